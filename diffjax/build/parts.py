"""What building a method takes whatever the method: the teacher, the student, data, optimiser, and what comes out."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from diffjax.assign import host, pair
from diffjax.build import companions, encoded, networks, planned, runs, video_networks
from diffjax.core import names, rng, trees
from diffjax.core.types import Array, Batch, Denoiser, Key, Method, Params
from diffjax.data import latents, loader, sources, texts, transforms
from diffjax.methods import edm
from diffjax.metrics import lpips
from diffjax.runtime import mesh
from diffjax.sampling.sample import sample as follow_plan
from diffjax.train import optim
from diffjax.train.hooks import Hook
from diffjax.weights import torch_file


class Parts(NamedTuple):
    """What a method contributes to an experiment. `plan` None: it draws no sample grids; `denoise` None: no samples at all.
    warning, hooks: see `loop.Experiment`."""

    method: Method
    init_params: Callable[[], Params]
    frozen: Any
    batches: Callable[[], loader.Batches]
    denoise: Denoiser | None
    data: sources.DataShape
    plan: Any
    sampler: Callable = follow_plan
    with_frozen: Callable[[Params], Params] = lambda params: params  # the trained parameters -> those of the sampler
    warning: Callable[[], str] = lambda: ""
    hooks: Sequence[Hook] = ()


def batches(config: ConfigDict) -> Callable[[], loader.Batches]:
    """The images of the `data` section in batches; opened at once, so that absent data is said before any work."""
    if planned.active():
        return lambda: iter([planned.batch(config)])
    source = source_of(config.data)
    options = config.get("method", {}).get("assign_options", {})
    beside = beside_data(config)
    if isinstance(source, latents.Latents):
        encoded.check(source.header, beside, config.model)
    part, parts = mesh.samples_of_process(run_mesh(config))
    if options.get("route") != "host":
        plain = lambda: loader.make_batches(  # noqa: E731
            source, config.train.batch_size, config.seed, process=part, num_processes=parts
        )
        if beside is None:
            return plain
        return lambda: encoded.Encoded(plain(), beside, config.model, networks.data_shape(config.data), config.seed)
    if beside is not None:
        raise ValueError("assign_options.route='host' pairs noise with images as they are, not encoded: leave it out")
    if config.train.get("overfit_one_batch"):
        raise ValueError(
            "assign_options.route='host' ships the noise with the batch, and train.overfit_one_batch repeats the batch: "
            "leave one of them out"
        )
    if jax.process_count() > 1:
        raise ValueError(
            f"assign_options.route='host' numbers the rows of one process, found {jax.process_count()}: leave it out"
        )
    own, made = {key: options[key] for key in ("group_by", "cost", "pool") if key in options}, prepare(config)

    def inputs(batch: Batch, step: Array) -> tuple[Array, Key]:
        keys = edm.split(rng.stream(config.seed, "train", step))
        return made(batch, keys.prepare)["image"], keys.noise

    return lambda: host.Assigned(loader.make_batches(source, config.train.batch_size, config.seed), inputs, **own)


def source_of(data: ConfigDict, whole: bool = False) -> sources.Source:
    """The images of a `data` section, or its cached latents. whole: images of any size, as they are.

    data.captions: a file with a text for each class; "own", the texts that the images have; or a key of
    `texts.CLASSES`, whose texts say where a picture is mirrored, as data.mirrored makes a second one of each.
    """
    drawn = ("flip", "augment_probability", "null_class", "image_scale", "companions", "captions", "mirrored")
    if whole:
        drawn = (*drawn, "resize", "metadata")
    options = without(data, "name", "image_size", "channels", "num_classes", "num_frames", *drawn)
    shape, captions = networks.data_shape(data), data.get("captions", "")
    is_generated = captions in texts.CLASSES
    _check_flips(data, is_generated, whole)
    if data.name == "latents":
        if captions:
            raise ValueError("cached latents have the texts they were prepared with: leave data.captions out")
        return sources.load(data.name, shape, **options)
    beside = companions.load_companions(data.companions) if data.get("companions") else None
    if beside is not None and beside.autoencoder is not None:  # which makes latents of pictures
        vae = beside.autoencoder
        shape = dataclasses.replace(shape, image_size=shape.image_size * vae.factor, channels=vae.channels)
    shape = dataclasses.replace(shape, image_size=0) if whole else shape
    if captions == texts.OWN:
        return sources.load(data.name, shape, captions=True, **options)
    if not captions:
        return sources.load(data.name, shape, **options)
    lines = texts.of_classes(captions) if is_generated else texts.lines(captions)  # of class 0, 1, ...
    shape = dataclasses.replace(shape, num_classes=len(lines))
    source = sources.load(data.name, shape, **options)
    source = texts.Mirrored(source) if data.get("mirrored") else source
    return texts.Captioned(source, lines, texts.MIRRORED if is_generated else "")


def _check_flips(data: ConfigDict, is_generated: bool, whole: bool) -> None:
    if is_generated and data.get("flip"):
        raise ValueError("data.flip mirrors pictures whose captions do not say so: set data.mirrored=True in its place")
    if data.get("mirrored") and not is_generated:
        known = sorted(texts.CLASSES)
        raise ValueError(f"data.mirrored needs captions that say it, data.captions one of {known}: leave it out")
    if data.get("mirrored") and whole:
        raise ValueError("of cached latents --flips makes the mirror images: leave data.mirrored out")


def beside_data(config: ConfigDict) -> companions.Companions | None:
    """The companions that encode the data of a run. Raises ValueError for augmentation of what becomes latents."""
    beside = companions.of_data(config.data)
    if beside is None:
        return None
    if config.data.get("flip") and config.data.name == "latents":
        raise ValueError(
            "data.flip would mirror cached latents, and an autoencoder does not turn a mirrored picture into mirrored "
            "latents: prepare both with --flips, and leave it out"
        )
    if beside.autoencoder is None:
        return beside
    changed = [key for key in ("flip", "augment_probability") if config.data.get(key)]
    if changed or config.data.get("image_scale", 1.0) != 1:
        raise ValueError(f"data.companions makes latents, and {changed or 'image_scale'} would change them as pixels: leave it out")
    return beside


def takes_texts(config: ConfigDict) -> bool:
    """Whether the companions of a run encode texts."""
    if planned.active():
        return planned.takes_texts(config)
    beside = beside_data(config)
    return beside is not None and beside.text is not None


def prompts(config: ConfigDict) -> Callable[[], loader.Batches]:
    """Batches of texts for methods that draw their own noise; empty ones where the data has none."""
    if config.data.get("name") != "prompts":
        if takes_texts(config):
            raise ValueError("this network makes pictures of texts: set data.name='prompts' and data.path to a file of them")
        return loader.NoData
    return batches(config)


def prepare(config: ConfigDict) -> Callable[[Batch, Key], Batch]:
    """Augmentation on the device, from what the loader gives to what the objective takes."""
    flip, probability = config.data.get("flip", False), config.data.get("augment_probability", 0.0)
    scale = config.data.get("image_scale", 1.0)
    if probability and not config.model.get("augment_dim"):
        raise ValueError("data.augment_probability needs model.augment_dim = 9: the network is told what was done")

    def prepare(batch: Batch, key: Key) -> Batch:
        image = transforms.to_float(batch["image"])
        rest = {name: value for name, value in batch.items() if name != "image"}
        if flip:
            image = transforms.flip(image, jax.random.fold_in(key, 0))
            if "flip" in rest:  # the network is told of it
                rest["flip"] = transforms.flipped(jax.random.fold_in(key, 0), len(image)).astype(jnp.float32)
        if probability:
            image, rest["augment"] = transforms.augment(image, jax.random.fold_in(key, 1), probability)
        image = image * scale
        if config.model.name in video_networks.FIRST_FRAME:
            rest["first_frame"] = image[:, 0]
        return {"image": image, **rest}

    return prepare


def assignment_options(config: ConfigDict, sigma_max: float) -> dict[str, Any]:
    """The option `assign_options` of a method's settings: that of the config, with the level sampling starts from."""
    if config.method.get("assign", "none") == "none":
        return {}
    return {"assign_options": {"terminal_sigma": sigma_max, **config.method.get("assign_options", {})}}


def assignment_warning(config: ConfigDict, plan: Any) -> str:
    """Where assigned noise (`assign.pair`) does nothing, or does harm along `plan` (None: no plan); "" elsewhere."""
    assign = config.get("method", {}).get("assign", "none")
    if assign == "none":
        return ""
    if assign in pair.PERMUTING and config.train.batch_size == 1:
        return f"WARNING: method.assign={assign!r} changes nothing in batches of one: type --config.method.assign=knn"
    if config.method.name == "consistency":  # whose own steps add noise, and are no score's
        if "teacher" not in config.method:
            return ""
        return f"WARNING: the teacher's trajectories pair noise and images, method.assign={assign!r} is not known to help"
    if plan is not None and getattr(plan, "noise", None) is not None:
        return (
            f"WARNING: this sampler adds noise, and a network trained with method.assign={assign!r} is no score of the "
            "noisy data, so that its samples are biased: take a deterministic solver, for example heun"
        )
    return ""


def load_teacher(config: ConfigDict) -> runs.Run:
    """The run config.method.teacher. Raises ValueError for one whose network is another run's, or of other images."""
    teacher = runs.load_run(config.method.teacher)
    shape = networks.data_shape(config.data)
    if shape != teacher.data:
        raise ValueError(
            f"config.data is {shape}, the teacher in {config.method.teacher} has {teacher.data}: make them equal"
        )
    if teacher.config.method.get("name") == "amed":
        raise ValueError(
            f"config.method.teacher = {config.method.teacher!r} is a sampler of {teacher.config.method.teacher!r} with "
            "no network of its own: give that run as the teacher"
        )
    return teacher


def student(config: ConfigDict, teacher: runs.Run) -> tuple[Denoiser, Callable[[], Params]]:
    """The student's network and its first weights: the teacher's, and fresh ones for conditions that are new."""
    if config.model == teacher.config.model and not planned.active():
        return teacher.denoise, lambda: teacher.params
    denoise, init = networks.denoiser(config.model, teacher.data)
    if planned.active():
        return denoise, lambda: init(rng.stream(config.seed, "init"))

    def init_params() -> Params:
        fresh = init(rng.stream(config.seed, "init"))
        flat, have = trees.flatten(fresh), trees.flatten(teacher.params)
        new = {path for path in flat if path not in have and any(name in path for name in _CONDITION_LAYERS)}
        expected = {path: leaf for path, leaf in flat.items() if path not in new}
        trees.check(expected, have, f"the teacher in {config.method.teacher}, as a student of config.model,")
        return jax.tree.unflatten(jax.tree.structure(fresh), [have.get(path, leaf) for path, leaf in flat.items()])

    return denoise, init_params


_CONDITION_LAYERS = ("map_step_", "affine_step", "map_guidance", "step_in", "step_out", "guidance_in", "guidance_out", "step/", "step_shift/")


def perceptual(config: ConfigDict) -> tuple[Callable | None, Params]:
    """(distance, its parameters) of the section method.perceptual, (None, {}) without it or without a network.

    parity: as released, pixels in [-1, 1] are taken for [0, 1] (see `metrics.lpips`).
    """
    options = config.method.get("perceptual", ConfigDict()).to_dict()
    network = options.pop("network", "")
    if not network:
        return None, {}
    if config.data.get("image_scale", 1.0) != 1:
        raise ValueError(f"the perceptual distance takes pixels in [-1, 1], found data.image_scale={config.data.image_scale}")
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


def settings_options(config: ConfigDict, settings: type, *apart: str) -> dict[str, Any]:
    """The options of a `method` section that are fields of `settings`; raises ValueError for others."""
    options = without(config.method, "name", "teacher", *apart)
    names.check_options(settings, options, "config.method")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}


def run_mesh(config: ConfigDict) -> jax.sharding.Mesh:
    """The devices of the run, as the section `train` lays them out."""
    return mesh.make_mesh(config.train.get("num_devices", 0) or None, layout=config.train.get("mesh", ""))


def optimizer(config: ConfigDict, section: ConfigDict | None = None) -> tuple[Any, Callable[[Array], Array]]:
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
