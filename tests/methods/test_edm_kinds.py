"""DDPM and flow matching as settings of `methods.edm`: the losses of their papers, in their own variables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.build import networks
from diffjax.core import schedules
from diffjax.data.sources import DataShape
from diffjax.methods import edm

NUM = 64
DATA = DataShape(4, 1, 0)
IMAGE, NOISE = (jax.random.normal(jax.random.key(seed), (NUM, 4, 4, 1)) for seed in (0, 1))


def seen_and_predicted(kind, process):
    """A `model` section's denoiser, with a network that keeps what it is fed."""
    fed = {}

    def network(params, x, label, cond=None, key=None):
        fed.update(x=x, label=label)
        return jnp.sin(3 * x) + 0.1 * label[:, None, None, None]

    wrap, *_ = networks._parts(
        {"name": "residual_mlp", "width": 16, "precondition": kind, "process": process, "label_scale": 0.5}, DATA
    )
    return wrap(network), network, fed


@pytest.mark.fast
@pytest.mark.parametrize("process", ["linear", "cosine", "scaled_linear"])
@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
def test_ddpm(kind, process, x64):
    """|eps - F|^2, |v - F|^2 or |x0 - F|^2 at x_t = sqrt(abar) x0 + sqrt(1 - abar) eps and the label t = 0..T-1."""
    denoise, network, fed = seen_and_predicted(kind, process)
    image, noise = (jnp.asarray(a, jnp.float64) for a in (IMAGE, NOISE))
    betas = {
        "linear": schedules.linear(), "cosine": schedules.cosine(), "scaled_linear": schedules.scaled_linear(0.00085, 0.012)
    }[process]  # fmt: skip
    t = np.random.default_rng(0).integers(0, 990, NUM)  # the cosine's last levels leave no digits of x0
    abar = jnp.asarray(betas[t])[:, None, None, None]
    xt = jnp.sqrt(abar) * image + jnp.sqrt(1 - abar) * noise
    target = {"eps": noise, "x0": image, "v": jnp.sqrt(abar) * noise - jnp.sqrt(1 - abar) * image}[kind]
    expected = (network({}, xt, 0.5 * t) - target) ** 2
    settings = edm.Settings(weighting={"eps": "eps", "v": "v", "x0": "unit"}[kind])
    sigma = jnp.sqrt(1 / abar - 1)[:, 0, 0, 0]
    found = edm.loss(settings, denoise, {}, image, sigma, noise)
    np.testing.assert_allclose(fed["label"], 0.5 * t, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(fed["x"], xt, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)  # labels by an inverse: 1e-7


def test_flow_matching(x64):
    """|F - (eps - x0)|^2 at (1 - t) x0 + t eps, label t."""
    denoise, network, _ = seen_and_predicted("velocity", "flow")
    image, noise = (jnp.asarray(a, jnp.float64) for a in (IMAGE, NOISE))
    t = jnp.asarray(np.random.default_rng(1).uniform(0.01, 0.99, NUM))
    at = t[:, None, None, None]
    expected = (network({}, (1 - at) * image + at * noise, 0.5 * t) - (noise - image)) ** 2
    found = edm.loss(edm.Settings(weighting="velocity"), denoise, {}, image, t / (1 - t), noise)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)  # float64


def test_unknown_process_and_kind():
    with pytest.raises(ValueError, match="unknown process 'quadratic'.*Known: linear, scaled_linear, cosine, flow"):
        seen_and_predicted("eps", "quadratic")[0]
    with pytest.raises(ValueError, match="'flow' has no table of levels"):
        edm.noise_levels.draw(jax.random.key(0), 4, "discrete", process="flow")
