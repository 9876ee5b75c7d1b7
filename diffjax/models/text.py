"""The text encoders of CLIP, frozen parts of latent diffusion: tokens see those before them. Radford 2021, 2.4.

    network, init = functionalize(lambda rngs: ClipText(**CLIP_L, rngs=rngs))
    text, hidden, pooled = network(params, ids)            # ids (B, 77) int32, of data.tokenisers.ClipTokeniser

What the models that were trained with these encoders read:

    Stable Diffusion 1    CLIP_L       text
    Stable Diffusion 2    OPEN_CLIP_H  text; of the 24 published blocks the last is left out
    Stable Diffusion XL   CLIP_L, OPEN_CLIP_BIG_G   hidden of both with skip=1, side by side; pooled of the second
    "clip skip" n         CLIP_L       text with skip=n-1

Presets have the widths of the published weights, see `weights.text`; OpenCLIP is Ilharco 2021, Cherti 2023. CLIP_B and
OPEN_CLIP_G, and CLIP_L with projection=768, are the texts' side of image encoders: see `image_encoder`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from diffjax.core import names
from diffjax.core.types import Array
from diffjax.nn import stack
from diffjax.nn.layers import Embedding, Init, Linear, over_channels
from diffjax.nn.norms import LayerNorm
from diffjax.nn.transformer import Mlp, SelfAttention, gelu

CLIP_B = dict(width=512, depth=12, heads=8, activation="quick_gelu", projection=512)
CLIP_L = dict(width=768, depth=12, heads=12, activation="quick_gelu")
OPEN_CLIP_H = dict(width=1024, depth=23, heads=16, activation="gelu")
OPEN_CLIP_G = dict(width=1024, depth=24, heads=16, activation="gelu", projection=1024)
OPEN_CLIP_BIG_G = dict(width=1280, depth=32, heads=20, activation="gelu", projection=1280)

EPS = 1e-5  # of all layer norms

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # Hendrycks & Gimpel 2016, section 2
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": gelu,
}


class ClipTextStates(NamedTuple):
    """text, hidden (B, L, width): with and without the last layer norm, after all blocks but the `skip` last;
    pooled (B, projection or width): of the end token after all blocks."""

    text: Array
    hidden: Array
    pooled: Array


class ClipBlock(nnx.Module):
    """Attention, then a perceptron, each after a layer norm and added to its input; CLIP's for text and images.

    eps: of the layer norms. layer_scale: what is added is first multiplied by a number a channel (Touvron 2021, eq. 3).
    """

    def __init__(
        self, width: int, heads: int, hidden: int, activation: str, dtype: Any = None, eps: float = EPS,
        layer_scale: bool = False, *, rngs: nnx.Rngs,
    ):  # fmt: skip
        self.norm1 = LayerNorm(width, eps, affine=True, rngs=rngs)
        self.attention = SelfAttention(width, heads, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(width, eps, affine=True, rngs=rngs)
        self.mlp = Mlp(width, hidden, activation=ACTIVATIONS[activation], dtype=dtype, rngs=rngs)
        self.scale1 = nnx.Param(jnp.ones(width)) if layer_scale else None
        self.scale2 = nnx.Param(jnp.ones(width)) if layer_scale else None

    def __call__(self, x_BLD: Array, causal: bool) -> Array:
        x_BLD = x_BLD + _scaled(self.scale1, self.attention(self.norm1(x_BLD), causal=causal)).astype(x_BLD.dtype)
        return x_BLD + _scaled(self.scale2, self.mlp(self.norm2(x_BLD))).astype(x_BLD.dtype)


def _scaled(scale: nnx.Param | None, x_BLD: Array) -> Array:
    return x_BLD if scale is None else x_BLD * over_channels(scale[...], x_BLD)


class ClipText(nnx.Module):
    """ids (B, L) of a vocabulary -> ClipTextStates; L up to `length`. An id outside the vocabulary gives NaN.

    hidden: width inside the perceptrons, 0 = 4 width. projection: size of the pooled vector, 0 = `width`, without a
    projection. end: id of the end token, of which the first in a text is pooled; a text without one gives NaN there.
    None: the highest id in the text, which in CLIP's vocabulary is the end token's. Radford 2021's code.
    """

    def __init__(
        self, width: int = 768, depth: int = 12, heads: int = 12, hidden: int = 0, activation: str = "quick_gelu",
        projection: int = 0, vocabulary: int = 49408, length: int = 77, end: int | None = None, dtype: Any = None,
        remat: str = "", *, rngs: nnx.Rngs,
    ):  # fmt: skip
        check_blocks(width, heads, activation, remat)
        self.depth, self.length, self.end, self.remat = depth, length, end, remat
        make = lambda rngs: ClipBlock(width, heads, hidden or 4 * width, activation, dtype, rngs=rngs)  # noqa: E731
        self.tokens = Embedding(vocabulary, width, rngs=rngs)
        self.positions = nnx.Param(Init("normal").draw(rngs.params(), (length, width), 1, 1, 0.01))
        self.blocks = stack.stacked(make, depth, rngs=rngs)
        self.norm = LayerNorm(width, EPS, affine=True, rngs=rngs)
        self.projection = Linear(width, projection, bias=False, dtype=dtype, rngs=rngs) if projection else None

    def __call__(self, ids_BL: Array, skip: int = 0) -> ClipTextStates:
        check_ids(ids_BL, self.length)
        x = self.tokens(ids_BL)
        x = x + self.positions[: ids_BL.shape[1]].astype(x.dtype)[None]
        last, hidden = run_blocks(self.blocks, x, self.depth, skip, causal=True, policy=self.remat)
        normed = self.norm(last)
        pooled = self._pool(normed, ids_BL)
        return ClipTextStates(self.norm(hidden) if skip else normed, hidden, pooled)

    def _pool(self, text_BLD: Array, ids_BL: Array) -> Array:
        # of equal ids argmax takes the first
        is_end = ids_BL == (jnp.max(ids_BL, axis=1, keepdims=True) if self.end is None else self.end)
        pooled = jnp.take_along_axis(text_BLD, jnp.argmax(is_end, axis=1)[:, None, None], axis=1)[:, 0]
        pooled = jnp.where(jnp.any(is_end, axis=1, keepdims=True), pooled, jnp.nan)
        return pooled if self.projection is None else self.projection(pooled)


def run_blocks(
    blocks: nnx.Module, x_BLD: Array, depth: int, skip: int, causal: bool, policy: str
) -> tuple[Array, Array]:
    """x after all `depth` blocks, and after all but the `skip` last. Raises ValueError for a skip that leaves none."""
    if not 0 <= skip < depth:
        raise ValueError(f"found skip={skip}, expected 0..{depth - 1}: how many of the {depth} blocks are left out")
    if not skip:
        x_BLD, _ = stack.scan(blocks, lambda block, x, _: (block(x, causal), None), x_BLD, policy=policy)
        return x_BLD, x_BLD

    def apply(block: ClipBlock, carry: tuple[Array, Array], index: Array) -> tuple[tuple[Array, Array], None]:
        x = block(carry[0], causal)
        return (x, jnp.where(index == depth - 1 - skip, x, carry[1])), None

    return stack.scan(blocks, apply, (x_BLD, x_BLD), jnp.arange(depth), policy=policy)[0]


def check_blocks(width: int, heads: int, activation: str, remat: str) -> None:
    """Raises ValueError for an unknown activation or policy, and heads that do not divide the width."""
    stack.check(remat)
    names.lookup(ACTIVATIONS, activation, "activation")
    if width % heads:
        raise ValueError(f"found width {width} with {heads} heads, expected a multiple")


def check_ids(ids_BL: Array, length: int) -> None:
    """Raises ValueError unless ids are integers (B, L) with L up to `length`; 0 = of any length."""
    if ids_BL.ndim != 2 or not jnp.issubdtype(ids_BL.dtype, jnp.integer):
        raise ValueError(f"found ids {ids_BL.dtype}{list(ids_BL.shape)}, expected integers (B, L), as of a tokeniser")
    if length and ids_BL.shape[1] > length:
        raise ValueError(f"found {ids_BL.shape[1]} tokens, expected {length} at most: cut the texts before")


def check_mask(mask_BL: Array | None, ids_BL: Array) -> None:
    """Raises ValueError unless the mask is bool, of the shape of the ids, or None."""
    if mask_BL is not None and (mask_BL.shape != ids_BL.shape or mask_BL.dtype != jnp.bool_):
        found = f"{mask_BL.dtype}{list(mask_BL.shape)}"
        raise ValueError(f"found a mask {found}, expected bool{list(ids_BL.shape)}, of the shape of the ids")
