"""Names of published autoencoders: folders of diffusers (AutoencoderKL, VQModel), files of CompVis and Stability AI.

    weights = load.read("sd-vae-ft-ema")                                          # a folder of diffusers
    weights = load.under(load.read("v1-5-pruned.safetensors"), vae.PREFIX)        # a file of the whole model
    params = keymap.to_params(vae.table(weights, levels=4), weights, shapes)

levels: the length of channel_mult. Folders of 2022 (sd-vae-ft-ema, SD v1 and v2) call the parts of attention query,
key, value and proj_attn, later ones to_q and so on; files of the original code have 1x1 convolutions there.
"""

from collections.abc import Iterable

from diffjax.weights.keymap import KeyMap

PREFIX = "first_stage_model."  # of files that hold the diffusion network and the text encoder too
_DIFFUSERS = ("to_q", "to_k", "to_v", "to_out.0")
_DIFFUSERS_2022 = ("query", "key", "value", "proj_attn")


def table(names: Iterable[str], levels: int) -> KeyMap:
    """The table of the file that has these names, without PREFIX.

    Raises ValueError for names that are of no autoencoder, and for those with PREFIX.
    """
    names = set(names)
    middle = "encoder.mid_block.attentions.0."
    if "encoder.mid.attn_1.q.weight" in names:
        return original()
    if middle + "to_q.weight" in names:
        return diffusers(levels)
    if middle + "query.weight" in names:
        return diffusers(levels, _DIFFUSERS_2022)
    if any(name.startswith(PREFIX) for name in names):
        raise ValueError(f"the names begin with {PREFIX}: give those of load.under(weights, {PREFIX!r})")
    some = ", ".join(sorted(names)[:3])
    raise ValueError(
        f"found the names {some}, ...; expected an autoencoder's, among them encoder.mid.attn_1.q.weight or "
        f"{middle}to_q.weight: give the file or folder of the autoencoder"
    )


def diffusers(levels: int, attention: tuple[str, str, str, str] = _DIFFUSERS) -> KeyMap:
    """AutoencoderKL and VQModel of diffusers; attention: what they call queries, keys, values and output. Their decoder
    counts levels from the lowest resolution, ours from the image."""
    *qkv, out = (f"*.mid_block.attentions.0.{name}" for name in attention)
    names: dict[str, str | tuple[str, ...]] = {
        "encoder/down/*/resample": "encoder.down_blocks.*.downsamplers.0.conv",
        "*/mid/block0": "*.mid_block.resnets.0",
        "*/mid/block1": "*.mid_block.resnets.1",
        "*/mid/attention/norm": "*.mid_block.attentions.0.group_norm",
        "*/mid/attention/qkv": tuple(qkv),
        "*/mid/attention/out": out,
        "*/norm_out": "*.conv_norm_out",
        "codebook": "quantize.embedding",
    }
    names |= _blocks("encoder/down/*/blocks/*", "encoder.down_blocks.*.resnets.*", "conv_shortcut")
    for level in range(levels):
        theirs = f"decoder.up_blocks.{levels - 1 - level}"
        names[f"decoder/up/{level}/resample/conv"] = f"{theirs}.upsamplers.0.conv"
        names |= _blocks(f"decoder/up/{level}/blocks/*", f"{theirs}.resnets.*", "conv_shortcut")
    return KeyMap(names)


def original() -> KeyMap:
    """The classes of CompVis's latent-diffusion, and those of Stability AI after them, without PREFIX."""
    names: dict[str, str | tuple[str, ...]] = {
        "encoder/down/*/resample": "encoder.down.*.downsample.conv",
        "decoder/up/*/resample/conv": "decoder.up.*.upsample.conv",
        "*/mid/block0": "*.mid.block_1",
        "*/mid/block1": "*.mid.block_2",
        "*/mid/attention": "*.mid.attn_1",
        "*/mid/attention/qkv": ("*.mid.attn_1.q", "*.mid.attn_1.k", "*.mid.attn_1.v"),
        "*/mid/attention/out": "*.mid.attn_1.proj_out",
        "codebook": "quantize.embedding",
    }
    names |= _blocks("encoder/down/*/blocks/*", "encoder.down.*.block.*", "nin_shortcut")
    names |= _blocks("decoder/up/*/blocks/*", "decoder.up.*.block.*", "nin_shortcut")
    # of files of the autoencoder alone: its discriminator and perceptual loss, its average, colours of segmentations
    ignored = (r"loss\..*", r"model_ema\..*", r"colorize")
    return KeyMap(names, pointwise=("*/mid/attention/qkv", "*/mid/attention/out"), ignored=ignored)


def _blocks(ours: str, theirs: str, skip: str) -> dict[str, str]:
    """Residual blocks whose convolution on the skip is called `skip`."""
    return {ours: theirs, f"{ours}/skip": f"{theirs}.{skip}"}
