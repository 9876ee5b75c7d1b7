"""Periodic work of the loop: means of an interval, sample grids, one batch repeated."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from diffjax.core.types import Batch, Params
from diffjax.data.loader import Batches
from diffjax.runtime import images


class Hook(NamedTuple):
    """Work every `every_steps` steps (0: never).

    call(step, images_seen, params) -> metrics for the log, or None; `params` are the ones to sample
    with. It must not keep them: the next step reuses their memory.
    """

    every_steps: int
    call: Callable[[int, int, Params], Mapping[str, float] | None]

    def due(self, step: int) -> bool:
        """Whether it is this hook's turn after `step` finished steps."""
        return self.every_steps > 0 and step % self.every_steps == 0


class Means:
    """Mean of every metric since the last log line, added in order, so that it repeats bit by bit.

    Its state goes into checkpoints: a run stopped inside an interval writes the same line.
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        self._sums: dict[str, float] = dict(state["sums"]) if state else {}
        self._count: int = state["count"] if state else 0

    def add(self, metrics: Mapping[str, float]) -> None:
        """Add the metrics of one step; `nonfinite_leaf` is an index and left out."""
        for name, value in metrics.items():
            if name != "nonfinite_leaf":
                self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1

    @property
    def count(self) -> int:
        """Steps added."""
        return self._count

    def mean(self) -> dict[str, float]:
        """Metric -> mean; empty when nothing was added."""
        return {name: value / self._count for name, value in self._sums.items()}

    def clear(self) -> None:
        """Start the next interval."""
        self._sums, self._count = {}, 0

    def state(self) -> dict[str, Any]:
        """JSON; Python floats survive it exactly."""
        return {"sums": dict(self._sums), "count": self._count}


class RepeatFirst:
    """The first batch for ever: a model that cannot overfit one batch has a bug."""

    def __init__(self, batches: Batches) -> None:
        self._batch = next(batches)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        return self._batch

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: Any) -> None:
        """Nothing to do: every position holds the same batch."""


def sample_grid(
    workdir: str | os.PathLike[str], sample: Callable[[Params], Any | None], every_steps: int
) -> Hook:
    """Hook that writes WORKDIR/samples/step_STEP.png.

    sample(params) -> uint8 (n, H, W, C) images, or None for no picture.
    """

    def write(step: int, images_seen: int, params: Params) -> None:
        pictures = sample(params)
        if pictures is not None and jax.process_index() == 0:
            path = Path(workdir) / "samples" / f"step_{step:08d}.png"
            images.save_png(path, images.grid(np.asarray(pictures)), [f"{images_seen:,} images"])

    return Hook(every_steps, write)
