"""Streaming mean and covariance of feature vectors, in float64 on the host.

Moments of chunks (or of hosts) merge exactly, so features never have to be held together.
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
        """(D, D), normalised by count - 1."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, found {self.count}")
        return self.scatter / (self.count - 1)


def moments(features: np.ndarray) -> Moments:
    """Moments of `features` (N, D), N >= 1. Raises ValueError for another rank or values that are not finite."""
    if features.ndim != 2 or not len(features):
        raise ValueError(f"features must be (N, D) with N at least 1, found {features.shape}")
    x = np.asarray(features, np.float64)
    mean = x.mean(0)
    if not np.all(np.isfinite(mean)):
        raise ValueError("features hold a NaN or an infinity: the samples are broken")
    return Moments(len(x), mean, (x - mean).T @ (x - mean))


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of both sets together. Chan, Golub & LeVeque 1979, eq. 1.5."""
    count = a.count + b.count
    shift = b.mean - a.mean
    scatter = a.scatter + b.scatter + np.outer(shift, shift) * (a.count * b.count / count)
    return Moments(count, a.mean + shift * (b.count / count), scatter)


def pixel_moments(images: np.ndarray) -> Moments:
    """Moments of pixels in [-1, 1]: images (N, H, W, C), float in that range or uint8, flattened to (N, H*W*C)."""
    if images.dtype == np.uint8:
        images = images.astype(np.float64) / 127.5 - 1
    return moments(images.reshape(len(images), -1))
