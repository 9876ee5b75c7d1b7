"""The mesh: its axes from a text, split batches, arrays laid out by path."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.runtime import mesh


@pytest.mark.fast
@pytest.mark.parametrize("num_devices", [None, 2])
def test_batches_are_split_and_parameters_whole(num_devices):
    devices = mesh.make_mesh(num_devices)
    size = num_devices or 8
    assert dict(devices.shape) == {"data": size, "fsdp": 1, "tensor": 1}
    batch = jax.device_put(jnp.zeros((16, 3)), mesh.batch_sharding(devices))
    assert [shard.data.shape for shard in batch.addressable_shards] == [(16 // size, 3)] * size
    params = jax.device_put(jnp.zeros((16, 3)), mesh.replicated(devices))
    assert [shard.data.shape for shard in params.addressable_shards] == [(16, 3)] * size


@pytest.mark.parametrize("num_devices", [0, 9])
def test_devices_that_do_not_exist_are_refused(num_devices):
    with pytest.raises(ValueError, match="found 8 devices.*use 1 to 8"):
        mesh.make_mesh(num_devices)


@pytest.mark.parametrize(
    ("layout", "sizes"),
    [("", (8, 1, 1)), ("fsdp:8", (1, 8, 1)), ("data:2, tensor:4", (2, 1, 4)), ("data:-1,fsdp:2", (4, 2, 1))],
)
def test_axes_from_a_text(layout, sizes):
    assert tuple(mesh.make_mesh(layout=layout).shape.values()) == sizes


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("data:4", "of 4 devices, found 8"),
        ("data:3,fsdp:-1", "of 3 devices, found 8"),
        ("fdsp:8", "fsdp"),
        ("fsdp", "expected AXIS:SIZE"),
        ("fsdp:0", "expected AXIS:SIZE"),
        ("data:-1,fsdp:-1", "one may be -1"),
    ],
)
def test_axes_that_do_not_fit_are_refused(layout, message):
    with pytest.raises(ValueError, match=message):
        mesh.make_mesh(layout=layout)


def test_a_batch_must_divide():
    devices = mesh.make_mesh(4, layout="data:2,fsdp:2")
    mesh.check_batch_size(8, devices)
    mesh.check_batch_size(6, mesh.make_mesh(4, layout="data:2,tensor:2"))
    with pytest.raises(ValueError, match="batch size 6 does not divide over 4 devices"):
        mesh.check_batch_size(6, devices)


def test_placed_arrays_are_copies_in_parts():
    devices = mesh.make_mesh(layout="fsdp:8")
    tree = {"a": {"kernel": jnp.arange(64.0).reshape(4, 16), "bias": jnp.arange(16.0)}}
    placed = mesh.place(tree, mesh.shardings(tree, devices))
    assert placed["a"]["kernel"].addressable_shards[0].data.shape == (4, 2)
    assert placed["a"]["bias"].is_fully_replicated
    jax.tree.map(np.testing.assert_array_equal, placed, tree)


def processes(*rows):
    """What `samples_of_process` reads of a mesh, the process of each device given by batch part."""
    grid = np.array([[types.SimpleNamespace(process_index=i) for i in row] for row in rows], object)
    return types.SimpleNamespace(shape={"data": len(rows), "fsdp": 1, "tensor": len(rows[0])}, devices=grid)


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([[0], [0], [1], [1]], [(0, 2), (1, 2)]),
        ([[0, 0], [1, 1], [2, 2]], [(0, 3), (1, 3), (2, 3)]),
        ([[0, 1], [2, 3]], [(0, 2), (0, 2), (1, 2), (1, 2)]),  # tensor lies across processes
    ],
)
def test_samples_of_each_process(rows, parts):
    assert [mesh.samples_of_process(processes(*rows), i) for i in range(len(parts))] == parts


def test_samples_that_do_not_hang_together_are_refused():
    with pytest.raises(ValueError, match=r"process 0 hold the parts \[0, 2\] of 4"):
        mesh.samples_of_process(processes([0], [1], [0], [1]), 0)
