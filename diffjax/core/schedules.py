"""Noise processes: how much data and how much noise at a time, and the time of a noise level.

A process is xt = alpha(u) x0 + sigma(u) eps for a time u. Its place in sigma space is the *level*
sigma(u) / alpha(u), the noise of x = xt / alpha = x0 + level eps. Each class below has

    alpha(u), sigma(u)   the two factors
    level(u)             sigma(u) / alpha(u), increasing in u
    time(level)          the inverse of `level`
    scale(level)         alpha at a level: what x is multiplied with before a network of this process sees it

on arrays of any shape. JAX arrays stay in JAX and keep their type; everything else is computed by NumPy in float64,
so the same map serves the host's sampling grids (`grids.discrete`) and the compiled denoiser.

    VP        beta linear in u, u in [0, 1]                               Song 2021, eq. 33
    Cosine    alpha = cos(pi u / 2), sigma = sin(pi u / 2)                Nichol & Dhariwal 2021 without offset
    VE        alpha = 1, level geometric in u                             Song 2021, eq. 31
    EDM       alpha = 1, the time is the level                            Karras 2022
    Flow      alpha = 1 - u, sigma = u                                    Lipman 2023, Liu 2023
    Discrete  a table of alpha_bar, as DDPM, LDM and Stable Diffusion     Ho 2020, Rombach 2022
    Shifted   any of these with all levels multiplied by one factor       Hoogeboom 2023, Esser 2024

`rescaled` gives the process of a network for larger images than it was pre-trained on.

>>> from diffjax.core import schedules
>>> stable_diffusion = schedules.Discrete(schedules.scaled_linear(0.00085, 0.012))
>>> round(float(stable_diffusion.level(1.0)), 4)
14.6146
"""

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core import names
from diffjax.core.types import Array


class Schedule(Protocol):
    """The five functions of a process; see the module's docstring."""

    def alpha(self, u: Array) -> Array: ...

    def sigma(self, u: Array) -> Array: ...

    def level(self, u: Array) -> Array: ...

    def time(self, level: Array) -> Array: ...

    def scale(self, level: Array) -> Array: ...


def logsnr(schedule: Schedule, u: Array) -> Array:
    """log(alpha^2 / sigma^2) at time u."""
    u, xp = _array(u)
    return -2 * xp.log(schedule.level(u))


def fraction(schedule: Schedule, level: Array) -> Array:
    """The time of a noise level as a share of the last one's, 0..1: t / (T - 1) of a table's index t, else u itself."""
    u = schedule.time(level)
    return jnp.clip(schedule.label(u) / (schedule.num - 1), 0, 1) if isinstance(schedule, Discrete) else jnp.clip(u, 0, 1)


def process(
    schedule: Schedule, label: Callable[[Array], Array] = lambda u: u
) -> Callable[[Array], tuple[Array, Array, Array]]:
    """sigma -> (alpha, sigma_t, noise label), for `prediction.process_denoiser`; `label` is a function of the time."""

    def at(sigma: Array) -> tuple[Array, Array, Array]:
        alpha = schedule.scale(sigma)
        return alpha, alpha * sigma, label(schedule.time(sigma))

    return at


@dataclasses.dataclass(frozen=True)
class VP:
    """Variance preserving with beta(u) = beta_min + beta_d u. Song 2021, eq. 33; level(u) in Karras 2022, table 1."""

    beta_d: float = 19.9
    beta_min: float = 0.1

    def alpha(self, u: Array) -> Array:
        u, xp = _array(u)
        return xp.exp(-self._integral(u) / 2)

    def sigma(self, u: Array) -> Array:
        u, xp = _array(u)
        return xp.sqrt(-xp.expm1(-self._integral(u)))

    def level(self, u: Array) -> Array:
        u, xp = _array(u)
        return xp.sqrt(xp.expm1(self._integral(u)))

    def time(self, level: Array) -> Array:
        level, xp = _array(level)
        total = 2 * xp.log1p(level**2)
        # the root of the quadratic without a difference of nearly equal numbers at small levels
        return total / (xp.sqrt(self.beta_min**2 + self.beta_d * total) + self.beta_min)

    def scale(self, level: Array) -> Array:
        return _preserving(level)

    def _integral(self, u: Array) -> Array:
        """The integral of beta from 0 to u."""
        return self.beta_d * u**2 / 2 + self.beta_min * u


@dataclasses.dataclass(frozen=True)
class Cosine:
    """Variance preserving on a quarter of a circle, u in [0, 1]. Nichol & Dhariwal 2021 without their offset."""

    def alpha(self, u: Array) -> Array:
        u, xp = _array(u)
        return xp.sin(np.pi / 2 * (1 - u))  # exactly 0 at u = 1, which a cosine misses

    def sigma(self, u: Array) -> Array:
        u, xp = _array(u)
        return xp.sin(np.pi / 2 * u)

    def level(self, u: Array) -> Array:
        u, xp = _array(u)
        return xp.tan(np.pi / 2 * u)

    def time(self, level: Array) -> Array:
        level, xp = _array(level)
        return xp.arctan(level) * (2 / np.pi)

    def scale(self, level: Array) -> Array:
        return _preserving(level)


@dataclasses.dataclass(frozen=True)
class VE:
    """Variance exploding, from sigma_min at u = 0 to sigma_max at u = 1. Song 2021, eq. 31."""

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    def alpha(self, u: Array) -> Array:
        return _one(u)

    def sigma(self, u: Array) -> Array:
        return self.level(u)

    def level(self, u: Array) -> Array:
        u, xp = _array(u)
        return self.sigma_min * xp.exp(u * float(np.log(self.sigma_max / self.sigma_min)))

    def time(self, level: Array) -> Array:
        level, xp = _array(level)
        return xp.log(level / self.sigma_min) / float(np.log(self.sigma_max / self.sigma_min))

    def scale(self, level: Array) -> Array:
        return _one(level)


@dataclasses.dataclass(frozen=True)
class EDM:
    """Sigma space itself: the time is the level. Karras 2022."""

    def alpha(self, u: Array) -> Array:
        return _one(u)

    def sigma(self, u: Array) -> Array:
        return _array(u)[0]

    def level(self, u: Array) -> Array:
        return _array(u)[0]

    def time(self, level: Array) -> Array:
        return _array(level)[0]

    def scale(self, level: Array) -> Array:
        return _one(level)


@dataclasses.dataclass(frozen=True)
class Flow:
    """The straight flow from data (u = 0) to noise (u = 1), whose level has no bound. Lipman 2023, Liu 2023."""

    def alpha(self, u: Array) -> Array:
        return 1 - _array(u)[0]

    def sigma(self, u: Array) -> Array:
        return _array(u)[0]

    def level(self, u: Array) -> Array:
        u, _ = _array(u)
        return u / (1 - u)

    def time(self, level: Array) -> Array:
        level, _ = _array(level)
        return level / (1 + level)

    def scale(self, level: Array) -> Array:
        return 1 / (1 + _array(level)[0])


@dataclasses.dataclass(frozen=True, eq=False)
class Discrete:
    """A table alpha_bar (T,), decreasing inside (0, 1), read at u = k/T, k = 1..T, and between.

    log alpha = log(alpha_bar) / 2 is linear in u between the knots and goes on linearly outside, with the slope of the
    first or last pair (level >= 0 always has a time; times below that of level 0 have no level). The network's time is
    T u - 1, so that knot k has the index k - 1 it was trained with.
    Raises ValueError for a table that is not as above. Zhou 2024 (SFD, released code) for LDM and Stable Diffusion.
    """

    alpha_bar: np.ndarray

    def __post_init__(self) -> None:
        table = np.asarray(self.alpha_bar, np.float64)
        if table.ndim != 1 or table.size < 2 or not (0 < table[-1] and table[0] < 1 and np.all(np.diff(table) < 0)):
            raise ValueError(
                "alpha_bar must be at least 2 decreasing numbers inside (0, 1), found "
                f"shape {table.shape} with values {np.array2string(table.ravel(), threshold=4, edgeitems=2)}; "
                "make it with linear, scaled_linear or cosine of diffjax.core.schedules"
            )
        object.__setattr__(self, "alpha_bar", table)

    @property
    def num(self) -> int:
        """T, the number of trained levels."""
        return self.alpha_bar.size

    def alpha(self, u: Array) -> Array:
        depth, xp = self._depth(u)
        return xp.exp(-depth)

    def sigma(self, u: Array) -> Array:
        depth, xp = self._depth(u)
        return xp.sqrt(-xp.expm1(-2 * depth))

    def level(self, u: Array) -> Array:
        depth, xp = self._depth(u)
        return xp.sqrt(xp.expm1(2 * depth))

    def time(self, level: Array) -> Array:
        level, xp = _array(level)
        depth = xp.log1p(level**2) / 2
        knots = xp.asarray(self._knots, depth.dtype)
        right = xp.clip(xp.searchsorted(knots, depth), 1, self.num - 1)
        return (right + (depth - knots[right - 1]) / (knots[right] - knots[right - 1])) / self.num

    def scale(self, level: Array) -> Array:
        return _preserving(level)

    def label(self, u: Array) -> Array:
        """The time that the network was trained with: T u - 1, 0..T-1 at the knots."""
        return self.num * _array(u)[0] - 1

    @property
    def _knots(self) -> np.ndarray:
        return -0.5 * np.log(self.alpha_bar)

    def _depth(self, u: Array) -> tuple[Array, ModuleType]:
        """-log alpha at time u, linear between knots and outside."""
        u, xp = _array(u)
        knots = xp.asarray(self._knots, u.dtype)
        right = xp.clip(xp.ceil(u * self.num).astype("int32") - 1, 1, self.num - 1)
        return knots[right - 1] + (u * self.num - right) * (knots[right] - knots[right - 1]), xp


@dataclasses.dataclass(frozen=True)
class Shifted:
    """`base` with every level multiplied by `factor`: more noise (> 1) at the same time, for larger images.

    Going from n to m pixels along a side takes factor m / n (Hoogeboom 2023, Simple Diffusion; Esser 2024, section
    5.3.2, as the root of the number of pixels). It is a change of time, alpha and sigma keep their kind.
    """

    base: Schedule
    factor: float

    def alpha(self, u: Array) -> Array:
        return self.base.scale(self.level(u))  # by way of the time, a small alpha would lose its digits

    def sigma(self, u: Array) -> Array:
        return self.base.sigma(self.base.time(self.level(u)))

    def level(self, u: Array) -> Array:
        return self.factor * self.base.level(u)

    def time(self, level: Array) -> Array:
        return self.base.time(_array(level)[0] / self.factor)

    def scale(self, level: Array) -> Array:
        return self.base.scale(level)


def rescaled(schedule: Schedule, scale: float) -> Schedule:
    """`schedule` for images `scale` = s times as large: every level times s, its time and index kept.

    s^2 pixels show what one of the small image did, each with noise of its own, whose mean has the variance
    (level / s)^2. With s times the level a network is as much in the dark as it was at this time in pre-training;
    log-SNR is lower by 2 log s. Hoogeboom 2023, section 2; Berrada et al. 2024, figure A1. A table stays one:

        alpha_bar' = alpha_bar / (s^2 - alpha_bar (s^2 - 1))          of the flow: sigma' = s sigma / (1 + (s - 1) sigma)

    Raises ValueError for a scale that is not above 0.
    """
    check_scale(scale)
    if scale == 1:
        return schedule
    if isinstance(schedule, Discrete):
        return Discrete(schedule.alpha_bar / (scale**2 - schedule.alpha_bar * (scale**2 - 1)))
    return Shifted(schedule, float(scale))


def check_scale(scale: float) -> None:
    """Raises ValueError for a factor of noise levels that is none."""
    if not 0 < scale < np.inf:
        raise ValueError(f"found resolution_scale={scale}, expected above 0, for example 2.0 from 256 to 512 pixels")


def linear(beta_first: float = 1e-4, beta_last: float = 0.02, num: int = 1000) -> np.ndarray:
    """alpha_bar (num,) of betas uniform between the two given, float64. Ho 2020, section 4."""
    return np.cumprod(1 - np.linspace(beta_first, beta_last, num))


def scaled_linear(beta_first: float, beta_last: float, num: int = 1000) -> np.ndarray:
    """alpha_bar (num,) of betas whose roots are uniform, float64. Rombach 2022: LDM, Stable Diffusion."""
    return np.cumprod(1 - np.linspace(beta_first**0.5, beta_last**0.5, num) ** 2)


def cosine(num: int = 1000, offset: float = 0.008, beta_max: float = 0.999) -> np.ndarray:
    """alpha_bar (num,) of the cosine table, betas cut at beta_max, float64. Nichol & Dhariwal 2021, eq. 17."""
    wave = np.cos((np.arange(num + 1) / num + offset) / (1 + offset) * np.pi / 2) ** 2
    return np.cumprod(1 - np.minimum(1 - wave[1:] / wave[:-1], beta_max))


# as configs name them; scaled_linear is Stable Diffusion's
PROCESSES: dict[str, Callable[[], Schedule]] = {
    "linear": lambda: Discrete(linear()),
    "scaled_linear": lambda: Discrete(scaled_linear(0.00085, 0.012)),
    "cosine": lambda: Discrete(cosine()),
    "flow": Flow,
    "animatediff": lambda: Discrete(linear(0.00085, 0.012)),  # its scripts; ends of scaled_linear, betas of linear
    "ldm": lambda: Discrete(scaled_linear(0.0015, 0.0195)),  # Rombach 2022, released configs
    "sd3": lambda: Shifted(Flow(), 3.0),  # the grid that Esser 2024's release samples on
}


def named(name: str, resolution_scale: float = 1.0) -> Schedule:
    """The process of PROCESSES called `name`, `rescaled`. Raises ValueError for an unknown one."""
    return rescaled(names.lookup(PROCESSES, name, "process")(), resolution_scale)


def table(name: str, resolution_scale: float = 1.0) -> Discrete:
    """The same where it must be a table of levels. Raises ValueError for one that is not."""
    schedule = named(name, resolution_scale)
    if not isinstance(schedule, Discrete):
        raise ValueError(f"process {name!r} has no table of levels: take linear, scaled_linear or cosine")
    return schedule


def _array(x: Any) -> tuple[Array, ModuleType]:
    """x as an array and the library that goes on with it: JAX's stay in JAX, the rest is NumPy float64."""
    return (x, jnp) if isinstance(x, jax.Array) else (np.asarray(x, np.float64), np)


def _one(x: Array) -> Array:
    x, xp = _array(x)
    return xp.ones_like(x)


def _preserving(level: Array) -> Array:
    """alpha where alpha^2 + sigma^2 = 1."""
    level, xp = _array(level)
    return 1 / xp.sqrt(1 + level**2)
