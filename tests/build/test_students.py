"""Every kind of student from its config, on a teacher that was trained for seconds: trained, loaded, sampled, refused."""

import functools
import importlib.util
import json
import shutil

import numpy as np
import pytest
import quick_runs

from diffjax import build
from diffjax.cli import flags, prepare
from diffjax.cli.train import train_and_evaluate
from diffjax.core import trees

small = functools.partial(quick_runs.small, batch_size=16, num_steps=4)
DRAW = {"seed": 0, "sample_ids": range(4), "batch_size": 4}


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a teacher that has a null class, and an SFD-v student of it."""
    folder = tmp_path_factory.mktemp("runs")
    teacher = small("edm_digits.py", None, model__width=32, model__depth=2, method__label_dropout=0.2)
    train_and_evaluate(teacher, folder / "teacher")
    train_and_evaluate(small("sfd_digits.py:v", folder / "teacher"), folder / "student_v")
    return folder


# SFD-v and the second stage --------------------------------------------------------------------------------------


def test_one_student_serves_each_number_it_was_trained_for(runs):
    student = build.load_run(runs / "student_v")
    plans = [build.run_plan(student, num_steps=num) for num in (4, 5, 6, 7)]
    assert [plan.nfe for plan in plans] == [2, 3, 4, 5] and build.run_plan(student).nfe == 2
    assert build.draw(student, plans[0], **DRAW).shape == (4, 8, 8, 1)
    with pytest.raises(ValueError, match=r"found num_steps=8, and this student was trained .* \(4, 5, 6, 7\)"):
        build.run_plan(student, num_steps=8)
    teacher = build.load_run(runs / "teacher")
    new = set(trees.flatten(student.params)) - set(trees.flatten(teacher.params))
    assert {path.split("/")[0] for path in new} == {"step_in", "step_out"}


def test_what_the_student_is_told_changes_its_samples(runs):
    student = build.load_run(runs / "student_v")
    plan = build.run_plan(student, num_steps=5)
    told = build.draw(student, plan, **DRAW)
    other = student.params | {"step_out": {**student.params["step_out"], "bias": student.params["step_out"]["bias"] + 1}}
    assert np.abs(told - build.draw(student._replace(params=other), plan, **DRAW)).max() > 1e-4


def test_guidance_at_sampling_needs_no_guidance_in_training(runs):
    """The student of a teacher with a null class takes any scale; 1 is the conditional network itself."""
    student = build.load_run(runs / "student_v")
    plan = build.run_plan(student)
    plain, one, four = (build.draw(student, plan, **DRAW, guidance_scale=scale) for scale in (None, 1.0, 4.0))
    np.testing.assert_allclose(plain, one, atol=1e-4)  # the same sum, in float32 and another program
    assert np.abs(plain - four).max() > 1e-3


def test_second_stage(runs, tmp_path):
    config = small("sfd_digits.py:second", runs / "student_v")
    train_and_evaluate(config, tmp_path / "second")
    student = build.load_run(tmp_path / "second")
    assert build.run_plan(student).nfe == 1 and build.draw(student, build.run_plan(student), **DRAW).shape[0] == 4


@pytest.mark.parametrize(
    "changes",
    [{"method__teacher_factor": 1}, {"method__teacher_afs": False}, {"method__sigma_min": 0.002}, {"method__rho": 5.0}],
)
def test_a_second_stage_that_asks_for_another_trajectory_is_refused(runs, changes):
    with pytest.raises(ValueError, match="the teacher is a student trained for .*: make them agree"):
        build.experiment(small("sfd_digits.py:second", runs / "student_v", **changes))


def test_a_student_does_without_its_teacher(runs, tmp_path):
    shutil.copytree(runs / "teacher", tmp_path / "teacher")
    train_and_evaluate(small("sfd_digits.py:1", tmp_path / "teacher"), tmp_path / "student")
    shutil.rmtree(tmp_path / "teacher")
    student = build.load_run(tmp_path / "student")
    assert student.config.model.width == 32 and student.data.num_classes == 10


def test_a_teacher_that_is_no_run_is_named(tmp_path):
    with pytest.raises(RuntimeError, match="holds no run: train it first"):
        build.experiment(small("sfd_digits.py:2", tmp_path / "nothing"))


def test_a_student_network_that_is_not_its_teachers_is_refused(runs):
    experiment = build.experiment(small("sfd_digits.py:2", runs / "teacher", model__depth=3))
    with pytest.raises(ValueError, match="as a student of config.model, does not fit"):
        experiment.init()


# Cached trajectories ---------------------------------------------------------------------------------------------


def test_cached_trajectories_give_the_losses_without_them(runs, tmp_path, monkeypatch):
    config = small("sfd_digits.py:2", runs / "teacher")
    train_and_evaluate(config, tmp_path / "online")
    targets, made_for = build.teacher_targets(config)
    steps = list(build.methods.trajectories.write(tmp_path / "cache", made_for, targets, 4))
    assert steps[-1] == 4
    with pytest.raises(FileExistsError, match="holds finished trajectories"):
        next(build.methods.trajectories.write(tmp_path / "cache", made_for, targets, 4))
    config.method.trajectories = str(tmp_path / "cache")
    train_and_evaluate(config, tmp_path / "cached")
    # float32 in two programs
    np.testing.assert_allclose(losses(tmp_path / "cached"), losses(tmp_path / "online"), rtol=1e-5)
    other = small("sfd_digits.py:2", runs / "teacher", method__trajectories=str(tmp_path / "cache"))
    other.seed = 1
    with pytest.raises(ValueError, match="do not fit this run:\n  seed: made for 0, the run has 1"):
        build.experiment(other)
    longer = small("sfd_digits.py:2", runs / "teacher", method__trajectories=str(tmp_path / "cache"), train__total_images=80)
    with pytest.raises(ValueError, match="holds the trajectories of 4 steps, the run has 5"):
        build.experiment(longer)
    config.method.trajectories = str(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no finished trajectories: make them with diffjax.cli.prepare"):
        build.experiment(config)


def test_prepare_goes_on_after_a_stop(runs, tmp_path, capsys):
    config = small("sfd_digits.py:2", runs / "teacher")
    targets, made_for = build.teacher_targets(config)
    writing = build.methods.trajectories.write(tmp_path / "cache", made_for, targets, 4)
    assert next(writing) == 1
    writing.close()
    argv = [
        "prepare", "--config=configs/quick/sfd_digits.py:2", f"--config.method.teacher={runs / 'teacher'}",
        "--config.train.batch_size=16", "--config.train.total_images=64", f"--out={tmp_path / 'cache'}",
    ]  # fmt: skip
    assert flags.run(prepare.__doc__, prepare.define, prepare.main, [*argv, "--dry_run"]) == 0
    assert "4 steps of 16 trajectories" in capsys.readouterr().out
    assert flags.run(prepare.__doc__, prepare.define, prepare.main, argv) == 0
    cached = build.methods.trajectories.Cached(tmp_path / "cache", made_for, 4)
    np.testing.assert_array_equal(next(cached)["target"], targets(0))
    state = cached.get_state()
    second = next(cached)["target"]
    cached.set_state(state)
    np.testing.assert_array_equal(next(cached)["target"], second)
    assert flags.run(prepare.__doc__, prepare.define, prepare.main, argv) == 2


# Baselines -------------------------------------------------------------------------------------------------------


def test_progressive_distillation_halves(runs, tmp_path):
    train_and_evaluate(small("pd_digits.py:16", runs / "teacher"), tmp_path / "pd_16")
    train_and_evaluate(small("pd_digits.py:8", tmp_path / "pd_16"), tmp_path / "pd_8")
    student = build.load_run(tmp_path / "pd_8")
    assert build.run_plan(student).nfe == 8 and np.all(np.isfinite(losses(tmp_path / "pd_8")))


def test_guided_progressive_distillation(runs, tmp_path):
    """Matched at all scales, then halved: one network, one call a step, and the scale is a condition."""
    guided = {"method__guidance_range": (1.0, 5.0)}
    match = small("pd_digits.py:16", runs / "teacher", model__guidance_condition=True, method__stage="match", **guided)
    train_and_evaluate(match, tmp_path / "match")
    train_and_evaluate(small("pd_digits.py:8", tmp_path / "match", **guided), tmp_path / "pd_8")
    student = build.load_run(tmp_path / "pd_8")
    plan = build.run_plan(student)
    one, four = (build.draw(student, plan, **DRAW, guidance_scale=scale) for scale in (1.0, 4.0))
    assert plan.nfe == 8 and np.abs(one - four).max() > 1e-5
    with pytest.raises(ValueError, match="go together: set both, or none"):
        build.experiment(small("pd_digits.py:16", runs / "teacher", **guided))


def test_amed_plugin(runs, tmp_path):
    config = small("amed_digits.py:3", runs / "teacher")
    config.train.num_devices = 0  # all eight: the frozen teacher has to follow the predictor to its devices
    train_and_evaluate(config, tmp_path / "amed")
    student = build.load_run(tmp_path / "amed")
    assert build.run_plan(student).nfe == 3 and set(student.params) == {"teacher", "predictor"}
    assert np.all(np.isfinite(build.draw(student, build.run_plan(student), **DRAW)))
    with pytest.raises(ValueError, match="found num_steps=5, and this student was trained"):
        build.run_plan(student, num_steps=5)
    with pytest.raises(ValueError, match="with no network of its own: give that run as the teacher"):
        build.experiment(small("sfd_digits.py:2", tmp_path / "amed"))


def test_gits_levels_are_among_the_teachers(runs):
    teacher = build.load_run(runs / "teacher")
    levels = {"sigma_min": 0.006, "sigma_max": 80.0, "to_zero": False}
    plan = build.run_plan(teacher, solver="ipndm", grid="gits", num_steps=6, order=4, **levels)
    fine = build.run_plan(teacher, solver="euler", num_steps=61, **levels).sigmas
    # other weights are searched anew
    moved = teacher._replace(params={**teacher.params, "image_out": {"bias": teacher.params["image_out"]["bias"] + 0.5,
                                                                    "kernel": teacher.params["image_out"]["kernel"]}})  # fmt: skip
    build.run_plan(moved, solver="ipndm", grid="gits", num_steps=6, order=4, **levels)
    assert build.runs._searched[0] is moved.params
    assert plan.nfe == 5 and np.all(np.isin(plan.sigmas, fine)) and plan.sigmas[0] == 80.0


# Perceptual loss -------------------------------------------------------------------------------------------------


def test_second_stage_with_lpips(runs, tmp_path):
    """Random weights of AlexNet, since the trained ones are the user's; the digits are shown to it as grey."""
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'diffjax[test]'")
    if importlib.util.find_spec("lpips") is None:  # its files are read; importing it would import torchvision
        pytest.skip("lpips is not installed: pip install 'diffjax[test]'")
    shapes = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3), 10: (256, 256, 3, 3)}
    weights = {}
    for layer, shape in shapes.items():
        weights[f"features.{layer}.weight"] = 0.05 * torch.randn(shape, generator=torch.manual_seed(layer))
        weights[f"features.{layer}.bias"] = torch.zeros(shape[0])
    torch.save(weights, tmp_path / "alexnet.pth")
    perceptual = {"network": "alex", "backbone": str(tmp_path / "alexnet.pth"), "resize": 64}
    plain = small("sfd_digits.py:second", runs / "student_v", train__total_images=16)
    train_and_evaluate(plain, tmp_path / "plain")
    config = small("sfd_digits.py:second", runs / "student_v", train__total_images=16, method__perceptual=perceptual)
    train_and_evaluate(config, tmp_path / "lpips")
    assert losses(tmp_path / "lpips")[0] > losses(tmp_path / "plain")[0]
