"""Exact denoisers against quadrature, and the exact path against its own equation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import gaussian


@pytest.mark.fast
def test_gaussian_denoiser_is_the_posterior_mean(x64):
    mean, std, sigma, x = 0.3, 0.5, 0.8, 1.1
    x0 = np.linspace(-8, 8, 20001)
    density = np.exp(-((x0 - mean) ** 2) / (2 * std**2) - (x - x0) ** 2 / (2 * sigma**2))
    expected = np.sum(x0 * density) / np.sum(density)
    params = {"mean": jnp.float64(mean), "std": jnp.float64(std)}
    # the trapezoid rule on a Gaussian that ends far inside the interval is exact to rounding
    assert float(gaussian.gaussian_denoiser(params, jnp.full((1, 1), x), sigma)[0, 0]) == pytest.approx(expected, rel=1e-12)


def test_mixture_denoiser_is_the_posterior_mean(x64):
    means, stds, weights = np.array([-1.0, 0.4, 2.0]), np.array([0.2, 0.5, 0.3]), np.array([0.2, 0.5, 0.3])
    params = {"mean": jnp.asarray(means)[:, None], "std": jnp.asarray(stds), "weight": jnp.asarray(weights)}
    x, sigma = np.array([-0.9, 0.1, 1.5]), np.array([0.3, 0.7, 2.0])
    x0 = np.linspace(-15, 15, 60001)[None, :]
    prior = sum(w * np.exp(-((x0 - m) ** 2) / (2 * s**2)) / s for m, s, w in zip(means, stds, weights, strict=True))
    density = prior * np.exp(-((x[:, None] - x0) ** 2) / (2 * sigma[:, None] ** 2))
    expected = np.sum(x0 * density, axis=1) / np.sum(density, axis=1)
    found = gaussian.mixture_denoiser(params, jnp.asarray(x)[:, None], jnp.asarray(sigma))[:, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-11)  # quadrature, exact to rounding of 60001 terms


def test_a_mixture_of_one_is_the_gaussian(x64):
    mean = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 3, 4)))
    sigma = jnp.array([0.1, 1.0, 2.0, 30.0, 80.0])
    one = {"mean": mean[None], "std": jnp.array([0.5]), "weight": jnp.array([1.0])}
    np.testing.assert_allclose(
        gaussian.mixture_denoiser(one, x, sigma),
        gaussian.gaussian_denoiser({"mean": mean, "std": 0.5}, x, sigma),
        rtol=1e-12,  # the same formula, other order of operations
        atol=1e-14,
    )


def test_the_exact_path_satisfies_the_ode(x64):
    params = {"mean": jnp.float64(0.1), "std": jnp.float64(0.5)}
    x = jnp.array([[2.0, -1.0]])
    sigma = jnp.float64(3.0)
    state, slope = jax.jvp(lambda s: gaussian.gaussian_solution(params, x, 20.0, s), (sigma,), (jnp.float64(1.0),))
    expected = (state - gaussian.gaussian_denoiser(params, state, sigma)) / sigma
    np.testing.assert_allclose(slope, expected, rtol=1e-12)  # rounding of float64


def test_mixture_samples_have_the_moments_of_the_mixture():
    params = {"mean": jnp.array([[-2.0], [1.0]]), "std": jnp.array([0.1, 0.5]), "weight": jnp.array([0.25, 0.75])}
    draws = np.asarray(gaussian.mixture_sample(params, jax.random.key(0), 20000))
    assert draws.shape == (20000, 1)
    variance = 0.25 * (0.01 + 4) + 0.75 * (0.25 + 1) - 0.25**2
    # five standard errors of the mean and of the variance (fourth moment below 20)
    assert draws.mean() == pytest.approx(0.25, abs=5 * np.sqrt(variance / 20000))
    assert draws.var() == pytest.approx(variance, abs=5 * np.sqrt(20 / 20000))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_type_of_the_state_comes_back(dtype):
    x = jnp.ones((2, 3), dtype)
    params = {"mean": jnp.zeros(()), "std": jnp.ones(())}
    assert gaussian.gaussian_denoiser(params, x, 1.0).dtype == dtype
    assert gaussian.gaussian_denoiser(params, x, jnp.ones(2)).shape == (2, 3)


def test_wrong_number_of_levels():
    params = {"mean": jnp.zeros(()), "std": jnp.ones(())}
    with pytest.raises(ValueError, match="one per sample"):
        gaussian.gaussian_denoiser(params, jnp.ones((2, 3)), jnp.ones(3))
