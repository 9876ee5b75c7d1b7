"""Gradients of a batch in equal parts, added up in a fixed order: the same bits on one device and on many.

A sum over devices is added up in an order that depends on their number, and a product's rounding on how many samples a
device has at a time. Here a part is a program of its own, whoever computes it, and the parts' gradients meet in the order
of the batch. Also what fits a large batch into little memory: a device computes its parts one after the other.

    with microbatches.of(8):                                      # while a step is traced
        (value, rows), grads = microbatches.value_and_grad(objective, params, fixed, batch, key)
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from diffjax.core import sharding
from diffjax.core.types import Array, Params

Objective = Callable[[Params, Any, Any, Any], tuple[Array, Any]]


@contextlib.contextmanager
def of(parts: int) -> Iterator[None]:
    """What is traced inside takes its gradients in this many parts; 0: the batch at once."""
    global _parts
    before, _parts = _parts, parts
    try:
        yield
    finally:
        _parts = before


def value_and_grad(
    objective: Objective, params: Params, fixed: Any, batch: Any, key: Any = None
) -> tuple[tuple[Array, Any], Params]:
    """((value, rows), gradient by `params`) of objective(params, fixed, batch, key) -> (mean over its samples, rows).

    batch and rows: trees of arrays (B, ...). fixed: what all samples share. key: a tree of keys, or None; each part draws
    from keys of its own. Raises ValueError for a batch that has not as many equal parts, or parts that the devices do not
    share equally.
    """
    differentiate = jax.value_and_grad(objective, has_aux=True)
    if not _parts:
        return differentiate(params, fixed, batch, key)
    cut = jax.tree.map(lambda rows: rows.reshape(_parts, _length(rows) // _parts, *rows.shape[1:]), batch)

    def one(params: Params, fixed: Any, part: tuple[Array, Any]) -> tuple[tuple[Array, Any], Params]:
        index, rows = part
        own = jax.tree.map(lambda each: jax.random.fold_in(each, index), key)
        # no arithmetic is fused across: what surrounds a part may depend on how many there are
        given = jax.lax.optimization_barrier((params, fixed, rows))
        return jax.lax.optimization_barrier(differentiate(*given, own))

    def in_turn(params: Params, fixed: Any, parts: tuple[Array, Any]) -> tuple[tuple[Array, Any], Params]:
        return jax.lax.map(lambda part: one(params, fixed, part), parts)

    (values, rows), grads = _over_devices(in_turn)(params, fixed, (jnp.arange(_parts), cut))
    rows = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), rows)
    value, grads = sharding.everywhere(_mean((values, grads)))  # so that a norm is the same on any mesh
    return (value, rows), grads


def _length(rows: Array) -> int:
    if rows.shape[0] % _parts:
        raise ValueError(f"found a batch of {rows.shape[0]}, expected {_parts} equal parts: see train.microbatches")
    return rows.shape[0]


def _over_devices(in_turn: Callable) -> Callable:
    mesh = jax.sharding.get_abstract_mesh().shape
    axes = tuple(axis for axis in sharding.BATCH if axis in mesh)
    devices = math.prod(mesh[axis] for axis in axes)
    if devices > 1 and _parts % (2 * devices):
        raise ValueError(
            f"found train.microbatches={_parts} on {devices} devices that share a batch: take a multiple of {2 * devices}, "
            "two for each, since a loop of one is compiled to other arithmetic"
        )
    if not axes:
        return in_turn

    def gathered(params: Params, fixed: Any, parts: Any) -> Any:
        # bits travel as they are, where a sum over devices would round
        return jax.lax.all_gather(in_turn(params, fixed, parts), axes, tiled=True)

    each, whole = PartitionSpec(axes), PartitionSpec()
    return jax.shard_map(gathered, in_specs=(whole, whole, each), out_specs=whole, axis_names=set(axes), check_vma=False)


def _mean(parts: Any) -> Any:
    """Over the first axis of each leaf, added up from its beginning to its end; in a loop, for nothing is fused with that."""
    add = lambda total, part: (jax.tree.map(lambda a, b: a + b / _parts, total, part), None)  # noqa: E731
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), parts)
    return jax.lax.scan(add, zero, parts)[0]


_parts = 0
