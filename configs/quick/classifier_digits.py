"""A classifier of scikit-learn's digits, whose features are a space to evaluate samples in without downloads.

    python -m diffjax.cli.train --config=configs/quick/classifier_digits.py --workdir=runs/classifier_digits

Hardware: any laptop CPU, about 20 seconds of one core.
Expect: right about 99.4 % of the 359 digits that are held out. No published number: the data set is a demonstration,
and distances in these features are no FID.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is unused."""
    if arg:
        raise ValueError(f"classifier_digits.py has no variants, found {arg!r}: leave out what follows the colon")
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict({"name": "digits", "image_size": 8, "channels": 1, "num_classes": 10})
    config.model = ConfigDict({"name": "classifier", "width": 32, "feature_width": 64})
    config.method = ConfigDict({"name": "classify", "held_out": 0.2, "test_every_steps": 250})
    config.optim = ConfigDict(
        {"name": "adamw", "weight_decay": 0.05, "learning_rate": 2e-3, "warmup_images": 6_400, "schedule": "cosine"}
    )
    config.ema = ConfigDict({"halflife_images": 6_400, "rampup_ratio": 0.1})
    config.train = ConfigDict(
        {
            "batch_size": 64,
            "total_images": 32_000,
            "log_every_steps": 50,
            "checkpoint_every_steps": 500,
            "checkpoint_every_minutes": 10.0,
        }
    )
    return config
