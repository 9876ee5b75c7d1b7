"""Sets of images or videos to be evaluated, read by id: samples of a run, files, arrays, data sets.

    samples = of_run(run, plan, "runs/digits_teacher", batch_size=256, mesh=mesh)
    samples.read(0, range(64))            # of seed 0: (64, H, W, C) float32
    of_folder("samples").read(0, [0, 1])  # (2, H, W, C) uint8

Sample i of a seed is the same whoever asks for it and beside which others.
"""

import concurrent.futures
import hashlib
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffjax.build import networks, parts, runs
from diffjax.core import trees
from diffjax.data import clips, pictures, sources
from diffjax.metrics import array_files
from diffjax.runtime import videos

_THREADS = 8  # that decode files; Pillow lets others run meanwhile


class ImageSet(NamedTuple):
    """A set of images.

    read(seed, ids) -> (n, H, W, C), videos (n, T, H, W, C), uint8 or float32 in about [-1, 1]; seeded: samples of a
    run, others are the same for all seeds. facts: what plots are drawn over, "images_seen" and "guidance_scale". texts:
    that of image i is texts[i]. total: how many there are, 0 = as many as wanted. shape: of one. name: for people.
    identity: plain values that tell the set from others; fingerprint(ids): of what those ids are now, so that changed
    files are read again.
    """

    name: str
    read: Callable[[int, Sequence[int]], np.ndarray]
    total: int
    shape: tuple[int, ...]
    identity: Mapping[str, Any]
    fingerprint: Callable[[Sequence[int]], str] = lambda ids: ""
    nfe: float | None = None
    seeded: bool = False
    facts: Mapping[str, float] = {}
    texts: Sequence[str] = ()


def of_run(
    run: runs.Run, plan: Any, name: str, *, batch_size: int, mesh: Mesh, prompts: Sequence[str] = (), **options: Any
) -> ImageSet:
    """Samples of a run along `plan`, `batch_size` on each device of `mesh` at a time. options: of `runs.draw`; prompts:
    that of sample i is prompts[i], so that there are as many samples."""

    def read(seed: int, ids: Sequence[int]) -> np.ndarray:
        texts = {"prompts": [prompts[i] for i in ids]} if prompts else {}
        return runs.draw(run, plan, seed, list(ids), batch_size=batch_size * mesh.size, mesh=mesh, **texts, **options)

    beside, side = runs.run_companions(run), run.data.image_size
    shape = run.data.shape
    if beside is not None and beside.autoencoder is not None:
        shape = (side * beside.factor, side * beside.factor, beside.autoencoder.channels)
    identity = {
        "run": name, "step": run.step, "weights": trees.sha256(run.params), "prompts": list(prompts),
        "plan": f"{jax.tree.structure(plan)} {trees.sha256(plan)}",
        "options": {key: str(value) for key, value in options.items()},
    }  # fmt: skip
    facts = {}
    if "train" in run.config:  # published weights do not say
        facts["images_seen"] = run.step * run.config.train.batch_size
    if options.get("guidance_scale") is not None:
        facts["guidance_scale"] = options["guidance_scale"]
    nfe = _nfe(plan, options, run)
    return ImageSet(name, read, len(prompts), shape, identity, nfe=nfe, seeded=True, facts=facts, texts=prompts)


def of_folder(path: str, channels: int = 3) -> ImageSet:
    """The pictures of a folder with its sub-folders, or of a .zip, in the order of their names. Raises
    FileNotFoundError, and ValueError as `pictures.PictureFiles`: all must have one size, the headers of squares are
    looked at now."""
    root = _existing(path)
    first = pictures.PictureFiles(root, channels)[0]["image"].shape
    files = pictures.PictureFiles(root, channels, image_size=first[0] if first[0] == first[1] else 0)

    def one(index: int) -> np.ndarray:
        image = files[index]["image"]
        if image.shape != first:
            raise ValueError(
                f"picture {files.name(index)} has shape {image.shape}, the first one {first}: make them equal"
            )
        return image

    return _of_files(path, one, [files.name(i) for i in range(len(files))], first, root)


def of_videos(path: str, num_frames: int) -> ImageSet:
    """The first `num_frames` frames of each video file in a folder, in the order of names. Raises FileNotFoundError,
    ValueError for a folder without videos, and, when it is read, for a video that is shorter or of another size."""
    root = _existing(path)
    files = clips.video_files(root)
    first = next(iter(videos.frames_of(files[0]))).shape

    def one(index: int) -> np.ndarray:
        try:
            frames = list(itertools.islice(videos.frames_of(files[index]), num_frames))
        except (OSError, ValueError) as error:
            raise ValueError(f"unreadable video {files[index]} ({error}): replace or remove it") from error
        if len(frames) < num_frames or frames[0].shape != first:
            raise ValueError(
                f"video {files[index]} has {len(frames)} frames of {frames[0].shape}, expected at least {num_frames} "
                f"of {first}"
            )
        return np.stack(frames)

    return _of_files(path, one, [str(file) for file in files], (num_frames, *first), root)


def of_arrays(path: str) -> ImageSet:
    """Images of a .npz: the array arr_0 of ADM's sample files, or `images`, uint8 (N, H, W, C). Raises
    FileNotFoundError, ValueError for a file that is none."""
    held = array_files.shapes(_existing(path))
    found = array_files.read(path, [name for name in ("arr_0", "images") if name in held][:1])
    images = next(iter(found.values()), None)
    if images is None or images.ndim != 4 or images.dtype != np.uint8:
        said = "neither" if images is None else f"{images.shape} {images.dtype}"
        raise ValueError(f"{path} must hold images (N, H, W, C) of uint8 as 'arr_0' or 'images', found {said}")
    return of_memory(images, Path(path).name, {"arrays": str(path), "sha256": hashlib.sha256(images).hexdigest()})


def of_memory(images: np.ndarray, name: str, identity: Mapping[str, Any] = {}) -> ImageSet:
    """Images (N, H, W, C) that are there already."""
    return ImageSet(name, lambda seed, ids: images[np.asarray(ids)], len(images), images.shape[1:], identity)


def of_data(data: ConfigDict) -> ImageSet:
    """The images of a `data` section, as stored. Raises as `sources.load`, ValueError for cached latents."""
    if data.name == "latents":
        raise ValueError("cached latents hold no images: give those they were made of, in their own data section")
    source = parts.source_of(data)
    shape = networks.data_shape(data).shape

    def read(seed: int, ids: Sequence[int]) -> np.ndarray:
        return sources.read(source, list(ids))["image"]

    return ImageSet(data_name(data), read, len(source), shape, {"data": data.to_dict()})


def data_name(data: ConfigDict) -> str:
    """A data set as a report names it, "digits 8x8": no paths."""
    what = data.get("dataset", "") or (Path(data.path).name if data.get("path") else data.name)
    split = f" {data.split}" if data.get("split") else ""
    return f"{what}{split} {data.image_size}x{data.image_size}"


def _of_files(
    path: str, one: Callable[[int], np.ndarray], names: Sequence[str], shape: tuple[int, ...], root: Path
) -> ImageSet:
    def read(seed: int, ids: Sequence[int]) -> np.ndarray:
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            return np.stack(list(pool.map(one, map(int, ids))))

    def fingerprint(ids: Sequence[int]) -> str:
        digest = hashlib.sha256()
        for index in ids:
            facts = (Path(names[index]) if root.is_dir() else root).stat()
            digest.update(f"{names[index]} {facts.st_size} {facts.st_mtime_ns}".encode())
        return digest.hexdigest()

    return ImageSet(Path(path).name, read, len(names), shape, {"files": str(path), "count": len(names)}, fingerprint)


def _existing(path: str) -> Path:
    if not path or not os.path.exists(path):
        raise FileNotFoundError(f"{path!r} does not exist: give a folder or file of images or videos")
    return Path(path)


def _nfe(plan: Any, options: Mapping[str, Any], run: runs.Run) -> float | None:
    """Calls a sample: two at each step of a guided network that is not told the scale itself, three with two strengths;
    None for plans that choose their steps."""
    guided = options.get("guidance_scale") is not None and not run.config.model.get("guidance_condition", False)
    at_once = 1 + guided + (options.get("control_strength") is not None)
    return None if plan.nfe is None else plan.nfe * at_once
