"""FID-infinity: known Gaussians, the line it fits, seeds, bad input."""

import numpy as np
import pytest

from diffjax.metrics import fid
from diffjax.metrics.fid_infinity import fid_infinity

WIDTH = 48


def gaussian(num, seed=0):
    return np.random.default_rng(seed).standard_normal((num, WIDTH))


@pytest.mark.fast
def test_a_set_that_is_perfect_has_a_limit_of_zero():
    """Samples of the reference itself: their mean is off by D / N, and by D (D + 1) / 4N their covariance."""
    found = [fid_infinity(gaussian(4000, seed), np.zeros(WIDTH), np.eye(WIDTH), 10, 400, seed) for seed in range(3)]
    for limit in found:
        assert limit.sizes == (400, 800, 1200, 1600, 2000, 2400, 2800, 3200, 3600, 4000)
        assert limit.slope > 0 and limit.distances[0] > limit.distances[-1] > 3 * abs(limit.value)
    # to first order, and with the spread of three sets
    assert np.mean([limit.slope for limit in found]) == pytest.approx(WIDTH + WIDTH * (WIDTH + 1) / 4, rel=0.15)


def test_it_is_the_line_through_the_distances_at_infinity():
    features = gaussian(900)
    mean, covariance = np.zeros(WIDTH), np.eye(WIDTH)
    found = fid_infinity(features, mean, covariance, 5, 500)
    assert found.sizes == (500, 600, 700, 800, 900)
    x, y = 1 / np.asarray(found.sizes), np.asarray(found.distances)
    slope = np.sum((x - x.mean()) * (y - y.mean())) / np.sum((x - x.mean()) ** 2)
    assert found.slope == pytest.approx(slope, rel=1e-10)
    assert found.value == pytest.approx(y.mean() - slope * x.mean(), rel=1e-10)
    # the last subset is all of them
    whole = fid.frechet_distance(features.mean(0), np.cov(features, rowvar=False), mean, covariance)
    assert found.distances[-1] == pytest.approx(whole, rel=1e-12)


def test_a_seed_draws_the_same_subsets():
    arguments = (gaussian(300), np.zeros(WIDTH), np.eye(WIDTH), 4, 50)
    assert fid_infinity(*arguments, seed=1) == fid_infinity(*arguments, seed=1)
    assert fid_infinity(*arguments, seed=1).distances[:-1] != fid_infinity(*arguments, seed=2).distances[:-1]


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="found 15 points from 5000 to 300 samples: draw more"):
        fid_infinity(gaussian(300), np.zeros(WIDTH), np.eye(WIDTH))
    with pytest.raises(ValueError, match="at least 2 points"):
        fid_infinity(gaussian(300), np.zeros(WIDTH), np.eye(WIDTH), 1, 50)
    with pytest.raises(ValueError, match="one width"):
        fid_infinity(gaussian(300), np.zeros(3), np.eye(3), 3, 50)
