"""PixArt-alpha (Chen 2023): a transformer whose patches attend to the caption, one modulation for all blocks.

    t0 = Linear(SiLU(c)),  c = time (+ size and aspect)                                    adaLN-single, section 2.3
    x += gate1 attention(mod(LN(x); shift1, scale1)),  (shift1, ..., gate2) = E + t0       E: a block's own 6 vectors
    x += cross_attention(x, caption)                                                       no norm, no gate
    x += gate2 mlp(mod(LN(x); shift2, scale2))                                             mod(x; b, s) = x (1 + s) + b

Cross-attention and the output start at zero, so a fresh network is exactly 0. The positions of n tokens a side are
i base_size / n, i = 0..n-1: any size has the limits of the size it was trained at.

>>> import jax, jax.numpy as jnp
>>> from diffjax.models.pixart import PixArt
>>> from diffjax.nn.functional import functionalize
>>> make = lambda rngs: PixArt(8, 4, 8, width=48, depth=2, heads=2, text_width=16, text_length=5, rngs=rngs)
>>> net, init = functionalize(make)
>>> x, t = jnp.ones((2, 8, 12, 4)), jnp.array([0.0, 999.0])  # the noise label is DDPM's index 0..999
>>> net(init(jax.random.key(0)), x, t, {"text": jnp.ones((2, 5, 16))}).shape
(2, 8, 12, 8)

Published networks: text_width=4096, text_length=120, base_size 16 at 256 pixels and 32 at 512 and 1024 (there: 64
divided by a scale of 2), controls=3 at 1024. Their weights map by `weights.pixart`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffjax.core.types import Array, Cond, Key
from diffjax.models.dit import add_positions, check_sizes
from diffjax.nn import embeddings, stack
from diffjax.nn.control import Control
from diffjax.nn.layers import Embedding, Init, Linear
from diffjax.nn.norms import LayerNorm
from diffjax.nn.patches import PatchEmbedding, unpatchify
from diffjax.nn.transformer import ZERO, CrossAttention, Mlp, SelfAttention, add_gated, modulate

_SMALL = Init("normal", 0.02)


class PixArt(nnx.Module):
    """x (B, H, W, channels), noise_label (B,) -> (B, H, W, out_channels), whatever multiples of the patch H and W are.

    cond: text (B, text_length, text_width) of a text encoder, and optionally text_mask (B, text_length), true where
    tokens are real. Where text is absent, and for samples whose mask is false everywhere, the caption is a random
    table that is stored with the weights but never trained. text_length=0 has no such table and takes any number of
    tokens. controls=3: control (B, 3), height and width of the picture in pixels and their ratio. num_classes: label
    int (B,) is a single token in place of text, absent = the null class num_classes (Berrada 2024). metadata: the
    arguments of `nn.control.Control`, whose vector joins c, for the blocks and for the head.

    Raises ValueError for sizes that do not divide, for images of another kind, and for conditions that are missing,
    misshapen, or that the network does not have.
    """

    def __init__(
        self,
        image_size: int,
        channels: int,
        out_channels: int,
        patch: int = 2,
        width: int = 1152,
        depth: int = 28,
        heads: int = 16,
        text_width: int = 4096,
        text_length: int = 120,
        num_classes: int = 0,
        controls: int = 0,
        base_size: float = 16,
        metadata: Mapping[str, Any] | None = None,
        dtype: Any = None,
        remat: str = "",
        *,
        rngs: nnx.Rngs,
    ):
        check_sizes(image_size, patch, width, heads)
        stack.check(remat)
        self.channels, self.patch, self.width, self.base_size, self.remat = channels, patch, width, base_size, remat
        self.time = TimeAndSize(width, controls, rngs=rngs)
        self.metadata = Control(width, **metadata, rngs=rngs) if metadata else None
        self.caption = None if num_classes else Caption(width, text_width, text_length, dtype=dtype, rngs=rngs)
        self.num_classes = num_classes
        self.label = Embedding(num_classes + 1, width, rngs=rngs) if num_classes else None
        self.modulation = Linear(width, 6 * width, init=_SMALL, rngs=rngs)
        self.embed = PatchEmbedding(patch, channels, width, dtype=dtype, rngs=rngs)
        self.blocks = stack.stacked(lambda rngs: Block(width, heads, dtype=dtype, rngs=rngs), depth, rngs=rngs)
        self.head = Head(width, patch, out_channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, noise_label: Array, cond: Cond | None = None, key: Key | None = None) -> Array:
        del key  # no dropout
        if x.ndim != 4 or x.shape[-1] != self.channels:
            raise ValueError(f"found images of shape {x.shape}, expected (batch, height, width, {self.channels})")
        cond = cond or {}
        c_BD = self.time(noise_label, cond.get("control"))
        if self.metadata is not None:
            c_BD = c_BD + self.metadata(cond, x.shape[0])
        modulation_BD, context = self.modulation(jax.nn.silu(c_BD)), self._context(x, cond)
        tokens = self.embed(x)
        rows, columns = x.shape[1] // self.patch, x.shape[2] // self.patch
        positions = (np.arange(n) * (self.base_size / n) for n in (rows, columns))
        tokens = add_positions(tokens, embeddings.grid(*positions, self.width)[None])
        tokens, _ = stack.scan(
            self.blocks, lambda block, x, _: (block(x, modulation_BD, context), None), tokens, policy=self.remat
        )
        return unpatchify(self.head(tokens, c_BD), rows, self.patch)

    def _context(self, x: Array, cond: Cond) -> tuple[Array, Array | None]:
        """What the blocks attend to: tokens (B, S, D), and None or where they are real (B, S)."""
        label = cond.get("label")
        if self.label is None:
            if label is not None:
                raise ValueError("cond['label'] is given to a network without classes: set num_classes or leave it out")
            return self.caption(x, cond.get("text"), cond.get("text_mask"))
        if cond.get("text") is not None:
            raise ValueError("cond['text'] is given to a network of classes: set num_classes=0, or leave it out")
        label = jnp.full(x.shape[0], self.num_classes) if label is None else label
        if label.shape != x.shape[:1]:
            raise ValueError(f"found labels of shape {label.shape}, expected {x.shape[:1]}: one class for each image")
        return self.label(label)[:, None, :].astype(x.dtype), None


class TimeAndSize(nnx.Module):
    """Noise label (B,), and with `controls` height, width and aspect ratio (B, 3), -> (B, width) in float32.

    The three are embedded like the label, in thirds of the width. Chen 2023, appendix, after Podell 2023, section 2.2.
    """

    def __init__(self, width: int, controls: int, *, rngs: nnx.Rngs):
        if controls not in (0, 3) or (controls and width % 3):
            raise ValueError(
                f"found controls={controls} and width={width}, expected 0, or 3 (height, width, aspect) and a multiple "
                "of 3 as width"
            )
        self.controls = controls
        self.noise = embeddings.NoiseEmbedding(width, rngs=rngs)
        self.size = embeddings.NoiseEmbedding(width // 3, rngs=rngs) if controls else None
        self.aspect = embeddings.NoiseEmbedding(width // 3, rngs=rngs) if controls else None

    def __call__(self, noise_label_B: Array, control_BK: Array | None) -> Array:
        c_BD = self.noise(noise_label_B)
        if self.size is None:
            if control_BK is not None:
                raise ValueError("cond['control'] is given to a network without it: set controls=3 or leave it out")
            return c_BD
        expected = (noise_label_B.shape[0], 3)
        if control_BK is None or control_BK.shape != expected:
            found = None if control_BK is None else control_BK.shape
            raise ValueError(f"found cond['control'] {found}, expected {expected}: height, width, height / width")
        height, width, aspect = control_BK.T
        return c_BD + jnp.concatenate([self.size(height), self.size(width), self.aspect(aspect)], axis=-1)


class Caption(nnx.Module):
    """Text (B, S, text_width) -> (B, S, width) for cross-attention, and the mask (B, S) or None."""

    def __init__(self, width: int, text_width: int, text_length: int, dtype: Any = None, *, rngs: nnx.Rngs):
        self.text_width, self.text_length = text_width, text_length
        self.project = Mlp(text_width, width, width, init=_SMALL, dtype=dtype, rngs=rngs)
        null = jax.random.normal(rngs.params(), (text_length, text_width)) / np.sqrt(text_width)
        self.null = nnx.Param(null) if text_length else None

    def __call__(self, x: Array, text: Array | None, mask_BS: Array | None) -> tuple[Array, Array | None]:
        if text is None and self.null is None:
            raise ValueError(
                f"this network needs cond['text'] (B, tokens, {self.text_width}): give the text encoder's tokens, or "
                "those of an empty text"
            )
        self._check(x.shape[0], text, mask_BS)
        if self.null is not None:
            null = jax.lax.stop_gradient(self.null[...])[None]
            text = jnp.broadcast_to(null, (x.shape[0], *null.shape[1:])) if text is None else text
            if mask_BS is not None:
                absent_B1 = ~jnp.any(mask_BS, axis=1, keepdims=True)
                text = jnp.where(absent_B1[:, :, None], null.astype(text.dtype), text)
                mask_BS = mask_BS | absent_B1
        return self.project(text.astype(x.dtype)), mask_BS

    def _check(self, batch: int, text: Array | None, mask_BS: Array | None) -> None:
        if text is not None:
            length = self.text_length or text.shape[1:2][0]
            if text.shape != (batch, length, self.text_width):
                raise ValueError(
                    f"found text of shape {text.shape}, expected {(batch, length, self.text_width)}: pad it, and tell "
                    "which tokens are real by cond['text_mask']"
                )
        expected = (batch, self.text_length) if text is None else text.shape[:2]
        if mask_BS is not None and (mask_BS.shape != expected or mask_BS.dtype != bool):
            raise ValueError(f"found text_mask {mask_BS.dtype} {mask_BS.shape}, expected bool {expected}")


class Block(nnx.Module):
    """Tokens (B, L, D); modulation (B, 6 D) of the whole network; context (tokens (B, S, D), mask or None)."""

    def __init__(self, width: int, heads: int, dtype: Any = None, *, rngs: nnx.Rngs):
        self.table = nnx.Param(jax.random.normal(rngs.params(), (6, width)) / np.sqrt(width))
        self.norm = LayerNorm(width, rngs=rngs)
        self.attention = SelfAttention(width, heads, dtype=dtype, rngs=rngs)
        self.cross = CrossAttention(width, width, heads, init_out=ZERO, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(width, 4 * width, dtype=dtype, rngs=rngs)

    def __call__(self, x_BLD: Array, modulation_BD: Array, context: tuple[Array, Array | None]) -> Array:
        modulation_BD = modulation_BD + self.table[...].reshape(1, -1)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation_BD, 6, axis=-1)
        x_BLD = add_gated(x_BLD, gate1, self.attention(modulate(self.norm(x_BLD), shift1, scale1)))
        x_BLD = x_BLD + self.cross(x_BLD, *context)
        return add_gated(x_BLD, gate2, self.mlp(modulate(self.norm(x_BLD), shift2, scale2)))


class Head(nnx.Module):
    """Tokens (B, L, D), c (B, D) -> (B, L, p p out_channels), zero at first; c itself is both shift and scale."""

    def __init__(self, width: int, patch: int, out_channels: int, dtype: Any = None, *, rngs: nnx.Rngs):
        self.table = nnx.Param(jax.random.normal(rngs.params(), (2, width)) / np.sqrt(width))
        self.norm = LayerNorm(width, rngs=rngs)
        self.out = Linear(width, patch * patch * out_channels, init=ZERO, dtype=dtype, rngs=rngs)

    def __call__(self, x_BLD: Array, c_BD: Array) -> Array:
        shift, scale = (c_BD + row for row in self.table[...][:, None, :])
        return self.out(modulate(self.norm(x_BLD), shift, scale))
