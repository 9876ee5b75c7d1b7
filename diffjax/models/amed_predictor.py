"""AMED's predictor (Zhou et al., CVPR 2024, AMED): where in a step the second network call should be.

About nine thousand parameters on top of a frozen diffusion network. Features of that network, the channel mean of its
bottleneck at 8x8 (so 64 numbers), are narrowed to 4 and joined with embeddings of the step's two noise levels:

    e(t) = SiLU(W [sin, cos](t))                      8 numbers, W shared by both levels                   (1)
    u = V [MLP(features), e(t), e(t')]                64 -> 128 -> SiLU -> 4, and 4 + 8 + 8 -> 3           (2)

`sampling.amed_sampler.bound` turns u into the place of the middle level and two factors. The released predictor has
one layer for each factor in use; here all three are rows of V, and a row whose scale is 0 is not used.

    predictor = AmedPredictor(64, rngs=nnx.Rngs(0))
    u = predictor(features_BD, sigma, sigma_next)
"""

import jax
import jax.numpy as jnp
from flax import nnx

from diffjax.core.types import Array
from diffjax.nn.embeddings import positional, swap_halves
from diffjax.nn.layers import Init, Linear


class AmedPredictor(nnx.Module):
    """features (B, inputs), sigma and sigma_next scalars -> (B, 3), in the type of the features.

    The levels go into (1) as they are, without a logarithm, as released. Raises ValueError for features of another
    shape.
    """

    def __init__(
        self, inputs: int = 64, hidden: int = 128, outputs: int = 4, noise_channels: int = 8, *, rngs: nnx.Rngs
    ):
        self.inputs, self.noise_channels = inputs, noise_channels
        self.map_noise = Linear(noise_channels, noise_channels, init=Init("xavier_uniform"), rngs=rngs)
        self.narrow_in = Linear(inputs, hidden, rngs=rngs)
        self.narrow_out = Linear(hidden, outputs, rngs=rngs)
        self.head = Linear(2 * noise_channels + outputs, 3, rngs=rngs)

    def __call__(self, features: Array, sigma: Array, sigma_next: Array) -> Array:
        if features.ndim != 2 or features.shape[1] != self.inputs:
            raise ValueError(
                f"expected features of shape (B, {self.inputs}), found {features.shape}: set inputs to the height "
                "times the width of the bottleneck"
            )
        narrow = self.narrow_out(jax.nn.silu(self.narrow_in(features)))
        levels = [self._embed(sigma, features), self._embed(sigma_next, features)]
        return self.head(jnp.concatenate([narrow, *levels], axis=1))

    def _embed(self, sigma: Array, features: Array) -> Array:
        """Equation (1), the same for the whole batch: (B, noise_channels)."""
        level = jnp.reshape(jnp.asarray(sigma, features.dtype), (1,))
        embedding = swap_halves(positional(level, self.noise_channels, endpoint=True))
        embedding = jax.nn.silu(self.map_noise(embedding))
        return jnp.broadcast_to(embedding, (features.shape[0], self.noise_channels))
