"""Names of published text and image encoders: CLIP's as transformers and OpenCLIP write them, T5's and BERT's as the
former.

    weights = read("sd15/text_encoder")
    params = to_params(clip_text(weights), weights, abstract(lambda rngs: ClipText(**options, rngs=rngs)))

`options` are those of `clip_text_options(config(folder))`, or a preset of the model's module. Where they are in single
files, for `load.under`:

    Stable Diffusion 1    "cond_stage_model.transformer."       clip_text
    Stable Diffusion 2    "cond_stage_model.model."             clip_text, OPEN_CLIP_H
    Stable Diffusion XL   "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."    clip_text, both
    SVD                   "conditioner.embedders.0.open_clip.model.visual."    clip_image
"""

from collections.abc import Iterable, Mapping
from typing import Any

from diffjax.core import names
from diffjax.weights.keymap import KeyMap

# transformers' names -> ours
_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}

# what sections of a whole CLIP's config.json need not say: the values of ViT-B/32
_CLIP_TEXT_DEFAULTS = {
    "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8,
    "hidden_act": "quick_gelu", "vocab_size": 49408, "max_position_embeddings": 77,
}  # fmt: skip
_CLIP_IMAGE_DEFAULTS = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "hidden_act": "quick_gelu", "patch_size": 32, "image_size": 224,
}  # fmt: skip


def _transformers(inside: str, layers: str) -> dict[str, str | tuple[str, ...]]:
    """CLIP's blocks as transformers names them."""
    return {
        "blocks/norm1": f"{inside}{layers}.layer_norm1",
        "blocks/norm2": f"{inside}{layers}.layer_norm2",
        "blocks/attention/qkv": tuple(f"{inside}{layers}.self_attn.{part}_proj" for part in "qkv"),
        "blocks/attention/out": f"{inside}{layers}.self_attn.out_proj",
        "blocks/mlp/expand": f"{inside}{layers}.mlp.fc1",
        "blocks/mlp/contract": f"{inside}{layers}.mlp.fc2",
    }


def _open_clip(layers: str) -> dict[str, str | tuple[str, ...]]:
    """CLIP's blocks as OpenCLIP and OpenAI name them; queries, keys and values are one matrix there too."""
    return {
        "blocks/norm1": f"{layers}.ln_1",
        "blocks/norm2": f"{layers}.ln_2",
        "blocks/attention/qkv/kernel": f"{layers}.attn.in_proj_weight",
        "blocks/attention/qkv/bias": f"{layers}.attn.in_proj_bias",
        "blocks/attention/out": f"{layers}.attn.out_proj",
        "blocks/mlp/expand": f"{layers}.mlp.c_fc",
        "blocks/mlp/contract": f"{layers}.mlp.c_proj",
    }


def _clip_text(inside: str) -> KeyMap:
    return KeyMap(
        {
            "tokens": f"{inside}embeddings.token_embedding",
            "positions": f"{inside}embeddings.position_embedding.weight",
            "norm": f"{inside}final_layer_norm",
            "projection": "text_projection",
            **_transformers(inside, "encoder.layers.{}"),
        },
        # tables of positions, the other half of a whole CLIP, and a projection that a model need not have
        ignored=(
            rf"{inside}embeddings\.position_ids", r"(vision_model|visual_projection)\..*", r"logit_scale",
            r"text_projection\.weight",
        ),  # fmt: skip
    )


# from transformers 5 on CLIPTextModel has no prefix of its own
CLIP_TEXT, CLIP_TEXT_PLAIN = _clip_text("text_model."), _clip_text("")

OPEN_CLIP_TEXT = KeyMap(
    {
        "tokens": "token_embedding",
        "positions": "positional_embedding",
        "norm": "ln_final",
        "projection/kernel": "text_projection",
        **_open_clip("transformer.resblocks.{}"),
    },
    straight=("projection/kernel",),
    # Stable Diffusion 2 ships the last of 24 blocks and the projection, and uses neither
    ignored=(r"transformer\.resblocks\.23\..*", r"text_projection", r"logit_scale", r"attn_mask", r"visual\..*"),
)

CLIP_IMAGE = KeyMap(
    {
        "class_token": "vision_model.embeddings.class_embedding",
        "patches": "vision_model.embeddings.patch_embedding",
        "positions": "vision_model.embeddings.position_embedding.weight",
        "norm_in": "vision_model.pre_layrnorm",
        "norm": "vision_model.post_layernorm",
        "projection": "visual_projection",
        **_transformers("vision_model.", "encoder.layers.{}"),
    },
    ignored=(r"vision_model\.embeddings\.position_ids", r"(text_model|text_projection)\..*", r"logit_scale"),
)

OPEN_CLIP_IMAGE = KeyMap(
    {
        "class_token": "class_embedding",
        "patches": "conv1",
        "positions": "positional_embedding",
        "norm_in": "ln_pre",
        "norm": "ln_post",
        "projection/kernel": "proj",
        **_open_clip("transformer.resblocks.{}"),
    },
    straight=("projection/kernel",),
)

T5 = KeyMap(
    {
        "tokens": "shared",
        "distances": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        "norm": "encoder.final_layer_norm",
        "blocks/norm1": "encoder.block.{}.layer.0.layer_norm",
        "blocks/attention/qkv": tuple(f"encoder.block.{{}}.layer.0.SelfAttention.{part}" for part in "qkv"),
        "blocks/attention/out": "encoder.block.{}.layer.0.SelfAttention.o",
        "blocks/norm2": "encoder.block.{}.layer.1.layer_norm",
        "blocks/expand": tuple(f"encoder.block.{{}}.layer.1.DenseReluDense.wi_{part}" for part in (0, 1)),
        "blocks/contract": "encoder.block.{}.layer.1.DenseReluDense.wo",
    },
    # the same table of tokens again, and the other half of a whole T5
    ignored=(r"encoder\.embed_tokens\.weight", r"decoder\..*", r"lm_head\.weight"),
)

BERT = KeyMap(
    {
        "tokens": "embeddings.word_embeddings",
        "positions": "embeddings.position_embeddings.weight",
        "kinds": "embeddings.token_type_embeddings.weight",
        "norm": "embeddings.LayerNorm",
        "blocks/attention/qkv": tuple(f"encoder.layer.{{}}.attention.self.{x}" for x in ("query", "key", "value")),
        "blocks/attention/out": "encoder.layer.{}.attention.output.dense",
        "blocks/norm1": "encoder.layer.{}.attention.output.LayerNorm",
        "blocks/mlp/expand": "encoder.layer.{}.intermediate.dense",
        "blocks/mlp/contract": "encoder.layer.{}.output.dense",
        "blocks/norm2": "encoder.layer.{}.output.LayerNorm",
    },
    # a table of positions, and what is made of the first token
    ignored=(r"embeddings\.position_ids", r"pooler\.dense\.(weight|bias)"),
)


def clip_text(weights: Iterable[str]) -> KeyMap:
    """The table for a CLIP text encoder with these names. Raises ValueError for names of something else."""
    known = {
        "text_model.embeddings.token_embedding.weight": CLIP_TEXT,
        "embeddings.token_embedding.weight": CLIP_TEXT_PLAIN,
        "token_embedding.weight": OPEN_CLIP_TEXT,
    }
    return chosen(known, weights, "CLIP text encoder")


def clip_image(weights: Iterable[str]) -> KeyMap:
    """The table for a CLIP image encoder with these names. Raises ValueError for names of something else."""
    known = {"vision_model.embeddings.class_embedding": CLIP_IMAGE, "class_embedding": OPEN_CLIP_IMAGE}
    return chosen(known, weights, "CLIP image encoder")


def clip_text_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `models.text.ClipText` from transformers' config.json. Raises ValueError where they cannot say it.

    Configs written before transformers 4.31 name 2 as the end token, which it is not: the highest id is meant there.
    """
    end = config.get("eos_token_id", 49407)
    return {
        **_clip_options(config, vocabulary="vocab_size", length="max_position_embeddings"),
        "projection": config["projection_dim"] if _has_class(config, "CLIPTextModelWithProjection") else 0,
        "end": None if end == 2 else end,
    }


def clip_image_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `models.image_encoder.ClipImage` from transformers' config.json. Raises ValueError as above."""
    return {
        **_clip_options(config, patch="patch_size", image_size="image_size"),
        "projection": config["projection_dim"] if _has_class(config, "CLIPVisionModelWithProjection") else 0,
    }


def clip_options(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of `models.image_encoder.ClipImage` and `models.text.ClipText` from the config.json of a whole CLIP,
    whose weights both tables read. Raises ValueError for another kind of model.

    transformers leaves out of the two sections what its classes have anyway.
    """
    if config.get("model_type") != "clip" or not {"vision_config", "text_config"} <= set(config):
        raise ValueError(f"found model_type={config.get('model_type')!r} in config.json, expected 'clip', a whole one")
    size, kind = {"projection_dim": config.get("projection_dim", 512)}, "architectures"
    image = {**_CLIP_IMAGE_DEFAULTS, **config["vision_config"], **size, kind: ["CLIPVisionModelWithProjection"]}
    words = {**_CLIP_TEXT_DEFAULTS, **config["text_config"], **size, kind: ["CLIPTextModelWithProjection"]}
    return clip_image_options(image), clip_text_options(words)


def t5_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `models.t5.T5` from transformers' config.json. Raises ValueError for the first version of T5."""
    if config.get("feed_forward_proj") != "gated-gelu":
        raise ValueError(
            f"found feed_forward_proj={config.get('feed_forward_proj')!r}, expected 'gated-gelu': T5 version 1.1, "
            "which PixArt and Stable Diffusion 3 use"
        )
    expect(config, "layer_norm_epsilon", 1e-6)
    options = renamed(
        config, width="d_model", depth="num_layers", heads="num_heads", hidden="d_ff", head_size="d_kv",
        vocabulary="vocab_size", buckets="relative_attention_num_buckets",
    )  # fmt: skip
    return {**options, "max_distance": config.get("relative_attention_max_distance", 128)}


def bert_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `models.bert.Bert` from transformers' config.json. Raises ValueError where they cannot say it."""
    expect(config, "layer_norm_eps", 1e-12)
    expect(config, "position_embedding_type", "absolute")
    expect(config, "type_vocab_size", 2)
    return _transformer(config, vocabulary="vocab_size", length="max_position_embeddings")


def _clip_options(config: Mapping[str, Any], **more: str) -> dict[str, Any]:
    """What CLIP's two encoders have in common, and `more` of `renamed`."""
    expect(config, "layer_norm_eps", 1e-5)
    return _transformer(config, **more)


def _transformer(config: Mapping[str, Any], **more: str) -> dict[str, Any]:
    """Sizes and activation as BERT, and CLIP after it, call them."""
    options = renamed(
        config, width="hidden_size", depth="num_hidden_layers", heads="num_attention_heads", hidden="intermediate_size",
        activation="hidden_act", **more,
    )  # fmt: skip
    return {**options, "activation": names.lookup(_ACTIVATIONS, options["activation"], "hidden_act")}


def renamed(config: Mapping[str, Any], **ours: str) -> dict[str, Any]:
    """Values of the config by our names. Raises ValueError naming those it lacks."""
    if missing := [theirs for theirs in ours.values() if theirs not in config]:
        have = sorted(config)[:10]
        raise ValueError(f"config.json lacks {', '.join(missing)}: it is of another kind of model; it has {have}")
    return {our: config[theirs] for our, theirs in ours.items()}


def _has_class(config: Mapping[str, Any], name: str) -> bool:
    return name in (config.get("architectures") or ())


def expect(config: Mapping[str, Any], name: str, value: float | str | bool) -> None:
    """Raises ValueError for a config that says another value; one that says none has the published one."""
    if config.get(name, value) != value:
        raise ValueError(f"found {name}={config[name]} in config.json, expected {value}, as published encoders have it")


def chosen(known: Mapping[str, KeyMap], weights: Iterable[str], what: str) -> KeyMap:
    """The table under a name that these weights have. Raises ValueError where they have none of them."""
    weights = list(weights)
    for name, table in known.items():
        if name in weights:
            return table
    starts = sorted({name.split(".")[0] for name in weights})[:10]
    raise ValueError(
        f"these are no weights of a {what}: none is called {' or '.join(known)}; their names begin with {starts}. "
        "In a file of a whole model, choose them with load.under"
    )
