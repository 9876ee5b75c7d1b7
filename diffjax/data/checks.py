"""What every source demands of paths, names, images and labels; the messages name what was found and what to set."""

import difflib
from collections.abc import Iterable
from pathlib import Path

import numpy as np


def existing(path: str) -> Path:
    """`path` where it exists; raises FileNotFoundError."""
    if not path or not Path(path).exists():
        raise FileNotFoundError(f"data.path: {path!r} does not exist: give the path of your data")
    return Path(path)


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of a message about an unknown name: the one that is meant, "" where none is near."""
    close = difflib.get_close_matches(str(name), list(names), 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_image(image: np.ndarray, shape: tuple[int, ...], what: str) -> None:
    """Raises ValueError unless `image` has `shape` (..., H, W, C), H = W = 0 for any size, and is uint8 or float32 in
    [-1, 1]."""
    any_size = shape[-3:-1] == (0, 0) and image.ndim == len(shape) and 0 not in image.shape
    if image.shape[:-1] != shape[:-1] and not any_size:
        raise ValueError(
            f"{what} has shape {image.shape}, expected {shape}: set data.image_size, or data.resize = True to crop "
            "the centre and scale"
        )
    if image.shape[-1] != shape[-1]:
        raise ValueError(f"{what} has {image.shape[-1]} channels, expected {shape[-1]}: set data.channels")
    if image.dtype not in (np.uint8, np.float32):
        raise ValueError(f"{what} is {image.dtype}, expected uint8 (0..255) or float32 (-1..1): convert it")
    # a NaN fails the comparison too
    if image.dtype == np.float32 and not (image.min() >= -1 and image.max() <= 1):
        raise ValueError(f"{what} spans {image.min():g}..{image.max():g}, expected float32 in -1..1: rescale it")


def check_labels(labels: np.ndarray, num_classes: int, what: str) -> None:
    """Raises ValueError unless `labels` are integers in 0 .. num_classes - 1."""
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{what} holds {labels.dtype} labels, expected integers 0..{num_classes - 1}")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"{what} has labels {labels.min()}..{labels.max()}, expected 0..{num_classes - 1}: set data.num_classes"
        )
