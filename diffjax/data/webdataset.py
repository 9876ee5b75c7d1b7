"""Pictures in tars, as webdataset names them: read at any place, by an index of where each file begins.

A sample is the files of one tar whose names are equal up to the first dot behind the last slash:

    000000012.jpg    or .jpeg, .png, .webp: the picture
    000000012.json   width, height of the original where the picture was made smaller, caption
    000000012.txt    caption; goes before that of the .json
    000000012.cls    class, a whole number

Samples are numbered in the order of the tars' names, then of their pictures. Other files are not looked at, nothing is
unpacked, and nothing in a file is executed. The index is made by reading each tar's headers, about 30 s a million
files, and kept beside the tar as .NAME.tar.index.npz where its folder can be written to; a tar that has changed since
is read again.
"""

import contextlib
import json
import os
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.data import pictures

_PICTURES = tuple(suffix.removeprefix(".") for suffix in pictures.SUFFIXES)
_PARTS = ("picture", "json", "txt", "cls")
_VERSION = 1  # of the index that is kept


class TarFiles:
    """The samples of a folder of .tar files, as {"image"} items with "label" or "caption", before any resizing, and
    with "height" and "width" of the original where a .json tells them.

    channels: 1 or 3. labels, captions: which of them every sample must have. Raises FileNotFoundError for a folder
    without .tar, ValueError, naming the file, for a damaged or compressed tar, two files for one part of a sample, a
    tar without pictures, and, when a sample is read, for one that cannot be read or lacks something.
    """

    def __init__(self, root: Path, channels: int, labels: bool = False, captions: bool = False):
        self._channels, self._wants_label, self._wants_caption = channels, labels, captions
        self._tars = [root] if root.is_file() else sorted(root.glob("*.tar"))
        if not self._tars:
            raise FileNotFoundError(f"no *.tar in {root}: give the folder of the tars, not compressed")
        tables = [_kept_index(path) for path in self._tars]
        self._tar = np.repeat(np.arange(len(tables), dtype=np.int32), [len(names) for names, _ in tables])
        self._names = np.concatenate([names for names, _ in tables])
        self._places = np.concatenate([places for _, places in tables])  # (N, parts, 2): offset and size, -1 = absent

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = self.name(index)
        item: dict[str, Any] = {"image": pictures.decode(self._read(index, "picture"), self._channels, name)}
        facts = self._facts(index, name)
        item |= _size(facts, name)
        if self._wants_caption:
            return {**item, "caption": self._caption(index, facts, name)}
        return {**item, "label": self._label(index, name)} if self._wants_label else item

    def name(self, index: int) -> str:
        """Path of picture `index`, for messages."""
        return f"{self._tars[self._tar[index]]}/{self._names[index].decode('utf-8', 'replace')}"

    def _read(self, index: int, part: str) -> bytes | None:
        offset, size = self._places[index, _PARTS.index(part)]
        if offset < 0:
            return None
        path = self._tars[self._tar[index]]
        with path.open("rb") as file:  # for every read: threads share no position, thousands of tars no handles
            file.seek(offset)
            data = file.read(size)
        if len(data) != size:
            raise ValueError(f"{path} ends before its file at byte {offset}: get it again")
        return data

    def _facts(self, index: int, name: str) -> dict[str, Any]:
        data = self._read(index, "json")
        if data is None:
            return {}
        try:
            facts = json.loads(data)
        except ValueError as error:
            raise ValueError(f"the .json beside {name} is damaged ({error}): replace or remove it") from error
        if not isinstance(facts, dict):
            raise ValueError(f"the .json beside {name} holds a {type(facts).__name__}, expected names and values")
        return facts

    def _caption(self, index: int, facts: dict[str, Any], name: str) -> np.ndarray:
        data = self._read(index, "txt")
        try:
            caption = facts.get("caption") if data is None else data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"the .txt beside {name} is not UTF-8 ({error}): convert it") from error
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f"{name} has no caption: add a .txt, or 'caption' to its .json, or leave captions out")
        return np.array(caption.strip())

    def _label(self, index: int, name: str) -> int:
        data = self._read(index, "cls")
        if data is None or not data.strip().isdigit():
            found = "no .cls" if data is None else f"the class {data[:20]!r}"
            expected = "a whole number in a .cls: add it, or set data.num_classes = 0"
            raise ValueError(f"{name} has {found}, expected {expected}")
        return int(data)


def _size(facts: dict[str, Any], name: str) -> dict[str, int]:
    """Height and width of the original, {} where they are not told."""
    found = {key: facts[key] for key in ("height", "width") if facts.get(key) is not None}
    if found and (len(found) < 2 or any(type(value) is not int or value < 1 for value in found.values())):
        expected = "height and width in pixels, or none"
        raise ValueError(f"the .json beside {name} tells {found} of the original, expected {expected}")
    return found


def _kept_index(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """`_index`, read from the file beside the tar if that is of this tar as it is now, else made and written there."""
    facts, file = path.stat(), path.with_name(f".{path.name}.index.npz")
    made_of = np.array([_VERSION, facts.st_size, facts.st_mtime_ns])
    with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile), np.load(file) as kept:
        if np.array_equal(kept["made_of"], made_of):
            return kept["names"], kept["places"]
    names, places = _index(path)
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    with contextlib.suppress(OSError):  # a folder that cannot be written to
        try:
            with temporary.open("wb") as out:
                np.savez(out, made_of=made_of, names=names, places=places)
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
    return names, places


def _index(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(names (N,) of the pictures, offset and size of every part (N, parts, 2)) of a tar, in its order."""
    samples: dict[str, dict[str, tuple[str, int, int]]] = {}
    for key, part, member in _members(path):
        sample = samples.setdefault(key, {})
        if part in sample:
            raise ValueError(f"{path} has {sample[part][0]} and {member.name} for one sample: rename one of them")
        sample[part] = member.name, member.offset_data, member.size
    whole = [sample for sample in samples.values() if "picture" in sample]
    if not whole:
        raise ValueError(f"no picture in {path}: expected files that end in {', '.join(_PICTURES)}")
    places = np.full((len(whole), len(_PARTS), 2), -1, np.int64)
    for row, sample in zip(places, whole, strict=True):
        for part, (_, *place) in sample.items():
            row[_PARTS.index(part)] = place
    return np.array([sample["picture"][0].encode("utf-8", "replace") for sample in whole]), places


def _members(path: Path) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """(key, part, member) of the files that are part of a sample."""
    total = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                archive.members = []  # tarfile keeps every header otherwise
                folder, slash, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                part = "picture" if suffix.lower() in _PICTURES else suffix.lower()
                if part not in _PARTS or not stem or not member.isreg() or member.issparse():
                    continue
                if member.offset_data + member.size > total:
                    raise ValueError(f"{path} ends within {member.name}: get it again")
                yield folder + slash + stem, part, member
            end = archive.offset
    except tarfile.TarError as error:
        raise ValueError(f"{path} is no whole tar without compression ({error}): unpack or get it again") from error
    with path.open("rb") as file:
        file.seek(end)
        if any(file.read(tarfile.BLOCKSIZE)):  # tarfile takes a damaged header for the end
            raise ValueError(f"{path} is damaged at byte {end}: get it again")
