"""The encoder of T5 version 1.1, a frozen part of PixArt and Stable Diffusion 3. Raffel 2020; gates: Shazeer 2020.

    network, init = functionalize(lambda rngs: T5(**T5_XXL, rngs=rngs))
    text = network(params, ids, mask)            # ids, mask (B, L), of data.tokenisers.SentencePieceTokeniser

Positions enter as one bias of the attention scores, by distance, that all blocks share; scores are not divided by
sqrt(C); norms have no mean and no bias; linear layers have no bias. XXL has 4.8 billion parameters: 9.5 GB in bfloat16.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffjax.core.types import Array
from diffjax.models.text import check_ids, check_mask
from diffjax.nn import stack
from diffjax.nn.attention import attend
from diffjax.nn.layers import Embedding, Linear
from diffjax.nn.norms import RMSNorm
from diffjax.nn.transformer import SelfAttention, gelu, merge_heads

T5_SMALL = dict(width=512, depth=8, heads=6, hidden=1024)
T5_BASE = dict(width=768, depth=12, heads=12, hidden=2048)
T5_LARGE = dict(width=1024, depth=24, heads=16, hidden=2816)
T5_XL = dict(width=2048, depth=24, heads=32, hidden=5120)
T5_XXL = dict(width=4096, depth=24, heads=64, hidden=10240)

EPS = 1e-6  # of all norms


class T5Block(nnx.Module):
    """Attention with a bias of its scores, then a gated perceptron, each after a norm and added to its input."""

    def __init__(self, width: int, heads: int, head_size: int, hidden: int, dtype: Any = None, *, rngs: nnx.Rngs):
        self.norm1 = RMSNorm(width, EPS, rngs=rngs)
        self.attention = SelfAttention(
            width, heads, bias=False, inner=heads * head_size, out_bias=False, dtype=dtype, rngs=rngs
        )
        self.norm2 = RMSNorm(width, EPS, rngs=rngs)
        self.expand = Linear(width, 2 * hidden, bias=False, dtype=dtype, rngs=rngs)  # [gate | value]
        self.contract = Linear(hidden, width, bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x_BLD: Array, bias_1NLL: Array, mask_B11L: Array | None) -> Array:
        q, k, v = self.attention.project(self.norm1(x_BLD))
        attended = attend(q * math.sqrt(q.shape[-1]), k, v, bias=bias_1NLL, mask=mask_B11L)  # undoes the division
        x_BLD = x_BLD + self.attention.out(merge_heads(attended)).astype(x_BLD.dtype)
        gate, value = jnp.split(self.expand(self.norm2(x_BLD)), 2, axis=-1)
        return x_BLD + self.contract(gelu(gate) * value).astype(x_BLD.dtype)


class T5(nnx.Module):
    """ids (B, L), mask bool (B, L), true where attended to, None = everywhere -> (B, L, width).

    What is at masked places attends to the text too; leave it out by the same mask. An id outside the vocabulary
    gives NaN. The sum over blocks stays in the type of the token table: with float16 it overflows (Raffel's weights
    are of bfloat16), with bfloat16 it does not.
    """

    def __init__(
        self, width: int = 4096, depth: int = 24, heads: int = 64, hidden: int = 10240, head_size: int = 64,
        vocabulary: int = 32128, buckets: int = 32, max_distance: int = 128, dtype: Any = None, remat: str = "",
        *, rngs: nnx.Rngs,
    ):  # fmt: skip
        stack.check(remat)
        _thresholds(buckets, max_distance)
        self.buckets, self.max_distance, self.remat = buckets, max_distance, remat
        make = lambda rngs: T5Block(width, heads, head_size, hidden, dtype, rngs=rngs)  # noqa: E731
        self.tokens = Embedding(vocabulary, width, 1.0, rngs=rngs)
        self.distances = Embedding(buckets, heads, width**-0.5, rngs=rngs)
        self.blocks = stack.stacked(make, depth, rngs=rngs)
        self.norm = RMSNorm(width, EPS, rngs=rngs)

    def __call__(self, ids_BL: Array, mask_BL: Array | None = None) -> Array:
        check_ids(ids_BL, 0)
        check_mask(mask_BL, ids_BL)
        length = ids_BL.shape[1]
        relative = np.arange(length)[None, :] - np.arange(length)[:, None]
        bias_LLN = self.distances(jnp.asarray(bucket(relative, self.buckets, self.max_distance)))
        bias = jnp.moveaxis(bias_LLN, -1, 0)[None].astype(jnp.float32)
        mask = None if mask_BL is None else mask_BL[:, None, None, :]
        apply = lambda block, x, _: (block(x, bias, mask), None)  # noqa: E731
        x, _ = stack.scan(self.blocks, apply, self.tokens(ids_BL), policy=self.remat)
        return self.norm(x)


def bucket(relative: np.ndarray, buckets: int = 32, max_distance: int = 128) -> np.ndarray:
    """Row of the table of biases for a key `relative` tokens after the query, int32 of the same shape.

    Half of the rows are for keys after the query. Of each half, half are for distances 0, 1, 2, ...; the others cover
    equal ratios of distance, up to max_distance and all beyond it. Raffel 2020, section 2.1, and its code.
    """
    half = buckets // 2
    distance = np.abs(relative)
    row = np.minimum(distance, half // 2) + np.searchsorted(_thresholds(buckets, max_distance), distance, side="right")
    return np.where(relative > 0, half + row, row).astype(np.int32)


def _thresholds(buckets: int, max_distance: int) -> np.ndarray:
    """The distances from which each row of the upper half of one direction counts, but the first. ValueError if there
    are none."""
    exact = buckets // 4
    if buckets % 4 or exact < 1 or max_distance <= exact:
        raise ValueError(
            f"found {buckets} buckets up to distance {max_distance}, expected a multiple of 4, and a quarter below it"
        )
    # the exponent of whole powers may be off by rounding
    return np.ceil(exact * (max_distance / exact) ** (np.arange(1, exact) / exact) - 1e-9)
