"""Damaged checkpoints: restoring gives the exact arrays or says so and falls back, and verifying finds it."""

import collections
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import damage_example
import pytest

from diffjax.cli import flags, inspect
from diffjax.runtime import checkpoint, checkpoint_read, configs

FLIPS = 4  # in each file


def kind(file):
    """A file without the random part of its name."""
    return re.sub(r"/[0-9a-f]{32}$", "/*", file)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """(kind of file, damage, what became of it), of a program: where a read fails, orbax leaves its other reads to the
    garbage collector, which complains."""
    folder = tmp_path_factory.mktemp("damage")
    command = [sys.executable, damage_example.__file__, str(folder), str(FLIPS)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [(kind(file), what, outcome) for file, what, outcome in map(json.loads, done.stdout.splitlines())]


def test_every_damage_gives_the_exact_arrays_or_a_word_and_the_one_before(outcomes):
    assert not [outcome for outcome in outcomes if not outcome[2].startswith(("exact", "fell back: WARNING"))]


def test_every_kind_of_file_was_damaged(outcomes):
    found = collections.Counter(file for file, _, _ in outcomes)
    expected = {"run/metadata", "state/_METADATA", "state/manifest.ocdbt", "state/d/*", "state/ocdbt.process_0/d/*"}
    assert expected <= set(found)
    assert min(found.values()) >= FLIPS + 3


def test_changes_of_what_is_read_do_not_pass(outcomes):
    """Of the JSON part and the arrays' index every byte counts; of the values, what only the checksums see."""
    for file in ("run/metadata", "state/manifest.ocdbt"):
        assert not [outcome for outcome in outcomes if outcome[0] == file and outcome[2] == "exact"]
    assert [outcome for outcome in outcomes if "arrays have changed since they were written" in outcome[2]]


@pytest.fixture
def run(tmp_path):
    damage_example.write(tmp_path)
    configs.write(tmp_path, damage_example.CONFIG)
    return tmp_path


def verify(folder):
    return flags.run(inspect.__doc__, inspect.define, inspect.main, ["inspect", f"--workdir={folder}", "--verify"])


def change_a_value(folder: Path) -> None:
    """Another value in the JSON part, and what it says of itself made to fit."""
    file = folder / "run" / "metadata"
    run = json.loads(file.read_text())
    run["arrays"]["kernel"][2] ^= 1
    content = {key: value for key, value in run.items() if key != "sha256"}
    file.write_text(json.dumps({**content, "sha256": checkpoint.checksums.of_text(content)}))


@pytest.mark.fast
def test_verifying_reads_all_and_names_the_damaged(run, capsys, monkeypatch):
    monkeypatch.setattr(checkpoint_read, "_AT_ONCE", 100)  # bytes: an array at a time
    assert verify(run) == 0
    lines = capsys.readouterr().out.splitlines()
    whole = re.compile(r"checkpoint      step \d, 7.965 KiB of arrays, equal to its checksums")
    assert len(lines) == 2 and all(whole.fullmatch(line) for line in lines)
    change_a_value(run / "checkpoints" / "2")
    assert verify(run) == 1
    found = capsys.readouterr()
    assert "step 1, 7.965 KiB of arrays, equal" in found.out
    assert "step 2, DAMAGED: 1 arrays have changed since they were written: kernel" in found.out
    assert "1 of 2 checkpoints" in found.err and "of steps [2]" in found.err
    assert checkpoint.steps(run) == [1, 2]  # nothing is moved


def test_weights_for_sampling_are_of_the_one_before_and_nothing_is_moved(tmp_path, capsys):
    with checkpoint.Checkpoints(tmp_path, {}) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"method": {"params": damage_example.make_state(step)}}, None, {})
    file = tmp_path / "checkpoints" / "2" / "run" / "metadata"
    file.write_text(file.read_text().replace('"step": 2', '"step": 1'))
    params, _, step = checkpoint_read.load_params(tmp_path, ema=None)
    assert step == 1 and int(params["step"]) == 1
    assert "checkpoints/2 is unreadable (the part 'run' has changed" in capsys.readouterr().err
    with pytest.raises(checkpoint.CheckpointError, match="checkpoints/2 is unreadable .*: name another step"):
        checkpoint_read.load_params(tmp_path, ema=None, step=2)
    assert checkpoint.steps(tmp_path) == [1, 2]


def test_checkpoints_of_before_checksums_still_load(run, capsys):
    for step in (1, 2):
        file = run / "checkpoints" / str(step) / "run" / "metadata"
        content = json.loads(file.read_text())
        del content["arrays"], content["sha256"]
        file.write_text(json.dumps(content))
    assert damage_example.restore(run) == "exact"
    assert verify(run) == 0
    assert capsys.readouterr().out.count("readable (written without checksums)") == 2


def test_all_damaged_is_an_error_that_lists_them(run):
    for step in (1, 2):
        shutil.rmtree(run / "checkpoints" / str(step) / "run")
    absent = r"\n.*checkpoints/2: FileNotFoundError.*\n.*checkpoints/1: FileNotFoundError"
    assert re.match("raised CheckpointError: no checkpoint is readable:" + absent, damage_example.restore(run))
    assert checkpoint.steps(run) == [1, 2]
