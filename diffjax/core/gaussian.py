"""Exact denoisers of Gaussian data and Gaussian mixtures, for tests and demonstrations.

For x0 ~ N(mu, s^2 I) and x = x0 + sigma eps

    D(x, sigma) = (s^2 x + sigma^2 mu) / (s^2 + sigma^2),                                            (1)
    x(sigma) = mu + (x_T - mu) sqrt((s^2 + sigma^2) / (s^2 + sigma_T^2))   along the ODE,             (2)

and for the mixture sum_k w_k N(mu_k, s_k^2 I) in d dimensions D is the mean of (1) over k with weights

    softmax_k( log w_k - |x - mu_k|^2 / (2 (s_k^2 + sigma^2)) - d/2 log(s_k^2 + sigma^2) ).          (3)

Parameters are plain dicts, so these are `Denoiser`s like any network. All arithmetic is in the type of x.
"""

import jax
import jax.numpy as jnp

from diffjax.core.broadcast import per_sample
from diffjax.core.types import Array, Cond, Key, Params


def gaussian_denoiser(
    params: Params, x: Array, sigma: Array, cond: Cond | None = None, key: Key | None = None
) -> Array:
    """(1) for params {"mean": scalar or x.shape[1:], "std": scalar}; x (B, ...), sigma scalar or (B,)."""
    del cond, key
    mean = jnp.broadcast_to(params["mean"], x.shape[1:])[None]
    data, noise = jnp.square(params["std"]), jnp.square(per_sample(jnp.asarray(sigma, x.dtype), x))
    return ((data * x + noise * mean) / (data + noise)).astype(x.dtype)


def gaussian_solution(params: Params, x: Array, sigma_from: Array, sigma_to: Array) -> Array:
    """(2): the state at noise level `sigma_to` of the ODE path through x (B, ...) at `sigma_from`; levels as in (1)."""
    mean = jnp.broadcast_to(params["mean"], x.shape[1:])[None]
    data = jnp.square(params["std"])
    start, end = (jnp.square(per_sample(jnp.asarray(sigma, x.dtype), x)) for sigma in (sigma_from, sigma_to))
    return (mean + (x - mean) * jnp.sqrt((data + end) / (data + start))).astype(x.dtype)


def mixture_denoiser(
    params: Params, x: Array, sigma: Array, cond: Cond | None = None, key: Key | None = None
) -> Array:
    """(3) for params {"mean": (K, ...), "std": (K,), "weight": (K,)}; x (B, ...), sigma scalar or (B,)."""
    del cond, key
    weights, means = _posterior(params, x, sigma)
    return jnp.einsum("bk,bkd->bd", weights, means).reshape(x.shape).astype(x.dtype)


def mixture_sample(params: Params, key: Key, num: int) -> Array:
    """Draw (num, ...) clean samples of the mixture with the parameters of `mixture_denoiser`."""
    mean = params["mean"]
    pick, draw = jax.random.split(key)
    component = jax.random.categorical(pick, jnp.log(params["weight"]), shape=(num,))
    eps = jax.random.normal(draw, (num, *mean.shape[1:]), mean.dtype)
    return mean[component] + per_sample(params["std"][component], eps) * eps


def _posterior(params: Params, x: Array, sigma: Array) -> tuple[Array, Array]:
    """Weights (B, K) of (3) and the means (B, K, d) of (1) per component."""
    flat = x.reshape(x.shape[0], 1, -1)
    mean = params["mean"].reshape(1, params["mean"].shape[0], -1)
    data = jnp.square(params["std"])[None, :, None]
    noise = jnp.broadcast_to(jnp.square(jnp.asarray(sigma, x.dtype)), x.shape[:1])[:, None, None]
    total = data + noise  # (B, K, 1)
    distance = jnp.sum(jnp.square(flat - mean), axis=-1)
    logits = (
        jnp.log(params["weight"])[None]
        - distance / (2 * total[..., 0])
        - 0.5 * flat.shape[-1] * jnp.log(total[..., 0])
    )
    return jax.nn.softmax(logits, axis=-1), (data * flat + noise * mean) / total
