"""Exact assignment: against brute force, order in one dimension, and scipy's own totals."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, stats

from diffjax.assign import costs, exact


def total(cost, perm):
    return cost[np.arange(len(cost)), perm].sum()


@pytest.mark.fast
@pytest.mark.parametrize("num", [1, 2, 4, 7])
@pytest.mark.parametrize("ties", [False, True])
def test_brute_force(num, ties):
    """Equal totals, with negative costs and with ties; the same plan where the best is unique."""
    random = np.random.default_rng(num)
    cost = random.integers(-2, 3, (num, num)).astype(float) if ties else random.normal(size=(num, num))
    totals = {perm: total(cost, list(perm)) for perm in itertools.permutations(range(num))}
    best = min(totals.values())
    found = exact.solve(cost)
    assert total(cost, found) == pytest.approx(best, abs=1e-12)
    if not ties:
        assert totals[tuple(found)] == best


def test_no_random_plan_and_no_swap_is_better():
    random = np.random.default_rng(0)
    cost = random.normal(size=(64, 64))
    perm = exact.solve(cost)
    best = total(cost, perm)
    assert all(total(cost, random.permutation(64)) >= best for _ in range(2000))
    for i, j in itertools.combinations(range(64), 2):
        swapped = perm.copy()
        swapped[[i, j]] = perm[[j, i]]
        assert total(cost, swapped) >= best


@pytest.mark.parametrize("cost", costs.COSTS)
def test_one_dimension_is_rank_matching(cost):
    x, noise = np.random.default_rng(1).normal(size=(2, 50, 1)).astype(np.float32)
    perm = exact.solve(np.asarray(costs.cost_matrix(jnp.asarray(3 * x + 2), jnp.asarray(noise), cost), np.float64))
    ranked = stats.rankdata(noise[perm, 0]) == stats.rankdata(x[:, 0])
    if cost == "dot":
        assert ranked.all()
    else:  # |x - n| is not strictly convex on a line: other plans may be as good
        matrix = np.abs(3 * x + 2 - noise.T)
        in_order = np.argsort(noise[:, 0])[np.argsort(np.argsort(x[:, 0]))]
        assert total(matrix, perm) == pytest.approx(total(matrix, in_order), rel=1e-5)  # costs are float32


def test_what_does_not_change_the_plan():
    random = np.random.default_rng(2)
    cost, rows, columns = random.normal(size=(40, 40)), random.normal(size=(40, 1)), random.normal(size=(1, 40))
    perm, order = exact.solve(cost), random.permutation(40)
    np.testing.assert_array_equal(exact.solve(cost + rows + columns), perm)
    np.testing.assert_array_equal(exact.solve(2 * cost), perm)
    np.testing.assert_array_equal(exact.solve(cost[order]), perm[order])


def test_groups_are_solved_apart():
    random = np.random.default_rng(3)
    cost, group = random.normal(size=(60, 60)), random.integers(0, 4, 60)
    perm = exact.solve(cost, group)
    np.testing.assert_array_equal(np.sort(perm), np.arange(60))
    np.testing.assert_array_equal(group[perm], group)
    for value in range(4):
        own = np.flatnonzero(group == value)
        block = cost[np.ix_(own, own)]
        assert total(block, np.searchsorted(own, perm[own])) == pytest.approx(
            block[optimize.linear_sum_assignment(block)].sum(), abs=1e-12
        )


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        (np.zeros((3, 4)), r"expected a square matrix of costs, found shape \(3, 4\)"),
        (np.array([[0.0, 1.0], [np.nan, 2.0]]), "1 costs are not finite, the first at row 1, column 0"),
        (np.array([[0.0, np.inf], [np.inf, 2.0]]), "2 costs are not finite"),
    ],
)
def test_costs_that_cannot_be_solved(cost, message):
    with pytest.raises(ValueError, match=message):
        exact.solve(cost)


# Costs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "order"), [("l2", 2), ("l1", 1)])
def test_distances_are_numpys(name, order):
    x, noise = np.random.default_rng(4).normal(size=(2, 20, 3, 4)).astype(np.float32)
    expected = np.linalg.norm((x[:, None] - noise[None]).reshape(20, 20, -1), order, axis=2)
    np.testing.assert_allclose(costs.cost_matrix(x, noise, name), expected, rtol=1e-5, atol=1e-5)  # float32 sums of 12


def test_half_precision_does_not_overflow():
    """Spec check 11: 4,096 values of deviation 16 have squared distances up to 1.1e6, beyond float16."""
    random = np.random.default_rng(5)
    x = (16 * random.normal(size=(32, 4096))).astype(np.float16)
    noise = random.normal(size=(32, 4096)).astype(np.float16)
    wide = np.linalg.norm(x[:, None].astype(np.float64) - noise[None], axis=2)
    assert np.max(wide**2) > 65504
    for name, reference in (("l2", wide), ("dot", -x.astype(np.float64) @ noise.T.astype(np.float64))):
        found = costs.cost_matrix(jnp.asarray(x), jnp.asarray(noise), name)
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(exact.solve(found), exact.solve(reference))


def test_unknown_cost():
    with pytest.raises(ValueError, match="must be one of .*found 'cosine'"):
        costs.cost_matrix(jnp.zeros((2, 3)), jnp.zeros((2, 3)), "cosine")


# Inside programs -------------------------------------------------------------------------------------------------


def test_one_answer_in_every_program():
    cost = jnp.asarray(np.random.default_rng(6).normal(size=(3, 24, 24)), jnp.float32)
    expected = np.stack([exact.solve(np.asarray(one)) for one in cost])
    np.testing.assert_array_equal(jax.jit(jax.vmap(exact.linear))(cost), expected)
    _, scanned = jax.jit(lambda cost: jax.lax.scan(lambda carry, one: (carry, exact.linear(one)), 0, cost))(cost)
    np.testing.assert_array_equal(scanned, expected)
    np.testing.assert_array_equal(exact.linear(cost[0]), expected[0])
    assert scanned.dtype == jnp.int32
