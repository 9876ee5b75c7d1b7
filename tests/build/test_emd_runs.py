"""Runs of EMD on a teacher that was trained for seconds: step sizes checked before, samples corrected after."""

import dataclasses
import json
import re
import zlib

import jax
import numpy as np
import pytest
from PIL import Image
from quick_runs import small

from diffjax import build
from diffjax.build import correction
from diffjax.cli import flags, sample
from diffjax.cli.train import train_and_evaluate
from diffjax.core import rng, trees
from diffjax.methods.emd_chain import StepSizes, noise_pair
from diffjax.runtime import checkpoint, checkpoint_read, guards


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """runs: teacher, and emd, a student of it with two Langevin steps."""
    folder = tmp_path_factory.mktemp("runs")
    train_and_evaluate(small("edm_digits.py", model__width=32, model__depth=2), folder / "teacher")
    train_and_evaluate(student(folder), folder / "emd")
    return folder


def student(folder, **changes):
    return small("emd_digits.py:emd_4", folder / "teacher", method__langevin_steps=2, **changes)


def warning(folder, **changes):
    return build.experiment(student(folder, **changes)).warning()


def correct(*argv):
    return flags.run(sample.__doc__, sample.define, sample.main, ["sample", "--mode=correct", *map(str, argv)])


# Networks --------------------------------------------------------------------------------------------------------


def test_a_student_may_compute_its_blocks_again(folder):
    """The teacher's weights fit, and an iteration is the same to rounding."""
    metrics = []
    for options in ({}, {"model__remat": "nothing"}):
        experiment = build.experiment(student(folder, **options))
        state = experiment.init()
        assert trees.compare(build.load_run(folder / "teacher").params, state.method.params) == []
        metrics.append(jax.jit(experiment.step)(state, experiment.frozen, next(experiment.batches()))[1])
    for name, value in metrics[0].items():
        np.testing.assert_allclose(metrics[1][name], value, rtol=1e-4, atol=1e-6, err_msg=name)


# Step sizes ------------------------------------------------------------------------------------------------------


def test_step_sizes_that_diverge_are_said(folder):
    """What it says to type is stable, what is far above its limit is not."""
    changes = {"method__scheme": "x_z", "method__latent_step": 1.0}
    text = warning(folder, **changes)
    assert "WARNING: the chain of scheme x_z diverges with noise_step 0.16, latent_step 1: the largest eigenvalue" in text
    assert text.count("at sigma") == 3 and "below 2" in text and "noise_step=" not in text
    typed = float(re.search(r"--config\.method\.latent_step=(\S+) \(half of it\)", text)[1])
    limit = float(re.search(r"stable up to latent_step (\S+): type", text)[1])
    assert 0 < typed <= limit / 2 < 0.5
    assert warning(folder, **changes | {"method__latent_step": limit}) == ""
    assert warning(folder, **changes | {"method__latent_step": 3 * limit}) != ""
    assert warning(folder, **changes, method__check_step_sizes=False) == ""
    assert warning(folder, method__scheme="eps_z") == ""
    # a noise that overshoots by itself, whatever the network: a = 2 is the limit
    text = warning(folder, method__noise_step=2.5)
    assert re.search(r"type --config.method.noise_step=(1|0\.9\d) \(half of it\)", text) and "latent_step=" not in text


def test_the_warning_comes_once_and_training_goes_on(folder, tmp_path, capsys):
    unstable = student(folder, method__scheme="x_z", method__latent_step=0.5, train__total_images=8)
    train_and_evaluate(unstable, tmp_path / "run")
    assert "WARNING: the chain of scheme x_z diverges" in capsys.readouterr().err
    train_and_evaluate(unstable, tmp_path / "run")
    assert "diverges" not in capsys.readouterr().err


# Correction ------------------------------------------------------------------------------------------------------


def test_both_networks_come_from_one_checkpoint(folder):
    run = correction.load(folder / "emd")
    (params, score), _, step = checkpoint_read.load_parts(folder / "emd", ("method/params", "method/score"))
    assert step == run.step == 2
    for found, read, other in ((run.weights.generator, params, score), (run.weights.score, score, params)):
        assert trees.compare(found, read) == []
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(read), strict=True):
            np.testing.assert_array_equal(a, b)
        assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(other), strict=True))
    with pytest.raises(checkpoint.CheckpointError, match="no arrays under method/sore/"):
        checkpoint_read.load_parts(folder / "emd", ("method/params", "method/sore"))


def test_a_pair_depends_on_its_seed_alone(folder):
    run = correction.load(folder / "emd")
    pair = correction.correct(run, 0, [0, 1, 2, 9], batch_size=4, langevin_steps=2)
    other = correction.correct(run, 0, [9, 2, 5], batch_size=2, langevin_steps=2)
    for all_of_them, some in zip(pair, other, strict=True):
        np.testing.assert_allclose(some[:2], all_of_them[[3, 2]], atol=1e-4)  # sums of another batch size, float32
        assert np.abs(all_of_them[0] - all_of_them[1]).max() > 0.01
    # before: what the command draws from these weights
    drawn = build.load_run(folder / "emd")._replace(params=run.weights.generator)
    drawn = build.draw(drawn, build.run_plan(drawn), 0, [0, 1, 2, 9], batch_size=4)
    np.testing.assert_allclose(pair.before, drawn, atol=1e-4)


def test_after_is_the_target_of_the_m_step(folder):
    """One step with the latent at rest, by hand: g + sigma (a gap); nothing where the two scores agree."""
    run = correction.load(folder / "emd")
    ids, labels, sigma, rates = np.array([3, 4]), np.array([1, 2]), np.full(2, 2.0, np.float32), StepSizes(0.1, 0.0)
    options = {"batch_size": 2, "langevin_steps": 1, "sigma": 2.0, "rates": rates, "labels": labels}
    pair = correction.correct(run, 0, ids, **options)
    keys = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, zlib.crc32(b"correction")))[0])(rng.sample_keys(0, ids))
    x, cond = pair.before + 2 * noise_pair(keys, (8, 8, 1))[0], {"label": labels}
    gap = run.teacher_denoise(run.weights.teacher, x, sigma, cond) - run.denoise(run.weights.score, x, sigma, cond)
    assert np.abs(gap).max() > 1e-3
    np.testing.assert_allclose(pair.after - pair.before, 0.1 * gap, atol=1e-5)
    same = run._replace(weights=run.weights._replace(score=run.weights.teacher))
    pair = correction.correct(same, 0, ids, **options)
    np.testing.assert_allclose(pair.before, pair.after, atol=1e-6)  # two networks of one program, float32


def test_the_command_writes_a_picture_arrays_and_facts(folder, tmp_path, capsys):
    argv = (f"--workdir={folder / 'emd'}", f"--out={tmp_path / 'out'}", "--seeds=0-2", "--langevin_steps=3", "--labels=3")
    assert correct(*argv, "--dry_run") == 0
    assert "3 images of (8, 8, 1), 3 steps of eps_z each" in capsys.readouterr().out and not (tmp_path / "out").exists()
    assert correct(*argv, "--noise_step=0.1", "--sigma=0.5") == 0
    with np.load(tmp_path / "out" / "samples.npz") as file:
        assert file["before"].shape == file["after"].shape == (3, 8, 8, 1) and file["seeds"].tolist() == [0, 1, 2]
        assert file["labels"].tolist() == [3, 3, 3] and np.abs(file["before"] - file["after"]).max() > 1e-4
    facts = json.loads((tmp_path / "out" / "sample.json").read_text())
    expected = {"scheme": "eps_z", "langevin_steps": 3, "sigma": 0.5, "noise_step": 0.1, "latent_step": 0.004**2, "step": 2}
    assert expected.items() <= facts.items()
    with Image.open(tmp_path / "out" / "samples.png") as picture:
        assert picture.height > 2 * 64  # two rows


def test_a_chain_that_diverges_is_named_by_seed_and_writes_nothing(folder, tmp_path, capsys):
    run = correction.load(folder / "emd")
    with pytest.raises(guards.NonFiniteError, match=r"of 2 of 2 samples are not finite .* seeds \[5, 7\] among"):
        correction.correct(run, 0, [5, 7], batch_size=2, langevin_steps=60, rates=StepSizes(1e3, 0.0))
    argv = (f"--workdir={folder / 'emd'}", f"--out={tmp_path / 'out'}", "--seeds=5", "--langevin_steps=60")
    assert correct(*argv, "--noise_step=1000") == 2
    assert "lower --latent_step or --noise_step" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_runs_and_flags_without_a_chain_are_refused(folder, tmp_path, capsys):
    out = f"--out={tmp_path / 'out'}"
    assert correct(f"--workdir={folder / 'teacher'}", out) == 2
    assert "is a run of method 'edm': only a run of 'emd' has a chain" in capsys.readouterr().err
    train_and_evaluate(student(folder, method__student_score="delta", train__total_images=8), tmp_path / "sds")
    assert correct(f"--workdir={tmp_path / 'sds'}", out) == 2
    assert "trained with student_score='delta', so that it has no student score" in capsys.readouterr().err
    assert correct(f"--workdir={folder / 'emd'}", out, "--solver=euler", "--sigma_min=1") == 2
    assert "--mode=correct takes no --solver, --sigma_min" in capsys.readouterr().err
    assert flags.run(sample.__doc__, sample.define, sample.main, ["sample", f"--workdir={folder / 'emd'}", out, "--sigma=1"]) == 2
    assert "--mode=draw takes no --sigma" in capsys.readouterr().err
    assert correct(f"--workdir={folder / 'emd'}", out, "--latent_step=-1") == 2
    assert not (tmp_path / "out").exists()


def test_a_score_of_another_network_is_refused(folder, monkeypatch):
    def other(workdir, parts):
        (params, score), config, step = checkpoint_load(workdir, parts)
        return (params, {**score, "image_in": {}}), config, step

    checkpoint_load = checkpoint_read.load_parts
    monkeypatch.setattr(checkpoint_read, "load_parts", other)
    with pytest.raises(ValueError, match="the student score in .* does not fit, 2 differences:\n  missing: image_in/bias"):
        correction.load(folder / "emd")


def test_a_latent_at_rest_is_let_go(folder):
    run = correction.load(folder / "emd")
    for own, used in (("eps", "eps_z"), ("x", "eps_z"), ("x_z", "x_z"), ("eps_z", "eps_z")):
        settings = dataclasses.replace(run.settings, scheme=own)
        assert correction.scheme(run._replace(settings=settings)) == used
