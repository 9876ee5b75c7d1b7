"""Names and layouts of NVlabs/edm's PyTorch weights (SongUNet, DhariwalUNet, and zju-pi's SFD versions of both).

Our modules have the names of that code, so one rule covers all of it: "model.enc.8x8_conv.weight" is
enc/8x8_conv/kernel, transposed from (out, in, kh, kw) to (kh, kw, in, out); 1-d weights are scales
of a normalisation. Nothing is dropped in silence: what is missing, extra or misshapen is named.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffjax.core import trees
from diffjax.core.types import Params

PREFIX = "model."  # the preconditioner holds the network under this name


def path(name: str, ndim: int) -> str:
    """Our path of the PyTorch parameter `name` with `ndim` axes; the Fourier frequencies are a buffer there."""
    *parents, leaf = name.removeprefix(PREFIX).split(".")
    if leaf == "weight":
        leaf = "kernel" if ndim > 1 else "scale"
    return "/".join([*parents, leaf])


def layout(array: np.ndarray) -> np.ndarray:
    """(out, in, kh, kw) -> (kh, kw, in, out), (out, in) -> (in, out), 1-d as it is."""
    return np.transpose(array, {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[array.ndim])


def to_params(weights: Mapping[str, np.ndarray], expected: Params) -> Params:
    """PyTorch arrays by name as a tree like `expected` (arrays or shapes).

    Raises ValueError naming every parameter that is missing, extra, or of another shape or type.
    """
    tree: dict[str, Any] = {}
    for name, array in weights.items():
        array = np.asarray(array)
        if array.ndim not in (1, 2, 4):
            raise ValueError(f"{name} has shape {array.shape}, expected 1, 2 or 4 axes: not a weight of these networks")
        *parents, leaf = path(name, array.ndim).split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = layout(array)
    trees.check(expected, tree, "the weights")
    return tree
