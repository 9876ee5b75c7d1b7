"""The variational bound that teaches a network its variance (Nichol & Dhariwal 2021, section 3.1 and equation 16).

L_hybrid = L_simple + lambda L_vlb. A term of L_vlb, for the table's level s of an image and the next lower r:

    KL( N(m~, b~) || N(m, Sigma) )   r > 0         - log p(x0 | x1), by pixel, r = 0                 (1)

with m~, m of x0 and of D, and log Sigma = v log b + (1 - v) log b~ (`sampling.learned_variance`, whose sigma space this
is: both sides of (1) are scaled alike). D passes no gradient: it is L_simple's. Bits per dimension.
"""

import jax
import jax.numpy as jnp

from diffjax.core import schedules
from diffjax.core.broadcast import per_sample
from diffjax.core.types import Array
from diffjax.sampling.learned_variance import log_variances

_GREY = 255.0  # steps of a pixel in [-1, 1]


def bound(table: schedules.Discrete, x0: Array, noisy: Array, sigma: Array, data: Array, fraction: Array) -> Array:
    """(1) for images x0 in [-1, 1] and noisy = x0 + sigma n (B, ...) at levels sigma (B,) of `table`, given D = data and
    v = fraction: (B,) bits per dimension, to be multiplied by the number of levels for an estimate of L_vlb."""
    step = jnp.round(table.time(sigma) * table.num)
    # the first step's posterior has no variance: as released, it borrows that of the second
    at = jnp.maximum(step, 2)
    s, r = table.level(at / table.num), table.level((at - 1) / table.num)
    small, large = log_variances(s, r)
    borrowed = -jnp.log1p(r**2)  # to the scale of x0
    small = jnp.where(step == 1, small + borrowed, small)
    large = jnp.where(step == 1, jnp.log(sigma**2) - jnp.log1p(sigma**2), large)
    small, large = per_sample(small, x0), per_sample(large, x0)
    log_variance = fraction * large + (1 - fraction) * small
    data = jax.lax.stop_gradient(data)
    ratio = per_sample((r / s) ** 2, x0)
    gap = (1 - ratio) * (x0 - data)  # the share of the noisy image is the same in both means
    kl = (log_variance - small - 1 + jnp.exp(small - log_variance) + gap**2 * jnp.exp(-log_variance)) / 2
    terms = jnp.where(per_sample(step, x0) == 1, _negative_log_likelihood(x0, data, log_variance / 2), kl)
    return jnp.mean(terms, axis=tuple(range(1, x0.ndim))) / jnp.log(2.0)


def _negative_log_likelihood(x0: Array, mean: Array, log_std: Array) -> Array:
    """Of pixels in 256 grey levels under a normal, its tails in the first and last. Ho 2020, eq. 13."""
    half, scale = 1 / _GREY, jnp.exp(-log_std)
    above = jnp.where(x0 > 1 - half, jnp.inf, (x0 + half - mean) * scale)
    below = jnp.where(x0 < -1 + half, -jnp.inf, (x0 - half - mean) * scale)
    inside = jax.scipy.special.ndtr(above) - jax.scipy.special.ndtr(below)
    return -jnp.log(jnp.maximum(inside, 1e-12))
