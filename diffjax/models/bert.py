"""BERT, a text encoder whose tokens see each other both ways. Devlin 2019, section 3; Vaswani 2017, section 3.

    network, init = functionalize(lambda rngs: Bert(**MINILM_L6, rngs=rngs))
    text_BLD = network(params, ids, mask)              # ids (B, L) int32, of data.tokenisers.WordPieceTokeniser

Norms come after attention and perceptron, over the sum with their input:

    x = LN(x + attention(x))            x = LN(x + mlp(x))

MINILM_L6 is the size of all-MiniLM-L6-v2 (Wang 2020; Reimers & Gurevych 2019): a text encoder of 91 MB for small runs.
"""

from typing import Any

from flax import nnx

from diffjax.core.types import Array
from diffjax.models.text import ACTIVATIONS, check_blocks, check_ids, check_mask
from diffjax.nn import stack
from diffjax.nn.layers import Embedding, Init
from diffjax.nn.norms import LayerNorm
from diffjax.nn.transformer import Mlp, SelfAttention

BERT_BASE = dict(width=768, depth=12, heads=12, hidden=3072)
MINILM_L6 = dict(width=384, depth=6, heads=12, hidden=1536)

EPS = 1e-12  # of all layer norms


class BertBlock(nnx.Module):
    """Attention, then a perceptron, each added to its input, the sum normalised."""

    def __init__(self, width: int, heads: int, hidden: int, activation: str, dtype: Any = None, *, rngs: nnx.Rngs):
        self.attention = SelfAttention(width, heads, dtype=dtype, rngs=rngs)
        self.norm1 = LayerNorm(width, EPS, affine=True, rngs=rngs)
        self.mlp = Mlp(width, hidden, activation=ACTIVATIONS[activation], dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(width, EPS, affine=True, rngs=rngs)

    def __call__(self, x_BLD: Array, mask_B11L: Array | None) -> Array:
        x_BLD = self.norm1(x_BLD + self.attention(x_BLD, mask=mask_B11L).astype(x_BLD.dtype))
        return self.norm2(x_BLD + self.mlp(x_BLD).astype(x_BLD.dtype))


class Bert(nnx.Module):
    """ids (B, L), mask bool (B, L), true where attended to, None = everywhere -> (B, L, width); L up to `length`.

    All tokens are of the first of two sentences, whose row of `kinds` is added to each. An id outside the vocabulary
    gives NaN. Published files have a pooler too, of the first token; it is not here.
    """

    def __init__(
        self, width: int = 768, depth: int = 12, heads: int = 12, hidden: int = 3072, activation: str = "gelu",
        vocabulary: int = 30522, length: int = 512, dtype: Any = None, remat: str = "", *, rngs: nnx.Rngs,
    ):  # fmt: skip
        check_blocks(width, heads, activation, remat)
        self.length, self.remat = length, remat
        make = lambda rngs: BertBlock(width, heads, hidden, activation, dtype, rngs=rngs)  # noqa: E731
        table = lambda rows: nnx.Param(Init("normal").draw(rngs.params(), (rows, width), 1, 1, 0.02))  # noqa: E731
        self.tokens = Embedding(vocabulary, width, rngs=rngs)
        self.positions, self.kinds = table(length), table(2)
        self.norm = LayerNorm(width, EPS, affine=True, rngs=rngs)
        self.blocks = stack.stacked(make, depth, rngs=rngs)

    def __call__(self, ids_BL: Array, mask_BL: Array | None = None) -> Array:
        check_ids(ids_BL, self.length)
        check_mask(mask_BL, ids_BL)
        x = self.tokens(ids_BL)
        same = self.positions[: ids_BL.shape[1]] + self.kinds[:1]
        x = self.norm(x + same.astype(x.dtype)[None])
        mask = None if mask_BL is None else mask_BL[:, None, None, :]
        x, _ = stack.scan(self.blocks, lambda block, x, _: (block(x, mask), None), x, policy=self.remat)
        return x
