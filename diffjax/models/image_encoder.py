"""The image encoders of CLIP: what SVD is told of its first frame, and CLIP's score. Radford 2021, section 2.4.

    network, init = functionalize(lambda rngs: ClipImage(**CLIP_VIT_H, rngs=rngs))
    hidden, pooled = network(params, normalise(x))         # x (B, 224, 224, 3) in [-1, 1]; pooled (B, 1024)

A vision transformer (Dosovitskiy 2021): patches and a class token, which is pooled. SVD reads `pooled` of CLIP_VIT_H.
CLIP's score compares `pooled` with that of the text encoder it was trained with, CMMD the images of CLIP_VIT_L_336:

    CLIP_VIT_B_32                 text.CLIP_B
    CLIP_VIT_L, CLIP_VIT_L_336    text.CLIP_L, projection=768
    CLIP_VIT_G                    text.OPEN_CLIP_G
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from diffjax.core.types import Array
from diffjax.models.text import EPS, ClipBlock, check_blocks, run_blocks
from diffjax.nn import stack
from diffjax.nn.layers import Init, Linear
from diffjax.nn.norms import LayerNorm
from diffjax.nn.patches import PatchEmbedding

CLIP_VIT_B_32 = dict(width=768, depth=12, heads=12, patch=32, activation="quick_gelu", projection=512)
CLIP_VIT_L = dict(width=1024, depth=24, heads=16, patch=14, activation="quick_gelu", projection=768)
CLIP_VIT_L_336 = dict(CLIP_VIT_L, image_size=336)
CLIP_VIT_H = dict(width=1280, depth=32, heads=16, patch=14, activation="gelu", projection=1024)
CLIP_VIT_G = dict(width=1408, depth=40, heads=16, hidden=6144, patch=14, activation="gelu", projection=1024)

# of red, green and blue in [0, 1], over CLIP's own data: Radford 2021's code
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


class ClipImageStates(NamedTuple):
    """hidden (B, 1 + patches, width): the class token, then patches row by row, after all blocks but the `skip` last,
    without the last layer norm; pooled (B, projection or width): of the class token after all blocks and that norm."""

    hidden: Array
    pooled: Array


class ClipImage(nnx.Module):
    """Normalised images (B, S, S, 3) -> ClipImageStates. hidden: width inside the perceptrons, 0 = 4 width; projection:
    size of the pooled vector, 0 = `width`, without a projection. Raises ValueError for images of another size."""

    def __init__(
        self, width: int = 1280, depth: int = 32, heads: int = 16, hidden: int = 0, patch: int = 14,
        image_size: int = 224, activation: str = "gelu", projection: int = 1024, dtype: Any = None, remat: str = "",
        *, rngs: nnx.Rngs,
    ):  # fmt: skip
        check_blocks(width, heads, activation, remat)
        if image_size % patch:
            raise ValueError(f"found images of {image_size} with patches of {patch}, expected a multiple")
        self.depth, self.image_size, self.remat = depth, image_size, remat
        make = lambda rngs: ClipBlock(width, heads, hidden or 4 * width, activation, dtype, rngs=rngs)  # noqa: E731
        draw = lambda *shape: nnx.Param(Init("normal").draw(rngs.params(), shape, 1, 1, width**-0.5))  # noqa: E731
        self.patches = PatchEmbedding(patch, 3, width, bias=False, dtype=dtype, rngs=rngs)
        self.class_token = draw(width)
        self.positions = draw(1 + (image_size // patch) ** 2, width)
        self.norm_in = LayerNorm(width, EPS, affine=True, rngs=rngs)
        self.blocks = stack.stacked(make, depth, rngs=rngs)
        self.norm = LayerNorm(width, EPS, affine=True, rngs=rngs)
        self.projection = Linear(width, projection, bias=False, dtype=dtype, rngs=rngs) if projection else None

    def __call__(self, x_BHWC: Array, skip: int = 0) -> ClipImageStates:
        size = self.image_size
        if x_BHWC.ndim != 4 or x_BHWC.shape[1:] != (size, size, 3):
            raise ValueError(f"found images of shape {x_BHWC.shape}, expected (B, {size}, {size}, 3): resize them")
        patches = self.patches(x_BHWC).astype(x_BHWC.dtype)
        first = jnp.broadcast_to(self.class_token[...].astype(patches.dtype), (len(patches), 1, patches.shape[-1]))
        tokens = jnp.concatenate([first, patches], axis=1)
        tokens = self.norm_in(tokens + self.positions[...].astype(tokens.dtype)[None])
        last, hidden = run_blocks(self.blocks, tokens, self.depth, skip, causal=False, policy=self.remat)
        pooled = self.norm(last[:, 0])
        return ClipImageStates(hidden, pooled if self.projection is None else self.projection(pooled))


def normalise(x_BHWC: Array) -> Array:
    """Pixels in [-1, 1] -> of about zero mean and unit variance over the images CLIP was trained with."""
    mean, deviation = (jnp.asarray(values, x_BHWC.dtype).reshape(1, 1, 1, 3) for values in (MEAN, DEVIATION))
    return ((x_BHWC + 1) / 2 - mean) / deviation
