"""Batches of pictures and texts as a denoiser takes them: encoded by its companions, on the way to the step.

What the data gives as pixels and captions, or as the cached latents and tokens of `data.latents`, becomes

    image           latents (B, h, w, c), drawn from the autoencoder's Gaussian with a key of the batch's number; pixels
                    stay what they are where there is no autoencoder
    text, pooled... of the captions; "negative_<name>" of the empty text, for guidance and for texts that are dropped
    control         where the network is told sizes: those of whole pictures
    height, ...     metadata of cached latents, as it is

so that data, objectives and the order of images stay what they are without companions.
"""

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.build import companions
from diffjax.core import rng, trees
from diffjax.core.types import Array, Key, Params
from diffjax.data import loader, sources, transforms

_HASHED = 4096  # values of each array, evenly spaced
_KEPT = 512  # texts whose conditions are kept, of data with a text for each class


class Encoded:
    """`batches`, encoded; a `data.loader.Batches`. model: the section of the denoiser. Every batch of a run has its own
    key, made of seed and number, so that a resumed run draws the same latents."""

    def __init__(self, batches: loader.Batches, beside: companions.Companions, model: Any, shape: sources.DataShape, seed: int):
        self._batches, self._beside, self._seed, self._count = batches, beside, seed, 0
        self._controls = companions.controls(model, shape.image_size * beside.factor, 1)
        self._empty = beside.condition([""]) if beside.text is not None else {}
        self._one = functools.lru_cache(maxsize=_KEPT)(lambda text: beside.condition([text]))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, np.ndarray | Array]:
        batch = dict(next(self._batches))
        key = rng.stream(self._seed, "encode", jnp.uint32(self._count))
        self._count += 1
        rows = len(next(iter(batch.values())))
        if "image" in batch and self._beside.autoencoder is not None:
            vae = self._beside.autoencoder
            batch["image"] = _latents(vae.encode, vae.params, batch["image"], key)
        if "moments" in batch:
            batch["image"] = self._beside.autoencoder.draw(batch.pop("moments"), key)
        if "text" in batch:
            batch |= self._tokens(batch)
        if "caption" in batch:
            batch |= self._texts([str(caption) for caption in batch.pop("caption")])
        return batch | {name: np.repeat(value, rows, axis=0) for name, value in self._controls.items()}

    def get_state(self) -> dict[str, Any]:
        """{"batches": the position of the inner batches, "count": of those given}."""
        return {"batches": self._batches.get_state(), "count": self._count}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue after `state`."""
        self._batches.set_state(state["batches"])
        self._count = int(state["count"])

    def _texts(self, captions: list[str]) -> dict[str, Array]:
        text = self._beside.text
        if text is None:
            raise ValueError(f"the data has captions, and {self._beside.folder} has no text encoder: leave captions out")
        distinct = dict.fromkeys(captions)
        if 2 * len(distinct) > len(captions):
            return text.encode(text.params, text.tokenise(captions)) | self._negative(len(captions))
        # of a few texts each is encoded once, and alone: the same numbers whatever came before
        found = {caption: self._one(caption) for caption in distinct}
        rows = {name: np.concatenate([found[caption][name] for caption in captions]) for name in self._empty}
        return rows | self._negative(len(captions))

    def _tokens(self, batch: dict[str, np.ndarray]) -> dict[str, Array]:
        """Cached texts as the text encoder gives them: as many slots, zeros behind the real tokens."""
        text, length = _padded(batch["text"], batch.pop("text_length"), self._empty["text"].shape[1])
        found = {"text": text, "text_length": length}
        if "pooled" in batch:
            found["pooled"] = batch["pooled"].astype(np.float32)
        if "text_mask" in self._empty:
            found["text_mask"] = jnp.arange(text.shape[1])[None] < length[:, None]
        return {name: found[name] for name in self._empty} | self._negative(len(text))

    def _negative(self, rows: int) -> dict[str, Array]:
        """Conditions of the empty text for so many rows."""
        return {f"negative_{name}": jnp.repeat(value, rows, axis=0) for name, value in self._empty.items()}


@functools.partial(jax.jit, static_argnums=2)
def _padded(text_BLD: Array, length_B: Array, slots: int) -> tuple[Array, Array]:
    return jnp.pad(text_BLD.astype(jnp.float32), [(0, 0), (0, slots - text_BLD.shape[1]), (0, 0)]), length_B


def _latents(encode: Any, params: Any, images: np.ndarray, key: Key) -> Array:
    return encode(params, transforms.to_float(jnp.asarray(images)), key)


# Caches ----------------------------------------------------------------------------------------------------------


def check(header: Mapping[str, Any], beside: companions.Companions | None, model: Mapping[str, Any]) -> None:
    """Raises ValueError unless the cache with this header was made by these companions, and `model` says what stands
    behind a text's tokens."""
    made = header["made_for"]
    if beside is None or beside.autoencoder is None:
        raise ValueError("data.name='latents' needs data.companions: the folder whose autoencoder draws and decodes them")
    pairs = [("autoencoder", made["autoencoder"], autoencoder(beside))]
    if header["text_width"]:
        if beside.text is None:
            raise ValueError(f"the latents have texts, and data.companions={beside.folder!r} no text encoder: give theirs")
        pairs.append(("text encoder", made["text_encoder"], text_encoder(beside)))
    for what, found, wanted in pairs:
        if found["weights"] != wanted["weights"]:
            raise ValueError(
                f"the latents were made with the {what} in {found['folder']!r}, that in data.companions="
                f"{beside.folder!r} has other weights: give that folder, or prepare them again"
            )
    if header["text_width"] and not model.get("text_padding") and "text_mask" not in beside.condition([""]):
        raise ValueError(
            "cached texts have no padding, and this network attends to padding: say in the config what stands in its "
            "place, for example model.text_padding = {'kind': 'noisy_replicate'}"
        )


def autoencoder(beside: companions.Companions) -> dict[str, str]:
    """What the latents of these companions depend on: the decoder may be another one, as published ones are."""
    encoder = {key: value for key, value in beside.autoencoder.params.items() if key in ("encoder", "quant_conv")}
    return {"folder": Path(beside.folder).name, "weights": fingerprint(encoder)}


def text_encoder(beside: companions.Companions) -> dict[str, str]:
    """What the tokens of their texts depend on."""
    return {"folder": Path(beside.folder).name, "weights": fingerprint(beside.text.params)}


def fingerprint(params: Params) -> str:
    """sha256 of the names, shapes and types of all arrays, and of up to some 4,096 values of each, evenly spaced."""
    digest = hashlib.sha256()
    for path, leaf in sorted(trees.flatten(params).items()):
        flat = np.asarray(leaf).reshape(-1)
        digest.update(f"{path} {np.shape(leaf)} {flat.dtype} ".encode())
        digest.update(flat[:: max(1, flat.size // _HASHED)].tobytes())
    return digest.hexdigest()
