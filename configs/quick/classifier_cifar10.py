"""A classifier of CIFAR-10 at 32x32, whose features are a space to evaluate samples in without downloads.

    python -m diffjax.cli.train --config=configs/quick/classifier_cifar10.py --workdir=runs/classifier_cifar10 \
        --config.data.data_dir=FOLDER_OF_TENSORFLOW_DATASETS

Hardware: 2 cores of an AMD EPYC, 9 minutes, part of them beside other work. Expect: right about 76.5 % of the 5,000 images
that are held out (seed 0). No published number, and distances in these features are no FID.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is unused."""
    if arg:
        raise ValueError(f"classifier_cifar10.py has no variants, found {arg!r}: leave out what follows the colon")
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
            "num_classes": 10,
            "flip": True,
        }
    )
    config.model = ConfigDict({"name": "classifier", "width": 16, "feature_width": 128})
    config.method = ConfigDict({"name": "classify", "held_out": 0.1, "test_every_steps": 500})
    config.optim = ConfigDict(
        {"name": "adamw", "weight_decay": 0.05, "learning_rate": 2e-3, "warmup_images": 25_600, "schedule": "cosine"}
    )
    config.ema = ConfigDict({"halflife_images": 50_000, "rampup_ratio": 0.1})
    config.train = ConfigDict(
        {
            "batch_size": 128,
            "total_images": 320_000,
            "log_every_steps": 100,
            "checkpoint_every_steps": 1000,
            "checkpoint_every_minutes": 10.0,
        }
    )
    return config
