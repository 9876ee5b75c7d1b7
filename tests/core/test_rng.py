"""Named streams: one key per (seed, name, step), the same traced, under float64 and after a restart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import rng


def _bits(keys):
    return np.asarray(jax.random.key_data(keys))


@pytest.mark.fast
def test_every_seed_name_and_step_has_its_own_key():
    keys = [rng.stream(s, n, k) for s in (0, 1, 2**32 - 1) for n in ("train", "sample") for k in (0, 1, 2**31)]
    assert len({_bits(key).tobytes() for key in keys}) == len(keys)


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (7, 3), (2**32 - 1, 2**31 - 1)])
def test_traced_numbers_give_the_same_key(seed, step):
    traced = jax.jit(lambda s, k: rng.stream(s, "train", k))
    found = traced(jnp.uint32(seed), jnp.int32(step))
    np.testing.assert_array_equal(_bits(found), _bits(rng.stream(seed, "train", step)))


def test_float64_mode_changes_no_key():
    plain = _bits(rng.stream(5, "train", 9)), _bits(rng.sample_keys(5, jnp.arange(3)))
    with jax.enable_x64(True):
        wide = _bits(rng.stream(5, "train", 9)), _bits(rng.sample_keys(5, jnp.arange(3)))
    for a, b in zip(plain, wide):
        np.testing.assert_array_equal(a, b)


def test_the_keys_of_a_run_do_not_move():
    # a resumed run, and a sample quoted by its number, must mean the same next year
    np.testing.assert_array_equal(_bits(rng.stream(0, "train", 3)), np.array([3942000937, 4078489552], np.uint32))


@pytest.mark.parametrize(("seed", "step"), [(-1, 0), (2**32, 0), (0, -1), (0, 2**32)])
def test_numbers_that_would_wrap_around_are_refused(seed, step):
    with pytest.raises(ValueError, match=r"must be in 0\.\.2\^32-1, found"):
        rng.stream(seed, "train", step)


def test_a_sample_key_depends_on_its_id_alone():
    keys = _bits(rng.sample_keys(3, jnp.arange(8)))
    assert len({row.tobytes() for row in keys}) == 8
    np.testing.assert_array_equal(_bits(rng.sample_keys(3, [6, 2])), keys[[6, 2]])
    assert not np.array_equal(_bits(rng.sample_keys(4, jnp.arange(8))), keys)
