"""The command that evaluates: runs over steps, checkpoints and guidance, folders, what fails, what may stand beside
what."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from diffjax import build
from diffjax.build import image_sets
from diffjax.cli import evaluate, flags, metric_plots, metrics
from diffjax.train import loop

ROOT = Path(__file__).parent.parent.parent
SMALL = {"batch_size": 64, "log_every_steps": 1, "sample_every_steps": 0, "num_devices": 1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a teacher that can be guided, three checkpoints of it, and a classifier."""
    folder = tmp_path_factory.mktemp("runs")
    teacher = flags.load_config(str(ROOT / "configs/quick/edm_digits.py"))
    teacher.model.update({"width": 32, "depth": 1})
    teacher.optim.warmup_images = 0
    teacher.method.label_dropout = 0.1
    teacher.sample.num_steps = 3
    teacher.train.update({**SMALL, "total_images": 6 * 64, "keep_every_steps": 2, "checkpoint_every_steps": 2})
    loop.run(build.experiment(teacher), teacher, folder / "teacher")
    classifier = flags.load_config(str(ROOT / "configs/quick/classifier_digits.py"))
    classifier.optim.warmup_images = 0
    classifier.model.width = 8
    classifier.train.update({**SMALL, "total_images": 2 * 64})
    loop.run(build.experiment(classifier), classifier, folder / "classifier")
    return folder


def quick_config(runs):
    config = flags.load_config(str(ROOT / "configs/quick/evaluate_digits.py"))
    config.sets.teacher.run, config.spaces.classifier.weights = str(runs / "teacher"), str(runs / "classifier")
    config.spaces.classifier = {"metrics": ("frechet",), "weights": str(runs / "classifier")}
    config.sets.teacher.num_steps = (2, 3)
    config.update({"num_samples": 200, "batch_size": 64, "seeds": (0, 1), "num_devices": 1})
    return config


@pytest.fixture
def config(runs):
    return quick_config(runs)


def tables(folder):
    return json.loads((folder / "report.json").read_text())["tables"]


def values(folder):
    return {(row["metric"], row["nfe"]): row["value"] for row in tables(folder)["metrics"]}


def measured(rows):
    lines = metric_plots.tables(rows)["metrics"]
    return {(line["metric"], line["nfe"]): line["value"] for line in lines}


@pytest.fixture(scope="module")
def swept(runs, tmp_path_factory):
    """The quick config, smaller."""
    made = tmp_path_factory.mktemp("swept")
    config = quick_config(runs)
    metrics.compare(config, made, "evaluate")
    return config, made


def test_a_run_over_its_steps(swept):
    _, folder = swept
    rows = tables(folder)["metrics"]
    assert {row["metric"] for row in rows} == {
        "classifier Frechet distance",
        *(f"pixel {name}" for name in ("Frechet distance", "precision", "recall", "density", "coverage")),
    }
    assert {row["nfe"] for row in rows} == {3, 5} and all(row["seeds"] == "0: 0-199; 1: 0-199" for row in rows)
    assert all(row["min"] <= row["mean"] <= row["max"] for row in rows)
    assert all(row["value"] == row["min" if "distance" in row["metric"] else "mean"] for row in rows)
    protocols = {row["protocol"]: row for row in tables(folder)["protocols"]}
    assert {row["protocol"] for row in rows} == set(protocols) and len(protocols) == 6
    said = next(row for row in protocols.values() if row["features"] == "classifier")
    assert (
        len(said["weights_sha256"]) == 64
        and said["rounding"].startswith("uint8")
        and said["reference"] == "digits 8x8"
    )
    text = (folder / "report.md").read_text()
    assert "FID" not in text.replace("no FID", "") and len(list(folder.glob("*_by_nfe_*.png"))) == 6
    assert all(f"({picture.name})" in text for picture in folder.glob("*.png"))


def test_a_rerun_measures_nothing_again(swept, monkeypatch):
    config, folder = swept
    monkeypatch.setattr(image_sets.runs, "draw", None)
    rows, failed = metrics.measure(config, folder, print)
    assert measured(rows) == values(folder) and not failed


def test_eight_devices_give_the_values_of_one(swept, tmp_path):
    config, folder = swept
    eight = config.copy_and_resolve_references()
    eight.num_devices = 8
    assert measured(metrics.measure(eight, tmp_path, print)[0]) == values(folder)


def test_along_training_and_guidance(config, tmp_path):
    config.sets.teacher.update({"num_steps": (3,), "checkpoints": "all"})
    config.spaces = {"pixels": {"metrics": ("frechet",)}}
    config.sets.guided = {"run": config.sets.teacher.run, "guidance_scale": (1.0, 2.0)}
    config.seeds = (0,)
    metrics.compare(config, tmp_path, "evaluate")
    rows = tables(tmp_path)["metrics"]
    teacher = [row for row in rows if row["run"] == "teacher"]
    assert [row["images_seen"] for row in teacher] == [2 * 64, 4 * 64, 6 * 64]
    assert [(row["guidance_scale"], row["nfe"]) for row in rows if row["run"] == "guided"] == [(1.0, 10), (2.0, 10)]
    names = {path.name.rpartition("_")[0] for path in tmp_path.glob("*.png")}
    assert names == {"pixel_frechet_distance_by_images_seen", "pixel_frechet_distance_by_guidance_scale"}


def test_one_set_that_fails_leaves_the_others(config, tmp_path):
    random = np.random.default_rng(0)
    for name in ("whole", "damaged"):
        (tmp_path / name).mkdir()
        for index, image in enumerate(random.integers(0, 256, (150, 8, 8), dtype=np.uint8)):
            PIL.Image.fromarray(image).save(tmp_path / name / f"{index:03d}.png")
    broken = tmp_path / "damaged" / "122.png"
    broken.write_bytes(broken.read_bytes()[:60])  # its header is whole
    config.sets = {name: {"images": str(tmp_path / name), "channels": 1} for name in ("damaged", "whole")}
    config.spaces = {"pixels": {"metrics": ("frechet",)}}
    config.num_samples = 0
    with pytest.raises(
        metrics.IncompleteError, match=r"1 of the sets could not be measured, .*122\.png .*replace or remove it"
    ):
        metrics.compare(config, tmp_path / "report", "evaluate")
    made = tables(tmp_path / "report")
    assert [(row["run"], row["nfe"], row["seeds"]) for row in made["metrics"]] == [("whole", None, "images 0-149")]
    assert [row["run"] for row in made["failed"]] == ["damaged"]
    config.num_samples = 151
    with pytest.raises(ValueError, match="has 150 images, fewer than the 151 asked for"):
        metrics.compare(config, tmp_path / "report", "evaluate")


def test_earlier_reports_stand_beside_only_with_the_same_protocol(swept, config, tmp_path):
    _, earlier = swept
    config.sets.teacher.num_steps = (4,)
    config.spaces = {"pixels": {"metrics": ("frechet",)}}
    config.beside = (str(earlier),)
    rows, _ = metrics.measure(config, tmp_path, print)
    lines = [line for line in metric_plots.tables(rows)["metrics"] if line["metric"] == "pixel Frechet distance"]
    assert [line["nfe"] for line in lines] == [7, 3, 5] and len({line["protocol"] for line in lines}) == 1
    config.num_samples = 100
    with pytest.raises(ValueError, match="num_samples: 100 and 200.* Evaluate both with one config"):
        metrics.measure(config, tmp_path, print)


def test_a_config_is_checked_first(config, tmp_path):
    for change, message in (
        ({"sets.teacher.checkpoints": "every"}, "checkpoints is 'every', expected 'last' or 'all'"),
        ({"sets.teacher.nun_steps": (3,)}, "unknown key config.sets.teacher.nun_steps; did you mean 'num_steps'"),
        ({"spaces.classifier.weights": str(tmp_path / "none")}, "holds no|no checkpoint|none"),
        ({"sets.teacher.images": "somewhere"}, "names .'run', 'images'., expected one of run, model, images, videos"),
        ({"seeds": ()}, "found no seeds"),
        ({"spaces.pixels.metrics": ("fid",)}, "'fid' is not defined on the features 'pixels'"),
        ({"reference.data.name": "digit"}, "unknown data set 'digit'"),
        ({"reference.data.channels": 3}, "takes images of shape .8, 8, 1., .* found .8, 8, 3."),
    ):
        changed = config.copy_and_resolve_references()
        with changed.unlocked():
            for key, value in change.items():
                changed.update_from_flattened_dict({key: value})
        with pytest.raises((ValueError, RuntimeError), match=message):
            metrics.compare(changed, tmp_path / "report", "evaluate")
    assert not (tmp_path / "report" / "report.md").exists()


@pytest.mark.fast
def test_dry_run_lists_the_cases(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    argv = ["evaluate", "--config=configs/quick/evaluate_digits.py", "--dry_run", f"--workdir={tmp_path}"]
    assert flags.run(evaluate.__doc__, evaluate.define, evaluate.main, argv) == 0
    assert "num_steps 4, num_steps 6, num_steps 10, num_steps 18" in capsys.readouterr().out


def test_only_this_report_is_made_by_several_processes(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    for name, value in {"COORDINATOR": "127.0.0.1", "NUM_PROCESSES": "2", "PROCESS_ID": "1"}.items():
        monkeypatch.setenv(f"DIFFJAX_{name}", value)
    argv = ["evaluate", "--config=configs/quick/compare_digits.py", f"--workdir={tmp_path}"]
    assert flags.run(evaluate.__doc__, evaluate.define, evaluate.main, argv) == 2
    assert "found 2 processes (hosts), but only the report 'metrics' is made by several" in capsys.readouterr().err


def test_two_processes_give_the_values_of_one(runs, config, tmp_path):
    """Each draws its blocks of 1,000 and has a device of its own; both have the same folder."""
    config.sets.teacher.num_steps = (3,)
    config.update({"num_samples": 1500, "batch_size": 250, "seeds": (0,)})
    config.spaces.classifier.update({"metrics": ("frechet", "prdc"), "options": {"prdc": {"k": 3}}})
    alone, _ = metrics.measure(config, tmp_path / "alone", print)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    changes = {
        "sets.teacher.run": runs / "teacher", "sets.teacher.num_steps": "(3,)",
        "spaces.classifier.weights": runs / "classifier", "num_samples": 1500, "batch_size": 250, "seeds": "(0,)",
        "num_devices": 1,
    }  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "diffjax.cli.evaluate",
        "--config=configs/quick/evaluate_digits.py",
        f"--workdir={tmp_path / 'both'}",
    ]
    command += [f"--config.{key}={value}" for key, value in changes.items()]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    variables |= {"DIFFJAX_COORDINATOR": f"127.0.0.1:{port}", "DIFFJAX_NUM_PROCESSES": "2"}
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, env={**variables, "DIFFJAX_PROCESS_ID": str(number)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    try:
        for process in processes:
            log, _ = process.communicate(timeout=300)
            assert process.returncode == 0, log
    finally:
        for process in processes:
            process.kill()
    both = values(tmp_path / "both")
    assert {key: both[key] for key in measured(alone)} == measured(alone)
