"""Feature spaces by name: what turns images or videos into the vectors that metrics compare.

    space = load("classifier", "runs/classifier_digits")
    found = features(space, images)                       # {"pool": (B, D)}

A space has the outputs "pool" (what most metrics take), "spatial" and "logits" (Inception's). Networks see uint8,
rounded as EDM does; "pixels" is no network and takes values as they are.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from diffjax.build import classifiers, feature_networks
from diffjax.build.companions import TextEncoder
from diffjax.core import names
from diffjax.core.types import Array, Params
from diffjax.data import transforms
from diffjax.metrics import fid, inception, protocol
from diffjax.metrics import resize as resizing
from diffjax.nn import functional
from diffjax.runtime import mesh as meshes
from diffjax.sampling import generate
from diffjax.weights import inception as inception_weights
from diffjax.weights import load as files

POOL = "pool"
_TEXTS_AT_ONCE = 64
_BRIGHT = 16.0  # no sample in [-1, 1] goes so far above and nowhere below 0: these are pixels in 0 .. 255
_INCEPTION_SIZE, _INCEPTION_RESIZE = 299, "tf1"  # as EDM and ADM


class FeatureSpace(NamedTuple):
    """extract(params, prepare(images)) -> (B, D) by output name.

    prepare: uint8 images (B, H, W, C) to what the network takes, on the host. extract: jittable, but for params None.
    widths: D by output, 0 = that of the flattened image. shape: (H, W, C) that images must have, () for any.
    num_frames: of the videos that it takes, 0 = images. text: of a CLIP, see `embed`.
    """

    name: str
    extract: Callable[[Params, Any], dict[str, Array]]
    params: Params | None
    widths: Mapping[str, int]
    prepare: Callable[[np.ndarray], np.ndarray] = lambda images: images
    resize: str = ""
    rounding: str = protocol.ROUNDED
    weights_sha256: str = ""
    shape: tuple[int, ...] = ()
    num_frames: int = 0
    text: TextEncoder | None = None


def load(name: str, weights: str = "", resize: str = "") -> FeatureSpace:
    """The space `name` of SPACES. weights: file or folder of its network; resize: one of metrics.resize.RESIZES where
    the space leaves a choice, "" for its own.

    Raises ValueError for an unknown name or resizing, FileNotFoundError for absent weights, with the file to get.
    """
    return names.lookup(SPACES, name, "feature space")(weights, resize)


def features(space: FeatureSpace, images: np.ndarray, mesh: Mesh | None = None) -> dict[str, np.ndarray]:
    """(B, D) by output name, of images (B, H, W, C) or videos (B, T, H, W, C), uint8 or float in about [-1, 1].

    mesh: each of its devices takes B / devices images in the one program that a single device runs, so that bits do not
    depend on how many there are. Raises ValueError for values that are not finite, another dtype or shape.
    """
    check_images(images, space)
    if space.params is None:
        return space.extract(None, images)
    rounded = images if images.dtype == np.uint8 else np.asarray(generate.to_uint8(images))
    found = _compiled(space.extract, mesh)(space.params, space.prepare(rounded))
    return {name: np.asarray(value) for name, value in found.items()}


def placed(space: FeatureSpace, mesh: Mesh) -> FeatureSpace:
    """`space` with its parameters on every device of `mesh`."""
    if space.params is None:
        return space
    return space._replace(params=jax.device_put(space.params, meshes.replicated(mesh)))


def check_images(images: np.ndarray, space: FeatureSpace, ids: Sequence[int] | None = None) -> None:
    """Raises ValueError for images that `space` cannot take, naming the first that holds a NaN by its id, and for floats
    in 0 .. 255."""
    rank = 5 if space.num_frames else 4
    if images.ndim != rank or not (images.dtype == np.uint8 or np.issubdtype(images.dtype, np.floating)):
        kind = "videos (B, T, H, W, C)" if space.num_frames else "images (B, H, W, C)"
        raise ValueError(f"{space.name!r} takes {kind}, uint8 or float, found {images.shape} {images.dtype}")
    if space.shape and images.shape[1:] != space.shape:
        raise ValueError(
            f"{space.name!r} takes images of shape {space.shape}, which its network was trained on, found "
            f"{images.shape[1:]}"
        )
    if space.num_frames and images.shape[1] != space.num_frames:
        raise ValueError(f"{space.name!r} takes videos of {space.num_frames} frames, found {images.shape[1]}")
    if images.dtype == np.uint8:
        return
    broken = np.flatnonzero(~np.isfinite(images).reshape(len(images), -1).all(axis=1))
    if len(broken):
        first = broken[0] if ids is None else ids[broken[0]]
        raise ValueError(
            f"{len(broken)} of {len(images)} images hold a NaN or infinity, the first is sample {first}: no metric is "
            "defined on them; look at the run, or at its plan"
        )
    if images.size and images.min() >= 0 and images.max() > _BRIGHT:
        raise ValueError(
            f"found images with values in {images.min():g} .. {images.max():g}, expected about -1 .. 1: divide by 127.5 "
            "and subtract 1, or give uint8"
        )


@functools.lru_cache(maxsize=16)
def _compiled(extract: Callable, mesh: Mesh | None) -> Callable[[Params, Array], dict[str, Array]]:
    if mesh is None:
        return jax.jit(extract)
    split = PartitionSpec("data")
    return jax.jit(
        jax.shard_map(extract, mesh=mesh, in_specs=(PartitionSpec(), split), out_specs=split, check_vma=False)
    )


# Spaces ----------------------------------------------------------------------------------------------------------


def _pixels(weights: str, resize: str) -> FeatureSpace:
    """None: the H W C values of an image in [-1, 1], as they are."""
    _refuse("pixels", weights, resize)
    return FeatureSpace("pixels", _flat, None, {POOL: 0}, rounding=protocol.UNROUNDED)


def _flat(params: None, images: np.ndarray) -> dict[str, np.ndarray]:
    return {POOL: fid.pixels(images)}


def _classifier(weights: str, resize: str) -> FeatureSpace:
    """The layer before the logits of a classifier that is trained here, the folder of its run; images of its size."""
    _refuse("classifier", "", resize)
    if not weights:
        raise ValueError(
            "the space 'classifier' needs weights, the run of a classifier: train configs/quick/classifier_digits.py "
            "and give its folder"
        )
    found = classifiers.load(weights)

    def extract(params: Params, images: Array) -> dict[str, Array]:
        return {POOL: found.features(params, transforms.to_float(images))}

    shape = (found.data.image_size, found.data.image_size, found.data.channels)
    return FeatureSpace(
        "classifier", extract, found.params, {POOL: found.width}, weights_sha256=found.sha256, shape=shape
    )


def _inception(weights: str, resize: str) -> FeatureSpace:
    """FID's InceptionV3, the file pt_inception-2015-12-05-6726825d.pth that pytorch-fid releases; images resized by
    `tf1`, which is the default, `torch` or `clean`."""
    how = resize or _INCEPTION_RESIZE
    scale = functools.partial(inception.normalise, how=how)
    scale(np.zeros((1, 1, 1, 3), np.float32))  # an unknown resizing, before a file is read
    network, init = functional.functionalize(lambda rngs: inception.InceptionV3(rngs=rngs))
    params = inception_weights.load(weights, jax.eval_shape(init, jax.random.key(0)))
    file = Path(weights, inception_weights.FILE) if Path(weights).is_dir() else Path(weights)

    def extract(params: Params, pixels: Array) -> dict[str, Array]:
        return network(params, scale(pixels))._asdict()

    widths = {POOL: inception.POOL, "spatial": inception.SPATIAL, "logits": inception.LOGITS}
    return _on_pixels(
        FeatureSpace("inception", extract, params, widths, weights_sha256=files.sha256(file)), _INCEPTION_SIZE, how
    )


def _published(name: str, weights: str, resize: str) -> FeatureSpace:
    _refuse(name, "", resize)
    found = feature_networks.load(name, weights)
    if "logits" in found.widths:  # FVD is of I3D's logits, Unterthiner 2018
        network = found.extract
        found = found._replace(
            extract=lambda params, pixels: {POOL: network(params, pixels)["logits"]},
            widths={POOL: found.widths["logits"]},
        )
    space = FeatureSpace(
        name,
        found.extract,
        found.params,
        found.widths,
        weights_sha256=found.sha256,
        num_frames=found.frames,
        text=found.text,
    )
    return _on_pixels(space, found.size, found.resize)


def _on_pixels(space: FeatureSpace, size: int, how: str) -> FeatureSpace:
    """`space`, whose network takes pixels (..., size, size, 3) float32 in [0, 255], on uint8 images of any size; one
    channel is shown as grey. Resized by the rule `how`, on the device where it can be."""

    def resized(images: Array) -> Array:
        flat = resizing.resize(images.reshape(-1, *images.shape[-3:]), size, how)
        return flat.reshape(*images.shape[:-3], size, size, 3)

    def extract(params: Params, images: Array) -> dict[str, Array]:
        return space.extract(params, resized(images))

    if how in resizing.ON_HOST:
        return space._replace(prepare=lambda images: resized(_coloured(images)), resize=f"{how} {size}")
    return space._replace(prepare=_coloured, extract=extract, resize=f"{how} {size}")


def _coloured(images: np.ndarray) -> np.ndarray:
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


def embed(space: FeatureSpace, texts: Sequence[str]) -> np.ndarray:
    """Unit embeddings (n, D) of texts, for a CLIP. Raises ValueError for another space."""
    if space.text is None:
        raise ValueError(f"the space {space.name!r} has no texts: take a CLIP, for example clip_l14")
    encode, found = jax.jit(space.text.encode), []
    for at in range(0, len(texts), _TEXTS_AT_ONCE):
        part = list(texts[at : at + _TEXTS_AT_ONCE])
        padded = part + part[-1:] * (_TEXTS_AT_ONCE - len(part))
        found.append(np.asarray(encode(space.text.params, space.text.tokenise(padded))["pooled"])[: len(part)])
    return np.concatenate(found)


def _refuse(name: str, weights: str, resize: str) -> None:
    given = {key: value for key, value in {"weights": weights, "resize": resize}.items() if value}
    if given:
        raise ValueError(f"the space {name!r} takes no {' and no '.join(given)}, found {given}: leave it out")


SPACES: Mapping[str, Callable[[str, str], FeatureSpace]] = {
    "pixels": _pixels,
    "classifier": _classifier,
    "inception": _inception,
    **{name: functools.partial(_published, name) for name in feature_networks.NETWORKS},
}
# of the videos that a space takes
NUM_FRAMES: Mapping[str, int] = {name: feature_networks.FRAMES for name in ("i3d", "videomae")}
