"""Sampling grids: the decreasing noise levels that a solver visits.

Every grid has N = `num` entries t_0 = sigma_max > ... > t_{N-1} = sigma_min, that is N-1 steps, and is computed
on the host in float64. All are a monotone map of something affine in the index i, so with K steps in the place
of one, `grid(K*(N-1)+1)[::K]` is `grid(N)`: a finer teacher grid is sliced, never interpolated.

    polynomial    t_i = (t_max^(1/rho) + i/(N-1) (t_min^(1/rho) - t_max^(1/rho)))^rho     Karras 2022, eq. 5
    logsnr        t_i = exp(lerp(log t_max, log t_min))                                   Lu 2022 (DPM-Solver)
    time_uniform  uniform in the time of a VP process with linear beta                    Song 2021, eq. 33
    discrete      uniform in the index of a trained table of noise levels                 Rombach 2022 (LDM)

>>> from diffjax.core import grids
>>> grids.polynomial(4, 0.006, 80.0).round(4).tolist()
[80.0, 10.9293, 0.6699, 0.006]
"""

import difflib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# The smallest time of the VP process (Song 2021, appendix C): at 0 the network sees no noise at all.
VP_EPSILON = 1e-3


def polynomial(num: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> np.ndarray:
    """Uniform in sigma^(1/rho): (num,) float64, decreasing. Karras 2022, eq. 5 without the appended zero."""
    _check(num, sigma_min, sigma_max, rho)
    return _pin(_ramp(num, sigma_max ** (1 / rho), sigma_min ** (1 / rho)) ** rho, sigma_min, sigma_max)


def logsnr(num: int, sigma_min: float, sigma_max: float) -> np.ndarray:
    """Uniform in log sigma, hence in log signal-to-noise ratio: (num,) float64, decreasing."""
    _check(num, sigma_min, sigma_max)
    return _pin(np.exp(_ramp(num, np.log(sigma_max), np.log(sigma_min))), sigma_min, sigma_max)


def time_uniform(num: int, sigma_min: float, sigma_max: float, rho: float = 1.0) -> np.ndarray:
    """Uniform in tau^(1/rho), tau the time of the VP process that spans the two levels: (num,) float64, decreasing."""
    _check(num, sigma_min, sigma_max, rho)
    tau = _ramp(num, 1.0, VP_EPSILON ** (1 / rho)) ** rho
    return _pin(vp_time(sigma_min, sigma_max).sigma(tau), sigma_min, sigma_max)


def discrete(
    num: int,
    sigma_min: float,
    sigma_max: float,
    rho: float = 1.0,
    *,
    sigma_to_time: Callable[[np.ndarray], np.ndarray],
    time_to_sigma: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Uniform in the time of a discretely trained network: (num,) float64, decreasing.

    `sigma_to_time` and `time_to_sigma` are the two maps of that network between sigma and tau in (0, 1] (see
    `schedules`). The time of sigma_max is not raised to 1/rho, as published: equal only where it is 1.
    """
    _check(num, sigma_min, sigma_max, rho)
    first, last = (float(sigma_to_time(np.float64(sigma))) for sigma in (sigma_max, sigma_min))
    tau = _ramp(num, first, last ** (1 / rho)) ** rho
    return _pin(np.asarray(time_to_sigma(tau), np.float64), sigma_min, sigma_max)


class VPTime(NamedTuple):
    """sigma(tau) = sqrt(exp(beta_d tau^2 / 2 + beta_min tau) - 1), tau in [VP_EPSILON, 1]. Song 2021, eq. 33."""

    beta_d: float
    beta_min: float

    def sigma(self, tau: np.ndarray) -> np.ndarray:
        """Noise level at time tau, any shape, float64."""
        return np.sqrt(np.expm1(0.5 * self.beta_d * tau**2 + self.beta_min * tau))

    def time(self, sigma: np.ndarray) -> np.ndarray:
        """Inverse of `sigma`: the positive root of the quadratic in tau."""
        level = np.log1p(np.asarray(sigma, np.float64) ** 2)
        return (np.sqrt(self.beta_min**2 + 2 * self.beta_d * level) - self.beta_min) / self.beta_d

    def slope(self, tau: np.ndarray) -> np.ndarray:
        """d sigma / d tau, any shape, float64."""
        sigma = self.sigma(tau)
        return 0.5 * (self.beta_d * tau + self.beta_min) * (sigma**2 + 1) / sigma


def vp_time(sigma_min: float, sigma_max: float) -> VPTime:
    """The VP process with sigma(VP_EPSILON) = sigma_min and sigma(1) = sigma_max."""
    low, high = np.log1p(sigma_min**2), np.log1p(sigma_max**2)
    beta_d = 2 * (low / VP_EPSILON - high) / (VP_EPSILON - 1)
    return VPTime(beta_d=float(beta_d), beta_min=float(high - beta_d / 2))


def append_zero(sigmas: np.ndarray) -> np.ndarray:
    """One more step, down to noise level 0: (N,) to (N+1,). Karras 2022, eq. 5 has this zero."""
    return np.append(np.asarray(sigmas, np.float64), 0.0)


GRIDS = {"polynomial": polynomial, "logsnr": logsnr, "time_uniform": time_uniform, "discrete": discrete}


def make_grid(name: str, num: int, sigma_min: float, sigma_max: float, **options) -> np.ndarray:
    """The grid called `name` with `num` entries, (num,) float64; `options` go to its function.

    Raises ValueError for an unknown name, num < 2, or levels that are not 0 < sigma_min < sigma_max.
    """
    if name not in GRIDS:
        nearest = difflib.get_close_matches(name.lower(), GRIDS, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown grid {name!r}; did you mean {nearest!r}? Known: {', '.join(GRIDS)}")
    return GRIDS[name](num, sigma_min, sigma_max, **options)


def check_nested(coarse: np.ndarray, fine: np.ndarray, factor: int) -> None:
    """Raises ValueError unless every `factor`-th level of `fine` (factor (N-1) + 1,) is one of `coarse` (N,).

    Equal but for float64 rounding through the power rho; a teacher off its student's levels would be a silent bias.
    """
    worst = np.max(np.abs(fine[::factor] / coarse - 1))
    if not worst <= 1e-12:
        raise ValueError(
            f"noise level {factor} i of the fine grid must be level i of the coarse grid, found a relative "
            f"difference of {worst:.1e}: the maps of a discrete grid must not depend on the number of levels"
        )


def _ramp(num: int, first: float, last: float) -> np.ndarray:
    return first + np.arange(num, dtype=np.float64) / (num - 1) * (last - first)


def _pin(sigmas: np.ndarray, sigma_min: float, sigma_max: float) -> np.ndarray:
    """The ends exactly as given: a power and its inverse leave a rounding error there."""
    sigmas[0], sigmas[-1] = sigma_max, sigma_min
    return sigmas


def _check(num: int, sigma_min: float, sigma_max: float, rho: float = 1.0) -> None:
    if num < 2:
        raise ValueError(f"a grid needs at least 2 noise levels (one step), found num={num}")
    if not 0 < sigma_min < sigma_max < np.inf:
        raise ValueError(
            f"noise levels must satisfy 0 < sigma_min < sigma_max, found {sigma_min} and {sigma_max}; "
            "to end at 0 use append_zero(grid)"
        )
    if not rho > 0:
        raise ValueError(f"rho must be positive, found {rho}")
