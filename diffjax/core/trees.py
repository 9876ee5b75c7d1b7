"""Trees of arrays, compared and named by path.

A path is the keys from the root joined by "/": "enc/16x16_block0/conv0/kernel". Merging a Flax graph
with a dict checks no shapes, so every tree that comes from outside (a checkpoint, converted weights)
goes through `check` before it is used.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.types import Array

_SHOWN = 20  # differences in one message; a wrong architecture has thousands


def flatten(tree: Any) -> dict[str, Any]:
    """Path -> leaf, in JAX's order of leaves. Raises ValueError where two leaves would share a path."""
    flat: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = _name(path)
        if name in flat:
            raise ValueError(f"two leaves have the path {name!r}: use keys without '/' that differ as text")
        flat[name] = leaf
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dict of path -> leaf, the inverse of `flatten` for dicts."""
    nested: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return nested


def paths(tree: Any) -> list[str]:
    """Paths of all leaves, in JAX's order of leaves."""
    return list(flatten(tree))


def count(tree: Any) -> int:
    """Number of array elements (parameters); leaves may be abstract."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def compare(expected: Any, found: Any) -> list[str]:
    """Differences in structure, shape and dtype, one readable line each; leaves may be abstract."""
    want, have = flatten(expected), flatten(found)
    lines = [f"missing: {path} {_describe(leaf)}" for path, leaf in want.items() if path not in have]
    lines += [f"extra: {path} {_describe(leaf)}" for path, leaf in have.items() if path not in want]
    for path in want.keys() & have.keys():
        if _describe(want[path]) != _describe(have[path]):
            lines.append(f"different: {path}, expected {_describe(want[path])}, found {_describe(have[path])}")
    return sorted(lines)


def check(expected: Any, found: Any, what: str) -> None:
    """Raise ValueError naming the paths in which `found` differs from `expected` (see `compare`), the first 20.

    `what` begins the message: "the checkpoint runs/demo/checkpoints/200".
    """
    report(compare(expected, found), what)


def report(lines: Sequence[str], what: str) -> None:
    """Raise ValueError with differences found in `what`, the first 20, where there are any."""
    if lines:
        more = f"\n  and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        listing = "\n  ".join(lines[:_SHOWN])
        number = "1 difference" if len(lines) == 1 else f"{len(lines)} differences"
        raise ValueError(f"{what} does not fit, {number}:\n  {listing}{more}")


def lerp(a: Any, b: Any, t: Array | float) -> Any:
    """a + t (b - a), leaf by leaf, in the dtype of `a`."""
    return jax.tree.map(lambda x, y: (x + t * (y - x)).astype(x.dtype), a, b)


def sha256(tree: Any) -> str:
    """Of paths, shapes, dtypes and values of all leaves."""
    digest = hashlib.sha256()
    for path, leaf in flatten(tree).items():
        values = np.ascontiguousarray(leaf)
        digest.update(f"{path} {values.shape} {values.dtype.str}".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def first_nonfinite(tree: Any) -> Array:
    """Index (order of `paths`) of the first leaf that holds a NaN or an infinity, int32; -1 where none does."""
    leaves = jax.tree.leaves(tree)
    if not leaves:
        return jnp.int32(-1)
    bad = jnp.stack([jnp.any(~jnp.isfinite(leaf)) for leaf in leaves])
    return jnp.where(jnp.any(bad), jnp.argmax(bad), -1).astype(jnp.int32)


def _name(path: tuple) -> str:
    return "/".join(str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry)))) for entry in path)


def _describe(leaf: Any) -> str:
    if not hasattr(leaf, "shape"):
        return f"{leaf!r}, which is no array"
    shape = ",".join(map(str, leaf.shape))
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
    return f"{leaf.dtype if is_key else np.dtype(leaf.dtype).name}[{shape}]"
