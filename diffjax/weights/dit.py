"""Published weights of DiT: the authors' files, and folders of diffusers' DiTTransformer2DModel.

    weights = load.read("DiT-XL-2-256x256.pt")
    params = dit.to_params(weights, shapes, embeddings.grid(range(16), range(16), 1152))
    load.save("dit.safetensors", dit.to_weights(params, "official", positions))

Both are read as the authors' network. The class of diffusers computes another function of the same weights: its
frequencies end at 1/10000 and its second LayerNorm has eps 1e-5; here, as in the authors' code, 10000^(-127/128) and
1e-6. It also holds the time and class embedders once in every block: they are read from block 0, and all compared.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from diffjax.core import names
from diffjax.core.types import Params
from diffjax.weights import keymap
from diffjax.weights.keymap import KeyMap

OFFICIAL = KeyMap(
    {
        "conditions/time/expand": "t_embedder.mlp.0",
        "conditions/time/contract": "t_embedder.mlp.2",
        "conditions/label": "y_embedder.embedding_table",
        "embed": "x_embedder.proj",
        "blocks/modulation": "blocks.{}.adaLN_modulation.1",
        "blocks/attention/qkv": "blocks.{}.attn.qkv",
        "blocks/attention/out": "blocks.{}.attn.proj",
        "blocks/mlp/expand": "blocks.{}.mlp.fc1",
        "blocks/mlp/contract": "blocks.{}.mlp.fc2",
        "head/modulation": "final_layer.adaLN_modulation.1",
        "head/out": "final_layer.linear",
    },
    ignored=("pos_embed",),
)

_EMBEDDERS = "transformer_blocks.0.norm1.emb."
DIFFUSERS = KeyMap(
    {
        "conditions/time/expand": _EMBEDDERS + "timestep_embedder.linear_1",
        "conditions/time/contract": _EMBEDDERS + "timestep_embedder.linear_2",
        "conditions/label": _EMBEDDERS + "class_embedder.embedding_table",
        "embed": "pos_embed.proj",
        "blocks/modulation": "transformer_blocks.{}.norm1.linear",
        "blocks/attention/qkv": tuple(f"transformer_blocks.{{}}.attn1.to_{part}" for part in "qkv"),
        "blocks/attention/out": "transformer_blocks.{}.attn1.to_out.0",
        "blocks/mlp/expand": "transformer_blocks.{}.ff.net.0.proj",
        "blocks/mlp/contract": "transformer_blocks.{}.ff.net.2",
        "head/modulation": "proj_out_1",
        "head/out": "proj_out_2",
    },
    ignored=(r"transformer_blocks\.[1-9]\d*\.norm1\.emb\..+", r"pos_embed\.pos_embed"),
)
LAYOUTS = {"official": OFFICIAL, "diffusers": DIFFUSERS}
_POSITIONS = {"official": "pos_embed", "diffusers": "pos_embed.pos_embed"}  # the latter where it was saved


def to_params(
    weights: Mapping[str, Any], expected: Params, positions: np.ndarray, what: str = "the weights",
    put: Callable[[str, np.ndarray], Any] = lambda path, array: array,
) -> Params:  # fmt: skip
    """Weights of either layout as a tree like `expected`; `what` and `put` as of `keymap.to_params`.

    positions: the network's own table (L, D), `embeddings.grid`; a file's table is compared with it and not kept.
    Raises ValueError as `keymap.to_params`, for a file with another table, and where embedders differ between blocks.
    """
    layout = "diffusers" if any(name.startswith("transformer_blocks.") for name in weights) else "official"
    params = keymap.to_params(LAYOUTS[layout], weights, expected, what, put)
    check_positions(weights, _POSITIONS[layout], positions, what)
    if layout == "diffusers":
        _check_tied(weights, what)
    return params


def to_weights(params: Params, layout: str, positions: np.ndarray) -> dict[str, np.ndarray]:
    """The names and shapes of the authors' ("official") or of diffusers' class, complete: the inverse of `to_params`.

    Raises ValueError for another layout, and for networks with attention to the condition, which neither has.
    """
    table = names.lookup(LAYOUTS, layout, "layout")
    if "cross" in params["blocks"]:
        raise ValueError("found blocks that attend to the condition: no published file has them, only condition='norm'")
    weights = keymap.to_weights(table, params)
    if layout == "official":
        weights[_POSITIONS[layout]] = np.asarray(positions, np.float32)[None]
        return weights
    shared = {name: array for name, array in weights.items() if name.startswith(_EMBEDDERS)}
    for block in range(1, params["blocks"]["modulation"]["bias"].shape[0]):
        weights |= {name.replace(".0.", f".{block}.", 1): array for name, array in shared.items()}
    return weights


def check_positions(weights: Mapping[str, Any], name: str, positions: np.ndarray, what: str) -> None:
    """Raises ValueError where `weights` has a table `name` (1, L, D) that is not `positions` (L, D)."""
    if name not in weights:
        return
    found = np.asarray(weights[name], np.float32)
    # half precision is 5e-4 of 1; another grid is wrong by about 1
    if found.shape != (1, *positions.shape) or np.abs(found[0] - positions).max() > 1e-3:
        raise ValueError(
            f"{what}: {name} {list(found.shape)} is not this network's table {[1, *positions.shape]} of sines and "
            "cosines: set image_size and patch to those of the file"
        )


def _check_tied(weights: Mapping[str, Any], what: str) -> None:
    first = {name: np.asarray(weights[name]) for name in weights if name.startswith(_EMBEDDERS)}
    for name in weights:
        match = re.fullmatch(r"transformer_blocks\.\d+\.norm1\.emb\.(.+)", name)
        if match and not np.array_equal(first.get(_EMBEDDERS + match[1]), np.asarray(weights[name])):
            raise ValueError(
                f"{what}: {name} is not that of block 0: a network with its own time and class embedders in every "
                "block, as diffusers trains it, is not DiT; give weights that were converted from the authors'"
            )
