"""Few-step students: the plan they are sampled with and the step condition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import gaussian, grids, guidance
from diffjax.sampling import few_step
from diffjax.sampling.sample import sample


@pytest.mark.fast
@pytest.mark.parametrize(
    ("num_steps", "afs", "factor"),
    [
        (4, False, 3.142236684e-3),
        (7, False, 3.984849708e-3),
        (4, True, 3.143012053e-3),
        (7, True, 3.985086449e-3),
    ],
)
def test_untrained_student_on_a_gaussian(num_steps, afs, factor, x64):
    """Euler on N(0, 0.5^2), 80 to 0.006, rho 7: the end is a known multiple of the start."""
    plan = few_step.student_plan(num_steps, 0.006, 80.0, afs=afs)
    assert (plan.num_steps, plan.nfe) == (num_steps - 1, num_steps - 1 - afs)
    params = {"mean": jnp.zeros(()), "std": jnp.asarray(0.5)}
    end = sample(gaussian.gaussian_denoiser, params, jnp.ones((1, 1)), plan)
    np.testing.assert_allclose(end, [[factor]], rtol=1e-9)  # 10 digits are given


def test_levels_are_those_of_the_grid_asked_for():
    np.testing.assert_array_equal(
        few_step.student_plan(5, 0.006, 80.0, afs=True, rho=5.0).sigmas, grids.polynomial(5, 0.006, 80.0, rho=5.0)
    )
    np.testing.assert_array_equal(
        few_step.student_plan(5, 0.006, 80.0, afs=True, grid="logsnr").sigmas, grids.logsnr(5, 0.006, 80.0)
    )


@pytest.mark.parametrize(("num_steps", "afs"), [(2, True), (1, False)])
def test_too_few_levels(num_steps, afs):
    with pytest.raises(ValueError, match=f"num_steps counts noise levels .* found {num_steps}"):
        few_step.student_plan(num_steps, 0.006, 80.0, afs=afs)


def told(params, x, sigma, cond=None, key=None):
    """D = N + label: shows what it was told."""
    label = jnp.zeros(len(x), jnp.int32) if cond.get("label") is None else cond["label"]
    return jnp.zeros_like(x) + cond["step"] + label.astype(x.dtype)[:, None]


def test_step_condition_reaches_the_network_beside_the_label():
    denoise = few_step.with_step_condition(told, "num_steps", grids.polynomial(6, 0.006, 80.0))
    x = jnp.zeros((3, 2))
    label = jnp.arange(3, dtype=jnp.int32)
    cond = {"label": label}
    np.testing.assert_array_equal(denoise({}, x, jnp.float32(1.0), cond)[:, 0], [6, 7, 8])
    np.testing.assert_array_equal(denoise({}, x, jnp.float32(1.0))[:, 0], [6, 6, 6])
    assert list(cond) == ["label"]  # the caller's condition is untouched


def test_step_condition_reaches_both_branches_of_guidance():
    uncond = functools.partial(guidance.null_label, num_classes=10)
    guided = guidance.cfg(few_step.with_step_condition(told, "num_steps", grids.polynomial(6, 0.006, 80.0)), 2.0, uncond)
    out = guided({}, jnp.zeros((1, 2)), jnp.float32(1.0), {"label": jnp.array([3], jnp.int32)})
    np.testing.assert_allclose(out, [[6 + 10 + 2 * (3 - 10)] * 2], rtol=1e-6)  # float32


def test_one_program_for_all_levels():
    """Noise levels are data: another grid of the same length does not compile again."""
    run = jax.jit(functools.partial(sample, gaussian.gaussian_denoiser))
    params = {"mean": jnp.zeros(()), "std": jnp.float32(0.5)}
    for sigma_min in (0.002, 0.006):
        run(params, jnp.ones((1, 1)), few_step.student_plan(4, sigma_min, 80.0, afs=True))
    assert run._cache_size() == 1
