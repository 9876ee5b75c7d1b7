"""Clips of two small networks of video, in slices and not, and with steps that reuse others.

    python -m diffjax.cli.evaluate --config=configs/quick/compare_video.py --workdir=runs/video_demo

Needs the runs that `bash launch/video_demo.sh` trains. Hardware: any laptop CPU, a few minutes,
most of which is compiling.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is unused."""
    if arg:
        raise ValueError(f"compare_video.py has no variants, found {arg!r}: leave out what follows the colon")
    config = ConfigDict()
    config.report = "video"
    config.base = "runs/video_demo"  # folder of the runs
    config.models = ("digits", "clips")
    config.seed = 0
    config.num_clips = 4
    config.num_steps = 25
    config.full_steps = 13
    # numbers of slices by axis; more than there are parts = one part a slice
    config.plans = ConfigDict({"default": {"frames": 7, "rows": 4}, "tight": {"frames": 64, "rows": 64, "tokens": 4}})
    config.measured = ConfigDict({"frames": 14, "size": 64})
    config.rounds = 5
    return config
