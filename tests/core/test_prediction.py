"""Every prediction means the same denoiser: conversions, exact Gaussian networks under every process, precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import gaussian, prediction, schedules

SIGMA_DATA = 0.4
MEAN, STD = 0.3, 0.7
GAUSSIAN = {"mean": jnp.float32(MEAN), "std": jnp.float32(STD)}
SIGMAS = np.array([0.02, 0.5, 10.0])
TABLE = schedules.Discrete(schedules.scaled_linear(0.00085, 0.0120))
PROCESSES = {
    "vp": (schedules.VP(), lambda u: 999 * u, lambda label: label / 999),
    "cosine": (schedules.Cosine(), lambda u: u, lambda label: label),
    "ve": (schedules.VE(), lambda u: u, lambda label: label),
    "edm": (schedules.EDM(), jnp.log, jnp.exp),
    "flow": (schedules.Flow(), lambda u: 1000 * u, lambda label: label / 1000),
    "discrete": (TABLE, TABLE.label, lambda label: (label + 1) / 1000),
    "shifted": (schedules.Shifted(schedules.Flow(), 3.0), lambda u: u, lambda label: label),
}


def _draw(dtype=np.float64, batch=3):
    random = np.random.RandomState(0)
    return (random.standard_normal((batch, 4, 4, 2)).astype(dtype) for _ in range(2))


def _predictions(x0, eps, alpha, sigma):
    """What each kind says about (x0, eps), from its definition."""
    x, level = (alpha * x0 + sigma * eps) / alpha, sigma / alpha
    skip, out = SIGMA_DATA**2 / (level**2 + SIGMA_DATA**2), level * SIGMA_DATA / np.sqrt(level**2 + SIGMA_DATA**2)
    return {
        "x0": x0,
        "eps": eps,
        "v": alpha * eps - sigma * x0,
        "score": -eps / sigma,
        "velocity": eps - x0,
        "edm": (x0 - skip * x) / out,
    }


@pytest.mark.parametrize(("alpha", "sigma"), [(0.8, 0.6), (0.3, 0.7), (1.0, 5.0)])
@pytest.mark.parametrize("source", prediction.KINDS)
def test_each_kind_converts_to_each_other(source, alpha, sigma, x64):
    x0, eps = _draw()
    kinds = _predictions(x0, eps, alpha, sigma)
    assert set(kinds) == set(prediction.KINDS)
    xt = jnp.asarray(alpha * x0 + sigma * eps)
    for target, expected in kinds.items():
        found = prediction.convert(source, target, jnp.asarray(kinds[source]), xt, alpha, sigma, SIGMA_DATA)
        # float64 rounding, of numbers up to 10
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.fast
def test_conversions_take_levels_per_sample():
    x0, eps = _draw(np.float32)
    alpha = np.array([0.9, 0.5, 0.1], np.float32).reshape(3, 1, 1, 1)
    sigma = np.sqrt(1 - alpha**2)
    kinds = _predictions(x0, eps, alpha, sigma)
    found = prediction.convert("eps", "v", jnp.asarray(eps), jnp.asarray(alpha * x0 + sigma * eps), alpha, sigma)
    np.testing.assert_allclose(found, kinds["v"], atol=1e-5)  # float32, divided by alpha = 0.1


def test_edm_with_unit_variance_is_v_with_the_other_sign(x64):
    v, xt = (jnp.asarray(x) for x in _draw())
    found = prediction.convert("v", "edm", v, xt, 0.8, 0.6, sigma_data=1.0)
    np.testing.assert_allclose(found, -v, rtol=1e-13)


@pytest.mark.parametrize("kind", ["Eps", "noise", "edn", None])
def test_unknown_kinds_are_answered_with_the_nearest(kind):
    with pytest.raises(ValueError, match=f"unknown prediction {kind!r}; did you mean"):
        prediction.to_x0(kind, jnp.ones(1), jnp.ones(1), 1.0, 1.0)
    with pytest.raises(ValueError, match=f"unknown prediction {kind!r}; did you mean"):
        prediction.process_denoiser(lambda *_: None, kind, schedules.process(schedules.Flow()))


def _gaussian_network(kind, schedule, time):
    """The exact network of N(MEAN, STD^2) under a process: sees xt and its noise label, nothing else."""

    def network(params, xt, label, cond=None, key=None):
        u = time(label)
        alpha, sigma = (factor.reshape(-1, 1, 1, 1) for factor in (schedule.alpha(u), schedule.sigma(u)))
        mean, std = params["mean"], params["std"]
        x0 = mean + alpha * std**2 / ((alpha * std) ** 2 + sigma**2) * (xt - alpha * mean)
        eps = (xt - alpha * x0) / sigma
        return {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "score": -eps / sigma, "velocity": eps - x0}[kind]

    return network


@pytest.mark.parametrize("kind", ["x0", "eps", "v", "score", "velocity"])
@pytest.mark.parametrize("name", PROCESSES)
def test_the_process_does_not_move_the_posterior(name, kind, x64):
    schedule, label, time = PROCESSES[name]
    network = _gaussian_network(kind, schedule, time)
    denoise = prediction.process_denoiser(network, kind, schedules.process(schedule, label))
    params = {"mean": jnp.float64(MEAN), "std": jnp.float64(STD)}
    x0, eps = _draw()
    x = jnp.asarray(x0 + SIGMAS.reshape(3, 1, 1, 1) * eps)
    found = jax.jit(denoise)(params, x, jnp.asarray(SIGMAS))
    assert found.dtype == jnp.float64
    expected = gaussian.gaussian_denoiser(params, x, jnp.asarray(SIGMAS))
    # float64; the label's rounding (of order 1000) is divided by the smallest level twice (score)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("make", "kind", "name"),
    [
        (lambda network: prediction.eps_denoiser(network, TABLE), "eps", "discrete"),
        (lambda network: prediction.v_denoiser(network, TABLE), "v", "discrete"),
        (lambda network: prediction.velocity_denoiser(network, 1000.0), "velocity", "flow"),
    ],
)
def test_named_denoisers_in_float32(make, kind, name):
    schedule, _, time = PROCESSES[name]
    denoise = make(_gaussian_network(kind, schedule, time))
    x0, eps = _draw(np.float32)
    sigma = jnp.asarray(SIGMAS, jnp.float32)
    x = x0 + sigma.reshape(3, 1, 1, 1) * eps
    found = jax.jit(denoise)(GAUSSIAN, x, sigma)
    assert found.dtype == jnp.float32
    # the label near 1000 has 3e-5 in float32; x up to 30 is cancelled down to order 1
    np.testing.assert_allclose(found, gaussian.gaussian_denoiser(GAUSSIAN, x, sigma), atol=3e-4)


def _preconditioning(name, sigma):
    """c_skip, c_out, c_in, c_noise of Karras 2022, table 1, written out in float64."""
    sigma = np.asarray(sigma, np.float64)
    one = np.ones_like(sigma)
    if name == "edm":
        root = np.sqrt(sigma**2 + SIGMA_DATA**2)
        return SIGMA_DATA**2 / root**2, sigma * SIGMA_DATA / root, 1 / root, np.log(sigma) / 4
    if name == "vp":
        time = (np.sqrt(0.1**2 + 2 * 19.9 * np.log(1 + sigma**2)) - 0.1) / 19.9
        return one, -sigma, 1 / np.sqrt(1 + sigma**2), 999 * time
    return one, sigma, one, np.log(sigma / 2)


DENOISERS = {
    "edm": lambda network: prediction.edm_denoiser(network, SIGMA_DATA),
    "vp": prediction.vp_denoiser,
    "ve": prediction.ve_denoiser,
}


@pytest.mark.fast
@pytest.mark.parametrize("name", DENOISERS)
def test_preconditioning_equals_the_table_and_passes_everything_on(name, x64):
    seen = {}

    def network(params, x, noise_label, cond=None, key=None):
        seen.update(x=x, noise_label=noise_label, cond=cond, key=key)
        return params["scale"] * x**2

    params, cond, key = {"scale": jnp.float64(0.3)}, {"label": jnp.arange(3)}, jax.random.key(0)
    x, _ = (jnp.asarray(a) for a in _draw())
    skip, out, scale, noise = _preconditioning(name, SIGMAS)
    found = DENOISERS[name](network)(params, x, jnp.asarray(SIGMAS), cond, key)
    skip, out, scale = (factor.reshape(3, 1, 1, 1) for factor in (skip, out, scale))
    # float64; the table's own form of VP's time loses four digits at sigma = 0.02
    np.testing.assert_allclose(seen["noise_label"], noise, rtol=1e-11)
    np.testing.assert_allclose(seen["x"], scale * x, rtol=1e-14)
    np.testing.assert_allclose(found, skip * x + out * 0.3 * (scale * x) ** 2, rtol=1e-13, atol=1e-14)
    assert seen["cond"] is cond and seen["key"] is key
    assert found.dtype == seen["x"].dtype == seen["noise_label"].dtype == jnp.float64


@pytest.mark.parametrize("name", DENOISERS)
def test_an_exact_gaussian_network_gives_the_exact_denoiser(name, x64):
    """F is solved from the closed form; the network finds sigma from its label, so a wrong label shows."""
    levels = {
        "edm": lambda label: jnp.exp(4 * label),
        "vp": lambda label: jnp.sqrt(jnp.exp(19.9 / 2 * (label / 999) ** 2 + 0.1 * (label / 999)) - 1),
        "ve": lambda label: 2 * jnp.exp(label),
    }

    def network(params, x, noise_label, cond=None, key=None):
        sigma = levels[name](noise_label)
        factors = _preconditioning(name, sigma)[:3]
        skip, out, scale = (jnp.asarray(factor).reshape(-1, 1, 1, 1) for factor in factors)
        return (gaussian.gaussian_denoiser(params, x / scale, sigma) - skip * x / scale) / out

    params = {"mean": jnp.float64(MEAN), "std": jnp.float64(STD)}
    x, _ = (jnp.asarray(a) for a in _draw())
    found = DENOISERS[name](network)(params, x, jnp.asarray(SIGMAS))
    expected = gaussian.gaussian_denoiser(params, x, jnp.asarray(SIGMAS))
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-11)  # float64, the time's digits as above


@pytest.mark.parametrize("name", DENOISERS)
def test_all_but_the_network_stays_float32_when_it_computes_in_bfloat16(name):
    seen = {}

    def network(params, x, noise_label, cond=None, key=None):
        seen.update(x=x.dtype, noise_label=noise_label)
        return jnp.full(x.shape, 0.5, jnp.bfloat16)  # exact in bfloat16

    x, _ = (jnp.asarray(a) for a in _draw(np.float32))
    found = DENOISERS[name](network)({}, x, jnp.asarray(SIGMAS, jnp.float32))
    skip, out, _, noise = _preconditioning(name, SIGMAS)
    expected = skip.reshape(3, 1, 1, 1) * x + 0.5 * out.reshape(3, 1, 1, 1)
    assert found.dtype == seen["x"] == seen["noise_label"].dtype == jnp.float32
    # float32 rounding of a sum of two terms up to 10; bfloat16 would be 4e-3
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(seen["noise_label"], noise, rtol=1e-6)


def test_one_sigma_serves_the_batch():
    def network(params, x, noise_label, cond=None, key=None):
        assert noise_label.shape == (3,)
        return jnp.tanh(x) * noise_label.reshape(-1, 1, 1, 1)

    x, _ = (jnp.asarray(a) for a in _draw(np.float32))
    for make in DENOISERS.values():
        one = make(network)({}, x, 0.7)
        np.testing.assert_array_equal(one, make(network)({}, x, jnp.full(3, 0.7, jnp.float32)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int32])
def test_low_precision_states_are_refused(dtype):
    denoise = prediction.edm_denoiser(lambda params, x, *_: x)
    with pytest.raises(ValueError, match=f"take float32 or float64 .* found {jnp.dtype(dtype).name}"):
        denoise({}, jnp.ones((2, 3), dtype), 1.0)


@pytest.mark.parametrize("scale", [1.0, 2.0, 0.5])
def test_edm_at_another_resolution(scale, x64):
    """The network is told the level of pre-training, and sees and predicts unit variance at the one there is."""
    sigma, told = jnp.asarray([0.01, 0.7, 60.0]), []
    generator = np.random.default_rng(0)
    x0, eps = (jnp.asarray(generator.normal(size=(3, 10_000))) for _ in range(2))
    x0 = 0.5 * x0

    def network(params, x, label, cond=None, key=None):
        told.append((x, label))
        return jnp.zeros_like(x)

    x = x0 + sigma[:, None] * eps
    skip = prediction.edm_denoiser(network, resolution_scale=scale)({}, x, sigma)
    one = prediction.edm_denoiser(lambda params, x, *_: jnp.ones_like(x), resolution_scale=scale)({}, x, sigma)
    seen, label = told[0]
    np.testing.assert_allclose(label, np.log(sigma / scale) / 4, rtol=1e-12)
    # 10,000 draws know a variance to 1.4 %; four times that
    np.testing.assert_allclose(np.var(seen, axis=1), 1, rtol=0.06)
    np.testing.assert_allclose(np.var((x0 - skip) / (one - skip), axis=1), 1, rtol=0.06)


def test_edm_networks_have_their_own_denoiser():
    with pytest.raises(ValueError, match="use edm_denoiser"):
        prediction.process_denoiser(lambda *_: None, "edm", schedules.process(schedules.EDM()))
