"""EDM teacher on CIFAR-10, DDPM++ network (Karras et al. 2022, table 2 and appendix F).

    python -m diffjax.cli.train --config=configs/edm/cifar10_ddpmpp.py:uncond --workdir=runs/edm_cifar10

Hardware and hours (paper): 8x V100, about 2 days for 200 million images.
Expect (paper): FID 1.97 unconditional, 1.79 conditional, 50,000 samples, 35 calls (18 Heun steps), the best of
3 sets of seeds. Ours: not run yet.
Data: tensorflow-datasets "cifar10" prepared as ArrayRecord; its folder in --config.data.data_dir=.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "cond") -> ConfigDict:
    """`arg`: "cond" (10 classes) or "uncond" (the teacher of SFD's CIFAR-10 results)."""
    if arg not in ("cond", "uncond"):
        raise ValueError(f"found variant {arg!r}, expected cond or uncond: type cifar10_ddpmpp.py:uncond")
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict(
        {
            "name": "tfds",
            "dataset": "cifar10",
            "split": "train",
            "data_dir": "",
            "image_size": 32,
            "channels": 3,
            "num_classes": 10 if arg == "cond" else 0,
            "flip": False,  # part of the augmentation
            "augment_probability": 0.12,
        }
    )
    config.model = ConfigDict(
        {
            "name": "ddpmpp",
            "precondition": "edm",
            "sigma_data": 0.5,
            "channels": 128,
            "channel_mult": (2, 2, 2),
            "num_blocks": 4,
            "attention_sizes": (16,),
            "dropout": 0.13,
            "augment_dim": 9,
            "compute_dtype": "",  # "bfloat16" on TPU and GPU
        }
    )
    config.method = ConfigDict({"name": "edm", "distribution_options": {"p_mean": -1.2, "p_std": 1.2}})
    config.optim = ConfigDict({"name": "adam", "learning_rate": 1e-3, "warmup_images": 10_000_000})
    config.ema = ConfigDict({"halflife_images": 500_000, "rampup_ratio": 0.05})
    config.train = ConfigDict(
        {
            "batch_size": 512,
            "total_images": 200_000_000,
            "log_every_steps": 100,
            "checkpoint_every_steps": 5000,
            "checkpoint_every_minutes": 30.0,
            "keep_every_steps": 50_000,
            "sample_every_steps": 5000,
        }
    )
    config.sample = ConfigDict(
        {"solver": "heun", "num_steps": 18, "grid": "polynomial", "sigma_min": 0.002, "sigma_max": 80.0, "to_zero": True}
    )
    return config
