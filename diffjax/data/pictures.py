"""Picture files: decode them, and index a folder or .zip of them.

The class of a picture is the entry of `dataset.json` beside it (the format of EDM's data sets:
`{"labels": [["00000/img00000000.png", 6], ...]}`), else its sub-folder, classes numbered in sorted order.
"""

import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL.Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_TABLE = "dataset.json"
_HEADERS_AT_START = 50_000  # a few seconds; of larger folders an even selection is looked at
_GREY = ("1", "L")
_COLOUR = ("RGB", "P", "CMYK", "YCbCr")


def decode(data: bytes, channels: int, name: str) -> np.ndarray:
    """uint8 (H, W, channels) of a picture file; grey becomes RGB where `channels` is 3.

    Raises ValueError naming `name` for a file that cannot be read to its end, and for pixels that would lose
    something: colour where one channel is expected, transparency, 16 bits.
    """
    try:
        with PIL.Image.open(io.BytesIO(data)) as picture:
            check_mode(picture, channels, name)
            pixels = np.asarray(picture.convert("L" if channels == 1 else "RGB"))
    except (OSError, SyntaxError, PIL.Image.DecompressionBombError) as error:  # PIL: SyntaxError for damaged PNG
        raise ValueError(f"unreadable picture {name} ({error}): replace or remove it") from error
    return pixels.reshape(*pixels.shape[:2], channels)


def check_mode(picture: PIL.Image.Image, channels: int, name: str) -> None:
    """Raises ValueError where `picture` does not convert to `channels` without loss, see `decode`."""
    if channels not in (1, 3):
        raise ValueError(f"pictures have 1 or 3 channels, found data.channels = {channels}: use data.name = 'arrays'")
    if "transparency" in picture.info or picture.mode not in _GREY + _COLOUR:
        raise ValueError(
            f"picture {name} has mode {picture.mode}, expected 8-bit grey or RGB without transparency: convert it"
        )
    if channels == 1 and picture.mode not in _GREY:
        raise ValueError(
            f"picture {name} has colours (mode {picture.mode}), expected grey: set data.channels = 3 or convert it"
        )


def crop_and_resize(image: np.ndarray, size: int) -> np.ndarray:
    """The central square of `image` (H, W, C), uint8 or float32 in [-1, 1], scaled to (size, size, C) by Lanczos."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return resize(image[top : top + side, left : left + side], size, size)


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """`image` (H, W, C), uint8 or float32 in [-1, 1], scaled to (height, width, C) by Lanczos, its dtype kept."""
    if image.shape[:2] == (height, width):
        return image
    planes = [PIL.Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(image, 2, 0)]
    scaled = np.stack([plane.resize((width, height), PIL.Image.Resampling.LANCZOS) for plane in planes], axis=2)
    # the filter overshoots at edges; 8-bit planes are clipped by Pillow itself
    return scaled if scaled.dtype == np.uint8 else np.clip(scaled, -1, 1)


class PictureFiles:
    """The pictures of a folder or .zip, sorted by name, as {"image", "label"} items before any resizing.

    root: folder or .zip. channels: 1 or 3. num_classes: 0 leaves labels out. image_size: the size every
    picture must have; 0 for any. Raises ValueError, naming the file, for no picture, a damaged .zip or
    dataset.json, a picture that cannot be opened or has another size or mode, and labels that do not fit.
    """

    def __init__(self, root: Path, channels: int, num_classes: int = 0, image_size: int = 0):
        self._root, self._channels = root, channels
        self._archive = _open_archive(root)
        everything = self._all_names()
        self._names = sorted(name for name in everything if name.lower().endswith(SUFFIXES))
        if not self._names:
            raise ValueError(f"no picture in {root}: expected files that end in {', '.join(SUFFIXES)}")
        self._labels = None
        if num_classes:
            table = self._read_table() if _TABLE in everything else None
            self._labels = _labels(self._names, table, num_classes, root)
        step = -(-len(self._names) // _HEADERS_AT_START)
        for name in self._names[::step]:
            self._check_header(name, image_size)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = self._names[index]
        try:
            with self._open(name) as file:
                data = file.read()
        except (OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"unreadable picture {self.name(index)} ({error}): replace or remove it") from error
        item = {"image": decode(data, self._channels, self.name(index))}
        return item if self._labels is None else {**item, "label": self._labels[index]}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_archive": None}  # worker processes open the .zip themselves

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._archive = _open_archive(self._root)

    def name(self, index: int) -> str:
        """Path of picture `index`, for messages."""
        return f"{self._root}/{self._names[index]}"

    def _all_names(self) -> set[str]:
        if self._archive:
            names = {info.filename for info in self._archive.infolist() if not info.is_dir()}
        else:
            names = {path.relative_to(self._root).as_posix() for path in self._root.rglob("*") if path.is_file()}
        # resource forks and thumbnails that desktops leave behind
        return {name for name in names if not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))}

    def _open(self, name: str) -> BinaryIO:
        return self._archive.open(name) if self._archive else (self._root / name).open("rb")

    def _read_table(self) -> Any:
        with self._open(_TABLE) as file:
            try:
                return json.loads(file.read())
            except ValueError as error:
                raise ValueError(f"{self._root}/{_TABLE} is not JSON ({error}): write it again") from error

    def _check_header(self, name: str, image_size: int) -> None:
        path = f"{self._root}/{name}"
        try:
            with self._open(name) as file, PIL.Image.open(file) as picture:
                check_mode(picture, self._channels, path)
                size = picture.size
        except (OSError, SyntaxError, zipfile.BadZipFile, PIL.Image.DecompressionBombError) as error:
            raise ValueError(f"unreadable picture {path} ({error}): replace or remove it") from error
        if image_size and size != (image_size, image_size):
            raise ValueError(
                f"picture {path} is {size[0]}x{size[1]}, expected {image_size}x{image_size}: "
                "set data.image_size, or data.resize = True to crop the centre and scale"
            )


def _open_archive(root: Path) -> zipfile.ZipFile | None:
    if root.is_dir():
        return None
    try:
        return zipfile.ZipFile(root)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{root} is neither a folder nor a complete .zip ({error})") from error


def _labels(names: Sequence[str], table: Any, num_classes: int, root: Path) -> np.ndarray:
    labels = _folder_labels(names, num_classes, root) if table is None else _table_labels(names, table, root)
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"labels of {root} are {labels.min()}..{labels.max()}, expected 0..{num_classes - 1}: set data.num_classes"
        )
    return labels


def _folder_labels(names: Sequence[str], num_classes: int, root: Path) -> np.ndarray:
    folders = [name.rpartition("/")[0] for name in names]
    classes = sorted(set(folders))
    if classes[0] == "" or len(classes) != num_classes:
        found = "pictures outside of any" if classes[0] == "" else f"{len(classes)} ({', '.join(classes[:5])}, ...)"
        raise ValueError(
            f"expected {num_classes} class folders in {root}, found {found}: set data.num_classes (0 = no classes) "
            f"or add a {_TABLE}"
        )
    numbers = {name: number for number, name in enumerate(classes)}
    return np.array([numbers[folder] for folder in folders], np.int32)


def _table_labels(names: Sequence[str], table: Any, root: Path) -> np.ndarray:
    rows = table.get("labels") if isinstance(table, dict) else None
    if not rows:
        raise ValueError(f"{root}/{_TABLE} has no labels: set data.num_classes = 0")
    by_name = dict(rows)
    missing = [name for name in names if name not in by_name]
    if missing:
        raise ValueError(f"{root}/{_TABLE} lacks the label of {len(missing)} pictures, the first is {missing[0]}")
    labels = [by_name[name] for name in names]
    wrong = [name for name, label in zip(names, labels, strict=True) if type(label) is not int]
    if wrong:
        raise ValueError(f"{root}/{_TABLE}: the label of {wrong[0]} is {by_name[wrong[0]]!r}, expected a whole number")
    return np.array(labels, np.int32)
