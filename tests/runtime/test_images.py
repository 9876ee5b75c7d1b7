"""Image grids: every pixel where it belongs."""

import numpy as np
import pytest
from PIL import Image

from diffjax.runtime import images


def pictures(num=5, size=3, channels=1):
    return np.random.default_rng(0).integers(0, 255, (num, size, size, channels), np.uint8)


@pytest.mark.fast
@pytest.mark.parametrize("channels", [1, 3])
def test_each_image_stands_in_its_cell_enlarged(channels):
    batch = pictures(channels=channels)
    found = images.grid(batch, columns=2, scale=4)
    assert found.shape == (3 * 14 + 2, 2 * 14 + 2, 3) and found.dtype == np.uint8
    for index, image in enumerate(batch):
        top, left = 2 + index // 2 * 14, 2 + index % 2 * 14
        cell = found[top : top + 12, left : left + 12]
        np.testing.assert_array_equal(cell[::4, ::4], np.broadcast_to(image, (3, 3, 3)))
        np.testing.assert_array_equal(cell[3::4, 3::4], np.broadcast_to(image, (3, 3, 3)))
    assert (found[:2] == 255).all() and (found[30:, 16:] == 255).all()


def test_a_video_is_a_row():
    videos = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5, 1), np.uint8)
    np.testing.assert_array_equal(images.grid(videos, scale=1), images.grid(videos.reshape(6, 4, 5, 1), columns=3, scale=1))


def test_tiny_images_are_made_visible_and_large_ones_stay():
    assert images.grid(pictures(1, 8)).shape[0] == 64 + 4
    assert images.grid(pictures(1, 100)).shape[0] == 100 + 4


@pytest.mark.parametrize(
    "batch", [pictures().astype(np.float32), pictures()[0], pictures(channels=2), pictures()[:0]]
)
def test_anything_but_uint8_nhwc_is_refused(batch):
    with pytest.raises(ValueError, match=r"expected uint8 \(n, H, W, 1 or 3\)"):
        images.grid(batch)


def test_rows_carry_their_names_left_of_the_same_pixels():
    batch = pictures(4, 8)
    found = images.labelled_rows({"teacher": batch, "student, 2 calls": batch[::-1]}, scale=2)
    plain = np.concatenate([images.grid(batch, 4, 2), images.grid(batch[::-1], 4, 2)])
    np.testing.assert_array_equal(found[:, -plain.shape[1] :], plain)
    margin = found[:, : -plain.shape[1]]
    assert (margin[:20] < 128).any() and (margin[20:] < 128).any()


def test_grids_stand_side_by_side_under_their_titles():
    found = images.side_by_side({"a": pictures(4, 8), "b": pictures(9, 8)}, scale=2)
    assert found.shape[1] > images.grid(pictures(4, 8), scale=2).shape[1] * 2
    assert (found[:16] < 128).any()


def test_a_file_holds_the_pixels_below_its_captions(tmp_path):
    picture = images.grid(pictures(4, 8), scale=8)
    images.save_png(tmp_path / "new" / "a.png", picture, ["step 3", "seed 0"])
    with Image.open(tmp_path / "new" / "a.png") as file:
        found = np.asarray(file)
    np.testing.assert_array_equal(found[-picture.shape[0] :, : picture.shape[1]], picture)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]
