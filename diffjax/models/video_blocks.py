"""What networks of video share: residual blocks over frames, and transformer blocks in groups.

    block = TemporalResBlock(320, 1e-6, embedding=1280, rngs=rngs)
    x = block(x_BTHWC, embedding_BE, run)              # blended with x (Blattmann 2023, eq. 2)
    x = transform(transformer_block, x_BLD, cross_attention(transformer_block, context_BSD), run)

What follows each other along an axis is written as a group and run by a Runner, see `nn.groups`. Statistics of a
normalisation over frames are those of all places, whatever the slices.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from diffjax.core import sharding
from diffjax.core.types import Array
from diffjax.models.unet_blocks import GROUPS, INIT, ZERO, TransformerBlock
from diffjax.nn.attention import attend
from diffjax.nn.groups import ROWS, TOKENS, Runner
from diffjax.nn.layers import Init, Linear, over_channels
from diffjax.nn.norms import GroupNorm
from diffjax.nn.transformer import merge_heads

# features that a network gives to be used again in later steps of sampling, see `video.rehash`
ANCHORS = "literal", "temporal", "deepcache"


def frames_of(x_BTHWC: Array) -> Array:
    """(B, T, H, W, C) -> (B T, H, W, C)."""
    return x_BTHWC.reshape(-1, *x_BTHWC.shape[2:])


def videos_of(x: Array, frames: int) -> Array:
    """(B T, H, W, C) -> (B, T, H, W, C)."""
    return x.reshape(-1, frames, *x.shape[1:])


def of_frames(values: Array, video_F: Array | None) -> Array:
    """Those of the video each frame is of: (B, ...), int (F,) -> (F, ...). None: as they are."""
    return values if video_F is None else values.at[video_F].get(mode="promise_in_bounds")


class TemporalConv(nnx.Module):
    """Convolution over three frames at each place, zeros before the first and after the last:
    (B, T, H, W, in) -> (B, T, H, W, out). Kernels are (3, in, out)."""

    def __init__(self, inputs: int, outputs: int, init: Init = INIT, dtype: Any = None, *, rngs: nnx.Rngs):
        self.dtype, fans = dtype, (3 * inputs, 3 * outputs)
        self.kernel = nnx.Param(init.draw(rngs.params(), (3, inputs, outputs), *fans, init.weight))
        self.bias = nnx.Param(init.draw(rngs.params(), (outputs,), *fans, init.bias))

    def __call__(self, x_BTHWC: Array) -> Array:
        dtype = x_BTHWC.dtype if self.dtype is None else self.dtype
        b, t, h, w, _ = x_BTHWC.shape
        y_BTPC = jax.lax.conv_general_dilated(  # frames are the rows of a picture, places its columns
            x_BTHWC.reshape(b, t, h * w, -1).astype(dtype), sharding.weight(self.kernel[...], dtype)[:, None], (1, 1),
            [(1, 1), (0, 0)], dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        y_BTPC = y_BTPC + over_channels(self.bias[...], y_BTPC)
        return y_BTPC.reshape(b, t, h, w, -1)


class TemporalResBlock(nnx.Module):
    """Two convolutions over frames, each behind a norm over frames and places, added to x with a learned share.

    share = 1 - sigmoid(mix_factor) or, swapped, sigmoid(mix_factor). Without `embedding` nothing is added between the
    two. Blattmann 2023, section 3.1; released code for the swap, which its decoder has.
    """

    def __init__(
        self, width: int, eps: float, embedding: int = 0, swapped: bool = False, dtype: Any = None, *, rngs: nnx.Rngs
    ):
        self.swapped = swapped
        self.norm1, self.norm2 = (GroupNorm(width, eps, GROUPS, rngs=rngs) for _ in range(2))
        self.conv1 = TemporalConv(width, width, dtype=dtype, rngs=rngs)
        self.shift = Linear(embedding, width, init=INIT, rngs=rngs) if embedding else None
        self.conv2 = TemporalConv(width, width, ZERO, dtype, rngs=rngs)
        self.mix_factor = nnx.Param(jnp.full(1, 0.0 if swapped else 0.5))

    def __call__(self, x_BTHWC: Array, embedding_BE: Array | None, run: Runner) -> Array:
        """embedding: after its SiLU, the same for all frames."""
        shift = 0.0 if self.shift is None else self.shift(embedding_BE)[:, None, None, None, :]
        of_x = run.moments("conv1", ROWS, self.norm1, x_BTHWC)

        def conv1(x: Array) -> Array:
            h = self.conv1(jax.nn.silu(self.norm1(x, of_x)))
            return (h + shift).astype(h.dtype)

        h_BTHWC = run("conv1", ROWS, {"conv1": conv1}, x_BTHWC)
        of_h = run.moments("conv2", ROWS, self.norm2, h_BTHWC)
        share = share_of_time(self.mix_factor[...], self.swapped)
        operators = {
            "conv2": lambda h, x: self.conv2(jax.nn.silu(self.norm2(h, of_h))),
            "blend": lambda h, x: (x + share * h).astype(x.dtype),
        }
        return run("conv2", ROWS, operators, h_BTHWC, x_BTHWC)


def share_of_time(mix_factor: Array, swapped: bool = False) -> Array:
    """What of a blend comes from the layer over frames, float32 (). Blattmann 2023, section 3.1; released code."""
    return jax.nn.sigmoid(mix_factor.astype(jnp.float32) * (1 if swapped else -1))[0]


def transform(block: TransformerBlock, x_BLD: Array, cross: Callable[[Array], Array], run: Runner) -> Array:
    """x after the block, its queries and its MLP as one group of tokens "tokens"; keys and values are whole.

    cross(x): x with what cross-attention adds to it, see `cross_attention`.
    """
    q, k, v = block.self_attention.project(block.norm1(x_BLD))
    operators = {
        "self_attention": lambda x, q: x + block.self_attention.out(merge_heads(attend(q, k, v))),
        "cross_attention": lambda x, q: cross(x),
        "mlp": lambda x, q: x + block.mlp(block.norm3(x)),
    }
    return run("tokens", TOKENS, operators, x_BLD, q)


def cross_attention(block: TransformerBlock, context_BSD: Array) -> Callable[..., Array]:
    """f(x, video_F) = x with what the block's cross-attention to the contexts of these videos adds; None: one of each.

    The weight of a single token is 1 whatever the query: it adds W_o W_v c + b_o, and no query is computed.
    """
    attention = block.cross_attention
    if context_BSD.shape[1] > 1:
        k, v = attention.keys_values(context_BSD)
        return lambda x, video_F=None: x + attention.look(block.norm2(x), of_frames(k, video_F), of_frames(v, video_F))
    _, value = jnp.split(attention.kv(context_BSD), 2, axis=-1)
    update_B1D = attention.out(value)
    return lambda x, video_F=None: x + of_frames(update_B1D, video_F)
