"""The check of EMD's step sizes before training: where the chain would diverge, and what to type instead."""

import dataclasses
from math import floor, log10

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from diffjax.core import noise_levels, rng
from diffjax.core.types import Denoiser, Params
from diffjax.methods import emd, emd_stability
from diffjax.methods.emd_chain import StepSizes, Weights

_QUANTILES = (0.05, 0.5, 0.95)
_SAMPLES = 4  # at each level


def warning(
    settings: emd.Settings, teacher_denoise: Denoiser, denoise: Denoiser, teacher: Params, student: Params,
    step_sizes: StepSizes,
) -> str:  # fmt: skip
    """What is wrong with the step sizes for a student at its first weights, "" where the chain is stable there.

    At the noise levels that 5, 50 and 95 % of the draws are below; some dozen Jacobian-vector products on a dozen
    samples. The student score is the teacher still, so that without guidance only the generator is seen: what goes wrong
    in x_z at low noise, or rates above 2. Samples are the same whatever the run's seed.
    """
    sigmas = levels(settings)
    learned = settings.student_score == "learned"
    eigenvalues = emd_stability.make_eigenvalues(
        teacher_denoise, denoise if learned else None,
        emd.generator(denoise, settings.generator_sigma, settings.latent), scheme=settings.scheme,
        sequential=settings.sequential, half_step=settings.half_step,
    )  # fmt: skip
    few = dataclasses.replace(settings, batch_size=_SAMPLES * len(sigmas))
    z, eps, _, cond, _ = emd.draw(few, rng.stream(0, "step_sizes"))
    weights = Weights(teacher, student if learned else {}, student)
    sigma = jnp.asarray(np.repeat(sigmas, _SAMPLES), jnp.float32)
    found = jax.jit(eigenvalues)(weights, z, eps, sigma, cond, step_sizes, rng.stream(1, "step_sizes"))
    found = jax.tree.map(np.asarray, found)
    return "" if np.max(found.both) <= emd_stability.LIMIT else _text(settings.scheme, sigmas, found, step_sizes)


def levels(settings: emd.Settings) -> np.ndarray:
    """Quantiles of the noise levels of the E-step, increasing."""
    name, options = emd.chain_distribution(settings)
    level, randomness = noise_levels.DISTRIBUTIONS[name]
    quantiles = np.asarray(_QUANTILES)
    drawn = special.ndtri(quantiles) if randomness is jax.random.normal else quantiles
    return np.sort(np.asarray(level(jnp.asarray(drawn, jnp.float32), **options)))


def _text(scheme: str, sigmas: np.ndarray, found: emd_stability.Eigenvalues, step_sizes: StepSizes) -> str:
    worst = found.both.reshape(len(sigmas), -1).max(axis=1)
    listing = ", ".join(f"{value:.3g} at sigma {sigma:.2g}" for value, sigma in zip(worst, sigmas, strict=True))
    most = emd_stability.largest_stable(found, step_sizes)
    limits, typed = [], []
    for name, now, limit in zip(("noise_step", "latent_step"), step_sizes, most, strict=True):
        if limit < float(now):
            limits.append(f"{name} {_rounded_down(limit)}")
            typed.append(f"--config.method.{name}={_rounded_down(limit / 2)}")
    other = "--config.method.scheme=eps_z, whose limit does not fall with sigma, or " if scheme == "x_z" else ""
    return (
        f"WARNING: the chain of scheme {scheme} diverges with noise_step {float(step_sizes.noise):.3g}, latent_step "
        f"{float(step_sizes.latent):.3g}: the largest eigenvalue of its step is {listing}, and it must be below 2 at all of "
        f"them. It is stable up to {' and '.join(limits)}: type {' '.join(typed)} (half of it), {other}"
        "--config.method.check_step_sizes=False to go without this check"
    )


def _rounded_down(value: float) -> str:
    """Two digits, never above `value`."""
    digit = 10.0 ** (floor(log10(value)) - 1)
    return f"{floor(value / digit) * digit:.2g}"
