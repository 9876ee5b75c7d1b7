"""EMD in closed form: a linear generator g(z) = A z + b and a teacher N(mu, Sigma).

At one noise level every denoiser here is affine, so a step of the chain is an affine map of s = (eps, z, R) driven by
unit noise. The map is read off the real step by its Jacobian (`read_off`) and repeated exactly (`repeat`); what comes
out is compared with figures and closed forms that know nothing of a chain. Those are written for x_t = alpha x0 +
sigma eps with alpha = 0.8, sigma = 0.6; diffjax is given sigma / alpha, and eps, z, R are the same numbers.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
from scipy.stats import multivariate_normal

from diffjax.methods import emd, emd_chain
from diffjax.methods.emd_chain import Sample, StepSizes, Weights

ALPHA, SIGMA = 0.8, 0.6
LEVEL = SIGMA / ALPHA
A, OFFSET = np.array([[1.0, 0.5], [0.0, 0.8]]), np.array([0.5, -0.25])
MEAN, COV = np.array([0.0, 0.5]), np.array([[0.8, 0.3], [0.3, 0.6]])
I = np.eye(2)  # noqa: E741
P, Q = ALPHA**2 * COV + SIGMA**2 * I, ALPHA**2 * A @ A.T + SIGMA**2 * I  # teacher and student, noised
PUBLISHED, LARGER = StepSizes(0.16, 1.6e-5), StepSizes(0.16, 0.016)
EPS, Z, R = slice(0, 2), slice(2, 4), slice(4, 6)
MLE = np.array([[0.06163, -0.24260], [-0.34176, 0.29463]]), np.array([-0.44627, 0.77215])
REVERSE_KL = np.array([[-0.18273, -0.08916], [0.00275, -0.01027]]), np.array([-0.53969, 0.78444])
DIGITS = 6e-6  # figures are written to five decimals


class Affine(NamedTuple):
    """s -> matrix s + offset + N(0, cov)."""

    matrix: np.ndarray
    offset: np.ndarray
    cov: np.ndarray

    def then(self, after):
        matrix, offset, cov = after
        return Affine(matrix @ self.matrix, matrix @ self.offset + offset, matrix @ self.cov @ matrix.T + cov)


def affine(params, x, sigma, cond=None, key=None):
    return x @ params["gain"].T + params["bias"][None]


def exact(mean, cov, level):
    """D(x) = x + level^2 score(x) of a Gaussian with noise `level`."""
    pull = level**2 * jnp.linalg.inv(cov + level**2 * jnp.eye(len(mean)))
    return {"gain": jnp.eye(len(mean)) - pull, "bias": pull @ mean}


@jax.jit
def networks(gain=A, bias=OFFSET, cov=COV, level=LEVEL):
    """Teacher, the exact score of the generator, the generator."""
    return Weights(exact(MEAN, cov, level), exact(bias, gain @ gain.T, level), {"gain": gain, "bias": bias})


generate = emd.generator(affine, 1.0)


@functools.partial(jax.jit, static_argnames="scheme")
def read_off(weights, rates, level=LEVEL, scheme="eps_z"):
    """The affine map of one real step."""
    step = emd_chain.make_step(affine, affine, generate, scheme=scheme)

    def flat(s, noise):
        sample, (n_eps, n_z) = Sample(*s.reshape(3, 1, 2)), noise.reshape(2, 1, 2)
        return jnp.concatenate(step(weights, sample, level, {}, rates, n_eps, n_z)[0], axis=1)[0]

    origin = jnp.zeros(6), jnp.zeros(4)
    matrix, spread = jax.jacobian(flat, (0, 1))(*origin)
    return Affine(matrix, flat(*origin), spread @ spread.T)


def repeat(one, times):
    """`one` after itself, by squaring."""
    total = None
    while times:
        if times % 2:
            total = one if total is None else total.then(one)
        one, times = one.then(one), times // 2
    return total


def moments(steps):
    """Mean and covariance of s after `steps`, from unit eps and z and R = 0."""
    return steps.offset, steps.matrix @ np.diag([1.0, 1, 1, 1, 0, 0]) @ steps.matrix.T + steps.cov


def ascent(mean, cov, of=R):
    """(alpha/sigma) E[R z'] and (alpha/sigma) E[R], the mean gradients of A and b; of=EPS without cancellation."""
    return (cov[of, Z] + mean[of][:, None] * mean[Z][None]) / LEVEL, mean[of] / LEVEL


def variance(mean, cov, of):
    """Sum over entries of the variance of (alpha/sigma) R z' of one sample: Gaussian fourth moments."""
    x, y, both, m, n = np.diag(cov)[of, None], np.diag(cov)[None, Z], cov[of, Z], mean[of, None], mean[None, Z]
    return np.sum(x * y + both**2 + 2 * m * n * both + m**2 * y + n**2 * x) / LEVEL**2


def precision_of(one, rates):
    """Lambda and the mean of rho from the map 1 - Gamma Lambda of (eps, z)."""
    drift = np.eye(4) - one.matrix[:4, :4]
    return drift / np.repeat(rates, 2)[:, None], np.linalg.solve(drift, one.offset[:4])


def closed_precision():
    """I - B'MB, B = (sigma, alpha A), M = Q^-1 - P^-1."""
    both = np.hstack([SIGMA * I, ALPHA * A])
    return np.eye(4) - both.T @ (np.linalg.inv(Q) - np.linalg.inv(P)) @ both


def chains(num_steps, rates, num=200_000, weights=None):
    """The end of `num` real chains, (eps, z, R)."""
    z, eps = np.random.default_rng(num_steps).standard_normal((2, num, 2))
    chain = jax.jit(emd_chain.make_chain(num_steps, affine, affine, generate))
    keys = jax.random.split(jax.random.key(num_steps), num)
    return jax.tree.map(np.asarray, chain(weights or networks(), z, eps, jnp.float64(LEVEL), {}, keys, rates)[0])


def outer(x, z):
    """(alpha/sigma) x z' per sample."""
    return x[:, :, None] * z[:, None] / LEVEL


def assert_mean(samples, expected):
    # four standard errors of a Monte Carlo mean, and the last digit of the figure
    allowed = 4 * np.std(samples, axis=0) / np.sqrt(len(samples)) + DIGITS
    assert np.all(np.abs(np.mean(samples, axis=0) - expected) < allowed)


def test_chain_rests_at_the_posterior(x64):
    """C1."""
    precision, mean = precision_of(read_off(networks(), LARGER), LARGER)
    # two ways through matrices of condition number below 10, in float64
    np.testing.assert_allclose(precision, closed_precision(), atol=1e-12)
    whitened = np.linalg.solve(Q, MEAN - OFFSET)
    np.testing.assert_allclose(mean, ALPHA * np.r_[SIGMA * whitened, ALPHA * A.T @ whitened], atol=1e-12)
    figures = np.triu([[0.92264, 0.00159, -0.10315, -0.04988], [0, 0.99195, 0.00211, -0.00754],
                       [0, 0, 0.86247, -0.06651], [0, 0, 0, 0.95871]])  # fmt: skip
    np.testing.assert_allclose(np.triu(np.linalg.inv(precision)), figures, atol=DIGITS)
    np.testing.assert_allclose(mean, [-0.33470, 0.57911, -0.44627, 0.39458], atol=DIGITS)
    np.testing.assert_allclose(np.sort(np.linalg.eigvals(precision).real), [1, 1, 1.01621, 1.33028], atol=DIGITS)


@functools.partial(jax.grad, argnums=(0, 1))
def descent(gain, bias, reverse):
    """Of minus KL(p | q), or minus KL(q | p), at A and b."""
    pair = (ALPHA * MEAN, P), (ALPHA * bias, ALPHA**2 * gain @ gain.T + SIGMA**2 * I)
    (mean_p, cov_p), (mean_q, cov_q) = pair[::-1] if reverse else pair
    inverse, gap = jnp.linalg.inv(cov_q), mean_q - mean_p
    volumes = jnp.linalg.slogdet(cov_q)[1] - jnp.linalg.slogdet(cov_p)[1]
    return -(jnp.trace(inverse @ cov_p) + gap @ inverse @ gap + volumes) / 2


def test_gradients_of_both_divergences(x64):
    """C2: forward, E[eps z'] under the density the chain rests at; reverse, one step of `emd.make_gradient`."""
    precision, mean = precision_of(read_off(networks(), LARGER), LARGER)
    forward = ascent(mean, np.linalg.inv(precision), EPS)
    # eight points with the first and second moments of unit noise, so the mean over the batch is exact
    z, eps = np.split(2 * np.vstack([np.eye(4), -np.eye(4)]), 2, axis=1)
    chosen = emd.Settings(8, (2,), generator_sigma=1.0, langevin_steps=1, scheme="eps", rescale=True)
    grads, _ = jax.jit(emd.make_gradient(chosen, affine, affine))(
        networks(), z, eps, jnp.full(8, LEVEL), {}, jax.random.split(jax.random.key(0), 8), PUBLISHED, None
    )
    reverse = [-grads[name] / (2 * LEVEL**2) for name in ("gain", "bias")]
    for is_reverse, found, figures in ((False, forward, MLE), (True, reverse, REVERSE_KL)):
        for mine, autodiff, figure in zip(found, descent(A, OFFSET, is_reverse), figures, strict=True):
            np.testing.assert_allclose(mine, autodiff, atol=1e-12)  # float64
            np.testing.assert_allclose(mine, figure, atol=DIGITS)


@pytest.mark.fast
def test_two_steps_by_hand(x64, monkeypatch):
    """C3."""
    step, weights = emd_chain.make_step(affine, affine, generate), networks()
    noise = np.array([[[0.2, -0.4], [0.6, 0.1]], [[-1, 0.1], [0.05, -0.3]]])[:, :, None]
    wanted = [  # eps, z, N, R, x0
        [0.46131, 0.70763, 0.39295, -0.66568, 0.53314, 0.61373, -0.07183, 0.09391, 0.50624, -0.71212],
        [-0.25185, 0.74525, 0.38579, -0.70355, -0.11785, 0.57210, -0.13400, 0.17315, 0.43351, -0.68298],
    ]
    sample, own = Sample(*np.array([[[0.5, 1.0]], [[0.3, -0.7]], [[0.0, 0.0]]])), np.array([[0.5, 1.0]])
    for pair, figures, gap in zip(noise, wanted, ([-0.74819, 0.97821], [-0.76738, 0.98198]), strict=True):
        sample, report = step(weights, sample, LEVEL, {}, LARGER, *pair)
        own = 0.84 * own + np.sqrt(0.32) * pair[0]
        x0 = np.asarray(sample.z) @ A.T + OFFSET + LEVEL * np.asarray(sample.residual)
        np.testing.assert_allclose(np.hstack([sample.eps, sample.z, own, sample.residual, x0])[0], figures, atol=DIGITS)
        np.testing.assert_allclose(sample.eps - sample.residual, own, atol=1e-15)
        np.testing.assert_allclose(report.gap, SIGMA * np.linalg.norm(gap), atol=DIGITS)
    monkeypatch.setattr(emd, "make_chain", lambda *_, **__: lambda *_: (sample, report))
    z, chosen = jnp.zeros((1, 2)), emd.Settings(1, (2,), generator_sigma=1.0, langevin_steps=2)
    grads, metrics = emd.make_gradient(chosen, affine, affine)(weights, z, z, jnp.full(1, LEVEL), {}, None, LARGER, None)
    np.testing.assert_allclose(metrics["loss"], 0.0269653, atol=6e-8)  # seven decimals
    np.testing.assert_allclose(grads["gain"], [[0.07755, -0.14142], [-0.10020, 0.18273]], atol=DIGITS)


@pytest.mark.parametrize(
    ("rates", "num_steps", "figure", "cancelled", "raw"),  # mean gradient of A; variance of one sample's
    [
        (PUBLISHED, 1, [[-0.029235, -0.014266], [0.000439, -0.001642]], 0.0506, 7.24),
        (PUBLISHED, 4, [[-0.089458, -0.043665], [0.001331, -0.005153]], 0.486, 7.79),
        (PUBLISHED, 16, [[-0.158183, -0.077273], [0.002272, -0.009600]], 1.61, 8.97),
        (LARGER, 16, [[-0.08201, -0.10415], [-0.08041, 0.05332]], None, None),
    ],
)
def test_mean_and_variance_of_the_gradient(rates, num_steps, figure, cancelled, raw, x64):
    """C4 and C7: of the map repeated, and of 200,000 real chains."""
    known = moments(repeat(read_off(networks(), rates), num_steps))
    np.testing.assert_allclose(ascent(*known)[0], figure, atol=DIGITS)
    end = chains(num_steps, rates)
    for part, of, spread in ((end.residual, R, cancelled), (end.eps, EPS, raw)):
        samples = outer(part, end.z)
        assert_mean(samples, ascent(*known, of)[0])
        assert_mean(part / LEVEL, ascent(*known, of)[1])
        # a variance from n samples of kurtosis 9 is off by sqrt(8 / n) = 0.6 %; five of those
        np.testing.assert_allclose(np.sum(np.var(samples, axis=0)), variance(*known, of), rtol=0.03)
        if spread:
            np.testing.assert_allclose(variance(*known, of), spread, rtol=5e-3)  # three digits
    if rates is LARGER:
        np.testing.assert_allclose(ascent(*known, EPS)[0], [[-0.09579, -0.11087], [-0.08020, 0.05250]], atol=DIGITS)


def test_student_equal_to_the_teacher(x64):
    """C7 at A A' = Sigma, b = mu: no gradient at all with cancellation, the noise of the chain without."""
    same = networks(np.linalg.cholesky(COV), MEAN)
    for num_steps, factor in ((1, 1.0256), (16, 1.0866)):
        end = chains(num_steps, PUBLISHED, 1000, same)
        assert np.max(outer(end.residual, end.z) ** 2) < 1e-28
        noise = variance(*moments(repeat(read_off(same, PUBLISHED), num_steps)), EPS)
        np.testing.assert_allclose(noise, 4 / LEVEL**2 * factor, rtol=1e-4)  # four decimals


def test_long_chains_reach_maximum_likelihood(x64):
    """C5: without cancellation; with it the latent's share of the noise is missing, nothing where that is small."""
    equal = moments(repeat(read_off(networks(), StepSizes(0.005, 0.005)), 20_000))
    # the step size moves this block of the covariance by its square, a quarter of 0.005^2
    np.testing.assert_allclose(ascent(*equal, EPS)[0], MLE[0], atol=2 * DIGITS)
    np.testing.assert_allclose(ascent(*equal)[0], [[0.14012, -0.20447], [-0.34316, 0.29971]], atol=DIGITS)
    small = moments(repeat(read_off(networks(), PUBLISHED), 400_000))
    np.testing.assert_allclose(ascent(*small)[0], ascent(*small, EPS)[0], atol=4e-5)
    for of in (R, EPS):
        assert np.linalg.norm(ascent(*small, of)[0] - MLE[0]) < 3e-3 * np.linalg.norm(MLE[0])


def test_stationary_covariance_is_that_of_the_discrete_chain(x64):
    """C6."""
    _, found = moments(repeat(read_off(networks(), LARGER), 2**14))
    gamma = np.diag(np.repeat(LARGER, 2))
    wanted = scipy.linalg.solve_discrete_lyapunov(np.eye(4) - gamma @ closed_precision(), 2 * gamma)
    np.testing.assert_allclose(found[:4, :4], wanted, atol=1e-11)  # float64 after 14 squarings
    np.testing.assert_allclose(np.diag(found)[:4], [1.01038, 1.07896, 0.87055, 0.96678], atol=DIGITS)

@pytest.mark.parametrize("scheme", ["x", "x_z"])
def test_schemes_in_x_as_they_are_written(scheme, x64):
    """C9: three steps for x_t, with gamma_x = gamma_eps sigma^2 and N in units of x."""
    z, eps = np.random.default_rng(0).standard_normal((2, 5, 2))
    keys = jax.random.split(jax.random.key(1), 5)
    chain = emd_chain.make_chain(3, affine, affine, generate, scheme=scheme)
    end, _ = chain(networks(), z, eps, jnp.float64(LEVEL), {}, keys, LARGER)
    (a, b), rate = LARGER, LARGER.noise * SIGMA**2
    x, own = ALPHA * (z @ A.T + OFFSET) + SIGMA * eps, SIGMA * eps
    for step_keys in jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys):
        n_x, n_z = np.asarray(emd_chain.noise_pair(step_keys, (2,), jnp.float64))
        apart = x - ALPHA * (z @ A.T + OFFSET)
        gap = -(x - ALPHA * MEAN) @ np.linalg.inv(P) + (x - ALPHA * OFFSET) @ np.linalg.inv(Q)
        x = x + rate * (gap - apart / SIGMA**2) + np.sqrt(2 * rate) * n_x
        own = (1 - a) * own + np.sqrt(2 * rate) * n_x
        if scheme == "x_z":
            z = (1 - b) * z + b * ALPHA / SIGMA**2 * apart @ A + np.sqrt(2 * b) * n_z
    found = np.asarray(end.z) @ A.T + OFFSET + LEVEL * np.asarray(end.residual)
    np.testing.assert_allclose(found, (x - own) / ALPHA, atol=1e-11)  # float64, numbers of size 1
    np.testing.assert_allclose(end.z, z, atol=1e-11)


def test_schemes_differ_by_the_latent_only(x64):
    """C9: `x` is `eps`; without a latent rate all four have the same R and z; with one `x_z` is another at once."""

    def end(scheme, rates, num_steps):
        one = repeat(read_off(networks(), rates, scheme=scheme), num_steps)
        return np.hstack([one.matrix, one.cov, one.offset[:, None]])

    np.testing.assert_allclose(end("x", LARGER, 4), end("eps", LARGER, 4), atol=1e-11)  # float64
    for scheme in emd_chain.SCHEMES:
        np.testing.assert_allclose(end(scheme, StepSizes(0.16, 0.0), 4), end("eps", LARGER, 4), atol=1e-11)
    assert np.max(np.abs(end("x_z", LARGER, 1) - end("eps_z", LARGER, 1))[Z]) > 0.01  # of the latent's rate, 0.016


def spectra(scheme, rates, gain, cov, level):
    """Spectral radius of a step, and eigenvalues of the blocks of x (or eps) and of z of the precision."""
    one = np.asarray(read_off(networks(gain, OFFSET, cov, level), rates, level, scheme=scheme).matrix[:4, :4])
    gamma = np.repeat(rates, 2)
    if scheme == "x_z":  # from (eps, z) to (x, z)
        change = np.block([[level * I, gain], [0 * I, I]])
        one = change @ one @ np.linalg.inv(change)
        gamma = gamma * [level**2, level**2, 1, 1]
    precision = (np.eye(4) - one) / gamma[:, None]
    return np.max(np.abs(np.linalg.eigvals(one))), *(np.linalg.eigvalsh(precision[of, of]) for of in (EPS, Z))


def test_only_eps_z_keeps_one_step_size_at_all_levels(x64):
    """C10, |A|_2 = 1, alpha = 1: the latent precision of `x_z` is 1 + 1 / sigma^2, that of `eps_z` below 1 + 1 / floor."""
    random, floor = np.random.default_rng(0), 0.2
    for _ in range(3):
        gain, root = random.standard_normal((2, 2, 2))
        gain, cov = gain / np.linalg.norm(gain, 2), root @ root.T + floor * I
        for level, top in ((0.02, 2501), (0.2, 26), (2.0, 1.25)):
            radius, _, latent = spectra("x_z", StepSizes(0.16, 0.01), gain, cov, level)
            np.testing.assert_allclose(latent[-1], top, rtol=1e-9)  # float64, level^2 = 4e-4
            assert (radius > 1) == (0.01 * top > 2)
            radius, noise, latent = spectra("eps_z", StepSizes(0.9, 0.01), gain, cov, level)
            assert radius < 1 and 0 < noise[0] and noise[-1] < 2 and latent[-1] < 1 + 1 / floor
    for factor in (0.99, 1.01):  # of the limit
        rate = factor * 2 / np.max(np.linalg.eigvalsh(closed_precision()))
        assert (spectra("eps_z", StepSizes(rate, rate), A, COV, LEVEL)[0] > 1) == (factor > 1)


def test_gap_gives_the_gradient_under_rho_and_by_importance(x64):
    """C11: E_rho[(gap - eps) h(z)] = 0, E_rho[gap z'] = E_q[p/q gap z'] is the gradient of the forward KL."""
    step = jax.jit(emd_chain.make_step(affine, affine, generate))

    def gap(z, eps):  # the residual of one step divided by its rate
        still = np.zeros_like(z)
        sample, _ = step(networks(), Sample(eps, z, still), jnp.float64(LEVEL), {}, PUBLISHED, still, still)
        return np.asarray(sample.residual) / PUBLISHED.noise

    x, z, eps = np.random.default_rng(2).standard_normal((3, 200_000, 2))
    x = MEAN + x @ np.linalg.cholesky(P / ALPHA**2).T  # (x, z) from p(x) q(z | x)
    gain = A.T @ np.linalg.inv(Q / ALPHA**2)
    posterior = (x - OFFSET) @ gain.T + z @ np.linalg.cholesky(I - gain @ A).T
    shift = (x - posterior @ A.T - OFFSET) / LEVEL
    for function in (np.sin, np.square, lambda z: z):
        assert_mean(outer(gap(posterior, shift) - shift, function(posterior)), 0)
    assert_mean(outer(gap(posterior, shift), posterior), MLE[0])
    x = ALPHA * (z @ A.T + OFFSET) + SIGMA * eps  # from the student
    ratio = multivariate_normal(ALPHA * MEAN, P).pdf(x) / multivariate_normal(ALPHA * OFFSET, Q).pdf(x)
    assert_mean(ratio[:, None, None] * outer(gap(z, eps), z), MLE[0])
    assert_mean(outer(gap(z, eps), z), REVERSE_KL[0])  # without it


def test_student_score_is_learned_from_the_generator(x64):
    """C11: the method's own score step, plain gradient descent from a zero score, its last half averaged."""
    levels = {"p_mean": np.log(LEVEL), "p_std": 0.0}
    chosen = emd.Settings(512, (2,), generator_sigma=1.0, langevin_steps=1, weighting="unit", distribution_options=levels)
    updates = [emd.Update(optax.identity(), lambda iteration, rate=rate: rate) for rate in (0.0, 0.1)]
    method = emd.make(chosen, affine, affine, *updates)
    teacher, score, generator = networks()
    state = method.init(generator)._replace(score=jax.tree.map(jnp.zeros_like, score))

    def iteration(state, j):
        state, _ = method.step(state, emd.Frozen(teacher, PUBLISHED), {}, jax.random.fold_in(jax.random.key(0), j), j)
        return state, state.score

    _, path = jax.jit(lambda state: jax.lax.scan(iteration, state, jnp.arange(400)))(state)
    for name, wanted in score.items():
        # 200 batches of 512 leave errors of size 1 / sqrt(200 * 512) = 3e-3
        np.testing.assert_allclose(np.mean(path[name][200:], axis=0), wanted, atol=0.01)


def end_of_training(gradient, seed, num=500):
    """|A A' - Sigma|, |b - mu| after `num` updates of rate 0.1 along (alpha/sigma) R z' / m_K, from a random generator."""
    gain, bias = np.split(np.random.default_rng(seed).standard_normal((3, 2)), [2])

    def update(params, j):
        return jax.tree.map(lambda p, g: p + 0.1 * g, params, gradient(params, j)), None

    start = {"gain": jnp.asarray(gain), "bias": jnp.asarray(bias[0])}
    end, _ = jax.jit(lambda start: jax.lax.scan(update, start, jnp.arange(num)))(start)
    return np.linalg.norm(end["gain"] @ end["gain"].T - COV), np.linalg.norm(end["bias"] - MEAN)


@pytest.mark.parametrize(("num_steps", "rates"), [(1, StepSizes(0.16, 0.0)), (16, PUBLISHED), (16, LARGER)])
def test_training_by_expected_gradients(num_steps, rates, x64):
    """C12: a student that can be the teacher becomes it; at the end there is no gap and so no bias."""

    def gradient(params, j):
        mean = ascent(*moments(repeat(read_off(networks(**params), rates), num_steps)))
        return {name: g / emd_chain.decay(rates, num_steps) for name, g in zip(("gain", "bias"), mean, strict=True)}

    for seed in range(3):
        assert max(end_of_training(gradient, seed)) < 1e-12


def test_training_by_particles(x64):
    """C12, by `emd.make_gradient`: to rounding, for the noise of 300 samples goes with the gap."""
    chosen = emd.Settings(300, (2,), generator_sigma=1.0, langevin_steps=16, rescale=True)
    estimate = emd.make_gradient(chosen, affine, affine)

    def gradient(params, j):
        z, eps, _, cond, keys = emd.draw(chosen, jax.random.fold_in(jax.random.key(0), j))
        grads, _ = estimate(networks(**params), z, eps, jnp.full(300, LEVEL), cond, keys, PUBLISHED, None)
        return jax.tree.map(lambda g: -g / (2 * LEVEL**2), grads)

    assert max(end_of_training(gradient, 0)) < 1e-12
