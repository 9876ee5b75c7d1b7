"""Image to video (Stable Video Diffusion) and text to video (AnimateDiff): three programs, one after the other.

    encode    what the network is told: the picture or the text
    denoise   noise to latents: the whole loop, `x` donated
    decode    latents to frames

Each is compiled apart, and asks for its weights when it begins: `weights` is a function of a part's name, and what it
gives is let go behind the stage, so that no two networks are in memory together if it reads them from a file. Those of
the U-Net and the autoencoder may lie in the host's memory, see `offload`.

    clips = image_to_video(parts, weights, pictures, seen, plan, sample_ids=[0], num_frames=14)    # uint8 BTHWC
    clips = text_to_video(parts, weights, tokens, empty, plan, sample_ids=[0], num_frames=16, size=(64, 64))

The parts are functions, see `ImageToVideo` and `TextToVideo`; `build.videos` makes them of a folder. Clip i is made of
(seed, sample_ids[i]) alone. `run` says how the groups of the U-Net and the decoder are run, see `slicer`: give the same
object again, and nothing is compiled anew.
"""

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core import rng
from diffjax.core.solvers import Plan
from diffjax.core.types import Array, Cond, Params
from diffjax.nn.groups import PLAIN, Runner
from diffjax.sampling import generate
from diffjax.sampling.sample import sample as follow_plan
from diffjax.video import guided, offload, rehash
from diffjax.video.guided import VideoNetwork

Weights = Callable[[str], Params]  # by a part's name: "image_encoder", "text_encoder", "unet", "vae"


class ImageToVideo(NamedTuple):
    """see (params, (B, S, S, 3) in [-1, 1]) -> (B, 1, D), what the network attends to; encode (params, (B, H, W, 3) in
    [-1, 1]) -> latents (B, h, w, c), not scaled; network: see `guided.functions`; precondition: makes a denoiser of it;
    decode (params, latents (B, T, h, w, c), run=) -> frames (B, T, H, W, 3) in about [-1, 1]."""

    see: Callable[[Params, Array], Array]
    encode: Callable[[Params, Array], Array]
    network: VideoNetwork
    precondition: rehash.Precondition
    decode: Callable[..., Array]


class TextToVideo(NamedTuple):
    """encode (params, tokens by name) -> {"text": (B, L, D)}; channels: of latents; others as of `ImageToVideo`."""

    encode: Callable[[Params, Mapping[str, Array]], dict[str, Array]]
    network: VideoNetwork
    precondition: rehash.Precondition
    decode: Callable[..., Array]
    channels: int = 4


class Told(NamedTuple):
    """What the first stage gives: unit noise x (B, T, h, w, c), both conditions of the network, and the scale of
    guidance, (T,) or a number, None for none."""

    x: Array
    cond: Cond
    uncond: Cond
    guidance_scale: np.ndarray | float | None


def image_to_video(
    parts: ImageToVideo, weights: Weights, pictures: np.ndarray, seen: np.ndarray, plan: Plan, *,
    sequential: bool = False, schedule: rehash.Schedule | None = None, run: Runner = PLAIN, **options: Any,
) -> np.ndarray:  # fmt: skip
    """Clips uint8 (B, T, H, W, 3) that begin with the pictures; arguments as of `tell_picture` and `make`."""
    told = tell_picture(parts, weights, pictures, seen, **options)
    return make(parts, weights, told, plan, sequential=sequential, schedule=schedule, run=run)


def text_to_video(
    parts: TextToVideo, weights: Weights, tokens: Mapping[str, np.ndarray], negative: Mapping[str, np.ndarray],
    plan: Plan, *, sequential: bool = False, schedule: rehash.Schedule | None = None, run: Runner = PLAIN,
    **options: Any,
) -> np.ndarray:  # fmt: skip
    """Clips uint8 (B, T, H, W, 3) of texts; arguments as of `tell_text` and `make`."""
    told = tell_text(parts, weights, tokens, negative, **options)
    return make(parts, weights, told, plan, sequential=sequential, schedule=schedule, run=run)


def tell_picture(
    parts: ImageToVideo, weights: Weights, pictures: np.ndarray, seen: np.ndarray, *, sample_ids: Sequence[int],
    num_frames: int, seed: int = 0, guidance_scale: tuple[float, float] | None = (1.0, 3.0), fps: int = 7,
    motion_bucket: int = 127, augmentation: float = 0.02,
) -> Told:  # fmt: skip
    """The first stage of image to video.

    pictures        uint8 (B, H, W, 3), of the size of the clips
    seen            (B, S, S, 3) float32 in [-1, 1]: the same for CLIP, see `for_clip`
    guidance_scale  of the first and last frame, linear between; None: no guidance, and half of the work
    fps             frames a second; the network is told fps - 1, as in training
    motion_bucket   0..255, more for more motion
    augmentation    standard deviation of the noise on the picture
    Raises ValueError for pictures of another shape, and another number of them than sample_ids.
    """
    pictures = _checked(pictures, len(sample_ids))
    scale = None if guidance_scale is None else np.linspace(*guidance_scale, num_frames, dtype=np.float32)
    noise = picture_noise(seed, sample_ids, pictures.shape[1:])
    cond = {
        "image": _see(parts.see, weights("image_encoder"), jnp.asarray(seen, jnp.float32)),
        "image_latents": _latents(parts.encode, weights("vae"), jnp.asarray(pictures), noise, augmentation),
        "control": jnp.tile(jnp.array([fps - 1, motion_bucket, augmentation], jnp.float32), (len(pictures), 1)),
    }
    uncond = {**cond, "image": jnp.zeros_like(cond["image"]), "image_latents": jnp.zeros_like(cond["image_latents"])}
    x = generate.initial_noise(seed, jnp.asarray(sample_ids), (num_frames, *cond["image_latents"].shape[1:]))
    return Told(x, cond, uncond, scale)


def tell_text(
    parts: TextToVideo, weights: Weights, tokens: Mapping[str, np.ndarray], negative: Mapping[str, np.ndarray], *,
    sample_ids: Sequence[int], num_frames: int, size: tuple[int, int], seed: int = 0,
    guidance_scale: float | None = 7.5,
) -> Told:  # fmt: skip
    """The first stage of text to video.

    tokens, negative  of B texts, and of those that guidance leads away from
    size              (h, w) of the latents
    guidance_scale    one for all frames; None: no guidance, and half of the work
    """
    params = weights("text_encoder")
    cond, uncond = ({"text": _encode(parts.encode, params, dict(ids))["text"]} for ids in (tokens, negative))
    x = generate.initial_noise(seed, jnp.asarray(sample_ids), (num_frames, *size, parts.channels))
    return Told(x, cond, uncond, guidance_scale)


def make(
    parts: ImageToVideo | TextToVideo, weights: Weights, told: Told, plan: Plan, *, sequential: bool = False,
    schedule: rehash.Schedule | None = None, run: Runner = PLAIN,
) -> np.ndarray:  # fmt: skip
    """The last two stages: clips uint8 (B, T, H, W, 3). told.x is overwritten.

    sequential: guidance's halves one after the other; schedule: steps that are reused, see `rehash`. Raises ValueError
    for a schedule of another number of steps.
    """
    options = dict(sequential=sequential, schedule=schedule, run=run)
    z = denoise(parts.network, parts.precondition, weights("unet"), told.x, plan, *told[1:], **options)
    rows = np.asarray(decode(parts.decode, weights("vae"), z, run))
    return rows.reshape(*rows.shape[:3], -1, 3)


def similarities(
    parts: ImageToVideo | TextToVideo, weights: Weights, told: Told, plan: Plan, anchor: str, *,
    sequential: bool = False, run: Runner = PLAIN,
) -> np.ndarray:  # fmt: skip
    """(K, K) of the K steps of a clip, for `rehash.of_count`; all of them are run. anchor: one of rehash.ANCHORS."""
    network, cond = _network(parts.network, told.cond, told.uncond, told.guidance_scale, sequential, run)
    x = told.x * np.float32(np.sqrt(1 + plan.sigmas[0] ** 2))
    return rehash.record(parts.precondition, network, weights("unet"), x, plan, cond, anchor)


# Stages ---------------------------------------------------------------------------------------------------------


@functools.partial(
    jax.jit, static_argnames=("network", "precondition", "sequential", "schedule", "run"), donate_argnames=("x",)
)
def denoise(
    network: VideoNetwork, precondition: rehash.Precondition, params: Params, x: Array, plan: Plan, cond: Cond,
    uncond: Cond, guidance_scale: Array | None = None, *, sequential: bool = False,
    schedule: rehash.Schedule | None = None, run: Runner = PLAIN,
) -> Array:  # fmt: skip
    """Latents (B, T, h, w, c) of unit noise `x`, which is overwritten. guidance_scale: None for none, or as of
    `guided.guided`; uncond: what guidance leads away from."""
    network, cond = _network(network, cond, uncond, guidance_scale, sequential, run)
    first = jnp.asarray(plan.sigmas[0], x.dtype)
    x = x * jnp.sqrt(1 + first**2)  # data and noise, as far as data can be told from noise
    if schedule is None:
        return follow_plan(precondition(network.full), params, x, plan, cond)
    return rehash.sample(precondition, network, params, x, plan, schedule, cond)


def _network(
    network: VideoNetwork, cond: Cond, uncond: Cond, guidance_scale: Array | None, sequential: bool, run: Runner
) -> tuple[VideoNetwork, Cond]:
    """With its groups run by `run`, and with guidance."""
    network = guided.run_by(network, run)
    if guidance_scale is None:
        return network, cond
    return guided.guided(network, guidance_scale, sequential), guided.halves(uncond, cond)


@functools.partial(jax.jit, static_argnums=(0, 3))
def decode(decoder: Callable[..., Array], params: Params, z: Array, run: Runner = PLAIN) -> Array:
    """uint8 (B, T, H, 3 W) of latents: 3 channels as the last axis would be padded to 128 on a TPU."""
    frames = generate.to_uint8(decoder(offload.on_device(params), z, run=run))
    return frames.reshape(*frames.shape[:3], -1)


def frame_by_frame(decoder: Callable[[Params, Array], Array], params: Params, z: Array, run: Runner = PLAIN) -> Array:
    """A decoder of videos made of one of images (B, h, w, c), one frame at a time: nothing is left to slice."""
    frames = jax.lax.map(lambda frame: decoder(params, frame[None])[0], z.reshape(-1, *z.shape[2:]))
    return frames.reshape(*z.shape[:2], *frames.shape[1:])


def picture_noise(seed: int, sample_ids: Sequence[int], shape: Sequence[int]) -> Array:
    """Unit noise (B, *shape) on the pictures of clips, which depends on seed and id alone."""
    keys = rng.sample_keys(seed, jnp.asarray(sample_ids))
    draw = lambda key: jax.random.normal(jax.random.fold_in(key, zlib.crc32(b"picture")), tuple(shape))  # noqa: E731
    return jax.vmap(draw)(keys)


_see = functools.partial(jax.jit, static_argnums=0)(lambda see, params, seen: see(params, seen))
_encode = functools.partial(jax.jit, static_argnums=0)(lambda encode, params, tokens: encode(params, tokens))


@functools.partial(jax.jit, static_argnums=0)
def _latents(encode: Callable, params: Params, pictures: Array, noise: Array, augmentation: Array) -> Array:
    return encode(offload.on_device(params), pictures.astype(jnp.float32) / 127.5 - 1 + augmentation * noise)


def _checked(pictures: np.ndarray, count: int) -> np.ndarray:
    pictures = np.asarray(pictures)
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3 or len(pictures) != count:
        found = f"{pictures.dtype}{list(pictures.shape)}"
        raise ValueError(f"found pictures {found} for {count} sample_ids, expected uint8 ({count}, H, W, 3)")
    return pictures


# What CLIP sees -------------------------------------------------------------------------------------------------


def for_clip(picture: np.ndarray, size: int = 224) -> np.ndarray:
    """A picture uint8 (H, W, 3) as SVD shows it to CLIP: (size, size, 3) float32 in about [-1, 1], not cropped.

    Blurred by a Gaussian of (H / size - 1) / 2 pixels, then read by cubic interpolation with the outer pixels in place,
    as its released code does: other ways of making pictures small give other tokens.
    """
    rows, columns = (_shrinking(length, size) for length in picture.shape[:2])
    values = picture.astype(np.float64) / 127.5 - 1
    return np.einsum("ih,hwc,jw->ijc", rows, values, columns, optimize=True).astype(np.float32)


def _shrinking(length: int, size: int) -> np.ndarray:
    """The matrix (size, length) of both along one axis."""
    sigma = max((length / size - 1) / 2, 0.001)
    reach = int(max(4 * sigma, 3)) // 2  # of an odd number of taps
    taps = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    at = np.pad(np.arange(length), reach, mode="reflect" if length > 1 else "edge")
    blur = np.zeros((length, length))
    for offset, tap in enumerate(taps / taps.sum()):
        np.add.at(blur, (np.arange(length), at[offset : offset + length]), tap)
    place = np.arange(size) * ((length - 1) / (size - 1))
    left = np.floor(place).astype(int)
    read = np.zeros((size, length))
    for neighbour in (-1, 0, 1, 2):
        weight = _cubic(np.abs(place - left - neighbour))
        np.add.at(read, (np.arange(size), np.clip(left + neighbour, 0, length - 1)), weight)
    return read @ blur


def _cubic(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Keys 1981, eq. 4, with PyTorch's parameter."""
    near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    far = a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
