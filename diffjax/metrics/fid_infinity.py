"""FID extrapolated to infinitely many samples.

The FID of N samples is too high by a bias that depends on the generator and falls like 1/N, so sets of one size do not
even rank generators safely. A line through FIDs of random subsets against 1/N has the limit at 1/N = 0:

    FID_N = FID_inf + slope / N                                             Chong & Forsyth 2020, sec. 3  (1)

Fitted by least squares to 15 sizes at equal distances in N, from 5,000 to all, each a random subset of its own, as in
the released code. The reference's statistics stay fixed: their bias remains.
"""

from typing import NamedTuple

import numpy as np

from diffjax.metrics import fid, stats


class Limit(NamedTuple):
    """value: FID_inf. slope: of the line, FID times samples. sizes, distances: N and FID_N of each subset."""

    value: float
    slope: float
    sizes: tuple[int, ...]
    distances: tuple[float, ...]


def fid_infinity(
    features: np.ndarray,
    mean: np.ndarray,
    covariance: np.ndarray,
    num_points: int = 15,
    smallest: int = 5000,
    seed: int = 0,
) -> Limit:
    """Eq. 1 of samples' `features` (N, D) against a reference's mean (D,) and covariance (D, D).

    Raises ValueError like `fid.frechet_distance`, and for fewer than `smallest` + `num_points` - 1 samples or 2 points.
    """
    features = np.asarray(features)
    if num_points < 2 or smallest < 2 or len(features) < smallest + num_points - 1:
        raise ValueError(
            f"expected at least 2 points from 2 samples on, found {num_points} points from {smallest} to "
            f"{len(features)} samples: draw more, or give smaller values"
        )
    sizes = np.linspace(smallest, len(features), num_points).astype(int)
    random = np.random.default_rng(seed)
    distances = []
    for size in sizes:
        subset = stats.of(features[random.permutation(len(features))[:size]])
        distances.append(fid.frechet_distance(subset.mean, subset.covariance, mean, covariance))
    slope, value = np.polyfit(1 / sizes, distances, 1)
    return Limit(float(value), float(slope), tuple(sizes.tolist()), tuple(distances))
