"""Guided progressive distillation (Meng et al. 2023) on ImageNet 64x64.

    python -m diffjax.cli.train --config=configs/pd/imagenet64_guided.py:match --workdir=runs/guided_pd_imagenet64_match
    python -m diffjax.cli.train --config=configs/pd/imagenet64_guided.py:512 --workdir=runs/guided_pd_imagenet64_512

The argument: match, the student of the guided teacher, then 512, 256 ... 2, 1, the steps (and calls) of
the student; the teacher of each is the one before.
The teacher needs a null class: configs/edm/imagenet64_adm.py with --config.method.label_dropout=0.1.
Hardware and hours (Zhou 2024): up to 4150 / 4611 / 5533 A100 hours for 4 / 2 / 1 calls, the whole chain.
Expect (Meng 2023): FID 4.14 / 9.75 / 22.74 at 4 / 2 / 1 calls. Ours: not run; their settings could not be read.
"""

from ml_collections import ConfigDict

VARIANTS = ('match', '512', '256', '128', '64', '32', '16', '8', '4', '2', '1')


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: see the module."""
    arg = arg or VARIANTS[0]
    if arg not in VARIANTS:
        raise ValueError(f"found {arg!r}, expected one of {VARIANTS}: type imagenet64_guided.py:match")
    above = VARIANTS[VARIANTS.index(arg) - 1] if arg != VARIANTS[0] else ""
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict({"name": "teacher", "flip": True, "augment_probability": 0.0})
    config.model = ConfigDict({"name": "teacher"})
    method = {
        "name": "pd",
        "teacher": f"runs/guided_pd_imagenet64_{above}" if above else "runs/edm_imagenet64_null",
        "stage": "match" if arg == "match" else "halve",
        "num_steps": 512 + 1 if arg == "match" else int(arg) + 1,
        "guidance_range": (1.0, 5.0),  # scales w + 1 of Meng 2023, from memory
        "sigma_min": 0.002,
        "sigma_max": 80.0,
        "grid": "polynomial",
        "rho": 7.0,
    }
    if arg == "match":
        config.model.guidance_condition = True
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
            "sample_every_steps": 0,
        }
    )
    return config
