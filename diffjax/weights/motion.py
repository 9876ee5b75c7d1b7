"""Names of published motion modules, and a U-Net made of two files.

    motion = load.read("animatediff-motion-adapter-v1-5-2")     # or "mm_sd_v15_v2.ckpt", of Guo 2024's authors
    net = MotionUNet(image_size=64, channels=4, out_channels=4, **options(motion), rngs=rngs)
    params = merge(load.read("sd15/unet"), motion, shapes, unet_table, max_frames=32)

    both = load.read("a UNetMotionModel")
    params = merge(*split(both), shapes, unet_table, max_frames=32)

    weights = to_weights(params["motion"], max_frames=32)       # as diffusers' MotionAdapter, or original=True
    weights |= keymap.to_weights(unet_table, params["unet"])    # with these as its UNetMotionModel

The parameters of `models.motion_unet` are "unet", for which `weights.unet` has the table, and "motion", whose modules
both kinds of files count as we do. Files hold the sines and cosines of the frames' numbers too, 24 rows in the first
motion modules and 32 in later ones: how many frames they were trained on. They are compared with ours.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from diffjax.core import sinusoids
from diffjax.core.types import Params
from diffjax.weights import keymap
from diffjax.weights.keymap import KeyMap
from diffjax.weights.load import Weights

_MODULE = "motion_modules."
_TABLES = (".pos_embed.pe", ".pos_encoder.pe")
_WRAPPED = "module."  # before each name of a file that was saved in distributed training


def _table(inside: str, block: Mapping[str, str]) -> KeyMap:
    """inside: between a module's name and its parts; block: ours inside a transformer block -> theirs."""
    parts = {"": inside, "blocks": f"{inside}.transformer_blocks.{{}}"}
    for ours, theirs in block.items():
        parts[f"blocks/{ours}"] = f"{inside}.transformer_blocks.{{}}.{theirs}"
    names: dict[str, str | tuple[str, ...]] = {}
    for ours, theirs in parts.items():
        entry = f"*/motion_modules/*/{ours}".rstrip("/")
        name = f"*.motion_modules.*{theirs}"
        names[entry] = tuple(f"{name}.to_{part}" for part in "qkv") if ours.endswith("/qkv") else name
    return KeyMap(names, ignored=tuple(f".*{end.replace('.', '[.]')}" for end in _TABLES))


_FF = {"mlp/expand": "ff.net.0.proj", "mlp/contract": "ff.net.2"}
DIFFUSERS = _table("", {
    "attention1/qkv": "attn1", "attention1/out": "attn1.to_out.0", "attention2/qkv": "attn2",
    "attention2/out": "attn2.to_out.0", **_FF,
})  # fmt: skip
ORIGINAL = _table(".temporal_transformer", {
    "norm1": "norms.0", "attention1/qkv": "attention_blocks.0", "attention1/out": "attention_blocks.0.to_out.0",
    "norm2": "norms.1", "attention2/qkv": "attention_blocks.1", "attention2/out": "attention_blocks.1.to_out.0",
    "norm3": "ff_norm", **_FF,
})  # fmt: skip


def split(weights: Weights) -> tuple[Weights, Weights]:
    """The weights of a U-Net and those of its motion modules, without the "module." of distributed training."""
    named = {name.removeprefix(_WRAPPED): entry for name, entry in weights.entries.items()}
    motion = {name: entry for name, entry in named.items() if _MODULE in name}
    rest = {name: entry for name, entry in named.items() if name not in motion}
    return Weights(rest, f"{weights.source} (U-Net)"), Weights(motion, f"{weights.source} (motion modules)")


def keymap_of(weights: Mapping[str, Any]) -> KeyMap:
    """The table for these motion modules, told apart by their names. Raises ValueError for weights of another kind."""
    others = {"lora": "a motion LoRA", "controlnet_": "a SparseCtrl network"}
    for part, what in others.items():
        if any(part in name for name in weights):
            raise ValueError(f"found {what}, expected motion modules: take mm_sd_v15_v2.ckpt or a MotionAdapter folder")
    if not any(_MODULE in name for name in weights):
        raise ValueError(
            f"found names like {sorted(weights)[:3]}, expected motion modules, which begin with "
            "down_blocks.0.motion_modules.0: take mm_sd_v15_v2.ckpt or a MotionAdapter folder"
        )
    return ORIGINAL if any(".temporal_transformer." in name for name in weights) else DIFFUSERS


def options(weights: Weights) -> dict[str, Any]:
    """Arguments of `MotionUNet` that these motion modules fix: mid_motion, and max_frames where they hold positions.
    Raises ValueError as `keymap_of`."""
    motion = split(weights)[1]
    keymap_of(motion)
    lengths = {entry.shape[1] for name, entry in motion.entries.items() if name.endswith(_TABLES)}
    middle = any(name.startswith("mid_block.") for name in motion)
    return {"mid_motion": middle, **({"max_frames": min(lengths)} if lengths else {})}


def merge(
    unet: Weights, motion: Weights, expected: Params, unet_table: KeyMap, max_frames: int,
    put: Callable[[str, np.ndarray], Any] = lambda path, array: array,
) -> Params:  # fmt: skip
    """{"unet", "motion"} like `expected`, the motion modules of one file in the U-Net of another; `put` as in
    `keymap.to_params`, with paths of the whole.

    Raises ValueError for motion modules of a network with more or fewer levels, for positions that are not ours or too
    few for `max_frames`, and as `keymap.to_params`.
    """
    motion = split(motion)[1]
    table = keymap_of(motion)
    levels = len({name.split(".")[1] for name in motion if name.startswith("down_blocks.")})
    if levels != (wanted := len(expected["motion"]["down_blocks"])):
        raise ValueError(
            f"{motion.source} are for a U-Net of {levels} levels, expected {wanted}: those of Stable Diffusion 1 have "
            "4, of SDXL 3, and only the former are supported"
        )
    _check_positions(motion, max_frames)
    under = lambda part: lambda path, array: put(f"{part}/{path}", array)  # noqa: E731
    return {
        "unet": keymap.to_params(unet_table, unet, expected["unet"], unet.source, under("unet")),
        "motion": keymap.to_params(table, motion, expected["motion"], motion.source, under("motion")),
    }


def to_weights(motion: Params, max_frames: int, original: bool = False) -> dict[str, np.ndarray]:
    """Motion modules, our parameters under "motion", by the names of diffusers or of the authors, with positions."""
    named = keymap.to_weights(ORIGINAL if original else DIFFUSERS, motion)
    parts = [f"attention_blocks.{number}.pos_encoder.pe" for number in (0, 1)] if original else ["pos_embed.pe"]
    last = "ff_norm.bias" if original else "norm3.bias"  # one a block, as wide as its tokens
    for name in [name for name in named if name.endswith(f".{last}")]:
        table = sinusoids.interleaved(max_frames, len(named[name]))[None]
        named |= {name.removesuffix(last) + part: table for part in parts}
    return named


def _check_positions(motion: Weights, max_frames: int) -> None:
    for name, entry in motion.entries.items():
        if not name.endswith(_TABLES):
            continue
        found = np.asarray(entry)[0].astype(np.float32)
        if len(found) < max_frames:
            raise ValueError(
                f"{motion.source} know {len(found)} frames, found model.max_frames={max_frames}: set it to that"
            )
        # half precision has steps of 0.0005 below 1
        if np.abs(found - sinusoids.interleaved(*found.shape)).max() > 1e-3:
            raise ValueError(f"{name} of {motion.source} has other positions than Guo 2024, which are not supported")
