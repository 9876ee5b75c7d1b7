"""Sampling of students that need one to five network calls (Zhou 2024, SFD).

A student is sampled exactly as it was trained: Euler steps between the N trained noise levels, the first call
replaced by the analytical first step (AFS, Dockhorn 2022) where it was trained so, and one student that serves
several N is told where it is.

    plan = student_plan(4, sigma_min=0.006, sigma_max=80.0, afs=True)          # 4 levels, 3 steps, 2 network calls
    denoise = with_step_condition(denoise, "num_steps", plan.sigmas)           # as it was trained: "" for one N
    x = sample(denoise, params, noise * 80.0, plan)

>>> student_plan(4, sigma_min=0.006, sigma_max=80.0, afs=True).nfe
2
"""

import jax.numpy as jnp
import numpy as np

from diffjax.core import grids, solvers
from diffjax.core.types import Array, Cond, Denoiser, Key, Params

STEP_CONDITIONS = ("", "num_steps", "next_level")


def student_grid(
    num: int, sigma_min: float, sigma_max: float, *, grid: str = "polynomial", rho: float = 7.0, **grid_options
) -> np.ndarray:
    """The `num` noise levels of a student or its teacher, (num,) float64, decreasing, from `grids.make_grid`.

    `rho` goes to every grid that has one (all but "logsnr"); `grid_options` are the maps of a "discrete" grid.
    Raises ValueError as `make_grid` does.
    """
    options = grid_options if grid == "logsnr" else {"rho": rho, **grid_options}
    return grids.make_grid(grid, num, sigma_min, sigma_max, **options)


def student_plan(
    num_steps: int, sigma_min: float, sigma_max: float, *, afs: bool, grid: str = "polynomial", rho: float = 7.0,
    **grid_options,
) -> solvers.Plan:
    """Euler on the student's grid: N = `num_steps` noise levels, N-1 steps, N-1 network calls, N-2 with `afs`.

    The arguments are those of the training settings of the same names. Raises ValueError for fewer than 2 levels, or
    3 with `afs`, which would never call the network.
    """
    check_num_steps(num_steps, afs)
    sigmas = student_grid(num_steps, sigma_min, sigma_max, grid=grid, rho=rho, **grid_options)
    return solvers.make_plan("euler", sigmas, afs=afs)


def check_num_steps(num_steps: int, afs: bool) -> None:
    """Raises ValueError unless N = `num_steps` noise levels leave at least one network call."""
    least = 3 if afs else 2
    if num_steps < least:
        raise ValueError(
            f"num_steps counts noise levels (steps + 1) and must be at least {least} with afs={afs}, "
            f"found {num_steps}: with fewer the network is never called"
        )


def with_step_condition(denoise: Denoiser, kind: str, sigmas: np.ndarray) -> Denoiser:
    """`denoise` that is told its place on the grid `sigmas` (N,), as a scalar float32 cond["step"].

    "num_steps": N itself, the same at every level (Zhou 2024, SFD-v). "next_level": log(t_next) / 4, where the step
    from this level leads (Zhou 2024, the other variant). "": nothing. Wrap before guidance, so that both of its
    branches have the condition.
    """
    steps = step_conditions(kind, sigmas)
    if steps is None:
        return denoise
    logs = np.log(np.asarray(sigmas, np.float64))

    def conditioned(
        params: Params, x: Array, sigma: Array, cond: Cond | None = None, key: Key | None = None
    ) -> Array:
        here = jnp.argmin(jnp.abs(jnp.log(sigma) - jnp.asarray(logs[:-1], x.dtype)))
        return denoise(params, x, sigma, {**(cond or {}), "step": jnp.asarray(steps)[here]}, key)

    return conditioned


def step_conditions(kind: str, sigmas: np.ndarray) -> np.ndarray | None:
    """What a network is told at each level but the last of `sigmas` (N,): (N-1,) float32, or None; see
    `with_step_condition`."""
    if kind not in STEP_CONDITIONS:
        raise ValueError(f"the step condition must be one of {STEP_CONDITIONS}, found {kind!r}")
    if not kind:
        return None
    steps = np.log(sigmas[1:]) / 4 if kind == "next_level" else np.full(len(sigmas) - 1, len(sigmas))
    return steps.astype(np.float32)
