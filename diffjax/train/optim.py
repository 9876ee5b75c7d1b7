"""Optimisers and learning rates from the plain values of a config.

The two are apart: an optimiser here is an optax transformation without a learning rate, and the rate
is a function of the iteration, so that a method may make several updates in one iteration.
"""

from collections.abc import Callable

import jax.numpy as jnp
import optax

from diffjax.core import names
from diffjax.core.types import Array

OPTIMIZERS = ("adam", "adamw", "radam", "sgd")
SCHEDULES = ("constant", "cosine", "linear", "half_drop")


def make_optimizer(
    name: str = "adam",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    clip_norm: float = 0.0,
) -> optax.GradientTransformation:
    """"adam", "adamw" (decoupled decay, Loshchilov & Hutter 2019), "radam" (Liu 2020) or "sgd" (momentum), after clipping the
    global gradient norm to `clip_norm` (0 = off). Its updates are to be subtracted after multiplication with the
    learning rate. Raises ValueError for an unknown name, a negative clip_norm, or a decay that would have no effect.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}; {names.nearest(name, OPTIMIZERS)}")
    if clip_norm < 0:
        raise ValueError(f"clip_norm must be positive, or 0 for no clipping, found {clip_norm}")
    if weight_decay and name != "adamw":
        raise ValueError(f"weight_decay={weight_decay} needs optim.name='adamw', found {name!r}")
    parts = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    if name == "sgd":
        parts.append(optax.trace(momentum))
    else:
        parts.append((optax.scale_by_radam if name == "radam" else optax.scale_by_adam)(b1, b2, eps))
    if name == "adamw":
        parts.append(optax.add_decayed_weights(weight_decay))
    return optax.chain(*parts)


def make_learning_rate(
    learning_rate: float,
    batch_size: int,
    total_images: int,
    schedule: str = "constant",
    warmup_images: int = 0,
) -> Callable[[Array], Array]:
    """iteration (from 0) -> rate, JAX's default float: linear warm-up from 0 over `warmup_images` (0 = off) times "constant",
    "cosine" or "linear" to zero at `total_images`, or "half_drop", a tenth from iteration j with (j-1) batch_size >=
    total_images / 2 on (Zhou 2024, as released). Raises ValueError for an unknown schedule or values out of range.
    """
    if not (learning_rate > 0 and batch_size > 0 and total_images > 0 and warmup_images >= 0):
        raise ValueError(
            "learning_rate, batch_size and total_images must be positive and warmup_images not negative, found "
            f"{learning_rate}, {batch_size}, {total_images}, {warmup_images}"
        )
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; {names.nearest(schedule, SCHEDULES)}")
    # the published SFD loop tests before it counts: one iteration after half of the images
    drop_at = 1 + -(-total_images // (2 * batch_size))

    def rate(iteration: Array) -> Array:
        images = jnp.asarray(iteration, float) * batch_size
        factor = jnp.minimum(images / warmup_images, 1.0) if warmup_images else jnp.ones((), float)
        if schedule == "cosine":
            factor = factor * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(images / total_images, 1.0)))
        if schedule == "linear":
            factor = factor * (1 - jnp.minimum(images / total_images, 1.0))
        if schedule == "half_drop":
            factor = factor * jnp.where(iteration >= drop_at, 0.1, 1.0)
        return learning_rate * factor

    return rate
