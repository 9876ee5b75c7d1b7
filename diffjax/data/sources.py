"""Random-access image sources: `len(source)` and `source[i] -> {"image": (H, W, C), "label": int32}`.

Images are uint8 in 0..255, or float32 in [-1, 1]; `label` is there exactly where `num_classes` is not 0. A
source is checked when it is made (sizes, labels, a selection of images decoded), so that a wrong data set
is reported before anything is compiled; every image is checked again when it is read.

    source = load("digits", DataShape(image_size=8, channels=1, num_classes=10))
    source[0]["image"].shape, source[0]["label"]      # (8, 8, 1), 0

Kinds, and what they take besides the shape:
    digits         scikit-learn's 1,797 handwritten digits, 8x8, 10 classes
    arrays         path: .npz with image(s) (N, H, W, C), label(s) (N,)
    prompts        path: a file of texts, one a line, without images; held_out: how many of the last are left out
    image_folder   path: folder or .zip, see `pictures`
    array_record   path: file, or folder of *.array_record*, made by `write_array_record`
    tfds           dataset, split, data_dir, download: tensorflow-datasets, without TensorFlow
All of images but digits take resize=True: crop the centre and scale. Otherwise other sizes are errors.
"""

import dataclasses
import difflib
import inspect
import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import PIL.Image

from diffjax.data import pictures, texts

Item = dict[str, np.ndarray]
_EARLY_READS = 256  # images decoded when a source is made, evenly spaced
_LABEL = struct.Struct("<i")
_NPY = b"\x93NUMPY"


class Source(Protocol):
    """Images by index; the same index always gives the same image."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item: ...


@dataclasses.dataclass(frozen=True)
class DataShape:
    """What the network expects: square images of `image_size` pixels, `channels`, and `num_classes` (0 = no labels).
    scale: what pixels in [-1, 1] are multiplied with before noise is added, and samples divided by (Li 2025, section 5.6).
    """

    image_size: int
    channels: int
    num_classes: int = 0
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.image_size, self.image_size, self.channels


def load(name: str, shape: DataShape, **options: Any) -> Source:
    """The checked source `name`. Raises ValueError (unknown name or option, wrong size, dtype, range or label; empty
    or unreadable data), FileNotFoundError (missing path or data set), ImportError (a package that is not installed).
    """
    if name not in SOURCES:
        raise ValueError(
            f"data.name: unknown data set {name!r}, expected one of {sorted(SOURCES)}{_nearest(name, SOURCES)}; "
            f"data sets of tensorflow-datasets are data.name = 'tfds', data.dataset = {name!r}"
        )
    allowed = list(inspect.signature(SOURCES[name]).parameters)[1:]
    for key in options:
        if key not in allowed:
            raise ValueError(f"data.{key}: unknown for {name!r}, expected some of {allowed}{_nearest(key, allowed)}")
    source = SOURCES[name](shape, **options)
    if len(source) == 0:
        raise ValueError(f"data set {name!r} with {options} holds no image")
    for index in np.unique(np.linspace(0, len(source) - 1, min(len(source), _EARLY_READS)).astype(int)):
        source[int(index)]
    return source


def read(source: Source, indices: Sequence[int]) -> Item:
    """Those images as one batch {"image": (B, H, W, C), "label": int32 (B,)}."""
    items = source.__getitems__(indices) if hasattr(source, "__getitems__") else [source[i] for i in indices]
    return {key: np.stack([item[key] for item in items]) for key in items[0]}


# Kinds of sources ----------------------------------------------------------------------------------------------


class Arrays:
    """Images (N, H, W, C) uint8 or float32 in [-1, 1], labels (N,) of integers or None; all checked at once."""

    def __init__(self, images: np.ndarray, labels: np.ndarray | None, shape: DataShape):
        if images.ndim != 4 or (labels is not None and np.shape(labels) != (len(images),)):
            found = None if labels is None else np.shape(labels)
            raise ValueError(f"expected images (N, H, W, C) and labels (N,), found {images.shape} and {found}")
        if len(images):
            _check_image(images, (len(images), *shape.shape), "the array of images")
        if shape.num_classes and labels is None:
            raise ValueError("data.num_classes is set and the data has no labels: add them or set num_classes = 0")
        if shape.num_classes and len(images):
            _check_labels(np.asarray(labels), shape.num_classes, "the array of labels")
        self._images = images
        self._labels = np.asarray(labels).astype(np.int32) if shape.num_classes else None

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Item:
        label = {} if self._labels is None else {"label": self._labels[index]}
        return {"image": self._images[index], **label}


class Records:
    """Anything indexable that gives records; each is decoded, resized if asked, and checked when read.

    decode(record, name) -> {"image", "label"}; `what` and the index name an item in messages.
    """

    def __init__(
        self, records: Sequence, decode: Callable[[Any, str], Item], shape: DataShape, resize: bool, what: str
    ):
        self._records, self._decode, self._shape, self._resize, self._what = records, decode, shape, resize, what

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Item:
        return self._item(self._records[index], index)

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        """Several at once: reading ArrayRecord one by one takes three times as long."""
        many = getattr(self._records, "__getitems__", None)
        records = many([int(i) for i in indices]) if many else [self._records[int(i)] for i in indices]
        return [self._item(record, index) for record, index in zip(records, indices, strict=True)]

    def _item(self, record: Any, index: int) -> Item:
        name = self._records.name(index) if hasattr(self._records, "name") else f"image {index} of {self._what}"
        item = self._decode(record, name)
        image = item["image"]
        if self._resize and image.ndim == 3:
            _check_image(image, (*image.shape[:2], self._shape.channels), name)
            image = pictures.crop_and_resize(image, self._shape.image_size)
        _check_image(image, self._shape.shape, name)
        if not self._shape.num_classes:
            return {"image": image}
        if "label" not in item:
            raise ValueError(f"{name} has no label: add labels or set data.num_classes = 0")
        label = np.asarray(item["label"])
        _check_labels(label, self._shape.num_classes, name)
        return {"image": image, "label": label.astype(np.int32)}


def _digits(shape: DataShape) -> Source:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn; type: pip install 'diffjax[demo]'") from error
    digits = load_digits()
    # 17 grey levels, 0..16
    return Arrays((digits.images / 8 - 1).astype(np.float32)[..., None], digits.target, shape)


def _arrays(shape: DataShape, path: str, resize: bool = False) -> Source:
    file_path = _existing(path)
    if not zipfile.is_zipfile(file_path):  # numpy would take it for a pickle
        raise ValueError(f"{path} is no readable .npz file (not a complete .zip): make it with numpy.savez")
    try:
        with np.load(file_path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is no readable .npz file ({error}): make it with numpy.savez") from error
    images = arrays.get("images", arrays.get("image"))
    labels = arrays.get("labels", arrays.get("label"))
    if images is None:
        raise ValueError(f"{path} must hold an array 'images' (N, H, W, C), found {sorted(arrays)}")
    if resize and images.ndim == 4 and len(images):
        _check_image(images, (*images.shape[:3], shape.channels), path)
        images = np.stack([pictures.crop_and_resize(image, shape.image_size) for image in images])
    return Arrays(images, labels, shape)


def _image_folder(shape: DataShape, path: str, resize: bool = False) -> Source:
    size = 0 if resize else shape.image_size
    files = pictures.PictureFiles(_existing(path), shape.channels, shape.num_classes, size)
    return Records(files, _as_is, shape, resize, path)


def _array_record(shape: DataShape, path: str, resize: bool = False) -> Source:
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    root = _existing(path)
    files = [root] if root.is_file() else sorted(root.glob("*.array_record*"))
    for file in files:
        try:
            len(ArrayRecordDataSource([str(file)]))
        except RuntimeError as error:
            raise ValueError(f"{file} is no complete ArrayRecord file ({error}): write it again") from error
    if not files:
        raise ValueError(f"no *.array_record* file in {path}")
    return Records(ArrayRecordDataSource([str(f) for f in files]), _decode_record, shape, resize, path)


def _tfds(
    shape: DataShape,
    dataset: str,
    split: str = "train",
    data_dir: str = "",
    download: bool = False,
    resize: bool = False,
) -> Source:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(f"{dataset!r} needs tensorflow-datasets; type: pip install tensorflow-datasets") from error
    where = data_dir or "the default folder of tensorflow-datasets"
    try:
        builder = tfds.builder(dataset, data_dir=data_dir or None)
    except tfds.core.registered.DatasetNotFoundError as error:
        near = _nearest(dataset, tfds.list_builders(with_community_datasets=False))
        raise ValueError(f"data.dataset: tensorflow-datasets has no {dataset!r}{near}") from error
    if not builder.is_prepared() and not download:
        raise FileNotFoundError(
            f"{dataset!r} is not prepared in {where}: set data.data_dir to the folder that holds it, or "
            "data.download = True to fetch it"
        )
    if builder.is_prepared():
        _check_features(builder, shape, split, f"{dataset!r} in {where}")
    records = tfds.data_source(dataset, split=split, data_dir=data_dir or None, download=download)
    return Records(records, _image_and_label, shape, resize, f"{dataset!r}, split {split!r}")


def _check_features(builder: Any, shape: DataShape, split: str, what: str) -> None:
    features, file_format = builder.info.features, str(builder.info.file_format.value)
    if file_format not in ("array_record", "parquet"):
        raise ValueError(
            f"{what} is stored as {file_format}, which has no random access: prepare it again with "
            "builder.download_and_prepare(file_format='array_record')"
        )
    missing = [name for name in ("image", "label") if name not in features and (name == "image" or shape.num_classes)]
    if missing:
        raise ValueError(f"{what} has no feature {missing}, found {sorted(features)}")
    classes = getattr(features["label"], "num_classes", None) if "label" in features else None
    if shape.num_classes and classes is not None and classes != shape.num_classes:
        raise ValueError(f"{what} has {classes} classes, found data.num_classes = {shape.num_classes}: set {classes}")
    base = split.partition("[")[0]
    if "+" not in split and base != "all" and base not in builder.info.splits:
        found = list(builder.info.splits)
        raise ValueError(f"data.split: {what} has no split {split!r}, expected one of {found}{_nearest(base, found)}")


SOURCES: dict[str, Callable[..., Source]] = {
    "digits": _digits,
    "arrays": _arrays,
    "prompts": texts.prompts,
    "image_folder": _image_folder,
    "array_record": _array_record,
    "tfds": _tfds,
}


# Records ---------------------------------------------------------------------------------------------------------


def write_array_record(path: str | Path, items: Iterable[Mapping[str, Any]]) -> int:
    """Write {"image", "label"} items as one ArrayRecord file; returns how many.

    A record is the label (int32, little-endian; -1 where there is none), then the image as a file: PNG for
    uint8 with 1 or 3 channels, .npy otherwise (float32 in [-1, 1]). Raises FileExistsError rather than
    overwrite, and ValueError for an image that is neither or no item at all; the file is then not there.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists: choose another name or remove it")
    unfinished = path.with_name(path.stem + ".unfinished")  # a name that `load` does not look for
    writer, count = ArrayRecordWriter(str(unfinished), "group_size:1"), 0  # groups of 1: random access
    try:
        for item in items:
            writer.write(_encode_record(item, f"item {count}"))
            count += 1
        if not count:
            raise ValueError(f"no image to write to {path}")
    except BaseException:
        writer.close()
        unfinished.unlink(missing_ok=True)
        raise
    writer.close()
    unfinished.rename(path)
    return count


def _encode_record(item: Mapping[str, Any], name: str) -> bytes:
    image = np.asarray(item["image"])
    if image.ndim != 3:
        raise ValueError(f"{name} has shape {image.shape}, expected (H, W, C)")
    _check_image(image, image.shape, name)
    buffer = io.BytesIO()
    if image.dtype == np.uint8 and image.shape[2] in (1, 3):
        PIL.Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(buffer, "PNG")
    else:
        np.save(buffer, image)
    return _LABEL.pack(int(item.get("label", -1))) + buffer.getvalue()


def _decode_record(record: bytes, name: str) -> Item:
    data = record[_LABEL.size :]
    try:
        if data.startswith(_NPY):
            image = np.load(io.BytesIO(data), allow_pickle=False)
        else:
            with PIL.Image.open(io.BytesIO(data)) as picture:
                channels = 1 if picture.mode == "L" else 3
            image = pictures.decode(data, channels, name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} is no record of write_array_record ({error}); for files of tensorflow-datasets: data.name = 'tfds'"
        ) from error
    (label,) = _LABEL.unpack(record[: _LABEL.size])
    return {"image": image} if label == -1 else {"image": image, "label": label}


def _as_is(item: Item, name: str) -> Item:
    return item


def _image_and_label(item: Mapping[str, Any], name: str) -> Item:
    return {key: item[key] for key in ("image", "label") if key in item}


# Checks ----------------------------------------------------------------------------------------------------------


def _existing(path: str) -> Path:
    if not path or not Path(path).exists():
        raise FileNotFoundError(f"data.path: {path!r} does not exist: give the path of your data")
    return Path(path)


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(names), 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _check_image(image: np.ndarray, shape: tuple[int, ...], what: str) -> None:
    if image.shape[:-1] != shape[:-1]:
        raise ValueError(
            f"{what} has shape {image.shape}, expected {shape}: set data.image_size, or data.resize = True to crop "
            "the centre and scale"
        )
    if image.shape != shape:
        raise ValueError(f"{what} has {image.shape[-1]} channels, expected {shape[-1]}: set data.channels")
    if image.dtype not in (np.uint8, np.float32):
        raise ValueError(f"{what} is {image.dtype}, expected uint8 (0..255) or float32 (-1..1): convert it")
    # a NaN fails the comparison too
    if image.dtype == np.float32 and not (image.min() >= -1 and image.max() <= 1):
        raise ValueError(f"{what} spans {image.min():g}..{image.max():g}, expected float32 in -1..1: rescale it")


def _check_labels(labels: np.ndarray, num_classes: int, what: str) -> None:
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{what} holds {labels.dtype} labels, expected integers 0..{num_classes - 1}")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"{what} has labels {labels.min()}..{labels.max()}, expected 0..{num_classes - 1}: set data.num_classes"
        )
