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

    settings = Settings(num_steps=(4,), batch_size=128, image_shape=(32, 32, 3))
    method = make(settings, denoise, denoise, optax.scale_by_adam(), learning_rate=lambda iteration: 5e-5)
    state = method.init(teacher_params)
    state, metrics = jax.jit(method.step)(state, Frozen(teacher_params), {}, key, iteration)

SFD-v, one student for several N: Settings(num_steps=(4, 5, 6, 7), step_condition="num_steps"); every iteration draws
its N and tells it to the student. One program serves all, whose loops run as often as the N of the iteration asks. The second stage, for one call: Settings(num_steps=(3,), teacher_factor=3,
teacher_solver="euler", teacher_order=None, teacher_afs=True), with the first student (N=7) as teacher; pixel models
add D LPIPS(y, Y) / B to eq. 3 at the last level (D pixels), which is `perceptual` of `make`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffjax.core import grids, loops, sharding, solvers, trees
from diffjax.core.types import Array, Batch, Cond, Denoiser, Key, Method, Metrics, Params
from diffjax.methods import from_noise
from diffjax.methods.update import descend
from diffjax.sampling.few_step import STEP_CONDITIONS, check_num_steps, step_conditions, student_grid
from diffjax.sampling.sample import sample

Distance = Callable[[Params, Array, Array], Array]  # (params, (B, ...), (B, ...)) -> (B,)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What one SFD iteration does. The defaults are those of CIFAR-10 (Zhou 2024).

    num_steps: N, the numbers of noise levels that the student serves: N-1 steps, one call fewer with `afs`. One of
      them is drawn uniformly in each iteration.
    teacher_factor: K, teacher steps per student step (M + 1 where M levels are inserted).
    sigma_min, sigma_max, grid, rho: the noise levels, see `few_step.student_grid`.
    afs: the student's first step is analytical. teacher_afs: the teacher's too (second stage).
    teacher_solver, teacher_order, teacher_parity: see `solvers.make_plan`; parity is the published third order.
    batch_size: trajectories per iteration over all devices. image_shape: one sample. num_classes: 0 = no labels.
    accumulate: parts that a batch is computed in, one after the other, to save memory. The gradient is that of the
      whole batch; dropout draws other masks.
    step_condition: what the student is told, see `few_step.with_step_condition`; the teacher is told nothing here.
    released_gradient_rule: NaN -> 0, +-inf -> +-1e5 in gradients, as the authors' code does. Otherwise a non-finite
      gradient is left as it is and reported.
    """

    num_steps: tuple[int, ...]
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
    accumulate: int = 1
    step_condition: str = ""
    released_gradient_rule: bool = False


class SFDState(NamedTuple):
    """params: the student's weights. opt_state: the optimiser's."""

    params: Params
    opt_state: Any


class Frozen(NamedTuple):
    """What is read: the teacher's parameters ({} where the targets are given), and those of `perceptual`."""

    teacher: Params
    perceptual: Params = {}


class Trace(NamedTuple):
    """One iteration as it happened; n = N-1 student steps, u updates (n, or n-1 with AFS). Of several N, n is that of
    the largest, and what a smaller one leaves over at the end is 0, and -1."""

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
    perceptual: Distance | None = None,
    grid_options: dict[str, Any] | None = None,
) -> Method:
    """SFD as a Method: frozen is a Frozen, state an SFDState; batch is empty, or has "target", the teacher's states
    (B, N-1, ...) for the noise of this key (a cache, see `targets`), and then the teacher is not called.

    `optimizer` has no learning rate of its own (optax.scale_by_adam()); `learning_rate` maps the iteration to it.
    `perceptual`(params, y, Y) -> (B,) is added at the last level. `grid_options` are the maps of a discrete grid.
    The trajectories, which are drawn inside, are spread over the devices of a mesh; the draws do not depend on it.
    Metrics, float32: loss (mean of eq. 3 over the noise levels), with one N loss_t<k> (eq. 3 at step k), with several
    num_steps (the N drawn), grad_norm (mean over the updates), learning_rate; nonfinite_leaf (int32), of the earliest
    update that has one. Raises ValueError for settings that cannot work.
    """
    _check(settings)
    update = make_update(
        settings, teacher_denoise, student_denoise, optimizer, perceptual=perceptual, grid_options=grid_options
    )

    def init(params: Params) -> SFDState:
        return SFDState(params, optimizer.init(params))

    def step(
        state: SFDState, frozen: Frozen, batch: Batch, key: Key, iteration: Array
    ) -> tuple[SFDState, Metrics]:
        noise, cond, dropout_key, which = _draws(settings, key, batch)
        noise, cond = sharding.spread((noise, cond))
        targets = jnp.moveaxis(batch["target"], 1, 0) if "target" in batch else None
        rate = learning_rate(iteration)
        state, trace = update(state, frozen, noise, cond, dropout_key, rate, which, targets)
        if len(settings.num_steps) == 1:
            return state, from_noise.metrics(trace, rate) | from_noise.by_level(trace)
        num_steps = jnp.asarray(settings.num_steps)[which]
        metrics = from_noise.metrics(trace, rate, unused=max(settings.num_steps) - num_steps)
        return state, {**metrics, "num_steps": num_steps.astype(jnp.float32)}

    return Method(init, step)


def _draws(settings: Settings, key: Key, batch: Batch | None = None) -> tuple[Array, dict[str, Array], Key, Array]:
    """Noise, condition, dropout key and the index of N of one iteration."""
    draw_key, dropout_key = jax.random.split(key)
    which = jax.random.randint(jax.random.fold_in(key, 2), (), 0, len(settings.num_steps))
    return *from_noise.draw(settings, draw_key, batch), dropout_key, which


def make_targets(
    settings: Settings, teacher_denoise: Denoiser, *, grid_options: dict[str, Any] | None = None
) -> Callable[[Params, Key], Array]:
    """targets(teacher_params, key) -> (B, N-1, ...): what the step with this key would ask its teacher, for a cache.

    They depend on the teacher, the key and the settings except those of the student. Raises ValueError for several N,
    whose targets have several shapes, and as `make`.
    """
    _check(settings)
    if len(settings.num_steps) > 1:
        raise ValueError(f"targets are cached for one N, found num_steps={settings.num_steps}: train one student each")
    trajectory = _make_teacher(settings, teacher_denoise, grid_options or {})

    def targets(params: Params, key: Key) -> Array:
        noise, cond, _, _ = _draws(settings, key)
        return jnp.moveaxis(trajectory(params, noise, cond, 0), 0, 1)

    return targets


def make_update(
    settings: Settings,
    teacher_denoise: Denoiser,
    student_denoise: Denoiser,
    optimizer: optax.GradientTransformation,
    *,
    perceptual: Distance | None = None,
    grid_options: dict[str, Any] | None = None,
) -> Callable[..., tuple[SFDState, Trace]]:
    """One iteration with the noise given:

        update(state, frozen, noise, cond, key, rate, which=0, targets=None) -> (state, Trace)

    `noise` (B, ...) has unit variance, `key` is the student's dropout key (None = no dropout), `rate` the learning
    rate, `which` the index of N in `num_steps`, `targets` (N-1, B, ...) replace the teacher. Eq. 1-5; pure, compiled
    once under `jax.jit`. Raises as `make`.
    """
    _check(settings)
    trajectory = _make_teacher(settings, teacher_denoise, grid_options or {})
    student_step = _make_student_step(settings, student_denoise, optimizer, perceptual)
    levels, first = _levels(settings, grid_options or {}), 1 if settings.afs else 0

    def update(
        state: SFDState, frozen: Frozen, noise: Array, cond: Cond, key: Key | None, rate: Array,
        which: Array | int = 0, targets: Array | None = None,
    ) -> tuple[SFDState, Trace]:  # fmt: skip
        if targets is None:
            targets = jax.lax.stop_gradient(trajectory(frozen.teacher, noise, cond, which))
        here = jax.tree.map(lambda table: jnp.asarray(table)[which], levels)
        steps = here.number if len(settings.num_steps) > 1 else None  # None: all there are
        num_steps = len(targets)
        x = here.sigma[0].astype(noise.dtype) * noise

        def body(carry: tuple[SFDState, Array, Any], row: tuple[Array, ...]) -> tuple[SFDState, Array, Any]:
            state, x, found = carry
            k, sigma, ratio, told, target = row
            step_key = None if key is None else jax.random.fold_in(key, k)
            told_cond = cond if told is None else {**cond, "step": told}
            last = k == (num_steps if steps is None else steps) - 1
            level = last, sigma.astype(x.dtype), ratio.astype(x.dtype)
            state, y, report = student_step(state, frozen.perceptual, x, told_cond, step_key, rate, *level, target)
            return state, y, jax.tree.map(lambda table, one: table.at[k].set(one), found, (y, *report))

        scalars = jnp.zeros(num_steps, x.dtype)
        found = jnp.zeros_like(targets), scalars, scalars, jnp.full(num_steps, -1, jnp.int32)
        if settings.afs:
            x = here.afs.astype(x.dtype) * x
            found = found[0].at[0].set(x), found[1].at[0].set(_l1(x, targets[0])), *found[2:]
        rows = jnp.arange(num_steps), here.sigma, here.ratio, here.told, targets
        rows = jax.tree.map(lambda a: a[first:], rows)
        carry = state, x, found
        state, _, found = loops.over_rows(body, carry, rows, None if steps is None else steps - first)
        states, losses, norms, leaves = found
        return state, Trace(targets, states, losses, norms[first:], leaves[first:])

    return update


class _Levels(NamedTuple):
    """What the student's steps are, of each N of P; n steps of the largest, smaller ones have more that are not made."""

    number: np.ndarray  # (P,) N-1
    sigma: np.ndarray  # (P, n) t_k
    ratio: np.ndarray  # (P, n) t_{k+1} / t_k
    told: np.ndarray | None  # (P, n) the step condition
    afs: np.ndarray  # (P,) factor of the analytical first step


def _levels(settings: Settings, options: dict[str, Any]) -> _Levels:
    grids_of = [_grid(settings, num, options) for num in settings.num_steps]
    most = max(settings.num_steps) - 1

    def put(values: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        return np.stack([np.pad(values(t), (0, most + 1 - len(t)), mode="edge") for t in grids_of])

    return _Levels(
        number=np.asarray(settings.num_steps, np.int32) - 1,
        sigma=put(lambda t: t[:-1]),
        ratio=put(lambda t: t[1:] / t[:-1]),
        told=put(lambda t: step_conditions(settings.step_condition, t)) if settings.step_condition else None,
        afs=np.asarray([1 + (t[1] - t[0]) / np.sqrt(1 + t[0] ** 2) for t in grids_of]),
    )


def _make_teacher(
    settings: Settings, denoise: Denoiser, options: dict[str, Any]
) -> Callable[[Params, Array, Cond, Array | int], Array]:
    """(params, unit noise (B, ...), cond, index of N) -> the targets Y (N-1, B, ...), of the largest N; see `Trace`."""
    factor, plans = settings.teacher_factor, []
    for num in settings.num_steps:
        sigmas = _grid(settings, factor * (num - 1) + 1, options)
        grids.check_nested(_grid(settings, num, options), sigmas, factor)
        plans.append(
            solvers.make_plan(
                settings.teacher_solver, sigmas, order=settings.teacher_order, parity=settings.teacher_parity,
                afs=settings.teacher_afs,
            )
        )  # fmt: skip
    stacked, numbers = solvers.stack(plans)

    def trajectory(params: Params, noise: Array, cond: Cond, which: Array | int) -> Array:
        plan = jax.tree.map(lambda table: jnp.asarray(table)[which], stacked)
        rows = jnp.asarray(numbers)[which] if len(plans) > 1 else None

        def part(noise: Array, cond: Cond) -> Array:
            x = plan.sigmas[0].astype(noise.dtype) * noise
            return sample(denoise, params, x, plan, cond, save_every=factor, num_rows=rows)[1]

        if settings.accumulate == 1:
            return part(noise, cond)
        parts = jax.lax.map(lambda these: part(*these), _split((noise, cond), settings.accumulate))
        return jnp.moveaxis(_join(jnp.moveaxis(parts, 1, 2)), 1, 0)

    return trajectory


def _make_student_step(
    settings: Settings, denoise: Denoiser, optimizer: optax.GradientTransformation, perceptual: Distance | None
) -> Callable[..., tuple[SFDState, Array, tuple[Array, Array, Array]]]:
    """Eq. 1-5 at one noise level; `ratio` is t_{k+1} / t_k, `last` whether t_{k+1} is the last level."""

    def objective(params, perceptual_params, last, sigma, ratio, x, target, cond, key):
        # Eq. 1-2 with the two terms in x gathered: at t = 80 their difference would cost float32 two digits.
        y = ratio * x + (1 - ratio) * denoise(params, x, sigma, cond, key)
        loss = _l1(y, target)
        if perceptual is not None:
            pixels = y[0].size
            loss += jax.lax.cond(
                last, lambda y: pixels * jnp.mean(perceptual(perceptual_params, y, target)), lambda y: 0 * loss, y
            )
        return loss, y

    def student_step(state, perceptual_params, x, cond, key, rate, last, sigma, ratio, target):
        gradient = jax.value_and_grad(objective, has_aux=True)
        fixed = state.params, perceptual_params, last, sigma, ratio
        (loss, y), grads = _accumulated(gradient, fixed, (x, target, cond), key, settings.accumulate)
        if settings.released_gradient_rule:
            grads = jax.tree.map(_released_rule, grads)
        report = loss, optax.tree.norm(grads), trees.first_nonfinite(grads)
        return SFDState(*descend(optimizer, rate, *state, grads)), jax.lax.stop_gradient(y), report

    return student_step


def _accumulated(gradient: Callable, fixed: tuple, batch: tuple, key: Key | None, parts: int) -> tuple:
    """((loss, y), grads) of the whole batch, computed in `parts`: means of means of equal parts."""
    if parts == 1:
        return gradient(*fixed, *batch, key)

    def body(total: tuple, this: tuple) -> tuple[tuple, Array]:
        index, part = this
        (loss, y), grads = gradient(*fixed, *part, None if key is None else jax.random.fold_in(key, index))
        return jax.tree.map(lambda a, b: a + b / parts, total, (loss, grads)), y

    zero = jax.tree.map(jnp.zeros_like, (batch[0].ravel()[0], fixed[0]))
    (loss, grads), y = jax.lax.scan(body, zero, (jnp.arange(parts), _split(batch, parts)))
    return (loss, _join(y)), grads


def _split(batch: Any, parts: int) -> Any:
    """(B, ...) -> (parts, B / parts, ...), part i being samples i, i + parts, ...: every device has its share."""
    return jax.tree.map(lambda a: jnp.moveaxis(a.reshape(-1, parts, *a.shape[1:]), 1, 0), batch)


def _join(parts: Array) -> Array:
    """The reverse of `_split`."""
    return jnp.moveaxis(parts, 0, 1).reshape(-1, *parts.shape[2:])


def _l1(y: Array, target: Array) -> Array:
    """Eq. 3: sum over pixels, mean over the batch."""
    return jnp.sum(jnp.abs(y - target)) / y.shape[0]


def _released_rule(g: Array) -> Array:
    finite = jnp.where(jnp.isnan(g), 0.0, g)
    return jnp.where(jnp.isinf(finite), jnp.sign(finite) * 1e5, finite)


def _grid(settings: Settings, num: int, options: dict[str, Any]) -> np.ndarray:
    """`num` noise levels: N of the student, or K(N-1)+1 of the teacher."""
    return student_grid(num, settings.sigma_min, settings.sigma_max, grid=settings.grid, rho=settings.rho, **options)


def _check(settings: Settings) -> None:
    if not settings.num_steps or len(set(settings.num_steps)) < len(settings.num_steps):
        raise ValueError(f"num_steps lists different numbers of noise levels, e.g. (4, 5), found {settings.num_steps}")
    for num in settings.num_steps:
        check_num_steps(num, settings.afs)
    if settings.step_condition not in STEP_CONDITIONS:
        raise ValueError(f"step_condition must be one of {STEP_CONDITIONS}, found {settings.step_condition!r}")
    from_noise.check(settings, settings.teacher_factor)
    if settings.accumulate < 1 or settings.batch_size % settings.accumulate:
        raise ValueError(
            f"accumulate divides the batch into equal parts, found {settings.accumulate} parts of {settings.batch_size}"
        )
