"""Published weights as runs, and runs as published weights.

    run = load_model("sd15")                               # a folder as diffusers writes it
    pictures = runs.draw(run, runs.run_plan(run), 0, [0, 1], batch_size=2, prompts=["a red fox"] * 2, guidance_scale=7.5)
    load.save("unet.safetensors", write_weights(run, "diffusers"))   # what diffusers' class of this network loads

A run of a folder has the denoiser with its weights, and the config that a run of ours would have. Nothing is downloaded:
the folder is on this machine.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diffjax.build import networks, runs
from diffjax.core import names
from diffjax.core.types import Array, Params
from diffjax.data import sources
from diffjax.models.mdt import distances
from diffjax.nn import positions
from diffjax.runtime import mesh as meshes
from diffjax.weights import dit, folders, keymap, load, mdt, mmdit, pixart, unet

_DISTANCES = "relative_position_bias_table"
LAYOUTS = ("diffusers", "original")  # whose names
_AS_IT_IS = lambda path, array: array  # noqa: E731


def load_model(folder: str | Path, variant: str = "", mesh: jax.sharding.Mesh | None = None, **changes: Any) -> runs.Run:
    """The denoiser of a folder, ready to sample. variant: as of `weights.load.read`; mesh: each weight is laid out on
    its devices as soon as it is read, so that the host never has a second copy of them; changes: other options of the section
    model, such as compute_dtype. Raises FileNotFoundError for what is absent, ValueError for what does not fit.
    """
    config = ConfigDict({"seed": 0, **folders.describe(folder)})
    config.model.update(changes)
    config.data.companions = str(folder)
    config = runs.resolve(config)
    shape = networks.data_shape(config.data)
    denoise, init = networks.denoiser(config.model, shape)
    weights = load.read(Path(folder) / folders.denoiser_part(folder), variant)
    expected = jax.eval_shape(init, jax.random.key(0))
    put = _AS_IT_IS if mesh is None else load.placed(meshes.shardings(expected, mesh))
    params = read_weights(config.model, shape, weights, expected, put)
    return runs.Run(config, denoise, params, 0, shape, runs.run_sampler(config.model, shape), null_class=bool(shape.num_classes))


def read_weights(
    model: Mapping[str, Any], data: sources.DataShape, weights: load.Weights, expected: Params,
    put: Callable[[str, np.ndarray], Array] = _AS_IT_IS,
) -> Params:  # fmt: skip
    """The weights of a file or folder as parameters of the network of a `model` section; put: as of `keymap.to_params`.
    Raises ValueError where they do not fit, and for networks that nobody published."""
    if model["name"] == "dit":
        return dit.to_params(weights, expected, _positions(model, data), weights.source, put)
    if model["name"] == "unet":
        known = ("num_blocks", "heads", "head_dim")
        given = {key: model[key] for key in known if key in model}
        table = unet.keymap_of(weights, model.get("transformer_depth", (1, 1, 1, 0)), **given)
    else:
        is_diffusers = any(entry.startswith("transformer_blocks.") for entry in weights)
        table = _table(model, "diffusers" if is_diffusers else "original")
    params = keymap.to_params(table, weights, expected, weights.source, put)
    if model["name"] == "pixart":
        dit.check_positions(weights, "pos_embed", _positions(model, data), weights.source)
    return params


def write_weights(run: runs.Run, layout: str) -> dict[str, np.ndarray]:
    """The denoiser of a run by the names and shapes of "diffusers" or of the authors' files, "original": the inverse of
    `read_weights`, bit for bit. Raises ValueError for networks that have no such names."""
    names.lookup(dict.fromkeys(LAYOUTS), layout, "layout")
    model = run.config.model.to_dict()
    if run.config.method.get("name") == "amed":
        raise ValueError("found a run of AMED, whose network is its teacher's: export the teacher")
    if model["name"] == "dit":
        return dit.to_weights(run.params, "official" if layout == "original" else layout, _positions(model, run.data))
    weights = keymap.to_weights(_table(model, layout), run.params)
    return weights | (_buffers(model, run.data, weights) if layout == "original" else {})


def _buffers(model: Mapping[str, Any], data: sources.DataShape, weights: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What the authors' files hold beside weights, which the networks here compute."""
    if model["name"] == "pixart":
        return {"pos_embed": _positions(model, data)[None]}
    tables = [name for name in weights if name.endswith(_DISTANCES)]  # of MDT's blocks
    side = data.image_size // model.get("patch", 2)
    index = np.asarray(distances(np.arange(side * side)[None], side))[0].astype(np.int64) if tables else None
    return {name.removesuffix(_DISTANCES) + "relative_position_index": index for name in tables}


def _table(model: Mapping[str, Any], layout: str) -> keymap.KeyMap:
    """Their names of a network's weights, dit's apart. Those of a U-Net with a given width of its heads (Stable Diffusion
    2 and XL) have matrices around their transformers, of one with a number of heads (1, LDM) 1x1 convolutions."""
    name, original = model["name"], layout == "original"
    if name == "unet":
        depths, linear = model.get("transformer_depth", (1, 1, 1, 0)), bool(model.get("head_dim"))
        is_plain = model.get("attention") == "plain"
        if not original:
            return unet.diffusers(linear, unet.PLAIN if is_plain else ())
        heads = (model.get("heads", 8), model.get("head_dim", 0)) if is_plain else None
        return unet.original(depths, model.get("num_blocks", 2), linear, plain_heads=heads)
    if name == "pixart":
        if not original:
            return pixart.DIFFUSERS
        without = () if model.get("text_length", 120) else ("y_embedder.y_embedding",)  # the null caption of training
        return dataclasses.replace(pixart.ORIGINAL, ignored=(*pixart.ORIGINAL.ignored, *without))
    if name == "mmdit":
        return (mmdit.original if original else mmdit.diffusers)(model.get("depth", 18))
    if name == "mdt":
        if not original:
            raise ValueError("diffusers has no MDT: found layout='diffusers', expected 'original', the authors' names")
        return mdt.OFFICIAL
    raise ValueError(f"no names are known for model.name={name!r}; expected one of {sorted(networks.LATENT)}")


def _positions(model: Mapping[str, Any], data: sources.DataShape) -> np.ndarray:
    """The table of a network that computes it."""
    side = data.image_size // model.get("patch", 2)
    mode, base = ("interp", 16) if model["name"] == "pixart" else (model.get("positions", "extrap"), side)
    return positions.table(mode, side, model.get("base_size") or base, model.get("width", 1152))
