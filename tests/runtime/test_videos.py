"""Video files: as many frames, of the size, with the pixels that were written."""

import numpy as np
import pytest
from PIL import Image

from diffjax.runtime import videos


@pytest.fixture
def av():
    return pytest.importorskip("av", reason="av is not installed: pip install 'diffjax[video]'")


def moving(num=6, height=32, width=48):
    """A bright square that moves over a slope of grey, in colour."""
    y, x = np.mgrid[:height, :width]
    frames = np.repeat((2 * x + y)[None, :, :, None], num, axis=0).repeat(3, axis=-1).astype(np.uint8)
    for index in range(num):
        frames[index, 8:20, 4 + 5 * index : 16 + 5 * index] = (200, 60, 90)
    return frames


@pytest.mark.parametrize(("height", "width"), [(32, 48), (33, 47)])
def test_mp4_is_near_to_what_was_written(av, tmp_path, height, width):
    frames = moving(height=height, width=width)
    videos.save(tmp_path / "new" / "a.mp4", frames, fps=7.5)
    found = videos.read(tmp_path / "new" / "a.mp4")
    assert found.shape == (6, height + height % 2, width + width % 2, 3) and found.dtype == np.uint8
    # half the resolution of colour, and eight bits of luma for three of colour: most at the edge of the square
    errors = np.abs(found[:, :height, :width].astype(int) - frames)
    assert errors.mean() < 4 < np.abs(np.roll(frames, 1, axis=0).astype(int) - frames).mean()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.mp4"]
    np.testing.assert_array_equal(next(videos.frames_of(tmp_path / "new" / "a.mp4")), found[0])
    with av.open(str(tmp_path / "new" / "a.mp4")) as file:
        assert file.streams.video[0].average_rate == 7.5


@pytest.mark.fast
def test_gif_keeps_every_pixel_of_256_colours(tmp_path):
    frames = np.concatenate([moving(3), moving(3)[-1:], moving(5)[3:]])  # the third twice
    assert max(len(np.unique(frame.reshape(-1, 3), axis=0)) for frame in frames) <= 256
    videos.save(tmp_path / "a.gif", frames, fps=7)
    np.testing.assert_array_equal(videos.read(tmp_path / "a.gif"), frames)
    with Image.open(tmp_path / "a.gif") as file:
        assert file.info["duration"] == 140  # 1 / 7 s in hundredths


def test_gif_of_more_colours_and_of_grey(tmp_path):
    random = np.random.default_rng(0)
    grey = random.integers(0, 256, (2, 20, 30, 1), np.uint8)
    videos.save(tmp_path / "grey.gif", grey, fps=10)
    np.testing.assert_array_equal(videos.read(tmp_path / "grey.gif"), grey.repeat(3, axis=-1))
    y, x = np.mgrid[:64, :64]
    smooth = np.stack([4 * x, 4 * y, 2 * (x + y)], axis=-1).astype(np.uint8)[None].repeat(2, axis=0)
    smooth[1] //= 2
    videos.save(tmp_path / "smooth.gif", smooth, fps=10)
    found = videos.read(tmp_path / "smooth.gif").astype(int)
    # 4,096 colours as 256, so boxes of about 16, spread by dithering
    assert found.shape == smooth.shape and np.abs(found - smooth).mean() < 10


@pytest.mark.parametrize(
    ("name", "frames", "fps", "message"),
    [
        ("a.avi", moving(), 7, "ends in .mp4 or .gif"),
        ("a.gif", moving().astype(np.float32), 7, r"expected uint8 \(T, H, W, 1 or 3\)"),
        ("a.gif", moving()[0], 7, r"found uint8\[32, 48, 3\]"),
        ("a.gif", moving()[..., :2], 7, "1 or 3"),
        ("a.gif", moving()[:0], 7, "T > 0"),
        ("a.gif", moving(), 0, "found fps=0"),
    ],
)
def test_what_is_no_video_is_not_written(tmp_path, name, frames, fps, message):
    with pytest.raises(ValueError, match=message):
        videos.save(tmp_path / name, frames, fps)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_read(av, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        videos.read(tmp_path / "a.mp4")
    for name in ("a.mp4", "a.gif"):
        (tmp_path / name).write_bytes(b"no video")
        with pytest.raises(ValueError, match="no readable"):
            videos.read(tmp_path / name)


def test_without_av_the_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install 'diffjax\[video\]'"):
        videos.save(tmp_path / "a.mp4", moving(), 7)
    assert not list(tmp_path.iterdir())
