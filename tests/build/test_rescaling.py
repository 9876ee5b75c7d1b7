"""One number rescales a network's process, its training and its sampling; anything else is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from quick_runs import small

from diffjax import build
from diffjax.build import networks, runs
from diffjax.core import noise_levels, schedules
from diffjax.methods import edm, variance_bound
from diffjax.runtime import configs

KINDS = [("eps", "linear"), ("v", "scaled_linear"), ("x0", "cosine"), ("velocity", "flow"), ("edm", "")]


def sections(precondition="eps", process="linear", **model):
    """A config of a residual MLP on digits with the levels of `process`."""
    sample = {"solver": "euler", "num_steps": 5, "sigma_min": 0.1, "sigma_max": 10.0, "to_zero": True}
    if process:
        sample |= {"grid": "discrete", "process": process}
    variant = "edm_digits.py"
    config = small(variant, model__precondition=precondition)
    config.model.update({**model, **({"process": process} if process else {})})
    config.sample = ConfigDict(sample)
    return config


def labels(model, sigmas):
    """What a network is told along noise levels, and what it sees of noise alone."""
    told = []

    def network(params, x, label, cond=None, key=None):
        told.append((float(label[0]), float(jnp.std(x))))
        return jnp.zeros_like(x)

    kind = {key: model[key] for key in ("process", "resolution_scale") if key in model}
    denoise = networks.PRECONDITIONS[model["precondition"]](network, **kind)
    noise = jax.random.normal(jax.random.key(0), (1, 64, 64))
    for sigma in sigmas:
        denoise({}, sigma * noise, jnp.float32(sigma))
    return np.array(told).T


@pytest.mark.fast
@pytest.mark.parametrize(("precondition", "process"), KINDS)
def test_sampling_visits_the_times_of_pre_training(precondition, process):
    """The same labels along the plan, at levels twice as high; no sampler meets a level that training never drew."""
    before, after = (runs.resolve(sections(precondition, process, resolution_scale=scale)) for scale in (1.0, 2.0))
    plans = [build.plan(config.sample) for config in (before, after)]
    coarse, fine = (np.asarray(plan.sigmas)[:-1] for plan in plans)
    # float32, and tables interpolate between trained levels: 1e-4 of a level
    np.testing.assert_allclose(fine, 2 * coarse, rtol=1e-4)
    told, seen = zip(*(labels(c.model, s) for c, s in zip((before, after), (coarse, fine), strict=True)), strict=True)
    # a float32 index of order 1000, found from a level
    np.testing.assert_allclose(told[1], told[0], rtol=1e-4, atol=1e-2 if process.endswith("linear") else 1e-6)
    assert np.all(seen[1] <= 1.05) and np.all(seen[1] > seen[0])
    low, high = (noise_levels.draw(jax.random.key(0), 64, "lognormal", **c.method.get("distribution_options", {}))
                 for c in (before, after))  # fmt: skip
    np.testing.assert_allclose(high, 2 * low, rtol=1e-6)


def test_what_follows_is_written_out_once():
    config = sections(resolution_scale=2.0)
    resolved = runs.resolve(config)
    assert "resolution_scale" not in config.sample and "distribution_options" not in config.method
    assert resolved.sample.resolution_scale == resolved.method.distribution_options.resolution_scale == 2.0
    assert configs.to_plain(runs.resolve(resolved)) == configs.to_plain(resolved)
    unscaled = sections()
    assert configs.to_plain(runs.resolve(unscaled)) == configs.to_plain(unscaled)


def test_every_level_of_a_sample_section_follows():
    section = {"solver": "dopri5", "sigma_min": 0.1, "sigma_max": 10.0, "resolution_scale": 2.0}
    plain, rescaled = build.plan({**section, "resolution_scale": 1.0}), build.plan(section)
    np.testing.assert_allclose(rescaled.sigmas, 2 * np.asarray(plain.sigmas), rtol=1e-6)  # float32
    churn = {"solver": "edm_stochastic", "num_steps": 5, "s_churn": 10.0, "s_min": 0.5, "s_max": 5.0, "sigma_min": 0.1}
    plain, rescaled = (build.plan({**churn, "sigma_max": 10.0, "resolution_scale": scale}) for scale in (1.0, 2.0))
    np.testing.assert_allclose(rescaled.noise, 2 * np.asarray(plain.noise), rtol=1e-5)  # the noise that churn adds


@pytest.mark.parametrize("process", ["linear", "flow"])
def test_what_depends_on_the_time_has_that_of_pre_training(process):
    """Guidance that rises, and the weight of low-level metadata; at a trained level, where tables are exact."""
    level = jnp.float32(schedules.named(process).level(np.float64(0.4)))
    scales = [runs._power_cosine(process, 4.0, scale)(3.0, scale * level) for scale in (1.0, 2.0)]
    np.testing.assert_allclose(scales[1], scales[0], rtol=1e-5)  # float32
    tell = [networks._teller({"low": ("height",)}, None, process, scale) for scale in (1.0, 2.0)]
    told = [tell({}, jnp.zeros((1, 1)), scale * level, None)["u"] for tell, scale in zip(tell, (1.0, 2.0), strict=True)]
    np.testing.assert_allclose(told[1], told[0], rtol=1e-5)


def test_a_learned_variance_is_bounded_on_the_rescaled_table():
    """Its steps are those of the levels that training draws: the bound of `variance_bound` on that table."""
    options = {"process": "linear", "resolution_scale": 2.0}
    settings = edm.Settings(distribution="discrete", distribution_options=options, weighting="eps", variance_weight=1.0)
    sigma = noise_levels.draw(jax.random.key(0), 4, "discrete", **options)
    image, noise, data, fraction = jax.random.uniform(jax.random.key(1), (4, 4, 2, 2, 1))
    found = edm.hybrid_loss(settings, lambda *_: (data, fraction), {}, image, sigma, noise)
    wide = (slice(None), None, None, None)
    noisy = image + sigma[wide] * noise
    bits = variance_bound.bound(schedules.table("linear", 2.0), image, noisy, sigma, data, fraction)
    np.testing.assert_allclose(found, ((data - image) / sigma[wide]) ** 2 + 1000 * bits[wide], rtol=1e-5)  # float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.sample.update(resolution_scale=1.0),
         r"found model.resolution_scale=2.0 and \{'sample.resolution_scale': 1.0\}"),
        (lambda c: c.method.update(distribution_options={"resolution_scale": 1.0}),
         "'method.distribution_options.resolution_scale': 1.0"),
        (lambda c: (c.model.update(resolution_scale=1.0), c.sample.update(resolution_scale=2.0)),
         r"found model.resolution_scale=1.0 and \{'sample.resolution_scale': 2.0\}.*Set model.resolution_scale alone"),
        (lambda c: c.method.update(name="consistency"), "method 'consistency', whose noise levels are its own options"),
        (lambda c: c.model.update(precondition="ve"), r"\['edm', 'eps', 'x0', 'v', 'velocity'\], found 've'"),
        (lambda c: c.model.update(resolution_scale=-1.0), "found resolution_scale=-1.0, expected above 0"),
    ],
)  # fmt: skip
def test_other_combinations_are_refused(change, message):
    config = sections("eps", "", resolution_scale=2.0)
    change(config)
    with pytest.raises(ValueError, match=message):
        build.experiment(config)
