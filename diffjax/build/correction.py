"""What EMD's chain does to the samples of its generator: the before and after of the paper's figure 1 (Xie 2024).

A trained generator's samples g(z) are the start; after K joint steps over noise and latent (`methods.emd_chain`) the
chain's own noise is taken out, which leaves g(z^K) + sigma R^K: what the M-step would move the generator to. Weights are
those that were trained, not their average: the student score describes the former.

    run = load("runs/emd_digits/seed_0/emd_16")
    pair = correct(run, seed=0, sample_ids=range(16), batch_size=16)
"""

import functools
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffjax.build import emd_parts, networks, runs
from diffjax.core import rng, trees
from diffjax.core.types import Array, Denoiser
from diffjax.data import sources
from diffjax.methods import emd
from diffjax.methods.emd_chain import StepSizes, Weights, make_chain, noise_pair
from diffjax.runtime import checkpoint_read, configs, guards
from diffjax.sampling import generate

_SHOWN = 10  # seeds in a message


class EMDRun(NamedTuple):
    """All three networks of a run. denoise: of generator and student score. teacher_denoise: guided as in training."""

    config: ConfigDict
    settings: emd.Settings
    teacher_denoise: Denoiser
    denoise: Denoiser
    weights: Weights
    step: int
    data: sources.DataShape


class Pair(NamedTuple):
    """Images (n, H, W, C) float32 in about [-1, 1]: g(z), and g(z^K) + sigma R^K."""

    before: np.ndarray
    after: np.ndarray


def load(workdir: str | Path) -> EMDRun:
    """Teacher, student score and generator of the newest checkpoint of a run of EMD.

    Raises ValueError for a run of another method, without a trained score, or whose weights do not fit its config,
    checkpoint.CheckpointError where there is no checkpoint, or no teacher.
    """
    saved = configs.read(workdir) or {}
    method = saved.get("method", {})
    if saved and method.get("name") != "emd":
        raise ValueError(
            f"{workdir} is a run of method {method.get('name')!r}: only a run of 'emd' has a chain to correct with"
        )
    if method.get("student_score", "learned") != "learned":
        raise ValueError(
            f"{workdir} was trained with student_score={method['student_score']!r}, so that it has no student score, "
            "without which there is no chain: give a run with student_score='learned'"
        )
    (params, score), saved, step = checkpoint_read.load_parts(workdir, ("method/params", "method/score"))
    config = runs.resolve(ConfigDict(saved))
    data = networks.data_shape(config.data)
    denoise, init = networks.denoiser(config.model, data)
    expected = jax.eval_shape(init, jax.random.key(0))
    trees.check(expected, params, f"the generator in {workdir}")
    trees.check(expected, score, f"the student score in {workdir}")
    teacher = runs.load_run(config.method.teacher)
    weights = Weights(teacher.params, score, params)
    settings, guided = emd_parts.settings(config, data), emd_parts.guided_teacher(config, teacher)
    return EMDRun(config, settings, guided, denoise, weights, step, data)


def scheme(run: EMDRun) -> str:
    """The run's own scheme, eps_z where its latent is at rest."""
    own = run.settings.scheme
    return own if own in ("eps_z", "x_z") else "eps_z"


def correct(
    run: EMDRun, seed: int, sample_ids: Sequence[int], *, batch_size: int, langevin_steps: int = 300, sigma: float = 1.0,
    rates: StepSizes | None = None, labels: np.ndarray | None = None,
) -> Pair:  # fmt: skip
    """Samples before and after K = `langevin_steps` joint steps at noise level `sigma`, image i of (seed, sample_ids[i]).

    sigma: of the order of the data's spread (0.5) noise leaves the layout of an image and hides its detail, so that the
    chain may change both; much lower and images hardly move, much higher and every image may become any other.
    rates: the run's where not given. labels (n,) are drawn per sample where not given. Raises guards.NonFiniteError
    naming the seeds whose chain is not finite, ValueError for numbers that cannot be.
    """
    if langevin_steps < 1 or not sigma > 0 or batch_size < 1:
        raise ValueError(
            f"found langevin_steps={langevin_steps}, sigma={sigma}, batch_size={batch_size}: all must be positive"
        )
    rates = emd_parts.step_sizes(run.config.method) if rates is None else rates
    settings = run.settings
    network = settings.generator_sigma, settings.latent
    kind = scheme(run), settings.half_step, settings.sequential
    program = _program(run.teacher_denoise, run.denoise, run.data, langevin_steps, network, kind)
    ids, parts = np.asarray(sample_ids, np.uint32), []
    for start in range(0, len(ids), batch_size):
        # the last chunk is filled up with its last sample, so that one program serves all
        rows = np.minimum(np.arange(start, start + batch_size), len(ids) - 1)
        cond = {} if labels is None else {"label": jnp.asarray(np.asarray(labels)[rows], jnp.int32)}
        count = min(batch_size, len(ids) - start)
        pair = program(run.weights, np.uint32(seed), ids[rows], cond, sigma, rates)
        parts.append([np.asarray(part)[:count] for part in pair])
    before, after = (np.concatenate(part) for part in zip(*parts, strict=True))
    bad = ids[~np.isfinite(after).all(axis=(1, 2, 3))]
    if len(bad):
        raise guards.NonFiniteError(
            f"the chains of {len(bad)} of {len(ids)} samples are not finite after {langevin_steps} steps with "
            f"noise_step={rates.noise:g}, latent_step={rates.latent:g} at sigma={sigma:g}, those of seeds "
            f"{bad[:_SHOWN].tolist()} among them: lower --latent_step or --noise_step, or take a higher --sigma"
        )
    return Pair(before / run.data.scale, after / run.data.scale)


@functools.lru_cache(maxsize=16)  # compiled once for all noise levels and step sizes
def _program(
    teacher_denoise: Denoiser, denoise: Denoiser, data: sources.DataShape, langevin_steps: int,
    network: tuple[float, str], kind: tuple[str, bool, bool],
) -> Callable[..., Pair]:  # fmt: skip
    """(weights, seed, ids, cond, sigma, rates) -> Pair of one chunk; a chain that left the finite numbers is NaN."""
    g = emd.generator(denoise, *network)
    options = dict(zip(("scheme", "half_step", "sequential"), kind, strict=True))
    chain = make_chain(langevin_steps, teacher_denoise, denoise, g, **options)

    @jax.jit
    def program(weights: Weights, seed: Array, ids: Array, cond: dict, sigma: Array, rates: StepSizes) -> Pair:
        z = generate.initial_noise(seed, ids, data.shape)
        if data.num_classes and not cond:
            cond = {"label": generate.draw_labels(seed, ids, data.num_classes)}
        keys = rng.sample_keys(seed, ids)
        keys = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, zlib.crc32(b"correction"))), out_axes=1)(keys)
        eps, _ = noise_pair(keys[0], data.shape)
        end, _ = chain(weights, z, eps, jnp.full(len(ids), sigma, z.dtype), cond, keys[1], rates)
        finite = jnp.isfinite(end.eps + end.z + end.residual)
        after = g(weights.generator, end.z, cond) + sigma * end.residual
        return Pair(g(weights.generator, z, cond), jnp.where(finite, after, jnp.nan))

    return program
