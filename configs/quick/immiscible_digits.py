"""Immiscible diffusion on scikit-learn's digits (Li et al. 2024): one objective, one way to give noise to images.

    python -m diffjax.cli.train --config=configs/quick/immiscible_digits.py:flow_linear --workdir=runs/flow_linear

The argument: OBJECTIVE_ASSIGN; consistency (consistency training), flow (flow matching) or ddim (noise prediction on
DDPM's linear table), or one of them with _labels for a class-conditional network, with none, linear, auction, knn (nearest
of 8 noises), or class (linear within each class; for _labels).
Hardware: any laptop CPU, a minute or two.
Expect: no published number, the data set is a demonstration.
"""

from ml_collections import ConfigDict

ASSIGN = {
    "none": {},
    "linear": {"assign": "linear", "assign_options": {"route": "device"}},  # "host": solved beside the step
    "auction": {"assign": "auction"},
    "knn": {"assign": "knn", "assign_options": {"k": 8}},
    "class": {"assign": "linear", "assign_options": {"group_by": "label"}},
}


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: see the module."""
    name, _, assign = (arg or "flow_linear").rpartition("_")
    objective, labels = name.removesuffix("_labels"), name.endswith("_labels")
    if objective not in ("consistency", "flow", "ddim") or assign not in ASSIGN or (assign == "class" and not labels):
        raise ValueError(
            f"found {arg!r}, expected consistency, flow or ddim, _labels or not, and one of {list(ASSIGN)} (class with "
            "_labels only): type immiscible_digits.py:flow_linear"
        )
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict({"name": "digits", "image_size": 8, "channels": 1, "num_classes": 10 if labels else 0})
    network = {"name": "residual_mlp", "width": 128, "depth": 3, "dropout": 0.0}
    if objective == "consistency":
        network |= {"precondition": "consistency", "sigma_data": 0.5}
        method = {"name": "consistency", "metric": "pseudo_huber", "curriculum": "double", "first_scale": 10}
        method |= {"last_scale": 160, "mu": 0.0, "levels": "lognormal", "inverse_gap": True}
    elif objective == "flow":
        network |= {"precondition": "velocity", "label_scale": 4.0, "skip": True}
        method = {"name": "edm", "distribution": "uniform_flow", "weighting": "velocity"}
    else:
        network |= {"precondition": "eps", "process": "linear", "label_scale": 0.004, "skip": True}
        method = {"name": "edm", "distribution": "discrete", "weighting": "eps"}
    config.model = ConfigDict(network)
    config.method = ConfigDict(method | ASSIGN[assign])
    config.optim = ConfigDict({"name": "adam", "learning_rate": 1e-3, "warmup_images": 25_600})
    config.ema = ConfigDict({"halflife_images": 80_000, "rampup_ratio": 0.1})
    config.train = ConfigDict(
        {
            "batch_size": 256,
            "total_images": 512_000,
            "log_every_steps": 100,
            "checkpoint_every_steps": 200,
            "checkpoint_every_minutes": 0.0,
            "keep_every_steps": 200,  # the report compares runs along their training
            "sample_every_steps": 1000,
        }
    )
    if objective != "consistency":  # 50 steps, uniform in the time of the process
        config.sample = ConfigDict({"solver": "euler", "grid": "discrete"})
    if objective == "flow":
        config.sample.update({"process": "flow", "num_steps": 51, "sigma_min": 1e-4, "sigma_max": 9999.0})
    if objective == "ddim":
        ends = {"sigma_min": 0.01, "sigma_max": 157.4}  # of the table
        config.sample.update({"process": "linear", "num_steps": 50, **ends, "to_zero": True})
    return config
