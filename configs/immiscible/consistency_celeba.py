"""Consistency training on CelebA with assigned noise (Li et al. 2024, table 1).

    python -m diffjax.cli.train --config=configs/immiscible/consistency_celeba.py:linear --workdir=runs/ct_celeba_linear

The argument: none, linear (exact assignment), auction, or knn (nearest of 4 noises).
Hardware (paper): 8x A800. Batch and hardware are the paper's; size of images and network, and the rate, are not published:
64x64, and those of CIFAR-10.
Expect (paper): the training reaches the same FID 1.3 times sooner with linear. Ours: not run.
Data: tensorflow-datasets "celeb_a" prepared as ArrayRecord; its folder in --config.data.data_dir=. Cropped and scaled.
"""

from ml_collections import ConfigDict

ASSIGN = {
    "none": {},
    "linear": {"assign": "linear", "assign_options": {"cost": "l2", "route": "host"}},
    "auction": {"assign": "auction"},
    "knn": {"assign": "knn", "assign_options": {"k": 4}},
}


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: see the module."""
    arg = arg or "linear"
    if arg not in ASSIGN:
        raise ValueError(f"found {arg!r}, expected one of {list(ASSIGN)}: type consistency_celeba.py:linear")
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict(
        {
            "name": "tfds",
            "dataset": "celeb_a",
            "split": "train",
            "data_dir": "",
            "resize": True,
            "image_size": 64,
            "channels": 3,
            "num_classes": 0,
            "flip": True,
        }
    )
    config.model = ConfigDict(
        {
            "name": "ncsnpp",
            "precondition": "consistency",
            "sigma_data": 0.5,
            "channels": 128,
            "channel_mult": (1, 2, 2, 2),
            "num_blocks": 4,
            "attention_sizes": (16,),
            "dropout": 0.0,
            "compute_dtype": "",  # "bfloat16" on TPU and GPU
        }
    )
    config.method = ConfigDict({"name": "consistency", "curriculum": "sqrt", "first_scale": 2, "last_scale": 150, **ASSIGN[arg]})
    config.method.update({"mu": 0.9, "metric": "perceptual"})
    config.method.perceptual = {"network": "vgg", "backbone": "", "linear": "", "parity": False, "resize": 224}
    config.optim = ConfigDict({"name": "radam", "learning_rate": 4e-4})
    config.ema = ConfigDict({"halflife_images": 7097000})  # 0.9999 a step
    config.train = ConfigDict(
        {
            "batch_size": 1024,
            "total_images": 1024 * 200_000,
            "log_every_steps": 100,
            "checkpoint_every_steps": 5000,
            "checkpoint_every_minutes": 30.0,
            "keep_every_steps": 20_000,
            "sample_every_steps": 5000,
        }
    )
    return config
