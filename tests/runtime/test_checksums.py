"""Checksums of arrays: the formula, any word counted, and the same for every sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from diffjax.runtime import checksums

DTYPES = ("float32", "bfloat16", "float16", "int32", "uint32", "int8", "uint8", "bool")


def expected(array):
    """The formula of the module's docstring, in 64 bits."""
    array = np.asarray(array)
    bits = {1: np.uint8, 2: np.uint16}.get(array.dtype.itemsize, np.uint32)
    words = np.ascontiguousarray(array).reshape(-1).view(bits).astype(np.uint64)
    return int(((2 * np.arange(len(words), dtype=np.uint64) + 1) * words % 2**32).sum() % 2**32)


def random(shape, dtype="float32", seed=0):
    return jnp.asarray(100 * np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def of(array):
    return checksums.of_arrays({"a": array})[0]["a"]


@pytest.mark.fast
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (7,), (0,), (3, 5, 2)])
def test_the_formula(shape, dtype):
    array = random(shape, dtype)
    assert of(array) == expected(array)


@pytest.mark.parametrize("dtype", ["float64", "int64"])
def test_the_formula_of_64_bits(x64, dtype):
    array = random((3, 5), dtype)
    assert array.dtype == dtype
    assert of(array) == expected(array)


def test_a_change_of_any_bit_changes_it():
    array = random((4, 3))
    words, before = np.asarray(array).view(np.uint32), of(array)
    for i in range(array.size):
        for bit in range(32):
            changed = words.copy()
            changed.reshape(-1)[i] ^= np.uint32(1 << bit)
            assert of(jnp.asarray(changed)) != before


def test_swapped_words_change_it():
    array = random(16)
    assert len({of(array), of(array[::-1]), of(jnp.roll(array, 1)), of(array.reshape(4, 4).T.ravel())}) == 4


@pytest.mark.parametrize("shape", [(16, 24), (24, 16, 3), (16,)])
def test_it_is_the_same_for_every_sharding(shape):
    array = random(shape)
    specs = [(), ("a",), (("a", "b"),), ("b", "a"), (None, ("b", "a"))]
    for sizes in ((2, 4), (8, 1), (1, 2)):
        devices = jax.devices()[: sizes[0] * sizes[1]]
        mesh = jax.make_mesh(sizes, ("a", "b"), axis_types=(AxisType.Auto,) * 2, devices=devices)
        for spec in specs:
            if len(spec) <= len(shape):
                placed = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
                assert of(placed) == expected(array)


def test_no_array_is_gathered_to_make_it():
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    array = jax.device_put(random((64, 8)), NamedSharding(mesh, PartitionSpec("a")))
    program = checksums._compiled(NamedSharding(mesh, PartitionSpec())).lower(array).compile().as_text()
    gathered = [line for line in program.splitlines() if "all-gather" in line and "[64" in line]
    assert not gathered


def test_the_first_array_that_is_not_finite_is_named():
    arrays = {"a": jnp.ones(3, int), "b": jnp.ones(2), "c": jnp.asarray([0.0, jnp.nan]), "d": jnp.full((2, 2), jnp.inf)}
    assert checksums.of_arrays(arrays)[1] == "c"
    assert checksums.of_arrays({"h": jnp.asarray([-jnp.inf], jnp.bfloat16)})[1] == "h"
    assert checksums.of_arrays({name: arrays[name] for name in "ab"})[1] == ""
    assert checksums.of_arrays({}) == ({}, "")


def test_text_is_summed_whatever_the_order_of_keys():
    assert checksums.of_text({"a": 1, "b": [1.5, "é"]}) == checksums.of_text({"b": [1.5, "é"], "a": 1})
    assert checksums.of_text({"a": 1}) != checksums.of_text({"a": 2})
