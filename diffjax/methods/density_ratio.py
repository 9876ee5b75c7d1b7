"""The ratio p/q of the densities of noisy data and noisy samples, by logistic regression, as a weight on gradients.

    loss = mean softplus(-l(x_p)) + mean softplus(l(x_q)),   l* = log p/q  where both have as many samples      (1)

Diff-Instruct's gradient lowers KL(q | p); each sample's times p/q at its x lowers KL(p | q) (Xu et al. 2025, f-distill,
table 1), the aim of EMD, which needs no data. The ratio is divided by its mean over the batch, as released there, and l
is bounded, so that one sample cannot take the whole gradient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffjax.core.types import Array, Batch, Cond, Key, Metrics, Params
from diffjax.methods.update import Update, descend

_BOUND = 5.0  # of |l|


class Ratio(NamedTuple):
    """logit(params, teacher_params, x (B, ...), sigma (B,), cond) -> l (B,); it may read the teacher's features.
    init(key) -> params. prepare(batch, key): what the loader gives to image float32 (B, ...) and conditions."""

    logit: Callable[[Params, Params, Array, Array, Cond], Array]
    init: Callable[[Key], Params]
    update: Update
    prepare: Callable[[Batch, Key], Batch] = lambda batch, key: batch


class RatioState(NamedTuple):
    """params: the logit's weights. opt_state: the optimiser's."""

    params: Params
    opt_state: Any


def start(ratio: Ratio, key: Key) -> RatioState:
    """The state before the first step."""
    params = ratio.init(key)
    return RatioState(params, ratio.update.optimizer.init(params))


def step(
    ratio: Ratio, state: RatioState, teacher: Params, real: tuple[Array, Cond], fake: tuple[Array, Cond], sigma: Array,
    iteration: Array,
) -> tuple[RatioState, Array, Metrics]:  # fmt: skip
    """One step of (1) on noisy data and noisy samples, each with its condition, at the same noise levels (B,).

    Returns the state, the factors p/q of the samples (B,), mean 1, from the weights before the step, and metrics.
    """

    def objective(params: Params) -> tuple[Array, Array]:
        of_real, of_fake = (ratio.logit(params, teacher, x, sigma, cond) for x, cond in (real, fake))
        return jnp.mean(jax.nn.softplus(-of_real)) + jnp.mean(jax.nn.softplus(of_fake)), of_fake

    (loss, logits), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
    rate = ratio.update.learning_rate(iteration)
    state = RatioState(*descend(ratio.update.optimizer, rate, *state, grads))
    factors = jnp.exp(jnp.clip(logits, -_BOUND, _BOUND))
    return state, jax.lax.stop_gradient(factors / jnp.mean(factors)), {"ratio_loss": loss}
