"""Images as tokens, patch by patch and row by row, and back.

    x_BLD = PatchEmbedding(2, 4, 1152, rngs=rngs)(x_BHWC)      # (B, 32, 32, 4) -> (B, 256, 1152)
    x_BHWC = unpatchify(y_BLD, 16, 2)                         # (B, 256, 2 * 2 * C) -> (B, 32, 32, C)

Dosovitskiy 2021, section 3.1; Peebles & Xie 2023, section 3.2.
"""

from typing import Any

from flax import nnx

from diffjax.core import sharding
from diffjax.core.types import Array
from diffjax.nn.layers import Init, over_channels, rows_times
from diffjax.nn.transformer import XAVIER


class PatchEmbedding(nnx.Module):
    """(B, H, W, C) -> (B, H/p W/p, width): a p x p convolution of stride p as one product, drawn as a linear layer.

    Raises ValueError for images that are no whole number of patches.
    """

    def __init__(
        self, patch: int, channels: int, width: int, bias: bool = True, init: Init = XAVIER, dtype: Any = None, *,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        self.patch, self.dtype = patch, dtype
        inputs = patch * patch * channels
        self.kernel = nnx.Param(init.draw(rngs.params(), (patch, patch, channels, width), inputs, width, init.weight))
        self.bias = nnx.Param(init.draw(rngs.params(), (width,), inputs, width, init.bias)) if bias else None

    def __call__(self, x_BHWC: Array) -> Array:
        b, h, w, c = x_BHWC.shape
        p = self.patch
        if h % p or w % p:
            raise ValueError(f"found images of {h} x {w}, expected a whole number of patches of {p} x {p}")
        patches = x_BHWC.reshape(b, h // p, p, w // p, p, c).swapaxes(2, 3).reshape(b, -1, p * p * c)
        dtype = x_BHWC.dtype if self.dtype is None else self.dtype
        kernel = sharding.weight(self.kernel[...], dtype).reshape(p * p * c, -1)
        y = rows_times(patches.astype(dtype), kernel)
        return y if self.bias is None else y + over_channels(self.bias[...], y)


def unpatchify(x_BLD: Array, rows: int, patch: int) -> Array:
    """(B, L, p p C), each token's numbers by row, column and channel, -> (B, rows p, L / rows p, C)."""
    b, length, _ = x_BLD.shape
    x = x_BLD.reshape(b, rows, length // rows, patch, patch, -1).swapaxes(2, 3)
    return x.reshape(b, rows * patch, length // rows * patch, -1)
