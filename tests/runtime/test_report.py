"""Reports: Markdown and JSON hold the same figures, strictly and atomically."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.runtime import report

ROWS = [
    {"method": "euler", "nfe": 2, "seed": 0, "frechet_distance": np.float32(1.7109375)},
    {"method": "a|b", "nfe": np.int64(3), "frechet_distance": jnp.float32(0.5), "note": "x"},
]


@pytest.mark.fast
def test_markdown_and_json_hold_the_same_figures(tmp_path):
    path = report.write_report(
        tmp_path / "new", "Demo", [("Results", "see\n\n<!-- table: main -->")], {"main": ROWS, "rest": ROWS[:1]}
    )
    found = json.loads((tmp_path / "new" / "report.json").read_text())
    assert set(found) == {"environment", "tables"}
    assert found["tables"]["main"][0] == {"method": "euler", "nfe": 2, "seed": 0, "frechet_distance": 1.7109375}
    text = path.read_text()
    assert "| method | nfe | seed | frechet_distance | note |" in text
    assert "| euler | 2 | 0 | 1.71094 |  |" in text
    assert "| a\\|b | 3 |  | 0.5 | x |" in text
    assert text.index("## Results") < text.index("| euler") < text.index("## rest") < text.index("## Environment")
    assert "<!--" not in text


def test_environment_names_versions_and_devices():
    found = report.environment()
    assert found["backend"] == "cpu" and found["device_count"] == 8
    assert set(found["versions"]) >= {"python", "diffjax", "jax", "jaxlib", "flax", "optax"}
    json.dumps(found, allow_nan=False)


def test_commit_is_none_outside_a_checkout(tmp_path):
    assert report.git_commit(tmp_path) is None


def test_non_finite_figures_stay_visible_in_strict_json(tmp_path):
    report.write_report(tmp_path, "Demo", [], {"t": [{"a": float("nan"), "b": np.inf}]}, environment={})

    def refuse(word):
        raise AssertionError(word)

    found = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert found["tables"]["t"] == [{"a": "nan", "b": "inf"}]
    assert "| nan | inf |" in (tmp_path / "report.md").read_text()


def test_a_placeholder_without_table_is_refused(tmp_path):
    with pytest.raises(ValueError, match="missing_table.*tables="):
        report.write_report(tmp_path, "Demo", [("A", "<!-- table: missing_table -->")], {}, environment={})


def test_a_value_json_cannot_hold_is_refused_before_any_file_is_written(tmp_path):
    with pytest.raises(TypeError, match="found set"):
        report.write_report(tmp_path, "Demo", [], {"t": [{"a": {1}}]}, environment={})
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    report.write_text(tmp_path / "a.txt", "old")

    def fail(source, target):
        raise OSError("no space")

    monkeypatch.setattr(report.os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        report.write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
