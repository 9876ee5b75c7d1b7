"""Model folders as diffusers writes them: their JSON files, in the terms of our configs.

    sections = describe("sd15")          # {"model": ..., "data": ..., "method": ..., "sample": ...} as a run has them
    options = autoencoder(load.config("sd15/vae"))

A folder holds model_index.json, and a folder for each part: unet or transformer, vae or vqvae, text_encoder, tokenizer,
scheduler. Options that our networks do not have are errors: a network that was made otherwise would load and be wrong.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from diffjax.core import names, schedules
from diffjax.weights import load

INDEX = "model_index.json"
_SCHEDULER = "scheduler_config.json"

_KINDS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
# (beta_schedule, beta_start, beta_end) -> process of our `model` section
_PROCESSES = {
    ("linear", 0.0001, 0.02): "linear", ("scaled_linear", 0.00085, 0.012): "scaled_linear",
    ("scaled_linear", 0.0015, 0.0195): "ldm", ("linear", 0.00085, 0.012): "animatediff",
}  # fmt: skip
# Stable Diffusion 3's: section `model`, and `sample` with the levels of its times 0.001 and 0.999
FLOW = MappingProxyType({"precondition": "velocity", "process": "flow", "label_scale": 1000.0})
FLOW_SAMPLE = MappingProxyType({
    "solver": "euler", "num_steps": 28, "grid": "discrete", "to_zero": True, "process": "sd3", "sigma_min": 0.003003,
    "sigma_max": 2997.0,
})  # fmt: skip


def describe(folder: str | Path) -> dict[str, dict[str, Any]]:
    """The sections model, data, method and sample of the denoiser in a folder.

    Raises FileNotFoundError for a folder without its files, ValueError for a network or an option we do not have.
    """
    folder = Path(folder)
    part = denoiser_part(folder)
    config = load.config(folder / part)
    name, model, shape = denoiser(config)
    kind, sample = _scheduler(folder / "scheduler")
    learned = model.pop("learned_variance", False)
    model = {"name": name, **kind, **({"learned_variance": True} if learned else {}), **model}
    dropout = {"label_dropout": 0.1} if shape["num_classes"] else {}
    return {"model": model, "data": {"name": "none", **shape}, "method": {"name": "edm", **dropout}, "sample": sample}


def denoiser_part(folder: str | Path) -> str:
    """The folder inside that holds the denoiser: unet or transformer. Raises FileNotFoundError where neither is."""
    for part in ("unet", "transformer"):
        if (Path(folder) / part).is_dir():
            return part
    have = sorted(path.name for path in Path(folder).iterdir())[:10] if Path(folder).is_dir() else "nothing"
    raise FileNotFoundError(
        f"{folder} has neither unet/ nor transformer/, found {have}: give the folder of a whole model, as diffusers writes it"
    )


def autoencoder_part(folder: str | Path) -> str:
    """The folder inside that holds the autoencoder: vqvae of unconditional models, vae of all others."""
    return "vqvae" if (Path(folder) / "vqvae").is_dir() else "vae"


def index(folder: str | Path) -> dict[str, Any]:
    """model_index.json. Raises FileNotFoundError where it is absent, ValueError where it is no dict."""
    path = Path(folder) / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{path} is absent: give the folder of a whole model, as diffusers writes it")
    return load.read_json(path)


def denoiser(config: Mapping[str, Any]) -> tuple[str, dict[str, Any], dict[str, int]]:
    """(name, options, data shape) of a unet's or transformer's config.json; options["learned_variance"] where the
    network has it. Raises ValueError for a class or an option that diffjax does not have."""
    kind = config.get("_class_name")
    if kind == "Transformer2DModel":  # what the classes of both were called first
        kind = "PixArtTransformer2DModel" if config.get("norm_type") == "ada_norm_single" else "DiTTransformer2DModel"
    return names.lookup(_DENOISERS, kind, "class of config.json")(config)


def autoencoder(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(class, options) of models.vae for a vae's config.json. Raises ValueError as `denoiser`."""
    kind = config.get("_class_name")
    if kind not in ("AutoencoderKL", "VQModel"):
        raise ValueError(f"found an autoencoder of class {kind!r}, expected AutoencoderKL or VQModel")
    _expect(config, act_fn=("silu",), norm_num_groups=(32,), mid_block_add_attention=(True,))
    width, mult = _widths(config["block_out_channels"])
    options = {
        "channels": config["in_channels"], "latent_channels": config["latent_channels"], "width": width,
        "channel_mult": mult, "num_blocks": config["layers_per_block"],
        # folders of before the option: Stable Diffusion's had 0.18215, the quantised ones of LDM none
        "scale": config.get("scaling_factor", 1.0 if kind == "VQModel" else 0.18215),
    }  # fmt: skip
    if kind == "VQModel":
        _expect(config, norm_type=("group",), vq_embed_dim=(None, config["latent_channels"]), lookup_from_codebook=(False,))
        return kind, {**options, "codes": config["num_vq_embeddings"]}
    both = {config.get("use_quant_conv", True), config.get("use_post_quant_conv", True)}
    if len(both) > 1:
        raise ValueError("found only one of use_quant_conv and use_post_quant_conv, expected both or none")
    return kind, {**options, "quant_conv": both.pop(), "shift": config.get("shift_factor") or 0.0}


def video_denoiser(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """("svd" or "motion", options) of models.svd or models.motion_unet for a unet's config.json. Raises ValueError as
    `denoiser`."""
    kinds = {"UNetSpatioTemporalConditionModel": _svd, "UNetMotionModel": _motion}
    return names.lookup(kinds, config.get("_class_name"), "class of config.json, of a network of video")(config)


def video_autoencoder(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(class, options) of models.vae_video or models.vae for a vae's config.json. Raises ValueError as `denoiser`."""
    if config.get("_class_name") != "AutoencoderKLTemporalDecoder":
        return autoencoder(config)
    _expect(config, layers_per_block=(2,))  # as many blocks are in its middle
    width, mult = _widths(config["block_out_channels"])
    return "AutoencoderKLTemporalDecoder", {
        "channels": config["in_channels"], "latent_channels": config["latent_channels"], "width": width,
        "channel_mult": mult, "num_blocks": config["layers_per_block"], "scale": config.get("scaling_factor", 0.18215),
    }  # fmt: skip


def karras_levels(folder: Path) -> tuple[float, float]:
    """(sigma_min, sigma_max) of the scheduler of Stable Video Diffusion. Raises ValueError for another scheduler."""
    absent = dict(prediction_type="epsilon", use_karras_sigmas=False, timestep_type="discrete")  # as diffusers takes it
    config = absent | load.read_json(folder / _SCHEDULER)
    _expect(
        config, _class_name=("EulerDiscreteScheduler",), prediction_type=("v_prediction",), use_karras_sigmas=(True,),
        timestep_type=("continuous",), final_sigmas_type=("zero",),
    )  # fmt: skip
    if not 0 < (config.get("sigma_min") or 0) < (config.get("sigma_max") or 0):
        raise ValueError(f"{folder / _SCHEDULER} has no sigma_min and sigma_max, for example 0.002 and 700.0")
    return config["sigma_min"], config["sigma_max"]


def ddim_options(folder: Path) -> tuple[str, dict[str, Any]]:
    """(process, options of `core.respaced.ddim`) of AnimateDiff's scheduler. Raises ValueError for another one."""
    config = {"clip_sample": True, **load.read_json(folder / _SCHEDULER)}  # as diffusers takes it
    _expect(
        config, _class_name=("DDIMScheduler",), prediction_type=("epsilon",), clip_sample=(False,),
        thresholding=(False,), num_train_timesteps=(1000,), trained_betas=(None,), rescale_betas_zero_snr=(False,),
    )  # fmt: skip
    spacing = config.get("timestep_spacing", "leading")
    offset = config.get("steps_offset", 0) if spacing == "leading" else 0
    return _process(config), {"spacing": spacing, "offset": offset, "to_zero": config.get("set_alpha_to_one", True)}


def _svd(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    _expect(
        config, transformer_layers_per_block=(1, [1] * len(config["block_out_channels"])),
        addition_time_embed_dim=(256,), in_channels=(2 * config["out_channels"],),
    )  # fmt: skip
    width, mult = _widths(config["block_out_channels"])
    heads = config.get("num_attention_heads", (5, 10, 20, 20))
    return "svd", {
        "num_frames": config.get("num_frames", 25), "channels": config["out_channels"],
        "out_channels": config["out_channels"], "width": width, "channel_mult": mult,
        "num_blocks": config["layers_per_block"],
        "transformer_depth": tuple(map(int, _attends(config, "CrossAttn", "SpatioTemporal"))),
        "heads": (heads,) * len(mult) if isinstance(heads, int) else tuple(heads),
        "context_width": config["cross_attention_dim"],
        "controls": config["projection_class_embeddings_input_dim"] // 256,
    }  # fmt: skip


def _motion(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    _expect(
        config, act_fn=("silu",), norm_num_groups=(32,), norm_eps=(1e-5,), downsample_padding=(1,),
        mid_block_layers=(1,), mid_block_scale_factor=(1,), transformer_layers_per_block=(1,), transformer_layers_per_mid_block=(None, 1),
        temporal_transformer_layers_per_block=(1,), temporal_transformer_layers_per_mid_block=(None, 1),
        addition_embed_type=(None,), encoder_hid_dim_type=(None,), time_cond_proj_dim=(None,),
        out_channels=(config["in_channels"],), use_linear_projection=(False,),
    )  # fmt: skip
    width, mult = _widths(config["block_out_channels"])
    heads = {name: config.get(name, 8) for name in ("num_attention_heads", "motion_num_attention_heads")}
    if not all(isinstance(number, int) for number in heads.values()):
        raise ValueError(f"found {heads}, expected one number for all levels each")
    return "motion", {
        "image_size": config.get("sample_size") or 64, "channels": config["in_channels"],
        "out_channels": config["in_channels"], "width": width, "channel_mult": mult,
        "num_blocks": config["layers_per_block"], "context_width": config["cross_attention_dim"],
        "transformer_depth": tuple(map(int, _attends(config, "CrossAttn", "Motion"))),
        "heads": heads["num_attention_heads"], "motion_heads": heads["motion_num_attention_heads"],
        "max_frames": config.get("motion_max_seq_length", 32), "mid_motion": config.get("use_motion_mid_block", True),
    }  # fmt: skip


def _unet(config: Mapping[str, Any]) -> tuple[str, dict[str, Any], dict[str, int]]:
    _expect(
        config, act_fn=("silu",), norm_num_groups=(32,), norm_eps=(1e-5,), flip_sin_to_cos=(True,), freq_shift=(0,),
        downsample_padding=(1,), center_input_sample=(False,), resnet_time_scale_shift=("default",), conv_in_kernel=(3,),
        conv_out_kernel=(3,), only_cross_attention=(False,), dual_cross_attention=(False,), class_embed_type=(None,),
        num_class_embeds=(None,), encoder_hid_dim=(None,), time_cond_proj_dim=(None,), attention_type=("default",),
        addition_embed_type=(None, "text_time"), addition_time_embed_dim=(None, 256), time_embedding_type=("positional",),
        mid_block_type=("UNetMidBlock2DCrossAttn",), resnet_skip_time_act=(False,), cross_attention_norm=(None,),
    )  # fmt: skip
    width, mult = _widths(config["block_out_channels"])
    depth = config.get("transformer_layers_per_block", 1)
    depths = [depth] * len(mult) if isinstance(depth, int) else list(depth)
    attends = _attends(config, "CrossAttn")
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)  # by its name a size, in fact a number
    options = {
        "width": width, "channel_mult": mult, "num_blocks": config["layers_per_block"],
        "transformer_depth": tuple(depth * attend for depth, attend in zip(depths, attends, strict=True)),
        "context_width": config["cross_attention_dim"],
    }  # fmt: skip
    if isinstance(heads, int):
        options["heads"] = heads
    else:
        sizes = {width * m // n for m, n in zip(mult, heads, strict=True)}
        if len(sizes) > 1:
            raise ValueError(f"found {heads} heads for widths {config['block_out_channels']}, expected heads of one size")
        options["head_dim"] = sizes.pop()
    if config.get("addition_embed_type") == "text_time":
        options |= {"controls": 6, "pooled_width": config["projection_class_embeddings_input_dim"] - 6 * 256}
    if config["out_channels"] != config["in_channels"]:
        raise ValueError(f"found {config['in_channels']} channels in, {config['out_channels']} out: inpainting is not here")
    return "unet", options, _shape(config)


def _plain_unet(config: Mapping[str, Any]) -> tuple[str, dict[str, Any], dict[str, int]]:
    """Without text: the U-Net of LDM-4 of faces and bedrooms."""
    width, mult = _widths(config["block_out_channels"])
    _expect(
        config, act_fn=("silu",), norm_num_groups=(32,), norm_eps=(1e-5,), attn_norm_num_groups=(None, 32),
        flip_sin_to_cos=(True,), freq_shift=(0,), time_embedding_type=("positional",), downsample_padding=(1,),
        time_embedding_dim=(None, 4 * width), center_input_sample=(False,), resnet_time_scale_shift=("default",),
        downsample_type=("conv",), upsample_type=("conv",), add_attention=(True,), mid_block_scale_factor=(1,),
        mid_block_type=("UNetMidBlock2D",), class_embed_type=(None,), num_class_embeds=(None,),
        out_channels=(config["in_channels"],),
    )  # fmt: skip
    attends, head_dim = _attends(config, "Attn"), config.get("attention_head_dim", 8)
    if not any(attends):
        raise ValueError("found attention in the middle only, expected it on a level too: AttnDownBlock2D")
    options = {
        "width": width, "channel_mult": mult, "num_blocks": config["layers_per_block"], "attention": "plain",
        "transformer_depth": tuple(map(int, attends)), **({"head_dim": head_dim} if head_dim else {"heads": 1}),
    }  # fmt: skip
    return "unet", options, _shape(config)


def _attends(config: Mapping[str, Any], kind: str, end: str = "2D") -> list[bool]:
    """Which levels have attention, from the image down; kind, end: how the names of their blocks begin and end."""
    blocks = {f"DownBlock{end}": False, f"{kind}DownBlock{end}": True}
    attends = [names.lookup(blocks, name, "down_block_types") for name in config["down_block_types"]]
    up = [f"{kind}UpBlock{end}" if attend else f"UpBlock{end}" for attend in reversed(attends)]
    if list(config.get("up_block_types", up)) != up:
        raise ValueError(f"found up_block_types={list(config['up_block_types'])}, expected those of the way down: {up}")
    return attends


def _dit(config: Mapping[str, Any]) -> tuple[str, dict[str, Any], dict[str, int]]:
    _expect(config, norm_type=("ada_norm_zero",), attention_bias=(True,), activation_fn=("gelu-approximate",))
    options = _transformer(config)
    return "dit", options, {**_shape(config), "num_classes": config.get("num_embeds_ada_norm", 1000)}


def _pixart(config: Mapping[str, Any]) -> tuple[str, dict[str, Any], dict[str, int]]:
    _expect(config, norm_type=("ada_norm_single",), attention_bias=(True,), norm_eps=(1e-6,))
    side, size = config["sample_size"] // config["patch_size"], config["sample_size"]
    controls = config.get("use_additional_conditions")
    options = _transformer(config) | {
        "text_width": config["caption_channels"], "text_length": 0,
        "controls": 3 if (size == 128 if controls is None else controls) else 0,
        "base_size": side / (config.get("interpolation_scale") or max(size // 64, 1)),
    }  # fmt: skip
    return "pixart", options, _shape(config)


def _sd3(config: Mapping[str, Any]) -> tuple[str, dict[str, Any], dict[str, int]]:
    _expect(config, qk_norm=(None, "rms_norm"), dual_attention_layers=((), [], None))
    heads = config["num_attention_heads"]
    width = heads * config["attention_head_dim"]
    if config["caption_projection_dim"] != width:
        raise ValueError(f"found caption_projection_dim={config['caption_projection_dim']}, expected the width {width}")
    options = {
        "width": width, "depth": config["num_layers"], "heads": heads, "patch": config["patch_size"],
        "text_width": config["joint_attention_dim"], "pooled_width": config["pooled_projection_dim"],
        "qk_norm": config.get("qk_norm") is not None, "max_grid": config.get("pos_embed_max_size", 96),
        "stored_positions": True,
    }  # fmt: skip
    return "mmdit", options, _shape(config)


_DENOISERS = {
    "UNet2DConditionModel": _unet, "DiTTransformer2DModel": _dit, "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3, "UNet2DModel": _plain_unet,
}  # fmt: skip


def _transformer(config: Mapping[str, Any]) -> dict[str, Any]:
    """What DiT and PixArt have in common."""
    heads, channels = config["num_attention_heads"], config["in_channels"]
    outputs = config.get("out_channels") or channels
    if outputs not in (channels, 2 * channels):
        raise ValueError(f"found {outputs} channels out of {channels}, expected as many, or twice as many with the variance")
    return {
        "width": heads * config["attention_head_dim"], "depth": config["num_layers"], "heads": heads,
        "patch": config["patch_size"], "learned_variance": outputs == 2 * channels,
    }  # fmt: skip


def _scheduler(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(options of `model`, section `sample`): what the network predicts, of which process, and 20 steps for it."""
    path = folder / _SCHEDULER
    if not path.is_file():
        raise FileNotFoundError(f"{path} is absent: it says which noise the network was trained with; get it again")
    config = load.read_json(path)
    if config.get("_class_name", "").startswith("FlowMatch"):
        _expect(config, shift=(3.0,), use_dynamic_shifting=(False,), num_train_timesteps=(1000,))
        return dict(FLOW), dict(FLOW_SAMPLE)
    _expect(config, num_train_timesteps=(1000,), trained_betas=(None,), rescale_betas_zero_snr=(False,))
    kind, process = names.lookup(_KINDS, config.get("prediction_type", "epsilon"), "prediction_type"), _process(config)
    return {"precondition": kind, "process": process}, sample_section(process)


def _process(config: Mapping[str, Any]) -> str:
    """The process of a scheduler's betas. Raises ValueError for others than those of `_PROCESSES`."""
    betas = tuple(config.get(key, default) for key, default in (("beta_schedule", "linear"), ("beta_start", 1e-4), ("beta_end", 0.02)))
    if betas not in _PROCESSES:
        raise ValueError(f"found the noise schedule {betas}, expected one of {sorted(_PROCESSES)}")
    return _PROCESSES[betas]


def sample_section(process: str) -> dict[str, Any]:
    """20 steps of DPM-Solver++(2M), uniform over the trained levels of a process (Lu 2022), the last to zero."""
    table = schedules.table(process)
    levels = {"sigma_min": round(float(table.level(1 / table.num)), 6), "sigma_max": round(float(table.level(1.0)), 6)}
    plan = {"solver": "dpmpp", "order": 2, "num_steps": 20, "grid": "discrete", "process": process, "to_zero": True}
    return {**plan, **levels}


def _shape(config: Mapping[str, Any]) -> dict[str, int]:
    return {"image_size": config["sample_size"], "channels": config["in_channels"], "num_classes": 0}


def _widths(channels: list[int]) -> tuple[int, tuple[int, ...]]:
    width = channels[0]
    if any(c % width for c in channels):
        raise ValueError(f"found block_out_channels={channels}, expected multiples of the first")
    return width, tuple(c // width for c in channels)


def _expect(config: Mapping[str, Any], **expected: tuple) -> None:
    """Raises ValueError for options that are there and have none of the values we build."""
    wrong = {key: config[key] for key, values in expected.items() if key in config and config[key] not in values}
    if wrong:
        wanted = {key: expected[key] if len(expected[key]) > 1 else expected[key][0] for key in wrong}
        raise ValueError(f"config of {config.get('_class_name')}: found {wrong}, here it is {wanted}")
