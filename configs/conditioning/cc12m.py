"""Text to image on CC12M with one recipe for five backbones, plain and improved (Berrada et al. 2024, table 1).

    python -m diffjax.cli.prepare --kind=latents --config=configs/conditioning/cc12m.py --out=cc12m256_latents \\
        --config.data.name=webdataset --config.data.path=cc12m_tars --config.data.captions=own --crop=random --flips
    python -m diffjax.cli.train --config=configs/conditioning/cc12m.py --workdir=runs/cc12m256_mmdit_improved
    python -m diffjax.cli.train --config=configs/conditioning/cc12m.py:mmdit_512_improved --workdir=runs/cc12m512

The argument: unet, dit, mdt, pixart or mmdit; 256 or 512 (which starts from the run of 256); baseline or improved; and
one of ddpm_eps (the paper's, where left out), ddpm_v, edm and flow, as in mmdit_256_improved_flow.
Texts are those of CLIP ViT-L/14, 77 tokens; pooled, for the U-Net and mmDiT, is the encoder's vector of the whole text.
Hardware (from memory of the paper): 16 A100, batches of 2048 at 256 and 384 at 512, 300,000 to 500,000 steps.
Expect: FID 8.64 and CLIP score 26.17 at 512 of the improved mmDiT, 8 and 23 % below the baseline's FID at 256 and 512
(abstract and a digest); the other cells of table 1 are not sourced; DiT, MDT and PixArt are said to diverge. Ours: not
run.
"""

from ml_collections import ConfigDict

from diffjax.core import paradigms

BACKBONES = {
    "unet": {"channel_mult": (1, 2, 4), "transformer_depth": (0, 1, 1), "head_dim": 64, "context_width": 768},
    "dit": {"condition": "attention", "qk_norm": True, "text_width": 768, "positions": "interp", "base_size": 16},
    "mdt": {"condition": "attention", "qk_norm": True, "text_width": 768},
    "pixart": {"text_width": 768, "text_length": 0},
    "mmdit": {"qk_norm": True, "text_width": 768, "pooled_width": 768},
}
METADATA = {
    "baseline": {"low": ("height", "width", "top", "left"), "weight": "constant", "zero_init": False},  # as SDXL's
    "improved": {"high": ("top", "left", "flip"), "low": ("height", "width"), "weight": "power_cosine", "alpha": 4.0},
}
BATCH = {256: 2048, 512: 384}


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: see the module."""
    backbone, size, kind, paradigm, *_ = [*(arg or "mmdit_256_improved").split("_", 3), *("ddpm_eps",) * 3]
    is_known = backbone in BACKBONES and size in ("256", "512") and kind in METADATA
    if not is_known or paradigm not in paradigms.PARADIGMS:
        raise ValueError(
            f"found {arg!r}, expected one of {list(BACKBONES)}, 256 or 512, one of {list(METADATA)}, and one of "
            f"{list(paradigms.PARADIGMS)} or nothing: type cc12m.py:mmdit_256_improved"
        )
    pixels = int(size)
    of_paradigm = paradigms.sections(paradigm, calls=50)  # samples on COCO's captions: 25, and guidance 5
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict({"name": "latents", "path": f"cc12m{size}_latents", "image_size": pixels // 8})
    config.data.update({"channels": 4, "num_classes": 0, "companions": "stable-diffusion-v1-5"})
    config.model = ConfigDict({"name": backbone, **of_paradigm["model"], **BACKBONES[backbone]})
    config.model.update({"compute_dtype": "bfloat16", "remat": "nothing" if pixels == 512 else "dots_no_batch"})
    config.model.metadata = ConfigDict(METADATA[kind])
    config.model.text_padding = ConfigDict({"kind": "noisy_replicate" if kind == "improved" else "zero"})
    config.method = ConfigDict({"name": "edm", **of_paradigm["method"]})
    config.method.update({"label_dropout": 0.1, "control_dropout": 0.1})
    if backbone == "mdt":
        config.method.mask_ratio = 0.3
    if pixels == 512:
        config.method.start = f"runs/cc12m256_{backbone}_{kind}{'' if paradigm == 'ddpm_eps' else f'_{paradigm}'}"
        if kind == "improved":
            config.model.resolution_scale = 2.0
    config.optim = ConfigDict({"name": "adam", "learning_rate": 1e-4, "b1": 0.9, "b2": 0.95})
    config.ema = ConfigDict({"halflife_images": 6931 * BATCH[pixels]})  # 0.9999 a step
    config.train = ConfigDict(
        {
            "batch_size": BATCH[pixels],
            "total_images": 500_000 * BATCH[pixels],  # from memory
            "log_every_steps": 100,
            "checkpoint_every_steps": 5000,
            "checkpoint_every_minutes": 30.0,
            "sample_every_steps": 5000,
        }
    )
    config.sample = ConfigDict(of_paradigm["sample"])
    return config
