"""config.json of unconditional latent diffusion: our options, and what is refused."""

import json

import pytest

from diffjax.models import unet, vae
from diffjax.weights import folders

# of CelebA-HQ's published folder, what is no default
UNET = {
    "_class_name": "UNet2DModel", "attention_head_dim": 32, "block_out_channels": [224, 448, 672, 896],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"], "downsample_padding": 1,
    "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 3, "layers_per_block": 2, "norm_eps": 1e-05, "out_channels": 3,
    "sample_size": 64, "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
AUTOENCODER = {
    "_class_name": "VQModel", "act_fn": "silu", "block_out_channels": [128, 256, 512], "in_channels": 3,
    "latent_channels": 3, "layers_per_block": 2, "num_vq_embeddings": 8192, "out_channels": 3, "sample_size": 256,
}  # fmt: skip


@pytest.mark.fast
def test_the_published_network_is_the_preset():
    name, options, shape = folders.denoiser(UNET)
    assert name == "unet" and shape == {"image_size": 64, "channels": 3, "num_classes": 0}
    sizes = {"image_size": 64, "channels": 3, "out_channels": 3, "num_blocks": 2}
    assert sizes | options == sizes | dict(unet.PRESETS["ldm_bedroom"])
    assert folders.denoiser({**UNET, "attention_head_dim": None})[1]["heads"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_eps": 1e-6}, "norm_eps"),
        ({"flip_sin_to_cos": False, "freq_shift": 1}, "flip_sin_to_cos.*freq_shift"),
        ({"resnet_time_scale_shift": "scale_shift"}, "scale_shift"),
        ({"num_class_embeds": 10}, "num_class_embeds"),
        ({"add_attention": False}, "add_attention"),
        ({"downsample_type": "resnet"}, "downsample_type"),
        ({"out_channels": 6}, "out_channels"),
        ({"down_block_types": ["SkipDownBlock2D"] * 4}, "unknown down_block_types 'SkipDownBlock2D'"),
        ({"up_block_types": ["UpBlock2D"] * 4}, "found up_block_types=.*expected those of the way down"),
        ({"down_block_types": ["DownBlock2D"] * 4, "up_block_types": ["UpBlock2D"] * 4}, "attention in the middle only"),
    ],
)
def test_other_networks_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        folders.denoiser({**UNET, **changes})


def test_quantised_latents_are_not_scaled_where_nothing_is_said():
    """The published folder has no scaling_factor; diffusers takes Stable Diffusion's, and its pictures are wrong
    (huggingface/diffusers issue 6725)."""
    kind, options = folders.autoencoder(AUTOENCODER)
    assert kind == "VQModel" and options["scale"] == 1.0
    assert folders.autoencoder({**AUTOENCODER, "scaling_factor": 0.5})[1]["scale"] == 0.5
    assert hasattr(vae, kind)


def test_where_the_autoencoder_is(tmp_path):
    assert folders.autoencoder_part(tmp_path) == "vae"
    (tmp_path / "vqvae").mkdir()
    (tmp_path / "vqvae" / "config.json").write_text(json.dumps(AUTOENCODER))
    assert folders.autoencoder_part(tmp_path) == "vqvae"


def test_a_damaged_index_is_named(tmp_path):
    (tmp_path / "model_index.json").write_text("[1")
    with pytest.raises(ValueError, match="model_index.json is damaged"):
        folders.index(tmp_path)
