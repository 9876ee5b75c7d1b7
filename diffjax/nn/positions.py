"""Where patches are, at the resolution of pre-training and at others: tables for n tokens a side, of training on n0.

Fixed tables have the sines and cosines of `embeddings.grid` at the places

    extrap    i                      the integers go on, the top left n0 x n0 tokens are those of training
    interp    i n0 / n               the same limits at every resolution: Chen 2023 (PixArt), Berrada 2024, figure 4
    tile      i mod n0               the table of training, repeated
    crop      i - floor((n - n0)/2)  the table of training in the middle: Esser 2024, section 5.3.2

or, with "bicubic", the table of training resized like an image, as is done with trained ones (Dosovitskiy 2021, section
3.2). By the formula every vector has the squared norm width / 2; in a resized table those between tokens are shorter.

>>> from diffjax.nn import positions
>>> positions.places("interp", 4, 2).tolist()
[0.0, 0.5, 1.0, 1.5]
"""

import math
from collections.abc import Callable

import jax
import numpy as np
from scipy import interpolate

from diffjax.core import names
from diffjax.nn import embeddings

PLACES: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "extrap": lambda i, base: i,
    "interp": lambda i, base: i * base / len(i),
    "tile": lambda i, base: i % base,
    "crop": lambda i, base: i - (len(i) - base) // 2,
}
MODES = (*PLACES, "bicubic")
_UNUSED = 3  # last rows of a table of biases, as published


def places(mode: str, side: int, base: float) -> np.ndarray:
    """(side,) float64, where the tokens of one axis are, for networks that were trained on `base` = n0 of them."""
    return PLACES[mode](np.arange(side, dtype=np.float64), base)


def table(mode: str, side: int, base: float, width: int) -> np.ndarray:
    """(side^2, width) float32, tokens row by row. Raises ValueError as `check`."""
    check(mode, base)
    if mode != "bicubic":
        at = places(mode, side, base)
        return embeddings.grid(at, at, width)
    own = embeddings.grid(np.arange(base), np.arange(base), width).reshape(int(base), int(base), width)
    with jax.ensure_compile_time_eval():  # a constant, also where the network is traced
        return np.asarray(jax.image.resize(own, (side, side, width), "cubic")).reshape(-1, width)


def check(mode: str, base: float) -> None:
    """Raises ValueError for an unknown mode, and for a number of tokens that it cannot repeat, cut or resize."""
    names.lookup(dict.fromkeys(MODES), mode, "model.positions")
    if not base > 0 or (base != int(base) and mode not in ("extrap", "interp")):
        expected = "a number above 0" if mode in ("extrap", "interp") else "a whole number of tokens"
        raise ValueError(f"found base_size={base} for positions={mode!r}, expected {expected}")


# Trained tables ------------------------------------------------------------------------------------------------


def resample(trained_BLD: np.ndarray, side: int) -> np.ndarray:
    """A trained table (..., n0^2, D) for side^2 tokens at the places of "interp", float32.

    What training has added to the sines and cosines that it began with is read by a cubic spline between tokens, and
    added to those of the new places: a token at a place of training keeps its vector, and a table that was never
    trained becomes `table("interp", ...)`. Beyond the last token of training the addition goes on unchanged. Training
    began with 0..n0-1, or, in a table that was resampled before, with the limits of a half, quarter or eighth as many
    tokens: those which are nearest.
    """
    *lead, length, width = trained_BLD.shape
    base = math.isqrt(length)

    def sines(num: int, limits: float) -> np.ndarray:
        return table("interp", num, limits, width)[(None,) * len(lead)]

    candidates = [base / 2**halvings for halvings in range(4)]
    limits = min(candidates, key=lambda limits: np.sum((trained_BLD - sines(base, limits)) ** 2))
    added = (trained_BLD - sines(base, limits)).reshape(*lead, base, base, width)
    added = _read(added, places("interp", side, base)).reshape(*lead, side**2, width)
    return (added + sines(side, limits)).astype(np.float32)


def resample_biases(trained: np.ndarray, side: int) -> np.ndarray:
    """Biases by distance (..., (2 n0 - 1)^2 + 3, heads), as in `models.mdt`, for n = `side` tokens a side, float32.

    The same share of the image has the same bias, distance d that of d n0 / n, by a cubic spline between.
    """
    *lead, rows, heads = trained.shape
    distances = math.isqrt(rows - _UNUSED)
    base = (distances + 1) // 2
    biases = trained[..., : rows - _UNUSED, :].reshape(*lead, distances, distances, heads)
    apart = np.arange(1 - side, side) * base / side + base - 1
    biases = _read(biases, apart).reshape(*lead, (2 * side - 1) ** 2, heads)
    return np.concatenate([biases, trained[..., rows - _UNUSED :, :]], axis=-2).astype(np.float32)


def tokens_of_biases(rows: int) -> int:
    """Tokens a side that a table of biases with so many rows is for."""
    return (math.isqrt(rows - _UNUSED) + 1) // 2


def _read(values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """(..., n, n, D) read by cubic splines at all pairs of `at` (m,): (..., m, m, D); constant beyond the ends."""
    count = values.shape[-2]
    weights = interpolate.CubicSpline(np.arange(count), np.eye(count))(np.clip(at, 0, count - 1))
    return np.einsum("ia,jb,...abd->...ijd", weights, weights, values.astype(np.float64), optimize=True)
