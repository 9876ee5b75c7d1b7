"""The residual block that the U-Nets of EDM share (Karras 2022, table 6 and figure 8), its style, and dropout."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from diffjax.core.types import Array, Key
from diffjax.nn import attention
from diffjax.nn.layers import Conv, Init, Linear
from diffjax.nn.norms import GroupNorm


@dataclasses.dataclass(frozen=True)
class BlockStyle:
    """What the blocks of one network have in common."""

    embedding: int  # width of the condition vector
    eps: float
    skip_scale: float
    adaptive_scale: bool  # the condition scales and shifts (ADM) or is added (DDPM++)
    project_resampled: bool  # 1x1 convolution on resampled skips even where the width stays
    head_channels: int | None  # None: one head
    init: Init
    init_zero: Init
    init_attention: Init
    taps: tuple[float, ...] = (1, 1)
    dropout: float = 0.0
    step_condition: bool = False
    zero_init_step: bool = False
    dtype: Any = None


class UNetBlock(nnx.Module):
    """Residual block with optional resampling and self-attention. Karras 2022, table 6 and figure 8."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        style: BlockStyle,
        up: bool = False,
        down: bool = False,
        attend: bool = False,
        *,
        rngs: nnx.Rngs,
    ):
        self.inputs, self.outputs, self.style = inputs, outputs, style
        options = dict(init=style.init, dtype=style.dtype, rngs=rngs)
        resample = dict(up=up, down=down, taps=style.taps)
        width = outputs * (2 if style.adaptive_scale else 1)
        self.norm0 = GroupNorm(inputs, style.eps, rngs=rngs)
        self.conv0 = Conv(inputs, outputs, 3, **resample, **options)
        self.affine = Linear(style.embedding, width, **options)
        if style.step_condition:
            step_init = Init(weight=0.0) if style.zero_init_step else style.init
            self.affine_step = Linear(style.embedding, width, **{**options, "init": step_init})
        self.norm1 = GroupNorm(outputs, style.eps, rngs=rngs)
        self.conv1 = Conv(outputs, outputs, 3, **{**options, "init": style.init_zero})
        if inputs != outputs or up or down:
            project = inputs != outputs or style.project_resampled
            self.skip = Conv(inputs, outputs, 1 if project else 0, **resample, **options)
        else:
            self.skip = None
        self.heads = 0 if not attend else 1 if style.head_channels is None else outputs // style.head_channels
        if self.heads:
            self.norm2 = GroupNorm(outputs, style.eps, rngs=rngs)
            self.qkv = Conv(outputs, 3 * outputs, 1, **{**options, "init": style.init_attention})
            self.proj = Conv(outputs, outputs, 1, **{**options, "init": style.init_zero})

    def __call__(self, x: Array, embedding: Array, step_embedding: Array | None, key: Key | None) -> Array:
        h = self.conv0(jax.nn.silu(self.norm0(x)))
        h = dropout(self._condition(h, embedding, step_embedding), self.style.dropout, key)
        x = (self.conv1(h) + (x if self.skip is None else self.skip(x))) * self.style.skip_scale
        return (self._attend(x) + x) * self.style.skip_scale if self.heads else x

    def _condition(self, h: Array, embedding: Array, step_embedding: Array | None) -> Array:
        shift = self.affine(embedding)[:, None, None, :].astype(h.dtype)
        step = None if step_embedding is None else self.affine_step(step_embedding)[:, None, None, :].astype(h.dtype)
        if not self.style.adaptive_scale:
            return jax.nn.silu(self.norm1(h + shift if step is None else h + shift + step))
        h = self.norm1(h)
        for both in (shift, step):
            if both is not None:
                scale, offset = jnp.split(both, 2, axis=-1)
                h = h * (1 + scale) + offset
        return jax.nn.silu(h)

    def _attend(self, x: Array) -> Array:
        b, height, width, c = x.shape
        # channels of qkv are ordered (head, channel, {q, k, v})
        qkv = self.qkv(self.norm2(x)).reshape(b, height * width, self.heads, c // self.heads, 3)
        q, k, v = (qkv[..., i] for i in range(3))
        return self.proj(attention.attend(q, k, v).reshape(b, height, width, c))


class Keys:
    """One dropout key a block, or None for all."""

    def __init__(self, key: Key | None):
        self.key, self.index = key, 0

    def next(self) -> Key | None:
        self.index += 1
        return None if self.key is None else jax.random.fold_in(self.key, self.index)


def dropout(x: Array, probability: float, key: Key | None) -> Array:
    """Inverted dropout; none without a key. Srivastava 2014."""
    if key is None or probability == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - probability, x.shape)
    return jnp.where(keep, x / (1 - probability), 0)
