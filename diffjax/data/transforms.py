"""Pixels to the range of the network, flips, and EDM's augmentation; on device, inside the jitted step.

EDM's augmentation (Karras 2022, appendix F.2 and table 6) draws a random transformation for each image and
tells the network which by 9 labels, so that it does not leak into samples: at sampling, all labels are 0.
In this order, centred pixel coordinates, x to the right and y down, W and H the size of the image:

    1 flip x              label w, w in {0, 1}, always drawn
    2 flip y              label w
    3 scale               by 2^(0.2 w), label w ~ N(0, 1)
    4 rotate              by w in [-pi, pi) from y towards x (to the left), labels cos w - 1, sin w
    5 scale unevenly      by 2^(0.2 w) along (cos r, -sin r) and by its inverse across, labels w cos r, w sin r;
                          r in [-pi, pi), and 0 in half of the cases
    6 shift               by (W/8 w_x, H/8 w_y), labels w_x, w_y ~ N(0, 1)

All but the first take place with `probability` each (a flip is then drawn: half of them flip). 3 to 6 are one
affine map: the image, reflected beyond its edges, is upsampled by two with the sym6 wavelet's low-pass filter,
read bilinearly, and brought down again by the same filter. Both filters are constant matrices along each axis.
The doubled images take 36 times the memory of the batch: meant for images of 32 or 64 pixels.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.broadcast import per_sample
from diffjax.core.types import Array, Key

NUM_AUGMENT_LABELS = 9
_SCALE_STD = 0.2  # of log2
_SHIFT_STD = 0.125  # of the image's size

# Low-pass filter of the wavelet sym6 (Daubechies 1992, section 8.1): orthonormal to its even shifts, 6 vanishing
# moments.
_SYM6 = np.array(
    [
        0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
        0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
        -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
    ]
)  # fmt: skip
_MARGIN = len(_SYM6) // 4  # pixels that the downsampling filter needs beyond each edge


def to_float(images: Array) -> Array:
    """uint8 0..255 -> float32 in [-1, 1]; float32 images, in that range already, pass. Raises ValueError otherwise."""
    if images.dtype == jnp.uint8:
        return images.astype(jnp.float32) / 127.5 - 1
    if images.dtype == jnp.float32:
        return images
    raise ValueError(f"images are {images.dtype}, expected uint8 (0..255) or float32 (-1..1)")


def flip(images: Array, key: Key) -> Array:
    """Mirror each of `images` (B, H, W, C), or videos (B, T, H, W, C) as a whole, left to right with probability 1/2,
    image i by the i-th split of `key`."""
    return _flip(images, flipped(key, len(images)), axis=-2)


def flipped(key: Key, count: int) -> Array:
    """Which of so many images `flip` mirrors with this key, bool (B,)."""
    return jax.vmap(jax.random.bernoulli)(jax.random.split(key, count))


class Transformation(NamedTuple):
    """What is done to each of B images, see the module's list; zeros do nothing. All float32 (B,), flips 0 or 1."""

    flip_x: Array
    flip_y: Array
    scale: Array
    rotation: Array  # radians, from x towards y
    stretch: Array
    stretch_angle: Array  # radians
    shift_x: Array
    shift_y: Array


def augment(images: Array, key: Key, probability: float | Array = 0.12) -> tuple[Array, Array]:
    """EDM's augmentation of `images`, float32 (B, H, W, C) with H and W at least 2: (images, labels (B, 9)).

    probability: of each transformation; 0 does nothing and gives zero labels. Image i depends on the i-th split of
    `key` alone. Deviation: images whose affine map is the identity skip the filters, which would give them back up
    to rounding. Raises ValueError for images that are not float32.
    """
    keys = jax.random.split(key, len(images))
    transformation = jax.vmap(_draw, in_axes=(0, None))(keys, probability)
    return transform(images, transformation), labels(transformation)


def _draw(key: Key, probability: float | Array) -> Transformation:
    """The transformation of one image, scalars."""
    which, flip_x, flip_y, normals, angles, straight = jax.random.split(key, 6)
    active = jax.random.uniform(which, (5,)) < probability
    normal = jax.random.normal(normals, (4,))
    angle = jax.random.uniform(angles, (2,), minval=-jnp.pi, maxval=jnp.pi)
    zero = jnp.zeros(())
    return Transformation(
        # the first is not thinned out, but off together with all others
        flip_x=(jax.random.bernoulli(flip_x) & (probability > 0)).astype(jnp.float32),
        flip_y=(jax.random.bernoulli(flip_y) & active[0]).astype(jnp.float32),
        scale=jnp.where(active[1], normal[0], zero),
        rotation=jnp.where(active[2], angle[0], zero),
        stretch=jnp.where(active[3], normal[1], zero),
        stretch_angle=jnp.where(jax.random.bernoulli(straight), angle[1], zero),
        shift_x=jnp.where(active[4], normal[2], zero),
        shift_y=jnp.where(active[4], normal[3], zero),
    )


def labels(t: Transformation) -> Array:
    """The 9 numbers (B, 9) that tell the network what was done, in the order of the module's list."""
    columns = (
        t.flip_x, t.flip_y, t.scale, jnp.cos(t.rotation) - 1, jnp.sin(t.rotation),
        t.stretch * jnp.cos(t.stretch_angle), t.stretch * jnp.sin(t.stretch_angle), t.shift_x, t.shift_y,
    )  # fmt: skip
    return jnp.stack(columns, axis=-1)


def transform(images: Array, t: Transformation) -> Array:
    """`images` float32 (B, H, W, C) after `t`. Raises ValueError for another dtype or a side below 2."""
    _, height, width, _ = images.shape
    if images.dtype != jnp.float32 or min(height, width) < 2:
        raise ValueError(f"expected float32 images of at least 2x2, found {images.dtype} {images.shape}: use to_float")
    images = _flip(images, t.flip_x == 1, axis=2)
    images = _flip(images, t.flip_y == 1, axis=1)
    matrices = _inverse_matrices(t, height, width)
    moved = jnp.any(matrices != jnp.eye(3)[None], axis=(1, 2))
    return jnp.where(moved[:, None, None, None], _resample(images, matrices), images)


def _flip(images: Array, which: Array, axis: int) -> Array:
    return jnp.where(per_sample(which, images), jnp.flip(images, axis), images)


# Affine maps ---------------------------------------------------------------------------------------------------


def _inverse_matrices(t: Transformation, height: int, width: int) -> Array:
    """(B, 3, 3): homogeneous centred coordinates of an output pixel -> those of the input that it shows."""
    one, none = jnp.ones_like(t.scale), jnp.zeros_like(t.scale)
    by_scale = _linear(2 ** (-_SCALE_STD * t.scale), none, none, 2 ** (-_SCALE_STD * t.scale))
    along = 2 ** (_SCALE_STD * t.stretch)
    by_stretch = _linear(1 / along, none, none, along)
    shift_x, shift_y = -t.shift_x * (width * _SHIFT_STD), -t.shift_y * (height * _SHIFT_STD)
    by_shift = _matrix([[one, none, shift_x], [none, one, shift_y], [none, none, one]])
    turned = _product(_rotation(-t.stretch_angle), by_stretch, _rotation(t.stretch_angle))
    # a product of two rotations is the identity up to rounding only
    turned = jnp.where((t.stretch == 0)[:, None, None], jnp.eye(3)[None], turned)
    return _product(by_scale, _rotation(t.rotation), turned, by_shift)


def _product(*matrices: Array) -> Array:
    # accelerators multiply with 8 bits unless told otherwise: a shift of a pixel at the edge of a large image
    return functools.reduce(functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST), matrices)


def _rotation(angle: Array) -> Array:
    return _linear(jnp.cos(angle), -jnp.sin(angle), jnp.sin(angle), jnp.cos(angle))


def _linear(a: Array, b: Array, c: Array, d: Array) -> Array:
    one, none = jnp.ones_like(a), jnp.zeros_like(a)
    return _matrix([[a, b, none], [c, d, none], [none, none, one]])


def _matrix(rows: list[list[Array]]) -> Array:
    return jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)


# Resampling ----------------------------------------------------------------------------------------------------


def _resample(images: Array, matrices: Array) -> Array:
    """Each image read through its inverse matrix, at doubled resolution."""
    _, height, width, _ = images.shape
    exact = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    fine = exact("yh,xw,bhwc->byxc", _upsampling(height), _upsampling(width), images)
    moved = jax.vmap(_read_bilinear, in_axes=(0, 0, None))(fine, matrices, (height, width))
    return exact("hy,wx,byxc->bhwc", _downsampling(height), _downsampling(width), moved)


@functools.lru_cache(maxsize=8)
def _upsampling(size: int) -> np.ndarray:
    """(2 (3 size - 2), size): reflect at both edges, put zeros between pixels, convolve with the filter."""
    padded = 3 * size - 2  # size - 1 mirrored pixels on each side
    pixel = np.abs((np.arange(padded) - (size - 1)) % (2 * size - 2))
    pixel = np.minimum(pixel, 2 * size - 2 - pixel)
    tap = np.arange(2 * padded)[:, None] - 2 * np.arange(padded)[None, :] + len(_SYM6) // 2 - 1
    weights = np.where((tap >= 0) & (tap < len(_SYM6)), _SYM6[tap.clip(0, len(_SYM6) - 1)], 0.0)
    return (weights @ (pixel[:, None] == np.arange(size))).astype(np.float32)


@functools.lru_cache(maxsize=8)
def _downsampling(size: int) -> np.ndarray:
    """(size, 2 (size + 2 margin)): correlate with the filter, keep every second pixel, cut the margins off."""
    row = 2 * (np.arange(size) + _MARGIN)[:, None]
    tap = np.arange(2 * (size + 2 * _MARGIN))[None, :] - row + len(_SYM6) // 2 - 1
    inside = (tap >= 0) & (tap < len(_SYM6))
    return np.where(inside, _SYM6[tap.clip(0, len(_SYM6) - 1)], 0.0).astype(np.float32)


def _read_bilinear(fine: Array, matrix: Array, size: tuple[int, int]) -> Array:
    """Values of one upsampled image (h, w, C) where `matrix` points to, (2 (H + 2 margin), 2 (W + 2 margin), C).

    Outside it is 0. Sample 2i of the doubled grid is pixel i: the filter's weight is centred there (its mean tap is
    5.1), half a sample before the middle of the taps.
    """
    height, width, _ = fine.shape
    rows, columns = (2 * (side + 2 * _MARGIN) for side in size)
    # centred coordinates in pixels of the image: sample s of a doubled grid of n is at (s - (n - 2) / 2) / 2
    y = (jnp.arange(rows) - (rows - 2) / 2)[:, None] / 2
    x = (jnp.arange(columns) - (columns - 2) / 2)[None, :] / 2
    x, y = jnp.broadcast_arrays(x, y)
    source_x = 2 * (matrix[0, 0] * x + matrix[0, 1] * y + matrix[0, 2]) + (width - 2) / 2
    source_y = 2 * (matrix[1, 0] * x + matrix[1, 1] * y + matrix[1, 2]) + (height - 2) / 2
    left, top = jnp.floor(source_x), jnp.floor(source_y)
    right_part, low_part = (source_x - left)[..., None], (source_y - top)[..., None]

    def pixel(row: Array, column: Array) -> Array:
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        safe = row.clip(0, height - 1).astype(jnp.int32), column.clip(0, width - 1).astype(jnp.int32)
        return jnp.where(inside[..., None], fine[safe], 0.0)

    upper = pixel(top, left) * (1 - right_part) + pixel(top, left + 1) * right_part
    lower = pixel(top + 1, left) * (1 - right_part) + pixel(top + 1, left + 1) * right_part
    return upper * (1 - low_part) + lower * low_part
