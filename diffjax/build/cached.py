"""Pictures to cached latents, for diffjax.cli.prepare.

    job = cached.job(config, cached.Crops("random", per_image=2, flips=True))
    for done in latents.write("cache", job.made_for, job.layout, job.num_images, job.records): ...

Every picture gives its crops, each also mirrored if asked, all of them chosen by (seed, number of the picture, number
of the crop). They are encoded in groups that begin anew with each shard, so that a shard is the same bits whoever makes
it when.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from ml_collections import ConfigDict

from diffjax.build import companions, encoded, parts
from diffjax.core import names
from diffjax.data import crops, latents, sources, texts

_GROUP = 16  # pictures read, and texts encoded, at once
_THREADS = 8  # that read, decode and crop


@dataclasses.dataclass(frozen=True)
class Crops:
    """What is cut from a picture: `per_image` windows of `kind`, see `data.crops`, and with `flips` as many of its
    mirror image, whose texts say so where they are generated (`texts.CLASSES`). high: pixels, of the kinds that need
    it. Raises ValueError for an unknown kind, and for centre crops beyond the one there is."""

    kind: str = "centre"
    per_image: int = 1
    flips: bool = False
    high: int = 0

    def __post_init__(self) -> None:
        names.lookup(crops.KINDS, self.kind, "crop")
        if self.per_image < 1 or (self.kind == "centre" and self.per_image > 1):
            raise ValueError(f"found num_crops={self.per_image} of {self.kind!r}, expected 1, or more of another kind")

    @property
    def variants(self) -> int:
        """Records of a picture."""
        return self.per_image * (1 + self.flips)


class Job(NamedTuple):
    """What `latents.write` takes."""

    made_for: dict[str, Any]
    layout: latents.Layout
    num_images: int
    records: Callable[[int, int], Iterator[list[tuple[str, dict[str, Any]]]]]


def job(config: ConfigDict, cut: Crops) -> Job:
    """The preparation of the pictures of a `data` section, by its companions, at the size that image_size latents have.

    Opens both; computes nothing but one text. Raises ValueError for companions that draw no latents, captions that they
    cannot read, data without pictures, and as `parts.source_of`.
    """
    if not config.data.get("companions"):
        raise ValueError("data.companions is empty: name the folder of the model whose autoencoder makes the latents")
    beside = companions.of_data(config.data)
    if beside.autoencoder is None:
        raise ValueError(
            f"data.companions={beside.folder!r} is a text encoder alone: give a folder with an autoencoder"
        )
    if beside.autoencoder.moments is None:
        raise ValueError(f"{beside.folder} has a quantised autoencoder, which draws nothing: give one of KL")
    source = parts.source_of(config.data, whole=True)
    first = source[0]
    if "image" not in first:
        raise ValueError(f"data.name={config.data.name!r} has no pictures: latents are made of these")
    pixels = config.data.image_size * beside.autoencoder.factor
    # one crop before all others: sizes that do not fit are said at once
    crops.crop(np.zeros((2, 2, 1), np.uint8), pixels, cut.kind, np.random.default_rng(0), False, high=cut.high)
    widths = _text_widths(beside) if "caption" in first else (0, 0)
    layout = latents.Layout((config.data.image_size,) * 2 + (2 * config.data.channels,), *widths)
    _check_channels(beside, pixels, layout)
    data = {key: value for key, value in config.data.to_dict().items() if key != "companions"}
    made_for = {"data": data, "crops": dataclasses.asdict(cut), "pixels": pixels, "seed": config.seed}
    made_for["autoencoder"] = encoded.autoencoder(beside)
    made_for["text_encoder"] = encoded.text_encoder(beside) if layout.text_width else None
    mirrored = texts.MIRRORED if config.data.get("captions") in texts.CLASSES else ""

    def records(first: int, last: int) -> Iterator[list[tuple[str, dict[str, Any]]]]:
        def read(start: int) -> list[tuple]:
            return [_cut(source, i, pixels, cut, config.seed) for i in range(start, min(start + _GROUP, last))]

        ahead = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_THREADS)
        for group in grain.MapDataset.range(first, last, _GROUP).map(read).to_iter_dataset(ahead):
            yield from _encoded(group, beside, mirrored)

    return Job(made_for, layout, len(source), records)


def sizes(config: ConfigDict, cut: Crops, num_images: int) -> str:
    """What a cache of `num_images` pictures takes, by the layout of its records; 0: the data is opened to count them.
    Texts are counted at their longest where the companions are there."""
    data = config.data
    folder, has_texts = data.get("companions", ""), bool(data.get("captions"))
    num_images = num_images or len(parts.source_of(data, whole=True))
    plain, tokens, more = latents.Layout((data.image_size,) * 2 + (2 * data.channels,)), 0, ""
    layout = plain
    if has_texts and Path(folder).is_dir():
        beside = companions.of_data(data)
        layout = latents.Layout(plain.moments, *_text_widths(beside))
        tokens = beside.condition([""])["text"].shape[1]
        more = f" (of them at most {layout.num_bytes(tokens) - plain.num_bytes():,} of text)"
    elif has_texts:
        more = f" and its text, which is not counted: data.companions={folder!r} is absent"
    records, each = num_images * cut.variants, layout.num_bytes(tokens)
    return (
        f"{num_images:,} pictures x {cut.variants} (crops, flips) = {records:,} records of {each:,} bytes{more}\n"
        f"{records * each / 1e9:,.3g} GB in {-(-num_images // latents.SHARD_IMAGES):,} shards"
    )


def _check_channels(beside: companions.Companions, pixels: int, layout: latents.Layout) -> None:
    vae = beside.autoencoder
    image = jax.ShapeDtypeStruct((1, pixels, pixels, vae.channels), np.uint8)
    found = jax.eval_shape(vae.moments, vae.params, image).shape[3] // 2
    if 2 * found != layout.moments[2]:
        raise ValueError(
            f"found data.channels={layout.moments[2] // 2}, and latents of {beside.folder} have {found}: set {found}"
        )


def _cut(
    source: sources.Source, index: int, pixels: int, cut: Crops, seed: int
) -> tuple[int, dict[str, Any], np.ndarray, list[dict[str, float]]]:
    """(index, what a record keeps of the item, its crops (V, pixels, pixels, C) uint8, their metadata)."""
    item = dict(source[index])
    image = item.pop("image")
    if image.dtype != np.uint8:
        image = np.round((image + 1) * 127.5).astype(np.uint8)
    pictures, told = [], []
    for number in range(cut.per_image):
        for flip in (False, True)[: 1 + cut.flips]:
            generator = np.random.default_rng([seed, index, number])
            picture, metadata = crops.crop(image, pixels, cut.kind, generator, flip, high=cut.high)
            metadata |= {key: item[key] for key in ("height", "width") if key in item}
            pictures.append(picture)
            told.append(metadata)
    kept = {key: item[key] for key in ("label", "caption") if key in item}
    return index, kept, np.stack(pictures), told


def _encoded(
    group: list[tuple], beside: companions.Companions, mirrored: str
) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """The records of each picture of a group. mirrored: what the text of a mirror image has behind it."""
    moments = beside.moments(np.concatenate([pictures for _, _, pictures, _ in group]))
    said, found = [], None
    if "caption" in group[0][1]:
        said = [str(kept["caption"]) + more for _, kept, _, _ in group for more in dict.fromkeys(("", mirrored))]
        found = beside.condition(said)
    start, kinds = 0, len(said) // len(group)  # texts of a picture: one, or another of its mirror image
    for row, (index, kept, _, told) in enumerate(group):
        records = []
        for i, metadata in enumerate(told):
            record = {**kept, **metadata, "moments": moments[start + i]}
            if found is not None:
                at = kinds * row + (int(metadata["flip"]) if kinds > 1 else 0)
                record |= {key: found[key][at] for key in ("pooled",) if key in found}
                record |= {"caption": said[at], "text": _real(found, at)}
            records.append((f"picture {index}", record))
        yield records
        start += len(told)


def _real(found: Mapping[str, np.ndarray], row: int) -> np.ndarray:
    """The tokens (n, D) of a text that are no padding."""
    if "text_mask" in found:
        return found["text"][row][found["text_mask"][row].astype(bool)]
    return found["text"][row][: found["text_length"][row]]


def _text_widths(beside: companions.Companions) -> tuple[int, int]:
    """(D, P) of the texts; P is 0 where they have no vector of the whole."""
    empty = beside.condition([""])
    if "text_length" not in empty and "text_mask" not in empty:
        raise ValueError(
            f"the texts of {beside.folder} do not say which tokens are padding, and caches keep the others: take the "
            "text encoder of Stable Diffusion 1, XL or PixArt"
        )
    return empty["text"].shape[2], empty["pooled"].shape[1] if "pooled" in empty else 0
