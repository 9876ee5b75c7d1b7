"""Time accounts that survive restarts: where the seconds of a run went, over all its sessions."""

import contextlib
import time
from collections.abc import Iterator, Mapping


class Clock:
    """Seconds by account name ('train', 'data', 'checkpoint', ...).

        clock = Clock()
        with clock.account("data"):
            batch = next(batches)
        clock.state()  # {"data": 0.2, "total": 0.3}, JSON; Clock(saved) continues from it

    `total` counts from construction, so that it holds what no account does. An account opened inside
    another is subtracted from the outer one: accounts never count a second twice.
    """

    def __init__(self, saved: Mapping[str, float] | None = None) -> None:
        self._seconds = dict(saved or {})
        self._total_before = self._seconds.pop("total", 0.0)
        self._start = time.monotonic()
        self._inner = [0.0]  # seconds that accounts nested in each open account took

    @contextlib.contextmanager
    def account(self, name: str) -> Iterator[None]:
        """Book the duration of the block under `name`. Raises ValueError for the name 'total'."""
        if name == "total":
            raise ValueError("found the account name 'total', which is the sum: use another name")
        start = time.monotonic()
        self._inner.append(0.0)
        try:
            yield
        finally:
            duration = time.monotonic() - start
            self._seconds[name] = self._seconds.get(name, 0.0) + duration - self._inner.pop()
            self._inner[-1] += duration

    @property
    def total(self) -> float:
        """Seconds of this session and of the ones before it."""
        return self._total_before + time.monotonic() - self._start

    def state(self) -> dict[str, float]:
        """Accounts as plain JSON numbers, with 'total'."""
        return {**self._seconds, "total": self.total}
