"""Several processes write and read checkpoints as one: other meshes and process counts, one that fails or dies."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import checkpoint_example
import jax
import numpy as np
import pytest

from diffjax.runtime import checkpoint, checkpoint_read

LOST_S = checkpoint_example.HEARTBEAT_S  # until jax.distributed gives up one that is gone


def session(folder, processes, devices, *action):
    """(exit code, output) of each process; `devices` to each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    running = [
        subprocess.Popen(
            [sys.executable, checkpoint_example.__file__, *map(str, (port, i, processes, devices, folder, *action))],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(processes)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=150)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, output) for process, output in zip(running, outputs, strict=True)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Steps 1 and 2 of two processes with two devices each."""
    folder = tmp_path_factory.mktemp("written")
    for step in (1, 2):
        assert [code for code, _ in session(folder, 2, 2, "save", step)] == [0, 0]
    assert checkpoint.steps(folder) == [1, 2]
    return folder


def copy(written, tmp_path):
    return shutil.copytree(written, tmp_path / "run")


def read_here(folder):
    """The step of the newest checkpoint, read by this process, its arrays compared."""
    abstract = {name: jax.ShapeDtypeStruct(np.shape(x), x.dtype) for name, x in checkpoint_example.values(0).items()}
    found = checkpoint_read.read_newest(folder, abstract, checkpoint_example.CONFIG)
    for name, array in checkpoint_example.values(found.step).items():
        np.testing.assert_array_equal(found.state[name], array)
    return found.step


def reads(found, step):
    return all(code == 0 and f"read {step}\n" in output for code, output in found)


@pytest.mark.fast
@pytest.mark.parametrize(("processes", "devices"), [(1, 4), (4, 1)])
def test_two_processes_write_and_others_read(written, tmp_path, processes, devices):
    found = session(copy(written, tmp_path), processes, devices, "read")
    assert reads(found, 2), found


def test_one_process_writes_and_two_read_its_shards(tmp_path):
    assert session(tmp_path, 1, 2, "save", 3)[0][0] == 0
    found = session(tmp_path, 2, 4, "read")
    assert reads(found, 3), found


def test_what_one_process_cannot_read_none_uses(written, tmp_path):
    folder = copy(written, tmp_path)
    found = session(folder, 2, 2, "blind")
    assert reads(found, 1), found
    (_, first), (_, second) = found
    assert "checkpoints/2 is unreadable (process 1: " in first and "put aside" in first
    assert "said" not in second
    assert checkpoint.steps(folder) == [1] and (folder / "unreadable_checkpoints" / "2").exists()


def test_a_write_that_fails_on_one_process_ends_all_and_older_checkpoints_stay(written, tmp_path):
    folder, start = copy(written, tmp_path), time.monotonic()
    (first, told), (second, own) = session(folder, 2, 2, "fail", 3)
    assert first == second == 7 and time.monotonic() - start < 60, (told, own)
    for output in (told, own):
        assert "could not write a checkpoint to" in output and "Readable checkpoints stay, at steps [1, 2]" in output
    assert "process 1: " in told.split("CheckpointError", 1)[1] and "File too large" in own
    assert read_here(folder) == 2


def test_a_signal_to_one_process_while_all_save_leaves_the_checkpoint_whole(written, tmp_path):
    folder = copy(written, tmp_path)
    found = session(folder, 2, 2, "SIGTERM", 3)
    assert [code for code, _ in found] == [0, 0] and "saved 3 [2, 3] SIGTERM" in found[1][1]
    assert read_here(folder) == 3


@pytest.mark.parametrize("action", ["SIGKILL", "late"])
def test_a_process_that_dies_while_all_save_leaves_no_half_checkpoint(written, tmp_path, action):
    folder, start = copy(written, tmp_path), time.monotonic()
    (first, _), (second, _) = session(folder, 2, 2, action, 3)
    assert first != 0 and second == {"SIGKILL": -signal.SIGKILL, "late": 9}[action]
    assert time.monotonic() - start < 60 + 2 * LOST_S
    assert checkpoint.steps(folder) == [1, 2]
    assert read_here(folder) == 2
    with checkpoint.Checkpoints(folder, checkpoint_example.CONFIG) as checkpoints:  # what was left is in nobody's way
        checkpoints.save(3, checkpoint_example.values(3), {"position": 3}, {})
    assert read_here(folder) == 3
