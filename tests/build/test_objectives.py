"""Objectives from their configs: trained for seconds, loaded, sampled, refused."""

import json

import numpy as np
import pytest
from quick_runs import small

from diffjax import build
from diffjax.cli.train import train_and_evaluate
from diffjax.core import trees

DRAW = {"seed": 0, "sample_ids": range(4), "batch_size": 4}
TINY = {"model__width": 64, "model__depth": 1}


@pytest.mark.parametrize(("variant", "calls"), [("consistency_linear", 1), ("flow_labels_class", 50), ("ddim_knn", 50)])
def test_trained_and_sampled(variant, calls, tmp_path):
    train_and_evaluate(small(f"immiscible_digits.py:{variant}", batch_size=64, **TINY), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) and line["assign_reduction"] > 0 for line in lines)
    run = build.load_run(tmp_path / "run")
    plan = build.run_plan(run)
    assert plan.nfe == calls
    images = build.draw(run, plan, **DRAW)
    assert images.shape == (4, 8, 8, 1) and np.isfinite(images).all()
    if variant.startswith("consistency"):
        assert build.run_plan(run, num_steps=3).nfe == 2
        with pytest.raises(ValueError, match="found num_steps=4; a consistency function starts anew at most at"):
            build.run_plan(run, num_steps=4)


def test_consistency_distillation_starts_as_its_teacher(tmp_path):
    """The same network under the other preconditioner, told by a Heun step of the teacher."""
    train_and_evaluate(small("edm_digits.py", **TINY), tmp_path / "teacher")
    config = small("immiscible_digits.py:consistency_labels_none", tmp_path / "teacher", **TINY)
    experiment = build.experiment(config)
    teacher = build.load_run(tmp_path / "teacher")
    found, known = trees.flatten(experiment.init().method.params), trees.flatten(teacher.params)
    assert set(found) == set(known) and all(np.array_equal(found[path], known[path]) for path in known)
    train_and_evaluate(config, tmp_path / "student")
    assert build.run_plan(build.load_run(tmp_path / "student")).nfe == 1


def test_sections_that_do_not_fit():
    with pytest.raises(ValueError, match="found model.precondition='edm': set config.model.precondition = 'consis"):
        build.experiment(small("immiscible_digits.py:consistency_none", model__precondition="edm"))
    with pytest.raises(ValueError, match="found grid='polynomial' and process='flow': set both, or none"):
        build.plan({"solver": "euler", "num_steps": 5, "sigma_min": 1e-4, "sigma_max": 99.0, "process": "flow"})
