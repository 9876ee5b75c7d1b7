"""Square crops of pictures, with what a network is told of them: original size, place of the crop, and flip.

A picture is mirrored first (if at all), then scaled until its shorter side fits, then cut, and then the window is
written down: so "left" counts from the left edge of the picture that the window was cut from, mirrored or not.

    centre             shorter side to `size`, the window in the middle
    random             shorter side to `size`, any window
    native             shorter side to `high`, any window of `size`: textures of the high resolution, parts of objects
    crop_then_resize   shorter side to `high`, any window of `high`, scaled to `size`: what a network for the high
                       resolution would see, made small

The last two are the ways to train for a later, higher resolution that Berrada et al. 2024 compare in figure 5.
"""

import numpy as np

from diffjax.core import names
from diffjax.data import pictures

KINDS = {"centre": False, "random": False, "native": True, "crop_then_resize": True}  # whether it needs `high`


def crop(
    image: np.ndarray, size: int, kind: str, generator: np.random.Generator, flip: bool, *, high: int = 0
) -> tuple[np.ndarray, dict[str, float]]:
    """A window (size, size, C) of `image` (H, W, C), both uint8, and its metadata.

    kind: see the module's list; flip: whether the picture is mirrored left to right before; high: pixels of the shorter
    side at the high resolution, for the kinds that need it. `generator` draws the window's top, then its left, the same
    numbers with and without flip. Smaller pictures are scaled up. All by Lanczos.

    Metadata: height, width of `image` in pixels; top, left of the window in pixels of the scaled picture that it was
    cut from; flip 0 or 1. Raises ValueError for an unknown kind, sizes that do not fit, and images that are not uint8.
    """
    _check(image, size, kind, high)
    mirrored = image[:, ::-1] if flip else image
    window = high if kind == "crop_then_resize" else size
    scaled = _shorter_side_to(mirrored, high or size)
    room = np.array(scaled.shape[:2]) - window
    top, left = (int(n) for n in (room // 2 if kind == "centre" else generator.integers(0, room + 1)))
    cut = scaled[top : top + window, left : left + window]
    height, width = image.shape[:2]
    metadata = {"height": height, "width": width, "top": top, "left": left, "flip": flip}
    return pictures.resize(cut, size, size), {name: float(value) for name, value in metadata.items()}


def _shorter_side_to(image: np.ndarray, side: int) -> np.ndarray:
    height, width = image.shape[:2]
    shorter = min(height, width)
    return pictures.resize(image, round(height * side / shorter), round(width * side / shorter))


def _check(image: np.ndarray, size: int, kind: str, high: int) -> None:
    needs_high = names.lookup(KINDS, kind, "crop")
    if image.dtype != np.uint8 or image.ndim != 3 or 0 in image.shape:
        raise ValueError(f"found an image {image.dtype} {image.shape}, expected uint8 (height, width, channels)")
    if size < 1 or (needs_high and high < size) or (high and not needs_high):
        expected = f"high of at least {size}" if needs_high else "no high"
        raise ValueError(f"found size={size} and high={high} for crop {kind!r}, expected size above 0 and {expected}")
