"""Faults of launch/faults.py that no test of a part makes: trainings of two real processes that break and go on.

Those that never start, silent hosts and clocks are in runtime/test_distributed.py, full disks, buckets and damage of each
file in runtime/test_checkpoint*.py.
"""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def faults():
    spec = importlib.util.spec_from_file_location("faults", ROOT / "launch" / "faults.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.STEPS = 70
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of all runs, so that the one that nothing happens to is made once."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """The processes find the package and its configs, and compile as users do."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_one_is_killed_and_fewer_go_on_to_the_same_bits(faults, folder):
    [(lost, seconds)] = faults.kill_one(folder, counts=[(2, 1)])
    assert 0 <= lost <= faults.SAVE_EVERY + 3 and seconds < 60  # steps in flight; said to be at once


def test_a_flipped_bit_in_the_newest_checkpoint(faults, folder):
    [(lost, _)] = faults.damaged_checkpoint(folder, ways=["flip"])
    assert lost == 10  # steps 60 and 70 are kept


def test_a_signal_to_one_process_stops_all_at_one_step(faults, folder):
    [(lost, seconds)] = faults.sigterm_in_a_save(folder)
    assert lost == 0 and seconds < 60


def test_nan_in_the_data_of_one_host(faults, folder):
    [(lost, _)] = faults.nan_on_one_host(folder)
    assert lost < faults.SAVE_EVERY


def test_what_does_not_survive_is_said(faults, folder):
    """The judge itself: a run that differs from the whole one is found."""
    expected = dict(faults.whole(folder))
    expected[5] += 1e-6
    with pytest.raises(faults.Broken, match=r"losses of steps \[5\] differ"):
        faults.check_same(folder / "whole", expected)
