"""Precision, recall, density, coverage: identities, order, sets whose figures are known, a loop written by hand, the
authors' package; memory."""

import tracemalloc

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


def lattice(seed, num):
    """Points of which many have the same distances up to rounding, far from 0, some twice."""
    return 100 + 0.1 * np.random.default_rng(seed).integers(0, 4, (num, 4))


def by_definition(real, samples, k):
    """Eq. 1-4 in float64, one pair after the other."""
    real, samples = real.astype(np.float64), samples.astype(np.float64)

    def norm(a, b):
        return np.sqrt(((a - b) ** 2).sum())

    def radius(i, points):
        return sorted(norm(points[i], p) for j, p in enumerate(points) if j != i)[k - 1]

    real_radii = [radius(i, real) for i in range(len(real))]
    sample_radii = [radius(i, samples) for i in range(len(samples))]
    balls = [[norm(a, b) <= r for a, r in zip(real, real_radii, strict=True)] for b in samples]
    precision, density = np.mean([any(row) for row in balls]), np.mean([sum(row) for row in balls]) / k
    recall = np.mean([any(norm(a, b) <= r for b, r in zip(samples, sample_radii, strict=True)) for a in real])
    coverage = np.mean([min(norm(a, b) for b in samples) <= r for a, r in zip(real, real_radii, strict=True)])
    return precision, recall, density, coverage


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize(
    ("real", "samples"),
    [
        (features(0, 50), 0.7 * features(1, 40) + 0.3),
        (features(0, 50, 9).astype(np.float32), features(1, 40, 9).astype(np.float32)),
        (lattice(0, 50), lattice(1, 40)),
        (np.float32(lattice(0, 50)), np.float32(lattice(1, 40))),
        (1e6 + features(0, 50), 1e6 + features(1, 40)),  # a matrix product alone knows no distance here
    ],
    ids=["float64", "float32", "ties", "ties in float32", "far from 0"],
)
def test_equals_the_definition_exactly(real, samples, k, monkeypatch):
    for values in (2**22, 100):  # one block; several of rows and of columns, the last ones short
        monkeypatch.setattr(lib, "_BLOCK_VALUES", values)
        assert prdc(real, samples, k) == by_definition(real, samples, k)


def test_equals_the_package_of_the_authors(capsys):
    package = pytest.importorskip("prdc", reason="prdc is not installed: pip install 'diffjax[test]'")
    real, samples = features(0, 150, 16), 0.9 * features(1, 120, 16)
    found = package.compute_prdc(real, samples, nearest_k=3)
    capsys.readouterr()  # it prints
    assert prdc(real, samples, 3)._asdict() == pytest.approx(found, rel=1e-14)
    assert 0.1 < found["recall"] < 0.9 and 0.1 < found["coverage"] < 0.9


def test_a_collapsed_set_is_one_point(monkeypatch):
    """Every distance is a tie there."""
    monkeypatch.setattr(lib, "_BLOCK_VALUES", 300)
    point = np.full((40, 4), 0.1)
    assert prdc(point, point, 3) == (1, 1, 40 / 3, 1)
    assert prdc(features(0), point, 3).recall == 0


def test_memory_does_not_grow_with_the_square_of_the_sets(monkeypatch):
    monkeypatch.setattr(lib, "_BLOCK_VALUES", 2**14)
    real, samples = features(0, 1000), features(1, 1000)
    tracemalloc.start()
    try:
        prdc(real, samples)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # four blocks; all distances are 61 blocks
    assert peak < 4 * 8 * 2**14 + 8 * real.size


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
