"""Names of `models.mmdit` in published files: Stable Diffusion 3's own, and diffusers' SD3Transformer2DModel.

    weights = under(read("sd3_medium.safetensors"), "model.diffusion_model.")
    params = to_params(original(depth=24), weights, shapes)
    params = to_params(diffusers(depth=24), read("stable-diffusion-3-medium-diffusers/transformer"), shapes)

Both hold their table of positions: the network needs stored_positions=True. Networks with a second attention in some
blocks, Stable Diffusion 3.5 medium, do not fit: its names are reported as extra.
"""

from diffjax.weights.keymap import KeyMap


def original(depth: int) -> KeyMap:
    """Table of a network of `depth` blocks, the last of which has no output for its text."""
    names = {
        "positions": "pos_embed",
        "embed": "x_embedder.proj",
        "conditions/noise/expand": "t_embedder.mlp.0",
        "conditions/noise/contract": "t_embedder.mlp.2",
        "conditions/pooled/expand": "y_embedder.mlp.0",
        "conditions/pooled/contract": "y_embedder.mlp.2",
        "conditions/text": "context_embedder",
        "head/modulation": "final_layer.adaLN_modulation.1",
        "head/out": "final_layer.linear",
    }
    for ours, theirs in (("blocks", "joint_blocks.{}"), ("last", f"joint_blocks.{depth - 1}")):
        for stream, block in (("image", "x_block"), ("text", "context_block")):
            names |= {
                f"{ours}/{stream}/modulation": f"{theirs}.{block}.adaLN_modulation.1",
                f"{ours}/{stream}/attention/qkv": f"{theirs}.{block}.attn.qkv",
                f"{ours}/{stream}/attention/norm_q": f"{theirs}.{block}.attn.ln_q",
                f"{ours}/{stream}/attention/norm_k": f"{theirs}.{block}.attn.ln_k",
                f"{ours}/{stream}/attention/out": f"{theirs}.{block}.attn.proj",
                f"{ours}/{stream}/mlp/expand": f"{theirs}.{block}.mlp.fc1",
                f"{ours}/{stream}/mlp/contract": f"{theirs}.{block}.mlp.fc2",
            }
    return KeyMap(names)


# our part of a block -> diffusers' in the stream of the image, and of the text
_PARTS = {
    "modulation": ("norm1.linear", "norm1_context.linear"),
    "attention/qkv": (
        ("attn.to_q", "attn.to_k", "attn.to_v"),
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    ),
    "attention/norm_q": ("attn.norm_q", "attn.norm_added_q"),
    "attention/norm_k": ("attn.norm_k", "attn.norm_added_k"),
    "attention/out": ("attn.to_out.0", "attn.to_add_out"),
    "mlp/expand": ("ff.net.0.proj", "ff_context.net.0.proj"),
    "mlp/contract": ("ff.net.2", "ff_context.net.2"),
}


def diffusers(depth: int) -> KeyMap:
    """Table of a network of `depth` blocks. The modulations of the head and of the last text are (scale, shift) there,
    all others, and all of ours, have the shift first."""
    names: dict[str, str | tuple[str, ...]] = {
        "positions": "pos_embed.pos_embed",
        "embed": "pos_embed.proj",
        "conditions/noise/expand": "time_text_embed.timestep_embedder.linear_1",
        "conditions/noise/contract": "time_text_embed.timestep_embedder.linear_2",
        "conditions/pooled/expand": "time_text_embed.text_embedder.linear_1",
        "conditions/pooled/contract": "time_text_embed.text_embedder.linear_2",
        "conditions/text": "context_embedder",
        "head/modulation": "norm_out.linear",
        "head/out": "proj_out",
    }
    for ours, theirs in (("blocks", "transformer_blocks.{}"), ("last", f"transformer_blocks.{depth - 1}")):
        for part, streams in _PARTS.items():
            for stream, name in zip(("image", "text"), streams, strict=True):
                several = (name,) if isinstance(name, str) else name
                names[f"{ours}/{stream}/{part}"] = tuple(f"{theirs}.{one}" for one in several)
    return KeyMap(names, swapped=("last/text/modulation", "head/modulation"))
