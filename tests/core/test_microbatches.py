"""Gradients in parts: those of the whole batch, and the same bits on any number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import microbatches
from diffjax.runtime import mesh

RANDOM = np.random.default_rng(0)
PARAMS = {"kernel": jnp.asarray(RANDOM.standard_normal((5, 7)), jnp.float32)}
ROWS = jnp.asarray(RANDOM.standard_normal((24, 5)), jnp.float32), jnp.asarray(RANDOM.standard_normal((24, 7)), jnp.float32)


def objective(params, fixed, rows, key):
    x, y = rows
    noise = 0.0 if key is None else jax.random.normal(key, y.shape)
    error = jnp.sum((jnp.tanh(x @ params["kernel"]) * fixed - y + noise) ** 2, axis=1)
    return jnp.mean(error), error


def run(parts, num_devices=1, key=None):
    def step(params, rows):
        with microbatches.of(parts):
            return microbatches.value_and_grad(objective, params, jnp.float32(0.7), rows, key)

    devices = mesh.make_mesh(num_devices)
    rows = jax.device_put(ROWS, mesh.batch_sharding(devices))
    with jax.set_mesh(devices):
        return jax.device_get(jax.jit(step)(PARAMS, rows))


@pytest.mark.fast
def test_parts_give_the_gradient_of_the_whole():
    whole, parts = run(0), run(6)
    # float32: means of 4 in the place of one of 24
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6), whole, parts)
    assert parts[0][1].shape == (24,)


def test_any_number_of_devices_gives_the_same_bits():
    alone = run(12, key=jax.random.key(1))
    for num_devices in (2, 3, 6):
        jax.tree.map(np.testing.assert_array_equal, alone, run(12, num_devices, key=jax.random.key(1)))
    assert len(np.unique(alone[0][1])) == 24


def test_each_part_draws_for_itself():
    (_, rows), _ = run(2, key=jax.random.key(1))
    repeated = jax.tree.map(lambda x: jnp.concatenate([x[:12], x[:12]]), ROWS)
    with microbatches.of(2):
        (_, same), _ = microbatches.value_and_grad(objective, PARAMS, jnp.float32(0.7), repeated, jax.random.key(1))
    np.testing.assert_allclose(same[:12], rows[:12], rtol=1e-6)
    assert np.abs(same[12:] - same[:12]).min() > 0


@pytest.mark.parametrize(
    ("parts", "num_devices", "message"), [(5, 1, "batch of 24, expected 5 equal"), (4, 4, "take a multiple of 8")]
)
def test_parts_that_do_not_fit_are_refused(parts, num_devices, message):
    with pytest.raises(ValueError, match=message):
        run(parts, num_devices)
