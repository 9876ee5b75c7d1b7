"""Classifiers from configs: trained by method "classify", read back as a feature space for evaluation.

A part of the data is held out (method.held_out, a share); every method.test_every_steps steps the averaged weights are
tested on it, and the log has `held_out_accuracy`.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from diffjax.build import networks, parts
from diffjax.core import rng, trees
from diffjax.core.types import Array, Key, Params
from diffjax.data import held_out, loader, sources, transforms
from diffjax.methods import classify
from diffjax.models import classifier
from diffjax.nn import functional
from diffjax.runtime import checkpoint_read
from diffjax.train import hooks

NAME = "classifier"  # of the network, as model.name
_TEST_BATCH = 256


class Classifier(NamedTuple):
    """features(params, x (B, H, W, C) float in [-1, 1]) -> (B, width), jittable. sha256: of names, shapes and values of
    all weights."""

    features: Callable[[Params, Array], Array]
    params: Params
    data: sources.DataShape
    width: int
    sha256: str


def load(workdir: str | Path) -> Classifier:
    """The classifier of a run folder, with its newest averaged weights.

    Raises checkpoint.CheckpointError where there is none, ValueError for a run of another method, or weights that do
    not fit.
    """
    params, saved, _ = checkpoint_read.load_params(workdir, ema=None)
    config = ConfigDict(saved)
    if config.model.name != NAME:
        raise ValueError(
            f"{workdir} holds a run of {config.model.name!r}, expected a classifier: train one with "
            "configs/quick/classifier_digits.py"
        )
    shape = networks.data_shape(config.data)
    features, init = _functions(config.model, shape, "features")
    trees.check(jax.eval_shape(init, jax.random.key(0)), params, f"the checkpoint in {workdir}")
    return Classifier(features, params, shape, params["features_out"]["bias"].shape[0], trees.sha256(params))


def classify_parts(config: ConfigDict) -> parts.Parts:
    """The parts of an experiment that trains a classifier. Raises ValueError for unknown options, and for data without
    labels, or that is encoded."""
    shape = networks.data_shape(config.data)
    _check(config, shape)
    options = parts.without(config.method, "name")
    share, every = options.pop("held_out", 0.1), options.pop("test_every_steps", 0)
    if options:
        found = sorted(options)
        raise ValueError(f"method 'classify' takes held_out and test_every_steps, found {found}: leave them out")
    logits, init = _functions(config.model, shape, "__call__")
    training, tested = held_out.split(parts.source_of(config.data), share)
    return parts.Parts(
        method=classify.make(logits, *parts.optimizer(config), parts.prepare(config)),
        init_params=lambda: init(rng.stream(config.seed, "init")),
        frozen={},
        batches=lambda: loader.make_batches(training, config.train.batch_size, config.seed),
        denoise=None,
        data=shape,
        plan=None,
        hooks=(hooks.Hook(every, _test(logits, tested)),),
    )


def _check(config: ConfigDict, shape: sources.DataShape) -> None:
    if config.model.get("name") != NAME:
        raise ValueError(f"method 'classify' trains model.name={NAME!r}, found {config.model.get('name')!r}")
    if config.data.name == "latents" or config.data.get("companions") or shape.scale != 1 or shape.num_frames:
        raise ValueError(
            "a classifier sees pictures in [-1, 1]: leave latents, data.companions, image_scale and num_frames out"
        )
    if not shape.num_classes:
        raise ValueError("a classifier learns labels: set config.data.num_classes")


def _functions(
    model: ConfigDict, shape: sources.DataShape, method: str
) -> tuple[Callable[[Params, Array], Array], Callable[[Key], Params]]:
    """(function of the network, init). Raises ValueError for unknown options."""
    options = parts.without(model, "name")
    parameters = inspect.signature(classifier.Classifier.__init__).parameters
    known = [key for key, p in parameters.items() if p.default is not p.empty]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"config.model does not fit {NAME!r}: found {unknown}, its options are {known}")
    where = shape.image_size, shape.channels, shape.num_classes
    return functional.functionalize(lambda rngs: classifier.Classifier(*where, **options, rngs=rngs), method)


def _test(
    logits: Callable[[Params, Array], Array], tested: sources.Source
) -> Callable[[int, int, Params], dict[str, float]]:
    """What a hook calls: accuracy on `tested`."""

    @jax.jit
    def right(params: Params, image: Array, label: Array) -> Array:
        found = logits(params, transforms.to_float(image))
        return (found.argmax(axis=-1) == label).sum()

    def test(step: int, images_seen: int, params: Params) -> dict[str, float]:
        del step, images_seen
        total = 0
        for start in range(0, len(tested), _TEST_BATCH):
            batch = sources.read(tested, range(start, min(start + _TEST_BATCH, len(tested))))
            # the last batch repeats its first image, with a class that there is not: one shape is one program
            missing = _TEST_BATCH - len(batch["label"])
            image = np.concatenate([batch["image"], np.repeat(batch["image"][:1], missing, axis=0)])
            total += int(right(params, image, np.pad(batch["label"], (0, missing), constant_values=-1)))
        return {"held_out_accuracy": total / len(tested)}

    return test

