"""EDM's losses against the original PyTorch code, label dropout, and training that falls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax.core import gaussian, noise_levels
from diffjax.methods import edm

CASES = {
    "edm": ("lognormal", {}, "edm", {}),
    "edm_alt": ("lognormal", {"p_mean": -0.4, "p_std": 1.0}, "edm", {"sigma_data": 0.3}),
    "vp": ("vp", {}, "eps", {}),
    "ve": ("ve", {}, "eps", {}),
}


def _mixture(arrays):
    """The file's mixture on NHWC images, as parameters of `gaussian.mixture_denoiser`."""
    num = arrays["images"].shape[1:]
    mean = arrays["gmm_mu"].reshape(-1, *num).transpose(0, 2, 3, 1)
    return {"mean": jnp.asarray(mean), "std": jnp.asarray(arrays["gmm_sd"]), "weight": jnp.asarray(arrays["gmm_w"])}


@pytest.mark.fast
@pytest.mark.parametrize("case", CASES)
def test_losses_equal_the_original(case, golden, x64):
    arrays, _ = golden("edm_loss")
    distribution, distribution_options, weighting, weighting_options = CASES[case]
    settings = edm.Settings(distribution, distribution_options, weighting, weighting_options)
    image, noise = (jnp.asarray(arrays[name].transpose(0, 2, 3, 1)) for name in ("images", "noise"))
    draws = arrays["rnd_normal" if distribution == "lognormal" else "rnd_uniform"].reshape(-1)
    levels, _ = noise_levels.DISTRIBUTIONS[distribution]
    sigma = levels(jnp.asarray(draws), **distribution_options)
    loss = edm.loss(settings, gaussian.mixture_denoiser, _mixture(arrays), image, sigma, noise)
    # float64 on both sides, the same formulas: rounding only
    np.testing.assert_allclose(sigma, arrays[f"{case}|sigma"].reshape(-1), rtol=1e-11)
    expected = arrays[f"{case}|loss"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(loss, expected, rtol=1e-11, atol=1e-11 * np.abs(expected).max())
    np.testing.assert_allclose(jnp.sum(loss) / len(image), arrays[f"{case}|loss_sum_over_batch"], rtol=1e-11)
