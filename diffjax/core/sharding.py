"""Where the arrays of a step lie on a mesh of devices: rules by path, the same for every network, average and optimiser.

    data     batches are split, weights are copied
    fsdp     batches are split, and weights too: put together where they are used, their gradients added up in parts
             (Rajbhandari 2020, ZeRO stage 3)
    tensor   products of transformer blocks are split: queries, keys, values and hidden units by columns, what follows them
             by rows, so that one sum over devices closes each pair (Shoeybi 2019, section 3); where the heads of an attention
             do not divide, its queries are split along the sequence

Functions that are traced read the mesh from `jax.set_mesh`. Without one, or with one device, they do nothing.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from diffjax.core.types import Array

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the axes that batches are split over

# what `tensor` splits of a product (in, out): its outputs, its inputs, nothing
Split = Literal["columns", "rows", ""]
_COLUMNS = re.compile(r"(^|/)(\w*attention/(qkv|q|kv)|mlp/expand)/kernel$")
_ROWS = re.compile(r"(^|/)(\w*attention/out|mlp/contract)/kernel$")
_WEIGHT = re.compile(r"(^|/)(kernel|embedding)$")


def spec(path: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    """How the parameter at `path` is split on a mesh of these sizes; so are its average and what an optimiser keeps of it,
    whose paths end alike. Kernels and tables are; vectors, which are few bytes, are everywhere."""
    if not _WEIGHT.search(path) or len(shape) < 2:
        return PartitionSpec()
    if path.endswith("embedding"):  # looked up by rows: its columns alone
        return _spec(shape, "", sizes, first=len(shape) - 1)
    split = "columns" if _COLUMNS.search(path) else "rows" if _ROWS.search(path) else ""
    return _spec(shape, split, sizes)


def _spec(shape: tuple[int, ...], split: Split, sizes: Mapping[str, int], first: int | None = None) -> PartitionSpec:
    """Of the last two axes, `split` over tensor, and the first of the others that divides over fsdp: the inputs, where they
    divide, since TPUs have no reduce-scatter along an array's last axis. Axes before them, those of a stack or of a
    convolution's places, stay whole: the rule is the same for one layer and for a stack."""
    tensor, fsdp = sizes.get("tensor", 1), sizes.get("fsdp", 1)
    axes: list[str | None] = [None] * len(shape)
    taken = {"columns": len(shape) - 1, "rows": len(shape) - 2, "": -1}[split]
    if tensor > 1 and taken >= 0 and shape[taken] % tensor == 0:
        axes[taken] = "tensor"
    free = [i for i in range(len(shape) - 2 if first is None else first, len(shape)) if axes[i] is None]
    fits = [i for i in free if shape[i] % fsdp == 0]
    if fsdp > 1 and fits:
        axes[fits[0]] = "fsdp"
    return PartitionSpec(*axes)


def sizes() -> dict[str, int]:
    """Axis -> size, of the mesh that is set; only axes over which the partitioner may still split, none inside `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in kinds if kind == AxisType.Auto and size > 1}


def weight(kernel: Array, dtype: Any, split: Split = "") -> Array:
    """`kernel` in this type, whole along fsdp, for the product that uses it. Its gradient comes back in parts and in the
    kernel's own type: what moves is an all-gather in `dtype`, and a reduce-scatter. The devices' products are added up
    there in the type that they have, `dtype`, as in other bfloat16 training."""
    if "fsdp" not in (mesh := sizes()):
        return kernel.astype(dtype)
    stored = _spec(kernel.shape, split, mesh)
    whole = PartitionSpec(*(None if axis == "fsdp" else axis for axis in stored))
    return _gathered(kernel, jnp.dtype(dtype), stored, whole)


def columns(kernel: Array) -> Array:
    """A kernel (in, out) whose outputs are split over tensor, where they divide: a part of several products in one."""
    tensor = sizes().get("tensor", 1)
    if tensor == 1 or kernel.shape[-1] % tensor:
        return kernel
    return jax.lax.with_sharding_constraint(kernel, PartitionSpec(None, "tensor"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gathered(kernel: Array, dtype: Any, stored: PartitionSpec, whole: PartitionSpec) -> Array:
    # twice: in parts while it changes its type, so that the smaller type travels
    cast = jax.lax.with_sharding_constraint(kernel.astype(dtype), stored)
    return jax.lax.with_sharding_constraint(cast, whole)


def _gathered_forward(kernel: Array, dtype: Any, stored: PartitionSpec, whole: PartitionSpec) -> tuple[Array, Array]:
    return _gathered(kernel, dtype, stored, whole), jnp.zeros((), kernel.dtype)


def _gathered_backward(dtype: Any, stored: PartitionSpec, whole: PartitionSpec, like: Array, grad: Array) -> tuple[Array]:
    return (jax.lax.with_sharding_constraint(grad.astype(like.dtype), stored),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def spread(tree: Any) -> Any:
    """Arrays (B, ...) drawn inside a step, split as its batch is; those that do not divide are left to the partitioner."""
    mesh = sizes()
    axes = tuple(axis for axis in BATCH if axis in mesh)
    parts = mesh.get("data", 1) * mesh.get("fsdp", 1)

    def place(leaf: Array) -> Array:
        if not leaf.ndim or leaf.shape[0] % parts:
            return leaf
        return jax.lax.with_sharding_constraint(leaf, PartitionSpec(axes))

    return jax.tree.map(place, tree) if axes else tree


def everywhere(tree: Any) -> Any:
    """Arrays whole on every device: what depends on all samples, an assignment or a sum in order, is the same on all."""
    if not sizes():
        return tree
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, PartitionSpec()), tree)


def split_heads_or_queries(q_BLNC: Array, k_BSNC: Array, v_BSNC: Array) -> tuple[Array, Array, Array]:
    """Over tensor: the heads of an attention, or where they do not divide its queries, each of which sees all keys."""
    tensor, free = sizes().get("tensor", 1), PartitionSpec.UNCONSTRAINED
    if tensor == 1:
        return q_BLNC, k_BSNC, v_BSNC
    put = jax.lax.with_sharding_constraint
    if q_BLNC.shape[2] % tensor == 0:
        by_head = PartitionSpec(free, None, "tensor", None)
        return put(q_BLNC, by_head), put(k_BSNC, by_head), put(v_BSNC, by_head)
    if q_BLNC.shape[1] % tensor:
        return q_BLNC, k_BSNC, v_BSNC
    whole = PartitionSpec(free, None, None, None)
    return put(q_BLNC, PartitionSpec(free, "tensor", None, None)), put(k_BSNC, whole), put(v_BSNC, whole)
