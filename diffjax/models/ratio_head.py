"""A logit on features of a frozen network: the density ratio of `methods.density_ratio`.

    head = RatioHead(192, rngs=nnx.Rngs(0))
    logit_B = head(features_BD)
"""

import jax
from flax import nnx

from diffjax.core.types import Array
from diffjax.nn.layers import Init, Linear


class RatioHead(nnx.Module):
    """features (B, inputs) -> (B,): two layers, the second from zero weights, so that every ratio starts at 1."""

    def __init__(self, inputs: int, hidden: int = 128, *, rngs: nnx.Rngs):
        self.narrow = Linear(inputs, hidden, rngs=rngs)
        self.out = Linear(hidden, 1, init=Init(weight=0.0), rngs=rngs)

    def __call__(self, features: Array) -> Array:
        return self.out(jax.nn.silu(self.narrow(features)))[:, 0]
