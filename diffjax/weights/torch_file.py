"""PyTorch weight files read with numpy: neither torch nor anything that a file names is ever executed.

A file of torch.save is a pickle that describes tensors as (storage, offset, size, stride), beside the raw numbers of
the storages; since torch 1.6 the parts are members of a zip archive, before they followed each other in one stream.
Unpickling here can only make plain containers and such descriptions: each global that a file names is in a short
table, and stands for an inert builder of ours, or is refused; each operation is on a list, too. Arrays are views of
the bytes read, with sizes checked before, so a file cannot ask for more memory than its own length.

    weights = load("vgg16.pth")                                # {"features.0.weight": float32 (64, 3, 3, 3), ...}
    weights = load("checkpoint.pt")["state_dict"]              # nested dicts stay nested
"""

import io
import math
import os
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # torch.save's stream before the zip files
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"  # how the files begin
_DTYPES = {
    "FloatStorage": np.dtype("<f4"), "HalfStorage": np.dtype("<f2"), "DoubleStorage": np.dtype("<f8"),
    "BFloat16Storage": np.dtype(jnp.bfloat16), "LongStorage": np.dtype("<i8"), "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"), "CharStorage": np.dtype("i1"), "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}  # fmt: skip
# what torch.save's pickles consist of: protocols 2 to 4, strings of Python 2, and NEWOBJ, which torch before 0.4 wrote
_OPERATIONS = frozenset(
    "PROTO FRAME STOP MARK BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET NONE NEWTRUE NEWFALSE BININT BININT1 BININT2"
    " LONG1 BINFLOAT BINSTRING SHORT_BINSTRING BINUNICODE SHORT_BINUNICODE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3"
    " EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD BINPERSID".split()
)
# what reading bytes that are no such file, or half of one, raises
_DAMAGED = (
    pickle.UnpicklingError, zipfile.BadZipFile, struct.error, EOFError, AttributeError, IndexError, KeyError, TypeError,
    ValueError, OverflowError, MemoryError, RuntimeError, OSError,
)  # fmt: skip
_SAVE, _AGAIN = "save model.state_dict() with torch.save", "compare its size, or download it again"
_OTHER = f"found another kind of file, expected one of torch.save or safetensors: {_SAVE}"


class RefusedError(ValueError):
    """The file asks for something that reading weights does not need, or is of another kind."""


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The dict that torch.save wrote (zip or older stream) or a .safetensors file holds, told apart by the first bytes.

    Tensors and parameters become read-only arrays of their shape and type, bfloat16 included; dicts inside stay
    dicts, numbers, texts, lists and tuples are kept. Raises FileNotFoundError; ValueError for a file that is damaged,
    something else, or names a global that is not in the table; ImportError where safetensors is needed and absent.
    """
    with open(path, "rb") as file:
        start = file.read(16)
        file.seek(0)
        try:
            if start[8:9] == b"{":  # behind the length of a JSON header
                return _load_safetensors(path)
            if not start.startswith((_ZIP, _PICKLE)):
                raise RefusedError(_OTHER)
            found = _load_zip(file) if start.startswith(_ZIP) else _load_stream(file)
        except RefusedError as error:
            raise ValueError(f"{path}: {error}") from error
        except _DAMAGED as error:
            raise ValueError(
                f"{path} is damaged or no weight file of torch.save ({type(error).__name__}: {error}): {_AGAIN}"
            ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: found a {type(found).__name__}, expected a dict of tensors: {_SAVE}")
    return found


def _load_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(f"{path} needs the package safetensors: pip install 'diffjax[weights]'") from error
    try:
        return safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise RefusedError(f"damaged ({error}): {_AGAIN}") from error


def _load_zip(file: BinaryIO) -> Any:
    """<name>/data.pkl describes the tensors, <name>/data/<key> are the storages, not compressed."""
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        length = os.fstat(file.fileno()).st_size
        if sum(info.file_size for info in members.values()) > length or any(
            info.compress_type != zipfile.ZIP_STORED for info in members.values()
        ):
            raise RefusedError("found a zip file that is compressed or larger than itself, expected one of torch.save")
        description = [name for name in members if name.endswith("/data.pkl")]
        folder = description[0].removesuffix("data.pkl") if len(description) == 1 else None
        if folder is None or f"{folder}constants.pkl" in members:
            kind = f"a zip file of {sorted(members)[:3]}" if folder is None else "a TorchScript archive"
            raise RefusedError(f"found {kind}, expected a state dict: {_SAVE}")
        order = archive.read(f"{folder}byteorder") if f"{folder}byteorder" in members else b"little"
        if order != b"little":
            raise RefusedError(f"found numbers of byte order {order!r}, expected little-endian: {_SAVE}")
        root, storages = _unpickle(io.BytesIO(archive.read(f"{folder}data.pkl")))
        return _materialise(root, {key: archive.read(f"{folder}data/{key}") for key in storages}, storages)


def _load_stream(file: BinaryIO) -> Any:
    """Five pickles (magic number, protocol, machine, description, keys of storages), then a count and bytes per key."""
    magic, _ = _unpickle(file)
    if magic != _MAGIC:
        raise RefusedError(_OTHER)
    protocol, _ = _unpickle(file)
    machine, _ = _unpickle(file)
    if protocol != _PROTOCOL or machine["little_endian"] is not True:
        raise RefusedError(f"found protocol {protocol!r} of {machine!r}, expected {_PROTOCOL}, little-endian: {_SAVE}")
    root, storages = _unpickle(file)
    keys, _ = _unpickle(file)
    if len(keys) != len(set(keys)) or set(keys) != set(storages):
        raise RefusedError(f"found {len(keys)} storages, expected the {len(storages)} that the tensors name")
    contents = {}
    for key in keys:
        count, storage = int.from_bytes(file.read(8), "little", signed=True), storages[key]
        left = os.fstat(file.fileno()).st_size - file.tell()
        if count != storage.count or count * storage.dtype.itemsize > left:
            raise RefusedError(
                f"storage {key} of {storage.count} {storage.dtype} has {count} numbers, and {left} bytes are left: "
                f"the file is damaged, {_AGAIN}"
            )
        contents[key] = file.read(count * storage.dtype.itemsize)
    return _materialise(root, contents, storages)


# From descriptions to arrays ------------------------------------------------------------------------------------------


class _Storage(NamedTuple):
    """`count` numbers of `kind`; a view counts from `start` within them."""

    kind: str
    key: str
    count: int
    start: int = 0
    size: int = 0

    @property
    def dtype(self) -> np.dtype:
        return _DTYPES[self.kind]


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def __setstate__(self, state: Any) -> None:
        """Old files set whether a gradient is wanted and the hooks: neither is of use here."""


class _Dict(dict):
    """A dict that files may set attributes on (state_dict() has `_metadata`): they are dropped."""

    def __setstate__(self, state: Any) -> None:
        pass


def _materialise(root: Any, contents: Mapping[str, bytes], storages: Mapping[str, _Storage]) -> Any:
    """`root` with arrays in place of descriptions; what it refers to twice is made once."""
    arrays, done = {}, {}
    for key, storage in storages.items():
        if len(contents[key]) != storage.count * storage.dtype.itemsize:
            found, expected = len(contents[key]), f"{storage.count} {storage.dtype}"
            raise RefusedError(f"storage {key} has {found} bytes, expected {expected}: {_AGAIN}")
        arrays[key] = np.frombuffer(contents[key], storage.dtype)

    def build(node: Any) -> Any:
        if isinstance(node, _Tensor):
            return _array(arrays[node.storage.key], node)
        if node is None or isinstance(node, bool | int | float | str):
            return node
        if type(node) not in (dict, _Dict, list, tuple):
            raise RefusedError(f"found a {type(node).__name__} among the weights, expected tensors: {_SAVE}")
        if id(node) not in done:
            if isinstance(node, dict):
                done[id(node)] = {_key(key): build(value) for key, value in node.items()}
            else:
                done[id(node)] = type(node)(map(build, node))
        return done[id(node)]

    return build(root)


def _key(key: Any) -> str | int:
    if not isinstance(key, str | int):
        raise RefusedError(f"found a key of type {type(key).__name__}, expected names")
    return key


def _array(numbers: np.ndarray, tensor: _Tensor) -> np.ndarray:
    """View of the storage `numbers`."""
    storage, offset, size, stride = tensor
    numbers = numbers[storage.start : storage.start + storage.size]
    if len(size) != len(stride) or min((offset, *size, *stride)) < 0 or math.prod(size) > numbers.size:
        raise RefusedError(f"found a tensor of size {size}, stride {stride} in a storage of {numbers.size} numbers")
    if not math.prod(size):
        return numbers[:0].reshape(size)
    if offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) >= numbers.size:
        raise RefusedError(f"a tensor of size {size}, stride {stride} ends behind its {numbers.size} numbers")
    strides = tuple(step * numbers.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(numbers[offset:], size, strides, writeable=False)


# Inert builders -------------------------------------------------------------------------------------------------------


class _Function:
    """A function that a file can call and cannot change: pickles may set attributes on whatever they name."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable):
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setstate__(self, state: Any) -> None:
        raise RefusedError("refused: it sets attributes on a function, which no weights need")


@_Function
def _tensor(storage: _Storage, offset: int, size: tuple, stride: tuple, *_: Any) -> _Tensor:
    if type(storage) is not _Storage or not all(type(number) is int for number in (offset, *size, *stride)):
        raise RefusedError("found a tensor without a storage or a size in whole numbers")
    return _Tensor(storage, offset, tuple(size), tuple(stride))


@_Function
def _parameter(tensor: _Tensor, *_: Any) -> _Tensor:
    return tensor


class _Parameter:
    """torch.nn.Parameter as torch before 0.4 pickled it, torchvision's vgg16-397923af.pth among them."""

    def __new__(cls, tensor: _Tensor, *_: Any) -> _Tensor:
        return tensor

    def __setstate__(self, state: Any) -> None:  # so that a file cannot set attributes of the class
        pass


_BUILDERS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Function(_Dict),
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.nn.parameter", "Parameter"): _Parameter,
} | {("torch", name): name for name in _DTYPES}


class _Unpickler(pickle.Unpickler):
    """Globals come from the table; nothing is imported. `storages` collects what the tensors name, by key."""

    def __init__(self, file: BinaryIO):
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _BUILDERS:
            raise RefusedError(
                f"refused: it names {module}.{name}, which no weights need; nothing of it was executed. "
                "If the file is a whole model or optimiser and you trust it, load it in torch and " + _SAVE
            )
        return _BUILDERS[module, name]

    def persistent_load(self, pid: tuple) -> _Storage:
        tag, kind, key, _, count = pid[:5]
        view = pid[5] if len(pid) > 5 else None  # streams only: (key of the view, start, size)
        _, start, size = (None, 0, count) if view is None else view
        if tag != "storage" or kind not in _DTYPES or type(key) is not str:
            raise RefusedError(f"found {tag!r} of type {kind!r}, expected a storage of {sorted(_DTYPES)}")
        if not all(type(n) is int and n >= 0 for n in (count, start, size)) or start + size > count:
            raise RefusedError(f"found a storage of {count!r} numbers, of which {size!r} from {start!r} are used")
        known = self.storages.setdefault(key, _Storage(kind, key, count))
        if (known.kind, known.count) != (kind, count):
            raise RefusedError(f"storage {key} has two descriptions: {known.count} {known.kind}, {count} {kind}")
        return _Storage(kind, key, count, start, size)


def _unpickle(file: BinaryIO) -> tuple[Any, dict[str, _Storage]]:
    """The next pickle of `file` and the storages it names; a first pass over its operations executes nothing."""
    start = file.tell()
    for number, (operation, argument, _) in enumerate(pickletools.genops(file)):
        if operation.name not in _OPERATIONS:
            raise RefusedError(f"refused: its pickle has the operation {operation.name}, which no weights need")
        # the unpickler's table of stored objects is as long as the largest index
        if operation.name in ("BINPUT", "LONG_BINPUT") and argument > number:
            raise RefusedError(f"refused: its pickle stores an object under {argument}, expected at most {number}")
    file.seek(start)
    unpickler = _Unpickler(file)
    return unpickler.load(), unpickler.storages
