"""Progressive distillation (Salimans & Ho 2022) on ImageNet 64x64, class-conditional.

    python -m diffjax.cli.train --config=configs/pd/imagenet64.py:512 --workdir=runs/pd_imagenet64_512
    python -m diffjax.cli.train --config=configs/pd/imagenet64.py:256 --workdir=runs/pd_imagenet64_256

The argument: 512, 256 ... 2, 1, the steps (and calls) of
the student; the teacher of each is the one before.
Hardware and hours (Zhou 2024): up to 4611 and 5533 A100 hours for 2 and 1 calls, the whole chain.
Expect (Salimans & Ho 2022): FID 8.95 / 15.39 at 2 / 1 calls. Ours: not run.
"""

from ml_collections import ConfigDict

VARIANTS = ('512', '256', '128', '64', '32', '16', '8', '4', '2', '1')


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: see the module."""
    arg = arg or VARIANTS[0]
    if arg not in VARIANTS:
        raise ValueError(f"found {arg!r}, expected one of {VARIANTS}: type imagenet64.py:512")
    above = VARIANTS[VARIANTS.index(arg) - 1] if arg != VARIANTS[0] else ""
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict({"name": "teacher", "flip": True, "augment_probability": 0.0})
    config.model = ConfigDict({"name": "teacher"})
    method = {
        "name": "pd",
        "teacher": f"runs/pd_imagenet64_{above}" if above else "runs/edm_imagenet64",
        "num_steps": int(arg) + 1,
        "sigma_min": 0.002,
        "sigma_max": 80.0,
        "grid": "polynomial",
        "rho": 7.0,
    }
    config.method = ConfigDict(method)
    config.optim = ConfigDict({"name": "adam", "learning_rate": 1e-4, "schedule": "linear"})
    config.ema = ConfigDict({"halflife_images": 0})
    config.train = ConfigDict(
        {
            "batch_size": 2048,
            "total_images": 50_000 * 2048,
            "log_every_steps": 100,
            "checkpoint_every_steps": 1000,
            "checkpoint_every_minutes": 30.0,
            "sample_every_steps": 5000,
        }
    )
    return config
