"""From a module to (function, parameters): split once, merged inside `jax.jit`.

    network, init = functionalize(lambda rngs: ResidualMLP((8, 8, 1), 256, 4, rngs=rngs))
    params = init(jax.random.key(0))                      # a nested dict of arrays; jit it to shard it
    shapes = jax.eval_shape(init, jax.random.key(0))      # no memory
    f = network(params, x, noise_label, cond, key)
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from diffjax.core.types import Key, Network, Params


def functionalize(
    constructor: Callable[[nnx.Rngs], nnx.Module], method: str = "__call__"
) -> tuple[Network, Callable[[Key], Params]]:
    """(network, init) of the module that `constructor(rngs)` makes; nothing is computed here.

    network(params, *args) is the module's `method` with these parameters; init(key) makes them.
    """
    graph, _ = nnx.split(nnx.eval_shape(lambda: constructor(nnx.Rngs(0))))

    def network(params: Params, *args: Any, **kwargs: Any) -> Any:
        return getattr(nnx.merge(graph, params), method)(*args, **kwargs)

    def init(key: Key) -> Params:
        return nnx.to_pure_dict(nnx.state(constructor(nnx.Rngs(key))))

    return network, init


def abstract(constructor: Callable[[nnx.Rngs], nnx.Module]) -> Params:
    """Shapes and types of the parameters, without allocating them."""
    return jax.eval_shape(functionalize(constructor)[1], jax.random.key(0))
