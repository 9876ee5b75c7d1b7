"""Cached teacher trajectories: the targets that data-free distillation would ask its teacher for, step by step.

They depend on the teacher, the seed and the grids alone, so students with other optimisers or networks share them.
A folder holds `targets-SHARD.array_record`, one record a training step (float32, (B, n, H, W, C), row by row), and,
once all of it is there, `trajectories.json` with what the targets were made for.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.data import shards

HEADER = "trajectories.json"
_SHARD_STEPS = 64


def write(
    folder: str | os.PathLike[str], made_for: Mapping[str, Any], targets: Callable[[int], np.ndarray], num_steps: int
) -> Iterator[int]:
    """Write the targets (B, n, ...) of the steps 0 .. num_steps - 1; yields the steps that are done.

    Shards that an interrupted call left complete are kept. Raises FileExistsError where the folder holds a finished
    cache, or shards that were made for something else.
    """
    folder = Path(folder)
    shards.claim(folder, {**made_for, "total_steps": num_steps}, HEADER, "trajectories")
    for first in range(0, num_steps, _SHARD_STEPS):
        last = min(first + _SHARD_STEPS, num_steps)
        path = folder / _shard(first)
        if not path.exists():
            records = (np.ascontiguousarray(targets(step), "<f4").tobytes() for step in range(first, last))
            for count in shards.write(path, records):
                yield first + count
        yield last
    header = {"made_for": made_for, "num_steps": num_steps, "shape": np.shape(targets(0))}
    shards.finish(folder, HEADER, header)


class Cached:
    """Batches {"target": float32 (B, n, H, W, C)} in the order of the steps they were made for, with a position.

    Raises FileNotFoundError where `folder` holds no finished cache, ValueError naming every difference between what
    it was made for and `made_for`, and where it ends before step `num_steps` of the run.
    """

    def __init__(self, folder: str | os.PathLike[str], made_for: Mapping[str, Any], num_steps: int):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        folder = Path(folder)
        if not (folder / HEADER).exists():
            raise FileNotFoundError(f"{folder} holds no finished trajectories: make them with diffjax.cli.prepare")
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        lines = shards.differences(header["made_for"], json.loads(json.dumps(made_for)))
        if lines:
            raise ValueError(f"the trajectories in {folder} do not fit this run:\n  " + "\n  ".join(lines))
        self._shape, self._num_steps = tuple(header["shape"]), header["num_steps"]
        files = [str(folder / _shard(first)) for first in range(0, self._num_steps, _SHARD_STEPS)]
        self._records, self._step, self._folder = ArrayRecordDataSource(files), 0, folder
        if self._num_steps < num_steps:
            raise ValueError(
                f"{folder} holds the trajectories of {self._num_steps} steps, the run has {num_steps}: make more in "
                "another folder, or lower train.total_images"
            )
        if len(self._records) != self._num_steps:
            raise ValueError(f"{folder} has {len(self._records)} records, expected {self._num_steps}: make it again")

    def __iter__(self) -> "Cached":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._step >= self._num_steps:
            raise StopIteration
        (record,) = self._records.__getitems__([self._step])
        self._step += 1
        return {"target": np.frombuffer(record, "<f4").reshape(self._shape)}

    def get_state(self) -> dict[str, int]:
        """{"step": batches given}."""
        return {"step": self._step}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Continue after `state`."""
        self._step = int(state["step"])


def _shard(first: int) -> str:
    return f"targets-{first // _SHARD_STEPS:05d}.array_record"
