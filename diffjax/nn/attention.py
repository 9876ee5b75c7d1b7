"""Dot-product attention with float32 softmax; long sequences in blocks of queries, fused kernels where they exist."""

import contextlib
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from diffjax.core import sharding
from diffjax.core.types import Array
from diffjax.nn import stack

# numbers of the matrix of scores that a device holds at once: 256 MiB of float32; on CPUs 8 MiB, where new pages cost
# more than the arithmetic: 1024 tokens and 8 heads of 40 take half the time
MAX_SCORES, MAX_SCORES_CPU = 2**26, 2**21


def attend(
    q_BLNC: Array, k_BSNC: Array, v_BSNC: Array, bias: Array | None = None, mask: Array | None = None,
    causal: bool = False,
) -> Array:  # fmt: skip
    """softmax(q k^T / sqrt(C) + bias) v for each of N heads: (B, L, N, C) back. Vaswani 2017, eq. 1.

    bias float, mask bool (False = not attended to), both broadcast to (B, N, L, S); causal: query i sees keys 0..i.
    On GPUs cuDNN's fused kernel runs where it takes the type and size (half precision, head sizes that are multiples of
    8 up to 128, neither bias nor mask). Elsewhere scores are held for a block of queries at a time, see MAX_SCORES,
    and computed again for a gradient where there are several blocks. Of a mesh that is set (`jax.set_mesh`) each device
    is taken to hold an equal part.
    """
    if _fused(q_BLNC) and bias is None and mask is None:
        return jax.nn.dot_product_attention(q_BLNC, k_BSNC, v_BSNC, is_causal=causal, implementation="cudnn")
    if causal:
        order = jnp.tril(jnp.ones((1, 1, q_BLNC.shape[1], k_BSNC.shape[1]), bool))
        mask = order if mask is None else mask & order
    # one block where the compiler's count of FLOPs is wanted, which takes a loop's body once
    blocks = 1 if causal or stack.unrolling() else _num_blocks(q_BLNC.shape, k_BSNC.shape[1])
    if blocks == 1:
        return _attend(q_BLNC, k_BSNC, v_BSNC, bias, mask)
    length = q_BLNC.shape[1]
    size = math.ceil(length / blocks)

    def rows(tree: Array | None) -> Array | None:
        """A bias or mask with an axis of queries that can be cut."""
        return None if tree is None else jnp.broadcast_to(tree, (*tree.shape[:2], length, tree.shape[3]))

    def cut(x: Array | None, axis: int) -> Array | None:
        if x is None:
            return None
        x = jnp.pad(x, [(0, blocks * size - length if i == axis else 0) for i in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:axis], blocks, size, *x.shape[axis + 1 :]), axis, 0)

    block = jax.checkpoint(lambda part: _attend(part[0], k_BSNC, v_BSNC, part[1], part[2]))
    out = jnp.moveaxis(jax.lax.map(block, (cut(q_BLNC, 1), cut(rows(bias), 2), cut(rows(mask), 2))), 0, 1)
    return out.reshape(q_BLNC.shape[0], blocks * size, *q_BLNC.shape[2:])[:, :length]


def _attend(q_BLNC: Array, k_BSNC: Array, v_BSNC: Array, bias: Array | None, mask: Array | None) -> Array:
    """All scores at once. Heads go before tokens and the sum divides the output, not the weights: on a CPU a third of
    the time of `jax.nn.dot_product_attention`."""
    placed = sharding.split_heads_or_queries(q_BLNC, k_BSNC, v_BSNC)
    q_BNLC, k_BNSC, v_BNSC = (jnp.swapaxes(x, 1, 2) for x in placed)
    wide = jnp.promote_types(q_BLNC.dtype, jnp.float32)
    scores = jnp.matmul(q_BNLC, k_BNSC.mT, preferred_element_type=wide) / math.sqrt(q_BLNC.shape[-1])
    if bias is not None:
        scores = scores + bias.astype(wide)
    if mask is not None:
        # finite: a query that may attend to nothing gets the mean of all values, not NaN
        scores = jnp.where(mask, scores, 0.7 * jnp.finfo(wide).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    out = jnp.matmul(weights.astype(v_BSNC.dtype), v_BNSC, preferred_element_type=wide)
    out = out / jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.swapaxes(out, 1, 2).astype(q_BLNC.dtype)


def _fused(q_BLNC: Array) -> bool:
    size = q_BLNC.shape[-1]
    half = q_BLNC.dtype in (jnp.bfloat16, jnp.float16)
    return _platform() == "gpu" and half and size % 8 == 0 and size <= 128


def _num_blocks(shape: tuple[int, ...], keys: int) -> int:
    """Into how many the queries are cut, so that a block's scores pass under the limit: equal blocks, unless that takes
    more than twice as many as a shorter last one would (257 tokens have no divisors)."""
    batch, length, heads, _ = shape
    limit = MAX_SCORES_CPU if _platform() == "cpu" else MAX_SCORES
    devices = max(jax.sharding.get_abstract_mesh().size, 1)
    least = min(max(math.ceil(batch * heads * length * keys / (limit * devices)), 1), length)
    equal = next(n for n in range(least, length + 1) if length % n == 0)
    return equal if equal <= 2 * least else math.ceil(length / math.ceil(length / least))


@contextlib.contextmanager
def traced_for(platform: str) -> Iterator[None]:
    """What is traced inside is for devices of this platform, which may be another than this machine's: programs are
    compiled for them elsewhere. JAX remembers the traces of a function: give it one that was not traced before."""
    global _target
    before, _target = _target, platform
    try:
        yield
    finally:
        _target = before


def _platform() -> str:
    return _target or jax.default_backend()


_target = ""
