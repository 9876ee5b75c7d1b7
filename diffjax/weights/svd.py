"""Names of Stable Video Diffusion's weights in the folders of diffusers: its U-Net and its autoencoder.

    params = keymap.to_params(svd.unet(), load.read("stable-video-diffusion-img2vid/unet"), shapes)
    params = keymap.to_params(svd.vae(levels=4), load.read("stable-video-diffusion-img2vid/vae"), shapes)
    weights = keymap.to_weights(svd.unet(), params)

Convolutions over frames are (out, in, 3, 1, 1) there. A blend's factor lies beside the two layers that it blends, here
in the second.
"""

from diffjax.weights import vae as image_vae
from diffjax.weights.keymap import KeyMap

_TEMPORAL_CONVS = ("*/temporal/conv1", "*/temporal/conv2", "*/time_conv_out")
_RESNET = {
    "*/spatial": "*.spatial_res_block",
    "*/spatial/shift": "*.spatial_res_block.time_emb_proj",
    "*/spatial/skip": "*.spatial_res_block.conv_shortcut",
    "*/temporal": "*.temporal_res_block",
    "*/temporal/shift": "*.temporal_res_block.time_emb_proj",
    "*/temporal/mix_factor": "*.time_mixer.mix_factor",
}


def unet() -> KeyMap:
    """UNetSpatioTemporalConditionModel."""
    names: dict[str, str | tuple[str, ...]] = {
        "time/expand": "time_embedding.linear_1",
        "time/contract": "time_embedding.linear_2",
        "added/expand": "add_embedding.linear_1",
        "added/contract": "add_embedding.linear_2",
        "norm_out": "conv_norm_out",
        "down_blocks/*/resample": "down_blocks.*.downsamplers.0.conv",
        "up_blocks/*/resample": "up_blocks.*.upsamplers.0.conv",
        "*/positions/expand": "*.time_pos_embed.linear_1",
        "*/positions/contract": "*.time_pos_embed.linear_2",
        "*/attentions/*/mix_factor": "*.attentions.*.time_mixer.mix_factor",
        "*/norm_in": "*.temporal_transformer_blocks.0.norm_in",
        **_mlp("*/mlp_in", "*.temporal_transformer_blocks.0.ff_in"),
        **_transformer_block("*/attentions/*/block", "*.attentions.*.transformer_blocks.0"),
        **_transformer_block("*/attentions/*/temporal", "*.attentions.*.temporal_transformer_blocks.0"),
        **_RESNET,
    }
    return KeyMap(names, pointwise=_TEMPORAL_CONVS)


def vae(levels: int) -> KeyMap:
    """AutoencoderKLTemporalDecoder; levels: the length of channel_mult."""
    encoder = image_vae.diffusers(levels).names
    names: dict[str, str | tuple[str, ...]] = {
        **{ours: theirs for ours, theirs in encoder.items() if not ours.startswith("decoder/")},
        "decoder/mid/blocks/*": "decoder.mid_block.resnets.*",
        "decoder/attention/norm": "decoder.mid_block.attentions.0.group_norm",
        "decoder/attention/qkv": tuple(f"decoder.mid_block.attentions.0.to_{part}" for part in "qkv"),
        "decoder/attention/out": "decoder.mid_block.attentions.0.to_out.0",
        "decoder/up/*/resample/conv": "decoder.up_blocks.*.upsamplers.0.conv",
    }
    for ours, theirs in (("mid/blocks/*", "mid_block.resnets.*"), ("up/*/blocks/*", "up_blocks.*.resnets.*")):
        names |= {f"decoder/{ours}{end[1:]}": f"decoder.{theirs}{name[1:]}" for end, name in _RESNET.items()}
    return KeyMap(names, pointwise=_TEMPORAL_CONVS)


def _transformer_block(ours: str, theirs: str) -> dict[str, str | tuple[str, ...]]:
    return {
        ours: theirs,
        f"{ours}/self_attention/qkv": tuple(f"{theirs}.attn1.to_{part}" for part in "qkv"),
        f"{ours}/self_attention/out": f"{theirs}.attn1.to_out.0",
        f"{ours}/cross_attention/q": f"{theirs}.attn2.to_q",
        f"{ours}/cross_attention/kv": tuple(f"{theirs}.attn2.to_{part}" for part in "kv"),
        f"{ours}/cross_attention/out": f"{theirs}.attn2.to_out.0",
        **_mlp(f"{ours}/mlp", f"{theirs}.ff"),
    }


def _mlp(ours: str, theirs: str) -> dict[str, str | tuple[str, ...]]:
    return {f"{ours}/expand": f"{theirs}.net.0.proj", f"{ours}/contract": f"{theirs}.net.2"}
