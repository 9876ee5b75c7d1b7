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
    config.base = "runs/quickstart"  # folder of the runs, in the place of "{base}" below
    config.teacher = "{base}/teacher"
    runs = tuple(f"{{base}}/student_{calls}" for calls in (1, 2, 3, 4, 5))
    config.students = ConfigDict({"sfd": {"runs": runs, "num_steps": ()}})
    levels = {"grid": "polynomial", "sigma_min": 0.006, "sigma_max": 80.0}
    config.solvers = ConfigDict(  # each with and without AFS
        {
            "euler": {"solver": "euler", **levels},
            "heun": {"solver": "heun", **levels},
            "ipndm": {"solver": "ipndm", "order": 4, **levels},
            "dpmpp": {"solver": "dpmpp", "order": 3, **levels},
            "unipc": {"solver": "unipc", "order": 3, **levels},
        }
    )
    config.calls = (1, 2, 3, 4, 5, 8)
    config.num_samples = 4000
    config.batch_size = 2000
    config.seeds = (0, 1, 2)
    config.grid_columns = 12
    return config
