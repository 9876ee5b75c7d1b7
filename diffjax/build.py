"""From a config to the objects that it names: the one place where data, models, methods and the loop meet.

Every `name` in a config selects a function from one of the dicts below; the rest of its section are
that function's options, so a signature is the list of what may be set.

    experiment(config)      what `train.loop.run` trains
    load_run(workdir)       a trained run, ready to sample
    plan(sample)            the sampling plan of a config's `sample` section
    draw(run, plan, ...)    seeds to images
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from diffjax.core import grids, guidance, names, prediction, rng, solvers, trees
from diffjax.core.types import Array, Batch, Denoiser, Key, Method, Params
from diffjax.data import loader, sources, transforms
from diffjax.methods import edm, sfd
from diffjax.models import edm_unet, toy
from diffjax.nn import functional
from diffjax.runtime import checkpoint, mesh
from diffjax.sampling import few_step, generate
from diffjax.train import ema, loop, optim, step
from diffjax.train import state as train_state

SECTIONS = ("seed", "data", "model", "method", "optim", "ema", "train", "sample", "allow_config_change")
_SAMPLES_SHOWN = 36  # images of a sample grid during training


class Run(NamedTuple):
    """A network with weights: what sampling, evaluation and distillation need of a finished run."""

    config: ConfigDict
    denoise: Denoiser
    params: Params
    step: int
    data: sources.DataShape


# Networks and denoisers ----------------------------------------------------------------------------------------


def _residual_mlp(data: sources.DataShape, *, width: int = 256, depth: int = 4, dropout: float = 0.0) -> Callable:
    return functools.partial(toy.ResidualMLP, data.shape, width, depth, data.num_classes, dropout)


def _edm_unet(network: Callable, fixed: Mapping[str, Any], data: sources.DataShape, *, augment_dim: int = 0,
              compute_dtype: str = "", **options: Any) -> Callable:  # fmt: skip
    dtype = jnp.dtype(compute_dtype) if compute_dtype else None
    return functools.partial(
        network, data.image_size, data.channels, data.channels, num_classes=data.num_classes, augment_dim=augment_dim,
        dtype=dtype, **fixed, **options,
    )  # fmt: skip


_NCSNPP = {"embedding": "fourier", "encoder": "residual", "taps": (1, 3, 3, 1), "noise_channels_mult": 2}

# name -> function of the data's shape and options, which returns a constructor of the module that takes rngs
MODELS: dict[str, Callable[..., Callable]] = {
    "residual_mlp": _residual_mlp,
    "ddpmpp": functools.partial(_edm_unet, edm_unet.SongUNet, {}),
    "ncsnpp": functools.partial(_edm_unet, edm_unet.SongUNet, _NCSNPP),
    "adm": functools.partial(_edm_unet, edm_unet.DhariwalUNet, {}),
}
PRECONDITIONS: dict[str, Callable[..., Denoiser]] = {
    "edm": prediction.edm_denoiser,
    "vp": prediction.vp_denoiser,
    "ve": prediction.ve_denoiser,
}


def denoiser(model: Mapping[str, Any], data: sources.DataShape) -> tuple[Denoiser, Callable[[Key], Params]]:
    """(denoise, init): the network of a `model` section as a denoiser, and its fresh parameters.

    Raises ValueError for unknown names and options.
    """
    options = dict(model)
    name, precondition = options.pop("name", None), options.pop("precondition", "edm")
    wrap = names.lookup(PRECONDITIONS, precondition, "model.precondition")
    if precondition == "edm":
        wrap = functools.partial(wrap, sigma_data=options.pop("sigma_data", 0.5))
    make = names.lookup(MODELS, name, "model.name")
    try:
        network, init = functional.functionalize(_with_rngs(make(data, **_lists_as_tuples(options))))
    except TypeError as error:
        raise ValueError(f"config.model does not fit {name!r}: {error}; its options are {_options(make)}") from error
    return wrap(network), init


def _with_rngs(constructor: Callable) -> Callable[[nnx.Rngs], nnx.Module]:
    return lambda rngs: constructor(rngs=rngs)


def _options(make: Callable) -> list[str]:
    module = make.args[0] if isinstance(make, functools.partial) else make
    hidden = {"data", "rngs", "image_size", "in_channels", "out_channels", "num_classes", "dtype"}
    return [name for name in inspect.signature(module).parameters if name not in hidden]


def data_shape(data: Mapping[str, Any]) -> sources.DataShape:
    """The image shape and classes that a `data` section declares."""
    missing = [key for key in ("image_size", "channels") if key not in data]
    if missing:
        raise ValueError(f"config.data lacks {missing}: set for example config.data.image_size = 32")
    return sources.DataShape(data["image_size"], data["channels"], data.get("num_classes", 0))


# Sampling ------------------------------------------------------------------------------------------------------


def plan(sample: Mapping[str, Any]) -> solvers.Plan:
    """The plan of a `sample` section: {solver, num_steps (noise levels), grid, sigma_min, sigma_max, rho, order, afs,
    parity} and the solver's own options; Heun and the stochastic solver end with a plain step to sigma = 0."""
    options = dict(sample)
    for key in ("guidance_scale", "batch_size"):
        options.pop(key, None)
    solver, grid, num = options.pop("solver"), options.pop("grid", "polynomial"), options.pop("num_steps")
    sigma_min, sigma_max = options.pop("sigma_min"), options.pop("sigma_max")
    rho = options.pop("rho", 7.0)
    to_zero = options.pop("to_zero", False)
    sigmas = few_step.student_grid(num, sigma_min, sigma_max, grid=grid, rho=rho)
    if to_zero:
        sigmas = grids.append_zero(sigmas)
    return solvers.make_plan(solver, sigmas, order=options.pop("order", 0) or None, **options)


def run_plan(run: Run, **overrides: Any) -> solvers.Plan:
    """The plan a run samples with: its `sample` section with `overrides`, or an SFD student's own Euler steps."""
    overrides = {key: value for key, value in overrides.items() if value is not None}
    if "sample" in run.config:
        return plan({**run.config.sample, **overrides})
    if overrides:
        raise ValueError(f"an SFD student samples as it was trained; found {sorted(overrides)}: leave them out")
    return student_plan(run.config.method)


def student_plan(method: Mapping[str, Any]) -> solvers.Plan:
    """The Euler steps of the student that a `method` section of SFD trains."""
    settings = {f: method[f] for f in ("sigma_min", "sigma_max", "grid", "rho") if f in method}
    return few_step.student_plan(method["num_steps"], afs=method.get("afs", True), **settings)


def draw(
    run: Run,
    plan: solvers.Plan,
    seed: int,
    sample_ids: Sequence[int],
    *,
    batch_size: int,
    labels: np.ndarray | None = None,
    guidance_scale: float | None = None,
) -> np.ndarray:
    """Images (n, H, W, C) float32 in about [-1, 1], image i made of (seed, sample_ids[i]) alone.

    labels (n,) are drawn per sample where not given. Raises ValueError for guidance of a network that was trained
    without a null class.
    """
    if guidance_scale is not None and not _has_null_class(run.config):
        raise ValueError(
            f"guidance_scale={guidance_scale} needs a null class and this run was trained without one: train with "
            "config.method.label_dropout > 0, or leave guidance_scale out"
        )
    return generate.generate(
        run.denoise,
        run.params,
        plan,
        list(sample_ids),
        run.data.shape,
        batch_size=batch_size,
        seed=seed,
        cond=None if labels is None else {"label": np.asarray(labels)},
        num_classes=run.data.num_classes or None,
        guidance_scale=guidance_scale,
        uncond=None if guidance_scale is None else _uncond(run.data.num_classes),
    )


@functools.cache
def _uncond(num_classes: int) -> guidance.Uncond:
    return functools.partial(guidance.null_label, num_classes=num_classes)


def _has_null_class(config: ConfigDict) -> bool:
    return config.method.get("label_dropout", 0) > 0


def load_run(workdir: str | Path) -> Run:
    """The newest checkpoint of a run folder, the average of the weights where there is one.

    Raises checkpoint.CheckpointError where there is none, ValueError where its weights do not fit its config.
    """
    params, saved, at = checkpoint.load_params(workdir, ema=None)
    config = ConfigDict(saved)
    model, data = network_sections(config)
    shape = data_shape(data)
    denoise, init = denoiser(model, shape)
    trees.check(jax.eval_shape(init, jax.random.key(0)), params, f"the checkpoint in {workdir}")
    return Run(config, denoise, params, at, shape)


def network_sections(config: ConfigDict) -> tuple[ConfigDict, ConfigDict]:
    """(model, data) sections of the network that `config` trains; a student's are its teacher's."""
    while config.model.get("name") == "teacher":
        _, saved, _ = checkpoint.load_params(config.method.teacher, ema=None)
        config = ConfigDict(saved)
    return config.model, config.data


# Training ------------------------------------------------------------------------------------------------------


class _Parts(NamedTuple):
    """What a method contributes to an experiment."""

    method: Method
    init_params: Callable[[], Params]
    frozen: Params
    batches: Callable[[], loader.Batches]
    denoise: Denoiser
    data: sources.DataShape
    plan: solvers.Plan | None


def _edm(config: ConfigDict) -> _Parts:
    shape = data_shape(config.data)
    denoise, init = denoiser(config.model, shape)
    options = _without(config.method, "name")
    if options.get("weighting", "edm") == "edm":
        options["weighting_options"] = {"sigma_data": config.model.get("sigma_data", 0.5)}
    names.check_options(edm.Settings, options, "config.method")
    settings = edm.Settings(**options, num_classes=shape.num_classes)
    source = _source(config.data, shape)
    return _Parts(
        method=edm.make(settings, denoise, *_optimizer(config), prepare=_prepare(config)),
        init_params=lambda: init(rng.stream(config.seed, "init")),
        frozen={},
        batches=lambda: loader.make_batches(source, config.train.batch_size, config.seed),
        denoise=denoise,
        data=shape,
        plan=plan(config.sample) if "sample" in config else None,
    )


def all_images(data: ConfigDict) -> np.ndarray:
    """Every image (N, H, W, C) of a `data` section, as stored: uint8, or float32 in [-1, 1]."""
    source = _source(data, data_shape(data))
    return sources.read(source, range(len(source)))["image"]


def _source(data: ConfigDict, shape: sources.DataShape) -> sources.Source:
    options = _without(data, "name", "image_size", "channels", "num_classes", "flip", "augment_probability")
    return sources.load(data.name, shape, **options)


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


def _sfd(config: ConfigDict) -> _Parts:
    teacher = load_run(config.method.teacher)
    options = _without(config.method, "name", "teacher")
    if not trees.count(teacher.params):
        raise ValueError(f"the teacher in {config.method.teacher} has no parameters")
    settings = sfd.Settings(
        **options, batch_size=config.train.batch_size, image_shape=teacher.data.shape, num_classes=teacher.data.num_classes
    )
    devices = mesh.make_mesh(config.train.get("num_devices", 0) or None)
    method = sfd.make(
        settings, teacher.denoise, teacher.denoise, *_optimizer(config), batch_sharding=mesh.batch_sharding(devices)
    )
    return _Parts(
        method=method,
        init_params=lambda: teacher.params,
        frozen=teacher.params,
        batches=loader.NoData,
        denoise=teacher.denoise,
        data=teacher.data,
        plan=student_plan(config.method),
    )


METHODS: dict[str, Callable[[ConfigDict], _Parts]] = {"edm": _edm, "sfd": _sfd}


def experiment(config: ConfigDict) -> loop.Experiment:
    """The experiment that `config` describes; data and teacher are opened, nothing is computed.

    Raises ValueError for unknown sections, names or options, FileNotFoundError for absent data, CheckpointError
    for an absent teacher.
    """
    for key in config:
        if key not in SECTIONS:
            raise ValueError(f"unknown section config.{key}; {names.nearest(key, SECTIONS)}")
    absent = [key for key in ("seed", "data", "model", "method", "optim", "train") if key not in config]
    if absent:
        raise ValueError(f"the config lacks {absent}; see configs/quick/edm_digits.py for a complete one")
    loop.Settings.from_config(config.train.to_dict())
    parts = names.lookup(METHODS, config.method.get("name"), "method")(config)
    average = config.get("ema", ConfigDict({"halflife_images": 0})).to_dict()
    decay = ema.make_decay(config.train.batch_size, **average)

    def init() -> train_state.TrainState:
        return train_state.create(parts.method, parts.init_params(), config.seed, averaged=decay is not None)

    return loop.Experiment(
        init=init,
        step=step.make_train_step(parts.method, decay),
        frozen=parts.frozen,
        batches=parts.batches,
        batch_size=config.train.batch_size,
        sample=None if parts.plan is None else _sampler(config, parts),
    )


def _sampler(config: ConfigDict, parts: _Parts) -> Callable[[Params], np.ndarray]:
    """Parameters to the uint8 images of a sample grid, the same seeds each time."""

    def sample(params: Params) -> np.ndarray:
        return generate.generate(
            parts.denoise,
            params,
            parts.plan,
            range(_SAMPLES_SHOWN),
            parts.data.shape,
            batch_size=_SAMPLES_SHOWN,
            seed=config.seed,
            num_classes=parts.data.num_classes or None,
            finish=generate.to_uint8,
        )

    return sample


def _optimizer(config: ConfigDict) -> tuple[Any, Callable[[Array], Array]]:
    """(optimizer, learning_rate) of the `optim` section."""
    options = config.optim.to_dict()
    rate = {key: options.pop(key) for key in ("learning_rate", "schedule", "warmup_images") if key in options}
    names.check_options(optim.make_optimizer, options, "config.optim")
    train = config.train
    schedule = optim.make_learning_rate(batch_size=train.batch_size, total_images=train.total_images, **rate)
    return optim.make_optimizer(**options), schedule


def _without(section: ConfigDict, *keys: str) -> dict[str, Any]:
    return {key: value for key, value in section.to_dict().items() if key not in keys}


def _lists_as_tuples(options: Mapping[str, Any]) -> dict[str, Any]:
    """A config read back from JSON has lists where its file had tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
