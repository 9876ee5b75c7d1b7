"""Kernel Inception distance: unbiased squared MMD of Inception features, over random subsets.

    k(x, y) = (x.y / D + 1)^3                                               Binkowski 2018, sec. 4  (1)
    KID     = mean over subsets of MMD^2 (eq. 1 of `mmd`, unbiased)         Binkowski 2018, sec. 4

The kernel is that of Inception features (D = 2048); on other features the value is a kernel distance, not a KID.
Subsets are those of torch-fidelity with the same seed: numpy's RandomState, whose draws never change, first of samples.
"""

from typing import NamedTuple

import numpy as np

from diffjax.metrics import mmd


class KID(NamedTuple):
    """mean: over subsets; may be below 0. std: between subsets, not of the mean."""

    mean: float
    std: float


def kid(
    real: np.ndarray, samples: np.ndarray, num_subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> KID:
    """KID of features `real` (n, D) and `samples` (m, D).

    Raises ValueError for features of other shapes or unequal widths, values that are not finite, and subsets that are
    larger than a set.
    """
    real, samples = mmd.checked(real, "real"), mmd.checked(samples, "samples")
    most = min(len(real), len(samples))
    if num_subsets < 1 or not 2 <= subset_size <= most:
        raise ValueError(
            f"expected subsets of 2 to {most} for sets of {len(real)} and {len(samples)}, found {num_subsets} of "
            f"{subset_size}: draw more samples, or give a smaller subset_size"
        )
    random = np.random.RandomState(seed)
    values = []
    for _ in range(num_subsets):
        subset = samples[random.choice(len(samples), subset_size, replace=False)]
        other = real[random.choice(len(real), subset_size, replace=False)]
        values.append(mmd.squared_mmd(subset, other, _cubic, unbiased=True))
    return KID(float(np.mean(values)), float(np.std(values)))


def _cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Eq. 1; a power takes ten times as long."""
    inner = x @ y.T
    inner /= x.shape[1]
    inner += 1
    return inner * inner * inner
