"""Steps of DDIM on a trained table against diffusers' scheduler, and the levels and labels of SVD's."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import grids, prediction, respaced, schedules, solvers
from diffjax.sampling.sample import sample

BETAS = dict(beta_schedule="linear", beta_start=0.00085, beta_end=0.012)


@pytest.fixture(scope="module")
def diffusers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'diffjax[test]'")


@pytest.mark.parametrize("spacing", respaced.SPACINGS)
@pytest.mark.parametrize("num_steps, offset", [(25, 1), (25, 0), (7, 0), (1000, 0)])
def test_indices(spacing, num_steps, offset, diffusers):
    scheduler = diffusers.DDIMScheduler(**BETAS, timestep_spacing=spacing, steps_offset=offset)
    scheduler.set_timesteps(num_steps)
    np.testing.assert_array_equal(respaced.indices(num_steps, spacing, offset=offset), scheduler.timesteps.numpy())


@pytest.mark.parametrize("spacing", respaced.SPACINGS)
@pytest.mark.parametrize("to_zero", [False, True])
def test_ddim(spacing, to_zero, diffusers):
    import torch

    scheduler = diffusers.DDIMScheduler(
        **BETAS, timestep_spacing=spacing, steps_offset=1, clip_sample=False, set_alpha_to_one=to_zero
    )
    scheduler.set_timesteps(7)
    noise = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    weight = np.random.default_rng(1).standard_normal((4, 4)).astype(np.float32) / 2

    def network(xt, t, xp):
        return xp.tanh(xt @ weight + t / 1000)

    expected = torch.tensor(noise)
    for t in scheduler.timesteps:
        out = network(expected.numpy(), float(t), np)
        expected = scheduler.step(torch.tensor(out), t, expected).prev_sample
    table = schedules.named("animatediff")
    plan = respaced.ddim(table, 7, spacing, offset=1, to_zero=to_zero)
    called = lambda params, x, label, cond, key: network(x, label[:, None, None], jnp)  # noqa: E731
    denoise = prediction.eps_denoiser(called, table)
    found = jax.jit(functools.partial(sample, denoise))({}, noise * np.float32(np.sqrt(1 + plan.levels[0] ** 2)), plan)
    error = np.linalg.norm(np.asarray(found) - expected.numpy()) / np.linalg.norm(expected)
    assert error < 2e-5  # labels are found again from levels in float32, to 1e-4 of an index


@pytest.mark.fast
def test_self_consistent_spacings_are_euler():
    for spacing in ("leading", "trailing"):
        plan = respaced.ddim(schedules.named("animatediff"), 20, spacing, to_zero=True)
        euler = solvers.make_plan("euler", plan.sigmas)
        np.testing.assert_allclose(plan.advance, euler.advance, rtol=1e-12)
    plan = respaced.ddim(schedules.named("animatediff"), 20, "linspace")
    assert np.all(plan.advance[:-1, 1] < 1)  # each state is taken for a less noisy one


@pytest.mark.parametrize("options, match", [
    (dict(num_steps=0, spacing="leading"), "0 steps"), (dict(num_steps=1001, spacing="leading"), "1001 steps"),
    (dict(num_steps=10, spacing="leading", offset=100), "offset 100"),
    (dict(num_steps=10, spacing="led"), "did you mean"),
])  # fmt: skip
def test_bad_spacings(options, match):
    with pytest.raises(ValueError, match=match):
        respaced.indices(**options)


def test_levels_and_labels_of_svd(diffusers):
    """The 25 steps of its scheduler's config."""
    scheduler = diffusers.EulerDiscreteScheduler(
        sigma_min=0.002, sigma_max=700.0, timestep_spacing="leading", timestep_type="continuous", steps_offset=1,
        prediction_type="v_prediction", use_karras_sigmas=True, beta_schedule="scaled_linear", beta_start=0.00085,
        beta_end=0.012, interpolation_type="linear",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch arrays as NumPy's
        scheduler.set_timesteps(25)
    sigmas = grids.append_zero(grids.polynomial(25, 0.002, 700.0))
    # 1e-6: their float32; the first three as printed
    np.testing.assert_allclose(sigmas, scheduler.sigmas.numpy(), rtol=1e-6)
    np.testing.assert_allclose(sigmas[:3], [700, 545.729, 421.569], rtol=1e-6)
    seen = []
    network = lambda params, x, label, cond, key: seen.append((x, label)) or jnp.ones_like(x)  # noqa: E731
    x = jnp.full((1, 2, 2), 3.0)
    for sigma, t in zip(sigmas[:-1], scheduler.timesteps, strict=True):
        found = prediction.edm_v_denoiser(network)({}, x, jnp.float32(sigma))
        c_in, label = seen[-1]
        np.testing.assert_allclose(label, [float(t)], rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(c_in, x / np.sqrt(sigma**2 + 1), rtol=1e-6)
        np.testing.assert_allclose(found, x / (sigma**2 + 1) - sigma / np.sqrt(sigma**2 + 1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose([seen[0][1][0], seen[-1][1][0]], [1.63777, -1.55365], atol=5e-6)  # six digits, printed
    assert abs(float(scheduler.init_noise_sigma) / np.sqrt(1 + sigmas[0] ** 2) - 1) < 1e-6
