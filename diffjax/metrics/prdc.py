"""Precision, recall, density and coverage of a set of samples, from nearest neighbours of features.

With R_k(a) the distance from a real feature a to its k-th nearest other real one, S_k(b) the same among the samples,

    precision = mean_b  any_a |a - b| <= R_k(a)        Kynkaanniemi 2019, eq. 1 and 2            (1)
    recall    = mean_a  any_b |a - b| <= S_k(b)        Kynkaanniemi 2019, eq. 1 and 2            (2)
    density   = mean_b  sum_a [|a - b| <= R_k(a)] / k  Naeem 2020, eq. 4                         (3)
    coverage  = mean_a  min_b |a - b| <= R_k(a)        Naeem 2020, eq. 6                         (4)

The counts are those of distances by their definition in float64, though a matrix product finds most of them: by
|a|^2 + |b|^2 - 2 a.b the square of a distance is known up to `_bound`, and only pairs that this leaves open, some in a
million, are taken by their difference. Distances are in blocks, so memory does not grow with the square of the sets.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_BLOCK_VALUES = 2**22  # distances, or values of features, at a time: 32 MiB


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
    for rows, squares, bound in _blocks(real, samples):
        within = _within(real[rows], samples, squares, real_radii[rows, None], bound)
        inside += within.sum(axis=0)
        covered.append(within.any(axis=1))
        recalled.append(_within(real[rows], samples, squares, sample_radii[None, :], bound).any(axis=1))
    return PRDC(
        precision=float(np.mean(inside > 0)),
        recall=float(np.mean(np.concatenate(recalled))),
        density=float(np.mean(inside) / k),
        coverage=float(np.mean(np.concatenate(covered))),
    )


def _radii(features: np.ndarray, k: int) -> np.ndarray:
    """Distance to the k-th nearest other feature, (n,): the nearest of all is the feature itself."""
    radii = []
    for rows, squares, bound in _blocks(features, features):
        # what could be nearer than the k-th by its definition: at least k + 1 of each row
        limits = np.partition(squares, k, axis=1)[:, k, None] + 2 * bound
        i, j = np.nonzero(squares <= limits)
        distances = _distances(features[rows], features, i, j)
        order = np.lexsort((distances, i))
        radii.append(distances[order][np.searchsorted(i, np.arange(len(squares))) + k])
    return np.concatenate(radii)


def _within(a: np.ndarray, b: np.ndarray, squares: np.ndarray, radii: np.ndarray, bound: float) -> np.ndarray:
    """Where the distances of a (n, D) to b (m, D), whose squares are about `squares`, are at most `radii`."""
    within = squares <= radii**2
    i, j = np.nonzero(np.abs(squares - radii**2) <= bound)
    within[i, j] = _distances(a, b, i, j) <= np.broadcast_to(radii, squares.shape)[i, j]
    return within


def _blocks(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[slice, np.ndarray, float]]:
    """(rows of a, squares of their distances to all of b, how far these may be off)."""
    size = max(1, _BLOCK_VALUES // max(len(b), a.shape[1]))
    columns = max(1, _BLOCK_VALUES // b.shape[1])
    lengths = _lengths(a), _lengths(b)
    bound = _bound(a.shape[1], lengths[0].max() + lengths[1].max())
    for start in range(0, len(a), size):
        rows = slice(start, start + size)
        left = a[rows].astype(np.float64)
        squares = np.empty((len(left), len(b)))
        for at in range(0, len(b), columns):
            right = slice(at, at + columns)
            np.matmul(left, b[right].astype(np.float64).T, out=squares[:, right])
        squares *= -2
        squares += lengths[0][rows, None]
        squares += lengths[1][None, :]
        yield rows, squares, bound


def _bound(width: int, largest: float) -> float:
    """Most by which |a|^2 + |b|^2 - 2 a.b and the sum of squared differences differ, in float64, where |a|^2 + |b|^2 is
    at most `largest`: a sum of `width` products errs by width * eps / 2 of their absolute values, in any order (Higham
    2002, eq. 3.5), and those of all sums here are less than 4 largest; twice that."""
    return 4 * (width + 8) * np.finfo(np.float64).eps * largest


def _lengths(features: np.ndarray) -> np.ndarray:
    """Squared, (n,)."""
    return np.einsum("nd,nd->n", features, features, dtype=np.float64)


def _distances(a: np.ndarray, b: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """|a_i - b_j| of the pairs (i, j), the same for a pair in whatever block it is."""
    size = max(1, _BLOCK_VALUES // a.shape[1])
    found = np.empty(len(i))
    for start in range(0, len(i), size):
        part = slice(start, start + size)
        differences = a[i[part]].astype(np.float64) - b[j[part]]
        found[part] = np.sqrt(np.sum(np.square(differences, out=differences), axis=1))
    return found


def _checked(features: np.ndarray, name: str) -> np.ndarray:
    features = np.asarray(features)
    if features.dtype not in (np.float32, np.float64):
        features = features.astype(np.float64)
    if features.ndim != 2 or not features.shape[1] or not np.all(np.isfinite(features)):
        raise ValueError(f"{name} must be finite features (n, D), found shape {features.shape}: flatten images first")
    return features
