"""The largest eigenvalue of EMD's step, against the exact precisions of linear generators and Gaussian teachers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.methods.emd_chain import StepSizes, Weights, make_chain
from diffjax.methods.emd_stability import largest_stable, make_eigenvalues

# singular values 1 and 0.5, so that the top precision of z in x_z is 1 + 1 / sigma^2
TURN = np.array([[0.8, -0.6], [0.6, 0.8]])
A = TURN @ np.diag([1.0, 0.5]) @ TURN
TEACHER = np.array([[0.8, 0.3], [0.3, 0.6]])


def generate(params, z, cond):
    return z @ jnp.asarray(A.T, z.dtype)


def denoiser(covariance):
    def denoise(params, x, sigma, cond=None, key=None):
        sigma = jnp.broadcast_to(sigma, x.shape[:1])
        gain = jax.vmap(lambda s: covariance @ jnp.linalg.inv(covariance + s**2 * jnp.eye(2)))(sigma)
        return jnp.einsum("bij,bj->bi", gain, x)

    return denoise


def precision(scheme, sigma):
    """Lambda of (eps, z) or (x / sigma, z), written out: spec's B'MB, and for x_z the quadratic form in x and z."""
    p, q = (c + sigma**2 * np.eye(2) for c in (TEACHER, A @ A.T))
    m = np.linalg.inv(q) - np.linalg.inv(p)
    if scheme == "eps_z":
        b = np.concatenate([sigma * np.eye(2), A], axis=1)
        return np.eye(4) - b.T @ m @ b
    return np.block([[np.eye(2) - sigma**2 * m, -A / sigma], [-A.T / sigma, np.eye(2) + A.T @ A / sigma**2]])


def find(scheme, sigma, step_sizes, **options):
    eigenvalues = make_eigenvalues(
        denoiser(TEACHER), denoiser(A @ A.T), generate, scheme=scheme, num_iterations=options.pop("num_iterations", 100), **options
    )
    z, eps = np.random.default_rng(0).standard_normal((2, 3, 2))
    return eigenvalues(Weights({}, {}, {}), jnp.asarray(z), jnp.asarray(eps), jnp.full(3, sigma), {}, step_sizes, jax.random.key(0))


@pytest.mark.fast
@pytest.mark.parametrize(("sigma", "expected"), [(0.02, 2501.0), (0.2, 26.0), (2.0, 1.25)])
def test_the_precision_of_the_latent_in_x_z(sigma, expected, x64):
    found = find("x_z", sigma, StepSizes(0.16, 0.01))
    np.testing.assert_allclose(found.latent, 0.01 * expected, rtol=1e-9)


@pytest.mark.parametrize("scheme", ["eps_z", "x_z"])
@pytest.mark.parametrize("sigma", [0.02, 0.2, 2.0])
def test_eigenvalues_are_those_of_the_precision(scheme, sigma, x64):
    rates, matrix = (0.5, 0.3), precision(scheme, sigma)
    gamma = np.diag(np.repeat(rates, 2))
    # 1e-3: of nearly equal eigenvalues the iteration finds a mean for long
    found = find(scheme, sigma, StepSizes(*rates), num_iterations=1000)
    np.testing.assert_allclose(found.both, np.linalg.eigvals(gamma @ matrix).real.max(), rtol=1e-3)
    np.testing.assert_allclose(found.noise, 0.5 * np.linalg.eigvalsh(matrix[:2, :2]).max(), rtol=1e-3)
    np.testing.assert_allclose(found.latent, 0.3 * np.linalg.eigvalsh(matrix[2:, 2:]).max(), rtol=1e-3)
    half = find(scheme, sigma, StepSizes(*rates), num_iterations=1000, half_step=True)
    np.testing.assert_allclose(half.both, found.both / 2, rtol=1e-3)
    # few iterations give a lower bound, near enough for a check
    few = find(scheme, sigma, StepSizes(*rates), num_iterations=16)
    assert np.all(few.both <= found.both * (1 + 1e-9)) and np.all(few.both > 0.85 * found.both)


def test_a_latent_at_rest_has_no_rate(x64):
    for scheme in ("eps", "x"):
        found = find(scheme, 0.2, StepSizes(0.5, 100.0))
        np.testing.assert_allclose(found.both, found.noise, rtol=1e-12)
        np.testing.assert_array_equal(found.latent, 0)


@pytest.mark.parametrize("scheme", ["eps_z", "x_z"])
def test_the_limit_divides_chains_that_stay_from_those_that_do_not(scheme, x64):
    """A hundred steps at 0.95 and 1.05 of the step sizes whose eigenvalue is 2."""
    asked = StepSizes(0.16, 1.0)
    factor = 2 / float(np.max(find(scheme, 0.2, asked, num_iterations=1000).both))

    def spread(scale):
        step_sizes = StepSizes(*(rate * factor * scale for rate in asked))
        chain = make_chain(200, denoiser(TEACHER), denoiser(A @ A.T), generate, scheme=scheme)
        keys = jax.random.split(jax.random.key(0), 8)
        end, _ = jax.jit(chain)(Weights({}, {}, {}), jnp.ones((8, 2)), jnp.ones((8, 2)), jnp.full(8, 0.2), {}, keys, step_sizes)
        return float(jnp.max(jnp.abs(end.z)))

    assert spread(0.95) < 100 < 1e4 < spread(1.05)


def test_the_largest_stable_steps_change_what_is_wrong(x64):
    slow = find("x_z", 0.02, StepSizes(0.16, 0.01), num_iterations=1000)
    most = largest_stable(slow, StepSizes(0.16, 0.01))
    assert most.noise == 0.16 and 0.5 * 2 / 2501 < most.latent < 2 / 2501
    assert 1 < np.max(find("x_z", 0.02, most, num_iterations=1000).both) <= 2
    most = largest_stable(find("eps_z", 0.2, StepSizes(5.0, 0.01), num_iterations=1000), StepSizes(5.0, 0.01))
    assert 1 < most.noise < 5 and most.latent == 0.01
    both = StepSizes(5.0, 3.0)
    most = largest_stable(find("eps_z", 0.2, both, num_iterations=1000), both)
    assert most.noise < 5 and most.noise / most.latent == pytest.approx(5 / 3)
    np.testing.assert_allclose(np.max(find("eps_z", 0.2, most, num_iterations=1000).both), 2, rtol=1e-6)
