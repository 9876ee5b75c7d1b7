"""Model folders as diffusers saves them, tiny and with drawn weights: what `load_model` reads, and a pipeline to compare."""

import functools
import json
import warnings

import numpy as np
import pytest

from diffjax.data.tokenisers import END, START

WORDS = "a photo of red blue fox car on the hill ."


def diffusers():
    """The package, or a skip."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'diffjax[test]'")


def quiet(make):
    """Without the warnings of diffusers about its own defaults."""

    @functools.wraps(make)
    def made(*args, **options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make(*args, **options)

    return made


def drawn(module, seed=0):
    """The torch module with every parameter drawn, also those that start as zero or one."""
    import torch

    random = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = random.standard_normal(parameter.shape)
            if "norm" in name and parameter.ndim == 1:
                values = 0.1 * values + (1 if name.endswith("weight") else 0)
            elif "embed" in name and parameter.ndim == 2:
                values = 0.3 * values
            else:
                values = values / np.sqrt(np.prod(parameter.shape[1:])) if parameter.ndim > 1 else 0.1 * values
            parameter.copy_(torch.from_numpy(values.astype(np.float32)))
    return module.eval()


def clip_tokeniser(transformers, folder):
    """CLIP's with a vocabulary of letters: every word is spelt."""
    letters = [chr(i) for i in range(ord("!"), ord("~") + 1)]
    pieces = [*letters, *(letter + "</w>" for letter in letters), START, END]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def clip(transformers, projection=0, seed=0, **changes):
    """A CLIP text encoder of width 32 for the vocabulary of `clip_tokeniser`."""
    end = 2 * 94 + 1
    config = transformers.CLIPTextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, vocab_size=end + 1,
        max_position_embeddings=77, eos_token_id=end, bos_token_id=end - 1, pad_token_id=end,
        **({"projection_dim": projection} if projection else {}), **changes,
    )  # fmt: skip
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return drawn(kind(config), seed)


def t5(transformers, folder, width=32):
    """(tokeniser, encoder) of T5 1.1."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed: pip install 'diffjax[test]'")
    folder.mkdir(parents=True)
    (folder / "text.txt").write_text("\n".join([WORDS, "the red fox", "a blue car", "photo of a hill ."] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "spiece"), vocab_size=40, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    config = transformers.T5Config(
        d_model=width, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=64, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )  # fmt: skip
    tokeniser = transformers.T5Tokenizer.from_pretrained(folder, vocab_file=str(folder / "spiece.model"), extra_ids=0)
    return tokeniser, drawn(transformers.T5EncoderModel(config))


def vae(package, channels=4, **changes):
    """A KL autoencoder that halves once."""
    config = dict(
        block_out_channels=(32, 64), layers_per_block=1, latent_channels=channels, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **changes,
    )  # fmt: skip
    return drawn(package.AutoencoderKL(**config))


def unet(package, **changes):
    """SD v1's U-Net with two levels, for latents of 8 x 8."""
    config = dict(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    return drawn(package.UNet2DConditionModel(**{**config, **changes}))


def euler(package, **changes):
    """SD's noise schedule on levels 0, 37, 74, ..., 999 of 28 steps, which need no interpolation of their tables."""
    options = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="linspace")
    return package.EulerDiscreteScheduler(**{**options, **changes})


@quiet
def stable_diffusion(transformers, folder):
    """A pipeline of SD v1, saved in `folder`."""
    package = diffusers()
    pipeline = package.StableDiffusionPipeline(
        vae=vae(package), text_encoder=clip(transformers), tokenizer=clip_tokeniser(transformers, folder / "made"),
        unet=unet(package), scheduler=euler(package), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return pipeline


@quiet
def stable_diffusion_xl(transformers, folder):
    """A pipeline of SDXL, saved in `folder`."""
    package = diffusers()
    network = unet(
        package, cross_attention_dim=64, attention_head_dim=(4, 8), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=48 + 6 * 256,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
    )  # fmt: skip
    pipeline = package.StableDiffusionXLPipeline(
        vae=vae(package, scaling_factor=0.13025), text_encoder=clip(transformers),
        text_encoder_2=clip(transformers, 48, seed=1, hidden_act="gelu"),
        tokenizer=clip_tokeniser(transformers, folder / "made"),
        tokenizer_2=clip_tokeniser(transformers, folder / "made_2"), unet=network, scheduler=euler(package),
        force_zeros_for_empty_prompt=False, add_watermarker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return pipeline


@quiet
def stable_diffusion_3(transformers, folder):
    """A pipeline of SD 3 with T5, saved in `folder`."""
    import torch

    package = diffusers()
    tokeniser, encoder = t5(transformers, folder / "made_3", 64)
    network = package.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64, out_channels=16,
        pos_embed_max_size=12,
    )  # fmt: skip
    # labels near 1000 are rounded to 1e-4, and drawn weights make 60 times as much of it in a picture; published ones
    # do not look at single units
    with torch.no_grad():
        drawn(network).time_text_embed.timestep_embedder.linear_1.weight.mul_(0.1)
    pipeline = package.StableDiffusion3Pipeline(
        transformer=network, scheduler=package.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(package, 16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(transformers, 32), tokenizer=clip_tokeniser(transformers, folder / "made"),
        text_encoder_2=clip(transformers, 32, seed=1, hidden_act="gelu"),
        tokenizer_2=clip_tokeniser(transformers, folder / "made_2"), text_encoder_3=encoder, tokenizer_3=tokeniser,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return pipeline


@quiet
def pixart(transformers, folder):
    """A pipeline of PixArt-alpha, saved in `folder`."""
    package = diffusers()
    tokeniser, encoder = t5(transformers, folder / "made")
    network = package.PixArtTransformer2DModel(
        sample_size=8, num_layers=2, num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8,
        cross_attention_dim=32, caption_channels=32, norm_eps=1e-6, interpolation_scale=1,
    )  # fmt: skip
    pipeline = package.PixArtAlphaPipeline(
        tokenizer=tokeniser, text_encoder=encoder, vae=vae(package), transformer=drawn(network),
        scheduler=euler(package, beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return pipeline


@quiet
def ldm(transformers, folder):
    """A pipeline of unconditional latent diffusion with the noise schedule of LDM, saved in `folder`."""
    package = diffusers()
    network = package.UNet2DModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=16,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    # drawn weights take no noise away: latents of about 100 come among the codes, where the nearest is no question of
    # rounding
    autoencoder = package.VQModel(
        block_out_channels=(32, 64), layers_per_block=1, num_vq_embeddings=64, sample_size=16, scaling_factor=200.0,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    pipeline = package.LDMPipeline(
        vqvae=drawn(autoencoder), unet=drawn(network), scheduler=euler(package, beta_start=0.0015, beta_end=0.0195)
    )
    pipeline.save_pretrained(folder)
    return pipeline


@quiet
def stable_video_diffusion(transformers, folder, num_frames=4):
    """A pipeline of image to video, saved in `folder`."""
    package = diffusers()
    unet = package.UNetSpatioTemporalConditionModel(
        block_out_channels=(64,), layers_per_block=1, sample_size=8, num_frames=num_frames, cross_attention_dim=24,
        num_attention_heads=(2,), down_block_types=("CrossAttnDownBlockSpatioTemporal",),
        up_block_types=("CrossAttnUpBlockSpatioTemporal",),
    )  # fmt: skip
    config = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=56,
        projection_dim=24,
    )  # fmt: skip
    scheduler = package.EulerDiscreteScheduler(
        sigma_min=0.002, sigma_max=700.0, timestep_spacing="leading", timestep_type="continuous", steps_offset=1,
        prediction_type="v_prediction", use_karras_sigmas=True, beta_schedule="scaled_linear", beta_start=0.00085,
        beta_end=0.012,
    )  # fmt: skip
    vae = package.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 64), layers_per_block=2, sample_size=16, down_block_types=("DownEncoderBlock2D",) * 2
    )
    pipeline = package.StableVideoDiffusionPipeline(
        vae=drawn(vae, 1),
        image_encoder=drawn(transformers.CLIPVisionModelWithProjection(config), 2), unet=drawn(unet, 3), scheduler=scheduler,
        feature_extractor=transformers.CLIPImageProcessor(),
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return pipeline


@quiet
def animatediff(transformers, folder, **scheduler):
    """A pipeline of text to video, saved in `folder`, with its motion modules once more in motion_adapter."""
    package = diffusers()
    adapter = package.MotionAdapter(
        block_out_channels=(32, 64), motion_layers_per_block=1, motion_num_attention_heads=4, motion_max_seq_length=24
    )
    options = dict(beta_schedule="linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, clip_sample=False)
    options |= dict(timestep_spacing="linspace", set_alpha_to_one=False)
    pipeline = package.AnimateDiffPipeline(
        vae=vae(package), text_encoder=clip(transformers), tokenizer=clip_tokeniser(transformers, folder / "made"),
        unet=unet(package), motion_adapter=drawn(adapter, 4), scheduler=package.DDIMScheduler(**{**options, **scheduler}),
    )  # fmt: skip
    pipeline.unet.eval()
    pipeline.save_pretrained(folder)
    return pipeline
