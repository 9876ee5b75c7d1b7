"""GITS: noise levels searched on a teacher's trajectory (Chen et al., ICML 2024, GITS).

A strong solver follows the ODE over T levels t_0 > ... > t_{T-1}; its states are x_i, with slopes d_i. One Euler step
from i to a later j would arrive at

    y_ij = x_i + (t_j - t_i) d_i                                                                          (1)

and costs, as a mean over samples, one of

    deviation   dev(y_ij) - dev(x_j), dev(x) the distance of x from the line through x_0 and x_{T-1}      (2)
    l1, l2      the norm of y_ij - x_j                                                                    (3)

The levels of a student with K = N-1 steps are the path 0 = p_0 < ... < p_K = T-1 of least discounted cost
sum_k gamma^k cost[p_k, p_{k+1}], found by dynamic programming from the end: V[j, k], the least cost of k steps from j,

    V[j, 1] = cost[j, T-1],   V[j, k] = min over j < i < T-1 of cost[j, i] + gamma V[i, k-1].             (4)

With gamma > 1 later steps count more. The search needs the trajectories of a few hundred samples and no training; any
solver may use the levels.

    sigmas = search(denoise, params, noise * 80.0, grids.polynomial(61, 0.002, 80.0), num_steps=7, batch_size=64)
    plan = solvers.make_plan("ipndm", sigmas)

The released search of an additional analytical first step is not included.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core import solvers
from diffjax.core.names import nearest
from diffjax.core.solvers import Plan
from diffjax.core.types import Array, Cond, Denoiser, Params
from diffjax.sampling.sample import sample

COSTS = ("deviation", "l1", "l2")


def search(
    denoise: Denoiser, params: Params, x: Array, sigmas_teacher: np.ndarray, num_steps: int,
    cond: Cond | None = None, *, gamma: float = 1.15, cost: str = "deviation", solver: str = "ipndm",
    order: int | None = None, batch_size: int | None = None,
) -> np.ndarray:  # fmt: skip
    """N = `num_steps` of the levels `sigmas_teacher` (T,), their ends included: (N,) float64, decreasing.

    `x` (B, ...) is at level sigmas_teacher[0], `cond` belongs to it; the rest as `cost_matrix` and `shortest_path`,
    which also say what raises. Levels for several N share one matrix: call these two.
    """
    matrix = cost_matrix(
        denoise, params, x, sigmas_teacher, cond, cost=cost, solver=solver, order=order, batch_size=batch_size
    )
    return np.array(sigmas_teacher, np.float64)[shortest_path(matrix, num_steps, gamma)]


def cost_matrix(
    denoise: Denoiser, params: Params, x: Array, sigmas_teacher: np.ndarray, cond: Cond | None = None, *,
    cost: str = "deviation", solver: str = "ipndm", order: int | None = None, batch_size: int | None = None,
) -> np.ndarray:  # fmt: skip
    """Equations (1)-(3): (T, T) float64, entry [i, j] for j > i, infinite elsewhere.

    solver, order  the teacher, see `solvers.make_plan`
    batch_size     samples at a time, all by default; memory is that of their T states and one network call, and one
                   program serves all parts. Entries of cond with an axis are split alike, scalars hold for all.
    Raises ValueError for an unknown cost, a batch_size that does not divide B, and as `make_plan`.
    """
    if cost not in COSTS:
        raise ValueError(f"unknown cost {cost!r}; {nearest(cost, COSTS)}")
    plan = solvers.make_plan(solver, sigmas_teacher, order=order)
    size = len(x) if batch_size is None else batch_size
    if size < 1 or len(x) % size:
        raise ValueError(f"batch_size must divide the {len(x)} samples into equal parts, found {size}")
    total = np.zeros((plan.num_steps, plan.num_steps + 1))
    for start in range(0, len(x), size):
        part = {k: v[start : start + size] if jnp.ndim(v) else v for k, v in (cond or {}).items() if v is not None}
        total += np.asarray(_costs(denoise, cost, params, plan, x[start : start + size], part), np.float64)
    matrix = np.full((plan.num_steps + 1,) * 2, np.inf)
    later = np.triu_indices(plan.num_steps + 1, 1)
    matrix[later] = total[later] * size / len(x)
    return matrix


@functools.partial(jax.jit, static_argnums=(0, 1))
def _costs(denoise: Denoiser, cost: str, params: Params, plan: Plan, x: Array, cond: dict) -> Array:
    """Rows i < T-1 of the matrix for one part of the samples, (T-1, T); entries with j <= i mean nothing."""
    _, states = sample(denoise, params, x, plan, cond or None, save_every=1)
    states = jnp.concatenate([x[None], states])  # (T, B, ...)
    sigmas = jnp.asarray(plan.sigmas, x.dtype)
    start, line = states[-1], states[0] - states[-1]
    own = jax.lax.map(lambda state: _deviation(state, start, line), states)

    def row(i: Array) -> Array:
        here = states[i]
        # not every solver calls the network at its states, so the slope is computed again
        slope = (here - denoise(params, here, sigmas[i], cond or None)) / sigmas[i]

        def entry(j: Array) -> Array:
            y = here + (sigmas[j] - sigmas[i]) * slope
            if cost == "deviation":
                return _deviation(y, start, line) - own[j]
            error = (y - states[j]).reshape(y.shape[0], -1)
            return jnp.mean(jnp.linalg.norm(error, ord=1 if cost == "l1" else 2, axis=1))

        return jax.lax.map(entry, jnp.arange(len(sigmas)))

    return jax.lax.map(row, jnp.arange(len(sigmas) - 1))


def _deviation(x: Array, start: Array, line: Array) -> Array:
    """Mean distance of the samples x (B, ...) from the lines through `start` along `line`. Eq. 2."""
    away, line = ((a.reshape(a.shape[0], -1)) for a in (x - start, line))
    along = line / jnp.linalg.norm(line, axis=1, keepdims=True)
    away = away - jnp.sum(away * along, axis=1, keepdims=True) * along
    return jnp.mean(jnp.linalg.norm(away, axis=1))


def shortest_path(cost: np.ndarray, num_steps: int, gamma: float = 1.15) -> list[int]:
    """The indices p_0 < ... < p_{N-1} of least discounted cost, N = `num_steps`, both ends included. Equation (4).

    `cost` (T, T), read above the diagonal. Of equal paths the one with the earlier levels. Raises ValueError for a
    matrix that is not square or not finite above its diagonal, N outside 2..T, and gamma that is not positive.
    """
    cost = np.asarray(cost, np.float64)
    last = len(cost) - 1
    if cost.shape != (last + 1, last + 1) or not np.all(np.isfinite(cost[np.triu_indices(last + 1, 1)])):
        raise ValueError(f"cost must be a square matrix, finite above its diagonal, found shape {cost.shape}:\n{cost}")
    if not 2 <= num_steps <= last + 1:
        raise ValueError(f"num_steps counts noise levels, 2 to the teacher's {last + 1}, found {num_steps}")
    if not gamma > 0:
        raise ValueError(f"gamma discounts later steps and must be positive, found {gamma}")
    upper = np.where(np.triu(np.ones_like(cost, bool), 1), cost, np.inf)
    upper[:, last] = np.inf  # the last level is reached by the last step only
    value, choices = cost[:, last].copy(), []
    value[last] = np.inf
    for _ in range(num_steps - 2):
        candidates = upper + gamma * value[None, :]
        choices.append(np.argmin(candidates, axis=1))
        value = np.min(candidates, axis=1)
    path = [0]
    for choice in reversed(choices):
        path.append(int(choice[path[-1]]))
    return [*path, last]
