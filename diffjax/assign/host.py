"""The exact assignment beside the training step: the host solves for coming batches while the device is at this one.

A thread makes the images and the noise of a batch as the step will, on the host's CPU and from the same keys, solves, and
adds to the batch

    noise_key    uint32 (B, ...): the key of the noise that each image gets

8 bytes an image; the device draws the noise from it (`pair.training_noise`, route="host"). The plan is that of the step's
own solve, up to ties within the last bits, in which two devices differ. A `pool` of several batches is assigned at once:
its plan is better, and its cost grows nearly with the third power.

    batches = Assigned(loader.make_batches(...), step_inputs, pool=2)      # again a data.loader.Batches
"""

import collections
import functools
from collections.abc import Callable
from concurrent import futures
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.assign import costs, exact, pair
from diffjax.core.types import Array, Batch, Key

Inputs = Callable[[Batch, Array], tuple[Array, Key]]  # (batch, step) -> images (B, ...) as trained on, key of the noise

_AHEAD = 2  # pools solved or in the making


class Assigned:
    """Batches with the keys of their noise.

    batches: a `data.loader.Batches`. inputs(batch, step): the images (B, ...) that the training step makes of a batch,
    and the key from which it draws its noise; traceable. group_by, cost: see `pair.training_noise`; pool: batches that are
    assigned as one. Raises ValueError for a pool below one, and at the first batch where `group_by` is absent.
    """

    def __init__(self, batches: Any, inputs: Inputs, *, group_by: str = "", cost: str = "dot", pool: int = 1):
        if pool < 1:
            raise ValueError(f"assign_options.pool is a number of batches, at least 1, found {pool}")
        self._batches, self._group_by, self._pool = batches, group_by, pool
        self._host = jax.local_devices(backend="cpu")[0]
        self._inputs = jax.jit(functools.partial(_keyed_inputs, inputs))
        self._costs = jax.jit(functools.partial(_costs, cost=cost))
        self._thread = futures.ThreadPoolExecutor(1, thread_name_prefix="assign")
        self._begin(batches.get_state(), 0)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if not self._ready:
            self._fill()
            self._state, self._first, self._ready = self._waiting.popleft().result()
            self._given = 0
            self._fill()  # now, so that the thread works while the device does
        self._given += 1
        return self._ready.popleft()

    def get_state(self) -> dict[str, Any]:
        """{"pool": the position of the inner batches before the present pool, "step": of its first batch, "given"}."""
        return {"pool": self._state, "step": self._first, "given": self._given}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue after `state`; the pool is solved again, and what was given of it left out."""
        for future in self._waiting:
            future.cancel()
        futures.wait(self._waiting)
        self._batches.set_state(state["pool"])
        self._begin(state["pool"], int(state["step"]))
        for _ in range(int(state["given"])):
            next(self)

    def _begin(self, state: dict[str, Any], step: int) -> None:
        self._state, self._first, self._given, self._next = state, step, 0, step
        self._ready: collections.deque[dict[str, np.ndarray]] = collections.deque()
        self._waiting: collections.deque[futures.Future] = collections.deque()

    def _fill(self) -> None:
        while len(self._waiting) < _AHEAD:
            self._waiting.append(self._thread.submit(self._make, self._next))
            self._next += self._pool

    def _make(self, first: int) -> tuple[dict[str, Any], int, collections.deque[dict[str, np.ndarray]]]:
        """The pool whose first batch is that of step `first`, with the position before it. Runs in the thread."""
        state = self._batches.get_state()
        pool = [dict(next(self._batches)) for _ in range(self._pool)]
        group = None
        if self._group_by:
            pair.check_group(self._group_by, pool[0])
            group = np.concatenate([batch[self._group_by] for batch in pool])
        with jax.default_device(self._host):
            made = [self._inputs(batch, jnp.uint32(first + offset)) for offset, batch in enumerate(pool)]
            images, keys = (jnp.concatenate(arrays) for arrays in zip(*made, strict=True))
            perm = exact.solve(np.asarray(self._costs(images, keys)), group)
            chosen = np.asarray(jax.random.key_data(keys))[perm]
        for batch, own in zip(pool, np.split(chosen, self._pool), strict=True):
            batch[pair.NOISE_KEY] = own
        return state, first, collections.deque(pool)


def _keyed_inputs(inputs: Inputs, batch: Batch, step: Array) -> tuple[Array, Key]:
    image, key = inputs(batch, step)
    return pair.usable(image)[0], pair.row_keys(key, len(image))


def _costs(images: Array, keys: Key, cost: str) -> Array:
    return costs.cost_matrix(images, pair.draw(keys, images.shape[1:]), cost)
