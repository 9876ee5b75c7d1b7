"""Weights of model folders and single files by name, each array read when it is asked for; and written back.

    weights = read("sd15/unet")                             # a part of a diffusers or transformers folder, shards too
    weights = under(read("v1-5.safetensors"), "model.diffusion_model.")
    params = keymap.to_params(TABLE, weights, shapes, put=placed(shardings))
    save("unet.safetensors", keymap.to_weights(TABLE, params))

Files are safetensors, or PyTorch's read as `torch_file` does: nothing in them is executed. A safetensors file is never
whole in memory, however many gigabytes it has.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.core import trees
from diffjax.weights import torch_file

# what diffusers, then transformers call the file of a folder, with shards in FILE.index.json
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_ENDS = (".safetensors", ".bin")
CONFIG = "config.json"


class Weights(Mapping[str, Any]):
    """Names to arrays, or to entries with `shape` and `dtype` that numpy.asarray reads. `source` says where they are."""

    def __init__(self, entries: Mapping[str, Any], source: str):
        self.entries, self.source = entries, source

    def __getitem__(self, name: str) -> Any:
        return self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


class _Lazy:
    """One tensor of an open safetensors file."""

    def __init__(self, file: Any, name: str):
        self.file, self.name, self.shape = file, name, tuple(file.get_slice(name).get_shape())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.file.get_tensor(self.name)
        return array if dtype is None else array.astype(dtype)


def read(path: str | os.PathLike[str], variant: str = "") -> Weights:
    """The weights of a file, or of a folder that holds one model: diffusion_pytorch_model or model, .safetensors before
    .bin, in shards or not. variant: as in diffusion_pytorch_model.fp16.safetensors.

    Raises FileNotFoundError for a path that is absent or holds none, and for a missing shard; ValueError for a damaged
    file, and names that two shards have.
    """
    path = _found(Path(path), variant)
    return Weights(_shards(path) if path.suffix == ".json" else _file(path), str(path))


def sha256(path: str | os.PathLike[str]) -> str:
    """Hexadecimal digest of the bytes that `read` reads; of shards, one after the other in the order of their names.
    Raises FileNotFoundError as `read`."""
    path, digest = _found(Path(path)), hashlib.sha256()
    for part in _shard_paths(path) if path.suffix == ".json" else [path]:
        with open(part, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def _found(path: Path, variant: str = "") -> Path:
    """The file, or the index of shards, of what the user named."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is absent: give a model folder, or a .safetensors, .bin, .pt, .ckpt or .pth file")
    end = f".{variant}" if variant else ""
    for stem in _STEMS:
        for suffix in _ENDS:
            single, index = path / f"{stem}{end}{suffix}", path / f"{stem}{suffix}.index{end}.json"
            if single.is_file():
                return single
            if index.is_file():
                return index
    have = sorted(file.name for file in path.iterdir())[:10]
    raise FileNotFoundError(
        f"{path} holds no {_STEMS[0]}{end}.safetensors or {_STEMS[1]}{end}.safetensors, nor a .bin file; found {have}: "
        "give the folder of one part, for example MODEL/unet" + (f", or leave variant={variant!r} out" if variant else "")
    )


def under(weights: Weights, prefix: str) -> Weights:
    """Those whose names begin with `prefix`, without it. Raises ValueError where there is none."""
    found = {name.removeprefix(prefix): entry for name, entry in weights.entries.items() if name.startswith(prefix)}
    if not found:
        starts = sorted({name.split(".")[0] for name in weights})[:10]
        raise ValueError(f"{weights.source} has no weights under {prefix!r}; its names begin with {starts}")
    return Weights(found, f"{weights.source} ({prefix}...)")


def config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """config.json of a folder of one model. Raises FileNotFoundError where it is absent, ValueError where it is no dict."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path} is absent: it says how the model is built; give a folder as diffusers writes it")
    return read_json(path)


def placed(shardings: Any) -> Callable[[str, np.ndarray], Any]:
    """For `keymap.to_params`: each leaf goes to its devices at once, by a tree of shardings like the parameters."""
    import jax

    by_path = trees.flatten(shardings)
    return lambda path, array: jax.device_put(array, by_path[path])


def save(path: str | os.PathLike[str], weights: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write a .safetensors file, whole or not at all. Raises FileExistsError where it exists."""
    import safetensors.numpy

    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists and is not overwritten: choose another name, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    arrays = {name: np.asarray(array, order="C") for name, array in weights.items()}
    try:
        safetensors.numpy.save_file(arrays, unfinished, metadata={"format": "pt", **(metadata or {})})
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _file(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        is_safetensors = file.read(9)[8:9] == b"{"
    if is_safetensors:
        return _open(path)
    found = torch_file.load(path)
    while isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    others = sorted(str(name) for name, value in found.items() if not hasattr(value, "shape"))
    if others:
        raise ValueError(
            f"{path} holds more than weights: {others[:10]}; save the dict of weights alone, torch.save(model.state_dict(), FILE)"
        )
    return found


def metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """What a .safetensors file says beside its weights. Raises FileNotFoundError, ValueError for a damaged file."""
    return _safetensors(_found(Path(path))).metadata() or {}


def _open(path: Path) -> dict[str, Any]:
    file = _safetensors(path)
    return {name: _Lazy(file, name) for name in file.keys()}  # noqa: SIM118, it is no dict


def _safetensors(path: Path) -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(f"{path} needs the package safetensors: pip install 'diffjax[weights]'") from error
    try:
        return safetensors.safe_open(path, "numpy")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): compare its size, or download it again") from error


def _shard_paths(index: Path) -> list[Path]:
    """In the order of their names."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict):
        raise ValueError(f"{index} has no weight_map: get it again")
    shards = sorted(set(names.values()))
    if odd := [shard for shard in shards if Path(shard).name != shard]:
        raise ValueError(f"{index} names files outside its folder: {odd[:3]}; get it again")
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{index.parent} lacks {len(missing)} of {len(shards)} shards: {', '.join(missing[:5])}; get them again"
        )
    return [index.parent / shard for shard in shards]


def _shards(index: Path) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for shard in _shard_paths(index):
        found = _file(shard)
        if twice := sorted(set(found) & set(entries)):
            raise ValueError(f"{shard} repeats {twice[:3]} of another shard: get the folder again")
        entries |= found
    if absent := sorted(set(read_json(index)["weight_map"]) - set(entries)):
        raise ValueError(f"{index.parent} lacks {len(absent)} weights that its index names: {absent[:5]}; get it again")
    return entries


def read_json(path: Path) -> dict[str, Any]:
    """The names and values of a JSON file. Raises ValueError, naming it, for one that is damaged or holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): get it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, expected names and values: get it again")
    return found
