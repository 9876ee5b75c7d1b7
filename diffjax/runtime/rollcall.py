"""All processes of a run meet before JAX is started, or every one of them says who is missing.

    roll = hold(place, {"config": text, "jax": version}, timeout_s=300)

Process 0 listens on the coordinator's port; each other one sends a line of JSON and waits for the answer. The
connections stay, for `heartbeat`. Other connections to the port are closed or ignored. JAX's own start waits as long,
but ends by an abort that names nobody.
"""

import errno
import json
import selectors
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from diffjax.runtime.guards import PREEMPTED_EXIT_CODE
from diffjax.runtime.launchers import PORT, Place, split_address
from diffjax.runtime.lines import Line

MAX_SKEW_S = 5.0  # of clocks, from which on it is said
_MAGIC = "diffjax roll call 1"
_LATE_S = 5.0  # that a refusal waits for those who come a little later
_RETRY_S = 0.2
_NEWS_S = 30.0
_RECORD = {"magic": str, "process": int, "num_processes": int, "host": str, "facts": dict, "clock": (int, float)}


class TogetherError(RuntimeError):
    """Not all processes came, or one left: the same command may be run again."""

    exit_code = PREEMPTED_EXIT_CODE


class Roll(NamedTuple):
    """hosts: names, by process. lines: to the others on process 0, to process 0 on the others; by process."""

    hosts: list[str]
    lines: dict[int, Line]


def hold(place: Place, facts: Mapping[str, str], timeout_s: float, clock: Callable[[], float] = time.time) -> Roll:
    """Wait until all processes are there.

    facts: name -> text that must be the same in all of them. timeout_s: for process 0 to wait for the others, and for
    the others to reach it. clock: compared with that of process 0, in seconds; a host whose clock is more than
    MAX_SKEW_S away is named in a warning.

    Raises TogetherError where not all came in time; ValueError, in all that came, for a number that two processes have,
    other numbers of processes, other facts, or a port that another program has.
    """
    record = {
        "magic": _MAGIC,
        "process": place.process_id,
        "num_processes": place.num_processes,
        "host": socket.gethostname(),
        "facts": dict(facts),
    }
    if place.process_id:
        return _report_in(place, record, timeout_s, clock)
    try:
        server = _server(place)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return _find_out(place, record, clock)
    with server:
        return _Call(place, record, clock).hold(server, timeout_s)


def bind_host(place: Place) -> str:
    """The address that process 0 listens on: all of this host, or only the local one."""
    host, _ = split_address(place.coordinator)
    return "127.0.0.1" if host in ("127.0.0.1", "localhost") else ""


def _server(place: Place) -> socket.socket:
    host, port = bind_host(place), split_address(place.coordinator)[1]
    both = not host and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server((host, port), family=family, dualstack_ipv6=both, backlog=1024)


def _find_out(place: Place, record: dict[str, Any], clock: Callable[[], float]) -> Roll:
    """The port is taken: by the roll call of another process 0, which answers, or by a stranger."""
    try:
        _report_in(place, record, _LATE_S, clock)
    except TogetherError:
        pass
    raise ValueError(
        f"port {split_address(place.coordinator)[1]} of this host is in use, perhaps by an earlier run that has not "
        f"ended: end it, or type DIFFJAX_COORDINATOR=HOST:PORT with a port other than {PORT}"
    )


# Process 0 -------------------------------------------------------------------------------------------------------


class _Call:
    """Process 0's side: who came, by number, and the connections that have not said who they are."""

    def __init__(self, place: Place, record: dict[str, Any], clock: Callable[[], float]) -> None:
        self._place, self._clock = place, clock
        self._came: dict[int, dict[str, Any]] = {0: record}
        self._lines: dict[int, Line] = {}
        self._refused: list[Line] = []
        self._problem = ""
        self._selector = selectors.DefaultSelector()

    def hold(self, server: socket.socket, timeout_s: float) -> Roll:
        server.setblocking(False)
        self._selector.register(server, selectors.EVENT_READ)
        lines: dict[int, Line] = {}
        try:
            self._wait(server, timeout_s)
            lines = self._lines
        finally:
            for key in list(self._selector.get_map().values()):
                if key.fileobj not in (server, *lines.values()):
                    key.fileobj.close()
            self._selector.close()
        return Roll(self._hosts(), lines)

    def _wait(self, server: socket.socket, timeout_s: float) -> None:
        """Until all came, and tell them."""
        start = said = time.monotonic()
        number = self._place.num_processes
        while len(self._came) < number and time.monotonic() - start < timeout_s and not self._problem:
            self._turn(server)
            if time.monotonic() - said > _NEWS_S:
                said = time.monotonic()
                _say(f"{len(self._came)} of {number} processes came, waiting for {self._missing()}")
        if self._problem:
            self._refuse(server)
        if len(self._came) < number:
            text = (
                f"{len(self._came)} of {number} processes came within {timeout_s:.0f} s; missing: {self._missing()}. "
                "Look at what they print, then run the same command again on all hosts"
            )
            _tell(self._lines.values(), {"kind": "refused", "text": text, "code": PREEMPTED_EXIT_CODE})
            raise TogetherError(text)
        _tell(self._lines.values(), {"kind": "complete", "hosts": self._hosts()})

    def _hosts(self) -> list[str]:
        return [self._came[process]["host"] for process in range(self._place.num_processes)]

    def _turn(self, server: socket.socket) -> None:
        """Take what comes in the next moment."""
        for key, _ in self._selector.select(_RETRY_S):
            if key.fileobj is server:
                connection, _ = server.accept()
                self._selector.register(Line(connection), selectors.EVENT_READ)
                continue
            line = key.fileobj
            try:
                for message in line.receive():
                    self._arrive(line, message)
            except ValueError:  # not one of ours
                line.ended = True
            if line.ended:
                self._drop(line)

    def _drop(self, line: Line) -> None:
        self._selector.unregister(line)
        line.close()
        for process in [process for process, known in self._lines.items() if known is line]:
            del self._lines[process], self._came[process]

    def _arrive(self, line: Line, record: dict[str, Any]) -> None:
        """Raises ValueError for what is no record."""
        if any(not isinstance(record.get(name), kind) for name, kind in _RECORD.items()) or record["magic"] != _MAGIC:
            raise ValueError("found something else than a record of the roll call")
        process, skew = record["process"], record["clock"] - self._clock()
        problem = self._conflict(record)
        if problem:
            self._problem = self._problem or problem
            self._refused.append(line)
            return
        self._came[process], self._lines[process] = record, line
        if abs(skew) > MAX_SKEW_S:
            ahead = "ahead of" if skew > 0 else "behind"
            _say(
                f"WARNING: the clock of {record['host']} (process {process}) is {abs(skew):.0f} s {ahead} that of "
                f"process 0 ({self._came[0]['host']}): times in logs of the hosts cannot be compared, set them by NTP"
            )

    def _conflict(self, record: dict[str, Any]) -> str:
        """What is wrong with a process beside those that came, "" for nothing."""
        process, host, own = record["process"], record["host"], self._came[0]
        number = self._place.num_processes
        if record["num_processes"] != number or not 0 <= process < number:
            return (
                f"process {process} ({host}) was started as one of {record['num_processes']}, process 0 "
                f"({own['host']}) as one of {number}: start all with the same number"
            )
        if process in self._came:
            other = self._came[process]["host"]
            return f"two processes have the number {process}, on {other} and {host}: give each its own"
        for name in sorted({*own["facts"], *record["facts"]}):
            ours, theirs = (str(facts.get(name, "nothing")) for facts in (own["facts"], record["facts"]))
            if ours != theirs:
                ours, theirs = _difference(ours, theirs)
                return (
                    f"process {process} ({host}) has another {name} than process 0 ({own['host']}): {theirs}, not "
                    f"{ours}. Start all with the same one"
                )
        return ""

    def _refuse(self, server: socket.socket) -> None:
        """Tell all, also those who come a little later."""
        until = time.monotonic() + _LATE_S
        told: set[int] = set()
        while time.monotonic() < until:
            for line in (*self._lines.values(), *self._refused):
                if id(line) not in told:
                    told.add(id(line))
                    _tell([line], {"kind": "refused", "text": self._problem, "code": 2})
            if len(self._came) + len(self._refused) >= self._place.num_processes:
                break
            self._turn(server)
        raise ValueError(self._problem)

    def _missing(self) -> str:
        absent = [process for process in range(self._place.num_processes) if process not in self._came]
        hosts = self._place.hosts
        return ", ".join(f"{process} ({hosts[process]})" if hosts else str(process) for process in absent)


def _difference(ours: str, theirs: str) -> tuple[str, str]:
    """The first line of each that the other lacks."""
    first, second = ours.splitlines(), theirs.splitlines()
    own = next((line for line in first if line not in second), "nothing in its place")
    other = next((line for line in second if line not in first), "nothing in its place")
    return own, other


def _tell(lines: Any, message: Mapping[str, Any]) -> None:
    for line in lines:
        line.send(message)
    until = time.monotonic() + 1
    while not all([line.flush() or line.ended for line in lines]) and time.monotonic() < until:
        time.sleep(0.01)


# The others ------------------------------------------------------------------------------------------------------


def _report_in(place: Place, record: dict[str, Any], timeout_s: float, clock: Callable[[], float]) -> Roll:
    address = split_address(place.coordinator)
    until = time.monotonic() + timeout_s
    reason = ""
    while time.monotonic() < until:
        try:
            with socket.create_connection(address, timeout=max(0.1, min(5.0, until - time.monotonic()))) as connection:
                line, answer = _ask(connection, {**record, "clock": clock()}, timeout_s)
            if answer["kind"] == "complete":
                return Roll(answer["hosts"], {0: line})
            line.close()
            kind = TogetherError if answer["code"] == PREEMPTED_EXIT_CODE else ValueError
            raise kind(answer["text"])
        except OSError as error:
            reason = error.strerror or str(error)
        except _StrangeAnswerError as error:
            reason = f"another program answers there: {error}"
        time.sleep(_RETRY_S)
    raise TogetherError(
        f"process {place.process_id} of {place.num_processes} did not reach process 0 at {place.coordinator} within "
        f"{timeout_s:.0f} s: {reason}. Look at what process 0 prints and whether a firewall closes the port, then run "
        "the same command again on all hosts"
    )


class _StrangeAnswerError(Exception):
    """Not from a roll call."""


def _ask(connection: socket.socket, record: dict[str, Any], timeout_s: float) -> tuple[Line, dict[str, Any]]:
    """The answer of process 0, which waits `timeout_s` itself. Raises OSError, _StrangeAnswerError."""
    if connection.getsockname() == connection.getpeername():  # TCP connects a free local port to itself
        raise ConnectionError("nothing listens there")
    connection.sendall(json.dumps(record).encode() + b"\n")
    line = Line(connection.dup())
    until = time.monotonic() + timeout_s + _LATE_S
    with selectors.DefaultSelector() as selector:
        selector.register(line, selectors.EVENT_READ)
        while time.monotonic() < until and not line.ended:
            selector.select(_RETRY_S)
            try:
                messages = line.receive()
            except ValueError as error:
                line.close()
                raise _StrangeAnswerError(error) from error
            if messages and messages[0].get("kind") in ("complete", "refused"):
                line.put_back(messages[1:])
                return line, messages[0]
    reason = "it closed the connection" if line.ended else "it did not answer"
    line.close()
    raise ConnectionError(reason)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
