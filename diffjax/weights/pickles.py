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
from typing import Any, BinaryIO

import numpy as np

# what reading bytes that are no pickle, or half of one, raises
DAMAGED = (
    pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError,
    MemoryError, RecursionError,
)  # fmt: skip
STORAGES = {"FloatStorage": "<f4", "HalfStorage": "<f2", "DoubleStorage": "<f8"}

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # torch.save's format before the zip files
_LONGEST_NAME = 1000  # characters of a global's module or name
# what protocols 2 to 4 write for plain values, objects and calls; left out is what can allocate at will (BYTEARRAY8),
# reach objects of the running process (EXT1, NEXT_BUFFER) or call by another way (INST, OBJ, NEWOBJ_EX)
_OPCODES = (
    "PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1",
    "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8",
    "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT",
    "SETITEM", "SETITEMS", "EMPTY_SET", "ADDITEMS", "MEMOIZE", "BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT",
    "GLOBAL", "STACK_GLOBAL", "BINPERSID",
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
    """A binary file with its size: a length in it is compared with what is left before memory is asked for."""

    def __init__(self, file: BinaryIO):
        self._file, at = file, file.tell()
        self.size = file.seek(0, io.SEEK_END)
        file.seek(at)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, count: int) -> bytes:
        """`count` bytes, never fewer. Raises EOFError where the file ends before."""
        left = self.size - self.tell()
        if count > left:
            raise EOFError(f"it ends at byte {self.size:,}, {count - left:,} bytes too early")
        return self._file.read(count)

    def readline(self) -> bytes:
        return self._file.readline(_LONGEST_NAME)


class _Opcodes(dict):
    def __missing__(self, code: int) -> None:
        raise pickle.UnpicklingError(f"found opcode {bytes([code])!r}, which no weights need")


# Python's own pickle._Unpickler, not the C one: that allocates by a number in the file (its memo) before reading on
class Unpickler(pickle._Unpickler):
    """Globals come from `builders`; nothing is imported. Make it of a `File`."""

    builders: Mapping[tuple[str, str], Any] = {}

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
        raise RefusedError("found a tensor without a storage, a size and a stride")
    if len(size) != len(stride) or min((offset, *size, *stride)) < 0 or math.prod(size) > storage.size:
        what = shown(f"size {size}, stride {stride}")
        raise RefusedError(f"found a tensor of {what} in a storage of {storage.size:,} numbers")
    if not math.prod(size):
        return np.zeros(size, storage.dtype)
    if offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) >= storage.size:
        what = shown(f"size {size}, stride {stride}")
        raise RefusedError(f"a tensor of {what} ends behind its storage of {storage.size:,} numbers")
    steps = tuple(step * storage.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)


def parameter(data: np.ndarray, *_: Any) -> np.ndarray:
    """torch._utils._rebuild_parameter."""
    return data


def storage(content: bytes) -> np.ndarray:
    """The numbers in what torch.save(storage) writes without zip (torch.storage._load_from_bytes): five pickles
    (magic number, protocol, machine, storage, keys), a count in 8 bytes, the numbers."""
    file = File(io.BytesIO(content))
    legacy_header(file)
    (dtype, key, count), keys = (_StorageUnpickler(file).load() for _ in range(2))
    if keys != [key]:
        raise RefusedError("found several arrays in a storage, expected one")
    numbers = np.frombuffer(content, dtype, offset=file.tell() + len(file.read(8)))
    if numbers.size != count:
        raise RefusedError(f"found a storage with {numbers.size:,} numbers, expected {shown(count)}")
    return numbers


def legacy_header(file: File) -> None:
    """Read the three pickles that torch.save's format before the zip files begins with. Raises RefusedError for
    others."""
    magic, protocol, machine = (Unpickler(file).load() for _ in range(3))
    if magic != _MAGIC or protocol != _PROTOCOL or not machine["little_endian"]:
        raise RefusedError("found another format than torch's of little-endian arrays")


class _StorageUnpickler(Unpickler):
    """The pickles inside a storage: nothing but one array's type."""

    builders = {("torch", name): code for name, code in STORAGES.items()}

    def persistent_load(self, pid: tuple) -> tuple[str, str, int]:
        kind, dtype, key, _, count, view = pid
        plain = isinstance(key, str) and isinstance(count, int) and view is None
        if kind != "storage" or dtype not in STORAGES.values() or not plain:
            raise RefusedError(f"found {shown(kind)} inside a storage, expected one whole array")
        return dtype, key, count
