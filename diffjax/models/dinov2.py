"""DINOv2's image encoder, whose class token is what FD-DINOv2 compares. Oquab 2023; Stein 2023, section 3.

    network, init = functionalize(lambda rngs: Dinov2(**DINOV2_L, rngs=rngs))
    tokens, pooled = network(params, normalise(x))         # x (B, 224, 224, 3) in [-1, 1]; pooled (B, 1024)

A vision transformer with layer scale (Touvron 2021). It was trained last with 518 pixels a side, n0 = 37 patches, and
its table of positions is read for the n = 16 of 224 pixels by cubic convolution at

    p_i = (i + 1/2) n0 / (n + offset) - 1/2        i = 0..n-1

The authors' code, and with it Stein's figures, has offset 0.1; that of transformers has none, and other features.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffjax.core.types import Array
from diffjax.models.text import ClipBlock, check_blocks, run_blocks
from diffjax.nn import stack
from diffjax.nn.layers import Init
from diffjax.nn.norms import LayerNorm
from diffjax.nn.patches import PatchEmbedding

DINOV2_L = dict(width=1024, depth=24, heads=16)

# of red, green and blue in [0, 1], over ImageNet
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_EPS = 1e-6
_SHARPNESS = -0.75  # a of Keys 1981's cubic convolution, torch's; Keys has -0.5


class Dinov2States(NamedTuple):
    """tokens (B, 1 + patches, width): the class token, then patches row by row, after the last layer norm; pooled
    (B, width): of them the class token."""

    tokens: Array
    pooled: Array


class Dinov2(nnx.Module):
    """Normalised images (B, S, S, 3) -> Dinov2States. hidden: width inside the perceptrons, 0 = 4 width; trained_size:
    pixels a side that the positions are for; offset: see above. Raises ValueError for images of another size."""

    def __init__(
        self, width: int = 1024, depth: int = 24, heads: int = 16, hidden: int = 0, patch: int = 14,
        image_size: int = 224, trained_size: int = 518, offset: float = 0.1, dtype: Any = None, remat: str = "", *,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        check_blocks(width, heads, "gelu", remat)
        if image_size % patch or trained_size % patch:
            sizes = f"{image_size} and {trained_size}"
            raise ValueError(f"found images of {sizes} with patches of {patch}, expected multiples")
        self.depth, self.image_size, self.remat, self.offset = depth, image_size, remat, offset
        self.side, self.trained_side = image_size // patch, trained_size // patch
        sizes = width, heads, hidden or 4 * width
        make = lambda rngs: ClipBlock(*sizes, "gelu", dtype, _EPS, layer_scale=True, rngs=rngs)  # noqa: E731
        draw = lambda *shape: nnx.Param(Init("normal").draw(rngs.params(), shape, 1, 1, 0.02))  # noqa: E731
        self.patches = PatchEmbedding(patch, 3, width, dtype=dtype, rngs=rngs)
        self.class_token = draw(1, 1, width)
        self.positions = draw(1, 1 + self.trained_side**2, width)
        self.blocks = stack.stacked(make, depth, rngs=rngs)
        self.norm = LayerNorm(width, _EPS, affine=True, rngs=rngs)

    def __call__(self, x_BHWC: Array) -> Dinov2States:
        size = self.image_size
        if x_BHWC.ndim != 4 or x_BHWC.shape[1:] != (size, size, 3):
            raise ValueError(f"found images of shape {x_BHWC.shape}, expected (B, {size}, {size}, 3): resize them")
        patches = self.patches(x_BHWC).astype(x_BHWC.dtype)
        first = jnp.broadcast_to(self.class_token[...].astype(patches.dtype), (len(patches), 1, patches.shape[-1]))
        tokens = jnp.concatenate([first, patches], axis=1) + self._positions().astype(patches.dtype)
        last, _ = run_blocks(self.blocks, tokens, self.depth, 0, causal=False, policy=self.remat)
        tokens = self.norm(last)
        return Dinov2States(tokens, tokens[:, 0])

    def _positions(self) -> Array:
        """(1, 1 + side^2, width)."""
        trained, old, new = self.positions[...], self.trained_side, self.side
        if old == new:  # as they are, whatever the offset
            return trained
        weights = jnp.asarray(cubic(old, new, self.offset), trained.dtype)
        grid = trained[0, 1:].reshape(old, old, -1)
        grid = jnp.einsum("ia,jb,abd->ijd", weights, weights, grid, precision="highest")
        return jnp.concatenate([trained[:, :1], grid.reshape(1, new * new, -1)], axis=1)


@functools.lru_cache
def cubic(old: int, new: int, offset: float) -> np.ndarray:
    """(new, old) float64: weights of `old` places for each of `new`, by the formula above. Beyond the ends the last
    place goes on. Keys 1981, eq. 15."""
    a = _SHARPNESS
    at = (np.arange(new) + 0.5) * old / (new + offset) - 0.5
    near = np.floor(at).astype(int)
    weights = np.zeros((new, old))
    for step in range(-1, 3):
        far = np.abs(at - near - step)
        inner = (a + 2) * far**3 - (a + 3) * far**2 + 1
        outer = a * (far**3 - 5 * far**2 + 8 * far - 4)
        np.add.at(weights, (np.arange(new), np.clip(near + step, 0, old - 1)), np.where(far <= 1, inner, outer))
    return weights


def normalise(x: Array) -> Array:
    """Pixels (..., 3) in [-1, 1] -> of about zero mean and unit variance over ImageNet."""
    mean, deviation = (jnp.asarray(values, x.dtype).reshape((1,) * (x.ndim - 1) + (3,)) for values in (MEAN, DEVIATION))
    return ((x + 1) / 2 - mean) / deviation
