"""Sampling of students that need one to five network calls (Zhou 2024, SFD).

A student is sampled exactly as it was trained: Euler steps between the N trained noise levels, the first call
replaced by the analytical first step (AFS, Dockhorn 2022) where it was trained so, and, for one student that serves
several N, the N it should act for as a constant condition.

    plan = student_plan(4, sigma_min=0.006, sigma_max=80.0, afs=True)      # 4 levels, 3 steps, 2 network calls
    x = sample(at_num_steps(denoise, 4), params, noise * 80.0, plan)       # plain `denoise` if trained for one N

>>> student_plan(4, sigma_min=0.006, sigma_max=80.0, afs=True).nfe
2
"""

import jax.numpy as jnp
import numpy as np

from diffjax.core import grids, solvers
from diffjax.core.types import Array, Cond, Denoiser, Key, Params


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


def at_num_steps(denoise: Denoiser, num_steps: int) -> Denoiser:
    """`denoise` with the step condition held at N = `num_steps`, as a scalar float32 cond["num_steps"].

    Zhou 2024: the condition of a student for several N (SFD-v) is N itself, constant along the trajectory. Wrap before
    guidance, so that both of its branches have the condition.
    """

    def conditioned(
        params: Params, x: Array, sigma: Array, cond: Cond | None = None, key: Key | None = None
    ) -> Array:
        return denoise(params, x, sigma, {**(cond or {}), "num_steps": jnp.float32(num_steps)}, key)

    return conditioned
