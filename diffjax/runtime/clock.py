"""Time accounts that survive restarts: where the seconds of a run went, over all its sessions.

    goodput = train / total

`train` holds the steps that count. The rest is what a run costs besides: `start` (from the beginning of a session to
its first batch: reading the checkpoint, opening the data), `compile` (the first step of a session), `data` (waiting for
batches), `checkpoint`, `hooks`, `lost`, and what no account holds.

Lost are the steps that a stopped session had done since the checkpoint from which the next one goes on. The checkpoint
has the accounts of the steps that count, WORKDIR/goodput.json those of all that was spent; it is written at each log
line and checkpoint, so that a kill hides what came after the last one. The time between two sessions is no account's.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from diffjax.runtime import report

FILE_NAME = "goodput.json"

_PRODUCTIVE = "train"
_REPEATED = ("train", "data", "hooks")  # what is done again from the checkpoint on


class Clock:
    """Seconds by account name ('train', 'data', 'checkpoint', ...).

        clock = Clock()
        with clock.account("data"):
            batch = next(batches)
        clock.state()  # {"data": 0.2, "total": 0.3}, JSON; Clock(saved) continues from it

    `total` counts from construction, so that it holds what no account does, or from `started`, a time of `now`: what
    lies between the two is booked under 'start'. An account opened inside another is subtracted from the outer one:
    accounts never count a second twice.
    """

    def __init__(
        self,
        saved: Mapping[str, float] | None = None,
        started: float | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._seconds = dict(saved or {})
        self._total_before = self._seconds.pop("total", 0.0)
        self._now = now
        self._start = now()
        self._inner = [0.0]  # seconds that accounts nested in each open account took
        if started is not None:
            self._seconds["start"] = self._seconds.get("start", 0.0) + self._start - started
            self._start = started

    @contextlib.contextmanager
    def account(self, name: str) -> Iterator[None]:
        """Book the duration of the block under `name`. Raises ValueError for the name 'total'."""
        if name == "total":
            raise ValueError("found the account name 'total', which is the sum: use another name")
        start = self._now()
        self._inner.append(0.0)
        try:
            yield
        finally:
            duration = self._now() - start
            self._seconds[name] = self._seconds.get(name, 0.0) + duration - self._inner.pop()
            self._inner[-1] += duration

    @property
    def total(self) -> float:
        """Seconds of this session and of the ones before it."""
        return self._total_before + self._now() - self._start

    @property
    def goodput(self) -> float:
        """Share of the seconds, over all sessions, that went into steps which count; 0 before the first."""
        total = self.total
        return self._seconds.get(_PRODUCTIVE, 0.0) / total if total > 0 else 0.0

    def state(self) -> dict[str, float]:
        """Accounts as plain JSON numbers, with 'total'."""
        return {**self._seconds, "total": self.total}

    def write(self, workdir: str | os.PathLike[str]) -> None:
        """Keep what was spent so far in WORKDIR/goodput.json, replaced atomically; one process of a run does this."""
        report.write_text(Path(workdir) / FILE_NAME, json.dumps(self.state()) + "\n")


def carried_over(
    workdir: str | os.PathLike[str], saved: Mapping[str, float] | None, say: Callable[[str], None]
) -> dict[str, float]:
    """Accounts that the next session starts with, `Clock(carried_over(...))`: steps after the checkpoint are lost.

    saved: accounts of the checkpoint it goes on from; None for a start from the beginning. A goodput.json that is
    damaged stops nothing: it is said, and what was lost until now is not counted.
    """
    saved, spent = dict(saved or {}), _read(Path(workdir) / FILE_NAME, say)
    if spent.get("total", 0.0) <= saved.get("total", 0.0):  # the checkpoint is newer, or there is nothing else
        return saved
    kept = spent | {name: saved.get(name, 0.0) for name in _REPEATED}
    kept["lost"] = kept.get("lost", 0.0) + sum(spent.get(name, 0.0) - kept[name] for name in _REPEATED)
    return kept


def _read(path: Path, say: Callable[[str], None]) -> dict[str, float]:
    if not path.exists():
        return {}
    try:
        return {name: float(seconds) for name, seconds in json.loads(path.read_text(encoding="utf-8")).items()}
    except (ValueError, TypeError, AttributeError) as error:
        say(f"WARNING: {path} is damaged ({error}): time lost before this session is not counted")
        return {}
