"""The moving average of the weights, with a half-life counted in images.

    beta = 0.5^(batch_size / halflife),  halflife = min(halflife_images, rampup_ratio * images_seen)

Karras 2022, appendix F.2: the ramp-up keeps the average from remembering its start.
"""

from collections.abc import Callable

import jax.numpy as jnp

from diffjax.core import trees
from diffjax.core.types import Array, Params


def make_decay(batch_size: int, halflife_images: int, rampup_ratio: float = 0.05) -> Callable[[Array], Array] | None:
    """iteration (before the update, from 0) -> beta, float32 scalar; None where halflife_images is 0 (no average)."""
    if halflife_images < 0 or rampup_ratio <= 0:
        raise ValueError(
            f"halflife_images must be at least 0 and rampup_ratio positive, found {halflife_images}, {rampup_ratio}"
        )
    if halflife_images == 0:
        return None

    def decay(iteration: Array) -> Array:
        images = jnp.asarray(iteration, jnp.float32) * batch_size
        halflife = jnp.minimum(jnp.float32(halflife_images), images * rampup_ratio)
        return 0.5 ** (batch_size / jnp.maximum(halflife, 1e-8))

    return decay


def update(ema_params: Params, params: Params, decay: Array) -> Params:
    """beta ema + (1 - beta) params."""
    return trees.lerp(params, ema_params, decay)
