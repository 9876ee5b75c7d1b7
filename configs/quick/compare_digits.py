"""Frechet distance against network calls on digits: teacher, training-free solvers, SFD students.

    python -m diffjax.cli.evaluate --config=configs/quick/compare_digits.py --workdir=runs/quickstart

Needs the runs that `bash launch/quickstart.sh` trains. Hardware: any laptop CPU, about 2 minutes.
The distance is in pixel space (64 dimensions, no network), so it is no FID.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is unused."""
    if arg:
        raise ValueError(f"compare_digits.py has no variants, found {arg!r}: leave out what follows the colon")
    config = ConfigDict()
    config.teacher = "runs/quickstart/teacher"
    config.students = tuple(f"runs/quickstart/student_{calls}" for calls in (1, 2, 3, 4, 5))
    config.solvers = ("euler", "heun", "ipndm", "dpmpp", "unipc")  # each with and without AFS
    config.calls = (1, 2, 3, 4, 5, 8)
    config.sigma_min = 0.006
    config.sigma_max = 80.0
    config.num_samples = 4000
    config.batch_size = 2000
    config.seeds = (0, 1, 2)
    config.grid_columns = 12
    return config
