"""config.json of networks of video and of their schedulers: our options, and what is refused."""

import inspect
import json

import pytest

from diffjax.models import svd, vae_video
from diffjax.weights import folders

# of the published folders, without what is said nowhere else
SVD = {
    "_class_name": "UNetSpatioTemporalConditionModel", "addition_time_embed_dim": 256, "cross_attention_dim": 1024,
    "block_out_channels": [320, 640, 1280, 1280], "in_channels": 8, "layers_per_block": 2, "out_channels": 4,
    "num_attention_heads": [5, 10, 20, 20], "num_frames": 14, "projection_class_embeddings_input_dim": 768,
    "sample_size": 96, "transformer_layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlockSpatioTemporal"] * 3 + ["DownBlockSpatioTemporal"],
    "up_block_types": ["UpBlockSpatioTemporal"] + ["CrossAttnUpBlockSpatioTemporal"] * 3,
}  # fmt: skip
AUTOENCODER = {
    "_class_name": "AutoencoderKLTemporalDecoder", "block_out_channels": [128, 256, 512, 512], "force_upcast": True,
    "in_channels": 3, "latent_channels": 4, "layers_per_block": 2, "out_channels": 3, "scaling_factor": 0.18215,
}  # fmt: skip
EULER = {
    "_class_name": "EulerDiscreteScheduler", "prediction_type": "v_prediction", "sigma_max": 700.0, "sigma_min": 0.002,
    "timestep_type": "continuous", "use_karras_sigmas": True,
}  # fmt: skip
DDIM = {
    "_class_name": "DDIMScheduler", "beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012,
    "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "linspace",
}  # fmt: skip


def defaults(make):
    parameters = inspect.signature(make.__init__).parameters.items()
    return {name: p.default for name, p in parameters if p.default is not p.empty}


@pytest.mark.fast
def test_published_networks_are_the_presets():
    name, options = folders.video_denoiser(SVD)
    assert name == "svd" and {**defaults(svd.SVDUNet), **options} == {**defaults(svd.SVDUNet), **svd.PRESETS["svd"]}
    kind, options = folders.video_autoencoder(AUTOENCODER)
    made = defaults(getattr(vae_video, kind))
    assert {**made, **options} == made


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "UNet3DConditionModel"}, "did you mean"),
        ({"in_channels": 4}, "in_channels"),
        ({"transformer_layers_per_block": 2}, "transformer_layers_per_block"),
        ({"block_out_channels": [320, 500, 1280, 1280]}, "multiples of the first"),
        ({"down_block_types": ["DownBlock2D"] * 4}, "unknown down_block_types"),
    ],
)
def test_other_networks_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        folders.video_denoiser({**SVD, **changes})


def test_other_autoencoders_are_refused():
    with pytest.raises(ValueError, match="layers_per_block"):
        folders.video_autoencoder({**AUTOENCODER, "layers_per_block": 1})


@pytest.mark.parametrize(
    ("read", "config", "changes", "message"),
    [
        (folders.karras_levels, EULER, {"_class_name": "DDIMScheduler"}, "EulerDiscreteScheduler"),
        (folders.karras_levels, EULER, {"use_karras_sigmas": None}, "use_karras_sigmas"),
        (folders.karras_levels, EULER, {"sigma_max": None}, "0.002 and 700"),
        (folders.ddim_options, DDIM, {"_class_name": "PNDMScheduler"}, "DDIMScheduler"),
        (folders.ddim_options, DDIM, {"clip_sample": True}, "clip_sample"),
        (folders.ddim_options, DDIM, {"beta_end": 0.02}, "noise schedule"),
    ],
)
def test_schedulers(read, config, changes, message, tmp_path):
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    expected = {
        folders.karras_levels: (0.002, 700.0),
        folders.ddim_options: ("animatediff", {"spacing": "linspace", "offset": 0, "to_zero": False}),
    }
    assert read(tmp_path) == expected[read]
    (tmp_path / "scheduler_config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=message):
        read(tmp_path)
