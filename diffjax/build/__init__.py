"""From a config to the objects that it names: the one place where data, models, methods and the loop meet.

Every `name` in a config selects a function from a dict of `networks` or `methods`; the rest of its section are
that function's options, so a signature is the list of what may be set.

    experiment(config)      what `train.loop.run` trains
    load_run(workdir)       a trained run, ready to sample
    load_model(folder)      a published model, the same
    run_plan(run)           the sampling plan it was trained for, or of its `sample` section
    draw(run, plan, ...)    seeds to images
"""

from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from diffjax.build import companions, methods, runs, video_networks
from diffjax.build.costs import emd_iteration
from diffjax.build.methods import teacher_targets
from diffjax.build.networks import data_shape, denoiser
from diffjax.build.parts import Parts, assignment_warning, beside_data, source_of
from diffjax.build.published import load_model, read_weights, write_weights
from diffjax.build.runs import Run, draw, load_run, plan, resolve, run_plan, trained_steps
from diffjax.core import names
from diffjax.core.types import Array, Params
from diffjax.data import sources
from diffjax.sampling import generate
from diffjax.train import ema, loop, step
from diffjax.train import state as train_state

__all__ = [
    "SECTIONS", "Run", "all_images", "all_items", "assignment_warning", "data_shape", "denoiser", "draw", "emd_iteration",
    "experiment", "load_model", "load_run", "plan", "read_weights", "resolve", "run_plan", "teacher_targets", "trained_steps",
    "write_weights",
]  # fmt: skip

SECTIONS = ("seed", "data", "model", "method", "optim", "ema", "train", "sample", "allow_config_change")
_SAMPLES_SHOWN = 36  # images of a sample grid during training
_PICTURES_SHOWN = 8  # of a network on latents, whose pictures are large; videos


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
    make = names.lookup(methods.METHODS, config.method.get("name"), "method")
    parts = make(resolve(config))
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
        warning=parts.warning,
    )


def _sampler(config: ConfigDict, parts: Parts) -> Callable[[Params], np.ndarray]:
    """Parameters to the uint8 images or videos of a sample grid, the same seeds each time; of texts those that are held
    out, of pictures to go on from those of the data."""
    config = resolve(config)
    beside = beside_data(config)
    is_latent = beside is not None and beside.autoencoder is not None
    count = _PICTURES_SHOWN if is_latent or parts.data.num_frames else _SAMPLES_SHOWN
    pixels = parts.data.image_size * (beside.factor if is_latent else 1)
    cond = companions.metadata(config.model, pixels, count)
    if beside is not None:
        if beside.text is not None:
            cond |= companions.conditions(beside, _shown_texts(source_of(config.data), count), "", count)
        cond |= companions.controls(config.model, pixels, count)

    if config.model.name in video_networks.FIRST_FRAME:
        source = source_of(config.data)
        frames = video_networks.first_frames(source, video_networks.spread(source, count))
        cond["first_frame"] = frames * parts.data.scale

    def finish(images: Array) -> Array:
        return generate.to_uint8(images / parts.data.scale)

    def sample(params: Params) -> np.ndarray:
        images = generate.generate(
            parts.denoise,
            parts.with_frozen(params),
            parts.plan,
            range(count),
            parts.data.shape,
            batch_size=count,
            seed=config.seed,
            cond=cond,
            num_classes=parts.data.num_classes or None,
            finish=None if is_latent else finish,
            sampler=runs.sampler_for(parts.plan, parts.sampler),
        )
        return np.asarray(generate.to_uint8(beside.pictures(images))) if is_latent else images

    return sample


def _shown_texts(source: sources.Source, count: int) -> list[str]:
    """`count` texts, again from the first where there are fewer."""
    held_out = getattr(source, "held_out", None)
    caption = getattr(source, "caption", lambda i: str(source[i]["caption"]))
    texts = held_out or [caption(i) for i in range(min(count, len(source)))]
    return [texts[i % len(texts)] for i in range(count)]


def all_images(data: ConfigDict) -> np.ndarray:
    """Every image (N, H, W, C) of a `data` section, as stored: uint8, or float32 in [-1, 1]."""
    return all_items(data)["image"]


def all_items(data: ConfigDict) -> dict[str, np.ndarray]:
    """Every item of a `data` section, {"image", "label" ...} as stored, each (N, ...)."""
    if data.name == "latents":
        raise ValueError("cached latents hold no images: give those they were made of, in their own data section")
    source = source_of(data)
    return sources.read(source, range(len(source)))
