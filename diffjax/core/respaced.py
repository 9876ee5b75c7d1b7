"""DDIM on the trained steps of a table, spaced as diffusers spaces them: the sampler of AnimateDiff's scripts.

A step of DDIM (Song 2021, eq. 12 with eta = 0) goes from the index t of a table of T levels to t - T // N, N the number
of steps. Where that is the index of the next step ("leading"; "trailing" if N divides T), the steps are those of
Euler on the levels visited. "linspace" visits both ends of the table, T - 1 and 0, so its indices lie further apart
than the steps reach, and the next call takes the state for a less noisy one than it is. With x = xt / alpha, and a
prime for where the step arrives,

    x <- r (x + (sigma' - sigma) eps),   r = alpha' / alpha of the next call                                      (1)

r is 1 where both are one index. Nothing is called after the last step: there r = alpha', and the result is xt itself.

>>> from diffjax.core import respaced
>>> respaced.indices(5, "linspace").tolist()
[999, 749, 500, 250, 0]
"""

import numpy as np

from diffjax.core import names, schedules, solvers

SPACINGS = ("leading", "linspace", "trailing")


def indices(num_steps: int, spacing: str, num: int = 1000, offset: int = 0) -> np.ndarray:
    """The indices t (num_steps,) int64 of a table of `num` levels that the network is called at, decreasing.

    offset: added to those of "leading", whose last is 0 otherwise; the other spacings have none. Raises ValueError for
    an unknown spacing, and for steps or an offset that the table does not have.
    """
    names.lookup(dict.fromkeys(SPACINGS), spacing, "spacing")
    stride = num // num_steps if 0 < num_steps <= num else 0
    if not stride or not 0 <= offset < stride + num % num_steps:
        raise ValueError(f"found {num_steps} steps with offset {offset}, which a table of {num} levels does not have")
    if spacing == "leading":
        return np.arange(num_steps)[::-1] * stride + offset
    if spacing == "linspace":
        return np.linspace(0, num - 1, num_steps).round()[::-1].astype(np.int64)
    return np.arange(num, 0, -num / num_steps).round().astype(np.int64)[:num_steps] - 1


def ddim(
    schedule: schedules.Discrete, num_steps: int, spacing: str = "linspace", offset: int = 0, to_zero: bool = False
) -> solvers.Plan:
    """The plan of (1) for `sampling.sample`, from x = eps / alpha of the first index.

    to_zero: the last step goes to level 0; otherwise to index 0, the least noise of the table. Raises ValueError as
    `indices`.
    """
    t = indices(num_steps, spacing, schedule.num, offset)
    arrived = t - schedule.num // num_steps
    level, alpha = schedule.level((t + 1) / schedule.num), schedule.alpha((t + 1) / schedule.num)
    u = (np.maximum(arrived, 0) + 1) / schedule.num
    level_after, alpha_after = schedule.level(u), schedule.alpha(u)
    if to_zero:
        level_after, alpha_after = np.where(arrived < 0, 0.0, level_after), np.where(arrived < 0, 1.0, alpha_after)
    ratio = alpha_after / np.append(alpha[1:], 1.0)
    advance = np.stack([np.zeros_like(ratio), ratio, ratio * (level_after - level)], axis=1)
    return solvers.Plan(
        sigmas=np.append(level, level_after[-1]), levels=level, advance=advance, keep=None, noise=None, afs_scale=None,
        steps=tuple(range(1, num_steps + 1)), form="noise", corrected=False,
    )  # fmt: skip
