"""Consistency models on CIFAR-10 with assigned noise (Song et al. 2023; Song & Dhariwal 2023; Li et al. 2024, table 1).

    python -m diffjax.cli.train --config=configs/immiscible/consistency_cifar10.py:training_linear --workdir=runs/ct_linear

The argument: RECIPE_ASSIGN; training (2023, N from 2 to 151), fixed (N = 120, mu = 0.99), ict (2023b), or distillation
(from the run runs/edm_cifar10), with none, linear (exact assignment), auction, or knn (nearest of 4 noises).
Hardware (paper): 4x A6000.
Expect (papers): FID of one / two calls 8.70 / 5.83 training, 2.51 / 2.24 ict, 3.55 / 2.93 distillation; Li 2024's own
training none 10.22, linear 8.54, knn 9.16. Neither reports assigned noise in distillation, whose teacher fixes the
pairing: expect nothing. Ours: not run.
Data: tensorflow-datasets "cifar10" prepared as ArrayRecord; its folder in --config.data.data_dir=. The perceptual metric
needs torchvision's vgg16 file: --config.method.perceptual.backbone=.
"""

from ml_collections import ConfigDict

RECIPES = ("training", "fixed", "ict", "distillation")
ASSIGN = {
    "none": {},
    "linear": {"assign": "linear", "assign_options": {"cost": "l2", "route": "host"}},
    "auction": {"assign": "auction"},
    "knn": {"assign": "knn", "assign_options": {"k": 4}},
}


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: see the module."""
    recipe, _, assign = (arg or "training_linear").partition("_")
    if recipe not in RECIPES or assign not in ASSIGN:
        raise ValueError(
            f"found {arg!r}, expected one of {RECIPES} and one of {list(ASSIGN)}: type consistency_cifar10.py:training_linear"
        )
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict(
        {"name": "tfds", "dataset": "cifar10", "split": "train", "data_dir": "", "image_size": 32, "channels": 3}
    )
    config.data.update({"num_classes": 0, "flip": True})
    config.model = ConfigDict(
        {
            "name": "ncsnpp",
            "precondition": "consistency",
            "sigma_data": 0.5,
            "channels": 128,
            "channel_mult": (2, 2, 2),
            "num_blocks": 4,
            "attention_sizes": (16,),
            "dropout": 0.3 if recipe == "ict" else 0.0,
            "compute_dtype": "",  # "bfloat16" on TPU and GPU
        }
    )
    method = {"name": "consistency", "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0, **ASSIGN[assign]}
    rate, batch, steps, halflife = 4e-4, 512, 800_000, 3_549_000  # 0.9999 a step
    if recipe == "ict":
        method |= {"curriculum": "double", "first_scale": 10, "last_scale": 1280, "mu": 0.0, "levels": "lognormal"}
        method |= {"metric": "pseudo_huber", "inverse_gap": True, "middle_levels": (0.821,)}
        rate, batch, steps, halflife = 1e-4, 1024, 400_000, 10_140_000  # 0.99993
    else:
        method |= {"curriculum": "sqrt", "first_scale": 2, "last_scale": 150, "mu": 0.9, "metric": "perceptual"}
        method["perceptual"] = {"network": "vgg", "backbone": "", "linear": "", "parity": False, "resize": 224}
    if recipe == "fixed":
        method |= {"curriculum": "fixed", "last_scale": 120, "mu": 0.99}
    if recipe == "distillation":
        method |= {"curriculum": "fixed", "last_scale": 18, "mu": 0.95, "teacher": "runs/edm_cifar10"}
        # the teacher's network, so that the student can start from its weights
        config.model = ConfigDict({"name": "teacher", "precondition": "consistency"})
    config.method = ConfigDict(method)
    config.optim = ConfigDict({"name": "radam", "learning_rate": rate})
    config.ema = ConfigDict({"halflife_images": halflife})
    config.train = ConfigDict(
        {
            "batch_size": batch,
            "total_images": batch * steps,
            "log_every_steps": 100,
            "checkpoint_every_steps": 5000,
            "checkpoint_every_minutes": 30.0,
            "keep_every_steps": 50_000,
            "sample_every_steps": 5000,
        }
    )
    return config
