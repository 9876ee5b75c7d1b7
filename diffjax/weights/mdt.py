"""Published weights of MDTv2, as the authors save them.

    weights = load.read("mdt_xl2_v2_ckpt.pt")
    params = keymap.to_params(mdt.OFFICIAL, weights, shapes)
    weights = keymap.to_weights(mdt.OFFICIAL, params)

Their files also hold each block's table of distances, which is computed here; both position tables are trained.
"""

from diffjax.weights.keymap import KeyMap

_STACKS = {
    "in_blocks": "en_inblocks.{}.",
    "out_blocks": "en_outblocks.{}.",
    "decoder": "de_blocks.{}.",
    "interpolate": "sideblocks.0.",
}
_BLOCK = {
    "project": "skip_linear",
    "bias_by_distance": "attn.rel_pos_bias.relative_position_bias_table",
    "block/modulation": "adaLN_modulation.1",
    "block/attention/qkv": "attn.qkv",
    "block/attention/out": "attn.proj",
    "block/mlp/expand": "mlp.fc1",
    "block/mlp/contract": "mlp.fc2",
}
OFFICIAL = KeyMap(
    {
        "conditions/time/expand": "t_embedder.mlp.0",
        "conditions/time/contract": "t_embedder.mlp.2",
        "conditions/label": "y_embedder.embedding_table",
        "embed": "x_embedder.proj",
        "positions": "pos_embed",
        "decoder_positions": "decoder_pos_embed",
        "head/modulation": "final_layer.adaLN_modulation.1",
        "head/out": "final_layer.linear",
    }
    | {f"{ours}/{part}": theirs + name for ours, theirs in _STACKS.items() for part, name in _BLOCK.items()},
    ignored=(r".+\.relative_position_index",),
)
