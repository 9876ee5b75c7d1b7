"""Training methods by the names of a `method` section, married with networks, data and teachers."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffjax.build import networks, runs
from diffjax.build import step_sizes as step_size_check
from diffjax.core import guidance, names, rng, trees
from diffjax.core.types import Array, Batch, Cond, Denoiser, Key, Method, Params
from diffjax.data import loader, sources, trajectories, transforms
from diffjax.methods import amed, density_ratio, edm, emd, emd_chain, pd, sfd
from diffjax.methods.update import Update
from diffjax.metrics import lpips
from diffjax.models import ratio_head
from diffjax.nn import functional
from diffjax.runtime import mesh
from diffjax.sampling.sample import sample as follow_plan
from diffjax.train import optim
from diffjax.weights import torch_file


class Parts(NamedTuple):
    """What a method contributes to an experiment; `plan` None: it draws no sample grids. warning: see `loop.Experiment`."""

    method: Method
    init_params: Callable[[], Params]
    frozen: Any
    batches: Callable[[], loader.Batches]
    denoise: Denoiser
    data: sources.DataShape
    plan: Any
    sampler: Callable = follow_plan
    with_frozen: Callable[[Params], Params] = lambda params: params  # the trained parameters -> those of the sampler
    warning: Callable[[], str] = lambda: ""


# From data -----------------------------------------------------------------------------------------------------


def _edm(config: ConfigDict) -> Parts:
    shape = networks.data_shape(config.data)
    denoise, init = networks.denoiser(config.model, shape)
    options = without(config.method, "name")
    if options.get("weighting", "edm") == "edm":
        options["weighting_options"] = {"sigma_data": config.model.get("sigma_data", 0.5)}
    names.check_options(edm.Settings, options, "config.method")
    settings = edm.Settings(**options, num_classes=shape.num_classes)
    return Parts(
        method=edm.make(settings, denoise, *_optimizer(config), prepare=_prepare(config)),
        init_params=lambda: init(rng.stream(config.seed, "init")),
        frozen={},
        batches=_batches(config),
        denoise=denoise,
        data=shape,
        plan=runs.plan(config.sample) if "sample" in config else None,
    )


def _pd(config: ConfigDict) -> Parts:
    teacher = _teacher(config)
    options = _settings_options(config, pd.Settings, "num_steps")
    if config.method.get("stage") == "match" and not teacher.null_class:
        raise ValueError(
            f"method.stage='match' guides its teacher, and {config.method.teacher} was trained without a null class: "
            "train it with config.method.label_dropout > 0"
        )
    if bool(options.get("guidance_range")) != bool(config.model.get("guidance_condition", False)):
        raise ValueError("method.guidance_range and model.guidance_condition go together: set both, or none")
    settings = pd.Settings(**options, num_steps=config.method.num_steps, num_classes=teacher.data.num_classes)
    denoise, init_params = _student(config, teacher)
    return Parts(
        method=pd.make(settings, teacher.denoise, denoise, *_optimizer(config), _prepare(config)),
        init_params=init_params,
        frozen=teacher.params,
        batches=_batches(config),
        denoise=denoise,
        data=teacher.data,
        plan=None if options.get("guidance_range") else runs.student_plan(config.method),
    )


def _batches(config: ConfigDict) -> Callable[[], loader.Batches]:
    source = source_of(config.data)
    return lambda: loader.make_batches(source, config.train.batch_size, config.seed)


def source_of(data: ConfigDict) -> sources.Source:
    """The images of a `data` section."""
    drawn = ("flip", "augment_probability", "null_class")
    options = without(data, "name", "image_size", "channels", "num_classes", *drawn)
    return sources.load(data.name, networks.data_shape(data), **options)


def _prepare(config: ConfigDict) -> Callable[[Batch, Key], Batch]:
    """Augmentation on the device, from what the loader gives to what the objective takes."""
    flip, probability = config.data.get("flip", False), config.data.get("augment_probability", 0.0)
    if probability and not config.model.get("augment_dim"):
        raise ValueError("data.augment_probability needs model.augment_dim = 9: the network is told what was done")

    def prepare(batch: Batch, key: Key) -> Batch:
        image = transforms.to_float(batch["image"])
        rest = {name: value for name, value in batch.items() if name != "image"}
        if flip:
            image = transforms.flip(image, jax.random.fold_in(key, 0))
        if probability:
            image, rest["augment"] = transforms.augment(image, jax.random.fold_in(key, 1), probability)
        return {"image": image, **rest}

    return prepare


# From a teacher ------------------------------------------------------------------------------------------------


def _teacher(config: ConfigDict) -> runs.Run:
    """The run config.method.teacher. Raises ValueError for one whose network is another run's, or of other images."""
    teacher = runs.load_run(config.method.teacher)
    shape = networks.data_shape(config.data)
    if shape != teacher.data:
        raise ValueError(f"config.data is {shape}, the teacher in {config.method.teacher} has {teacher.data}: make them equal")
    if teacher.config.method.get("name") == "amed":
        raise ValueError(
            f"config.method.teacher = {config.method.teacher!r} is a sampler of {teacher.config.method.teacher!r} with "
            "no network of its own: give that run as the teacher"
        )
    return teacher


def _sfd(config: ConfigDict) -> Parts:
    teacher = _teacher(config)
    settings = sfd_settings(config, teacher)
    denoise, init_params = _student(config, teacher)
    distance, distance_params = _perceptual(config)
    cache = config.method.get("trajectories", "")
    method = sfd.make(
        settings, sfd_teacher(settings, teacher), denoise, *_optimizer(config), perceptual=distance,
        batch_sharding=_batch_sharding(config),
    )  # fmt: skip
    plan = runs.student_plan(config.method)
    told = runs.Run(config, denoise, {}, 0, teacher.data)
    return Parts(
        method=method,
        init_params=init_params,
        frozen=sfd.Frozen({} if cache else teacher.params, distance_params),
        batches=_cached(config, teacher, settings) if cache else loader.NoData,
        denoise=runs.sampling_denoiser(told, plan),
        data=teacher.data,
        plan=plan,
    )


def _cached(config: ConfigDict, teacher: runs.Run, settings: sfd.Settings) -> Callable[[], loader.Batches]:
    # opened at once: a cache that does not fit is said before any work
    num_steps = -(-config.train.total_images // config.train.batch_size)
    made_for = trajectories_for(config, teacher, settings)
    cached = trajectories.Cached(config.method.trajectories, made_for, num_steps)
    return lambda: cached


def sfd_settings(config: ConfigDict, teacher: runs.Run) -> sfd.Settings:
    """The settings of a `method` section. Raises ValueError for unknown keys."""
    options = _settings_options(config, sfd.Settings, "num_steps", "perceptual", "trajectories")
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


def teacher_targets(config: ConfigDict) -> tuple[Callable[[int], np.ndarray], dict[str, Any]]:
    """(targets, made_for) of `data.trajectories.write` for a config of SFD: step -> what its teacher answers."""
    config = runs.resolve(config)
    if config.method.name != "sfd":
        raise ValueError(f"trajectories are cached for method 'sfd', found {config.method.name!r}")
    teacher = _teacher(config)
    settings = sfd_settings(config, teacher)
    compute = jax.jit(sfd.make_targets(settings, sfd_teacher(settings, teacher)))

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


def _perceptual(config: ConfigDict) -> tuple[Callable | None, Params]:
    """(distance, its parameters) of the section method.perceptual, (None, {}) without it or without a network.

    parity: as released, pixels in [-1, 1] are taken for [0, 1] (see `metrics.lpips`).
    """
    options = config.method.get("perceptual", ConfigDict()).to_dict()
    network = options.pop("network", "")
    if not network:
        return None, {}
    backbone, parity = options.pop("backbone", ""), options.pop("parity", True)
    if not backbone:
        raise ValueError(
            "method.perceptual.backbone is empty: give torchvision's file of the network, for example "
            "--config.method.perceptual.backbone=vgg16-397923af.pth, or train on L1 alone with "
            "--config.method.perceptual.network="
        )
    linear = options.pop("linear", "") or None
    lpips_distance, params = lpips.load(network, backbone, linear, read=torch_file.load, **options)

    def distance(params: Params, a: Array, b: Array) -> Array:
        # one channel is shown as grey
        a, b = (jnp.broadcast_to(x, (*x.shape[:-1], 3)) if x.shape[-1] == 1 else x for x in (a, b))
        return lpips_distance(params, 2 * a - 1, 2 * b - 1) if parity else lpips_distance(params, a, b)

    return distance, params


def _amed(config: ConfigDict) -> Parts:
    teacher = _teacher(config)
    options = _settings_options(config, amed.Settings, "num_steps")
    settings = amed.Settings(
        **options, num_steps=config.method.num_steps, batch_size=config.train.batch_size,
        image_shape=teacher.data.shape, num_classes=teacher.data.num_classes,
    )  # fmt: skip
    features, predict, init = runs.amed_functions(config, teacher.data)
    sampler, _ = runs.amed_parts(config, teacher.data)

    def with_teacher(params: Params) -> Params:
        # where the predictor is: on all devices of the run
        here = jax.tree.leaves(params)[0].sharding
        return {"teacher": jax.device_put(teacher.params, here), "predictor": params}

    method = amed.make(
        settings, teacher.denoise, features, predict, *_optimizer(config), batch_sharding=_batch_sharding(config)
    )
    return Parts(
        method=method,
        init_params=lambda: init(rng.stream(config.seed, "init")),
        frozen=teacher.params,
        batches=loader.NoData,
        denoise=teacher.denoise,
        data=teacher.data,
        plan=runs.student_plan(config.method),
        sampler=sampler,
        with_frozen=with_teacher,
    )


def _emd(config: ConfigDict) -> Parts:
    teacher = _teacher(config)
    if teacher.config.method.get("name") != "edm":
        raise ValueError(
            f"EMD needs a teacher that denoises at every noise level, and {config.method.teacher} is a student of method "
            f"{teacher.config.method.get('name')!r}: give the run that it was distilled from"
        )
    apart = ("noise_step", "latent_step", "guidance_scale", "score_optim", "regression", "perceptual", "ratio_optim",
             "check_step_sizes")  # fmt: skip
    settings = emd.Settings(
        **_settings_options(config, emd.Settings, *apart), batch_size=config.train.batch_size,
        image_shape=teacher.data.shape, num_classes=teacher.data.num_classes,
    )  # fmt: skip
    denoise, init_params = _student(config, teacher)
    guided = guided_teacher(config, teacher)
    regression, distance_params = _regression(config)
    ratio = _ratio(config, teacher) if "ratio_optim" in config.method else None
    method = emd.make(
        settings, guided, denoise, Update(*_optimizer(config)),
        Update(*_optimizer(config, config.method.get("score_optim"))), regression=regression, ratio=ratio,
        batch_sharding=_batch_sharding(config),
    )  # fmt: skip
    step_sizes = emd_chain.StepSizes(*(jnp.float32(config.method[key]) for key in ("noise_step", "latent_step")))
    plan = runs.student_plan(config.method)
    return Parts(
        method=method,
        init_params=init_params,
        frozen=emd.Frozen(teacher.params, step_sizes, distance_params),
        batches=loader.NoData if ratio is None else _batches(config),
        denoise=runs.sampling_denoiser(runs.Run(config, denoise, {}, 0, teacher.data), plan),
        data=teacher.data,
        plan=plan,
        warning=lambda: (
            step_size_check.warning(settings, guided, denoise, teacher.params, init_params(), step_sizes)
            if config.method.get("check_step_sizes", True) else ""
        ),
    )  # fmt: skip


def guided_teacher(config: ConfigDict, teacher: runs.Run) -> Denoiser:
    """The teacher's network, guided at config.method.guidance_scale where that is set."""
    scale = config.method.get("guidance_scale", 1.0)
    if scale == 1.0:
        return teacher.denoise
    runs.check_guidance(teacher, scale)
    return guidance.cfg(teacher.denoise, scale, runs.uncond(teacher.data.num_classes))


def _regression(config: ConfigDict) -> tuple[emd.Regression | None, Params]:
    """(term, parameters of its distance) of the section method.regression: weight, and the keys of `sample`."""
    options = config.method.get("regression", ConfigDict()).to_dict()
    weight = options.pop("weight", 0.0)
    if not weight:
        return None, {}
    distance, params = _perceptual(config)
    chosen = {} if distance is None else {"distance": distance}
    return emd.Regression(runs.plan(options), weight, **chosen), params


def _ratio(config: ConfigDict, teacher: runs.Run) -> density_ratio.Ratio:
    """The density ratio read off the teacher's bottleneck, trained as config.method.ratio_optim says."""
    features, width = networks.features(teacher.config.model, teacher.data)
    head, init = functional.functionalize(lambda rngs: ratio_head.RatioHead(width, rngs=rngs))
    prepare = _prepare(config)

    def logit(params: Params, teacher_params: Params, x: Array, sigma: Array, cond: Cond) -> Array:
        return head(params, jax.lax.stop_gradient(features(teacher_params, x, sigma, cond)))

    return density_ratio.Ratio(logit, init, Update(*_optimizer(config, config.method.ratio_optim)), prepare)


def _student(config: ConfigDict, teacher: runs.Run) -> tuple[Denoiser, Callable[[], Params]]:
    """The student's network and its first weights: the teacher's, and fresh ones for conditions that are new."""
    if config.model == teacher.config.model:
        return teacher.denoise, lambda: teacher.params
    denoise, init = networks.denoiser(config.model, teacher.data)

    def init_params() -> Params:
        fresh = init(rng.stream(config.seed, "init"))
        flat, have = trees.flatten(fresh), trees.flatten(teacher.params)
        new = {path for path in flat if path not in have and any(name in path for name in _CONDITION_LAYERS)}
        expected = {path: leaf for path, leaf in flat.items() if path not in new}
        trees.check(expected, have, f"the teacher in {config.method.teacher}, as a student of config.model,")
        return jax.tree.unflatten(jax.tree.structure(fresh), [have.get(path, leaf) for path, leaf in flat.items()])

    return denoise, init_params


_CONDITION_LAYERS = ("map_step_", "affine_step", "map_guidance", "step_in", "step_out", "guidance_in", "guidance_out")


# Common --------------------------------------------------------------------------------------------------------


METHODS: dict[str, Callable[[ConfigDict], Parts]] = {"edm": _edm, "sfd": _sfd, "pd": _pd, "amed": _amed, "emd": _emd}


def _settings_options(config: ConfigDict, settings: type, *apart: str) -> dict[str, Any]:
    """The options of a `method` section that are fields of `settings`; raises ValueError for others."""
    options = without(config.method, "name", "teacher", *apart)
    names.check_options(settings, options, "config.method")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}


def _batch_sharding(config: ConfigDict) -> jax.sharding.Sharding:
    return mesh.batch_sharding(mesh.make_mesh(config.train.get("num_devices", 0) or None))


def _optimizer(config: ConfigDict, section: ConfigDict | None = None) -> tuple[Any, Callable[[Array], Array]]:
    """(optimizer, learning_rate) of the `optim` section, or of another."""
    options = (config.optim if section is None else section).to_dict()
    rate = {key: options.pop(key) for key in ("learning_rate", "schedule", "warmup_images") if key in options}
    names.check_options(optim.make_optimizer, options, "config.optim")
    train = config.train
    schedule = optim.make_learning_rate(batch_size=train.batch_size, total_images=train.total_images, **rate)
    return optim.make_optimizer(**options), schedule


def without(section: ConfigDict, *keys: str) -> dict[str, Any]:
    """The section as a dict, without these keys."""
    return {key: value for key, value in section.to_dict().items() if key not in keys}
