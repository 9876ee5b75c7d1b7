"""Names of DINOv2's published weights: the authors' file dinov2_vitl14_pretrain.pth, and transformers' folders.

    weights = read("dinov2_vitl14_pretrain.pth")                # or the folder dinov2-large
    params = to_params(table(weights), weights, abstract(lambda rngs: Dinov2(**DINOV2_L, rngs=rngs)))

Such a folder's config.json says the same as `DINOV2_L`: see `options`. A token for masked patches is left out: there
are none here.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from diffjax.weights.keymap import KeyMap
from diffjax.weights.text import chosen, expect, renamed

_ORIGINAL = "blocks.{}"
ORIGINAL = KeyMap(
    {
        "class_token": "cls_token",
        "positions": "pos_embed",
        "patches": "patch_embed.proj",
        "norm": "norm",
        "blocks/norm1": f"{_ORIGINAL}.norm1",
        "blocks/attention/qkv": f"{_ORIGINAL}.attn.qkv",
        "blocks/attention/out": f"{_ORIGINAL}.attn.proj",
        "blocks/scale1": f"{_ORIGINAL}.ls1.gamma",
        "blocks/norm2": f"{_ORIGINAL}.norm2",
        "blocks/mlp/expand": f"{_ORIGINAL}.mlp.fc1",
        "blocks/mlp/contract": f"{_ORIGINAL}.mlp.fc2",
        "blocks/scale2": f"{_ORIGINAL}.ls2.gamma",
    },
    ignored=("mask_token",),
)


def _transformers(query: tuple[str, ...], out: str) -> KeyMap:
    layers = "encoder.layer.{}"
    return KeyMap(
        {
            "class_token": "embeddings.cls_token",
            "positions": "embeddings.position_embeddings",
            "patches": "embeddings.patch_embeddings.projection",
            "norm": "layernorm",
            "blocks/norm1": f"{layers}.norm1",
            "blocks/attention/qkv": tuple(f"{layers}.attention.{part}" for part in query),
            "blocks/attention/out": f"{layers}.attention.{out}",
            "blocks/scale1": f"{layers}.layer_scale1.lambda1",
            "blocks/norm2": f"{layers}.norm2",
            "blocks/mlp/expand": f"{layers}.mlp.fc1",
            "blocks/mlp/contract": f"{layers}.mlp.fc2",
            "blocks/scale2": f"{layers}.layer_scale2.lambda1",
        },
        ignored=(r"embeddings\.mask_token",),
    )


# as the published files have it, and as transformers calls it from version 5 on
TRANSFORMERS = _transformers(tuple(f"attention.{part}" for part in ("query", "key", "value")), "output.dense")
TRANSFORMERS_5 = _transformers(tuple(f"{part}_proj" for part in "qkv"), "o_proj")


def table(weights: Iterable[str]) -> KeyMap:
    """The table for a DINOv2 with these names. Raises ValueError for names of something else."""
    known = {
        "cls_token": ORIGINAL,
        "encoder.layer.0.attention.attention.query.weight": TRANSFORMERS,
        "encoder.layer.0.attention.q_proj.weight": TRANSFORMERS_5,
    }
    return chosen(known, weights, "DINOv2")


def options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `models.dinov2.Dinov2` from transformers' config.json. Raises ValueError where they cannot say it."""
    expect(config, "model_type", "dinov2")
    expect(config, "layer_norm_eps", 1e-6)
    expect(config, "hidden_act", "gelu")
    expect(config, "use_swiglu_ffn", False)
    found = renamed(
        config, width="hidden_size", depth="num_hidden_layers", heads="num_attention_heads", patch="patch_size",
        trained_size="image_size",
    )  # fmt: skip
    return {**found, "hidden": int(config.get("mlp_ratio", 4) * found["width"])}
