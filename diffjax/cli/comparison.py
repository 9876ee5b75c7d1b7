"""The comparison that the field reports: Frechet distance against network calls.

A teacher, its training-free solvers and its distilled students sample from the same seeds; every
row of the table is (method, nfe, seed, frechet_distance). The distance is taken in pixel space
against all training images, without a network: a distance between Gaussians, and no FID.

A config names the teacher's run; `solvers`, method -> a `sample` section without num_steps, each with and without
the analytical first step; and `students`, method -> {"runs": folders, "num_steps": () or the N to sample at}. In a
folder "{base}" stands for config.base, and "{seed}" for the sampling seed, so that the spread over seeds has the
spread of training in it. A student with "seeds" is measured for those only.
"""

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from diffjax import build
from diffjax.build import image_sets
from diffjax.cli import comparison_report
from diffjax.core import solvers
from diffjax.metrics import pixels
from diffjax.metrics.protocol import Result
from diffjax.runtime import report
from diffjax.sampling import generate

Rows = list[dict]
HALVES = "distance between two halves of the data"


class Entry(NamedTuple):
    """One curve of the comparison: a run that samples, and its plan for each number of calls."""

    method: str
    run: build.Run
    plans: dict[int, solvers.Plan]  # by network calls


def plan_for_calls(teacher: build.Run, section: dict, afs: bool, calls: int) -> solvers.Plan | None:
    """The plan of a `sample` section that makes exactly `calls` network calls, or None."""
    for num_steps in range(3 if afs else 2, calls + 3):
        try:
            plan = build.run_plan(teacher, **{**section, "to_zero": False, "afs": afs, "num_steps": num_steps})
        except solvers.TooFewSteps:
            continue
        if plan.nfe == calls:
            return plan
    return None


def folder_of(config: ConfigDict, pattern: str, seed: int) -> Path:
    """The run folder of a pattern."""
    return Path(pattern.replace("{base}", config.base).replace("{seed}", str(seed)))


def solver_entries(config: ConfigDict, teacher: build.Run) -> Iterable[Entry]:
    """The teacher as it was configured, and the curves of the training-free solvers."""
    teacher_plan = build.run_plan(teacher)
    yield Entry("teacher", teacher, {teacher_plan.nfe: teacher_plan})
    for method, section in config.solvers.items():
        for afs in (False, True):
            plans = {calls: plan_for_calls(teacher, section.to_dict(), afs, calls) for calls in config.calls}
            plans = {calls: plan for calls, plan in plans.items() if plan is not None}
            yield Entry(method + ("_afs" if afs else ""), teacher, plans)


def student_entries(config: ConfigDict, teacher: build.Run, seed: int) -> Iterable[Entry]:
    """The curves of the students for one seed."""
    for method, students in config.students.items():
        if seed not in students.get("seeds", config.seeds):
            continue
        for folder in students.runs:
            student = build.load_run(folder_of(config, folder, seed))
            if student.config.model == teacher.config.model:
                # one denoiser for all, so that equal plans compile once
                student = student._replace(denoise=teacher.denoise)
            plans = [
                build.run_plan(student, num_steps=num)
                for num in students.num_steps or build.trained_steps(student.config.method)
            ]
            yield Entry(method, student, {plan.nfe: plan for plan in plans})


def entries(config: ConfigDict) -> list[Entry]:
    """All curves that `config` asks for, the students of its first seed."""
    teacher = build.load_run(folder_of(config, config.teacher, 0))
    return [*solver_entries(config, teacher), *student_entries(config, teacher, config.seeds[0])]


def measure(
    config: ConfigDict, progress: Callable[[str], None] = lambda text: None
) -> tuple[Rows, dict, list[Result]]:
    """Rows of the table `frechet_by_calls`, the first images of each (method, nfe) for the grids, and their distances
    with the protocol, the last one between two halves of the data."""
    teacher = build.load_run(folder_of(config, config.teacher, 0))
    free = list(solver_entries(config, teacher))
    data = build.all_images(teacher.config.data)
    real = pixels.reference(data, image_sets.data_name(teacher.config.data))
    rows, pictures, results = [], {}, []
    for seed in config.seeds:
        for entry in (*free, *student_entries(config, teacher, seed)):
            for nfe, plan in entry.plans.items():
                progress(f"seed {seed}: {entry.method}, {nfe} calls")
                samples = build.draw(entry.run, plan, seed, range(config.num_samples), batch_size=config.batch_size)
                results.append(pixels.frechet(samples, real))
                distance = results[-1].value
                rows.append({"method": entry.method, "nfe": nfe, "seed": seed, "frechet_distance": distance})
                pictures.setdefault((entry.method, nfe), np.asarray(generate.to_uint8(samples[: config.grid_columns])))
    return rows, pictures, [*results, halves(data, image_sets.data_name(teacher.config.data))]


# Tables ----------------------------------------------------------------------------------------------------------


def gap_closed(rows: Rows, free: Iterable[str]) -> Rows:
    """For each call count of an SFD student and each seed: how much of the gap between the best
    training-free solver (of the methods `free`) and the teacher it closes (1 = all of it)."""
    out = []
    free = set(free)
    students = (row for row in rows if row["method"] == "sfd")
    for student in sorted(students, key=lambda row: (row["nfe"], row["seed"])):
        same_seed = [row for row in rows if row["seed"] == student["seed"]]
        teacher = next(row for row in same_seed if row["method"] == "teacher")
        rivals = [r for r in same_seed if r["nfe"] == student["nfe"] and r["method"].removesuffix("_afs") in free]
        if not rivals:
            continue
        best = min(rivals, key=lambda row: row["frechet_distance"])
        gap = best["frechet_distance"] - teacher["frechet_distance"]
        closed = (best["frechet_distance"] - student["frechet_distance"]) / gap
        out.append(
            {
                "nfe": student["nfe"],
                "seed": student["seed"],
                "best_solver": best["method"],
                "best_solver_distance": best["frechet_distance"],
                "sfd_distance": student["frechet_distance"],
                "teacher_distance": teacher["frechet_distance"],
                "gap_closed": closed,
            }
        )
    return out


def means(rows: Rows) -> Rows:
    """One row a method, its mean over seeds in a column for each number of calls, the methods in order."""
    columns = sorted({row["nfe"] for row in rows if row["method"] != "teacher"})
    out = []
    for method in dict.fromkeys(row["method"] for row in rows if row["method"] != "teacher"):
        at = {nfe: _values(rows, method, nfe) for nfe in columns}
        cells = {f"{nfe} calls": float(np.mean(found)) if found else None for nfe, found in at.items()}
        out.append({"method": comparison_report.label(method), **cells})
    return out


def halves(data: np.ndarray, source: str) -> Result:
    """The distance between two halves of `data` (N, H, W, C), by chance."""
    order = np.random.default_rng(0).permutation(len(data))
    first, second = data[order[: len(data) // 2]], data[order[len(data) // 2 :]]
    return pixels.frechet(first, pixels.reference(second, f"half of {source}"))


def noise(rows: Rows, apart: Result, free: Iterable[str]) -> Rows:
    """What the figures can resolve: spread over seeds, and `halves` of the data apart."""
    points = dict.fromkeys((row["method"], row["nfe"]) for row in rows)
    spread = {point: np.std(found, ddof=1) for point in points if len(found := _values(rows, *point)) > 1}
    out = [{"what": HALVES, "value": apart.value}]
    if spread:
        free = set(free)
        ours = [value for (method, _), value in spread.items() if method.removesuffix("_afs") not in free]
        relative = [value / np.mean(_values(rows, *point)) for point, value in spread.items()]
        out.append({"what": "largest standard deviation over seeds, teacher and students", "value": float(max(ours))})
        middle = float(np.median(relative))
        out.append({"what": "median of standard deviation / mean over seeds, all rows", "value": middle})
    return out


def cost(config: ConfigDict) -> Rows:
    """What each student cost to train, its chain of teachers without the first included, and against that first."""
    first = folder_of(config, config.teacher, 0)
    base = _own_cost(first)
    out = [{"method": "teacher", "run": str(first), "images": base["images"], "seconds": base["seconds"]}]
    for method, students in config.students.items():
        for pattern in students.runs:
            folder = folder_of(config, pattern, config.seeds[0])
            chain = [_own_cost(run) for run in (folder, *_teachers(folder, first))]
            seconds = sum(run["seconds"] for run in chain)
            out.append(
                {
                    "method": method,
                    "run": str(folder),
                    "images": chain[0]["images"],
                    "seconds": chain[0]["seconds"],
                    "seconds_with_its_teachers": seconds,
                    "share_of_the_teachers_time": seconds / base["seconds"],
                }
            )
    return out


def _values(rows: Rows, method: str, nfe: int) -> list[float]:
    return [row["frechet_distance"] for row in rows if (row["method"], row["nfe"]) == (method, nfe)]


def _own_cost(folder: Path) -> dict:
    return read_report(folder)["tables"]["training"][-1]


def _teachers(folder: Path, base: Path) -> Iterable[Path]:
    """The runs that `folder` was distilled from, up to and without `base`."""
    while True:
        above = json.loads((folder / "config.json").read_text())["method"].get("teacher")
        if above is None or Path(above) == base:
            return
        folder = Path(above)
        yield folder


def read_report(folder: Path) -> dict:
    """`report.json` of a run. Raises FileNotFoundError for a run that is not finished."""
    path = folder / "report.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: train that run to its end first")
    return json.loads(path.read_text())


def compare(
    config: ConfigDict, workdir: Path, command: str, progress: Callable[[str], None] = lambda text: None
) -> Path:
    """Measure, draw, and write `report.md` and `report.json` into `workdir`; returns the report's path."""
    start = time.perf_counter()
    costs = cost(config)  # first: it knows at once which runs are not finished
    rows, pictures, (*results, apart) = measure(config, progress)
    free = tuple(config.solvers)
    gaps = gap_closed(rows, free)
    workdir.mkdir(parents=True, exist_ok=True)
    comparison_report.draw_plot(rows, free, workdir / "frechet_by_calls.png")
    comparison_report.draw_grids(pictures, rows, gaps, free, workdir / "samples.png")
    tables = {
        "means": means(rows),
        "gap_closed": gaps,
        "noise": noise(rows, apart, free),
        "cost": costs,
        "evaluation": [{"seconds": time.perf_counter() - start, "samples_per_row": config.num_samples}],
        "protocols": pixels.protocols({"frechet_distance": results, HALVES: [apart]}),
        "frechet_by_calls": rows,
    }
    commands = [read_report(Path(row["run"]))["environment"]["command"] for row in costs]
    sections = comparison_report.sections(config, [*dict.fromkeys(commands), command])
    return report.write_report(workdir, "Fréchet distance by network calls", sections, tables)
