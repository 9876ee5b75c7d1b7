"""SFD students of the 16x16 CIFAR-10 teacher (Zhou et al. 2024, algorithm 1), for one number of calls or all.

    python -m diffjax.cli.train --config=configs/quick/sfd_cifar16.py:2 --workdir=runs/sfd_cifar10/seed_0/student_2 \
        --config.method.teacher=runs/sfd_cifar10/teacher

The argument: 1 to 5, the network calls of the student (2 where absent); v, one student for 2 to 5 calls that is told
which (SFD-v), with five times the trajectories; second, the second stage for one call, whose teacher is the student v.
Hardware: 2 CPU cores; two to ten minutes, v three quarters of an hour.
Expect: see the table of `bash launch/sfd_cifar10.sh --quick` in README.md.
"""

from ml_collections import ConfigDict

VARIANTS = ("1", "2", "3", "4", "5", "v", "second")


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: see the module; the first step of each student is analytical (AFS)."""
    arg = arg or "2"
    if arg not in VARIANTS:
        raise ValueError(f"found {arg!r}, expected one of {VARIANTS}: type sfd_cifar16.py:2")
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict({"name": "none"})  # distillation needs noise and labels only
    config.model = ConfigDict({"name": "teacher"})  # the same network, started from the teacher's weights
    method = {
        "name": "sfd",
        "teacher": "runs/sfd_cifar10/teacher",
        "num_steps": int(arg) + 2 if arg.isdigit() else 4,  # timestamps: calls, the AFS step, and the end point
        # iPNDM-4 follows this smooth teacher closer in 2 steps than DPM-Solver++(3M) in 4. SFD-v, with five times the
        # trajectories, learns the variance that 2 leave too much of: 3.4 at 5 calls, 3.1 with 4
        "teacher_factor": 4 if arg == "v" else 2,
        "sigma_min": 0.006,
        "sigma_max": 80.0,
        "grid": "polynomial",
        "rho": 7.0,
        "afs": True,
        "teacher_solver": "ipndm",
        "teacher_order": 4,
    }
    rate, images = 4e-4, 32_000
    if arg == "v":
        config.model.step_condition = True
        method |= {"num_steps": (4, 5, 6, 7), "step_condition": "num_steps"}
        images = 5 * images
    if arg == "second":
        method |= {"teacher": "runs/sfd_cifar10/seed_0/student_v", "num_steps": 3, "teacher_factor": 3}
        # 0: the order of Euler's method is its own
        method |= {"teacher_solver": "euler", "teacher_order": 0, "teacher_afs": True, "step_condition": "num_steps"}
        images = 64_000
    config.method = ConfigDict(method)
    config.optim = ConfigDict({"name": "adam", "learning_rate": rate, "schedule": "cosine"})
    config.ema = ConfigDict({"halflife_images": 0})
    config.train = ConfigDict(
        {
            "batch_size": 64,
            "total_images": images,
            "log_every_steps": 100,
            "checkpoint_every_steps": 500,
            "checkpoint_every_minutes": 10.0,
            "sample_every_steps": 500,
        }
    )
    return config
