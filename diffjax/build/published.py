"""Published model folders as runs: the denoiser with its weights, and the config that a run of ours would have.

    run = load_model("sd15")                               # a folder as diffusers writes it
    pictures = runs.draw(run, runs.run_plan(run), 0, [0, 1], batch_size=2, prompts=["a red fox"] * 2, guidance_scale=7.5)

Nothing is downloaded: the folder is on this machine.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from diffjax.build import networks, runs
from diffjax.core.types import Params
from diffjax.data import sources
from diffjax.nn import embeddings
from diffjax.weights import dit, folders, keymap, load, mdt, mmdit, pixart, unet


def load_model(folder: str | Path, variant: str = "", **changes: Any) -> runs.Run:
    """The denoiser of a folder, ready to sample. variant: as of `weights.load.read`; changes: other options of the section
    model, such as compute_dtype. Raises FileNotFoundError for what is absent, ValueError for what does not fit.
    """
    config = ConfigDict({"seed": 0, **folders.describe(folder)})
    config.model.update(changes)
    config.data.companions = str(folder)
    shape = networks.data_shape(config.data)
    denoise, init = networks.denoiser(config.model, shape)
    weights = load.read(Path(folder) / folders.denoiser_part(folder), variant)
    params = read_weights(config.model, shape, weights, jax.eval_shape(init, jax.random.key(0)))
    return runs.Run(config, denoise, params, 0, shape, runs.run_sampler(config.model, shape), null_class=bool(shape.num_classes))


def read_weights(model: Mapping[str, Any], data: sources.DataShape, weights: load.Weights, expected: Params) -> Params:
    """The weights of a file or folder as parameters of the network of a `model` section. Raises ValueError where they do
    not fit, and for networks that nobody published."""
    name, options = model["name"], dict(model)
    if name == "dit":
        side = range(data.image_size // options.get("patch", 2))
        return dit.to_params(weights, expected, embeddings.grid(side, side, options["width"]), weights.source)
    is_diffusers = any(entry.startswith(("transformer_blocks.", "down_blocks.")) for entry in weights)
    if name == "unet":
        known = ("num_blocks", "heads", "head_dim")
        given = {key: options[key] for key in known if key in options}
        table = unet.keymap_of(weights, options.get("transformer_depth", (1, 1, 1, 0)), **given)
    elif name == "pixart":
        table = pixart.DIFFUSERS if is_diffusers else pixart.ORIGINAL
    elif name == "mmdit":
        table = (mmdit.diffusers if is_diffusers else mmdit.original)(options.get("depth", 18))
    elif name == "mdt":
        table = mdt.OFFICIAL
    else:
        raise ValueError(f"no weights were published for model.name={name!r}; expected one of {sorted(networks.LATENT)}")
    return keymap.to_params(table, weights, expected, weights.source)
