"""AMED-Plugin on iPNDM-4 for the digits teacher (Zhou et al., CVPR 2024): learned middle points.

    python -m diffjax.cli.train --config=configs/quick/amed_digits.py:3 --workdir=runs/sfd_digits/seed_0/amed_3 \
        --config.method.teacher=runs/quickstart/teacher

The argument: 1 to 5, the network calls (3 where absent); odd numbers have an analytical first step.
Hardware: 2 CPU cores; see the table `cost` of the report.
Expect: the row of README.md's table of `bash launch/sfd_digits.sh`. No published number for this data.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: network calls; two a step, one fewer with the analytical first step."""
    if arg not in ("", "1", "2", "3", "4", "5"):
        raise ValueError(f"found {arg!r} network calls, expected 1 to 5: type amed_digits.py:3")
    calls = int(arg or 3)
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict({"name": "none"})
    config.model = ConfigDict({"name": "teacher"})  # the predictor sees its bottleneck
    config.method = ConfigDict(
        {
            "name": "amed",
            "teacher": "runs/quickstart/teacher",
            "num_steps": (calls + 1) // 2 + 1,
            "afs": calls % 2 == 1,
            "solver": "ipndm",
            "order": 4,
            "scale_dir": 0.01,
            "scale_time": 0.2,
            "sigma_min": 0.006,
            "sigma_max": 80.0,
            "grid": "polynomial",
            "rho": 7.0,
            "teacher_solver": "ipndm",
            "teacher_order": 4,
            "teacher_factor": 3,
        }
    )
    config.optim = ConfigDict({"name": "adam", "learning_rate": 5e-3, "schedule": "constant"})
    config.ema = ConfigDict({"halflife_images": 0})
    config.train = ConfigDict(
        {
            "batch_size": 128,
            "total_images": 10_240,
            "log_every_steps": 20,
            "checkpoint_every_steps": 0,
            "checkpoint_every_minutes": 10.0,
            "sample_every_steps": 0,
        }
    )
    return config
