"""Drawn pictures of two coloured things, one left of the other, with a caption that says so; of many sizes.

    source = Shapes(num=1000)
    source[0]["image"].shape, source[0]["label"]       # (92, 95, 3), 8: one of 12, a blue triangle
    Shapes(1000, captions=True)[0]["caption"]          # "a blue triangle left of a blue square"

They have what a collection of photographs has (sizes, crops that lose something, classes, texts), and a picture that
is mirrored makes its caption wrong: what a network does without being told of flips can be seen. Item i depends on i
alone.
"""

import numpy as np

COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (235, 205, 50)}
THINGS = ("square", "circle", "triangle")
NUM_CLASSES = len(COLOURS) * len(THINGS)  # of the thing on the left
_SIDES = 48, 128  # pixels, both included


class Shapes:
    """`num` pictures uint8 (H, W, 3), H and W in 48..128, with int32 "label" of the left thing, colour before form, or,
    with `captions`, "caption" in its place. Raises ValueError for a `num` that is not positive."""

    def __init__(self, num: int, captions: bool = False):
        if num < 1:
            raise ValueError(f"data.num: found {num}, expected the number of pictures, 1 or more")
        self._num, self._captions = num, captions

    def __len__(self) -> int:
        return self._num

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < self._num:
            raise IndexError(f"picture {index} of {self._num}")
        # RandomState: numpy promises the same numbers in every version
        random = np.random.RandomState(int(index))
        height, width = random.randint(_SIDES[0], _SIDES[1] + 1, 2)
        grey = random.randint(0, 256)
        image = np.full((height, width, 3), grey, np.uint8)
        left, right = random.choice(NUM_CLASSES, 2, replace=False)
        for place, kind in ((0.25, left), (0.75, right)):
            colour, thing = _colour_and_thing(kind)
            radius = min(0.22 * width, 0.45 * height) * random.uniform(0.6, 1)
            y = random.uniform(radius, height - radius)
            image[_inside(thing, height, width, y, place * width, radius)] = COLOURS[colour]
        if not self._captions:
            return {"image": image, "label": np.int32(left)}
        return {"image": image, "caption": np.array(_caption(left, right, random.randint(2) == 1))}


def _colour_and_thing(kind: int) -> tuple[str, str]:
    return list(COLOURS)[kind // len(THINGS)], THINGS[kind % len(THINGS)]


def _caption(left: int, right: int, from_the_right: bool) -> str:
    """'a red square left of a blue circle', or the same from its other end."""
    one, other = (f"a {' '.join(_colour_and_thing(kind))}" for kind in (left, right))
    return f"{other} right of {one}" if from_the_right else f"{one} left of {other}"


def _inside(thing: str, height: int, width: int, y: float, x: float, radius: float) -> np.ndarray:
    """bool (H, W): the pixels whose centres are within a thing of `radius` around (y, x)."""
    down = (np.arange(height) + 0.5 - y)[:, None] / radius
    right = (np.arange(width) + 0.5 - x)[None, :] / radius
    if thing == "circle":
        return down**2 + right**2 <= 1
    if thing == "square":
        return (np.abs(down) <= 0.85) & (np.abs(right) <= 0.85)
    return (np.abs(right) <= (down + 1) / 2) & (down <= 1)  # a triangle, its tip on top
