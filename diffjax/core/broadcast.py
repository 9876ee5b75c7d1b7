"""Per-sample numbers and batches."""

import jax.numpy as jnp

from diffjax.core.types import Array


def per_sample(values: Array, x: Array) -> Array:
    """`values`, scalar or (B,), in a shape that combines with `x` (B, ...): () or (B, 1, ..., 1). Same dtype.

    Raises ValueError for any other shape.
    """
    values = jnp.asarray(values)
    if values.ndim == 0:
        return values
    if values.shape != x.shape[:1]:
        raise ValueError(f"expected one number or one per sample, shape {x.shape[:1]}, found {values.shape}")
    return values.reshape(-1, *(1,) * (x.ndim - 1))


def squared_norm(x: Array) -> Array:
    """Squared L2 norm of each sample of `x` (B, ...): (B,)."""
    return jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim)))
