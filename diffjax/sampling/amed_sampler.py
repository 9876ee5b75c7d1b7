"""Sampling through learned middle points: AMED-Solver and AMED-Plugin (Zhou et al., CVPR 2024, AMED).

One step goes from noise level t down to t', with d = (x - D(x, t)) / t. A small predictor looks at features of the
network at (x, t) and gives three numbers u per sample, which are bounded to

    r = sigmoid(u_1),   c = 1 + s_dir (2 sigmoid(u_2) - 1),   a = 1 + s_time (2 sigmoid(u_3) - 1)          (1)
    t_m = t'^r t^(1-r)                                        the middle level                            (2)
    d_m = (x_m - D(x_m, a t_m)) / t_m                         a moves what the network is told, only      (3)

    amed     x_m = x + (t_m - t) d,   x' = x + c (t' - t) d_m                    AMED-Solver              (4)
    dpm2s    x_m as in (4),           x' = x + c (t' - t) (d_m / (2r) + (1 - 1/(2r)) d)                   (5)
    euler, ipndm, dpmpp, dpmpp_noise: the base solver, equation (1) of `core.multistep`, from t to t_m and then to
             t', with x' = A x_m + c sum_j B_j m_j in the second half            AMED-Plugin              (6)

Multistep histories get both values of a step, so a plan of N levels is 2(N-1) steps of the base solver and, whatever
the solver, 2(N-1) network calls. The analytical first step (AFS) saves one: D(x, t_0) = x (1 - t_0 / sqrt(1 + t_0^2))
and zeros for features.

    plan = make_amed_plan("amed", grids.time_uniform(4, 0.002, 80.0), afs=True)
    sample = make_sampler(features, predict)
    x = sample(denoise, {"teacher": teacher_params, "predictor": predictor_params}, noise * 80.0, plan)

features(teacher_params, x, sigma, cond) -> (B, d) is the channel mean of the bottleneck of the network, and
predict(predictor_params, features, sigma, sigma_next) -> (B, 3) the numbers u. Without guidance the features are free:
in one compiled program XLA computes the encoder of `denoise` and `features`, called with equal arguments, once.

>>> from diffjax.core import grids
>>> from diffjax.sampling.amed_sampler import make_amed_plan
>>> make_amed_plan("ipndm", grids.polynomial(4, 0.002, 80.0), afs=True).nfe
5
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core import multistep
from diffjax.core.broadcast import per_sample
from diffjax.core.names import lookup
from diffjax.core.types import Array, Cond, Denoiser, Key, Params

Features = Callable[[Params, Array, Array, Cond | None], Array]
Predict = Callable[[Params, Array, Array, Array], Array]
Sampler = Callable[..., Array]


class Base(NamedTuple):
    """orders: the last is the default. form: "data" (m = D) or "noise" (m = d). kind: "single", "adams" or "log"."""

    orders: tuple[int, ...]
    form: str
    kind: str


SOLVERS = {
    "amed": Base((2,), "noise", "single"),
    "dpm2s": Base((2,), "noise", "single"),
    "euler": Base((1,), "noise", "adams"),
    "ipndm": Base((1, 2, 3, 4), "noise", "adams"),
    "dpmpp": Base((1, 2, 3), "data", "log"),
    "dpmpp_noise": Base((1, 2, 3), "noise", "log"),
}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["sigmas", "scale_dir", "scale_time"],
    meta_fields=["solver", "order", "parity", "afs"],
)
@dataclasses.dataclass(frozen=True)
class AmedPlan:
    """AMED on a grid, made by `make_amed_plan`. The arrays are leaves, the rest is static; deterministic.

    sigmas     (N,) the grid, decreasing
    scale_dir  scalar s_dir of (1), scale_time scalar s_time
    """

    sigmas: Array
    scale_dir: Array
    scale_time: Array
    solver: str
    order: int
    parity: bool
    afs: bool

    @property
    def num_steps(self) -> int:
        """Intervals of the grid, N-1; each is two steps of the base solver."""
        return self.sigmas.shape[0] - 1

    @property
    def nfe(self) -> int:
        """Network calls per sample; guidance doubles it. Features are not counted."""
        return 2 * self.num_steps - self.afs

    @property
    def noise(self) -> None:
        """No noise is added, as in a deterministic `solvers.Plan`."""
        return None

    @property
    def history(self) -> int:
        """Values that a half step combines, its own included."""
        return 1 if SOLVERS[self.solver].kind == "single" else self.order


class Seen(NamedTuple):
    """What a step knows before the predictor is asked."""

    value: Array  # (B, ...), D or d at (x, t), as the form of the solver says
    features: Array  # (B, d)


class Memory(NamedTuple):
    """Past values and where they were taken, newest first; H-1 of each for a history of H."""

    values: tuple[Array, ...]  # (B, ...)
    levels: tuple[Array, ...]  # (B,)


class Row(NamedTuple):
    """One step. weights (2, H), for each half: Adams-Bashforth weights, or which order, one-hot."""

    sigma: Array
    sigma_next: Array
    weights: Array


def make_amed_plan(
    solver: str,
    sigmas: np.ndarray,
    *,
    order: int | None = None,
    afs: bool = False,
    scale_dir: float = 0.01,
    scale_time: float = 0.0,
    parity: bool = False,
) -> AmedPlan:
    """The plan of `solver` on `sigmas` (N,), decreasing and positive, with the bounds of (1) as it was trained.

    order   of a multistep base solver; None is its default (ipndm: 4, dpmpp: 3, lowered at the end)
    parity  the third order of the released DPM-Solver++, which lacks a factor 2, see `multistep.dpmpp`
    Raises ValueError for an unknown solver, an order it does not have, scales outside [0, 1), and noise levels that
    are not positive and strictly decreasing.
    """
    base = lookup(SOLVERS, solver, "AMED solver")
    order = base.orders[-1] if order is None else order
    if order not in base.orders:
        raise ValueError(f"AMED solver {solver!r} has order {' or '.join(map(str, base.orders))}, found order={order}")
    for name, scale in (("scale_dir", scale_dir), ("scale_time", scale_time)):
        if not 0 <= scale < 1:
            raise ValueError(f"{name} bounds a factor to 1 +- {name} and must be in [0, 1), found {scale}")
    t = np.array(sigmas, np.float64)
    if t.ndim != 1 or len(t) < 2 or not np.all(np.isfinite(t)) or t[-1] <= 0 or np.any(np.diff(t) >= 0):
        raise ValueError(
            f"AMED needs at least 2 finite, positive and strictly decreasing noise levels (the middle one is a "
            f"geometric mean), found {np.asarray(sigmas).tolist()}"
        )
    return AmedPlan(t, np.float64(scale_dir), np.float64(scale_time), solver, order, parity, afs)


def make_sampler(features: Features, predict: Predict) -> Sampler:
    """`sample` for plans of `make_amed_plan`, with the signature of `sampling.sample.sample`:

        sample(denoise, params, x, plan, cond=None, *, key=None, transform=None) -> (B, ...)

    params = {"teacher": of denoise and features, "predictor": of predict}; x (B, ...) float32 or float64 at level
    plan.sigmas[0]; `transform` is applied to every D the network returns. It raises ValueError for a key (nothing is
    random) and a state of low precision.
    """

    def sample(
        denoise: Denoiser, params: Params, x: Array, plan: AmedPlan, cond: Cond | None = None, *,
        key: Key | None = None, transform: Callable[[Array], Array] | None = None,
    ) -> Array:  # fmt: skip
        if key is not None:
            raise ValueError("this plan is deterministic: leave key away")
        if x.dtype not in (jnp.float32, jnp.float64):
            raise ValueError(f"the state must be float32 or float64 (the network may compute lower), found {x.dtype}")
        look, advance = make_step(plan, denoise, features, predict, cond, transform)
        teacher, predictor = params["teacher"], params["predictor"]

        def step(carry: tuple[Array, Memory], row: Row, analytical: bool = False) -> tuple[tuple[Array, Memory], None]:
            x, memory = carry
            seen = look(teacher, x, row.sigma, analytical)
            return advance(teacher, predictor, x, seen, memory, row), None

        rows, carry = make_rows(plan, x.dtype), (x, start_memory(plan, x))
        if plan.afs:  # outside the loop: its first half has no network call
            first, rows = jax.tree.map(lambda a: a[0], rows), jax.tree.map(lambda a: a[1:], rows)
            carry, _ = step(carry, first, analytical=True)
        return jax.lax.scan(step, carry, rows)[0][0]

    return sample


def make_step(
    plan: AmedPlan, denoise: Denoiser, features: Features, predict: Predict, cond: Cond | None,
    transform: Callable[[Array], Array] | None = None,
) -> tuple[Callable[..., Seen], Callable[..., tuple[Array, Memory]]]:  # fmt: skip
    """The two halves of a step, the predictor being in the second alone:

        look(teacher, x, sigma, analytical) -> Seen
        advance(teacher, predictor, x, seen, memory, row) -> (x', memory)

    `analytical` (static) takes D and features without a network call.
    """
    base = SOLVERS[plan.solver]

    def value(teacher: Params, x: Array, told: Array, level: Array) -> Array:
        data = denoise(teacher, x, told, cond)
        data = data if transform is None else transform(data)
        return data if base.form == "data" else (x - data) / per_sample(level, x)

    def look(teacher: Params, x: Array, sigma: Array, analytical: bool) -> Seen:
        if not analytical:
            return Seen(value(teacher, x, sigma, sigma), features(teacher, x, sigma, cond))
        shape = jax.eval_shape(features, teacher, x, sigma, cond)
        slope = 1 / jnp.sqrt(1 + sigma**2)
        # D = x (1 - t slope), without its cancellation
        scale = slope / (jnp.sqrt(1 + sigma**2) + sigma) if base.form == "data" else slope
        return Seen(scale * x, jnp.zeros(shape.shape, shape.dtype))

    def advance(
        teacher: Params, predictor: Params, x: Array, seen: Seen, memory: Memory, row: Row
    ) -> tuple[Array, Memory]:
        raw = predict(predictor, seen.features, row.sigma, row.sigma_next).astype(x.dtype)
        r, c, a = bound(raw, jnp.asarray(plan.scale_dir, x.dtype), jnp.asarray(plan.scale_time, x.dtype))
        middle = row.sigma * jnp.exp(r * jnp.log(row.sigma_next / row.sigma))  # (B,), eq. 2
        if base.kind == "single":
            h = row.sigma_next - row.sigma
            x_m = x + per_sample(middle - row.sigma, x) * seen.value
            d_m = value(teacher, x_m, a * middle, middle)
            if plan.solver == "dpm2s":
                d_m = per_sample(0.5 / r, x) * d_m + per_sample(1 - 0.5 / r, x) * seen.value
            return x + per_sample(c * h, x) * d_m, memory
        memory = _remember(memory, seen.value, jnp.full_like(middle, row.sigma))
        x_m = _base_step(plan, x, memory, middle, row.weights[0], jnp.ones_like(c))
        memory = _remember(_forget(memory), value(teacher, x_m, a * middle, middle), middle)
        y = _base_step(plan, x_m, memory, jnp.full_like(middle, row.sigma_next), row.weights[1], c)
        return y, _forget(memory)

    return look, advance


def bound(raw: Array, scale_dir: Array, scale_time: Array) -> tuple[Array, Array, Array]:
    """Equation (1): r, c and a, each (B,), of the predictor's numbers (B, 3)."""
    if raw.ndim != 2 or raw.shape[1] != 3:
        raise ValueError(f"predict must return three numbers per sample, shape (B, 3), found {raw.shape}")
    r, c, a = jnp.moveaxis(jax.nn.sigmoid(raw), 1, 0)
    return r, 1 + scale_dir * (2 * c - 1), 1 + scale_time * (2 * a - 1)


def make_rows(plan: AmedPlan, dtype: Any) -> Row:
    """The steps of a plan, stacked: leaves (N-1, ...)."""
    base, num, history = SOLVERS[plan.solver], plan.num_steps, plan.history
    weights = np.zeros((2 * num, history))
    if base.kind != "single":
        ranks = multistep.orders(2 * num, plan.order, lower_order_final=base.kind == "log")
        for row, rank in zip(weights, ranks, strict=True):
            row[:rank] = multistep.ADAMS_BASHFORTH[rank - 1] if base.kind == "adams" else np.arange(rank) == rank - 1
    t = jnp.asarray(plan.sigmas, dtype)
    return Row(t[:-1], t[1:], jnp.asarray(weights.reshape(num, 2, history), dtype))


def start_memory(plan: AmedPlan, x: Array) -> Memory:
    """No past: zeros at made-up levels above the first, all different, so that unused coefficients are finite."""
    past = range(1, plan.history)
    level = jnp.full(x.shape[:1], plan.sigmas[0], x.dtype)
    return Memory(tuple(jnp.zeros_like(x) for _ in past), tuple(level * 2.0**i for i in past))


def _remember(memory: Memory, value: Array, level: Array) -> Memory:
    return Memory((value, *memory.values), (level, *memory.levels))


def _forget(memory: Memory) -> Memory:
    return Memory(memory.values[:-1], memory.levels[:-1])


def _base_step(plan: AmedPlan, x: Array, memory: Memory, new: Array, weights: Array, scale: Array) -> Array:
    """Equation (6) to the levels `new` (B,); the newest of `memory` (H) is the value at x."""
    base = SOLVERS[plan.solver]
    kept = new / memory.levels[0] if base.form == "data" else jnp.ones_like(new)
    if base.kind == "adams":
        factors = [(new - memory.levels[0]) * weight for weight in weights]
    else:
        factors = _log_factors(memory.levels, new, weights, base.form, 1.0 if plan.parity else 2.0)
    moved = sum(per_sample(scale * b, x) * m for b, m in zip(factors, memory.values, strict=True))
    return per_sample(kept, x) * x + moved


def _log_factors(
    levels: tuple[Array, ...], new: Array, ranks: Array, form: str, d2_factor: float
) -> list[Array]:
    """B_j of DPM-Solver++ (Lu 2022), newest first, each (B,); see `multistep.dpmpp` for the differences d0, d1.

    Order 1 is B_0; order 2 adds (B_0 / 2) d0 and order 3 phi2 D1 - phi3 D2 (data form), where `ranks` is 1.
    """
    base = 1 - new / levels[0] if form == "data" else new - levels[0]
    zero = jnp.zeros_like(base)
    if len(levels) == 1:
        return [base]
    lam = [-jnp.log(level) for level in levels]
    h = -jnp.log(new) - lam[0]
    r0 = (lam[0] - lam[1]) / h
    on_d0, on_d1 = ranks[1] * base / 2, zero
    if len(levels) == 3:
        sign = -1.0 if form == "data" else 1.0
        phi2 = jnp.expm1(sign * h) / h - sign
        phi3 = phi2 / h - 0.5
        slope, curvature = (phi2, -phi3) if form == "data" else (-new * phi2, -new * phi3)
        r1 = (lam[1] - lam[2]) / h
        difference = (slope * r0 + d2_factor * curvature) / (r0 + r1)  # of d0 - d1
        on_d0 = on_d0 + ranks[2] * (slope + difference)
        on_d1 = -ranks[2] * difference / r1
    on_d0 = on_d0 / r0
    return [base + on_d0, on_d1 - on_d0, -on_d1][: len(levels)]
