"""Streaming moments against NumPy on all data at once."""

import functools

import numpy as np
import pytest

from diffjax.metrics import stats


@pytest.mark.fast
@pytest.mark.parametrize("cuts", [[], [1], [7, 8, 40]])
def test_moments_of_chunks_merge_to_those_of_all(cuts):
    # far from 0: a sum of squares would lose six digits
    x = 1e3 + np.random.default_rng(0).standard_normal((50, 4)) * [1, 2, 3, 0.1]
    total = functools.reduce(stats.merge, map(stats.moments, np.split(x, cuts)))
    assert total.count == 50
    np.testing.assert_allclose(total.mean, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(total.covariance, np.cov(x, rowvar=False), rtol=1e-10, atol=1e-11)


def test_moments_do_not_depend_on_the_order():
    random = np.random.default_rng(0)
    x = random.standard_normal((50, 4))
    first, second = stats.moments(x), stats.moments(x[random.permutation(50)])
    np.testing.assert_allclose(first.covariance, second.covariance, atol=1e-14)


def test_float32_features_are_summed_in_float64():
    x = np.full((1000, 2), np.float32(0.1))
    assert stats.moments(x).mean.dtype == np.float64
    np.testing.assert_allclose(stats.moments(x).mean, np.float64(np.float32(0.1)), rtol=1e-14)


def test_bad_features_are_refused():
    with pytest.raises(ValueError, match="at least 2 samples, found 1"):
        _ = stats.moments(np.zeros((1, 3))).covariance
    for wrong in (np.zeros((0, 3)), np.zeros(3), np.zeros((2, 3, 1))):
        with pytest.raises(ValueError, match="N at least 1"):
            stats.moments(wrong)
    broken = np.zeros((5, 3))
    broken[3, 1], broken[4, 0] = np.nan, np.inf
    with pytest.raises(ValueError, match="2 of 5 samples hold a NaN or infinity, the first is sample 3"):
        stats.moments(broken)
    with pytest.raises(ValueError, match="one width"):
        stats.merge(stats.moments(np.zeros((2, 3))), stats.moments(np.zeros((2, 4))))
