"""MM-DiT, the network of Stable Diffusion 3 (Esser 2024, section 4): image and text attend to each other as equals.

Each of the two streams has weights of its own; only attention mixes them, over the tokens of both:

    q, k, v = qkv_s(mod(LN(x_s); shift1, scale1))                       for s in image, text
    x_s += gate1 out_s(attention of all tokens)_s
    x_s += gate2 mlp_s(mod(LN(x_s); shift2, scale2))                    mod(x; b, s) = x (1 + s) + b

The six vectors are Linear_s(SiLU(c)), c = time + MLP(pooled text). They and the output start at zero, so a fresh
network is exactly 0. The last block's text is only attended to. Text has no positions; those of the image are the
centre of a grid of max_grid x max_grid tokens, in steps of base_size / n for the n tokens a side of image_size.

>>> import jax, jax.numpy as jnp
>>> from diffjax.models.mmdit import SIZES, MMDiT
>>> from diffjax.nn.functional import functionalize
>>> make = lambda rngs: MMDiT(8, 4, 32, depth=3, heads=2, text_width=16, pooled_width=8, rngs=rngs)
>>> net, init = functionalize(make)
>>> x, label = jnp.ones((2, 8, 12, 4)), jnp.array([0.0, 1000.0])  # of SD3: 1000 times the time of the flow
>>> net(init(jax.random.key(0)), x, label, {"text": jnp.ones((2, 5, 16)), "pooled": jnp.ones((2, 8))}).shape
(2, 8, 12, 4)
>>> big = lambda rngs: MMDiT(128, 16, **SIZES["SD3-medium"], rngs=rngs)

Weights of Stability and of diffusers map by `weights.mmdit`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffjax.core.types import Array, Cond, Key
from diffjax.models.dit import Head, add_positions, check_sizes
from diffjax.nn import embeddings, stack
from diffjax.nn.attention import attend
from diffjax.nn.control import Control
from diffjax.nn.layers import Embedding, Init, Linear
from diffjax.nn.norms import LayerNorm
from diffjax.nn.patches import PatchEmbedding, unpatchify
from diffjax.nn.transformer import XAVIER, ZERO, Mlp, SelfAttention, add_gated, merge_heads, modulate

# Berrada 2024 have an "XL/2" whose size is not told: A has that of DiT-XL; B follows SD3, heads of 64 channels and as
# many as blocks, for the same width, and comes near the sizes of the networks that it is compared with.
SIZES = {
    "XL/2-A": {"width": 1152, "depth": 28, "heads": 16},
    "XL/2-B": {"width": 1152, "depth": 18, "heads": 18},
    "SD3-medium": {
        "width": 1536, "depth": 24, "heads": 24, "text_width": 4096, "pooled_width": 2048, "qk_norm": False,
        "stored_positions": True,
    },
}  # fmt: skip


class MMDiT(nnx.Module):
    """x (B, H, W, channels), noise_label (B,) -> (B, H, W, out_channels or channels), H and W multiples of the patch up
    to max_grid patches.

    cond: text (B, S, text_width), all of it attended to as in SD3, and pooled (B, pooled_width). num_classes: label int
    (B,) in their place, absent = the null class num_classes; its vector is the only text token, and what is pooled.
    qk_norm: RMS-normalised queries and keys, in each stream by its own scale.

    metadata: the arguments of `nn.control.Control`, whose vector joins c.

    stored_positions: the table of positions is among the weights, never trained, as in published files, whose tables
    need not be the formula's.

    Raises ValueError for sizes that do not divide, for images of another kind or too large, and for conditions that are
    missing, misshapen, or that the network does not have.
    """

    def __init__(
        self,
        image_size: int,
        channels: int,
        width: int = 1152,
        depth: int = 18,
        heads: int = 18,
        patch: int = 2,
        out_channels: int = 0,
        text_width: int = 768,
        pooled_width: int = 768,
        num_classes: int = 0,
        qk_norm: bool = True,
        max_grid: int = 192,
        base_size: float = 16,
        stored_positions: bool = False,
        metadata: Mapping[str, Any] | None = None,
        dtype: Any = None,
        remat: str = "",
        *,
        rngs: nnx.Rngs,
    ):
        check_sizes(image_size, patch, width, heads)
        stack.check(remat)
        side = image_size // patch
        if max_grid < side or depth < 2:
            raise ValueError(
                f"found max_grid={max_grid} and depth={depth} for images of {side} patches a side, expected as large a "
                "grid or a larger one, and 2 blocks or more"
            )
        self.channels, self.patch, self.width, self.remat = channels, patch, width, remat
        self.max_grid, self.step, self.origin = max_grid, base_size / side, (max_grid - side) / 2
        self.positions = nnx.Param(self._grid(max_grid, max_grid)) if stored_positions else None
        self.conditions = Conditions(width, num_classes, text_width, pooled_width, metadata, dtype, rngs=rngs)
        self.embed = PatchEmbedding(patch, channels, width, dtype=dtype, rngs=rngs)
        options = dict(heads=heads, qk_norm=qk_norm, dtype=dtype)
        self.blocks = stack.stacked(lambda rngs: JointBlock(width, **options, rngs=rngs), depth - 1, rngs=rngs)
        self.last = JointBlock(width, **options, last=True, rngs=rngs)
        self.head = Head(width, patch, out_channels or channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, noise_label: Array, cond: Cond | None = None, key: Key | None = None) -> Array:
        del key  # no dropout
        rows, columns = self._check(x)
        c_BD, text = self.conditions(x, noise_label, cond or {})
        image = add_positions(self.embed(x), self._positions(rows, columns))
        (image, text), _ = stack.scan(
            self.blocks, lambda block, streams, _: (block(*streams, c_BD), None), (image, text), policy=self.remat
        )
        last = stack.remat(lambda image, text: self.last(image, text, c_BD)[0], self.remat)
        return unpatchify(self.head(last(image, text), c_BD), rows, self.patch)

    def _check(self, x: Array) -> tuple[int, int]:
        """Tokens a column and a row of the image."""
        if x.ndim != 4 or x.shape[-1] != self.channels:
            raise ValueError(f"found images of shape {x.shape}, expected (batch, height, width, {self.channels})")
        rows, columns = x.shape[1] // self.patch, x.shape[2] // self.patch
        if max(rows, columns) > self.max_grid:
            raise ValueError(
                f"found images of {rows} x {columns} patches, expected {self.max_grid} or fewer a side: set max_grid"
            )
        return rows, columns

    def _positions(self, rows: int, columns: int) -> Array:
        """(1, L, D), the centre of the largest table. Esser 2024, section 5.3.2."""
        if self.positions is None:
            return self._grid(rows, columns)
        table = jax.lax.stop_gradient(self.positions[...]).reshape(self.max_grid, self.max_grid, -1)
        top, left = ((self.max_grid - n) // 2 for n in (rows, columns))
        return table[top : top + rows, left : left + columns].reshape(1, rows * columns, -1)

    def _grid(self, rows: int, columns: int) -> Array:
        """The centre by the formula: 0, 1 ... n - 1 times the step where the image has the size n of training."""
        half, origin = self.width // 2, np.zeros(1)
        row, column = (((self.max_grid - n) // 2 - self.origin + np.arange(n)) * self.step for n in (rows, columns))
        # the two halves apart, since a whole table of 192 x 192 would be 200 MB of constants in the program
        row = embeddings.grid(row, origin, self.width)[:, None, half:]
        column = embeddings.grid(origin, column, self.width)[None, :, :half]
        parts = (jnp.broadcast_to(part, (rows, columns, half)) for part in (column, row))
        return jnp.concatenate([*parts], axis=-1).reshape(1, rows * columns, -1)


class Conditions(nnx.Module):
    """Noise label (B,) and conditions -> SiLU(c) (B, D), text (B, S, D)."""

    def __init__(
        self, width: int, num_classes: int, text_width: int, pooled_width: int,
        metadata: Mapping[str, Any] | None = None, dtype: Any = None, *, rngs: nnx.Rngs,
    ):  # fmt: skip
        self.num_classes, self.text_width, self.pooled_width = num_classes, text_width, pooled_width
        self.noise = embeddings.NoiseEmbedding(width, rngs=rngs)
        self.metadata = Control(width, **metadata, rngs=rngs) if metadata else None
        self.label = Embedding(num_classes + 1, width, rngs=rngs) if num_classes else None
        self.text = None if num_classes else Linear(text_width, width, init=XAVIER, dtype=dtype, rngs=rngs)
        pooled = width if num_classes else pooled_width
        self.pooled = Mlp(pooled, width, width, jax.nn.silu, init=Init("normal", 0.02), rngs=rngs)

    def __call__(self, x: Array, noise_label_B: Array, cond: Cond) -> tuple[Array, Array]:
        c_BD = self.noise(noise_label_B)
        if self.metadata is not None:
            c_BD = c_BD + self.metadata(cond, x.shape[0])
        if self.label is not None:
            label_BD = self._class(x, cond)
            return jax.nn.silu(c_BD + self.pooled(label_BD)), label_BD[:, None, :].astype(x.dtype)
        text, pooled = self._text(x, cond)
        return jax.nn.silu(c_BD + self.pooled(pooled.astype(c_BD.dtype))), self.text(text.astype(x.dtype))

    def _class(self, x: Array, cond: Cond) -> Array:
        if given := [name for name in ("text", "pooled") if cond.get(name) is not None]:
            raise ValueError(f"found {given} for a network of classes: set num_classes=0, or leave them out")
        label = cond.get("label")
        label = jnp.full(x.shape[0], self.num_classes) if label is None else label
        if label.shape != x.shape[:1]:
            raise ValueError(f"found labels of shape {label.shape}, expected {x.shape[:1]}: one class for each image")
        return self.label(label)

    def _text(self, x: Array, cond: Cond) -> tuple[Array, Array]:
        if cond.get("label") is not None:
            raise ValueError("cond['label'] is given to a network without classes: set num_classes, or leave it out")
        text, pooled = (cond.get(name) for name in ("text", "pooled"))
        shapes = [None if given is None else given.shape for given in (text, pooled)]
        batch, tokens = x.shape[0], "tokens" if text is None or text.ndim != 3 else text.shape[1]
        expected = [(batch, tokens, self.text_width), (batch, self.pooled_width)]
        if shapes != expected:
            raise ValueError(
                f"found cond['text'] and cond['pooled'] of shapes {shapes}, expected {expected}: give what the text "
                "encoders make of the prompts, or of empty ones"
            )
        return text, pooled


class JointBlock(nnx.Module):
    """Image (B, L, D), text (B, S, D), c (B, D) -> image, text; text is None after the last."""

    def __init__(
        self, width: int, heads: int, qk_norm: bool, last: bool = False, dtype: Any = None, *, rngs: nnx.Rngs
    ):
        self.image = Stream(width, heads, qk_norm, dtype=dtype, rngs=rngs)
        self.text = Stream(width, heads, qk_norm, last, dtype=dtype, rngs=rngs)

    def __call__(self, image: Array, text: Array, c_BD: Array) -> tuple[Array, Array | None]:
        image_qkv, image_rest = self.image.project(image, c_BD)
        text_qkv, text_rest = self.text.project(text, c_BD)
        q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip(image_qkv, text_qkv, strict=True))
        attended = merge_heads(attend(q, k, v))
        length = image.shape[1]
        image = self.image.update(image, attended[:, :length], image_rest)
        return image, self.text.update(text, attended[:, length:], text_rest) if text_rest else None


class Stream(nnx.Module):
    """What one of the two kinds of tokens has for itself. `last`: queries, keys and values only."""

    def __init__(
        self, width: int, heads: int, qk_norm: bool, last: bool = False, dtype: Any = None, *, rngs: nnx.Rngs
    ):
        self.norm = LayerNorm(width, rngs=rngs)
        self.modulation = Linear(width, (2 if last else 6) * width, init=ZERO, rngs=rngs)
        self.attention = SelfAttention(width, heads, qk_norm=qk_norm, dtype=dtype, project_out=not last, rngs=rngs)
        self.mlp = None if last else Mlp(width, 4 * width, dtype=dtype, rngs=rngs)

    def project(self, x_BLD: Array, c_BD: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """Queries, keys and values (B, L, N, C), and the vectors that `update` takes, none of the last text."""
        shift, scale, *rest = jnp.split(self.modulation(c_BD), 2 if self.mlp is None else 6, axis=-1)
        return self.attention.project(modulate(self.norm(x_BLD), shift, scale)), tuple(rest)

    def update(self, x_BLD: Array, attended_BLD: Array, rest: tuple[Array, ...]) -> Array:
        gate1, shift2, scale2, gate2 = rest
        x_BLD = add_gated(x_BLD, gate1, self.attention.out(attended_BLD))
        return add_gated(x_BLD, gate2, self.mlp(modulate(self.norm(x_BLD), shift2, scale2)))
