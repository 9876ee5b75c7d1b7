"""GITS: the search against all subsets, costs by hand, and the gain on a Gaussian mixture."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import gaussian, grids, solvers
from diffjax.sampling import gits
from diffjax.sampling.sample import sample

SIGMAS = grids.polynomial(13, 0.01, 20.0)


def mixture():
    """Four components in 6 dimensions, two of them close: trajectories bend at two scales."""
    mean = jax.random.normal(jax.random.key(0), (4, 2, 3))
    mean = mean.at[3].set(mean[2] + 0.2)
    return {"mean": mean, "std": jnp.array([0.1, 0.2, 0.05, 0.05]), "weight": jnp.array([0.3, 0.3, 0.2, 0.2])}


def start(num, sigma=20.0):
    return sigma * jax.random.normal(jax.random.key(1), (num, 2, 3))


# The search ------------------------------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize("num", [2, 3, 5, 8])
@pytest.mark.parametrize("gamma", [0.9, 1.0, 1.15])
def test_path_is_the_best_of_all_subsets(num, gamma):
    """Costs of both signs, as deviations have."""
    for seed in range(5):
        cost = np.random.default_rng(seed).normal(size=(8, 8))

        def total(path, cost=cost):
            return sum(gamma**k * cost[i, j] for k, (i, j) in enumerate(itertools.pairwise(path)))

        everything = [(0, *middle, 7) for middle in itertools.combinations(range(1, 7), num - 2)]
        assert tuple(gits.shortest_path(cost, num, gamma)) == min(everything, key=total)


def test_the_discount_decides():
    """0-1-3 costs 1 + gamma, 0-2-3 costs 1.5 + 0.4 gamma: equal at gamma = 5/6."""
    cost = np.full((4, 4), 9.0)
    cost[0, 1], cost[1, 3], cost[0, 2], cost[2, 3] = 1, 1, 1.5, 0.4
    assert gits.shortest_path(cost, 3, 0.8) == [0, 1, 3]
    assert gits.shortest_path(cost, 3, 0.9) == [0, 2, 3]


# The costs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", gits.COSTS)
def test_costs_equal_a_loop_written_by_hand(cost, x64):
    params = jax.tree.map(lambda a: a.astype(jnp.float64), mixture())
    x = start(6).astype(jnp.float64)
    found = gits.cost_matrix(gaussian.mixture_denoiser, params, x, SIGMAS, cost=cost, solver="heun")
    _, states = sample(gaussian.mixture_denoiser, params, x, solvers.make_plan("heun", SIGMAS), save_every=1)
    states = np.concatenate([x[None], states]).reshape(13, 6, 6)

    def away(points):
        """Mean distance from the line, by the angle at its start."""
        line, chord = states[-1] - states[0], points - states[0]
        length = np.linalg.norm(chord, axis=1)
        cosine = np.sum(line * chord, axis=1) / np.linalg.norm(line, axis=1) / np.maximum(length, 1e-300)
        return np.mean(length * np.sqrt(np.maximum(1 - cosine**2, 0)))

    for i, j in itertools.combinations(range(13), 2):
        here = jnp.asarray(states[i].reshape(6, 2, 3))
        slope = np.asarray(here - gaussian.mixture_denoiser(params, here, SIGMAS[i])) / SIGMAS[i]
        y = states[i] + (SIGMAS[j] - SIGMAS[i]) * slope.reshape(6, 6)
        norms = {"l1": np.abs(y - states[j]).sum(1).mean(), "l2": np.sqrt(np.square(y - states[j]).sum(1)).mean()}
        expected = norms.get(cost) if cost in norms else away(y) - away(states[j])
        # sqrt(1 - cosine^2) keeps half of the digits of a distance of order 20
        np.testing.assert_allclose(found[i, j], expected, rtol=1e-9, atol=1e-6 if cost == "deviation" else 1e-12)
    assert np.all(np.isinf(found[np.tril_indices(13)]))


def test_parts_of_a_batch_make_the_same_matrix_and_one_program():
    params, x = mixture(), start(12)
    offset = jnp.linspace(0, 1, 12)

    def denoise(params, x, sigma, cond=None, key=None):
        shifted = gaussian.mixture_denoiser(params, x, sigma)
        return shifted + 0.1 * cond["offset"].reshape(-1, 1, 1) * cond["scale"]

    before = gits._costs._cache_size()
    cond = {"offset": offset, "scale": jnp.float32(0.5), "absent": None}
    parts = gits.cost_matrix(denoise, params, x, SIGMAS, cond, batch_size=4)
    assert gits._costs._cache_size() == before + 1
    whole = gits.cost_matrix(denoise, params, x, SIGMAS, cond)
    later = np.triu_indices(13, 1)
    # float32 distances of order 20, averaged in another order
    np.testing.assert_allclose(parts[later], whole[later], rtol=1e-4, atol=1e-4)


# The levels ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exact():
    """Samples that no search has seen, and the ends of their trajectories: 400 Heun steps are off by 4e-5."""
    fresh = 80.0 * jax.random.normal(jax.random.key(7), (256, 2, 3))
    fine = solvers.make_plan("heun", grids.polynomial(401, 0.002, 80.0))
    return fresh, sample(gaussian.mixture_denoiser, mixture(), fresh, fine)


@pytest.mark.parametrize("cost", gits.COSTS)
def test_searched_levels_beat_polynomial_ones(cost, exact):
    """At 5, 6 and 8 calls of Euler and of the solver that the search followed."""
    teacher = grids.polynomial(61, 0.002, 80.0)
    matrix = gits.cost_matrix(gaussian.mixture_denoiser, mixture(), start(64, 80.0), teacher, cost=cost)
    fresh, ends = exact
    run = jax.jit(lambda plan: sample(gaussian.mixture_denoiser, mixture(), fresh, plan))

    def error(solver, sigmas):
        end = run(solvers.make_plan(solver, sigmas))
        return float(jnp.mean(jnp.linalg.norm((end - ends).reshape(256, -1), axis=1)))

    for solver in ("euler", "ipndm"):
        for num in (6, 7, 9):
            searched = teacher[gits.shortest_path(matrix, num)]
            # found 0.34 to 0.63 of the error
            assert error(solver, searched) < 0.75 * error(solver, grids.polynomial(num, 0.002, 80.0)), (solver, num)


def test_search_returns_levels_of_the_teacher():
    teacher = grids.polynomial(61, 0.002, 80.0)
    sigmas = gits.search(gaussian.mixture_denoiser, mixture(), start(8, 80.0), teacher, 7, gamma=1.1, cost="l2")
    assert sigmas.shape == (7,) and sigmas.dtype == np.float64
    assert set(sigmas) <= set(teacher) and sigmas[0] == 80.0 and sigmas[-1] == 0.002
    assert np.all(np.diff(sigmas) < 0)
    matrix = gits.cost_matrix(gaussian.mixture_denoiser, mixture(), start(8, 80.0), teacher, cost="l2")
    np.testing.assert_array_equal(sigmas, teacher[gits.shortest_path(matrix, 7, 1.1)])
    assert not np.array_equal(sigmas, teacher[gits.shortest_path(matrix, 7, 3.0)])


# Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cost": "deviations"}, "unknown cost 'deviations'; did you mean 'deviation'"),
        ({"batch_size": 3}, "batch_size must divide the 4 samples into equal parts, found 3"),
        ({"batch_size": 0}, "must divide the 4 samples .* found 0"),
        ({"num_steps": 1}, "2 to the teacher's 13, found 1"),
        ({"num_steps": 14}, "2 to the teacher's 13, found 14"),
        ({"gamma": 0.0}, "gamma .* must be positive, found 0.0"),
        ({"solver": "ipmdn"}, "did you mean 'ipndm'"),
        ({"order": 9}, "order=9"),
    ],
)
def test_arguments_that_cannot_work(changes, message):
    arguments = {"num_steps": 4, **changes}
    with pytest.raises(ValueError, match=message):
        gits.search(gaussian.mixture_denoiser, mixture(), start(4), SIGMAS, **arguments)


@pytest.mark.parametrize("cost", [np.zeros((3, 4)), np.full((3, 3), np.nan)])
def test_matrices_that_cannot_work(cost):
    with pytest.raises(ValueError, match="square matrix, finite above its diagonal"):
        gits.shortest_path(cost, 2)
