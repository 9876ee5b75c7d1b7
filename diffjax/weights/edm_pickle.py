"""NVlabs/edm's network pickles (Karras 2022, released checkpoints), read without running anything they hold.

Such a file is a dict whose "ema" is a tree of modules, each pickled as a call of
torch_utils.persistence._reconstruct_persistent_obj(meta), meta = {type, version, module_src, class_name, state}.
The released code executes module_src, the source text of the network; here it is never looked at. Every
global that a file names is either in a short table, and stands for an inert builder of ours, or is refused (see
`weights.pickles`). Tensors are read with numpy, so torch is not needed.

    network = read("edm-cifar10-32x32-uncond-vp.pkl")
    sections(network)             the `model`, `data`, `method` and `sample` sections of a config
    to_params(network, expected)  the weights as our tree
"""

import math
import os
import re
from typing import Any, NamedTuple

import numpy as np

from diffjax.core.types import Params
from diffjax.weights import edm, pickles
from diffjax.weights.pickles import RefusedError

_VERSION = 6  # of torch_utils.persistence, the same in all released files
_FILTER = "resample_filter"
_SCALARS = ("f4", "f8", "i4", "i8", "b1")
_SMALLEST_NUMBER = 2  # bytes of a stored weight, half precision

# options of the released classes -> ours; values that our networks have built in, DDPM++'s are SongUNet's defaults
_OPTIONS = {
    "model_channels": "channels", "channel_mult": "channel_mult", "num_blocks": "num_blocks",
    "attn_resolutions": "attention_sizes", "dropout": "dropout", "augment_dim": "augment_dim",
}  # fmt: skip
_DDPMPP = {"embedding_type": "positional", "encoder_type": "standard", _FILTER: [1, 1], "channel_mult_noise": 1}
_NCSNPP = {"embedding_type": "fourier", "encoder_type": "residual", _FILTER: [1, 3, 3, 1], "channel_mult_noise": 2}
_FIXED = {"channel_mult_emb": 4, "decoder_type": "standard"}
_KINDS = {"EDMPrecond": "edm", "VPPrecond": "vp", "VEPrecond": "ve"}
_VP_CONSTANTS = {"beta_d": 19.9, "beta_min": 0.1, "M": 1000}

# option -> its type where a wrong one would not be noticed before the network is built, and its largest value
_INTEGERS = ("img_resolution", "img_channels", "label_dim", "augment_dim", "model_channels", "num_blocks")
_LISTS = ("channel_mult", "attn_resolutions", _FILTER)
_NUMBERS = ("dropout", "label_dropout")
_LARGEST, _LONGEST, _LONGEST_NAME = 2**20, 32, 200
_NAME = re.compile(r"\w+", re.ASCII)


class Network(NamedTuple):
    """kind: class of the preconditioner, "EDMPrecond". options: the arguments it was made with. attributes: its own
    numbers. weights: float32 arrays by PyTorch name, parameters and buffers."""

    kind: str
    options: dict[str, Any]
    attributes: dict[str, float]
    weights: dict[str, np.ndarray]


def read(path: str | os.PathLike[str]) -> Network:
    """The averaged network ("ema") of a pickle. Raises FileNotFoundError, ValueError for a file that is damaged,
    something else, or names a global that is not on the list."""
    with open(path, "rb") as file:
        try:
            bounded = pickles.File(file)
            found = _Unpickler(bounded).load()
            root = found.get("ema") if isinstance(found, dict) else None
            if not isinstance(root, _Module):
                keys = [pickles.shown(key) for key in found if isinstance(key, str)] if isinstance(found, dict) else []
                what = f"a dict of {sorted(keys)[:5]}" if isinstance(found, dict) else type(found).__name__
                raise RefusedError(f"found {what}, expected a dict whose 'ema' is a network")
            return _network(root, bounded.size)
        except RefusedError as error:
            raise ValueError(f"{path}: {error}; give a network pickle of NVlabs/edm") from error
        except pickles.DAMAGED as error:
            raise ValueError(
                f"{path} is damaged or no network pickle of NVlabs/edm ({type(error).__name__}: "
                f"{pickles.shown(error)}): compare its size, or download it again"
            ) from error


def to_params(network: Network, expected: Params) -> Params:
    """The weights as a tree like `expected` (arrays or shapes).

    The resampling filters are constants of our networks: they are compared with those, and left out. Raises
    ValueError naming every weight that is missing, extra or misshapen, a filter that differs, and a weight that is
    not finite.
    """
    taps = np.asarray(network.options.get(_FILTER, [1, 1]), np.float32)
    constant = np.outer(taps, taps)[None, None] / taps.sum() ** 2
    weights = {}
    for name, array in network.weights.items():
        if not name.endswith("." + _FILTER):
            weights[name] = array
        elif array.shape != constant.shape or not np.allclose(array, constant, rtol=1e-6, atol=0):
            raise ValueError(f"{name} is not the filter of taps {taps.tolist()} that the network was made with")
    params = edm.to_params(weights, expected)
    broken = [name for name, array in weights.items() if not np.isfinite(array).all()]
    if broken:
        raise ValueError(f"{', '.join(broken[:5])}: found NaN or infinity, expected weights; download the file again")
    return params


def sections(network: Network) -> dict[str, dict[str, Any]]:
    """The `model`, `data`, `method` and `sample` sections of the config of a published network; it samples with 18
    Heun noise levels (Karras 2022, table 1), within the range of its preconditioner.

    Raises ValueError for a network or an option that diffjax does not have.
    """
    options, own = dict(network.options), network.attributes
    if network.kind not in _KINDS:
        raise ValueError(f"found a network of class {network.kind}, expected one of {sorted(_KINDS)}")
    data = {"image_size": options.pop("img_resolution"), "channels": options.pop("img_channels")}
    data["num_classes"] = options.pop("label_dim", 0)
    default = "DhariwalUNet" if network.kind == "EDMPrecond" else "SongUNet"
    name, builtin, options = _architecture(options.pop("model_type", default), options)
    model = {"name": name, "precondition": _KINDS[network.kind]}
    if network.kind == "EDMPrecond":
        model["sigma_data"] = own.get("sigma_data", 0.5)
    if network.kind == "VPPrecond":
        builtin = builtin | _VP_CONSTANTS
    method = {"name": "edm", "label_dropout": options.pop("label_dropout", 0)}
    # float16 is a choice of the machine, the range of sigma is in the attributes
    for key in ("use_fp16", "sigma_min", "sigma_max", "sigma_data", "epsilon_t"):
        options.pop(key, None)
    for key, value in options.items():
        if key in _OPTIONS:
            model[_OPTIONS[key]] = value
        elif key not in builtin or value != builtin[key]:
            have = f"has {builtin[key]!r} built in" if key in builtin else "has no such option"
            raise ValueError(f"the network was made with {key}={value!r}, and {name} here {have}")
    sigma_min, sigma_max = max(0.002, own.get("sigma_min", 0.0)), min(80.0, own.get("sigma_max", math.inf))
    levels = {"grid": "polynomial", "sigma_min": sigma_min, "sigma_max": sigma_max, "to_zero": True}
    return {"data": data, "model": model, "method": method, "sample": {"solver": "heun", "num_steps": 18, **levels}}


def _architecture(model_type: str, options: dict[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """(our name, options built into it, options with the released defaults of those)."""
    if model_type == "DhariwalUNet":
        return "adm", {"channel_mult_emb": _FIXED["channel_mult_emb"]}, options
    if model_type != "SongUNet":
        raise ValueError(f"found model_type {model_type!r}, expected SongUNet or DhariwalUNet")
    options = _DDPMPP | options
    name, builtin = ("ncsnpp", _NCSNPP) if options["embedding_type"] == "fourier" else ("ddpmpp", _DDPMPP)
    return name, builtin | _FIXED, options


# The tree of modules ---------------------------------------------------------------------------------------------


def _network(root: "_Module", file_size: int) -> Network:
    options = root.state.get("_init_kwargs")
    if not isinstance(options, dict) or root.state.get("_init_args"):
        raise RefusedError("the network does not say by which named options it was made (_init_kwargs)")
    absent = [key for key in ("img_resolution", "img_channels") if key not in options]
    if absent:
        raise RefusedError(f"found a {root.kind} made without {absent}, expected a preconditioner of EDM")
    options = {key: _option(key, value) for key, value in options.items()}
    attributes = {key: n for key, n in root.state.items() if isinstance(n, int | float) and not key.startswith("_")}
    arrays = _arrays(root)
    count = sum(array.size for array in arrays.values())
    if count * _SMALLEST_NUMBER > file_size:
        raise RefusedError(f"found {count:,} weights in a file of {file_size:,} bytes, expected two bytes each or more")
    if options.get("num_blocks", 0) > len(arrays):
        raise RefusedError(f"found num_blocks={options['num_blocks']} with {len(arrays)} arrays, expected some in each")
    weights = {name: np.asarray(array, np.float32) for name, array in arrays.items()}
    return Network(root.kind, options, attributes, weights)


def _option(key: Any, value: Any) -> Any:
    """An option as a number, a text or a short list of integers. Raises RefusedError for anything else."""
    items = list(value) if isinstance(value, list | tuple) else value
    if key in _LISTS:
        fits = isinstance(items, list) and len(items) <= _LONGEST and all(map(_is_integer, items))
    elif key in _INTEGERS:
        fits = _is_integer(items)
    elif key in _NUMBERS:
        fits = isinstance(items, int | float)
    else:
        fits = isinstance(items, int | float | None) or (isinstance(items, str) and len(items) <= _LONGEST)
    if not isinstance(key, str) or not fits:
        kind = "a list of integers" if key in _LISTS else "an integer" if key in _INTEGERS else "a number or name"
        found = value if isinstance(value, int | float) else type(value).__name__
        raise RefusedError(f"the network was made with {pickles.shown(key)}={pickles.shown(found)}, expected {kind}")
    return items


def _is_integer(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST


def _arrays(root: "_Module") -> dict[str, np.ndarray]:
    """Parameters and buffers by name, as stored. Raises RefusedError for anything else in their place, and for a module
    in two places, which can make a small file endless."""
    found: dict[str, np.ndarray] = {}
    waiting, seen = [("", root)], {id(root)}
    while waiting:
        prefix, module = waiting.pop()
        for name, array in (*module.state["_parameters"].items(), *module.state["_buffers"].items()):
            if isinstance(array, np.ndarray):
                found[_joined(prefix, name)] = array
            elif array is not None:
                raise RefusedError(f"{_joined(prefix, name)} is a {type(array).__name__}, expected a tensor")
        for name, child in module.state["_modules"].items():
            if child is None:
                continue
            if not isinstance(child, _Module) or id(child) in seen:
                what = "in two places" if isinstance(child, _Module) else f"a {type(child).__name__}"
                raise RefusedError(f"{_joined(prefix, name)} is {what}, expected a module of its own")
            seen.add(id(child))
            waiting.append((_joined(prefix, name) + ".", child))
    return found


def _joined(prefix: str, name: Any) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(prefix + name) > _LONGEST_NAME:
        raise RefusedError(f"found {pickles.shown(prefix)} with a part {pickles.shown(name)}, expected a short name")
    return prefix + name


# Inert builders --------------------------------------------------------------------------------------------------


class _Module(pickles.Buildable):
    """A module as its class's name and its attributes."""

    def __init__(self, kind: str = "ModuleDict"):  # the one class of torch itself in these networks
        self.kind: str = kind
        self.state: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise RefusedError(f"found a {self.kind} whose state is a {type(state).__name__}, expected a dict")
        self.state = state


class ScalarType(pickles.Buildable):
    """numpy.dtype of a scalar; of its state only the byte order is of use here."""

    def __init__(self, code: str, *_: Any):
        if code not in _SCALARS:
            raise RefusedError(f"found a number of type {pickles.shown(code)}, expected one of {_SCALARS}")
        self.code = "<" + code

    def __setstate__(self, state: Any) -> None:
        if state[1] not in ("<", "|"):
            raise RefusedError(f"found numbers of byte order {pickles.shown(state[1])}, expected little-endian")


def _persistent(meta: dict[str, Any]) -> _Module:
    if meta["type"] != "class" or meta["version"] != _VERSION:
        kind, version = pickles.shown(meta["type"]), pickles.shown(meta["version"])
        raise RefusedError(f"found a persistent {kind} of version {version}, expected class of version {_VERSION}")
    module = _Module(pickles.shown(meta["class_name"]))
    module.__setstate__(meta["state"])
    return module


def _scalar(kind: ScalarType, content: bytes) -> Any:
    (value,) = np.frombuffer(content, kind.code)
    return value.item()


class _Unpickler(pickles.Unpickler):
    builders = {
        ("torch_utils.persistence", "_reconstruct_persistent_obj"): pickles.Function(_persistent),
        ("torch.nn.modules.container", "ModuleDict"): pickles.Function(_Module),
        ("torch._utils", "_rebuild_parameter"): pickles.Function(pickles.parameter),
        ("torch._utils", "_rebuild_tensor_v2"): pickles.Function(pickles.tensor),
        ("torch.storage", "_load_from_bytes"): pickles.Function(pickles.storage),
        # filled afterwards, item by item; a call with content would copy it, again and again where a file asks for it
        ("dnnlib.util", "EasyDict"): pickles.Function(lambda: {}),
        ("collections", "OrderedDict"): pickles.Function(lambda: {}),
        ("builtins", "set"): pickles.Function(lambda *_: None),  # of names of buffers, not needed
        ("numpy", "dtype"): pickles.Function(ScalarType),
        ("numpy.core.multiarray", "scalar"): pickles.Function(_scalar),
        ("numpy._core.multiarray", "scalar"): pickles.Function(_scalar),
    }
