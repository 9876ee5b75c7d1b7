"""The moving average of the weights, with a half-life counted in images.

    beta = 0.5^(batch_size / halflife),  halflife = min(halflife_images, rampup_ratio * images_seen)

Karras 2022, appendix F: the ramp-up keeps the average from remembering its start.
"""

from collections.abc import Callable

import jax.numpy as jnp

from diffjax.core import trees
from diffjax.core.types import Array, Params


def make_decay(
    batch_size: int, halflife_images: int, rampup_ratio: float | None = 0.05
) -> Callable[[Array], Array] | None:
    """iteration (before the update, from 0) -> beta, float32 scalar; None where halflife_images is 0 (no average).

    rampup_ratio None is no ramp-up. With one, beta is 0 at iteration 0. Raises ValueError for values out of range.
    """
    if batch_size < 1 or halflife_images < 0 or (rampup_ratio is not None and rampup_ratio <= 0):
        raise ValueError(
            "batch_size must be positive, halflife_images at least 0 and rampup_ratio positive or None, "
            f"found {batch_size}, {halflife_images}, {rampup_ratio}"
        )
    if halflife_images == 0:
        return None

    def decay(iteration: Array) -> Array:
        halflife = jnp.float32(halflife_images)
        if rampup_ratio is not None:
            images = jnp.asarray(iteration, jnp.float32) * batch_size
            halflife = jnp.minimum(halflife, images * rampup_ratio)
        return 0.5 ** (batch_size / jnp.maximum(halflife, 1e-8))

    return decay


def update(ema_params: Params, params: Params, decay: Array) -> Params:
    """beta ema + (1 - beta) params, leaf by leaf; exactly params where beta is 0."""
    return trees.lerp(params, ema_params, decay)
