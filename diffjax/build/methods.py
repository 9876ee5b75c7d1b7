"""Training methods by the names of a `method` section, married with networks, data and teachers."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffjax.build import classifiers, emd_parts, networks, parts, runs, transfer
from diffjax.core import names, rng
from diffjax.core.types import Denoiser, Params
from diffjax.data import loader, trajectories
from diffjax.methods import amed, consistency, edm, pd, sfd
from diffjax.runtime import mesh


def _edm(config: ConfigDict) -> parts.Parts:
    shape = networks.data_shape(config.data)
    denoise, init = networks.denoiser(config.model, shape)
    options = parts.without(config.method, "name", "start")
    masks = options.pop("mask_ratio", 0.0), options.pop("mask_buckets", 1)
    if options.get("weighting", "edm") == "edm":
        options["weighting_options"] = {"sigma_data": shape.scale * config.model.get("sigma_data", 0.5)}
    sigma_max = config.get("sample", {}).get("sigma_max", 80.0) * config.model.get("resolution_scale", 1.0)
    options |= parts.assignment_options(config, sigma_max)
    names.check_options(edm.Settings, options, "config.method")
    settings = edm.Settings(**options, num_classes=shape.num_classes, texts=parts.takes_texts(config))
    plan = runs.plan(config.sample) if "sample" in config else None
    variance = networks.variance_denoiser(config.model, shape)
    if variance is not None and shape.scale != 1:
        raise ValueError(f"model.learned_variance takes pixels in [-1, 1], found data.image_scale={shape.scale}")
    first = transfer.start(config, init)
    return parts.Parts(
        method=edm.make(
            settings, denoise, *parts.optimizer(config), parts.prepare(config), variance,
            networks.masked_denoisers(config.model, shape, *masks),
        ),  # fmt: skip
        init_params=first.init_params,
        frozen={},
        batches=parts.batches(config),
        denoise=denoise,
        data=shape,
        plan=plan,
        sampler=runs.run_sampler(config.model, shape),
        warning=lambda: "\n".join(filter(None, (parts.assignment_warning(config, plan), first.report))),
    )


def _pd(config: ConfigDict) -> parts.Parts:
    teacher = parts.load_teacher(config)
    options = parts.settings_options(config, pd.Settings, "num_steps")
    if config.method.get("stage") == "match" and not teacher.null_class:
        raise ValueError(
            f"method.stage='match' guides its teacher, and {config.method.teacher} was trained without a null class: "
            "train it with config.method.label_dropout > 0"
        )
    if bool(options.get("guidance_range")) != bool(config.model.get("guidance_condition", False)):
        raise ValueError("method.guidance_range and model.guidance_condition go together: set both, or none")
    settings = pd.Settings(**options, num_steps=config.method.num_steps, num_classes=teacher.data.num_classes)
    denoise, init_params = parts.student(config, teacher)
    return parts.Parts(
        method=pd.make(settings, teacher.denoise, denoise, *parts.optimizer(config), parts.prepare(config)),
        init_params=init_params,
        frozen=teacher.params,
        batches=parts.batches(config),
        denoise=denoise,
        data=teacher.data,
        plan=None if options.get("guidance_range") else runs.student_plan(config.method),
    )


def _sfd(config: ConfigDict) -> parts.Parts:
    teacher = parts.load_teacher(config)
    settings = sfd_settings(config, teacher)
    denoise, init_params = parts.student(config, teacher)
    distance, distance_params = parts.perceptual(config)
    cache = config.method.get("trajectories", "")
    method = sfd.make(
        settings, sfd_teacher(settings, teacher), denoise, *parts.optimizer(config), perceptual=distance,
        grid_options=runs.grid_options(config.method),
    )  # fmt: skip
    plan = runs.student_plan(config.method)
    told = runs.Run(config, denoise, {}, 0, teacher.data)
    return parts.Parts(
        method=method,
        init_params=init_params,
        frozen=sfd.Frozen({} if cache else teacher.params, distance_params),
        batches=_cached(config, teacher, settings) if cache else parts.prompts(config),
        denoise=runs.sampling_denoiser(told, plan),
        data=teacher.data,
        plan=plan,
    )


def _cached(config: ConfigDict, teacher: runs.Run, settings: sfd.Settings) -> Callable[[], loader.Batches]:
    if parts.takes_texts(config):
        raise ValueError("cached trajectories keep no texts: leave method.trajectories out")
    # opened at once: a cache that does not fit is said before any work
    num_steps = -(-config.train.total_images // config.train.batch_size)
    made_for = trajectories_for(config, teacher, settings)
    cached = trajectories.Cached(config.method.trajectories, made_for, num_steps)
    return lambda: cached


def sfd_settings(config: ConfigDict, teacher: runs.Run) -> sfd.Settings:
    """The settings of a `method` section. Raises ValueError for unknown keys."""
    options = parts.settings_options(config, sfd.Settings, "num_steps", "perceptual", "trajectories", "process")
    options["teacher_order"] = options.get("teacher_order", 3) or None  # 0: the solver's own
    return sfd.Settings(
        **options, num_steps=runs.trained_steps(config.method), batch_size=config.train.batch_size,
        image_shape=teacher.data.shape, num_classes=teacher.data.num_classes,
    )  # fmt: skip


def trajectories_for(config: ConfigDict, teacher: runs.Run, settings: sfd.Settings) -> dict[str, Any]:
    """What cached targets depend on: seed, teacher, and the settings that are not the student's."""
    students = ("step_condition", "released_gradient_rule", "accumulate")
    fields = {name: value for name, value in dataclasses.asdict(settings).items() if name not in students}
    return {"seed": config.seed, "teacher": config.method.teacher, "teacher_step": teacher.step, **fields}


def _consistency(config: ConfigDict) -> parts.Parts:
    """Training from data, or distillation where method.teacher names a run."""
    if config.model.get("precondition") != "consistency":
        raise ValueError(
            f"method 'consistency' trains a function that keeps x at sigma_min; found model.precondition="
            f"{config.model.get('precondition', 'edm')!r}: set config.model.precondition = 'consistency'"
        )
    distilled = "teacher" in config.method
    shape = networks.data_shape(config.data)
    options = parts.settings_options(config, consistency.Settings, "perceptual", "middle_levels")
    options |= parts.assignment_options(config, options.get("sigma_max", consistency.Settings.sigma_max))
    steps = -(-config.train.total_images // config.train.batch_size)
    settings = consistency.Settings(total_steps=steps, **options, num_classes=shape.num_classes)
    distance, distance_params = parts.perceptual(config)
    if distilled:
        teacher = parts.load_teacher(config)
        denoise, init_params = parts.student(config, teacher)
    else:
        denoise, init = networks.denoiser(config.model, shape)
        init_params = lambda: init(rng.stream(config.seed, "init"))  # noqa: E731
    method = consistency.make(
        settings, denoise, *parts.optimizer(config), parts.prepare(config),
        teacher_denoise=teacher.denoise if distilled else None, perceptual=distance,
    )  # fmt: skip
    plan = runs.student_plan(config.method)
    return parts.Parts(
        method=method,
        init_params=init_params,
        frozen=consistency.Frozen(teacher.params if distilled else {}, distance_params),
        batches=parts.batches(config),
        denoise=denoise,
        data=shape,
        plan=plan,
        warning=lambda: parts.assignment_warning(config, plan),
    )


def teacher_targets(config: ConfigDict) -> tuple[Callable[[int], np.ndarray], dict[str, Any]]:
    """(targets, made_for) of `data.trajectories.write` for a config of SFD: step -> what its teacher answers."""
    config = runs.resolve(config)
    if config.method.name != "sfd":
        raise ValueError(f"trajectories are cached for method 'sfd', found {config.method.name!r}")
    teacher = parts.load_teacher(config)
    settings = sfd_settings(config, teacher)
    compute = jax.jit(
        sfd.make_targets(settings, sfd_teacher(settings, teacher), grid_options=runs.grid_options(config.method))
    )

    def targets(step: int) -> np.ndarray:
        return np.asarray(compute(teacher.params, rng.stream(config.seed, "train", jnp.uint32(step))))

    return targets, trajectories_for(config, teacher, settings)


def sfd_teacher(settings: sfd.Settings, teacher: runs.Run) -> Denoiser:
    """The teacher's network as SFD calls it. A teacher that is a student itself (second stage) must be asked for the
    trajectory that it was trained for; raises ValueError otherwise."""
    own = teacher.config.method
    if own.name != "sfd":
        return teacher.denoise
    (num, *more), factor = settings.num_steps, settings.teacher_factor
    levels = factor * (num - 1) + 1
    have = {"num_steps": runs.trained_steps(own), "afs": own.get("afs", True)}
    have |= {key: own.get(key, getattr(sfd.Settings, key)) for key in ("sigma_min", "sigma_max", "grid", "rho")}
    want = {key: getattr(settings, key) for key in ("sigma_min", "sigma_max", "grid", "rho")}
    fits = levels in have["num_steps"] and settings.teacher_afs == have["afs"] and settings.teacher_solver == "euler"
    if more or not fits or any(have[key] != value for key, value in want.items()):
        raise ValueError(
            f"the teacher is a student trained for {have} with Euler steps; found num_steps={settings.num_steps} and "
            f"teacher_factor={factor}, which ask it for {levels} noise levels, with teacher_solver="
            f"{settings.teacher_solver!r}, teacher_afs={settings.teacher_afs}, {want}: make them agree, for example "
            "num_steps=3, teacher_factor=3 for a student of num_steps=7"
        )
    return runs.sampling_denoiser(teacher, runs.student_plan(own, levels))


def _amed(config: ConfigDict) -> parts.Parts:
    teacher = parts.load_teacher(config)
    options = parts.settings_options(config, amed.Settings, "num_steps")
    settings = amed.Settings(
        **options, num_steps=config.method.num_steps, batch_size=config.train.batch_size,
        image_shape=teacher.data.shape, num_classes=teacher.data.num_classes,
    )  # fmt: skip
    features, predict, init = runs.amed_functions(config, teacher.data)
    sampler, _ = runs.amed_parts(config, teacher.data)

    def with_teacher(params: Params) -> Params:
        # where the predictor is: on all devices of the run
        here = jax.tree.leaves(params)[0].sharding
        where = mesh.replicated(here.mesh) if isinstance(here, jax.sharding.NamedSharding) else here
        return {"teacher": jax.device_put(teacher.params, where), "predictor": params}

    method = amed.make(
        settings, teacher.denoise, features, predict, *parts.optimizer(config),
    )  # fmt: skip
    return parts.Parts(
        method=method,
        init_params=lambda: init(rng.stream(config.seed, "init")),
        frozen=teacher.params,
        batches=parts.prompts(config),
        denoise=teacher.denoise,
        data=teacher.data,
        plan=runs.student_plan(config.method),
        sampler=sampler,
        with_frozen=with_teacher,
    )


IN_MICROBATCHES = ("edm", "consistency", "pd", "classify")
METHODS: dict[str, Callable[[ConfigDict], parts.Parts]] = {
    "edm": _edm, "consistency": _consistency, "sfd": _sfd, "pd": _pd, "amed": _amed, "emd": emd_parts.emd_parts,
    "classify": classifiers.classify_parts,
}  # fmt: skip
