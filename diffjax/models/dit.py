"""DiT (Peebles & Xie 2023): a transformer on patches of a latent image, the condition by modulated LayerNorm.

    x += gate1 attention(mod(LN(x); shift1, scale1))          [x += cross_attention(x, condition)]           (1)
    x += gate2 mlp(mod(LN(x); shift2, scale2))                mod(x; b, s) = x (1 + s) + b

The six vectors of a block are Linear(SiLU(c)), which starts at zero as the output does: a fresh network is exactly 0.

    condition="norm"       c = time + class, the published network
    condition="attention"  c = time; class token or text by the bracket in (1), as Berrada et al. 2024 compare

>>> import jax, jax.numpy as jnp
>>> from diffjax.models.dit import DiT
>>> from diffjax.nn.functional import functionalize
>>> net, init = functionalize(lambda rngs: DiT(8, 4, 8, num_classes=10, width=32, depth=2, heads=2, rngs=rngs))
>>> x, t = jnp.ones((2, 8, 8, 4)), jnp.array([0.0, 999.0])  # the noise label is DDPM's index 0..999
>>> net(init(jax.random.key(0)), x, t, {"label": jnp.array([3, 10])}).shape  # 10 is the null class
(2, 8, 8, 8)

Learned variance is twice as many output channels; weights of the authors and of diffusers map by `weights.dit`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffjax.core import names
from diffjax.core.types import Array, Cond, Key
from diffjax.nn import embeddings, stack
from diffjax.nn import positions as tables
from diffjax.nn.control import Control
from diffjax.nn.layers import Embedding, Linear
from diffjax.nn.norms import LayerNorm
from diffjax.nn.patches import PatchEmbedding, unpatchify
from diffjax.nn.transformer import ZERO, CrossAttention, Mlp, SelfAttention, add_gated, modulate

# Peebles & Xie 2023, table 1; each with patches of 2, 4 or 8
SIZES = {
    "S": {"width": 384, "depth": 12, "heads": 6},
    "B": {"width": 768, "depth": 12, "heads": 12},
    "L": {"width": 1024, "depth": 24, "heads": 16},
    "XL": {"width": 1152, "depth": 28, "heads": 16},
}
CONDITIONS = {"norm": False, "attention": True}  # whether blocks attend to the condition


class DiT(nnx.Module):
    """x (B, R, R, channels), noise_label (B,) -> (B, R, R, out_channels), R = image_size. Peebles & Xie 2023, 3.2.

    cond: label int (B,), absent = the null class num_classes; with text_width, text (B, S, text_width) and optionally
    text_mask (B, S). num_classes=0 has no label. qk_norm: RMS-normalised queries and keys, in all attention. metadata:
    the arguments of `nn.control.Control`, whose vector joins c. positions: where tokens are, a mode of `nn.positions`,
    for networks that were pre-trained on base_size tokens a side, 0 = as many as this one has.

    Raises ValueError for sizes that do not divide, an unknown condition or mode, images of another size, and for
    conditions that are missing or that the network does not have.
    """

    def __init__(
        self,
        image_size: int,
        channels: int,
        out_channels: int,
        num_classes: int,
        patch: int = 2,
        width: int = 1152,
        depth: int = 28,
        heads: int = 16,
        mlp_ratio: float = 4.0,
        condition: str = "norm",
        text_width: int = 0,
        qk_norm: bool = False,
        metadata: Mapping[str, Any] | None = None,
        positions: str = "extrap",
        base_size: float = 0,
        dtype: Any = None,
        remat: str = "",
        *,
        rngs: nnx.Rngs,
    ):
        check_sizes(image_size, patch, width, heads)
        stack.check(remat)
        self.image_size, self.channels, self.patch, self.width, self.remat = image_size, channels, patch, width, remat
        self.positions, self.base_size = positions, base_size or image_size // patch
        tables.check(self.positions, self.base_size)
        self.conditions = Conditions(width, num_classes, condition, text_width, metadata, dtype, rngs=rngs)
        self.embed = PatchEmbedding(patch, channels, width, dtype=dtype, rngs=rngs)
        options = dict(hidden=int(width * mlp_ratio), cross=CONDITIONS[condition], qk_norm=qk_norm, dtype=dtype)
        self.blocks = stack.stacked(lambda rngs: Block(width, heads, **options, rngs=rngs), depth, rngs=rngs)
        self.head = Head(width, patch, out_channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, noise_label: Array, cond: Cond | None = None, key: Key | None = None) -> Array:
        del key  # no dropout
        check_images(x, self.image_size, self.channels)
        c_BD, context = self.conditions(noise_label, cond or {})
        tokens = self.embed(x)
        side = self.image_size // self.patch
        tokens = add_positions(tokens, tables.table(self.positions, side, self.base_size, self.width)[None])
        tokens, _ = stack.scan(
            self.blocks, lambda block, x, _: (block(x, c_BD, context), None), tokens, policy=self.remat
        )
        return unpatchify(self.head(tokens, c_BD), side, self.patch)


class Conditions(nnx.Module):
    """Noise label (B,) and conditions -> SiLU of what modulates (B, width); None or (tokens (B, S, width), mask)."""

    def __init__(
        self, width: int, num_classes: int, condition: str, text_width: int, metadata: Mapping[str, Any] | None = None,
        dtype: Any = None, *, rngs: nnx.Rngs,
    ):  # fmt: skip
        self.attend = names.lookup(CONDITIONS, condition, "model.condition")
        if text_width and (num_classes or not self.attend):
            raise ValueError(
                f"found model.text_width={text_width} with num_classes={num_classes} and condition={condition!r}: text "
                "is given by attention and in place of classes, set condition='attention' and num_classes=0"
            )
        if self.attend and not (text_width or num_classes):
            raise ValueError("condition='attention' has nothing to attend to: set num_classes or model.text_width")
        self.num_classes, self.text_width = num_classes, text_width
        self.time = embeddings.NoiseEmbedding(width, rngs=rngs)
        self.metadata = Control(width, **metadata, rngs=rngs) if metadata else None
        self.label = Embedding(num_classes + 1, width, rngs=rngs) if num_classes else None
        self.text = Mlp(text_width, width, width, dtype=dtype, rngs=rngs) if text_width else None

    def __call__(self, noise_label_B: Array, cond: Cond) -> tuple[Array, tuple[Array, Array | None] | None]:
        c_BD, batch = self.time(noise_label_B), noise_label_B.shape[0]
        if self.metadata is not None:
            c_BD = c_BD + self.metadata(cond, batch)
        if self.text is not None:
            return jax.nn.silu(c_BD), (self.text(_checked_text(cond, batch, self.text_width)), cond.get("text_mask"))
        if cond.get("text") is not None:
            raise ValueError(
                "cond['text'] is given to a network without it: set model.text_width and condition='attention'"
            )
        label = cond.get("label")
        if self.label is None:
            if label is not None:
                raise ValueError("cond['label'] is given to a network without classes: set num_classes, or drop it")
            return jax.nn.silu(c_BD), None
        label = jnp.full(batch, self.num_classes) if label is None else label
        if label.shape != (batch,):
            raise ValueError(f"found labels of shape {label.shape}, expected ({batch},): one class for each image")
        label_BD = self.label(label)
        if self.attend:
            return jax.nn.silu(c_BD), (label_BD[:, None, :], None)
        return jax.nn.silu(c_BD + label_BD), None


class Block(nnx.Module):
    """(1) on tokens (B, L, D): c (B, D), context None or (tokens (B, S, D), mask), attention bias (1 or B, N, L, L)."""

    def __init__(
        self, width: int, heads: int, hidden: int, cross: bool = False, qk_norm: bool = False, dtype: Any = None,
        *, rngs: nnx.Rngs,
    ):  # fmt: skip
        self.norm = LayerNorm(width, rngs=rngs)
        self.modulation = Linear(width, 6 * width, init=ZERO, rngs=rngs)
        self.attention = SelfAttention(width, heads, qk_norm=qk_norm, dtype=dtype, rngs=rngs)
        options = dict(qk_norm=qk_norm, init_out=ZERO, dtype=dtype, rngs=rngs)
        self.cross = CrossAttention(width, width, heads, **options) if cross else None
        self.mlp = Mlp(width, hidden, dtype=dtype, rngs=rngs)

    def __call__(
        self, x_BLD: Array, c_BD: Array, context: tuple[Array, Array | None] | None = None, bias: Array | None = None
    ) -> Array:
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(self.modulation(c_BD), 6, axis=-1)
        x_BLD = add_gated(x_BLD, gate1, self.attention(modulate(self.norm(x_BLD), shift1, scale1), bias=bias))
        if self.cross is not None:
            x_BLD = x_BLD + self.cross(x_BLD, *context)
        return add_gated(x_BLD, gate2, self.mlp(modulate(self.norm(x_BLD), shift2, scale2)))


class Head(nnx.Module):
    """Tokens (B, L, D), c (B, D) -> (B, L, p p out_channels), zero at first."""

    def __init__(self, width: int, patch: int, out_channels: int, dtype: Any = None, *, rngs: nnx.Rngs):
        self.norm = LayerNorm(width, rngs=rngs)
        self.modulation = Linear(width, 2 * width, init=ZERO, rngs=rngs)
        self.out = Linear(width, patch * patch * out_channels, init=ZERO, dtype=dtype, rngs=rngs)

    def __call__(self, x_BLD: Array, c_BD: Array) -> Array:
        return self.out(modulate(self.norm(x_BLD), *jnp.split(self.modulation(c_BD), 2, axis=-1)))


def add_positions(x_BLD: Array, table_1LD: Array | np.ndarray) -> Array:
    """Tokens and a table of theirs, added in float32."""
    return (x_BLD.astype(jnp.promote_types(x_BLD.dtype, jnp.float32)) + table_1LD).astype(x_BLD.dtype)


def check_sizes(image_size: int, patch: int, width: int, heads: int) -> None:
    """Raises ValueError for a patch that does not divide the image, or a width not divided by heads or positions."""
    if image_size % patch:
        raise ValueError(f"found image_size={image_size} and patch={patch}, expected a multiple of the patch")
    if width % heads or width % 4:
        raise ValueError(f"found width={width} and heads={heads}, expected a multiple of heads, and of 4 for positions")


def check_images(x: Array, image_size: int, channels: int) -> None:
    """Raises ValueError for images of another size."""
    if x.shape[1:] != (image_size, image_size, channels):
        raise ValueError(f"found images of shape {x.shape[1:]}, expected {(image_size, image_size, channels)}")


def _checked_text(cond: Cond, batch: int, text_width: int) -> Array:
    text = cond.get("text")
    if text is None:
        raise ValueError(
            f"this network needs cond['text'] (B, tokens, {text_width}), found {sorted(cond)}: give the text encoder's "
            "tokens, or those of an empty text"
        )
    if text.ndim != 3 or text.shape[0] != batch or text.shape[2] != text_width:
        raise ValueError(f"found text of shape {text.shape}, expected ({batch}, tokens, {text_width})")
    return text
