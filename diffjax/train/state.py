"""What a run carries from step to step, and what a checkpoint holds of it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffjax.core.types import Array, Method, Params


class TrainState(NamedTuple):
    """step: int32 scalar, iterations done. seed: uint32 scalar; all randomness is (seed, name, step).
    method: the method's own state; its `params` are trained. ema_params: their average, {} where off."""

    step: Array
    seed: Array
    method: Any
    ema_params: Params


def create(method: Method, params: Params, seed: int, averaged: bool) -> TrainState:
    """The state before the first step; the average starts at `params`."""
    # copies: the step donates its state, and no buffer may be given away twice
    ema_params = jax.tree.map(jnp.copy, params) if averaged else {}
    return TrainState(jnp.int32(0), jnp.uint32(seed), method.init(params), ema_params)


def sampling_params(state: TrainState) -> Params:
    """The weights to sample with: the average where there is one."""
    return state.ema_params or state.method.params
