"""Names of FID's InceptionV3 in the file that pytorch-fid and torch-fidelity release.

    network, init = functionalize(lambda rngs: InceptionV3(rngs=rngs))
    params = load("weights/pt_inception-2015-12-05-6726825d.pth", jax.eval_shape(init, jax.random.key(0)))

The file holds convolutions without bias, each with its batch normalisation; ours hold the two as one (eq. 1 of
metrics.inception), made here in float64.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.core import trees
from diffjax.core.types import Params
from diffjax.weights import keymap
from diffjax.weights import load as files
from diffjax.weights.keymap import KeyMap

FILE = "pt_inception-2015-12-05-6726825d.pth"  # torch-fidelity's weights-inception-2015-12-05-6726825d.pth is the same
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

TABLE = KeyMap(
    {
        "stem/1a": "Conv2d_1a_3x3",
        "stem/2a": "Conv2d_2a_3x3",
        "stem/2b": "Conv2d_2b_3x3",
        "stem/3b": "Conv2d_3b_1x1",
        "stem/4a": "Conv2d_4a_3x3",
        "mixed/*/convs/*": "Mixed_*.*",
        "logits": "fc",
    },
    ignored=(r"fc\.bias",),  # Inception scores are computed without it
)

_EPS = 1e-3  # of every batch normalisation
_NORM = ("weight", "bias", "running_mean", "running_var")


def load(path: str | os.PathLike[str], expected: Params) -> Params:
    """The parameters of a file, or of FILE in a folder, as a tree like `expected` (arrays or shapes).

    Raises FileNotFoundError with what to put where; ValueError for a damaged file, and naming every weight that is
    missing, extra or misshapen.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"the weights of FID's Inception network are absent: put {FILE}, the file that the project pytorch-fid "
            f"releases as fid_weights, at {path} (91 MiB, SHA-256 {SHA256[:8]}...), or name its place"
        )
    return to_params(files.read(path), expected)


def to_params(weights: Mapping[str, Any], expected: Params) -> Params:
    """PyTorch arrays by name as a tree like `expected`. Raises ValueError naming what is missing, extra, misshapen."""
    return keymap.to_params(TABLE, folded(weights), expected, "the weights of FID's Inception network")


def folded(weights: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Theirs with X.conv.weight and X.bn.* as X.weight and X.bias, float32; others stay. Raises ValueError naming the
    arrays of normalisations that are missing or misshapen."""
    found, lines = dict(weights), []
    for name in [name for name in weights if name.endswith(".conv.weight")]:
        layer = name.removesuffix(".conv.weight")
        kernel = np.asarray(found.pop(name), np.float64)
        norm = {part: found.pop(f"{layer}.bn.{part}", None) for part in _NORM}
        found.pop(f"{layer}.bn.num_batches_tracked", None)
        for part, array in norm.items():
            if array is None:
                lines.append(f"missing: {layer}.bn.{part} {[len(kernel)]}")
            elif tuple(array.shape) != (len(kernel),):
                lines.append(f"different: {layer}.bn.{part}, expected {[len(kernel)]}, found {list(array.shape)}")
        if not lines:
            gamma, beta, mean, variance = (np.asarray(norm[part], np.float64) for part in _NORM)
            scale = gamma / np.sqrt(variance + _EPS)
            found[f"{layer}.weight"] = (kernel * scale.reshape(-1, *(1,) * (kernel.ndim - 1))).astype(np.float32)
            found[f"{layer}.bias"] = (beta - mean * scale).astype(np.float32)
    trees.report(lines, "the batch normalisations of FID's Inception network")
    return found
