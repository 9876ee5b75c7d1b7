"""Resizing as the published protocols do it; which one is used moves an FID by more than papers differ. Parmar 2022.

    resize(images, 299, "torch")     bilinear, pixel centres aligned, no low-pass: pytorch-fid
    resize(images, 299, "tf1")       bilinear, corner 0 on corner 0, no low-pass: ADM, EDM, StyleGAN, the graph of 2015
    resize(images, 299, "clean")     bicubic with a low-pass, in float, channel by channel: clean-fid
    resize(images, 224, "clip")      bicubic with a low-pass to the shorter side, rounded, the central square: CLIP

Of n pixels to m, those two without a low-pass read the source between two pixels, at

    torch: max(0, (i + 1/2) n / m - 1/2)         tf1: i n / m                                                        (1)

("bilinear" of TensorFlow 1 without align_corners or half_pixel_centers). They work inside `jax.jit`; those of ON_HOST
are Pillow's, with NumPy arrays.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax.numpy as jnp
import numpy as np
import PIL.Image

from diffjax.core import names
from diffjax.core.types import Array

ON_HOST = ("clean", "clip")


def resize(images_BHWC: Array | np.ndarray, size: int, how: str) -> Array | np.ndarray:
    """(B, H, W, C) uint8 or float in [0, 255] -> (B, size, size, C) float32 in [0, 255], by the rule `how` of RESIZES.

    Raises ValueError for an unknown rule, another rank or dtype, and floats for "clip", whose rule rounds.
    """
    rule = names.lookup(RESIZES, how, "resizing")
    dtype = images_BHWC.dtype
    if images_BHWC.ndim != 4 or not (dtype == np.uint8 or jnp.issubdtype(dtype, jnp.floating)):
        raise ValueError(f"expected images (B, H, W, C), uint8 or float in [0, 255], found {images_BHWC.shape} {dtype}")
    return rule(images_BHWC, size)


def _torch(images: Array, size: int) -> Array:
    """Bilinear, pixel centres aligned, without a low-pass, as pytorch-fid."""
    return _bilinear(images, size, lambda i, ratio: np.maximum(0, (i + 0.5) * ratio - 0.5))


def _tf1(images: Array, size: int) -> Array:
    """Bilinear, corner 0 on corner 0, without a low-pass, as ADM, EDM and the graph of 2015."""
    return _bilinear(images, size, lambda i, ratio: i * ratio)


def _bilinear(images: Array, size: int, place: Callable[[np.ndarray, float], np.ndarray]) -> Array:
    """`place`: eq. 1, of target pixels and the source's pixels per target's."""
    x = jnp.asarray(images, jnp.float32)
    for axis in (1, 2):
        pixels = x.shape[axis]
        if pixels != size:
            at = place(np.arange(size), pixels / size)
            first = np.minimum(np.floor(at).astype(int), pixels - 1)
            weight = np.expand_dims(np.float32(at - first), tuple(i for i in range(4) if i != axis))
            before, after = (jnp.take(x, np.minimum(first + i, pixels - 1), axis=axis) for i in (0, 1))
            x = before + (after - before) * weight
    return x


def _clean(images: np.ndarray, size: int) -> np.ndarray:
    """Bicubic with a low-pass, in float, channel by channel, as clean-fid."""
    planes = np.moveaxis(np.asarray(images, np.float32), 3, 1)
    scaled = np.empty((*planes.shape[:2], size, size), np.float32)
    for i in np.ndindex(planes.shape[:2]):
        picture = PIL.Image.fromarray(np.ascontiguousarray(planes[i]))
        scaled[i] = picture.resize((size, size), PIL.Image.Resampling.BICUBIC)
    return np.moveaxis(np.clip(scaled, 0, 255), 1, 3)  # the filter overshoots at edges


def _clip(images: np.ndarray, size: int) -> np.ndarray:
    """Bicubic with a low-pass of the shorter side, rounded to uint8, the central square of it, as CLIP."""
    images = np.asarray(images)
    if images.dtype != np.uint8:
        raise ValueError(f"found {images.dtype} images for 'clip', expected uint8: its rule rounds; round them first")
    height, width = (size * side // min(images.shape[1:3]) for side in images.shape[1:3])
    top, left = (height - size) // 2, (width - size) // 2
    found = np.empty((len(images), height, width, images.shape[3]), np.uint8)
    for i, image in enumerate(images):
        for channel in range(images.shape[3]):  # Pillow, too, takes channels apart
            picture = PIL.Image.fromarray(np.ascontiguousarray(image[..., channel]))
            found[i, ..., channel] = picture.resize((width, height), PIL.Image.Resampling.BICUBIC)
    return found[:, top : top + size, left : left + size].astype(np.float32)


RESIZES: Mapping[str, Callable[[Array | np.ndarray, int], Array | np.ndarray]] = MappingProxyType(
    {"torch": _torch, "tf1": _tf1, "clean": _clean, "clip": _clip}
)
