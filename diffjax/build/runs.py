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

from diffjax.build import companions, networks, planned, rescaling
from diffjax.core import grids, guidance, names, schedules, solvers
from diffjax.core.types import Array, Denoiser, Params
from diffjax.data import sources
from diffjax.methods import amed, emd
from diffjax.models import amed_predictor
from diffjax.nn import functional
from diffjax.runtime import checkpoint
from diffjax.sampling import adaptive, amed_sampler, few_step, generate, gits, learned_variance
from diffjax.sampling.sample import sample as follow_plan

_SOLVER_FREE = ("guidance_scale", "batch_size")  # keys of a `sample` section that are not the plan's
_FIXED_LEVELS = ("num_steps", "grid", "process", "rho", "to_zero", "order", "afs", "parity")  # not of an adaptive plan
_MIDDLE = (0.821,)  # where a consistency function's second call starts; Song & Dhariwal 2023
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


def load_run(workdir: str | Path, step: int | None = None) -> Run:
    """The newest checkpoint of a run folder, or that of `step`; the average of the weights where there is one.

    Raises checkpoint.CheckpointError where there is none, ValueError where its weights do not fit its config, and for a
    classifier.
    """
    params, saved, at = planned.read(workdir, step)
    config = resolve(ConfigDict(saved))
    shape = networks.data_shape(config.data)
    if config.method.get("name") == "classify":
        raise ValueError(
            f"{workdir} holds a classifier, which draws no samples: give it as the weights of the feature space "
            "'classifier'"
        )
    null_class = config.method.get("label_dropout", 0) > 0 or config.data.get("null_class", False)
    what = f"the checkpoint in {workdir}"
    if config.method.get("name") == "amed":
        teacher = load_run(config.method.teacher)
        sampler, init = amed_parts(config, shape)
        params = {"teacher": teacher.params, "predictor": planned.checked(init, params, what)}
        return Run(config, teacher.denoise, params, at, shape, sampler, null_class)
    denoise, init = networks.denoiser(config.model, shape)
    params = planned.checked(init, params, what)
    return Run(config, denoise, params, at, shape, run_sampler(config.model, shape), null_class)


def resolve(config: ConfigDict) -> ConfigDict:
    """A copy of `config` whose sections "teacher" are written out, so that the run does without its teacher.

    config.model = {"name": "teacher", ...}: the teacher's network, with these options changed; of a run that goes on from
    method.start, that run's. config.data "none" and {"name": "teacher", ...}: the teacher's image shape, or its data with
    these options changed. What follows model.resolution_scale is written out too, see `rescaling`. Raises CheckpointError
    for a teacher that is no run, ValueError as `rescaling.follow`.
    """
    config = ConfigDict(config.to_dict())
    if config.get("model", {}).get("name") != "teacher":
        return rescaling.follow(config)
    key = "teacher" if "teacher" in config.method else "start"
    saved = planned.config_of(config.method[key])
    if saved is None:
        raise checkpoint.CheckpointError(
            f"config.method.{key} = {config.method[key]!r} holds no run: train it first, or give another folder"
        )
    teacher = resolve(ConfigDict(saved))
    changes = {key: value for key, value in config.model.items() if key != "name"}
    config.model = {**teacher.model.to_dict(), **changes}
    data, changes = teacher.data.to_dict(), config.data.to_dict()
    if changes["name"] == "teacher":
        changes.pop("name")
    else:
        kept = ("image_size", "channels", "num_classes", "null_class", "image_scale", "companions")
        data = {key: data[key] for key in kept if key in data}
    data |= changes
    if teacher.method.get("label_dropout", 0) > 0:
        data["null_class"] = True
    config.data = data
    return rescaling.follow(config)


# Plans ---------------------------------------------------------------------------------------------------------


def plan(sample: Mapping[str, Any]) -> solvers.Plan | adaptive.AdaptivePlan:
    """The plan of a `sample` section: {solver, num_steps (noise levels), grid, sigma_min, sigma_max, rho, order, afs,
    parity} and the solver's own options; grid "discrete" is uniform in the time of `process`, a key of
    schedules.PROCESSES. Heun and the stochastic solver end with a plain step to sigma = 0. {solver: dopri5, sigma_min,
    sigma_max, rtol, atol} chooses its levels as it goes; {solver: ancestral, variance: learned} has the network's own.
    """
    options, scale = rescaling.sample_options({key: value for key, value in sample.items() if key not in _SOLVER_FREE})
    if options["solver"] == "dopri5":
        options = {key: value for key, value in options.items() if key not in ("solver", *_FIXED_LEVELS)}
        names.check_options(adaptive.make_plan, options, "sample")
        return adaptive.make_plan(**options)
    grid, num, rho = options.pop("grid", "polynomial"), options.pop("num_steps"), options.pop("rho", 7.0)
    maps = grid_options({"grid": grid, "process": options.pop("process", ""), "resolution_scale": scale})
    rho = 1.0 if maps else rho
    learned = options["solver"] == "ancestral" and options.get("variance") == "learned"
    sigmas = few_step.student_grid(num, options.pop("sigma_min"), options.pop("sigma_max"), grid=grid, rho=rho, **maps)
    if learned:
        return learned_variance.make_plan(grids.append_zero(sigmas))
    return _on_levels(sigmas, options)


def grid_options(section: Mapping[str, Any]) -> dict[str, Callable]:
    """The maps of a grid that is uniform in the time of section["process"], {} for other grids. Raises ValueError where
    only one of both is named."""
    if (section.get("grid") == "discrete") != bool(section.get("process")):
        raise ValueError(
            f"process names the noise process in whose time the grid 'discrete' is uniform; found grid={section.get('grid')!r}"
            f" and process={section.get('process')!r}: set both, or none"
        )
    if not section.get("process"):
        return {}
    process = schedules.named(section["process"], section.get("resolution_scale", 1.0))
    return {"sigma_to_time": process.time, "time_to_sigma": process.level}


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
        return solvers.make_plan("euler", np.array([method.get("generator_sigma", emd.Settings.generator_sigma), 0.0]))
    if method["name"] == "consistency":
        middle = tuple(method.get("middle_levels", _MIDDLE))
        if not 2 <= num <= 2 + len(middle):
            raise ValueError(
                f"found num_steps={num}; a consistency function starts anew at most at {middle}: take 2 for one call, "
                "or give more of method.middle_levels"
            )
        ends = method.get("sigma_max", 80.0), method.get("sigma_min", 0.002)
        return solvers.make_plan("consistency", np.array([ends[0], *middle[: num - 2], 0.0]), epsilon=ends[1])
    told = method.get("step_condition", "") or method["name"] == "amed"
    if told and num not in trained:
        raise ValueError(f"found num_steps={num}, and this student was trained for num_steps in {trained} and told so")
    if method["name"] == "amed":
        own = {key: value for key, value in method.items() if key not in ("name", "teacher")}
        return amed.make_plan(amed.Settings(**own, batch_size=1, image_shape=(1,)))
    levels = {key: method[key] for key in ("grid", "rho") if key in method}
    ends = method.get("sigma_min", 0.006), method.get("sigma_max", 80.0)
    levels |= grid_options(method)
    return few_step.student_plan(num, *ends, afs=method.get("afs", method["name"] == "sfd"), **levels)


def trained_steps(method: Mapping[str, Any]) -> tuple[int, ...]:
    """The N of a `method` section: a number, or a list of them."""
    if method["name"] in ("emd", "consistency"):
        return (2,)
    num = method["num_steps"]
    return (num,) if isinstance(num, int) else tuple(num)


def run_sampler(model: Mapping[str, Any], data: sources.DataShape) -> Callable:
    """What follows the plans of a `model` section's network: its own variance may be one of them."""
    variance = networks.variance_denoiser(model, data)
    return follow_plan if variance is None else learned_variance.make_sampler(variance)


def sampler_for(plan: Any, sampler: Callable = follow_plan) -> Callable:
    """What follows `plan`: `sampler`, but for adaptive plans."""
    return adaptive.sample if isinstance(plan, adaptive.AdaptivePlan) else sampler


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
    options, _ = rescaling.sample_options({k: v for k, v in section.items() if k not in (*_SOLVER_FREE, "grid", "rho")})
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
    prompts: Sequence[str] | None = None,
    negative_prompt: str = "",
    guidance_scale: float | None = None,
    guidance_channels: int = 0,
    guidance_power: float | None = None,
    control_strength: float | None = None,
    metadata: Mapping[str, float] = {},
    mesh: jax.sharding.Mesh | None = None,
) -> np.ndarray:
    """Images (n, H, W, C) float32 in about [-1, 1], image i made of (seed, sample_ids[i]) alone.

    labels (n,) are drawn per sample where not given; prompts: a text a sample, of a run whose config.data.companions
    has a text encoder. A guidance-distilled student is told the scale, others are guided by two calls, away from the
    null class or from negative_prompt: guidance_channels of the first channels, 0 = all, and with guidance_power by a
    scale that rises from 1 at the first noise level, `guidance.power_cosine`. A network that is told sizes, crops and
    flips is told those of whole pictures, or `metadata`; guidance leads away from them too where they were dropped in
    training, by control_strength if given, see `guidance.two_strengths`. mesh splits batches over its devices.
    Latents are decoded. Raises ValueError for guidance of a network that was trained without a null class, and for
    prompts that are missing or too many.
    """
    beside, count = run_companions(run), len(sample_ids)
    pixels = run.data.image_size * (1 if beside is None else beside.factor)
    cond = {} if labels is None else {"label": np.asarray(labels)}
    texts = companions.conditions(beside, prompts, negative_prompt, count)
    cond |= texts | companions.metadata(run.config.model, pixels, count, metadata)
    if beside is not None:
        cond |= companions.controls(run.config.model, pixels, count)
    guided = {"guidance_scale": guidance_scale, "guidance_channels": guidance_channels, "control_strength": control_strength}
    if run.config.model.get("guidance_condition", False):
        scale = 1.0 if guidance_scale is None else guidance_scale
        cond["guidance_scale"], guided["guidance_scale"] = np.full(count, scale, np.float32), None
    elif guidance_scale is not None:
        guided |= {"uncond": _null(run, bool(texts), guidance_scale, control_strength)}
        guided |= {"guidance_curve": _power_cosine(run.config, guidance_power)}
    images = generate.generate(
        sampling_denoiser(run, plan),
        run.params,
        plan,
        list(sample_ids),
        run.data.shape,
        batch_size=batch_size,
        seed=seed,
        cond=cond,
        num_classes=run.data.num_classes or None,
        sampler=sampler_for(plan, run.sampler),
        mesh=mesh,
        **guided,
    )
    if beside is not None and beside.autoencoder is not None:
        return beside.pictures(images)
    return images if run.data.scale == 1 else images / np.float32(run.data.scale)


def _null(run: Run, has_texts: bool, guidance_scale: float, control_strength: float | None) -> guidance.Uncond:
    """What guidance leads away from: the negative text or null class, without control metadata too where the network was
    trained so and both have one strength. Raises ValueError for a network that was not trained so."""
    if not has_texts:
        check_guidance(run, guidance_scale)
    null = guidance.negative if has_texts else uncond(run.data.num_classes)
    drops_control = run.config.method.get("control_dropout", 0) > 0
    if control_strength is not None and not drops_control:
        raise ValueError("control_strength needs a run trained with config.method.control_dropout > 0: leave it out")
    return _without_control(null) if drops_control and control_strength is None else null


@functools.cache
def _without_control(null: guidance.Uncond) -> guidance.Uncond:
    """`null`, and no control metadata; the same function for the same one."""
    return lambda cond: guidance.null_control(null(cond))


def _power_cosine(config: ConfigDict, power: float | None) -> Callable[[Array, Array], Array] | None:
    """guidance_scale of (its greatest value, sigma), None without a power. Raises ValueError for a network without a
    process: its noise levels have no times."""
    process = config.model.get("process", "")
    if power is None:
        return None
    if not process:
        raise ValueError("guidance_power is of networks with model.process, whose noise levels have times: leave it out")
    return _curve(process, power, config.model.get("resolution_scale", 1.0))


@functools.cache
def _curve(process: str, power: float, resolution_scale: float) -> Callable[[Array, Array], Array]:
    # the same function for the same values: programs are cached by it
    schedule = schedules.named(process, resolution_scale)
    # of a table the index by their number, as published
    first = 1 / schedule.num if isinstance(schedule, schedules.Discrete) else 0.0
    return lambda scale, sigma: guidance.power_cosine(schedule.time(sigma) - first, scale, power)


def run_companions(run: Run) -> companions.Companions | None:
    """The text encoder and autoencoder of a run, None for one on pixels without texts."""
    return companions.of_data(run.config.data)


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
