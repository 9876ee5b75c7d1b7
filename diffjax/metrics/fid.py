"""Fréchet distance between two sets, each described by mean and covariance of its features.

    d^2 = |mu_1 - mu_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))                   Heusel 2017, eq. 6      (1)

With Inception features this is the FID, with the spatial ones (`references`) the sFID of Nash 2021, with features of
videos the FVD. On plain pixels it is the distance between two Gaussians in pixel space: `pixel_frechet`, never to be
called FID.
"""

import functools

import numpy as np

from diffjax.metrics import stats

_CHUNK_VALUES = 2**24  # of float64: 128 MiB at a time


def frechet_distance(mean_1: np.ndarray, cov_1: np.ndarray, mean_2: np.ndarray, cov_2: np.ndarray) -> float:
    """d^2 of eq. 1 (the figure that papers give as FID), in float64, from means (D,) and covariances (D, D).

    With C = F F^T the eigenvalues of C_1 C_2 other than 0 are the squared singular values of F_1^T F_2: no root of a
    matrix without symmetry, no offset for singular covariances, no imaginary part, and less work at a low rank. Raises
    ValueError for shapes that do not fit, values that are not finite, and matrices that are no covariances.
    """
    mean_1, mean_2 = np.asarray(mean_1, np.float64), np.asarray(mean_2, np.float64)
    cov_1, cov_2 = np.asarray(cov_1, np.float64), np.asarray(cov_2, np.float64)
    width = mean_1.size
    if (mean_1.shape, mean_2.shape, cov_1.shape, cov_2.shape) != ((width,), (width,), (width, width), (width, width)):
        raise ValueError(
            "expected means (D,) and covariances (D, D) of one width D, found "
            f"{mean_1.shape}, {cov_1.shape} and {mean_2.shape}, {cov_2.shape}"
        )
    factors = _factor(cov_1, "first"), _factor(cov_2, "second")
    cross = np.linalg.svd(factors[0].T @ factors[1], compute_uv=False).sum()
    distance = np.sum((mean_1 - mean_2) ** 2) + np.trace(cov_1) + np.trace(cov_2) - 2 * cross
    if not np.isfinite(distance):
        raise ValueError("a mean holds a NaN or infinity")
    return float(max(distance, 0.0))  # a squared distance; rounding alone takes it below 0


def _factor(covariance: np.ndarray, which: str) -> np.ndarray:
    """F (D, rank) of C = F F^T."""
    scale = np.abs(covariance).max(initial=0.0)
    # rounding of the sums behind a covariance is some 1e-13 of its scale, float32 statistics 1e-6
    if not np.isfinite(scale) or np.abs(covariance - covariance.T).max(initial=0.0) > 1e-5 * scale:
        raise ValueError(f"the {which} covariance is not symmetric and finite")
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    largest = values.max(initial=0.0)
    if values.min(initial=0.0) < -1e-5 * largest or (largest <= 0 < scale):
        raise ValueError(f"the {which} covariance has the eigenvalue {values.min():g}: expected none below 0")
    # what rounding makes of 0; its root would be 1e-8, no longer small
    kept = values > largest * len(values) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])


def pixels(images: np.ndarray) -> np.ndarray:
    """Features (N, H*W*C) in [-1, 1], float64, of images (N, H, W, C): uint8, or floats already in that range.

    Raises ValueError for another rank or dtype.
    """
    images = np.asarray(images)
    if images.ndim != 4 or not (images.dtype == np.uint8 or np.issubdtype(images.dtype, np.floating)):
        raise ValueError(f"expected images (N, H, W, C), uint8 or float, found {images.shape} {images.dtype}")
    features = images.reshape(len(images), int(np.prod(images.shape[1:]))).astype(np.float64)
    return features / 127.5 - 1 if images.dtype == np.uint8 else features


def pixel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and covariance (D, D) of `pixels(images)`, D = H*W*C. Raises ValueError for fewer than 2 images."""
    size = max(1, _CHUNK_VALUES // max(1, int(np.prod(images.shape[1:]))))
    chunks = [images[i : i + size] for i in range(0, len(images), size)] or [images]
    total = functools.reduce(stats.merge, (stats.moments(pixels(chunk)) for chunk in chunks))
    return total.mean, total.covariance


def pixel_frechet(images_1: np.ndarray, images_2: np.ndarray) -> float:
    """Pixel-space Fréchet distance (eq. 1, squared) between two sets of images of one size; see `pixel_statistics`."""
    return frechet_distance(*pixel_statistics(images_1), *pixel_statistics(images_2))
