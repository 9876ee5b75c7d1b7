"""Linear layers, convolutions with resampling, and tables of vectors, NHWC.

Parameters are float32; products run in `dtype`. Kernels are (in, out) and (kh, kw, in, out).
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

from diffjax.core import sharding
from diffjax.core.types import Array


@dataclasses.dataclass(frozen=True)
class Init:
    """How a layer starts: `mode` by fan, or "normal" without; `weight` and `bias` scale the draw. Karras 2022's code,
    table 6."""

    mode: str = "kaiming_normal"
    weight: float = 1.0
    bias: float = 0.0

    def draw(self, key: Array, shape: Sequence[int], fan_in: int, fan_out: int, scale: float) -> Array:
        """Float32 of `shape`. Glorot & Bengio 2010, eq. 16; He 2015, eq. 10 without the gain of 2."""
        if scale == 0:
            return jnp.zeros(shape)
        if self.mode == "normal":
            deviation = 1.0
        else:
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
    """(..., in) -> (..., out). split: what the axis tensor of a mesh splits, as `core.sharding` says by this layer's path."""

    def __init__(
        self, inputs: int, outputs: int, bias: bool = True, init: Init = Init(), dtype: Any = None,
        split: sharding.Split = "", *, rngs: nnx.Rngs,
    ):  # fmt: skip
        self.dtype, self.split = dtype, split
        self.kernel = nnx.Param(init.draw(rngs.params(), (inputs, outputs), inputs, outputs, init.weight))
        self.bias = nnx.Param(init.draw(rngs.params(), (outputs,), inputs, outputs, init.bias)) if bias else None

    def __call__(self, x: Array) -> Array:
        y = rows_times(*_cast(self.dtype, x, self.kernel[...], self.split))
        return y if self.bias is None else y + over_channels(self.bias[...], y)

    def parts(self, x: Array, count: int) -> list[Array]:
        """The output in `count` equal parts; where tensor splits it, each of them is split."""
        if "tensor" not in sharding.sizes():
            return jnp.split(self(x), count, axis=-1)
        x, kernel = _cast(self.dtype, x, self.kernel[...], self.split)
        kernels = [sharding.columns(part) for part in jnp.split(kernel, count, axis=-1)]
        products = [rows_times(x, part) for part in kernels]
        if self.bias is None:
            return products
        biases = jnp.split(self.bias[...], count)
        return [y + over_channels(bias, y) for y, bias in zip(products, biases, strict=True)]


class Embedding(nnx.Module):
    """Integers in 0..rows-1 -> vectors of `width`, drawn with the given standard deviation. Other integers give NaN,
    which stops a run, in place of some row."""

    def __init__(self, rows: int, width: int, deviation: float = 0.02, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(deviation * jax.random.normal(rngs.params(), (rows, width)))

    def __call__(self, index: Array) -> Array:
        return self.embedding[...].at[index].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


class Conv(nnx.Module):
    """`size` x `size` convolution (B, H, W, in) -> (B, H', W', out), H' = 2H after `up`, H/2 after `down`.

    Resampling with `taps` (a separable low-pass filter) comes first; with `fused` the kernel is applied at the
    high resolution, before the filter. size = 0 resamples only. `stride` keeps every stride-th place; `pad` zeros
    before and after both axes, where it is not size // 2 of them.
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
        stride: int = 1,
        pad: tuple[int, int] | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.size, self.up, self.down, self.taps, self.fused, self.dtype = size, up, down, tuple(taps), fused, dtype
        around = size // 2 + ((len(self.taps) - 1) // 2 if fused else 0)
        self.stride, self.pad = stride, pad or (around, around)
        if size:
            fans = inputs * size**2, outputs * size**2
            self.kernel = nnx.Param(init.draw(rngs.params(), (size, size, inputs, outputs), *fans, init.weight))
            self.bias = nnx.Param(init.draw(rngs.params(), (outputs,), *fans, init.bias))

    def __call__(self, x: Array, places: tuple[int, int] | None = None) -> Array:
        """places: (H', W') that are left after `up`, for what was halved from odd sizes; None: all."""
        if self.up:
            x = upsample(x, self.taps)
            x = x if places is None else x[:, : places[0], : places[1]]
        elif self.down and not self.fused:
            x = downsample(x, self.taps)
        if not self.size:
            return x
        x, kernel = _cast(self.dtype, x, self.kernel[...])
        if self.size == 1 and self.stride == 1:
            y = rows_times(x, kernel[0, 0])
        else:
            y = convolve(x, kernel, self.pad, self.stride)
        if self.down and self.fused:
            y = _filter_down(y, self.taps, pad=0)
        return y + over_channels(self.bias[...], y)


def convolve(x: Array, kernel: Array, pad: tuple[int, int], stride: int = 1) -> Array:
    """Convolution of (B, H, W, in) with (kh, kw, in, out), `pad` zeros before and after both axes."""
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), [pad, pad], dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def rows_times(x: Array, kernel: Array) -> Array:
    """(..., in) times (in, out). As a matrix of all rows: XLA for CPUs takes twice as long for the kernel's gradient
    where it is a sum over several axes."""
    return jnp.matmul(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], kernel.shape[1])


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


def _cast(dtype: Any, x: Array, kernel: Array, split: sharding.Split = "") -> tuple[Array, Array]:
    """Both in the compute type; None is the type of x."""
    dtype = x.dtype if dtype is None else dtype
    return x.astype(dtype), sharding.weight(kernel, dtype, split)


def over_channels(bias: Array, y: Array) -> Array:
    """(C,) in the type and with the axes of y (..., C)."""
    return bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
