"""AMED's sampler: closed forms by hand, the base solvers on refined grids, calls, compilations, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import gaussian, grids, solvers
from diffjax.sampling import amed_sampler
from diffjax.sampling.amed_sampler import make_amed_plan, make_sampler
from diffjax.sampling.sample import sample

SIGMAS = grids.polynomial(5, 0.05, 20.0)
GAUSSIAN = {"mean": 0.3, "std": 0.5}


def logit(p):
    p = np.asarray(p, np.float64)
    return np.log(p / (1 - p))


def moments(params, x, sigma, cond=None):
    """Features (B, 2) that depend on the state: the mean and the deviation of D."""
    data = gaussian.gaussian_denoiser(params, x, sigma).reshape(x.shape[0], -1)
    return jnp.stack([jnp.mean(data, axis=1), jnp.std(data, axis=1)], axis=1)


def fixed(params, features, sigma, sigma_next):
    """The same numbers everywhere: params (B, 3) or (3,)."""
    return jnp.broadcast_to(params, (features.shape[0], 3))


def run(plan, raw, num=3, denoise=gaussian.gaussian_denoiser, predict=fixed, **options):
    """(start, sample) on a Gaussian in float64."""
    x = 20.0 * jax.random.normal(jax.random.key(0), (num, 2, 3), jnp.float64)
    params = {"teacher": jax.tree.map(jnp.float64, GAUSSIAN), "predictor": jnp.asarray(raw, jnp.float64)}
    draw = make_sampler(moments, predict)
    return np.asarray(x), np.asarray(jax.jit(lambda x: draw(denoise, params, x, plan, **options))(x))


def slope(x, level, told=None):
    """(x - D(x, told)) / level in NumPy; levels (B, 1, 1)."""
    told = level if told is None else told
    return (x - (0.25 * x + told**2 * 0.3) / (0.25 + told**2)) / level


# Closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["amed", "dpm2s"])
def test_neutral_predictor_is_the_midpoint_method(solver, x64):
    """u = 0 is r = 1/2, c = a = 1: DPM-Solver-2 with its middle at the geometric mean, all of the step along d_m."""
    x, found = run(make_amed_plan(solver, SIGMAS, scale_dir=0.1, scale_time=0.2), np.zeros(3))
    for t, t_next in zip(SIGMAS[:-1], SIGMAS[1:], strict=True):
        middle = np.sqrt(t * t_next)
        x = x + (t_next - t) * slope(x + (middle - t) * slope(x, t), middle)
    np.testing.assert_allclose(found, x, rtol=1e-12)  # float64 rounding


@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("solver", ["amed", "dpm2s", "euler"])
def test_every_sample_has_its_own_numbers(solver, afs, x64):
    """One-step solvers by hand. The features move r, so that zeros for features (AFS) show."""
    raw = np.array([[0.7, 1.0, -2.0], [-1.0, 0.3, 0.5], [0.2, -3.0, 1.5]])

    def predict(params, features, sigma, sigma_next):
        assert features.shape == (3, 2)
        return params + 0.1 * features[:, :1] + 0.01 * sigma / sigma_next

    plan = make_amed_plan(solver, SIGMAS, afs=afs, scale_dir=0.1, scale_time=0.2)
    x, found = run(plan, raw, predict=predict)
    for i, (t, t_next) in enumerate(zip(SIGMAS[:-1], SIGMAS[1:], strict=True)):
        analytical = afs and i == 0
        d = x / np.sqrt(1 + t**2) if analytical else slope(x, t)
        mean = 0 if analytical else np.mean(x - t * d, axis=(1, 2))[:, None]
        gate = 1 / (1 + np.exp(-(raw + 0.1 * mean + 0.01 * t / t_next)))
        r, c, a = (part[:, None, None] for part in (gate[:, 0], 0.9 + 0.2 * gate[:, 1], 0.8 + 0.4 * gate[:, 2]))
        middle = t_next**r * t ** (1 - r)
        x_m = x + (middle - t) * d
        d_m = slope(x_m, middle, a * middle)
        if solver == "amed":
            x = x + c * (t_next - t) * d_m
        elif solver == "dpm2s":
            x = x + c * (t_next - t) * (d_m / (2 * r) + (1 - 1 / (2 * r)) * d)
        else:
            x = x_m + c * (t_next - middle) * d_m
    np.testing.assert_allclose(found, x, rtol=1e-11)  # float64 rounding through powers


@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize(
    ("solver", "order", "parity"),
    [("euler", 1, False)]
    + [("ipndm", order, False) for order in (1, 2, 3, 4)]
    + [(name, order, False) for name in ("dpmpp", "dpmpp_noise") for order in (1, 2, 3)]
    + [("dpmpp", 3, True), ("dpmpp_noise", 3, True)],
)
def test_plugin_with_neutral_factors_is_the_base_solver_on_the_refined_grid(solver, order, parity, afs, x64):
    refined = np.empty(9)
    refined[::2], refined[1::2] = SIGMAS, SIGMAS[1:] ** 0.3 * SIGMAS[:-1] ** 0.7
    plan = make_amed_plan(solver, SIGMAS, order=order, parity=parity, afs=afs, scale_dir=0.1)
    x, found = run(plan, [logit(0.3), 0.0, 0.0])
    base = solvers.make_plan(solver, refined, order=order, parity=parity, afs=afs)
    params = jax.tree.map(jnp.float64, GAUSSIAN)
    expected = sample(gaussian.gaussian_denoiser, params, jnp.asarray(x), base)
    np.testing.assert_allclose(found, expected, rtol=1e-10)  # the divided differences lose two digits
    ipndm1 = run(make_amed_plan("ipndm", SIGMAS, order=1, afs=afs), [logit(0.3), 0.0, 0.0])[1]
    assert (np.max(np.abs(found / ipndm1 - 1)) < 1e-10) == (order == 1)  # order 1 is Euler, the others are not


@pytest.mark.parametrize("solver", ["ipndm", "dpmpp", "dpmpp_noise"])
def test_second_half_of_a_plugin_step_is_scaled(solver, x64):
    """Order 2 by hand, two steps. c scales the increment; x in the data form keeps its own factor t'/t."""
    raw = np.array([[0.7, 1.0, -2.0], [-1.0, 0.3, 0.5], [0.2, -3.0, 1.5]])
    x, found = run(make_amed_plan(solver, SIGMAS[:3], order=2, scale_dir=0.1, scale_time=0.2), raw)
    gate = 1 / (1 + np.exp(-raw))
    r, c, a = (part[:, None, None] for part in (gate[:, 0], 0.9 + 0.2 * gate[:, 1], 0.8 + 0.4 * gate[:, 2]))
    past, count = [], 0
    for t, t_next in ((SIGMAS[0], SIGMAS[1]), (SIGMAS[1], SIGMAS[2])):
        middle = t_next**r * t ** (1 - r)
        for level, new, told, scale in ((t + 0 * r, middle, t, 1.0), (middle, t_next + 0 * r, a * middle, c)):
            d, count = slope(x, level, told), count + 1
            m = x - level * d if solver == "dpmpp" else d
            past.append((level, m))
            # the first step knows one value, the last one of DPM-Solver++ is lowered
            second = count > 1 and not (solver != "ipndm" and count == 4)
            if solver == "ipndm":
                x = x + scale * (new - level) * ((3 * m - past[-2][1]) / 2 if second else m)
                continue
            step = np.log(level / new)
            slope_m = (m - past[-2][1]) / np.log(past[-2][0] / level) * step if second else 0.0
            if solver == "dpmpp":
                x = new / level * x + scale * (1 - new / level) * (m + slope_m / 2)
            else:
                x = x + scale * (new - level) * (m + slope_m / 2)
    np.testing.assert_allclose(found, x, rtol=1e-11)  # float64 rounding


def test_bounds(x64):
    """1 +- s at the ends, exactly 1 in the middle and for a scale of 0."""
    raw = jnp.array([[-900.0, -900.0, -900.0], [0.0, 0.0, 0.0], [900.0, 900.0, 900.0]])
    r, c, a = amed_sampler.bound(raw, 0.1, 0.0)
    np.testing.assert_array_equal(r, [0, 0.5, 1])
    np.testing.assert_allclose(c, [0.9, 1, 1.1], rtol=1e-15)
    np.testing.assert_array_equal(a, [1, 1, 1])
    with pytest.raises(ValueError, match=r"three numbers per sample, shape \(B, 3\), found \(3, 2\)"):
        amed_sampler.bound(raw[:, :2], 0.1, 0.0)


# Calls and programs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("num", [2, 5])
@pytest.mark.parametrize("solver", list(amed_sampler.SOLVERS))
def test_calls(solver, num, afs, x64):
    """Counted as the compiled program runs, features too: none of either in the analytical half."""
    calls = {"denoise": 0, "features": 0}

    def counting(function, name):
        def counted(params, x, sigma, cond=None, key=None):
            jax.debug.callback(lambda _: calls.__setitem__(name, calls[name] + 1), sigma)
            return function(params, x, sigma, cond)

        return counted

    plan = make_amed_plan(solver, grids.polynomial(num, 0.05, 20.0), afs=afs)
    params = {"teacher": jax.tree.map(jnp.float64, GAUSSIAN), "predictor": jnp.zeros(3)}
    draw = make_sampler(counting(moments, "features"), fixed)
    denoise = counting(gaussian.gaussian_denoiser, "denoise")
    jax.block_until_ready(jax.jit(lambda x: draw(denoise, params, x, plan))(jnp.ones((2, 2, 3))))
    jax.effects_barrier()
    assert plan.num_steps == num - 1 and plan.noise is None
    assert calls == {"denoise": plan.nfe, "features": num - 1 - afs}
    assert plan.nfe == 2 * (num - 1) - afs


def test_levels_and_scales_do_not_recompile(x64):
    traced = []
    draw = make_sampler(moments, fixed)

    def ends(params, x, plan):
        traced.append(plan)
        return draw(gaussian.gaussian_denoiser, params, x, plan)

    compiled = jax.jit(ends)
    params = {"teacher": jax.tree.map(jnp.float64, GAUSSIAN), "predictor": jnp.ones(3)}
    results = [
        compiled(params, jnp.ones((2, 2, 3)), make_amed_plan("ipndm", grids.polynomial(4, low, 20.0), scale_dir=scale))
        for low, scale in ((0.05, 0.1), (0.1, 0.1), (0.1, 0.2))
    ]
    assert len(traced) == 1
    assert not np.allclose(results[0], results[1]) and not np.allclose(results[1], results[2])


def test_transform_and_condition_reach_the_network(x64):
    seen = []

    def denoise(params, x, sigma, cond=None, key=None):
        seen.append(cond)
        return gaussian.gaussian_denoiser(params, x, sigma)

    plan, cond = make_amed_plan("dpmpp", SIGMAS), {"label": jnp.zeros(3, jnp.int32)}
    plain = run(plan, np.zeros(3), denoise=denoise, cond=cond)[1]
    assert all("label" in found for found in seen)
    _, zero = run(plan, np.zeros(3), transform=jnp.zeros_like)
    x = 20.0 * jax.random.normal(jax.random.key(0), (3, 2, 3), jnp.float64)
    np.testing.assert_allclose(zero, x * SIGMAS[-1] / SIGMAS[0], rtol=1e-12)  # D = 0: x stays proportional to t
    assert not np.allclose(plain, zero)


@pytest.mark.parametrize("solver", list(amed_sampler.SOLVERS))
def test_float32_follows_float64(solver):
    """Levels from 80 to 0.002. States lose to the cancellation of 80 against the size of the data: 80 * 2^-24 * N."""
    plan = make_amed_plan(solver, grids.polynomial(6, 0.002, 80.0), scale_dir=0.05, scale_time=0.1, afs=True)

    def end(dtype):
        x = (80.0 * jax.random.normal(jax.random.key(0), (4, 2, 3), jnp.float32)).astype(dtype)
        teacher = jax.tree.map(lambda a: jnp.asarray(a, dtype), GAUSSIAN)
        predictor = jnp.asarray([0.2, 1.0, -1.0], dtype)
        params = {"teacher": teacher, "predictor": predictor}
        return np.asarray(make_sampler(moments, fixed)(gaussian.gaussian_denoiser, params, x, plan))

    low = end(jnp.float32)
    assert low.dtype == np.float32
    with jax.enable_x64(True):
        np.testing.assert_allclose(low, end(jnp.float64), atol=5e-5)


# Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "ipmdn"}, "unknown AMED solver 'ipmdn'; did you mean 'ipndm'"),
        ({"solver": "dpmpp", "order": 4}, "'dpmpp' has order 1 or 2 or 3, found order=4"),
        ({"solver": "amed", "order": 3}, "'amed' has order 2, found order=3"),
        ({"scale_dir": -0.1}, r"scale_dir .* in \[0, 1\), found -0.1"),
        ({"scale_time": 1.0}, r"scale_time .* in \[0, 1\), found 1.0"),
        ({"sigmas": [1.0]}, r"at least 2 .* found \[1.0\]"),
        ({"sigmas": [1.0, 0.0]}, "positive"),
        ({"sigmas": [1.0, 2.0]}, "strictly decreasing"),
        ({"sigmas": [np.inf, 2.0]}, "finite"),
    ],
)
def test_plans_that_cannot_work(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_amed_plan(**{"solver": "amed", "sigmas": SIGMAS, **arguments})


def test_states_and_keys_that_cannot_work():
    plan, draw, params = make_amed_plan("amed", SIGMAS), make_sampler(moments, fixed), {}
    with pytest.raises(ValueError, match="deterministic: leave key away"):
        draw(gaussian.gaussian_denoiser, params, jnp.ones((2, 2)), plan, key=jax.random.key(0))
    with pytest.raises(ValueError, match="float32 or float64 .* found bfloat16"):
        draw(gaussian.gaussian_denoiser, params, jnp.ones((2, 2), jnp.bfloat16), plan)
