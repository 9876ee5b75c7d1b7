"""Training draws of the noise level, as functions of given unit randomness.

Each takes the random numbers themselves (`normal`, or `uniform` in [0, 1), any shape), so that a draw can be
compared with other code number by number; `draw` makes them from a key. All return sigma of that shape.

    lognormal   log sigma ~ N(p_mean, p_std^2)                         Karras 2022, table 1
    vp          t of the VP process uniform in (epsilon_t, 1]              Karras 2022, table 1
    ve          log sigma uniform                                          Karras 2022, table 1
    polynomial  sigma^(1/rho) uniform, as the sampling grid has it         Karras 2022, eq. 5; Yin 2024 (DMD)
    discrete    a level of a trained table, each as often              Ho 2020, algorithm 1
    logit_normal, uniform_flow   t of the straight flow, sigma = t / (1 - t)    Esser 2024, section 3.1
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core import names, schedules, sharding
from diffjax.core.types import Array, Key


def lognormal(normal: Array, p_mean: float = -1.2, p_std: float = 1.2) -> Array:
    """sigma = exp(p_mean + p_std n), n unit normal."""
    return jnp.exp(p_mean + p_std * normal)


def vp(uniform: Array, beta_d: float = 19.9, beta_min: float = 0.1, epsilon_t: float = 1e-5) -> Array:
    """sigma of the VP process with linear beta at t = 1 + u (epsilon_t - 1)."""
    return schedules.VP(beta_d, beta_min).level(1 + uniform * (epsilon_t - 1))


def ve(uniform: Array, sigma_min: float = 0.02, sigma_max: float = 100.0) -> Array:
    """sigma = sigma_min (sigma_max / sigma_min)^u."""
    return schedules.VE(sigma_min, sigma_max).level(uniform)


def polynomial(
    uniform: Array, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, low: float = 0.0,
    high: float = 1.0,
) -> Array:  # fmt: skip
    """The grid of Karras 2022 from its fraction `low` to `high`, 0 being sigma_max; DMD takes 0.02 to 0.98."""
    start, end = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (start + (low + uniform * (high - low)) * (end - start)) ** rho


def logit_normal(normal: Array, mean: float = 0.0, std: float = 1.0) -> Array:
    """t = sigmoid(mean + std n), so sigma = t / (1 - t) = exp(mean + std n): the lognormal of the flow."""
    return jnp.exp(mean + std * normal)


def uniform_flow(uniform: Array, epsilon: float = 1e-4) -> Array:
    """t uniform in [epsilon, 1 - epsilon]: sigma is unbounded at t = 1."""
    return schedules.Flow().level(epsilon + uniform * (1 - 2 * epsilon))


def discrete(uniform: Array, process: str = "linear") -> Array:
    """One of the T levels of a table of `schedules.PROCESSES`, T u rounded down."""
    schedule = schedules.table(process)
    levels = schedule.level(np.arange(1, schedule.num + 1) / schedule.num)
    index = jnp.minimum(jnp.floor(uniform * schedule.num), schedule.num - 1).astype(jnp.int32)
    return jnp.asarray(levels, uniform.dtype)[index]


# name -> (draw from unit randomness, that randomness)
DISTRIBUTIONS: dict[str, tuple[Callable[..., Array], Callable[..., Array]]] = {
    "lognormal": (lognormal, jax.random.normal),
    "vp": (vp, jax.random.uniform),
    "ve": (ve, jax.random.uniform),
    "polynomial": (polynomial, jax.random.uniform),
    "logit_normal": (logit_normal, jax.random.normal),
    "uniform_flow": (uniform_flow, jax.random.uniform),
    "discrete": (discrete, jax.random.uniform),
}


def draw(key: Key, num: int, name: str, resolution_scale: float = 1.0, **options: float) -> Array:
    """`num` levels of the distribution `name`, float32 (num,), those of pre-training times `resolution_scale`, see
    `schedules.rescaled`. Raises ValueError as `check`."""
    check(name, {"resolution_scale": resolution_scale, **options})
    levels, randomness = DISTRIBUTIONS[name]
    drawn = levels(randomness(key, (num,), jnp.float32), **options) * resolution_scale
    return sharding.everywhere(drawn)  # powers of few numbers at a time are rounded otherwise than of many


def check(name: str, options: Mapping[str, float]) -> None:
    """Raise ValueError for a distribution or an option that does not exist, with the nearest that does."""
    levels, _ = names.lookup(DISTRIBUTIONS, name, "noise distribution")
    schedules.check_scale(options.get("resolution_scale", 1.0))
    own = {option: value for option, value in options.items() if option != "resolution_scale"}
    names.check_options(levels, own, f"noise distribution {name!r}")
