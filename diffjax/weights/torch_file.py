"""PyTorch weight files read with numpy: neither torch nor anything that a file names is ever executed.

A file of torch.save is a pickle that describes tensors as (storage, offset, size, stride), beside the raw numbers of
the storages; since torch 1.6 the parts are members of a zip archive, before they followed each other in one stream.
Unpickling here can only make plain containers and such descriptions: each global that a file names is in a short
table, and stands for an inert builder of ours, or is refused; each operation is on a list, too. Arrays are views of
the bytes read, with sizes checked before, so a file cannot ask for more memory than its own length.

    weights = load("vgg16.pth")                                # {"features.0.weight": float32 (64, 3, 3, 3), ...}
    weights = load("checkpoint.pt")["state_dict"]              # nested dicts stay nested
"""

import os
import struct
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

from diffjax.weights import pickles
from diffjax.weights.pickles import RefusedError

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"  # how the files begin
# what reading bytes that are no such file, or half of one, raises
_DAMAGED = (*pickles.DAMAGED, zipfile.BadZipFile, struct.error, RuntimeError, OSError)
_AGAIN = "compare its size, or download it again"
_EXPECTED = (
    "give a state dict as torch.save or safetensors writes it: where you trust the file, load it in torch and save "
    "model.state_dict()"
)


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
                raise RefusedError("found another kind of file")
            if start.startswith(_ZIP):
                root, arrays = _load_zip(file)
            else:
                root, arrays = pickles.legacy(pickles.File(file), _Unpickler)
            found = _materialise(root, arrays)
            if not isinstance(found, dict):
                raise RefusedError(f"found a {type(found).__name__}, expected a dict of tensors")
            return found
        except RefusedError as error:
            raise ValueError(f"{path}: {error}; {_EXPECTED}") from error
        except _DAMAGED as error:
            raise ValueError(
                f"{path} is damaged or no weight file of torch.save ({type(error).__name__}: {pickles.shown(error)}): "
                f"{_AGAIN}"
            ) from error


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


def _load_zip(file: BinaryIO) -> tuple[Any, dict[str, np.ndarray]]:
    """<name>/data.pkl describes the tensors, <name>/data/<key> are the storages, not compressed."""
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        if sum(info.file_size for info in members.values()) > pickles.File(file).size or any(
            info.compress_type != zipfile.ZIP_STORED for info in members.values()
        ):
            raise RefusedError("found a zip file that is compressed or larger than itself, expected one of torch.save")
        description = [name for name in members if name.endswith("/data.pkl")]
        folder = description[0].removesuffix("data.pkl") if len(description) == 1 else None
        if folder is None or f"{folder}constants.pkl" in members:
            names = [pickles.shown(name) for name in sorted(members)[:3]]
            raise RefusedError("found " + (f"a zip file of {names}" if folder is None else "a TorchScript archive"))
        order = archive.read(f"{folder}byteorder") if f"{folder}byteorder" in members else b"little"
        if order != b"little":
            raise RefusedError(f"found numbers of byte order {order[:10]!r}, expected little-endian")
        reader = _Unpickler(pickles.File(archive.read(f"{folder}data.pkl")))
        root, arrays = reader.load(), {}
        for key, storage in reader.storages.items():
            size, expected = members[f"{folder}data/{key}"].file_size, f"{storage.count:,} {storage.dtype} numbers"
            if size != storage.count * storage.dtype.itemsize:
                raise RefusedError(f"storage {pickles.shown(key)} has {size:,} bytes, expected {expected}")
            arrays[key] = np.frombuffer(archive.read(f"{folder}data/{key}"), storage.dtype)
        return root, arrays


# From descriptions to arrays ------------------------------------------------------------------------------------------


class _Tensor(pickles.Buildable):
    """A tensor whose storage is not yet read. Its state, in old files whether a gradient is wanted and the hooks, is
    dropped."""

    def __init__(self, storage: pickles.Storage, *place: Any):
        self.storage, self.place = storage, place

    def __setstate__(self, state: Any) -> None:
        pass


class _Dict(dict, pickles.Buildable):
    """A dict that files may set attributes on (state_dict() has `_metadata`): they are dropped."""

    def __init__(self, items: list | None = None):
        super().__init__(items or ())
        if items:
            items.clear()  # Python 2 passes them; moved, as a file can ask again and again for copies

    def __setstate__(self, state: Any) -> None:
        pass


def _materialise(root: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """`root` with arrays in place of descriptions; what it refers to twice is made once."""
    done = {}

    def build(node: Any) -> Any:
        if isinstance(node, _Tensor):
            numbers = node.storage.of(arrays) if isinstance(node.storage, pickles.Storage) else None
            return pickles.tensor(numbers, *node.place)
        if node is None or isinstance(node, bool | int | float | str):
            return node
        if type(node) not in (dict, _Dict, list, tuple):
            raise RefusedError(f"found a {type(node).__name__} among the weights, expected tensors")
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


class _Unpickler(pickles.StorageUnpickler):
    builders = pickles.StorageUnpickler.builders | {
        ("collections", "OrderedDict"): pickles.Function(_Dict),
        ("torch._utils", "_rebuild_tensor"): pickles.Function(_Tensor),
        ("torch._utils", "_rebuild_tensor_v2"): pickles.Function(_Tensor),
        ("torch._utils", "_rebuild_parameter"): pickles.Function(pickles.parameter),
        # as torch before 0.4 pickled it, torchvision's vgg16-397923af.pth among them
        ("torch.nn.parameter", "Parameter"): pickles.Function(pickles.parameter),
    }
