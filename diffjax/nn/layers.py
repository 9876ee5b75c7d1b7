"""Linear, convolution with resampling, and group normalisation, NHWC.

Parameters are float32; products run in `dtype`, normalisation always in float32. Kernels are
(in, out) and (kh, kw, in, out).
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffjax.core.types import Array


@dataclasses.dataclass(frozen=True)
class Init:
    """How a layer starts: `mode` by fan, `weight` and `bias` scale the draw. Karras 2022's code, table 6."""

    mode: str = "kaiming_normal"
    weight: float = 1.0
    bias: float = 0.0

    def draw(self, key: Array, shape: Sequence[int], fan_in: int, fan_out: int, scale: float) -> Array:
        """Float32 of `shape`. Glorot & Bengio 2010, eq. 16; He 2015, eq. 10 without the gain of 2."""
        if scale == 0:
            return jnp.zeros(shape)
        deviation = math.sqrt(2 / (fan_in + fan_out)) if self.mode.startswith("xavier") else math.sqrt(1 / fan_in)
        size = math.prod(shape)
        # sizes rounded up to powers of two: a network has dozens of shapes, and each would be compiled
        values = _draw(key, 1 << (size - 1).bit_length(), self.mode.endswith("uniform"))
        return scale * deviation * values[:size].reshape(shape)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw(key: Array, size: int, uniform: bool) -> Array:
    """(size,) float32 of unit variance."""
    if uniform:
        return jax.random.uniform(key, (size,), minval=-math.sqrt(3), maxval=math.sqrt(3))
    return jax.random.normal(key, (size,))


class Linear(nnx.Module):
    """(..., in) -> (..., out)."""

    def __init__(
        self, inputs: int, outputs: int, bias: bool = True, init: Init = Init(), dtype: Any = None, *, rngs: nnx.Rngs
    ):
        self.dtype = dtype
        self.kernel = nnx.Param(init.draw(rngs.params(), (inputs, outputs), inputs, outputs, init.weight))
        self.bias = nnx.Param(init.draw(rngs.params(), (outputs,), inputs, outputs, init.bias)) if bias else None

    def __call__(self, x: Array) -> Array:
        y = jnp.matmul(*_cast(self.dtype, x, self.kernel[...]))
        return y if self.bias is None else y + _broadcast(self.bias[...], y)


class Conv(nnx.Module):
    """`size` x `size` convolution (B, H, W, in) -> (B, H', W', out), H' = 2H after `up`, H/2 after `down`.

    Resampling with `taps` (a separable low-pass filter) comes first; with `fused` the kernel is applied at the
    high resolution, before the filter. size = 0 resamples only.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        up: bool = False,
        down: bool = False,
        taps: Sequence[float] = (1, 1),
        fused: bool = False,
        init: Init = Init(),
        dtype: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.size, self.up, self.down, self.taps, self.fused, self.dtype = size, up, down, tuple(taps), fused, dtype
        if size:
            fans = inputs * size**2, outputs * size**2
            self.kernel = nnx.Param(init.draw(rngs.params(), (size, size, inputs, outputs), *fans, init.weight))
            self.bias = nnx.Param(init.draw(rngs.params(), (outputs,), *fans, init.bias))

    def __call__(self, x: Array) -> Array:
        if self.up:
            x = upsample(x, self.taps)
        elif self.down and not self.fused:
            x = downsample(x, self.taps)
        if not self.size:
            return x
        x, kernel = _cast(self.dtype, x, self.kernel[...])
        if self.size == 1:
            y = jnp.matmul(x, kernel[0, 0])
        else:
            pad = self.size // 2 + ((len(self.taps) - 1) // 2 if self.fused else 0)
            y = convolve(x, kernel, pad)
        if self.down and self.fused:
            y = _filter_down(y, self.taps, pad=0)
        return y + _broadcast(self.bias[...], y)


class GroupNorm(nnx.Module):
    """Normalise groups of channels of (B, H, W, C) over space: min(32, C / 4) groups. Wu & He 2018."""

    def __init__(self, channels: int, eps: float, *, rngs: nnx.Rngs):
        del rngs  # starts as the identity
        self.groups, self.eps = min(32, channels // 4), eps
        self.scale, self.bias = nnx.Param(jnp.ones(channels)), nnx.Param(jnp.zeros(channels))

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        # sums over space first, channels stay innermost: on a CPU three times faster than sums over (space, group)
        centred = wide - self._group_means(jnp.mean(wide, axis=(1, 2)))
        variance = self._group_means(jnp.mean(jnp.square(centred), axis=(1, 2)))
        factor = jax.lax.rsqrt(variance + self.eps) * _broadcast(self.scale[...], wide)
        y = centred * factor + _broadcast(self.bias[...], wide)
        return y.astype(x.dtype)

    def _group_means(self, channels: Array) -> Array:
        """Means of channels (B, C) over each group, for every channel again: (B, 1, 1, C)."""
        groups = channels.reshape(channels.shape[0], self.groups, -1)
        means = jnp.broadcast_to(jnp.mean(groups, axis=-1, keepdims=True), groups.shape)
        return means.reshape(channels.shape[0], 1, 1, -1)


def convolve(x: Array, kernel: Array, pad: int) -> Array:
    """Stride-1 convolution of (B, H, W, in) with (kh, kw, in, out), `pad` zeros on every side."""
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), [(pad, pad), (pad, pad)], dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def downsample(x: Array, taps: Sequence[float]) -> Array:
    """Low-pass and halve: (B, H, W, C) -> (B, H/2, W/2, C)."""
    if tuple(taps) == (1, 1):
        b, h, w, c = x.shape
        return x.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))
    return _filter_down(x, taps, pad=(len(taps) - 1) // 2)


def upsample(x: Array, taps: Sequence[float]) -> Array:
    """Double and interpolate: (B, H, W, C) -> (B, 2H, 2W, C)."""
    if tuple(taps) == (1, 1):
        b, h, w, c = x.shape
        wide = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c))
        return wide.reshape(b, 2 * h, 2 * w, c)
    pad = len(taps) - 1 - (len(taps) - 1) // 2  # of the transposed convolution
    return _depthwise(x, 2 * np.asarray(taps) / np.sum(taps), stride=1, pad=pad, dilation=2)


def _filter_down(x: Array, taps: Sequence[float], pad: int) -> Array:
    return _depthwise(x, np.asarray(taps) / np.sum(taps), stride=2, pad=pad, dilation=1)


def _depthwise(x: Array, gain: np.ndarray, stride: int, pad: int, dilation: int) -> Array:
    """Every channel with the outer product of `gain` (k,)."""
    kernel = jnp.asarray(np.outer(gain, gain), x.dtype)[:, :, None, None]
    kernel = jnp.broadcast_to(kernel, (*kernel.shape[:3], x.shape[-1]))
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), [(pad, pad), (pad, pad)], lhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=x.shape[-1],
    )  # fmt: skip


def _cast(dtype: Any, x: Array, kernel: Array) -> tuple[Array, Array]:
    """Both in the compute type; None is the type of x."""
    dtype = x.dtype if dtype is None else dtype
    return x.astype(dtype), kernel.astype(dtype)


def _broadcast(bias: Array, y: Array) -> Array:
    return bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
