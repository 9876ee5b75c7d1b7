"""I3D, the network of FVD: Inception-v1 with kernels inflated over time. Carreira & Zisserman 2017; Unterthiner 2018.

    network, init = functionalize(lambda rngs: I3D(rngs=rngs))
    pool, logits = network(params, x)                      # x (B, 16, 224, 224, 3) in [-1, 1]; logits (B, 400)

FVD is the Frechet distance of `logits`, of the network that was trained on Kinetics-400 (Unterthiner 2018's code, and
those after it). Windows are placed as TensorFlow's "same": of a padding of odd size the smaller half is before.

Each convolution of the published network is followed by a batch norm with fixed statistics, which `weights.i3d` folds
into its kernel and bias: here there is none.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from diffjax.core.types import Array
from diffjax.nn.layers import Init, Linear, over_channels, rows_times

CLASSES = 400
_PLACES, _FRAMES = 7, 2  # of the last average
_LEAST = 9  # frames that leave two

# channels of the branches: one place; one place, then three; one place, then three; largest of three, then one place
_MIXED = {
    "3b": (64, 96, 128, 16, 32, 32), "3c": (128, 128, 192, 32, 96, 64), "4b": (192, 96, 208, 16, 48, 64),
    "4c": (160, 112, 224, 24, 64, 64), "4d": (128, 128, 256, 24, 64, 64), "4e": (112, 144, 288, 32, 64, 64),
    "4f": (256, 160, 320, 32, 128, 128), "5b": (256, 160, 320, 32, 128, 128), "5c": (384, 192, 384, 48, 128, 128),
}  # fmt: skip
_POOLED = {"4b": (3, 2), "5b": (2, 2)}  # before these: size and stride over time and places


class I3DStates(NamedTuple):
    """pool (B, 1024): mean of the last features; logits (B, 400) of it."""

    pool: Array
    logits: Array


class I3D(nnx.Module):
    """Clips (B, T, S, S, 3) in [-1, 1], T of 9 at least, S of 193..224 -> I3DStates. Others raise ValueError."""

    def __init__(self, classes: int = CLASSES, dtype: Any = None, *, rngs: nnx.Rngs):
        self.conv_1a = Conv3d(3, 64, 7, 2, dtype, rngs=rngs)
        self.conv_2b = Conv3d(64, 64, 1, 1, dtype, rngs=rngs)
        self.conv_2c = Conv3d(64, 192, 3, 1, dtype, rngs=rngs)
        mixed, channels = {}, 192
        for name, widths in _MIXED.items():
            mixed[name] = Mixed(channels, widths, dtype, rngs=rngs)
            channels = widths[0] + widths[2] + widths[4] + widths[5]
        self.mixed = nnx.Dict(mixed)
        self.logits = Linear(channels, classes, dtype=dtype, rngs=rngs)

    def __call__(self, x_BTHWC: Array) -> I3DStates:
        _check(x_BTHWC)
        x = _largest(self.conv_1a(x_BTHWC), (1, 3, 3), (1, 2, 2))
        x = _largest(self.conv_2c(self.conv_2b(x)), (1, 3, 3), (1, 2, 2))
        for name, block in self.mixed.items():
            if name in _POOLED:
                size, stride = _POOLED[name]
                x = _largest(x, (size,) * 3, (stride,) * 3)
            x = block(x)
        frames = jnp.mean(x, axis=(2, 3))  # of windows of all places
        # the mean over windows of frames, as the logits are linear in them
        windows = (frames[:, :-1] + frames[:, 1:]) / _FRAMES
        pool = jnp.mean(windows, axis=1)
        return I3DStates(pool, self.logits(pool))


class Mixed(nnx.Module):
    """(B, T, H, W, in) -> (B, T, H, W, sum of the branches). Szegedy 2015, fig. 2b, over time too."""

    def __init__(self, inputs: int, widths: tuple[int, ...], dtype: Any = None, *, rngs: nnx.Rngs):
        one, narrow1, three1, narrow2, three2, last = widths
        self.b0 = Conv3d(inputs, one, 1, 1, dtype, rngs=rngs)
        self.b1a = Conv3d(inputs, narrow1, 1, 1, dtype, rngs=rngs)
        self.b1b = Conv3d(narrow1, three1, 3, 1, dtype, rngs=rngs)
        self.b2a = Conv3d(inputs, narrow2, 1, 1, dtype, rngs=rngs)
        self.b2b = Conv3d(narrow2, three2, 3, 1, dtype, rngs=rngs)
        self.b3b = Conv3d(inputs, last, 1, 1, dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        widest = _largest(x, (3, 3, 3), (1, 1, 1))
        return jnp.concatenate([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(widest)], axis=-1)


class Conv3d(nnx.Module):
    """`size`^3 convolution (B, T, H, W, in) -> (B, T', H', W', out), then a ReLU."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int, dtype: Any = None, *, rngs: nnx.Rngs):
        self.stride, self.dtype = stride, dtype
        shape, fans = (size, size, size, inputs, outputs), (inputs * size**3, outputs * size**3)
        self.kernel = nnx.Param(Init().draw(rngs.params(), shape, *fans, 1.0))
        self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x: Array) -> Array:
        dtype = x.dtype if self.dtype is None else self.dtype
        y = _convolve(x.astype(dtype), self.kernel[...].astype(dtype), self.stride)
        return jax.nn.relu(y + over_channels(self.bias[...], y))


def _convolve(x: Array, kernel: Array, stride: int) -> Array:
    """By one 2-D convolution of frames side by side: XLA for CPUs takes three times as long for the first in 3-D."""
    size, (b, t, h, w, c) = kernel.shape[0], x.shape
    if size == 1:
        return rows_times(x, kernel[0, 0, 0])
    times = -(-t // stride)
    pad = max((times - 1) * stride + size - t, 0)
    x = jnp.pad(x, [(0, 0), (pad // 2, pad - pad // 2), (0, 0), (0, 0), (0, 0)])
    beside = jnp.concatenate([x[:, i : i + (times - 1) * stride + 1 : stride] for i in range(size)], axis=-1)
    y = jax.lax.conv_general_dilated(
        beside.reshape(b * times, h, w, size * c), kernel.transpose(1, 2, 0, 3, 4).reshape(size, size, size * c, -1),
        (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    return y.reshape(b, times, *y.shape[1:])


def _largest(x: Array, size: tuple[int, int, int], stride: tuple[int, int, int]) -> Array:
    """Of windows, axis by axis, which is a fifth of the work for 3 x 3 x 3."""
    for axis in (1, 2, 3):
        window, steps = ([n if i == axis else 1 for i in range(5)] for n in (size[axis - 1], stride[axis - 1]))
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, steps, "SAME")
    return x


def _check(x: Array) -> None:
    """Raises ValueError unless the last features are of 7 x 7 places and two times at least."""
    if x.ndim != 5 or x.shape[-1] != 3 or any(-(-side // 32) != _PLACES for side in x.shape[2:4]):
        raise ValueError(f"found clips of shape {x.shape}, expected (B, T, 224, 224, 3): resize their frames")
    if x.shape[1] < _LEAST:
        raise ValueError(f"found clips of {x.shape[1]} frames, expected {_LEAST} at least: FVD is of 16")
