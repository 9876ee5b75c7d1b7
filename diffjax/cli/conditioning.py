"""Conditioning and pre-training strategies in small: what each variant changes, on three seeds.

A config names a folder of runs, one a variant (`{base}/seed_{seed}/{effect}_{variant}`), and the variants of an effect:

    size     pairwise_distance: root mean square difference of two images that differ in the told height alone (same
             noise, same class), mean over pairs of heights; frechet_distance with the heights of the data
    text     frechet_distance; right_digit: share of images in which a classifier sees the digit of the prompt
    switch   after a change of resolution: best_frechet_distance, and steps_to_default_best, the first step that is as
             good as the best of "default" (null: never)
    bf16     loss_over_first: the last losses over that of the fresh network, which is 0 everywhere, so that above 1 a
             training has diverged; highest_over_first, the highest one, shows outbreaks that it came back from; a loss
             that is not finite ends a training (null) after so many steps

Table `effects`, rows {effect, variant, seed, metric, value}; `means`, the same over seeds; `claims`, for how many seeds
what the paper leads to expect holds. Frechet distances are taken in pixel space to all training images, so they are no
FID.
"""

import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from diffjax import build
from diffjax.cli import comparison, comparison_report, immiscible
from diffjax.core.types import Denoiser
from diffjax.data import digits, texts, transforms
from diffjax.metrics import fid, pixels
from diffjax.metrics.protocol import Result
from diffjax.metrics.references import Reference
from diffjax.runtime import checkpoint, images, report
from diffjax.sampling import generate

Rows = list[dict]

# effect, metric, a variant that is expected to have at most a share of what another one has. Berrada 2024, figures 2
# and 3, table 3; the share of steps is ours
CLAIMS = (
    ("size", "pairwise_distance", "alpha_1", 1, "constant"),
    ("size", "pairwise_distance", "alpha_4", 1, "alpha_1"),
    ("size", "frechet_distance", "alpha_4", 1, "alpha_4_drawn"),
    ("text", "frechet_distance", "replicate", 1, "zero"),
    ("text", "frechet_distance", "noisy_replicate", 1, "zero"),
    ("text", "right_digit", "zero", 1, "replicate"),
    ("text", "right_digit", "zero", 1, "noisy_replicate"),
    ("switch", "steps_to_default_best", "rescaled", 2 / 3, "default"),
    ("bf16", "loss_over_first", "qk_norm", 1, "plain"),
    ("bf16", "highest_over_first", "qk_norm", 1, "plain"),
    ("bf16", "loss_over_first", "qk_norm_3e-2", 1, "plain_3e-2"),
    ("bf16", "highest_over_first", "qk_norm_3e-2", 1, "plain_3e-2"),
)


def entries(config: ConfigDict) -> list[comparison.Entry]:
    """The runs of the first seed that are sampled, with their plans."""
    found = []
    for effect, variants in config.effects.items():
        for variant in variants if effect != "bf16" else ():
            run = _load(_folder(config, effect, variant, config.seeds[0]))
            plan = build.run_plan(run)
            found.append(comparison.Entry(f"{effect}, {variant}", run, {plan.nfe: plan}))
    return found


class Measures(NamedTuple):
    """rows: of table `effects`. curves: {variant, seed, step, frechet_distance} after the change of resolution. shown:
    images (n, H, W, C) of the first seed by their name. distances: of each effect, with their protocol."""

    rows: Rows
    curves: Rows
    shown: dict[str, np.ndarray]
    distances: dict[str, list[Result]]


def measure(config: ConfigDict, progress: Callable[[str], None]) -> Measures:
    """All that the report says."""
    measures = {"size": _size, "text": _text, "bf16": _bf16}
    found = Measures([], [], {}, {})
    for effect, seed in itertools.product(config.effects, config.seeds):
        if effect == "switch":  # whose variants are measured against each other
            curves = _curves(config, seed, progress, found.distances.setdefault(effect, []))
            found.curves.extend(curves)
            found.rows.extend(_switch(curves))
            continue
        for variant in config.effects[effect]:
            progress(f"seed {seed}: {effect}, {variant}")
            own = {"effect": effect, "variant": variant, "seed": seed}
            for metric, value, samples in measures[effect](config, _folder(config, effect, variant, seed), seed):
                if isinstance(value, Result):
                    found.distances.setdefault(effect, []).append(value)
                    value = value.value
                found.rows.append({**own, "metric": metric, "value": value})
                if seed == config.seeds[0]:
                    named = {f"{effect}, {variant}{told}": images for told, images in samples.items()}
                    found.shown.update({name: images[: config.shown] for name, images in named.items()})
    return found


# metric, value, images to show by what the network was told
Measured = Iterator[tuple[str, Result | float | None, dict[str, np.ndarray]]]


def _size(config: ConfigDict, folder: Path, seed: int) -> Measured:
    run = _load(folder)
    told = run.config.model.get("metadata") is not None
    generator = np.random.default_rng(seed)
    count = config.num_samples
    data = {"height": generator.choice(digits.HEIGHTS, count), "left": generator.integers(0, 3, count)}
    data |= {"flip": generator.integers(0, 2, count)}
    samples = _draw(config, run, seed, count, data if told else {})
    yield "frechet_distance", _distance(run, samples), {} if told else {"": samples}
    if told:
        count = config.num_pairs
        by_height = {height: _draw(config, run, seed, count, {"height": height}) for height in digits.HEIGHTS}
        pairs = [np.sqrt(np.mean((a - b) ** 2)) for a, b in itertools.combinations(by_height.values(), 2)]
        named = {f", {height} high": images for height, images in by_height.items()}
        yield "pairwise_distance", float(np.mean(pairs)), named


def _text(config: ConfigDict, folder: Path, seed: int) -> Measured:
    from sklearn.neighbors import KNeighborsClassifier

    run = _load(folder)
    labels = np.arange(config.num_samples) % 10
    names = texts.of_classes("digits")
    prompts = [names[label] for label in labels]
    samples = _draw(config, run, seed, config.num_samples, {}, prompts=prompts)
    yield "frechet_distance", _distance(run, samples), {"": samples}
    pictures, classes = _labelled(run)
    judge = KNeighborsClassifier(5).fit(fid.pixels(pictures), classes)
    yield "right_digit", float(np.mean(judge.predict(fid.pixels(samples)) == labels)), {}


def _curves(config: ConfigDict, seed: int, progress: Callable[[str], None], distances: list[Result]) -> Rows:
    """The distance at each kept step of each variant; they are appended to `distances` too."""
    found = []
    for variant in config.effects.switch:
        progress(f"seed {seed}: switch, {variant}")
        folder = _folder(config, "switch", variant, seed)
        for step in checkpoint.steps(folder):
            run = _load(folder, step)
            distances.append(_distance(run, _draw(config, run, seed, config.num_samples_along, {})))
            found.append({"variant": variant, "seed": seed, "step": step, "frechet_distance": distances[-1].value})
    return found


def _switch(curves: Rows) -> Rows:
    """Rows of one seed."""
    by_variant: dict[str, dict[int, float]] = {}
    for row in curves:
        by_variant.setdefault(row["variant"], {})[row["step"]] = row["frechet_distance"]
    best, rows = min(by_variant["default"].values()), []
    for variant, curve in by_variant.items():
        steps, values = np.array(list(curve), float), np.array(list(curve.values()))
        found = {"best_frechet_distance": float(values.min())}
        found["steps_to_default_best"] = immiscible.first_below(steps, values, best)
        own = {"effect": "switch", "variant": variant, "seed": curves[0]["seed"]}
        rows += [{**own, "metric": metric, "value": value} for metric, value in found.items()]
    return rows


def _bf16(config: ConfigDict, folder: Path, seed: int) -> Measured:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    ended = (folder / "report.md").exists()
    yield "loss_over_first", float(np.mean(losses[-config.last_losses :]) / losses[0]) if ended else None, {}
    yield "highest_over_first", max(losses) / losses[0] if ended else None, {}
    yield "steps", lines[-1]["step"], {}


def _draw(config: ConfigDict, run: build.Run, seed: int, count: int, metadata: dict, **options) -> np.ndarray:
    plan = build.run_plan(run)
    size = min(config.batch_size, count)
    return build.draw(run, plan, seed, range(count), batch_size=size, metadata=metadata, **options)


def _distance(run: build.Run, samples: np.ndarray) -> Result:
    return pixels.frechet(samples, _reference(run.config.data.image_size, run.config.data.views))


@functools.cache
def _reference(size: int, views: int) -> Reference:
    return pixels.reference(_images(size, views)[0], f"digits {size}x{size}, views={views}")


def _labelled(run: build.Run) -> tuple[np.ndarray, np.ndarray]:
    """All training images float32 and their classes."""
    return _images(run.config.data.image_size, run.config.data.views)


@functools.cache
def _images(size: int, views: int) -> tuple[np.ndarray, np.ndarray]:
    data = {"name": "digits", "image_size": size, "channels": 1, "num_classes": 10, "views": views}
    batch = build.all_items(ConfigDict(data))
    return np.asarray(transforms.to_float(batch["image"])), batch["label"]


def _load(folder: Path, step: int | None = None) -> build.Run:
    """`build.load_run` with one denoiser for equal networks, so that sampling compiles once."""
    run = build.load_run(folder, step)
    network = f"{json.dumps(run.config.model.to_dict(), sort_keys=True)} {run.data}"
    return run._replace(denoise=_denoisers.setdefault(network, run.denoise))


_denoisers: dict[str, Denoiser] = {}


def _folder(config: ConfigDict, effect: str, variant: str, seed: int) -> Path:
    """The run, which must have ended; that of a high learning rate may have stopped."""
    pattern = config.runs.replace("{effect}", effect).replace("{variant}", variant)
    folder = comparison.folder_of(config, pattern, seed)
    if effect != "bf16":
        comparison.read_report(folder)
    return folder


def means(rows: Rows) -> Rows:
    """Over seeds: mean, lowest and highest of the values there are, and how many."""
    found = []
    groups: dict[tuple[str, str, str], list[float | None]] = {}
    for row in rows:
        groups.setdefault((row["effect"], row["variant"], row["metric"]), []).append(row["value"])
    for (effect, variant, metric), own in groups.items():
        values = [value for value in own if value is not None]
        spread = {"mean": np.mean(values), "lowest": min(values), "highest": max(values)} if values else {}
        name = {"effect": effect, "variant": variant, "metric": metric}
        found.append({**name, "seeds": len(own), "with_value": len(values), **spread})
    return found


def claims(rows: Rows) -> Rows:
    """{effect, metric, variant, at_most, of, holds, seeds}: for how many seeds each of CLAIMS holds, of those whose two
    variants are there."""
    values = {(row["effect"], row["metric"], row["variant"], row["seed"]): row["value"] for row in rows}
    found = []
    for effect, metric, variant, share, other in CLAIMS:
        seeds = dict.fromkeys(row["seed"] for row in rows)
        pairs = [tuple(values.get((effect, metric, name, seed), ...) for name in (variant, other)) for seed in seeds]
        pairs = [pair for pair in pairs if ... not in pair]
        holds = sum(one is not None and (two is None or one <= share * two) for one, two in pairs)
        claim = {"effect": effect, "metric": metric, "variant": variant, "at_most": share, "of": other}
        found += [{**claim, "holds": holds, "seeds": len(pairs)}] if pairs else []
    return found


def compare(
    config: ConfigDict, workdir: Path, command: str, progress: Callable[[str], None] = lambda text: None
) -> Path:
    """Measure, draw, and write `report.md` and `report.json` into `workdir`; returns the report's path."""
    start = time.perf_counter()
    rows, curves, shown, distances = measure(config, progress)
    workdir.mkdir(parents=True, exist_ok=True)
    pictures = {name: np.asarray(generate.to_uint8(samples)) for name, samples in shown.items()}
    images.save_png(workdir / "samples.png", images.labelled_rows(pictures, scale=6))
    draw_curves(curves, workdir / "switch.png")
    tables = {"claims": claims(rows), "means": means(rows), "effects": rows, "curves": curves}
    tables["protocols"] = pixels.protocols({f"{effect}, frechet_distance": own for effect, own in distances.items()})
    tables["evaluation"] = [{"seconds": time.perf_counter() - start}]
    return report.write_report(workdir, "Conditioning in small", sections(config, command), tables)


def draw_curves(curves: Rows, path: Path) -> None:
    """Distance by step after the change of resolution, as a PNG: each seed, and the mean in bold."""
    figure = comparison_report.figure_class()(figsize=(7, 4), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    for index, variant in enumerate(dict.fromkeys(row["variant"] for row in curves)):
        own = [row for row in curves if row["variant"] == variant]
        steps = sorted({row["step"] for row in own})
        for seed in dict.fromkeys(row["seed"] for row in own):
            values = [row["frechet_distance"] for row in own if row["seed"] == seed]
            axes.plot(steps, values, color=f"C{index}", linewidth=0.7, alpha=0.5)
        values = [np.mean([row["frechet_distance"] for row in own if row["step"] == step]) for step in steps]
        axes.plot(steps, values, "o-", color=f"C{index}", markersize=4, label=variant)
    axes.set(xlabel="steps at 16 pixels", ylabel="Fréchet distance, pixels")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def sections(config: ConfigDict, command: str) -> list[tuple[str, str]]:
    """Headings and Markdown of the report, which place its tables."""
    text = (
        f"Seeds {', '.join(map(str, config.seeds))} (of training and of sampling), {config.num_samples:,} samples a "
        f"row, {config.num_pairs:,} a height, {config.num_samples_along:,} along a training. Distances are taken in "
        "pixel space against all training images (no network, so no FID; lower is better). pairwise_distance: how much "
        "an image changes with the height that the network is told, same noise and class. right_digit: five nearest "
        "training images. loss_over_first, highest_over_first: the last and the highest loss over that of the fresh "
        "network; with the last above 1 it diverged, without a value it was not finite."
    )
    expected = "For how many seeds the metric of `variant` is at most `at_most` times that of the variant `of`."
    return [
        ("Claims", f"{expected}\n\n<!-- table: claims -->"),
        ("Effects", f"{text}\n\n<!-- table: means -->"),
        ("After a change of resolution", "Thin: each seed. Bold: their mean.\n\n![switch](switch.png)"),
        ("Samples", "Each column has the same noise.\n\n![samples](samples.png)"),
        ("Protocol", "What the distances were measured by.\n\n<!-- table: protocols -->"),
        ("Reproduce", f"```bash\nbash launch/conditioning_digits.sh   # which ends with\n{command}\n```"),
    ]
