"""Names of published weights of `models.unet`: folders of diffusers, and single files of CompVis and Stability AI.

    weights = load.read("sd15/unet")                          # or "v1-5-pruned.safetensors"
    table = keymap_of(weights, transformer_depth=(1, 1, 1, 0))
    params = to_params(table, weights, shapes)
    weights = to_weights(original((1, 1, 1, 0)), params)      # the other kind of names

Our modules are named as diffusers' are, block by block; the single files count blocks through all levels. Both have the
projections around a transformer as 1x1 convolutions (Stable Diffusion 1, LDM) or as matrices (2 and XL). LDM-4-G's
class tokens are in its single file only; in a folder they would be "classes.weight".

Of plain attention (LDM-4 of faces and bedrooms) folders of 2022 call the parts query, key, value and proj_attn, later
ones to_q and so on; single files have [q | k | v] head by head in one convolution, so that its table needs the heads.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from diffjax.weights.keymap import KeyMap
from diffjax.weights.load import Weights

PREFIX = "model.diffusion_model."  # of the network in a single file

_TRANSFORMER = {
    "proj_in": "proj_in",
    "proj_out": "proj_out",
    "blocks": "transformer_blocks.{}",
    "blocks/self_attention/qkv": tuple(f"transformer_blocks.{{}}.attn1.to_{part}" for part in "qkv"),
    "blocks/self_attention/out": "transformer_blocks.{}.attn1.to_out.0",
    "blocks/cross_attention/q": "transformer_blocks.{}.attn2.to_q",
    "blocks/cross_attention/kv": tuple(f"transformer_blocks.{{}}.attn2.to_{part}" for part in "kv"),
    "blocks/cross_attention/out": "transformer_blocks.{}.attn2.to_out.0",
    "blocks/mlp/expand": "transformer_blocks.{}.ff.net.0.proj",
    "blocks/mlp/contract": "transformer_blocks.{}.ff.net.2",
}
_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "shift": "emb_layers.1", "step_shift": "emb_nfe_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "skip": "skip_connection",
}  # fmt: skip
PLAIN = ("to_q", "to_k", "to_v", "to_out.0")
_PLAIN_2022 = ("query", "key", "value", "proj_attn")


def diffusers(linear_projection: bool = False, plain: Sequence[str] = ()) -> KeyMap:
    """Names of UNet2DConditionModel, linear_projection: its use_linear_projection; or of UNet2DModel, plain: what its
    attention calls queries, keys, values and output."""
    attention = {"norm": "group_norm", "qkv": tuple(plain[:3]), "out": plain[3]} if plain else _TRANSFORMER
    names = {
        "time/expand": "time_embedding.linear_1",
        "time/contract": "time_embedding.linear_2",
        "added/expand": "add_embedding.linear_1",
        "added/contract": "add_embedding.linear_2",
        "norm_out": "conv_norm_out",
        "*/shift": "*.time_emb_proj",
        "*/skip": "*.conv_shortcut",
        "down_blocks/*/resample": "down_blocks.*.downsamplers.0.conv",
        "up_blocks/*/resample": "up_blocks.*.upsamplers.0.conv",
        **_under("*/attentions/*", "*.attentions.*", attention),
    }
    return KeyMap(names, _pointwise(linear_projection))


def original(
    transformer_depth: Sequence[int], num_blocks: int = 2, linear_projection: bool = False, prefix: str = PREFIX,
    plain_heads: tuple[int, int] | None = None,
) -> KeyMap:  # fmt: skip
    """Names of the single files for a network of this architecture, also those of SFD-v's step condition (Zhou 2024's
    code). Text encoders, autoencoders and averages in the same file are left alone. plain_heads: (heads, head_dim) of
    plain attention, None for transformers."""
    attention = _TRANSFORMER if plain_heads is None else {"out": "proj_out"}
    names = {
        "time/expand": "time_embed.0", "time/contract": "time_embed.2",
        "step/expand": "nfe_embed.0", "step/contract": "nfe_embed.2",
        "added/expand": "label_emb.0.0", "added/contract": "label_emb.0.2",
        "map_guidance": "map_guidance",  # nobody's but ours
        "conv_in": "input_blocks.0.0", "norm_out": "out.0", "conv_out": "out.2",
        **_block("mid_block/resnets/0", "middle_block.0"),
        **_under("mid_block/attentions/0", "middle_block.1", attention),
        **_block("mid_block/resnets/1", f"middle_block.{2 if any(transformer_depth) else 1}"),
    }  # fmt: skip
    levels = len(transformer_depth)
    for level, depth in enumerate(transformer_depth):
        first = 1 + level * (num_blocks + 1)
        for index in range(num_blocks):
            names |= _pair(f"down_blocks/{level}", index, f"input_blocks.{first + index}", attention)
        names[f"down_blocks/{level}/resample"] = f"input_blocks.{(level + 1) * (num_blocks + 1)}.0.op"
        up = levels - 1 - level  # counted from the lowest resolution
        for index in range(num_blocks + 1):
            names |= _pair(f"up_blocks/{up}", index, f"output_blocks.{up * (num_blocks + 1) + index}", attention)
        last = (up + 1) * (num_blocks + 1) - 1
        names[f"up_blocks/{up}/resample"] = f"output_blocks.{last}.{2 if depth else 1}.conv"
    named = {ours: _prefixed(prefix, theirs) for ours, theirs in names.items()}
    named["classes"] = "cond_stage_model.embedding"
    others = (rf"(?!{re.escape(prefix)}).*",) if prefix else ()
    if plain_heads is None:
        return KeyMap(named, _pointwise(linear_projection), others)
    qkv, out = "*/attentions/*/qkv", "*/attentions/*/out"
    return KeyMap(named, ignored=others, sequential=(qkv, out), headwise={qkv: plain_heads})


def keymap_of(
    weights: Mapping[str, Any], transformer_depth: Sequence[int], num_blocks: int = 2, heads: int = 8, head_dim: int = 0
) -> KeyMap:
    """The table for these weights, told apart by names and shapes. Raises ValueError for names of neither kind."""
    linear = all(len(weights[name].shape) == 2 for name in weights if name.endswith(".proj_in.weight"))
    for prefix in (PREFIX, ""):
        if any(name.startswith(f"{prefix}input_blocks.") for name in weights):
            is_plain = f"{prefix}middle_block.1.qkv.weight" in weights
            return original(transformer_depth, num_blocks, linear, prefix, (heads, head_dim) if is_plain else None)
    if any(name.startswith("down_blocks.") for name in weights):
        middle = "mid_block.attentions.0."
        plain = [parts for parts in (PLAIN, _PLAIN_2022) if f"{middle}{parts[0]}.weight" in weights]
        return diffusers(linear, plain[0] if plain else ())
    raise ValueError(
        f"found names like {sorted(weights)[:3]}; expected a U-Net's, which begin with down_blocks. (the folder unet/ "
        f"of diffusers) or {PREFIX} (a single file)"
    )


def averaged(weights: Weights) -> Weights:
    """A single file of training with the averages of the network's weights in their place: published samples are made
    with these. Names under "model_ema." have no dots. Raises ValueError where there are none, or not for all."""
    flat = lambda name: "model_ema." + name.removeprefix("model.").replace(".", "")  # noqa: E731
    named = {name: flat(name) for name in weights if name.startswith(PREFIX)}
    found = {name: weights[average] for name, average in named.items() if average in weights}
    if not found:
        raise ValueError(f"{weights.source} has no averages under 'model_ema.': read it without asking for them")
    if missing := sorted(set(named) - set(found)):
        raise ValueError(f"{weights.source} has averages, but none of {missing[:3]}: get the file again")
    return Weights({**weights.entries, **found}, f"{weights.source} (averages)")


def _under(ours: str, theirs: str, names: Mapping[str, str | tuple[str, ...]]) -> dict[str, str | tuple[str, ...]]:
    return {ours: theirs} | {f"{ours}/{key}": _prefixed(f"{theirs}.", value) for key, value in names.items()}


def _prefixed(prefix: str, names: str | tuple[str, ...]) -> str | tuple[str, ...]:
    return prefix + names if isinstance(names, str) else tuple(prefix + name for name in names)


def _block(ours: str, theirs: str) -> dict[str, str | tuple[str, ...]]:
    return _under(ours, theirs, _RESNET)


def _pair(
    ours: str, index: int, theirs: str, attention: Mapping[str, str | tuple[str, ...]]
) -> dict[str, str | tuple[str, ...]]:
    """A residual block, and the attention after it, if there is one."""
    after = _under(f"{ours}/attentions/{index}", f"{theirs}.1", attention)
    return _block(f"{ours}/resnets/{index}", f"{theirs}.0") | after


def _pointwise(linear_projection: bool) -> tuple[str, ...]:
    return () if linear_projection else ("*/proj_in", "*/proj_out")
