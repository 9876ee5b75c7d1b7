"""Learned variance: diffusers' log variance, torch's divergences, and what the hybrid loss and the sampler do with it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax import build
from diffjax.core import gaussian, schedules
from diffjax.data.sources import DataShape
from diffjax.methods import edm, variance_bound
from diffjax.sampling import learned_variance
from diffjax.sampling.sample import sample

TABLE = schedules.table("linear")
SHAPE = (2, 2, 1)


def level(k):
    return TABLE.level(np.asarray(k) / 1000)


@pytest.mark.parametrize("v", [0.0, 0.3, 1.0])
def test_log_variance_is_diffusers(v):
    """DDPMScheduler's "learned_range", for all steps but the first, in the scale of x_{t-1}."""
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(1000, variance_type="learned_range")
    steps = np.array([2, 3, 50, 500, 1000])
    small, large = (np.asarray(a) for a in learned_variance.log_variances(level(steps), level(steps - 1)))
    ours = v * large + (1 - v) * small - np.log1p(level(steps - 1) ** 2)
    import torch

    expected = [float(theirs._get_variance(int(k) - 1, torch.tensor(2 * v - 1))) for k in steps]
    np.testing.assert_allclose(ours, expected, rtol=2e-4)  # theirs sums the table in float32


@pytest.mark.fast
@pytest.mark.parametrize("k", [1, 2, 40, 1000])
def test_bound_is_torchs_divergence(k):
    import torch
    from torch.distributions import Normal, kl_divergence

    random = np.random.default_rng(k)
    x0 = np.round(random.uniform(-1, 1, (3, *SHAPE)) * 127.5) / 127.5
    x0[0, 0, 0, 0], x0[0, 0, 1, 0] = -1, 1
    noise, v = random.normal(size=x0.shape), random.uniform(size=x0.shape)
    data = x0 + 0.1 * random.normal(size=x0.shape)
    s = float(level(k))
    with jax.enable_x64(True):
        found = variance_bound.bound(TABLE, *map(jnp.asarray, (x0, x0 + s * noise, np.full(3, s), data, v)))
    r2 = 0.0 if k == 1 else float(level(k - 1)) ** 2
    beta = 1 - (1 + r2) / (1 + s**2)  # of step k, in DDPM's own variables, where x_{k-1} = sqrt(abar) (x0 + r n)
    posterior = beta * r2 / (1 + r2) / (s**2 / (1 + s**2))
    if k == 1:
        q2, p2 = float(level(2)) ** 2, float(level(1)) ** 2
        posterior = (1 - (1 + p2) / (1 + q2)) * p2 / (1 + p2) / (q2 / (1 + q2))
    std = np.exp((v * np.log(beta) + (1 - v) * np.log(posterior)) / 2)
    if k == 1:
        normal = Normal(torch.tensor(data), torch.tensor(std))
        upper, lower = normal.cdf(torch.tensor(x0 + 1 / 255)).numpy(), normal.cdf(torch.tensor(x0 - 1 / 255)).numpy()
        upper[x0 == 1], lower[x0 == -1] = 1, 0
        expected = -np.log(np.maximum(upper - lower, 1e-12))
    else:
        mean = lambda x: np.sqrt(1 / (1 + r2)) * (r2 / s**2 * (x0 + s * noise) + (1 - r2 / s**2) * x)  # noqa: E731
        true = Normal(torch.tensor(mean(x0)), torch.full(x0.shape, posterior**0.5, dtype=torch.float64))
        expected = kl_divergence(true, Normal(torch.tensor(mean(data)), torch.tensor(std))).numpy()
    np.testing.assert_allclose(found, expected.mean(axis=(1, 2, 3)) / np.log(2), rtol=1e-6)


def model():
    config = {"name": "ddpmpp", "precondition": "eps", "learned_variance": True, "channels": 8, "channel_mult": (1,)}
    return config | {"num_blocks": 1, "attention_sizes": (), "dropout": 0.0}


def test_the_bound_trains_the_variance_alone():
    """Without it the hybrid loss is the usual one, and its gradient on D is none."""
    shape = DataShape(8, 1)
    denoise, init = build.denoiser(model(), shape)
    variance = build.networks.variance_denoiser(model(), shape)
    params = jax.tree.map(lambda a: a + 0.05 * jax.random.normal(jax.random.key(1), a.shape), init(jax.random.key(0)))
    x0 = jnp.clip(jax.random.normal(jax.random.key(2), (4, 8, 8, 1)), -1, 1)
    noise, sigma = jax.random.normal(jax.random.key(3), x0.shape), jnp.asarray(level([1, 5, 300, 900]), jnp.float32)
    settings = edm.Settings(distribution="discrete", weighting="eps", variance_weight=0.0)
    plain = edm.loss(settings, denoise, params, x0, sigma, noise)
    assert plain.shape == x0.shape
    np.testing.assert_allclose(edm.hybrid_loss(settings, variance, params, x0, sigma, noise), plain, rtol=1e-5)
    noisy = x0 + sigma[:, None, None, None] * noise

    def bound(data, v):
        return jnp.sum(variance_bound.bound(TABLE, x0, noisy, sigma, data, v))

    data, v = variance(params, noisy, sigma)
    to_data, to_v = jax.grad(bound, argnums=(0, 1))(data, v)
    assert not np.any(to_data) and np.all(np.isfinite(to_v)) and np.any(to_v)


def test_a_step_and_its_refusal():
    shape = DataShape(8, 1)
    denoise, init = build.denoiser(model(), shape)
    variance = build.networks.variance_denoiser(model(), shape)
    settings = edm.Settings(distribution="discrete", weighting="eps")
    method = edm.make(settings, denoise, optax.scale_by_adam(), lambda i: jnp.float32(1e-3), variance=variance)
    state = method.init(init(jax.random.key(0)))
    state, metrics = jax.jit(method.step)(state, {}, {"image": jnp.zeros((4, 8, 8, 1))}, jax.random.key(1), jnp.int32(0))
    assert np.isfinite(metrics["loss"]) and metrics["nonfinite_leaf"] == -1
    with pytest.raises(ValueError, match="needs the levels of a table, found distribution='lognormal'"):
        edm.make(edm.Settings(), denoise, optax.scale_by_adam(), lambda i: 0.1, variance=variance)


@pytest.mark.parametrize(("v", "name"), [(0.0, "small"), (1.0, "large")])
def test_the_ends_of_the_range_are_ddpms_two_variances(v, name):
    """v = 0 and 1 sample as the fixed ones, from the same keys."""
    levels = np.append(level(np.arange(1000, 0, -100)), 0.0)
    params = {"mean": jnp.float32(0.2), "std": jnp.float32(0.5)}
    both = lambda *args: (gaussian.gaussian_denoiser(*args), jnp.full_like(args[1], v))  # noqa: E731
    follow = learned_variance.make_sampler(both)
    x = float(levels[0]) * jax.random.normal(jax.random.key(0), (5, 3))
    keys = jax.random.split(jax.random.key(1), 5)
    found = follow(gaussian.gaussian_denoiser, params, x, learned_variance.make_plan(levels), key=keys)
    plan = build.runs.solvers.make_plan("ancestral", levels, variance=name)
    expected = sample(gaussian.gaussian_denoiser, params, x, plan, noise=_same_noise(keys, x))
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)  # float32; the noise is added a row later there
    heun = build.runs.solvers.make_plan("ddim", levels)
    np.testing.assert_array_equal(
        follow(gaussian.gaussian_denoiser, params, x, heun), sample(gaussian.gaussian_denoiser, params, x, heun)
    )


def _same_noise(keys, x):
    draw = lambda key, step: jax.random.normal(jax.random.fold_in(key, step), x.shape[1:], x.dtype)  # noqa: E731
    return lambda step: jax.vmap(draw, in_axes=(0, None))(keys, step - 1)


def test_the_plan_of_a_config():
    section = {"solver": "ancestral", "variance": "learned", "grid": "discrete", "process": "linear", "num_steps": 5}
    plan = build.plan(section | {"sigma_min": 0.01, "sigma_max": 157.4})
    assert isinstance(plan, learned_variance.LearnedVariancePlan) and plan.nfe == 5 and plan.sigmas[-1] == 0
