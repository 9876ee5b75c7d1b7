"""One-step generators on CIFAR-10 32x32 from an EDM teacher: Diff-Instruct, DMD and EM distillation.

    python -m diffjax.cli.train --config=configs/emd/cifar10.py:diff_instruct --workdir=runs/diff_instruct_cifar10 \
        --config.method.teacher=runs/edm_cifar10

The argument: emd_16 (where absent), emd_8, emd_4, emd_2, emd_1; diff_instruct (Luo et al. 2023); dmd (Yin et al.
2024), with its regression towards the teacher's ODE under LPIPS, asked for in every iteration.
Hardware: one GPU.
Expect (paper): FID 4.53 unconditional for diff_instruct, 50,000 samples, one call (recalled, not checked). The EMD
paper has no CIFAR-10: its settings here are those of ImageNet-64 with Diff-Instruct's noise level and learning rates.
Ours: not run.
"""

from ml_collections import ConfigDict

VARIANTS = ("emd_16", "emd_8", "emd_4", "emd_2", "emd_1", "diff_instruct", "dmd")


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: see the module."""
    arg = arg or "emd_16"
    if arg not in VARIANTS:
        raise ValueError(f"found {arg!r}, expected one of {VARIANTS}: type cifar10.py:emd_16")
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict({"name": "none"})  # distillation needs noise and labels only
    config.model = ConfigDict({"name": "teacher", "remat": ""})  # "nothing" saves memory for a second forward pass
    method = {
        "name": "emd",
        "teacher": "runs/edm_cifar10",
        "generator_sigma": 1.0,
        "langevin_steps": int(arg.removeprefix("emd_")) if arg.startswith("emd") else 1,
        "scheme": "eps_z" if arg.startswith("emd") else "eps",
        "noise_step": 0.4**2,
        "latent_step": 0.004**2,
        "distribution": "lognormal",
        "distribution_options": {"p_mean": -1.2, "p_std": 1.2},
        "generator_weighting": "unit",
        "guidance_scale": 1.0,
        "dropout": True,
    }
    if arg == "dmd":
        method |= {"generator_sigma": 80.0, "generator_weighting": "dmd", "distribution": "polynomial"}
        method["distribution_options"] = {"low": 0.02, "high": 0.98}
        method["regression"] = {"weight": 0.25, "solver": "heun", "num_steps": 18, "sigma_min": 0.002, "sigma_max": 80.0}
        method["regression"]["to_zero"] = True
        # backbone: torchvision's vgg16 file
        method["perceptual"] = {"network": "vgg", "backbone": "", "linear": "", "parity": False}
    adam = {"name": "adam", "b1": 0.0, "b2": 0.999, "learning_rate": 1e-5}
    config.method = ConfigDict({**method, "score_optim": adam})
    config.optim = ConfigDict(dict(adam))
    config.ema = ConfigDict({"halflife_images": 500_000, "rampup_ratio": 0.05})
    config.train = ConfigDict(
        {
            "batch_size": 128,
            "total_images": 50_000_000,
            "log_every_steps": 100,
            "checkpoint_every_steps": 5000,
            "checkpoint_every_minutes": 30.0,
            "sample_every_steps": 5000,
        }
    )
    return config
