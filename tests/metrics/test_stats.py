"""Streaming moments against NumPy on all data at once; the same bits whatever the batches and ranges; memory."""

import functools
import itertools
import tracemalloc

import numpy as np
import pytest

from diffjax.metrics import array_files, stats


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


def seen(x, start=0, block=4, sizes=(3,)):
    """Running moments of x in batches of those sizes, again and again."""
    state, at = stats.running(start, block), 0
    for size in itertools.cycle(sizes):
        if at >= len(x):
            return state
        state, at = stats.update(state, x[at : at + size]), at + size


def assert_same(a, b):
    """Bit-equal."""
    assert a.count == b.count
    np.testing.assert_array_equal(a.mean, b.mean)
    np.testing.assert_array_equal(a.scatter, b.scatter)


@pytest.mark.parametrize("num", [1, 4, 31, 64, 67])
def test_running_moments_are_those_of_all_and_do_not_depend_on_batches(num):
    # offsets and scales that make the order of the sums visible
    x = (np.random.default_rng(num).standard_normal((num, 3)) * [1, 1e3, 1e-3] + [1e4, 0, 1]).astype(np.float32)
    whole = stats.total(seen(x))
    assert whole.count == num and whole.mean.dtype == np.float64
    np.testing.assert_allclose(whole.mean, x.astype(np.float64).mean(0), rtol=1e-13, atol=1e-13)
    if num > 1:
        # deviations of 1 from a mean of 1e4 keep 12 digits
        np.testing.assert_allclose(whole.covariance, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(whole.scatter, whole.scatter.T)
    for sizes in ((1,), (4,), (7, 2), (100,)):
        assert_same(stats.total(seen(x, sizes=sizes)), whole)


@pytest.mark.parametrize("cuts", [[4], [8, 12], [0, 20, 44], [4, 8, 12, 16, 20], [64]])
def test_ranges_join_to_the_bits_of_one(cuts):
    """The tree of blocks is that of the ids, wherever it is cut; with a plain sum in order it would not be."""
    x = 1e3 + np.random.default_rng(0).standard_normal((67, 3))
    edges = [0, *cuts, 67]
    parts = [seen(x[a:b], start=a, sizes=(5,)) for a, b in itertools.pairwise(edges)]
    joined = functools.reduce(stats.join, parts)
    assert (joined.start, joined.stop) == (0, 67)
    assert_same(stats.total(joined), stats.total(seen(x)))
    # the same from right to left
    assert_same(stats.total(functools.reduce(lambda b, a: stats.join(a, b), reversed(parts))), stats.total(seen(x)))
    # and when more follows
    more = stats.update(joined, x[:9])
    assert_same(stats.total(more), stats.total(seen(np.concatenate([x, x[:9]]))))


def test_features_held_together_give_the_same_bits():
    x = np.random.default_rng(0).standard_normal((2 * stats.BLOCK + 300, 3)).astype(np.float32)
    assert_same(stats.of(x), stats.total(seen(x, block=stats.BLOCK, sizes=(700,))))


def test_a_saved_state_goes_on_to_the_same_bits(tmp_path):
    x, file = np.random.default_rng(0).standard_normal((31, 3)), tmp_path / "state.npz"
    for stop in (0, 2, 4, 9, 28):
        array_files.write(file, stats.to_arrays(seen(x[:stop])))
        state = stats.from_arrays(array_files.read(file))
        assert state.stop == stop
        assert_same(stats.total(stats.update(state, x[stop:])), stats.total(seen(x)))


def test_states_that_do_not_fit_are_refused():
    x = np.random.default_rng(0).standard_normal((16, 3))
    with pytest.raises(ValueError, match="multiple of block 4, found start 6"):
        stats.running(6, 4)
    with pytest.raises(ValueError, match="expected sample 6, and all but the last range in whole blocks of 4"):
        stats.join(seen(x[:6]), seen(x[8:], start=8))
    with pytest.raises(ValueError, match="blocks of 4 and 8"):
        stats.join(seen(x), seen(x, start=16, block=8))
    with pytest.raises(ValueError, match="one width, found 3 and 2"):
        stats.update(seen(x[:5]), x[:, :2])
    with pytest.raises(ValueError, match="1 of 4 samples hold a NaN"):
        stats.update(seen(x[:5]), np.where(np.arange(4)[:, None] == 2, np.nan, x[:4]))
    with pytest.raises(ValueError, match="found no sample"):
        stats.total(stats.running())
    arrays = stats.to_arrays(seen(x[:10]))
    with pytest.raises(ValueError, match="no running moments .*mean_0"):
        stats.from_arrays({name: array for name, array in arrays.items() if name != "mean_0"})
    with pytest.raises(ValueError, match="moments of 8 samples, expected those of 0 to 9"):
        stats.from_arrays(arrays | {"pending": x[:0]})


def peak_bytes(width, num_blocks, block):
    """Largest amount that NumPy held while `num_blocks` were summed, the features apart."""
    batch = np.random.default_rng(0).standard_normal((block, width)).astype(np.float32)
    state = stats.running(0, block)
    tracemalloc.start()
    try:
        for _ in range(num_blocks):
            state = stats.update(state, batch)
        stats.total(state)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def expected_bytes(width, num_blocks, block):
    """What the module says: log2(blocks) nodes and three more, four blocks of features."""
    return 8 * ((np.floor(np.log2(num_blocks)) + 3) * width**2 + 4 * block * width)


def test_memory_is_what_the_module_says():
    # the 32nd block finds the most nodes, five; 2 % for means and the objects of Python
    for width, block in ((256, 64), (64, 512)):
        assert peak_bytes(width, 33, block) < 1.02 * expected_bytes(width, 33, block)
    assert peak_bytes(256, 33, 64) > 0.8 * expected_bytes(256, 33, 64)


def test_inception_features_of_50000_images_take_less_than_500_megabytes():
    """Measured at a third of their 50 blocks, and fewer samples to a block; the rest by the same formula."""
    assert 0.8 * expected_bytes(2048, 17, 4) < peak_bytes(2048, 17, 4) < 1.02 * expected_bytes(2048, 17, 4)
    assert expected_bytes(2048, -(-50_000 // stats.BLOCK), stats.BLOCK) < 350e6
