"""The quickstart in small, through the same functions: teacher, student, comparison, reports."""

import json
import shutil

import numpy as np
import pytest

from diffjax import build
from diffjax.cli import comparison, flags
from diffjax.cli.train import train_and_evaluate


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a teacher and a student of two calls, both trained for seconds."""
    folder = tmp_path_factory.mktemp("runs")
    teacher = flags.load_config("configs/quick/edm_digits.py")
    teacher.model.update({"width": 32, "depth": 1})
    teacher.optim.warmup_images = 0
    teacher.train.update({"batch_size": 64, "total_images": 64 * 40, "log_every_steps": 10, "sample_every_steps": 20})
    train_and_evaluate(teacher, folder / "teacher", command="train the teacher")
    student = flags.load_config("configs/quick/sfd_digits.py:2")
    student.method.teacher = str(folder / "teacher")
    student.train.update({"batch_size": 32, "total_images": 32 * 4, "log_every_steps": 2, "sample_every_steps": 0})
    train_and_evaluate(student, folder / "student_0", command="train the student")
    shutil.copytree(folder / "student_0", folder / "student_1")
    return folder


def test_run_folder_is_complete_and_the_loss_falls(runs):
    names = {path.name for path in (runs / "teacher").iterdir()}
    assert {"config.json", "metrics.jsonl", "checkpoints", "samples", "report.md", "report.json"} <= names
    losses = [json.loads(line)["loss"] for line in (runs / "teacher" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.8 * losses[0]
    assert len(list((runs / "teacher" / "samples").glob("step_*.png"))) == 2


def test_student_starts_from_the_teacher_and_moves(runs):
    teacher, student = build.load_run(runs / "teacher"), build.load_run(runs / "student_0")
    assert build.run_plan(student).nfe == 2
    kernels = [run.params["image_in"]["kernel"] for run in (teacher, student)]
    moved = np.abs(kernels[0] - kernels[1]).max()
    # 4 iterations of 2 Adam updates, each at most about the learning rate 1e-3 (half_drop lowers the last)
    assert 0 < moved < 0.012


def test_comparison_writes_the_table(runs):
    config = flags.load_config("configs/quick/compare_digits.py")
    config.base, config.solvers = str(runs), {"euler": config.solvers.euler}
    config.students = {"sfd": {"runs": ("{base}/student_{seed}",), "num_steps": ()}}
    config.update({"calls": (2, 3), "num_samples": 64, "batch_size": 64, "seeds": (0, 1), "grid_columns": 4})
    comparison.compare(config, runs / "comparison", "compare")
    report = json.loads((runs / "comparison" / "report.json").read_text())
    rows = report["tables"]["frechet_by_calls"]
    assert {(row["method"], row["nfe"]) for row in rows} == {
        ("teacher", 35), ("euler", 2), ("euler", 3), ("euler_afs", 2), ("euler_afs", 3), ("sfd", 2),
    }  # fmt: skip
    assert {row["seed"] for row in rows} == {0, 1} and set(rows[0]) == {"method", "nfe", "seed", "frechet_distance"}
    assert report["environment"]["versions"]["jax"]
    distances, halves = report["tables"]["protocols"]
    assert (distances["values"], distances["metric"], distances["features"]) == ("frechet_distance", "frechet", "pixels")
    assert (distances["num_samples"], distances["reference_count"], halves["num_samples"]) == (64, 1797, 898)
    assert distances["protocol"] != halves["protocol"] and "FID" not in distances["in words"]
    text = (runs / "comparison" / "report.md").read_text()
    assert "train the teacher" in text and "train the student" in text
    for picture in ("frechet_by_calls.png", "samples.png"):
        assert (runs / "comparison" / picture).stat().st_size > 1000 and f"({picture})" in text


def test_comparison_needs_finished_runs(runs, tmp_path):
    config = flags.load_config("configs/quick/compare_digits.py")
    config.base = str(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="report.json does not exist: train that run to its end first"):
        comparison.compare(config, tmp_path / "comparison", "compare")
    assert not (tmp_path / "comparison").exists()


def test_gap_closed_by_hand():
    rows = [
        {"method": "teacher", "nfe": 35, "seed": 0, "frechet_distance": 1.0},
        {"method": "euler", "nfe": 2, "seed": 0, "frechet_distance": 5.0},
        {"method": "ipndm", "nfe": 2, "seed": 0, "frechet_distance": 3.0},
        {"method": "sfd", "nfe": 2, "seed": 0, "frechet_distance": 1.5},
    ]
    (gap,) = comparison.gap_closed(rows, ("euler", "ipndm"))
    assert gap["best_solver"] == "ipndm" and gap["gap_closed"] == 0.75
