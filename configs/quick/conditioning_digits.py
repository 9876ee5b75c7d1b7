"""What a network is told beside the class, padding of texts, and a change of resolution, in small (Berrada et al. 2024).

    python -m diffjax.cli.train --config=configs/quick/conditioning_digits.py:size_alpha_4 --workdir=runs/size_alpha_4
    python -m diffjax.cli.train --config=configs/quick/conditioning_digits.py:switch_rescaled --workdir=runs/rescaled \\
        --config.method.start=runs/switch_start

The argument, one effect and one variant: size_VARIANT (none, constant, alpha_1, alpha_4, and alpha_4_drawn, which does not
start at zero), text_VARIANT (zero, replicate, noisy_replicate), switch_start at 8 pixels and from there switch_default,
switch_interp, switch_schedule and switch_rescaled (both) at 16, bf16_VARIANT (plain, qk_norm) at a high learning rate.
Hardware: any laptop CPU, about a minute each. Expect: no published number, digits are a demonstration.
"""

from ml_collections import ConfigDict

METADATA = {"high": ("left", "flip"), "low": ("height",)}
SIZES = {
    "none": None,
    "constant": {**METADATA, "weight": "constant"},
    "alpha_1": {**METADATA, "alpha": 1.0},
    "alpha_4": {**METADATA, "alpha": 4.0},
    "alpha_4_drawn": {**METADATA, "alpha": 4.0, "zero_init": False},
}
SWITCHES = {
    "start": {},
    "default": {},
    "interp": {"positions": "interp", "base_size": 4},
    "schedule": {"resolution_scale": 2.0},
    "rescaled": {"positions": "interp", "base_size": 4, "resolution_scale": 2.0},
}
PADDINGS = ("zero", "replicate", "noisy_replicate")
BF16 = {"plain": False, "qk_norm": True}


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: see the module."""
    effect, _, variant = (arg or "size_alpha_4").partition("_")
    variants = {"size": SIZES, "text": PADDINGS, "switch": SWITCHES, "bf16": BF16}
    if variant not in variants.get(effect, ()):
        every = [f"{effect}_{variant}" for effect, names in variants.items() for variant in names]
        raise ValueError(f"found {arg!r}, expected one of {every}: type conditioning_digits.py:size_alpha_4")
    is_large = effect == "switch" and variant != "start"
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict({"name": "digits", "image_size": 16 if is_large else 8, "channels": 1, "num_classes": 10, "views": 8})
    network = {"width": 48, "depth": 4, "heads": 4, "precondition": "eps", "process": "linear"}
    config.model = ConfigDict({"name": "dit", **network})
    config.method = ConfigDict({"name": "edm", "distribution": "discrete", "weighting": "eps"})
    if effect == "size" and SIZES[variant]:
        config.model.metadata = ConfigDict(SIZES[variant])
    if effect == "switch":
        config.model.update(SWITCHES[variant])
        if is_large:
            config.method.start = ""  # the run of switch_start
    if effect == "text":
        config.model = ConfigDict({"name": "mmdit", **network, "text_width": 384, "pooled_width": 384})
        config.model.text_padding = ConfigDict({"kind": variant})
        config.data.companions = "minilm"
        config.data.num_classes = 0
        config.data.captions = "digits"
    rate = 2e-3
    if effect == "bf16":
        config.model.update({"compute_dtype": "bfloat16", "qk_norm": BF16[variant]})
        rate = 3e-2
    config.optim = ConfigDict({"name": "adam", "learning_rate": rate, "warmup_images": 12_800})
    config.ema = ConfigDict({"halflife_images": 25_600, "rampup_ratio": 0.1})
    config.train = ConfigDict(
        {
            "batch_size": 128,
            "total_images": 38_400 if effect == "bf16" else 256_000,
            "log_every_steps": 50,
            "checkpoint_every_steps": 100,
            "checkpoint_every_minutes": 0.0,
            "keep_every_steps": 100 if is_large else 0,  # how soon it is as good is the question
            "sample_every_steps": 1000,
        }
    )
    # 25 steps, uniform in the trained levels
    levels = {"sigma_min": 0.01, "sigma_max": 157.4, "process": "linear"}
    config.sample = ConfigDict({"solver": "dpmpp", "order": 2, "grid": "discrete", "num_steps": 25, "to_zero": True, **levels})
    return config
