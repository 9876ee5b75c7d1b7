"""The mesh of devices of a run, axes `data`, `fsdp`, `tensor` (see `core.sharding`), and arrays laid out on it.

    devices = make_mesh(layout="data:4,fsdp:4")            # by default all devices along data
    where = shardings(jax.eval_shape(init), devices)        # by path: parameters, average, optimiser
    state = place(init(), where)                            # also over several processes
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from diffjax.core import names, sharding, trees


def make_mesh(
    num_devices: int | None = None, devices: Sequence[jax.Device] | None = None, layout: str = ""
) -> Mesh:
    """Mesh of the first `num_devices` of `devices` (default: all devices).

    layout: axes and their sizes, "data:2,fsdp:4"; an axis that is not named has size 1, one of size -1 takes what is left,
    and "" is all along data. Raises ValueError when fewer devices exist than asked for, for a layout of another number of
    devices or one that cannot be read.
    """
    devices = list(jax.devices() if devices is None else devices)
    wanted = len(devices) if num_devices is None else num_devices
    if not 1 <= wanted <= len(devices):
        raise ValueError(f"found {len(devices)} devices, asked for {wanted}: use 1 to {len(devices)}")
    shape = axis_sizes(layout, wanted)
    kinds = (AxisType.Auto,) * len(sharding.AXES)
    return jax.make_mesh(shape, sharding.AXES, axis_types=kinds, devices=devices[:wanted])


def axis_sizes(layout: str, num_devices: int) -> tuple[int, ...]:
    """Sizes of data, fsdp and tensor of a `layout` of that many devices. Raises ValueError as `make_mesh`."""
    sizes = dict.fromkeys(sharding.AXES, 1)
    if not layout:
        return num_devices, 1, 1
    for part in layout.split(","):
        name, colon, size = part.strip().partition(":")
        if not colon or not size.lstrip("-").isdecimal() or int(size) < -1 or int(size) == 0:
            raise ValueError(f"found {part.strip()!r} in mesh={layout!r}, expected AXIS:SIZE, as data:2,fsdp:4")
        names.lookup(sizes, name, "axis of the mesh")
        sizes[name] = int(size)
    known = math.prod(size for size in sizes.values() if size > 0)
    if list(sizes.values()).count(-1) == 1 and num_devices % known == 0:
        sizes = {name: num_devices // known if size < 0 else size for name, size in sizes.items()}
    if min(sizes.values()) < 1 or math.prod(sizes.values()) != num_devices:
        raise ValueError(
            f"mesh={layout!r} is of {known} devices, found {num_devices}: sizes multiply to their number, one may be -1"
        )
    return tuple(sizes.values())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding that splits axis 0, of samples, over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(sharding.BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding that puts the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Where each array of `tree` lies, by its path: a state of training, or the parameters that it reads."""
    sizes = dict(mesh.shape)
    flat = trees.flatten(tree)
    placed = [NamedSharding(mesh, sharding.spec(path, leaf.shape, sizes)) for path, leaf in flat.items()]
    return jax.tree.unflatten(jax.tree.structure(tree), placed)


def place(tree: Any, where: Any) -> Any:
    """Copies of the arrays, laid out as `where` (a tree of shardings) says. Every process gives the same values; each
    device is sent its own part."""

    def put(leaf: Any, to: NamedSharding) -> jax.Array:
        if jax.process_count() == 1:
            return jax.device_put(leaf, to, may_alias=False)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, to, lambda index: host[index])

    return jax.tree.map(put, tree, where)


def local_copy(tree: Any) -> Any:
    """Arrays on a mesh of several processes, whole on one device of this one: what a process needs to compute by itself.
    A step of all processes; a process alone keeps its arrays as they are."""
    if jax.process_count() == 1:
        return tree
    everywhere = jax.tree.map(lambda leaf: replicated(leaf.sharding.mesh), tree)
    whole = jax.jit(lambda tree: tree, out_shardings=everywhere)(tree)
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), whole)


def samples_of_process(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """(k, n): the devices of a process, by default this one, hold the k-th of n equal parts of every batch. Where an axis
    of the mesh lies across processes, several have the same part. Raises ValueError for parts that do not hang together."""
    process = jax.process_index() if process is None else process
    cut = math.prod(mesh.shape[axis] for axis in sharding.BATCH)
    grid = mesh.devices.reshape(cut, -1)
    own = [i for i in range(cut) if any(device.process_index == process for device in grid[i])]
    count = len(own)
    if not own or own != list(range(own[0], own[0] + count)) or own[0] % count or cut % count:
        raise ValueError(
            f"the devices of process {process} hold the parts {own} of {cut} of a batch, expected neighbours that divide "
            "it: order the axes so that those within a process come last, as data:PROCESSES,fsdp:DEVICES_OF_ONE"
        )
    return own[0] // count, cut // count


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises ValueError unless every device gets the same number of samples."""
    parts = math.prod(mesh.shape[axis] for axis in sharding.BATCH)
    if batch_size % parts:
        fewer = ", or fewer devices with --config.train.num_devices=1" if jax.process_count() == 1 else ""
        raise ValueError(f"batch size {batch_size} does not divide over {parts} devices: use a multiple of {parts}{fewer}")
