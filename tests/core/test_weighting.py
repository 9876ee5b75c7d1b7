"""Loss weights: what each makes of the squared error of the image."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import prediction, weighting

SIGMA = np.array([0.01, 0.3, 1.0, 7.0, 80.0])


@pytest.mark.fast
def test_edm_makes_unit_targets_of_f(x64):
    """|D - x0|^2 under `edm` is the plain squared error of F, for any error of F."""
    sigma, x0, xt = jnp.asarray(SIGMA), jnp.full(5, 0.2), jnp.linspace(-1, 2, 5)
    target = prediction.from_x0("edm", x0, xt, 1.0, sigma, sigma_data=0.4)
    denoised = prediction.to_x0("edm", target + 0.1, xt, 1.0, sigma, sigma_data=0.4)
    weight = weighting.weigh("edm", sigma, sigma_data=0.4)
    # float64; x0 is cancelled against terms up to sigma = 80 times larger
    np.testing.assert_allclose(weight * (denoised - x0) ** 2, 0.01, rtol=1e-9)


def test_eps_makes_the_error_of_the_noise(x64):
    sigma, x0, xt = jnp.asarray(SIGMA), jnp.full(5, 0.2), jnp.linspace(-1, 2, 5)
    eps = prediction.from_x0("eps", x0, xt, 1.0, sigma)
    denoised = prediction.to_x0("eps", eps + 0.1, xt, 1.0, sigma)
    np.testing.assert_allclose(weighting.weigh("eps", sigma) * (denoised - x0) ** 2, 0.01, rtol=1e-9)


def test_values(x64):
    sigma = jnp.asarray(SIGMA)
    cases = {
        ("unit", ()): np.ones(5),
        ("edm", ()): (SIGMA**2 + 0.25) / (0.5 * SIGMA) ** 2,
        ("min_snr", ()): [5.0, 5.0, 1.0, 1 / 49, 1 / 6400],
        ("min_snr", (("gamma", 20.0),)): [20.0, 1 / 0.09, 1.0, 1 / 49, 1 / 6400],
        ("truncated_snr", ()): [1e4, 1 / 0.09, 1.0, 1.0, 1.0],
        ("truncated_snr", (("sigma_data", 0.5),)): [1e4, 1 / 0.09, 4.0, 4.0, 4.0],
        # sigmoid(b - logsnr) = 1 / (1 + exp(-b) SNR), over sigma^2
        ("sigmoid", (("bias", -1.0),)): 1 / (1 + np.e / SIGMA**2) / SIGMA**2,
    }
    for (name, options), expected in cases.items():
        np.testing.assert_allclose(weighting.weigh(name, sigma, **dict(options)), expected, rtol=1e-12)


@pytest.mark.parametrize("name", weighting.WEIGHTINGS)
def test_weights_keep_type_and_shape(name):
    weight = weighting.weigh(name, jnp.asarray(SIGMA, jnp.float32))
    assert weight.dtype == jnp.float32 and weight.shape == (5,)
    assert np.all(np.isfinite(weight)) and np.all(weight > 0)


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match="unknown weighting 'minsnr'; did you mean 'min_snr'"):
        weighting.weigh("minsnr", jnp.ones(2))
    with pytest.raises(ValueError, match="unknown option 'gama' of weighting 'min_snr'; did you mean 'gamma'"):
        weighting.check("min_snr", {"gama": 5.0})
    with pytest.raises(ValueError, match="weighting 'unit' has no options, found 'gamma'"):
        weighting.check("unit", {"gamma": 5.0})
