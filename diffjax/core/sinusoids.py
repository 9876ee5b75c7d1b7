"""Sines and cosines of places in a sequence, as a table.

>>> from diffjax.core import sinusoids
>>> sinusoids.interleaved(2, 4).round(2).tolist()
[[0.0, 1.0, 0.0, 1.0], [0.8399999737739563, 0.5400000214576721, 0.009999999776482582, 1.0]]
"""

import numpy as np


def interleaved(length: int, width: int) -> np.ndarray:
    """float32 (length, width): column 2i is the sine, 2i + 1 the cosine of place / 10000^(2i / width). Vaswani 2017,
    section 3.5."""
    angles = np.arange(length)[:, None] * 10_000.0 ** (-np.arange(0, width, 2) / width)
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(length, width).astype(np.float32)
