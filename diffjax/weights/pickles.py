"""Pickles, and the tensors of PyTorch in them, read without running anything that they hold.

A pickle is a program: it names globals, calls them, and sets attributes on what they return. Here every global is
looked up in a table of inert builders of ours or refused; only those are called, and only a `Buildable` takes a state.
A file can also ask for memory that it has no content for, so lengths are compared with the file before anything is
allocated, and tensors are views of their storage: reading takes no more than about the size of the file.

    class Unpickler(pickles.Unpickler):
        builders = {("collections", "OrderedDict"): pickles.Function(dict)}

    with open(path, "rb") as file:
        content = Unpickler(pickles.File(file)).load()
"""

import io
import math
import pickle
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

# what reading bytes that are no pickle, or half of one, raises
DAMAGED = (
    pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError,
    MemoryError, RecursionError,
)  # fmt: skip

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # torch.save's format before the zip files
_STORAGES = {
    "FloatStorage": np.dtype("<f4"), "HalfStorage": np.dtype("<f2"), "DoubleStorage": np.dtype("<f8"),
    "BFloat16Storage": np.dtype(jnp.bfloat16), "LongStorage": np.dtype("<i8"), "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"), "CharStorage": np.dtype("i1"), "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}  # fmt: skip
_LONGEST_NAME = 1000  # characters of a global's module or name
# what protocols 2 to 4 write for plain values (Python 2's strings too), objects and calls; left out is what can
# allocate at will (BYTEARRAY8), reach objects of the running process (EXT1, NEXT_BUFFER) or call by another way (INST,
# OBJ, NEWOBJ_EX)
_OPCODES = (
    "PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1",
    "BINFLOAT", "BINSTRING", "SHORT_BINSTRING", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES",
    "BINBYTES", "BINBYTES8", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS",
    "EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_SET", "ADDITEMS", "MEMOIZE", "BINGET", "LONG_BINGET", "BINPUT",
    "LONG_BINPUT", "GLOBAL", "STACK_GLOBAL", "BINPERSID",
)  # fmt: skip


class RefusedError(ValueError):
    """The file asks for something that reading weights does not need, or holds something else."""


class Function:
    """A builder that a file can call and cannot change."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable):
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)


class Buildable:
    """An object whose state a file may set, by this method alone."""

    def __setstate__(self, state: Any) -> None:
        raise NotImplementedError


class File:
    """A binary file, or its content, with its size: a length in it is compared with what is left before memory is
    asked for."""

    def __init__(self, file: BinaryIO | bytes):
        self._content = file if isinstance(file, bytes) else None
        self._file = io.BytesIO(file) if isinstance(file, bytes) else file
        at = self._file.tell()
        self.size = self._file.seek(0, io.SEEK_END)
        self._file.seek(at)

    @property
    def left(self) -> int:
        return self.size - self._file.tell()

    def read(self, count: int) -> bytes:
        """`count` bytes, never fewer. Raises EOFError where the file ends before."""
        if count > self.left:
            raise EOFError(f"it ends at byte {self.size:,}, {count - self.left:,} bytes too early")
        return self._file.read(count)

    def numbers(self, dtype: np.dtype, count: int) -> np.ndarray:
        """The next `count` numbers, read-only; of a content they are a view. Raises like `read`."""
        if self._content is None or count * dtype.itemsize > self.left:
            return np.frombuffer(self.read(count * dtype.itemsize), dtype)
        at = self._file.tell()
        self._file.seek(at + count * dtype.itemsize)
        return np.frombuffer(self._content, dtype, count, at)

    def readline(self) -> bytes:
        return self._file.readline(_LONGEST_NAME)


class _Opcodes(dict):
    def __missing__(self, code: int) -> None:
        raise pickle.UnpicklingError(f"found opcode {bytes([code])!r}, which no weights need")


# Python's own pickle._Unpickler, not the C one: that allocates by a number in the file (its memo) before reading on
class Unpickler(pickle._Unpickler):
    """Globals come from `builders`; nothing is imported. Make it of a `File`."""

    builders: Mapping[tuple[str, str], Any] = {}

    def __init__(self, file: File):
        super().__init__(file, encoding="utf-8")  # of Python 2's strings

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.builders:
            raise RefusedError(
                f"refused: it names {shown(f'{module}.{name}')}, which no weights need; nothing of it was executed"
            )
        return self.builders[module, name]

    def load_call(self) -> None:
        args = self.stack.pop()
        if not isinstance(self.stack[-1], Function):
            raise RefusedError(f"refused: it calls a {type(self.stack[-1]).__name__}, which no weights need")
        self.stack[-1] = self.stack[-1](*args)

    def load_build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], Buildable):
            kind = type(self.stack[-1]).__name__
            raise RefusedError(f"refused: it sets attributes on a {kind}, which no weights need")
        self.stack[-1].__setstate__(state)

    dispatch = _Opcodes(
        {getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _OPCODES}
        | {pickle.REDUCE[0]: load_call, pickle.NEWOBJ[0]: load_call, pickle.BUILD[0]: load_build}
    )


def shown(value: Any) -> str:
    """A name or number from a file as it may be printed: short, without control characters. Of other values only the
    type: the text of nested lists can be endless."""
    text = str(value) if isinstance(value, str | int | float | BaseException) else type(value).__name__
    return ascii(text[:100])[1:-1] + ("..." if len(text) > 100 else "")


# Tensors of PyTorch ----------------------------------------------------------------------------------------------


def tensor(storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_: Any) -> np.ndarray:
    """The view that torch._utils._rebuild_tensor_v2 makes. Raises RefusedError where it leaves its storage."""
    if not isinstance(storage, np.ndarray) or not all(type(n) is int for n in (offset, *size, *stride)):
        raise RefusedError("found a tensor without a storage or a size in whole numbers")
    if len(size) != len(stride) or min((offset, *size, *stride)) < 0 or math.prod(size) > storage.size:
        what = shown(f"size {size}, stride {stride}")
        raise RefusedError(f"found a tensor of {what} in a storage of {storage.size:,} numbers")
    if not math.prod(size):
        return storage[:0].reshape(size)
    if offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) >= storage.size:
        what = shown(f"size {size}, stride {stride}")
        raise RefusedError(f"a tensor of {what} ends behind its storage of {storage.size:,} numbers")
    steps = tuple(step * storage.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)


def parameter(data: np.ndarray, *_: Any) -> np.ndarray:
    """torch._utils._rebuild_parameter."""
    return data


class Storage(NamedTuple):
    """What a pickle says of `count` numbers that are elsewhere, of which `size` from `start` are used."""

    key: str
    dtype: np.dtype
    count: int
    start: int
    size: int

    def of(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        return arrays[self.key][self.start : self.start + self.size]


class StorageUnpickler(Unpickler):
    """`storages` collects the storages that a pickle names, by key, whole."""

    builders = {("torch", name): name for name in _STORAGES}

    def __init__(self, file: File):
        super().__init__(file)
        self.storages: dict[str, Storage] = {}

    def persistent_load(self, pid: tuple) -> Storage:
        tag, kind, key, _, count = pid[:5]
        view = pid[5] if len(pid) > 5 else None  # without zip only: (key of the view, start, size)
        _, start, size = (None, 0, count) if view is None else view
        if tag != "storage" or kind not in _STORAGES or type(key) is not str:
            raise RefusedError(f"found {shown(tag)} of type {shown(kind)}, expected a storage of {sorted(_STORAGES)}")
        if not all(type(n) is int and n >= 0 for n in (count, start, size)) or start + size > count:
            what = f"{shown(count)} numbers, of which {shown(size)} from {shown(start)} are used"
            raise RefusedError(f"found a storage of {what}")
        found = Storage(key, _STORAGES[kind], count, 0, count)
        if self.storages.setdefault(key, found) != found:
            raise RefusedError(f"found two descriptions of storage {shown(key)}")
        return found._replace(start=start, size=size)


def legacy(file: File, unpickler: type[StorageUnpickler]) -> tuple[Any, dict[str, np.ndarray]]:
    """What torch.save wrote before the zip files, read by `unpickler`, and the numbers of its storages by key.

    That is five pickles (magic number, protocol, machine, content, keys), then for each key a count in 8 bytes and
    the numbers. Raises RefusedError for other formats and counts, EOFError like `File`.
    """
    first = unpickler(file).load()  # of another file it may be the content, so the error names what that asks for
    if first != _MAGIC or Unpickler(file).load() != _PROTOCOL or not Unpickler(file).load()["little_endian"]:
        raise RefusedError("found another format than torch's of little-endian arrays")
    reader = unpickler(file)
    root, keys, arrays = reader.load(), Unpickler(file).load(), {}
    if len(keys) != len(set(keys)) or set(keys) != set(reader.storages):
        raise RefusedError(f"found {len(keys)} storages, expected the {len(reader.storages)} that the content names")
    for key in keys:
        _, dtype, expected, *_ = reader.storages[key]
        count = int.from_bytes(file.read(8), "little", signed=True)
        if count != expected:
            raise RefusedError(f"found a storage with {count:,} {dtype} numbers, expected {expected:,}")
        arrays[key] = file.numbers(dtype, count)
    return root, arrays


def storage(content: bytes) -> np.ndarray:
    """The view of the numbers in what torch.save(storage) writes without zip (torch.storage._load_from_bytes)."""
    file = File(content)
    root, arrays = legacy(file, StorageUnpickler)
    if not isinstance(root, Storage) or file.left:
        raise RefusedError(f"found a {type(root).__name__} and {file.left:,} bytes more, expected one storage")
    return root.of(arrays)
