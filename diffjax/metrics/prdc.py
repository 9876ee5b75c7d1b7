"""Precision, recall, density and coverage of a set of samples, from nearest neighbours of features.

With R_k(a) the distance from a real feature a to its k-th nearest other real one, S_k(b) the same among the samples,

    precision = mean_b  any_a |a - b| <= R_k(a)        Kynkaanniemi 2019, eq. 1 and 2            (1)
    recall    = mean_a  any_b |a - b| <= S_k(b)        Kynkaanniemi 2019, eq. 1 and 2            (2)
    density   = mean_b  sum_a [|a - b| <= R_k(a)] / k  Naeem 2020, eq. 4                         (3)
    coverage  = mean_a  min_b |a - b| <= R_k(a)        Naeem 2020, eq. 6                         (4)

Distances are float64, in blocks of rows, so memory grows with the block and not with the square of the sets.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy.spatial import distance

_BLOCK_VALUES = 2**24  # distances at a time: 128 MiB


class PRDC(NamedTuple):
    """Fractions; density may exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def prdc(real: np.ndarray, samples: np.ndarray, k: int = 5) -> PRDC:
    """Eq. 1-4 for features `real` (n, D) and `samples` (m, D).

    Raises ValueError for features of other shapes, values that are not finite, and k outside 1..min(n, m) - 1.
    """
    real, samples = _checked(real, "real"), _checked(samples, "samples")
    if real.shape[1] != samples.shape[1]:
        raise ValueError(
            f"real features have width {real.shape[1]}, those of the samples {samples.shape[1]}: use one extractor"
        )
    most = min(len(real), len(samples)) - 1
    if not 1 <= k <= most:
        raise ValueError(f"k must be in 1..{most} for sets of {len(real)} and {len(samples)}, found {k}")
    real_radii, sample_radii = _radii(real, k), _radii(samples, k)
    inside, recalled, covered = np.zeros(len(samples), np.int64), [], []  # inside: real balls around each sample
    for rows, between in _blocks(real, samples):
        within = between <= real_radii[rows, None]
        inside += within.sum(axis=0)
        covered.append(within.any(axis=1))
        recalled.append((between <= sample_radii[None, :]).any(axis=1))
    return PRDC(
        precision=float(np.mean(inside > 0)),
        recall=float(np.mean(np.concatenate(recalled))),
        density=float(np.mean(inside) / k),
        coverage=float(np.mean(np.concatenate(covered))),
    )


def _radii(features: np.ndarray, k: int) -> np.ndarray:
    """Distance to the k-th nearest other feature, (n,): the nearest of all is the feature itself."""
    return np.concatenate([np.partition(block, k, axis=1)[:, k] for _, block in _blocks(features, features)])


def _blocks(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """(rows of a, their distances to all of b)."""
    size = max(1, _BLOCK_VALUES // len(b))
    for start in range(0, len(a), size):
        rows = slice(start, start + size)
        yield rows, distance.cdist(a[rows], b)


def _checked(features: np.ndarray, name: str) -> np.ndarray:
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or not np.all(np.isfinite(features)):
        raise ValueError(f"{name} must be finite features (n, D), found shape {features.shape}: flatten images first")
    return features
