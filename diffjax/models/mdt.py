"""MDTv2 (Gao 2023): DiT with long skips, trained on all tokens and on a part of them, which a side block completes.

    encoder   in-blocks, then as many out-blocks, whose k-th takes the skip of the k-th last in-block
    decoder   blocks that all take the network's input tokens as their skip

A skip is Linear([x, skip]) in front of a block. Attention adds a bias by the distance of two tokens, learned in each
block. The masked pass gives `keep` tokens to the encoder; then a token of its own stands for each of the others, and
one block interpolates at these. Training adds the losses of both passes, sampling has the unmasked one.

>>> import jax, jax.numpy as jnp
>>> from diffjax.models import mdt
>>> from diffjax.nn.functional import functionalize
>>> make = lambda rngs: mdt.MDT(8, 4, 8, num_classes=10, width=32, depth=4, decoder_depth=2, heads=2, rngs=rngs)
>>> net, init = functionalize(make)
>>> params, x, t = init(jax.random.key(0)), jnp.ones((2, 8, 8, 4)), jnp.array([0.0, 999.0])
>>> net(params, x, t, {"label": jnp.array([3, 10])}).shape  # 10 is the null class
(2, 8, 8, 8)
>>> mdt.buckets(16)  # the length of a sequence is static: one compilation for each of these
(10, 10, 9, 8, 8)
>>> net(params, x, t, {"label": jnp.array([3, 10])}, jax.random.key(1), keep=9).shape
(2, 8, 8, 8)

Widths, depths and heads are those of `dit.SIZES`; the authors train S with decoder_depth=6, XL with 4. Their weights
map by `weights.mdt`.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffjax.core.types import Array, Cond, Key
from diffjax.models.dit import CONDITIONS, Block, Conditions, Head, add_positions, check_images, check_sizes
from diffjax.nn import embeddings, stack
from diffjax.nn.layers import Linear
from diffjax.nn.patches import PatchEmbedding, unpatchify
from diffjax.nn.transformer import XAVIER

_DEVIATION = 0.02  # of tables of biases and the mask token


def buckets(num_tokens: int, ratio: float = 0.3, spread: float = 0.2, count: int = 5) -> tuple[int, ...]:
    """How many tokens to keep: `count` equally likely numbers, descending, in place of floor(N (1 - r)) with r uniform
    in ratio + [0, spread].

    Each is that of the middle of its part of the interval, so their mean is that of the draw. Raises ValueError for
    ratios outside [0, 1), no count, and where no token would be kept.
    """
    if count < 1 or not (0 <= ratio and 0 <= spread and ratio + spread < 1):
        raise ValueError(
            f"found ratio={ratio}, spread={spread}, count={count}; expected 0 <= ratio, ratio + spread < 1, count >= 1"
        )
    ratios = ratio + spread * (np.arange(count) + 0.5) / count
    # 1e-9: N (1 - r) may be a whole number, and rounded down
    keep = tuple(int(num_tokens * (1 - r) + 1e-9) for r in ratios)
    if keep[-1] < 1:
        raise ValueError(f"found {num_tokens} tokens of which {keep[-1]} are kept, expected 1 or more: lower ratio")
    return keep


class MDT(nnx.Module):
    """x (B, R, R, channels), noise_label (B,) -> (B, R, R, out_channels), R = image_size. Gao 2023, section 3; v2.

    keep: static number of tokens, chosen for each sample by `key`, or the smallest of cond["mask_noise"] (B, N); None
    is the unmasked pass, in which `key` has no effect. Conditions as for DiT. depth counts all blocks but the side
    block.

    Raises ValueError as DiT; for a depth that leaves no even number of blocks before the decoder; where `keep` is not
    in 1..N, or there is nothing to choose tokens by.
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
        decoder_depth: int = 4,
        heads: int = 16,
        mlp_ratio: float = 4.0,
        condition: str = "norm",
        text_width: int = 0,
        qk_norm: bool = False,
        metadata: Mapping[str, Any] | None = None,
        dtype: Any = None,
        remat: str = "",
        *,
        rngs: nnx.Rngs,
    ):
        check_sizes(image_size, patch, width, heads)
        stack.check(remat)
        half, odd = divmod(depth - decoder_depth, 2)
        if odd or half < 1 or decoder_depth < 1:
            raise ValueError(
                f"found depth={depth} and decoder_depth={decoder_depth}, expected an even number of blocks before the "
                "decoder, and at least one in it"
            )
        self.image_size, self.channels, self.patch, self.remat = image_size, channels, patch, remat
        self.side = image_size // patch
        self.conditions = Conditions(width, num_classes, condition, text_width, metadata, dtype, rngs=rngs)
        self.embed = PatchEmbedding(patch, channels, width, dtype=dtype, rngs=rngs)
        table = embeddings.grid(np.arange(self.side), np.arange(self.side), width)[None]
        # an array each: a step that gives its parameters' memory away may not do so twice
        self.positions, self.decoder_positions = nnx.Param(jnp.array(table)), nnx.Param(jnp.array(table))
        self.mask_token = nnx.Param(_DEVIATION * jax.random.normal(rngs.params(), (1, 1, width)))
        options = dict(cross=CONDITIONS[condition], qk_norm=qk_norm, dtype=dtype)
        block = functools.partial(SkipBlock, self.side, width, heads, int(width * mlp_ratio), **options)
        self.in_blocks = stack.stacked(lambda rngs: block(rngs=rngs), half, rngs=rngs)
        self.out_blocks = stack.stacked(lambda rngs: block(skip=True, rngs=rngs), half, rngs=rngs)
        self.decoder = stack.stacked(lambda rngs: block(skip=True, rngs=rngs), decoder_depth, rngs=rngs)
        self.interpolate = block(rngs=rngs)
        self.head = Head(width, patch, out_channels, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Array, noise_label: Array, cond: Cond | None = None, key: Key | None = None, keep: int | None = None
    ) -> Array:
        check_images(x, self.image_size, self.channels)
        cond = cond or {}
        given = self.conditions(noise_label, cond)
        inputs = add_positions(self.embed(x), self.positions[...])
        every = jnp.arange(self.side**2)[None]
        if keep is None:
            tokens = add_positions(self._encode(inputs, every, given), self.decoder_positions[...])
        else:
            order = jnp.argsort(self._mask_noise(x, cond, key, keep), axis=1)
            kept = order[:, :keep]
            tokens = self._encode(jnp.take_along_axis(inputs, kept[..., None], axis=1), kept, given)
            tokens = self._complete(tokens, order, every, given)
        decode = lambda block, x, _: (block(x, every, *given, skip_BLD=inputs), None)  # noqa: E731
        tokens, _ = stack.scan(self.decoder, decode, tokens, policy=self.remat)
        return unpatchify(self.head(tokens, given[0]), self.side, self.patch)

    def _encode(self, x_BLD: Array, places: Array, given: tuple) -> Array:
        """In- and out-blocks on tokens at `places` (1 or B, L)."""

        def inward(block: "SkipBlock", x: Array, _: None) -> tuple[Array, Array]:
            x = block(x, places, *given)
            return x, x

        x_BLD, skips = stack.scan(self.in_blocks, inward, x_BLD, policy=self.remat)
        outward = lambda block, x, skip: (block(x, places, *given, skip_BLD=skip), None)  # noqa: E731
        return stack.scan(self.out_blocks, outward, x_BLD, skips[::-1], policy=self.remat)[0]

    def _complete(self, x_BLD: Array, order: Array, every: Array, given: tuple) -> Array:
        """The first tokens of `order` (B, N) -> all N at their places: the others interpolated from them."""
        batch, keep, width = x_BLD.shape
        absent = jnp.broadcast_to(self.mask_token[...].astype(x_BLD.dtype), (batch, order.shape[1] - keep, width))
        rank = jnp.argsort(order, axis=1)
        tokens = jnp.take_along_axis(jnp.concatenate([x_BLD, absent], axis=1), rank[..., None], axis=1)
        tokens = add_positions(tokens, self.decoder_positions[...])
        side = stack.remat(lambda x: self.interpolate(x, every, *given), self.remat)
        return jnp.where((rank >= keep)[..., None], side(tokens), tokens)

    def _mask_noise(self, x: Array, cond: Cond, key: Key | None, keep: int) -> Array:
        """Numbers (B, N) whose smallest say which tokens are kept."""
        shape = x.shape[0], self.side**2
        if not isinstance(keep, int) or not 1 <= keep <= shape[1]:
            raise ValueError(
                f"found keep={keep!r}, expected a Python int in 1..{shape[1]}, for example of mdt.buckets({shape[1]})"
            )
        noise = cond.get("mask_noise")
        if noise is None:
            if key is None:
                raise ValueError("a masked pass chooses tokens by key: give key, or keep=None for the unmasked pass")
            return jax.random.uniform(key, shape)
        if noise.shape != shape:
            raise ValueError(f"found mask_noise of shape {noise.shape}, expected {shape}: a number for each token")
        return noise


class SkipBlock(nnx.Module):
    """DiT's block with a bias by distance, and with `skip` a projection of [x, skip] (B, L, 2 D) in front."""

    def __init__(
        self, side: int, width: int, heads: int, hidden: int, skip: bool = False, cross: bool = False,
        qk_norm: bool = False, dtype: Any = None, *, rngs: nnx.Rngs,
    ):  # fmt: skip
        self.side = side
        self.project = Linear(2 * width, width, init=XAVIER, dtype=dtype, rngs=rngs) if skip else None
        # the published tables have three rows more than there are distances
        shape = (2 * side - 1) ** 2 + 3, heads
        self.bias_by_distance = nnx.Param(_DEVIATION * jax.random.normal(rngs.params(), shape))
        self.block = Block(width, heads, hidden, cross=cross, qk_norm=qk_norm, dtype=dtype, rngs=rngs)

    def __call__(
        self, x_BLD: Array, places: Array, c_BD: Array, context: tuple[Array, Array | None] | None = None,
        skip_BLD: Array | None = None,
    ) -> Array:  # fmt: skip
        """Tokens at `places` (1 or B, L), integers 0..N-1 row by row."""
        if skip_BLD is not None:
            x_BLD = self.project(jnp.concatenate([x_BLD, skip_BLD], axis=-1))
        bias = jnp.moveaxis(self.bias_by_distance[...][distances(places, self.side)], -1, 1)
        return self.block(x_BLD, c_BD, context, bias)


def distances(places: Array, side: int) -> Array:
    """Rows of the table of biases for all pairs of tokens at `places` (B, L): (B, L, L).

    (rows apart + n - 1) (2n - 1) + columns apart + n - 1, query minus key, n = side. Liu 2021, 3.2; Bao 2022's code.
    """
    apart = [part[:, :, None] - part[:, None, :] + side - 1 for part in (places // side, places % side)]
    return apart[0] * (2 * side - 1) + apart[1]
