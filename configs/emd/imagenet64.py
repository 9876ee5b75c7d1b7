"""One-step generators on ImageNet 64x64, class-conditional, by EM distillation (Xie et al. 2024, table 7), and rivals.

    python -m diffjax.cli.train --config=configs/emd/imagenet64.py --workdir=runs/emd_imagenet64 \
        --config.method.teacher=runs/edm_imagenet64

The argument: emd_16 (where absent), emd_8, emd_4, emd_2, emd_1; diff_instruct; dmd2 (without its discriminator, the
score updated five times an iteration, as tianweiy/DMD2's experiments have it).
Hardware and hours (paper): 64 TPU-v4, about 8 days (recalled, not checked).
Expect (papers): FID 2.20 and recall 0.59 for emd_16, 5.57 for diff_instruct, 2.61 for dmd2, 50,000 samples, one call.
Ours: not run. Learning rates, batch, betas and step sizes of EMD are recalled from the paper, not checked against it.
"""

from ml_collections import ConfigDict

VARIANTS = ("emd_16", "emd_8", "emd_4", "emd_2", "emd_1", "diff_instruct", "dmd2")


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: see the module."""
    arg = arg or "emd_16"
    if arg not in VARIANTS:
        raise ValueError(f"found {arg!r}, expected one of {VARIANTS}: type imagenet64.py:emd_16")
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict({"name": "none"})  # distillation needs noise and labels only
    config.model = ConfigDict({"name": "teacher", "remat": ""})  # "nothing" saves memory for a second forward pass
    method = {
        "name": "emd",
        "teacher": "runs/edm_imagenet64",
        "generator_sigma": 5.0,  # lambda* = -3.2189
        "langevin_steps": int(arg.removeprefix("emd_")) if arg.startswith("emd") else 1,
        "scheme": "eps_z" if arg.startswith("emd") else "eps",
        "noise_step": 0.4**2,
        "latent_step": 0.004**2,
        "distribution": "lognormal",
        "distribution_options": {"p_mean": -1.2, "p_std": 1.2},
        "generator_weighting": "unit",  # of the denoised image: sigma^2 / alpha^2 of the likelihood
        "guidance_scale": 1.0,
        "dropout": True,
    }
    adam = {"name": "adam", "b1": 0.0, "b2": 0.99}
    optim, score_optim = {**adam, "learning_rate": 2e-6}, {**adam, "learning_rate": 1e-5}
    if arg == "diff_instruct":
        optim = score_optim = {**adam, "b2": 0.999, "learning_rate": 1e-5}
    if arg == "dmd2":
        method |= {"generator_sigma": 80.0, "score_updates": 5, "generator_weighting": "dmd", "distribution": "polynomial"}
        method["distribution_options"] = {"low": 0.02, "high": 0.98}
        optim = score_optim = {
            "name": "adamw", "weight_decay": 0.01, "b1": 0.9, "b2": 0.999, "clip_norm": 10.0, "learning_rate": 2e-6,
            "warmup_images": 500 * 280,
        }  # fmt: skip
    config.method = ConfigDict({**method, "score_optim": score_optim})
    config.optim = ConfigDict(optim)
    config.ema = ConfigDict({"halflife_images": 500_000, "rampup_ratio": 0.05})
    batch_size = 280 if arg == "dmd2" else 128
    config.train = ConfigDict(
        {
            "batch_size": batch_size,
            "total_images": 300_000 * batch_size,
            "log_every_steps": 100,
            "checkpoint_every_steps": 5000,
            "checkpoint_every_minutes": 30.0,
            "sample_every_steps": 5000,
        }
    )
    return config
