"""Profile of a few train steps: a trace for xprof, and its figures as a table.

    with profile.Profile("runs/demo", steps=10, say=print) as tracer:
        for step in range(1, 100):
            ...
            tracer.step(step, wait)  # at each step boundary; wait() for the steps in flight

Writes runs/demo/profile/summary.md and summary.json; the trace itself lies beside them and is read by
`xprof runs/demo/profile` (pip install xprof) or, its .trace.json.gz, by ui.perfetto.dev.
"""

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import jax

from diffjax.runtime import report, traces

FOLDER = "profile"

_ROWS = 15  # operations in the table


class Profile:
    """Context that traces `steps` train steps of a session, from its third one on: the first compiles, and the second
    still waits for it. 0 traces none; of several processes the first one traces its own devices.

    say: prints a line. A run that ends earlier has the steps there were; one that fails leaves the trace alone.
    """

    def __init__(self, workdir: str | os.PathLike[str], steps: int, say: Callable[[str], None]) -> None:
        self._folder, self._say = Path(workdir) / FOLDER, say
        self._left = steps if jax.process_index() == 0 else 0  # steps still to be traced
        self._traced = self._boundaries = 0
        self._annotation: jax.profiler.StepTraceAnnotation | None = None  # of the step that is being traced
        self._trace = Path()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._annotation is not None:
            self._stop(summary=error is None)
        if self._left and not self._traced and error is None:
            self._say("no profile: the session ended within its first three steps, which are not traced")

    def step(self, step: int, wait: Callable[[], object]) -> None:
        """Say that `step` steps of the run were started.

        wait: until they are done, so that the trace holds its steps whole; called before the first and behind the last of
        them, of several processes by the first alone.
        """
        if not self._left:
            return
        self._boundaries += 1
        if self._annotation is not None:
            self._left, self._traced = self._left - 1, self._traced + 1
            if not self._left:
                wait()
            self._annotation.__exit__(None, None, None)
            if not self._left:
                self._stop(summary=True)
                return
        elif self._boundaries == 2:
            wait()
            self._start(step)
        if self._boundaries >= 2:
            self._annotation = jax.profiler.StepTraceAnnotation(traces.STEP_NAME, step_num=step + 1)
            self._annotation.__enter__()

    def _start(self, step: int) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # a line for each Python call would be most of the trace
        options.session_id = f"step_{step:08d}"
        self._trace = self._folder / "plugins" / "profile" / options.session_id
        jax.profiler.start_trace(self._folder, profiler_options=options)

    def _stop(self, summary: bool) -> None:
        jax.profiler.stop_trace()
        self._annotation = None  # only now: one that is given up before would put an unfinished step into the trace
        if not summary or not self._traced:
            return
        trace = max(self._trace.glob("*.xplane.pb"), key=os.path.getmtime)  # a host before this one may have left its own
        try:
            self._say(f"profile: {write(self._folder, traces.summarise(trace))}")
        except ValueError as error:  # the run goes on: the trace is there for xprof
            self._say(f"no summary of the profile: {error}")


def write(folder: str | os.PathLike[str], summary: traces.Summary) -> Path:
    """Write `summary.md` and `summary.json` into `folder`; returns the Markdown path."""
    steps = {
        "steps": len(summary.step_ms), "devices": summary.devices, "mean_ms": summary.mean_ms,
        "spread_ms": summary.spread_ms, "min_ms": min(summary.step_ms), "max_ms": max(summary.step_ms),
    }  # fmt: skip
    shares = [
        {"time": kind, "share": share, "ms_per_step": share * summary.mean_ms} for kind, share in summary.shares.items()
    ]
    longest = [
        {"operation": row.operation, "kind": row.kind, "self_ms": row.self_ms, "share": row.share, "calls": row.calls}
        for row in summary.operations[:_ROWS]
    ]
    sections = [
        ("Steps", "Between step boundaries of the host; the spread is a standard deviation.\n\n<!-- table: steps -->"),
        (
            "Where the time goes",
            "Mean over devices. Collectives and transfers as far as no computation hides them; host gaps are the time "
            "in which a device has nothing to do.\n\n<!-- table: shares -->",
        ),
        (
            f"Operations, the {len(longest)} longest of {len(summary.operations)}",
            "Self time and calls per step and device.\n\n<!-- table: operations -->",
        ),
    ]
    tables = {"steps": [steps], "shares": shares, "operations": longest}
    return report.write_report(folder, "Profile", sections, tables, name="summary")
