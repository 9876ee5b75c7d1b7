"""Four paradigms behind one interface: the loss of each by hand, its levels, its sampler, and its recipes."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import build
from diffjax.build import networks
from diffjax.cli import flags
from diffjax.core import gaussian, noise_levels, paradigms
from diffjax.core.trees import count
from diffjax.data.sources import DataShape
from diffjax.methods import edm
from diffjax.sampling.sample import sample

CONFIGS = Path(__file__).parents[2] / "configs" / "conditioning"
NUM = 64
IMAGE, NOISE = (jax.random.normal(jax.random.key(seed), (NUM, 4, 4, 1)) for seed in (0, 1))
ABAR = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)  # specification, 3


def network(params, x, label, cond=None, key=None):
    return jnp.sin(3 * x) + jnp.cos(0.01 * label)[:, None, None, None]


def by_hand(name, image, noise, sigma):
    """The squared error of the paradigm's target, in its own variables (specification, 3; Karras 2022, table 1)."""
    if name == "edm":
        total = sigma**2 + 0.25
        skip, out = 0.25 / total, 0.5 * sigma / total**0.5
        noisy = image + sigma * noise
        return (network({}, noisy / total**0.5, jnp.log(sigma)[:, 0, 0, 0] / 4) - (image - skip * noisy) / out) ** 2
    if name == "flow":
        u = sigma / (1 + sigma)
        return (network({}, (1 - u) * image + u * noise, 1000 * u[:, 0, 0, 0]) - (noise - image)) ** 2
    t = np.abs(np.sqrt(1 / ABAR - 1) - np.asarray(sigma)[:, :, 0, 0]).argmin(axis=1)
    abar = jnp.asarray(ABAR[t])[:, None, None, None]
    xt = jnp.sqrt(abar) * image + jnp.sqrt(1 - abar) * noise
    target = {"ddpm_eps": noise, "ddpm_v": jnp.sqrt(abar) * noise - jnp.sqrt(1 - abar) * image}[name]
    return (network({}, xt, jnp.asarray(t, jnp.float64)) - target) ** 2


@pytest.mark.parametrize("name", [pytest.param("ddpm_eps", marks=pytest.mark.fast), "ddpm_v", "edm", "flow"])
def test_loss_by_hand(name, x64):
    """At levels that the paradigm's own training draws."""
    of = paradigms.sections(name, 50)
    wrap, *_ = networks._parts({"name": "residual_mlp", "width": 16, **of["model"]}, DataShape(4, 1, 0))
    settings = edm.Settings(**of["method"])
    drawn = noise_levels.draw(jax.random.key(2), NUM, settings.distribution, **settings.distribution_options)
    image, noise, sigma = (jnp.asarray(a, jnp.float64) for a in (IMAGE, NOISE, drawn))
    found = edm.loss(settings, wrap(network), {}, image, sigma, noise)
    # levels are drawn in float32, from which the hand's exact table differs by 1e-7, and labels follow it
    np.testing.assert_allclose(found, by_hand(name, image, noise, sigma[:, None, None, None]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", paradigms.PARADIGMS)
def test_levels_of_training(name):
    method = paradigms.sections(name, 50)["method"]
    options = method.get("distribution_options", {})
    drawn = noise_levels.draw(jax.random.key(0), 20_000, method["distribution"], **options)
    if name.startswith("ddpm"):
        index = np.searchsorted(np.sqrt(1 / ABAR - 1), np.asarray(drawn) * (1 - 1e-6))
        # uniform over 0 .. 999: mean and deviation to 1 % (standard error 0.4 %)
        np.testing.assert_allclose([index.mean(), index.std()], [499.5, 1000 / 12**0.5], rtol=1e-2)
        assert index.min() == 0 and index.max() == 999
        return
    logs = np.log(drawn)  # of the flow the logit of u
    np.testing.assert_allclose([logs.mean(), logs.std()], {"edm": [-1.2, 1.2], "flow": [0, 1]}[name], atol=0.03)


@pytest.mark.parametrize("calls", [50, 249])
@pytest.mark.parametrize("name", paradigms.PARADIGMS)
def test_one_way_of_sampling(name, calls):
    """Each plan takes Gaussian data's exact denoiser to its deviation, with the calls it was asked for."""
    plan = build.plan(paradigms.sections(name, calls)["sample"])
    assert calls - 1 <= plan.nfe <= calls
    start = plan.sigmas[0] * jax.random.normal(jax.random.key(0), (20_000, 1))
    params = {"mean": 0.0, "std": 0.5}
    ended = sample(gaussian.gaussian_denoiser, params, start.astype(jnp.float32), plan)
    # Euler steps shrink the deviation by about 1 / calls; the tables of latent diffusion start from 14.6, not from all
    # noise, which is 0.1 %
    assert abs(float(jnp.std(ended)) / 0.5 - 1) < 2 / calls + 0.015


@pytest.mark.parametrize("name", paradigms.PARADIGMS)
def test_levels_of_sampling(name):
    """First and last before 0: of the table, to the digits that a config names; Karras 2022; u = 0.999 and 0.001."""
    levels = np.asarray(build.plan(paradigms.sections(name, 50)["sample"]).sigmas)
    table = np.sqrt(1 / ABAR[[-1, 0]] - 1)
    expected = {"edm": [80, 0.002], "flow": [999, 0.001]}.get(name, table)
    np.testing.assert_allclose(levels[[0, -2]], expected, rtol=2e-3)
    assert levels[-1] == 0


@pytest.mark.parametrize("name", paradigms.PARADIGMS)
@pytest.mark.parametrize("data", ["imagenet", "cc12m"])
def test_recipes(data, name):
    """Both files build each paradigm: the same network, other sections."""
    config = flags.load_config(f"{CONFIGS / data}.py:mmdit_512_improved_{name}")
    base = flags.load_config(f"{CONFIGS / data}.py:mmdit_512_improved")
    assert ("_" + name in config.method.start) == (name != "ddpm_eps")
    assert (config.to_dict() == base.to_dict()) == (name == "ddpm_eps")
    shape = build.data_shape(config.data)
    _, init = build.denoiser(build.resolve(config).model, shape)
    params = jax.eval_shape(init, jax.random.key(0))
    assert count(params) == count(jax.eval_shape(build.denoiser(base.model, shape)[1], jax.random.key(0)))
