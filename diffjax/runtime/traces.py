"""What a trace of the profiler holds, in a few figures: step times, where devices spend them, the longest operations.

    summarise("runs/demo/profile/plugins/profile/step_00000003/host.xplane.pb").shares

An operation's self time is its own without that of the operations inside it (a loop has a body). Each instant of a
device is given to one of KINDS: to compute where any operation computes; else to a collective or a transfer where one
runs, which therefore count as far as nothing hides them; else the device waits for the host.
"""

import collections
import itertools
import os
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from jax.profiler import ProfileData

KINDS = ("compute", "collectives", "transfers", "host gaps")
STEP_NAME = "train_step"  # of the annotations that mark steps

_DEVICE = re.compile(r"/device:\w+:\d+")  # in whole: the parts of a TPU have longer names
_COLLECTIVE = re.compile(
    r"all-?reduce|all-?gather|reduce-?scatter|all-?to-?all|collective|nccl|\bsend|\brecv|megascale", re.IGNORECASE
)
_TRANSFER = re.compile(r"memcpy|infeed|outfeed|copy-(start|done)|transfer", re.IGNORECASE)


class Span(NamedTuple):
    """An operation, or a piece of it, from `start` to `end` in ns."""

    start: float
    end: float
    name: str
    kind: str


class Operation(NamedTuple):
    """Self time and calls of an operation, per step and device."""

    operation: str
    kind: str
    self_ms: float
    share: float  # of the traced time
    calls: float


class Summary(NamedTuple):
    """Figures of a trace. step_ms: of each traced step. shares: kind -> share of the devices' time, 1 in all.
    operations: by self time, longest first."""

    devices: int
    step_ms: Sequence[float]
    shares: dict[str, float]
    operations: Sequence[Operation]

    @property
    def mean_ms(self) -> float:
        """Mean of the step times."""
        return statistics.fmean(self.step_ms)

    @property
    def spread_ms(self) -> float:
        """Standard deviation of the step times; 0 for a single step."""
        return statistics.stdev(self.step_ms) if len(self.step_ms) > 1 else 0.0


def summarise(path: str | os.PathLike[str]) -> Summary:
    """Figures of an .xplane.pb file, between the start of its first step and the end of its last one.

    Raises ValueError for a trace without steps or without operations.
    """
    planes = list(ProfileData.from_file(os.fspath(path)).planes)
    steps = sorted(_steps(planes))
    if not steps:
        raise ValueError(f"{path} holds no annotation {STEP_NAME!r}: trace at least one whole step")
    start, end = steps[0][0], max(step[1] for step in steps)
    spans: list[Span] = []
    own: dict[str, list[Span]] = collections.defaultdict(list)  # device -> pieces
    for device, line in _lines(planes):
        line = [_clipped(span, start, end) for span in line if span.start < end and span.end > start]
        spans += line
        own[device] += pieces(line)
    if not spans:
        raise ValueError(f"{path} holds no operation of a device within its {len(steps)} steps")
    whole = len(own) * (end - start)
    times = [split(device, start, end) for device in own.values()]
    shares = {kind: sum(time[kind] for time in times) / whole for kind in KINDS}
    step_ms = [(after - before) / 1e6 for before, after in steps]
    return Summary(len(own), step_ms, shares, _operations(spans, own, whole, len(own) * len(steps)))


def pieces(spans: Iterable[Span]) -> list[Span]:
    """The self time of operations on one line, where one lies inside another: pieces that do not overlap, in order."""
    found, open_spans, at = [], [], 0.0

    def advance(until: float) -> None:
        """Give what lies between `at` and `until` to the innermost open operation; close those that end there."""
        nonlocal at
        while open_spans:
            inner = open_spans[-1]
            stop = min(inner.end, until)
            if stop > at:
                found.append(inner._replace(start=at, end=stop))
                at = stop
            if inner.end > until:
                return
            open_spans.pop()

    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        advance(span.start)
        at = span.start
        open_spans.append(span)
    advance(float("inf"))
    return found


def split(spans: Iterable[Span], start: float, end: float) -> dict[str, float]:
    """Kind -> ns between `start` and `end`; where pieces of several lines overlap, the earlier of KINDS has the time."""
    changes = sorted([(span.start, span.kind, 1) for span in spans] + [(span.end, span.kind, -1) for span in spans])
    time, running, at = dict.fromkeys(KINDS, 0.0), collections.Counter(), start
    for moment, kind, change in [*changes, (end, "host gaps", 0)]:
        now = next((kind for kind in KINDS if running[kind] > 0), "host gaps")
        time[now] += moment - at
        running[kind] += change
        at = moment
    return time


def kind_of(*names: str) -> str:
    """Kind of the operation with these names: its own, its kernel's, that of what it calls."""
    text = " ".join(names)
    if _COLLECTIVE.search(text):
        return "collectives"
    return "transfers" if _TRANSFER.search(text) else "compute"


def _steps(planes: Iterable) -> Iterator[tuple[float, float]]:
    """(start, end) of the steps that are marked."""
    for plane in planes:
        if plane.name.startswith("/host:"):
            for line in plane.lines:
                for event in line.events:
                    if event.name == STEP_NAME:
                        yield event.start_ns, event.start_ns + event.duration_ns


def _lines(planes: Sequence) -> Iterator[tuple[str, list[Span]]]:
    """(device, operations) of each line on which a device's operations stand: one of a TPU, the streams of a GPU, the
    threads of the CPU, which say the device of each operation."""
    on_devices = [plane for plane in planes if _DEVICE.fullmatch(plane.name)]
    for plane in on_devices:
        for line in plane.lines:
            if line.name == "XLA Ops" or line.name.startswith("Stream"):
                yield plane.name, [_span(event, dict(event.stats)) for event in line.events]
    for plane in planes:
        if on_devices or plane.name != "/host:CPU":
            continue
        for line in plane.lines:
            spans: dict[str, list[Span]] = collections.defaultdict(list)
            for event in line.events:
                if event.duration_ns and "hlo_op" in (stats := dict(event.stats)):
                    spans[f"cpu:{stats.get('device_ordinal', 0)}"].append(_span(event, stats))
            yield from spans.items()


def _span(event, stats: dict) -> Span:
    """The name of a TPU's operation is its line of HLO, `%fusion.1 = f32[8]{0} fusion(%p), kind=kLoop, calls=%body`:
    what it calls tells its kind too, what it reads does not."""
    text = event.name
    name = str(stats.get("hlo_op") or text.removeprefix("%").split(" ")[0])
    called = re.findall(r"calls=(\S+)", text)
    return Span(event.start_ns, event.start_ns + event.duration_ns, name, kind_of(name, text.split(" = ")[0], *called))


def _clipped(span: Span, start: float, end: float) -> Span:
    return span._replace(start=max(span.start, start), end=min(span.end, end))


def _operations(
    spans: Iterable[Span], own: Mapping[str, Sequence[Span]], whole: float, steps: int
) -> list[Operation]:
    calls = collections.Counter((span.name, span.kind) for span in spans)
    own_times: dict[tuple[str, str], float] = collections.defaultdict(float)
    for span in itertools.chain.from_iterable(own.values()):
        own_times[span.name, span.kind] += span.end - span.start
    rows = [
        Operation(name, kind, own_ns / 1e6 / steps, own_ns / whole, calls[name, kind] / steps)
        for (name, kind), own_ns in own_times.items()
    ]
    return sorted(rows, key=lambda row: -row.self_ms)
