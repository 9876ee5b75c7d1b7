"""SFD against the authors' loss and training order, in float64 on an analytic denoiser."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax.core import gaussian
from diffjax.methods import sfd
from diffjax.train import optim

RUNS = (pytest.param("afs_N5_dpmpp2_M2", marks=pytest.mark.fast), "noafs_N6_ipndm3_M1", "stepcond_afs_dpmpp3")
SLOTS = 8  # more than the updates of any iteration


class Recorded(NamedTuple):
    inner: Any
    count: jax.Array
    grads: jax.Array  # (SLOTS, 5)
    params: jax.Array  # (SLOTS, 5), before each update


def pack(tree):
    return jnp.concatenate([tree["a"][None], tree["b"], tree["u"]])


def recording(inner):
    """An optimiser that also keeps what it was given: the gradients and the parameters of every update."""

    def init(params):
        empty = jnp.zeros((SLOTS, 5))
        return Recorded(inner.init(params), jnp.int32(0), empty, empty)

    def update(grads, state, params):
        direction, inner_state = inner.update(grads, state.inner, params)
        record = Recorded(
            inner_state,
            state.count + 1,
            state.grads.at[state.count].set(pack(grads)),
            state.params.at[state.count].set(pack(params)),
        )
        return direction, record

    return optax.GradientTransformation(init, update)


def student_of(arrays):
    """D = (1+a) D_gmm + c_out (b + n/10 u), the n-term only with the step condition."""
    mixture = {
        "mean": jnp.asarray(arrays["gmm_mu"]).reshape(-1, 2, 5, 6),
        "std": jnp.asarray(arrays["gmm_sd"]),
        "weight": jnp.asarray(arrays["gmm_w"]),
    }

    def denoise(params, x, sigma, cond=None, key=None):
        shift = params["b"]
        if "step" in (cond or {}):
            shift = shift + cond["step"].astype(x.dtype) / 10 * params["u"]
        c_out = 0.5 * sigma / jnp.sqrt(sigma**2 + 0.25)
        return (1 + params["a"]) * gaussian.mixture_denoiser(mixture, x, sigma) + c_out * shift[None, :, None, None]

    return denoise


def settings_of(run):
    return sfd.Settings(
        num_steps=tuple(sorted({it["num_steps"] for it in run["iters"]})),
        teacher_factor=run["M"] + 1,
        sigma_min=run["sigma_min"],
        sigma_max=run["sigma_max"],
        grid=run["schedule_type"],
        rho=run["schedule_rho"],
        afs=run["afs"],
        teacher_solver=run["sampler_tea"],
        teacher_order=run["max_order"],
        batch_size=run["batch"],
        image_shape=(2, 5, 6),
        step_condition="num_steps" if run["use_step_condition"] else "",
    )


def close(found, expected, rel):
    """max |difference| / max |reference|"""
    return np.max(np.abs(found - expected)) <= rel * np.max(np.abs(expected))


@pytest.mark.parametrize("name", RUNS)
def test_every_number_of_the_released_training_order(name, golden, x64):
    arrays, meta = golden("sfd_train_trace")
    run = meta[name]
    denoise = student_of(arrays)
    optimizer = recording(optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8))
    rate = optim.make_learning_rate(run["lr"], run["batch"], round(1000 * run["total_kimg"]), "half_drop")
    settings = settings_of(run)
    update = jax.jit(sfd.make_update(settings, denoise, denoise, optimizer))
    start = {"a": jnp.zeros(()), "b": jnp.zeros(2), "u": jnp.zeros(2)}
    state = sfd.SFDState(start, optimizer.init(start))
    for j, expected_iteration in enumerate(run["iters"]):
        expected = {k: arrays[f"{name}|it{j}|{k}"] for k in ("z", "teacher", "student", "loss", "grad", "params_after")}
        assert float(rate(jnp.int32(j))) == pytest.approx(expected_iteration["lr"], rel=1e-15)
        state = state._replace(opt_state=state.opt_state._replace(count=jnp.int32(0)))
        num = expected_iteration["num_steps"]
        which = jnp.int32(settings.num_steps.index(num))
        state, trace = update(state, sfd.Frozen(start), jnp.asarray(expected["z"]), {}, None, rate(jnp.int32(j)), which)
        # Tolerances: 100 times what a second, independent loop shows against the same numbers in its worst run;
        # the smallest L1 residual (1e-5) is far above rounding, so no sign can flip.
        assert close(trace.teacher[: num - 1], expected["teacher"], 1e-10)
        assert close(trace.student[: num - 1], expected["student"], 1e-10)
        assert close(trace.loss[: num - 1], expected["loss"], 1e-8)
        assert not any(np.any(values[num - 1 :]) for values in trace[:3])
        first, count = int(run["afs"]), int(state.opt_state.count)
        assert count == len(expected["loss"]) - first
        assert np.all(np.isnan(expected["grad"][:first]))
        assert close(state.opt_state.grads[:count], expected["grad"][first:], 1e-8)
        after = np.concatenate([state.opt_state.params[1:count], pack(state.params)[None]])
        assert np.max(np.abs(after - expected["params_after"][first:])) <= 1e-9
        assert np.all(np.asarray(trace.nonfinite_leaf) == -1)
