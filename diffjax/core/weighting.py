"""Loss weights by noise level, for the squared error of the denoised image |D - x0|^2.

Other losses are this one with another weight: |eps error|^2 = |D - x0|^2 / sigma^2, so weight 1 on
eps is `eps` here, and a weight w(SNR) on eps is w / sigma^2. SNR = 1 / sigma^2.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from diffjax.core import names
from diffjax.core.types import Array


def unit(sigma: Array) -> Array:
    """1: the squared error of the image itself."""
    return jnp.ones_like(sigma)


def edm(sigma: Array, sigma_data: float = 0.5) -> Array:
    """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2 = 1 / c_out^2. Karras 2022, table 1."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def eps(sigma: Array) -> Array:
    """1 / sigma^2: the squared error of the noise, Ho 2020, eq. 14; the weight of VP and VE in Karras 2022, table 1."""
    return 1 / sigma**2


def v(sigma: Array) -> Array:
    """1 + 1 / sigma^2: the squared error of v = alpha eps - sigma_t x0. Salimans & Ho 2022, section 4 (SNR + 1)."""
    return 1 + 1 / sigma**2


def velocity(sigma: Array) -> Array:
    """(1 + 1 / sigma)^2: the squared error of the straight flow's velocity eps - x0. Lipman 2023, Liu 2023."""
    return (1 + 1 / sigma) ** 2


def min_snr(sigma: Array, gamma: float = 5.0) -> Array:
    """min(SNR, gamma). Hang 2023 (Min-SNR), their weight for x0 prediction."""
    return jnp.minimum(1 / sigma**2, gamma)


def truncated_snr(sigma: Array, sigma_data: float = 1.0) -> Array:
    """max(SNR, 1 / sigma_data^2). Salimans & Ho 2022, section 4, with 1, whatever the data."""
    return jnp.maximum(1 / sigma**2, 1 / sigma_data**2)


def sigmoid(sigma: Array, bias: float = 0.0) -> Array:
    """sigmoid(bias - logSNR) on eps, thus / sigma^2 here. Kingma & Gao 2023; Hoogeboom 2024 (Simpler Diffusion)."""
    return jax.nn.sigmoid(bias + 2 * jnp.log(sigma)) / sigma**2


WEIGHTINGS: dict[str, Callable[..., Array]] = {
    "unit": unit, "edm": edm, "eps": eps, "v": v, "velocity": velocity, "min_snr": min_snr,
    "truncated_snr": truncated_snr, "sigmoid": sigmoid,
}  # fmt: skip


def weigh(name: str, sigma: Array, **options: float) -> Array:
    """The weight called `name` at noise levels sigma of any shape. Raises ValueError as `check`."""
    check(name, options)
    return WEIGHTINGS[name](sigma, **options)


def check(name: str, options: Mapping[str, float]) -> None:
    """Raise ValueError for a weighting or an option that does not exist, with the nearest that does."""
    names.check_options(names.lookup(WEIGHTINGS, name, "weighting"), options, f"weighting {name!r}")
