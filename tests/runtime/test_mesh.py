"""The mesh: one axis, split batches, whole parameters."""

import jax
import jax.numpy as jnp
import pytest

from diffjax.runtime import mesh


@pytest.mark.fast
@pytest.mark.parametrize("num_devices", [None, 2])
def test_batches_are_split_and_parameters_whole(num_devices):
    devices = mesh.make_mesh(num_devices)
    size = num_devices or 8
    assert devices.axis_names == ("data",) and devices.size == size
    batch = jax.device_put(jnp.zeros((16, 3)), mesh.batch_sharding(devices))
    assert [shard.data.shape for shard in batch.addressable_shards] == [(16 // size, 3)] * size
    params = jax.device_put(jnp.zeros((16, 3)), mesh.replicated(devices))
    assert [shard.data.shape for shard in params.addressable_shards] == [(16, 3)] * size


@pytest.mark.parametrize("num_devices", [0, 9])
def test_devices_that_do_not_exist_are_refused(num_devices):
    with pytest.raises(ValueError, match="found 8 devices.*use 1 to 8"):
        mesh.make_mesh(num_devices)


def test_a_batch_must_divide():
    devices = mesh.make_mesh(4)
    mesh.check_batch_size(8, devices)
    with pytest.raises(ValueError, match="batch size 6 does not divide over 4 devices"):
        mesh.check_batch_size(6, devices)
