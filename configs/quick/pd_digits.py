"""Progressive distillation of the digits teacher (Salimans & Ho 2022), halved from 32 steps to 1.

    python -m diffjax.cli.train --config=configs/quick/pd_digits.py:16 --workdir=runs/sfd_digits/seed_0/pd_16 \
        --config.method.teacher=runs/quickstart/teacher
    python -m diffjax.cli.train --config=configs/quick/pd_digits.py:8 --workdir=runs/sfd_digits/seed_0/pd_8 \
        --config.method.teacher=runs/sfd_digits/seed_0/pd_16

The argument: 16, 8, 4, 2 or 1, the steps (and calls) of the student; its teacher has twice as many.
Hardware: 2 CPU cores; see the table `cost` of the report.
Expect: the row of README.md's table of `bash launch/sfd_digits.sh`. No published number for this data.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: steps of the student."""
    if arg not in ("", "16", "8", "4", "2", "1"):
        raise ValueError(f"found {arg!r} steps, expected 16, 8, 4, 2 or 1: type pd_digits.py:16")
    steps = int(arg or 16)
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict({"name": "teacher"})
    config.model = ConfigDict({"name": "teacher"})
    config.method = ConfigDict(
        {
            "name": "pd",
            "teacher": "runs/quickstart/teacher" if steps == 16 else f"runs/sfd_digits/seed_0/pd_{2 * steps}",
            "num_steps": steps + 1,
            "sigma_min": 0.006,
            "sigma_max": 80.0,
            "grid": "polynomial",
            "rho": 7.0,
        }
    )
    config.optim = ConfigDict({"name": "adam", "learning_rate": 1e-3, "schedule": "linear"})
    config.ema = ConfigDict({"halflife_images": 0})
    config.train = ConfigDict(
        {
            "batch_size": 128,
            "total_images": 64_000,
            "log_every_steps": 100,
            "checkpoint_every_steps": 500,
            "checkpoint_every_minutes": 10.0,
            "sample_every_steps": 0,
        }
    )
    return config
