"""Several processes as one run: they start together or say who is missing, and end together or say who was lost.

    place = launchers.find(os.environ)
    with distributed.session(place, {"config": text}):       # before the first computation; place None: one process
        ...
        distributed.beat(step)                               # at each step
        distributed.barrier("report", timeout_s=600)

How each way to end looks in all processes: exit code 0 together behind a last barrier; the code and the message of the
process that ends by an error; 75, "run the same command again", where one was lost or did not come.
"""

import contextlib
import glob
import os
import re
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax

from diffjax.runtime import heartbeat, relay, report, rollcall
from diffjax.runtime.guards import PREEMPTED_EXIT_CODE
from diffjax.runtime.launchers import Place, split_address

START_TIMEOUT_S = 300.0
LOST_AFTER_S = 30.0
_END_TIMEOUT_S = 1800.0  # that those who are done wait for the last, which lives: it may be drawing a report
_INITIALIZE_S = 60
# what XLA raises for a mistake of this process alone; any other status may come from a lost one
_OWN_FAULT = re.compile(r"(RESOURCE_EXHAUSTED|INVALID_ARGUMENT|UNIMPLEMENTED|NOT_FOUND)\b")
# the first collective waits half a minute for the slowest host
_LATE = re.compile(r"DEADLINE_EXCEEDED|Gloo context initialization failed|Getting local topologies failed")
_STATUS = re.compile(r"[A-Z]+(_[A-Z]+)*: ")

_peers: heartbeat.Peers | None = None


class Ending(NamedTuple):
    """What an error that ends a process says, its exit code, and whether this process shows the stack."""

    text: str
    code: int
    stack: bool = False


def ending(error: BaseException) -> Ending:
    """Of any error: its code is its `exit_code`, or 1."""
    if isinstance(error, SystemExit):
        return Ending(f"exit code {error.code}", error.code if isinstance(error.code, int) else 1)
    if isinstance(error, KeyboardInterrupt):
        return Ending("interrupted", 130)
    return Ending(f"{type(error).__name__}: {error}", getattr(error, "exit_code", 1), stack=True)


@contextlib.contextmanager
def session(
    place: Place | None,
    facts: Mapping[str, str],
    *,
    ending: Callable[[BaseException], Ending] = ending,
    timeout_s: float = START_TIMEOUT_S,
    lost_after_s: float = LOST_AFTER_S,
    clock: Callable[[], float] = time.time,
) -> Iterator[None]:
    """Enter as one of several processes; nothing happens for `place` None.

    facts: what must be the same in all processes, name -> text; the versions of diffjax and JAX are added. ending: the
    message and the exit code of an error. timeout_s, clock: see `rollcall.hold`. lost_after_s: see `heartbeat`.

    Raises what `rollcall.hold` raises. An error inside the block ends the process: printed, told to the others, and by
    os._exit, since a clean end waits for processes that are gone. SystemExit with code 75 is a stop of all: they leave
    together.
    """
    global _peers
    if place is None:
        yield
        return
    versions = {name: version for name, version in report.versions().items() if name in ("diffjax", "jax", "jaxlib")}
    roll = rollcall.hold(place, {**facts, **versions}, timeout_s, clock)
    _peers = heartbeat.Peers(place.process_id, roll, lost_after_s)
    try:
        _initialize(place, roll.hosts, lost_after_s)
        try:
            yield
        except SystemExit as stop:
            if stop.code not in (0, None, PREEMPTED_EXIT_CODE):
                raise
            _finish(lost_after_s)  # they have saved together
            raise
        else:
            _finish(_END_TIMEOUT_S)
    except SystemExit as stop:
        if _peers is not None:
            _fail(stop, ending)
        raise
    except BaseException as error:
        _fail(error, ending)


def barrier(name: str, timeout_s: float) -> None:
    """Wait until all processes are here. Raises rollcall.TogetherError, naming who has not come and where they are,
    after `timeout_s`."""
    if _peers is not None:
        _peers.barrier(name, timeout_s)


def beat(step: int) -> None:
    """Tell the others how many steps are done."""
    if _peers is not None:
        _peers.beat(step)


def saved(step: int) -> None:
    """Tell this process what it would resume from, for the message of its end."""
    if _peers is not None:
        _peers.saved(step)


def table() -> str:
    """Where each process is, slowest first: lines of process, step, seconds since it, host. "" for one process."""
    return "" if _peers is None else _peers.table()


def _initialize(place: Place, hosts: list[str], lost_after_s: float) -> None:
    host, port = split_address(place.coordinator)
    if place.process_id:
        port = relay.open_relay(host, port)
    os.environ.setdefault("no_grpc_proxy", "127.0.0.1")  # what follows is local: no proxy of the network is asked
    jax.config.update("jax_check_proxy_envs", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from guards.StopSignal
    jax.distributed.initialize(
        f"127.0.0.1:{port}",
        place.num_processes,
        place.process_id,
        local_device_ids=_own_gpus(os.environ, hosts, place.process_id),
        cluster_detection_method="deactivate",
        initialization_timeout=_INITIALIZE_S,
        heartbeat_timeout_seconds=max(600, int(10 * lost_after_s)),  # `heartbeat` is first
        shutdown_timeout_seconds=_INITIALIZE_S,
        coordinator_bind_address=f"{rollcall.bind_host(place) or '[::]'}:{port}",
    )


def _own_gpus(environ: Mapping[str, str], hosts: list[str], process: int) -> list[int] | None:
    """The share of this process in the GPUs of a host that several processes share; None where there is nothing to
    share, or the launcher has shared them out."""
    local = [i for i, host in enumerate(hosts) if host == hosts[process]]
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    count = len(glob.glob("/dev/nvidia[0-9]*")) if visible is None else len(list(filter(None, visible.split(","))))
    share = count // len(local)
    if len(local) == 1 or not share:
        return None
    first = local.index(process) * share
    return list(range(first, first + share))


def _finish(timeout_s: float) -> None:
    """Leave together."""
    global _peers
    _peers.barrier(heartbeat.END, timeout_s)
    jax.distributed.shutdown()
    _peers.leave()
    _peers = None


def _fail(error: BaseException, ending: Callable[[BaseException], Ending]) -> None:
    """Tell the others, print and end. Where a collective broke, a lost process is the likely reason: the thread of
    `heartbeat` gets the time to find it, and ends this process."""
    if _collective_broke(error):
        time.sleep(1.5 * _peers.lost_after_s)
    end = ending(error)
    if _LATE.search(end.text):
        end = Ending(f"{end.text}\nThe processes did not meet in time: run the same command again", PREEMPTED_EXIT_CODE)
    _peers.fail(end.text, end.code)
    heartbeat.stop(end.code, "".join(traceback.format_exception(error)) if end.stack else f"error: {end.text}\n")


def _collective_broke(error: BaseException | None) -> bool:
    """Whether XLA raised it, or what it comes from."""
    while error is not None:
        text = str(error)
        # an error inside a program arrives as ValueError, "UNKNOWN: Gloo all-reduce failed: ..."
        is_status = isinstance(error, ValueError) and _STATUS.match(text)
        if (is_status or isinstance(error, jax.errors.JaxRuntimeError)) and not _OWN_FAULT.match(text):
            return True
        error = error.__cause__ or error.__context__
    return False
