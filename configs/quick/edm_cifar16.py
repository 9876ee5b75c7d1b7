"""Unconditional EDM teacher on CIFAR-10 at 16x16, small enough to train on a CPU.

    python -m diffjax.cli.train --config=configs/quick/edm_cifar16.py --workdir=runs/sfd_cifar10/teacher \
        --config.data.data_dir=FOLDER_OF_TENSORFLOW_DATASETS

Hardware: 2 CPU cores, about 10 minutes.
Expect: pixel-space Frechet distance near 1.9 with 18 Heun steps (4,000 samples; two halves of the data are 0.29 apart).
No published number: a demonstration of the effect, at a quarter of the pixels and with a network of matrix products.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is unused."""
    if arg:
        raise ValueError(f"edm_cifar16.py has no variants, found {arg!r}: leave out what follows the colon")
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict(
        {
            "name": "tfds",
            "dataset": "cifar10",
            "split": "train",
            "data_dir": "",
            "resize": True,
            "image_size": 16,
            "channels": 3,
            "num_classes": 0,
            "flip": True,
        }
    )
    config.model = ConfigDict(
        {
            "name": "residual_mlp",
            "precondition": "edm",
            "sigma_data": 0.5,
            "width": 768,  # of the image's numbers: with 512 the distance stayed at 30
            "depth": 4,
            "embedding_width": 128,
            "dropout": 0.0,
        }
    )
    config.method = ConfigDict({"name": "edm"})
    config.optim = ConfigDict({"name": "adam", "learning_rate": 1e-3, "warmup_images": 12_800, "schedule": "cosine"})
    config.ema = ConfigDict({"halflife_images": 40_000, "rampup_ratio": 0.1})
    config.train = ConfigDict(
        {
            "batch_size": 256,
            "total_images": 512_000,
            "log_every_steps": 100,
            "checkpoint_every_steps": 500,
            "checkpoint_every_minutes": 10.0,
            "sample_every_steps": 0,
        }
    )
    config.sample = ConfigDict(
        {"solver": "heun", "num_steps": 18, "grid": "polynomial", "sigma_min": 0.002, "sigma_max": 80.0, "to_zero": True}
    )
    return config
