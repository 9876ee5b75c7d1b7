"""One step down a gradient, the same for every method and network."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from diffjax.core.types import Array, Params


class Update(NamedTuple):
    """optimizer: without a learning rate of its own; learning_rate: iteration -> rate."""

    optimizer: optax.GradientTransformation
    learning_rate: Callable[[Array], Array]


def descend(
    optimizer: optax.GradientTransformation, rate: Array, params: Params, opt_state: Any, grads: Params
) -> tuple[Params, Any]:
    """(params, opt_state) after a step of size `rate` along the optimiser's direction, in the parameters' types."""
    direction, opt_state = optimizer.update(grads, opt_state, params)
    return jax.tree.map(lambda p, u: (p - rate * u).astype(p.dtype), params, direction), opt_state
