"""Networks of video on the pixels of small clips: how they are made, and what they are told in the place of texts.

    motion_unet    text (B, 1, max(num_classes, 1)): the class as one token of zeros and a one; zeros for the null class
    svd            of cond["first_frame"] (B, H, W, C): the frame itself as image_latents; the frame in 4 x 4
                   pixels as the one token of `image`, (B, 1, 16 C); always CONTROL as control

Published networks, on latents, with texts and CLIP's tokens: `build.videos`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.types import Array, Cond
from diffjax.data import sources, transforms

CONTROL = 6.0, 127.0, 0.0  # frames a second - 1, motion bucket, noise on the picture: the middle of what SVD is told
_PIXELS = 4  # a side
FIRST_FRAME = ("svd",)  # networks that go on from a picture


def motion_unet(network: Callable, data: sources.DataShape, *, compute_dtype: str = "", **options: Any) -> Callable:
    """Constructor of a `models.motion_unet.MotionUNet`."""
    return functools.partial(
        network, data.image_size, data.channels, data.channels, context_width=max(data.num_classes, 1),
        dtype=_dtype(compute_dtype), **options,
    )  # fmt: skip


def svd(network: Callable, data: sources.DataShape, *, compute_dtype: str = "", **options: Any) -> Callable:
    """Constructor of a `models.svd.SVDUNet`."""
    return functools.partial(
        network, data.num_frames, data.channels, data.channels, context_width=_PIXELS**2 * data.channels,
        controls=len(CONTROL), dtype=_dtype(compute_dtype), **options,
    )  # fmt: skip


def _dtype(name: str) -> Any:
    return jnp.dtype(name) if name else None


def check(name: str, data: sources.DataShape) -> None:
    """Raises ValueError for a network of video on images, and for one of images on videos."""
    if name in TELLERS and not data.num_frames:
        known = sorted(sources.VIDEOS)
        raise ValueError(f"model.name={name!r} is of videos: set data.num_frames, and data.name to one of {known}")
    if data.num_frames and name not in (*TELLERS, "residual_mlp"):
        found, known = data.num_frames, sorted(TELLERS)
        raise ValueError(f"model.name={name!r} is of images, found data.num_frames={found}: take one of {known}")


def teller(name: str, data: sources.DataShape) -> Callable | None:
    """(cond, x, sigma, key) -> what the network of this name takes; None for networks of images."""
    return functools.partial(TELLERS[name], data) if name in TELLERS else None


def _tell_class(data: sources.DataShape, cond: Cond, x: Array, *_: Any) -> dict[str, Array]:
    if not data.num_classes:
        return {"text": jnp.zeros((len(x), 1, 1))}
    if "label" not in cond:
        raise ValueError(f"this network was trained with {data.num_classes} classes, found none: give labels")
    # the null class, num_classes, is no place of the token: zeros
    label = jnp.broadcast_to(cond["label"], len(x))
    return {"text": jax.nn.one_hot(label, data.num_classes)[:, None]}


def _tell_picture(data: sources.DataShape, cond: Cond, x: Array, *_: Any) -> dict[str, Array]:
    if "first_frame" not in cond:
        raise ValueError("this network goes on from a picture, found none: give cond['first_frame'] (B, H, W, C)")
    picture = cond["first_frame"]
    small = jax.image.resize(picture, (len(x), _PIXELS, _PIXELS, data.channels), "linear")
    control = jnp.broadcast_to(jnp.asarray(CONTROL), (len(x), len(CONTROL)))
    return {"image": small.reshape(len(x), 1, -1), "image_latents": picture, "control": control}


TELLERS: Mapping[str, Callable] = MappingProxyType({"motion_unet": _tell_class, "svd": _tell_picture})


def first_frames(source: sources.Source, indices: Sequence[int]) -> np.ndarray:
    """Those of these clips, float32 (n, H, W, C) in [-1, 1]."""
    return np.asarray(transforms.to_float(jnp.asarray(np.stack([source[i]["image"][0] for i in indices]))))


def spread(source: sources.Source, count: int) -> list[int]:
    """`count` indices of a source, from the first clip to the last."""
    return np.linspace(0, len(source) - 1, count).astype(int).tolist()
