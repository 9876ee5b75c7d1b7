"""Positions at other resolutions: published sums, which tokens stay where they were, trained tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.models.dit import DiT
from diffjax.models.mdt import distances
from diffjax.nn import embeddings, positions
from diffjax.nn.functional import functionalize

WIDTH = 1152  # of the XL networks
LOW = embeddings.grid(np.arange(16), np.arange(16), WIDTH)


def square(mode, side=32, base=16, width=WIDTH):
    return positions.table(mode, side, base, width).reshape(side, side, width)


def draw(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.fast
def test_sums_of_the_published_tables():
    sums = [table.astype(np.float64).sum() for table in (LOW, square("interp"), square("extrap"))]
    # entries are rounded to float32 (3e-8): of a million of them about 3e-5, and all alike in the worst case 1e-3
    np.testing.assert_allclose(sums, [134598.9478, 536917.4384, 494676.2994], rtol=0, atol=1e-3)


def test_the_first_half_of_the_channels_is_the_column():
    """Tokens row by row: 1 is a column on, 16 a row."""
    np.testing.assert_allclose(LOW[1, [0, 576]], [0.84147098, 0], atol=1e-7)  # sin 1, float32
    np.testing.assert_allclose(LOW[16, [0, 576]], [0, 0.84147098], atol=1e-7)


def test_the_table_of_training_is_in_those_of_its_formula():
    low = LOW.reshape(16, 16, WIDTH)
    np.testing.assert_array_equal(square("interp")[::2, ::2], low)
    np.testing.assert_array_equal(square("interp", side=48)[::3, ::3], low)
    np.testing.assert_array_equal(square("extrap")[:16, :16], low)
    np.testing.assert_array_equal(square("crop")[8:24, 8:24], low)
    np.testing.assert_array_equal(square("tile"), np.tile(low, (2, 2, 1)))
    for mode in positions.MODES:
        np.testing.assert_array_equal(positions.table(mode, 16, 16, WIDTH), LOW)


def test_resizing_shortens_vectors_and_the_formula_does_not():
    for mode in ("interp", "extrap", "tile", "crop"):
        norms = np.sum(square(mode).astype(np.float64) ** 2, axis=2)
        np.testing.assert_allclose(norms, WIDTH / 2, rtol=1e-6)  # sin^2 + cos^2 of float32
    norms = np.sum(square("bicubic").astype(np.float64) ** 2, axis=2)
    # measured 572.8 to 579.0, mean 575.5: cubics lose less than straight lines, whose midpoints have 572.13
    assert 574 < norms.mean() < 575.9 and norms.min() < 573


def test_bicubic_is_cubic_convolution():
    """Keys 1981, eq. 4, at the quarters between tokens that twice as many fall on; away from the edges."""
    found = square("bicubic", 16, 8, width=4)[4, :, 0]
    t = 0.25
    near = 1 - (5 * t**2 - 3 * t**3) / 2, (t + 4 * t**2 - 3 * t**3) / 2
    weights = [(-t + 2 * t**2 - t**3) / 2, *near, (t**3 - t**2) / 2]
    known = np.sin(np.arange(8))
    for token in (5, 7, 9):  # at (token - 1) / 2 + 1 / 4
        low = (token - 1) // 2
        np.testing.assert_allclose(found[token], weights @ known[low - 1 : low + 3], atol=1e-6)  # float32


@pytest.mark.parametrize(
    ("mode", "base", "message"),
    [
        ("interpolate", 16, "unknown model.positions 'interpolate'; did you mean 'interp'"),
        ("tile", 1.5, "found base_size=1.5 for positions='tile', expected a whole number"),
        ("interp", -1, "expected a number above 0"),
    ],
)
def test_bad_options_are_refused(mode, base, message):
    with pytest.raises(ValueError, match=message):
        positions.table(mode, 32, base, 16)
    options = dict(width=16, depth=1, heads=2, positions=mode, base_size=base)
    with pytest.raises(ValueError, match=message):
        functionalize(lambda rngs: DiT(8, 4, 4, 0, **options, rngs=rngs))


def test_a_resampled_table_keeps_what_was_trained():
    trained = LOW[None] + 0.1 * draw(1, 256, WIDTH)
    found = positions.resample(trained, 32).reshape(32, 32, WIDTH)
    # float32; the spline goes through its points
    np.testing.assert_allclose(found[::2, ::2].reshape(256, WIDTH), trained[0], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(positions.resample(LOW[None], 32)[0], positions.table("interp", 32, 16, WIDTH))
    shifted = positions.resample(LOW[None] + 0.5, 32)[0]
    np.testing.assert_allclose(shifted, positions.table("interp", 32, 16, WIDTH) + 0.5, rtol=0, atol=1e-6)


def test_a_table_is_resampled_again_and_back():
    """From 256 to 512 to 1024 pixels as at once, also where it was trained; and down, where tokens are left out."""
    trained = positions.resample(LOW[None], 32) + 0.3
    expected = positions.table("interp", 64, 16, WIDTH) + 0.3
    np.testing.assert_allclose(positions.resample(trained, 64)[0], expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(positions.resample(trained, 16)[0], LOW + 0.3, rtol=0, atol=1e-6)


def test_the_same_share_of_an_image_has_the_same_bias():
    """Between tokens at even places of twice as many: the matrix of biases that they had."""
    table = draw(2, 7**2 + 3, 5)
    found = positions.resample_biases(table, 8)
    assert found.shape == (2, 15**2 + 3, 5) and positions.tokens_of_biases(found.shape[1]) == 8
    even = (8 * np.arange(0, 8, 2)[:, None] + np.arange(0, 8, 2)).reshape(1, 16)
    before, after = distances(jnp.arange(16)[None], 4), distances(jnp.asarray(even), 8)
    # float64 splines at their own points, float32 when stored
    np.testing.assert_allclose(found[:, np.asarray(after[0])], table[:, np.asarray(before[0])], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(found[:, -3:], table[:, -3:])  # the rows that nothing reads


def test_biases_that_are_linear_stay_so():
    """By d n0 / n, up to the longest distance that was trained; beyond, as that."""
    apart = np.arange(-3, 4)
    table = np.concatenate([(10.0 * apart[:, None] + apart).reshape(-1, 1), np.zeros((3, 1))])
    found = positions.resample_biases(table, 8)[:-3, 0].reshape(15, 15)
    wide = np.clip(np.arange(-7, 8) / 2, -3, 3)
    np.testing.assert_allclose(found, 10 * wide[:, None] + wide, rtol=0, atol=1e-5)


def test_a_network_at_twice_the_resolution():
    """512 pixels: latents of 64, every one of 32 repeated. Finite, and the table is that of 256 at even tokens."""
    x = jnp.asarray(draw(2, 32, 32, 4)).repeat(2, axis=1).repeat(2, axis=2)
    outputs = {}
    for mode in ("interp", "extrap", "bicubic"):
        make = lambda rngs, mode=mode: DiT(
            64, 4, 4, 0, width=32, depth=2, heads=2, positions=mode, base_size=16, rngs=rngs
        )
        net, init = functionalize(make)
        leaves, tree = jax.tree.flatten(init(jax.random.key(0)))
        weights = jax.tree.unflatten(tree, [leaf + 0.1 * draw(*leaf.shape) for leaf in leaves])  # fresh ones give 0
        outputs[mode] = jax.jit(net)(weights, x, jnp.array([10.0, 900.0]))
        assert outputs[mode].shape == x.shape and np.isfinite(outputs[mode]).all() and outputs[mode].std() > 0.01
    assert np.abs(outputs["interp"] - outputs["extrap"]).max() > 1e-3
    # a resized table is nearly the formula's between the same limits
    assert np.abs(outputs["interp"] - outputs["bicubic"]).mean() < np.abs(outputs["interp"] - outputs["extrap"]).mean()
