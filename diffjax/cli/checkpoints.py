"""Lines about the checkpoints of a run, for `diffjax.cli.inspect`."""

import datetime
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from etils import epath


class DamagedError(RuntimeError):
    """Checkpoints of a run are damaged; the message names them. Ends the command with code 1."""

    exit_code = 1


def lines(workdir: Path) -> Iterable[str]:
    """Step, size on the disk and time of every checkpoint. Raises CheckpointError as `checkpoint.steps`."""
    from diffjax.runtime import checkpoint

    folder = checkpoint.place(workdir)
    steps = checkpoint.steps_in(folder)
    for step in steps:
        when = datetime.datetime.fromtimestamp((folder / str(step)).stat().mtime).strftime("%Y-%m-%d %H:%M:%S")
        yield f"checkpoint      step {step:,}, {readable_bytes(_size(folder / str(step)))}, {when}"
    if not steps:
        yield "checkpoint      none yet"


def verified_lines(workdir: Path) -> Iterable[str]:
    """What reading every checkpoint whole found. Raises DamagedError after the last where one is damaged,
    CheckpointError as `checkpoint.steps`."""
    from diffjax.runtime import checkpoint_read

    damaged, count = [], 0
    for verdict in checkpoint_read.verify(workdir):
        count += 1
        if verdict.problem:
            damaged.append(verdict.step)
            yield f"checkpoint      step {verdict.step:,}, DAMAGED: {verdict.problem}"
        else:
            how = "equal to its checksums" if verdict.has_checksums else "readable (written without checksums)"
            yield f"checkpoint      step {verdict.step:,}, {readable_bytes(verdict.num_bytes)} of arrays, {how}"
    if not count:
        yield "checkpoint      none yet"
    if damaged:
        raise DamagedError(
            f"{len(damaged)} of {count} checkpoints of {workdir} are damaged, of steps {damaged}: training again "
            "puts those aside that are newer than the last readable one, and goes on from that"
        )


def readable_bytes(number: float) -> str:
    """A number of bytes with 4 digits and a unit."""
    for unit in ("bytes", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.4g} GiB"


def _size(folder: "epath.Path") -> int:
    return sum((path / name).stat().length for path, _, names in folder.walk() for name in names)
