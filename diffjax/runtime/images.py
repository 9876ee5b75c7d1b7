"""Image grids: uint8 NHWC arrays to labelled PNG files."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_GAP = 2  # pixels between images, in the file
_TEXT = 14  # pixels of a line of text
_WHITE = 255


def grid(images: np.ndarray, columns: int = 0, scale: int = 0) -> np.ndarray:
    """Images in rows, with a white gap.

    images: uint8 (n, H, W, C), C 1 or 3; (n, T, H, W, C) are videos, a row each. columns: 0 for a square grid. scale: each pixel becomes
    scale x scale (nearest); 0 for the smallest that shows at least 64 pixels. Returns uint8 (h, w, 3).
    Raises ValueError for another dtype or shape.
    """
    images = np.asarray(images)
    if images.ndim == 5:
        images, columns = images.reshape(-1, *images.shape[2:]), images.shape[1]
    images = _checked(images)
    scale = scale or max(1, math.ceil(64 / images.shape[1]))
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = images.shape[1] + _GAP, images.shape[2] + _GAP
    canvas = np.full((rows * height + _GAP, columns * width + _GAP, 3), _WHITE, np.uint8)
    for index, image in enumerate(images):
        top, left = _GAP + index // columns * height, _GAP + index % columns * width
        canvas[top : top + height - _GAP, left : left + width - _GAP] = image
    return canvas


def labelled_rows(rows: Mapping[str, np.ndarray], scale: int = 0) -> np.ndarray:
    """One row of images per entry, its name to the left: the same seeds under several samplers.

    rows: name -> uint8 (n, H, W, C), the same n, H, W. Returns uint8 (h, w, 3).
    """
    strips = [grid(images, len(images), scale) for images in rows.values()]
    margin = max(_text_width(name) for name in rows) + 2 * _GAP
    return np.concatenate([_with_text(strip, name, left=margin) for name, strip in zip(rows, strips, strict=True)])


def side_by_side(grids: Mapping[str, np.ndarray], columns: int = 0, scale: int = 0) -> np.ndarray:
    """Several grids from left to right, each under its title.

    grids: title -> uint8 (n, H, W, C). Returns uint8 (h, w, 3).
    """
    panels = [_with_text(grid(images, columns, scale), title, top=_TEXT + _GAP) for title, images in grids.items()]
    height = max(panel.shape[0] for panel in panels)
    padded = [np.pad(p, ((0, height - len(p)), (0, 4 * _GAP), (0, 0)), constant_values=_WHITE) for p in panels]
    return np.concatenate(padded, axis=1)


def save_png(path: str | os.PathLike[str], image: np.ndarray, captions: Sequence[str] = ()) -> None:
    """Write uint8 (h, w, 3) as PNG, `captions` as lines of text above it; the file appears whole or not at all."""
    path = Path(path)
    for caption in reversed(captions):
        image = _with_text(image, caption, top=_TEXT + _GAP)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        Image.fromarray(image).save(temporary, format="PNG")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _checked(images: np.ndarray) -> np.ndarray:
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or not len(images):
        raise ValueError(
            f"found {images.dtype}{list(images.shape)}, expected uint8 (n, H, W, 1 or 3) with n > 0: map [-1, 1] to "
            "0..255 first"
        )
    return np.broadcast_to(images, (*images.shape[:3], 3))


def _text_width(text: str) -> int:
    return math.ceil(ImageFont.load_default().getlength(text))


def _with_text(image: np.ndarray, text: str, top: int = 0, left: int = 0) -> np.ndarray:
    """`image` moved by (top, left) on white, with the text in the space that opens."""
    width = max(image.shape[1] + left, _text_width(text) + 2 * _GAP if top else 0)
    canvas = np.full((image.shape[0] + top, width, 3), _WHITE, np.uint8)
    canvas[top:, left : left + image.shape[1]] = image
    picture = Image.fromarray(canvas)
    middle = _GAP if top else (canvas.shape[0] - _TEXT) // 2
    ImageDraw.Draw(picture).text((_GAP, middle), text, fill=(0, 0, 0), font=ImageFont.load_default())
    return np.asarray(picture)
