"""Accounts and profiles of whole runs: what a restart loses is counted, and a trace of a run's steps is summed up."""

import json

import loop_example
import pytest

from diffjax.runtime import clock, guards, writers
from diffjax.train import loop


@pytest.mark.fast
def test_steps_that_a_restart_repeats_are_lost(tmp_path):
    """Stopped by a NaN in step 10, two steps behind the checkpoint of step 7 and one behind the line of step 9."""
    config = loop_example.make_config(checkpoint_every_steps=7)
    with pytest.raises(guards.NonFiniteError):
        loop.run(loop_example.make_experiment(config, poison_at=9), config, tmp_path)
    before = json.loads((tmp_path / clock.FILE_NAME).read_text())
    loop.run(loop_example.make_experiment(config), config, tmp_path)
    lines = writers.read(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    first, second = (line["time"] for line in lines[1:3])
    assert "lost_s" not in first and 0 < second["lost_s"] <= before["train"] + before["data"]
    assert second["compile_s"] > before["compile"] and second["start_s"] > before["start"]
    for line in lines:
        times = {name: value for name, value in line["time"].items() if name.endswith("_s") and name != "images_per_s"}
        total = times.pop("total_s")
        assert sum(times.values()) <= total
        # the clock is read twice for one line
        assert line["time"]["goodput"] == pytest.approx(times["train_s"] / total, rel=0.01)


def test_a_profile_of_a_run(tmp_path, capfd):
    config = loop_example.make_config()
    loop.run(loop_example.make_experiment(config), config, tmp_path, profile_steps=4)
    tables = json.loads((tmp_path / "profile" / "summary.json").read_text())["tables"]
    assert tables["steps"][0]["steps"] == 4 and tables["steps"][0]["devices"] == 1
    assert {row["time"] for row in tables["shares"]} == {"compute", "collectives", "transfers", "host gaps"}
    assert f"profile: {tmp_path / 'profile' / 'summary.md'}" in capfd.readouterr().err


def test_the_process_that_traces_hears_wishes_when_the_others_do(tmp_path, monkeypatch):
    """They come with the metrics of a step: taken earlier by the first process alone, it would save while the others
    train."""
    taken, drain = [], guards.InFlight.drain
    monkeypatch.setattr(guards.InFlight, "drain", lambda self: taken.append(1) or drain(self))
    config = loop_example.make_config()
    counts = []
    for steps in (0, 4):
        loop.run(loop_example.make_experiment(config), config, tmp_path / str(steps), profile_steps=steps)
        counts.append(len(taken))
    assert counts[0] > 0 and counts[1] == 2 * counts[0]
