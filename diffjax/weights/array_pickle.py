"""Pickles of numpy arrays in dicts, read without running anything that they hold (see `pickles`).

    read("i3d-kinetics-400.ckpt")       # {"params": {"Conv3d_1a_7x7": {...}}, "batch_stats": {...}}
"""

import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from diffjax.weights import pickles
from diffjax.weights.edm_pickle import ScalarType
from diffjax.weights.pickles import RefusedError

_EXPECTED = "give a file of dicts of numpy arrays, pickled with protocol 2 to 4"


class PickledArray(pickles.Buildable):
    """What numpy's pickle of an array says."""

    def __init__(self, *_: Any):
        self.state: tuple = ()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def values(self) -> np.ndarray:
        """The array, read-only. Raises RefusedError for other things than numbers, and for another number of them."""
        _, shape, kind, fortran, content = self.state
        if not isinstance(kind, ScalarType) or not isinstance(content, bytes):
            raise RefusedError(f"found an array of {type(kind).__name__}, expected numbers")
        if not all(type(n) is int and n >= 0 for n in shape):
            raise RefusedError("found an array whose shape is not in whole numbers")
        if math.prod(shape) * np.dtype(kind.code).itemsize != len(content):
            raise RefusedError(f"found an array of shape {pickles.shown(str(shape))} in {len(content):,} bytes")
        return np.frombuffer(content, kind.code).reshape(shape, order="F" if fortran else "C")


class Unpickler(pickles.Unpickler):
    """Dicts of PickledArrays."""

    builders = {
        ("numpy.core.multiarray", "_reconstruct"): pickles.Function(PickledArray),
        ("numpy._core.multiarray", "_reconstruct"): pickles.Function(PickledArray),
        ("numpy", "ndarray"): "ndarray",  # the first argument of _reconstruct
        ("numpy", "dtype"): pickles.Function(ScalarType),
    }


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The dict of a file, its arrays read-only. Raises as `load`."""
    return load(path, Unpickler, _arrays, _EXPECTED)


def load(
    path: str | os.PathLike[str], unpickler: type[pickles.Unpickler], plain: Callable[[Any], dict[str, Any]], expected: str
) -> dict[str, Any]:
    """What `plain` makes of a file's content. Raises FileNotFoundError, and ValueError, which ends in `expected`, for a
    file that is damaged, something else, or names a global that is not on the unpickler's list."""
    with open(path, "rb") as file:
        try:
            return plain(unpickler(pickles.File(file)).load())
        except RefusedError as error:
            raise ValueError(f"{path}: {error}; {expected}") from error
        except pickles.DAMAGED as error:
            raise ValueError(
                f"{path} is damaged or no such file ({type(error).__name__}: {pickles.shown(error)}): {expected}"
            ) from error


def _arrays(found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise RefusedError(f"found a {type(found).__name__}, expected a dict of arrays")
    plain = {}
    for name, entry in found.items():
        if type(name) is not str:
            raise RefusedError(f"found a key of type {type(name).__name__}, expected names")
        plain[name] = entry.values() if isinstance(entry, PickledArray) else _arrays(entry)
    return plain
