"""Training draws of the noise level: closed forms, ranges, moments, names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import noise_levels, schedules

UNIFORM = np.array([0.0, 0.25, 0.5, 0.999])
NORMAL = np.array([-2.0, 0.0, 0.5, 3.0])


@pytest.mark.fast
def test_closed_forms(x64):
    uniform, normal = jnp.asarray(UNIFORM), jnp.asarray(NORMAL)
    time = 1 - UNIFORM * (1 - 1e-5)
    flow = 1 / (1 + np.exp(-(0.3 + 0.8 * NORMAL)))
    straight = 1e-4 + UNIFORM * (1 - 2e-4)
    cases = [
        (noise_levels.lognormal(normal), np.exp(-1.2 + 1.2 * NORMAL)),
        (noise_levels.lognormal(normal, -0.4, 1.0), np.exp(-0.4 + NORMAL)),
        (noise_levels.vp(uniform), np.sqrt(np.exp(9.95 * time**2 + 0.1 * time) - 1)),
        (noise_levels.ve(uniform), np.exp(np.log(0.02) + UNIFORM * np.log(5000))),
        (noise_levels.polynomial(uniform, 0.01, 50.0, 5.0), (50**0.2 + UNIFORM * (0.01**0.2 - 50**0.2)) ** 5),
        (noise_levels.polynomial(uniform, low=0.5, high=0.5), np.full(4, ((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7)),
        (noise_levels.logit_normal(normal, 0.3, 0.8), flow / (1 - flow)),
        (noise_levels.uniform_flow(uniform), straight / (1 - straight)),
        (noise_levels.discrete(uniform), np.sqrt(1 / schedules.linear()[[0, 250, 500, 999]] - 1)),
    ]
    for found, expected in cases:
        np.testing.assert_allclose(found, expected, rtol=1e-10)  # float64; 1 - flow loses digits near 1


@pytest.mark.parametrize("name", noise_levels.DISTRIBUTIONS)
def test_draws_are_float32_within_range_and_follow_the_key(name):
    draw = jax.jit(lambda key: noise_levels.draw(key, 4096, name))
    sigma = draw(jax.random.key(0))
    assert sigma.shape == (4096,) and sigma.dtype == jnp.float32
    assert np.all(np.isfinite(sigma)) and np.all(sigma > 0)
    low, high = {"vp": (9.9e-4, 152.2), "ve": (0.02, 100.0), "polynomial": (0.002, 80.0), "uniform_flow": (0.99e-4, 1.01e4)}.get(name, (0, np.inf))
    assert low <= sigma.min() and sigma.max() <= high * (1 + 1e-5)  # float32 powers
    assert not np.array_equal(sigma, draw(jax.random.key(1)))
    assert np.array_equal(sigma, draw(jax.random.key(0)))


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [("lognormal", -1.2, 1.2), ("logit_normal", 0.0, 1.0), ("ve", np.log(2) / 2, np.log(5000) / np.sqrt(12))],
)
def test_moments_of_log_sigma(name, mean, std):
    num = 1 << 16
    log_sigma = np.log(np.asarray(noise_levels.draw(jax.random.key(3), num, name), np.float64))
    # 5 standard errors of the mean; the standard deviation's own error is smaller still for these two shapes
    assert abs(log_sigma.mean() - mean) < 5 * std / np.sqrt(num)
    assert abs(log_sigma.std() - std) < 5 * std / np.sqrt(num)


def test_options_reach_the_distribution():
    key = jax.random.key(0)
    plain, moved = (noise_levels.draw(key, 8, "lognormal", p_mean=mean) for mean in (-1.2, -0.2))
    np.testing.assert_allclose(moved / plain, np.e, rtol=1e-5)  # float32 exponentials


@pytest.mark.parametrize("name", noise_levels.DISTRIBUTIONS)
def test_a_resolution_scale_multiplies_every_draw(name):
    key = jax.random.key(0)
    np.testing.assert_array_equal(
        noise_levels.draw(key, 64, name, resolution_scale=2.0), 2 * noise_levels.draw(key, 64, name)
    )
    with pytest.raises(ValueError, match="found resolution_scale=0, expected above 0"):
        noise_levels.check(name, {"resolution_scale": 0})


def test_a_rescaled_table_is_drawn_at_its_knots():
    found = np.unique(noise_levels.draw(jax.random.key(0), 1 << 15, "discrete", resolution_scale=2.0))
    table = schedules.table("linear", 2.0)
    # 1000 levels, each missed by 32768 draws with a probability of e^-33; float32
    np.testing.assert_allclose(found, table.level(np.arange(1, 1001) / 1000), rtol=2e-7)


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match="unknown noise distribution 'log_normal'; did you mean 'lognormal'"):
        noise_levels.draw(jax.random.key(0), 2, "log_normal")
    with pytest.raises(ValueError, match="unknown option 'pmean' of noise distribution .*; did you mean 'p_mean'"):
        noise_levels.check("lognormal", {"pmean": 0.0})
