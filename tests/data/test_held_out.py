"""What is held out: a fixed part, of all of the data, that shares nothing with the rest."""

import numpy as np
import pytest

from diffjax.data import held_out, sources
from diffjax.data.sources import Arrays, DataShape

SHAPE = DataShape(2, 1, 10)


def source(count=50):
    images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 2, 2, 1))
    return Arrays(np.ascontiguousarray(images), np.arange(count) * 10 // count, SHAPE)


def places(part):
    return [int(part[i]["image"][0, 0, 0]) for i in range(len(part))]


@pytest.mark.fast
def test_the_parts_share_nothing_and_are_fixed():
    training, tested = held_out.split(source(), 0.2)
    assert len(tested) == 10 and sorted(places(training) + places(tested)) == list(range(50))
    assert places(held_out.split(source(), 0.2)[1]) == places(tested)
    # the data is sorted by class: its last or first tenth would hold few of them
    assert len({int(tested[i]["label"]) for i in range(len(tested))}) > 5


def test_items_are_read_together():
    class Many(Arrays):
        def __getitems__(self, indices):
            return [self[i] for i in indices]

    plain, many = source(), source()
    many.__class__ = Many
    for of in (plain, many):
        part = held_out.split(of, 0.2)[1]
        np.testing.assert_array_equal(sources.read(part, [3, 1])["image"][:, 0, 0, 0], np.array(places(part))[[3, 1]])


@pytest.mark.parametrize("share", [0.0, 0.001, 1.0])
def test_a_share_that_leaves_nothing_is_refused(share):
    with pytest.raises(ValueError, match="set config.method.held_out = 0.1"):
        held_out.split(source(), share)
