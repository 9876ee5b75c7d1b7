"""What fits on devices that need not be here: the largest batch, and changes that make a step fit, by `plans`.

    best, tried = largest(job, first=256)          # of a few batches that are compiled
    for change, found in fixes(job, 256): ...      # remat, then more fsdp, then a smaller batch
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from diffjax import build
from diffjax.build import networks, planned, plans

COMPILES = 5  # of batches, for the largest that fits
_CLOSE = 0.96  # of the memory in use: near enough to the limit


class Measured(NamedTuple):
    """peak: bytes, None where nobody says. fixed: what does not grow with the batch, about."""

    peak: float | None
    fits: bool
    fixed: float = 0.0


def largest(
    job: plans.Job, first: int, known: plans.Plan | None = None, compiles: int = COMPILES
) -> tuple[plans.Plan | None, list[plans.Plan]]:
    """(the plan of the largest batch that was found to fit, all that were compiled), by up to `compiles` compilations
    from a first, whose plan may be known. A batch that the compiler fails at counts as too large. Raises ValueError where
    no limit is known."""
    # what the rows of the search are of: parts on devices, and in turn on one
    parts = math.lcm(plans.parts_of_batch(plans.mesh_of(job)), job.config.train.get("microbatches", 0) or 1)
    found = {} if known is None else {known.batch_size // parts: known}

    def measure(rows: int) -> Measured:
        if rows not in found:
            try:
                found[rows] = plans.plan(job, rows * parts)
            except plans.CompilerError as error:
                found[rows] = plans.Plan(rows * parts, {}, 0, fits=False, peak=None, problem=str(error))
        return Measured(found[rows].peak, found[rows].fits, found[rows].state)

    if job.target.limit is None:
        raise ValueError(f"no limit is known of a device of {job.target.topology}: give --budget=16GiB")
    rows = largest_rows(measure, job.target.limit, max(first // parts, 1), compiles)
    return found.get(rows), list(found.values())


def largest_rows(measure: Callable[[int], Measured], limit: float, first: int, compiles: int = COMPILES) -> int:
    """The largest number of rows, of up to `compiles` that are measured, that fits; 0 for none. Memory is taken to grow
    evenly: each guess is where the line through the two nearest the limit meets it."""
    tried: dict[int, Measured] = {}
    rows = first
    while rows and len(tried) < compiles:
        tried[rows] = found = measure(rows)
        rows = 0 if found.fits and (found.peak or 0) >= _CLOSE * limit else _guess(tried, limit)
    return max((n for n, found in tried.items() if found.fits), default=0)


def _guess(tried: Mapping[int, Measured], limit: float) -> int:
    """The next number to measure, above all that fit and below all that do not; 0 for none."""
    most = max((n for n, found in tried.items() if found.fits), default=0)
    least = min((n for n, found in tried.items() if not found.fits), default=0)
    points = [(n, found.peak) for n, found in tried.items() if found.peak]
    if len(points) == 1:
        points.append((0, tried[points[0][0]].fixed))
    if len(points) > 1:
        (n0, size0), (n1, size1) = sorted(points, key=lambda point: abs(point[1] - limit))[:2]
        slope = (size1 - size0) / (n1 - n0)
        guess = math.floor(n0 + (limit - size0) / slope) if slope > 0 else 2 * most
    else:
        guess = least // 2
    guess = _even(min(guess, 64 * max(tried)))
    if least and guess >= least:
        guess = _even(least - 1)
    return guess if guess > most else 0


def _even(rows: int) -> int:
    """Down to a multiple of 8, of 4 for few, where it is not very few."""
    step = 8 if rows >= 64 else 4 if rows >= 16 else 1
    return rows // step * step


class Change(NamedTuple):
    """What was changed, as flags and their values, and the job with it."""

    flags: Mapping[str, Any]
    job: plans.Job

    @property
    def text(self) -> str:
        """As they are typed."""
        return " ".join(f"{name}={value}" for name, value in self.flags.items())

    def to(self, flag: str, value: Any, **job: Any) -> "Change":
        """With one more."""
        return Change({**self.flags, flag: value}, self.job._replace(**job))


def fixes(job: plans.Job, batch_size: int) -> Iterator[tuple[Change, plans.Plan]]:
    """What may make a step fit, in this order, up to the first that does: less kept for the gradient, more and more of
    the devices on fsdp, and then a smaller batch, the largest that fits. Flags are those of diffjax.cli.train, or of
    diffjax.cli.sample."""
    change = Change({}, job)
    for attempt in (_with_remat, *[_with_fsdp] * len(job.target.devices)):
        following = attempt(change)
        if following is not None:
            change = following
            found = plans.plan(change.job, batch_size)
            yield change, found
            if found.fits:
                return
    found, _ = largest(change.job, batch_size // 2)
    if found is not None:
        yield change.to("--batch_size" if job.is_sample else "--config.train.batch_size", found.batch_size), found


def _with_remat(change: Change) -> Change | None:
    job = change.job
    with planned.planning(job.teachers):
        model = build.resolve(job.config).model
    if job.is_sample or "remat" not in networks.defaults(model.name) or model.get("remat") == "nothing":
        return None
    config = ConfigDict(job.config.to_dict())
    config.model.remat = "nothing"
    return change.to("--config.model.remat", "nothing", config=config)


def _with_fsdp(change: Change) -> Change | None:
    """Twice as many devices on fsdp, as long as data has them."""
    shape = dict(plans.mesh_of(change.job).shape)
    if shape["data"] % 2:
        return None
    shape |= {"data": shape["data"] // 2, "fsdp": 2 * shape["fsdp"]}
    text = ",".join(f"{axis}:{size}" for axis, size in shape.items() if size > 1)
    return change.to("--mesh" if change.job.is_sample else "--config.train.mesh", text, layout=text)
