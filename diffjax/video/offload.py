"""Arrays that wait in the host's memory until their turn comes: skips and weights.

    x, kept = stow(x)                       # inside a program: a copy of x, on the host
    part = on_device(kept[:1])              # where it is read
    f = program(to_host(params), x)         # a program that reads on_device(params)

`stow` copies frame by frame, and no more than a frame of what is kept is on the device. When weights are brought is up
to the compiler: each is written to the device no later than it is read and let go behind it. XLA's compiler for TPUs
brings one after the other; where it hides latency, as it does by itself, as many ahead as the device has room for.

Values are the same, every copy takes time. JAX calls this memory pinned_host; backends without it are refused.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from diffjax.core.types import Array

_HOST = "pinned_host"


def check(what: Sequence[str], device: jax.Device | None = None) -> None:
    """Raises ValueError where something is to wait and the device, the first if None, has no such memory."""
    device = device or jax.devices()[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if what and _HOST not in kinds:
        raise ValueError(
            f"nothing can wait in the host's memory: the backend {device.platform!r} has the memories {kinds}, "
            f"expected {_HOST!r} among them; leave offload={','.join(what)} out"
        )


def host_sharding(device: jax.Device | None = None) -> SingleDeviceSharding:
    """Of arrays that wait on the host for a device, the first if None."""
    return SingleDeviceSharding(device or jax.devices()[0], memory_kind=_HOST)


def to_host(tree: Any) -> Any:
    """Arrays of the host, or of the device, as arguments that wait. Raises as `check`."""
    check(("weights",))
    return jax.device_put(tree, host_sharding())


def on_device(tree: Any) -> Any:
    """The same, with what waits on the host brought to the device."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf, jax.memory.Space.Device) if _waits(leaf) else leaf, tree)


def _waits(leaf: Any) -> bool:
    return jax.typeof(leaf).memory_space == jax.memory.Space.Host


@jax.custom_vjp
def stow(x: Array) -> tuple[Array, Array]:
    """(x, kept): x, and a copy of it on the host. Without a gradient."""

    def copy(index: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        x, kept = carry
        part = jax.lax.dynamic_slice_in_dim(x, index, 1)
        kept = jax.lax.dynamic_update_slice_in_dim(kept, jax.device_put(part, jax.memory.Space.Host), index, 0)
        # written back as it was, so that what reads x waits for the copy: else the compiler, which counts both memories
        # as one, keeps x and copies late
        return jax.lax.dynamic_update_slice_in_dim(x, jax.lax.optimization_barrier(part), index, 0), kept

    # the compiler makes an allocation of it and writes nothing; of one number for all skips it would make one
    empty = jnp.broadcast_to(x[(0,) * x.ndim], x.shape)
    return jax.lax.fori_loop(0, len(x), copy, (x, jax.device_put(empty, jax.memory.Space.Host)))


def _refuse(x: Array) -> None:
    raise ValueError("skips that wait in the host's memory have no gradient: leave 'skips' out of the plan's offload")


stow.defvjp(_refuse, _refuse)
