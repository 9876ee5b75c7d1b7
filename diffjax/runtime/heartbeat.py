"""Who of the processes of a run lives, at which step, and what ends the others when one is lost.

A daemon thread in each process sends lines over the connections of the roll call: the others tell process 0, which
tells all. A process counts as lost when its connection breaks without a word (it was killed: seen at once) or nothing
came from it for `lost_after_s` of the own monotonic clock (its host is off, or the network), so clocks may differ.

A collective that waits for a lost process never returns, and cannot be cancelled: the thread prints what happened and
ends the process by os._exit. Code that holds Python's lock for `lost_after_s` keeps the thread from answering.
"""

import collections
import contextlib
import os
import queue
import selectors
import socket
import sys
import threading
import time
from typing import Any, NamedTuple

from diffjax.runtime.guards import PREEMPTED_EXIT_CODE
from diffjax.runtime.lines import Line
from diffjax.runtime.rollcall import Roll, TogetherError

_GRACE_S = 2.0  # for this process to end by itself, when another one tells that it ends by an error
_TOLD_S = 2.0  # that telling the others may take
_LINGER_S = 0.2  # of process 0: what is on its way is lost when a connection ends with lines unread
END = "end of the run"


class Row(NamedTuple):
    """What is known of a process: its last step, seconds since then, the barriers that it waits at or passed last."""

    step: int = 0
    age_s: float = 0.0
    where: str = ""


class Peers:
    """The processes of a run, as one of them sees the others.

    roll: of `rollcall.hold`. The thread runs from here until `leave`, or until it ends the process.
    """

    def __init__(self, process: int, roll: Roll, lost_after_s: float) -> None:
        self.process, self.hosts, self.lost_after_s = process, roll.hosts, lost_after_s
        self._lines = dict(roll.lines)
        self._rows = [Row() for _ in roll.hosts]
        now = time.monotonic()
        self._heard = {other: now for other in self._lines}
        self._step, self._step_at, self._where = 0, now, ""
        self._saved: int | None = None
        self._came: collections.defaultdict[str, set[int]] = collections.defaultdict(set)  # process 0: by barrier
        self._open: dict[str, threading.Event] = {}
        self._numbers: collections.Counter[str] = collections.Counter()  # of the barriers of a name
        self._commands: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._told = threading.Event()
        self._leaving = self._over = False
        self._until: float | None = None  # when the thread ends
        self._wakes, self._wake = socket.socketpair()
        self._wakes.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    # For the main thread

    def beat(self, step: int) -> None:
        """Say that `step` steps are done."""
        self._step, self._step_at = step, time.monotonic()

    def saved(self, step: int) -> None:
        """Say that the checkpoint of `step` is whole."""
        self._saved = step

    def name(self, process: int) -> str:
        """How messages call a process."""
        return f"process {process} of {len(self.hosts)} ({self.hosts[process]})"

    def barrier(self, name: str, timeout_s: float) -> None:
        """Wait until all processes have called this with the same name as often. Raises TogetherError after
        `timeout_s`, with those who have not come and where they are."""
        self._numbers[name] += 1
        key = f"{name} {self._numbers[name]}"
        self._where = f"waiting at barrier {key!r}"
        opened = self._open[key] = threading.Event()
        self._command({"kind": "came", "name": key})
        if not opened.wait(timeout_s):
            absent = [i for i, row in enumerate(self._rows) if i != self.process and f"{key!r}" not in row.where]
            lines = "; ".join(f"{self.name(i)}, at {_place(self._rows[i])}" for i in absent)
            raise TogetherError(
                f"barrier {name!r}: {len(self.hosts) - len(absent)} of {len(self.hosts)} processes came within "
                f"{timeout_s:.0f} s, not {lines}"
            )
        del self._open[key]
        self._where = f"past barrier {key!r}"

    def fail(self, text: str, code: int) -> None:
        """Tell the others that this process ends by an error of its own: they print it and end with its code."""
        self._leaving = True
        self._command({"kind": "fail", "process": self.process, "text": text, "code": code})
        self._told.wait(_TOLD_S)

    def leave(self) -> None:
        """Stop the thread, after the barrier END."""
        self._command({"kind": "bye"})
        self._thread.join(2 * _TOLD_S)

    def table(self) -> str:
        """Process, host, step, seconds since its last step, slowest first."""
        rows = [*self._rows]
        rows[self.process] = self._own()
        order = sorted(range(len(rows)), key=lambda i: (rows[i].step, -rows[i].age_s))
        lines = ["process  step      seconds ago  host"]
        lines += [f"{i:<8d} {rows[i].step:<9,d} {rows[i].age_s:<12.0f} {self.hosts[i]}  {rows[i].where}" for i in order]
        return "\n".join(line.rstrip() for line in lines)

    # For the thread

    def _command(self, message: dict[str, Any]) -> None:
        self._commands.put(message)
        self._wake.send(b"!")

    def _own(self) -> Row:
        return Row(self._step, time.monotonic() - self._step_at, self._where)

    def _run(self) -> None:
        every = min(3.0, self.lost_after_s / 10)
        sent = 0.0
        with selectors.DefaultSelector() as selector:
            for source in (self._wakes, *self._lines.values()):
                selector.register(source, selectors.EVENT_READ)
            while self._until is None or (self._lines and time.monotonic() < self._until):
                for key, _ in selector.select(every / 2):
                    if key.fileobj is self._wakes:
                        self._wakes.recv(4096)
                while not self._commands.empty():
                    self._take(self.process, self._commands.get())
                for other, line in list(self._lines.items()):
                    if why := self._read(other, line):
                        selector.unregister(line)
                        line.close()
                        self._part(other, why)
                if time.monotonic() - sent > every:
                    sent = time.monotonic()
                    self._send_rows()
        for end in (self._wakes, self._wake, *self._lines.values()):
            end.close()

    def _read(self, other: int, line: Line) -> str:
        """What came; returns why nothing more will, "" while the connection holds."""
        line.flush()
        try:
            for message in line.receive():
                self._heard[other] = time.monotonic()
                self._take(other, message)
        except (ValueError, KeyError, TypeError) as error:
            return f"it sent what nobody understands, {error}"
        if line.ended:
            return "its connection broke"
        silent = time.monotonic() - self._heard[other] > self.lost_after_s
        return f"nothing came from it for {self.lost_after_s:.0f} s" if silent else ""

    def _send_rows(self) -> None:
        self._rows[self.process] = self._own()
        if self.process:
            self._send({"kind": "row", "row": self._rows[self.process]})
        else:
            self._send({"kind": "rows", "rows": self._rows})

    def _take(self, sender: int, message: dict[str, Any]) -> None:
        """A message of another process, or a command of this one."""
        kind = message["kind"]
        if kind == "rows":
            self._rows = [Row(*row) for row in message["rows"]]
        elif kind == "row":
            self._rows[sender] = Row(*message["row"])
        elif kind == "came":
            self._arrive(sender, message)
        elif kind == "open":
            self._over = self._over or message["name"] == f"{END} 1"
            self._open[message["name"]].set()
        elif kind == "bye":
            self._until = time.monotonic() + (_LINGER_S if self.process else _TOLD_S)
        elif kind == "fail":
            if self.process in (0, sender):
                self._send(message)
            self._end(f"{self.name(message['process'])} ended: {message['text']}", message["code"], message["process"])
        elif kind == "lost":
            self._lost(message["process"], message["step"], message["why"])

    def _arrive(self, sender: int, message: dict[str, Any]) -> None:
        if self.process:
            self._send_rows()  # where this one is, before another gives up
            self._send(message)
            return
        name = message["name"]
        self._came[name].add(sender)
        self._send_rows()
        if len(self._came[name]) == len(self.hosts):
            del self._came[name]
            self._send({"kind": "open", "name": name})
            self._take(0, {"kind": "open", "name": name})

    def _part(self, other: int, why: str) -> None:
        """A connection has ended."""
        del self._lines[other]
        if self._over or self._leaving:
            return
        step = self._rows[other].step
        self._send({"kind": "lost", "process": other, "step": step, "why": why})
        self._lost(other, step, why)

    def _lost(self, other: int, step: int, why: str) -> None:
        again = "run the same command again on all hosts"
        if self._saved is not None:
            again += f" to go on: it resumes from step {self._saved:,} or a later one"
        text = f"{self.name(other)} was lost, last heard of at step {step:,}: {why}; {again}"
        self._end(text, PREEMPTED_EXIT_CODE, other)

    def _send(self, message: dict[str, Any]) -> None:
        for line in self._lines.values():
            line.send(message)

    def _end(self, text: str, code: int, process: int) -> None:
        """End this process, unless it is ending by an error of its own."""
        until = time.monotonic() + _TOLD_S / 2
        while not all([line.flush() or line.ended for line in self._lines.values()]) and time.monotonic() < until:
            time.sleep(0.01)
        if not self.process:
            time.sleep(_LINGER_S)
        self._told.set()
        if process != self.process and code != PREEMPTED_EXIT_CODE:
            time.sleep(_GRACE_S)  # the same error may have come up here
        if not self._leaving:
            stop(code, f"error: {text}\n")


def stop(code: int, text: str) -> None:
    """End the process now, with a last text on stderr: what JAX and other threads still wait for may never come, and
    nobody may read any more, or the disk of the log be full."""
    for stream, last in ((sys.stdout, ""), (sys.stderr, text)):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # a broken pipe, a closed stream, none
            stream.write(last)
            stream.flush()
    os._exit(code)


def _place(row: Row) -> str:
    return f"step {row.step:,}, {row.age_s:.0f} s ago" + (f", {row.where}" if row.where else "")
