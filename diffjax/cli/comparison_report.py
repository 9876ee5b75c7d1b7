"""The pictures and the text of a comparison (see `comparison`)."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from diffjax.runtime import images as image_files

_LABELS = {
    "teacher": "teacher", "euler": "Euler (DDIM)", "heun": "Heun", "dpm2s": "DPM-Solver-2S", "ipndm": "iPNDM-4",
    "ipndm_v": "iPNDM_v-4", "dpmpp": "DPM-Solver++(3M)", "dpmpp_logsnr": "DPM-Solver++(3M), logSNR", "unipc": "UniPC-3",
    "unipc_logsnr": "UniPC-3, logSNR", "deis": "DEIS-tAB3", "ipndm_gits": "iPNDM-4 on GITS levels", "sfd": "SFD",
    "sfd_v": "SFD-v", "second_stage": "SFD second stage", "two_call_student_at_one": "SFD for 2 calls, used at 1",
    "pd": "progressive distillation", "amed_plugin": "AMED-Plugin (iPNDM-4)",
    "teacher_heun18": "teacher, 18 Heun steps", "diff_instruct": "Diff-Instruct", "dmd": "DMD", "emd_1": "EMD-1",
    "emd_4": "EMD-4", "emd_16": "EMD-16", "emd_16_raw": "EMD-16, noise not cancelled",
}  # fmt: skip
# curve and colour of each student
_STUDENTS = {
    "sfd": "k*-", "sfd_v": "r^-", "second_stage": "mP-", "two_call_student_at_one": "kx", "pd": "bD-", "amed_plugin": "gv-",
}  # fmt: skip


def label(method: str) -> str:
    """As people write it: "ipndm_afs" -> "iPNDM-4 + AFS"."""
    solver = method.removesuffix("_afs")
    return _LABELS.get(solver, solver) + (" + AFS" if method.endswith("_afs") else "")


def ordered(methods: Iterable[str]) -> list[str]:
    """Each of `methods` once, in the order of the labels, the others last: a config keeps names by the alphabet."""
    return sorted(dict.fromkeys(methods), key=lambda name: [*_LABELS, name].index(name))


def figure_class() -> type:
    """matplotlib's Figure. Raises ImportError where it is not installed, with what to type."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the plot needs matplotlib; type: pip install 'diffjax[demo]'") from error
    return Figure


def draw_plot(rows: list[dict], free: Iterable[str], path: Path) -> None:
    """Frechet distance against calls, one line a method (mean over seeds), as a PNG. Of a solver with and without
    AFS the better is drawn at each number of calls; the table has both."""
    new_figure = figure_class()
    from matplotlib import colormaps

    free = [solver for solver in free if any(row["method"].removesuffix("_afs") == solver for row in rows)]
    figure = new_figure(figsize=(8.5, 4.8), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    for index, solver in enumerate(free):
        points = _best_of_afs(rows, solver)
        colour = colormaps["tab20"](index % 20)
        axes.plot(*zip(*points, strict=True), "o--", color=colour, markersize=4, linewidth=1, label=label(solver))
    for method in dict.fromkeys(row["method"] for row in rows):
        points = _points(rows, method)
        if method == "teacher":
            axes.axhline(points[0][1], color="0.4", linestyle="--", label=f"teacher, {points[0][0]} calls")
        elif method.removesuffix("_afs") not in free:
            style = _STUDENTS.get(method, "ks-")
            axes.plot(*zip(*points, strict=True), style, markersize=9, linewidth=2, label=label(method), zorder=5)
    axes.set(xlabel="network calls per image", ylabel="Fréchet distance in pixel space", yscale="log")
    # two-stage solvers diverge at 2 to 4 calls by factors of a thousand: the table has the figures
    plausible = [row["frechet_distance"] for row in rows if row["method"].startswith("euler")] or [1.0]
    axes.set_ylim(top=2 * max(plausible))
    axes.set_xticks(sorted({row["nfe"] for row in rows if row["nfe"] <= 10}))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path)


def _points(rows: list[dict], method: str) -> list[tuple[int, float]]:
    """(calls, mean over seeds) of a method."""
    by_calls: dict[int, list[float]] = {}
    for row in rows:
        if row["method"] == method:
            by_calls.setdefault(row["nfe"], []).append(row["frechet_distance"])
    return [(nfe, float(np.mean(values))) for nfe, values in sorted(by_calls.items())]


def _best_of_afs(rows: list[dict], solver: str) -> list[tuple[int, float]]:
    best: dict[int, float] = {}
    for nfe, value in (*_points(rows, solver), *_points(rows, f"{solver}_afs")):
        best[nfe] = min(value, best.get(nfe, value))
    return sorted(best.items())


def draw_grids(pictures: dict, rows: list[dict], gaps: list[dict], free: Iterable[str], path: Path) -> None:
    """One row of samples a method, the same seeds and classes in every column, as a PNG: the teacher; for each number
    of calls of an SFD student the best training-free solver and every student."""
    chosen = [key for key in pictures if key[0] == "teacher"]
    students = [method for method, _ in pictures if method != "teacher" and method.removesuffix("_afs") not in free]
    for nfe in sorted({row["nfe"] for row in gaps}):
        best = next(row["best_solver"] for row in gaps if row["nfe"] == nfe)
        chosen += [key for key in ((best, nfe), *((s, nfe) for s in dict.fromkeys(students))) if key in pictures]
    captions = [f"{label(method)}, {nfe} call{'s' if nfe > 1 else ''}" for method, nfe in chosen]
    named = {caption: pictures[key] for caption, key in zip(captions, chosen, strict=True)}
    size = next(iter(pictures.values())).shape[1]
    image_files.save_png(path, image_files.labelled_rows(named, scale=max(1, 48 // size)))


def sections(config: ConfigDict, commands: list[str]) -> list[tuple[str, str]]:
    """Headings and Markdown of the report, which place its tables."""
    trained = any("{seed}" in folder for students in config.students.values() for folder in students.runs)
    text = (
        f"{config.num_samples:,} samples a row, seeds {', '.join(map(str, config.seeds))}"
        f"{' (of sampling and of the students)' if trained else ' of sampling'}; the distance is taken in pixel space "
        "against all training images (no network, so no FID; lower is better). AFS: the first step is analytical and "
        "costs no call. SFD: one student for each number of calls."
    )
    return [
        ("Distance against calls", f"{text}\n\n![Fréchet distance by calls](frechet_by_calls.png)"),
        ("Means over seeds", "<!-- table: means -->"),
        ("Samples from the same seeds", "Every column has the same noise and class.\n\n![samples](samples.png)"),
        (
            "How much of the gap the student closes",
            "The gap lies between the best training-free solver at equal calls and the teacher.\n\n"
            "<!-- table: gap_closed -->",
        ),
        ("Noise of these figures", "<!-- table: noise -->"),
        ("Protocol", "What the values were measured by.\n\n<!-- table: protocols -->"),
        ("Training cost", "Images are trajectories for students that learn from noise.\n\n<!-- table: cost -->"),
        ("Reproduce", "```bash\n" + "\n".join(commands) + "\n```"),
    ]
