"""Networks by the names of a `model` section: denoisers, their fresh parameters, and their bottlenecks."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from diffjax.core import names, prediction
from diffjax.core.types import Array, Cond, Denoiser, Key, Params
from diffjax.data import sources
from diffjax.models import edm_unet, toy
from diffjax.nn import functional


def _residual_mlp(
    data: sources.DataShape, *, width: int = 256, depth: int = 4, dropout: float = 0.0, step_condition: bool = False,
    zero_init_step: bool = False, guidance_condition: bool = False, embedding_width: int = 0, remat: str = "",
) -> Callable:  # fmt: skip
    return functools.partial(
        toy.ResidualMLP, data.shape, width, depth, data.num_classes, dropout, step_condition, zero_init_step,
        guidance_condition, embedding_width, remat,
    )  # fmt: skip


def _edm_unet(network: Callable, fixed: Mapping[str, Any], data: sources.DataShape, *, augment_dim: int = 0,
              compute_dtype: str = "", **options: Any) -> Callable:  # fmt: skip
    dtype = jnp.dtype(compute_dtype) if compute_dtype else None
    return functools.partial(
        network, data.image_size, data.channels, data.channels, num_classes=data.num_classes, augment_dim=augment_dim,
        dtype=dtype, **fixed, **options,
    )  # fmt: skip


_NCSNPP = {"embedding": "fourier", "encoder": "residual", "taps": (1, 3, 3, 1), "noise_channels_mult": 2}

# name -> function of the data's shape and options, which returns a constructor of the module that takes rngs
MODELS: dict[str, Callable[..., Callable]] = {
    "residual_mlp": _residual_mlp,
    "ddpmpp": functools.partial(_edm_unet, edm_unet.SongUNet, {}),
    "ncsnpp": functools.partial(_edm_unet, edm_unet.SongUNet, _NCSNPP),
    "adm": functools.partial(_edm_unet, edm_unet.DhariwalUNet, {}),
}
PRECONDITIONS: dict[str, Callable[..., Denoiser]] = {
    "edm": prediction.edm_denoiser,
    "vp": prediction.vp_denoiser,
    "ve": prediction.ve_denoiser,
}


def denoiser(model: Mapping[str, Any], data: sources.DataShape) -> tuple[Denoiser, Callable[[Key], Params]]:
    """(denoise, init): the network of a `model` section as a denoiser, and its fresh parameters.

    Raises ValueError for unknown names and options.
    """
    wrap, constructor = _parts(model, data)
    network, init = functional.functionalize(constructor)
    return wrap(network), init


def features(model: Mapping[str, Any], data: sources.DataShape) -> tuple[Callable[..., Array], int]:
    """(features, width): the bottleneck of the same network, features(params, x, sigma, cond) -> (B, width).

    Under `jax.jit` beside a call of the denoiser at the same point, the compiler computes the encoder once.
    """
    wrap, constructor = _parts(model, data)
    bottleneck, init = functional.functionalize(constructor, "bottleneck")

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
    return sources.DataShape(data["image_size"], data["channels"], data.get("num_classes", 0))


def _parts(model: Mapping[str, Any], data: sources.DataShape) -> tuple[Callable, Callable[[nnx.Rngs], nnx.Module]]:
    """The preconditioner, and the network's constructor, of a `model` section."""
    options = dict(model)
    name, precondition = options.pop("name", None), options.pop("precondition", "edm")
    wrap = names.lookup(PRECONDITIONS, precondition, "model.precondition")
    if precondition == "edm":
        wrap = functools.partial(wrap, sigma_data=options.pop("sigma_data", 0.5))
    make = names.lookup(MODELS, name, "model.name")
    # a config read back from JSON has lists where its file had tuples
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    try:
        constructor = make(data, **options)
        nnx.eval_shape(lambda: constructor(rngs=nnx.Rngs(0)))
    except TypeError as error:
        raise ValueError(f"config.model does not fit {name!r}: {error}; its options are {_options(make)}") from error
    return wrap, lambda rngs: constructor(rngs=rngs)


def _options(make: Callable) -> list[str]:
    module = make.args[0] if isinstance(make, functools.partial) else make
    hidden = {"data", "rngs", "image_size", "in_channels", "out_channels", "num_classes", "dtype"}
    return [name for name in inspect.signature(module).parameters if name not in hidden]
