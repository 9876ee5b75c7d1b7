"""Views of scikit-learn's digits that carry control metadata: seen at several sizes, cropped and mirrored.

Each digit, 8x8, is made `height` = 4, 6 or 8 pixels high, set on a canvas a quarter wider, mirrored or not, scaled until
its height is the image's, and cut at a place of its own (`crops`): small originals are blurred, as small photographs are
that were scaled up. What was done is drawn from the number of the view alone.
"""

from typing import Any

import numpy as np

from diffjax.data import crops, pictures

HEIGHTS = (4, 6, 8)
_WIDER = 5 / 4  # of the canvas, over its height


def original() -> Any:
    """scikit-learn's: `images` (1797, 8, 8) of 0..16, `target` (1797,). Raises ImportError where it is not installed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn; type: pip install 'diffjax[demo]'") from error
    return load_digits()


def views(digits: np.ndarray, size: int, count: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """`count` views of each of uint8 `digits` (n, 8, 8): (n count, size, size, 1), and (n count,) of each metadata."""
    images, told = [], []
    for index in range(len(digits) * count):
        generator = np.random.default_rng([index, count])
        height, flip = int(generator.choice(HEIGHTS)), bool(generator.integers(2))
        small = pictures.resize(digits[index // count, :, :, None], height, height)
        right = round(height * _WIDER) - height
        canvas = np.pad(small, [(0, 0), (right // 2, right - right // 2), (0, 0)], mode="edge")
        image, metadata = crops.crop(canvas, size, "random", generator, flip)
        images.append(image)
        told.append(metadata | {"aspect": metadata["width"] / metadata["height"]})
    columns = {name: np.array([item[name] for item in told], np.float32) for name in told[0]}
    return np.stack(images), columns
