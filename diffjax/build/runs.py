"""Finished runs: loaded, with the plan they sample with, and sampled from seeds."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from diffjax.build import networks
from diffjax.core import grids, guidance, solvers, trees
from diffjax.core.types import Denoiser, Params
from diffjax.data import sources
from diffjax.methods import amed, emd
from diffjax.models import amed_predictor
from diffjax.nn import functional
from diffjax.runtime import checkpoint, configs
from diffjax.sampling import amed_sampler, few_step, generate, gits
from diffjax.sampling.sample import sample as follow_plan

_SOLVER_FREE = ("guidance_scale", "batch_size")  # keys of a `sample` section that are not the plan's
_GITS_LEVELS, _GITS_SAMPLES = 61, 256  # teacher levels and warm-up samples, as published


class Run(NamedTuple):
    """A network with weights: what sampling, evaluation and distillation need of a finished run.

    params: all that `sampler` takes. sampler: with the signature of `sampling.sample.sample`. null_class: whether
    the network was trained without labels too, so that it can be guided.
    """

    config: ConfigDict
    denoise: Denoiser
    params: Params
    step: int
    data: sources.DataShape
    sampler: Callable = follow_plan
    null_class: bool = False


def load_run(workdir: str | Path) -> Run:
    """The newest checkpoint of a run folder, the average of the weights where there is one.

    Raises checkpoint.CheckpointError where there is none, ValueError where its weights do not fit its config.
    """
    params, saved, at = checkpoint.load_params(workdir, ema=None)
    config = resolve(ConfigDict(saved))
    shape = networks.data_shape(config.data)
    null_class = config.method.get("label_dropout", 0) > 0 or config.data.get("null_class", False)
    what = f"the checkpoint in {workdir}"
    if config.method.get("name") == "amed":
        teacher = load_run(config.method.teacher)
        sampler, init = amed_parts(config, shape)
        trees.check(jax.eval_shape(init, jax.random.key(0)), params, what)
        params = {"teacher": teacher.params, "predictor": params}
        return Run(config, teacher.denoise, params, at, shape, sampler, null_class)
    denoise, init = networks.denoiser(config.model, shape)
    trees.check(jax.eval_shape(init, jax.random.key(0)), params, what)
    return Run(config, denoise, params, at, shape, null_class=null_class)


def resolve(config: ConfigDict) -> ConfigDict:
    """A copy of `config` whose sections "teacher" are written out, so that the run does without its teacher.

    config.model = {"name": "teacher", ...}: the teacher's network, with these options changed. config.data "none" and
    {"name": "teacher", ...}: the teacher's image shape, or its data with these options changed. Raises CheckpointError for a teacher that is no run.
    """
    config = ConfigDict(config.to_dict())
    if config.get("model", {}).get("name") != "teacher":
        return config
    saved = configs.read(config.method.teacher)
    if saved is None:
        raise checkpoint.CheckpointError(
            f"config.method.teacher = {config.method.teacher!r} holds no run: train it first, or give another folder"
        )
    teacher = resolve(ConfigDict(saved))
    changes = {key: value for key, value in config.model.items() if key != "name"}
    config.model = {**teacher.model.to_dict(), **changes}
    data, changes = teacher.data.to_dict(), config.data.to_dict()
    if changes["name"] == "teacher":
        changes.pop("name")
    else:
        data = {key: data[key] for key in ("image_size", "channels", "num_classes", "null_class") if key in data}
    data |= changes
    if teacher.method.get("label_dropout", 0) > 0:
        data["null_class"] = True
    config.data = data
    return config


# Plans ---------------------------------------------------------------------------------------------------------


def plan(sample: Mapping[str, Any]) -> solvers.Plan:
    """The plan of a `sample` section: {solver, num_steps (noise levels), grid, sigma_min, sigma_max, rho, order, afs,
    parity} and the solver's own options; Heun and the stochastic solver end with a plain step to sigma = 0."""
    options = {key: value for key, value in sample.items() if key not in _SOLVER_FREE}
    grid, num, rho = options.pop("grid", "polynomial"), options.pop("num_steps"), options.pop("rho", 7.0)
    sigmas = few_step.student_grid(num, options.pop("sigma_min"), options.pop("sigma_max"), grid=grid, rho=rho)
    return _on_levels(sigmas, options)


def _on_levels(sigmas: np.ndarray, options: dict[str, Any]) -> solvers.Plan:
    if options.pop("to_zero", False):
        sigmas = grids.append_zero(sigmas)
    return solvers.make_plan(options.pop("solver"), sigmas, order=options.pop("order", 0) or None, **options)


def run_plan(run: Run, **overrides: Any) -> solvers.Plan | amed_sampler.AmedPlan:
    """The plan a run samples with: its `sample` section with `overrides`, or a student's own steps.

    A student takes the override num_steps only: one of the numbers it was trained for, or any where it is not told.
    grid="gits" searches the noise levels for this network and num_steps (Chen 2024, GITS).
    """
    overrides = {key: value for key, value in overrides.items() if value is not None}
    if "sample" in run.config:
        section = {**run.config.sample, **overrides}
        return _searched_plan(run, section) if section.get("grid") == "gits" else plan(section)
    others = sorted(set(overrides) - {"num_steps"})
    if others:
        raise ValueError(f"a student samples as it was trained; found {others}: leave them out")
    return student_plan(run.config.method, **overrides)


def student_plan(
    method: Mapping[str, Any], num_steps: int | None = None
) -> solvers.Plan | amed_sampler.AmedPlan:
    """The steps of the student that a `method` section trains: by default for the first N of its list.

    Raises ValueError for an N that a student with a step condition never was trained for.
    """
    trained = trained_steps(method)
    num = trained[0] if num_steps is None else num_steps
    if method["name"] == "emd":
        if num != 2:
            raise ValueError(f"found num_steps={num}, and this generator makes one step, of 2 levels: leave it out")
        return solvers.make_plan("euler", np.array([method.get("generator_sigma", 5.0), 0.0]))
    told = method.get("step_condition", "") or method["name"] == "amed"
    if told and num not in trained:
        raise ValueError(f"found num_steps={num}, and this student was trained for num_steps in {trained} and told so")
    if method["name"] == "amed":
        own = {key: value for key, value in method.items() if key not in ("name", "teacher")}
        return amed.make_plan(amed.Settings(**own, batch_size=1, image_shape=(1,)))
    levels = {key: method[key] for key in ("grid", "rho") if key in method}
    ends = method.get("sigma_min", 0.006), method.get("sigma_max", 80.0)
    return few_step.student_plan(num, *ends, afs=method.get("afs", method["name"] == "sfd"), **levels)


def trained_steps(method: Mapping[str, Any]) -> tuple[int, ...]:
    """The N of a `method` section: a number, or a list of them."""
    if method["name"] == "emd":
        return (2,)
    num = method["num_steps"]
    return (num,) if isinstance(num, int) else tuple(num)


def sampling_denoiser(run: Run, plan: solvers.Plan) -> Denoiser:
    """The network of `run` as it is called along `plan`: a student with a step condition is told it, a generator has
    its own input."""
    if run.config.method.get("latent") == "unit":
        sigma = float(plan.sigmas[0])
        return _scaled(run.denoise, emd.latent_scale(sigma, "unit") / sigma)
    kind = run.config.method.get("step_condition", "")
    return _conditioned(run.denoise, kind, tuple(np.asarray(plan.sigmas).tolist())) if kind else run.denoise


@functools.lru_cache(maxsize=64)
def _conditioned(denoise: Denoiser, kind: str, sigmas: tuple[float, ...]) -> Denoiser:
    # the same function for the same plan: programs are cached by it
    return few_step.with_step_condition(denoise, kind, np.asarray(sigmas))


@functools.lru_cache(maxsize=64)
def _scaled(denoise: Denoiser, scale: float) -> Denoiser:
    return lambda params, x, sigma, cond=None, key=None: denoise(params, scale * x, sigma, cond, key)


def _searched_plan(run: Run, section: dict[str, Any]) -> solvers.Plan:
    options = {key: value for key, value in section.items() if key not in (*_SOLVER_FREE, "grid", "rho")}
    ends = options.pop("sigma_min"), options.pop("sigma_max")
    # the noise and classes of these samples are those of no seed that a user would take
    ids, seed = np.arange(_GITS_SAMPLES), 2**32 - 1
    x = generate.initial_noise(seed, ids, run.data.shape) * ends[1]
    cond = {"label": generate.draw_labels(seed, ids, run.data.num_classes)} if run.data.num_classes else {}
    teacher = grids.make_grid("polynomial", _GITS_LEVELS, *ends)
    # one matrix serves every number of steps; it is kept with the weights it belongs to, for one network at a time
    if not _searched or _searched[0] is not run.params or _searched[1] != ends:
        matrix = gits.cost_matrix(run.denoise, run.params, x, teacher, cond, batch_size=64)
        _searched[:] = [run.params, ends, matrix]
    return _on_levels(teacher[gits.shortest_path(_searched[2], options.pop("num_steps"))], options)


_searched: list[Any] = []  # parameters, (sigma_min, sigma_max), cost matrix


# Samples -------------------------------------------------------------------------------------------------------


def draw(
    run: Run,
    plan: solvers.Plan | amed_sampler.AmedPlan,
    seed: int,
    sample_ids: Sequence[int],
    *,
    batch_size: int,
    labels: np.ndarray | None = None,
    guidance_scale: float | None = None,
) -> np.ndarray:
    """Images (n, H, W, C) float32 in about [-1, 1], image i made of (seed, sample_ids[i]) alone.

    labels (n,) are drawn per sample where not given. A guidance-distilled student is told the scale, others are
    guided by two calls. Raises ValueError for guidance of a network that was trained without a null class.
    """
    cond = {} if labels is None else {"label": np.asarray(labels)}
    told = run.config.model.get("guidance_condition", False)
    if told:
        scale = 1.0 if guidance_scale is None else guidance_scale
        cond["guidance_scale"] = np.full(len(sample_ids), scale, np.float32)
    elif guidance_scale is not None:
        check_guidance(run, guidance_scale)
    guided = guidance_scale is not None and not told
    return generate.generate(
        sampling_denoiser(run, plan),
        run.params,
        plan,
        list(sample_ids),
        run.data.shape,
        batch_size=batch_size,
        seed=seed,
        cond=cond,
        num_classes=run.data.num_classes or None,
        guidance_scale=guidance_scale if guided else None,
        uncond=uncond(run.data.num_classes) if guided else None,
        sampler=run.sampler,
    )


def check_guidance(run: Run, guidance_scale: float) -> None:
    """Raises ValueError for a network that cannot be guided: trained without a null class."""
    if not run.null_class:
        raise ValueError(
            f"guidance_scale={guidance_scale} needs a null class and this run was trained without one: train "
            "with config.method.label_dropout > 0, or leave guidance_scale out"
        )


@functools.cache
def uncond(num_classes: int) -> guidance.Uncond:
    """From labels to the null class, the same function for the same number of classes."""
    return functools.partial(guidance.null_label, num_classes=num_classes)


def amed_parts(config: ConfigDict, shape: sources.DataShape) -> tuple[Callable, Callable]:
    """(sampler, init) of AMED: its sampler, and the fresh parameters of its predictor."""
    features, predict, init = amed_functions(config, shape)
    return amed_sampler.make_sampler(features, predict), init


def amed_functions(config: ConfigDict, shape: sources.DataShape) -> tuple[Callable, Callable, Callable]:
    """(features, predict, init): the bottleneck of the teacher, the predictor on it, its fresh parameters."""
    features, width = networks.features(config.model, shape)
    predict, init = functional.functionalize(lambda rngs: amed_predictor.AmedPredictor(width, rngs=rngs))
    return features, predict, init
