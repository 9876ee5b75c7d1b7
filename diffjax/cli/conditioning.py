"""Conditioning and pre-training strategies in small: what each variant changes, on three seeds.

A config names a folder of runs, one a variant (`{base}/seed_{seed}/{effect}_{variant}`), and the variants of each effect:

    size     pairwise_distance: root mean square difference of two images that differ in the told height alone (same noise,
             same class), mean over pairs of heights; frechet_distance with the heights of the data
    text     frechet_distance; right_digit: share of images in which a classifier sees the digit of the prompt
    switch   after a change of resolution: best_frechet_distance, and steps_to_default_best, the first step that is as good
             as the best of "default" (null: never)
    bf16     loss at the end, of how many steps; a loss that is not finite ends a run (null)

Table `effects`, rows {effect, variant, seed, metric, value}; `means`, the same over seeds. Frechet distances are taken in
pixel space to all training images, so they are no FID.
"""

import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from diffjax import build
from diffjax.cli import comparison, immiscible
from diffjax.data import digits, texts, transforms
from diffjax.metrics import fid
from diffjax.runtime import checkpoint, images, report
from diffjax.sampling import generate

Rows = list[dict]


def entries(config: ConfigDict) -> list[comparison.Entry]:
    """The runs of the first seed that are sampled, with their plans."""
    found = []
    for effect, variants in config.effects.items():
        for variant in variants if effect != "bf16" else ():
            run = build.load_run(_folder(config, effect, variant, config.seeds[0]))
            plan = build.run_plan(run)
            found.append(comparison.Entry(f"{effect}, {variant}", run, {plan.nfe: plan}))
    return found


def measure(config: ConfigDict, progress: Callable[[str], None]) -> tuple[Rows, dict[str, np.ndarray]]:
    """Table `effects`, and samples of the first seed by variant for a picture."""
    measures = {"size": _size, "text": _text, "bf16": _bf16}
    rows, shown = [], {}
    for effect, seed in itertools.product(config.effects, config.seeds):
        if effect == "switch":  # whose variants are measured against each other
            rows += _switch(config, seed, progress)
            continue
        for variant in config.effects[effect]:
            progress(f"seed {seed}: {effect}, {variant}")
            folder = _folder(config, effect, variant, seed)
            for metric, value, samples in measures[effect](config, folder, seed):
                rows.append({"effect": effect, "variant": variant, "seed": seed, "metric": metric, "value": value})
                if samples is not None and seed == config.seeds[0]:
                    shown[f"{effect}, {variant}"] = samples[: config.shown]
    return rows, shown


Measured = Iterator[tuple[str, float | None, np.ndarray | None]]


def _size(config: ConfigDict, folder: Path, seed: int) -> Measured:
    run = build.load_run(folder)
    told = run.config.model.get("metadata") is not None
    generator = np.random.default_rng(seed)
    heights = generator.choice(digits.HEIGHTS, config.num_samples).astype(np.float32)
    everywhere = {"height": heights, "left": generator.integers(0, 3, config.num_samples), "flip": generator.integers(0, 2, config.num_samples)}
    samples = _draw(config, run, seed, config.num_samples, everywhere if told else {})
    yield "frechet_distance", _distance(run, samples), samples
    if told:
        by_height = [_draw(config, run, seed, config.num_pairs, {"height": height}) for height in digits.HEIGHTS]
        pairs = [np.sqrt(np.mean((a - b) ** 2)) for a, b in itertools.combinations(by_height, 2)]
        yield "pairwise_distance", float(np.mean(pairs)), None


def _text(config: ConfigDict, folder: Path, seed: int) -> Measured:
    from sklearn.neighbors import KNeighborsClassifier

    run = build.load_run(folder)
    labels = np.arange(config.num_samples) % 10
    names = texts.of_classes("digits")
    prompts = [names[label] for label in labels]
    samples = _draw(config, run, seed, config.num_samples, {}, prompts=prompts)
    yield "frechet_distance", _distance(run, samples), samples
    pictures, classes = _labelled(run)
    judge = KNeighborsClassifier(5).fit(fid.pixels(pictures), classes)
    yield "right_digit", float(np.mean(judge.predict(fid.pixels(samples)) == labels)), None


def _along(config: ConfigDict, folder: Path, seed: int) -> dict[int, float]:
    """Distance at each kept step."""
    found, denoise = {}, None
    for step in checkpoint.steps(folder):
        run = build.load_run(folder, step)
        run = run if denoise is None else run._replace(denoise=denoise)  # so that sampling compiles once
        denoise = run.denoise
        found[step] = _distance(run, _draw(config, run, seed, config.num_samples, {}))
    return found


def _switch(config: ConfigDict, seed: int, progress: Callable[[str], None]) -> Rows:
    curves = {}
    for variant in config.effects.switch:
        progress(f"seed {seed}: switch, {variant}")
        curves[variant] = _along(config, _folder(config, "switch", variant, seed), seed)
    best, rows = min(curves["default"].values()), []
    for variant, curve in curves.items():
        steps, values = np.array(list(curve), float), np.array(list(curve.values()))
        found = {"best_frechet_distance": float(values.min()), "steps_to_default_best": immiscible.first_below(steps, values, best)}
        own = {"effect": "switch", "variant": variant, "seed": seed}
        rows += [{**own, "metric": metric, "value": value} for metric, value in found.items()]
    return rows


def _bf16(config: ConfigDict, folder: Path, seed: int) -> Measured:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    ended = (folder / "report.md").exists()
    yield "loss", losses[-1][1] if ended else None, None
    yield "steps", losses[-1][0], None


def _draw(config: ConfigDict, run: build.Run, seed: int, count: int, metadata: dict, **options) -> np.ndarray:
    plan = build.run_plan(run)
    size = min(config.batch_size, count)
    return build.draw(run, plan, seed, range(count), batch_size=size, metadata=metadata, **options)


def _distance(run: build.Run, samples: np.ndarray) -> float:
    return fid.frechet_distance(*fid.pixel_statistics(samples), *fid.pixel_statistics(_labelled(run)[0]))


def _labelled(run: build.Run) -> tuple[np.ndarray, np.ndarray]:
    """All training images float32 and their classes; views are in the order of the classes' list."""
    data = ConfigDict({**run.config.data.to_dict(), "num_classes": 10, "captions": "", "companions": ""})
    batch = build.all_items(data)
    return np.asarray(transforms.to_float(batch["image"])), batch["label"]


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
    for effect, variant, metric in dict.fromkeys((row["effect"], row["variant"], row["metric"]) for row in rows):
        own = [row["value"] for row in rows if (row["effect"], row["variant"], row["metric"]) == (effect, variant, metric)]
        values = [value for value in own if value is not None]
        spread = {"mean": np.mean(values), "lowest": min(values), "highest": max(values)} if values else {}
        found.append({"effect": effect, "variant": variant, "metric": metric, "seeds": len(own), "with_value": len(values), **spread})
    return found


def compare(
    config: ConfigDict, workdir: Path, command: str, progress: Callable[[str], None] = lambda text: None
) -> Path:
    """Measure, draw, and write `report.md` and `report.json` into `workdir`; returns the report's path."""
    start = time.perf_counter()
    rows, shown = measure(config, progress)
    workdir.mkdir(parents=True, exist_ok=True)
    pictures = {name: np.asarray(generate.to_uint8(samples)) for name, samples in shown.items()}
    images.save_png(workdir / "samples.png", images.labelled_rows(pictures, scale=4))
    tables = {"means": means(rows), "effects": rows, "evaluation": [{"seconds": time.perf_counter() - start}]}
    return report.write_report(workdir, "Conditioning in small", sections(config, command), tables)


def sections(config: ConfigDict, command: str) -> list[tuple[str, str]]:
    """Headings and Markdown of the report, which place its tables."""
    text = (
        f"Seeds {', '.join(map(str, config.seeds))} (of training and of sampling), {config.num_samples:,} samples a row, "
        f"{config.num_pairs:,} a height. Distances are taken in pixel space against all training images (no network, so no "
        "FID; lower is better). pairwise_distance: how much an image changes with the height that the network is told, same "
        "noise and class. right_digit: five nearest training images. bf16: a run without a loss was not finite and stopped."
    )
    return [
        ("Effects", f"{text}\n\n<!-- table: means -->"),
        ("Samples", "Each column has the same noise.\n\n![samples](samples.png)"),
        ("Reproduce", f"```bash\nbash launch/conditioning_digits.sh   # which ends with\n{command}\n```"),
    ]
