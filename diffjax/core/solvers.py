"""Solvers of the probability-flow ODE dx/dt = d(x, t) = (x - D(x, t)) / t as tables of numbers.

`t` is the noise level sigma. Every solver here is linear in what it has seen, so it is a list of rows, one for each
value of the network. With y the point of the current call, x a second register (the start of a two-stage step, or a
corrected state) and m_0, m_1, ... the newest values first (m = D in the "data" form, m = d in the "noise" form), a
row does

    y += s eps                            stochastic solvers only: eps unit noise                   (1)
    m_0 = D(y, t)  or  (y - D(y, t)) / t  the one network call                                      (2)
    x <- k . (x, y, m_0, m_1, ...)        only where a second register is needed                    (3)
    y <- w . (x, y, m_0, m_1, ...)        x here is the old one                                     (4)

and y after the last row is the sample. So one compiled loop over the rows serves all solvers, the number of network
calls is the number of rows, and changing the noise levels changes numbers only, never the program.

    euler = ddim             Song 2021 (DDIM), eq. 13                        order 1, one call per step
    heun                     Karras 2022, algorithm 1                        order 2, two calls per step
    dpm2s                    Lu 2022 (DPM-Solver), algorithm 1               order 2, two calls per step
    ipndm, ipndm_v, deis     Liu 2022 (PNDM), Zhang 2023 (DEIS)              orders 1-4, one call per step
    dpmpp = dpmpp_data, dpmpp_noise   Lu 2022 (DPM-Solver++)                 orders 1-3, one call per step
    unipc                    Zhao 2023 (UniPC), algorithms 1 and 2           orders 1-3, one call per step
    edm_stochastic           Karras 2022, algorithm 2                        Heun with added noise
    consistency              Song 2023 (consistency models), algorithm 1     noise again after each denoised image
    ancestral                Ho 2020 (DDPM), algorithm 2; Song 2021 (DDIM)   noise after each step, one call per step

>>> from diffjax.core import grids, solvers
>>> solvers.make_plan("dpmpp", grids.polynomial(4, 0.006, 80.0), afs=True).nfe
2
"""

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from diffjax.core import multistep, unipc
from diffjax.core.types import Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["sigmas", "levels", "advance", "keep", "noise", "afs_scale"],
    meta_fields=["steps", "form", "corrected"],
)
@dataclasses.dataclass(frozen=True)
class Plan:
    """A solver on a grid: E rows for n steps, made by `make_plan`. The arrays are leaves, the rest is static.

    sigmas     (n+1,) the grid, decreasing
    levels     (E,) noise level of each value
    advance    (E, 2+H) weights w of (4) on (x, y, m_0..m_{H-1})
    keep       (E, 2+H) weights k of (3), or None: no second register
    noise      (E,) standard deviation s of (1), or None: deterministic
    afs_scale  scalar, or None: the first value is afs_scale * y in the place of a network call
    steps      1-based step that each row works on
    form       "data" or "noise": what m is
    corrected  the state at a grid level is in x, one row later (predictor-corrector)
    """

    sigmas: Array
    levels: Array
    advance: Array
    keep: Array | None
    noise: Array | None
    afs_scale: Array | None
    steps: tuple[int, ...]
    form: str
    corrected: bool

    @property
    def num_steps(self) -> int:
        """Intervals of the grid."""
        return self.steps[-1]

    @property
    def nfe(self) -> int:
        """Network calls per sample; guidance doubles it."""
        return len(self.steps) - (self.afs_scale is not None)

    @property
    def history(self) -> int:
        """Values that are kept, H."""
        return self.advance.shape[-1] - 2


class TooFewSteps(ValueError):
    """The grid has too few noise levels for the solver."""


class Rows(NamedTuple):
    """What a solver's builder returns: the fields of Plan before the analytic first step is considered."""

    levels: np.ndarray
    advance: np.ndarray
    steps: tuple[int, ...]
    form: str
    keep: np.ndarray | None = None
    noise: np.ndarray | None = None
    corrected: bool = False


def make_plan(
    solver: str, sigmas: np.ndarray, *, order: int | None = None, parity: bool = False, afs: bool = False, **options
) -> Plan:
    """The plan of `solver` on `sigmas` (N,), decreasing and positive; the last may be 0 where the solver allows it.

    order    of a multistep solver; None is its default (ipndm, ipndm_v, deis: 4, dpmpp, unipc: 3)
    parity   the coefficients of the released code of Zhou 2024 where they differ from the right ones
    afs      analytic first step: D(x, t_0) = x (1 - t_0 / sqrt(1 + t_0^2)) without a call. Dockhorn 2022
    options  dpmpp and unipc: form ("data", "noise"), lower_order_final (True); unipc: variant ("bh2", "bh1");
             dpm2s: r (0.5); edm_stochastic: s_churn, s_min, s_max, s_noise; ancestral: eta (1), variance ("small");
             consistency: epsilon (0.002)

    Raises ValueError for an unknown solver or option, levels that are not finite, negative or not strictly decreasing,
    an order the solver does not have, and a last level of 0 where the solver has no limit there; TooFewSteps, a
    ValueError, for too few levels.
    """
    build, orders, parity_differs, options = _lookup(solver, options)
    t = _check_sigmas(sigmas)
    order = _check_order(solver, order, orders)
    if order is not None and len(orders) > 1:
        options["order"] = order
    if parity_differs:
        options["parity"] = parity
    rows = build(t, **options)
    if not np.all(np.isfinite(rows.advance)):
        raise ValueError(f"solver {solver!r} with {options} has no finite coefficients on sigmas {t.tolist()}")
    plan = Plan(
        sigmas=t, levels=rows.levels, advance=rows.advance, keep=rows.keep, noise=rows.noise,
        afs_scale=_afs_scale(t[0], rows.form) if afs else None,
        steps=rows.steps, form=rows.form, corrected=rows.corrected,
    )  # fmt: skip
    if plan.nfe < 1:
        raise TooFewSteps("the analytic first step alone makes no network call: give at least 3 sigmas or afs=False")
    if afs and rows.noise is not None:
        raise ValueError(f"afs replaces the first call of a deterministic solver; {solver} adds noise between its calls")
    return plan


def stack(plans: Sequence[Plan]) -> tuple[Plan, np.ndarray]:
    """(a plan whose arrays have an axis in front, of the plans, the rows of each). All are of one solver; shorter ones
    are filled up with zeros that nobody is to follow."""
    longest = max(plans, key=lambda plan: len(plan.steps))

    def put(*arrays: np.ndarray) -> np.ndarray:
        table = np.zeros((len(arrays), *map(max, zip(*map(np.shape, arrays), strict=True))))
        for i, array in enumerate(arrays):
            table[(i, *map(slice, np.shape(array)))] = array
        return table

    alike = [dataclasses.replace(plan, steps=longest.steps) for plan in plans]
    return jax.tree.map(put, *alike), np.asarray([len(plan.steps) for plan in plans])


def _afs_scale(t0: float, form: str) -> np.ndarray:
    """m_0 = scale * x_0 for d_0 = x_0 / sqrt(1 + t_0^2), D_0 = x_0 - t_0 d_0."""
    slope = 1 / np.sqrt(1 + t0**2)
    # 1 - t0 / sqrt(1 + t0^2) without its cancellation
    return np.asarray(slope if form == "noise" else slope / (np.sqrt(1 + t0**2) + t0))


# One row per step -----------------------------------------------------------------------------------------------


def _from_table(t: np.ndarray, table: multistep.Table, form: str) -> Rows:
    """Row i of a multistep solver: y <- a_i y + sum_j b_ij m_j."""
    advance = np.concatenate([np.zeros((len(table.a), 1)), table.a[:, None], table.b], axis=1)
    return Rows(levels=t[:-1], advance=advance, steps=tuple(range(1, len(t))), form=form)


def _euler(t: np.ndarray) -> Rows:
    """x' = x + h d."""
    return _from_table(t, multistep.ipndm(t, 1), "noise")


def _ipndm(t: np.ndarray, order: int) -> Rows:
    return _from_table(t, multistep.ipndm(t, order), "noise")


def _ipndm_v(t: np.ndarray, order: int, parity: bool) -> Rows:
    return _from_table(t, multistep.ipndm_v(t, order, parity), "noise")


def _deis(t: np.ndarray, order: int, parity: bool) -> Rows:
    _refuse_zero(t, "deis")
    return _from_table(t, multistep.deis(t, order, parity), "noise")


def _dpmpp(t: np.ndarray, order: int, parity: bool, form: str = "data", lower_order_final: bool = True) -> Rows:
    _check_log_time(t, "dpmpp", order, form, lower_order_final)
    return _from_table(t, multistep.dpmpp(t, order, form, lower_order_final, parity), form)


def _unipc(
    t: np.ndarray, order: int, parity: bool, form: str = "data", lower_order_final: bool = True, variant: str = "bh2"
) -> Rows:
    _check_log_time(t, "unipc", order, form, lower_order_final)
    if variant not in ("bh1", "bh2"):
        raise ValueError(f"unipc variant must be 'bh1' or 'bh2', found {variant!r}")
    if parity and len(t) - 1 < order:
        raise TooFewSteps(
            f"unipc of order {order} needs at least {order + 1} sigmas with parity=True (the released code spends "
            f"one call more on shorter grids), found {len(t)}: give more sigmas, order={len(t) - 1} or parity=False"
        )
    advance, keep = unipc.tables(t, order, form, lower_order_final, variant)
    steps = tuple(range(1, len(t)))
    return Rows(levels=t[:-1], advance=advance, steps=steps, form=form, keep=keep, corrected=True)


# Two rows per step ----------------------------------------------------------------------------------------------
# Weights are on (x, y, m_0, m_1), where m_1 is the slope at the start of the step once the second call is made.


def _heun(t: np.ndarray) -> Rows:
    """y = x + h d; x' = x + h (d + d') / 2. A last level of 0 is reached by a plain Euler step."""
    return _edm(t, t[:-1])


def _dpm2s(t: np.ndarray, r: float = 0.5) -> Rows:
    """t_m = t'^r t^(1-r); y = x + (t_m - t) d; x' = x + h (d_m / (2r) + (1 - 1/(2r)) d)."""
    _refuse_zero(t, "dpm2s")
    if not 0 < r <= 1:
        raise ValueError(f"dpm2s: r places the middle call and must be in (0, 1], found {r}")
    h, middle = np.diff(t), t[1:] ** r * t[:-1] ** (1 - r)
    first = np.stack([_row(0, 1, m - s, 0) for m, s in zip(middle, t[:-1], strict=True)])
    second = np.stack([_row(1, 0, step / (2 * r), step * (1 - 1 / (2 * r))) for step in h])
    return _two_stage(first, second, t[:-1], middle)


def _edm_stochastic(
    t: np.ndarray, s_churn: float = 0.0, s_min: float = 0.0, s_max: float = np.inf, s_noise: float = 1.0
) -> Rows:
    """Karras 2022, algorithm 2: raise the level by gamma with fresh noise, then a Heun step from there."""
    if s_churn < 0 or s_noise < 0:
        raise ValueError(f"s_churn and s_noise must not be negative, found {s_churn} and {s_noise}")
    start = t[:-1]
    gamma = np.where((s_min <= start) & (start <= s_max), min(s_churn / len(start), np.sqrt(2) - 1), 0.0)
    raised = start * (1 + gamma)
    rows = _edm(t, raised)
    noise = np.zeros(len(rows.levels))
    noise[::2] = s_noise * np.sqrt(raised**2 - start**2)
    return rows._replace(noise=noise)


def _ancestral(t: np.ndarray, eta: float = 1.0, variance: str = "small") -> Rows:
    """x' = D + (down / t) (x - D) + s eps, down^2 = t'^2 - s^2, down to a last level of 0.

    s = eta t' sqrt(1 - (t'/t)^2): 1 is DDPM with the posterior's variance, 0 DDIM. Song 2021 (DDIM), eq. 16. With
    variance "large" that of the forward process is added in the place of the posterior's ("fixed large", Ho 2020,
    section 3.2; eta = 1 only), from the same mean.
    """
    if t[-1] != 0:
        raise ValueError(f"ancestral adds noise after each step but one that ends at level 0: found {t[-1]}; append 0")
    if not 0 <= eta <= 1 or variance not in ("small", "large") or (variance == "large" and eta != 1):
        raise ValueError(
            f"ancestral: found eta={eta} and variance={variance!r}; expected eta in [0, 1] with 'small', eta=1 with 'large'"
        )
    start, end = t[:-1], t[1:]
    added = eta * end * np.sqrt(1 - (end / start) ** 2)
    ratio = np.sqrt(end**2 - added**2) / start
    if variance == "large":
        added = np.sqrt((start**2 - end**2) * (1 + end**2) / (1 + start**2)) * (end > 0)
    advance = np.stack([np.zeros_like(start), ratio, 1 - ratio], axis=1)
    # the noise of a step is added before the next call; the last has none
    noise = np.concatenate([[0.0], added[:-1]])
    return Rows(levels=start, advance=advance, steps=tuple(range(1, len(t))), form="data", noise=noise)


def _consistency(t: np.ndarray, epsilon: float = 0.002) -> Rows:
    """x' = f(x, t), the end of the trajectory; then sqrt(t'^2 - epsilon^2) of noise before the next call. Ends at 0."""
    if t[-1] != 0 or not np.all(t[:-1] > epsilon):
        raise ValueError(f"consistency steps start above epsilon={epsilon} and end at level 0, found {t.tolist()}")
    start = t[:-1]
    advance = np.tile([0.0, 0.0, 1.0], (len(start), 1))
    noise = np.concatenate([[0.0], np.sqrt(start[1:] ** 2 - epsilon**2)])
    return Rows(levels=start, advance=advance, steps=tuple(range(1, len(t))), form="data", noise=noise)


def _edm(t: np.ndarray, start: np.ndarray) -> Rows:
    """Heun steps from `start` (n,) to t[1:]; the last one is plain where it ends at 0."""
    h = t[1:] - start
    first = np.stack([_row(0, 1, step, 0) for step in h])
    second = np.stack([_row(1, 0, step / 2, step / 2) for step in h])
    rows = _two_stage(first, second, start, t[1:])
    if t[-1] > 0:
        return rows
    return rows._replace(
        levels=rows.levels[:-1], advance=rows.advance[:-1], keep=rows.keep[:-1], steps=rows.steps[:-1]
    )


def _row(x: float, y: float, newest: float, older: float) -> np.ndarray:
    return np.array([x, y, newest, older], np.float64)


def _two_stage(first: np.ndarray, second: np.ndarray, start: np.ndarray, middle: np.ndarray) -> Rows:
    """Alternate the rows of both stages; the first keeps its y as x, the second leaves its result in both."""

    def alternate(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.stack([a, b], axis=1).reshape((-1, *a.shape[1:]))

    same = np.tile(_row(0, 1, 0, 0), (len(first), 1))
    return Rows(
        levels=alternate(start, middle), advance=alternate(first, second), keep=alternate(same, second),
        steps=tuple(i + 1 for i in range(len(first)) for _ in range(2)), form="noise",
    )  # fmt: skip


# Names and checks -----------------------------------------------------------------------------------------------

# name -> builder, its orders (the last is the default), whether `parity` changes the coefficients
SOLVERS: dict[str, tuple[Callable[..., Rows], tuple[int, ...], bool]] = {
    "euler": (_euler, (1,), False),
    "ddim": (_euler, (1,), False),
    "heun": (_heun, (2,), False),
    "dpm2s": (_dpm2s, (2,), False),
    "ipndm": (_ipndm, (1, 2, 3, 4), False),
    "ipndm_v": (_ipndm_v, (1, 2, 3, 4), True),
    "deis": (_deis, (1, 2, 3, 4), True),
    "dpmpp": (_dpmpp, (1, 2, 3), True),
    "dpmpp_data": (functools.partial(_dpmpp, form="data"), (1, 2, 3), True),
    "dpmpp_noise": (functools.partial(_dpmpp, form="noise"), (1, 2, 3), True),
    "unipc": (_unipc, (1, 2, 3), True),
    "edm_stochastic": (_edm_stochastic, (2,), False),
    "ancestral": (_ancestral, (1,), False),
    "consistency": (_consistency, (1,), False),
}


def _lookup(solver: str, options: dict) -> tuple:
    """The entry of SOLVERS and a copy of the options, both checked by name."""
    if solver not in SOLVERS:
        nearest = difflib.get_close_matches(solver.lower(), SOLVERS, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown solver {solver!r}; did you mean {nearest!r}? Known: {', '.join(SOLVERS)}")
    build, orders, parity_differs = SOLVERS[solver]
    parameters = inspect.signature(build).parameters
    known = [name for name, p in parameters.items() if p.default is not p.empty]
    for name in options:
        if name not in known:
            raise ValueError(f"solver {solver!r} has no option {name!r}; it has {known or 'none'}")
    return build, orders, parity_differs, dict(options)


def _check_order(solver: str, order: int | None, orders: tuple[int, ...]) -> int:
    """The highest order is the default."""
    if order is None:
        return orders[-1]
    if order not in orders:
        raise ValueError(f"solver {solver!r} has order {' or '.join(map(str, orders))}, found order={order}")
    return order


def _check_sigmas(sigmas: np.ndarray) -> np.ndarray:
    t = np.array(sigmas, np.float64)
    if t.ndim != 1:
        raise ValueError(f"sigmas must be one array of noise levels, found shape {t.shape}")
    if len(t) < 2:
        raise TooFewSteps(f"a solver needs at least 2 sigmas (one step), found {t.tolist()}")
    if not np.all(np.isfinite(t)) or np.any(t < 0):
        raise ValueError(f"sigmas must be finite and not negative, found {t.tolist()}")
    if np.any(np.diff(t) >= 0):
        at = int(np.argmax(np.diff(t) >= 0))
        raise ValueError(f"sigmas must decrease strictly, found {t[at]:g} then {t[at + 1]:g} at index {at}")
    return t


def _refuse_zero(t: np.ndarray, solver: str) -> None:
    if t[-1] == 0:
        raise ValueError(f"solver {solver!r} has no limit at sigma 0: end the grid at a positive sigma")


def _check_log_time(t: np.ndarray, solver: str, order: int, form: str, lower_order_final: bool) -> None:
    """Solvers in lambda = -log t reach t = 0 by a step of order 1 only."""
    if form not in ("data", "noise"):
        raise ValueError(f"{solver} form must be 'data' or 'noise', found {form!r}")
    last = multistep.orders(len(t) - 1, order, lower_order_final)[-1]
    if t[-1] == 0 and last > 1:
        raise ValueError(
            f"solver {solver!r} reaches sigma 0 by a step of order 1 only, found order {last}: "
            "set lower_order_final=True or order=1, or end the grid at a positive sigma"
        )
