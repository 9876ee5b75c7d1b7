"""Texts: prompts without pictures, and captions of labelled ones.

    source = Captioned(Mirrored(cifar10), of_classes("cifar10"), MIRRORED)
    source[13]["caption"]                                   # "a photo of a frog, mirrored"
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

OWN = "own"  # in place of a file: the texts that pictures bring
MIRRORED = ", mirrored"  # behind the text of a picture with flip = 1

# name -> (text around the name of a class, names of class 0, 1, ...), in place of a file too
CLASSES = {
    "digits": (
        "a handwritten {}", ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    ),
    "cifar10": (
        "a photo of {}",
        ("an airplane", "an automobile", "a bird", "a cat", "a deer", "a dog", "a frog", "a horse", "a ship", "a truck"),
    ),
}  # fmt: skip


class Prompts:
    """Items {"caption"} without pictures; `held_out` are texts that are not among them."""

    def __init__(self, lines: Sequence[str], held_out: Sequence[str] = ()):
        self._lines, self.held_out = np.array(lines), list(held_out)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"caption": self._lines[index]}


class Captioned:
    """A source of labelled pictures with the text of each label in its place, {"image", "caption"}; behind that of
    pictures whose metadata say flip = 1, the text `mirrored`."""

    def __init__(self, source: Any, lines: Sequence[str], mirrored: str = ""):
        self._source = source
        self._lines = np.array([[line, line + mirrored] for line in lines])

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self._item(self._source[index])

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, np.ndarray]]:
        return [self._item(item) for item in _read(self._source, indices)]

    def _item(self, item: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        rest = {name: value for name, value in item.items() if name != "label"}
        return {"caption": self._lines[item["label"], int(item.get("flip", 0))], **rest}


class Mirrored:
    """Each item of a source, and behind it its mirror image, with "flip" 0 and 1: twice as many."""

    def __init__(self, source: Any):
        self._source = source

    def __len__(self) -> int:
        return 2 * len(self._source)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self._item(self._source[index // 2], index % 2)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, np.ndarray]]:
        items = _read(self._source, [index // 2 for index in indices])
        return [self._item(item, index % 2) for item, index in zip(items, indices, strict=True)]

    def _item(self, item: Mapping[str, np.ndarray], flip: int) -> dict[str, np.ndarray]:
        if item.get("flip"):
            raise ValueError("data.mirrored mirrors pictures that are mirrored already: leave it out")
        return {**item, "image": item["image"][:, ::-1] if flip else item["image"], "flip": np.float32(flip)}


def _read(source: Any, indices: Sequence[int]) -> list[dict[str, np.ndarray]]:
    """Several items, at once where the source can."""
    return source.__getitems__(indices) if hasattr(source, "__getitems__") else [source[index] for index in indices]


def prompts(shape: Any, path: str, held_out: int = 0) -> Prompts:
    """The lines of a file that are not empty, without the last `held_out`. `shape` is that of the latents, not looked at."""
    del shape
    found = lines(path)
    if not 0 <= held_out < len(found):
        raise ValueError(f"{path} has {len(found)} texts and data.held_out={held_out}: leave some to train on")
    return Prompts(found[: len(found) - held_out], found[len(found) - held_out :])


def of_classes(name: str) -> list[str]:
    """The text of each class of CLASSES[name]."""
    around, names = CLASSES[name]
    return [around.format(what) for what in names]


def lines(path: str) -> list[str]:
    """Those that are not empty. Raises FileNotFoundError for an absent file, ValueError for one without texts."""
    if not path or not Path(path).is_file():
        raise FileNotFoundError(f"{path!r} is absent: give a file with a text a line")
    found = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not found:
        raise ValueError(f"{path} holds no text: give a file with a text a line")
    return found
