"""What one process wishes and all must do at the same step: to stop (it got a signal), to save (it is time, by its clock).

A wish travels with the batch of a step and comes back with that step's metrics, so that all processes hear of it at the
same step without waiting for each other; clocks and signals of hosts need not agree.
"""

import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffjax.core.types import Array

BATCH_KEY = "wishes"  # the entry of a batch
KINDS = ("stop", "save")
_METRIC = "wish_"


def ballot(mesh: Mesh, wishes: Iterable[str]) -> jax.Array:
    """(devices, kinds) int32 over all processes, the rows of this one's devices being its wishes."""
    own = np.asarray([[kind in set(wishes) for kind in KINDS]], np.int32)
    where = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    shape = (math.prod(mesh.axis_sizes), len(KINDS))
    return jax.make_array_from_callback(shape, where, lambda index: own)


def count(votes: Array) -> dict[str, Array]:
    """As metrics, float32: how many devices wish each kind."""
    return {_METRIC + kind: jnp.sum(votes[:, i]).astype(jnp.float32) for i, kind in enumerate(KINDS)}


def take(metrics: dict[str, float]) -> set[str]:
    """The kinds that any process wishes; they leave the metrics."""
    return {kind for kind in KINDS if metrics.pop(_METRIC + kind, 0.0) > 0}
