"""Guards of a long run: non-finite numbers stop it, hangs print stacks, signals save first, and
compilations are counted.

Metrics reach the host late: `InFlight` holds the last few steps' device arrays and fetches the oldest
one, so that the device always has work queued and the host never runs further ahead than `limit`.
"""

import collections
import faulthandler
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType, TracebackType
from typing import Any, Self, TextIO

import jax

PREEMPTED_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: run the same command again to go on

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class NonFiniteError(RuntimeError):
    """A metric, gradient or saved array is not finite; the message says which, and at what step."""

    exit_code = 1


class Preempted(SystemExit):
    """A signal stopped the run after saving. As SystemExit it ends the process with code 75."""

    def __init__(self, step: int, signal_name: str) -> None:
        super().__init__(PREEMPTED_EXIT_CODE)
        self.step, self.signal_name = step, signal_name


def check_finite(step: int, metrics: Mapping[str, float], paths: Sequence[str]) -> None:
    """Raises NonFiniteError when a metric is not finite, `nonfinite_leaf` points at a parameter, or `nonfinite_sample`
    at a sample of the batch.

    step: 1-based count of finished steps. paths: `trees.paths` of the parameters.
    """
    bad = [f"{name} = {value}" for name, value in metrics.items() if not math.isfinite(value)]
    leaf, sample = (int(metrics.get(f"nonfinite_{what}", -1)) for what in ("leaf", "sample"))
    if not bad and leaf < 0 and sample < 0:
        return
    where = f"; first parameter with a non-finite gradient: {paths[leaf]}" if leaf >= 0 else ""
    where += f"; first sample of the batch that is not finite: {sample}" if sample >= 0 else ""
    raise NonFiniteError(
        f"step {step}: found non-finite {', '.join(bad) or ('gradients' if leaf >= 0 else 'states')}{where}. Nothing after the last checkpoint "
        f"is kept. Lower config.optim.learning_rate, set config.optim.clip_norm, or look at the batch of this step"
    )


class InFlight:
    """Bounded queue of steps in flight.

    limit: steps that may be queued on the device before the host waits for the oldest (0: wait for
    each). paths: of the parameters, for `check_finite`.
    """

    def __init__(self, limit: int, paths: Sequence[str]) -> None:
        if limit < 0:
            raise ValueError(f"found {limit} steps in flight: use 0 or more")
        self._limit, self._paths = limit, paths
        self._queue: collections.deque[tuple[int, Mapping[str, jax.Array]]] = collections.deque()

    def push(self, step: int, metrics: Mapping[str, jax.Array]) -> list[tuple[int, dict[str, float]]]:
        """Add the device metrics of `step`; returns (step, floats) of the steps that left the queue.

        Raises NonFiniteError for a step that left it.
        """
        self._queue.append((step, metrics))
        return self._pop(self._limit)

    def drain(self) -> list[tuple[int, dict[str, float]]]:
        """Wait for every step in flight; returns and raises like `push`."""
        return self._pop(0)

    def _pop(self, keep: int) -> list[tuple[int, dict[str, float]]]:
        done = []
        while len(self._queue) > keep:
            step, metrics = self._queue.popleft()
            values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
            check_finite(step, values, self._paths)
            done.append((step, values))
        return done


class StopSignal:
    """Context that turns SIGTERM and SIGINT into `received`, read at the next step boundary.

    A second SIGINT acts as if this guard were absent, so that a hung run can be ended by hand; further
    SIGTERMs (schedulers repeat them) change nothing. A SIGINT that the process was started to ignore
    (`command &` in a script) stays ignored.
    Handlers exist in the main thread only: elsewhere entering raises RuntimeError.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("signals reach the main thread only: start the run there")
        numbers = [signal.SIGTERM]
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            numbers.append(signal.SIGINT)
        for number in numbers:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, self._previous.pop(number, signal.SIG_DFL))

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


class Watchdog:
    """Context that prints the stacks of all threads when `beat` stays away for `timeout_s` seconds.

    It prints (again after each further timeout) and ends nothing: a slow step is not an error.
    0 turns it off. stream: a real file, default stderr. beside: a text to print beside the stacks, "" for none:
    `distributed.table` says which of several processes lags.
    """

    def __init__(self, timeout_s: float, stream: TextIO | None = None, beside: Callable[[], str] = lambda: "") -> None:
        self._timeout_s, self._stream, self._beside = timeout_s, stream, beside
        self._armed_at = 0.0
        self._left = threading.Event()

    def __enter__(self) -> Self:
        self._arm()
        if self._timeout_s:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._left.set()
        if self._timeout_s:
            faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """Say that the run is alive."""
        # arming starts a thread: not at every step
        if time.monotonic() - self._armed_at > self._timeout_s / 10:
            self._arm()

    def _arm(self) -> None:
        if self._timeout_s:
            faulthandler.dump_traceback_later(self._timeout_s, repeat=True, file=self._file())
            self._armed_at = time.monotonic()

    def _file(self) -> TextIO:
        return sys.__stderr__ if self._stream is None else self._stream

    def _watch(self) -> None:
        """Print the text beside. The stacks come from a thread that needs no Python: it prints even in a deadlock."""
        said_at = 0.0
        while not self._left.wait(self._timeout_s / 10):
            now = time.monotonic()
            if now - max(self._armed_at, said_at) > self._timeout_s:
                said_at = now
                if text := self._beside():
                    print(text, file=self._file(), flush=True)


class CompileCounter:
    """Context that counts XLA compilations by the name of the jitted function.

        with CompileCounter() as compilations:
            run(...)
        compilations.count("train_step")

    A program that comes from the persistent compilation cache counts too: what matters is that a new
    one was asked for.
    """

    def __init__(self) -> None:
        self._counts: collections.Counter[str] = collections.Counter()

    def count(self, name: str | None = None) -> int:
        """Compilations of the function `name`; of all functions for None."""
        return self._counts.total() if name is None else self._counts[name]

    def __enter__(self) -> Self:
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration: float, **facts: Any) -> None:
        if event == _COMPILE_EVENT:
            name = str(facts.get("fun_name", "unknown"))
            self._counts[name.removeprefix("jit_").removeprefix("jit(").removesuffix(")")] += 1
