"""Equal blocks in a scan, and blocks that are computed again in the backward pass.

Equal blocks are made as one module whose parameters have a first axis over depth, and run by `jax.lax.scan`: a network
of 28 blocks compiles as fast as one of two.

    self.blocks = stacked(lambda rngs: Block(width, rngs=rngs), depth, rngs=rngs)
    x, _ = scan(self.blocks, lambda block, x, _: (block(x, c), None), x, policy="nothing")

Rematerialisation (Chen 2016) trades time for memory.

A gradient keeps what every block made inside, unless the block is given to `jax.checkpoint` with a policy that says
what may be kept. Without a policy ("nothing") a gradient costs one more forward pass, and a network needs about the
memory of its blocks' inputs and of one block. XLA's compiler for CPUs merges the two computations again, so there
nothing is saved and little is lost; those for accelerators keep them apart.

    block = remat(block, "nothing")
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
from flax import nnx

from diffjax.core import names
from diffjax.nn.functional import ParamKeys

Output = TypeVar("Output")

# what a block keeps for its backward pass beside its inputs: nothing; products and convolutions; products with weights,
# which leaves out those of attention, and convolutions
POLICIES: dict[str, Callable[..., Any]] = {
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def remat(block: Callable[..., Output], policy: str) -> Callable[..., Output]:
    """`block` with the same values and gradients, keeping for the latter what the policy of this name allows; "" = all.

    Arguments and result of `block` are trees of arrays; it may close over its parameters. Raises ValueError as `check`.
    """
    check(policy)
    if not policy:
        return block
    # a function of its own: JAX keeps the trace of a function by its identity, and with it the parameters it closes over
    return jax.checkpoint(lambda *args: block(*args), policy=POLICIES[policy])


def check(policy: str) -> None:
    """Raises ValueError for a name that is neither "" nor a policy, with the nearest."""
    if policy:
        names.lookup(POLICIES, policy, "model.remat")


def stacked(make: Callable[[nnx.Rngs], nnx.Module], depth: int, *, rngs: nnx.Rngs) -> nnx.Module:
    """The module of `make(rngs)` with parameters of `depth` of them, drawn one by one, along a new first axis."""
    keys = jax.random.split(rngs.params(), depth)
    return nnx.vmap(lambda key: make(ParamKeys(key)))(keys)


def scan(
    blocks: nnx.Module, apply: Callable[..., tuple[Any, Any]], carry: Any, xs: Any = None, policy: str = ""
) -> tuple[Any, Any]:
    """carry, y = apply(block, carry, x) for each block of `stacked` in turn: the last carry, and all y along a first axis.

    xs: a tree with a first axis over depth, or None. policy: what a block keeps for a gradient, see `remat`.
    """
    graph, params = nnx.split(blocks)
    step = remat(lambda carry, x, params: apply(nnx.merge(graph, params), carry, x), policy)
    return jax.lax.scan(lambda carry, given: step(carry, *given), carry, (xs, params), unroll=_unroll)


@contextlib.contextmanager
def unrolled() -> Iterator[None]:
    """What is traced inside has a copy of the block for each layer in place of a loop: the compiler's cost analysis
    counts the body of a loop once. JAX remembers the traces of a function: give it one that was not traced before."""
    global _unroll
    before, _unroll = _unroll, True
    try:
        yield
    finally:
        _unroll = before


def unrolling() -> bool:
    """Whether this is traced inside `unrolled`."""
    return _unroll


_unroll = False
