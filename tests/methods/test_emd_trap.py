"""EMD where Diff-Instruct is trapped: one generator N(b, a^2) between the two modes of a teacher, at one noise level.

Teacher N(-3, 0.25) / 2 + N(3, 0.25) / 2, sigma = 1, exact student score, start on the right mode. The landmarks are
extrema of the divergences of the noised densities, by quadrature; the outcome is that of `emd.make_gradient`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from scipy.stats import norm

from diffjax.core import gaussian
from diffjax.methods import emd
from diffjax.methods.emd_chain import StepSizes, Weights

MIXTURE = {"mean": np.array([[-3.0], [3.0]]), "std": np.array([0.5, 0.5]), "weight": np.array([0.5, 0.5])}
GRID = np.linspace(-25, 25, 5001)  # 8 standard deviations of the widest student; +-10 moves its minimum by 0.05
START = 0.5, 3.0
PARTICLES = 1000


def densities(a, b):
    """Teacher and student on GRID, with noise 1."""
    bells = [norm.pdf(GRID, mean, np.sqrt(variance)) for mean, variance in ((-3, 1.25), (3, 1.25), (b, a * a + 1))]
    return (bells[0] + bells[1]) / 2, bells[2]


def kl(p, q):
    return np.sum(p * np.log(p / q)) * (GRID[1] - GRID[0])


def minimum(objective, start):
    options = {"xatol": 1e-7, "fatol": 1e-13}
    found = scipy.optimize.minimize(lambda at: objective(*densities(*at)), start, method="Nelder-Mead", options=options)
    return found.x, found.fun


def affine(params, x, sigma, cond=None, key=None):
    return params["a"] * x + params["b"]


def teacher(params, x, sigma, cond=None, key=None):
    return gaussian.mixture_denoiser(jax.tree.map(jnp.float32, MIXTURE), x, sigma)


def train(num_steps, updates, seed=0):
    """(a, b) after each of `updates` steps of plain ascent, rate 0.05, along R z' / m_K and R / m_K."""
    chosen = emd.Settings(PARTICLES, (1,), generator_sigma=1.0, langevin_steps=num_steps, rescale=True, scheme="eps_z")
    gradient = emd.make_gradient(chosen, teacher, affine)

    def update(params, j):
        key = jax.random.fold_in(jax.random.key(seed), j)
        z, eps, _, cond, keys = emd.draw(chosen, key)
        total = params["a"] ** 2 + 1
        score = {"a": params["a"] ** 2 / total, "b": params["b"] / total}  # x + the score of N(b, a^2 + 1)
        grads, _ = gradient(
            Weights({}, score, params), z, eps, jnp.ones(PARTICLES), cond, keys, StepSizes(0.16, 1.6e-5), None
        )
        params = jax.tree.map(lambda p, g: p - 0.05 / 2 * g, params, grads)  # the gradient is that of |g - x0|^2
        return params, jnp.stack([params["a"], params["b"]])

    start = dict(zip("ab", map(jnp.float32, START), strict=True))
    return np.asarray(jax.jit(lambda p: jax.lax.scan(update, p, jnp.arange(updates))[1])(start))


@pytest.mark.fast
def test_landmarks():
    """Maximum likelihood covers both modes; the reverse divergence has its best there and a trap on the right one."""
    likely, _ = minimum(kl, (2.5, 0.1))
    np.testing.assert_allclose(likely, [np.sqrt(9.25), 0], atol=1e-4)  # the teacher's own mean and variance
    best, low = minimum(lambda p, q: kl(q, p), (2.5, 0.1))
    trap, high = minimum(lambda p, q: kl(q, p), START)
    # minima to the square root of the objective's rounding, figures of four digits
    np.testing.assert_allclose([*best, low], [2.6328, 0, 0.6007], atol=1e-4)
    np.testing.assert_allclose([*trap, high], [0.64784, 2.94413, 0.6797], atol=1e-4)


@pytest.mark.parametrize(("num_steps", "at"), [(1, (0.648, 2.944)), (4, (0.80, 2.87))])
def test_short_chains_stay_on_one_mode(num_steps, at):
    """K = 1 at the minimum of the reverse divergence: it is Diff-Instruct."""
    path = train(num_steps, 1500)
    # means of 300 updates over three seeds: within 0.007, nearly all of it slow drift along the valley
    np.testing.assert_allclose(np.mean(path[-300:], axis=0), at, atol=0.02)
    assert np.min(path[:, 1]) > 2.8  # found 2.87


@pytest.mark.parametrize(("num_steps", "first", "last"), [(8, 800, 1200), (16, 250, 350)])
def test_longer_chains_escape(num_steps, first, last):
    """To both modes; over six seeds K = 8 leaves (b < 2) after 926 to 1007 updates, K = 16 after 290 to 309."""
    path = train(num_steps, 1200 if num_steps == 8 else 1000)
    assert first < np.argmax(path[:, 1] < 2) < last
    assert np.all(path[last - 1 :, 1] < 2)
    if num_steps == 16:
        # the fixed point of a short run lies between the two landmarks; three seeds at 1,500 updates differ by 0.02
        np.testing.assert_allclose(path[-1], [2.70, 0.02], atol=0.06)
