"""Solvers that add noise after a step: DDPM's posterior, DDIM between, consistency steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import gaussian, schedules, solvers
from diffjax.sampling.sample import sample

TABLE = schedules.named("linear")
LEVELS = np.append(TABLE.level(np.arange(1000, 0, -125) / 1000), 0.0)


@pytest.mark.fast
@pytest.mark.parametrize("variance", ["small", "large"])
def test_ancestral_is_ddpm_in_the_variables_of_the_paper(variance):
    """Ho 2020, eq. 7, between the kept levels: mean (sqrt(abar') beta x0 + sqrt(alpha) (1 - abar') x_t) / (1 - abar) and
    variance beta (1 - abar') / (1 - abar), or beta, all for x_t = sqrt(abar) (x0 + sigma n)."""
    plan = solvers.make_plan("ancestral", LEVELS, variance=variance)
    abar = 1 / (1 + LEVELS**2)
    x0, x = 0.3, 1.7
    for i in range(len(LEVELS) - 1):
        beta = 1 - abar[i] / abar[i + 1]
        mean = np.sqrt(abar[i + 1]) * beta * x0 + np.sqrt(1 - beta) * (1 - abar[i + 1]) * np.sqrt(abar[i]) * x
        found = plan.advance[i] @ [0, x, x0]
        assert found == pytest.approx(mean / (1 - abar[i]) / np.sqrt(abar[i + 1]), rel=1e-12)
        last = i == len(LEVELS) - 2
        expected = 0 if last else beta * ((1 - abar[i + 1]) / (1 - abar[i]) if variance == "small" else 1)
        added = 0 if last else plan.noise[i + 1]
        assert added**2 * abar[i + 1] == pytest.approx(expected, rel=1e-9, abs=1e-15)
    assert plan.nfe == 8 and plan.noise[0] == 0


def test_without_noise_ancestral_is_ddim():
    ancestral, ddim = solvers.make_plan("ancestral", LEVELS, eta=0.0), solvers.make_plan("ddim", LEVELS)
    params = {"mean": jnp.float32(0.2), "std": jnp.float32(0.5)}
    x = float(LEVELS[0]) * jax.random.normal(jax.random.key(0), (4, 3))
    found = sample(gaussian.gaussian_denoiser, params, x, ancestral, key=jax.random.split(jax.random.key(1), 4))
    expected = sample(gaussian.gaussian_denoiser, params, x, ddim)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)  # float32 from levels of 157


@pytest.mark.parametrize("options", [{}, {"eta": 0.5}, {"variance": "large"}])
def test_ancestral_ends_at_the_data(options):
    """With the exact denoiser of a Gaussian and all 1,000 levels: mean and spread to 4 standard errors and the bias of
    the steps."""
    levels = np.append(TABLE.level(np.arange(1000, 0, -1) / 1000), 0.0)
    plan = solvers.make_plan("ancestral", levels, **options)
    params = {"mean": jnp.float32(0.2), "std": jnp.float32(0.5)}
    x = float(levels[0]) * jax.random.normal(jax.random.key(0), (4096, 1))
    end = sample(gaussian.gaussian_denoiser, params, x, plan, key=jax.random.split(jax.random.key(1), len(x)))
    assert float(jnp.mean(end)) == pytest.approx(0.2, abs=4 * 0.5 / 64)
    assert float(jnp.std(end)) == pytest.approx(0.5, abs=4 * 0.5 / 64 / np.sqrt(2) + 0.01)


def test_consistency_steps():
    """The function's answer, then noise up to the next level: with the exact function of a Gaussian, still the data."""
    plan = solvers.make_plan("consistency", np.array([80.0, 0.821, 0.0]))
    np.testing.assert_allclose(plan.noise, [0, np.sqrt(0.821**2 - 0.002**2)])
    assert plan.nfe == 2
    params = {"mean": jnp.float32(0.2), "std": jnp.float32(0.5)}

    def exact(params, x, sigma, cond=None, key=None):
        return gaussian.gaussian_solution(params, x, sigma, jnp.full(x.shape[:1], 0.002))

    x = 80 * jax.random.normal(jax.random.key(0), (1 << 14, 1))
    keys = jax.random.split(jax.random.key(1), len(x))
    end = sample(exact, params, x, plan, key=keys)
    assert float(jnp.std(end)) == pytest.approx(0.5, abs=4 * 0.5 / 128 / np.sqrt(2))  # 4 standard errors
    one = sample(exact, params, x, solvers.make_plan("consistency", np.array([80.0, 0.0])), key=keys)
    np.testing.assert_allclose(one, exact(params, x, jnp.full(len(x), 80.0)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("solver", "sigmas", "options", "message"),
    [
        ("ancestral", [80.0, 1.0], {}, "append 0"),
        ("ancestral", [80.0, 1.0, 0.0], {"eta": 1.5}, "expected eta in .0, 1."),
        ("ancestral", [80.0, 1.0, 0.0], {"eta": 0.5, "variance": "large"}, "eta=1 with 'large'"),
        ("ancestral", [80.0, 1.0, 0.0], {"afs": True}, "ancestral adds noise between its calls"),
        ("consistency", [80.0, 0.001, 0.0], {}, "start above epsilon=0.002"),
        ("consistency", [80.0, 1.0], {}, "end at level 0"),
    ],
)
def test_plans_that_cannot_be(solver, sigmas, options, message):
    with pytest.raises(ValueError, match=message):
        solvers.make_plan(solver, np.array(sigmas), **options)
