"""Training draws of the noise level, as functions of given unit randomness.

Each takes the random numbers themselves (`normal` or `uniform`, shape (B,)), so that a draw can be
compared with other code number by number; `draw` makes them from a key. All return sigma (B,).

    lognormal   log sigma ~ N(p_mean, p_std^2)                         Karras 2022, table 1
    vp          t uniform in [eps, 1], sigma^2 = exp(beta_d t^2 / 2 + beta_min t) - 1
    ve          log sigma uniform
    logit_normal, uniform_flow   t of the straight flow, sigma = t / (1 - t)    Esser 2024, section 3.1
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffjax.core.types import Array, Key


def lognormal(normal: Array, p_mean: float = -1.2, p_std: float = 1.2) -> Array:
    """sigma = exp(p_mean + p_std n), n unit normal."""
    return jnp.exp(p_mean + p_std * normal)


def vp(uniform: Array, beta_d: float = 19.9, beta_min: float = 0.1, epsilon_t: float = 1e-5) -> Array:
    """sigma of the VP process with linear beta at t = 1 + u (epsilon_t - 1)."""
    t = 1 + uniform * (epsilon_t - 1)
    return jnp.sqrt(jnp.expm1(beta_d * t**2 / 2 + beta_min * t))


def ve(uniform: Array, sigma_min: float = 0.02, sigma_max: float = 100.0) -> Array:
    """sigma = sigma_min (sigma_max / sigma_min)^u."""
    return sigma_min * (sigma_max / sigma_min) ** uniform


def logit_normal(normal: Array, mean: float = 0.0, std: float = 1.0) -> Array:
    """t = sigmoid(mean + std n), so sigma = t / (1 - t) = exp(mean + std n): the lognormal of the flow."""
    return jnp.exp(mean + std * normal)


def uniform_flow(uniform: Array, epsilon: float = 1e-4) -> Array:
    """t uniform in [epsilon, 1 - epsilon]: sigma is unbounded at t = 1."""
    t = epsilon + uniform * (1 - 2 * epsilon)
    return t / (1 - t)


# name -> (draw from unit randomness, that randomness)
DISTRIBUTIONS: dict[str, tuple[Callable[..., Array], Callable[..., Array]]] = {
    "lognormal": (lognormal, jax.random.normal),
    "vp": (vp, jax.random.uniform),
    "ve": (ve, jax.random.uniform),
    "logit_normal": (logit_normal, jax.random.normal),
    "uniform_flow": (uniform_flow, jax.random.uniform),
}


def draw(key: Key, num: int, name: str, **options: float) -> Array:
    """`num` levels of the distribution `name`, float32 (num,)."""
    if name not in DISTRIBUTIONS:
        raise ValueError(f"unknown noise distribution {name!r}, expected one of {sorted(DISTRIBUTIONS)}")
    levels, randomness = DISTRIBUTIONS[name]
    return levels(randomness(key, (num,), jnp.float32), **options)
