"""Single files of DiT, MDTv2, PixArt-alpha and Stable Diffusion 3: the sections of a config, read from their weights.

    sections = describe("dit", load.read("DiT-XL-2-256x256.pt"))

Nothing else in such a file says how the network is built. DiT, MDT and PixArt were trained as DDPMs with a linear
schedule and predict noise (Peebles & Xie 2023, section 4; Gao 2023, section 4.1; Chen 2023, section 3.1).
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from diffjax.core import names
from diffjax.weights.folders import FLOW, FLOW_SAMPLE, sample_section

Sections = dict[str, dict[str, Any]]

_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of DiT and PixArt by width; Peebles & Xie 2023, table 1
_HEAD_DIM = 64  # of Stable Diffusion 3
_LATENTS_SD3 = 128  # a side, of the 1024 pixels that its files were trained for last


def describe(kind: str, weights: Mapping[str, Any]) -> Sections:
    """The sections model, data, method and sample of a "dit", "mdt", "pixart" or "sd3". Raises ValueError for names of
    something else, and for a width that no DiT was published with."""
    return names.lookup(KINDS, kind, "kind")(weights)


def _dit(weights: Mapping[str, Any]) -> Sections:
    return _ddpm("dit", weights, ("blocks",), {}) | {"method": {"name": "edm", "label_dropout": 0.1}}


def _mdt(weights: Mapping[str, Any]) -> Sections:
    stacks = ("en_inblocks", "en_outblocks", "de_blocks")
    table = "en_inblocks.0.attn.rel_pos_bias.relative_position_bias_table"
    _needed("mdt", weights, (table,))
    options = {"heads": weights[table].shape[1], "decoder_depth": _count(weights, stacks[-1])}
    return _ddpm("mdt", weights, stacks, options) | {"method": {"name": "edm", "label_dropout": 0.1}}


def _pixart(weights: Mapping[str, Any]) -> Sections:
    text = "y_embedder.y_proj.fc1.weight"
    _needed("pixart", weights, (text,))
    # the null caption of training is left: an empty text stands for it, as in folders
    options = {"text_width": weights[text].shape[1], "text_length": 0}
    options["controls"] = 3 if any(name.startswith("csize_embedder.") for name in weights) else 0
    sections = _ddpm("pixart", weights, ("blocks",), options)
    side = sections["data"]["image_size"] // sections["model"]["patch"]
    sections["model"]["base_size"] = min(side, 32)  # 16 at 256 pixels, 32 at 512 and 1024
    return sections | {"method": {"name": "edm"}}


def _sd3(weights: Mapping[str, Any]) -> Sections:
    needed = ("x_embedder.proj.weight", "pos_embed", "context_embedder.weight", "y_embedder.mlp.0.weight")
    _needed("sd3", weights, needed)
    (width, channels, patch, _), positions, text, pooled = (weights[name].shape for name in needed)
    options = {
        "width": width, "depth": _count(weights, "joint_blocks"), "heads": width // _HEAD_DIM, "patch": patch,
        "text_width": text[1], "pooled_width": pooled[1], "max_grid": math.isqrt(positions[1]), "stored_positions": True,
        "qk_norm": "joint_blocks.0.x_block.attn.ln_q.weight" in weights,
    }  # fmt: skip
    return {
        "model": {"name": "mmdit", **FLOW, **options},
        "data": {"name": "none", "image_size": _LATENTS_SD3, "channels": channels, "num_classes": 0},
        "method": {"name": "edm"},
        "sample": dict(FLOW_SAMPLE),
    }


KINDS = {"dit": _dit, "mdt": _mdt, "pixart": _pixart, "sd3": _sd3}


def _ddpm(kind: str, weights: Mapping[str, Any], stacks: tuple[str, ...], options: dict[str, Any]) -> Sections:
    """What the three have in common; options: more of `model`, heads among them where the width does not tell."""
    needed = (f"{stacks[0]}.0.mlp.fc1.weight", "x_embedder.proj.weight", "final_layer.linear.weight", "pos_embed")
    _needed(kind, weights, needed)
    hidden, (width, channels, patch, _), out, positions = (weights[name].shape for name in needed)
    depths = [_count(weights, stack) for stack in stacks]
    if not all(depths):
        raise ValueError(f"these are no weights of {kind}: expected blocks in all of {stacks}, found {depths} of them")
    if "heads" not in options and width not in _HEADS:
        raise ValueError(f"found a {kind} of width {width}, and its heads are known for {sorted(_HEADS)}")
    side = math.isqrt(positions[1])
    model = {"width": width, "depth": sum(depths), "heads": _HEADS.get(width), "patch": patch, **options}
    if hidden[0] != 4 * width:
        model["mlp_ratio"] = hidden[0] / width
    if out[0] == 2 * channels * patch**2:
        model["learned_variance"] = True
    labels = weights.get("y_embedder.embedding_table.weight")
    num_classes = 0 if labels is None else labels.shape[0] - 1
    return {
        "model": {"name": kind, "precondition": "eps", "process": "linear", **model},
        "data": {"name": "none", "image_size": side * patch, "channels": channels, "num_classes": num_classes},
        "sample": sample_section("linear"),
    }


def _needed(kind: str, weights: Mapping[str, Any], needed: tuple[str, ...]) -> None:
    if missing := [name for name in needed if name not in weights]:
        raise ValueError(f"these are no weights of {kind}: {missing} missing; their names are like {sorted(weights)[:3]}")


def _count(weights: Mapping[str, Any], stack: str) -> int:
    return len({match[1] for name in weights if (match := re.match(rf"{stack}\.(\d+)\.", name))})
