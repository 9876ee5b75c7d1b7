"""Programs of published video models by their shapes, as they are run: one step of the U-Net, and the decoder.

    function, shapes = stage("svd_xt", "unet", size=(576, 1024))
    traced = steps.trace(function, *shapes)                                    # function(*arrays, run=...)

Nothing is computed and no weights are needed. Weights and pictures are bfloat16, as served. The U-Net's step has
guidance; the picture or the text are encoded before, by programs of their own.
"""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffjax.core import names
from diffjax.core.types import Array
from diffjax.models import motion_unet, svd, vae, vae_video
from diffjax.nn.functional import abstract, functionalize
from diffjax.nn.groups import FRAMES, PLAIN, Runner
from diffjax.video import guided, offload

Shape = jax.ShapeDtypeStruct
STAGES = "unet", "vae"
_GUIDANCE = 7.5  # whatever: memory does not depend on it


class Model(NamedTuple):
    """A published model: frames of a clip, and its U-Net."""

    frames: int
    unet: Callable[..., Any]


MODELS: Mapping[str, Model] = MappingProxyType({
    "svd": Model(14, functools.partial(svd.SVDUNet, **svd.PRESETS["svd"])),
    "svd_xt": Model(25, functools.partial(svd.SVDUNet, **svd.PRESETS["svd_xt"])),
    "animatediff": Model(16, functools.partial(motion_unet.MotionUNet, **motion_unet.PRESETS["animatediff_v2"])),
})


def stage(
    model: str, name: str, size: tuple[int, int], frames: int = 0, sequential: bool = False
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """(function, shapes) of a stage: function(weights, latents, ..., run=...).

    size: height and width in pixels; frames: 0 = the model's own; sequential: guidance one half after the other. Raises
    ValueError for an unknown model or stage, and for a size that is no multiple of 8.
    """
    known, factor = names.lookup(MODELS, model, "video model"), 8
    height, width = size
    if min(size) < factor or height % factor or width % factor:
        raise ValueError(f"found a size of {height}x{width}, expected multiples of {factor}, as 576x1024")
    latents = Shape((1, frames or known.frames, height // factor, width // factor, 4), jnp.bfloat16)
    if name not in STAGES:
        raise ValueError(f"unknown stage {name!r}; {names.nearest(name, STAGES)}")
    if name == "vae":
        return _decoder(model, latents)
    make = lambda rngs: known.unet(dtype=jnp.bfloat16, rngs=rngs)  # noqa: E731
    network = guided.functions(make)

    def step(*arrays: Any, run: Runner = PLAIN) -> Array:
        return guided.guided(guided.run_by(network, run), _GUIDANCE, sequential).full(*arrays)

    return step, (_weights(make), latents, Shape((1,), jnp.float32), _conditions(model, latents.shape))


def _conditions(model: str, shape: tuple[int, ...]) -> dict[str, Shape]:
    """Of both halves."""
    if model == "animatediff":
        return {"text": Shape((2, 1, 77, 768), jnp.bfloat16)}
    picture = Shape((2, 1, *shape[2:]), jnp.bfloat16)
    token, control = Shape((2, 1, 1, 1024), jnp.bfloat16), Shape((2, 1, 3), jnp.float32)
    return {"image": token, "image_latents": picture, "control": control}


def _decoder(model: str, latents: Shape) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """All frames as bytes (T, H, 3 W): a TPU keeps an axis of 3 in the memory of 128. AnimateDiff's decoder is that of
    pictures, one group over frames."""
    if model == "animatediff":
        make = lambda rngs: vae.AutoencoderKL(dtype=jnp.bfloat16, rngs=rngs)  # noqa: E731
        apply = functionalize(make, "decode")[0]

        def decode(params: Any, z_BTHWC: Array, run: Runner = PLAIN) -> Array:
            here = offload.on_device(params)
            return run("decoder", FRAMES, {"decode": lambda z: _as_bytes(apply(here, z))}, z_BTHWC[0])

    else:
        make = lambda rngs: vae_video.AutoencoderKLTemporalDecoder(dtype=jnp.bfloat16, rngs=rngs)  # noqa: E731
        apply = functionalize(make, "decode")[0]

        def decode(params: Any, z_BTHWC: Array, run: Runner = PLAIN) -> Array:
            return _as_bytes(apply(offload.on_device(params), z_BTHWC, run=run)[0])

    return decode, (_weights(make), latents)


def _as_bytes(frames: Array) -> Array:
    """(T, H, W, 3) in [-1, 1] -> uint8 (T, H, 3 W)."""
    rounded = jnp.clip(jnp.round(127.5 * frames + 127.5), 0, 255).astype(jnp.uint8)
    return rounded.reshape(*rounded.shape[:2], -1)


def _weights(make: Callable) -> Any:
    return jax.tree.map(lambda leaf: Shape(leaf.shape, jnp.bfloat16), abstract(make))
