"""A loop over rows of which only the first may be wanted."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.core.types import Array


def over_rows(body: Callable[[Any, Any], Any], carry: Any, rows: Any, number: Array | None = None) -> Any:
    """The carry after carry = body(carry, row) for the rows of the arrays `rows` (n, ...), in their order.

    number: a traced number of rows at the beginning, the others are passed over; None for all, which alone has a
    gradient. So one program serves several lengths. That `number` is at most n stands in the loop's condition, where
    those who count what a program costs find it.
    """
    if number is None:
        return jax.lax.scan(lambda carry, row: (body(carry, row), None), carry, rows)[0]
    most = jax.tree.leaves(rows)[0].shape[0]

    def goes_on(state: tuple[Array, Array, Any]) -> Array:
        return (state[0] < most) & (state[0] < state[1])

    def turn(state: tuple[Array, Array, Any]) -> tuple[Array, Array, Any]:
        i, number, carry = state
        return i + 1, number, body(carry, jax.tree.map(lambda a: a[i], rows))

    return jax.lax.while_loop(goes_on, turn, (jnp.int32(0), jnp.asarray(number, jnp.int32), carry))[2]
