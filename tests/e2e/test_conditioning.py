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
    for name in names:
        config = flags.load_config(f"configs/quick/conditioning_digits.py:{name}")
        config.model.update({"width": 16, "depth": 1, "heads": 2})
        config.data.views = 1
        config.train.update({"batch_size": 16, "total_images": 48, "log_every_steps": 1, "sample_every_steps": 0})
        config.train.update({"checkpoint_every_steps": 1, "num_devices": 1})
        if "start" in config.method:
            config.method.start = str(folder / "seed_0" / "size_none")
        train_and_evaluate(config, folder / "seed_0" / name)
    (folder / "seed_0" / "bf16_plain" / "report.md").unlink()
    return folder


def test_the_report(base, tmp_path):
    config = flags.load_config("configs/quick/compare_conditioning.py")
    config.update({"base": str(base), "seeds": (0,), "num_samples": 30, "num_pairs": 10, "batch_size": 30, "shown": 4})
    config.update({"num_samples_along": 30, "last_losses": 2})
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
    assert rows["bf16", "plain", "loss_over_first"] is None and rows["bf16", "plain", "steps"] == 3
    assert [row["step"] for row in tables["curves"]] == [2, 3] * 2  # the checkpoints that are kept
    protocols = {row["values"]: row["reference"] for row in tables["protocols"]}
    assert protocols["size, frechet_distance"] == "digits 8x8, views=1"
    assert protocols["switch, frechet_distance"] == "digits 16x16, views=1"
    (claim,) = tables["claims"]  # the only two variants that are compared
    assert (claim["variant"], claim["of"], claim["seeds"]) == ("rescaled", "default", 1)
    for picture in ("samples.png", "switch.png"):
        assert picture in path.read_text() and (tmp_path / picture).exists()


def test_means():
    own = {"effect": "bf16", "variant": "plain", "metric": "loss_over_first"}
    rows = [{**own, "seed": seed, "value": value} for seed, value in enumerate((1.0, None, 3.0))]
    (mean,) = conditioning.means(rows)
    assert mean == {**own, "seeds": 3, "with_value": 2, "mean": 2.0, "lowest": 1.0, "highest": 3.0}
    (never,) = conditioning.means([rows[1]])
    assert never["with_value"] == 0 and "mean" not in never


def test_claims():
    """A value that is missing is worse than any, and two of them are no gain."""
    values = {"qk_norm": (1.0, None, 2.0), "plain": (1.5, None, None)}
    rows = [
        {"effect": "bf16", "variant": variant, "seed": seed, "metric": "loss_over_first", "value": value}
        for variant, found in values.items() for seed, value in enumerate(found)
    ]  # fmt: skip
    (claim,) = conditioning.claims(rows)
    own = {"effect": "bf16", "metric": "loss_over_first", "variant": "qk_norm", "at_most": 1, "of": "plain"}
    assert claim == {**own, "holds": 2, "seeds": 3}
    steps = [{**row, "effect": "switch", "metric": "steps_to_default_best"} for row in rows if row["seed"] == 0]
    steps = [{**row, "variant": {"qk_norm": "rescaled", "plain": "default"}[row["variant"]]} for row in steps]
    assert conditioning.claims(steps)[0]["holds"] == 1
    steps[0]["value"] = 1.01  # 2 / 3 of 1.5 and a little more
    assert conditioning.claims(steps)[0]["holds"] == 0


def test_the_told_height_reaches_the_samples(base):
    """Of a network all of whose weights count: other heights, other images; the same height, the same images."""
    run, random = build.load_run(base / "seed_0" / "size_alpha_1"), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.2 * random.standard_normal(leaf.shape, np.float32), run.params)
    run = run._replace(params=params)
    config = flags.load_config("configs/quick/compare_conditioning.py")
    config.update({"batch_size": 8})
    four, again, eight = (conditioning._draw(config, run, 0, 8, {"height": height}) for height in (4, 4, 8))
    np.testing.assert_array_equal(four, again)
    assert np.abs(four - eight).max() > 1e-3
    with pytest.raises(ValueError, match=r"found metadata \['colour'\], and this network is told"):
        conditioning._draw(config, run, 0, 8, {"colour": 1.0})
