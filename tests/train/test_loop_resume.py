"""A run that was stopped (cleanly, by SIGTERM, by kill -9) goes on to the same bits as one that was not."""

import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import loop_example
import numpy as np
import pytest

from diffjax.runtime import checkpoint, guards, writers
from diffjax.train import loop

TOTAL_STEPS = 12


def deterministic(workdir):
    """Every line of the log without what a clock says."""
    return [{k: v for k, v in line.items() if k != "time"} for line in writers.read(workdir / "metrics.jsonl")]


def run(workdir, order=None, **train):
    """One session in this process; `order` collects a fingerprint of every batch drawn."""
    config = loop_example.make_config(**train)
    experiment = loop_example.make_experiment(config)
    if order is not None:
        experiment = experiment._replace(batches=lambda: Recorded(config, order))
    return loop.run(experiment, config, workdir)


class Recorded:
    def __init__(self, config, order):
        self.inner, self.order = loop_example.make_experiment(config).batches(), order
        self.get_state, self.set_state = self.inner.get_state, self.inner.set_state

    def __next__(self):
        batch = next(self.inner)
        self.order.append(batch["image"].tobytes())
        return batch


def assert_same(expected, found, expected_dir, found_dir):
    """Bit-equal, not close: every leaf of the state (parameters, optimiser, average, step) and every log line."""
    for (path, a), b in zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=str(path))
    assert deterministic(expected_dir) == deterministic(found_dir)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(state, folder, data order) of the uninterrupted run."""
    workdir, order = tmp_path_factory.mktemp("whole"), []
    return run(workdir, order), workdir, order


def session(workdir, **train):
    """One session in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    return subprocess.run(
        [sys.executable, loop_example.__file__, str(workdir), json.dumps(train)],
        env=environment, capture_output=True, text=True, timeout=180,
    )


def test_the_uninterrupted_run_is_what_the_tests_below_assume(whole):
    state, workdir, order = whole
    assert int(state.step) == TOTAL_STEPS == len(order)
    lines = deterministic(workdir)
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    assert len(set(order)) == len(order)
    averaged = jax.tree.map(lambda a, b: bool((a != b).all()), state.ema_params, state.method.params)
    assert all(jax.tree.leaves(averaged))


@pytest.mark.fast
@pytest.mark.parametrize("stop_at", [1, 5, 7])
def test_stopping_at_step_k_and_going_on_changes_no_bit(whole, tmp_path, stop_at):
    state, workdir, order = whole
    resumed_order = []
    run(tmp_path, resumed_order, total_images=stop_at * loop_example.BATCH_SIZE)
    found = run(tmp_path, resumed_order)
    assert_same(state, found, workdir, tmp_path)
    assert resumed_order == order


def test_stopping_changes_no_bit_on_eight_devices(tmp_path):
    expected = run(tmp_path / "whole", num_devices=8)
    run(tmp_path / "parts", num_devices=8, total_images=7 * loop_example.BATCH_SIZE)
    assert_same(expected, run(tmp_path / "parts", num_devices=8), tmp_path / "whole", tmp_path / "parts")


def test_sigterm_saves_at_the_next_step_and_the_same_command_goes_on(whole, tmp_path):
    state, workdir, _ = whole
    done = session(tmp_path, end=[7, "SIGTERM"])
    assert done.returncode == guards.PREEMPTED_EXIT_CODE == 75, done.stderr
    assert "SIGTERM: saved step 7 of 12; run the same command to go on" in done.stderr
    assert checkpoint.steps(tmp_path) == [5, 7]
    assert_same(state, run(tmp_path), workdir, tmp_path)


def test_kill_9_after_a_checkpoint_repeats_the_lost_steps(whole, tmp_path, capfd):
    state, workdir, _ = whole
    done = session(tmp_path, end=[8, "SIGKILL"])
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert checkpoint.steps(tmp_path) == [5]
    # the log is ahead of the checkpoint, and its last line is torn
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "ima')
    assert [line["step"] for line in writers.read(tmp_path / "metrics.jsonl")] == [3, 6]
    found = run(tmp_path)
    assert "resumed from step 5 of 12" in capfd.readouterr().err
    assert_same(state, found, workdir, tmp_path)


def test_another_folder_of_checkpoints_does_not_begin_the_run_again(whole, tmp_path):
    _, folder, _ = whole
    shutil.copytree(folder, tmp_path / "run")
    log = (tmp_path / "run" / "metrics.jsonl").read_text()
    config = loop_example.make_config(checkpoint_folder=str(tmp_path / "other")) | {"allow_config_change": True}
    with pytest.raises(checkpoint.CheckpointError, match=f"lie in .*run/checkpoints, expected in {tmp_path / 'other'}"):
        loop.run(loop_example.make_experiment(config), config, tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == log
    shutil.copytree(tmp_path / "run" / "checkpoints", tmp_path / "other")
    assert int(loop.run(loop_example.make_experiment(config), config, tmp_path / "run").step) == TOTAL_STEPS


def test_kill_9_before_the_first_checkpoint_starts_again(whole, tmp_path):
    state, workdir, _ = whole
    run(tmp_path, total_images=4 * loop_example.BATCH_SIZE)
    shutil.rmtree(tmp_path / "checkpoints")
    assert_same(state, run(tmp_path), workdir, tmp_path)
