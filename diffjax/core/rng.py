"""Random keys without a key that travels: named streams folded with the step, and one key per sample.

A run is reproduced by its seed alone: the key of step k is computed from (seed, name, k), never split from the key of
step k - 1, so a resumed run draws what the uninterrupted one would have drawn.
"""

import zlib

import jax
import jax.numpy as jnp

from diffjax.core.types import Array, Key


def stream(seed: int | Array, name: str, step: int | Array = 0) -> Key:
    """The key of stream `name` at `step`; seed and step may be traced, uint32 or int32 scalars.

    Raises ValueError for a Python integer outside 0..2^32-1, which would silently be another seed.
    """
    key = jax.random.fold_in(jax.random.key(_uint32(seed, "seed")), zlib.crc32(name.encode()))
    return jax.random.fold_in(key, _uint32(step, "step"))


def sample_keys(seed: int | Array, sample_ids: Array) -> Key:
    """One key for each of `sample_ids` (B,), 0..2^32-1: (B,) typed keys that depend on seed and id alone."""
    base = stream(seed, "sample")
    return jax.vmap(lambda index: jax.random.fold_in(base, index))(jnp.asarray(sample_ids, jnp.uint32))


def _uint32(value: int | Array, what: str) -> Array:
    if isinstance(value, int) and not 0 <= value < 2**32:
        raise ValueError(f"{what} must be in 0..2^32-1, found {value}")
    return jnp.asarray(value, jnp.uint32)
