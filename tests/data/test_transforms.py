"""Pixels, flips and EDM's augmentation against closed forms and a second implementation in NumPy and SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from diffjax.data import transforms
from diffjax.runtime import mesh
from diffjax.sampling import generate

SIZE = 16
transform = jax.jit(transforms.transform)
augment = jax.jit(transforms.augment)
draw = jax.jit(jax.vmap(transforms._draw, in_axes=(0, None)))


def make_images(batch: int, height: int = SIZE, width: int = SIZE, channels: int = 2) -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 1, (batch, height, width, channels)).astype(np.float32)


def make_transformation(batch: int = 1, **values: float) -> transforms.Transformation:
    zeros = {name: jnp.zeros(batch) for name in transforms.Transformation._fields}
    return transforms.Transformation(**zeros | {name: jnp.full(batch, v, jnp.float32) for name, v in values.items()})


@pytest.mark.fast
def test_pixels_survive_the_way_to_floats_and_back():
    pixels = np.arange(256, dtype=np.uint8)
    floats = transforms.to_float(pixels)
    assert floats.dtype == jnp.float32 and floats[0] == -1 and floats[255] == 1
    np.testing.assert_array_equal(generate.to_uint8(floats), pixels)
    # 127.5 x + 128, truncated: 0 gives 128, and what lies outside is cut off
    out = generate.to_uint8(jnp.array([-3.0, -1.0, 0.0, 0.0039, 1.0, 7.0]))
    np.testing.assert_array_equal(out, [0, 0, 128, 128, 255, 255])
    np.testing.assert_array_equal(transforms.to_float(floats), floats)
    with pytest.raises(ValueError, match="int32"):
        transforms.to_float(jnp.zeros(3, jnp.int32))


def test_flip_mirrors_half_of_the_images_each_for_itself():
    images = make_images(400)
    flipped = np.asarray(transforms.flip(images, jax.random.key(0)))
    mirrored = (flipped == images[:, :, ::-1]).all((1, 2, 3))
    assert (mirrored | (flipped == images).all((1, 2, 3))).all()
    assert 140 < mirrored.sum() < 260  # 200 expected, six standard deviations of 10


def test_a_video_is_mirrored_as_a_whole():
    images = make_images(8)
    videos = np.stack([images, -images], axis=1)  # two frames
    flipped, key = transforms.flip(images, jax.random.key(0)), jax.random.key(0)
    np.testing.assert_array_equal(transforms.flip(videos, key), np.stack([flipped, -flipped], axis=1))


def test_probability_zero_changes_nothing():
    images = make_images(8)
    augmented, labels = augment(images, jax.random.key(0), 0.0)
    np.testing.assert_array_equal(augmented, images)
    np.testing.assert_array_equal(labels, np.zeros((8, 9)))


def test_flips_are_exact():
    images = make_images(1)
    np.testing.assert_array_equal(transform(images, make_transformation(flip_x=1)), images[:, :, ::-1])
    np.testing.assert_array_equal(transform(images, make_transformation(flip_y=1)), images[:, ::-1])


@pytest.mark.parametrize(("right", "down"), [(2, 0), (0, -3), (5, 1)])
def test_whole_shifts_are_exact_and_reflect_at_the_edge(right, down):
    images = make_images(1, 16, 24)
    # the shift is in units of an eighth of the side
    moved = transform(images, make_transformation(shift_x=right / 3, shift_y=down / 2))
    padded = np.pad(images, ((0, 0), (8, 8), (8, 8), (0, 0)), "reflect")
    expected = padded[:, 8 - down : 24 - down, 8 - right : 32 - right]
    np.testing.assert_allclose(moved, expected, atol=3e-6)  # float32 through two filters of 12 taps


def test_a_quarter_turn_goes_to_the_left():
    images = make_images(1, channels=1)
    smooth = scipy.ndimage.gaussian_filter(images[0, :, :, 0], 2.0)[None, :, :, None]
    turned = transform(smooth, make_transformation(rotation=np.pi / 2))
    inner = slice(4, -4)
    # the filter is not quite symmetric (its mean tap is 5.1): a turn shows a twentieth of a pixel
    np.testing.assert_allclose(turned[0, inner, inner], np.rot90(smooth[0])[inner, inner], atol=0.01)
    assert np.abs(np.rot90(smooth[0], -1) - np.rot90(smooth[0]))[inner, inner].max() > 0.1


@pytest.mark.parametrize(
    "values",
    [{"rotation": 0.7}, {"scale": 1.5}, {"scale": -1.0, "rotation": -2.0}, {"stretch": 1.2, "stretch_angle": 0.9}],
)
def test_a_smooth_image_is_resampled_as_its_formula(values):
    size = 32
    y, x = np.mgrid[:size, :size] - (size - 1) / 2

    def blob(x, y):  # an oval away from the centre
        return np.exp(-((x - 4) ** 2 / 30 + (y + 3) ** 2 / 50 + (x - 4) * (y + 3) / 60))

    image = blob(x, y)[None, :, :, None].astype(np.float32)
    moved = transform(image, make_transformation(**values))[0, :, :, 0]
    full = {"scale": 0.0, "rotation": 0.0, "stretch": 0.0, "stretch_angle": 0.0} | values

    def turn(angle):
        return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])

    along = 2 ** (0.2 * full["stretch"])
    uneven = turn(-full["stretch_angle"]) @ np.diag([1 / along, along]) @ turn(full["stretch_angle"])
    inverse = turn(full["rotation"]) @ uneven / 2 ** (0.2 * full["scale"])
    source = np.einsum("ij,jyx->iyx", inverse, np.stack([x, y]))
    inside = np.abs(source).max(0) < size / 2 - 3  # beyond the edge the image is reflected
    expected = np.where(inside, blob(*source), 0)
    # slopes of at most 0.15 a pixel, times the 0.14 pixels by which two filters, each a twentieth of a pixel off
    # the centre along both axes, miss after a half turn
    np.testing.assert_allclose(np.where(inside, moved, 0), expected, atol=0.021)
    assert inside.sum() > 400 and np.abs(expected - image[0, :, :, 0])[inside].max() > 0.1


def second_implementation(image: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    """One channel, float64: pad, insert zeros, convolve, read, correlate, step by step."""
    taps = transforms._SYM6
    height, width = image.shape
    image = np.pad(image, ((height - 1,) * 2, (width - 1,) * 2), "reflect")
    for axis in (0, 1):
        stuffed = np.insert(image, np.arange(1, image.shape[axis] + 1), 0, axis=axis)
        # sample j of the doubled grid is sum_k taps[k] stuffed[j + 5 - k]
        full = np.apply_along_axis(np.convolve, axis, stuffed, taps)
        image = np.take(full, np.arange(5, 5 + stuffed.shape[axis]), axis)
    rows, columns = 2 * height + 12, 2 * width + 12
    s, t = np.mgrid[:rows, :columns].astype(float)
    point = np.stack([(t - (columns - 2) / 2) / 2, (s - (rows - 2) / 2) / 2, np.ones_like(s)])
    source = 2 * np.einsum("ij,jyx->iyx", inverse, point)[:2]
    where = np.stack([source[1] + (image.shape[0] - 2) / 2, source[0] + (image.shape[1] - 2) / 2])
    image = scipy.ndimage.map_coordinates(image, where, order=1, mode="grid-constant")
    for axis in (0, 1):
        # full[j + 11] = sum_k taps[k] image[j + k]
        full = np.apply_along_axis(np.convolve, axis, image, taps[::-1])
        image = np.take(full, np.arange(12, 12 + image.shape[axis] - 12, 2), axis)
    return image


def test_random_transformations_equal_a_second_implementation():
    images = make_images(12, 12, 16, 1)
    key = jax.random.key(5)
    transformation = draw(jax.random.split(key, 12), 1.0)
    inverse = jax.jit(transforms._inverse_matrices, static_argnums=(1, 2))
    matrices = np.asarray(inverse(transformation, 12, 16), np.float64)
    augmented, labels = augment(images, key, 1.0)
    flipped = images[..., 0].copy()
    for i in range(12):
        flipped[i] = flipped[i][:, ::-1] if labels[i, 0] else flipped[i]
        flipped[i] = flipped[i][::-1] if labels[i, 1] else flipped[i]
    expected = [second_implementation(flipped[i], matrices[i]) for i in range(12)]
    # float32 coordinates of some 100 pixels: 1e-5 of a pixel, times slopes of about 1
    np.testing.assert_allclose(augmented[..., 0], expected, atol=1e-4)


def test_labels_follow_their_definition():
    values = {"flip_x": 1, "scale": 0.3, "rotation": 2.0, "stretch": -0.7, "stretch_angle": 0.4}
    values |= {"shift_x": 1.1, "shift_y": -0.2}
    expected = [1, 0, 0.3, np.cos(2) - 1, np.sin(2), -0.7 * np.cos(0.4), -0.7 * np.sin(0.4), 1.1, -0.2]
    np.testing.assert_allclose(transforms.labels(make_transformation(2, **values)), [expected] * 2, rtol=1e-6)


def test_draws_have_the_right_frequencies():
    count, p = 20_000, 0.12
    keys = jax.random.split(jax.random.key(0), count)
    t = draw(keys, p)
    labels = np.asarray(transforms.labels(t))
    shares = {0: 0.5, 1: p / 2, 2: p, 4: p, 5: p, 7: p, 8: p}
    for column, share in shares.items():
        # five standard deviations of a share
        assert abs((labels[:, column] != 0).mean() - share) < 5 * np.sqrt(share * (1 - share) / count), column
    for draws in (t.scale, t.stretch, t.shift_x, t.shift_y):
        normal = np.asarray(draws)[np.asarray(draws) != 0]
        assert abs(normal.mean()) < 0.1 and abs(normal.std() - 1) < 0.1  # some 2,400 draws: five deviations
    turns = np.asarray(t.rotation)[np.asarray(t.rotation) != 0]
    assert turns.min() < -3 and turns.max() > 3 and abs(turns.std() - np.pi / np.sqrt(3)) < 0.15
    straight = np.asarray(t.stretch_angle == 0)[np.asarray(t.stretch) != 0].mean()
    assert 0.45 < straight < 0.55  # half of some 2,400
    np.testing.assert_array_equal(t.shift_x != 0, t.shift_y != 0)


def test_the_filter_is_the_wavelet_sym6():
    """Orthonormal to its even shifts, and six vanishing moments: Daubechies 1992, eqs. 5.1.39 and 6.1.1."""
    taps = transforms._SYM6
    for shift in range(6):
        expected = float(shift == 0)
        # published with 11 correct digits
        assert np.sum(taps[2 * shift :] * taps[: 12 - 2 * shift]) == pytest.approx(expected, abs=1e-10)
    assert taps.sum() == pytest.approx(np.sqrt(2), abs=1e-10)
    k = np.arange(12) - 5.5
    for moment in range(6):
        assert np.sum((-1.0) ** np.arange(12) * k**moment * taps) == pytest.approx(0, abs=1e-6)


def test_augmentation_is_the_same_on_any_number_of_devices():
    images = make_images(8)
    alone, labels_alone = augment(images, jax.random.key(2), 0.5)
    for devices in (2, 8):
        split = jax.device_put(images, mesh.batch_sharding(mesh.make_mesh(devices)))
        spread, labels_spread = augment(split, jax.random.key(2), 0.5)
        np.testing.assert_allclose(labels_spread, labels_alone, rtol=1e-6, atol=1e-7)  # sin and cos are compiled anew
        np.testing.assert_allclose(spread, alone, atol=1e-5)  # sums in another order


def test_images_that_cannot_be_augmented_are_refused():
    for wrong in (np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 1, 8, 3), np.float32)):
        with pytest.raises(ValueError, match="at least 2x2"):
            transforms.augment(jnp.asarray(wrong), jax.random.key(0))
