"""Random-access sources: `len(source)` and `source[i] -> {"image": (H, W, C), "label": int32}`.

Images are uint8 in 0..255, or float32 in [-1, 1]; `label` is there exactly where `num_classes` is not 0. A
source is checked when it is made (sizes, labels, a selection of images decoded), so that a wrong data set
is reported before anything is compiled; every image is checked again when it is read.

    source = load("digits", DataShape(image_size=8, channels=1, num_classes=10))
    source[0]["image"].shape, source[0]["label"]      # (8, 8, 1), 0

Kinds, and what they take besides the shape:
    digits         scikit-learn's 1,797 handwritten digits, 8x8, 10 classes; views: how many of each, with metadata, of any
                   size, see `digits`
    shapes         num: drawn pictures of two coloured things, of many sizes, see `synthetic`
    arrays         path: .npz with image(s) (N, H, W, C), label(s) (N,); for metadata without resize height (N,), ...
    prompts        path: a file of texts, one a line, without images; held_out: how many of the last are left out
    image_folder   path: folder or .zip, see `pictures`
    webdataset     path: folder of .tar, see `webdataset`
    array_record   path: file, or folder of *.array_record*, made by `write_array_record`
    tfds           dataset, split, data_dir, download: tensorflow-datasets, without TensorFlow
    latents        path: folder made by diffjax.cli.prepare; skip_corrupt: see `latents`; what images became
    moving_digits  num, seed: videos of one of the digits, see `clips`
    clips          path, every, hop: pieces of video files, see `clips`
The last two need data.num_frames, and their "image" is a video (T, H, W, C).
All of images but digits take resize=True: crop the centre and scale (otherwise other sizes are errors), and
metadata=True: beside the image float32 height, width of the original, top, left of the crop in pixels of the
scaled original, flip (0) and aspect (width / height). Those that know texts take captions=True: "caption" in
place of the label.
"""

import dataclasses
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

from diffjax.data import checks, clips, latents, pictures, synthetic, texts, tfds, webdataset
from diffjax.data import digits as digit_views

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
    """What the network expects: square images of `image_size` pixels (0 = of any size, for who crops them), `channels`,
    and `num_classes` (0 = no labels).
    scale: what pixels in [-1, 1] are multiplied with before noise is added, and samples divided by (Li 2025, section 5.6).
    num_frames: of videos; 0 = images.
    """

    image_size: int
    channels: int
    num_classes: int = 0
    scale: float = 1.0
    num_frames: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W, C), of videos (T, H, W, C)."""
        frames = (self.num_frames,) if self.num_frames else ()
        return (*frames, self.image_size, self.image_size, self.channels)


def load(name: str, shape: DataShape, **options: Any) -> Source:
    """The checked source `name`. Raises ValueError (unknown name or option, wrong size, dtype, range or label; empty
    or unreadable data), FileNotFoundError (missing path or data set), ImportError (a package that is not installed).
    """
    if name not in SOURCES:
        raise ValueError(
            f"data.name: unknown data set {name!r}, expected one of {sorted(SOURCES)}{checks.nearest(name, SOURCES)}; "
            f"data sets of tensorflow-datasets are data.name = 'tfds', data.dataset = {name!r}"
        )
    if (name in VIDEOS) != (shape.num_frames > 0):
        wanted = f"1 or more for {name!r}, which are videos" if name in VIDEOS else f"0: videos are {sorted(VIDEOS)}"
        raise ValueError(f"found data.num_frames = {shape.num_frames}, expected {wanted}")
    allowed = list(inspect.signature(SOURCES[name]).parameters)[1:]
    options = {key: value for key, value in options.items() if key in allowed or value != ""}  # emptied by a flag
    for key in options:
        if key not in allowed:
            near = checks.nearest(key, allowed)
            raise ValueError(f"data.{key}: unknown for {name!r}, expected some of {allowed}{near}")
    source = SOURCES[name](shape, **options)
    if len(source) == 0:
        raise ValueError(f"data set {name!r} with {options} holds no image")
    for index in np.unique(np.linspace(0, len(source) - 1, min(len(source), _EARLY_READS)).astype(int)):
        source[int(index)]
    return source


def read(source: Source, indices: Sequence[int]) -> Item:
    """Those items as one batch {"image": (B, H, W, C), "label": int32 (B,)}."""
    items = source.__getitems__(indices) if hasattr(source, "__getitems__") else [source[i] for i in indices]
    return {key: np.stack([item[key] for item in items]) for key in items[0]}


# Kinds of sources ----------------------------------------------------------------------------------------------


class Arrays:
    """Images (N, H, W, C) uint8 or float32 in [-1, 1], labels (N,) of integers or None; all checked at once. told:
    names to (N,), further entries of the items."""

    def __init__(
        self, images: np.ndarray, labels: np.ndarray | None, shape: DataShape, told: Mapping[str, np.ndarray] = {}
    ):
        if images.ndim != 4 or (labels is not None and np.shape(labels) != (len(images),)):
            found = None if labels is None else np.shape(labels)
            raise ValueError(f"expected images (N, H, W, C) and labels (N,), found {images.shape} and {found}")
        if len(images):
            checks.check_image(images, (len(images), *shape.shape), "the array of images")
        if shape.num_classes and labels is None:
            raise ValueError("data.num_classes is set and the data has no labels: add them or set num_classes = 0")
        if shape.num_classes and len(images):
            checks.check_labels(np.asarray(labels), shape.num_classes, "the array of labels")
        self._columns = {"image": images, **told}
        if shape.num_classes:
            self._columns["label"] = np.asarray(labels).astype(np.int32)

    def __len__(self) -> int:
        return len(self._columns["image"])

    def __getitem__(self, index: int) -> Item:
        return {name: column[index] for name, column in self._columns.items()}


class Records:
    """Anything indexable that gives records; each is decoded, resized if asked, and checked when read.

    decode(record, name) -> {"image", "label"}, and "caption", which then stands for the label; "height" and "width"
    where the picture was made smaller before. `what` and the index name an item in messages.
    """

    def __init__(
        self, records: Sequence, decode: Callable[[Any, str], Item], shape: DataShape, resize: bool, what: str,
        metadata: bool = False,
    ):  # fmt: skip
        if metadata and not resize and shape.image_size:
            raise ValueError("data.metadata tells what data.resize did to a picture: set data.resize = True")
        self._records, self._decode, self._shape, self._resize, self._what = records, decode, shape, resize, what
        self._metadata = metadata or not shape.image_size  # who crops pictures has to know

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
        told = _told(image, self._shape.image_size, item) if self._metadata and image.ndim == 3 else {}
        if self._resize and image.ndim == 3:
            checks.check_image(image, (*image.shape[:2], self._shape.channels), name)
            image = pictures.crop_and_resize(image, self._shape.image_size)
        checks.check_image(image, self._shape.shape, name)
        if "caption" in item:
            return {"image": image, "caption": item["caption"], **told}
        if not self._shape.num_classes:
            return {"image": image, **told}
        if "label" not in item:
            raise ValueError(f"{name} has no label: add labels or set data.num_classes = 0")
        label = np.asarray(item["label"])
        checks.check_labels(label, self._shape.num_classes, name)
        return {"image": image, "label": label.astype(np.int32), **told}


def _told(image: np.ndarray, size: int, item: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Metadata of `image` and of what `pictures.crop_and_resize` makes of it; size 0: of the whole image. The size of
    the original is that of the item, where the item knows it."""
    height, width = image.shape[:2]
    side = min(height, width)
    scale = size / side
    told = {"height": item.get("height", height), "width": item.get("width", width)}
    told |= {"top": (height - side) // 2 * scale, "left": (width - side) // 2 * scale, "flip": 0}
    return {name: np.float32(value) for name, value in {**told, "aspect": told["width"] / told["height"]}.items()}


def _digits(shape: DataShape, views: int = 0) -> Source:
    digits = digit_views.original()
    if views:
        images, told = digit_views.views((digits.images * (255 / 16)).round().astype(np.uint8), shape.image_size, views)
        return Arrays(images, np.repeat(digits.target, views), shape, told)
    # 17 grey levels, 0..16; grey becomes RGB, as in picture files
    images = np.repeat((digits.images / 8 - 1).astype(np.float32)[..., None], 3 if shape.channels == 3 else 1, axis=3)
    return Arrays(images, digits.target, shape)


def _shapes(
    shape: DataShape, num: int = 10_000, resize: bool = False, metadata: bool = False, captions: bool = False
) -> Source:
    return Records(synthetic.Shapes(num, captions), _as_is, shape, resize, "shapes", metadata)


def _arrays(shape: DataShape, path: str, resize: bool = False, metadata: bool = False) -> Source:
    file_path = checks.existing(path)
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
    told = _columns(arrays, images, path) if metadata and not resize else {}
    if metadata and resize and images.ndim == 4 and len(images):
        told = {name: np.full(len(images), value) for name, value in _told(images[0], shape.image_size, {}).items()}
    if resize and images.ndim == 4 and len(images):
        checks.check_image(images, (*images.shape[:3], shape.channels), path)
        images = np.stack([pictures.crop_and_resize(image, shape.image_size) for image in images])
    return Arrays(images, labels, shape, told)


def _columns(arrays: Mapping[str, np.ndarray], images: np.ndarray, path: str) -> dict[str, np.ndarray]:
    """Metadata that a file of arrays has itself, (N,) each."""
    found = {name: np.shape(arrays.get(name)) for name in latents.METADATA}
    wrong = {name: shape for name, shape in found.items() if shape != (len(images),)}
    if wrong:
        raise ValueError(
            f"{path} tells {sorted(wrong)} of no image, or not of each (found shapes {wrong}): add arrays "
            f"{', '.join(latents.METADATA)} (N,), or set data.resize = True, or leave data.metadata out"
        )
    told = {name: arrays[name].astype(np.float32) for name in latents.METADATA}
    return {**told, "aspect": told["width"] / told["height"]}


def _image_folder(shape: DataShape, path: str, resize: bool = False, metadata: bool = False) -> Source:
    size = 0 if resize else shape.image_size
    files = pictures.PictureFiles(checks.existing(path), shape.channels, shape.num_classes, size)
    return Records(files, _as_is, shape, resize, path, metadata)


def _webdataset(
    shape: DataShape, path: str, resize: bool = False, metadata: bool = False, captions: bool = False
) -> Source:
    files = webdataset.TarFiles(checks.existing(path), shape.channels, shape.num_classes > 0, captions)
    return Records(files, _as_is, shape, resize, path, metadata)


def _array_record(shape: DataShape, path: str, resize: bool = False, metadata: bool = False) -> Source:
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    root = checks.existing(path)
    files = [root] if root.is_file() else sorted(root.glob("*.array_record*"))
    for file in files:
        try:
            len(ArrayRecordDataSource([str(file)]))
        except RuntimeError as error:
            raise ValueError(f"{file} is no complete ArrayRecord file ({error}): write it again") from error
    if not files:
        raise ValueError(f"no *.array_record* file in {path}")
    return Records(ArrayRecordDataSource([str(f) for f in files]), _decode_record, shape, resize, path, metadata)


def _tfds(
    shape: DataShape,
    dataset: str,
    split: str = "train",
    data_dir: str = "",
    download: bool = False,
    resize: bool = False,
    metadata: bool = False,
) -> Source:
    records, what = tfds.open_split(dataset, split, data_dir, download, shape.num_classes)
    return Records(records, _image_and_label, shape, resize, what, metadata)


VIDEOS: dict[str, Callable[..., Source]] = {"moving_digits": clips.moving_digits, "clips": clips.of_files}
SOURCES: dict[str, Callable[..., Source]] = {
    "digits": _digits,
    "shapes": _shapes,
    "arrays": _arrays,
    "prompts": texts.prompts,
    "image_folder": _image_folder,
    "webdataset": _webdataset,
    "array_record": _array_record,
    "tfds": _tfds,
    "latents": latents.load,
    **VIDEOS,
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
    checks.check_image(image, image.shape, name)
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
