"""Progressive distillation (Salimans & Ho 2022) and its guided form (Meng et al. 2023), in sigma space.

Time is the noise level, x = x0 + t eps. The student has N noise levels t_0 > ... > t_n, n = N - 1 steps; the teacher
has one more, t_{k+1/2}, in the middle of each. For an image x0, k uniform in 0 .. n-1 and x = x0 + t_k eps the teacher
makes two Euler (DDIM) steps, written with both terms in x gathered,

    x'  = r1 x  + (1 - r1) D(x, t_k)              r1 = t_{k+1/2} / t_k                                  (1)
    x'' = r2 x' + (1 - r2) D(x', t_{k+1/2})       r2 = t_{k+1} / t_{k+1/2}                              (2)

and the student should arrive there in one: its denoised image must be x~ with x'' = r x + (1 - r) x~, r = r1 r2, so

    x~ = (x'' - r x) / (1 - r)                    Salimans & Ho 2022, algorithm 2                       (3)
       = a D(x, t_k) + (1 - a) D(x', t_{k+1/2})   a = r2 (1 - r1) / (1 - r), by (1) and (2)             (4)
    loss = w(t_k) |D_student(x, t_k) - x~|^2      w(t) = max(1 / t^2, 1 / sigma_data^2)                 (5)

(4) is computed: (3) subtracts numbers of order t_k, a mean of two images does not, and r2 = 0 is no special case.
(5) is summed over pixels and averaged over the batch, as in `edm`; the two published codes take the mean over pixels
(openai/consistency_models, `progdist_losses`, in the same sigma space; google-research, diffusion_distillation).
Adam does not see the difference, clipping by norm does. w with sigma_data = 1 is the "truncated SNR" of both.

The student of N levels is the teacher of the student of (N + 1) / 2: n is halved until it is 1.

    method = make(Settings(num_steps=5), denoise, denoise, optax.scale_by_adam(), learning_rate=lambda i: 5e-5)
    state = method.init(teacher_params)
    state, metrics = jax.jit(method.step)(state, teacher_params, {"image": x_BHWC}, key, iteration)
    x = sample(denoise, state.params, noise * 80.0, few_step.student_plan(5, 0.006, 80.0, afs=False))

Guided teachers cost two calls and need a scale w. First ("match") a student that is told w, as cond["guidance_scale"],
learns the guided denoiser at any t, log-uniform between two neighbours of the grid,

    x~ = D_u(x, t) + w (D_c(x, t) - D_u(x, t))    w uniform in guidance_range                           (6)

then ("halve") (1)-(5) with both told the same w. Scale 1 is no guidance, as everywhere here; Meng's w is one less.
Such a student is sampled with cond["guidance_scale"] and without `core.guidance`.

Published, Salimans & Ho 2022 (their configs): Adam, 50,000 updates per halving, learning rate falling linearly to 0 in
each, clipping at norm 1 (of a loss per pixel), no dropout, no EMA; CIFAR-10: 8192 to 1 steps, 5e-5, batch 128;
ImageNet-64: 1024 to 1 steps, 1e-4, batch 2048.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffjax.core import grids, guidance, microbatches, trees, weighting
from diffjax.core.broadcast import per_sample
from diffjax.core.types import Array, Batch, Cond, Denoiser, Key, Method, Metrics, Params
from diffjax.methods.edm import take_image
from diffjax.methods.update import descend
from diffjax.sampling.few_step import check_num_steps, student_grid

STAGES = ("halve", "match")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What one step of progressive distillation draws and compares.

    num_steps: N, the number of noise levels of the student: N-1 steps, as many calls. In "match", the grid in which
      the noise levels are spread.
    stage: "halve" (eq. 1-5) or "match" (eq. 6).
    sigma_min, sigma_max, grid, rho: the noise levels, see `few_step.student_grid`.
    to_zero: the last level of student and teacher is 0 in the place of sigma_min, so that the sample is a denoised
      image; `few_step.student_plan` has no such grid, `solvers.make_plan("euler", sigmas(settings)[0])` has.
      No effect in "match".
    guidance_range: (low, high), the scales w that the student is told; () = none. "match" needs it.
    num_classes: "match": the index of the null label, which makes D_u of the teacher. "halve" does not look at it.
    sigma_data: the noise level above which the weight is constant, eq. 5.
    """

    num_steps: int
    stage: str = "halve"
    sigma_min: float = 0.006
    sigma_max: float = 80.0
    grid: str = "polynomial"
    rho: float = 7.0
    to_zero: bool = False
    guidance_range: tuple[float, ...] = ()
    num_classes: int = 0
    sigma_data: float = 1.0


class PDState(NamedTuple):
    """params: the student's weights. opt_state: the optimiser's."""

    params: Params
    opt_state: Any


class Row(NamedTuple):
    """One step of the student: (n,) float64 for all of them on the host, (B,) for those that a batch drew."""

    sigma: Array  # t_k
    middle: Array | None = None  # t_{k+1/2}; None in "match"
    share: Array | None = None  # a of eq. 4; None in "match"


Draw = Callable[[Key, int, Any], Row]
Target = Callable[[Params, Array, Row, Cond], Array]


def make(
    settings: Settings,
    teacher_denoise: Denoiser,
    student_denoise: Denoiser,
    optimizer: optax.GradientTransformation,
    learning_rate: Callable[[Array], Array],
    prepare: Callable[[Batch, Key], Batch] | None = None,
    *,
    grid_options: dict[str, Any] | None = None,
) -> Method:
    """Progressive distillation as a Method: frozen = the teacher's parameters, state is a PDState.

    The batch is that of `edm.make`, and so is `prepare`; all but the image is the condition of both networks. Only
    the student has dropout. `optimizer` has no learning rate of its own, `learning_rate` maps the iteration to it;
    `grid_options` are the maps of a discrete grid. Metrics, float32: loss, grad_norm before clipping, learning_rate;
    nonfinite_leaf (int32). Raises ValueError for settings that cannot work, and at the first call for a batch that
    does not fit.
    """
    _check(settings)
    parts = _halving if settings.stage == "halve" else _matching
    draw, make_target = parts(settings, teacher_denoise, grid_options or {})

    def init(params: Params) -> PDState:
        return PDState(params, optimizer.init(params))

    def step(state: PDState, frozen: Params, batch: Batch, key: Key, iteration: Array) -> tuple[PDState, Metrics]:
        prepare_key, level_key, scale_key, noise_key, dropout_key = jax.random.split(key, 5)
        cond = dict(batch) if prepare is None else dict(prepare(batch, prepare_key))
        image = take_image(cond)
        if settings.guidance_range:
            low, high = settings.guidance_range
            cond["guidance_scale"] = jax.random.uniform(scale_key, image.shape[:1], jnp.float32, low, high)
        row = draw(level_key, image.shape[0], image.dtype)
        x = image + per_sample(row.sigma, image) * jax.random.normal(noise_key, image.shape, image.dtype)

        def objective(params: Params, frozen: Params, rows: tuple[Array, Row, Cond], key: Key) -> tuple[Array, tuple[()]]:
            x, row, cond = rows
            target = jax.lax.stop_gradient(make_target(frozen, x, row, cond))
            pixels = loss(settings, student_denoise, params, x, row.sigma, target, cond, key)
            return jnp.sum(pixels) / x.shape[0], ()

        given = x, row, cond
        (value, _), grads = microbatches.value_and_grad(objective, state.params, frozen, given, dropout_key)
        rate = learning_rate(iteration)
        params, opt_state = descend(optimizer, rate, *state, grads)
        values = {"loss": value, "grad_norm": optax.tree.norm(grads), "learning_rate": rate}
        metrics = {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}
        return PDState(params, opt_state), {**metrics, "nonfinite_leaf": trees.first_nonfinite(grads)}

    return Method(init, step)


def loss(
    settings: Settings,
    denoise: Denoiser,
    params: Params,
    x: Array,
    sigma: Array,
    target: Array,
    cond: Cond | None = None,
    key: Key | None = None,
) -> Array:
    """Eq. 5 for every pixel, the shape of the noisy image `x` (B, H, W, C) and of `target`; sigma (B,)."""
    weight = weighting.truncated_snr(sigma, settings.sigma_data)
    return per_sample(weight, x) * (denoise(params, x, sigma, cond, key) - target) ** 2


def halved_target(denoise: Denoiser, params: Params, x: Array, row: Row, cond: Cond | None = None) -> Array:
    """Eq. 1 and 4 with the teacher's `denoise`: x~ like `x` (B, ...); a row of numbers or of (B,) arrays."""
    first = denoise(params, x, row.sigma, cond)
    ratio = per_sample(row.middle / row.sigma, x)
    second = denoise(params, ratio * x + (1 - ratio) * first, row.middle, cond)
    return second + per_sample(row.share, x) * (first - second)


def guided_target(
    denoise: Denoiser, params: Params, x: Array, sigma: Array, cond: Cond, num_classes: int
) -> Array:
    """Eq. 6 with the teacher's `denoise`, w = cond["guidance_scale"], which the teacher itself is not told.

    Raises ValueError where `cond` has no label.
    """
    told = {name: value for name, value in cond.items() if name != "guidance_scale"}
    guided = guidance.cfg(denoise, cond["guidance_scale"], lambda given: guidance.null_label(given, num_classes))
    return guided(params, x, sigma, told)


def sigmas(settings: Settings, grid_options: dict[str, Any] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The noise levels of the student (N,) and of its teacher (2N-1,), float64; every second is the student's.

    Raises ValueError as `few_step.student_grid`, and for a discrete grid whose levels do not nest.
    """
    levels = dict(grid=settings.grid, rho=settings.rho, **(grid_options or {}))
    student = student_grid(settings.num_steps, settings.sigma_min, settings.sigma_max, **levels)
    teacher = student_grid(2 * settings.num_steps - 1, settings.sigma_min, settings.sigma_max, **levels)
    grids.check_nested(student, teacher, 2)
    if settings.to_zero:
        student[-1] = teacher[-1] = 0.0
    return student, teacher


def rows(student: np.ndarray, teacher: np.ndarray) -> Row:
    """The n steps between levels as `sigmas` makes them, a of eq. 4 in float64."""
    start, middle, end = student[:-1], teacher[1::2], student[1:]
    return Row(start, middle, end / middle * (start - middle) / (start - end))


def _halving(settings: Settings, teacher_denoise: Denoiser, options: dict[str, Any]) -> tuple[Draw, Target]:
    """Eq. 1-4: levels from the grid, each step as often as any other."""
    table = rows(*sigmas(settings, options))

    def draw(key: Key, num: int, dtype: Any) -> Row:
        k = jax.random.randint(key, (num,), 0, settings.num_steps - 1)
        return jax.tree.map(lambda column: jnp.asarray(column, dtype)[k], table)

    def make_target(params: Params, x: Array, row: Row, cond: Cond) -> Array:
        return halved_target(teacher_denoise, params, x, row, cond)

    return draw, make_target


def _matching(settings: Settings, teacher_denoise: Denoiser, options: dict[str, Any]) -> tuple[Draw, Target]:
    """Eq. 6: any level between sigma_min and sigma_max, log-uniform within a step, each step as often as any other."""
    logs = np.log(sigmas(dataclasses.replace(settings, to_zero=False), options)[0])

    def draw(key: Key, num: int, dtype: Any) -> Row:
        place = jax.random.uniform(key, (num,), dtype, 0.0, settings.num_steps - 1)
        return Row(jnp.exp(jnp.interp(place, jnp.arange(len(logs), dtype=dtype), jnp.asarray(logs, dtype))))

    def make_target(params: Params, x: Array, row: Row, cond: Cond) -> Array:
        return guided_target(teacher_denoise, params, x, row.sigma, cond, settings.num_classes)

    return draw, make_target


def _check(settings: Settings) -> None:
    if settings.stage not in STAGES:
        raise ValueError(f"stage must be one of {STAGES}, found {settings.stage!r}")
    check_num_steps(settings.num_steps, afs=False)
    if not settings.sigma_data > 0:
        raise ValueError(f"sigma_data must be positive, found {settings.sigma_data}; 1 is the published weight")
    if settings.num_classes < 0:
        raise ValueError(f"num_classes must be 0 (no labels) or positive, found {settings.num_classes}")
    bounds = settings.guidance_range
    if len(bounds) not in (0, 2) or (bounds and not 0 <= bounds[0] <= bounds[1] < math.inf):
        raise ValueError(
            f"guidance_range must be () or (low, high) with 0 <= low <= high, found {bounds}: "
            "for one scale w give (w, w)"
        )
    if settings.stage == "match" and not bounds:
        raise ValueError('stage "match" learns a guided teacher: give guidance_range, e.g. (1.0, 5.0), found ()')
    if settings.stage == "match" and not settings.num_classes:
        raise ValueError(
            'stage "match" needs a teacher with a null label, whose index is num_classes, found 0: set num_classes'
        )
