"""Simple and Fast Distillation (Zhou et al., NeurIPS 2024, SFD): a teacher's trajectory in one to five calls.

Time is the noise level. A student visits N noise levels t_0 > ... > t_{N-1}, the teacher the finer grid with K steps
in the place of each of the student's. From x_0 = t_0 z, z unit noise, the teacher gives targets Y_k at t_{k+1} once;
then for k = 0 .. N-2, with the weights of that moment,

    d_k = (x_k - D(x_k, t_k)) / t_k             the student's own state, not the teacher's              (1)
    y_k = x_k + (t_{k+1} - t_k) d_k             one Euler step                                          (2)
    l_k = sum over pixels |y_k - Y_k| / B       L1, weight 1 at every noise level                       (3)
    params <- Adam(params, grad l_k)            one update per noise level                              (4)
    x_{k+1} = stop_gradient(y_k)                y_k from the weights before the update                  (5)

With the analytical first step (AFS, Dockhorn 2022) d_0 = x_0 / sqrt(1 + t_0^2): nothing to train, no update, but its
error is measured and carried on. Data-free: an iteration needs noise and uniform labels only. The student has
dropout, the teacher has not. No moving average, no clipping, no warm-up; the learning rate falls to a tenth at
half ("half_drop" of `train.optim`).

    settings = Settings(num_steps=4, batch_size=128, image_shape=(32, 32, 3))
    method = make(settings, denoise, denoise, optax.scale_by_adam(), learning_rate=lambda iteration: 5e-5)
    state = method.init(teacher_params)
    state, metrics = jax.jit(method.step)(state, teacher_params, {}, key, iteration)

Students for several N (SFD-v) are one state and one `make(..., step_condition=True)` per N; the caller draws N.
A second stage is Settings(num_steps=3, teacher_factor=3, teacher_solver="euler", teacher_order=None,
teacher_afs=True), with the first student (N=7) as teacher, inside `few_step.at_num_steps` if it has the condition.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffjax.core import solvers, trees
from diffjax.core.types import Array, Batch, Cond, Denoiser, Key, Method, Metrics, Params
from diffjax.sampling.few_step import at_num_steps, check_num_steps, student_grid
from diffjax.sampling.sample import sample


@dataclasses.dataclass(frozen=True)
class Settings:
    """What one SFD iteration does. The defaults are those of CIFAR-10 (Zhou 2024).

    num_steps: N, the number of noise levels of the student: N-1 steps, one call fewer with `afs`.
    teacher_factor: K, teacher steps per student step (M + 1 where M levels are inserted).
    sigma_min, sigma_max, grid, rho: the noise levels, see `few_step.student_grid`.
    afs: the student's first step is analytical. teacher_afs: the teacher's too (second stage).
    teacher_solver, teacher_order, teacher_parity: see `solvers.make_plan`; parity is the published third order.
    batch_size: trajectories per iteration over all devices. image_shape: one sample. num_classes: 0 = no labels.
    step_condition: the student is told N, see `few_step.at_num_steps`; the teacher never is.
    released_gradient_rule: NaN -> 0, +-inf -> +-1e5 in gradients, as the authors' code does. Otherwise a non-finite
      gradient is left as it is and reported.
    """

    num_steps: int
    batch_size: int
    image_shape: tuple[int, ...]
    teacher_factor: int = 4
    sigma_min: float = 0.006
    sigma_max: float = 80.0
    grid: str = "polynomial"
    rho: float = 7.0
    afs: bool = True
    teacher_afs: bool = False
    teacher_solver: str = "dpmpp"
    teacher_order: int | None = 3
    teacher_parity: bool = True
    num_classes: int = 0
    step_condition: bool = False
    released_gradient_rule: bool = False


class SFDState(NamedTuple):
    """params: the student's weights. opt_state: the optimiser's."""

    params: Params
    opt_state: Any


class Trace(NamedTuple):
    """One iteration as it happened; n = N-1 student steps, u updates (n, or n-1 with AFS)."""

    teacher: Array  # (n, B, ...) targets Y_k at t_{k+1}
    student: Array  # (n, B, ...) states y_k
    loss: Array  # (n,) l_k, eq. 3
    grad_norm: Array  # (u,) L2 norm of each gradient, after `released_gradient_rule`
    nonfinite_leaf: Array  # (u,) int32, first parameter with a non-finite gradient, -1 = none


def make(
    settings: Settings,
    teacher_denoise: Denoiser,
    student_denoise: Denoiser,
    optimizer: optax.GradientTransformation,
    learning_rate: Callable[[Array], Array],
    *,
    grid_options: dict[str, Any] | None = None,
    batch_sharding: jax.sharding.Sharding | None = None,
) -> Method:
    """SFD as a Method: frozen = the teacher's parameters, batch is not looked at, state is an SFDState.

    `optimizer` has no learning rate of its own (optax.scale_by_adam()); `learning_rate` maps the iteration to it.
    `grid_options` are the maps of a discrete grid. `batch_sharding` spreads the trajectories, which are drawn inside,
    over devices; the draws do not depend on it. Metrics, float32: loss (mean of eq. 3 over the noise levels),
    loss_t<k> (eq. 3 at step k), grad_norm (mean over the updates), learning_rate; nonfinite_leaf (int32), of the
    earliest update that has one. Raises ValueError for settings that cannot work.
    """
    update = make_update(settings, teacher_denoise, student_denoise, optimizer, grid_options=grid_options)

    def init(params: Params) -> SFDState:
        return SFDState(params, optimizer.init(params))

    def step(
        state: SFDState, frozen: Params, batch: Batch, key: Key, iteration: Array
    ) -> tuple[SFDState, Metrics]:
        del batch  # SFD is data-free
        draw_key, dropout_key = jax.random.split(key)
        noise, cond = draw(settings, draw_key)
        if batch_sharding is not None:
            noise, cond = jax.lax.with_sharding_constraint((noise, cond), batch_sharding)
        rate = learning_rate(iteration)
        state, trace = update(state, frozen, noise, cond, dropout_key, rate)
        return state, _metrics(trace, rate)

    return Method(init, step)


def draw(settings: Settings, key: Key) -> tuple[Array, dict[str, Array]]:
    """Unit noise (B, *image_shape) and cond, {"label": int32 (B,)} uniform over the classes or {} without classes.

    Sample i depends on `key` and i only, whatever the batch size and the number of devices.
    """
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(settings.batch_size))
    noise_keys, label_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    noise = jax.vmap(lambda k: jax.random.normal(k, settings.image_shape))(noise_keys)
    if not settings.num_classes:
        return noise, {}
    label = jax.vmap(lambda k: jax.random.randint(k, (), 0, settings.num_classes, jnp.int32))(label_keys)
    return noise, {"label": label}


def make_update(
    settings: Settings,
    teacher_denoise: Denoiser,
    student_denoise: Denoiser,
    optimizer: optax.GradientTransformation,
    *,
    grid_options: dict[str, Any] | None = None,
) -> Callable[[SFDState, Params, Array, Cond, Key | None, Array], tuple[SFDState, Trace]]:
    """One iteration with the noise given: update(state, frozen, noise, cond, key, rate) -> (state, Trace).

    `noise` (B, ...) has unit variance, `key` is the student's dropout key (None = no dropout), `rate` the learning
    rate. Eq. 1-5; pure, and compiled once under `jax.jit`. Raises as `make`.
    """
    _check(settings)
    options = grid_options or {}
    sigmas, teacher_sigmas = _sigmas(settings, options)
    plan = solvers.make_plan(
        settings.teacher_solver,
        teacher_sigmas,
        order=settings.teacher_order,
        parity=settings.teacher_parity,
        afs=settings.teacher_afs,
    )
    if settings.step_condition:
        student_denoise = at_num_steps(student_denoise, settings.num_steps)
    student_step = _make_student_step(settings, student_denoise, optimizer)

    def update(
        state: SFDState, frozen: Params, noise: Array, cond: Cond, key: Key | None, rate: Array
    ) -> tuple[SFDState, Trace]:
        x = noise * float(sigmas[0])
        _, targets = sample(teacher_denoise, frozen, x, plan, cond, save_every=settings.teacher_factor)
        targets = jax.lax.stop_gradient(targets)
        start = 1 if settings.afs else 0
        if settings.afs:
            x = x * float(1 + (sigmas[1] - sigmas[0]) / np.sqrt(1 + sigmas[0] ** 2))
        afs_states, afs_losses = x[None][:start], _l1(x, targets[0])[None][:start]

        def body(carry: tuple[SFDState, Array], this: tuple[Array, ...]) -> tuple[Any, Any]:
            state, x = carry
            k, sigma, ratio, target = this
            step_key = None if key is None else jax.random.fold_in(key, k)
            state, y, report = student_step(state, x, target, sigma, ratio, cond, step_key, rate)
            return (state, y), (y, *report)

        levels = jnp.asarray(sigmas[:-1], x.dtype), jnp.asarray(sigmas[1:] / sigmas[:-1], x.dtype)
        steps = (jnp.arange(settings.num_steps - 1), *levels, targets)
        (state, _), (states, losses, norms, leaves) = jax.lax.scan(
            body, (state, x), jax.tree.map(lambda a: a[start:], steps)
        )
        states, losses = jnp.concatenate([afs_states, states]), jnp.concatenate([afs_losses, losses])
        return state, Trace(targets, states, losses, norms, leaves)

    return update


def _make_student_step(
    settings: Settings, denoise: Denoiser, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[SFDState, Array, tuple[Array, Array, Array]]]:
    """Eq. 1-5 at one noise level; `ratio` is t_{k+1} / t_k."""

    def objective(params, x, target, sigma, ratio, cond, key):
        # Eq. 1-2 with the two terms in x gathered: at t = 80 their difference would cost float32 two digits.
        y = ratio * x + (1 - ratio) * denoise(params, x, sigma, cond, key)
        return _l1(y, target), y

    def student_step(state, x, target, sigma, ratio, cond, key, rate):
        (loss, y), grads = jax.value_and_grad(objective, has_aux=True)(
            state.params, x, target, sigma, ratio, cond, key
        )
        if settings.released_gradient_rule:
            grads = jax.tree.map(_released_rule, grads)
        direction, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: (p - rate * u).astype(p.dtype), state.params, direction)
        report = loss, optax.tree.norm(grads), trees.first_nonfinite(grads)
        return SFDState(params, opt_state), jax.lax.stop_gradient(y), report

    return student_step


def _l1(y: Array, target: Array) -> Array:
    """Eq. 3: sum over pixels, mean over the batch."""
    return jnp.sum(jnp.abs(y - target)) / y.shape[0]


def _released_rule(g: Array) -> Array:
    finite = jnp.where(jnp.isnan(g), 0.0, g)
    return jnp.where(jnp.isinf(finite), jnp.sign(finite) * 1e5, finite)


def _metrics(trace: Trace, rate: Array) -> Metrics:
    bad = trace.nonfinite_leaf >= 0
    first = trace.nonfinite_leaf[jnp.argmax(bad)]  # the earliest bad update; index 0, hence -1, where none is
    per_level = {f"loss_t{k}": trace.loss[k] for k in range(trace.loss.shape[0])}
    values = {"loss": jnp.mean(trace.loss), **per_level}
    values |= {"grad_norm": jnp.mean(trace.grad_norm), "learning_rate": rate}
    metrics = {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}
    return {**metrics, "nonfinite_leaf": first}


def _sigmas(settings: Settings, options: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The noise levels of the student (N,) and of the teacher (K(N-1)+1,), the first a slice of the second."""
    levels = dict(grid=settings.grid, rho=settings.rho, **options)
    factor, num = settings.teacher_factor, settings.num_steps
    student = student_grid(num, settings.sigma_min, settings.sigma_max, **levels)
    teacher = student_grid(factor * (num - 1) + 1, settings.sigma_min, settings.sigma_max, **levels)
    # Equal but for float64 rounding through the power rho; a state off its level would be a silent bias.
    worst = np.max(np.abs(teacher[::factor] / student - 1))
    if not worst <= 1e-12:
        raise ValueError(
            f"every {factor}th noise level of the teacher must be one of the student's, found a relative difference "
            f"of {worst:.1e} in grid {settings.grid!r}: its maps must not depend on the number of levels"
        )
    return student, teacher


def _check(settings: Settings) -> None:
    check_num_steps(settings.num_steps, settings.afs)
    if settings.teacher_factor < 1:
        raise ValueError(
            f"teacher_factor is the number of teacher steps per student step, at least 1, "
            f"found {settings.teacher_factor}"
        )
    if settings.batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, found {settings.batch_size}")
    if not settings.image_shape or min(settings.image_shape) < 1:
        raise ValueError(f"image_shape is the shape of one sample, e.g. (32, 32, 3), found {settings.image_shape}")
    if settings.num_classes < 0:
        raise ValueError(f"num_classes must be 0 (no labels) or positive, found {settings.num_classes}")
