"""Precision, recall, density, coverage: identities, order, sets whose figures are known, a loop written by hand."""

import numpy as np
import pytest

from diffjax.metrics import prdc as lib
from diffjax.metrics.prdc import prdc


def features(seed, num=60, width=4):
    return np.random.default_rng(seed).standard_normal((num, width))


@pytest.mark.fast
def test_identical_sets_have_all_of_each_other():
    found = prdc(features(0), features(0))
    assert (found.precision, found.recall, found.coverage) == (1, 1, 1)
    # every point lies in its own ball and, on average, in those of its k neighbours
    assert found.density == pytest.approx(6 / 5, abs=1e-12)


def test_the_order_does_not_matter():
    real, samples, random = features(0), features(1, 80), np.random.default_rng(2)
    assert prdc(real, samples) == prdc(random.permutation(real), random.permutation(samples))


def test_sets_apart_share_nothing_and_one_mode_of_two_is_half():
    assert prdc(features(0), features(1) + 100) == (0, 0, 0, 0)
    two_modes = np.concatenate([features(0), features(1) + 100])
    found = prdc(two_modes, features(0))
    assert (found.precision, found.recall, found.coverage) == (1, 0.5, 0.5)


@pytest.mark.parametrize("k", [1, 5])
def test_equals_the_definition_written_out(k, monkeypatch):
    monkeypatch.setattr(lib, "_BLOCK_VALUES", 500)  # several blocks, the last one short
    real, samples = features(0, 50), 0.7 * features(1, 40) + 0.3

    def norm(a, b):
        return np.sqrt(((a - b) ** 2).sum())

    def radius(i, points):
        return sorted(norm(points[i], p) for j, p in enumerate(points) if j != i)[k - 1]

    real_radii = [radius(i, real) for i in range(len(real))]
    sample_radii = [radius(i, samples) for i in range(len(samples))]
    balls = [[norm(a, b) <= r for a, r in zip(real, real_radii, strict=True)] for b in samples]
    precision, density = np.mean([any(row) for row in balls]), np.mean([sum(row) / k for row in balls])
    recall = np.mean([any(norm(a, b) <= r for b, r in zip(samples, sample_radii, strict=True)) for a in real])
    coverage = np.mean([min(norm(a, b) for b in samples) <= r for a, r in zip(real, real_radii, strict=True)])
    assert 0 < recall < 1 and 0 < coverage < 1
    # the same counts divided by the same numbers, up to the order of two divisions
    np.testing.assert_allclose(prdc(real, samples, k), (precision, recall, density, coverage), rtol=1e-14)


@pytest.mark.parametrize(
    ("real", "samples", "k", "message"),
    [
        (features(0), features(1, width=3), 5, "have width 4, those of the samples 3"),
        (features(0), features(1, 5), 5, r"k must be in 1..4 for sets of 60 and 5, found 5"),
        (features(0)[None], features(1), 5, r"real must be finite features \(n, D\)"),
        (features(0), np.full((60, 4), np.nan), 5, "samples must be finite"),
    ],
)
def test_bad_input_is_refused(real, samples, k, message):
    with pytest.raises(ValueError, match=message):
        prdc(real, samples, k)
