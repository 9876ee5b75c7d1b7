"""The loop: published factors on Gaussian data, orders of convergence, call counts, memory, compilations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import gaussian, grids, guidance, solvers
from diffjax.sampling.sample import sample

DETERMINISTIC = ["euler", "heun", "dpm2s", "ipndm", "ipndm_v", "deis", "dpmpp", "dpmpp_noise", "unipc"]
ALL = [*DETERMINISTIC, "edm_stochastic"]


def unit_gaussian(dtype=jnp.float64, mean=0.0):
    return {"mean": jnp.asarray(mean, dtype), "std": jnp.asarray(0.5, dtype)}


# Published factors ----------------------------------------------------------------------------------------------

# x_end / x_start on N(0, 1/4 I), polynomial grid rho 7 from 80 to 0.006 with N = 4, 7, 13 levels, from the released
# solvers of Zhou 2024 (thresholding off). "parity" marks those whose released coefficients differ from the right ones.
FACTORS = {
    "euler": ("euler", {}, (3.142236684e-3, 3.984849708e-3, 4.988965015e-3)),
    "euler+afs": ("euler", {"afs": True}, (3.143012053e-3, 3.985086449e-3, 4.989074867e-3)),
    "heun": ("heun", {}, (2.057726031e-2, 9.125569266e-3, 6.905976534e-3)),
    "dpm2s": ("dpm2s", {}, (1.101630845e-2, 7.908676852e-3, 6.622756918e-3)),
    "ipndm-2": ("ipndm", {"order": 2}, (4.538461144e-3, 5.310179425e-3, 5.976618478e-3)),
    "ipndm-3": ("ipndm", {"order": 3}, (5.660719700e-3, 6.151462156e-3, 6.352572097e-3)),
    "ipndm-4": ("ipndm", {"order": 4}, (5.660719700e-3, 6.722089512e-3, 6.483765009e-3)),
    "dpmpp-2": ("dpmpp", {"order": 2}, (3.201193566e-3, 5.436935438e-3, 6.650122217e-3)),
    "dpmpp-3 parity": ("dpmpp", {"parity": True}, (3.201193566e-3, 5.639118781e-3, 7.286216203e-3)),
    "dpmpp-3 parity, never lowered": (
        "dpmpp",
        {"parity": True, "lower_order_final": False},
        (1.037988805e-2, 1.038471149e-2, 6.589524442e-3),
    ),
    "dpmpp-3 noise parity": ("dpmpp_noise", {"parity": True}, (3.201193566e-3, 5.261657631e-3, 6.260485734e-3)),
    "unipc-3": ("unipc", {}, (3.217322319e-3, 5.746629531e-3, 7.194114978e-3)),
    "ipndm_v-4 parity": ("ipndm_v", {"parity": True}, (4.622296894e-3, 5.545133076e-3, 6.207439347e-3)),
    "ipndm_v-4": ("ipndm_v", {}, (3.250222355e-3, 4.398956421e-3, 5.677247780e-3)),
}
FACTOR_CASES = [
    pytest.param(*FACTORS[name], i, num, id=f"{name} N={num}", marks=[pytest.mark.fast] if num == 4 else [])
    for name in FACTORS
    for i, num in enumerate((4, 7, 13))
]


def factor(plan):
    return float(sample(gaussian.gaussian_denoiser, unit_gaussian(), jnp.ones((1, 1), jnp.float64), plan)[0, 0])


@pytest.mark.parametrize("solver, options, expected, i, num", FACTOR_CASES)
def test_factor_on_gaussian_data(x64, solver, options, expected, i, num):
    plan = solvers.make_plan(solver, grids.polynomial(num, 0.006, 80.0), **options)
    assert factor(plan) == pytest.approx(expected[i], rel=1e-9)  # published to ten digits


@pytest.mark.parametrize("num, expected", [(4, 2.844810011e-3), (7, 7.289058578e-3), (13, 6.518207689e-3)])
def test_factor_on_the_logsnr_grid(x64, num, expected):
    plan = solvers.make_plan("dpmpp", grids.logsnr(num, 0.006, 80.0), parity=True)
    assert factor(plan) == pytest.approx(expected, rel=1e-9)  # published to ten digits


def test_states_of_the_teacher_at_the_stamps_of_its_student(x64):
    plan = solvers.make_plan("dpmpp", grids.polynomial(13, 0.006, 80.0), parity=True)
    x = jnp.ones((1, 1), jnp.float64)
    end, states = sample(gaussian.gaussian_denoiser, unit_gaussian(), x, plan, save_every=4)
    expected = [1.3674874309e-1, 1.0337212782e-2, 7.2862162028e-3]
    np.testing.assert_allclose(states[:, 0, 0], expected, rtol=1e-9)  # published to eleven digits
    np.testing.assert_array_equal(states[-1], end)


# Convergence ----------------------------------------------------------------------------------------------------

SLOPES = [
    ("euler", {}, 0.99),
    ("heun", {}, 2.01),
    ("dpm2s", {}, 2.01),
    ("ipndm", {"order": 2}, 2.0),
    ("ipndm", {"order": 3}, 2.0),
    ("ipndm", {"order": 4}, 2.0),
    ("ipndm_v", {"order": 3}, 2.9),
    ("ipndm_v", {"order": 4}, 3.8),
    ("deis", {"order": 3}, 2.9),
    ("deis", {"order": 4}, 3.7),
    ("dpmpp", {"order": 2}, 2.0),
    ("dpmpp", {"parity": True}, 1.9),
    ("dpmpp", {}, 2.0),
    ("unipc", {}, 2.1),
]


def slope(solver, options):
    params = unit_gaussian(mean=0.1)
    x = jnp.array([[20.0]], jnp.float64)
    exact = gaussian.gaussian_solution(params, x, 20.0, 0.05)
    errors = []
    for steps in (80, 160):
        plan = solvers.make_plan(solver, grids.polynomial(steps + 1, 0.05, 20.0), **options)
        errors.append(float(jnp.abs(sample(gaussian.gaussian_denoiser, params, x, plan) - exact)[0, 0]))
    return np.log2(errors[0] / errors[1])


@pytest.mark.parametrize("solver, options, expected", SLOPES)
def test_order_of_convergence(x64, solver, options, expected):
    """The first step, Euler's, caps constant weights and differences in log sigma at 2. Weights of the actual grid are
    exact for straight paths, which this one is where it starts, so they show their own order (released weights: 1.3).
    """
    # 0.15: at 80 steps the next order still bends the line
    assert slope(solver, options) == pytest.approx(expected, abs=0.15)


# Identities -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", DETERMINISTIC)
def test_the_analytic_first_step_is_a_call_of_its_denoiser(x64, solver):
    sigmas = grids.polynomial(6, 0.006, 80.0)
    params = unit_gaussian(mean=0.3)

    def first_is_analytic(params, x, sigma, cond=None, key=None):
        analytic = x * (1 - sigmas[0] / np.sqrt(1 + sigmas[0] ** 2))
        return jnp.where(sigma == sigmas[0], analytic, gaussian.gaussian_denoiser(params, x, sigma))

    x = 80 * jax.random.normal(jax.random.key(0), (3, 2), jnp.float64)
    found = sample(gaussian.gaussian_denoiser, params, x, solvers.make_plan(solver, sigmas, afs=True))
    expected = sample(first_is_analytic, params, x, solvers.make_plan(solver, sigmas))
    # 1e-11: the plain form loses 1e-16 * 80^2 * 2 of 1 - t / sqrt(1 + t^2) to cancellation
    np.testing.assert_allclose(found, expected, rtol=1e-11)


def unipc_by_hand(denoise, x, t):
    """UniPC-3, bh2, data form, lowered at the end: the published loop, one solve per step."""
    lam, values, states = -np.log(t), [denoise(x, t[0])], []
    last = len(t) - 2
    for i in range(last + 1):
        order = i + 1 if i + 1 < 3 else min(3, last + 1 - i)
        h = lam[i + 1] - lam[i]
        base = t[i + 1] / t[i] * x - np.expm1(-h) * values[-1]
        r = [(lam[i - j] - lam[i]) / h for j in range(1, order)] + [1.0]
        delta = [(values[-1 - j] - values[-1]) / r[j - 1] for j in range(1, order)]
        phi = np.expm1(-h) / -h - 1
        b, factorial = [], 1
        for k in range(1, order + 1):
            factorial *= k
            b.append(phi * factorial / np.expm1(-h))
            phi = phi / -h - 1 / (factorial * (k + 1))
        matrix = np.array([[node**k for node in r] for k in range(order)])
        rho = [0.5] if order == 2 else np.linalg.solve(matrix[:-1, :-1], b[:-1])
        new = base - np.expm1(-h) * sum((p * d for p, d in zip(rho, delta, strict=True)), np.zeros_like(x))
        if i < last:
            values.append(denoise(new, t[i + 1]))
            rho = [0.5] if order == 1 else np.linalg.solve(matrix, b)
            terms = [*delta, values[-1] - values[-2]]
            new = base - np.expm1(-h) * sum(p * d for p, d in zip(rho, terms, strict=True))
        x = new
        states.append(x)
    return np.stack(states)


def test_states_of_unipc_are_the_corrected_ones(x64):
    t = grids.polynomial(7, 0.006, 80.0)
    params = unit_gaussian(mean=0.3)
    x = np.array([[50.0, -70.0]])
    expected = unipc_by_hand(lambda x, s: np.asarray(gaussian.gaussian_denoiser(params, jnp.asarray(x), s)), x, t)
    for every in (1, 2, 3, 6):
        end, states = sample(
            gaussian.gaussian_denoiser, params, jnp.asarray(x), solvers.make_plan("unipc", t), save_every=every
        )
        np.testing.assert_allclose(states, expected[every - 1 :: every], rtol=1e-11)  # rounding of 6 steps
        np.testing.assert_array_equal(end, states[-1])


def two_stage_by_hand(solver, denoise, x, t):
    states = []
    for now, new in zip(t[:-1], t[1:], strict=True):
        d = (x - denoise(x, now)) / now
        if solver == "heun":
            y = x + (new - now) * d
            x = x + (new - now) / 2 * (d + (y - denoise(y, new)) / new)
        else:
            middle = np.sqrt(new * now)
            y = x + (middle - now) * d
            x = x + (new - now) * (y - denoise(y, middle)) / middle
        states.append(x)
    return np.stack(states)


@pytest.mark.parametrize("solver", ["heun", "dpm2s"])
def test_states_of_two_stage_solvers(x64, solver):
    t = grids.polynomial(7, 0.006, 80.0)
    params = unit_gaussian(mean=0.3)
    x = np.array([[50.0, -70.0]])
    expected = two_stage_by_hand(
        solver, lambda x, s: np.asarray(gaussian.gaussian_denoiser(params, jnp.asarray(x), s)), x, t
    )
    for every in (1, 2, 3):
        _, states = sample(
            gaussian.gaussian_denoiser, params, jnp.asarray(x), solvers.make_plan(solver, t), save_every=every
        )
        np.testing.assert_allclose(states, expected[every - 1 :: every], rtol=1e-11)  # rounding of 6 steps


def test_states_of_a_student_with_the_analytic_first_step(x64):
    """N = 7 with AFS at steps 3 and 6: what the second stage of Zhou 2024 is trained on."""
    t = grids.polynomial(7, 0.006, 80.0)
    params, x = unit_gaussian(mean=0.3), np.array([[50.0, -70.0]])
    _, states = sample(
        gaussian.gaussian_denoiser, params, jnp.asarray(x), solvers.make_plan("euler", t, afs=True), save_every=3
    )
    expected = []
    for i in range(6):
        d = x / np.sqrt(1 + t[0] ** 2)
        if i:
            d = (x - np.asarray(gaussian.gaussian_denoiser(params, jnp.asarray(x), t[i]))) / t[i]
        x = x + (t[i + 1] - t[i]) * d
        expected.append(x)
    np.testing.assert_allclose(states, np.stack(expected)[2::3], rtol=1e-12)  # rounding of 6 steps


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp", "dpmpp_noise", "unipc", "ipndm"])
def test_a_last_level_of_zero_returns_the_last_estimate(x64, solver):
    sigmas = grids.append_zero(grids.polynomial(6, 0.02, 80.0))
    params = unit_gaussian(mean=0.3)
    seen = []

    def recording(params, x, sigma, cond=None, key=None):
        data = gaussian.gaussian_denoiser(params, x, sigma)
        jax.debug.callback(seen.append, data, ordered=True)
        return data

    options = {"order": 1} if solver == "ipndm" else {}
    x = jnp.full((1, 2), 80.0, jnp.float64)
    found = sample(recording, params, x, solvers.make_plan(solver, sigmas, **options))
    jax.effects_barrier()
    np.testing.assert_allclose(found, seen[-1], rtol=1e-12)  # x - sigma (x - D) / sigma rounds


def test_transform_is_applied_to_the_estimate():
    plan = solvers.make_plan("dpmpp", grids.append_zero(grids.polynomial(4, 0.02, 80.0)))
    far = {"mean": jnp.float32(3.0), "std": jnp.float32(0.5)}
    x = 80 * jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
    found = sample(gaussian.gaussian_denoiser, far, x, plan, transform=guidance.dynamic_threshold)
    assert float(jnp.abs(found).max()) == pytest.approx(1.0, abs=1e-6)  # the threshold divides by its limit
    assert float(jnp.abs(sample(gaussian.gaussian_denoiser, far, x, plan)).max()) > 2


# Calls, memory, compilations ------------------------------------------------------------------------------------


def counted(solver, guided=False, **options):
    """Network calls that really run in one compiled sampling, and the plan's own number."""
    calls = []

    def counting(params, x, sigma, cond=None, key=None):
        jax.debug.callback(lambda _: calls.append(1), sigma)
        return gaussian.gaussian_denoiser(params, x, sigma)

    denoise = counting
    if guided:
        denoise = guidance.cfg(counting, 2.0, functools.partial(guidance.null_label, num_classes=3))
    sigmas = options.pop("sigmas", grids.polynomial(7, 0.006, 80.0))
    plan = solvers.make_plan(solver, sigmas, **options)
    noise = (lambda step: jnp.ones((2, 3))) if plan.noise is not None else None
    cond = {"label": jnp.zeros(2, jnp.int32)}
    jax.jit(lambda p, x: sample(denoise, p, x, plan, cond, noise=noise))(
        unit_gaussian(jnp.float32), jnp.ones((2, 3))
    ).block_until_ready()
    jax.effects_barrier()
    return len(calls), plan.nfe


@pytest.mark.parametrize("solver", ALL)
def test_calls_that_run(solver):
    expected = 12 if solver in ("heun", "dpm2s", "edm_stochastic") else 6
    assert counted(solver) == (expected, expected)
    if solver != "edm_stochastic":
        assert counted(solver, afs=True) == (expected - 1, expected - 1)


def test_calls_that_run_to_zero_and_with_guidance():
    zero = grids.append_zero(grids.polynomial(6, 0.006, 80.0))
    assert counted("heun", sigmas=zero) == (11, 11)
    assert counted("edm_stochastic", sigmas=zero, s_churn=2.0) == (11, 11)
    assert counted("dpmpp", guided=True) == (12, 6)  # guidance: two calls each


@pytest.mark.parametrize("solver", ALL)
def test_one_compilation_for_all_levels_and_seeds(solver):
    @jax.jit
    def run(params, x, plan, key):
        key = None if plan.noise is None else key
        return sample(gaussian.gaussian_denoiser, params, x, plan, key=key)

    x = jnp.ones((2, 3))
    ends = []
    for seed, sigmas in enumerate([grids.polynomial(6, 0.006, 80.0), grids.logsnr(6, 0.1, 20.0)]):
        options = {"s_churn": 1.0 + seed} if solver == "edm_stochastic" else {}
        plan = solvers.make_plan(solver, sigmas, **options)
        ends.append(run(unit_gaussian(jnp.float32), x, plan, jax.random.split(jax.random.key(seed), 2)))
    assert run._cache_size() == 1
    assert not np.allclose(ends[0], ends[1])


@pytest.mark.parametrize("solver", ["euler", "heun", "unipc"])
def test_memory_does_not_grow_with_the_number_of_steps(solver):
    x = jnp.ones((4, 128, 128, 1))

    def workspace(steps, save_every=0):
        plan = solvers.make_plan(solver, grids.polynomial(steps + 1, 0.006, 80.0))
        run = jax.jit(lambda p, x: sample(gaussian.gaussian_denoiser, p, x, plan, save_every=save_every))
        memory = run.lower(unit_gaussian(jnp.float32), x).compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes

    few, many = workspace(4), workspace(64)
    assert abs(many - few) < x.nbytes / 4  # only the rows of numbers grow
    assert workspace(64, save_every=1) - many > 60 * x.nbytes  # so the measure does see a trajectory
    assert workspace(64, save_every=32) - many < 8 * x.nbytes


@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("solver", DETERMINISTIC)
def test_several_plans_in_a_stack(x64, solver, afs):
    """Two, four and six steps by one program: samples and states of each plan alone."""
    plans = [solvers.make_plan(solver, grids.polynomial(num, 0.006, 80.0), afs=afs) for num in (7, 3, 5)]
    stacked, rows = solvers.stack(plans)
    denoise, params = gaussian.gaussian_denoiser, unit_gaussian()
    x = jax.random.normal(jax.random.key(0), (3, 4), jnp.float64) * 80

    @jax.jit
    def follow(which):
        plan = jax.tree.map(lambda table: jnp.asarray(table)[which], stacked)
        return sample(denoise, params, x, plan, save_every=2, num_rows=jnp.asarray(rows)[which])

    for i, plan in enumerate(plans):
        expected, states = sample(denoise, params, x, plan, save_every=2)
        found, found_states = follow(jnp.int32(i))
        # the same operations in two programs: rounding of float64
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        np.testing.assert_allclose(found_states[: len(states)], states, rtol=1e-12)
        assert not np.any(found_states[len(states) :])
    assert follow._cache_size() == 1


def test_the_network_is_traced_once():
    """Compile time of a large network: whatever the solver, its program holds one copy of it."""
    for solver in DETERMINISTIC:
        traces = []

        def tracing(params, x, sigma, cond=None, key=None):
            traces.append(1)  # noqa: B023
            return gaussian.gaussian_denoiser(params, x, sigma)

        plan = solvers.make_plan(solver, grids.polynomial(6, 0.006, 80.0), afs=True)
        jax.make_jaxpr(lambda x: sample(tracing, unit_gaussian(jnp.float32), x, plan))(jnp.ones((1, 1)))  # noqa: B023
        assert len(traces) == 1


@pytest.mark.parametrize("solver", DETERMINISTIC)
def test_float32_follows_float64(x64, solver):
    plan = solvers.make_plan(solver, grids.polynomial(9, 0.006, 80.0))
    x = 80 * jax.random.normal(jax.random.key(0), (4, 8), jnp.float64)
    exact = sample(gaussian.gaussian_denoiser, unit_gaussian(mean=0.3), x, plan)
    found = sample(gaussian.gaussian_denoiser, unit_gaussian(jnp.float32, 0.3), x.astype(jnp.float32), plan)
    assert found.dtype == jnp.float32
    # noise forms divide the rounding of x - D (80 * 6e-8) by no more than they multiply it with again; 8 steps
    np.testing.assert_allclose(found, exact, atol=2e-5)


# The published stochastic sampler -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", ["det_N4", "det_N6", "det_N11", "stoch_imagenet_N8", "stoch_cap_N7", "stoch_smallchurn_N10"]
)
def test_edm_sampler_matches_the_original(x64, golden, case):
    arrays, meta = golden("edm_sampler")
    settings = {"sigma_min": 0.002, "sigma_max": 80.0, "rho": 7, "S_churn": 0.0, "S_min": 0.0, "S_max": np.inf,
                "S_noise": 1.0, **meta[case]}  # fmt: skip
    latents = jnp.asarray(arrays["latents"])
    params = {
        "mean": jnp.asarray(arrays["gmm_mu"]).reshape(-1, *latents.shape[1:]),
        "std": jnp.asarray(arrays["gmm_sd"]),
        "weight": jnp.asarray(arrays["gmm_w"]),
    }
    sigmas = grids.append_zero(
        grids.polynomial(settings["num_steps"], settings["sigma_min"], settings["sigma_max"], settings["rho"])
    )
    stochastic = case.startswith("stoch")
    options = {name.lower(): settings[name] for name in ("S_churn", "S_min", "S_max", "S_noise")} if stochastic else {}
    plan = solvers.make_plan("edm_stochastic" if stochastic else "heun", sigmas, **options)
    seen = []

    def recording(params, x, sigma, cond=None, key=None):
        jax.debug.callback(lambda *call: seen.append(call), x, sigma, ordered=True)
        return gaussian.mixture_denoiser(params, x, sigma)

    noise = (lambda step: jnp.asarray(arrays[f"{case}|noise"])[step]) if stochastic else None
    found = sample(recording, params, latents * sigmas[0], plan, noise=noise)
    jax.effects_barrier()
    assert plan.nfe == settings["nfe"] == len(seen)
    # 1e-9 of the largest value: the slope (x - D) / t divides rounding errors by t = 0.002
    for value, expected in [
        (np.stack([sigma for _, sigma in seen]), arrays[f"{case}|call_sigma"]),
        (np.stack([x for x, _ in seen]), arrays[f"{case}|call_x"]),
        (found, arrays[f"{case}|x_final"]),
    ]:
        np.testing.assert_allclose(value, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


def test_the_noise_of_a_sample_is_its_own():
    plan = solvers.make_plan("edm_stochastic", grids.append_zero(grids.polynomial(5, 0.02, 80.0)), s_churn=5.0)
    keys, x = jax.random.split(jax.random.key(0), 4), jnp.ones((4, 3))
    run = functools.partial(sample, gaussian.gaussian_denoiser, unit_gaussian(jnp.float32), plan=plan)
    whole = run(x=x, key=keys)
    np.testing.assert_allclose(run(x=x[2:], key=keys[2:]), whole[2:], rtol=1e-5)  # float32, other batch shape
    assert not np.allclose(run(x=x, key=keys[::-1]), whole)
    assert len(np.unique(np.asarray(whole))) == 12


# Bad input ------------------------------------------------------------------------------------------------------


def test_bad_input():
    plan = solvers.make_plan("euler", grids.polynomial(5, 0.02, 80.0))
    stochastic = solvers.make_plan("edm_stochastic", grids.polynomial(5, 0.02, 80.0), s_churn=5.0)
    run = functools.partial(sample, gaussian.gaussian_denoiser, unit_gaussian(jnp.float32))
    x, keys = jnp.ones((2, 3)), jax.random.split(jax.random.key(0), 2)
    with pytest.raises(ValueError, match="float32 or float64"):
        run(x.astype(jnp.bfloat16), plan)
    with pytest.raises(ValueError, match="must divide the 4 steps"):
        run(x, plan, save_every=3)
    with pytest.raises(ValueError, match="must divide"):
        run(x, plan, save_every=-1)
    with pytest.raises(ValueError, match="deterministic"):
        run(x, plan, key=keys)
    with pytest.raises(ValueError, match="stochastic plan needs"):
        run(x, stochastic)
    with pytest.raises(ValueError, match="one key per sample"):
        run(x, stochastic, key=keys[0])
