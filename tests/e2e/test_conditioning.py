"""The report on conditioning, from runs made here in small."""

import json

import jax
import numpy as np
import pytest

from diffjax import build
from diffjax.cli import conditioning, flags
from diffjax.cli.train import train_and_evaluate

VARIANTS = {"size": ("none", "alpha_1"), "switch": ("default", "rescaled"), "bf16": ("plain",)}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Runs of three steps, and one of bfloat16 that stopped."""
    folder = tmp_path_factory.mktemp("conditioning")
    names = [f"{effect}_{variant}" for effect, variants in VARIANTS.items() for variant in variants]
    for name in ("switch_start", *names):
        config = flags.load_config(f"configs/quick/conditioning_digits.py:{name}")
        config.model.update({"width": 16, "depth": 1, "heads": 2})
        config.data.views = 1
        config.train.update({"batch_size": 16, "total_images": 48, "log_every_steps": 1, "sample_every_steps": 0})
        config.train.update({"checkpoint_every_steps": 1, "num_devices": 1})
        if "start" in config.method:
            config.method.start = str(folder / "seed_0" / "switch_start")
        train_and_evaluate(config, folder / "seed_0" / name)
    (folder / "seed_0" / "bf16_plain" / "report.md").unlink()
    return folder


def test_the_report(base, tmp_path):
    config = flags.load_config("configs/quick/compare_conditioning.py")
    config.update({"base": str(base), "seeds": (0,), "num_samples": 30, "num_pairs": 10, "batch_size": 30, "shown": 4})
    config.effects = VARIANTS
    entries = {entry.method for entry in conditioning.entries(config)}
    assert entries == {f"{effect}, {variant}" for effect in ("size", "switch") for variant in VARIANTS[effect]}
    path = conditioning.compare(config, tmp_path, "the command")
    tables = json.loads(path.with_suffix(".json").read_text())["tables"]
    rows = {(row["effect"], row["variant"], row["metric"]): row["value"] for row in tables["effects"]}
    assert rows["size", "alpha_1", "pairwise_distance"] >= 0 and ("size", "none", "pairwise_distance") not in rows
    distances = [value for (_, _, metric), value in rows.items() if "frechet" in metric]
    assert len(distances) == 4 and np.isfinite(distances).all()
    best = rows["switch", "default", "best_frechet_distance"]
    assert 1 <= rows["switch", "default", "steps_to_default_best"] <= 3 and best > 0
    assert rows["bf16", "plain", "loss"] is None and rows["bf16", "plain", "steps"] == 3
    assert "samples.png" in path.read_text() and (tmp_path / "samples.png").exists()


def test_means():
    rows = [{"effect": "bf16", "variant": "plain", "seed": seed, "metric": "loss", "value": value} for seed, value in enumerate((1.0, None, 3.0))]
    (mean,) = conditioning.means(rows)
    assert mean == {"effect": "bf16", "variant": "plain", "metric": "loss", "seeds": 3, "with_value": 2, "mean": 2.0, "lowest": 1.0, "highest": 3.0}
    (never,) = conditioning.means([rows[1]])
    assert never["with_value"] == 0 and "mean" not in never


def test_the_told_height_reaches_the_samples(base):
    """Of a network all of whose weights count: other heights, other images; the same height, the same images."""
    run, random = build.load_run(base / "seed_0" / "size_alpha_1"), np.random.default_rng(0)
    run = run._replace(params=jax.tree.map(lambda leaf: 0.2 * random.standard_normal(leaf.shape, np.float32), run.params))
    config = flags.load_config("configs/quick/compare_conditioning.py")
    config.update({"batch_size": 8})
    four, again, eight = (conditioning._draw(config, run, 0, 8, {"height": height}) for height in (4, 4, 8))
    np.testing.assert_array_equal(four, again)
    assert np.abs(four - eight).max() > 1e-3
    with pytest.raises(ValueError, match=r"found metadata \['colour'\], and this network is told"):
        conditioning._draw(config, run, 0, 8, {"colour": 1.0})
