"""Texts: prompts without pictures, and captions of labelled ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


class Prompts:
    """Items {"caption"} without pictures; `held_out` are texts that are not among them."""

    def __init__(self, lines: Sequence[str], held_out: Sequence[str] = ()):
        self._lines, self.held_out = np.array(lines), list(held_out)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"caption": self._lines[index]}


class Captioned:
    """A source of labelled pictures with the text of each label, {"image", "caption"}."""

    def __init__(self, source: Any, lines: Sequence[str]):
        self._source, self._lines = source, np.array(lines)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        item = self._source[index]
        return {"image": item["image"], "caption": self._lines[item["label"]]}


def prompts(shape: Any, path: str, held_out: int = 0) -> Prompts:
    """The lines of a file that are not empty, without the last `held_out`. `shape` is that of the latents, not looked at."""
    del shape
    found = lines(path)
    if not 0 <= held_out < len(found):
        raise ValueError(f"{path} has {len(found)} texts and data.held_out={held_out}: leave some to train on")
    return Prompts(found[: len(found) - held_out], found[len(found) - held_out :])


def lines(path: str) -> list[str]:
    """Those that are not empty. Raises FileNotFoundError for an absent file, ValueError for one without texts."""
    if not path or not Path(path).is_file():
        raise FileNotFoundError(f"{path!r} is absent: give a file with a text a line")
    found = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not found:
        raise ValueError(f"{path} holds no text: give a file with a text a line")
    return found
