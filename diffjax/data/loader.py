"""Batches in a reproducible order that can be left and taken up again at any step.

The order is grain's: shuffled anew each epoch, repeated for ever, so batch k depends on (seed, k)
alone. An iterator's `get_state()` is a small dict for a checkpoint, `set_state` continues from it.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import grain
import jax
import numpy as np

from diffjax.data.sources import Source


class Batches(Protocol):
    """An endless iterator of batches with a position."""

    def __next__(self) -> dict[str, np.ndarray]: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


def make_batches(source: Source, batch_size: int, seed: int, num_threads: int = 8) -> Batches:
    """Shuffled batches of `batch_size` over all processes; each process reads its own part of every batch.

    Raises ValueError where the data set is smaller than a batch, or processes do not divide it.
    """
    processes, process = jax.process_count(), jax.process_index()
    if batch_size % processes:
        raise ValueError(f"train.batch_size {batch_size} must be a multiple of the {processes} processes")
    if len(source) < batch_size:
        raise ValueError(f"the data set has {len(source)} images, fewer than train.batch_size = {batch_size}")
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    # one epoch after the other, each process every n-th image: the global batch is the same for any n
    dataset = dataset[process::processes].batch(batch_size // processes, drop_remainder=True)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=num_threads)))


class NoData:
    """Empty batches for data-free methods (SFD draws its noise inside the step)."""

    def __init__(self) -> None:
        self._position = 0

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        self._position += 1
        return {}

    def get_state(self) -> dict[str, Any]:
        """{"position": batches given}."""
        return {"position": self._position}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue after `state`."""
        self._position = int(state["position"])
