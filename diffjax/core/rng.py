"""Random keys without a key that travels: named streams folded with the step, and one key per sample.

A run is reproduced by its seed alone: the key of step k is computed from (seed, name, k), never split from the key of
step k - 1, so a resumed run draws what the uninterrupted one would have drawn.
"""

import zlib

import jax
import jax.numpy as jnp

from diffjax.core.types import Array, Key


def stream(seed: int | Array, name: str, step: int | Array = 0) -> Key:
    """The key of stream `name` at `step`; seed and step may be traced, uint32 or int32 scalars."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode())), step)


def sample_keys(seed: int | Array, sample_ids: Array) -> Key:
    """One key for each of `sample_ids` (B,), 0..2^32-1: (B,) typed keys that depend on seed and id alone."""
    base = stream(seed, "sample")
    return jax.vmap(lambda index: jax.random.fold_in(base, index))(jnp.asarray(sample_ids, jnp.uint32))
