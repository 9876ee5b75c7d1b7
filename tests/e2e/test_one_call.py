"""The table of one-step generators, from runs trained for seconds."""

import json

import pytest

from diffjax.cli import flags, one_call
from diffjax.cli.train import train_and_evaluate


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a teacher, and two generators of it with one and with three Langevin steps."""
    folder = tmp_path_factory.mktemp("runs")
    train = {"batch_size": 16, "total_images": 64, "log_every_steps": 1, "sample_every_steps": 0, "num_devices": 1}
    teacher = flags.load_config("configs/quick/edm_digits.py")
    teacher.model.update({"width": 128, "depth": 2})
    teacher.optim.warmup_images = 0
    teacher.train.update(train)
    train_and_evaluate(teacher, folder / "teacher", command="train the teacher")
    for variant, steps in (("diff_instruct", 1), ("emd_16", 3)):
        config = flags.load_config(f"configs/quick/emd_digits.py:{variant}")
        config.method.update({"teacher": str(folder / "teacher"), "langevin_steps": steps, "check_step_sizes": False})
        config.train.update({**train, "batch_size": 64, "total_images": 128})
        train_and_evaluate(config, folder / "seed_0" / variant, command=f"train {variant}")
    return folder


def test_one_call_writes_its_tables(runs):
    config = flags.load_config("configs/quick/compare_emd.py")
    config.base, config.seeds, config.grid_columns = str(runs), (0, 1), 4
    config.students = {name: config.students[name] for name in ("diff_instruct", "emd_16")}
    config.students.diff_instruct.runs = ("{base}/seed_0/diff_instruct",)  # sampled twice, was trained once
    config.students.emd_16.seeds = (0,)
    config.gradient_norms = {"residual": ("emd_16", "grad_norm"), "with noise": ("emd_16", "grad_norm_raw")}
    config.update({"num_samples": 64, "batch_size": 64})
    one_call.compare(config, runs / "report", "compare")
    report = json.loads((runs / "report" / "report.json").read_text())
    rows = report["tables"]["one_call"]
    found = [(row["method"], row["nfe"], row["seed"]) for row in rows]
    first = [("teacher_heun18", 35, 0), ("diff_instruct", 1, 0), ("emd_16", 1, 0)]
    assert found == [*first, ("teacher_heun18", 35, 1), ("diff_instruct", 1, 1)]
    assert "two halves" in report["tables"]["noise"][0]["what"] and len(report["tables"]["noise"]) == 3
    assert all({"method", "seed", "frechet_distance", "recall"} <= set(row) for row in rows)
    protocols = {row["values"]: row for row in report["tables"]["protocols"]}
    assert list(protocols)[:3] == ["frechet_distance", "recall", "precision"] and len(protocols) == 4
    assert (protocols["recall"]["settings"], protocols["recall"]["num_samples"]) == (f"k={config.neighbours}, equal=False", 64)
    cost = {row["method"]: row for row in report["tables"]["cost"]}
    # 7 + 4 (score updates - 1) + 2 K for z at rest, 4 K for z that moves, forward passes and what is no network; but what
    # this network makes of level and class, two fifths of its work, is the same along a chain and computed once
    assert 9 + 12 < cost["diff_instruct"]["flops_ratio"] < 1.35 * (9 + 12)
    assert cost["diff_instruct"]["flops_ratio"] + 4 < cost["emd_16"]["flops_ratio"] < 1.35 * (7 + 12 + 4 * 3)
    assert cost["emd_16"]["peak_bytes"] > 0
    text = (runs / "report" / "report.md").read_text()
    assert "train emd_16" in text and "EMD-16" in text
    for picture in ("one_call.png", "samples.png", "gradient_norms.png"):
        assert (runs / "report" / picture).stat().st_size > 1000 and f"({picture})" in text


def test_it_needs_finished_runs(runs, tmp_path):
    config = flags.load_config("configs/quick/compare_emd.py")
    config.base = str(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="report.json does not exist: train that run to its end first"):
        one_call.compare(config, tmp_path / "report", "compare")
    assert not (tmp_path / "report").exists()
