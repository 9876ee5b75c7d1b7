"""What a network is told beside the class, padding of texts, a change of resolution, in small (Berrada et al. 2024).

    python -m diffjax.cli.train --config=configs/quick/conditioning_digits.py:size_alpha_4 --workdir=runs/size_alpha_4
    python -m diffjax.cli.train --config=configs/quick/conditioning_digits.py:size_none --workdir=runs/size_none
    python -m diffjax.cli.train --config=configs/quick/conditioning_digits.py:switch_rescaled --workdir=runs/rescaled \\
        --config.method.start=runs/size_none

The argument, one effect and one variant: size_VARIANT (none, constant, alpha_1, alpha_4, and alpha_4_drawn, which does
not start at zero) and text_VARIANT (zero, replicate, noisy_replicate) at 8 pixels; from size_none switch_default,
switch_interp, switch_schedule and switch_rescaled (both) at 16; bf16_VARIANT (plain, qk_norm at a rate of 5e-2, and
plain_3e-2, qk_norm_3e-2).
Networks this small predict v: errors of predicted noise are multiplied by levels of up to 157.
Hardware: one core of a laptop CPU, half a minute each. Expect: no published number, digits are a demonstration.
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
    "default": {},
    "interp": {"positions": "interp", "base_size": 2},
    "schedule": {"resolution_scale": 2.0},
    "rescaled": {"positions": "interp", "base_size": 2, "resolution_scale": 2.0},
}
PADDINGS = ("zero", "replicate", "noisy_replicate")
BF16 = {"plain": (False, 5e-2), "qk_norm": (True, 5e-2), "plain_3e-2": (False, 3e-2), "qk_norm_3e-2": (True, 3e-2)}


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: see the module."""
    effect, _, variant = (arg or "size_alpha_4").partition("_")
    variants = {"size": SIZES, "text": PADDINGS, "switch": SWITCHES, "bf16": BF16}
    if variant not in variants.get(effect, ()):
        every = [f"{effect}_{variant}" for effect, names in variants.items() for variant in names]
        raise ValueError(f"found {arg!r}, expected one of {every}: type conditioning_digits.py:size_alpha_4")
    is_large = effect == "switch"
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict({"name": "digits", "image_size": 16 if is_large else 8, "channels": 1, "num_classes": 10})
    config.data.views = 4
    network = {"width": 64, "depth": 3, "heads": 2, "patch": 4, "precondition": "v", "process": "linear"}
    config.model = ConfigDict({"name": "dit", **network})
    config.method = ConfigDict({"name": "edm", "distribution": "discrete", "weighting": "v"})
    total_images, rate, schedule = 44_800, 3e-3, "cosine"
    if effect == "size" and SIZES[variant]:
        config.model.metadata = ConfigDict(SIZES[variant])
    if is_large:
        config.model.update(SWITCHES[variant])
        config.method.start = ""  # the run of size_none
        total_images, schedule = 15_360, "constant"
    if effect == "text":
        config.model = ConfigDict({"name": "mmdit", **network, "depth": 2, "text_width": 384, "pooled_width": 384})
        config.model.text_padding = ConfigDict({"kind": variant})
        config.data.companions = "minilm"
        config.data.num_classes = 0
        config.data.captions = "digits"
        total_images = 38_400
    if effect == "bf16":
        qk_norm, rate = BF16[variant]
        config.model.update({"patch": 2, "compute_dtype": "bfloat16", "qk_norm": qk_norm})
        total_images, schedule = 9_600, "constant"
    config.optim = ConfigDict({"name": "adam", "learning_rate": rate, "schedule": schedule})
    config.optim.warmup_images = 640 if effect == "bf16" else 3_200
    config.ema = ConfigDict({"halflife_images": 6_400, "rampup_ratio": 0.1})
    config.train = ConfigDict(
        {
            "batch_size": 64,
            "total_images": total_images,
            "log_every_steps": 1 if effect == "bf16" else 25,
            "checkpoint_every_steps": 30 if is_large else 500,
            "keep_every_steps": 30 if is_large else 0,  # how soon it is as good is the question
        }
    )
    # 25 steps, uniform in the trained levels
    levels = {"sigma_min": 0.01, "sigma_max": 157.4, "process": "linear"}
    plan = {"solver": "dpmpp", "order": 2, "grid": "discrete", "num_steps": 25, "to_zero": True}
    config.sample = ConfigDict({**plan, **levels})
    return config
