"""Consistency training and distillation (Song et al. 2023; Song & Dhariwal 2023, iCT): one call, without or with a teacher.

f(x, sigma) is to be the end of the trajectory through x at every level (`prediction.consistency_function` makes
f(x, sigma_min) = x exact). With levels t_0 = sigma_max > ... > t_{N-1} = sigma_min of the polynomial grid, an image x,
unit noise z and a random i

    loss = lambda d(f(x + t_i z), sg f'(x'))        x' = x + t_{i+1} z                                   (1)
                                                    x' = one Heun step of the teacher from x + t_i z      (2)

(1) is training, (2) distillation. Both calls have the same noise and the same dropout. N grows along the run, k of K
steps:

    "sqrt"     m = max(1, ceil(sqrt(k/K ((s1+1)^2 - s0^2) + s0^2) - 1)),  N = m + 1                       (3)
    "double"   N = min(s0 2^floor(k/K'), s1) + 1,  K' = floor(K / (log2 floor(s1/s0) + 1))                (4)
    "fixed"    N = s1

f' has the average of the weights with mu = exp(s0 log(mu0) / m) as its own (2023), or the weights themselves (mu0 = 0,
iCT). i is uniform, or "lognormal": as often as log sigma ~ N(-1.1, 2^2) falls between t_{i+1} and t_i (iCT, eq. 10).

    method = make(Settings(total_steps=800_000), f, optax.radam(1.0), learning_rate=lambda i: 4e-4)
    state = method.init(params)
    state, metrics = method.step(state, {}, {"image": x_BHWC, "label": y_B}, key, iteration)
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from diffjax.assign import pair
from diffjax.core import microbatches, names, sharding, trees
from diffjax.core.broadcast import per_sample, squared_norm
from diffjax.core.types import Array, Batch, Denoiser, Key, Method, Metrics, Params
from diffjax.methods import edm
from diffjax.methods.update import descend

Distance = Callable[[Params, Array, Array], Array]  # (params, (B, ...), (B, ...)) -> (B,)

CURRICULA, LEVELS = ("sqrt", "double", "fixed"), ("uniform", "lognormal")
_P_MEAN, _P_STD = -1.1, 2.0  # of log sigma in "lognormal"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What one step does; the defaults are the CIFAR-10 training of 2023.

    total_steps: K of (3) and (4). curriculum, first_scale, last_scale: the kind of N(k), s0 and s1.
    mu: mu0, the target's average at m = s0; 0: the target has the weights themselves.
    sigma_min, sigma_max, rho: of the grid. levels: how i is drawn.
    metric: "l1", "l2" (means over pixels), "pseudo_huber" sqrt(|a - b|^2 + c^2) - c with c = 0.00054 sqrt(D), or
      "perceptual", the distance given to `make`. inverse_gap: lambda = 1 / (t_i - t_{i+1}) in the place of 1.
    assign, assign_options: how noise is given to images, see `edm.Settings`.
    """

    total_steps: int
    curriculum: str = "sqrt"
    first_scale: int = 2
    last_scale: int = 150
    mu: float = 0.9
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    levels: str = "uniform"
    metric: str = "l2"
    inverse_gap: bool = False
    label_dropout: float = 0.0
    num_classes: int = 0
    assign: str = "none"
    assign_options: Mapping[str, str | int | float] = dataclasses.field(default_factory=dict)


class ConsistencyState(NamedTuple):
    """params: the network's weights. opt_state: the optimiser's. target: those of f', {} where they are params."""

    params: Params
    opt_state: Any
    target: Params


class Frozen(NamedTuple):
    """What is read: the teacher's parameters, those of the perceptual distance."""

    teacher: Params = {}
    perceptual: Params = {}


class Scales(NamedTuple):
    """At an iteration: N, the number of levels (int32), and mu, the target's decay (float32)."""

    num: Array
    decay: Array


def make(
    settings: Settings,
    denoise: Denoiser,
    optimizer: optax.GradientTransformation,
    learning_rate: Callable[[Array], Array],
    prepare: Callable[[Batch, Key], Batch] | None = None,
    *,
    teacher_denoise: Denoiser | None = None,
    perceptual: Distance | None = None,
) -> Method:
    """Consistency training as a Method, distillation with `teacher_denoise`; frozen is a Frozen. `denoise` is f. The
    batch as in `edm.make`. `perceptual`: distance of the metric of that name.

    Metrics, float32: loss, grad_norm, learning_rate, levels (N), target_decay (mu), those of an assignment;
    nonfinite_leaf (int32). Raises ValueError for settings that cannot work.
    """
    _check(settings, perceptual)
    averaged = settings.mu > 0

    def init(params: Params) -> ConsistencyState:
        return ConsistencyState(params, optimizer.init(params), jax.tree.map(jnp.copy, params) if averaged else {})

    def objective(params: Params, fixed: tuple[Frozen, Params], rows: tuple, key: Key) -> tuple[Array, tuple[()]]:
        (frozen, target), (image, noise, high, low, cond) = fixed, rows
        noisy = image + per_sample(high, image) * noise
        if teacher_denoise is None:
            less = image + per_sample(low, image) * noise
        else:
            less = _heun(lambda x, sigma: teacher_denoise(frozen.teacher, x, sigma, cond, None), noisy, high, low)
        known = jax.lax.stop_gradient(denoise(target, less, low, cond, key))
        found = denoise(params, noisy, high, cond, key)
        distances = _distance(settings, perceptual, frozen.perceptual, found, known)
        return jnp.mean(distances / (high - low) if settings.inverse_gap else distances), ()

    def step(
        state: ConsistencyState, frozen: Frozen, batch: Batch, key: Key, iteration: Array
    ) -> tuple[ConsistencyState, Metrics]:
        keys = edm.split(key)
        batch = dict(batch) if prepare is None else dict(prepare(batch, keys.prepare))
        image = edm.take_image(batch)
        noise, found = pair.training_noise(keys.noise, image, batch, settings.assign, **settings.assign_options)
        cond = edm.drop_labels(keys.label, batch, settings.label_dropout, settings.num_classes)
        scales = schedule(settings, iteration)
        high, low = draw_levels(settings, keys.level, image.shape[0], scales.num)
        fixed, given = (frozen, state.target if averaged else state.params), (image, noise, high, low, cond)
        (value, _), grads = microbatches.value_and_grad(objective, state.params, fixed, given, keys.dropout)
        rate = learning_rate(iteration)
        params, opt_state = descend(optimizer, rate, state.params, state.opt_state, grads)
        target = trees.lerp(params, state.target, scales.decay) if averaged else {}
        values = {"loss": value, "grad_norm": optax.tree.norm(grads), "learning_rate": rate, **found}
        values |= {"levels": scales.num, "target_decay": scales.decay}
        metrics = {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}
        return ConsistencyState(params, opt_state, target), {**metrics, "nonfinite_leaf": trees.first_nonfinite(grads)}

    return Method(init, step)


def schedule(settings: Settings, iteration: Array) -> Scales:
    """N and mu at an iteration, (3), (4); as released m = N - 1 in mu, where the paper of 2023 writes N."""
    k = jnp.asarray(iteration, jnp.float32)
    s0, s1, total = settings.first_scale, settings.last_scale, settings.total_steps
    if settings.curriculum == "sqrt":
        steps = jnp.maximum(1.0, jnp.ceil(jnp.sqrt(k / total * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1))
    elif settings.curriculum == "double":
        doublings = (s1 // s0).bit_length() - 1
        each = max(1, total // (doublings + 1))
        steps = jnp.minimum(s0 * 2.0 ** jnp.floor(k / each), s1)
    else:
        steps = jnp.float32(s1 - 1)
    decay = jnp.exp(s0 * jnp.log(settings.mu) / steps) if settings.mu > 0 else jnp.float32(0)
    if settings.curriculum == "fixed":
        decay = jnp.float32(settings.mu)
    return Scales(steps.astype(jnp.int32) + 1, decay)


def grid_level(settings: Settings, index: Array, num: Array) -> Array:
    """t_i of N = `num` levels, float32, the shape of `index`; t_{N-1} is sigma_min exactly."""
    top, bottom = settings.sigma_max ** (1 / settings.rho), settings.sigma_min ** (1 / settings.rho)
    level = (top + index.astype(jnp.float32) / (num - 1) * (bottom - top)) ** settings.rho
    return jnp.where(index == num - 1, settings.sigma_min, level)


def draw_levels(settings: Settings, key: Key, batch_size: int, num: Array) -> tuple[Array, Array]:
    """(t_i, t_{i+1}), float32 (B,) each, of random i in 0..N-2 at N = `num` (int32, may be traced)."""
    uniform = jax.random.uniform(key, (batch_size,))
    if settings.levels == "uniform":
        index = jnp.minimum(jnp.floor(uniform * (num - 1)), num - 2)
    else:
        index = jnp.searchsorted(jnp.cumsum(_lognormal_shares(settings, num)), uniform)
        index = jnp.minimum(index, num - 2)
    index = index.astype(jnp.int32)
    return sharding.everywhere((grid_level(settings, index, num), grid_level(settings, index + 1, num)))


def _lognormal_shares(settings: Settings, num: Array) -> Array:
    """How often each i is drawn, (s1,) with 0 beyond N - 2; sums to 1."""
    index = jnp.arange(settings.last_scale)
    scale = _P_STD * 2**0.5
    high, low = (
        jax.scipy.special.erf((jnp.log(grid_level(settings, jnp.minimum(at, num - 1), num)) - _P_MEAN) / scale)
        for at in (index, index + 1)
    )
    shares = jnp.where(index < num - 1, high - low, 0)
    return shares / jnp.sum(shares)


def _heun(denoise: Callable[[Array, Array], Array], x: Array, high: Array, low: Array) -> Array:
    """(2): one Heun step of dx/dt = (x - D) / t per sample, without a gradient."""
    start, end = per_sample(high, x), per_sample(low, x)
    slope = (x - denoise(x, high)) / start
    ahead = x + (end - start) * slope
    return jax.lax.stop_gradient(x + (end - start) * (slope + (ahead - denoise(ahead, low)) / end) / 2)


def _distance(settings: Settings, perceptual: Distance | None, params: Params, a: Array, b: Array) -> Array:
    """d of (1), (B,)."""
    axes = tuple(range(1, a.ndim))
    if settings.metric == "l1":
        return jnp.mean(jnp.abs(a - b), axis=axes)
    if settings.metric == "l2":
        return jnp.mean(jnp.square(a - b), axis=axes)
    if settings.metric == "pseudo_huber":
        c = 0.00054 * (a.size / a.shape[0]) ** 0.5
        return jnp.sqrt(squared_norm(a - b) + c**2) - c
    return perceptual(params, a, b)


METRICS = ("l1", "l2", "pseudo_huber", "perceptual")


def _check(settings: Settings, perceptual: Distance | None) -> None:
    for value, known, what in (
        (settings.curriculum, CURRICULA, "curriculum"),
        (settings.levels, LEVELS, "levels"),
        (settings.metric, METRICS, "metric"),
    ):
        if value not in known:
            raise ValueError(f"unknown {what} {value!r}; {names.nearest(value, known)}")
    if (settings.metric == "perceptual") != (perceptual is not None):
        raise ValueError("metric='perceptual' and a perceptual distance go together: set both, or none")
    if not 1 < settings.first_scale <= settings.last_scale:
        raise ValueError(f"expected 1 < first_scale <= last_scale, found {settings.first_scale}, {settings.last_scale}")
    if settings.total_steps < 1 or not 0 <= settings.mu < 1:
        raise ValueError(f"total_steps must be positive and mu in [0, 1), found {settings.total_steps}, {settings.mu}")
    if not 0 < settings.sigma_min < settings.sigma_max:
        raise ValueError(f"expected 0 < sigma_min < sigma_max, found {settings.sigma_min}, {settings.sigma_max}")
    pair.check_options(settings.assign, settings.assign_options)
