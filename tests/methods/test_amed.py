"""AMED's training: updates by hand, gradients by differences, counts, the gain on a Gaussian mixture, errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from diffjax.core import gaussian, grids, solvers
from diffjax.methods import amed
from diffjax.runtime import mesh
from diffjax.models.amed_predictor import AmedPredictor
from diffjax.nn.functional import functionalize
from diffjax.runtime import mesh
from diffjax.sampling.sample import sample

GAUSSIAN = {"mean": 0.3, "std": 0.5}
RATE = 0.05


def settings(**changes):
    return dataclasses.replace(amed.Settings(num_steps=4, batch_size=6, image_shape=(2, 3)), **changes)


def teacher_params():
    return jax.tree.map(jnp.asarray, GAUSSIAN)


def moments(params, x, sigma, cond=None):
    data = gaussian.gaussian_denoiser(params, x, sigma).reshape(x.shape[0], -1)
    return jnp.stack([jnp.mean(data, axis=1), jnp.std(data, axis=1)], axis=1)


def linear(params, features, sigma, sigma_next):
    """Three numbers that depend on the features and on the levels."""
    shift = 0.1 * jnp.log(sigma) + 0.05 * jnp.log(sigma_next)
    return params["bias"][None] + shift + features @ params["weight"]


def predictor_params():
    weight = 0.3 * jax.random.normal(jax.random.key(5), (2, 3))
    return {"bias": jnp.array([0.2, -0.4, 0.6], weight.dtype), "weight": weight}


def run_update(chosen, params, noise, optimizer=None, denoise=gaussian.gaussian_denoiser, features=moments):
    optimizer = optimizer or optax.scale_by_adam()
    update = amed.make_update(chosen, denoise, features, linear, optimizer)
    state = amed.AmedState(params, optimizer.init(params))
    return jax.jit(update)(state, teacher_params(), noise, {}, RATE)


# The algorithm, derived again ------------------------------------------------------------------------------------


def denoised(x, sigma):
    return (0.25 * x + sigma**2 * 0.3) / (0.25 + sigma**2)


def step_by_hand(chosen, params, x, t, t_next, past, analytical):
    """One step of AMED-Solver or of the iPNDM plug-in of order 2 in NumPy: (y, values of the step)."""
    d = x / np.sqrt(1 + t**2) if analytical else (x - denoised(x, t)) / t
    data = denoised(x, t).reshape(len(x), -1)
    features = np.stack([data.mean(1), data.std(1)], axis=1) * (0 if analytical else 1)
    raw = params["bias"] + 0.1 * np.log(t) + 0.05 * np.log(t_next) + features @ params["weight"]
    gate = (1 / (1 + np.exp(-raw)))[:, :, None, None]
    r = gate[:, 0]
    c, a = (1 - s + 2 * s * gate[:, i] for i, s in ((1, chosen.scale_dir), (2, chosen.scale_time)))
    middle = t_next**r * t ** (1 - r)

    def mean_slope(new, old):
        return new if old is None else (3 * new - old) / 2

    multistep = chosen.solver == "ipndm"
    x_m = x + (middle - t) * (mean_slope(d, past) if multistep else d)
    d_m = (x_m - denoised(x_m, a * middle)) / middle
    if multistep:
        return x_m + c * (t_next - middle) * mean_slope(d_m, d), d_m
    return x + c * (t_next - t) * d_m, None


@pytest.mark.parametrize("loss", ["l2", "l1"])
@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("solver", ["amed", "ipndm"])
def test_updates_equal_a_loop_written_by_hand(solver, afs, loss, x64):
    """Losses, states, gradients by central differences and plain descent, N-1 updates; the state comes from the
    weights before the update, and the next step starts where equation (4) says."""
    chosen = settings(
        solver=solver, order=2, afs=afs, loss=loss, scale_dir=0.1, scale_time=0.2, grid="polynomial", rho=7.0
    )
    t = grids.polynomial(4, 0.002, 80.0)
    noise = jax.random.normal(jax.random.key(1), (6, 2, 3))
    descent = optax.scale(1e-2)
    state, trace = run_update(chosen, predictor_params(), noise, descent)
    fine = solvers.make_plan("heun", grids.polynomial(7, 0.002, 80.0))
    _, targets = sample(gaussian.gaussian_denoiser, teacher_params(), 80.0 * noise, fine, save_every=2)
    np.testing.assert_allclose(trace.teacher, targets, rtol=1e-12)

    flat, unflatten = ravel_pytree(predictor_params())
    flat, x, past = np.array(flat), 80.0 * np.asarray(noise), None
    for k, target in enumerate(np.asarray(targets)):

        def objective(flat, x=x, past=past, k=k, target=target):
            params = jax.tree.map(np.asarray, unflatten(jnp.asarray(flat)))
            y, value = step_by_hand(chosen, params, x, t[k], t[k + 1], past, afs and k == 0)
            error = (y - target) ** 2 if loss == "l2" else np.abs(y - target)
            return error.sum() / 6, y, value

        value, y, past = objective(flat)
        np.testing.assert_allclose(trace.loss[k], value, rtol=1e-9)
        np.testing.assert_allclose(trace.student[k], y, rtol=1e-9, atol=1e-12)
        width = 1e-5
        grad = np.array([(objective(flat + e)[0] - objective(flat - e)[0]) / (2 * width) for e in width * np.eye(9)])
        # differences of width 1e-5: truncation 1e-10, and rounding of the loss (up to 10) over the width, 1e-10
        np.testing.assert_allclose(trace.grad_norm[k], np.linalg.norm(grad), rtol=1e-6)
        flat = flat - RATE * 1e-2 * grad
        x = target if solver == "amed" else y
    np.testing.assert_allclose(ravel_pytree(state.params)[0], flat, rtol=1e-8)
    np.testing.assert_array_equal(trace.nonfinite_leaf, [-1, -1, -1])


@pytest.mark.parametrize("solver", ["amed", "dpm2s", "euler", "ipndm", "dpmpp", "dpmpp_noise"])
def test_untouched_weights_repeat_the_sampler(solver, x64):
    """At rate 0 multistep students visit the states of the sampler; one-step students restart from the teacher."""
    chosen = settings(solver=solver, scale_dir=0.1, scale_time=0.2)
    noise = jax.random.normal(jax.random.key(2), (6, 2, 3))
    _, trace = run_update(chosen, predictor_params(), noise, optax.scale(0.0))
    params = {"teacher": teacher_params(), "predictor": predictor_params()}
    draw = amed.make_sampler(moments, linear)
    end = draw(gaussian.gaussian_denoiser, params, 80.0 * noise, amed.make_plan(chosen))
    if solver in ("amed", "dpm2s", "euler"):
        assert np.max(np.abs(trace.student[-1] - end)) > 1e-3
    else:
        np.testing.assert_allclose(trace.student[-1], end, rtol=1e-12)


def test_calls_and_updates(x64):
    """Teacher and student of one iteration, counted as they run: Heun 2 K (N-1), student 2 (N-1) - 1, N-1 updates."""
    calls = {"denoise": 0, "features": 0}

    def counting(function, name):
        def counted(params, x, sigma, cond=None, key=None):
            jax.debug.callback(lambda _: calls.__setitem__(name, calls[name] + 1), jax.lax.stop_gradient(x))
            return function(params, x, sigma, cond)

        return counted

    chosen = settings(teacher_factor=3)
    noise = jax.random.normal(jax.random.key(1), (6, 2, 3))
    denoise, features = counting(gaussian.gaussian_denoiser, "denoise"), counting(moments, "features")
    state, trace = run_update(chosen, predictor_params(), noise, None, denoise, features)
    jax.block_until_ready((state, trace))
    jax.effects_barrier()
    assert calls == {"denoise": 2 * 3 * 3 + 5, "features": 2}
    assert int(state.opt_state.count) == 3 and trace.grad_norm.shape == (3,)


def test_analytical_step_is_trained_on_zeros():
    """The first step sees neither the features nor the network at t_0, and still has a gradient."""
    noise = jax.random.normal(jax.random.key(3), (6, 2, 3))
    doubled = run_update(settings(), predictor_params(), noise, features=lambda *a: 2 * moments(*a))[1]
    _, trace = run_update(settings(), predictor_params(), noise)
    assert trace.loss[0] == doubled.loss[0] > 0 and trace.grad_norm[0] == doubled.grad_norm[0] > 0
    assert abs(trace.loss[1] / doubled.loss[1] - 1) > 1e-3


# The method ------------------------------------------------------------------------------------------------------


def mixture():
    mean = jax.random.normal(jax.random.key(0), (4, 2, 3))
    return {"mean": mean, "std": jnp.array([0.1, 0.2, 0.05, 0.1]), "weight": jnp.array([0.3, 0.3, 0.2, 0.2])}


def mixture_features(params, x, sigma, cond=None):
    return gaussian.mixture_denoiser(params, x, sigma).reshape(x.shape[0], -1)


@pytest.mark.parametrize("solver", ["amed", "ipndm", "dpmpp"])
def test_training_moves_to_the_exact_trajectory(solver):
    """The published predictor on six features of a mixture, 5 calls; the error on samples that it has not seen."""
    predict, init = functionalize(lambda rngs: AmedPredictor(6, rngs=rngs))
    chosen = settings(
        solver=solver, batch_size=128, grid="polynomial", rho=7.0, scale_dir=0.1, scale_time=0.2, teacher_factor=8
    )
    rate = optax.schedules.cosine_decay_schedule(2e-3, 400)
    method = amed.make(
        chosen, gaussian.mixture_denoiser, mixture_features, predict, optax.scale_by_adam(), rate
    )

    def iteration(state, j):
        return method.step(state, mixture(), {}, jax.random.fold_in(jax.random.key(4), j), j)

    start = method.init(init(jax.random.key(6)))
    state, _ = jax.jit(lambda s: jax.lax.scan(iteration, s, jnp.arange(400)))(start)
    fresh = 80.0 * jax.random.normal(jax.random.key(7), (256, 2, 3))
    fine = solvers.make_plan("heun", grids.polynomial(401, 0.002, 80.0))
    exact = sample(gaussian.mixture_denoiser, mixture(), fresh, fine)
    draw = jax.jit(amed.make_sampler(mixture_features, predict), static_argnums=0)

    def error(predictor):
        params = {"teacher": mixture(), "predictor": predictor}
        end = draw(gaussian.mixture_denoiser, params, fresh, amed.make_plan(chosen))
        return float(jnp.mean(jnp.linalg.norm((end - exact).reshape(256, -1), axis=1)))

    neutral = jax.tree.map(jnp.zeros_like, start.params)  # r = 1/2, c = a = 1
    # found 0.06, 0.39 and 0.29 of the error at the start; 0.08, 0.67 and 0.35 of the neutral one. The rounding of the
    # machine code matters: with optimised code iPNDM has 0.30 and 0.52
    assert error(state.params) < 0.5 * error(start.params)
    assert error(state.params) < 0.8 * error(neutral)


def test_method_metrics_labels_and_one_program():
    seen, traced = [], []

    def denoise(params, x, sigma, cond=None, key=None):
        seen.append(cond["label"].shape)
        return gaussian.gaussian_denoiser(params, x, sigma)

    method = amed.make(
        settings(num_classes=10), denoise, moments, linear, optax.scale_by_adam(), lambda i: 1e-3 * (i + 1)
    )

    def step(*arguments):
        traced.append(1)
        return method.step(*arguments)

    compiled, state = jax.jit(step), method.init(predictor_params())
    for i in range(3):
        state, metrics = compiled(state, teacher_params(), {}, jax.random.key(i), jnp.int32(i))
    assert len(traced) == 1 and set(seen) == {(6,)}
    assert set(metrics) == {
        "loss", "loss_t0", "loss_t1", "loss_t2", "grad_norm", "learning_rate", "nonfinite_leaf"
    }  # fmt: skip
    assert metrics["loss"] == pytest.approx(np.mean([metrics[f"loss_t{k}"] for k in range(3)]), rel=1e-6)
    assert metrics["learning_rate"] == pytest.approx(3e-3) and metrics["nonfinite_leaf"] == -1
    assert metrics["nonfinite_leaf"].dtype == jnp.int32 and metrics["loss"].dtype == jnp.float32
    again, _ = compiled(method.init(predictor_params()), teacher_params(), {}, jax.random.key(0), jnp.int32(0))
    other, _ = compiled(method.init(predictor_params()), teacher_params(), {}, jax.random.key(1), jnp.int32(0))
    assert not np.array_equal(again.params["weight"], other.params["weight"])  # the key makes the noise


def test_non_finite_gradients_are_reported():
    """sqrt at 0: finite numbers, infinite gradient of the second parameter."""

    def predict(params, features, sigma, sigma_next):
        return linear(params["a"], features, sigma, sigma_next) + jnp.sqrt(params["root"])

    method = amed.make(
        settings(), gaussian.gaussian_denoiser, moments, predict, optax.identity(), lambda i: jnp.float32(0)
    )
    params = {"a": predictor_params(), "root": jnp.zeros(())}
    _, metrics = jax.jit(method.step)(method.init(params), teacher_params(), {}, jax.random.key(0), jnp.int32(0))
    assert metrics["nonfinite_leaf"] == 2 and np.isfinite(metrics["loss_t0"])


def test_trajectories_over_devices():
    results = []
    for num_devices in (1, 2):
        method = amed.make(
            settings(), gaussian.gaussian_denoiser, moments, linear, optax.scale_by_adam(), lambda i: jnp.float32(1e-2)
        )
        arguments = method.init(predictor_params()), teacher_params(), {}, jax.random.key(0), jnp.int32(0)
        with jax.set_mesh(mesh.make_mesh(num_devices)):
            results.append(jax.device_get(jax.jit(method.step)(*arguments)))
    # float32 sums in another order, one Adam step of 1e-2
    np.testing.assert_allclose(results[0][0].params["weight"], results[1][0].params["weight"], atol=2e-5)
    np.testing.assert_allclose(results[0][1]["loss"], results[1][1]["loss"], rtol=1e-5)


def test_plan_is_the_one_that_was_trained():
    chosen = settings(solver="ipndm", order=3, scale_time=0.2, grid="polynomial", rho=7.0, sigma_min=0.006)
    plan = amed.make_plan(chosen)
    np.testing.assert_array_equal(plan.sigmas, grids.polynomial(4, 0.006, 80.0))
    assert (plan.solver, plan.order, plan.afs, plan.nfe) == ("ipndm", 3, True, 5)
    assert (plan.scale_dir, plan.scale_time) == (0.01, 0.2)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 1}, "at least 2, found 1"),
        ({"teacher_factor": 0}, "teacher_factor .* at least 1, found 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, found 0"),
        ({"image_shape": ()}, "image_shape is the shape of one sample"),
        ({"num_classes": -1}, "num_classes must be 0"),
        ({"loss": "l3"}, "unknown loss 'l3'; did you mean 'l"),
        ({"solver": "adem"}, "did you mean 'amed'"),
        ({"solver": "ipndm", "order": 7}, "order=7"),
        ({"scale_dir": 1.5}, r"in \[0, 1\), found 1.5"),
        ({"teacher_solver": "hern"}, "did you mean 'heun'"),
        ({"sigma_min": 90.0}, "0 < sigma_min < sigma_max"),
        ({"grid": "polinomial"}, "did you mean 'polynomial'"),
    ],
)
def test_settings_that_cannot_work(changes, message):
    with pytest.raises(ValueError, match=message):
        amed.make(settings(**changes), gaussian.gaussian_denoiser, moments, linear, optax.scale_by_adam(), None)
