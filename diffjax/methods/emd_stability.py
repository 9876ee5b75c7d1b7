"""Whether the step sizes of EMD's chain are stable: the largest eigenvalue of Gamma Lambda.

Near a point the chain of `emd_chain` without its noise is the linear map I - Gamma Lambda of its coordinates (u, z): Gamma
= diag(a, b) are its rates, Lambda minus the Jacobian of its drift, for Gaussians the precision of what it samples. u is the
noise eps, and x / sigma for the schemes x and x_z, in which x stays where it is when z moves. The chain converges where

    every eigenvalue of Gamma Lambda is below 2,                                                          (1)

and diverges otherwise. In x_z the precision of z is I + J'J / sigma^2, J = dg/dz, so that b must fall with sigma^2, where
that of eps_z stays of order one. The eigenvalue is found by power iteration on Gamma^(1/2) Lambda Gamma^(1/2), which is
similar and symmetric (of exact scores), so that the estimate comes from below and is good to the square of the vector's
error; it needs Jacobian-vector products of one step only. With `sequential` the map is not quite (1)'s.

    eigenvalues = make_eigenvalues(teacher_denoise, score_denoise, generate, scheme="x_z")
    found = jax.jit(eigenvalues)(weights, z, eps, sigma, cond, StepSizes(0.16, 1.6e-5), key)
    most = largest_stable(found, StepSizes(0.16, 1.6e-5))
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.broadcast import per_sample, squared_norm
from diffjax.core.types import Array, Cond, Denoiser, Key
from diffjax.methods.emd_chain import Generate, Sample, StepSizes, Weights, make_step

LIMIT = 2.0  # eq. 1


class Eigenvalues(NamedTuple):
    """Largest absolute eigenvalue of Gamma Lambda at each sample, (B,): of both blocks, of that of the noise alone (b = 0)
    and that of the latent alone (a = 0); with exact scores both <= noise + latent."""

    both: Array
    noise: Array
    latent: Array


def make_eigenvalues(
    teacher_denoise: Denoiser, score_denoise: Denoiser | None, generate: Generate, *, scheme: str = "eps_z",
    num_iterations: int = 16, **options: bool,
) -> Callable[..., Eigenvalues]:  # fmt: skip
    """eigenvalues(weights, z, eps, sigma, cond, step_sizes, key) -> Eigenvalues at the points (z, eps), unit noise (B, ...).

    Networks, scheme and options as in `emd_chain.make_step`, which raises ValueError for a scheme that does not exist;
    sigma (B,) or scalar; key: of the first vector. 3 num_iterations products with the Jacobian of a step.
    """
    step = make_step(teacher_denoise, score_denoise, generate, scheme=scheme, **options)

    def eigenvalues(
        weights: Weights, z: Array, eps: Array, sigma: Array, cond: Cond, step_sizes: StepSizes, key: Key
    ) -> Eigenvalues:
        level, still = per_sample(sigma, z), jnp.zeros_like(z)

        def image(z: Array) -> Array:
            return generate(weights.generator, z, cond) / level if scheme == "x_z" else still

        def top(rates: StepSizes) -> Array:
            def move(u: Array, z: Array) -> tuple[Array, Array]:
                end, _ = step(weights, Sample(u - image(z), z, still), sigma, cond, rates, still, still)
                return end.eps + image(end.z), end.z

            def multiply(carry: tuple, _: None) -> tuple[tuple, None]:
                vector, _ = carry
                tangent = tuple(jnp.sqrt(rate) * part for rate, part in zip(rates, vector, strict=True))
                _, moved = jax.jvp(move, (eps + image(z), z), tangent)
                result = tuple(
                    (before - after) / jnp.where(rate > 0, jnp.sqrt(rate), 1.0)  # 0 / 1 where the rate is 0
                    for rate, before, after in zip(rates, tangent, moved, strict=True)
                )
                return _normalise(result), None

            start = _normalise(tuple(jax.random.normal(key, (2, *z.shape), z.dtype)))
            return jax.lax.scan(multiply, start, length=num_iterations)[0][1]

        a, b = (jnp.asarray(rate, z.dtype) for rate in step_sizes)
        b = b * (scheme not in ("eps", "x"))  # z is at rest there
        return Eigenvalues(*jax.lax.map(top, StepSizes(jnp.stack([a, a, 0 * a]), jnp.stack([b, 0 * b, b]))))

    return eigenvalues


def largest_stable(found: Eigenvalues, step_sizes: StepSizes) -> StepSizes:
    """Step sizes that are stable at all samples, by the bound noise + latent: the one with the larger eigenvalue lowered
    on its own, as little as that allows, where this is enough; else both times one factor, 2 / the largest eigenvalue."""
    both, noise, latent = (np.asarray(part, np.float64) for part in found)
    a, b = (float(rate) for rate in step_sizes)
    if np.max(noise) < min(LIMIT, np.max(latent)):
        return StepSizes(a, b * float(np.min((LIMIT - noise) / latent)))
    if np.max(latent) < min(LIMIT, np.max(noise)):
        return StepSizes(a * float(np.min((LIMIT - latent) / noise)), b)
    return StepSizes(a * LIMIT / float(np.max(both)), b * LIMIT / float(np.max(both)))


def _normalise(vector: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
    """The vector (B, ...), (B, ...) at length 1, and what its length was, (B,)."""
    length = jnp.sqrt(sum(map(squared_norm, vector)))
    return tuple(part / per_sample(jnp.maximum(length, 1e-30), part) for part in vector), length
