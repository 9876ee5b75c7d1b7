"""Numbers as vectors of cosines and sines."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffjax.core.types import Array


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


def swap_halves(embedding: Array) -> Array:
    """[cos, sin] -> [sin, cos], the order in which DDPM's weights expect it."""
    return jnp.roll(embedding, embedding.shape[-1] // 2, axis=-1)


def _cos_sin(values: Array, frequencies: Array) -> Array:
    angles = values[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
