"""Random-access image sources: `len(source)` and `source[i] -> {"image": (H, W, C), "label": int32}`.

Images are uint8 in 0..255, or float32 in [-1, 1]. A source is checked when it is made (first image,
labels, size), so a wrong data set is reported before anything is compiled.

    source = load("image_folder", DataShape(32, 3, 10), path="photos/")

Kinds: digits, arrays (.npz), image_folder (or .zip), array_record, tfds. All but digits take a path
or a data set name, and refuse sizes other than those configured unless `resize` is set.
"""

import dataclasses
import difflib
import io
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import PIL.Image

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


class Source(Protocol):
    """Images by index; the same index always gives the same image."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...


@dataclasses.dataclass(frozen=True)
class DataShape:
    """What the network expects: square images of `image_size` pixels, `channels`, and `num_classes` (0 = no labels)."""

    image_size: int
    channels: int
    num_classes: int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.image_size, self.image_size, self.channels


def load(name: str, shape: DataShape, **options: Any) -> Source:
    """The checked source `name`. Raises ValueError (unknown name, wrong size, dtype or label), FileNotFoundError."""
    if name not in SOURCES:
        close = difflib.get_close_matches(str(name), SOURCES, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"data.name: unknown data set {name!r}, expected one of {sorted(SOURCES)}{hint}")
    source = SOURCES[name](shape, **options)
    if len(source) == 0:
        raise ValueError(f"data set {name!r} with {options} holds no image")
    _check(source[0], shape, f"the first image of {name!r}")
    return source


# Kinds of sources ----------------------------------------------------------------------------------------------


class Arrays:
    """Images (N, H, W, C) uint8 or float32 in [-1, 1], labels (N,) of integers or None."""

    def __init__(self, images: np.ndarray, labels: np.ndarray | None, shape: DataShape):
        if images.ndim != 4 or (labels is not None and len(labels) != len(images)):
            found = None if labels is None else labels.shape
            raise ValueError(f"expected images (N, H, W, C) and labels (N,), found {images.shape} and {found}")
        if shape.num_classes and labels is None:
            raise ValueError("data.num_classes is set and the data has no labels: add them or set num_classes = 0")
        if shape.num_classes and not (labels.min() >= 0 and labels.max() < shape.num_classes):
            raise ValueError(f"labels must be 0..{shape.num_classes - 1}, found {labels.min()}..{labels.max()}")
        self.images = images
        self.labels = None if labels is None or not shape.num_classes else labels.astype(np.int32)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        label = {} if self.labels is None else {"label": self.labels[index]}
        return {"image": self.images[index], **label}


class Records:
    """Anything indexable that gives records, decoded and checked one by one."""

    def __init__(self, records: Sequence, decode: Callable[[Any, int], dict[str, np.ndarray]], shape: DataShape):
        self.records, self.decode, self.shape = records, decode, shape

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        item = self.decode(self.records[index], index)
        if not self.shape.num_classes:
            item.pop("label", None)
        _check(item, self.shape, f"image {index}")
        return item


def _digits(shape: DataShape) -> Source:
    """scikit-learn's 1,797 digits, 8x8, 10 classes, float32."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn; type: pip install 'diffjax[demo]'") from error
    digits = load_digits()
    # 17 grey levels, 0..16
    return Arrays((digits.images / 8 - 1).astype(np.float32)[..., None], digits.target, shape)


def _arrays(shape: DataShape, path: str) -> Source:
    """An .npz file with `image` (N, H, W, C) and optionally `label` (N,)."""
    with np.load(_existing(path), allow_pickle=False) as file:
        names = set(file.files)
        if "image" not in names:
            raise ValueError(f"{path} must hold an array 'image' (N, H, W, C), found {sorted(names)}")
        return Arrays(file["image"], file["label"] if "label" in names else None, shape)


def _image_folder(shape: DataShape, path: str, resize: bool = False) -> Source:
    """Pictures of a folder or .zip; the class is the sub-folder (sorted), or the entry of dataset.json."""
    root = _existing(path)
    archive = zipfile.ZipFile(root) if root.is_file() else None
    names = archive.namelist() if archive else [str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()]
    pictures = sorted(name for name in names if name.lower().endswith(_SUFFIXES))
    if not pictures:
        raise ValueError(f"no picture in {path}: expected files that end in {', '.join(_SUFFIXES)}")
    read = (lambda name: archive.read(name)) if archive else (lambda name: (root / name).read_bytes())
    labels = _folder_labels(pictures, json.loads(read("dataset.json")) if "dataset.json" in names else None, shape)

    def decode(name: str, index: int) -> dict[str, np.ndarray]:
        image = _decode_picture(read(name), shape, resize, f"{path}/{name}")
        return {"image": image, **({} if labels is None else {"label": labels[index]})}

    return Records(pictures, decode, shape)


def _folder_labels(pictures: list[str], table: dict | None, shape: DataShape) -> np.ndarray | None:
    if not shape.num_classes:
        return None
    if table is not None and table.get("labels"):
        by_name = dict(table["labels"])
        missing = [name for name in pictures if name not in by_name]
        if missing:
            raise ValueError(f"dataset.json has no label for {missing[0]!r} and {len(missing) - 1} other pictures")
        labels = np.array([by_name[name] for name in pictures], np.int32)
    else:
        folders = sorted({str(Path(name).parent) for name in pictures})
        labels = np.array([folders.index(str(Path(name).parent)) for name in pictures], np.int32)
    if labels.max() >= shape.num_classes or labels.min() < 0:
        raise ValueError(f"found labels up to {labels.max()}, expected 0..{shape.num_classes - 1}: set data.num_classes")
    return labels


def _array_record(shape: DataShape, path: str, resize: bool = False) -> Source:
    """ArrayRecord files (a file, or a folder of *.array_record*) of records made by `write_array_record`."""
    from array_record.python import array_record_data_source

    root = _existing(path)
    files = [root] if root.is_file() else sorted(root.glob("*.array_record*"))
    if not files:
        raise ValueError(f"no *.array_record* file in {path}")
    records = array_record_data_source.ArrayRecordDataSource([str(file) for file in files])

    def decode(record: bytes, index: int) -> dict[str, np.ndarray]:
        with np.load(io.BytesIO(record), allow_pickle=False) as file:
            return {"image": file["image"], **({"label": np.int32(file["label"])} if "label" in file.files else {})}

    return Records(records, decode, shape)


def _tfds(shape: DataShape, dataset: str, split: str = "train", data_dir: str = "", download: bool = False) -> Source:
    """A tensorflow-datasets data set with features image and label, read without TensorFlow."""
    import tensorflow_datasets as tfds

    try:
        records = tfds.data_source(dataset, split=split, data_dir=data_dir or None, download=download)
    except (tfds.core.registered.DatasetNotFoundError, FileNotFoundError, AssertionError, ValueError) as error:
        raise FileNotFoundError(
            f"tensorflow-datasets found no prepared {dataset!r} (split {split!r}) in {data_dir or 'its default folder'}: "
            "set data.data_dir, or data.download = True to prepare it as ArrayRecord"
        ) from error
    return Records(records, lambda r, _: {"image": r["image"], "label": np.int32(r.get("label", 0))}, shape)


SOURCES: dict[str, Callable[..., Source]] = {
    "digits": _digits, "arrays": _arrays, "image_folder": _image_folder, "array_record": _array_record, "tfds": _tfds,
}  # fmt: skip


def write_array_record(path: str | Path, items: Sequence[dict[str, np.ndarray]]) -> int:
    """Write {"image", "label"} items as one ArrayRecord file (each record an .npz); returns how many.

    Raises FileExistsError rather than overwrite.
    """
    from array_record.python import array_record_module

    if Path(path).exists():
        raise FileExistsError(f"{path} exists: choose another name or remove it")
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    count = 0
    for item in items:
        buffer = io.BytesIO()
        np.savez(buffer, **item)
        writer.write(buffer.getvalue())
        count += 1
    writer.close()
    return count


# Checks ----------------------------------------------------------------------------------------------------------


def _existing(path: str) -> Path:
    if not path or not Path(path).exists():
        raise FileNotFoundError(f"data.path: {path!r} does not exist")
    return Path(path)


def _decode_picture(data: bytes, shape: DataShape, resize: bool, name: str) -> np.ndarray:
    try:
        picture = PIL.Image.open(io.BytesIO(data))
        picture = picture.convert("L" if shape.channels == 1 else "RGB")
    except (PIL.UnidentifiedImageError, OSError) as error:
        raise ValueError(f"unreadable picture {name}: {error}") from error
    if resize:
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        picture = picture.crop((left, top, left + side, top + side))
        picture = picture.resize((shape.image_size, shape.image_size), PIL.Image.Resampling.LANCZOS)
    image = np.asarray(picture)
    return image[..., None] if image.ndim == 2 else image


def _check(item: dict[str, np.ndarray], shape: DataShape, what: str) -> None:
    image = item["image"]
    if image.shape != shape.shape:
        raise ValueError(
            f"{what} has shape {image.shape}, expected {shape.shape}: set data.image_size and data.channels, or "
            "data.resize = True (image_folder) to crop and scale"
        )
    if image.dtype not in (np.uint8, np.float32):
        raise ValueError(f"{what} is {image.dtype}, expected uint8 (0..255) or float32 (-1..1)")
    if image.dtype == np.float32 and not (np.all(np.abs(image) <= 1)):
        raise ValueError(f"{what} spans {image.min():g}..{image.max():g}, expected float32 images in -1..1")
    if shape.num_classes and "label" not in item:
        raise ValueError(f"{what} has no label and data.num_classes is {shape.num_classes}: set num_classes = 0")
    if shape.num_classes and not 0 <= item["label"] < shape.num_classes:
        raise ValueError(f"{what} has label {item['label']}, expected 0..{shape.num_classes - 1}")
