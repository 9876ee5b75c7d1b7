"""Metrics along a training: the numbers of an evaluation afterwards, under a name that says the protocol."""

import json

import jax
import numpy as np
import pytest
from quick_runs import small

from diffjax import build
from diffjax.build import along, evaluation, feature_spaces, image_sets, streams
from diffjax.cli.train import train_and_evaluate
from diffjax.metrics import pixels, protocol, references
from diffjax.runtime import guards, writers


def config(**evaluate):
    """Two steps of training; 40 samples in batches of 16, of which the last is not full."""
    made = small("edm_digits.py", num_steps=2, model__width=32, model__depth=1, sample__num_steps=4)
    made.evaluate.update({"every_steps": 1, "num_samples": 40, "batch_size": 16, **evaluate})
    return made


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, lines of the log with a metric, compilations by name)."""
    folder = tmp_path_factory.mktemp("along")
    with guards.CompileCounter() as counter:
        train_and_evaluate(config(), folder)
    lines = [line for line in writers.read(folder / writers.FILE_NAME) if any("@" in name for name in line)]
    return folder, lines, {name: counter.count(name) for name in ("train_step", "_chunk")}


def test_the_log_has_the_value_of_an_evaluation_afterwards(run):
    folder, lines, _ = run
    assert [line["step"] for line in lines] == [1, 2]
    trained = build.load_run(folder)
    samples = build.draw(trained, build.run_plan(trained), 0, range(40), batch_size=16)
    data = build.all_images(trained.config.data)
    result = pixels.frechet(samples, pixels.reference(data, "digits"))
    # the protocol is the one that reports of finished runs have, so that values may stand beside each other
    name = f"frechet_pixels@{protocol.identity(result.protocol)}"
    # the same program in float32; sums of the statistics in another order
    assert lines[-1][name] == pytest.approx(result.value, rel=1e-5)
    assert lines[0][name] != lines[1][name]


def test_it_compiles_once(run):
    """Sampling once for two evaluations, beside the grid of samples at the end; the step itself once."""
    assert run[2] == {"train_step": 1, "_chunk": 2}


def test_the_report_writes_the_protocol_out(run):
    folder, lines, _ = run
    (row,) = json.loads((folder / "report.json").read_text())["tables"]["protocols"]
    assert row["values"] == f"frechet_pixels@{row['protocol']}" and row["values"] in lines[-1]
    assert (row["features"], row["num_samples"], row["reference_count"]) == ("pixels", 40, 1797)
    summary = json.loads((folder / "report.json").read_text())["tables"]["training"][0]
    assert summary["loss"] > 0  # that of the last training step, though the last line is a metric's


def test_a_file_of_statistics_is_the_reference(tmp_path):
    space = feature_spaces.load("pixels")
    data = image_sets.of_data(config().data)
    made = evaluation.make_reference(data, space, ("prdc",), streams.How(streams.local_mesh(1)), None)
    references.write(tmp_path / "digits.npz", made)
    chosen = config(metric="prdc", reference=str(tmp_path / "digits.npz"), options={"k": 3})
    (hook,) = build.experiment(chosen).hooks
    found = hook.call(1, 8, jax.jit(build.experiment(chosen).init)().ema_params)
    assert {name.partition("_pixels@")[0] for name in found} == {"precision", "recall", "density", "coverage"}
    assert all(np.isfinite(value) for value in found.values())


@pytest.mark.parametrize("count", [30, 80])
def test_reports_of_runs_have_the_protocol_of_an_evaluation(count):
    """So that values of both may stand beside each other; fewer and more samples than images."""
    random = np.random.default_rng(0)
    data, samples = (random.uniform(-1, 1, (n, 3, 3, 1)).astype(np.float32) for n in (50, count))
    space, how = feature_spaces.load("pixels"), streams.How(streams.local_mesh(1))
    real = evaluation.make_reference(image_sets.of_memory(data, "noise"), space, ("prdc",), how, None)
    request = evaluation.Request(space, ("frechet", "prdc"), real, {"prdc": {"k": 3, "equal": count > 50}})
    items = image_sets.of_memory(samples, "samples")
    results = evaluation.evaluate(items, evaluation.seed_ranges(items, (0,), count), [request], how)
    own = pixels.reference(data, "noise", keep_features=True)
    reported = [pixels.frechet(samples, own), *pixels.prdc(samples, own, 3).values()]
    for found, expected in zip(results, reported, strict=True):
        protocol.check_comparable([found, expected])
        assert found.value == pytest.approx(expected.value, rel=1e-9)  # sums in another order


@pytest.mark.fast
def test_it_is_off_by_default():
    assert build.experiment(config(every_steps=0)).hooks == ()
    without = config()
    del without.evaluate
    assert along.evaluation_of(without, None) is None


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        ({"every_step": 5}, "unknown option 'every_step' of config.evaluate; did you mean 'every_steps'"),
        ({"metric": "fid"}, "'fid' is not defined on the features 'pixels', expected one of: inception"),
        ({"metric": "frechett"}, "unknown metric 'frechett'; did you mean 'frechet'"),
        ({"features": "pixel"}, "unknown feature space 'pixel'; did you mean 'pixels'"),
        ({"features": "classifier"}, "'classifier' needs weights"),
        ({"weights": "a.pth"}, "'pixels' takes no weights"),
        ({"num_samples": 0}, "num_samples=0, .* which a covariance needs"),
        ({"options": {"k": 3}}, "metric 'frechet' has no options, found 'k'"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(evaluate, message):
    with pytest.raises(ValueError, match=message):
        build.experiment(config(**evaluate))


def test_a_reference_that_is_absent_or_of_another_width_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="prepare --stats"):
        build.experiment(config(reference=str(tmp_path / "absent.npz")))
    references.write(tmp_path / "small.npz", references.Reference(np.zeros(3), np.eye(3)))
    with pytest.raises(ValueError, match="mismatched reference size: .* width 3.* have 64"):
        build.experiment(config(reference=str(tmp_path / "small.npz")))


def test_methods_without_samples_are_refused():
    chosen = small("classifier_digits.py")
    chosen.evaluate = {"every_steps": 1}
    with pytest.raises(ValueError, match="method 'classify' draws none: leave it out"):
        build.experiment(chosen)
