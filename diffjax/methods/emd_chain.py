"""The E-step of EM distillation (Xie et al., NeurIPS 2024, EMD): a short Langevin chain over noise and latent.

Sigma space: x = x0 + sigma eps. A generator g(z), z unit noise, and a noise level make the latent-variable model
q(x, z) = N(x; g(z), sigma^2 I) N(z; 0, I). The chain moves (x, z) from q towards rho = [p(x) / q(x)] q(x, z), p being
the teacher's density: what the posterior q(z | x) would be if x came from the teacher. Only the gap of the two scores
is needed, here as the gap of the denoised images of teacher and student score,

    gap = sigma (s_p - s_q)(x) = (D_p(x) - D_q(x)) / sigma                                              (1)

and J = dg/dz, by its vector-Jacobian product. In x = g(z) + sigma eps, with rates a for noise, b for latent,

    eps_z    eps <- (1 - a) eps + a gap + sqrt(2a) n        z <- (1 - b) z + b J'gap / sigma + sqrt(2b) n'   (2)
    x_z      x <- x + a (sigma gap - (x - g)) + sigma sqrt(2a) n                                        (3)
             z <- (1 - b) z + b J'(x - g) / sigma^2 + sqrt(2b) n'
    eps, x   the same with z at rest

The rate of x is a sigma^2, so that `x` is `eps` step by step; `x_z` is not `eps_z`: there x follows g(z), here it
stays and the noise absorbs what z does. Both right-hand sides see the old values (`sequential`: z sees the new eps).

The chain's own noise N <- (1 - a) N + sqrt(2a) n, N = eps at the start, is taken out of the result ("noise
cancellation", with its exact decay): the M-step regresses g(z) on x0 = g(z) + sigma R, where

    R = eps - N,   R <- (1 - a) R + a gap,   R = 0 at the start.                                        (4)

Noise rates are those of drift a grad log rho with noise sqrt(2a) ("A"); with `half_step` a/2 and sqrt(a) ("B").

    chain = make_chain(16, teacher_denoise, score_denoise, generate)
    end = chain(frozen, z, eps, sigma, cond, keys, StepSizes(0.16, 1.6e-5))     # keys (B,): one a sample
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from diffjax.core.broadcast import per_sample, squared_norm
from diffjax.core.types import Array, Cond, Denoiser, Key, Params

SCHEMES = ("eps_z", "eps", "x_z", "x")


class StepSizes(NamedTuple):
    """The rates a (`noise`) and b (`latent`) of eq. 2, scalars; they may be traced. Defaults: Xie 2024, table 7."""

    noise: Array | float = 0.4**2
    latent: Array | float = 0.004**2


class Weights(NamedTuple):
    """Parameters of the three networks; the chain reads them only."""

    teacher: Params
    score: Params
    generator: Params


class Generate(Protocol):
    """The generator g: unit noise z (B, ...) to images of the same shape, deterministic."""

    def __call__(self, params: Params, z: Array, cond: Cond) -> Array: ...


class Sample(NamedTuple):
    """The chain's state. eps, z, residual (B, ...): eq. 2 and 4."""

    eps: Array
    z: Array
    residual: Array


class Report(NamedTuple):
    """What a step saw, per sample (B,). gap: |gap| (L2, eq. 1). error: mean over pixels of |g(z) - D_p(x)|."""

    gap: Array
    error: Array


def make_step(
    teacher_denoise: Denoiser,
    score_denoise: Denoiser | None,
    generate: Generate,
    *,
    scheme: str = "eps_z",
    sequential: bool = False,
    half_step: bool = False,
) -> Callable[..., tuple[Sample, Report]]:
    """One Langevin step: step(weights, sample, sigma, cond, step_sizes, n_eps, n_z, key) -> (sample, report).

    sigma (B,) or scalar; n_eps, n_z unit noise (B, ...); `key` switches the same dropout on in both score networks,
    None = off. `score_denoise` None is the student whose density is a point, D_q = g(z) (score distillation, SDS).
    Raises ValueError for an unknown scheme.
    """
    check_scheme(scheme, sequential)

    def gap_at(weights: Weights, x: Array, y: Array, sigma: Array, cond: Cond, key: Key | None) -> tuple[Array, Array]:
        teacher = teacher_denoise(weights.teacher, x, sigma, cond, key)
        score = y if score_denoise is None else score_denoise(weights.score, x, sigma, cond, key)
        return (teacher - score) / per_sample(sigma, x), teacher

    def step(
        weights: Weights, sample: Sample, sigma: Array, cond: Cond, step_sizes: StepSizes, n_eps: Array, n_z: Array,
        key: Key | None = None,
    ) -> tuple[Sample, Report]:  # fmt: skip
        a, b = (rate / 2 if half_step else rate for rate in step_sizes)
        level = per_sample(sigma, sample.z)
        y, pull = jax.vjp(lambda z: generate(weights.generator, z, cond), sample.z)
        gap, teacher = gap_at(weights, y + level * sample.eps, y, sigma, cond, key)
        eps = (1 - a) * sample.eps + a * gap + jnp.sqrt(2 * a) * n_eps
        residual = (1 - a) * sample.residual + a * gap
        report = Report(jnp.sqrt(squared_norm(gap)), jnp.mean(jnp.abs(y - teacher), axis=tuple(range(1, y.ndim))))
        if scheme in ("eps", "x"):
            return Sample(eps, sample.z, residual), report
        seen = eps if sequential else sample.eps
        if scheme == "x_z":
            z = (1 - b) * sample.z + b * pull(seen / level)[0] + jnp.sqrt(2 * b) * n_z
            # x stays where it is: its noise, and what is left of it without the chain's own, absorb the move of g(z)
            move = (y - generate(weights.generator, z, cond)) / level
            return Sample(eps + move, z, residual + move), report
        if sequential:
            gap, _ = gap_at(weights, y + level * eps, y, sigma, cond, key)
        z = (1 - b) * sample.z + b * pull(gap / level)[0] + jnp.sqrt(2 * b) * n_z
        return Sample(eps, z, residual), report

    return step


def make_chain(
    num_steps: int, teacher_denoise: Denoiser, score_denoise: Denoiser | None, generate: Generate, *,
    scheme: str = "eps_z", unroll: int = 1, **options: bool,
) -> Callable[..., tuple[Sample, Report]]:  # fmt: skip
    """chain(weights, z, eps, sigma, cond, keys, step_sizes, dropout_key=None) -> (sample, report) after K = `num_steps`
    steps; scheme and options as `make_step`, `unroll` as in `jax.lax.scan`. K = 0 gives R = 0.

    keys (B,) make the noise, so a sample's chain does not depend on the batch around it. The report has means over the
    chain (0 for K = 0). Nothing is stacked and no gradient passes, so memory does not depend on K.
    """
    if num_steps < 0:
        raise ValueError(f"num_steps is the number of Langevin steps, found {num_steps}")
    check_scheme(scheme, options.get("sequential", False))

    def chain(
        weights: Weights, z: Array, eps: Array, sigma: Array, cond: Cond, keys: Key, step_sizes: StepSizes,
        dropout_key: Key | None = None,
    ) -> tuple[Sample, Report]:  # fmt: skip
        weights, z, eps = jax.lax.stop_gradient((weights, z, eps))
        moved = generate
        if scheme in ("eps", "x"):  # z is at rest: one call of g serves the whole chain
            y = generate(weights.generator, z, cond)
            moved = lambda params, z, cond: y  # noqa: E731
        step = make_step(teacher_denoise, score_denoise, moved, scheme=scheme, **options)

        def body(carry: tuple[Sample, Report], this: tuple[Array, Key]) -> tuple[tuple[Sample, Report], None]:
            sample, total = carry
            index, step_keys = this
            n_eps, n_z = noise_pair(step_keys, z.shape[1:], z.dtype)
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
            sample, report = step(weights, sample, sigma, cond, step_sizes, n_eps, n_z, key)
            return (sample, jax.tree.map(lambda sum, new: sum + new / num_steps, total, report)), None

        start = Sample(eps, z, jnp.zeros_like(eps)), Report(*[jnp.zeros(z.shape[:1], z.dtype)] * 2)
        steps = jnp.arange(num_steps), jax.vmap(lambda key: jax.random.split(key, num_steps), out_axes=1)(keys)
        (sample, report), _ = jax.lax.scan(body, start, steps, unroll=unroll)
        return jax.lax.stop_gradient((sample, report))

    return chain


def noise_pair(keys: Key, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> tuple[Array, Array]:
    """Two batches (B, *shape) of unit noise, sample i made of keys[i] alone."""
    pair = jax.vmap(lambda key: jax.random.normal(key, (2, *shape), dtype), out_axes=1)(keys)
    return pair[0], pair[1]


def decay(step_sizes: StepSizes, num_steps: int, half_step: bool = False) -> Array:
    """m = 1 - (1 - a)^K, the total weight of the gaps in R (eq. 4)."""
    a = step_sizes.noise / 2 if half_step else step_sizes.noise
    return 1 - (1 - a) ** num_steps


def check_scheme(scheme: str, sequential: bool) -> None:
    """Raises ValueError for an unknown scheme, or one in which `sequential` says nothing."""
    if scheme not in SCHEMES:
        raise ValueError(f"the scheme must be one of {SCHEMES}, found {scheme!r}")
    if sequential and scheme in ("eps", "x"):
        raise ValueError(f"sequential=True lets z see the new noise, and scheme={scheme!r} leaves z at rest")
