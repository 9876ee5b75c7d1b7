"""The comparison that the field reports: Frechet distance against network calls.

A teacher, its training-free solvers and its distilled students sample from the same seeds; every
row of the table is (method, nfe, seed, frechet_distance). The distance is taken in pixel space
against all training images, without a network: a distance between Gaussians, and no FID.
"""

import json
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from diffjax import build
from diffjax.core import solvers
from diffjax.metrics import fid
from diffjax.runtime import images as image_files
from diffjax.runtime import report
from diffjax.sampling import generate

_ORDERS = {"ipndm": 4, "dpmpp": 3, "unipc": 3}  # the orders that the field compares
_LABELS = {
    "teacher": "teacher", "sfd": "SFD", "euler": "Euler (DDIM)", "heun": "Heun", "ipndm": "iPNDM-4",
    "dpmpp": "DPM-Solver++(3M)", "unipc": "UniPC-3",
}  # fmt: skip


class Entry(NamedTuple):
    """One curve of the comparison: a run that samples, and its plan for each number of calls."""

    method: str
    run: build.Run
    plans: dict[int, solvers.Plan]  # by network calls


def plan_for_calls(config: ConfigDict, solver: str, afs: bool, calls: int) -> solvers.Plan | None:
    """The plan of `solver` on the polynomial grid that makes exactly `calls` network calls, or None."""
    section = {"solver": solver, "order": _ORDERS.get(solver, 0), "afs": afs}
    section |= {"sigma_min": config.sigma_min, "sigma_max": config.sigma_max}
    for num_steps in range(3 if afs else 2, calls + 3):
        plan = build.plan({**section, "num_steps": num_steps})
        if plan.nfe == calls:
            return plan
    return None


def entries(config: ConfigDict) -> list[Entry]:
    """Curves that `config` asks for: the teacher as it was configured, solvers, students."""
    teacher = build.load_run(config.teacher)
    teacher_plan = build.run_plan(teacher)
    found = [Entry("teacher", teacher, {teacher_plan.nfe: teacher_plan})]
    for solver in config.solvers:
        for afs in (False, True):
            plans = {calls: plan_for_calls(config, solver, afs, calls) for calls in config.calls}
            plans = {calls: plan for calls, plan in plans.items() if plan is not None}
            found.append(Entry(solver + ("_afs" if afs else ""), teacher, plans))
    for folder in config.students:
        student = build.load_run(folder)
        plan = build.run_plan(student)
        # one denoiser for all, so that equal plans compile once
        found.append(Entry("sfd", student._replace(denoise=teacher.denoise), {plan.nfe: plan}))
    return found


def measure(config: ConfigDict, curves: list[Entry], progress=lambda text: None) -> tuple[list[dict], dict]:
    """Rows of the table `frechet_by_calls`, and the first images of each (method, nfe) for the grids."""
    data = build.all_images(curves[0].run.config.data)
    reference = fid.pixel_statistics(data)
    rows, pictures = [], {}
    for seed in config.seeds:
        for entry in curves:
            for nfe, plan in entry.plans.items():
                progress(f"seed {seed}: {entry.method}, {nfe} calls")
                samples = build.draw(entry.run, plan, seed, range(config.num_samples), batch_size=config.batch_size)
                distance = fid.frechet_distance(*fid.pixel_statistics(samples), *reference)
                rows.append({"method": entry.method, "nfe": nfe, "seed": seed, "frechet_distance": distance})
                pictures.setdefault((entry.method, nfe), np.asarray(generate.to_uint8(samples[: config.grid_columns])))
    return rows, pictures


def gap_closed(rows: list[dict]) -> list[dict]:
    """For each call count of a student and each seed: how much of the gap between the best
    training-free solver and the teacher it closes (1 = all of it)."""
    out = []
    students = (row for row in rows if row["method"] == "sfd")
    for student in sorted(students, key=lambda row: (row["nfe"], row["seed"])):
        same_seed = [row for row in rows if row["seed"] == student["seed"]]
        teacher = next(row for row in same_seed if row["method"] == "teacher")
        rivals = [r for r in same_seed if r["nfe"] == student["nfe"] and r["method"] not in ("sfd", "teacher")]
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


def noise(rows: list[dict], data: np.ndarray) -> list[dict]:
    """What the figures can resolve: spread over sampling seeds, and two halves of the data apart."""
    by_point = {}
    for row in rows:
        by_point.setdefault((row["method"], row["nfe"]), []).append(row["frechet_distance"])
    spread = {point: np.std(values, ddof=1) for point, values in by_point.items() if len(values) > 1}
    order = np.random.default_rng(0).permutation(len(data))
    halves = (data[order[: len(data) // 2]], data[order[len(data) // 2 :]])
    out = [
        {
            "what": "distance between two halves of the data",
            "value": fid.frechet_distance(*fid.pixel_statistics(halves[0]), *fid.pixel_statistics(halves[1])),
        }
    ]
    if spread:
        ours = [value for (method, _), value in spread.items() if method in ("teacher", "sfd")]
        out.append({"what": "largest standard deviation over seeds, teacher and students", "value": float(max(ours))})
        relative = [value / np.mean(by_point[point]) for point, value in spread.items()]
        out.append({"what": "median of standard deviation / mean over seeds, all rows", "value": float(np.median(relative))})
    return out


def draw_plot(rows: list[dict], path: Path) -> None:
    """Frechet distance against calls, one line a method (mean over seeds), as a PNG."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the plot needs matplotlib; type: pip install 'diffjax[demo]'") from error
    figure = Figure(figsize=(7.5, 4.6), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    solvers_shown = dict.fromkeys(row["method"].removesuffix("_afs") for row in rows)
    colours = {solver: f"C{i}" for i, solver in enumerate(s for s in solvers_shown if s not in ("teacher", "sfd"))}
    for method in dict.fromkeys(row["method"] for row in rows):
        calls = sorted({row["nfe"] for row in rows if row["method"] == method})
        means = [np.mean([r["frechet_distance"] for r in rows if (r["method"], r["nfe"]) == (method, c)]) for c in calls]
        if method == "teacher":
            axes.axhline(means[0], color="0.4", linestyle="--", label=f"teacher, {calls[0]} calls")
        elif method == "sfd":
            axes.plot(calls, means, "k*-", markersize=11, linewidth=2, label="SFD students", zorder=5)
        else:
            style = "o:" if method.endswith("_afs") else "s-"
            colour = colours[method.removesuffix("_afs")]
            axes.plot(calls, means, style, color=colour, markersize=4, label=_label(method))
    axes.set(xlabel="network calls per image", ylabel="Fréchet distance in pixel space", yscale="log")
    # two-stage solvers diverge at 2 to 4 calls by factors of a thousand: the table has the figures
    plausible = [row["frechet_distance"] for row in rows if row["method"].startswith("euler")] or [1.0]
    axes.set_ylim(top=2 * max(plausible))
    axes.set_xticks(sorted({row["nfe"] for row in rows if row["nfe"] <= 10}))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path)


def _label(method: str) -> str:
    """As people write it: "ipndm_afs" -> "iPNDM-4 + AFS"."""
    solver = method.removesuffix("_afs")
    return _LABELS.get(solver, solver) + (" + AFS" if method.endswith("_afs") else "")


def draw_grids(pictures: dict, gaps: list[dict], path: Path) -> None:
    """One row of samples a method, the same seeds and classes in every column, as a PNG."""
    chosen = [key for key in pictures if key[0] == "teacher"]
    for nfe in sorted({row["nfe"] for row in gaps}):
        best = next(row["best_solver"] for row in gaps if row["nfe"] == nfe)
        chosen += [(best, nfe), ("sfd", nfe)]
    captions = [f"{_label(method)}, {nfe} call{'s' if nfe > 1 else ''}" for method, nfe in chosen]
    rows = {caption: pictures[key] for caption, key in zip(captions, chosen, strict=True)}
    image_files.save_png(path, image_files.labelled_rows(rows, scale=6))


def run_cost(folder: Path) -> dict:
    """Training cost of a run, from its own report: {run, images, seconds, final loss}."""
    return {"run": folder.name, **_report(folder)["tables"]["training"][-1]}


def _report(folder: Path) -> dict:
    path = folder / "report.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: train that run to its end first")
    return json.loads(path.read_text())


def compare(config: ConfigDict, workdir: Path, command: str, progress=lambda text: None) -> Path:
    """Measure, draw, and write `report.md` and `report.json` into `workdir`; returns the report's path."""
    start = time.perf_counter()
    curves = entries(config)
    rows, pictures = measure(config, curves, progress)
    gaps = gap_closed(rows)
    workdir.mkdir(parents=True, exist_ok=True)
    draw_plot(rows, workdir / "frechet_by_calls.png")
    draw_grids(pictures, gaps, workdir / "samples.png")
    costs = [run_cost(Path(folder)) for folder in (config.teacher, *config.students)]
    tables = {
        "gap_closed": gaps,
        "noise": noise(rows, build.all_images(curves[0].run.config.data)),
        "training": costs,
        "evaluation": [{"seconds": time.perf_counter() - start, "samples_per_row": config.num_samples}],
        "frechet_by_calls": rows,
    }
    return report.write_report(workdir, "Fréchet distance by network calls", _sections(config, command), tables)


def _sections(config: ConfigDict, command: str) -> list[tuple[str, str]]:
    runs = [Path(folder) for folder in (config.teacher, *config.students)]
    commands = [_report(run)["environment"]["command"] for run in runs]
    text = (
        f"{config.num_samples:,} samples a row, seeds {', '.join(map(str, config.seeds))}; the distance is taken in pixel "
        "space against all training images (no network, so no FID; lower is better). `_afs`: the first step is "
        "analytical and costs no call. `sfd`: one student for each number of calls."
    )
    return [
        ("Distance against calls", f"{text}\n\n![Fréchet distance by calls](frechet_by_calls.png)"),
        ("Samples from the same seeds", "Every column has the same noise and class.\n\n![samples](samples.png)"),
        (
            "How much of the gap the student closes",
            "The gap lies between the best training-free solver at equal calls and the teacher.\n\n"
            "<!-- table: gap_closed -->",
        ),
        ("Noise of these figures", "<!-- table: noise -->"),
        ("Training cost", "<!-- table: training -->"),
        ("Reproduce", "```bash\n" + "\n".join([*commands, command]) + "\n```"),
    ]
