"""Conditioning and pre-training strategies on digits, one against the other (Berrada et al. 2024, in small).

    python -m diffjax.cli.evaluate --config=configs/quick/compare_conditioning.py --workdir=runs/conditioning_digits

Needs the runs that `bash launch/conditioning_digits.sh` trains. Hardware: any laptop CPU, a few minutes. Distances are
taken in pixel space (no network), so they are no FID.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is unused."""
    if arg:
        raise ValueError(f"compare_conditioning.py has no variants, found {arg!r}: leave out what follows the colon")
    config = ConfigDict()
    config.report = "conditioning"
    config.base = "runs/conditioning_digits"  # folder of the runs, in the place of "{base}" below
    config.runs = "{base}/seed_{seed}/{effect}_{variant}"
    config.effects = ConfigDict(
        {
            "size": ("none", "constant", "alpha_1", "alpha_4", "alpha_4_drawn"),
            "text": ("zero", "replicate", "noisy_replicate"),
            "switch": ("default", "interp", "schedule", "rescaled"),
            "bf16": ("plain", "qk_norm", "plain_3e-2", "qk_norm_3e-2"),
        }
    )
    config.seeds = (0, 1, 2)
    config.num_samples = 1000
    config.num_samples_along = 500  # at each kept step after the change of resolution
    config.num_pairs = 200
    config.batch_size = 1000
    config.last_losses = 25  # steps
    config.shown = 16
    return config
