"""Frechet distance against network calls: every training-free solver, SFD, SFD-v, its second stage, and the baselines.

    python -m diffjax.cli.evaluate --config=configs/quick/compare_sfd.py:digits --workdir=runs/sfd_digits
    python -m diffjax.cli.evaluate --config=configs/quick/compare_sfd.py:cifar10 --workdir=runs/sfd_cifar10

Needs the runs that `bash launch/sfd_digits.sh` and `bash launch/sfd_cifar10.sh --quick` train. Hardware: any laptop
CPU, about 5 minutes. The distance is in pixel space (no network), so it is no FID.
"""

from ml_collections import ConfigDict

LEVELS = {"grid": "polynomial", "sigma_min": 0.006, "sigma_max": 80.0}
LOGSNR = {**LEVELS, "grid": "logsnr"}
# each with and without the analytical first step; orders and grids as published (Zhou 2024's diff-solvers)
SOLVERS = {
    "euler": {"solver": "euler", **LEVELS},
    "heun": {"solver": "heun", **LEVELS},
    "dpm2s": {"solver": "dpm2s", **LEVELS},
    "ipndm": {"solver": "ipndm", "order": 4, **LEVELS},
    "ipndm_v": {"solver": "ipndm_v", "order": 4, **LEVELS},
    "dpmpp": {"solver": "dpmpp", "order": 3, **LEVELS},
    "dpmpp_logsnr": {"solver": "dpmpp", "order": 3, **LOGSNR},
    "unipc": {"solver": "unipc", "order": 3, **LEVELS},
    "unipc_logsnr": {"solver": "unipc", "order": 3, **LOGSNR},
    "deis": {"solver": "deis", "order": 4, **LEVELS, "grid": "time_uniform", "rho": 2.0},
    "ipndm_gits": {"solver": "ipndm", "order": 4, **LEVELS, "grid": "gits"},
}


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "digits" (3 training seeds) or "cifar10" (16x16, one seed)."""
    if arg not in ("digits", "cifar10"):
        raise ValueError(f"found {arg!r}, expected digits or cifar10: type compare_sfd.py:digits")
    each = "{base}/seed_{seed}/"
    calls = (1, 2, 3, 4, 5)
    config = ConfigDict()
    config.base = f"runs/sfd_{arg}"  # folder of the runs, in the place of "{base}" below
    config.teacher = "{base}/teacher"
    config.students = ConfigDict(
        {
            "sfd": {"runs": tuple(each + f"student_{n}" for n in calls), "num_steps": ()},
            "sfd_v": {"runs": (each + "student_v",), "num_steps": ()},
            "second_stage": {"runs": (each + "second_stage",), "num_steps": ()},
            "two_call_student_at_one": {"runs": (each + "student_2",), "num_steps": (3,)},
            "pd": {"runs": tuple(each + f"pd_{n}" for n in (4, 2, 1)), "num_steps": ()},
            "amed_plugin": {"runs": tuple(each + f"amed_{n}" for n in calls), "num_steps": ()},
        }
    )
    config.solvers = ConfigDict(SOLVERS)
    config.calls = (1, 2, 3, 4, 5, 8)
    config.num_samples = 4000
    config.batch_size = 2000 if arg == "digits" else 500
    config.seeds = (0, 1, 2) if arg == "digits" else (0,)
    config.grid_columns = 12
    return config
