"""Cached latents: what an autoencoder says of pictures and a text encoder of their captions, encoded once.

A folder holds `latents-SHARD.array_record`, one record a picture, crop and flip, and once it is whole `latents.json`:
the sizes below, counts, versions, what it was made for, and of each shard bytes and sha256. A record is, little-endian,

    float32  height, width of the original; top, left of the crop in the scaled original; flip (0 or 1)
    int32    label, -1 = none
    uint16   n, tokens of the text (start and end among them, no padding); bytes of the caption
    float16  moments (h, w, 2c): mean, then log variance of the latents before they are scaled, never a sample;
             text (n, D); pooled (P)
    UTF-8    caption

so that latents are drawn anew in every epoch, and text is padded where it is read. Crop and flip are chosen before the
picture is encoded: an autoencoder does not turn a mirrored picture into mirrored latents.

    for done in write("cache", made_for, layout, num_images, records): ...
    source = load(shape, "cache")
    source[0]        # {"moments", "height", "width", "top", "left", "flip", "aspect", "label" or "text", ...}
"""

import functools
import hashlib
import json
import os
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffjax.data import checks, shards
from diffjax.runtime import report

HEADER = "latents.json"
METADATA = ("height", "width", "top", "left", "flip")
SHARD_IMAGES = 4096
_VERSION = 1
_HEAD = struct.Struct("<5fiHH")
_HALF = np.dtype("<f2")


class Layout(NamedTuple):
    """Sizes of a record. moments: (h, w, 2c); text_width, pooled_width: 0 where there is none."""

    moments: tuple[int, int, int]
    text_width: int = 0
    pooled_width: int = 0

    def num_bytes(self, num_tokens: int = 0, caption: int = 0) -> int:
        """Bytes of a record with a text of so many tokens, and a caption of so many bytes."""
        numbers = np.prod(self.moments) + num_tokens * self.text_width + (num_tokens > 0) * self.pooled_width
        return _HEAD.size + int(numbers) * _HALF.itemsize + caption


def encode(layout: Layout, record: Mapping[str, Any], name: str) -> bytes:
    """The bytes of {"moments", METADATA, and "label", or "caption", "text" (n, D) and "pooled" (P,)}; `name` is that of
    its picture. Raises ValueError for missing metadata, captions without tokens, other sizes, and numbers above
    float16's."""
    if missing := [key for key in METADATA if key not in record]:
        raise ValueError(f"{name} has no metadata {missing}, found {sorted(record)}: a network shall be told of it")
    caption = str(record.get("caption", "")).encode("utf-8")
    text = np.asarray(record.get("text", np.zeros((0, layout.text_width))))
    if "caption" in record and not len(text):
        raise ValueError(f"{name} has a caption and no tokens: encode its text too")
    if len(caption) >= 2**16:
        raise ValueError(f"the caption of {name} has {len(caption)} bytes, expected less than {2**16}: shorten it")
    parts = {"moments": (record["moments"], layout.moments), "text": (text, (len(text), layout.text_width))}
    if len(text) and layout.pooled_width:
        parts["pooled"] = record["pooled"], (layout.pooled_width,)
    head = _HEAD.pack(*(record[key] for key in METADATA), int(record.get("label", -1)), len(text), len(caption))
    return b"".join([head, *(_half(*part, f"{key} of {name}") for key, part in parts.items()), caption])


def _half(array: np.ndarray, shape: tuple[int, ...], what: str) -> bytes:
    if np.shape(array) != shape:
        raise ValueError(
            f"{what}: found shape {np.shape(array)}, expected {shape}: a folder holds one resolution and encoder"
        )
    with np.errstate(over="ignore"):
        half = np.ascontiguousarray(array, _HALF)
    if not np.isfinite(half).all():
        raise ValueError(
            f"{what}: not all finite in float16, expected numbers below 65,504: look at the weights and the picture"
        )
    return half.tobytes()


def decode(layout: Layout, data: bytes, name: str) -> dict[str, Any]:
    """The record of `encode`, its arrays float16, "text" absent where there is none. Raises ValueError, naming it, for
    bytes that are no such record."""
    if len(data) < _HEAD.size:
        raise ValueError(f"{name} has {len(data)} bytes, expected a record of {HEADER}'s sizes: prepare it again")
    *told, label, num_tokens, caption = _HEAD.unpack_from(data)
    if len(data) != layout.num_bytes(num_tokens, caption):
        raise ValueError(
            f"{name} has {len(data)} bytes, expected {layout.num_bytes(num_tokens, caption)} with moments of "
            f"{layout.moments}: a folder holds one resolution and encoder, do not mix its files with others"
        )
    record: dict[str, Any] = {key: np.float32(value) for key, value in zip(METADATA, told, strict=True)}
    sizes = {"moments": layout.moments}
    if num_tokens:
        sizes |= {"text": (num_tokens, layout.text_width)}
        sizes |= {"pooled": (layout.pooled_width,)} if layout.pooled_width else {}
    offset = _HEAD.size
    for key, shape in sizes.items():
        record[key] = np.frombuffer(data, _HALF, int(np.prod(shape)), offset).reshape(shape)
        offset += record[key].nbytes
    return record | {"label": np.int32(label), "caption": data[offset:].decode("utf-8", "replace")}


# Writing ---------------------------------------------------------------------------------------------------------


def write(
    folder: str | os.PathLike[str],
    made_for: Mapping[str, Any],
    layout: Layout,
    num_images: int,
    records: Callable[[int, int], Iterable[Sequence[tuple[str, Mapping[str, Any]]]]],
    *,
    shard_images: int = SHARD_IMAGES,
    process: int = 0,
    num_processes: int = 1,
) -> Iterator[int]:
    """Write the shards of this process, i mod num_processes; yields how many of its images are done.

    records(first, last) gives, for each of these images in order, all its records: (name, what `encode` takes). Shards
    that an interrupted call left complete are kept. The process that finds all shards there writes the header. Raises
    FileExistsError where the folder holds a finished cache, or shards that were made for something else; ValueError for
    counts that do not fit, and as `encode`.
    """
    if not 0 <= process < num_processes or num_images < 1:
        raise ValueError(
            f"found process {process} of {num_processes} and {num_images} images, expected 0 <= process < number"
        )
    folder, done = Path(folder), 0
    made_for = {**made_for, "layout": layout, "num_images": num_images, "shard_images": shard_images}
    shards.claim(folder, made_for, HEADER, "latents")
    for shard in range(process, _num_shards(num_images, shard_images), num_processes):
        first, last = shard * shard_images, min((shard + 1) * shard_images, num_images)
        path, tally = folder / _file(shard), _Tally()
        if not _facts_file(path).exists():
            for _ in shards.write(path, tally.encoded(layout, records(first, last))):
                yield done + tally.images - 1
            facts = {**tally.facts(), "bytes": path.stat().st_size, "sha256": _sha256(path)}
            report.write_text(_facts_file(path), json.dumps(facts))
        done += last - first
        yield done
    _finish(folder, made_for, layout)


def own_images(num_images: int, process: int, num_processes: int, shard_images: int = SHARD_IMAGES) -> int:
    """How many of the images a process of `write` has."""
    own = range(process, _num_shards(num_images, shard_images), num_processes)
    return sum(min((shard + 1) * shard_images, num_images) - shard * shard_images for shard in own)


class _Tally:
    """Counts what passes: images, records, the longest text, whether there are labels and captions."""

    def __init__(self) -> None:
        self.images = self.records = self.longest = self.labels = self.captions = 0

    def encoded(
        self, layout: Layout, images: Iterable[Sequence[tuple[str, Mapping[str, Any]]]]
    ) -> Iterator[bytes]:
        for image in images:
            self.images += 1
            for name, record in image:
                self.records += 1
                self.labels += "label" in record
                self.captions += "caption" in record
                self.longest = max(self.longest, len(record.get("text", ())))
                yield encode(layout, record, name)

    def facts(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("images", "records", "longest", "labels", "captions")}


def _finish(folder: Path, made_for: Mapping[str, Any], layout: Layout) -> None:
    """Write the header, if all shards are there with their facts."""
    files = [folder / _file(shard) for shard in range(_num_shards(made_for["num_images"], made_for["shard_images"]))]
    if not all(_facts_file(file).exists() for file in files):
        return
    tables = [{"file": file.name, **json.loads(_facts_file(file).read_text(encoding="utf-8"))} for file in files]
    counted = ("images", "records", "labels", "captions", "bytes")
    total = {name: sum(table[name] for table in tables) for name in counted}
    header = {"version": _VERSION, **layout._asdict(), "longest": max(table["longest"] for table in tables), **total}
    shards.finish(folder, HEADER, {**header, "made_for": made_for, "versions": report.versions(), "shards": tables})
    for file in files:
        _facts_file(file).unlink(missing_ok=True)


def _num_shards(num_images: int, shard_images: int) -> int:
    return -(-num_images // shard_images)


def _file(shard: int) -> str:
    return f"latents-{shard:05d}.array_record"


def _facts_file(path: Path) -> Path:
    return path.with_suffix(".json")


def _sha256(path: Path) -> str:
    facts = path.stat()
    return _sha256_of(path, facts.st_size, facts.st_mtime_ns)


@functools.lru_cache(maxsize=100_000)
def _sha256_of(path: Path, size: int, mtime_ns: int) -> str:
    # a source that is opened twice is read once
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Reading ---------------------------------------------------------------------------------------------------------


class _Instruction(NamedTuple):
    """All of a file, as ArrayRecordDataSource takes it."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class Latents:
    """The records of a finished folder, in their order, as items; its header as `header`.

    Items: moments float16 (h, w, 2c); METADATA and aspect = width / height, float32; label int32 where num_classes is
    not 0; or, of captions, text float16 (L, D) with zeros behind its text_length (int32) tokens, L = header["longest"],
    and pooled float16 (P,). Raises as `load`; at reading ValueError, naming the shard, for records that are damaged.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any], files: Sequence[Path], num_classes: int):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self.header, self._files, self._num_classes = header, list(files), num_classes
        self.layout = Layout(tuple(header["moments"]), header["text_width"], header["pooled_width"])
        counts = {table["file"]: table["records"] for table in header["shards"]}
        # with their counts no file is opened before it is read
        parts = [_Instruction(str(file), 0, counts[file.name], counts[file.name]) for file in files]
        self._records, self._ends = ArrayRecordDataSource(parts), np.cumsum([part.take for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self._item(self._record(index), index)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, np.ndarray]]:
        """Several at once."""
        try:
            records = self._records.__getitems__([int(i) for i in indices])
        except RuntimeError:
            records = [self._record(int(i)) for i in indices]  # one of them says which
        return [self._item(record, index) for record, index in zip(records, indices, strict=True)]

    def caption(self, index: int) -> str:
        """The text that record `index` was made of, "" where it has none."""
        return decode(self.layout, self._record(index), self._name(index))["caption"]

    def _record(self, index: int) -> bytes:
        try:
            return self._records[int(index)]
        except RuntimeError as error:
            raise ValueError(f"{self._name(index)} cannot be read ({error}): {_REMEDY}") from error

    def _name(self, index: int) -> str:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return f"record {index - (self._ends[shard - 1] if shard else 0)} of {self._files[shard]}"

    def _item(self, data: bytes, index: int) -> dict[str, np.ndarray]:
        record = decode(self.layout, data, self._name(index))
        item = {key: record[key] for key in ("moments", *METADATA)}
        item["aspect"] = item["width"] / item["height"]
        if self._num_classes:
            label = record["label"]
            if not 0 <= label < self._num_classes:
                expected = f"0..{self._num_classes - 1}: set data.num_classes"
                raise ValueError(f"{self._name(index)} has label {label}, expected {expected}")
            return {**item, "label": label}
        return item | self._text(record, index) if self.layout.text_width else item

    def _text(self, record: Mapping[str, Any], index: int) -> dict[str, np.ndarray]:
        if "text" not in record:
            raise ValueError(f"{self._name(index)} has no tokens of its text: prepare the folder again")
        text = np.zeros((self.header["longest"], self.layout.text_width), _HALF)
        text[: len(record["text"])] = record["text"]
        item = {"text": text, "text_length": np.int32(len(record["text"]))}
        return item | ({"pooled": record["pooled"]} if "pooled" in record else {})


_REMEDY = (
    "prepare the folder again, or set data.skip_corrupt = True to compare all checksums at the start and leave corrupt "
    "shards out"
)


def load(shape: Any, path: str, skip_corrupt: bool = False) -> Latents:
    """The latents in folder `path`, of the size and channels of `shape`.

    Without skip_corrupt the shards' sizes are compared; with it their checksums too, which reads all of them once, and
    shards that are not as they were written are left out, named and counted on standard error. Raises FileNotFoundError
    for a folder without finished latents, ValueError for those of another size, shards that are corrupt or not of this
    folder, and labels or texts that are missing.
    """
    folder = checks.existing(path)
    header = _header(folder, shape)
    tables = {table["file"]: table for table in header["shards"]}
    if strange := sorted(file.name for file in folder.glob("*.array_record") if file.name not in tables):
        raise ValueError(
            f"{folder} has {strange[:3]}, which {HEADER} does not name: a folder holds one preparation, take them out"
        )
    with ThreadPoolExecutor() as pool:
        reasons = pool.map(lambda table: _reason(folder, table, checksum=skip_corrupt), tables.values())
        corrupt = {name: reason for name, reason in zip(tables, reasons, strict=True) if reason}
    listed = "; ".join(f"{name} ({reason})" for name, reason in list(corrupt.items())[:10])
    if corrupt and not skip_corrupt:
        raise ValueError(f"{len(corrupt)} of {len(tables)} shards in {folder} are corrupt: {listed}: {_REMEDY}")
    kept = [folder / name for name in tables if name not in corrupt]
    if not kept:
        raise ValueError(f"every shard in {folder} is corrupt: {listed}: prepare the folder again")
    if corrupt:
        lost = sum(tables[name]["records"] for name in corrupt)
        print(
            f"WARNING: {len(corrupt)} of {len(tables)} shards in {folder} are corrupt and left out, {lost:,} of "
            f"{header['records']:,} records: {listed}", file=sys.stderr, flush=True,
        )  # fmt: skip
    return Latents(folder, header, kept, shape.num_classes)


def _header(folder: Path, shape: Any) -> dict[str, Any]:
    """latents.json, checked against `shape`."""
    if not (folder / HEADER).exists():
        begun = (folder / shards.CLAIM).exists()
        state = "unfinished latents: run the same command again" if begun else f"no {HEADER}: make it"
        raise FileNotFoundError(f"{folder} holds {state} with diffjax.cli.prepare --kind=latents")
    header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
    if header.get("version") != _VERSION:
        found = header.get("version")
        raise ValueError(f"{folder / HEADER} has version {found}, expected {_VERSION}: prepare it again")
    height, width, double = header["moments"]
    if (height, width, double) != (*shape.shape[:2], 2 * shape.channels):
        raise ValueError(
            f"{folder} holds latents of {height}x{width}x{double // 2}, found data.image_size={shape.image_size} and "
            f"data.channels={shape.channels}: set {height} and {double // 2}"
        )
    if shape.num_classes and header["labels"] < header["records"]:
        found = f"{header['labels']} labels for {header['records']} records"
        raise ValueError(f"{folder} has {found}: set data.num_classes = 0")
    if header["captions"] and not header["text_width"]:
        raise ValueError(f"{folder} has captions without tokens: prepare it with companions that have a text encoder")
    return header


def _reason(folder: Path, table: Mapping[str, Any], checksum: bool) -> str:
    """Why a shard is not as it was written, "" where it is."""
    path = folder / table["file"]
    if not path.exists():
        return "absent"
    if path.stat().st_size != table["bytes"]:
        return f"{path.stat().st_size:,} bytes, {table['bytes']:,} written"
    return "another checksum" if checksum and _sha256(path) != table["sha256"] else ""
