"""Squared W2 of point sets: on a line it is that of sorted points."""

import numpy as np
import pytest

from diffjax.metrics.wasserstein import squared_w2


@pytest.mark.fast
def test_on_a_line_points_go_in_order():
    random = np.random.default_rng(0)
    a, b = random.normal(size=50), 1 + 2 * random.normal(size=50)
    expected = np.mean((np.sort(a) - np.sort(b)) ** 2)
    assert squared_w2(a[:, None], b[:, None]) == pytest.approx(expected, rel=1e-10)


def test_a_shift_in_the_plane():
    """The optimal plan of a shifted set is the shift."""
    a = np.random.default_rng(1).normal(size=(40, 2))
    assert squared_w2(a, a[::-1] + np.array([3.0, 4.0])) == pytest.approx(25, rel=1e-10)
    assert squared_w2(a, a) == pytest.approx(0, abs=1e-12)


def test_sets_of_different_size():
    with pytest.raises(ValueError, match="found 3 and 4 points"):
        squared_w2(np.zeros((3, 2)), np.zeros((4, 2)))
