"""Clips of a digit that moves and bounces (AnimateDiff's network, small and on pixels), told which digit it is.

    python -m diffjax.cli.train --config=configs/quick/video_digits.py --workdir=runs/video_digits

One of scikit-learn's digits in its own 8 x 8 pixels, straight on over 12 x 12 and back from the edges, 6 frames. The
class is the one token of the text, see `diffjax.build.video_networks`. All is trained at once,
where Guo et al. 2024 put motion modules into a network that was trained on pictures.
Hardware: any laptop CPU; about 40 minutes on one shared core of an AMD EPYC. Expect: no published number, the data is a
demonstration.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is unused."""
    if arg:
        raise ValueError(f"video_digits.py has no variants, found {arg!r}: leave out what follows the colon")
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict({"name": "moving_digits", "image_size": 12, "channels": 1, "num_classes": 10})
    config.data.num_frames = 6
    config.model = ConfigDict(
        {
            "name": "motion_unet",
            "precondition": "edm",
            "sigma_data": 0.5,
            "width": 32,
            "channel_mult": (1, 1),
            "num_blocks": 1,
            "transformer_depth": (0, 1),
            "heads": 2,
            "motion_heads": 2,
            "max_frames": 32,
        }
    )
    # noisier than Karras 2022's (-1.2, 1.2): where and which the digit is shows in all frames, and is decided early
    config.method = ConfigDict({"name": "edm", "distribution_options": {"p_mean": 0.0, "p_std": 1.4}})
    config.optim = ConfigDict({"name": "adam", "learning_rate": 2e-3, "warmup_images": 800, "schedule": "cosine"})
    config.ema = ConfigDict({"halflife_images": 800, "rampup_ratio": 0.1})
    config.train = ConfigDict(
        {
            "batch_size": 4,
            "total_images": 12_000,
            "log_every_steps": 50,
            "checkpoint_every_steps": 500,
            "checkpoint_every_minutes": 10.0,
            "sample_every_steps": 1_000,
        }
    )
    levels = {"grid": "polynomial", "sigma_min": 0.01, "sigma_max": 80.0, "to_zero": True}
    config.sample = ConfigDict({"solver": "euler", "num_steps": 25, **levels})
    return config
