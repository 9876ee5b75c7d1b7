"""DDPM's noise prediction on CIFAR-10, sampled by DDIM, with assigned noise (Li et al. 2024, table 1; Li et al. 2025).

    python -m diffjax.cli.train --config=configs/immiscible/ddim_cifar10.py:linear --workdir=runs/ddim_cifar10_linear

The argument: none, linear (exact assignment), auction (on the device), or knn (nearest of 8 noises).
Hardware (paper): one A5000.
Expect (paper): best FID none 6.63, linear 5.14, knn 4.45; image_scale 2 or 4 is better still (values only plotted).
Ours: not run. The network is DDPM++ of about the published width (128; 1, 2, 2, 2), not the same code.
Data: tensorflow-datasets "cifar10" prepared as ArrayRecord; its folder in --config.data.data_dir=.
"""

from ml_collections import ConfigDict

ASSIGN = {
    "none": {},
    "linear": {"assign": "linear", "assign_options": {"cost": "l2", "route": "host"}},
    "auction": {"assign": "auction"},
    "knn": {"assign": "knn", "assign_options": {"k": 8}},
}


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: see the module."""
    arg = arg or "linear"
    if arg not in ASSIGN:
        raise ValueError(f"found {arg!r}, expected one of {list(ASSIGN)}: type ddim_cifar10.py:linear")
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict(
        {
            "name": "tfds",
            "dataset": "cifar10",
            "split": "train",
            "data_dir": "",
            "image_size": 32,
            "channels": 3,
            "num_classes": 0,
            "flip": True,
            "image_scale": 1.0,
        }
    )
    config.model = ConfigDict(
        {
            "name": "ddpmpp",
            "precondition": "eps",
            "process": "linear",  # betas 0.0001 to 0.02 in 1000 steps
            "channels": 128,
            "channel_mult": (1, 2, 2, 2),
            "num_blocks": 2,
            "attention_sizes": (16,),
            "dropout": 0.1,
            "compute_dtype": "",  # "bfloat16" on TPU and GPU
        }
    )
    config.method = ConfigDict({"name": "edm", "distribution": "discrete", "weighting": "eps", **ASSIGN[arg]})
    config.method.distribution_options = {"process": "linear"}
    config.optim = ConfigDict({"name": "adam", "learning_rate": 2e-4, "warmup_images": 1_280_000, "clip_norm": 1.0})
    config.ema = ConfigDict({"halflife_images": 1_774_000})  # 0.9999 a step
    config.train = ConfigDict(
        {
            "batch_size": 256,
            "total_images": 102_400_000,  # 400,000 steps
            "log_every_steps": 100,
            "checkpoint_every_steps": 5000,
            "checkpoint_every_minutes": 30.0,
            "keep_every_steps": 20_000,
            "sample_every_steps": 5000,
        }
    )
    config.sample = ConfigDict({"solver": "ddim", "num_steps": 50, "grid": "discrete", "process": "linear"})
    config.sample.update({"sigma_min": 0.01, "sigma_max": 157.4, "to_zero": True})  # the ends of the table
    return config
