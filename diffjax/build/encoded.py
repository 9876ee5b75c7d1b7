"""Batches of pictures and texts as a latent denoiser takes them: encoded by its companions, on the way to the step.

What the data gives as pixels and captions becomes

    image           latents (B, h, w, c), drawn from the autoencoder's Gaussian with a key of the batch's number
    text, pooled... of the captions; "negative_<name>" of the empty text, for guidance and for texts that are dropped
    control         where the network is told sizes: those of whole pictures

so that data, objectives and the order of images stay what they are without companions.
"""

from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.build import companions
from diffjax.core import rng
from diffjax.core.types import Array, Key
from diffjax.data import loader, sources, transforms


class Encoded:
    """`batches`, encoded; a `data.loader.Batches`. model: the section of the denoiser. Every batch of a run has its own
    key, made of seed and number, so that a resumed run draws the same latents."""

    def __init__(self, batches: loader.Batches, beside: companions.Companions, model: Any, shape: sources.DataShape, seed: int):
        self._batches, self._beside, self._seed, self._count = batches, beside, seed, 0
        self._controls = companions.controls(model, shape.image_size * beside.autoencoder.factor, 1)
        self._empty = beside.condition([""]) if beside.text is not None else {}

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, np.ndarray | Array]:
        batch = dict(next(self._batches))
        key = rng.stream(self._seed, "encode", jnp.uint32(self._count))
        self._count += 1
        rows = len(next(iter(batch.values())))
        if "image" in batch:
            vae = self._beside.autoencoder
            batch["image"] = _latents(vae.encode, vae.params, batch["image"], key)
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
        found = text.encode(text.params, text.tokenise(captions))
        return found | {f"negative_{name}": np.repeat(value, len(captions), axis=0) for name, value in self._empty.items()}


def _latents(encode: Any, params: Any, images: np.ndarray, key: Key) -> Array:
    return encode(params, transforms.to_float(jnp.asarray(images)), key)
