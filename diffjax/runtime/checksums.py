"""Checksums that do not depend on how an array is spread over devices and processes.

An array's bits are read as unsigned words w_0, w_1, ..., one to an element in row-major order (two to 64 bits):

    checksum = sum_i (2 i + 1) w_i  mod 2^32

The sum is exact in any order, so every device adds up what it holds. The weights are odd: a change of any one word
changes it. Several changes at once pass unseen by coincidence only, 1 in 2^32.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from diffjax.core.types import Array


def of_arrays(flat: Mapping[str, Array]) -> tuple[dict[str, int], str]:
    """(path -> checksum, path of the first array with a NaN or an infinity or ""), on the devices of the arrays.

    Arrays are real or integer, of any sharding; each is read once, and nothing of its size is made. Where several
    processes hold them, all must call this.
    """
    # an array at a time, since one program for thousands of them takes minutes to compile; all are under way together
    found = jax.device_get({path: _compiled(_everywhere(array))(array) for path, array in flat.items()})
    bad = [path for path, (_, nonfinite) in found.items() if nonfinite]
    return {path: int(total) for path, (total, _) in found.items()}, bad[0] if bad else ""


def of_text(content: Any) -> str:
    """SHA-256 of JSON content, whatever the order of its keys and its white space."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def summary(array: Array) -> tuple[Array, Array]:
    """(checksum, 1 where an element is not finite else 0), uint32 scalars, in one pass."""
    words = _words(array)
    bad = jnp.zeros(words.shape, jnp.uint32)
    if jnp.issubdtype(array.dtype, jnp.inexact):
        bad = (~jnp.isfinite(array)).astype(jnp.uint32).reshape(array.shape + (1,) * (words.ndim - array.ndim)) | bad
    index, stride = jnp.zeros(words.shape, jnp.uint32), 1
    # the index along each axis instead of one arange: every device makes the weights of its own part
    for axis in reversed(range(words.ndim)):
        index = index + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    zero = jnp.uint32(0)
    # one reduction with two results: two reductions would keep the weighted words between them, a second array
    terms = (words * (2 * index + 1), bad)
    return jax.lax.reduce(terms, (zero, zero), lambda a, b: (a[0] + b[0], a[1] | b[1]), tuple(range(words.ndim)))


def _words(array: Array) -> Array:
    if array.dtype == bool:
        return array.astype(jnp.uint32)
    bits = min(8 * array.dtype.itemsize, 32)
    return jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)


def _everywhere(array: Array) -> NamedSharding | None:
    """Where the results of an array go: on every device of its mesh, so that every process can read them."""
    sharding = getattr(array, "sharding", None)
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None


@functools.cache
def _compiled(results: NamedSharding | None) -> Any:
    return jax.jit(summary, out_shardings=results)
