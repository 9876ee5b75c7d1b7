"""From a config to the objects that it names: the one place where data, models, methods and the loop meet.

Every `name` in a config selects a function from a dict of `networks` or `methods`; the rest of its section are
that function's options, so a signature is the list of what may be set.

    experiment(config)      what `train.loop.run` trains
    load_run(workdir)       a trained run, ready to sample
    load_model(folder)      a published model, the same
    run_plan(run)           the sampling plan it was trained for, or of its `sample` section
    draw(run, plan, ...)    seeds to images
"""

import numpy as np
from ml_collections import ConfigDict

from diffjax.build import along, methods, planned, runs
from diffjax.build.costs import emd_iteration
from diffjax.build.methods import teacher_targets
from diffjax.build.networks import data_shape, denoiser
from diffjax.build.parts import assignment_warning, source_of
from diffjax.build.published import load_model, read_weights, write_weights
from diffjax.build.runs import Run, draw, load_run, plan, resolve, run_plan, trained_steps
from diffjax.core import names
from diffjax.data import sources
from diffjax.train import ema, loop, step
from diffjax.train import state as train_state
from diffjax.train.settings import Settings

__all__ = [
    "SECTIONS", "Run", "all_images", "all_items", "assignment_warning", "check", "data_shape", "denoiser", "draw", "emd_iteration",
    "experiment", "load_model", "load_run", "plan", "read_weights", "resolve", "run_plan", "teacher_targets", "trained_steps",
    "write_weights",
]  # fmt: skip

SECTIONS = ("seed", "data", "model", "method", "optim", "ema", "train", "sample", "evaluate", "allow_config_change")


def experiment(config: ConfigDict) -> loop.Experiment:
    """The experiment that `config` describes; data and teacher are opened, nothing is computed.

    Raises ValueError for unknown sections, names or options, FileNotFoundError for absent data, CheckpointError
    for an absent teacher.
    """
    check(config)
    make = methods.METHODS[config.method.name]
    config = resolve(config)
    parts = make(config)
    evaluated = None if planned.active() else along.evaluation_of(config, parts)
    average = config.get("ema", ConfigDict({"halflife_images": 0})).to_dict()
    decay = ema.make_decay(config.train.batch_size, **average)

    def init() -> train_state.TrainState:
        return train_state.create(parts.method, parts.init_params(), config.seed, averaged=decay is not None)

    return loop.Experiment(
        init=init,
        step=step.make_train_step(parts.method, decay, config.train.get("microbatches", 0)),
        frozen=parts.frozen,
        batches=parts.batches,
        batch_size=config.train.batch_size,
        sample=None if parts.plan is None or planned.active() else along.grid(config, parts),
        hooks=parts.hooks if evaluated is None else (*parts.hooks, evaluated.hook),
        warning=parts.warning,
        tables=dict if evaluated is None else lambda: {"protocols": evaluated.protocols()},
    )


def check(config: ConfigDict) -> None:
    """Raises ValueError for a config that is none of a training: its sections, its method, the keys of `train`."""
    for key in config:
        if key not in SECTIONS:
            raise ValueError(f"unknown section config.{key}; {names.nearest(key, SECTIONS)}")
    absent = [key for key in ("seed", "data", "model", "method", "optim", "train") if key not in config]
    if absent:
        raise ValueError(f"the config lacks {absent}; see configs/quick/edm_digits.py for a complete one")
    Settings.from_config(config.train.to_dict())
    names.lookup(methods.METHODS, config.method.get("name"), "method")
    if config.train.get("microbatches") and config.method.name not in methods.IN_MICROBATCHES:
        raise ValueError(
            f"train.microbatches is for the methods {methods.IN_MICROBATCHES}, found {config.method.name!r}: leave it out; sfd "
            "has method.accumulate"
        )


def all_images(data: ConfigDict) -> np.ndarray:
    """Every image (N, H, W, C) of a `data` section, as stored: uint8, or float32 in [-1, 1]."""
    return all_items(data)["image"]


def all_items(data: ConfigDict) -> dict[str, np.ndarray]:
    """Every item of a `data` section, {"image", "label" ...} as stored, each (N, ...)."""
    if data.name == "latents":
        raise ValueError("cached latents hold no images: give those they were made of, in their own data section")
    source = source_of(data)
    return sources.read(source, range(len(source)))
