"""InceptionV3 as FID needs it: the network of TensorFlow's graph of 2015, as pytorch-fid ported it. Szegedy 2016.

    network, init = functionalize(lambda rngs: InceptionV3(rngs=rngs))
    features = jax.jit(network)(params, normalise(resize(images, 299, "tf1"), "tf1"))
    features.pool, features.spatial, features.logits           # (B, 2048), (B, 2023), (B, 1008)

Parameters are those of diffjax.weights.inception, which folds each batch normalisation into its convolution:

    w' = w gamma / sqrt(variance + eps),   b' = beta - mean gamma / sqrt(variance + eps),   eps = 1e-3             (1)

Where the graph differs from torchvision's class, so does this one: means over 3x3 leave out the padding, the last
block takes the largest of 3x3 in place of their mean, and there are 1008 logits. A mean over 3x3 behind which a 1x1
convolution stands is taken behind it, of fewer channels: both are linear, and the weights of the mean add up to 1.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffjax.core import names
from diffjax.core.types import Array
from diffjax.nn.layers import Init, over_channels

SIZE = 299  # height and width of images
POOL, LOGITS = 2048, 1008
SPATIAL = 17 * 17 * 7

# (a, b) of (x - a) / b for pixels x in [0, 255], by the resizing of the protocol: pytorch-fid has 2 x / 255 - 1; the
# graph of 2015, which ADM runs and of which EDM and clean-fid run a copy, has (x - 128) / 128
_RANGES = {"torch": (127.5, 127.5), "tf1": (128.0, 128.0), "clean": (128.0, 128.0)}

# of a block: name -> arguments of its convolution
_Convs = Mapping[str, tuple]


def normalise(x_BHWC: Array, how: str) -> Array:
    """Pixels in [0, 255] -> what the network takes, about [-1, 1]. how: the key of RESIZES that the images were resized
    with. Raises ValueError for "clip" and unknown ones."""
    shift, scale = names.lookup(_RANGES, how, "range of Inception's pixels")
    return (x_BHWC - shift) / scale


class Features(NamedTuple):
    """pool: (B, 2048), the last block's mean over places: FID, KID, precision and recall.

    spatial: (B, 2023), the first 7 channels of mixed_6/conv (Mixed_6d.branch1x1 in PyTorch's names) at 17 x 17 places,
    channels last: sFID as ADM takes it. logits: (B, 1008), without the last layer's bias, as the Inception score is
    computed by Salimans 2016's code, ADM and torch-fidelity.
    """

    pool: Array
    spatial: Array
    logits: Array


class InceptionV3(nnx.Module):
    """Normalised images (B, 299, 299, 3) -> Features, float32. Raises ValueError for images of another shape."""

    def __init__(self, *, rngs: nnx.Rngs):
        convs = {
            "1a": (3, 32, 3, 2), "2a": (32, 32, 3), "2b": (32, 64, (3, 3)), "3b": (64, 80, (1, 1)), "4a": (80, 192, 3),
        }  # fmt: skip
        self.stem = nnx.Dict({name: _Conv(*spec, rngs=rngs) for name, spec in convs.items()})
        blocks = {
            "5b": _BlockA(192, 32, rngs=rngs), "5c": _BlockA(256, 64, rngs=rngs), "5d": _BlockA(288, 64, rngs=rngs),
            "6a": _BlockB(288, rngs=rngs), "6b": _BlockC(768, 128, rngs=rngs), "6c": _BlockC(768, 160, rngs=rngs),
            "6d": _BlockC(768, 160, rngs=rngs), "6e": _BlockC(768, 192, rngs=rngs), "7a": _BlockD(768, rngs=rngs),
            "7b": _BlockE(1280, rngs=rngs), "7c": _BlockE(2048, largest=True, rngs=rngs),
        }  # fmt: skip
        self.mixed = nnx.Dict(blocks)
        self.logits = _Matrix(POOL, LOGITS, rngs=rngs)

    def __call__(self, x_BHWC: Array) -> Features:
        if x_BHWC.ndim != 4 or x_BHWC.shape[1:] != (SIZE, SIZE, 3):
            raise ValueError(
                f"found images {x_BHWC.shape}, expected (B, {SIZE}, {SIZE}, 3): resize them, repeat grey three times"
            )
        x = self.stem["2b"](self.stem["2a"](self.stem["1a"](x_BHWC)))
        x = self.stem["4a"](self.stem["3b"](_over_3x3(x, jnp.maximum, stride=2)))
        x = _over_3x3(x, jnp.maximum, stride=2)
        for name, block in self.mixed.items():
            if name == "6d":
                spatial = block["branch1x1"](x)[..., :7].reshape(len(x), SPATIAL)
            x = block(x)
        pool = jnp.mean(x, axis=(1, 2))
        return Features(pool, spatial, self.logits(pool))


class _Conv(nnx.Module):
    """Eq. 1's convolution and ReLU, (B, H, W, in) -> (B, H', W', out). size: of the kernel in both axes, without
    padding; or (height, width), padded to keep H and W."""

    def __init__(self, inputs: int, outputs: int, size: int | tuple[int, int], stride: int = 1, *, rngs: nnx.Rngs):
        sides, pads = ((size, size), (0, 0)) if isinstance(size, int) else (size, (size[0] // 2, size[1] // 2))
        self.stride, self.pad = stride, tuple((pad, pad) for pad in pads)
        fans = (math.prod(sides) * inputs, math.prod(sides) * outputs)
        self.kernel = nnx.Param(Init().draw(rngs.params(), (*sides, inputs, outputs), *fans, scale=math.sqrt(2)))
        self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x: Array) -> Array:
        return self.rectify(self.linear(x))

    def linear(self, x: Array) -> Array:
        """Without bias and ReLU."""
        return jax.lax.conv_general_dilated(
            x, self.kernel[...], (self.stride, self.stride), self.pad, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def rectify(self, y: Array) -> Array:
        return jax.nn.relu(y + over_channels(self.bias[...], y))


class _Matrix(nnx.Module):
    """(B, in) -> (B, out)."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(Init().draw(rngs.params(), (inputs, outputs), inputs, outputs, scale=1))

    def __call__(self, x: Array) -> Array:
        return x @ self.kernel[...]


class _Block(nnx.Module):
    """Branches side by side on the same input, their channels one after the other. Szegedy 2016, figures 5-7 and 10."""

    def __init__(self, convs: _Convs, *, rngs: nnx.Rngs):
        self.convs = nnx.Dict({name: _Conv(*spec, rngs=rngs) for name, spec in convs.items()})

    def __getitem__(self, name: str) -> _Conv:
        return self.convs[name]

    def chain(self, x: Array, *names: str) -> Array:
        for name in names:
            x = self.convs[name](x)
        return x

    def mean(self, x: Array) -> Array:
        """The 1x1 convolution of the mean over 3x3."""
        conv = self.convs["branch_pool"]
        return conv.rectify(_mean_3x3(conv.linear(x)))


class _BlockA(_Block):
    """35 x 35 places. pool: channels of the pooled branch."""

    def __init__(self, inputs: int, pool: int, *, rngs: nnx.Rngs):
        convs = {
            "branch1x1": (inputs, 64, (1, 1)), "branch5x5_1": (inputs, 48, (1, 1)), "branch5x5_2": (48, 64, (5, 5)),
            "branch3x3dbl_1": (inputs, 64, (1, 1)), "branch3x3dbl_2": (64, 96, (3, 3)),
            "branch3x3dbl_3": (96, 96, (3, 3)), "branch_pool": (inputs, pool, (1, 1)),
        }  # fmt: skip
        super().__init__(convs, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        five = self.chain(x, "branch5x5_1", "branch5x5_2")
        three = self.chain(x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
        return jnp.concatenate([self.chain(x, "branch1x1"), five, three, self.mean(x)], axis=-1)


class _BlockB(_Block):
    """35 x 35 to 17 x 17 places."""

    def __init__(self, inputs: int, *, rngs: nnx.Rngs):
        convs = {
            "branch3x3": (inputs, 384, 3, 2), "branch3x3dbl_1": (inputs, 64, (1, 1)),
            "branch3x3dbl_2": (64, 96, (3, 3)), "branch3x3dbl_3": (96, 96, 3, 2),
        }  # fmt: skip
        super().__init__(convs, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        double = self.chain(x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
        return jnp.concatenate([self.chain(x, "branch3x3"), double, _over_3x3(x, jnp.maximum, stride=2)], axis=-1)


class _BlockC(_Block):
    """17 x 17 places, 7x7 convolutions as rows and columns. width: channels between them."""

    def __init__(self, inputs: int, width: int, *, rngs: nnx.Rngs):
        row, column = (1, 7), (7, 1)
        convs = {
            "branch1x1": (inputs, 192, (1, 1)), "branch7x7_1": (inputs, width, (1, 1)),
            "branch7x7_2": (width, width, row), "branch7x7_3": (width, 192, column),
            "branch7x7dbl_1": (inputs, width, (1, 1)), "branch7x7dbl_2": (width, width, column),
            "branch7x7dbl_3": (width, width, row), "branch7x7dbl_4": (width, width, column),
            "branch7x7dbl_5": (width, 192, row), "branch_pool": (inputs, 192, (1, 1)),
        }  # fmt: skip
        super().__init__(convs, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        once = self.chain(x, *(f"branch7x7_{i}" for i in range(1, 4)))
        twice = self.chain(x, *(f"branch7x7dbl_{i}" for i in range(1, 6)))
        return jnp.concatenate([self.chain(x, "branch1x1"), once, twice, self.mean(x)], axis=-1)


class _BlockD(_Block):
    """17 x 17 to 8 x 8 places."""

    def __init__(self, inputs: int, *, rngs: nnx.Rngs):
        convs = {
            "branch3x3_1": (inputs, 192, (1, 1)), "branch3x3_2": (192, 320, 3, 2),
            "branch7x7x3_1": (inputs, 192, (1, 1)), "branch7x7x3_2": (192, 192, (1, 7)),
            "branch7x7x3_3": (192, 192, (7, 1)), "branch7x7x3_4": (192, 192, 3, 2),
        }  # fmt: skip
        super().__init__(convs, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        three = self.chain(x, "branch3x3_1", "branch3x3_2")
        seven = self.chain(x, *(f"branch7x7x3_{i}" for i in range(1, 5)))
        return jnp.concatenate([three, seven, _over_3x3(x, jnp.maximum, stride=2)], axis=-1)


class _BlockE(_Block):
    """8 x 8 places. largest: the pooled branch takes the largest of 3x3, not the mean."""

    def __init__(self, inputs: int, largest: bool = False, *, rngs: nnx.Rngs):
        convs = {
            "branch1x1": (inputs, 320, (1, 1)), "branch3x3_1": (inputs, 384, (1, 1)),
            "branch3x3_2a": (384, 384, (1, 3)), "branch3x3_2b": (384, 384, (3, 1)),
            "branch3x3dbl_1": (inputs, 448, (1, 1)), "branch3x3dbl_2": (448, 384, (3, 3)),
            "branch3x3dbl_3a": (384, 384, (1, 3)), "branch3x3dbl_3b": (384, 384, (3, 1)),
            "branch_pool": (inputs, 192, (1, 1)),
        }  # fmt: skip
        super().__init__(convs, rngs=rngs)
        self.largest = largest

    def __call__(self, x: Array) -> Array:
        once, twice = self.chain(x, "branch3x3_1"), self.chain(x, "branch3x3dbl_1", "branch3x3dbl_2")
        ends = [self.chain(once, f"branch3x3_2{end}") for end in "ab"]
        ends += [self.chain(twice, f"branch3x3dbl_3{end}") for end in "ab"]
        if self.largest:
            pooled = self.chain(_over_3x3(_padded(x, -jnp.inf), jnp.maximum), "branch_pool")
        else:
            pooled = self.mean(x)
        return jnp.concatenate([self.chain(x, "branch1x1"), *ends, pooled], axis=-1)


def _over_3x3(x: Array, combine: Callable[[Array, Array], Array], stride: int = 1) -> Array:
    """`combine` over each 3x3 window inside the image, every `stride` places. Axis by axis and by slices: XLA's windows
    take a tenth of the network's time on a CPU, these half of that."""
    for axis in (1, 2):
        last = 1 + (x.shape[axis] - 3) // stride * stride
        parts = (jax.lax.slice_in_dim(x, start, start + last, stride, axis) for start in range(3))
        x = combine(combine(next(parts), next(parts)), next(parts))
    return x


def _mean_3x3(x: Array) -> Array:
    """At each place, of those of its 3x3 window that are inside the image."""
    inside = [np.convolve(np.ones(side), np.ones(3), "same") for side in x.shape[1:3]]
    share = jnp.asarray(1 / np.multiply.outer(*inside), x.dtype)
    return _over_3x3(_padded(x, 0), jnp.add) * share[None, :, :, None]


def _padded(x: Array, value: float) -> Array:
    return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=value)
