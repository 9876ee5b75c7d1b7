"""A classifier of digits: it learns in seconds, is tested on images that it never saw, and is read back."""

import jax
import numpy as np
import pytest
from quick_runs import small

from diffjax import build
from diffjax.build import classifiers
from diffjax.cli.train import train_and_evaluate
from diffjax.core import trees
from diffjax.data import sources, transforms
from diffjax.runtime import checkpoint_read, writers


def short(**changes):
    config = small("classifier_digits.py", batch_size=64, num_steps=80, **changes)
    config.method.test_every_steps, config.optim.learning_rate = 40, 5e-3
    config.model.update({"width": 16, "feature_width": 24})
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 80 steps, seconds."""
    folder = tmp_path_factory.mktemp("classifier")
    train_and_evaluate(short(), folder)
    return folder


def test_it_learns_and_says_how_well_on_images_it_never_saw(run):
    lines = [line for line in writers.read(run / writers.FILE_NAME) if "held_out_accuracy" in line]
    assert [line["step"] for line in lines] == [40, 80]
    # of guesses a tenth is right; 60 steps reach 0.92, the whole training 0.98
    assert lines[-1]["held_out_accuracy"] > 0.8
    assert "held_out_accuracy" in (run / "report.md").read_text()


def test_it_is_read_back_as_a_feature_space(run):
    found = classifiers.load(run)
    params, _, _ = checkpoint_read.load_params(run, ema=None)
    assert found.width == 24 and found.sha256 == trees.sha256(params)
    digits = sources.read(build.parts.source_of(short().data), range(400))
    features = np.asarray(jax.jit(found.features)(found.params, transforms.to_float(digits["image"])))
    assert features.shape == (400, 24)
    # classes lie apart: most digits are nearest to the mean of their own class
    means = np.stack([features[digits["label"] == label].mean(axis=0) for label in range(10)])
    nearest = np.linalg.norm(features[:, None] - means[None], axis=-1).argmin(axis=1)
    assert np.mean(nearest == digits["label"]) > 0.8


@pytest.mark.fast
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__num_classes": 0}, "needs 2 classes|set config.data.num_classes"),
        ({"data__image_scale": 0.5}, "sees pictures in .* image_scale"),
        ({"model__depth": 3}, r"found \['depth'\], its options are \['width', 'feature_width'\]"),
        ({"model__name": "dit"}, "trains model.name='classifier', found 'dit'"),
        ({"method__held_out": 0.0}, "set config.method.held_out = 0.1"),
        ({"method__dropout": 0.1}, r"takes held_out and test_every_steps, found \['dropout'\]"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build.experiment(short(**changes))


def test_samples_are_measured_in_its_features_along_a_training(run):
    config = small("edm_digits.py", model__width=32, model__depth=1, sample__num_steps=2)
    config.evaluate.update({"every_steps": 1, "num_samples": 30, "batch_size": 30})
    config.evaluate.update({"features": "classifier", "weights": str(run)})
    experiment = build.experiment(config)
    (hook,), (row,) = experiment.hooks, experiment.tables()["protocols"]
    ((name, value),) = hook.call(1, 8, jax.jit(experiment.init)().ema_params).items()
    assert name == row["values"] == f"frechet_classifier@{row['protocol']}" and value > 0
    assert row["weights_sha256"] == classifiers.load(run).sha256 and "FID" not in row["in words"]
    config.evaluate.metric = "fid"
    with pytest.raises(ValueError, match="'fid' is not defined on the features 'classifier'"):
        build.experiment(config)


def test_a_run_of_something_else_is_no_classifier(run, monkeypatch):
    params, config, step = checkpoint_read.load_params(run, ema=None)
    other = {**config, "model": {"name": "dit"}}
    with pytest.raises(ValueError, match="holds a classifier, which draws no samples"):
        build.load_run(run)
    monkeypatch.setattr(checkpoint, "load_params", lambda workdir, ema: (params, other, step))
    with pytest.raises(ValueError, match="holds a run of 'dit', expected a classifier: train one"):
        classifiers.load(run)
