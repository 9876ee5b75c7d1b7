"""Normalisations, in float32 whatever the type of their input.

A layer's own `scale` and `bias` start as the identity.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from diffjax.core.types import Array
from diffjax.nn.layers import over_channels


class Moments(NamedTuple):
    """Of `count` numbers in each group of each sample: mean (B, groups), and the sum of squares around it. A GroupNorm
    over parts of an array takes those of all parts."""

    count: Array
    mean: Array
    squares: Array


def merge(a: Moments, b: Moments) -> Moments:
    """Of the numbers of both. Chan, Golub & LeVeque 1979, eq. 2.1: no difference of large sums, so no digits are lost."""
    count, delta = a.count + b.count, b.mean - a.mean
    mean = a.mean + delta * (b.count / count)
    return Moments(count, mean, a.squares + b.squares + jnp.square(delta) * (a.count * b.count / count))


class GroupNorm(nnx.Module):
    """Normalise groups of channels of (B, ..., C) over the axes between; 0 groups: min(32, C / 4) of them. Wu & He 2018."""

    def __init__(self, channels: int, eps: float, groups: int = 0, *, rngs: nnx.Rngs):
        del rngs  # starts as the identity
        self.groups, self.eps = groups or min(32, channels // 4), eps
        if channels % self.groups:
            raise ValueError(f"found {channels} channels in {self.groups} groups; expected a multiple")
        self.scale, self.bias = nnx.Param(jnp.ones(channels)), nnx.Param(jnp.zeros(channels))

    def __call__(self, x: Array, moments: Moments | None = None) -> Array:
        """moments: of the whole that x is a part of; None: x is the whole."""
        wide = _wide(x)
        if moments is None:
            # sums over space first, channels stay innermost: on a CPU three times faster than sums over (space, group)
            centred = wide - self._over_channels(self._group_means(wide), wide)
            variance = self._group_means(jnp.square(centred))
        else:
            centred = wide - self._over_channels(moments.mean, wide)
            variance = moments.squares / moments.count
        factor = jax.lax.rsqrt(self._over_channels(variance, wide) + self.eps) * over_channels(self.scale[...], wide)
        y = centred * factor + over_channels(self.bias[...], wide)
        return y.astype(x.dtype)

    def moments(self, x: Array) -> Moments:
        """Of x (B, ..., C), at least float32."""
        wide = _wide(x)
        mean = self._group_means(wide)
        count = jnp.asarray(x[0].size // self.groups, wide.dtype)
        variance = self._group_means(jnp.square(wide - self._over_channels(mean, wide)))
        return Moments(count, mean, variance * count)

    def _group_means(self, x: Array) -> Array:
        """(B, groups) of x (B, ..., C)."""
        channels = jnp.mean(x, axis=tuple(range(1, x.ndim - 1)))
        return jnp.mean(channels.reshape(x.shape[0], self.groups, -1), axis=-1)

    def _over_channels(self, groups: Array, x: Array) -> Array:
        """(B, groups) for every channel of x (B, ..., C): (B, 1, ..., 1, C)."""
        wide = jnp.broadcast_to(groups[:, :, None], (*groups.shape, x.shape[-1] // self.groups))
        return wide.reshape(x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1])


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class LayerNorm(nnx.Module):
    """Normalise each vector of (..., C); `affine` adds a scale and a bias. Ba 2016, eq. 4."""

    def __init__(self, channels: int, eps: float = 1e-6, affine: bool = False, *, rngs: nnx.Rngs):
        del rngs  # starts as the identity
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(channels)) if affine else None
        self.bias = nnx.Param(jnp.zeros(channels)) if affine else None

    def __call__(self, x: Array) -> Array:
        wide = _wide(x)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps)
        if self.scale is not None:
            y = y * over_channels(self.scale[...], y) + over_channels(self.bias[...], y)
        return y.astype(x.dtype)


class RMSNorm(nnx.Module):
    """Divide each vector of (..., C) by its root mean square, times a learned scale. Zhang & Sennrich 2019, eq. 4."""

    def __init__(self, channels: int, eps: float = 1e-6, *, rngs: nnx.Rngs):
        del rngs  # starts as the identity
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(channels))

    def __call__(self, x: Array) -> Array:
        wide = _wide(x)
        y = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (y * over_channels(self.scale[...], y)).astype(x.dtype)
