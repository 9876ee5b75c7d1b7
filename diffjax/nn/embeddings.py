"""Numbers as vectors of cosines and sines."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffjax.core.types import Array
from diffjax.nn.layers import Init, Linear


def positional(values: Array, channels: int, endpoint: bool = False, max_positions: float = 10_000.0) -> Array:
    """(B,) -> (B, channels), [cos, sin] of `values` times frequencies from 1 down to about 1 / max_positions.

    With `endpoint` the last frequency is exactly 1 / max_positions. Vaswani 2017, section 3.5; Karras 2022's code.
    """
    half = channels // 2
    frequencies = (1 / max_positions) ** (np.arange(half) / (half - (1 if endpoint else 0)))
    return _cos_sin(values, jnp.asarray(frequencies, values.dtype))


class Fourier(nnx.Module):
    """Random Fourier features of numbers (B,) -> (B, channels), [cos, sin]. Tancik 2020; `scale` of Song 2021.

    The frequencies are drawn once and stored with the weights, but never trained.
    """

    def __init__(self, channels: int, scale: float = 16.0, *, rngs: nnx.Rngs):
        self.freqs = nnx.Param(jax.random.normal(rngs.params(), (channels // 2,)) * scale)

    def __call__(self, values: Array) -> Array:
        return _cos_sin(values, 2 * np.pi * jax.lax.stop_gradient(self.freqs[...]).astype(values.dtype))


def grid(rows: np.ndarray, columns: np.ndarray, width: int) -> np.ndarray:
    """Sine-cosine table of a grid's positions: (R,), (C,) -> float32 (R C, width), tokens row by row.

    The first half of the channels encodes the column, the second the row, each [sin, cos] with frequencies
    10000^(-i / (width / 4)). Peebles & Xie 2023's code, after He 2022. Integers from 0 are DiT's positions.
    """
    frequencies = 1 / 10_000 ** (np.arange(width // 4, dtype=np.float64) / (width // 4))

    def encode(positions: np.ndarray) -> np.ndarray:
        angles = positions.reshape(-1, 1) * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    row, column = np.meshgrid(np.asarray(rows, np.float64), np.asarray(columns, np.float64), indexing="ij")
    return np.concatenate([encode(column), encode(row)], axis=1).astype(np.float32)


class NoiseEmbedding(nnx.Module):
    """Noise labels (B,) -> (B, width) float32: sinusoids [cos, sin], linear, SiLU, linear. Peebles & Xie 2023's code.

    The last frequency is 10000^(-(n - 1) / n) of n = `frequencies` / 2: PixArt's and SD3's too, not HF's DiT's.
    """

    def __init__(self, width: int, frequencies: int = 256, init: Init = Init("normal", 0.02), *, rngs: nnx.Rngs):
        self.frequencies = frequencies
        self.expand = Linear(frequencies, width, init=init, rngs=rngs)
        self.contract = Linear(width, width, init=init, rngs=rngs)

    def __call__(self, noise_label_B: Array) -> Array:
        features = positional(noise_label_B.astype(jnp.promote_types(noise_label_B.dtype, jnp.float32)), self.frequencies)
        return self.contract(jax.nn.silu(self.expand(features)))


def swap_halves(embedding: Array) -> Array:
    """[cos, sin] -> [sin, cos], the order in which DDPM's weights expect it."""
    return jnp.roll(embedding, embedding.shape[-1] // 2, axis=-1)


def _cos_sin(values: Array, frequencies: Array) -> Array:
    angles = values[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
