"""SFD students on CIFAR-10 32x32, unconditional (Zhou et al. 2024, table 2).

    python -m diffjax.cli.train --config=configs/sfd/cifar10.py:2 --workdir=runs/sfd_cifar10_full_2 \
        --config.method.teacher=runs/edm_cifar10

The argument: 2 to 5, the network calls of the student (2 where absent); v, one student for 2 to 5 calls (SFD-v);
second, the second stage for one call, whose teacher is the run runs/sfd_cifar10_full_v.
Hardware and hours (paper): 4x A100; 0.64 / 0.92 / 1.17 / 1.42 A100 hours for 2 / 3 / 4 / 5 calls, v 4.26, second 4.88.
Expect (paper): FID 4.53 / 3.58 / 3.24 / 3.06, v 4.28 / 3.50 / 3.18 / 2.95, second 5.83, 50,000 samples. Ours: not run.
"""

from ml_collections import ConfigDict

VARIANTS = ("2", "3", "4", "5", "v", "second")


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: see the module; the first step of each student is analytical (AFS)."""
    arg = arg or "2"
    if arg not in VARIANTS:
        raise ValueError(f"found {arg!r}, expected one of {VARIANTS}: type cifar10.py:2")
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict({"name": "none"})  # distillation needs noise and labels only
    config.model = ConfigDict({"name": "teacher"})  # the same network, started from the teacher's weights
    method = {
        "name": "sfd",
        "teacher": "runs/edm_cifar10",
        "num_steps": int(arg) + 2 if arg.isdigit() else 4,  # timestamps: calls, the AFS step, and the end point
        "teacher_factor": 4,
        "sigma_min": 0.006,
        "sigma_max": 80.0,
        "grid": "polynomial",
        "rho": 7.0,
        "afs": True,
        "teacher_solver": "dpmpp",
        "teacher_order": 3,
        "teacher_parity": True,  # the released third order; False has its missing factor 2
    }
    rate, images = 5e-5, 200_000
    if arg == "v":
        config.model.step_condition = True
        config.model.zero_init_step = False  # as published; True starts from the teacher exactly
        method |= {"num_steps": (4, 5, 6, 7), "step_condition": "num_steps"}
        images = 800_000
    if arg == "second":
        method |= {"teacher": "runs/sfd_cifar10_full_v", "num_steps": 3, "teacher_factor": 3}
        # 0: the order of Euler's method is its own
        method |= {"teacher_solver": "euler", "teacher_order": 0, "teacher_afs": True, "step_condition": "num_steps"}
        # network "": L1 alone; backbone: torchvision's vgg16 file; parity: [-1, 1] taken for [0, 1], as released
        method["perceptual"] = {"network": "vgg", "backbone": "", "linear": "", "parity": True}
        method["perceptual"] |= {"pooling": "average", "resize": 224}
        rate, images = 5e-4, 2_000_000
    config.method = ConfigDict(method)
    config.optim = ConfigDict({"name": "adam", "learning_rate": rate, "schedule": "half_drop"})
    config.ema = ConfigDict({"halflife_images": 0})
    config.train = ConfigDict(
        {
            "batch_size": 128,
            "total_images": images,
            "log_every_steps": 50,
            "checkpoint_every_steps": 500,
            "checkpoint_every_minutes": 30.0,
            "sample_every_steps": 250,
        }
    )
    return config
