"""Blocks of latent U-Nets: residual block, transformer or plain attention, resampling. Rombach 2022, section 3.

    block = ResBlock(320, 640, style, rngs=rngs)
    x = block(x_BHWC, embedding_BE)                    # embedding after its SiLU, float32
    x = SpatialTransformer(640, 768, heads=8, depth=2, rngs=rngs)(x, text_BSD)
    x = PlainAttention(640, heads=20, rngs=rngs)(x)
    x = downsample(640, rngs=rngs)(x)                  # (B, H, W, C) -> (B, H/2, W/2, C)

Normalisations have 32 groups, the embedding is added, and sums are not scaled: Ho 2020's block, where EDM's U-Nets have
Song's and ADM's (`edm_blocks`).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from diffjax.core.types import Array, Key
from diffjax.models.edm_blocks import dropout
from diffjax.nn import stack
from diffjax.nn.attention import attend
from diffjax.nn.layers import Conv, Init, Linear
from diffjax.nn.norms import GroupNorm, LayerNorm
from diffjax.nn.transformer import CrossAttention, SelfAttention, merge_heads, split_heads

GROUPS = 32
INIT = Init("kaiming_uniform", math.sqrt(1 / 3), math.sqrt(1 / 3))  # PyTorch's default
ZERO = Init(weight=0.0)


@dataclasses.dataclass(frozen=True)
class Style:
    """What the residual blocks of one network have in common."""

    embedding: int  # width of the condition vector
    dropout: float = 0.0
    step_condition: bool = False  # a second projection, of what an SFD-v student is told (Zhou 2024)
    zero_init_step: bool = False
    eps: float = 1e-5
    dtype: Any = None


class ResBlock(nnx.Module):
    """Two convolutions beside a skip, the embedding added between them. Ho 2020, appendix B."""

    def __init__(self, inputs: int, outputs: int, style: Style, *, rngs: nnx.Rngs):
        self.dropout = style.dropout
        options = dict(dtype=style.dtype, rngs=rngs)
        self.norm1 = GroupNorm(inputs, style.eps, GROUPS, rngs=rngs)
        self.conv1 = Conv(inputs, outputs, 3, init=INIT, **options)
        self.shift = Linear(style.embedding, outputs, init=INIT, rngs=rngs)
        if style.step_condition:
            self.step_shift = Linear(style.embedding, outputs, init=ZERO if style.zero_init_step else INIT, rngs=rngs)
        self.norm2 = GroupNorm(outputs, style.eps, GROUPS, rngs=rngs)
        self.conv2 = Conv(outputs, outputs, 3, init=ZERO, **options)
        self.skip = Conv(inputs, outputs, 1, init=INIT, **options) if inputs != outputs else None

    def __call__(
        self, x: Array, embedding: Array, step_embedding: Array | None = None, key: Key | None = None
    ) -> Array:
        """x (B, H, W, inputs), embeddings (B, E) after their SiLU; key switches dropout on."""
        shift = self.shift(embedding)
        if step_embedding is not None:
            shift = shift + self.step_shift(step_embedding)
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = jax.nn.silu(self.norm2(h + shift[:, None, None, :].astype(h.dtype)))
        return self.conv2(dropout(h, self.dropout, key)) + (x if self.skip is None else self.skip(x))


class GatedMlp(nnx.Module):
    """(..., D) -> (..., 4 D) gated by as many -> (..., D), exact GELU. Shazeer 2020, eq. 5 ("GEGLU")."""

    def __init__(self, width: int, dtype: Any = None, *, rngs: nnx.Rngs):
        # [value | gate]
        self.expand = Linear(width, 8 * width, init=INIT, dtype=dtype, split="columns", rngs=rngs)
        self.contract = Linear(4 * width, width, init=INIT, dtype=dtype, split="rows", rngs=rngs)

    def __call__(self, x: Array) -> Array:
        value, gate = self.expand.parts(x, 2)
        return self.contract(value * jax.nn.gelu(gate, approximate=False))


class TransformerBlock(nnx.Module):
    """Tokens (B, L, D) attend to each other, then to a context (B, S, context_width), then each passes a gated MLP."""

    def __init__(self, width: int, context_width: int, heads: int, dtype: Any = None, *, rngs: nnx.Rngs):
        options = dict(dtype=dtype, rngs=rngs)
        self.norm1, self.norm2, self.norm3 = (LayerNorm(width, 1e-5, affine=True, rngs=rngs) for _ in range(3))
        self.self_attention = SelfAttention(width, heads, bias=False, init=INIT, **options)
        self.cross_attention = CrossAttention(
            width, context_width, heads, bias=False, init=INIT, init_out=INIT, **options
        )
        self.mlp = GatedMlp(width, **options)

    def __call__(self, x_BLD: Array, context_BSD: Array) -> Array:
        x_BLD = x_BLD + self.self_attention(self.norm1(x_BLD))
        x_BLD = x_BLD + self.cross_attention(self.norm2(x_BLD), context_BSD)
        return x_BLD + self.mlp(self.norm3(x_BLD))


class SpatialTransformer(nnx.Module):
    """`depth` blocks over the positions of (B, H, W, C), row by row, added to it. Rombach 2022, appendix E.2.1.

    The projections around them are matrices: published networks have these or 1x1 convolutions, which are the same.
    """

    def __init__(
        self, width: int, context_width: int, heads: int, depth: int, dtype: Any = None, remat: str = "", *,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        self.remat = remat
        self.norm = GroupNorm(width, 1e-6, GROUPS, rngs=rngs)
        self.proj_in = Linear(width, width, init=INIT, dtype=dtype, rngs=rngs)
        self.blocks = stack.stacked(
            lambda rngs: TransformerBlock(width, context_width, heads, dtype, rngs=rngs), depth, rngs=rngs
        )
        self.proj_out = Linear(width, width, init=ZERO, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, context_BSD: Array) -> Array:
        b, _, _, c = x.shape
        tokens = self.proj_in(self.norm(x).reshape(b, -1, c))
        apply = lambda block, tokens, _: (block(tokens, context_BSD), None)  # noqa: E731
        tokens, _ = stack.scan(self.blocks, apply, tokens, policy=self.remat)
        return x + self.proj_out(tokens).reshape(x.shape)


class PlainAttention(nnx.Module):
    """Positions of (B, H, W, C) attend to each other, added to x. Ho 2020, appendix B; with several heads Dhariwal &
    Nichol 2021, section 3."""

    def __init__(self, width: int, heads: int, dtype: Any = None, remat: str = "", *, rngs: nnx.Rngs):
        self.heads, self.remat = heads, remat
        self.norm = GroupNorm(width, 1e-5, GROUPS, rngs=rngs)
        self.qkv = Linear(width, 3 * width, init=INIT, dtype=dtype, rngs=rngs)
        self.out = Linear(width, width, init=ZERO, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return stack.remat(self._added, self.remat)(x)

    def _added(self, x: Array) -> Array:
        b, _, _, c = x.shape
        parts = self.qkv.parts(self.norm(x).reshape(b, -1, c), 3)
        q, k, v = (split_heads(part, self.heads) for part in parts)
        return x + self.out(merge_heads(attend(q, k, v))).reshape(x.shape)


def downsample(channels: int, dtype: Any = None, *, rngs: nnx.Rngs) -> Conv:
    """3x3 convolution at every second position, one zero around: (B, H, W, C) -> (B, H/2, W/2, C)."""
    return Conv(channels, channels, 3, stride=2, init=INIT, dtype=dtype, rngs=rngs)


def upsample(channels: int, dtype: Any = None, *, rngs: nnx.Rngs) -> Conv:
    """Every position four times, then a 3x3 convolution: (B, H, W, C) -> (B, 2H, 2W, C)."""
    return Conv(channels, channels, 3, up=True, init=INIT, dtype=dtype, rngs=rngs)
