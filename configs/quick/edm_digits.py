"""Class-conditional EDM teacher on scikit-learn's digits (1,797 real 8x8 images).

    python -m diffjax.cli.train --config=configs/quick/edm_digits.py --workdir=runs/digits_teacher

Hardware: any laptop CPU; about 1 minute on 2 cores.
Expect: pixel-space Frechet distance near 0.1 with 18 Heun steps (35 calls, 4,000 samples); two
halves of the data are 0.26 apart. No published number: the data set is a demonstration.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is unused: the teacher has one variant."""
    if arg:
        raise ValueError(f"edm_digits.py has no variants, found {arg!r}: leave out what follows the colon")
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict({"name": "digits", "image_size": 8, "channels": 1, "num_classes": 10})
    config.model = ConfigDict(
        {"name": "residual_mlp", "precondition": "edm", "sigma_data": 0.5, "width": 192, "depth": 4, "dropout": 0.0}
    )
    config.method = ConfigDict({"name": "edm"})
    config.optim = ConfigDict(
        {"name": "adam", "learning_rate": 2e-3, "warmup_images": 25_600, "schedule": "cosine"}
    )
    config.ema = ConfigDict({"halflife_images": 80_000, "rampup_ratio": 0.1})
    config.train = ConfigDict(
        {
            "batch_size": 256,
            "total_images": 768_000,
            "log_every_steps": 100,
            "checkpoint_every_steps": 1000,
            "checkpoint_every_minutes": 10.0,
            "sample_every_steps": 1000,
        }
    )
    config.sample = ConfigDict(
        {"solver": "heun", "num_steps": 18, "grid": "polynomial", "sigma_min": 0.002, "sigma_max": 80.0, "to_zero": True}
    )
    # in the log along the training; off with every_steps = 0
    config.evaluate = ConfigDict({"every_steps": 0, "metric": "frechet", "features": "pixels", "num_samples": 2000})
    return config
