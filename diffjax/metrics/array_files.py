"""Files of named arrays (.npz): written whole or not at all, read without running anything that they hold.

    write("state.npz", {"mean": mean, "count": np.int64(3)})
    shapes("state.npz")                     # {"mean": (2048,), "count": ()}: of the headers alone
    read("state.npz", ["mean"])             # the arrays that are asked for; a file may hold gigabytes of images beside
"""

import hashlib
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np

# what reading bytes that are no such file, or half of one, raises
_DAMAGED = (
    zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError, TypeError, RuntimeError, OSError, MemoryError,
    OverflowError,
)  # fmt: skip
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_NPY = ".npy"

Found = TypeVar("Found")


class _RefusedError(ValueError):
    """The file is whole, and holds what is not read."""


def write(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> None:
    """Write `arrays` to `path`, made of the same bytes each time. A reader sees the old file or the whole new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:  # numpy adds .npz to names, not to files
            np.savez(file, **arrays)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def shapes(path: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """Shape of each array, from the headers. Raises FileNotFoundError, and ValueError for a file that is damaged or no
    .npz, and for arrays of Python objects, which only a pickle could make."""
    return _opened(path, lambda file: {name: _shape(file, name) for name in _names(file)})


def read(path: str | os.PathLike[str], names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of those names, default all. Raises like `shapes`, and ValueError naming arrays that are missing."""

    def load(file: zipfile.ZipFile) -> dict[str, np.ndarray]:
        held = _names(file)
        wanted = held if names is None else list(names)
        missing = [name for name in wanted if name not in held]
        if missing:
            raise _RefusedError(f"has no {', '.join(missing)}: found {', '.join(held[:20]) or 'nothing'}")
        for name in wanted:
            _shape(file, name)
        found = {}
        for name in wanted:
            with file.open(name + _NPY) as member:
                found[name] = np.lib.format.read_array(member, allow_pickle=False)
        return found

    return _opened(path, load)


def sha256(path: str | os.PathLike[str]) -> str:
    """Hexadecimal digest of the file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _opened(path: str | os.PathLike[str], function: Callable[[zipfile.ZipFile], Found]) -> Found:
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                return function(archive)
        except _RefusedError as error:
            raise ValueError(f"{path} {error}") from error
        except _DAMAGED as error:
            raise ValueError(
                f"{path} is damaged or no .npz file ({type(error).__name__}: {str(error)[:100]}): compare its size, or "
                "make it again"
            ) from error


def _names(file: zipfile.ZipFile) -> list[str]:
    return [name.removesuffix(_NPY) for name in file.namelist() if name.endswith(_NPY)]


def _shape(file: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    """Of one member, checked: numbers or text, and as many bytes as the header says."""
    with file.open(name + _NPY) as member:
        shape, dtype, start = _header(member, name)
    if dtype.hasobject:
        raise _RefusedError(f"holds Python objects in {name}, which are not read: expected an array of numbers")
    held = file.getinfo(name + _NPY).file_size
    if start + math.prod(shape) * dtype.itemsize != held:
        raise ValueError(f"{name} is {dtype} {shape} in {held:,} bytes")
    return shape


def _header(member: BinaryIO, name: str) -> tuple[tuple[int, ...], np.dtype, int]:
    """(shape, dtype, bytes before the numbers)."""
    version = np.lib.format.read_magic(member)
    if version not in _HEADERS:
        raise _RefusedError(f"holds {name} in version {version} of the format: expected a plain array")
    shape, _, dtype = _HEADERS[version](member)
    return shape, dtype, member.tell()
