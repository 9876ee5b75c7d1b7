"""What networks predict, and the one denoiser that all of it becomes.

A process mixes clean data and unit noise, xt = alpha x0 + sigma_t eps (1). Networks predict

    "eps"       the noise
    "x0"        the data
    "v"         alpha eps - sigma_t x0                             Salimans & Ho 2022, section 4
    "score"     grad log p(xt) = -eps / sigma_t                    Song 2021
    "velocity"  dx/dt of the straight flow, eps - x0               Lipman 2023, Liu 2023
    "edm"       F of (2) with Karras 2022's c_skip and c_out, which depend on sigma_data

and each is linear in the others given xt. In sigma space x = xt / alpha = x0 + sigma eps, sigma =
sigma_t / alpha, the same network is a denoiser D(x, sigma) = E[x0 | x], whatever the schedule it
was trained under. Preconditioned networks (Karras 2022, table 1) read

    D = c_skip x + c_out F(c_in x, c_noise)                                                        (2)

All arithmetic outside the network is in the type of x, float32 or float64.

>>> import jax.numpy as jnp
>>> round(float(to_x0("eps", jnp.float32(1.0), jnp.float32(2.0), 0.8, 0.6)), 4)
1.75
"""

from collections.abc import Callable

import jax.numpy as jnp

from diffjax.core import names, schedules
from diffjax.core.broadcast import per_sample
from diffjax.core.types import Array, Cond, Denoiser, Key, Network, Params

KINDS = ("eps", "x0", "v", "score", "velocity", "edm")


def to_x0(
    kind: str, prediction: Array, xt: Array, alpha: Array | float, sigma: Array | float, sigma_data: float = 0.5
) -> Array:
    """x0 from a prediction of `kind` at xt (1); alpha and sigma scalar or shaped to combine with xt.

    Undefined where the prediction says nothing of x0: eps and score at alpha = 0. `sigma_data` is for "edm" only.
    Raises ValueError for an unknown kind.
    """
    _check_kind(kind)
    if kind == "x0":
        return prediction
    if kind == "eps":
        return (xt - sigma * prediction) / alpha
    if kind == "score":
        return (xt + sigma**2 * prediction) / alpha
    if kind == "v":
        return (alpha * xt - sigma * prediction) / (alpha**2 + sigma**2)
    if kind == "velocity":
        return (xt - sigma * prediction) / (alpha + sigma)
    total = sigma**2 + (alpha * sigma_data) ** 2  # (2) at x = xt / alpha, sigma / alpha, multiplied out
    return sigma_data**2 * alpha / total * xt + sigma_data * sigma / total**0.5 * prediction


def from_x0(
    kind: str, x0: Array, xt: Array, alpha: Array | float, sigma: Array | float, sigma_data: float = 0.5
) -> Array:
    """The prediction of `kind` that means `x0` at xt (1), the inverse of `to_x0`; undefined at sigma = 0 but for x0."""
    _check_kind(kind)
    if kind == "x0":
        return x0
    eps = (xt - alpha * x0) / sigma
    if kind == "eps":
        return eps
    if kind == "score":
        return -eps / sigma
    if kind == "v":
        return alpha * eps - sigma * x0
    if kind == "velocity":
        return eps - x0
    total = sigma**2 + (alpha * sigma_data) ** 2
    return (x0 - sigma_data**2 * alpha / total * xt) * total**0.5 / (sigma_data * sigma)


def convert(
    source: str,
    target: str,
    prediction: Array,
    xt: Array,
    alpha: Array | float,
    sigma: Array | float,
    sigma_data: float = 0.5,
) -> Array:
    """A prediction of kind `source` as one of kind `target`; arguments as `to_x0`."""
    x0 = to_x0(source, prediction, xt, alpha, sigma, sigma_data)
    return from_x0(target, x0, xt, alpha, sigma, sigma_data)


def edm_denoiser(network: Network, sigma_data: float = 0.5, resolution_scale: float = 1.0) -> Denoiser:
    """(2) with Karras 2022's own coefficients: unit variance for input and target at every level.

    resolution_scale s: of images s times as large as in pre-training, where s sigma hides as much as sigma did
    (`schedules.rescaled`). The network is told sigma / s. c_skip, c_out and c_in stay those of sigma itself: they are
    right for the noise that is in x, and a pixel of a larger image varies by sigma_data as well. A rescaled table does
    the same: alpha of the noise there is, the index of pre-training.
    """
    schedules.check_scale(resolution_scale)

    def coefficients(sigma: Array) -> tuple[Array, ...]:
        total = sigma**2 + sigma_data**2
        root = jnp.sqrt(total)
        return sigma_data**2 / total, sigma * sigma_data / root, 1 / root, jnp.log(sigma / resolution_scale) / 4

    return _preconditioned(network, coefficients)


def consistency_function(network: Network, sigma_data: float = 0.5, epsilon: float = 0.002) -> Denoiser:
    """(2) with f(x, epsilon) = x exactly: sigma - epsilon in the place of sigma in c_skip and in c_out's numerator.

    Song 2023 (consistency models), appendix C. epsilon is the smallest level.
    """

    def coefficients(sigma: Array) -> tuple[Array, ...]:
        root = jnp.sqrt(sigma**2 + sigma_data**2)
        above = sigma - epsilon
        return sigma_data**2 / (above**2 + sigma_data**2), above * sigma_data / root, 1 / root, jnp.log(sigma) / 4

    return _preconditioned(network, coefficients)


def vp_denoiser(network: Network, beta_d: float = 19.9, beta_min: float = 0.1, num_levels: int = 1000) -> Denoiser:
    """(2) for networks of the VP process with linear beta: c_noise = (M-1) t(sigma). Karras 2022, table 1."""

    def coefficients(sigma: Array) -> tuple[Array, ...]:
        time = schedules.VP(beta_d, beta_min).time(sigma)
        return jnp.ones_like(sigma), -sigma, 1 / jnp.sqrt(sigma**2 + 1), (num_levels - 1) * time

    return _preconditioned(network, coefficients)


def ve_denoiser(network: Network) -> Denoiser:
    """(2) for networks of the VE process: c_noise = log(sigma / 2). Karras 2022, table 1."""

    def coefficients(sigma: Array) -> tuple[Array, ...]:
        one = jnp.ones_like(sigma)
        return one, sigma, one, jnp.log(sigma / 2)

    return _preconditioned(network, coefficients)


def process_denoiser(network: Network, kind: str, process: Callable[[Array], tuple[Array, Array, Array]]) -> Denoiser:
    """The denoiser of a network that predicts `kind` under its own process.

    process: sigma (B,) -> (alpha (B,), sigma_t (B,), noise label (B,)) with sigma_t / alpha = sigma, as
    `schedules.process` makes it. For "edm" see `edm_denoiser`. Raises ValueError for an unknown kind.
    """
    _check_kind(kind)
    if kind == "edm":
        raise ValueError("a network that predicts EDM's F has its own process: use edm_denoiser(network, sigma_data)")

    def denoise(params: Params, x: Array, sigma: Array, cond: Cond | None = None, key: Key | None = None) -> Array:
        alpha, sigma_t, noise_label = process(_levels(sigma, x))
        alpha, sigma_t = per_sample(alpha, x), per_sample(sigma_t, x)
        xt = alpha * x
        return to_x0(kind, network(params, xt, noise_label, cond, key).astype(x.dtype), xt, alpha, sigma_t)

    return denoise


def eps_denoiser(network: Network, schedule: schedules.Discrete) -> Denoiser:
    """Noise prediction on a trained table: D = x - sigma F(x / sqrt(1 + sigma^2), T tau(sigma) - 1).

    LDM and Stable Diffusion (Rombach 2022); between and outside the trained levels see `schedules.Discrete`.
    """
    return process_denoiser(network, "eps", schedules.process(schedule, schedule.label))


def v_denoiser(network: Network, schedule: schedules.Discrete) -> Denoiser:
    """v-prediction on a trained table. Salimans & Ho 2022; Stable Diffusion 2 and later video models."""
    return process_denoiser(network, "v", schedules.process(schedule, schedule.label))


def edm_v_denoiser(network: Network) -> Denoiser:
    """v-prediction told log(sigma) / 4, at any level: Stable Video Diffusion (Blattmann 2023, appendix D).

    (2) with c_skip and c_in of sigma_data = 1, where F of "edm" is -v.
    """

    def coefficients(sigma: Array) -> tuple[Array, ...]:
        root = jnp.sqrt(sigma**2 + 1)
        return 1 / root**2, -sigma / root, 1 / root, jnp.log(sigma) / 4

    return _preconditioned(network, coefficients)


def velocity_denoiser(network: Network, label_scale: float = 1.0) -> Denoiser:
    """Velocity prediction of the straight flow; noise label label_scale u, u in [0, 1]. Lipman 2023, Esser 2024."""
    return process_denoiser(network, "velocity", schedules.process(schedules.Flow(), lambda u: label_scale * u))


def _preconditioned(network: Network, coefficients: Callable[[Array], tuple[Array, ...]]) -> Denoiser:
    """(2); coefficients(sigma (B,)) -> c_skip, c_out, c_in, c_noise. All but F stays in the precision of x."""

    def denoise(params: Params, x: Array, sigma: Array, cond: Cond | None = None, key: Key | None = None) -> Array:
        *factors, c_noise = coefficients(_levels(sigma, x))
        c_skip, c_out, c_in = (per_sample(factor, x) for factor in factors)
        return c_skip * x + c_out * network(params, c_in * x, c_noise, cond, key).astype(x.dtype)

    return denoise


def _levels(sigma: Array, x: Array) -> Array:
    """One level per sample, in the dtype of x, which must hold it: bfloat16 would move sigma by 0.4 %."""
    if x.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"denoisers take float32 or float64 (the network may compute lower), found {x.dtype}")
    return jnp.broadcast_to(jnp.asarray(sigma, x.dtype), x.shape[:1])


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"unknown prediction {kind!r}; {names.nearest(kind, KINDS)}")
