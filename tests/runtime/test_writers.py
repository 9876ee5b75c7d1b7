"""Metric logs: strict JSON lines that a resumed run continues, optional writers that fail clearly."""

import builtins
import json

import pytest

from diffjax.runtime import writers


def write(workdir, steps, step=0, names=(), partial=()):
    with writers.Writers(workdir, names, step, {}) as log:
        for number in steps:
            log.write(number, number * 4, {"loss": 0.1 * number}, {"total_s": 1.0}, partial=number in partial)


@pytest.mark.fast
def test_lines_behind_the_restored_step_are_written_again(tmp_path):
    write(tmp_path, [2, 4, 6])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "torn')
    write(tmp_path, [6, 8], step=5)
    lines = writers.read(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    # floats survive the rewriting exactly
    assert [line["loss"] for line in lines] == [0.1 * step for step in (2, 4, 6, 8)]
    assert lines[0] == {"step": 2, "images": 8, "loss": 0.2, "time": {"total_s": 1.0}}


def test_a_partial_line_is_replaced_when_the_run_goes_on(tmp_path):
    write(tmp_path, [2, 3], partial=[3])
    write(tmp_path, [4], step=3)
    assert [line["step"] for line in writers.read(tmp_path / "metrics.jsonl")] == [2, 4]


def test_a_new_run_drops_what_a_dead_one_left(tmp_path):
    write(tmp_path, [2, 4])
    write(tmp_path, [2], step=0)
    assert [line["step"] for line in writers.read(tmp_path / "metrics.jsonl")] == [2]


def test_a_damaged_line_inside_the_file_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        writers.read(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_line_is_strict_json(tmp_path, value):
    with writers.Writers(tmp_path, (), 0, {}) as log, pytest.raises(ValueError, match="not JSON compliant"):
        log.write(1, 4, {"loss": value}, {})


def test_each_line_is_on_disk_when_write_returns(tmp_path):
    with writers.Writers(tmp_path, (), 0, {}) as log:
        log.write(1, 4, {"loss": 1.0}, {})
        assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 1


def test_reserved_names_are_refused(tmp_path):
    with writers.Writers(tmp_path, (), 0, {}) as log, pytest.raises(ValueError, match=r"\['time'\].*rename"):
        log.write(1, 4, {"time": 1.0}, {})


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_package_is_named_before_the_log_is_touched(tmp_path, monkeypatch, name, module):
    real = builtins.__import__

    def without(wanted, *arguments, **options):
        if wanted == module:
            raise ImportError(wanted)
        return real(wanted, *arguments, **options)

    write(tmp_path, [1])
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=rf"{name} writer needs {module}.*pip install 'diffjax\[log\]'"):
        writers.Writers(tmp_path, [name], 0, {})
    assert len(writers.read(tmp_path / "metrics.jsonl")) == 1


def test_an_unknown_writer_gets_the_nearest_name(tmp_path):
    with pytest.raises(ValueError, match="unknown writer 'wandbb'.*did you mean 'wandb'"):
        writers.Writers(tmp_path, ["wandbb"], 0, {})


def test_tensorboard_gets_every_scalar(tmp_path):
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed: pip install 'diffjax[log]'")
    write(tmp_path, [1, 2], names=["tensorboard"])
    data = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert data.count(b"loss") == 2 and data.count(b"time/total_s") == 2 and data.count(b"images") == 2
