"""Names of `models.pixart` in published files: the authors' own, and diffusers' PixArtTransformer2DModel.

    params = to_params(ORIGINAL, under(read("PixArt-XL-2-512x512.pth"), "state_dict."), shapes)
    params = to_params(DIFFUSERS, read("PixArt-XL-2-1024-MS/transformer"), shapes)

A folder of diffusers has no table of the null caption: load it into a network of text_length=0, and give the tokens of
an empty text in its place. The authors' table of positions is the formula's, and left out.
"""

from diffjax.weights.keymap import KeyMap

ORIGINAL = KeyMap(
    {
        "embed": "x_embedder.proj",
        "time/noise/expand": "t_embedder.mlp.0",
        "time/noise/contract": "t_embedder.mlp.2",
        "time/size/expand": "csize_embedder.mlp.0",
        "time/size/contract": "csize_embedder.mlp.2",
        "time/aspect/expand": "ar_embedder.mlp.0",
        "time/aspect/contract": "ar_embedder.mlp.2",
        "modulation": "t_block.1",
        "caption/null": "y_embedder.y_embedding",
        "caption/project/expand": "y_embedder.y_proj.fc1",
        "caption/project/contract": "y_embedder.y_proj.fc2",
        "blocks/table": "blocks.{}.scale_shift_table",
        "blocks/attention/qkv": "blocks.{}.attn.qkv",
        "blocks/attention/out": "blocks.{}.attn.proj",
        "blocks/cross/q": "blocks.{}.cross_attn.q_linear",
        "blocks/cross/kv": "blocks.{}.cross_attn.kv_linear",
        "blocks/cross/out": "blocks.{}.cross_attn.proj",
        "blocks/mlp/expand": "blocks.{}.mlp.fc1",
        "blocks/mlp/contract": "blocks.{}.mlp.fc2",
        "head/table": "final_layer.scale_shift_table",
        "head/out": "final_layer.linear",
    },
    ignored=("pos_embed",),
)

DIFFUSERS = KeyMap(
    {
        "embed": "pos_embed.proj",
        "time/noise/expand": "adaln_single.emb.timestep_embedder.linear_1",
        "time/noise/contract": "adaln_single.emb.timestep_embedder.linear_2",
        "time/size/expand": "adaln_single.emb.resolution_embedder.linear_1",
        "time/size/contract": "adaln_single.emb.resolution_embedder.linear_2",
        "time/aspect/expand": "adaln_single.emb.aspect_ratio_embedder.linear_1",
        "time/aspect/contract": "adaln_single.emb.aspect_ratio_embedder.linear_2",
        "modulation": "adaln_single.linear",
        "caption/project/expand": "caption_projection.linear_1",
        "caption/project/contract": "caption_projection.linear_2",
        "blocks/table": "transformer_blocks.{}.scale_shift_table",
        "blocks/attention/qkv": tuple(f"transformer_blocks.{{}}.attn1.to_{part}" for part in "qkv"),
        "blocks/attention/out": "transformer_blocks.{}.attn1.to_out.0",
        "blocks/cross/q": "transformer_blocks.{}.attn2.to_q",
        "blocks/cross/kv": tuple(f"transformer_blocks.{{}}.attn2.to_{part}" for part in "kv"),
        "blocks/cross/out": "transformer_blocks.{}.attn2.to_out.0",
        "blocks/mlp/expand": "transformer_blocks.{}.ff.net.0.proj",
        "blocks/mlp/contract": "transformer_blocks.{}.ff.net.2",
        "head/table": "scale_shift_table",
        "head/out": "proj_out",
    },
)
