"""Ancestral steps with a variance that the network says (Nichol & Dhariwal 2021, section 3.1).

Between the levels s > r of a table, in sigma space, with x = x0 + s n and the network's D and v in 0..1

    mean = (r/s)^2 x + (1 - (r/s)^2) D                                                                (1)
    log variance = v log b + (1 - v) log b~                                                           (2)
    b~ = r^2 (1 - (r/s)^2),   b = (s^2 - r^2) (1 + r^2) / (1 + s^2)                                   (3)

b~ is the posterior's variance given x0, b that of the forward process; both are the paper's divided by alpha_bar at r.
The last step, to level 0, adds nothing.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core import solvers
from diffjax.core.types import Array, Cond, Denoiser, Key, Params
from diffjax.sampling import sample as fixed

VarianceDenoiser = Callable[..., tuple[Array, Array]]  # a Denoiser's arguments -> (D, v), both like x


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LearnedVariancePlan:
    """Levels (N + 1,), decreasing to 0, one call a step. noise: standard deviations, marks a plan that needs keys."""

    sigmas: Array
    noise: Array

    @property
    def nfe(self) -> int:
        """Network calls per sample."""
        return len(self.sigmas) - 1


def make_plan(sigmas: np.ndarray) -> LearnedVariancePlan:
    """A plan on `sigmas`; raises ValueError as `solvers.make_plan` of "ancestral"."""
    plan = solvers.make_plan("ancestral", sigmas)
    return LearnedVariancePlan(plan.sigmas, plan.noise)


def log_variances(s: Array, r: Array) -> tuple[Array, Array]:
    """(log b~, log b) of (3), for 0 < r < s of any one shape."""
    small = 2 * jnp.log(r) + jnp.log1p(-((r / s) ** 2))
    return small, jnp.log(s**2 - r**2) + jnp.log1p(r**2) - jnp.log1p(s**2)


def make_sampler(variance: VarianceDenoiser) -> Callable[..., Array]:
    """`sampling.sample.sample` that also follows a LearnedVariancePlan, with the network's own v."""

    def sample(
        denoise: Denoiser, params: Params, x: Array, plan: solvers.Plan | LearnedVariancePlan, cond: Cond | None = None, *,
        key: Key | None = None, transform: Callable[[Array], Array] | None = None,
    ) -> Array:  # fmt: skip
        if not isinstance(plan, LearnedVariancePlan):
            return fixed.sample(denoise, params, x, plan, cond, key=key, transform=transform)
        if key is None or key.shape != x.shape[:1]:
            raise ValueError(f"ancestral steps need one key per sample, shape {x.shape[:1]}")
        levels = jnp.asarray(plan.sigmas, x.dtype)

        def body(x: Array, row: tuple[Array, Array, Array]) -> tuple[Array, None]:
            s, r, step = row
            data = denoise(params, x, s, cond)  # with guidance where there is any; else the same call as the next
            data = data if transform is None else transform(data)
            v = variance(params, x, s, cond)[1]
            last = r == 0
            small, large = log_variances(s, jnp.where(last, s / 2, r))
            std = jnp.where(last, 0, jnp.exp((v * large + (1 - v) * small) / 2))
            noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, step), x.shape[1:], x.dtype))(key)
            return data + (r / s) ** 2 * (x - data) + std * noise, None

        rows = levels[:-1], levels[1:], jnp.arange(plan.nfe)
        return jax.lax.scan(body, x, rows)[0]

    return sample
