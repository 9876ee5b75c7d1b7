"""Progressive distillation: its target by hand and by the sampler, the guided stage, and a student that gets there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax.core import gaussian, solvers
from diffjax.methods import pd
from diffjax.sampling import few_step
from diffjax.sampling.sample import sample

SHAPE = (2, 3, 1)
GAUSSIAN = {"mean": 0.3, "std": 0.5}


def settings(**changes):
    return dataclasses.replace(pd.Settings(num_steps=4), **changes)


def exact(mean=GAUSSIAN["mean"]):
    return {"mean": jnp.asarray(mean), "std": jnp.asarray(GAUSSIAN["std"])}


def batch(num, seed=0, dtype=jnp.float32):
    image = GAUSSIAN["mean"] + GAUSSIAN["std"] * jax.random.normal(jax.random.key(seed), (num, *SHAPE), dtype)
    return {"image": image}


def column(values):
    return np.asarray(values).reshape(-1, 1, 1, 1)


def scaled(params, x, sigma, cond=None, key=None):
    """The least student: one number."""
    return params["a"] * x


def recorder(seen, denoise=scaled):
    """`denoise` that keeps the arrays of each of its calls."""

    def keep(*call):
        seen.append(jax.tree.map(np.asarray, call))

    def spy(params, x, sigma, cond=None, key=None):
        jax.debug.callback(keep, x, sigma, dict(cond or {}), ordered=True)
        return denoise(params, x, sigma, cond, key)

    return spy


def labelled(params, x, sigma, cond=None, key=None):
    """A Gaussian for each label, the null label included: its mean is the label."""
    mean = cond["label"].astype(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
    return mean + gaussian.gaussian_denoiser({"mean": 0.0, "std": params["std"]}, x - mean, sigma)


@pytest.mark.parametrize("to_zero", [False, True])
def test_a_step_by_hand(to_zero, x64):
    """Loss, gradient and update of D = a x, from the noise and the levels that the step itself drew."""
    seen = []
    chosen = settings(to_zero=to_zero, sigma_data=0.5)
    method = pd.make(
        chosen, gaussian.gaussian_denoiser, recorder(seen), optax.scale_by_adam(), lambda i: jnp.float32(0.1) / (1 + i)
    )
    state, metrics = method.step(
        method.init({"a": jnp.float64(0.7)}), exact(), batch(32, dtype=jnp.float64), jax.random.key(2), jnp.int32(3)
    )
    x, t = seen[0][0], seen[0][1]
    levels = (80 ** (1 / 7) + np.arange(7) / 6 * (0.006 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    if to_zero:
        levels[-1] = 0.0
    assert set(np.round(t, 9)) == set(np.round(levels[:-1:2], 9))  # 32 draws: all three levels come up
    k = 2 * np.argmin(np.abs(t[:, None] - levels[None]) + (np.arange(7) % 2) * 1e9, axis=1) // 2
    start, middle, end = (column(levels[k + i]) for i in range(3))

    def denoise(x, t):
        return (0.25 * x + 0.3 * t**2) / (0.25 + t**2)

    x1 = x + (middle - start) * (x - denoise(x, start)) / start
    x2 = x1 + (end - middle) * (x1 - denoise(x1, middle)) / middle
    target = (x2 - end / start * x) / (1 - end / start)
    weight = np.maximum(1 / start**2, 4.0)
    loss = np.sum(weight * (0.7 * x - target) ** 2) / 32
    grad = np.sum(2 * weight * (0.7 * x - target) * x) / 32
    # metrics are float32
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], abs(grad), rtol=1e-6)
    # Adam's first update is the sign (eps 1e-8 against a gradient of order 100); learning rate 0.1 / 4
    np.testing.assert_allclose(state.params["a"], 0.7 - 0.025 * np.sign(grad), rtol=1e-7)
    np.testing.assert_allclose(metrics["learning_rate"], 0.025, rtol=1e-6)
    assert metrics["nonfinite_leaf"] == -1
    assert sorted(metrics) == ["grad_norm", "learning_rate", "loss", "nonfinite_leaf"]


@pytest.mark.fast
@pytest.mark.parametrize("grid", ["polynomial", "logsnr", "time_uniform"])
@pytest.mark.parametrize("to_zero", [False, True])
def test_one_step_to_the_target_is_two_steps_of_the_teacher(grid, to_zero, x64):
    student, teacher = pd.sigmas(settings(num_steps=6, grid=grid, to_zero=to_zero))
    assert student[-1] == (0 if to_zero else 0.006) and len(teacher) == 11
    table = pd.rows(student, teacher)
    x = 80 * jax.random.normal(jax.random.key(0), (4, *SHAPE))
    two = solvers.make_plan("euler", teacher)
    _, states = sample(gaussian.gaussian_denoiser, exact(), x, two, save_every=2)
    for k, expected in enumerate(states):
        row = jax.tree.map(lambda column: jnp.asarray(column[k]), table)  # noqa: B023
        target = pd.halved_target(gaussian.gaussian_denoiser, exact(), x, row)
        ratio = student[k + 1] / student[k]
        # float64, an identity: rounding of a few operations, in the scale of the state
        x = ratio * x + (1 - ratio) * target
        np.testing.assert_allclose(x, expected, rtol=1e-12, atol=1e-12 * float(jnp.abs(expected).max()))


def test_the_target_is_not_lost_to_rounding_at_large_noise():
    """float32 at t = 80 to 79.9: eq. 3 as written divides a difference of numbers of order 80 by 1e-3."""
    levels = np.array([80.0, 79.95, 79.9])
    row = jax.tree.map(lambda column: jnp.float32(column[0]), pd.rows(levels[::2], levels))
    x = 80 * jax.random.normal(jax.random.key(0), (4, *SHAPE))
    target = pd.halved_target(gaussian.gaussian_denoiser, exact(), x, row)
    start = np.asarray(x, np.float64)
    middle = start + (79.95 / 80 - 1) * (start - (0.25 * start + 0.3 * 80**2) / (0.25 + 80**2))
    end = middle + (79.9 / 79.95 - 1) * (middle - (0.25 * middle + 0.3 * 79.95**2) / (0.25 + 79.95**2))
    expected = (end - 79.9 / 80 * start) / (1 - 79.9 / 80)
    # float32 rounding of images of order 0.3; eq. 3 in float32 is off by 80 * 6e-8 / 1e-3 = 5e-3
    np.testing.assert_allclose(target, expected, rtol=0, atol=3e-7)


def test_gradients_flow_to_the_student_only():
    method = pd.make(settings(), scaled, scaled, optax.scale_by_adam(), lambda i: 1e-3)
    state = method.init({"a": jnp.float32(0.4)})

    def loss(trained, frozen):
        _, metrics = method.step(
            state._replace(params=trained), frozen, batch(8), jax.random.key(0), jnp.int32(0)
        )
        return metrics["loss"]

    trained, frozen = jax.grad(loss, argnums=(0, 1))(state.params, {"a": jnp.float32(0.6)})
    assert trained["a"] != 0 and frozen["a"] == 0


def test_dropout_is_the_students_and_conditions_are_both():
    seen = {"teacher": [], "student": []}

    def spy(name):
        def denoise(params, x, sigma, cond=None, key=None):
            seen[name].append((sorted(cond), key is not None))
            return scaled(params, x, sigma)

        return denoise

    given = {**batch(4), "label": jnp.zeros(4, jnp.int32)}
    for bounds, names in [((), ["label"]), ((1.0, 3.0), ["guidance_scale", "label"])]:
        method = pd.make(
            settings(guidance_range=bounds), spy("teacher"), spy("student"), optax.scale_by_adam(), lambda i: 1e-3
        )
        method.step(method.init({"a": jnp.float32(1)}), {"a": jnp.float32(1)}, given, jax.random.key(0), jnp.int32(0))
        assert seen["teacher"][-2:] == [(names, False), (names, False)]
        assert seen["student"][-1] == (names, True)
    assert len(seen["teacher"]) == 4 and len(seen["student"]) == 2  # two calls and one per iteration


def test_the_student_of_a_gaussian_reaches_the_teachers_two_steps():
    """D = gain_k x + offset_k holds the minimiser exactly, so that the loss goes to 0 and the samples agree."""
    chosen = settings(sigma_data=0.5)
    student, teacher = pd.sigmas(chosen)

    def linear(params, x, sigma, cond=None, key=None):
        # input of unit variance, as a network has it: then one learning rate suits all levels
        sigma = jnp.broadcast_to(jnp.asarray(sigma, x.dtype), x.shape[:1])
        k = jnp.argmin(jnp.abs(jnp.log(sigma)[:, None] - jnp.log(student[:-1]).astype(x.dtype)[None]), axis=1)
        gain, offset = (jnp.take(params[name], k).reshape(-1, 1, 1, 1) for name in ("gain", "offset"))
        return gain * x / jnp.sqrt(0.25 + sigma.reshape(-1, 1, 1, 1) ** 2) + offset

    rate = lambda i: 0.03 * jnp.minimum(1.0, 2.0 * (1 - i / 600))  # noqa: E731, Adam comes to rest
    method = pd.make(chosen, gaussian.gaussian_denoiser, linear, optax.scale_by_adam(), rate)

    def iteration(state, i):
        data, key = jax.random.split(jax.random.fold_in(jax.random.key(0), i))
        image = GAUSSIAN["mean"] + GAUSSIAN["std"] * jax.random.normal(data, (64, *SHAPE))
        state, metrics = method.step(state, exact(), {"image": image}, key, i)
        return state, metrics["loss"]

    state = method.init({"gain": jnp.zeros(3), "offset": jnp.zeros(3)})
    state, losses = jax.jit(lambda s: jax.lax.scan(iteration, s, jnp.arange(600)))(state)
    plan = few_step.student_plan(4, 0.006, 80.0, afs=False)
    assert (plan.nfe, plan.num_steps) == (3, 3)
    np.testing.assert_array_equal(plan.sigmas, student)
    x = 80 * jax.random.normal(jax.random.key(1), (256, *SHAPE))
    found = sample(linear, state.params, x, plan)
    expected = sample(gaussian.gaussian_denoiser, exact(), x, solvers.make_plan("euler", teacher))
    once = sample(gaussian.gaussian_denoiser, exact(), x, plan)
    scale = float(jnp.std(expected))
    assert float(jnp.abs(once - expected).max()) > 0.2 * scale  # the untrained student: Euler in half the steps
    # what 600 updates leave, with a rate that falls to 0
    assert float(jnp.abs(found - expected).max()) < 0.01 * scale
    assert losses[-1] < 1e-4 * losses[0]


@pytest.mark.fast
def test_the_guided_target_is_the_guided_combination(x64):
    seen = []
    chosen = settings(stage="match", guidance_range=(1.0, 5.0), num_classes=3)
    label = jnp.arange(12, dtype=jnp.int32) % 3
    teacher = {"std": jnp.asarray(0.5)}
    method = pd.make(chosen, recorder(seen, labelled), recorder(seen), optax.scale_by_adam(), lambda i: 1e-3)
    state = method.init({"a": jnp.float64(0.7)})
    given = {**batch(12, dtype=jnp.float64), "label": label}
    _, metrics = method.step(state, teacher, given, jax.random.key(1), jnp.int32(0))
    (x, t, first), (_, _, second), (x_student, t_student, told) = seen
    np.testing.assert_array_equal(first["label"], label)
    np.testing.assert_array_equal(second["label"], 3)  # the null label
    assert "guidance_scale" not in first and "guidance_scale" not in second
    np.testing.assert_array_equal(x_student, x)
    np.testing.assert_array_equal(t_student, t)
    w = told["guidance_scale"]
    assert w.dtype == np.float32 and w.shape == (12,) and len(set(w)) == 12 and np.all((w >= 1) & (w <= 5))
    # the posterior mean is linear in the mean of the data, so guidance moves that mean
    mean, noise = column(3 + w.astype(np.float64) * (np.asarray(label) - 3)), column(t) ** 2
    target = (0.25 * x + noise * mean) / (0.25 + noise)
    loss = np.sum(np.maximum(1 / noise, 1) * (0.7 * x - target) ** 2) / 12
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)  # metrics are float32
    cond = {"label": label, "guidance_scale": jnp.asarray(w)}
    found = pd.guided_target(labelled, teacher, jnp.asarray(x), jnp.asarray(t), cond, 3)
    np.testing.assert_allclose(found, target, rtol=1e-12, atol=1e-12)  # float64, values of order 1


def test_levels_of_the_guided_stage_cover_the_grid_evenly():
    seen = []
    chosen = settings(stage="match", guidance_range=(2.0, 2.0), num_classes=3, num_steps=5)
    method = pd.make(chosen, labelled, recorder(seen), optax.scale_by_adam(), lambda i: 1e-3)
    given = {"image": jnp.zeros((8000, 1, 1, 1)), "label": jnp.zeros(8000, jnp.int32)}
    method.step(method.init({"a": jnp.float32(0)}), {"std": jnp.float32(0.5)}, given, jax.random.key(0), jnp.int32(0))
    t, w = seen[0][1], seen[0][2]["guidance_scale"]
    np.testing.assert_array_equal(w, 2.0)
    student, _ = pd.sigmas(chosen)
    counts, _ = np.histogram(np.log(t), np.log(student[::-1]) + [-1e-5, 0, 0, 0, 1e-5])  # float32 rounding at the ends
    assert counts.sum() == 8000 and len(np.unique(t)) > 7000
    # binomial with p = 1/4: 5 standard deviations
    assert np.all(np.abs(counts - 2000) < 5 * np.sqrt(8000 * 0.25 * 0.75))


def test_a_guided_student_is_halved_at_its_own_scale(x64):
    """"halve" with scales: teacher and student see the same w, twice and once."""
    seen = []

    def told(params, x, sigma, cond=None, key=None):
        return params["a"] * cond["guidance_scale"].astype(x.dtype).reshape(-1, 1, 1, 1) + 0 * x

    chosen = settings(guidance_range=(1.0, 5.0))
    method = pd.make(chosen, recorder(seen, told), recorder(seen, told), optax.scale_by_adam(), lambda i: 1e-3)
    params = {"a": jnp.float64(0.7)}
    _, metrics = method.step(method.init(params), params, batch(6, dtype=jnp.float64), jax.random.key(0), jnp.int32(0))
    scales = [cond["guidance_scale"] for _, _, cond in seen]
    assert len(scales) == 3 and np.all(scales[0] == scales[1]) and np.all(scales[0] == scales[2])
    assert len(set(scales[0])) == 6
    assert metrics["loss"] < 1e-20  # the teacher's two answers are one image, and the student's is the same; float64


def test_the_step_compiles_once_and_repeats_with_its_key():
    method = pd.make(settings(), gaussian.gaussian_denoiser, scaled, optax.scale_by_adam(), lambda i: 1e-3)
    traces = []
    step = jax.jit(lambda *arguments: traces.append(0) or method.step(*arguments))
    state = method.init({"a": jnp.float32(0.7)})
    losses = [
        float(step(state, exact(), batch(8), jax.random.key(key), jnp.int32(i))[1]["loss"])
        for i, key in enumerate((0, 1, 0))
    ]
    assert len(traces) == 1
    assert losses[0] == losses[2] != losses[1]


def test_prepare_makes_the_batch():
    images = jnp.arange(2 * np.prod(SHAPE), dtype=jnp.uint8).reshape(2, *SHAPE)

    def prepare(batch, key):
        assert key is not None
        return {"image": batch["image"].astype(jnp.float32) / 127.5 - 1}

    def step(given, **options):
        method = pd.make(settings(), scaled, scaled, optax.scale_by_adam(), lambda i: 1e-3, **options)
        params = {"a": jnp.float32(0.7)}
        return method.step(method.init(params), {"a": jnp.float32(0.5)}, given, jax.random.key(0), jnp.int32(0))[1]

    assert step({"image": images}, prepare=prepare)["loss"] == step(prepare({"image": images}, 0))["loss"]
    with pytest.raises(ValueError, match=r"image must be float32 .* found uint8 \(2, 2, 3, 1\): give `prepare`"):
        step({"image": images})


def test_a_batch_without_labels_is_refused_by_the_guided_stage():
    chosen = settings(stage="match", guidance_range=(1.0, 5.0), num_classes=3)
    method = pd.make(chosen, scaled, scaled, optax.scale_by_adam(), lambda i: 1e-3)
    params = {"a": jnp.float32(1)}
    with pytest.raises(ValueError, match=r"guidance needs cond\['label'\] to replace, found \[\]"):
        method.step(method.init(params), params, batch(2), jax.random.key(0), jnp.int32(0))


def test_the_first_bad_gradient_is_named():
    def denoise(params, x, sigma, cond=None, key=None):
        # below 0 the value is 0, and the derivative 0 times that of a root of a negative number: NaN, for b alone
        return params["a"] * x + jnp.where(params["b"] > 0, jnp.sqrt(params["b"]), 0.0)

    method = pd.make(settings(), gaussian.gaussian_denoiser, denoise, optax.scale_by_adam(), lambda i: 1e-3)
    state = method.init({"a": jnp.float32(-1), "b": jnp.float32(-1)})
    _, metrics = method.step(state, exact(), batch(2), jax.random.key(0), jnp.int32(0))
    assert int(metrics["nonfinite_leaf"]) == 1 and np.isfinite(metrics["loss"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "half"}, r"stage must be one of \('halve', 'match'\), found 'half'"),
        ({"num_steps": 1}, "at least 2 with afs=False, found 1"),
        ({"sigma_min": 0.0}, "0 < sigma_min < sigma_max, found 0.0 and 80.0"),
        ({"grid": "polynom"}, "unknown grid 'polynom'; did you mean 'polynomial'"),
        ({"sigma_data": 0.0}, "sigma_data must be positive, found 0.0; 1 is the published weight"),
        ({"num_classes": -1}, r"num_classes must be 0 \(no labels\) or positive, found -1"),
        ({"guidance_range": (2.0,)}, r"guidance_range must be \(\) or \(low, high\) .* found \(2.0,\): for one scale"),
        ({"guidance_range": (3.0, 2.0)}, r"0 <= low <= high, found \(3.0, 2.0\)"),
        ({"guidance_range": (-1.0, 2.0)}, r"0 <= low <= high, found \(-1.0, 2.0\)"),
        ({"guidance_range": (1.0, np.inf)}, r"0 <= low <= high, found \(1.0, inf\)"),
        ({"stage": "match", "num_classes": 3}, r"learns a guided teacher: give guidance_range, .* found \(\)"),
        ({"stage": "match", "guidance_range": (1.0, 2.0)}, "needs a teacher with a null label.*set num_classes"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(changes, message):
    with pytest.raises(ValueError, match=message):
        pd.make(settings(**changes), scaled, scaled, optax.scale_by_adam(), lambda i: 1e-3)


def test_a_discrete_grid_must_not_depend_on_the_number_of_levels():
    sizes = []

    def time_to_sigma(tau):
        sizes.append(np.size(tau))
        return tau * (1 + (np.size(tau) == 7) * 1e-6 * (tau < 0.9) * (tau > 0.1))

    options = {"sigma_to_time": lambda sigma: sigma, "time_to_sigma": time_to_sigma}
    chosen = settings(grid="discrete", rho=1.0, sigma_max=1.0)
    with pytest.raises(ValueError, match="noise level 2 i of the fine grid must be level i"):
        pd.make(chosen, scaled, scaled, optax.scale_by_adam(), lambda i: 1e-3, grid_options=options)
    assert set(sizes) >= {4, 7}
