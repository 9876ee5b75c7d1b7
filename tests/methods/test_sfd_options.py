"""SFD beyond the plain student: several N, given targets, accumulated gradients, a perceptual term, its cost."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax.core import gaussian, grids, prediction
from diffjax.methods import sfd
from diffjax.models.toy import ResidualMLP
from diffjax.nn.functional import functionalize
from diffjax.sampling import few_step

GAUSSIAN = {"mean": jnp.zeros(()), "std": jnp.asarray(0.5)}


def settings(**changes):
    return dataclasses.replace(sfd.Settings(num_steps=(4,), batch_size=8, image_shape=(2, 3)), **changes)


def student_denoise(params, x, sigma, cond=None, key=None):
    base = gaussian.gaussian_denoiser({"mean": 0.0, "std": 0.5}, x, sigma)
    told = (cond or {}).get("step", jnp.float32(0)).astype(x.dtype)
    return (1 + params["gain"]) * base + params["shift"][None] + told / 10 * params["told"]


def student_params():
    return {"gain": jnp.zeros(()), "shift": jnp.zeros((2, 3)), "told": jnp.zeros(())}


def make(chosen, optimizer=None, **options):
    """Plain gradient steps by default: Adam makes a whole step of a rounding error."""
    optimizer = optax.identity() if optimizer is None else optimizer
    method = sfd.make(
        chosen, gaussian.gaussian_denoiser, student_denoise, optimizer, lambda iteration: jnp.asarray(1e-3), **options
    )
    return method, method.init(student_params())


# Several N -------------------------------------------------------------------------------------------------------


def test_each_iteration_is_one_of_the_number_drawn():
    """The step of (4, 6) is, bit for bit, the step of a student for the N it says; both occur; one program."""
    method, state = make(settings(num_steps=(4, 6), step_condition="num_steps"))
    step, frozen = jax.jit(method.step), sfd.Frozen(GAUSSIAN)
    single = {
        num: jax.jit(make(settings(num_steps=(num,), step_condition="num_steps"))[0].step) for num in (4, 6)
    }
    seen = []
    for j in range(6):
        arguments = state, frozen, {}, jax.random.key(j), jnp.int32(j)
        found, metrics = step(*arguments)
        seen.append(int(metrics["num_steps"]))
        expected, expected_metrics = single[seen[-1]](*arguments)
        # the same operations, fused differently by the compiler
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), found, expected)
        assert metrics["loss"] == pytest.approx(float(expected_metrics["loss"]), rel=1e-5)
    assert set(seen) == {4, 6} and step._cache_size() == 1


def test_several_numbers_have_the_program_of_one():
    """Each network stands in it as often as in a program for a single N: compiling takes no longer."""

    def products(num_steps):
        network, init = functionalize(lambda rngs: ResidualMLP((2, 3, 1), 8, 1, rngs=rngs))
        denoise, optimizer = prediction.edm_denoiser(network), optax.identity()
        method = sfd.make(settings(num_steps=num_steps, image_shape=(2, 3, 1)), denoise, denoise, optimizer, lambda iteration: 1e-3)
        params = init(jax.random.key(0))
        arguments = method.init(params), sfd.Frozen(params), {}, jax.random.key(1), jnp.int32(0)
        return str(jax.make_jaxpr(method.step)(*arguments)).count("dot_general")

    assert products((4, 5, 6, 7)) == products((4,)) > 0


def test_next_level_condition_is_where_the_step_leads():
    sigmas = grids.polynomial(5, 0.006, 80.0)

    def told(params, x, sigma, cond=None, key=None):
        return jnp.zeros_like(x) + cond["step"]

    denoise = few_step.with_step_condition(told, "next_level", sigmas)
    found = [float(denoise({}, jnp.zeros((1, 1)), jnp.float32(s))[0, 0]) for s in sigmas[:-1]]
    np.testing.assert_allclose(found, np.log(sigmas[1:]) / 4, rtol=1e-6)  # float32
    with pytest.raises(ValueError, match="found 'next'"):
        few_step.with_step_condition(told, "next", sigmas)


# Given targets ---------------------------------------------------------------------------------------------------


def test_cached_targets_give_the_same_step_without_a_teacher():
    chosen = settings(num_classes=3)
    method, state = make(chosen)
    key = jax.random.key(5)
    target = jax.jit(sfd.make_targets(chosen, gaussian.gaussian_denoiser))(GAUSSIAN, key)
    assert target.shape == (8, 3, 2, 3)
    online = jax.jit(method.step)(state, sfd.Frozen(GAUSSIAN), {}, key, jnp.int32(0))
    # a teacher without parameters would fail if it were called
    cached = jax.jit(method.step)(state, sfd.Frozen({}), {"target": target}, key, jnp.int32(0))
    # the same operations in two programs: float32 rounding
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), online, cached)


def test_targets_of_several_numbers_are_refused():
    with pytest.raises(ValueError, match=r"cached for one N, found num_steps=\(4, 5\)"):
        sfd.make_targets(settings(num_steps=(4, 5)), gaussian.gaussian_denoiser)


# Accumulated gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 8])
def test_accumulated_gradients_are_those_of_the_whole_batch(parts, x64):
    results = []
    for accumulate in (1, parts):
        method, state = make(settings(accumulate=accumulate, num_classes=4))
        results.append(jax.jit(method.step)(state, sfd.Frozen(GAUSSIAN), {}, jax.random.key(6), jnp.int32(0)))
    # float64 sums in another order; metrics are float32
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12), results[0][0], results[1][0])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), results[0][1], results[1][1])


# Perceptual term -------------------------------------------------------------------------------------------------


def test_perceptual_term_is_at_the_last_level_only(x64):
    """With the distance s mean |a - b|^2 the objective is by hand: L1 sums, and D times its batch mean at the end."""

    def distance(params, a, b):
        return params["scale"] * jnp.mean((a - b) ** 2, axis=(1, 2))

    chosen = settings(batch_size=4)
    plain, with_term = (
        sfd.make_update(
            chosen, gaussian.gaussian_denoiser, student_denoise, optax.identity(), perceptual=perceptual
        )
        for perceptual in (None, distance)
    )
    frozen = sfd.Frozen(GAUSSIAN, {"scale": jnp.asarray(3.0)})
    noise = jax.random.normal(jax.random.key(7), (4, 2, 3))
    state = sfd.SFDState(student_params(), optax.identity().init(student_params()))
    before = jax.jit(plain)(state, frozen, noise, {}, None, 0.0)[1]
    after = jax.jit(with_term)(state, frozen, noise, {}, None, 0.0)[1]
    np.testing.assert_allclose(before.loss[:2], after.loss[:2], rtol=1e-14)
    gap = after.student[2] - after.teacher[2]
    np.testing.assert_allclose(after.loss[2] - before.loss[2], 6 * 3.0 * np.mean(gap**2), rtol=1e-10)
    assert after.grad_norm[-1] != before.grad_norm[-1] and after.grad_norm[0] == before.grad_norm[0]


# Cost ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [4, 5, 6, 7])
def test_floating_point_operations_of_an_iteration(num, monkeypatch):
    """At most 1.05 times K(N-1) + 3(N-2) forward passes, by the compiler's count of the optimised program (which counts
    a loop's body once, so loops are unrolled here). 128 trajectories, as published; a DDPM++ of 32 channels with 16
    gave 1.008 for N=4 and 1.012 for N=7."""
    monkeypatch.setattr(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=True))
    network, init = functionalize(lambda rngs: ResidualMLP((4, 4, 3), 256, 1, rngs=rngs))
    denoise = prediction.edm_denoiser(network)
    params = jax.eval_shape(init, jax.random.key(0))
    chosen = settings(num_steps=(num,), batch_size=128, image_shape=(4, 4, 3))
    optimizer = optax.scale_by_adam()
    update = sfd.make_update(chosen, denoise, denoise, optimizer)
    state = sfd.SFDState(params, jax.eval_shape(optimizer.init, params))
    images, scalar = jax.ShapeDtypeStruct((128, 4, 4, 3), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)

    def operations(function, *arguments):
        return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]

    one = operations(lambda p, x, s: denoise(p, x, s), params, images, scalar)
    ratio = operations(update, state, sfd.Frozen(params), images, {}, None, scalar) / one
    model = 4 * (num - 1) + 3 * (num - 2)
    print(f"N={num}: {ratio:.2f} forward passes, {ratio / model:.3f} of the model's {model}")
    assert 0.8 * model < ratio <= 1.05 * model
