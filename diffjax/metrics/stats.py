"""Streaming mean and covariance of feature vectors, in float64 on the host.

Moments of chunks (or of hosts) merge exactly, so features never have to be held together:

    total = functools.reduce(merge, map(moments, chunks))
    total.mean, total.covariance
"""

from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
    """count: vectors seen. mean: (D,). scatter: (D, D), sum of outer products of deviations from the mean."""

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @property
    def covariance(self) -> np.ndarray:
        """(D, D), normalised by count - 1. Raises ValueError for fewer than 2 samples."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, found {self.count}: draw more")
        return self.scatter / (self.count - 1)


def moments(features: np.ndarray) -> Moments:
    """Moments of `features` (N, D), N >= 1. Raises ValueError for another rank or values that are not finite."""
    x = np.asarray(features, np.float64)
    if x.ndim != 2 or not len(x):
        raise ValueError(f"expected features (N, D) with N at least 1, found {x.shape}")
    broken = np.flatnonzero(~np.isfinite(x).all(axis=1))
    if len(broken):
        raise ValueError(f"{len(broken)} of {len(x)} samples hold a NaN or infinity, the first is sample {broken[0]}")
    mean = x.mean(0)
    return Moments(len(x), mean, (x - mean).T @ (x - mean))


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of both sets together. Chan, Golub & LeVeque 1979, eq. 2.1. Raises ValueError for unequal widths."""
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features must have one width, found {a.mean.shape} and {b.mean.shape}")
    count = a.count + b.count
    shift = b.mean - a.mean
    scatter = a.scatter + b.scatter + np.outer(shift, shift) * (a.count * b.count / count)
    return Moments(count, a.mean + shift * (b.count / count), scatter)
