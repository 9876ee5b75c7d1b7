"""One device mesh with the axis `data`: batches are split over it, parameters are on every device."""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh(num_devices: int | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh of the first `num_devices` of `devices` (default: all devices), axis `data`.

    Raises ValueError when fewer devices exist than asked for.
    """
    devices = list(jax.devices() if devices is None else devices)
    wanted = len(devices) if num_devices is None else num_devices
    if not 1 <= wanted <= len(devices):
        raise ValueError(f"found {len(devices)} devices, asked for {wanted}: use 1 to {len(devices)}")
    return jax.make_mesh((wanted,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:wanted])


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding that splits axis 0 over `data`."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding that puts the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises ValueError unless every device gets the same number of samples."""
    if batch_size % mesh.size:
        raise ValueError(
            f"batch size {batch_size} does not divide over {mesh.size} devices: use a multiple of {mesh.size}, "
            f"or fewer devices with --config.train.num_devices=1"
        )
