"""Networks by the names of a `model` section: denoisers, their fresh parameters, and their bottlenecks."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.build import video_networks
from diffjax.core import names, prediction, schedules
from diffjax.core.types import Array, Cond, Denoiser, Key, Network, Params
from diffjax.data import sources
from diffjax.models import dit, edm_unet, mdt, mmdit, motion_unet, pixart, svd, toy, unet
from diffjax.nn import control, functional
from diffjax.sampling.learned_variance import VarianceDenoiser
from diffjax.video.guided import VideoNetwork


def _residual_mlp(
    data: sources.DataShape, *, width: int = 256, depth: int = 4, dropout: float = 0.0, step_condition: bool = False,
    zero_init_step: bool = False, guidance_condition: bool = False, embedding_width: int = 0, remat: str = "",
    skip: bool = False,
) -> Callable:  # fmt: skip
    return functools.partial(
        toy.ResidualMLP, data.shape, width, depth, data.num_classes, dropout, step_condition, zero_init_step,
        guidance_condition, embedding_width, remat, skip,
    )  # fmt: skip


def _edm_unet(network: Callable, fixed: Mapping[str, Any], data: sources.DataShape, *, augment_dim: int = 0,
              compute_dtype: str = "", learned_variance: bool = False, **options: Any) -> Callable:  # fmt: skip
    dtype = jnp.dtype(compute_dtype) if compute_dtype else None
    return functools.partial(
        network, data.image_size, data.channels, data.channels * (1 + learned_variance), num_classes=data.num_classes,
        augment_dim=augment_dim, dtype=dtype, **fixed, **options,
    )  # fmt: skip


def _latent(network: Callable, data: sources.DataShape, *, compute_dtype: str = "", learned_variance: bool = False,
            **options: Any) -> Callable:  # fmt: skip
    return functools.partial(
        network, data.image_size, data.channels, out_channels=data.channels * (1 + learned_variance),
        num_classes=data.num_classes, dtype=jnp.dtype(compute_dtype) if compute_dtype else None, **options,
    )  # fmt: skip


_NCSNPP = {"embedding": "fourier", "encoder": "residual", "taps": (1, 3, 3, 1), "noise_channels_mult": 2}

LATENT = {"unet": unet.UNet, "dit": dit.DiT, "mdt": mdt.MDT, "pixart": pixart.PixArt, "mmdit": mmdit.MMDiT}

# name -> function of the data's shape and options, which returns a constructor of the module that takes rngs
MODELS: dict[str, Callable[..., Callable]] = {
    "residual_mlp": _residual_mlp,
    "ddpmpp": functools.partial(_edm_unet, edm_unet.SongUNet, {}),
    "ncsnpp": functools.partial(_edm_unet, edm_unet.SongUNet, _NCSNPP),
    "adm": functools.partial(_edm_unet, edm_unet.DhariwalUNet, {}),
    **{name: functools.partial(_latent, network) for name, network in LATENT.items()},
    "motion_unet": functools.partial(video_networks.motion_unet, motion_unet.MotionUNet),
    "svd": functools.partial(video_networks.svd, svd.SVDUNet),
}


def _predicts(kind: str) -> Callable[..., Denoiser]:
    default = "flow" if kind == "velocity" else "linear"

    def wrap(
        network: Network, process: str = default, label_scale: float = 1.0, resolution_scale: float = 1.0
    ) -> Denoiser:
        """A network that predicts `kind` under a process of `schedules.PROCESSES`, rescaled. Its noise label is the time,
        0..1 of the flow and 0..T-1 of a table, times label_scale."""
        schedule = schedules.named(process, resolution_scale)
        label = schedule.label if isinstance(schedule, schedules.Discrete) else lambda u: u
        at = schedules.process(schedule, lambda u: label_scale * label(u))
        return prediction.process_denoiser(network, kind, at)

    return wrap


# name -> function of the network and options of the `model` section, which returns its denoiser
PRECONDITIONS: dict[str, Callable[..., Denoiser]] = {
    "edm": prediction.edm_denoiser,
    "edm_v": prediction.edm_v_denoiser,
    "consistency": prediction.consistency_function,
    "vp": prediction.vp_denoiser,
    "ve": prediction.ve_denoiser,
    **{kind: _predicts(kind) for kind in ("eps", "x0", "v", "velocity")},
}


def denoiser(model: Mapping[str, Any], data: sources.DataShape) -> tuple[Denoiser, Callable[[Key], Params]]:
    """(denoise, init): the network of a `model` section as a denoiser, and its fresh parameters.

    Raises ValueError for unknown names and options.
    """
    wrap, network, init = _parts(model, data)
    if variance := variance_denoiser(model, data):
        return lambda *args, **options: variance(*args, **options)[0], init
    return wrap(network), init


def video_network(
    model: Mapping[str, Any], data: sources.DataShape
) -> tuple[VideoNetwork, Callable[[Network], Denoiser]]:
    """The network of video of a `model` section for `video.pipelines`, and what makes a denoiser of it."""
    parts = [_parts(model, data, method) for method in ("__call__", "keep", "reuse")]
    return VideoNetwork(*(network for _, network, _ in parts)), parts[0][0]


def masked_denoisers(model: Mapping[str, Any], data: sources.DataShape, ratio: float, count: int) -> tuple[Denoiser, ...]:
    """The masked passes of an MDT, one for each number of tokens that `mdt.buckets` keeps; with model.learned_variance
    as `variance_denoiser` has them. () where ratio is 0. Raises ValueError for another network."""
    if not ratio:
        return ()
    if model["name"] != "mdt":
        raise ValueError(f"method.mask_ratio={ratio} is of model.name='mdt', found {model['name']!r}: leave it out")
    if model.get("learned_variance"):
        make = lambda keep: variance_denoiser(model, data, keep=keep)  # noqa: E731
    else:
        wrap, network, _ = _parts(model, data)
        make = lambda keep: wrap(functools.partial(network, keep=keep))  # noqa: E731
    tokens = (data.image_size // model.get("patch", 2)) ** 2
    return tuple(make(keep) for keep in mdt.buckets(tokens, ratio, count=count))


def variance_denoiser(model: Mapping[str, Any], data: sources.DataShape, **options: Any) -> VarianceDenoiser | None:
    """(D, v) of a network with model.learned_variance, whose second half of channels is 2 v - 1; None for others. options:
    of the network's call."""
    if not model.get("learned_variance"):
        return None
    wrap, both, _ = _parts(model, data)

    def variance(
        params: Params, x: Array, sigma: Array, cond: Cond | None = None, key: Key | None = None
    ) -> tuple[Array, Array]:
        seen = []

        def network(params: Params, x: Array, noise_label: Array, cond: Cond | None, key: Key | None) -> Array:
            prediction, second = jnp.split(both(params, x, noise_label, cond, key, **options), 2, axis=-1)
            seen.append(second)
            return prediction

        data = wrap(network)(params, x, sigma, cond, key)
        return data, (seen[0].astype(x.dtype) + 1) / 2

    return variance


def features(model: Mapping[str, Any], data: sources.DataShape) -> tuple[Callable[..., Array], int]:
    """(features, width): the bottleneck of the same network, features(params, x, sigma, cond) -> (B, width).

    Under `jax.jit` beside a call of the denoiser at the same point, the compiler computes the encoder once.
    """
    wrap, bottleneck, init = _parts(model, data, "bottleneck")

    def at(params: Params, x: Array, sigma: Array, cond: Cond | None = None) -> Array:
        seen = []

        def network(params: Params, x: Array, noise_label: Array, cond: Cond | None, key: Key | None) -> Array:
            seen.append(bottleneck(params, x, noise_label, cond))
            return x

        wrap(network)(params, x, sigma, cond)  # for what it feeds the network, whatever the preconditioner
        return seen[0]

    image = jax.ShapeDtypeStruct((1, *data.shape), jnp.float32)
    shape = jax.eval_shape(at, jax.eval_shape(init, jax.random.key(0)), image, jax.ShapeDtypeStruct((), jnp.float32))
    return at, shape.shape[1]


def data_shape(data: Mapping[str, Any]) -> sources.DataShape:
    """The image shape and classes that a `data` section declares."""
    missing = [key for key in ("image_size", "channels") if key not in data]
    if missing:
        raise ValueError(f"config.data lacks {missing}: set for example config.data.image_size = 32")
    if not data.get("image_scale", 1.0) > 0:
        raise ValueError(f"data.image_scale multiplies the pixels, above 0, found {data['image_scale']}")
    return sources.DataShape(
        data["image_size"], data["channels"], data.get("num_classes", 0), data.get("image_scale", 1.0),
        data.get("num_frames", 0),
    )  # fmt: skip


def _parts(
    model: Mapping[str, Any], data: sources.DataShape, method: str = "__call__"
) -> tuple[Callable, Callable, Callable[[Key], Params]]:
    """The preconditioner of a `model` section; a method of its network as a function, and its fresh parameters."""
    options = dict(model)
    name, precondition = options.pop("name", None), options.pop("precondition", "edm")
    padding = options.pop("text_padding", None)
    wrap = names.lookup(PRECONDITIONS, precondition, "model.precondition")
    own = [key for key, p in inspect.signature(wrap).parameters.items() if p.default is not p.empty]
    given = {key: options.pop(key) for key in own if key in options}
    if options.pop("resolution_scale", 1.0) != 1:  # not one of its own
        rescaled = [key for key, p in PRECONDITIONS.items() if "resolution_scale" in inspect.signature(p).parameters]
        raise ValueError(f"model.resolution_scale is of the preconditions {rescaled}, found {precondition!r}: leave it out")
    if "sigma_data" in own:  # that of the pixels as they are stored
        given["sigma_data"] = data.scale * given.get("sigma_data", inspect.signature(wrap).parameters["sigma_data"].default)
    process = given.get("process", _PROCESS_OF.get(precondition, "scaled_linear"))
    tell = _teller(options.get("metadata"), padding, process, given.get("resolution_scale", 1.0))
    tell = video_networks.teller(name, data) or tell
    wrap = _telling(functools.partial(wrap, **given), tell)
    make = names.lookup(MODELS, name, "model.name")
    video_networks.check(name, data)
    # a config read back from JSON has lists where its file had tuples
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    try:
        constructor = make(data, **options)
        return wrap, *functional.functionalize(lambda rngs: constructor(rngs=rngs), method)
    except TypeError as error:
        raise ValueError(f"config.model does not fit {name!r}: {error}; its options are {_options(make)}") from error


# of predictions whose process a config may leave out
_PROCESS_OF = {"eps": "linear", "x0": "linear", "v": "linear", "velocity": "flow"}


def _teller(
    metadata: Mapping[str, Any] | None, padding: Mapping[str, Any] | None, process: str, resolution_scale: float
) -> Callable | None:
    """What a network is told beside what it is given, (cond, sigma, key) -> cond: the time u that weighs low-level
    metadata, and the tokens behind a text's real ones. None where it is nothing. Networks on noise levels (EDM) have the
    time at which the table of `process` has as much noise."""
    has_low = bool((metadata or {}).get("low"))
    if not has_low and not padding:
        return None
    schedule = schedules.named(process, resolution_scale)

    def tell(cond: Cond, x: Array, sigma: Array, key: Key | None) -> Cond:
        if padding and cond.get("text") is not None:
            length = cond.get("text_length")
            if length is None:
                raise ValueError("model.text_padding needs cond['text_length'] (B,), the number of each text's tokens")
            noise = None if key is None else jax.random.fold_in(key, 1)
            cond = {**cond, "text": control.pad_text(cond["text"], length, **padding, key=noise)}
        if has_low:
            u = jnp.broadcast_to(schedules.fraction(schedule, jnp.asarray(sigma)), x.shape[:1])
            cond = {**cond, "u": u.astype(jnp.float32)}
        return cond

    return tell


def _telling(wrap: Callable, tell: Callable | None) -> Callable:
    """`wrap` of a network whose conditions are completed by `tell`."""
    if tell is None:
        return wrap

    def telling(network: Network) -> Denoiser:
        denoise = wrap(network)

        def told(params: Params, x: Array, sigma: Array, cond: Cond | None = None, key: Key | None = None) -> Array:
            return denoise(params, x, sigma, tell(dict(cond or {}), x, sigma, key), key)

        return told

    return telling


def defaults(name: str) -> dict[str, Any]:
    """Options of a network, by its name in a `model` section, that have a default, and that default."""
    return {key: p.default for key, p in _parameters(MODELS[name]).items() if p.default is not p.empty}


def _options(make: Callable) -> list[str]:
    hidden = {"self", "data", "rngs", "image_size", "channels", "in_channels", "out_channels", "num_classes", "dtype"}
    return [name for name in _parameters(make) if name not in hidden]


def _parameters(make: Callable) -> Mapping[str, inspect.Parameter]:
    # a module's class shows (*args, **kwargs)
    return inspect.signature(make.args[0].__init__ if isinstance(make, functools.partial) else make).parameters
