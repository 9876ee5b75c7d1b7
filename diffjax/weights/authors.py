"""Files of DiT's and MDTv2's authors: the sections of a config, read from the names and shapes of the weights.

    sections = describe("dit", load.read("DiT-XL-2-256x256.pt"))

Nothing else in such a file says how the network is built. Both were trained as DDPMs with a linear schedule, predict
noise, and their labels were dropped in training (Peebles & Xie 2023, section 4; Gao 2023, section 4.1).
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from diffjax.core import names
from diffjax.weights.folders import sample_section

# where the numbers are: first block, its distances, the stacks of blocks
_BLOCKS = {"dit": ("blocks",), "mdt": ("en_inblocks", "en_outblocks", "de_blocks")}
_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of DiT by width; Peebles & Xie 2023, table 1


def describe(kind: str, weights: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The sections model, data, method and sample of a "dit" or "mdt". Raises ValueError for names of something else, and
    for a width that no DiT was published with."""
    stacks = names.lookup(_BLOCKS, kind, "kind")
    depths = [_count(weights, stack) for stack in stacks]
    needed = [f"{stacks[0]}.0.mlp.fc1.weight", "x_embedder.proj.weight", "y_embedder.embedding_table.weight",
              "final_layer.linear.weight", "pos_embed"]  # fmt: skip
    missing = [name for name in needed if name not in weights]
    if missing or not all(depths):
        raise ValueError(
            f"these are no weights of {kind}: {missing or stacks} missing; their names are like {sorted(weights)[:3]}"
        )
    hidden, embed, classes, out, positions = (weights[name].shape for name in needed)
    width, channels, patch, _ = embed
    side = math.isqrt(positions[1])
    if kind == "mdt":
        heads = weights["en_inblocks.0.attn.rel_pos_bias.relative_position_bias_table"].shape[1]
    elif width in _HEADS:
        heads = _HEADS[width]
    else:
        raise ValueError(f"found a DiT of width {width}, and its heads are known for {sorted(_HEADS)}")
    options = {"width": width, "depth": sum(depths), "heads": heads, "patch": patch, "mlp_ratio": hidden[0] / width}
    if kind == "mdt":
        options["decoder_depth"] = depths[-1]
    if out[0] == 2 * channels * patch**2:
        options["learned_variance"] = True
    return {
        "model": {"name": kind, "precondition": "eps", "process": "linear", **options},
        "data": {"name": "none", "image_size": side * patch, "channels": channels, "num_classes": classes[0] - 1},
        "method": {"name": "edm", "label_dropout": 0.1},
        "sample": sample_section("linear"),
    }


def _count(weights: Mapping[str, Any], stack: str) -> int:
    return len({match[1] for name in weights if (match := re.match(rf"{stack}\.(\d+)\.", name))})
