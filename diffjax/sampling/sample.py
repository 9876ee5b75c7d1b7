"""The sampling loop: one loop over the rows of a `Plan`, for every solver.

Only the state and the few values that the solver needs are kept, so memory does not grow with the number of steps;
`save_every` collects states where they are asked for. Deterministic solvers take no key.

>>> import jax.numpy as jnp
>>> from diffjax.core import gaussian, grids, solvers
>>> from diffjax.sampling.sample import sample
>>> plan = solvers.make_plan("euler", grids.polynomial(4, 0.006, 80.0))
>>> params = {"mean": jnp.zeros(()), "std": jnp.float32(0.5)}
>>> round(float(sample(gaussian.gaussian_denoiser, params, jnp.full((1, 2), 80.0), plan)[0, 0]), 4)
0.2514
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffjax.core import loops
from diffjax.core.solvers import Plan
from diffjax.core.types import Array, Cond, Denoiser, Key, Params


class State(NamedTuple):
    """What travels through the loop. `x` is None for solvers with one register."""

    x: Array | None  # (B, ...)
    y: Array  # (B, ...), the point of the next call
    values: tuple[Array, ...]  # H times (B, ...), newest first


class Row(NamedTuple):
    """One row of a plan (see `solvers`), with the place of its state among the saved ones."""

    level: Array
    advance: Array
    keep: Array | None
    noise: Array | None
    step: Array
    slot: Array


def sample(
    denoise: Denoiser,
    params: Params,
    x: Array,
    plan: Plan,
    cond: Cond | None = None,
    *,
    key: Key | None = None,
    noise: Callable[[Array], Array] | None = None,
    save_every: int = 0,
    num_rows: Array | None = None,
    transform: Callable[[Array], Array] | None = None,
) -> Array | tuple[Array, Array]:
    """Follow `plan` from `x` (B, ...) at noise level plan.sigmas[0] to its last level; x is float32 or float64.

    Returns the sample (B, ...), or with `save_every` = k the pair (sample, states): the (num_steps / k, B, ...)
    states after steps k, 2k, ...

    key        stochastic plans: per-sample keys (B,), see `rng.sample_keys`; step and key make the noise
    noise      in its place, a function step (0-based, traced) -> unit noise like x
    num_rows   of one of several plans in a stack, see `solvers.stack`: its rows, traced; states after them are zeros
    transform  applied to every D the network returns, as `guidance.dynamic_threshold`
    Raises ValueError for a state of low precision, a missing or superfluous key, and k that does not divide num_steps.
    """
    noise = _noise_source(plan, x, key, noise)
    if x.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"the state must be float32 or float64 (the network may compute lower), found {x.dtype}")
    if save_every < 0 or (save_every and plan.num_steps % save_every):
        raise ValueError(f"save_every must divide the {plan.num_steps} steps of the plan, found {save_every}")

    def value(state: State, row: Row) -> Array:
        data = denoise(params, state.y, row.level, cond)
        data = data if transform is None else transform(data)
        return data if plan.form == "data" else (state.y - data) / row.level

    def body(carry: tuple[State, Array | None], row: Row) -> tuple[State, Array | None]:
        state, saved = carry
        if plan.noise is not None:
            noisy = state.y + row.noise * noise(row.step - 1)
            state = state._replace(y=noisy)
        state = _apply(row, state, value(state, row))
        return state, _save(saved, row, state, plan.corrected)

    rows = _rows(plan, x.dtype, save_every)
    zero = jnp.zeros_like(x)
    carry = (
        State(x=None if plan.keep is None else x, y=x, values=(zero,) * plan.history),
        jnp.zeros((plan.num_steps // save_every, *x.shape), x.dtype) if save_every else None,
    )
    if plan.afs_scale is not None:  # outside the loop: it has no network call
        first, rows = jax.tree.map(lambda a: a[0], rows), jax.tree.map(lambda a: a[1:], rows)
        state = _apply(first, carry[0], jnp.asarray(plan.afs_scale, x.dtype) * x)
        carry = (state, _save(carry[1], first, state, plan.corrected))
        num_rows = None if num_rows is None else num_rows - 1
    state, saved = loops.over_rows(body, carry, rows, num_rows)
    if not save_every:
        return state.y
    last = -1 if num_rows is None else (rows.step[num_rows - 1] - 1) // save_every
    return state.y, saved.at[last].set(state.y)


def _apply(row: Row, state: State, value: Array) -> State:
    """Equations (3) and (4) of `solvers` for a new value."""
    values = (value, *state.values[:-1])
    seen = (state.x, state.y, *values)
    x = None if row.keep is None else _combine(row.keep, seen)
    return State(x=x, y=_combine(row.advance, seen), values=values)


def _combine(weights: Array, arrays: tuple[Array | None, ...]) -> Array:
    return sum(weights[i] * array for i, array in enumerate(arrays) if array is not None)


def _save(saved: Array | None, row: Row, state: State, corrected: bool) -> Array | None:
    """Write the state into the slot of its k steps; the last write of each slot is the one that stays."""
    if saved is None:
        return None
    return jax.lax.dynamic_update_index_in_dim(saved, state.x if corrected else state.y, row.slot, 0)


def _rows(plan: Plan, dtype: jnp.dtype, save_every: int) -> Row:
    def cast(a: Array | None) -> Array | None:
        return None if a is None else jnp.asarray(a, dtype)

    step = jnp.asarray(plan.steps, jnp.int32)
    # a predictor-corrector holds state i-1 while it works on step i; its first row rewrites the start
    done = jnp.maximum(step - 1, 1) if plan.corrected else step
    slot = (done - 1) // max(save_every, 1)
    return Row(cast(plan.levels), cast(plan.advance), cast(plan.keep), cast(plan.noise), step, slot)


def _noise_source(plan: Plan, x: Array, key: Key | None, noise: Callable | None) -> Callable | None:
    if plan.noise is None:
        if key is not None or noise is not None:
            raise ValueError("this plan is deterministic: leave key and noise away")
        return None
    if (key is None) == (noise is None):
        raise ValueError("a stochastic plan needs either key=per-sample keys (B,) or noise=function of the step")
    if noise is not None:
        return noise
    if key.shape != x.shape[:1]:
        raise ValueError(f"key must hold one key per sample, shape {x.shape[:1]}, found {key.shape}")

    def draw(one: Key, step: Array) -> Array:
        return jax.random.normal(jax.random.fold_in(one, step), x.shape[1:], x.dtype)

    return lambda step: jax.vmap(draw, in_axes=(0, None))(key, step)
