"""Images without data: random fields with the spectrum of photographs, for tables and tests of assignment."""

import numpy as np


def images(num: int, seed: int = 0, size: int = 32) -> np.ndarray:
    """(num, size, size, 3) float32 of unit variance: amplitude 1 / (f + 0.5)^1.3 at f periods an image, of which channels
    share 95 % of the variance."""
    random = np.random.default_rng(seed)
    f = np.fft.fftfreq(size) * size
    amplitude = 1 / (np.hypot(f[:, None], f[None]) + 0.5) ** 1.3

    def field(*shape: int) -> np.ndarray:
        white = np.fft.fft2(random.normal(size=(*shape, size, size)))
        return np.fft.ifft2(white * amplitude).real / np.sqrt(np.mean(amplitude**2))

    shared, own = field(num, 1), field(num, 3)
    both = np.sqrt(0.95) * shared + np.sqrt(0.05) * own
    return np.moveaxis(both, 1, 3).astype(np.float32)
