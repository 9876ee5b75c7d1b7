"""One-step generators of the digits teacher beside each other: distance, recall, and what their training costs.

    python -m diffjax.cli.evaluate --config=configs/quick/compare_emd.py --workdir=runs/emd_digits

Needs the runs that `bash launch/emd_digits.sh` trains. Hardware: any laptop CPU, about 3 minutes. Distance and recall
are taken in pixel space (no network), so they are no FID.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is unused."""
    if arg:
        raise ValueError(f"compare_emd.py has no variants, found {arg!r}: leave out what follows the colon")
    config = ConfigDict()
    config.report = "one_call"
    config.base = "runs/emd_digits"  # folder of the runs, in the place of "{base}" below
    config.teacher = "{base}/teacher"
    config.teacher_method = "teacher_heun18"  # its name in the table
    seeds = (0, 1, 2)
    config.students = ConfigDict(
        {
            method: {"runs": ("{base}/seed_{seed}/" + method,), "num_steps": (), "seeds": seeds}
            for method in ("diff_instruct", "dmd", "emd_1", "emd_4", "emd_16")
        }
    )
    config.students.emd_16_raw = {"runs": ("{base}/seed_{seed}/emd_16_raw",), "num_steps": (), "seeds": (0,)}
    # curves of the gradient's norm: name -> (method, metric in its log)
    config.gradient_norms = ConfigDict(
        {
            "EMD-16": ("emd_16", "grad_norm"),
            "EMD-16, the same targets with their noise": ("emd_16", "grad_norm_raw"),
            "EMD-16, trained without cancellation": ("emd_16_raw", "grad_norm"),
        }
    )
    config.seeds = seeds
    config.num_samples = 4000
    config.batch_size = 2000
    config.neighbours = 3
    config.grid_columns = 12
    return config
