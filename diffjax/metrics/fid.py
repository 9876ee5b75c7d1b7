"""Fréchet distance between two sets, each described by mean and covariance of its features.

    d^2 = |mu_1 - mu_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))                   Heusel 2017, eq. 6

With Inception features this is the FID; with plain pixels (`stats.pixel_moments`) it is the "pixel
Fréchet distance" and must be called so.
"""

import numpy as np

from diffjax.metrics.stats import Moments


def frechet_distance(a: Moments, b: Moments) -> float:
    """The squared distance above (as FID is always given), float64, at least 0 up to rounding.

    tr (C_1 C_2)^(1/2) is the sum of the roots of the eigenvalues of C_1^(1/2) C_2 C_1^(1/2), which is symmetric,
    so singular covariances need no offset. Raises ValueError for features of different width or fewer than 2 samples.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features must have one width, found {a.mean.shape} and {b.mean.shape}")
    first, second = a.covariance, b.covariance
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ second @ root), 0)).sum()
    return float(np.sum((a.mean - b.mean) ** 2) + np.trace(first) + np.trace(second) - 2 * cross)
