"""Immiscible diffusion on digits: assigned noise against noise as drawn, along the training.

    python -m diffjax.cli.evaluate --config=configs/quick/compare_immiscible.py --workdir=runs/immiscible_digits

Needs the runs that `bash launch/immiscible_digits.sh` trains. Hardware: any laptop CPU, about half an hour. Distances are
taken in pixel space (no network), so they are no FID.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is unused."""
    if arg:
        raise ValueError(f"compare_immiscible.py has no variants, found {arg!r}: leave out what follows the colon")
    config = ConfigDict()
    config.report = "immiscible"
    config.base = "runs/immiscible_digits"  # folder of the runs, in the place of "{base}" below
    config.runs = "{base}/seed_{seed}/{training}_{assign}"
    # name of the training -> its assignments, and number of calls -> the plan's own settings
    plans = {
        "consistency": {"1": {"num_steps": 2}, "2": {"num_steps": 3}},
        "flow": {"1": {"num_steps": 2}, "5": {"num_steps": 6}, "50": {"num_steps": 51}},
        "ddim": {"20": {"num_steps": 20}, "50": {"num_steps": 50}},
    }
    config.trainings = ConfigDict()
    for name, own in plans.items():
        config.trainings[name] = {"assigns": ("none", "linear", "auction", "knn"), "plans": own}
        config.trainings[f"{name}_labels"] = {"assigns": ("none", "linear", "class"), "plans": own}
    config.seeds = (0, 1, 2)
    config.num_samples = 2000
    config.batch_size = 2000
    config.batches = (128, 256, 512, 1024)  # of the tables of reduction and solvers
    config.gaussians_updates = 4000
    return config
