"""VideoMAE's encoder, a feature space of FVD. Tong 2022; version 2: Wang 2023; for FVD: Ge 2024, section 4.

    network, init = functionalize(lambda rngs: VideoMAE(**VIDEOMAE_V2_G, rngs=rngs))
    tokens, pooled = network(params, x)                    # x (B, 16, 224, 224, 3); pooled (B, 1408)

A vision transformer on tubelets, patches of two frames, with fixed sines and cosines as positions; nothing is masked.
Ge's tool `cd-fvd` gives VIDEOMAE_V2_G pixels in [0, 1], not normalised; transformers' processor, for its own files,
normalises them by the mean and deviation of ImageNet, as `dinov2.normalise`.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from diffjax.core import names, sinusoids
from diffjax.core.types import Array
from diffjax.models.text import ClipBlock, check_blocks, run_blocks
from diffjax.nn import stack
from diffjax.nn.layers import over_channels, rows_times
from diffjax.nn.norms import LayerNorm
from diffjax.nn.transformer import XAVIER

VIDEOMAE_B = dict(width=768, depth=12, heads=12)
VIDEOMAE_V2_G = dict(width=1408, depth=40, heads=16, hidden=6144, patch=14, eps=1e-6, pooled_eps=1e-6)

POOLING = ("normed_mean", "mean_normed")


class VideoMAEStates(NamedTuple):
    """tokens (B, tubelets, width): by time, then row by row, after all blocks, with "mean_normed" after the layer norm;
    pooled (B, width)."""

    tokens: Array
    pooled: Array


class Tubelets(nnx.Module):
    """(B, T, H, W, 3) -> (B, T/t H/p W/p, width): a t x p x p convolution of the same strides as one product."""

    def __init__(self, frames: int, patch: int, width: int, dtype: Any = None, *, rngs: nnx.Rngs):
        self.dtype = dtype
        shape, inputs = (frames, patch, patch, 3, width), frames * patch * patch * 3
        self.kernel = nnx.Param(XAVIER.draw(rngs.params(), shape, inputs, width, XAVIER.weight))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x_BTHWC: Array) -> Array:
        b, t, h, w, c = x_BTHWC.shape
        f, p, _, _, width = self.kernel.shape
        x = x_BTHWC.reshape(b, t // f, f, h // p, p, w // p, p, c).transpose(0, 1, 3, 5, 2, 4, 6, 7)
        dtype = x.dtype if self.dtype is None else self.dtype
        y = rows_times(x.reshape(b, -1, f * p * p * c).astype(dtype), self.kernel[...].reshape(-1, width).astype(dtype))
        return y + over_channels(self.bias[...], y)


class VideoMAE(nnx.Module):
    """Clips (B, frames, S, S, 3) -> VideoMAEStates. hidden: width inside the perceptrons, 0 = 4 width; tubelet: frames
    of one; pooling: "normed_mean", the mean of tokens and then a layer norm, of networks that were tuned to classify;
    "mean_normed", the mean of tokens after the layer norm, of those that were not; eps, pooled_eps: of the blocks'
    layer norms, and of the last. Raises ValueError for clips of another size.
    """

    def __init__(
        self, width: int = 768, depth: int = 12, heads: int = 12, hidden: int = 0, patch: int = 16, tubelet: int = 2,
        frames: int = 16, image_size: int = 224, pooling: str = "normed_mean", eps: float = 1e-12,
        pooled_eps: float = 1e-5, dtype: Any = None, remat: str = "", *, rngs: nnx.Rngs,
    ):  # fmt: skip
        check_blocks(width, heads, "gelu", remat)
        names.lookup(dict.fromkeys(POOLING), pooling, "pooling")
        if image_size % patch or frames % tubelet:
            raise ValueError(
                f"found {frames} frames of {image_size} with tubelets of {tubelet} and {patch}, expected multiples"
            )
        self.depth, self.remat, self.pooling = depth, remat, pooling
        self.shape = (frames, image_size, image_size, 3)
        make = lambda rngs: ClipBlock(width, heads, hidden or 4 * width, "gelu", dtype, eps, rngs=rngs)  # noqa: E731
        self.patches = Tubelets(tubelet, patch, width, dtype, rngs=rngs)
        self.blocks = stack.stacked(make, depth, rngs=rngs)
        self.norm = LayerNorm(width, pooled_eps, affine=True, rngs=rngs)

    def __call__(self, x_BTHWC: Array) -> VideoMAEStates:
        if x_BTHWC.ndim != 5 or x_BTHWC.shape[1:] != self.shape:
            expected = ", ".join(map(str, self.shape))
            raise ValueError(f"found clips of shape {x_BTHWC.shape}, expected (B, {expected}): cut and resize them")
        tokens = self.patches(x_BTHWC).astype(x_BTHWC.dtype)
        places = sinusoids.interleaved(*tokens.shape[1:])
        tokens = tokens + jnp.asarray(places, tokens.dtype)[None]
        tokens, _ = run_blocks(self.blocks, tokens, self.depth, 0, causal=False, policy=self.remat)
        if self.pooling == "normed_mean":
            return VideoMAEStates(tokens, self.norm(jnp.mean(tokens, axis=1)))
        tokens = self.norm(tokens)
        return VideoMAEStates(tokens, jnp.mean(tokens, axis=1))
