"""KID against torch-fidelity and clean-fid, CMMD against its definition; bounded memory."""

import tracemalloc

import numpy as np
import pytest

from diffjax.metrics import mmd
from diffjax.metrics.kid import kid
from diffjax.metrics.mmd import cmmd, squared_mmd


def features(seed, num=60, width=8, shift=0.0):
    return shift + np.random.default_rng(seed).standard_normal((num, width))


def units(seed, num=30, width=8, shift=0.0):
    x = features(seed, num, width, shift)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def cubic(x, y):
    return (x @ y / len(x) + 1) ** 3


def pairs(x, y, kernel, but_itself=False):
    return np.mean([kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(y) if not (but_itself and i == j)])


@pytest.mark.fast
@pytest.mark.parametrize("unbiased", [False, True])
def test_mmd_is_its_definition_in_any_blocks(unbiased, monkeypatch):
    x, y = features(0, 30), features(1, 41, shift=0.2)
    expected = pairs(x, x, cubic, unbiased) + pairs(y, y, cubic, unbiased) - 2 * pairs(x, y, cubic)
    for side in (2048, 7):
        monkeypatch.setattr(mmd, "_SIDE", side)
        found = squared_mmd(x, y, lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3, unbiased=unbiased)
        assert found == pytest.approx(expected, rel=1e-11)  # the difference is a tenth of the means


def test_kid_is_that_of_torch_fidelity_subset_by_subset(torch_fidelity):
    import torch

    # as wide and as large as activations of Inception are: positive, of mean 0.4
    real, samples = np.abs(features(0, 90, 64)) * 0.5, np.abs(features(1, 80, 64, 0.1)) * 0.5
    found = kid(real, samples, num_subsets=20, subset_size=50, seed=2020)
    theirs = torch_fidelity.metric_kid.kid_features_to_metric(
        torch.from_numpy(samples), torch.from_numpy(real),
        kid_subsets=20, kid_subset_size=50, rng_seed=2020, verbose=False,
    )  # fmt: skip
    # the same sums in float64, in another order
    assert found.mean == pytest.approx(theirs["kernel_inception_distance_mean"], abs=1e-12)
    assert found.std == pytest.approx(theirs["kernel_inception_distance_std"], abs=1e-12)
    assert found.std > 1e-3
    # the float32 features that a network gives; theirs then sums in float32
    single = kid(real.astype(np.float32), samples.astype(np.float32), num_subsets=20, subset_size=50)
    assert single.mean == pytest.approx(theirs["kernel_inception_distance_mean"], abs=1e-6)


def test_kid_is_that_of_clean_fid(clean_fid):
    real, samples = features(0, 50, 64), features(1, 50, 64, 0.1)
    # subsets of all are the same in whatever order they are drawn
    theirs = clean_fid.fid.kernel_distance(real, samples, num_subsets=2, max_subset_size=50)
    found = kid(real, samples, num_subsets=2, subset_size=50)
    assert found.mean == pytest.approx(theirs, abs=1e-12)
    assert found.std == pytest.approx(0, abs=1e-12)


def test_kid_of_one_distribution_is_zero_on_average():
    values = [kid(features(2 * i), features(2 * i + 1), 1, 60).mean for i in range(40)]
    # unbiased: within three deviations of the mean of 40
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(40)
    assert min(values) < 0 < max(values)


@pytest.mark.parametrize("widths", [8, 768])
def test_cmmd_is_its_definition(widths):
    x, y = units(0, 30, widths), units(1, 41, widths, 0.1)

    def kernel(a, b):
        return np.exp(-np.sum((a - b) ** 2) / (2 * 10**2))

    expected = 1000 * (pairs(x, x, kernel) + pairs(y, y, kernel) - 2 * pairs(x, y, kernel))
    # three means of about 1, a thousand times
    assert cmmd(x, y) == pytest.approx(expected, abs=1e-11)
    assert expected > 0.1
    assert cmmd(x, x) == pytest.approx(0, abs=1e-11)
    # embeddings as networks give them
    assert cmmd(x.astype(np.float32), y.astype(np.float32)) == pytest.approx(expected, abs=1e-5)


def test_two_points_in_closed_form():
    x, y = np.asarray([[1.0, 0.0]]), np.asarray([[0.0, 1.0]])  # at a squared distance of 2
    assert cmmd(x, y) == pytest.approx(1000 * (2 - 2 * np.exp(-2 / 200)), abs=1e-11)


def test_memory_does_not_grow_with_the_sets(monkeypatch):
    monkeypatch.setattr(mmd, "_SIDE", 256)
    x = units(0, 1100, 4)
    tracemalloc.start()
    try:
        cmmd(x, x)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # three blocks of 256 x 256 and what else; the whole kernel is 18 blocks
    assert peak < 3.5 * 8 * 256**2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kid(features(0), features(1, width=3), 2, 50), "first features have width 3, the second 8"),
        (lambda: kid(features(0), features(1, 40), 2, 50), "subsets of 2 to 40 for sets of 60 and 40, found 2 of 50"),
        (lambda: kid(features(0), np.full((60, 8), np.nan), 2, 50), "samples must be finite floats"),
        (lambda: kid(features(0)[0], features(1), 2, 50), r"real must be finite floats \(N, D\)"),
        (lambda: kid(features(0).astype(int), features(1), 2, 50), r"found int64 of shape \(60, 8\)"),
        (lambda: cmmd(features(0), units(1)), "real have lengths of .*, expected 1: divide by them"),
        (lambda: squared_mmd(units(0, 1), units(1), cubic, unbiased=True), "at least 2 features on either side"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
