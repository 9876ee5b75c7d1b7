"""The moving average: its decay in numbers, and what it does to a constant and to a step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.train import ema

# exp2 of float32 numbers of order 1
RTOL = 1e-6


@pytest.mark.fast
def test_ramp_up_then_half_life():
    decay = jax.jit(ema.make_decay(batch_size=100, halflife_images=2000, rampup_ratio=0.05))
    # half-life 5% of the images seen: 5, 50, 500, then 2000 from 40,000 images on
    for iteration, halflife in ((1, 5), (10, 50), (100, 500), (400, 2000), (100_000, 2000)):
        beta = decay(jnp.int32(iteration))
        assert beta.dtype == jnp.float32
        np.testing.assert_allclose(beta, 0.5 ** (100 / halflife), rtol=RTOL)
    assert decay(jnp.int32(0)) == 0


def test_without_ramp_up_it_is_constant():
    decay = ema.make_decay(batch_size=100, halflife_images=2000, rampup_ratio=None)
    for iteration in (0, 7):
        np.testing.assert_allclose(decay(jnp.int32(iteration)), 0.5**0.05, rtol=RTOL)


def test_zero_half_life_is_off():
    assert ema.make_decay(batch_size=100, halflife_images=0) is None


@pytest.mark.parametrize(("batch", "halflife", "ratio"), [(0, 10, 0.1), (8, -1, 0.1), (8, 10, 0.0), (8, 10, -1.0)])
def test_values_out_of_range_are_refused(batch, halflife, ratio):
    with pytest.raises(ValueError, match=f"found {batch}, {halflife}, {ratio}"):
        ema.make_decay(batch, halflife, ratio)


def test_a_step_is_followed_by_half_in_one_half_life():
    decay = ema.make_decay(batch_size=10, halflife_images=200, rampup_ratio=None)
    average, params = {"w": jnp.zeros(2)}, {"w": jnp.ones(2)}
    for iteration in range(20):
        average = ema.update(average, params, decay(jnp.int32(iteration)))
    np.testing.assert_allclose(average["w"], 0.5, rtol=1e-5)  # 20 float32 roundings


def test_the_first_update_forgets_the_start():
    decay = ema.make_decay(batch_size=10, halflife_images=200, rampup_ratio=0.05)
    params = {"w": jnp.asarray([1.3, -0.7])}
    average = ema.update({"w": jnp.full(2, 1e6)}, params, decay(jnp.int32(0)))
    np.testing.assert_array_equal(average["w"], params["w"])


def test_equal_trees_stay_as_they_are():
    params = {"w": jnp.asarray([1.3, -0.7, 1e-30])}
    np.testing.assert_array_equal(ema.update(params, params, jnp.float32(0.9993))["w"], params["w"])
