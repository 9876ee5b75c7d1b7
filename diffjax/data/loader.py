"""Batches in a reproducible order that can be left and taken up again at any batch.

All images in a new order each epoch, for ever. Image n of the run depends on (seed, n) alone: not on the
batch size, the number of processes, threads or workers. grain reads ahead in threads or workers. The
order is drawn here, an epoch at once: grain's own shuffle takes 30 us an image, more than a small step.

    batches = make_batches(source, batch_size=64, seed=0)
    batch = next(batches)                  # {"image": (64, H, W, C), "label": int32 (64,)}
    state = batches.get_state()            # plain values, for a checkpoint
    batches.set_state(state)               # the next batch is the one after `batch` again
"""

import functools
from collections.abc import Iterator
from typing import Any, Protocol, Self

import grain
import jax
import numpy as np
from absl import flags

from diffjax.data import sources

_END = 2**62  # of the images of a run: never reached
_BUFFERED = 8  # batches ready or in the making, each thread makes one at a time


class Batches(Protocol):
    """An endless iterator of batches with a position. get_state() is JSON: plain values only."""

    def __next__(self) -> dict[str, np.ndarray]: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


def make_batches(
    source: sources.Source,
    batch_size: int,
    seed: int,
    *,
    num_threads: int = 4,
    num_workers: int = 0,
    process: int | None = None,
    num_processes: int | None = None,
) -> Batches:
    """Shuffled batches, `batch_size` images over all processes; batches may span the end of an epoch.

    Each process gets its rows of the global batch, batch_size / num_processes of them: put in the order of
    the processes they are the batch that a single process would get. process, num_processes: those of JAX.
    num_workers: further operating-system processes that read and decode; 0 = threads only, which is enough
    unless decoding is slow. Raises ValueError where the data set is smaller than a batch, the processes do not
    divide it, or seed is not in 0 .. 2**32 - 1.
    """
    process = jax.process_index() if process is None else process
    num_processes = jax.process_count() if num_processes is None else num_processes
    if batch_size < 1 or batch_size % num_processes:
        raise ValueError(f"train.batch_size: found {batch_size}, expected a multiple of {num_processes} (processes)")
    if len(source) < batch_size:
        raise ValueError(
            f"the data set has {len(source)} images, fewer than train.batch_size = {batch_size}: use a smaller batch"
        )
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: found {seed}, expected 0 .. 2**32 - 1")
    rows = batch_size // num_processes
    reader = _Reader(source, seed, process * rows, rows)
    return _Shuffled(reader, batch_size, num_threads, num_workers)


def order(num_images: int, seed: int, start: int, count: int) -> np.ndarray:
    """Indices (count,) of the images `start` to `start + count` of a run over `num_images` images."""
    epochs = range(start // num_images, (start + count - 1) // num_images + 1)
    indices = np.concatenate([_epoch(num_images, seed, epoch) for epoch in epochs])
    offset = start - epochs[0] * num_images
    return indices[offset : offset + count]


@functools.lru_cache(maxsize=4)
def _epoch(num_images: int, seed: int, epoch: int) -> np.ndarray:
    # RandomState: numpy promises the same numbers in every version, so a resumed run keeps its order
    return np.random.RandomState([seed, epoch]).permutation(num_images)


class _Reader:
    """First image of a global batch -> this process's rows of it; a class, since workers have to receive it."""

    def __init__(self, source: sources.Source, seed: int, offset: int, rows: int):
        self.source, self._seed, self._offset, self._rows = source, seed, offset, rows

    def __call__(self, start: int) -> dict[str, np.ndarray]:
        indices = order(len(self.source), self._seed, start + self._offset, self._rows)
        return sources.read(self.source, indices)


class _Shuffled:
    """The position is counted in images; grain's pipeline is built anew from there."""

    def __init__(self, reader: _Reader, batch_size: int, num_threads: int, num_workers: int):
        self._reader, self._source, self._batch_size = reader, reader.source, batch_size
        self._num_threads, self._num_workers = num_threads, num_workers
        self._images = 0
        self._pipeline: grain.DatasetIterator | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._pipeline is None:
            self._pipeline = self._start()
        batch = next(self._pipeline)
        self._images += self._batch_size
        return batch

    def get_state(self) -> dict[str, int]:
        """{"images": images given, over all processes; "num_images": images of the data set}."""
        return {"images": self._images, "num_images": len(self._source)}

    def set_state(self, state: dict[str, int]) -> None:
        """Continue after `state`, with any batch size. Raises ValueError where the data set had another length."""
        if state["num_images"] != len(self._source):
            raise ValueError(
                f"the position was saved in a data set of {state['num_images']} images, found {len(self._source)}: "
                "the order cannot go on; restore the data, or begin in another --workdir"
            )
        self.close()
        self._images = int(state["images"])

    def close(self) -> None:
        """End threads and workers; the next batch starts them again."""
        if self._pipeline is not None:
            self._pipeline.close()
            self._pipeline = None

    def _start(self) -> grain.DatasetIterator:
        batches = grain.MapDataset.range(self._images, _END, self._batch_size).map(self._reader)
        ahead = grain.ReadOptions(num_threads=self._num_threads, prefetch_buffer_size=max(_BUFFERED, self._num_threads))
        dataset = batches.to_iter_dataset(ahead)
        if self._num_workers:
            if not flags.FLAGS.is_parsed():  # outside of an absl program; grain's workers read flags
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(self._num_workers, per_worker_buffer_size=2))
        return iter(dataset)


class NoData:
    """Empty batches for data-free methods (SFD draws its noise inside the step)."""

    def __init__(self) -> None:
        self._batches = 0

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        self._batches += 1
        return {}

    def get_state(self) -> dict[str, int]:
        """{"batches": batches given}."""
        return {"batches": self._batches}

    def set_state(self, state: dict[str, int]) -> None:
        """Continue after `state`."""
        self._batches = int(state["batches"])
