"""Run a command as several processes on this machine, as on several hosts. Standard library only.

    python launch/processes.py --processes=2 --retries=3 -- python -m diffjax.cli.train --config=... --workdir=...

Each process finds DIFFJAX_COORDINATOR, DIFFJAX_NUM_PROCESSES and DIFFJAX_PROCESS_ID (see diffjax.runtime.launchers),
runs on its share of the cores and makes its share of the CPU devices that XLA_FLAGS asks for. Its lines begin with its
number. SIGINT and SIGTERM go to all, a closed terminal as SIGTERM. After the first end that is not a clean one the others
have PATIENCE_S to follow; helpers that outlive all of them are ended.
Run by launch/local.sh.

Ends with the worst code of them: 0; 75, run it again, which also stands for a process that was killed; else an error.
"""

import argparse
import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import BinaryIO

PREEMPTED_EXIT_CODE = 75  # of diffjax.runtime.guards
PATIENCE_S = 120.0
HELPERS_S = 10.0

_COUNT = re.compile(r"--xla_force_host_platform_device_count=(\d+)")


def variables(number: int, own: int, coordinator: str, flags: str) -> dict[str, str]:
    """What process `own` of `number` finds in its environment; flags: XLA_FLAGS of all of them together.

    Raises ValueError where the devices cannot be shared out evenly.
    """
    found = _COUNT.search(flags)
    devices = int(found[1]) if found else number
    if devices % number:
        raise ValueError(
            f"found {devices} CPU devices in XLA_FLAGS, expected a multiple of --processes={number}: change one"
        )
    if number == 1:
        return {}
    share = f"--xla_force_host_platform_device_count={devices // number}"
    return {
        "DIFFJAX_COORDINATOR": coordinator, "DIFFJAX_NUM_PROCESSES": str(number), "DIFFJAX_PROCESS_ID": str(own),
        "XLA_FLAGS": _COUNT.sub(share, flags) if found else f"{flags} {share}".strip(),
    }  # fmt: skip


def core_shares(cores: Sequence[int], number: int) -> list[list[int]]:
    """Cores of each process: disjoint where there are enough."""
    cores = sorted(cores)
    return [cores[i::number] or [cores[i % len(cores)]] for i in range(number)]


def worst(codes: Sequence[int]) -> int:
    """The code for all of them; negative ones are signals that killed a process."""
    errors = [code for code in codes if code > 0 and code != PREEMPTED_EXIT_CODE]
    return max(errors) if errors else PREEMPTED_EXIT_CODE if any(codes) else 0


class Round:
    """The processes of one start."""

    def __init__(self, command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> None:
        self._command, self._environments = command, environments
        self._running: list[subprocess.Popen] = []
        self._lock = threading.Lock()  # a line is printed whole
        self.stopped = 0  # the signal that ended it

    def stop(self, number: int, frame: object = None) -> None:
        """Pass a signal on to all."""
        self.stopped = number
        for process in self._running:
            if process.poll() is None:
                process.send_signal(number)

    def run(self) -> list[int]:
        """Start all, print their lines, wait; returns their codes."""
        pumps = []
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
        shares = core_shares(cores, len(self._environments)) if cores else [None] * len(self._environments)
        for i, (environment, share) in enumerate(zip(self._environments, shares, strict=True)):
            if share:
                os.sched_setaffinity(0, share)  # inherited
            process = subprocess.Popen(
                self._command, env={**os.environ, "PYTHONUNBUFFERED": "1", **environment}, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
            if cores:
                os.sched_setaffinity(0, cores)
            self._running.append(process)
            for source, target in ((process.stdout, sys.stdout.buffer), (process.stderr, sys.stderr.buffer)):
                pumps.append(threading.Thread(target=self._pump, args=(f"[{i}] ".encode(), source, target)))
                pumps[-1].start()
        if self.stopped:  # while they were started
            self.stop(self.stopped)
        self._wait()
        until = time.monotonic() + HELPERS_S
        for pump in pumps:
            pump.join(max(until - time.monotonic(), 0))
        for process in self._running:  # its session: a helper that outlives it may hold its pipes for ever
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        for pump in pumps:
            pump.join()
        return [process.returncode for process in self._running]

    def _wait(self) -> None:
        deadline = None
        while any(process.poll() is None for process in self._running):
            time.sleep(0.1)
            if deadline is None and any(process.returncode for process in self._running):
                deadline = time.monotonic() + PATIENCE_S
            if deadline is not None and time.monotonic() > deadline:
                for process in self._running:
                    process.kill()

    def _pump(self, mark: bytes, source: BinaryIO, target: BinaryIO) -> None:
        for line in source:
            # where nobody reads any more the lines still have to be taken, or the process would wait for it
            with self._lock, contextlib.suppress(OSError):
                target.write(mark + line.rstrip(b"\n") + b"\n")
                target.flush()


def free_address() -> str:
    """An address of this machine whose port nobody uses now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def run(command: Sequence[str], number: int, retries: int) -> int:
    """Start `number` processes, again while they end with 75; returns the code."""
    for again in range(retries, -1, -1):
        coordinator = free_address()
        flags = os.environ.get("XLA_FLAGS", "")
        now = Round(command, [variables(number, i, coordinator, flags) for i in range(number)])
        for signal_number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signal_number, now.stop)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # which nohup asks for
            signal.signal(signal.SIGHUP, lambda *_: now.stop(signal.SIGTERM))
        codes = now.run()
        code = worst(codes)
        if code == 0 or now.stopped or code != PREEMPTED_EXIT_CODE:
            break
        print(f"processes ended with codes {codes}; starts left: {again}", file=sys.stderr, flush=True)
    return code


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--retries", type=int, default=0)
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("command", nargs="+")
    values = parser.parse_args(argv)
    try:
        flags = os.environ.get("XLA_FLAGS", "")
        shown = [variables(values.processes, i, "127.0.0.1:PORT", flags) for i in range(values.processes)]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not values.dry_run:
        return run(values.command, values.processes, values.retries)
    for i, environment in enumerate(shown):
        words = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
        print(f"[{i}]", *words, shlex.join(values.command))
    print(f"with a free PORT; started again at most {values.retries} times after code {PREEMPTED_EXIT_CODE}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
