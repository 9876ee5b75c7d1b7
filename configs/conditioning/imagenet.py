"""Class-conditional ImageNet-1k with one recipe for five backbones, plain and improved (Berrada et al. 2024, table 1).

    python -m diffjax.cli.prepare --kind=latents --config=configs/conditioning/imagenet.py:mmdit_256_improved \
        --config.data.name=tfds --config.data.dataset=imagenet2012 --config.data.path= --crop=random --flips \
        --out=imagenet256_latents
    python -m diffjax.cli.train --config=configs/conditioning/imagenet.py:mmdit_256_improved --workdir=runs/imagenet256_mmdit_improved
    python -m diffjax.cli.train --config=configs/conditioning/imagenet.py:mmdit_512_improved --workdir=runs/imagenet512_mmdit_improved

The argument: unet, dit, mdt, pixart or mmdit, then 256 or 512 (which starts from the run of 256), then baseline or improved.
Hardware (from memory of the paper): 16 A100, batches of 2048 at 256 and 384 at 512, 500,000 steps and more.
Expect: FID 2.76 at 512 of the improved mmDiT, 7 and 8 % below the baseline at 256 and 512 (abstract); the other cells of
table 1 are not sourced. Ours: not run.
"""

from ml_collections import ConfigDict

# The class goes through attention in all of them; normalised queries and keys keep bfloat16 from diverging.
BACKBONES = {
    "unet": {"channel_mult": (1, 2, 4), "transformer_depth": (0, 1, 1), "head_dim": 64},
    "dit": {"condition": "attention", "qk_norm": True, "positions": "interp", "base_size": 16},
    "mdt": {"condition": "attention", "qk_norm": True},
    "pixart": {},
    "mmdit": {"qk_norm": True},  # XL/2-B: 18 blocks of width 1152
}
METADATA = {
    "baseline": {"low": ("height", "width", "top", "left"), "weight": "constant", "zero_init": False},  # as SDXL's
    "improved": {"high": ("top", "left", "flip"), "low": ("height", "width"), "weight": "power_cosine", "alpha": 4.0},
}
STEPS = {256: 500_000, 512: 500_000}  # from memory
BATCH = {256: 2048, 512: 384}


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: see the module."""
    backbone, size, kind = [*(arg or "mmdit_256_improved").split("_"), "", ""][:3]
    if backbone not in BACKBONES or size not in ("256", "512") or kind not in METADATA:
        raise ValueError(
            f"found {arg!r}, expected one of {list(BACKBONES)}, 256 or 512, and one of {list(METADATA)}: type "
            "imagenet.py:mmdit_256_improved"
        )
    pixels = int(size)
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict({"name": "latents", "path": f"imagenet{size}_latents", "companions": "stable-diffusion-v1-5"})
    config.data.update({"image_size": pixels // 8, "channels": 4, "num_classes": 1000})
    config.model = ConfigDict({"name": backbone, "precondition": "eps", "process": "scaled_linear", **BACKBONES[backbone]})
    config.model.update({"compute_dtype": "bfloat16", "remat": "nothing" if pixels == 512 else "dots_no_batch"})
    config.model.metadata = ConfigDict(METADATA[kind])
    config.method = ConfigDict({"name": "edm", "distribution": "discrete", "weighting": "eps"})
    config.method.distribution_options = {"process": "scaled_linear"}
    config.method.update({"label_dropout": 0.1, "control_dropout": 0.1})
    if backbone == "mdt":
        config.method.mask_ratio = 0.3  # 0.3 to 0.5 of the tokens; one number of them, that in the middle
    if pixels == 512:
        config.method.start = f"runs/imagenet256_{backbone}_{kind}"
        if kind == "improved":
            config.model.resolution_scale = 2.0
    config.optim = ConfigDict({"name": "adam", "learning_rate": 1e-4, "b1": 0.9, "b2": 0.95})
    config.ema = ConfigDict({"halflife_images": 6931 * BATCH[pixels]})  # 0.9999 a step
    config.train = ConfigDict(
        {
            "batch_size": BATCH[pixels],
            "total_images": STEPS[pixels] * BATCH[pixels],
            "log_every_steps": 100,
            "checkpoint_every_steps": 5000,
            "checkpoint_every_minutes": 30.0,
            "sample_every_steps": 5000,
        }
    )
    # 250 steps of DDIM, as FID is taken; 50 for grids do as well
    levels = {"process": "scaled_linear", "sigma_min": 0.0292, "sigma_max": 14.6146, "to_zero": True}
    config.sample = ConfigDict({"solver": "euler", "grid": "discrete", "num_steps": 250, **levels})
    return config
