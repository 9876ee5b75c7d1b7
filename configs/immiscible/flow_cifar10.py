"""Flow matching on CIFAR-10 with assigned noise (Li et al. 2025, tables 3 and 4).

    python -m diffjax.cli.train --config=configs/immiscible/flow_cifar10.py:knn --workdir=runs/flow_cifar10_knn

The argument: none, linear (exact assignment), auction (on the device), or knn (nearest of 4 noises).
Hardware (paper): one A6000.
Expect (paper): FID with 50 Euler steps at 100,000 / 200,000 steps none 6.10 / 5.07, knn 4.28 / 3.68; best none 4.92, linear
5.02, knn 3.56; dopri5 none 3.49, knn 3.31. Ours: not run. The network is DDPM++ of about the published width.
Data: tensorflow-datasets "cifar10" prepared as ArrayRecord; its folder in --config.data.data_dir=.
"""

from ml_collections import ConfigDict

ASSIGN = {
    "none": {},
    "linear": {"assign": "linear", "assign_options": {"cost": "l2", "route": "host"}},
    "auction": {"assign": "auction"},
    "knn": {"assign": "knn", "assign_options": {"k": 4}},
}


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: see the module. --config.sample.solver=dopri5 for the adaptive solver."""
    arg = arg or "knn"
    if arg not in ASSIGN:
        raise ValueError(f"found {arg!r}, expected one of {list(ASSIGN)}: type flow_cifar10.py:knn")
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
        }
    )
    config.model = ConfigDict(
        {
            "name": "ddpmpp",
            "precondition": "velocity",
            "label_scale": 1000.0,  # the flow's time 0..1 as the embedding likes it
            "channels": 128,
            "channel_mult": (1, 2, 2, 2),
            "num_blocks": 2,
            "attention_sizes": (16,),
            "dropout": 0.1,
            "compute_dtype": "",  # "bfloat16" on TPU and GPU
        }
    )
    config.method = ConfigDict({"name": "edm", "distribution": "uniform_flow", "weighting": "velocity", **ASSIGN[arg]})
    config.optim = ConfigDict({"name": "adam", "learning_rate": 2e-4, "warmup_images": 1_280_000, "clip_norm": 1.0})
    config.ema = ConfigDict({"halflife_images": 1_774_000})  # 0.9999 a step
    config.train = ConfigDict(
        {
            "batch_size": 256,
            "total_images": 51_200_000,  # 200,000 steps
            "log_every_steps": 100,
            "checkpoint_every_steps": 5000,
            "checkpoint_every_minutes": 30.0,
            "keep_every_steps": 20_000,
            "sample_every_steps": 5000,
        }
    )
    config.sample = ConfigDict({"solver": "euler", "num_steps": 51, "grid": "discrete", "process": "flow"})
    config.sample.update({"sigma_min": 1e-4, "sigma_max": 9999.0})
    return config
