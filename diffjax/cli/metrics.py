"""Metrics of runs and of files by one protocol: FID and its kin against a reference, resumable, on all devices.

Rows of the table `metrics` are (run, metric, value, min, mean, max, nfe, num_samples, seeds, protocol), each protocol
written out in the table `protocols`. A config has

    sets         name -> {"run": folder} or {"model": folder of published weights}, with "sample": {changes of the plan}
                 and lists to sweep over, "num_steps", "guidance_scale" and, of a run, "checkpoints": "last" or "all";
                 or {"images": folder, .zip or .npz, "channels": 3}; or {"videos": folder}.
                 "prompts": a file with the text of each sample or picture, line by line
    spaces       feature space -> {"metrics": names, "weights": file, "resize": name, "reference": statistics,
                 "options": {metric: {}}}
    reference    {"data": section}, {"images": folder, .zip or .npz}, {"videos": folder} or {"path": statistics}, for
                 spaces that name none of their own; path and images together: statistics of one, features of the other
    beside       folders of earlier evaluations whose rows are shown too, refused where their protocols differ
    seeds, num_samples, batch_size (of a device), num_devices (0 = all), save_every_s

What one set cannot give (an unreadable file, a NaN) is named in the end; the rows of the others are written before.
"""

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from diffjax import build
from diffjax.build import evaluation, feature_spaces, image_sets, streams
from diffjax.cli import metric_plots
from diffjax.core import names
from diffjax.data import texts
from diffjax.metrics import protocol
from diffjax.runtime import checkpoint, distributed, progress

_SWEPT = ("num_steps", "guidance_scale")
_KINDS = ("run", "model", "images", "videos")
_SET = (*_KINDS, *_SWEPT, "checkpoints", "sample", "prompts", "channels")
_SPACE = ("metrics", "weights", "resize", "reference", "options")
_STATE = "state"
_REPORT_TIMEOUT_S = 600


class Case(NamedTuple):
    """One row of each metric: of the set `name`, opened when it is its turn; `text` says which of its cases."""

    name: str
    text: str
    open: Callable[[], image_sets.ImageSet]


class Listed(NamedTuple):
    """A line of --dry_run."""

    method: str
    plans: list[str]


class IncompleteError(ValueError):
    """Some sets could not be measured; the report has the others."""


def entries(config: ConfigDict) -> list[Listed]:
    """What would be measured."""
    check(config)
    return [Listed(name, [case.text for case in cases(config, name)]) for name in config.sets]


def check(config: ConfigDict) -> None:
    """Raises ValueError for sections that are misspelt or lack something."""
    if not config.sets or not config.spaces:
        raise ValueError(
            "config.sets and config.spaces say what is measured, and in which feature spaces: one of them is empty"
        )
    for name, section in config.sets.items():
        _check_keys(section, _SET, f"config.sets.{name}")
        named = [kind for kind in _KINDS if section.get(kind)]
        if len(named) != 1:
            raise ValueError(
                f"config.sets.{name} names {named or 'nothing'}, expected one of {', '.join(_KINDS)}: say what is "
                "measured"
            )
        if section.get("checkpoints", "last") not in ("last", "all"):
            raise ValueError(f"config.sets.{name}.checkpoints is {section.checkpoints!r}, expected 'last' or 'all'")
    for name, section in config.spaces.items():
        names.lookup(feature_spaces.SPACES, name, "feature space")
        _check_keys(section, _SPACE, f"config.spaces.{name}")
        evaluation.check_metrics(name, section.metrics, _options(section))
    _check_keys(config.get("reference", {}), ("data", "images", "channels", "videos", "path"), "config.reference")


def _check_keys(section: ConfigDict, known: tuple[str, ...], what: str) -> None:
    for key in section:
        if key not in known:
            raise ValueError(f"unknown key {what}.{key}; {names.nearest(key, known)}")


def _options(section: ConfigDict) -> dict[str, dict[str, Any]]:
    """By metric, of a section of config.spaces."""
    return {metric: values.to_dict() for metric, values in section.get("options", ConfigDict()).items()}


# Sets ------------------------------------------------------------------------------------------------------------


def cases(config: ConfigDict, name: str) -> Iterator[Case]:
    """The cases of one set: of a run, one for each checkpoint, number of steps and guidance scale that it lists."""
    section = config.sets[name]
    if not (section.get("run") or section.get("model")):
        yield Case(name, "of files", functools.partial(_of_files, config, section))
        return
    steps = checkpoint.steps(section.run) if section.get("checkpoints", "last") == "all" else [None]
    if not steps:
        raise ValueError(
            f"config.sets.{name}.run: {section.run!r} has no checkpoint: train it first, or correct the folder"
        )
    swept = [section.get(key, ()) or (None,) for key in _SWEPT]
    for values in itertools.product(steps, *swept):
        told = [
            f"{key} {value}" for key, value in zip(("checkpoint", *_SWEPT), values, strict=True) if value is not None
        ]
        yield Case(name, ", ".join(told) or "as configured", functools.partial(_of_run, config, section, *values))


def _of_files(config: ConfigDict, section: ConfigDict) -> image_sets.ImageSet:
    if section.get("videos"):
        return _videos(config, section.videos)
    found = _pictures(section.images, section.get("channels", 3))
    prompts = texts.lines(section.prompts) if section.get("prompts") else []
    if prompts and len(prompts) != found.total:
        raise ValueError(
            f"{section.prompts} has {len(prompts):,} texts, {section.images} {found.total:,} images: one is needed for "
            "each"
        )
    return found._replace(texts=prompts, identity={**found.identity, "texts": prompts})


def _pictures(path: str, channels: int) -> image_sets.ImageSet:
    return image_sets.of_arrays(path) if path.endswith(".npz") else image_sets.of_folder(path, channels)


def _videos(config: ConfigDict, path: str) -> image_sets.ImageSet:
    """As many frames as the spaces of videos take."""
    frames = {feature_spaces.NUM_FRAMES.get(name, 0) for name in config.spaces}
    if len(frames) > 1 or 0 in frames:
        known = ", ".join(feature_spaces.NUM_FRAMES)
        raise ValueError(f"videos need a space of videos, {known}, found config.spaces {list(config.spaces)}")
    return image_sets.of_videos(path, frames.pop())


def _of_run(
    config: ConfigDict, section: ConfigDict, step: int | None, num_steps: int | None, scale: float | None
) -> image_sets.ImageSet:
    folder = section.get("run") or section.model
    run = build.load_run(folder, step) if section.get("run") else build.load_model(folder)
    changes = section.get("sample", ConfigDict()).to_dict()
    plan = build.run_plan(run, **{**changes, "num_steps": num_steps or changes.get("num_steps")})
    prompts = texts.lines(section.prompts) if section.get("prompts") else ()
    options = {} if scale is None else {"guidance_scale": scale}
    where = streams.local_mesh(config.num_devices)
    return image_sets.of_run(run, plan, folder, batch_size=config.batch_size, mesh=where, prompts=prompts, **options)


# Measuring -------------------------------------------------------------------------------------------------------


def requests(config: ConfigDict, how: streams.How, folder: Path) -> list[evaluation.Request]:
    """What is measured in each space, with its reference: files are opened first, then that of the data is made."""
    spaces = {
        name: feature_spaces.load(name, s.get("weights", ""), s.get("resize", "")) for name, s in config.spaces.items()
    }
    paths = {
        name: s.get("reference", "") or config.get("reference", {}).get("path", "") for name, s in config.spaces.items()
    }
    opened = {name: evaluation.open_reference(path, spaces[name]) for name, path in paths.items() if path}
    made = []
    for name, section in config.spaces.items():
        space, metrics = spaces[name], tuple(section.metrics)
        real, items = opened.get(name), None
        if any(protocol.metric_of(metric).reference for metric in metrics):
            items = _reference_items(config) if real is None or evaluation.lacks(real, metrics) else None
        if items is not None:
            of_images = evaluation.make_reference(items, space, metrics, how, folder)
            # statistics of all images in a file, which holds some of them too: ADM's
            real = of_images if real is None else real._replace(features=of_images.features)
        made.append(evaluation.Request(space, metrics, real, _options(section)))
    return made


def _reference_items(config: ConfigDict) -> image_sets.ImageSet | None:
    """The images of config.reference, None where it names none."""
    section = config.get("reference", ConfigDict())
    if section.get("data"):
        return image_sets.of_data(section.data)
    if section.get("videos"):
        return _videos(config, section.videos)
    return _pictures(section.images, section.get("channels", 3)) if section.get("images") else None


def measure(
    config: ConfigDict, workdir: Path, say: Callable[[str], None]
) -> tuple[list[metric_plots.Row], list[dict[str, str]]]:
    """(rows, failed): every value that could be had, and what could not with its reason. Raises ValueError before any
    sampling for what a look at the config, the weights, the references and the first case of each set can tell."""
    check(config)
    found = {name: list(cases(config, name)) for name in config.sets}
    how = streams.How(streams.local_mesh(config.num_devices), config.batch_size, config.save_every_s)
    earlier = [row for folder in config.get("beside", ()) for row in metric_plots.read(Path(folder))]
    asked = requests(config, how, workdir / _STATE)
    for first, *_ in found.values():
        items = first.open()
        ranges = evaluation.seed_ranges(items, config.seeds, config.num_samples)
        for request in asked:
            evaluation.check_request(request, items)
        planned = evaluation.protocols_of(asked, ranges[0].count).values()
        metric_plots.check_beside([protocol.of_ranges(one, len(ranges)) for one in planned], earlier)
    rows, failed = [], []
    for case in itertools.chain.from_iterable(found.values()):
        say(f"{case.name}: {case.text}")
        try:
            rows += _case_rows(config, case, asked, how, workdir / _STATE)
        except (ValueError, OSError, checkpoint.CheckpointError) as error:
            failed.append({"run": case.name, "case": case.text, "reason": str(error)})
            say(f"failed: {error}")
    return [*rows, *earlier], failed


def _case_rows(
    config: ConfigDict, case: Case, asked: list[evaluation.Request], how: streams.How, folder: Path
) -> list[metric_plots.Row]:
    items = case.open()
    ranges = evaluation.seed_ranges(items, config.seeds, config.num_samples)
    share = streams.share(ranges[0].count, *streams.place())
    with progress.Progress((share[1] - share[0]) * len(ranges)) as bar:
        results = evaluation.evaluate(items, ranges, asked, how._replace(say=bar.update), folder)
    return [metric_plots.Row(case.name, result, dict(items.facts)) for result in results]


def compare(
    config: ConfigDict, workdir: Path, command: str, progress: Callable[[str], None] = lambda text: None
) -> Path:
    """Measure, draw, and write `report.md` and `report.json` into `workdir`; returns the report's path.

    Raises as `measure`; IncompleteError, behind the report, where some sets could not be measured.
    """
    start = time.perf_counter()
    rows, failed = measure(config, workdir, progress)
    path = workdir / "report.md"
    if streams.place()[0] == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        path = metric_plots.write(workdir, rows, failed, command, time.perf_counter() - start)
    if failed:
        distributed.barrier("report of metrics", _REPORT_TIMEOUT_S)  # the first error ends all processes
        lines = "; ".join(f"{row['run']} ({row['case']}): {row['reason']}" for row in failed)
        raise IncompleteError(f"{len(failed)} of the sets could not be measured, the others are in {path}: {lines}")
    return path
