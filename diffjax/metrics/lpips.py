"""LPIPS: distance of two images in the features of a classifier (Zhang 2018), the `lpips` package's version 0.1.

With y_l the features (B, H_l, W_l, C_l) of layer l, unit-normalised over the channels, and w_l >= 0 learned,

    x' = (x - shift) / scale                                         ImageNet's mean and deviation, for [-1, 1]   (1)
    y  = f / (|f| + 1e-10)                                                                                        (2)
    d(a, b) = sum_l mean_hw sum_c w_lc (y_lhwc(a) - y_lhwc(b))^2     Zhang 2018, eq. 1                            (3)

The networks are VGG16, AlexNet and SqueezeNet 1.1 up to their last used activation. Files stay where the user has
them: the classifier's weights from torchvision, w from the `lpips` package (its files are read, it is not imported).

    distance, params = load("vgg", "vgg16-397923af.pth", read=torch_file.load)
    d_B = jax.jit(distance)(params, a_BHWC, b_BHWC)

SFD's second stage calls `piq` (VGG, average pooling, resized to 224) with pixels in [-1, 1], where that library
expects [0, 1] and applies the mean and deviation of [0, 1]. Eq. 1 is the same map of 2 x - 1, so there it is

    distance, params = load("vgg", path, read=torch_file.load, pooling="average", resize=224)
    loss = jnp.mean(distance(params, 2 * a - 1, 2 * b - 1))
"""

import functools
import importlib.util
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffjax.core import names, trees
from diffjax.core.types import Array, Params
from diffjax.nn.functional import abstract, functionalize
from diffjax.nn.layers import Init

Distance = Callable[[Params, Array, Array], Array]
Reader = Callable[[str | os.PathLike[str]], Mapping[str, np.ndarray]]

_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_EPS = 1e-10
_CLASSIFIER = "classifier."  # of the torchvision file: not used here


class _Conv(NamedTuple):
    inputs: int
    outputs: int
    size: int = 3
    stride: int = 1
    pad: int = 1


class _Fire(NamedTuple):
    """1x1 convolution to `squeeze` channels, then 1x1 and 3x3 ones to `expand` each. Iandola 2016, fig. 1."""

    inputs: int
    squeeze: int
    expand: int


class _Net(NamedTuple):
    """`layers`: torchvision's index in `features` -> layer, each followed by a ReLU; `pools`: indices of the poolings;
    `taps`: index of a layer -> channels compared behind its ReLU; `least`: height and width that leave a pixel."""

    layers: Mapping[int, _Conv | _Fire]
    pools: tuple[int, ...]
    taps: Mapping[int, int]
    pool_size: int
    ceil: bool
    least: int


_NETS = {
    "vgg": _Net(
        {
            0: _Conv(3, 64), 2: _Conv(64, 64), 5: _Conv(64, 128), 7: _Conv(128, 128), 10: _Conv(128, 256),
            12: _Conv(256, 256), 14: _Conv(256, 256), 17: _Conv(256, 512), 19: _Conv(512, 512), 21: _Conv(512, 512),
            24: _Conv(512, 512), 26: _Conv(512, 512), 28: _Conv(512, 512),
        },
        pools=(4, 9, 16, 23), taps={2: 64, 7: 128, 14: 256, 21: 512, 28: 512}, pool_size=2, ceil=False, least=16,
    ),
    "alex": _Net(
        {
            0: _Conv(3, 64, size=11, stride=4, pad=2), 3: _Conv(64, 192, size=5, pad=2), 6: _Conv(192, 384),
            8: _Conv(384, 256), 10: _Conv(256, 256),
        },
        pools=(2, 5), taps={0: 64, 3: 192, 6: 384, 8: 256, 10: 256}, pool_size=3, ceil=False, least=31,
    ),
    "squeeze": _Net(
        {
            0: _Conv(3, 64, stride=2, pad=0), 3: _Fire(64, 16, 64), 4: _Fire(128, 16, 64), 6: _Fire(128, 32, 128),
            7: _Fire(256, 32, 128), 9: _Fire(256, 48, 192), 10: _Fire(384, 48, 192), 11: _Fire(384, 64, 256),
            12: _Fire(512, 64, 256),
        },
        pools=(2, 5, 8), taps={0: 64, 4: 128, 7: 256, 9: 384, 10: 384, 11: 512, 12: 512}, pool_size=3, ceil=True,
        least=17,
    ),
}  # fmt: skip


def load(
    net: str,
    backbone_path: str | os.PathLike[str],
    linear_path: str | os.PathLike[str] | None = None,
    *,
    read: Reader,
    pooling: str = "max",
    resize: int | None = None,
) -> tuple[Distance, Params]:
    """(distance, params) of weight files: `make` and `to_params` together.

    `net` "vgg", "alex" or "squeeze"; `backbone_path` the state dict of torchvision's vgg16, alexnet or squeezenet1_1;
    `linear_path` the file of w, from the installed `lpips` package where None; `read` path -> arrays by name:
    diffjax.weights.torch_file.load (this package may not import that one).
    """
    distance = make(net, pooling, resize)
    linear = read(package_linear_path(net) if linear_path is None else linear_path)
    return distance, to_params(net, read(backbone_path), linear)


def make(net: str, pooling: str = "max", resize: int | None = None) -> Distance:
    """distance(params, a, b) -> (B,): eq. 3 for images (B, H, W, 3) in [-1, 1], differentiable and jittable, in
    float32 or the images' type where that is wider.

    `pooling` "average" replaces VGG's max pooling by 2x2 means, as `piq` does; `resize` first brings both images to
    that height and width. Raises ValueError for an unknown network or pooling, and when called with images that are
    too small or not of one shape.
    """
    spec = names.lookup(_NETS, net, "network of LPIPS")
    if pooling not in ("max", "average") or (pooling == "average" and net != "vgg"):
        known = "'max' or 'average'" if net == "vgg" else "'max': average pooling is defined for 'vgg' only"
        raise ValueError(f"pooling of {net!r} is {pooling!r}, expected {known}")
    if resize is not None and resize < spec.least:
        raise ValueError(f"resize is {resize}, {net!r} needs at least {spec.least}: use 224")
    network, _ = functionalize(functools.partial(_LPIPS, spec, pooling))

    def distance(params: Params, a: Array, b: Array) -> Array:
        if a.shape != b.shape or a.ndim != 4 or a.shape[-1] != 3:
            raise ValueError(f"found images {a.shape} and {b.shape}, expected two (B, H, W, 3)")
        if resize is None and min(a.shape[1:3]) < spec.least:
            raise ValueError(f"found images {a.shape}, {net!r} needs {spec.least}x{spec.least}: pass resize=224")
        dtype = jnp.promote_types(jnp.result_type(a, b), jnp.float32)
        a, b = a.astype(dtype), b.astype(dtype)
        return network(params, a, b) if resize is None else network(params, _resize(a, resize), _resize(b, resize))

    return distance


def to_params(net: str, backbone: Mapping[str, np.ndarray], linear: Mapping[str, np.ndarray]) -> Params:
    """Arrays by PyTorch name as the tree that `make`'s distance takes, float32.

    `backbone` has torchvision's names ("features.0.weight"; "classifier.*" is left out), `linear` those of the `lpips`
    files ("lin0.model.1.weight"). Raises ValueError naming every array that is missing, extra or misshapen.
    """
    shapes = abstract(functools.partial(_LPIPS, names.lookup(_NETS, net, "network of LPIPS"), "max"))
    expected = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, np.float32), shapes)
    tree: dict[str, Any] = {}
    for name, array in backbone.items():
        if not name.startswith(_CLASSIFIER):
            *parents, leaf = name.split(".")
            array = _numbers(name, array)
            if leaf == "weight":
                leaf, array = "kernel", array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
            _set(tree, [*parents, leaf], array)
    for name, array in linear.items():
        array = _numbers(name, array)
        end = ".model.1.weight"
        parts = [name.removesuffix(end), "kernel"] if name.endswith(end) else name.split(".")
        fits = array.ndim == 4 and array.shape[0] == 1 and array.shape[2:] == (1, 1)
        _set(tree, ["linear", *parts], array.reshape(-1) if fits else array)
    trees.check(expected, tree, f"the weights of LPIPS with {net!r}")
    return tree


def package_linear_path(net: str) -> Path:
    """The file of w in the installed `lpips` package, found without importing it (which would import PyTorch).

    Raises FileNotFoundError with what to type where there is none.
    """
    names.lookup(_NETS, net, "network of LPIPS")
    found = importlib.util.find_spec("lpips")
    for folder in (found.submodule_search_locations or ()) if found else ():
        path = Path(folder, "weights", "v0.1", f"{net}.pth")
        if path.is_file():
            return path
    state = "incomplete" if found else "absent"
    raise FileNotFoundError(
        f"the linear weights of LPIPS with {net!r} are in the package lpips, which is {state}: type pip install "
        f"--no-deps lpips (PyTorch is not needed), or give linear_path, a copy of its weights/v0.1/{net}.pth"
    )


def _numbers(name: str, array: Any) -> np.ndarray:
    if not hasattr(array, "dtype") or not jnp.issubdtype(array.dtype, jnp.floating):
        found = getattr(array, "dtype", type(array).__name__)
        raise ValueError(
            f"{name!r} is {found}, expected floating-point numbers: give the state dict, not a dict that holds it"
        )
    return np.asarray(array, np.float32)


def _set(tree: dict[str, Any], path: list[str], value: np.ndarray) -> None:
    for parent in path[:-1]:
        tree = tree.setdefault(parent, {})
    tree[path[-1]] = value


# Modules and eq. 1-3 --------------------------------------------------------------------------------------------------


class _Convolution(nnx.Module):
    """(B, H, W, in) -> (B, H', W', out), then a ReLU."""

    def __init__(self, spec: _Conv, *, rngs: nnx.Rngs):
        self.spec = spec
        area = spec.size**2
        shape, fans = (spec.size, spec.size, spec.inputs, spec.outputs), (spec.inputs * area, spec.outputs * area)
        self.kernel = nnx.Param(Init().draw(rngs.params(), shape, *fans, scale=math.sqrt(2)))
        self.bias = nnx.Param(jnp.zeros(spec.outputs))

    def __call__(self, x: Array) -> Array:
        stride, pad = (self.spec.stride,) * 2, ((self.spec.pad, self.spec.pad),) * 2
        y = jax.lax.conv_general_dilated(
            x, self.kernel[...].astype(x.dtype), stride, pad, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jax.nn.relu(y + self.bias[...].astype(x.dtype)[None, None, None, :])


class _FireModule(nnx.Module):
    """(B, H, W, in) -> (B, H, W, 2 expand)."""

    def __init__(self, spec: _Fire, *, rngs: nnx.Rngs):
        self.squeeze = _Convolution(_Conv(spec.inputs, spec.squeeze, size=1, pad=0), rngs=rngs)
        self.expand1x1 = _Convolution(_Conv(spec.squeeze, spec.expand, size=1, pad=0), rngs=rngs)
        self.expand3x3 = _Convolution(_Conv(spec.squeeze, spec.expand), rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = self.squeeze(x)
        return jnp.concatenate([self.expand1x1(x), self.expand3x3(x)], axis=-1)


class _Linear(nnx.Module):
    """w of one layer, (C,)."""

    def __init__(self, channels: int):
        self.kernel = nnx.Param(jnp.full(channels, 1 / channels))


class _LPIPS(nnx.Module):
    """Eq. 1-3: a, b (B, H, W, 3) -> (B,). Before weights are loaded w is uniform."""

    def __init__(self, spec: _Net, pooling: str, rngs: nnx.Rngs):
        self.spec, self.pooling = spec, pooling
        layers = {
            str(index): (_FireModule if isinstance(layer, _Fire) else _Convolution)(layer, rngs=rngs)
            for index, layer in spec.layers.items()
        }
        self.features = nnx.Dict(layers)
        self.linear = nnx.Dict({f"lin{i}": _Linear(channels) for i, channels in enumerate(spec.taps.values())})

    def __call__(self, a: Array, b: Array) -> Array:
        # not as one batch: where only a is differentiated, b needs no backward pass
        total = jnp.zeros(a.shape[0], a.dtype)
        for i, (y_a, y_b) in enumerate(zip(self._tapped(a), self._tapped(b), strict=True)):
            weighted = jnp.square(y_a - y_b) @ self.linear[f"lin{i}"].kernel[...].astype(a.dtype)
            total = total + jnp.mean(weighted, axis=(1, 2))
        return total

    def _tapped(self, x: Array) -> list[Array]:
        """y_l of each layer."""
        shift, scale = (jnp.asarray(values, x.dtype)[None, None, None, :] for values in (_SHIFT, _SCALE))
        x, found = (x - shift) / scale, []
        for index in sorted([*self.spec.layers, *self.spec.pools]):
            x = self._pool(x) if index in self.spec.pools else self.features[str(index)](x)
            if index in self.spec.taps:
                found.append(_unit(x))
        return found

    def _pool(self, x: Array) -> Array:
        if self.pooling == "average":
            return nnx.avg_pool(x, (2, 2), strides=(2, 2))
        return _max_pool(x, self.spec.pool_size, self.spec.ceil)


def _unit(features: Array) -> Array:
    """Eq. 2 over the last axis; the square root is not taken at 0, where its derivative is infinite."""
    squares = jnp.sum(jnp.square(features), axis=-1, keepdims=True)
    norm = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)
    return features / (norm + _EPS)


def _max_pool(x: Array, size: int, ceil: bool) -> Array:
    """Windows of `size` every 2 pixels; with `ceil` a last one that begins inside the image counts too."""
    ends = [(0, (n - size) % 2 if ceil else 0) for n in x.shape[1:3]]
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, size, size, 1), (1, 2, 2, 1), [(0, 0), *ends, (0, 0)])


def _resize(x: Array, size: int) -> Array:
    """Bilinear to (size, size), pixel centres aligned, no low-pass: F.interpolate(mode="bilinear")."""
    return jax.image.resize(x, (x.shape[0], size, size, x.shape[-1]), "linear", antialias=False)
