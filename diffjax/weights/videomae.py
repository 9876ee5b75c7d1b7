"""Names of VideoMAE's published weights: version 2's files, and transformers' folders of version 1.

    weights = read("vit_g_hybrid_pt_1200e_ssv2_ft.pth")     # or the folder videomae-base-finetuned-kinetics
    params = to_params(table(weights), weights, abstract(lambda rngs: VideoMAE(**VIDEOMAE_V2_G, rngs=rngs)))

Such a folder's config.json says how the network is built: see `options`. Queries and values have biases and keys have
none, which would change nothing: ours are zero. What classifies, and the decoder of pre-training, are left out.
"""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.weights import load, torch_file
from diffjax.weights.keymap import KeyMap
from diffjax.weights.load import Weights
from diffjax.weights.text import chosen, expect, renamed

_WRAPPED = ("module", "model")
_BIAS = re.compile(r"(.*\.)q_bias")

V2 = KeyMap(
    {
        "patches": "patch_embed.proj",
        "norm": "fc_norm",
        "blocks/norm1": "blocks.{}.norm1",
        "blocks/attention/qkv/kernel": "blocks.{}.attn.qkv.weight",
        "blocks/attention/qkv/bias": tuple(f"blocks.{{}}.attn.{part}_bias" for part in "qkv"),
        "blocks/attention/out": "blocks.{}.attn.proj",
        "blocks/norm2": "blocks.{}.norm2",
        "blocks/mlp/expand": "blocks.{}.mlp.fc1",
        "blocks/mlp/contract": "blocks.{}.mlp.fc2",
    },
    ignored=(r"head\..*",),
)


def _transformers(norm: str) -> KeyMap:
    inside, layers = "videomae.", "videomae.encoder.layer.{}"
    return KeyMap(
        {
            "patches": f"{inside}embeddings.patch_embeddings.projection",
            "norm": norm,
            "blocks/norm1": f"{layers}.layernorm_before",
            "blocks/attention/qkv/kernel": tuple(
                f"{layers}.attention.attention.{part}.weight" for part in ("query", "key", "value")
            ),
            "blocks/attention/qkv/bias": tuple(f"{layers}.attention.attention.{part}_bias" for part in "qkv"),
            "blocks/attention/out": f"{layers}.attention.output.dense",
            "blocks/norm2": f"{layers}.layernorm_after",
            "blocks/mlp/expand": f"{layers}.intermediate.dense",
            "blocks/mlp/contract": f"{layers}.output.dense",
        },
        ignored=(r"classifier\..*", r"decoder\..*", r"encoder_to_decoder\.weight", "mask_token", "position_embeddings"),
    )


TUNED, PRE_TRAINED = _transformers("fc_norm"), _transformers("videomae.layernorm")


def read(path: str | os.PathLike[str]) -> Weights:
    """The weights of a folder or file, `completed`. Files of version 2 hold them as "module" or "model" of a dict.
    Raises as `load.read`."""
    if Path(path).suffix != ".pth":
        return completed(load.read(path))
    found = torch_file.load(path)
    inner = next((found[key] for key in _WRAPPED if isinstance(found.get(key), dict)), found)
    return completed(Weights({name: array for name, array in inner.items() if hasattr(array, "shape")}, str(path)))


def completed(weights: Weights) -> Weights:
    """With biases of keys, zero, and those of transformers 5 (query.bias) under the names of files before (q_bias)."""
    entries = {}
    for name, array in weights.entries.items():
        name = re.sub(r"\.attention\.(query|value)\.bias$", lambda match: f".attention.{match[1][0]}_bias", name)
        entries[name] = array
        if found := _BIAS.fullmatch(name):
            entries[f"{found[1]}k_bias"] = np.zeros(array.shape, np.float32)
    return Weights(entries, weights.source)


def table(weights: Iterable[str]) -> KeyMap:
    """The table for a VideoMAE with these names. Raises ValueError for names of something else."""
    known = {"patch_embed.proj.weight": V2, "fc_norm.weight": TUNED, "videomae.layernorm.weight": PRE_TRAINED}
    return chosen(known, weights, "VideoMAE")


def options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `models.videomae.VideoMAE` from transformers' config.json. Raises ValueError where it cannot say
    them."""
    expect(config, "model_type", "videomae")
    expect(config, "hidden_act", "gelu")
    expect(config, "qkv_bias", True)
    expect(config, "qv_bias", True)
    found = renamed(
        config, width="hidden_size", depth="num_hidden_layers", heads="num_attention_heads", hidden="intermediate_size",
        patch="patch_size", tubelet="tubelet_size", frames="num_frames", image_size="image_size", eps="layer_norm_eps",
    )  # fmt: skip
    if config.get("use_mean_pooling", True):
        return found | {"pooling": "normed_mean", "pooled_eps": 1e-5}
    return found | {"pooling": "mean_normed", "pooled_eps": found["eps"]}
