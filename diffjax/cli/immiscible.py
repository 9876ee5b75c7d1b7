"""Assigned noise against noise as drawn: how soon the same training reaches the same distance, and what pairing costs.

A config names runs that kept checkpoints along their training (train.keep_every_steps): `trainings`, name -> the
assignments it was done with, and `plans`, number of calls -> overrides of its sampling plan. At each checkpoint the
Frechet distance in pixel space to all training images is taken, from the same seeds. An objective is a training with a
number of calls. Tables of the report:

    effect      rows {objective, assign, seed, steps_to_vanilla_best, best_frechet_distance, vanilla_best}: the first
                step at which the distance is the best one of "none" or below, between checkpoints by a line in log
                distance; null: never
    speed_up    the same over seeds: steps of "none" to its best over steps to reach it
    curves      every distance
    reduction, solvers   see `assign_tables`
    gaussians   see `gaussians`
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from diffjax import build
from diffjax.assign import fields
from diffjax.build import assign_tables, gaussians, image_sets
from diffjax.cli import comparison, comparison_report
from diffjax.data import transforms
from diffjax.metrics import pixels
from diffjax.metrics.protocol import Result
from diffjax.metrics.references import Reference
from diffjax.runtime import checkpoint, report

Rows = list[dict]

# the same in every panel
_COLOURS = {"none": "k", "linear": "C0", "auction": "C1", "knn": "C2", "class": "C3"}


def entries(config: ConfigDict) -> list[comparison.Entry]:
    """Each objective of the runs of the first seed, with its plan."""
    found = []
    for training, section in config.trainings.items():
        for assign in section.assigns:
            run = build.load_run(_folder(config, training, assign, config.seeds[0]))
            plans = [build.run_plan(run, **overrides) for overrides in section.plans.values()]
            found.append(comparison.Entry(f"{training}, {assign}", run, {plan.nfe: plan for plan in plans}))
    return found


def measure(config: ConfigDict, progress: Callable[[str], None]) -> tuple[Rows, list[Result]]:
    """Rows {objective, assign, seed, step, frechet_distance}, and their distances with the protocol."""
    rows, results, real, denoisers = [], [], None, {}
    for seed in config.seeds:
        for training, section in config.trainings.items():
            for assign in section.assigns:
                folder = _folder(config, training, assign, seed)
                progress(f"seed {seed}: {training}, {assign}")
                for step in checkpoint.steps(folder):
                    run = build.load_run(folder, step)
                    # one denoiser for all of a training, so that sampling compiles once
                    run = run._replace(denoise=denoisers.setdefault(training, run.denoise))
                    if real is None:
                        data = run.config.data
                        real = pixels.reference(build.all_images(data), image_sets.data_name(data))
                    for calls, overrides in section.plans.items():
                        row = {"objective": f"{training}_{calls}", "assign": assign, "seed": seed, "step": step}
                        results.append(_distance(config, run, dict(overrides), seed, real))
                        rows.append(row | {"frechet_distance": results[-1].value})
    return rows, results


def _distance(config: ConfigDict, run: build.Run, overrides: dict, seed: int, real: Reference) -> Result:
    plan = build.run_plan(run, **overrides)
    samples = build.draw(run, plan, seed, range(config.num_samples), batch_size=config.batch_size)
    return pixels.frechet(samples, real)


def _folder(config: ConfigDict, training: str, assign: str, seed: int) -> Path:
    """The run, which must have ended."""
    pattern = config.runs.replace("{training}", training).replace("{assign}", assign)
    folder = comparison.folder_of(config, pattern, seed)
    comparison.read_report(folder)
    return folder


# Tables ----------------------------------------------------------------------------------------------------------


def effect(curves: Rows, value: str = "frechet_distance", step: str = "step") -> Rows:
    """Table `effect` of rows with `objective`, `assign`, `seed`, `step` and `value`; "none" must be among them."""
    rows = []
    for objective, seed in dict.fromkeys((row["objective"], row["seed"]) for row in curves):
        own = [row for row in curves if (row["objective"], row["seed"]) == (objective, seed)]
        by_assign = {name: _series(own, name, step, value) for name in dict.fromkeys(row["assign"] for row in own)}
        best = float(np.min(by_assign["none"][1]))
        for assign, (steps, values) in by_assign.items():
            rows.append(
                {
                    "objective": objective,
                    "assign": assign,
                    "seed": seed,
                    "steps_to_vanilla_best": first_below(steps, values, best),
                    f"best_{value}": float(np.min(values)),
                    "vanilla_best": best,
                }
            )
    return rows


def first_below(steps: np.ndarray, values: np.ndarray, level: float) -> float | None:
    """The step at which `values` (n,) at `steps` (n,) first are `level` or below, log-linear between two; None: never."""
    below = np.flatnonzero(values <= level)
    if not len(below):
        return None
    at = below[0]
    if at == 0:
        return float(steps[0])
    (x0, x1), (y0, y1) = steps[at - 1 : at + 1], np.log(np.maximum(values[at - 1 : at + 1], 1e-12))
    return float(x0 + (x1 - x0) * (y0 - np.log(max(level, 1e-12))) / (y0 - y1))


def speed_up(effects: Rows) -> Rows:
    """Over seeds: steps of "none" to its best over those of each to reach it (a seed that never does counts 0 in the
    lowest and is left out of the mean), and the ratio of best distances."""
    value = next(name for name in effects[0] if name.startswith("best_"))
    rows = []
    for objective, assign in dict.fromkeys((row["objective"], row["assign"]) for row in effects):
        ratios, distances, best = [], [], []
        for row in effects:
            if (row["objective"], row["assign"]) != (objective, assign):
                continue
            same = (r for r in effects if (r["objective"], r["seed"]) == (objective, row["seed"]))
            vanilla = next(r for r in same if r["assign"] == "none")
            steps = row["steps_to_vanilla_best"]
            ratios.append(vanilla["steps_to_vanilla_best"] / steps if steps else None)
            distances.append(row[value] / row["vanilla_best"])
            best.append(row[value])
        reached = [ratio for ratio in ratios if ratio is not None]
        rows.append(
            {
                "objective": objective,
                "assign": assign,
                "seeds": len(ratios),
                "reached": len(reached),
                "times_sooner": float(np.mean(reached)) if reached else None,
                value: float(np.mean(best)),
                "best_over_vanilla_best": float(np.mean(distances)),
                "lowest": float(min(distances)),
                "highest": float(max(distances)),
            }
        )
    return rows


def toy(config: ConfigDict, progress: Callable[[str], None]) -> Rows:
    """Rows of `gaussians.curve` for every assignment that it has, and every seed."""
    rows = []
    for seed in config.seeds:
        for assign in gaussians.OPTIONS:
            progress(f"seed {seed}: eight Gaussians, {assign}")
            rows += gaussians.curve(assign, seed, at=range(250, config.gaussians_updates + 1, 250))
    return rows


def _series(rows: Rows, assign: str, step: str, value: str) -> tuple[np.ndarray, np.ndarray]:
    own = sorted((row[step], row[value]) for row in rows if row["assign"] == assign)
    return np.array([x for x, _ in own], float), np.array([y for _, y in own], float)


# Report ----------------------------------------------------------------------------------------------------------


def draw_curves(rows: Rows, path: Path, step: str = "step", value: str = "frechet_distance") -> None:
    """Distance along training, mean over seeds, one panel an objective, as a PNG."""
    objectives = list(dict.fromkeys(row["objective"] for row in rows))
    columns = min(3, len(objectives))
    lines = -(-len(objectives) // columns)
    figure = comparison_report.figure_class()(figsize=(3.6 * columns, 3.0 * lines), dpi=130, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, objective in zip(panels, objectives, strict=False):
        own = [row for row in rows if row["objective"] == objective]
        for assign in dict.fromkeys(row["assign"] for row in own):
            steps, values = _series(own, assign, step, value)
            places = np.unique(steps)
            means = [values[steps == place].mean() for place in places]
            axes.plot(places, means, ".-", color=_COLOURS[assign], label=assign)
        axes.set(title=objective, yscale="log", xlabel="training steps")
        axes.grid(alpha=0.3, which="both")
    for axes in panels[len(objectives) :]:
        axes.set_visible(False)
    panels[0].set_ylabel("distance")
    lines = {line.get_label(): line for axes in panels for line in axes.get_lines()}
    figure.legend(lines.values(), lines, loc="outside right upper", frameon=False)
    figure.savefig(path)


def compare(
    config: ConfigDict, workdir: Path, command: str, progress: Callable[[str], None] = lambda text: None
) -> Path:
    """Measure, draw, and write `report.md` and `report.json` into `workdir`; returns the report's path."""
    start = time.perf_counter()
    (training, section), *_ = config.trainings.items()
    first = build.load_run(_folder(config, training, section.assigns[0], config.seeds[0]))
    curves, results = measure(config, progress)
    small = toy(config, progress)
    small = [row | {"objective": f"{row['euler_steps']} Euler step{'s' if row['euler_steps'] > 1 else ''}"} for row in small]
    workdir.mkdir(parents=True, exist_ok=True)
    draw_curves(curves, workdir / "curves.png")
    draw_curves(small, workdir / "gaussians.png", "updates", "squared_w2")
    effects, small_effects = effect(curves), effect(small, "squared_w2", "updates")
    last = max(row["updates"] for row in small)
    tables = {
        "speed_up": speed_up(effects),
        "reduction": assign_tables.reduction(_images(config, first.config.data), config.batches),
        "solvers": assign_tables.solvers(config.batches, progress),
        "gaussians_speed_up": speed_up(small_effects),
        "gaussians": [row for row in small if row["updates"] in (250, last)],
        "effect": effects,
        "gaussians_effect": small_effects,
        "protocols": pixels.protocols({"frechet_distance": results}),
        "curves": curves,
        "evaluation": [{"seconds": time.perf_counter() - start, "samples_per_row": config.num_samples}],
    }
    return report.write_report(workdir, "Immiscible diffusion", sections(config, command), tables)


def _images(config: ConfigDict, data: ConfigDict) -> Mapping[str, np.ndarray]:
    """Images for the table `reduction`, as they are trained on."""
    own = np.asarray(transforms.to_float(build.all_images(data)))
    return {data.name: own, "fields": fields.images(max(config.batches))}


def sections(config: ConfigDict, command: str) -> list[tuple[str, str]]:
    """Headings and Markdown of the report, which place its tables."""
    text = (
        f"Seeds {', '.join(map(str, config.seeds))} (of training and of sampling), {config.num_samples:,} samples a row; the "
        "distance is taken in pixel space against all training images (no network, so no FID; lower is better). The number "
        "in an objective is that of network calls.\n\n"
        "times_sooner: training steps that noise as drawn takes to its best distance, over those to reach the same with "
        "assigned noise (mean of the seeds that reach it). best_over_vanilla_best: the best distance of a run over that of "
        "noise as drawn, mean, lowest and highest of the seeds; below 1 is better."
    )
    return [
        ("Effect", f"{text}\n\n![distance along training](curves.png)\n\n<!-- table: speed_up -->"),
        (
            "What assignment does to a batch",
            "By how many per cent the mean distance between image and noise falls. `fields`: random fields with the spectrum "
            "of photographs, 32x32x3, unit variance.\n\n<!-- table: reduction -->",
        ),
        (
            "What it costs",
            "On those fields; the gain in the sum of products over noise as drawn, the exact plan's being 100. matmul: the "
            "costs, from which scipy, auction and sinkhorn start; the callback has both in it, and the transfers.\n\n"
            "<!-- table: solvers -->",
        ),
        (
            "Eight Gaussians",
            "Flow matching in two dimensions; squared 2-Wasserstein distance of 1,000 samples to as many data points.\n\n"
            "![distance along training](gaussians.png)\n\n<!-- table: gaussians_speed_up -->\n\n<!-- table: gaussians -->",
        ),
        ("Protocol", "What the values were measured by.\n\n<!-- table: protocols -->"),
        ("Reproduce", f"```bash\nbash launch/immiscible_digits.sh   # which ends with\n{command}\n```"),
    ]
