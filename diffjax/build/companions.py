"""What stands beside a latent denoiser, frozen: text encoders that make its conditions, an autoencoder for its pictures.

    beside = companions.load("sd15")                        # a folder as diffusers writes it
    cond = beside.condition(["a red fox", "a green car"])   # {"text": (2, 77, 768)}
    pictures = beside.pictures(latents)                     # (n, H, W, 3) in about [-1, 1]

Texts become numbers in two steps: `tokenise` on the host, `encode` a pure function of its parameters, so that a
training step can do it too. Which encoder gives what is in the functions below, one for each kind of model.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core import names
from diffjax.core.types import Array, Key, Params
from diffjax.data import tokenisers
from diffjax.models import t5, text, vae
from diffjax.nn import functional
from diffjax.weights import folders, keymap, load
from diffjax.weights import text as text_tables
from diffjax.weights import vae as vae_tables

Tokens = Mapping[str, np.ndarray]
_AT_ONCE = 8  # texts encoded, and pictures decoded, in one call


class TextEncoder(NamedTuple):
    """tokenise(texts) -> {name: (n, L)}; encode(params, tokens) -> conditions by name (n, ...). empty_is_zero: as a
    negative prompt, the empty text stands for zeros (Podell 2023's released model)."""

    tokenise: Callable[[Sequence[str]], dict[str, np.ndarray]]
    encode: Callable[[Params, Mapping[str, Array]], dict[str, Array]]
    params: Params
    empty_is_zero: bool = False


class Autoencoder(NamedTuple):
    """encode(params, images, key) -> latents as the denoiser sees them; decode(params, latents) -> images; factor:
    pixels a latent along a side."""

    encode: Callable[[Params, Array, Key], Array]
    decode: Callable[[Params, Array], Array]
    params: Params
    factor: int
    channels: int


class Companions(NamedTuple):
    """The parts of one folder; text None: it takes no texts."""

    folder: str
    text: TextEncoder | None
    autoencoder: Autoencoder

    def condition(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Conditions of the denoiser, one row a text. Raises ValueError where the model takes no texts."""
        if self.text is None:
            raise ValueError(f"{self.folder} has no text encoder: it makes no pictures of texts, leave them out")
        return _in_parts(lambda tokens: self.text.encode(self.text.params, tokens), self.text.tokenise(list(texts)))

    def pictures(self, latents: np.ndarray) -> np.ndarray:
        """Images (n, H, W, 3) float32 in about [-1, 1] of latents (n, h, w, c)."""
        decode, params = self.autoencoder.decode, self.autoencoder.params
        return _in_parts(lambda part: {"image": decode(params, part["z"])}, {"z": latents})["image"]


@functools.lru_cache(maxsize=2)
def load_companions(folder: str) -> Companions:
    """The companions in `folder`; the newest two are kept. Raises FileNotFoundError for parts that are absent, ValueError
    for a kind of model or an option that diffjax does not have."""
    kind = folders.index(folder).get("_class_name")
    make = names.lookup(_TEXTS, kind, f"class of {Path(folder) / folders.INDEX}")
    text = make(Path(folder))
    text = text and text._replace(encode=jax.jit(text.encode))
    return Companions(folder, text, autoencoder(Path(folder) / folders.autoencoder_part(folder)))


def autoencoder(folder: Path) -> Autoencoder:
    """The autoencoder in a folder. Raises as `load_companions`."""
    weights = load.read(folder)
    kind, options = folders.autoencoder(load.config(folder))
    make = lambda rngs: getattr(vae, kind)(**options, rngs=rngs)  # noqa: E731
    expected = functional.abstract(make)
    params = keymap.to_params(vae_tables.table(weights, len(options["channel_mult"])), weights, expected, weights.source)
    decode, encode = (functional.functionalize(make, method)[0] for method in ("decode", "encode"))
    if kind == "VQModel":  # a code for each place: nothing is drawn
        encode = lambda params, images, key, exact=encode: exact(params, images)  # noqa: E731
    factor = 2 ** (len(options["channel_mult"]) - 1)
    return Autoencoder(jax.jit(encode), jax.jit(decode), params, factor, options["channels"])


def _clip(folder: Path, part: str = "text_encoder") -> tuple[Callable, Params]:
    """(network, params) of a CLIP text encoder."""
    weights = load.read(folder / part)
    options = text_tables.clip_text_options(load.config(folder / part))
    make = lambda rngs: text.ClipText(**options, rngs=rngs)  # noqa: E731
    table = text_tables.clip_text(weights)
    return functional.functionalize(make)[0], keymap.to_params(table, weights, functional.abstract(make), weights.source)


def _t5(folder: Path, part: str) -> tuple[Callable, Params]:
    weights = load.read(folder / part)
    options = text_tables.t5_options(load.config(folder / part))
    make = lambda rngs: t5.T5(**options, rngs=rngs)  # noqa: E731
    params = keymap.to_params(text_tables.T5, weights, functional.abstract(make), weights.source)
    return functional.functionalize(make)[0], params


def _stable_diffusion(folder: Path) -> TextEncoder:
    network, params = _clip(folder)
    words = tokenisers.ClipTokeniser(folder / "tokenizer")
    return TextEncoder(
        lambda texts: {"tokens": words(texts).ids},
        lambda params, tokens: {"text": network(params, tokens["tokens"]).text},
        params,
    )


def _two_clips(folder: Path) -> tuple[Callable, Callable, dict[str, Params]]:
    """(tokenise, encode, params) of the two encoders of SDXL and SD3: hidden states after all blocks but the last, side by
    side, and both pooled vectors."""
    (one, first), (two, second) = _clip(folder), _clip(folder, "text_encoder_2")
    words, words_2 = tokenisers.ClipTokeniser(folder / "tokenizer"), tokenisers.ClipTokeniser(folder / "tokenizer_2")

    def encode(params: Params, tokens: Mapping[str, Array]) -> tuple[Array, Array, Array]:
        a, b = one(params["one"], tokens["tokens"], skip=1), two(params["two"], tokens["tokens_2"], skip=1)
        return jnp.concatenate([a.hidden, b.hidden], axis=-1), a.pooled, b.pooled

    return lambda texts: {"tokens": words(texts).ids, "tokens_2": words_2(texts).ids}, encode, {"one": first, "two": second}


def _stable_diffusion_xl(folder: Path) -> TextEncoder:
    tokenise, both, params = _two_clips(folder)

    def encode(params: Params, tokens: Mapping[str, Array]) -> dict[str, Array]:
        hidden, _, pooled = both(params, tokens)
        return {"text": hidden, "pooled": pooled}

    return TextEncoder(tokenise, encode, params, folders.index(folder).get("force_zeros_for_empty_prompt", True))


def _stable_diffusion_3(folder: Path) -> TextEncoder:
    """CLIP's tokens, zeros behind their numbers, then T5's; zeros in its place where it was left out (Esser 2024, 5.3)."""
    clip_tokens, both, params = _two_clips(folder)
    has_t5 = (folder / "text_encoder_3").is_dir()
    width = load.config(folder / "transformer")["joint_attention_dim"]
    if has_t5:
        network, params["three"] = _t5(folder, "text_encoder_3")
        pieces = tokenisers.SentencePieceTokeniser(folder / "tokenizer_3", 77)

    def tokenise(texts: Sequence[str]) -> dict[str, np.ndarray]:
        return clip_tokens(texts) | ({"tokens_3": pieces(texts).ids} if has_t5 else {})

    def encode(params: Params, tokens: Mapping[str, Array]) -> dict[str, Array]:
        hidden, *pooled = both(params, tokens)
        hidden = jnp.pad(hidden, [(0, 0), (0, 0), (0, width - hidden.shape[-1])])
        # padding is attended to, as it was in training
        more = network(params["three"], tokens["tokens_3"]) if has_t5 else jnp.zeros_like(hidden)
        return {"text": jnp.concatenate([hidden, more], axis=1), "pooled": jnp.concatenate(pooled, axis=-1)}

    return TextEncoder(tokenise, encode, params)


def _pixart(folder: Path) -> TextEncoder:
    network, params = _t5(folder, "text_encoder")
    pieces = tokenisers.SentencePieceTokeniser(folder / "tokenizer", 120)

    def tokenise(texts: Sequence[str]) -> dict[str, np.ndarray]:
        found = pieces(texts)
        return {"tokens": found.ids, "mask": found.mask}

    def encode(params: Params, tokens: Mapping[str, Array]) -> dict[str, Array]:
        return {"text": network(params, tokens["tokens"], tokens["mask"]), "text_mask": tokens["mask"]}

    return TextEncoder(tokenise, encode, params)


# class in model_index.json -> its text encoder
_TEXTS: dict[str, Callable[[Path], TextEncoder | None]] = {
    "StableDiffusionPipeline": _stable_diffusion,
    "StableDiffusionXLPipeline": _stable_diffusion_xl,
    "StableDiffusion3Pipeline": _stable_diffusion_3,
    "PixArtAlphaPipeline": _pixart,
    "DiTPipeline": lambda folder: None,
    "LDMPipeline": lambda folder: None,
}


def conditions(
    beside: Companions | None, prompts: Sequence[str] | None, negative_prompt: str, count: int
) -> dict[str, np.ndarray]:
    """Conditions of `count` samples from a prompt each, and "negative_<name>" of the negative one, see
    `guidance.negative`; {} for a run without texts. Each text is encoded once. Raises ValueError for prompts that are
    missing, not one a sample, or given to a run that takes none."""
    takes_texts = beside is not None and beside.text is not None
    if takes_texts != (prompts is not None):
        raise ValueError(
            "this network makes pictures of texts and found none: give a prompt" if takes_texts
            else "found a prompt, and this run takes no texts: leave it out"
        )  # fmt: skip
    if prompts is None:
        return {}
    if len(prompts) != count:
        raise ValueError(f"found {len(prompts)} prompts for {count} samples: give one for each")
    distinct = list(dict.fromkeys([*prompts, negative_prompt]))
    rows, found = [distinct.index(text) for text in prompts], beside.condition(distinct)
    last = distinct.index(negative_prompt)
    away = {name: np.repeat(value[last : last + 1], count, axis=0) for name, value in found.items()}
    if not negative_prompt and beside.text.empty_is_zero:
        away = {name: np.zeros_like(value) for name, value in away.items()}
    negative = {f"negative_{name}": value for name, value in away.items()}
    return {name: value[rows] for name, value in found.items()} | negative


def controls(model: Mapping[str, Any], pixels: int, count: int) -> dict[str, np.ndarray]:
    """cond["control"] (count, k) of a network that is told sizes: those of whole pictures of `pixels` a side; {} of one
    that is not. Raises ValueError for another number of controls than PixArt's and SDXL's."""
    num = model.get("controls", 0)
    known = {0: (), 3: (pixels, pixels, 1), 6: (pixels, pixels, 0, 0, pixels, pixels)}
    if num not in known:
        raise ValueError(f"found model.controls={num}, and what they mean is known for {sorted(known)} of them")
    return {"control": np.tile(np.float32(known[num]), (count, 1))} if num else {}


def _in_parts(make: Callable[[dict], dict[str, Array]], rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`make` of a few rows at a time, always as many, so that it is compiled once."""
    count = len(next(iter(rows.values())))
    size, found = min(_AT_ONCE, count), []
    for start in range(0, count, size):
        part = {name: value[start : start + size] for name, value in rows.items()}
        part = {name: np.pad(v, [(0, size - len(v))] + [(0, 0)] * (v.ndim - 1), mode="edge") for name, v in part.items()}
        found.append({name: np.asarray(value)[: count - start] for name, value in make(part).items()})
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}
