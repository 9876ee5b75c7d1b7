"""Assignment without a host: a truncated auction, nearest of k noises, Sinkhorn as a reference.

`auction` always returns a permutation and finds about 99 % of the best sum of products at any batch. In a Jacobi round
every row without a column bids for the column whose value minus price is best,

    bid = price + (best value - price) - (second best value - price) + eps                              (1)

(Bertsekas 1988); a column goes to the highest bid, which becomes its price, and its owner before is free again. With one
phase and few rounds some rows are left over; they take the columns that are left, and rounds of swaps between pairs of
rows that both gain most by it mend the worst of that. Shapes are static, the work is O((rounds + swaps) B^2).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffjax.assign import costs
from diffjax.core.broadcast import squared_norm
from diffjax.core.types import Array, Key

_ROUNDS, _SWAPS = 30, 6
_FAR = 1e30  # the cost of a column of another group: finite, so that differences are


class _Auction(NamedTuple):
    """prices (B,); owner (B,): the row of each column, -1 = none; column (B,): of each row."""

    prices: Array
    owner: Array
    column: Array


def auction(
    cost: Array, eps: Array | float, group: Array | None = None, *, rounds: int = _ROUNDS, swaps: int = _SWAPS
) -> Array:
    """A permutation (B,) int32 with a small sum of cost[i, s(i)], within each group where `group` (B,) is given.

    eps: smallest raise of a price, for example 0.2 standard deviations of the costs. Equal bids go to the higher row.
    """
    value = -jnp.asarray(cost, jnp.float32)
    num = len(value)
    group = jnp.zeros(num, jnp.int32) if group is None else group
    value = jnp.where(group[:, None] == group[None], value, -_FAR)
    state = _Auction(jnp.zeros(num), jnp.full(num, -1, jnp.int32), jnp.full(num, -1, jnp.int32))
    state, _ = jax.lax.scan(lambda state, _: (_bid(value, eps, state), None), state, length=rounds)
    perm = _fill(state, group)
    perm, _ = jax.lax.scan(lambda perm, _: (_swap(value, group, perm), None), perm, length=swaps)
    return perm


def _bid(value: Array, eps: Array | float, state: _Auction) -> _Auction:
    """One round of (1)."""
    num = len(value)
    rows = jnp.arange(num, dtype=jnp.int32)
    net = value - state.prices[None]
    best = jnp.argmax(net, axis=1)
    first = jnp.take_along_axis(net, best[:, None], axis=1)[:, 0]
    second = jnp.max(jnp.where(rows[None] == best[:, None], -jnp.inf, net), axis=1)
    second = jnp.where(second > -_FAR / 2, second, first)  # the only column of its group
    free = state.column < 0
    bid = jnp.where(free, state.prices[best] + (first - second) + eps, -jnp.inf)
    highest = jax.ops.segment_max(bid, best, num)
    winner = jax.ops.segment_max(jnp.where(free & (bid == highest[best]), rows, -1), best, num)
    sold = winner >= 0
    # the owner before is free again, then the winner has the column; num is nobody, and dropped
    column = state.column.at[jnp.where(sold & (state.owner >= 0), state.owner, num)].set(-1, mode="drop")
    column = column.at[jnp.where(sold, winner, num)].set(rows, mode="drop")
    return _Auction(jnp.where(sold, highest, state.prices), jnp.where(sold, winner, state.owner), column)


def _fill(state: _Auction, group: Array) -> Array:
    """Rows without a column take the columns that are left, in order, group by group: each has as many of both."""
    order = [jnp.lexsort((group, taken)) for taken in (state.owner >= 0, state.column >= 0)]
    columns, rows = (indices.astype(jnp.int32) for indices in order)
    left = jnp.zeros_like(columns).at[rows].set(columns)  # right for the free rows, which come first in both
    return jnp.where(state.column < 0, left, state.column)


def _swap(value: Array, group: Array, perm: Array) -> Array:
    """Pairs of rows that are each other's best partner exchange their columns."""
    rows = jnp.arange(len(perm))
    have = value[:, perm]
    own = jnp.diagonal(have)
    gain = have + have.T - own[:, None] - own[None]
    gain = jnp.where((group[:, None] == group[None]) & (rows[:, None] != rows[None]), gain, -jnp.inf)
    partner = jnp.argmax(gain, axis=1)
    agreed = (partner[partner] == rows) & (jnp.max(gain, axis=1) > 0)
    return jnp.where(agreed, perm[partner], perm)


def nearest(keys: Key, x: Array, first: Array, k: int, *, dot: bool = False) -> Array:
    """Noise (B, ...): for each image the nearest of k unit noises of its own, of which `first` (B, ...) is one.

    keys (B,): of each image. Nearest in |x - n| (Li 2025, algorithm 1), which also prefers short noise; with `dot` in
    x . n, which leaves the length alone. Candidates are drawn one at a time, so memory does not depend on k.
    """
    x = jax.lax.stop_gradient(x)
    target = costs.flat(x)

    def draw(index: Array) -> Array:
        return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), x.shape[1:]))(keys)

    def distance(noise: Array) -> Array:
        products = jnp.sum(target * costs.flat(noise), axis=1)
        return -products if dot else squared_norm(noise) - 2 * products

    def body(best: tuple[Array, Array], index: Array) -> tuple[tuple[Array, Array], None]:
        noise, at = best
        other = draw(index)
        there = distance(other)
        nearer = (there < at).reshape(-1, *(1,) * (x.ndim - 1))
        return (jnp.where(nearer, other, noise), jnp.minimum(at, there)), None

    (noise, _), _ = jax.lax.scan(body, (first, distance(first)), jnp.arange(1, k, dtype=jnp.int32))
    return noise


def sinkhorn(cost: Array, eps: Array | float, *, iterations: int = 50) -> Array:
    """A permutation (B,) int32 rounded from the entropic plan at temperature eps, row by row, surest rows first: a
    reference, whose rounding takes B steps one after another."""
    num = len(cost)
    log_kernel = -jnp.asarray(cost, jnp.float32) / eps

    def body(column: Array, _: None) -> tuple[Array, None]:
        row = -jax.nn.logsumexp(log_kernel + column[None], axis=1)
        return -jax.nn.logsumexp(log_kernel + row[:, None], axis=0), None

    column, _ = jax.lax.scan(body, jnp.zeros(num), length=iterations)
    plan = jax.nn.log_softmax(log_kernel + column[None], axis=1)

    def take(free: Array, row: Array) -> tuple[Array, Array]:
        chosen = jnp.argmax(jnp.where(free, plan[row], -jnp.inf)).astype(jnp.int32)
        return free.at[chosen].set(False), chosen

    order = jnp.argsort(-jnp.max(plan, axis=1))
    _, chosen = jax.lax.scan(take, jnp.ones(num, bool), order)
    return jnp.zeros(num, jnp.int32).at[order].set(chosen)
