"""Inception score against torch-fidelity, in closed form, and at its limits."""

import numpy as np
import pytest

from diffjax.metrics.inception_score import inception_score


def logits(seed, num=103, classes=12):
    return 2 * np.random.default_rng(seed).standard_normal((num, classes)).astype(np.float32)


@pytest.mark.fast
def test_limits():
    # certain of one class each, all equally often: as many as there are classes
    assert inception_score(1e4 * np.eye(8, dtype=np.float32), splits=1) == pytest.approx((8, 0), rel=1e-12)
    # the same answer for all, sure or not
    assert inception_score(np.tile(logits(0, 1), (50, 1)), splits=5) == pytest.approx((1, 0), abs=1e-12)


def test_two_classes_in_closed_form():
    # half of the samples are a class with probability 0.9, half with 0.1: p(y) is (1/2, 1/2)
    probabilities = np.tile([[0.9, 0.1], [0.1, 0.9]], (10, 1))
    divergence = 0.9 * np.log(0.9 / 0.5) + 0.1 * np.log(0.1 / 0.5)
    assert inception_score(np.log(probabilities), splits=10) == pytest.approx((np.exp(divergence), 0), rel=1e-12)
    # a constant added to the logits of a sample changes nothing
    assert inception_score(np.log(probabilities) + np.arange(20)[:, None], 10).mean == pytest.approx(
        np.exp(divergence), rel=1e-12
    )


@pytest.mark.parametrize("splits", [1, 10])
def test_it_is_that_of_torch_fidelity(splits, torch_fidelity):
    import torch

    features = logits(0)
    theirs = torch_fidelity.metric_isc.isc_features_to_metric(torch.from_numpy(features), splits, shuffle=False)
    found = inception_score(features, splits)
    # both in float64
    assert found.mean == pytest.approx(theirs["inception_score_mean"], rel=1e-12)
    assert found.std == pytest.approx(theirs["inception_score_std"], abs=1e-12)
    assert found.mean > 2


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="1 to 103 splits of 103 samples, found 104"):
        inception_score(logits(0), 104)
    with pytest.raises(ValueError, match=r"logits must be finite floats \(N, D\)"):
        inception_score(np.full((5, 2), np.nan), 1)
    with pytest.raises(ValueError, match="found 0 splits|found 10"):
        inception_score(np.zeros((0, 3)))
