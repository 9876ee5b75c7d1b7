"""Sampling with an adaptive Runge-Kutta method: Dormand & Prince's pair of orders 5 and 4, by diffrax.

The ODE dx/dsigma = (x - D(x, sigma)) / sigma has no bound on sigma; on the straight flow t = sigma / (1 + sigma),
y = x / (1 + sigma) it is

    dy/dt = (y - D) / t                                                                              (1)

which is the velocity n - x0 of flow matching, smooth from one end to the other, whatever the denoiser was trained for.
Each sample has its own steps, so that it does not depend on the batch it is drawn in; a step calls the network six times.
"""

import dataclasses
import functools
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.types import Array, Cond, Denoiser, Key, Params

_CALLS = 6  # of a step; the last slope of a step is the first of the next
_MAX_STEPS = 4096


@functools.partial(jax.tree_util.register_dataclass, data_fields=["sigmas", "rtol", "atol"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class AdaptivePlan:
    """From sigmas[0] to sigmas[1] with errors of a step below atol + rtol |y|. The number of calls is the solver's to
    choose: `nfe` is None, `solve` counts them."""

    sigmas: Array
    rtol: Array | float = 1e-5
    atol: Array | float = 1e-5

    @property
    def nfe(self) -> None:
        """Not known before the sample is."""
        return None

    @property
    def noise(self) -> None:
        """Nothing is added on the way."""
        return None


def make_plan(sigma_min: float = 0.002, sigma_max: float = 80.0, rtol: float = 1e-5, atol: float = 1e-5) -> AdaptivePlan:
    """A plan. Raises ValueError for levels out of order and tolerances that float32 cannot keep."""
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"dopri5 goes from sigma_max down to sigma_min > 0, found {sigma_max} and {sigma_min}")
    if not (rtol >= 1e-6 and atol >= 1e-6):
        raise ValueError(f"rtol and atol must be 1e-6 or more, which float32 can tell from zero, found {rtol}, {atol}")
    return AdaptivePlan(np.array([sigma_max, sigma_min]), rtol, atol)


def sample(
    denoise: Denoiser, params: Params, x: Array, plan: AdaptivePlan, cond: Cond | None = None, *,
    key: Key | None = None, transform: None = None,
) -> Array:  # fmt: skip
    """The sample (B, ...) from x (B, ...) at plan.sigmas[0], as `sampling.sample.sample`. Deterministic: no key. A chain
    that does not end within 4096 steps is NaN. Raises ImportError without diffrax."""
    if key is not None or transform is not None:
        raise ValueError("dopri5 takes neither a key nor a transform of D: leave them out")
    return solve(denoise, params, x, plan, cond)[0]


def solve(
    denoise: Denoiser, params: Params, x: Array, plan: AdaptivePlan, cond: Cond | None = None
) -> tuple[Array, Array]:
    """(sample (B, ...), network calls int32 (B,))."""
    diffrax = _diffrax()
    start, end = (jnp.asarray(sigma, x.dtype) for sigma in (plan.sigmas[0], plan.sigmas[1]))
    cond = dict(cond or {})
    axes = {name: 0 if jnp.ndim(value) else None for name, value in cond.items()}

    def one(x: Array, cond: Cond) -> tuple[Array, Array]:
        own = {name: value if axes[name] is None else value[None] for name, value in cond.items()}

        def velocity(t: Array, y: Array, _: None) -> Array:
            data = denoise(params, (y / (1 - t))[None], t / (1 - t), own or None)[0]
            return (y - data) / t

        times = start / (1 + start), end / (1 + end)
        found = diffrax.diffeqsolve(
            diffrax.ODETerm(velocity), diffrax.Dopri5(), *times, None, x / (1 + start), max_steps=_MAX_STEPS, throw=False,
            stepsize_controller=diffrax.PIDController(rtol=plan.rtol, atol=plan.atol),
        )  # fmt: skip
        done = found.result == diffrax.RESULTS.successful
        y = jnp.where(done, found.ys[-1] * (1 + end), jnp.nan)
        return y, _CALLS * found.stats["num_steps"].astype(jnp.int32) + 1

    return jax.vmap(one, in_axes=(0, axes))(x, cond)


def _diffrax() -> ModuleType:
    try:
        import diffrax
    except ImportError as error:
        raise ImportError("the solver dopri5 is diffrax's; type: pip install 'diffjax[ode]'") from error
    return diffrax
