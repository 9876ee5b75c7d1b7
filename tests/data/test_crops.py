"""Crops of pictures: which pixels, and what is told of them."""

import numpy as np
import pytest

from diffjax.data import crops, pictures

HIGH = {"native": 32, "crop_then_resize": 32}


def picture(height=37, width=53):
    """Smooth, so that a scaled window is told from its neighbours, and not symmetric."""
    rows, columns = np.mgrid[:height, :width]
    waves = np.stack([rows * 4, columns * 4, 128 + 100 * np.sin(rows / 3) * np.cos(columns / 5)], axis=2)
    return waves.astype(np.uint8)


def cut(image, size, kind, seed=0, flip=False):
    return crops.crop(image, size, kind, np.random.default_rng(seed), flip, high=HIGH.get(kind, 0))


def window(image, told, size):
    top, left = int(told["top"]), int(told["left"])
    return image[top : top + size, left : left + size]


@pytest.mark.fast
@pytest.mark.parametrize("kind", crops.KINDS)
def test_the_window_is_where_it_is_said_to_be(kind):
    image = picture()
    for seed in range(5):
        found, told = cut(image, 16, kind, seed)
        assert found.shape == (16, 16, 3) and found.dtype == np.uint8
        assert all(type(value) is float for value in told.values())
        assert (told["height"], told["width"], told["flip"]) == (37, 53, 0)
        short = 32 if kind in HIGH else 16
        scaled = pictures.resize(image, short, round(53 * short / 37))
        expected = window(scaled, told, 32 if kind == "crop_then_resize" else 16)
        np.testing.assert_array_equal(found, pictures.resize(expected, 16, 16))


@pytest.mark.parametrize("kind", crops.KINDS)
def test_a_flip_comes_before_the_window(kind):
    """The window of the mirrored picture, at the same place: not the mirrored window."""
    image = picture()
    found, told = cut(image, 16, kind, seed=3, flip=True)
    expected, plain = cut(np.ascontiguousarray(image[:, ::-1]), 16, kind, seed=3)
    np.testing.assert_array_equal(found, expected)
    assert told == {**plain, "flip": 1.0}


def test_centre_is_the_middle():
    image = picture(20, 33)
    found, told = cut(image, 20, "centre")
    np.testing.assert_array_equal(found, image[:, 6:26])  # 13 columns more than needed, the odd one right
    assert told == {"height": 20, "width": 33, "top": 0, "left": 6, "flip": 0}


@pytest.mark.parametrize(("kind", "room"), [("random", 3), ("native", 19), ("crop_then_resize", 3)])
def test_every_window_is_drawn(kind, room):
    """Windows fill the picture to its last column; 600 draws miss one of 20 places with odds 20 (19/20)^600 = 1e-12."""
    image = np.zeros((16, 19, 1), np.uint8) if kind == "random" else np.zeros((32, 35, 1), np.uint8)
    generator = np.random.default_rng(0)
    told = [crops.crop(image, 16, kind, generator, False, high=HIGH.get(kind, 0))[1] for _ in range(600)]
    assert {place["left"] for place in told} == set(range(room + 1))
    assert {place["top"] for place in told} == (set(range(17)) if kind == "native" else {0})


def test_native_shows_a_part_and_crop_then_resize_all():
    """Of a picture that is square: a quarter of it at full detail, or the whole."""
    image = np.zeros((32, 32, 1), np.uint8)
    image[::2] = 255  # the finest stripes
    native, _ = cut(image, 16, "native")
    whole, told = cut(image, 16, "crop_then_resize")
    assert set(np.unique(native)) == {0, 255} and (told["top"], told["left"]) == (0, 0)
    assert np.abs(whole[2:-2].astype(int) - 127).max() <= 1  # stripes of one pixel are grey at half the size


def test_small_pictures_are_scaled_up():
    found, told = cut(picture(7, 9), 16, "random")
    assert found.shape == (16, 16, 3) and (told["height"], told["width"]) == (7, 9)


@pytest.mark.parametrize(
    ("image", "size", "kind", "high", "message"),
    [
        (picture(), 16, "center", 0, "unknown crop 'center'; did you mean 'centre'"),
        (picture(), 16, "native", 0, "found size=16 and high=0 for crop 'native', .* high of at least 16"),
        (picture(), 16, "native", 8, "high of at least 16"),
        (picture(), 16, "random", 32, "expected size above 0 and no high"),
        (picture(), 0, "random", 0, "expected size above 0"),
        (picture().astype(np.float32), 16, "random", 0, r"found an image float32 \(37, 53, 3\), expected uint8"),
        (picture()[..., 0], 16, "random", 0, r"found an image uint8 \(37, 53\)"),
    ],
)
def test_bad_input_is_refused(image, size, kind, high, message):
    with pytest.raises(ValueError, match=message):
        crops.crop(image, size, kind, np.random.default_rng(0), False, high=high)
