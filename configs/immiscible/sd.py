"""Stable Diffusion on ImageNet 256x256 with assigned noise, from scratch or fine-tuned (Li et al. 2024; Li et al. 2025).

    python -m diffjax.cli.convert --kind=folder stable-diffusion-v1-4 runs/sd14
    python -m diffjax.cli.train --config=configs/immiscible/sd.py:scratch_linear --workdir=runs/sd_scratch \
        --config.data.path=imagenet256 --config.data.companions=stable-diffusion-v1-4
    python -m diffjax.cli.train --config=configs/immiscible/sd.py:finetune_linear --workdir=runs/sd_finetuned \
        --config.data.path=imagenet256 --config.data.companions=stable-diffusion-v1-4

The argument: scratch or finetune, then none, linear (assigned over the batch) or knn (nearest of 64).
Data: ArrayRecord files with pictures of 256 x 256 and labels, made by `sources.write_array_record`; captions: a file with
the name of each class, a line a class. Released code's "fine-tune" script starts from random weights too: here it starts from runs/sd14.
Hardware (released scripts): 8 A800 for 20,000 steps from scratch, 4 A6000 for 5,000 of fine-tuning.
Expect (released README): FID none / linear / knn 17.92 / 16.43 / 16.84 from scratch, 11.45 / 10.28 / 10.38 fine-tuned.
Ours: not run.
"""

from ml_collections import ConfigDict

ASSIGN = {"none": {}, "linear": {"assign": "linear"}, "knn": {"assign": "knn", "assign_options": {"k": 64}}}
VARIANTS = tuple(f"{start}_{assign}" for start in ("scratch", "finetune") for assign in ASSIGN)


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: see the module."""
    arg = arg or "scratch_linear"
    if arg not in VARIANTS:
        raise ValueError(f"found {arg!r}, expected one of {VARIANTS}: type sd.py:scratch_linear")
    start, assign = arg.split("_")
    scratch = start == "scratch"
    config = ConfigDict()
    config.seed = 42
    config.data = ConfigDict({"name": "array_record", "path": "imagenet256", "companions": "stable-diffusion-v1-4"})
    config.data.captions = "imagenet_classes.txt"
    config.data.update({"image_size": 32, "channels": 4, "num_classes": 0})  # latents
    network = {"name": "unet", "precondition": "eps", "process": "scaled_linear"}
    config.model = ConfigDict({**network, "compute_dtype": "bfloat16", "remat": "nothing"})
    config.method = ConfigDict({"name": "edm", "distribution": "discrete", "weighting": "eps", **ASSIGN[assign]})
    config.method.distribution_options = {"process": "scaled_linear"}
    if not scratch:
        config.method.start = "runs/sd14"
    rate = 1e-4 if scratch else 1e-5
    config.optim = ConfigDict({"name": "adamw", "learning_rate": rate, "weight_decay": 0.01, "clip_norm": 1.0})
    batch_size = 2048 if scratch else 512
    config.ema = ConfigDict({"halflife_images": 6931 * batch_size})  # 0.9999 a step
    config.train = ConfigDict(
        {
            "batch_size": batch_size,
            "total_images": (20_000 if scratch else 5_000) * batch_size,
            "log_every_steps": 50,
            "checkpoint_every_steps": 1000,
            "checkpoint_every_minutes": 30.0,
            "sample_every_steps": 1000,
        }
    )
    config.sample = ConfigDict({"solver": "dpmpp", "order": 2, "num_steps": 20, "grid": "discrete", "process": "scaled_linear"})
    config.sample.update({"sigma_min": 0.0292, "sigma_max": 14.6146, "to_zero": True})  # the ends of the table
    return config
