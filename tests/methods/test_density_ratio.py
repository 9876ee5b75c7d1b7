"""The learned density ratio, and the forward KL that it makes of Diff-Instruct."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax.core import gaussian
from diffjax.methods import density_ratio, emd
from diffjax.methods.emd_chain import StepSizes, Weights
from diffjax.methods.update import Update

P, Q = {"mean": jnp.float32(0.5), "std": 0.6}, {"mean": jnp.float32(-0.25), "std": 0.6}
SIGMA = 0.8


def sample(params, key, num):
    return params["mean"] + params["std"] * jax.random.normal(key, (num, 1))


def linear(params, teacher, x, sigma, cond):
    return params["slope"] * x[:, 0] + params["offset"]


RATIO = density_ratio.Ratio(
    linear, lambda key: {"slope": jnp.zeros(()), "offset": jnp.zeros(())}, Update(optax.identity(), lambda iteration: 0.5)
)


@pytest.mark.fast
def test_it_learns_the_ratio_of_two_gaussians():
    """Equal spreads: log p/q is linear, slope (m_p - m_q) / v and offset (m_q^2 - m_p^2) / 2v at v = s^2 + sigma^2."""
    num, sigma = 4096, jnp.full(4096, SIGMA)

    def body(state, this):
        index, key = this
        keys = jax.random.split(key, 4)
        real, fake = (
            sample(params, a, num) + SIGMA * jax.random.normal(b, (num, 1))
            for params, a, b in ((P, keys[0], keys[1]), (Q, keys[2], keys[3]))
        )
        state, factors, _ = density_ratio.step(RATIO, state, {}, (real, {}), (fake, {}), sigma, index)
        return state, (state.params, jnp.mean(factors))

    start = density_ratio.start(RATIO, jax.random.key(0))
    steps = jnp.arange(300), jax.random.split(jax.random.key(1), 300)
    _, (path, means) = jax.lax.scan(body, start, steps)
    found = {name: float(jnp.mean(values[100:])) for name, values in path.items()}
    v = 0.6**2 + SIGMA**2
    # the mean of 200 correlated iterates of plain gradient descent, each off by about 0.03
    assert found["slope"] == pytest.approx(0.75 / v, abs=0.02)
    assert found["offset"] == pytest.approx((0.25**2 - 0.5**2) / (2 * v), abs=0.02)
    np.testing.assert_allclose(means, 1, rtol=1e-5)  # float32 means


def test_factors_are_bounded_and_of_the_weights_before_the_step():
    state = density_ratio.RatioState({"slope": jnp.float32(100.0), "offset": jnp.float32(0.0)}, optax.EmptyState())
    x, sigma = jnp.array([[-1.0], [0.0], [1.0]]), jnp.ones(3)
    _, factors, metrics = density_ratio.step(RATIO, state, {}, (x, {}), (x, {}), sigma, jnp.int32(0))
    bounded = np.exp([-5.0, 0.0, 5.0])
    np.testing.assert_allclose(factors, bounded / bounded.mean(), rtol=1e-6)
    assert np.isfinite(metrics["ratio_loss"])


def test_weighted_by_the_exact_ratio_diff_instruct_is_maximum_likelihood(x64):
    """A generator g = m + s z: the gradient of KL(p | q) in m is -(m_p - m) / v, with v the noisy variance of q; without
    the factors that of KL(q | p), -(m_p - m) / v_p. The variances differ, so the two do."""
    num, sigma = 1 << 18, 0.75
    generator, teacher = {"mean": jnp.array(-0.2), "std": jnp.array(0.5)}, {"mean": jnp.array(0.4), "std": jnp.array(0.7)}
    q, p = 0.5**2 + sigma**2, 0.7**2 + sigma**2

    def denoise(params, x, level, cond=None, key=None):
        latent = x / level[0]
        g = params["mean"] + params["std"] * latent
        # at the generator's own level (5) it is the generator, elsewhere the exact denoiser of its samples
        return jnp.where(level[0] == 5.0, g, gaussian.gaussian_denoiser(params, x, level))

    settings = emd.Settings(
        batch_size=num, image_shape=(1,), langevin_steps=1, scheme="eps", distribution="ve", weighting="unit"
    )
    gradient = emd.make_gradient(settings, gaussian.gaussian_denoiser, denoise)
    z, eps = jax.random.normal(jax.random.key(0), (2, num, 1), jnp.float64)
    x = generator["mean"] + generator["std"] * z + sigma * eps
    log_ratio = -((x - 0.4) ** 2) / (2 * p) + (x + 0.2) ** 2 / (2 * q) + 0.5 * np.log(q / p)
    factors = jnp.exp(log_ratio[:, 0])
    keys = jax.random.split(jax.random.key(1), num)
    rest = jnp.full(num, sigma), {}, keys, StepSizes(0.5, 0.0), None
    found = [
        float(gradient(Weights(teacher, generator, generator), z, eps, *rest, weight)[0]["mean"])
        for weight in (factors, None)
    ]
    # eq. 2 with rate 1/2 and w~ = 1 is sigma^2 times the gradient of the KL
    expected = [-(sigma**2) * 0.6 / variance for variance in (q, p)]
    # per-sample values are of order 1: 5 standard errors of 2^18 samples
    np.testing.assert_allclose(found, expected, atol=5 / np.sqrt(num))
