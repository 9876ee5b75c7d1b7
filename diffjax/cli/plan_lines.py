"""Lines about what a config needs on devices that need not be here, for `diffjax.cli.inspect --topology`."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ml_collections import ConfigDict

from diffjax.cli import flags
from diffjax.cli.checkpoints import readable_bytes
from diffjax.runtime import chips

if TYPE_CHECKING:
    from diffjax.build import plans

_KEYS = ("teacher", "start")  # of a section method: run folders


class Asked(NamedTuple):
    """What the flags say. layout: of --mesh; teacher: of --teacher_config; budget: bytes in place of the chip's."""

    topology: str
    layout: str = ""
    teacher: str = ""
    budget: float | None = None
    is_sample: bool = False


def lines(config: ConfigDict, asked: Asked) -> Iterable[str]:
    """The plan of a config, as it is found. Raises ValueError as `chips.set_environment` and building the config do,
    for a mesh of another number of devices, and where nothing fits."""
    chips.set_environment(asked.topology)
    from diffjax import build
    from diffjax.build import plans

    build.check(config)
    where = plans.target(asked.topology, asked.budget)
    job = plans.Job(config, where, asked.layout, teachers(config, asked.teacher), asked.is_sample)
    parts = plans.parts_of_batch(plans.mesh_of(job))
    batch = config.get("sample", {}).get("batch_size", parts) if asked.is_sample else config.train.batch_size
    command = "diffjax.cli.sample" if asked.is_sample else "diffjax.cli.train"
    yield f"target            {len(where.devices)} devices of {where.topology}, {where.compiler}; nothing is run"
    found = plans.plan(job, batch)
    yield from plan_lines(found, job)
    if where.limit is None:
        yield "largest batch     unknown: give --budget=16GiB"
    elif found.fits:
        yield from _largest_lines(job, found)
    else:
        yield from _fix_lines(job, batch, command)


def teachers(config: ConfigDict, given: str) -> dict[str, ConfigDict]:
    """Run folder of a config's method -> the config that --teacher_config says it will hold, a file or a model's folder
    as diffusers writes it. Raises ValueError for a method that reads no run."""
    if not given:
        return {}
    from diffjax.build import planned

    key = next((key for key in _KEYS if config.get("method", {}).get(key)), None)
    if key is None:
        raise ValueError(f"found --teacher_config={given}, and the config's method reads no run: leave it out")
    found = planned.folder_config(Path(given)) if Path(given).is_dir() else flags.load_config(given)
    return {config.method[key]: found}


def plan_lines(found: "plans.Plan", job: "plans.Job") -> Iterable[str]:
    """One plan."""
    from diffjax.build import plans

    devices, limit = len(job.target.devices), job.target.limit
    what = "samples at a time" if job.is_sample else "batch"
    layout = ",".join(f"{axis}:{size}" for axis, size in found.mesh.items() if size > 1) or "one device"
    yield f"parameters        {found.parameters:,}"
    yield f"mesh              {layout}; {what} {found.batch_size:,}, {found.batch_size / devices:.4g} a device"
    of_limit = "" if limit is None else f" of {readable_bytes(limit)}"
    if not found.fits and not found.flops:
        needs = "more than there is" if found.peak is None else readable_bytes(found.peak)
        yield f"memory a device   does not fit: {needs}{of_limit}"
        return
    verdict = "" if found.fits else "does not fit: "
    yield (
        f"memory a device   {verdict}{readable_bytes(found.peak)}{of_limit}: {readable_bytes(found.state)} state and "
        f"batch, {readable_bytes(found.work)} work; compiled in {found.seconds:.0f} s"
    )
    call = "call" if job.is_sample else "step"
    yield f"products          {found.flops:.4g} FLOPs a {call} of all devices, what is computed again among them"
    yield f"memory traffic    {readable_bytes(found.accessed)} a {call} and device"
    for kind, moved in plans.moved(found).items():
        rest = moved.num_bytes - moved.of_weights
        split = f"{readable_bytes(moved.of_weights)} of weights and gradients, {readable_bytes(rest)} of others"
        yield f"  {kind:15s} {moved.number:,} a device leave {readable_bytes(moved.num_bytes)} there: {split}"
    if job.target.chip is not None:
        yield _time_line(plans.estimate(found, job.target.chip), call)


def _time_line(seconds: "plans.Estimate", call: str) -> str:
    each = f"products {seconds.products:.3g} s, memory {seconds.memory:.3g} s, links {seconds.links:.3g} s"
    return (
        f"time              an estimate at the makers' peaks, no measurement: at least {max(seconds):.3g} s a {call} "
        f"({each}), {sum(seconds):.3g} s where nothing overlaps"
    )


def _largest_lines(job: "plans.Job", found: "plans.Plan") -> Iterable[str]:
    from diffjax.build import fitting

    best, tried = fitting.largest(job, found.batch_size, found)
    devices = len(job.target.devices)
    above = min((one.batch_size for one in tried if not one.fits and not one.problem), default=0)
    bound = f"; {above:,} does not" if above else ""
    bound += "".join(f"; {one.problem}" for one in tried if one.problem)
    yield (
        f"largest batch     {best.batch_size:,} fits, {best.batch_size / devices:.4g} a device, with "
        f"{readable_bytes(best.peak)}{bound} ({len(tried)} batches compiled)"
    )


def _fix_lines(job: "plans.Job", batch: int, command: str) -> Iterable[str]:
    """What was tried to make it fit, and the flags of `command` to type. Raises ValueError where nothing did."""
    from diffjax.build import fitting, plans

    for change, found in fitting.fixes(job, batch):
        size = "" if found.peak is None else f": {readable_bytes(found.peak)} a device"
        yield f"{'this fits' if found.fits else 'tried':17s} {command} {change.text}{size}"
        if found.fits:
            yield from plan_lines(found, change.job)
            return
    devices = math.prod(plans.mesh_of(job).shape.values())
    raise ValueError(
        f"no batch fits {devices} devices of {job.target.topology}: take more, larger ones, or a smaller network"
    )
