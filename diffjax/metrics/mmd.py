"""Squared maximum mean discrepancy of two sets of features, in float64 and in blocks; CMMD.

For a kernel k, features x_1..x_n and y_1..y_m,

    MMD^2 = mean k(x, x') + mean k(y, y') - 2 mean k(x, y)                       Gretton 2012, eq. 5      (1)

with all pairs (biased, the estimate of least variance), or without those of a feature with itself (unbiased, Gretton
2012, eq. 3; it can be below 0). CMMD is 1000 times the biased one with

    k(x, y) = exp(-|x - y|^2 / (2 sigma^2)),  sigma = 10                         Jayasumana 2024, sec. 4  (2)

on CLIP embeddings (ViT-L/14 at 336 pixels) of unit length. Against the release, which sums in float32 and so is good to
some 1e-4 of the scaled value, sums here are float64.
"""

from collections.abc import Callable

import numpy as np

_SIDE = 2048  # the kernel is evaluated at _SIDE x _SIDE pairs at a time: 32 MiB, and two more for its steps
_SIGMA, _SCALE = 10.0, 1000.0

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (n, D), (m, D) -> (n, m)


def squared_mmd(x: np.ndarray, y: np.ndarray, kernel: Kernel, *, unbiased: bool) -> float:
    """Eq. 1 of features x (n, D) and y (m, D). Raises ValueError for features of other shapes or unequal widths, values
    that are not finite, and fewer than 2 features of either for the unbiased estimate."""
    x, y = checked(x, "first"), checked(y, "second")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"the first features have width {x.shape[1]}, the second {y.shape[1]}: use one extractor")
    n, m, least = len(x), len(y), 2 if unbiased else 1
    if min(n, m) < least:
        raise ValueError(f"expected at least {least} features on either side, found {n} and {m}: draw more")
    pairs = (n * (n - 1), m * (m - 1)) if unbiased else (n * n, m * m)
    within = [_sum(z, z, kernel, diagonal=not unbiased) / count for z, count in zip((x, y), pairs, strict=True)]
    return sum(within) - 2 * _sum(x, y, kernel) / (n * m)


def cmmd(real: np.ndarray, samples: np.ndarray) -> float:
    """CMMD of unit embeddings `real` (n, D) and `samples` (m, D). Raises like `squared_mmd`, and ValueError for
    embeddings of another length than 1."""
    for name, embeddings in (("real", real), ("samples", samples)):
        lengths = np.linalg.norm(checked(embeddings, name), axis=1)
        # embeddings normalised in float16 are off by 1e-3
        if np.abs(lengths - 1).max(initial=0.0) > 1e-2:
            found = f"{lengths.min():g} to {lengths.max():g}"
            raise ValueError(f"{name} have lengths of {found}, expected 1: divide by them")
    return _SCALE * squared_mmd(real, samples, _gaussian, unbiased=False)


def checked(features: np.ndarray, name: str) -> np.ndarray:
    """`features`, floats as they are. Raises ValueError unless they are finite and (N, D)."""
    features = np.asarray(features)
    if features.ndim != 2 or not np.issubdtype(features.dtype, np.floating) or not np.isfinite(features).all():
        raise ValueError(f"{name} must be finite floats (N, D), found {features.dtype} of shape {features.shape}")
    return features


def _gaussian(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Eq. 2."""
    squares = np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1)[None, :]
    squares -= 2 * (x @ y.T)
    squares *= -0.5 / _SIGMA**2
    return np.exp(squares, out=squares)


def _sum(x: np.ndarray, y: np.ndarray, kernel: Kernel, *, diagonal: bool = True) -> float:
    """Sum of k over all pairs, block by block; without `diagonal` not of x_i and y_i."""
    found = 0.0
    for i in range(0, len(x), _SIDE):
        rows = x[i : i + _SIDE].astype(np.float64)
        for j in range(0, len(y), _SIDE):
            values = kernel(rows, y[j : j + _SIDE].astype(np.float64))
            found += values.sum() - (0.0 if diagonal or i != j else np.trace(values))
    return float(found)
