"""Metric logs: JSON lines always, TensorBoard and wandb where asked for.

A line of metrics.jsonl is {"step", "images", NAME: number, ..., "time": {...}}. Everything outside
`time` repeats exactly in a resumed run; `time` holds what a clock says.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from diffjax.core import names
from diffjax.runtime import report

FILE_NAME = "metrics.jsonl"
RESERVED = ("step", "images", "time", "partial")
OPTIONAL = ("tensorboard", "wandb")


class Writer(Protocol):
    """Receives one record at a time; `close` flushes."""

    def write(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class JsonlWriter:
    """Appends records to WORKDIR/metrics.jsonl, flushed one by one.

    step: that of the restored state, 0 for a new run. Lines behind it are dropped (they will be written
    again), and so are `partial` ones, the mean of an unfinished interval that a run ended with.
    Raises ValueError for a damaged line that is not the last one.
    """

    def __init__(self, workdir: str | os.PathLike[str], step: int) -> None:
        path = Path(workdir) / FILE_NAME
        if path.exists():
            kept = [json.dumps(line) for line in read(path) if line["step"] <= step and not line.get("partial")]
            report.write_text(path, "".join(line + "\n" for line in kept))
        # without a buffer: what a full disk did not take is not written again when the file is closed
        self._file = path.open("ab", buffering=0)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record. Raises ValueError for a number that is not finite, OSError where the disk is full."""
        line = json.dumps(record, allow_nan=False) + "\n"
        try:
            self._file.write(line.encode())
        except OSError as error:
            text = f"{error.strerror}; make space, then run the same command to go on from the last checkpoint"
            raise OSError(error.errno, text, str(self._file.name)) from error

    def close(self) -> None:
        self._file.close()


class TensorBoardWriter:
    """Writes scalars to WORKDIR/tensorboard without TensorFlow. Raises ImportError naming the extra."""

    def __init__(self, workdir: str | os.PathLike[str], step: int) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard", "tensorboardX") from error
        self._writer = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=step + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """Sends scalars to wandb, one wandb run per run folder (id in WORKDIR/wandb_id.txt). Project, entity and
    mode come from wandb's environment variables. Raises ImportError naming the extra."""

    def __init__(self, workdir: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb", "wandb") from error
        path = Path(workdir) / "wandb_id.txt"
        if not path.exists():
            report.write_text(path, wandb.util.generate_id())
        run_id = path.read_text(encoding="utf-8").strip()
        self._run = wandb.init(dir=str(workdir), id=run_id, resume="allow", config=dict(config))

    def write(self, record: Mapping[str, Any]) -> None:
        self._run.log(scalars(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()


class Writers:
    """All writers of a run as one context.

    optional: of `OPTIONAL`, beside the JSON lines. is_first: of several processes only the first writes. Raises ValueError for an unknown name, ImportError for a
    package that is not installed.
    """

    def __init__(
        self, workdir: str | os.PathLike[str], optional: Sequence[str], step: int, config: Mapping[str, Any],
        is_first: bool = True,
    ) -> None:  # fmt: skip
        unknown = [name for name in optional if name not in OPTIONAL]
        if unknown:
            raise ValueError(f"unknown writer {unknown[0]!r}; {names.nearest(unknown[0], OPTIONAL)}")
        self._writers: list[Writer] = []
        if not is_first:
            return
        if "tensorboard" in optional:
            self._writers.append(TensorBoardWriter(workdir, step))
        if "wandb" in optional:
            self._writers.append(WandbWriter(workdir, config))
        # last: it rewrites the file, which must not happen when another one is missing
        self._writers.append(JsonlWriter(workdir, step))

    def write(
        self, step: int, images: int, metrics: Mapping[str, float], times: Mapping[str, float], partial: bool = False
    ) -> None:
        """Write one record. Raises ValueError for a metric with a reserved name."""
        taken = sorted(set(metrics) & set(RESERVED))
        if taken:
            raise ValueError(f"found metrics named {taken}, which {FILE_NAME} uses itself: rename them")
        record = {"step": step, "images": images, **metrics, "time": dict(times)}
        if partial:
            record["partial"] = True
        for writer in self._writers:
            writer.write(record)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl; a last line that a killed process left unfinished is dropped.

    Raises ValueError naming any other damaged line.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number} is not JSON ({error}): repair or remove it") from error
    return records


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record by one name each: 'loss', 'images', 'time/images_per_s'."""
    flat = {name: value for name, value in record.items() if name not in ("step", "time", "partial")}
    return flat | {f"time/{name}": value for name, value in record["time"].items()}


def _missing(writer: str, package: str) -> ImportError:
    return ImportError(
        f"the {writer} writer needs {package}, which is not installed: pip install 'diffjax[log]', or take it out of "
        "config.train.writers"
    )
