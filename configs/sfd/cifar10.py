"""SFD students of 2 to 5 calls on CIFAR-10 32x32, unconditional (Zhou et al. 2024, table 2).

    python -m diffjax.cli.train --config=configs/sfd/cifar10.py:2 --workdir=runs/sfd_cifar10_2 \
        --config.method.teacher=runs/edm_cifar10

The argument is the number of network calls, 2 to 5 (2 where absent).
Hardware and hours (paper): 4x A100; 0.64 / 0.92 / 1.17 / 1.42 A100 hours for 2 / 3 / 4 / 5 calls.
Expect (paper): FID 4.53 / 3.58 / 3.24 / 3.06, 50,000 samples. Ours: not run yet.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: network calls of the student, "2" to "5"; the first step of each is analytical (AFS)."""
    if arg not in ("", "2", "3", "4", "5"):
        raise ValueError(f"found {arg!r} network calls, expected 2 to 5: type cifar10.py:2")
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict({"name": "none"})  # distillation needs noise and labels only
    config.model = ConfigDict({"name": "teacher"})  # the same network, started from the teacher's weights
    config.method = ConfigDict(
        {
            "name": "sfd",
            "teacher": "runs/edm_cifar10",
            "num_steps": int(arg or 2) + 2,  # timestamps: calls, the AFS step, and the end point
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
    config.optim = ConfigDict({"name": "adam", "learning_rate": 5e-5, "schedule": "half_drop"})
    config.ema = ConfigDict({"halflife_images": 0})
    config.train = ConfigDict(
        {
            "batch_size": 128,
            "total_images": 200_000,
            "log_every_steps": 50,
            "checkpoint_every_steps": 500,
            "checkpoint_every_minutes": 30.0,
            "sample_every_steps": 250,
        }
    )
    return config
