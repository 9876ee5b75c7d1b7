"""AMED (Zhou et al., CVPR 2024, AMED): train the predictor of `sampling.amed_sampler`, a few thousand numbers.

The diffusion network is frozen; it is the teacher, and the student calls it too. The student visits N noise levels
t_0 > ... > t_{N-1}, the teacher K times as many steps. From x_0 = t_0 z, z unit noise, the teacher gives targets Y_k
at t_{k+1} once; then for k = 0 .. N-2, with the predictor of that moment,

    y_k = step of the AMED plan from x_k at t_k to t_{k+1}, equations (1)-(6) of `amed_sampler`           (1)
    l_k = sum over pixels (y_k - Y_k)^2 / B              "l2"; "l1" takes absolute values                 (2)
    params <- Adam(params, grad l_k)                     one update per noise level, N-1 in all           (3)
    x_{k+1} = Y_k for one-step solvers (amed, dpm2s, euler), stop_gradient(y_k) for multistep ones        (4)

The history of a multistep solver passes from step to step with its gradient stopped. With the analytical first step
(AFS) k = 0 is trained like the others: its middle point is a network call. Data-free: noise and uniform labels only;
ten thousand trajectories and a constant learning rate of 5e-3 are enough.

    settings = Settings(num_steps=4, batch_size=128, image_shape=(32, 32, 3))
    method = make(settings, denoise, features, predict, optax.scale_by_adam(), learning_rate=lambda iteration: 5e-3)
    state = method.init(predictor_params)
    state, metrics = jax.jit(method.step)(state, teacher_params, {}, key, iteration)
    x = make_sampler(features, predict)(
        denoise, {"teacher": teacher_params, "predictor": state.params}, noise * 80.0, make_plan(settings)
    )

The released code replaces non-finite gradients by 0 or 1e5; here they are left as they are and reported.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffjax.core import grids, sharding, solvers, trees
from diffjax.core.names import lookup
from diffjax.core.types import Array, Batch, Cond, Denoiser, Key, Method, Metrics, Params
from diffjax.methods import from_noise
from diffjax.methods.update import descend
from diffjax.sampling import amed_sampler
from diffjax.sampling.amed_sampler import AmedPlan, Features, Memory, Predict, Row, make_sampler
from diffjax.sampling.few_step import student_grid
from diffjax.sampling.sample import sample

__all__ = ["AmedState", "Settings", "Trace", "make", "make_plan", "make_sampler", "make_update"]

ONE_STEP = ("amed", "dpm2s", "euler")  # start from the teacher's states, eq. 4
LOSSES = {"l2": jnp.square, "l1": jnp.abs}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What one AMED iteration does. The defaults are those of AMED-Solver on CIFAR-10 (Zhou 2024, AMED).

    num_steps: N, the number of noise levels of the student: 2(N-1) network calls, one fewer with `afs`.
    solver, order, parity: the student, see `amed_sampler.make_amed_plan`; parity holds for the teacher too.
    scale_dir, scale_time: how far the predictor may move c and a from 1; 0 is not at all.
    sigma_min, sigma_max, grid, rho: the noise levels, see `few_step.student_grid`.
    afs: the student's first call is analytical; the teacher's never is.
    teacher_solver, teacher_order: see `solvers.make_plan`.
    teacher_factor: K, teacher steps per student step (M + 1 where M levels are inserted).
    loss: "l2" (squares) or "l1", eq. 2.
    batch_size: trajectories per iteration over all devices. image_shape: one sample. num_classes: 0 = no labels.
    """

    num_steps: int
    batch_size: int
    image_shape: tuple[int, ...]
    solver: str = "amed"
    order: int | None = None
    parity: bool = False
    scale_dir: float = 0.01
    scale_time: float = 0.0
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    grid: str = "time_uniform"
    rho: float = 1.0
    afs: bool = True
    teacher_solver: str = "heun"
    teacher_order: int | None = None
    teacher_factor: int = 2
    loss: str = "l2"
    num_classes: int = 0


class AmedState(NamedTuple):
    """params: the predictor's weights. opt_state: the optimiser's."""

    params: Params
    opt_state: Any


class Trace(NamedTuple):
    """One iteration as it happened; n = N-1 steps and updates."""

    teacher: Array  # (n, B, ...) targets Y_k at t_{k+1}
    student: Array  # (n, B, ...) states y_k
    loss: Array  # (n,) l_k, eq. 2
    grad_norm: Array  # (n,) L2 norm of each gradient
    nonfinite_leaf: Array  # (n,) int32, first parameter with a non-finite gradient, -1 = none


def make(
    settings: Settings,
    denoise: Denoiser,
    features: Features,
    predict: Predict,
    optimizer: optax.GradientTransformation,
    learning_rate: Callable[[Array], Array],
    *,
    grid_options: dict[str, Any] | None = None,
) -> Method:
    """AMED as a Method: frozen = the network's parameters, batch has texts or nothing, state is an AmedState.

    `features` and `predict` are those of `amed_sampler`; `init` takes the predictor's parameters. `optimizer` has no
    learning rate of its own (optax.scale_by_adam()); `learning_rate` maps the iteration to it. `grid_options` are the
    maps of a discrete grid. The trajectories, which are drawn inside, are spread over
    the devices of a mesh.
    Metrics, float32: loss (mean of eq. 2 over the noise levels), loss_t<k> (eq. 2 at step k), grad_norm (mean over
    the updates), learning_rate; nonfinite_leaf (int32), of the earliest update that has one. Raises ValueError for
    settings that cannot work.
    """
    update = make_update(settings, denoise, features, predict, optimizer, grid_options=grid_options)

    def init(params: Params) -> AmedState:
        return AmedState(params, optimizer.init(params))

    def step(
        state: AmedState, frozen: Params, batch: Batch, key: Key, iteration: Array
    ) -> tuple[AmedState, Metrics]:
        noise, cond = from_noise.draw(settings, key, batch)
        noise, cond = sharding.spread((noise, cond))
        rate = learning_rate(iteration)
        state, trace = update(state, frozen, noise, cond, rate)
        return state, from_noise.metrics(trace, rate) | from_noise.by_level(trace)

    return Method(init, step)


def make_plan(settings: Settings, *, grid_options: dict[str, Any] | None = None) -> AmedPlan:
    """The plan that the settings train for, to be sampled with `make_sampler`. Raises ValueError as `make`."""
    return amed_sampler.make_amed_plan(
        settings.solver, _grid(settings, settings.num_steps, grid_options), order=settings.order, afs=settings.afs,
        scale_dir=settings.scale_dir, scale_time=settings.scale_time, parity=settings.parity,
    )  # fmt: skip


def make_update(
    settings: Settings,
    denoise: Denoiser,
    features: Features,
    predict: Predict,
    optimizer: optax.GradientTransformation,
    *,
    grid_options: dict[str, Any] | None = None,
) -> Callable[[AmedState, Params, Array, Cond, Array], tuple[AmedState, Trace]]:
    """One iteration with the noise given: update(state, frozen, noise, cond, rate) -> (state, Trace).

    `noise` (B, ...) has unit variance, `rate` is the learning rate. Eq. 1-4; pure, and compiled once under `jax.jit`.
    Raises as `make`.
    """
    _check(settings)
    plan = make_plan(settings, grid_options=grid_options)
    teacher_plan = _teacher_plan(settings, plan, grid_options)
    distance, local = LOSSES[settings.loss], settings.solver in ONE_STEP

    def update(
        state: AmedState, frozen: Params, noise: Array, cond: Cond, rate: Array
    ) -> tuple[AmedState, Trace]:
        x = noise * float(plan.sigmas[0])
        _, targets = sample(denoise, frozen, x, teacher_plan, cond, save_every=settings.teacher_factor)
        targets = jax.lax.stop_gradient(targets)
        look, advance = amed_sampler.make_step(plan, denoise, features, predict, cond)

        def body(
            carry: tuple[AmedState, Array, Memory], this: tuple[Row, Array], analytical: bool = False
        ) -> tuple[Any, Any]:
            (state, x, memory), (row, target) = carry, this
            seen = look(frozen, x, row.sigma, analytical)

            def objective(params: Params) -> tuple[Array, tuple[Array, Memory]]:
                y, after = advance(frozen, params, x, seen, memory, row)
                return jnp.sum(distance(y - target)) / y.shape[0], (y, after)

            (loss, (y, memory)), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
            report = loss, optax.tree.norm(grads), trees.first_nonfinite(grads)
            return (AmedState(*descend(optimizer, rate, *state, grads)), target if local else y, memory), (y, *report)

        carry = state, x, amed_sampler.start_memory(plan, x)
        steps, reports = (amed_sampler.make_rows(plan, x.dtype), targets), []
        if plan.afs:  # outside the loop: its first half has no network call
            first, steps = jax.tree.map(lambda a: a[0], steps), jax.tree.map(lambda a: a[1:], steps)
            carry, report = body(carry, first, analytical=True)
            reports.append(jax.tree.map(lambda a: a[None], report))
        carry, report = jax.lax.scan(body, carry, steps)
        return carry[0], Trace(targets, *map(jnp.concatenate, zip(*reports, report, strict=True)))

    return update


def _teacher_plan(settings: Settings, plan: AmedPlan, grid_options: dict[str, Any] | None) -> solvers.Plan:
    """The teacher on a grid of which the student's levels are every K-th."""
    factor = settings.teacher_factor
    sigmas = _grid(settings, factor * (settings.num_steps - 1) + 1, grid_options)
    grids.check_nested(plan.sigmas, sigmas, factor)
    return solvers.make_plan(
        settings.teacher_solver, sigmas, order=settings.teacher_order, parity=settings.parity
    )


def _grid(settings: Settings, num: int, grid_options: dict[str, Any] | None) -> np.ndarray:
    return student_grid(
        num, settings.sigma_min, settings.sigma_max, grid=settings.grid, rho=settings.rho, **(grid_options or {})
    )


def _check(settings: Settings) -> None:
    lookup(LOSSES, settings.loss, "loss")
    if settings.num_steps < 2:
        raise ValueError(f"num_steps counts noise levels (steps + 1), at least 2, found {settings.num_steps}")
    from_noise.check(settings, settings.teacher_factor)
