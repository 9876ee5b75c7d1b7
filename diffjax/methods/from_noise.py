"""What methods share that follow a teacher from noise, without data: draws, metrics, checks of their settings."""

from typing import Protocol

import jax
import jax.numpy as jnp

from diffjax.core.types import Array, Batch, Key, Metrics


# conditions that come with a batch of prompts, see build.encoded
_TOLD = ("text", "text_mask", "text_length", "pooled", "control")
TEXT = tuple(prefix + name for prefix in ("", "negative_") for name in _TOLD)


class FromNoise(Protocol):
    """The settings used here, of SFD, AMED and EMD."""

    batch_size: int
    image_shape: tuple[int, ...]
    num_classes: int


class Updates(Protocol):
    """The part of an iteration's trace used here: n steps, u updates."""

    loss: Array  # (n,)
    grad_norm: Array  # (u,)
    nonfinite_leaf: Array  # (u,) int32, -1 = none


def draw(settings: FromNoise, key: Key, batch: Batch | None = None) -> tuple[Array, dict[str, Array]]:
    """Unit noise (B, *image_shape) and cond: {"label": int32 (B,)} uniform over the classes, without classes what the
    batch has of a text, {} where it has none.

    Noise and label of sample i depend on `key` and i only, whatever the batch size and the number of devices.
    """
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(settings.batch_size))
    noise_keys, label_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    noise = jax.vmap(lambda k: jax.random.normal(k, settings.image_shape))(noise_keys)
    if not settings.num_classes:
        return noise, {name: batch[name] for name in TEXT if name in (batch or {})}
    label = jax.vmap(lambda k: jax.random.randint(k, (), 0, settings.num_classes, jnp.int32))(label_keys)
    return noise, {"label": label}


def metrics(trace: Updates, rate: Array, unused: Array | int = 0) -> Metrics:
    """Means of one iteration, and the first parameter of its earliest bad update; see `Method`. unused: steps at the
    end of the trace that were not made, zeros there."""
    bad = trace.nonfinite_leaf >= 0
    first = trace.nonfinite_leaf[jnp.argmax(bad)]  # the earliest bad update; index 0, hence -1, where none is
    mean = lambda values: jnp.sum(values) / (len(values) - unused)  # noqa: E731
    values = {"loss": mean(trace.loss), "grad_norm": mean(trace.grad_norm), "learning_rate": rate}
    return {name: jnp.asarray(value, jnp.float32) for name, value in values.items()} | {"nonfinite_leaf": first}


def by_level(trace: Updates) -> Metrics:
    """loss_t<k>, the loss at each step k."""
    return {f"loss_t{k}": jnp.asarray(loss, jnp.float32) for k, loss in enumerate(trace.loss)}


def check(settings: FromNoise, teacher_factor: int = 1) -> None:
    """Raises ValueError for settings that cannot work; `teacher_factor`: teacher steps per student step."""
    if teacher_factor < 1:
        raise ValueError(
            f"teacher_factor is the number of teacher steps per student step, at least 1, found {teacher_factor}"
        )
    if settings.batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, found {settings.batch_size}")
    if not settings.image_shape or min(settings.image_shape) < 1:
        raise ValueError(f"image_shape is the shape of one sample, e.g. (32, 32, 3), found {settings.image_shape}")
    if settings.num_classes < 0:
        raise ValueError(f"num_classes must be 0 (no labels) or positive, found {settings.num_classes}")
