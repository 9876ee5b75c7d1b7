"""Loops over the first rows of a table: the same program for every number, counted at its most."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.build import sizes
from diffjax.core import loops
from diffjax.runtime import xla

ROWS = jnp.arange(1.0, 6.0), jnp.asarray([2.0, 3.0, 5.0, 7.0, 11.0])


def follow(number=None):
    return loops.over_rows(lambda carry, row: carry * row[1] + row[0], jnp.float32(1), ROWS, number)


@pytest.mark.fast
def test_the_first_rows_in_their_order():
    some, expected = jax.jit(follow), 1.0
    for number in range(6):
        assert float(some(jnp.int32(number))) == expected
        if number < 5:
            expected = expected * float(ROWS[1][number]) + float(ROWS[0][number])
    assert some._cache_size() == 1
    assert float(follow()) == expected
    assert float(some(jnp.int32(9))) == expected  # there are no more


@pytest.mark.fast
def test_a_whole_loop_has_a_gradient():
    found = jax.grad(lambda x: loops.over_rows(lambda carry, row: carry * row, x, ROWS[1]))(jnp.float32(1))
    assert float(found) == np.prod(ROWS[1])


def test_what_it_costs_at_most_is_found_in_the_program():
    """Five products of 8 x 8 matrices, four devices' all-gathers."""
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])

    def program(number, x, kernel):
        def body(carry, row):
            whole = jax.lax.with_sharding_constraint(jnp.tanh(row * kernel), NamedSharding(mesh, PartitionSpec()))
            return carry @ whole

        return loops.over_rows(body, x, ROWS[0], number)

    placed = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
        for shape, dtype, spec in (((), jnp.int32, ()), ((4, 8), jnp.float32, ()), ((8, 8), jnp.float32, ("fsdp",)))
    ]
    traced = jax.jit(program).trace(*placed)
    assert sizes.product_flops(traced.jaxpr) == 5 * 2 * 4 * 8 * 8
    found = xla.collectives(traced.lower().compile().as_text())
    assert [(one.kind, one.turns) for one in found] == [("all-gather", 5)]
