"""Immiscible diffusion on the circle of eight Gaussians, and its report from runs made here in small."""

import json

import numpy as np
import pytest

from diffjax import build
from diffjax.build import gaussians
from diffjax.cli import flags, immiscible
from diffjax.train import loop


@pytest.mark.parametrize(
    ("assign", "last", "early", "late", "loss"),
    [("none", 500, 3.4, 3.35, 3.65), ("linear", 1000, 0.21, 0.10, 0.066), ("knn", 4000, 0.45, 0.58, 1.05)],
)
def test_eight_gaussians(assign, last, early, late, loss):
    """Spec check 8: squared W2 with one Euler step after 250 and 4000 updates, with 100 steps at the floor (0.06-0.19, data
    against data 0.15), and the loss. The figures are two seeds' on another machine, and their spread is not given: half as
    much again either way tells the three apart by far, as does 0.12 where the floor itself is of that size. The callbacks
    of `linear` take a minute for 4000, and there is little to see of "none": the README's table has both to the end."""
    rows = list(gaussians.curve(assign, 0, at=(250, last)))
    at = {(row["updates"], row["euler_steps"]): row["squared_w2"] for row in rows}
    assert at[250, 1] == pytest.approx(early, rel=0.5, abs=0.12)
    assert at[last, 1] == pytest.approx(late, rel=0.5, abs=0.12)
    assert at[last, 100] < 0.45  # three times the floor
    assert loss / 1.25 < rows[-1]["loss"] < 1.75 * loss  # on its way down where there are fewer updates


def test_first_step_below():
    steps, values = np.array([10.0, 20.0, 30.0]), np.array([4.0, 1.0, 0.5])
    assert immiscible.first_below(steps, values, 2.0) == pytest.approx(15)  # half way in the logarithm
    assert immiscible.first_below(steps, values, 5.0) == 10
    assert immiscible.first_below(steps, values, 0.1) is None


def test_effect_and_speed_up():
    def rows(assign, seed, values):
        own = {"objective": "flow_1", "assign": assign, "seed": seed}
        return [own | {"step": 10 * (i + 1), "frechet_distance": value} for i, value in enumerate(values)]

    curves = rows("none", 0, [4, 2, 3]) + rows("linear", 0, [2, 1, 1]) + rows("none", 1, [4, 2, 2]) + rows("linear", 1, [9, 9, 9])
    effects = immiscible.effect(curves)
    found = {(row["assign"], row["seed"]): row["steps_to_vanilla_best"] for row in effects}
    assert found == {("none", 0): 20, ("linear", 0): 10, ("none", 1): 20, ("linear", 1): None}
    (vanilla, linear) = immiscible.speed_up(effects)
    assert vanilla["times_sooner"] == 1 and vanilla["best_over_vanilla_best"] == 1
    assert linear["times_sooner"] == 2 and linear["reached"] == 1 and linear["seeds"] == 2
    assert linear["best_over_vanilla_best"] == pytest.approx((0.5 + 4.5) / 2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    base = tmp_path_factory.mktemp("immiscible")
    for name in ("flow_none", "flow_linear"):
        config = flags.load_config(f"configs/quick/immiscible_digits.py:{name}")
        config.model.update({"width": 32, "depth": 1})
        config.train.update({"batch_size": 32, "total_images": 32 * 60, "log_every_steps": 30, "sample_every_steps": 0})
        config.train.update({"checkpoint_every_steps": 20, "keep_every_steps": 20, "num_devices": 1})
        config.optim.warmup_images = 0
        workdir = base / "seed_0" / name
        loop.run(build.experiment(config), config, workdir)
        (workdir / "report.json").write_text(json.dumps({"tables": {}}))  # what cli.train leaves at the end
    return base


def test_the_report(runs, monkeypatch):
    config = flags.load_config("configs/quick/compare_immiscible.py")
    config.base, config.seeds = str(runs), (0,)
    plans = {"1": {"num_steps": 2}, "3": {"num_steps": 4}}
    config.trainings = {"flow": {"assigns": ("none", "linear"), "plans": plans}}
    config.update({"num_samples": 100, "batch_size": 100, "batches": (16,), "gaussians_updates": 250})
    assert [(entry.method, list(entry.plans)) for entry in immiscible.entries(config)] == [
        ("flow, none", [1, 3]), ("flow, linear", [1, 3]),
    ]  # fmt: skip
    monkeypatch.setattr(gaussians, "OPTIONS", {"none": {}, "linear": {}})
    path = immiscible.compare(config, runs / "report", "evaluate")
    tables = json.loads((runs / "report" / "report.json").read_text())["tables"]
    assert len(tables["curves"]) == 2 * 2 * 3 and len(tables["effect"]) == 4
    assert set(tables["effect"][0]) >= {"objective", "assign", "seed", "steps_to_vanilla_best", "best_frechet_distance"}
    assert set(tables["solvers"][0]) == {"batch", "method", "milliseconds", "quality_percent"}
    (protocol,) = tables["protocols"]
    assert (protocol["values"], protocol["num_samples"], protocol["reference"]) == ("frechet_distance", 100, "digits 8x8")
    quality = {row["method"]: row["quality_percent"] for row in tables["solvers"]}
    assert quality["scipy"] == pytest.approx(100) and quality["scipy, callback"] == pytest.approx(100, abs=1e-3)
    assert 90 < quality["auction"] <= 100 + 1e-3
    assert {(row["batch"], row["method"]) for row in tables["reduction"]} >= {(16, "linear"), (16, "knn")}
    assert (runs / "report" / "curves.png").exists() and (runs / "report" / "gaussians.png").exists()
    assert "curves.png" in path.read_text(encoding="utf-8")


def test_a_run_that_has_not_ended(runs):
    config = flags.load_config("configs/quick/compare_immiscible.py")
    config.base = str(runs)
    with pytest.raises(FileNotFoundError, match="train that run to its end first"):
        immiscible.entries(config)
