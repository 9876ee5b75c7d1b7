"""From a module to (function, parameters): split once, merged inside `jax.jit`.

    network, init = functionalize(lambda rngs: ResidualMLP((8, 8, 1), 256, 4, rngs=rngs))
    params = init(jax.random.key(0))                      # a nested dict of arrays; jit it to shard it
    shapes = jax.eval_shape(init, jax.random.key(0))      # no memory
    f = network(params, x, noise_label, cond, key)
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from diffjax.core.types import Key, Network, Params


class ParamKeys:
    """The keys that `nnx.Rngs(key)` draws for new parameters, counted in Python: an array that counts costs, in a
    function that is traced, the square of the number of parameters, and abstract SDXL took ten times as long."""

    def __init__(self, key: Key):
        self.key, self.count = key, -1

    def params(self) -> Key:
        self.count += 1
        return jax.random.fold_in(self.key, np.uint32(self.count))


def functionalize(
    constructor: Callable[[nnx.Rngs], nnx.Module], method: str = "__call__"
) -> tuple[Network, Callable[[Key], Params]]:
    """(network, init) of the module that `constructor(rngs)` makes; nothing is computed here.

    network(params, *args) is the module's `method` with these parameters; init(key) makes them.
    """
    graph, _ = nnx.split(nnx.eval_shape(lambda: constructor(ParamKeys(jax.random.key(0)))))

    def network(params: Params, *args: Any, **kwargs: Any) -> Any:
        return getattr(nnx.merge(graph, params), method)(*args, **kwargs)

    def init(key: Key) -> Params:
        return nnx.to_pure_dict(nnx.state(constructor(ParamKeys(key))))

    return network, init


def abstract(constructor: Callable[[nnx.Rngs], nnx.Module]) -> Params:
    """Shapes and types of the parameters, without allocating them."""
    return jax.eval_shape(functionalize(constructor)[1], jax.random.key(0))
