"""Building from shapes alone: what a run compiles, where neither its data nor anybody's weights need be.

    with planning({"runs/edm_imagenet64": teacher}):        # configs of run folders that may hold nothing yet
        experiment = build.experiment(config)
        batch = next(experiment.batches())                  # shapes, as those in experiment.frozen

Inside, no data is opened and no weights are read; a teacher, and the run that another starts from, are networks without
numbers. Nothing else changes: the step is that of the run.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from diffjax.build import companions, networks, sizes
from diffjax.core import trees
from diffjax.core.types import Key, Params
from diffjax.data import latents
from diffjax.runtime import checkpoint, checkpoint_read, configs
from diffjax.weights import folders

Shapes = dict[str, jax.ShapeDtypeStruct]


@contextlib.contextmanager
def planning(runs: Mapping[str, ConfigDict]) -> Iterator[None]:
    """What is built inside has shapes for weights and data. runs: the configs of run folders that need not be there."""
    global _runs
    before, _runs = _runs, {str(Path(folder)): config for folder, config in runs.items()}
    try:
        yield
    finally:
        _runs = before


def active() -> bool:
    """Whether this is built inside `planning`."""
    return _runs is not None


def config_of(folder: str | Path) -> dict | None:
    """The config of a run folder: inside `planning` the one that was given for it, or else that in the folder; None
    where there is none."""
    given = (_runs or {}).get(str(Path(folder)))
    return configs.read(folder) if given is None else given.to_dict()


def read(folder: str | Path, step: int | None = None) -> tuple[Params | None, dict, int]:
    """(parameters, config, step) of a run folder as `checkpoint_read.load_params`; inside `planning` without the
    former. Raises CheckpointError where there is none."""
    if not active():
        return checkpoint_read.load_params(folder, ema=None, step=step)
    found = config_of(folder)
    if found is None:
        raise checkpoint.CheckpointError(
            f"{folder} holds no run: train it first, give another folder, or say what it will hold with "
            "--teacher_config=configs/edm/imagenet64_adm.py"
        )
    return None, found, 0


def folder_config(folder: Path) -> ConfigDict:
    """The config of a run with a model as diffusers saves it: its config files are read, its weights need not be there.
    Raises FileNotFoundError, ValueError as `folders.describe`."""
    config = ConfigDict({"seed": 0, **folders.describe(folder)})
    config.data.companions = str(folder)
    return config


def checked(init: Callable[[Key], Params], params: Params | None, what: str) -> Params:
    """The parameters that were read, which must be those that `init` makes; their shapes where none were. Raises
    ValueError as `trees.check`."""
    shapes = jax.eval_shape(init, jax.random.key(0))
    if params is None:
        return shapes
    trees.check(shapes, params, what)
    return params


def takes_texts(config: ConfigDict) -> bool:
    """Whether the network of a config is told texts, by its own options: its companions are not opened."""
    return bool(config.data.get("companions")) and "text" in _conditions(config)


def batch(config: ConfigDict) -> Shapes:
    """What a step of a config takes beside state and teacher: pictures as they are loaded, or encoded, and conditions.
    A text is as long as published models have it."""
    count, shape = config.train.batch_size, networks.data_shape(config.data)
    found = _conditions(config)
    if "text" in found:
        if config.model.name == "pixart":
            found["text_mask"] = jax.ShapeDtypeStruct(found["text"].shape[:2], jnp.bool_)
        else:
            found["text_length"] = jax.ShapeDtypeStruct((count,), jnp.int32)
        found |= {f"negative_{name}": leaf for name, leaf in found.items() if name != "control"}
    if config.data.name == "prompts":
        return found
    beside = config.data.get("companions", "")
    is_encoded = bool(beside) and beside not in companions.PACKAGED
    image = jax.ShapeDtypeStruct((count, *shape.shape), jnp.float32 if is_encoded else jnp.uint8)
    told = (*latents.METADATA, "aspect") if config.model.get("metadata") else ()
    return {"image": image, **found} | {name: jax.ShapeDtypeStruct((count,), jnp.float32) for name in told}


def _conditions(config: ConfigDict) -> Shapes:
    """Of a batch; texts only where something encodes them."""
    found = sizes.conditions(config.model, networks.data_shape(config.data), config.train.batch_size)
    own = ("label",) if not config.data.get("companions") else ("label", "control", "text", "pooled")
    return {name: leaf for name, leaf in found.items() if name in own}


_runs: Mapping[str, ConfigDict] | None = None
