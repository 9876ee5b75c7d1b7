"""Weights of one run as the start of another, at another resolution or for other data.

    first = transfer.start(config, init)       # of a config with method.start, the folder of a run
    params, told = first.init_params(), first.report

Every weight is copied by its path. What a class, a text or control metadata goes through first is made anew where its
shapes differ (other classes, another text encoder), and left out where there is none. Tables of positions and
distances that MDT trains are resampled, see `nn.positions`. All else must fit. The optimiser's state is new, an average
of weights begins at those that training begins with. Berrada et al. 2024, table 4.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffjax.build import planned, runs
from diffjax.core import rng, trees
from diffjax.core.types import Array, Key, Params
from diffjax.nn import positions

# Parts of networks that see class, text or metadata first: of DiT, MDT and MM-DiT; of PixArt; of U-Nets on latents; of
# those on pixels; of the residual MLP.
_INPUTS = re.compile(
    r"(conditions/(label|text|pooled|metadata/(high|low|null))|label|caption/(project|null)|metadata/(high|low|null)"
    r"|classes|added|.*/cross_attention/kv|map_label|label_embedding)/"
)
_POSITIONS, _BIASES = ("positions", "decoder_positions"), "bias_by_distance"  # tables that MDT trains


class Start(NamedTuple):
    """init_params: the first weights, traceable. report: what was copied, resampled, made anew; "" for fresh ones."""

    init_params: Callable[[], Params]
    report: str = ""


def start(config: ConfigDict, init: Callable[[Key], Params]) -> Start:
    """The first weights of a run: those of the run method.start, or fresh ones by `init`.

    Raises ValueError for weights that do not fit, naming each, and for positions that do not say how many tokens the
    first run had; CheckpointError for a folder that holds no run.
    """
    folder = config.method.get("start", "")
    if not folder or planned.active():
        return Start(lambda: init(rng.stream(config.seed, "init")))
    run = runs.load_run(folder)
    _check_positions(config, run)
    shapes = jax.eval_shape(init, jax.random.key(0))
    want, have = trees.flatten(shapes), trees.flatten(run.params)
    changed = _changed_inputs(want, have)
    kept = {path: leaf for path, leaf in have.items() if _part(path) not in changed}
    expected = {path: leaf for path, leaf in want.items() if _part(path) not in changed}
    resampled = _resampled(expected, kept) if config.model.name == "mdt" else {}
    kept |= resampled
    trees.check(expected, kept, f"the run in {folder}, as the start of config.model,")

    def init_params() -> Params:
        fresh = trees.flatten(init(rng.stream(config.seed, "init"))) if len(kept) < len(want) else {}
        return jax.tree.unflatten(jax.tree.structure(shapes), [kept.get(path, fresh.get(path)) for path in want])

    anew = changed & {_part(path) for path in want}
    told = {"resampled": list(resampled), "made anew": sorted(anew), "left out": sorted(changed - anew)}
    lines = [f"start: {len(kept) - len(resampled)} of {len(want)} arrays are those of {folder}, step {run.step:,}"]
    lines += [f"{what}: {', '.join(names)}" for what, names in told.items() if names]
    return Start(init_params, "; ".join(lines))


def _part(path: str) -> str:
    """The part of _INPUTS that a weight belongs to, "" for others."""
    found = _INPUTS.match(path + "/")
    return found[1] if found else ""


def _changed_inputs(want: Mapping[str, Any], have: Mapping[str, Any]) -> set[str]:
    """Parts of _INPUTS whose weights are not the same in number and shape."""
    shapes = [{path: (leaf.shape, leaf.dtype) for path, leaf in flat.items()} for flat in (want, have)]
    differing = {path for path, _ in shapes[0].items() ^ shapes[1].items()}
    return {_part(path) for path in differing} - {""}


def _resampled(expected: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, Array]:
    """The trained tables of an MDT that are for another number of tokens, brought to that of `expected`."""
    found = {}
    for path, leaf in expected.items():
        name = path.rpartition("/")[2]
        if path not in kept or leaf.shape == kept[path].shape or name not in (*_POSITIONS, _BIASES):
            continue
        trained = np.asarray(kept[path])
        if name == _BIASES:
            table = positions.resample_biases(trained, positions.tokens_of_biases(leaf.shape[-2]))
        else:
            table = positions.resample(trained, math.isqrt(leaf.shape[-2]))
        found[path] = jnp.asarray(table)
    return found


def _check_positions(config: ConfigDict, run: runs.Run) -> None:
    mode = config.model.get("positions", "extrap")
    ours, first = (c.data.image_size // c.model.get("patch", 2) for c in (config, run.config))
    if mode != "extrap" and not config.model.get("base_size") and ours != first:
        raise ValueError(
            f"found model.positions={mode!r} without model.base_size, and images of {ours} tokens a side after {first} "
            f"of the run in {config.method.start}: set model.base_size={run.config.model.get('base_size') or first}"
        )
