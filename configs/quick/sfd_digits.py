"""SFD student of the digits teacher (Zhou et al. 2024, algorithm 1), one for each number of calls.

    python -m diffjax.cli.train --config=configs/quick/sfd_digits.py:2 --workdir=runs/digits_student_2 \
        --config.method.teacher=runs/digits_teacher

The argument is the number of network calls, 1 to 5 (2 where absent).
Hardware: any laptop CPU; about half a minute on 2 cores.
Expect: pixel-space Frechet distance near 0.1 at 2 calls, where Euler with AFS has 1.7 (4,000 samples).
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: network calls of the student, "1" to "5"; the first step of each is analytical (AFS)."""
    if arg not in ("", "1", "2", "3", "4", "5"):
        raise ValueError(f"found {arg!r} network calls, expected 1 to 5: type sfd_digits.py:2")
    calls = int(arg or 2)
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict({"name": "none"})  # distillation needs noise and labels only
    config.model = ConfigDict({"name": "teacher"})  # the same network, started from the teacher's weights
    config.method = ConfigDict(
        {
            "name": "sfd",
            "teacher": "runs/quickstart/teacher",
            "num_steps": calls + 2,  # timestamps: calls, the AFS step, and the end point
            "teacher_factor": 4,
            "sigma_min": 0.006,
            "sigma_max": 80.0,
            "grid": "polynomial",
            "rho": 7.0,
            "afs": True,
            "teacher_solver": "dpmpp",
            "teacher_order": 3,
        }
    )
    config.optim = ConfigDict({"name": "adam", "learning_rate": 1e-3, "schedule": "half_drop"})
    config.ema = ConfigDict({"halflife_images": 0})
    config.train = ConfigDict(
        {
            "batch_size": 128,
            "total_images": 32_000,
            "log_every_steps": 50,
            "checkpoint_every_steps": 250,
            "checkpoint_every_minutes": 10.0,
            "sample_every_steps": 250,
        }
    )
    return config
