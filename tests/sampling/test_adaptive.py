"""Adaptive sampling: the exact flow of a Gaussian, scipy's solver of the same pair, independence of the batch."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

from diffjax import build
from diffjax.core import gaussian
from diffjax.sampling import adaptive

PARAMS = {"mean": jnp.float32(0.3), "std": jnp.float32(0.5)}
X = 80 * jax.random.normal(jax.random.key(0), (4, 3))


@pytest.mark.fast
def test_the_flow_of_a_gaussian():
    plan = adaptive.make_plan(0.01, 80.0)
    found, calls = jax.jit(lambda x: adaptive.solve(gaussian.gaussian_denoiser, PARAMS, x, plan))(X)
    ratio = np.sqrt((0.5**2 + 0.01**2) / (0.5**2 + 80.0**2))
    np.testing.assert_allclose(found, 0.3 + (X - 0.3) * ratio, atol=5e-4)  # 1e-5 (1 + |y|) a step, twenty steps
    assert np.all(calls % 6 == 1) and np.all(calls > 12) and np.all(calls < 400)
    loose = adaptive.make_plan(0.01, 80.0, rtol=1e-2, atol=1e-2)
    assert np.all(adaptive.solve(gaussian.gaussian_denoiser, PARAMS, X, loose)[1] < calls)


def test_against_scipy():
    """A denoiser without a closed form, from scipy's Dormand-Prince in float64 on the equation in sigma."""

    def denoise(params, x, sigma, cond=None, key=None):
        return jnp.tanh(x / (1 + sigma)) + cond["shift"][:, None]

    shift = np.array([0.0, 0.1, -0.2, 0.3])
    plan = adaptive.make_plan(0.01, 20.0)
    found = adaptive.sample(denoise, {}, X / 4, plan, {"shift": jnp.asarray(shift, jnp.float32)})
    for i in range(4):
        slope = lambda s, x, i=i: (x - np.tanh(x / (1 + s)) - shift[i]) / s  # noqa: E731
        expected = integrate.solve_ivp(slope, (20.0, 0.01), np.asarray(X[i] / 4, float), rtol=1e-9, atol=1e-9).y[:, -1]
        np.testing.assert_allclose(found[i], expected, atol=1e-3)  # 1e-5 a step in float32


def test_a_sample_does_not_depend_on_its_batch():
    plan = adaptive.make_plan(0.01, 80.0)
    both = adaptive.sample(gaussian.gaussian_denoiser, PARAMS, X, plan)
    alone = adaptive.sample(gaussian.gaussian_denoiser, PARAMS, X[2:3], plan)
    np.testing.assert_allclose(both[2:3], alone, rtol=1e-5)  # another batch size compiles to another order of sums


def test_the_plan_of_a_config():
    """On a run's own section, whose fixed levels fall away."""
    own = {"solver": "dopri5", "grid": "discrete", "process": "flow", "num_steps": 51, "sigma_min": 1e-4, "sigma_max": 9999.0}
    plan = build.plan(own | {"rtol": 1e-4})
    assert plan.nfe is None and plan.rtol == 1e-4 and plan.sigmas.tolist() == [9999.0, 1e-4]
    assert build.runs.sampler_for(plan) is adaptive.sample
    with pytest.raises(ValueError, match="unknown option 's_churn' of sample"):
        build.plan(own | {"s_churn": 1.0})


def test_errors(monkeypatch):
    for options, message in (
        ({"sigma_min": 3.0, "sigma_max": 1.0}, "found 1.0 and 3.0"),
        ({"rtol": 1e-9}, "1e-6 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            adaptive.make_plan(**options)
    with pytest.raises(ValueError, match="takes neither a key"):
        adaptive.sample(gaussian.gaussian_denoiser, PARAMS, X, adaptive.make_plan(), key=jax.random.key(0))
    monkeypatch.setitem(sys.modules, "diffrax", None)
    with pytest.raises(ImportError, match=r"pip install 'diffjax\[ode\]'"):
        adaptive.sample(gaussian.gaussian_denoiser, PARAMS, X, adaptive.make_plan())
