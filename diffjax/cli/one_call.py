"""One-step generators beside each other: Frechet distance, recall, and what an iteration costs.

A teacher and its generators sample from the same seeds; every row of the table `one_call` is (method, seed,
frechet_distance, recall, precision) in pixel space, against all training images. A config names the teacher's run and
`students` as in `comparison`.

`cost` is the compiler's: the floating-point operations of one training iteration in forward passes of the network on
the same batch, loops unrolled (a loop's body is counted once), and the peak of the memory the iteration works in.
"""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from diffjax import build
from diffjax.build import image_sets
from diffjax.cli import comparison, comparison_report
from diffjax.cli.comparison import Rows
from diffjax.metrics import pixels
from diffjax.metrics.protocol import Result
from diffjax.runtime import configs, report, writers
from diffjax.runtime import images as image_files
from diffjax.sampling import generate


def entries(config: ConfigDict) -> list[comparison.Entry]:
    """The teacher and the generators of the first seed."""
    teacher = build.load_run(comparison.folder_of(config, config.teacher, 0))
    return [_teacher_entry(config, teacher), *comparison.student_entries(config, teacher, config.seeds[0])]


def _teacher_entry(config: ConfigDict, teacher: build.Run) -> comparison.Entry:
    plan = build.run_plan(teacher)
    return comparison.Entry(config.teacher_method, teacher, {plan.nfe: plan})


def measure(
    config: ConfigDict, progress: Callable[[str], None]
) -> tuple[Rows, dict[str, np.ndarray], dict[str, list[Result]]]:
    """Rows of the table `one_call`, the first images of each method at the first seed, and the values by name, each
    with its protocol, the distance between two halves of the data among them."""
    teacher = build.load_run(comparison.folder_of(config, config.teacher, 0))
    data = build.all_images(teacher.config.data)
    name = image_sets.data_name(teacher.config.data)
    real = pixels.reference(data, name, keep_features=True)
    rows, pictures, results = [], {}, {"frechet_distance": [], "recall": [], "precision": []}
    for seed in config.seeds:
        for entry in (_teacher_entry(config, teacher), *comparison.student_entries(config, teacher, seed)):
            (nfe, plan), *_ = entry.plans.items()
            progress(f"seed {seed}: {entry.method}")
            samples = build.draw(entry.run, plan, seed, range(config.num_samples), batch_size=config.batch_size)
            found = {"frechet_distance": pixels.frechet(samples, real), **pixels.prdc(samples, real, config.neighbours)}
            for metric, measured in results.items():
                measured.append(found[metric])
            values = {metric: found[metric].value for metric in results}
            rows.append({"method": entry.method, "nfe": nfe, "seed": seed, **values})
            pictures.setdefault(entry.method, np.asarray(generate.to_uint8(samples[: config.grid_columns])))
    return rows, pictures, results | {comparison.HALVES: [comparison.halves(data, name)]}


# Tables ----------------------------------------------------------------------------------------------------------


def means(rows: Rows) -> Rows:
    """One row a method: mean over the seeds, and lowest and highest distance."""
    out = []
    for method in comparison_report.ordered(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        distances = [row["frechet_distance"] for row in own]
        out.append(
            {
                "method": comparison_report.label(method),
                "calls": own[0]["nfe"],
                "seeds": len(own),
                "frechet_distance": float(np.mean(distances)),
                "lowest": min(distances),
                "highest": max(distances),
                "recall": float(np.mean([row["recall"] for row in own])),
                "precision": float(np.mean([row["precision"] for row in own])),
            }
        )
    return out


def cost(config: ConfigDict, progress: Callable[[str], None]) -> Rows:
    """What an iteration of each generator's training costs by the compiler: (method, flops_ratio, peak_bytes)."""
    out = []
    for method, student in config.students.items():
        progress(f"compiling {method}")
        saved = ConfigDict(configs.read(comparison.folder_of(config, student.runs[0], config.seeds[0])))
        ratio, peak = build.emd_iteration(saved)
        out.append({"method": method, "flops_ratio": ratio, "peak_bytes": peak})
    base = next((row["flops_ratio"] for row in out if row["method"] == "diff_instruct"), math.nan)
    return [{**row, "against_diff_instruct": row["flops_ratio"] / base} for row in out]


# Pictures --------------------------------------------------------------------------------------------------------


def draw_plot(rows: Rows, path: Path) -> None:
    """Distance and recall of each method, one point a seed, as a PNG."""
    figure_class = comparison_report.figure_class()
    from matplotlib import ticker

    methods = comparison_report.ordered(row["method"] for row in rows)
    figure = figure_class(figsize=(8.5, 3.8), dpi=130, layout="constrained")
    titles = {"frechet_distance": "Fréchet distance in pixel space", "recall": "recall"}
    for axes, (key, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for row in rows:
            axes.plot(row[key], methods.index(row["method"]), "k*" if row["nfe"] > 1 else "ro", markersize=6, alpha=0.7)
        axes.set_yticks(range(len(methods)), [comparison_report.label(method) for method in methods])
        axes.invert_yaxis()
        axes.set_xlabel(title)
        axes.grid(alpha=0.3)
    figure.axes[0].set_xscale("log", subs=())
    figure.axes[0].xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    figure.axes[0].xaxis.set_major_formatter("{x:g}")
    figure.axes[1].set_yticklabels([])
    figure.savefig(path)


def draw_gradients(curves: Mapping[str, tuple[list, list]], path: Path) -> None:
    """Norms of the generator's gradient against images seen, as a PNG (Xie 2024, figure 3)."""
    figure = comparison_report.figure_class()(figsize=(6, 3.4), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    for name, (images, norms) in curves.items():
        axes.plot(images, norms, label=name)
    axes.set(xlabel="images", ylabel="norm of the generator's gradient", yscale="log")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path)


def gradient_curves(config: ConfigDict) -> dict[str, tuple[list, list]]:
    """Curves of config.gradient_norms, name -> [method, metric]: (images, values) from the logs of the first seed."""
    curves = {}
    for name, (method, metric) in config.gradient_norms.items():
        folder = comparison.folder_of(config, config.students[method].runs[0], config.seeds[0])
        lines = [line for line in writers.read(folder / writers.FILE_NAME) if metric in line]
        curves[name.replace("_", " ")] = [line["images"] for line in lines], [line[metric] for line in lines]
    return curves


def compare(
    config: ConfigDict, workdir: Path, command: str, progress: Callable[[str], None] = lambda text: None
) -> Path:
    """Measure, draw, and write `report.md` and `report.json` into `workdir`; returns the report's path."""
    start = time.perf_counter()
    training = comparison.cost(config)  # first: it knows at once which runs are not finished
    curves = gradient_curves(config)
    rows, pictures, results = measure(config, progress)
    workdir.mkdir(parents=True, exist_ok=True)
    draw_plot(rows, workdir / "one_call.png")
    draw_gradients(curves, workdir / "gradient_norms.png")
    named = {comparison_report.label(method): pictures[method] for method in comparison_report.ordered(pictures)}
    size = next(iter(pictures.values())).shape[1]
    image_files.save_png(workdir / "samples.png", image_files.labelled_rows(named, scale=max(1, 48 // size)))
    tables = {
        "means": means(rows),
        "noise": comparison.noise(rows, *results[comparison.HALVES], ()),
        "cost": cost(config, progress),
        "training": training,
        "evaluation": [{"seconds": time.perf_counter() - start, "samples_per_row": config.num_samples}],
        "protocols": pixels.protocols(results),
        "one_call": rows,
    }
    commands = [comparison.read_report(Path(row["run"]))["environment"]["command"] for row in training]
    return report.write_report(
        workdir, "Generators of one network call", sections(config, [*dict.fromkeys(commands), command]), tables
    )


def sections(config: ConfigDict, commands: list[str]) -> list[tuple[str, str]]:
    """Headings and Markdown of the report, which place its tables."""
    text = (
        f"{config.num_samples:,} samples a row, seeds {', '.join(map(str, config.seeds))} (of sampling and of training); the "
        "distance is taken in pixel space against all training images (no network, so no FID; lower is better). "
        f"Recall and precision: {config.neighbours} nearest neighbours in pixel space, as many samples as images."
    )
    return [
        ("Distance and recall", f"{text}\n\n![Distance and recall by method](one_call.png)\n\n<!-- table: means -->"),
        ("Noise of these figures", "<!-- table: noise -->"),
        ("Samples from the same seeds", "Every column has the same noise and class.\n\n![samples](samples.png)"),
        (
            "Noise cancellation",
            "The gradient's norm for the chain's residual, and for its noisy end, which has the same mean where the "
            "latent barely moves (Xie 2024, figure 3).\n\n![norm of the gradient](gradient_norms.png)",
        ),
        (
            "Cost of an iteration",
            "flops_ratio: in forward passes on the same batch. With K steps EMD makes 4 for each update of the student "
            "score and 3 + 4 K, Diff-Instruct 3 + 2; less where what a network makes of level and class, the same along "
            "a chain, is much of its work, since that is computed once.\n\n<!-- table: cost -->",
        ),
        ("Protocol", "What the values were measured by.\n\n<!-- table: protocols -->"),
        ("Training", "<!-- table: training -->"),
        ("Reproduce", "```bash\n" + "\n".join(commands) + "\n```"),
    ]
