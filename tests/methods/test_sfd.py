"""SFD: what each step sees and changes, known numbers, identities, counts, devices."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax.core import gaussian, grids, solvers
from diffjax.methods import from_noise, sfd
from diffjax.runtime import mesh
from diffjax.sampling.sample import sample
from diffjax.train import optim

GAUSSIAN = {"mean": 0.0, "std": 0.5}


def settings(**changes):
    return dataclasses.replace(sfd.Settings(num_steps=(4,), batch_size=8, image_shape=(2, 3)), **changes)


def constant_rate(rate):
    return lambda iteration: jnp.asarray(rate)


def gaussian_params():
    return jax.tree.map(jnp.asarray, GAUSSIAN)


def student_denoise(params, x, sigma, cond=None, key=None):
    """(1 + gain) D_gaussian + c_out shift: every parameter matters at every level."""
    c_out = 0.5 * sigma / jnp.sqrt(sigma**2 + 0.25)
    base = gaussian.gaussian_denoiser(GAUSSIAN, x, sigma)
    return (1 + params["gain"]) * base + c_out * params["shift"][None]


def student_params():
    return {"gain": jnp.zeros(()), "shift": jnp.zeros((2, 3))}


def run_update(chosen, denoise, params, noise, rate, teacher=gaussian.gaussian_denoiser, cond=None, key=None):
    """One iteration from fresh Adam moments: (state, trace)."""
    optimizer = optax.scale_by_adam()
    update = sfd.make_update(chosen, teacher, denoise, optimizer)
    state = sfd.SFDState(params, optimizer.init(params))
    return jax.jit(update)(state, sfd.Frozen(gaussian_params()), noise, cond or {}, key, rate)


# Known numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize(
    ("num_steps", "expected"),
    [
        (4, [5.206459e-3, 1.353227e-1, 3.314563e-1]),
        (5, [1.235423e-3, 2.674301e-2, 2.355878e-1, 2.600481e-1]),
        (7, [5.196215e-4, 4.628404e-3, 2.116842e-2, 9.918685e-2, 1.860314e-1, 1.826615e-1]),
    ],
)
def test_initial_loss_on_a_gaussian(num_steps, expected, x64):
    """Every state is a known multiple of x_0 = 80: the losses of the published settings before any training."""
    chosen = settings(num_steps=(num_steps,))
    params = {"gain": jnp.zeros(()), "shift": jnp.zeros((1, 1))}
    _, trace = run_update(chosen, student_denoise, params, jnp.ones((1, 1, 1)), 0.0)
    np.testing.assert_allclose(trace.loss, expected, rtol=5e-7)  # 7 digits are given
    if num_steps == 4:
        factors = [1.3674874309e-1, 1.0337212782e-2, 7.2862162028e-3]
        np.testing.assert_allclose(trace.teacher[:, 0, 0, 0] / 80, factors, rtol=1e-10)  # 11 digits are given


def test_expected_loss_of_drawn_noise():
    """For unit noise the sum over D pixels is sqrt(2/pi) D times the loss at |z| = 1."""
    chosen = settings(batch_size=64, image_shape=(16, 16))
    params = {"gain": jnp.zeros(()), "shift": jnp.zeros((16, 16))}
    method = sfd.make(
        chosen, gaussian.gaussian_denoiser, student_denoise, optax.scale_by_adam(), constant_rate(0.0)
    )
    step = jax.jit(method.step)
    _, metrics = step(method.init(params), sfd.Frozen(gaussian_params()), {}, jax.random.key(0), jnp.int32(0))
    expected = np.sqrt(2 / np.pi) * 256 * np.array([5.206459e-3, 1.353227e-1, 3.314563e-1])
    # |z| has relative deviation 0.76, averaged over 64 * 256 draws: 0.6 %; three of these
    np.testing.assert_allclose([metrics[f"loss_t{k}"] for k in range(3)], expected, rtol=0.018)
    assert metrics["loss"] == pytest.approx(np.mean([metrics[f"loss_t{k}"] for k in range(3)]), rel=1e-6)


# The algorithm, derived again ------------------------------------------------------------------------------------


def by_hand(chosen, params, noise, targets, rate):
    """Equations (1)-(5) of the module and Adam in NumPy: the gradients of this student are sums of signs."""
    t = grids.polynomial(chosen.num_steps[0], chosen.sigma_min, chosen.sigma_max)
    gain, shift = 0.0, np.zeros_like(params["shift"])
    m, v, count = [0.0, 0.0 * shift], [0.0, 0.0 * shift], 0
    x, losses, trail = noise * t[0], [], []
    for k in range(chosen.num_steps[0] - 1):
        base = 0.25 * x / (0.25 + t[k] ** 2)
        c_out = 0.5 * t[k] / np.sqrt(t[k] ** 2 + 0.25)
        analytical = chosen.afs and k == 0
        d = x / np.sqrt(1 + t[0] ** 2) if analytical else (x - (1 + gain) * base - c_out * shift) / t[k]
        h = t[k + 1] - t[k]
        y = x + h * d
        losses.append(np.sum(np.abs(y - targets[k])) / len(x))
        if not analytical:
            signs = np.sign(y - targets[k]) * (-h / t[k]) / len(x)
            grads = [np.sum(signs * base), np.sum(signs, axis=0) * c_out]
            count += 1
            m = [0.9 * a + 0.1 * g for a, g in zip(m, grads, strict=True)]
            v = [0.999 * a + 0.001 * g**2 for a, g in zip(v, grads, strict=True)]
            move = [
                rate * (a / (1 - 0.9**count)) / (np.sqrt(b / (1 - 0.999**count)) + 1e-8)
                for a, b in zip(m, v, strict=True)
            ]
            gain, shift = gain - move[0], shift - move[1]
            trail.append(gain)
        x = y
    return losses, gain, shift, trail


@pytest.mark.parametrize("afs", [True, False])
def test_updates_equal_a_loop_written_by_hand(afs, x64):
    chosen = settings(num_steps=(6,), afs=afs)
    noise = jax.random.normal(jax.random.key(1), (8, 2, 3))
    state, trace = run_update(chosen, student_denoise, student_params(), noise, 0.01)
    losses, gain, shift, trail = by_hand(
        chosen, jax.tree.map(np.asarray, student_params()), np.asarray(noise), np.asarray(trace.teacher), 0.01
    )
    # float64 rounding through six steps and Adam
    np.testing.assert_allclose(trace.loss, losses, rtol=1e-10)
    np.testing.assert_allclose(state.params["gain"], gain, rtol=0, atol=1e-10)
    np.testing.assert_allclose(state.params["shift"], shift, rtol=0, atol=1e-10)
    assert len(set(trail)) == (4 if afs else 5) == int(state.opt_state.count)  # one update per noise level


def test_each_state_comes_from_the_weights_before_its_update(x64):
    """y_1 is the Euler step of the untouched weights, however large the updates are; y_2 is not."""
    noise = jax.random.normal(jax.random.key(2), (4, 2, 3))
    quiet = run_update(settings(), student_denoise, student_params(), noise, 0.0)[1]
    loud = run_update(settings(), student_denoise, student_params(), noise, 0.3)[1]
    np.testing.assert_array_equal(quiet.student[1], loud.student[1])
    assert np.max(np.abs(quiet.student[2] - loud.student[2])) > 0.05


def test_analytical_step_does_not_see_the_weights():
    noise = jax.random.normal(jax.random.key(3), (4, 2, 3))
    moved = {"gain": jnp.float32(0.5), "shift": jnp.ones((2, 3))}
    losses = [run_update(settings(), student_denoise, p, noise, 0.0)[1].loss for p in (student_params(), moved)]
    assert losses[0][0] == losses[1][0] > 0
    assert np.all(np.abs(losses[0][1:] - losses[1][1:]) > 0.01)


# Non-finite gradients --------------------------------------------------------------------------------------------


def rooted_denoise(params, x, sigma, cond=None, key=None):
    """The gradients of `safe` are finite, of `up` and `down` +inf and -inf, of `undefined` NaN; D itself is finite."""
    roots = jnp.sqrt(params["up"]) - jnp.sqrt(params["down"]) + jnp.sqrt(params["undefined"] ** 2)
    return x - x * (1 + 0 * params["safe"]) + params["safe"] + roots


@pytest.mark.parametrize("released", [True, False])
def test_non_finite_gradients(released):
    """One update, N=3: all pixels err to the same side, so no infinity meets its opposite."""
    params = {name: jnp.zeros(()) for name in ("down", "safe", "undefined", "up")}
    chosen = settings(num_steps=(3,), released_gradient_rule=released, batch_size=1)
    method = sfd.make(
        chosen, lambda *_: jnp.full((1, 2, 3), -9.0), rooted_denoise, optax.identity(), constant_rate(1e-5)
    )
    state, metrics = jax.jit(method.step)(method.init(params), sfd.Frozen({}), {}, jax.random.key(0), jnp.int32(0))
    moved = {name: float(value) for name, value in state.params.items()}
    if released:
        assert metrics["nonfinite_leaf"] == -1
        assert moved["up"] == pytest.approx(-1.0) and moved["down"] == pytest.approx(1.0)  # rate * 1e5
        assert moved["undefined"] == 0 and -1e-3 < moved["safe"] < 0
    else:
        assert metrics["nonfinite_leaf"] == 0  # "down", the first in the order of paths
        assert np.isinf(moved["up"]) and np.isinf(moved["down"]) and np.isnan(moved["undefined"])
    assert np.isfinite(metrics["loss"])


# Identities ------------------------------------------------------------------------------------------------------


def test_student_equal_to_its_teacher_has_no_loss(x64):
    """K=1, Euler, no AFS. Loss, not weights: L1 with Adam moves weights by the rate on rounding noise."""
    chosen = settings(num_steps=(6,), afs=False, teacher_factor=1, teacher_solver="euler", teacher_order=None)
    noise = jax.random.normal(jax.random.key(4), (8, 2, 3))
    _, trace = run_update(chosen, student_denoise, student_params(), noise, 0.0)
    assert np.max(trace.loss) <= 1e-12


def test_analytical_step_is_an_euler_step(x64):
    """for the denoiser x (1 - t_0 / sqrt(1 + t_0^2)), that is unit-variance data seen as if t_0 were large."""

    def unit_denoise(params, x, sigma, cond=None, key=None):
        return params["scale"] * x * (1 - sigma / jnp.sqrt(1 + sigma**2))

    noise = jax.random.normal(jax.random.key(5), (4, 2, 3))
    params = {"scale": jnp.ones(())}
    states = [
        run_update(settings(afs=afs), unit_denoise, params, noise, 0.0)[1].student for afs in (True, False)
    ]
    np.testing.assert_allclose(states[0], states[1], rtol=1e-12)  # float64 rounding


def test_second_stage_targets_are_states_of_the_first_student(x64):
    """N=3, K=3, a teacher that is Euler with AFS: states 3 and 6 of its own 7-level trajectory."""
    chosen = settings(
        num_steps=(3,), teacher_factor=3, teacher_solver="euler", teacher_order=None, teacher_afs=True
    )
    noise = jax.random.normal(jax.random.key(6), (4, 2, 3))
    _, trace = run_update(chosen, student_denoise, student_params(), noise, 0.0)
    plan = solvers.make_plan("euler", grids.polynomial(7, 0.006, 80.0), afs=True)
    _, states = sample(gaussian.gaussian_denoiser, gaussian_params(), noise * 80.0, plan, save_every=1)
    np.testing.assert_allclose(trace.teacher, states[np.array([2, 5])], rtol=1e-12)  # float64 rounding


# Counts ----------------------------------------------------------------------------------------------------------


def counted(name, counts, denoise):
    """`denoise` that counts its evaluations and those of its derivative when they run."""

    def tick(kind):
        counts[name, kind] += 1

    @jax.custom_vjp
    def marked(d):
        return d

    def forward(d):
        return d, None

    def backward(_, g):
        jax.debug.callback(tick, "backward")
        return (g,)

    marked.defvjp(forward, backward)

    def counting(params, x, sigma, cond=None, key=None):
        jax.debug.callback(tick, "forward")
        return marked(denoise(params, x, sigma, cond, key))

    return counting


@pytest.mark.parametrize(("num_steps", "factor", "afs"), [(4, 4, True), (5, 2, False)])
def test_network_calls(num_steps, factor, afs):
    """An iteration costs K(N-1) teacher calls and N-2 student calls with gradient (N-1 without AFS), no more."""
    counts = collections.Counter()
    chosen = settings(num_steps=(num_steps,), teacher_factor=factor, afs=afs)
    noise = jnp.ones((2, 2, 3))
    student = counted("student", counts, student_denoise)
    teacher = counted("teacher", counts, gaussian.gaussian_denoiser)
    run_update(chosen, student, student_params(), noise, 0.1, teacher=teacher)
    jax.effects_barrier()
    trained = num_steps - 1 - afs
    assert counts == {
        ("teacher", "forward"): factor * (num_steps - 1),
        ("student", "forward"): trained,
        ("student", "backward"): trained,
    }


def test_one_program_per_number_of_levels():
    traced = collections.Counter()

    def denoise(params, x, sigma, cond=None, key=None):
        traced["student"] += 1
        return student_denoise(params, x, sigma)

    optimizer, rate = optax.scale_by_adam(), optim.make_learning_rate(1e-3, 8, 16, "half_drop")
    methods = [
        sfd.make(settings(num_steps=(n,)), gaussian.gaussian_denoiser, denoise, optimizer, rate) for n in (4, 6)
    ]
    state = methods[0].init(student_params())
    for method in methods:  # one state serves several N
        before, step = traced["student"], jax.jit(method.step)
        for iteration in range(4):  # over the drop of the learning rate
            state, metrics = step(state, sfd.Frozen(gaussian_params()), {}, jax.random.key(iteration), jnp.int32(iteration))
            assert metrics["learning_rate"] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4][iteration], rel=1e-6)
        assert traced["student"] == before + 1
        assert step._cache_size() == 1


# Draws, conditions, devices --------------------------------------------------------------------------------------


def test_draws_do_not_depend_on_the_batch():
    draw = jax.jit(from_noise.draw, static_argnums=0)
    many, few = (draw(settings(batch_size=b, num_classes=10), jax.random.key(7)) for b in (4000, 8))
    np.testing.assert_array_equal(many[0][:8], few[0])
    np.testing.assert_array_equal(many[1]["label"][:8], few[1]["label"])
    counts = np.bincount(many[1]["label"], minlength=10)
    assert many[1]["label"].dtype == jnp.int32 and len(counts) == 10
    assert np.all(np.abs(counts - 400) < 5 * np.sqrt(400 * 0.9))  # five standard deviations of a uniform class
    assert abs(np.mean(many[0])) < 5 / np.sqrt(24000) and abs(np.std(many[0]) - 1) < 5 / np.sqrt(48000)
    assert from_noise.draw(settings(), jax.random.key(7))[1] == {}


def test_what_each_network_is_told():
    """Labels for both; dropout key and step condition for the student alone, the key new at every call."""
    seen = collections.defaultdict(list)

    def teacher(params, x, sigma, cond=None, key=None):
        seen["teacher"].append((sorted(cond), key))
        return jnp.zeros_like(x)

    def student(params, x, sigma, cond=None, key=None):
        seen["student"].append(sorted(cond))
        assert cond["step"].shape == () and cond["step"].dtype == jnp.float32
        return params["scale"] * jnp.full_like(x, jax.random.uniform(key)) + cond["step"]

    chosen = settings(num_steps=(5,), num_classes=3, step_condition="num_steps")
    cond = {"label": jnp.zeros(4, jnp.int32)}
    params = {"scale": jnp.ones(())}
    _, trace = run_update(
        chosen, student, params, jnp.ones((4, 2, 3)), 0.0, teacher=teacher, cond=cond, key=jax.random.key(8)
    )
    assert seen["teacher"] == [(["label"], None)] and seen["student"] == [["label", "step"]]
    t = grids.polynomial(5, 0.006, 80.0)
    ratio = (t[2:] / t[1:-1])[:, None]
    drawn = (trace.student[1:, :, 0, 0] - ratio * trace.student[:-1, :, 0, 0]) / (1 - ratio) - 5.0
    assert np.all((drawn > -1e-4) & (drawn < 1.0001))  # the uniform draw of the key, told N = 5
    assert len(set(np.round(drawn[:, 0], 4).tolist())) == 3


def test_sharded_equals_single():
    """With plain gradient steps: Adam makes a full step of the rounding error of a balanced sum of signs."""
    results = []
    for num_devices in (1, 8):
        method = sfd.make(
            settings(batch_size=16, num_classes=4), gaussian.gaussian_denoiser, student_denoise,
            optax.identity(), constant_rate(1e-2),
        )  # fmt: skip
        state, step = method.init(student_params()), jax.jit(method.step)
        arguments = (sfd.Frozen(gaussian_params()), {}, jax.random.key(9), jnp.int32(0))
        with jax.set_mesh(mesh.make_mesh(num_devices)):
            assert ("all-reduce" in step.lower(state, *arguments).compile().as_text()) == (num_devices > 1)
            results.append(jax.device_get(step(state, *arguments)))
    # Sums over devices come in another order: float32 rounding of a few hundred terms.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *results)
