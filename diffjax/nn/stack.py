"""Blocks of a stack that are computed again in the backward pass ("rematerialisation", Chen 2016): less memory, more time.

A gradient keeps what every block made inside, unless the block is given to `jax.checkpoint` with a policy that says
what may be kept. Without a policy ("nothing") a gradient costs one more forward pass, and a network needs about the
memory of its blocks' inputs and of one block. XLA's compiler for CPUs merges the two computations again, so there
nothing is saved and little is lost; those for accelerators keep them apart.

    block = remat(block, "nothing")
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax

from diffjax.core import names

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
