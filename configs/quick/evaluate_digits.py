"""Pixel and classifier Frechet distance of the digits teacher against the number of steps, three seed ranges.

    python -m diffjax.cli.evaluate --config=configs/quick/evaluate_digits.py --workdir=runs/digits_metrics

Needs the runs of configs/quick/edm_digits.py in runs/digits_teacher and of configs/quick/classifier_digits.py in
runs/classifier_digits. Hardware: any laptop CPU, about 1 minute. Neither space is Inception's, so nothing here is an
FID.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is unused."""
    if arg:
        raise ValueError(f"evaluate_digits.py has no variants, found {arg!r}: leave out what follows the colon")
    config = ConfigDict()
    config.report = "metrics"
    config.sets = ConfigDict({"teacher": {"run": "runs/digits_teacher", "num_steps": (4, 6, 10, 18)}})
    config.spaces = ConfigDict(
        {
            "pixels": {"metrics": ("frechet", "prdc"), "options": {"prdc": {"k": 3}}},
            "classifier": {
                "metrics": ("frechet", "prdc"),
                "weights": "runs/classifier_digits",
                "options": {"prdc": {"k": 3}},
            },
        }
    )
    config.reference = ConfigDict({"data": {"name": "digits", "image_size": 8, "channels": 1, "num_classes": 0}})
    config.beside = ()
    config.seeds = (0, 1, 2)
    config.num_samples = 4000
    config.batch_size = 1000  # of a device
    config.num_devices = 0  # all
    config.save_every_s = 60.0
    return config
