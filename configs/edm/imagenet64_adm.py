"""EDM teacher on ImageNet 64x64, class-conditional, ADM network (Karras et al. 2022, table 3 and appendix F).

    python -m diffjax.cli.train --config=configs/edm/imagenet64_adm.py --workdir=runs/edm_imagenet64 \
        --config.data.path=DATASET

Hardware and hours (paper): 32x A100, about 13 days for 2,500 million images.
Expect (paper): FID 1.36 at 511 calls, 50,000 samples, the best of 3 sets of seeds, with the variant "stochastic" (the
same training, sampled with 256 stochastic steps). Ours: not run yet.
Data: a folder or .zip of 64x64 pictures with class sub-folders or a dataset.json, or ArrayRecord.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" samples with 40 deterministic Heun steps (79 calls), "stochastic" as the published score was made."""
    if arg not in ("", "stochastic"):
        raise ValueError(f"found variant {arg!r}, expected none or stochastic: type imagenet64_adm.py:stochastic")
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict(
        {"name": "image_folder", "path": "", "image_size": 64, "channels": 3, "num_classes": 1000, "flip": False}
    )
    config.model = ConfigDict(
        {
            "name": "adm",
            "precondition": "edm",
            "sigma_data": 0.5,
            "channels": 192,
            "channel_mult": (1, 2, 3, 4),
            "num_blocks": 3,
            "attention_sizes": (32, 16, 8),
            "dropout": 0.10,
            "compute_dtype": "",  # "bfloat16" on TPU and GPU
        }
    )
    config.method = ConfigDict({"name": "edm", "distribution_options": {"p_mean": -1.2, "p_std": 1.2}})
    config.optim = ConfigDict({"name": "adam", "learning_rate": 1e-4, "warmup_images": 10_000_000})
    config.ema = ConfigDict({"halflife_images": 50_000_000, "rampup_ratio": 0.05})
    config.train = ConfigDict(
        {
            "batch_size": 4096,
            "total_images": 2_500_000_000,
            "log_every_steps": 100,
            "checkpoint_every_steps": 2000,
            "checkpoint_every_minutes": 30.0,
            "keep_every_steps": 50_000,
            "sample_every_steps": 5000,
        }
    )
    config.sample = ConfigDict(
        {"solver": "heun", "num_steps": 40, "grid": "polynomial", "sigma_min": 0.002, "sigma_max": 80.0, "to_zero": True}
    )
    if arg == "stochastic":
        config.sample.update({"solver": "edm_stochastic", "num_steps": 256})
        config.sample.update({"s_churn": 40.0, "s_min": 0.05, "s_max": 50.0, "s_noise": 1.003})
    return config
