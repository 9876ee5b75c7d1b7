"""A network for larger images than it was pre-trained on: one number for its process, its training and its sampling.

config.model.resolution_scale = s, the size of an image over that of pre-training, multiplies every noise level of a run
(`schedules.rescaled`): those that the network is called at, those that training draws and those that sampling visits.
All levels that a config or a flag names, such as sample.sigma_max, stay those of pre-training. Only s is set; the same
number in method.distribution_options and in sample follows it, and is written out with the config of the run.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from diffjax.core import schedules

KEY = "resolution_scale"
_LEVELS = ("sigma_min", "sigma_max", "s_min", "s_max")  # of a `sample` section


def follow(config: ConfigDict) -> ConfigDict:
    """`config` with the scale of its network in the sections that follow it, changed in place.

    Raises ValueError where one of them has another, and for methods whose levels are options of their own.
    """
    scale, method = config.get("model", {}).get(KEY, 1.0), config.get("method", {})
    schedules.check_scale(scale)
    options = method.get("distribution_options", {})
    followers = {"method.distribution_options": options, "sample": config.get("sample", {})}
    if wrong := {f"{name}.{KEY}": own[KEY] for name, own in followers.items() if own.get(KEY, scale) != scale}:
        raise ValueError(
            f"found model.{KEY}={scale} and {wrong}: a network that is sampled at other noise levels than it was "
            f"trained at draws grey or blurred images. Set model.{KEY} alone, the others follow"
        )
    if scale == 1:
        return config
    if method.get("name", "edm") != "edm":
        raise ValueError(
            f"found model.{KEY}={scale} with method {method.name!r}, whose noise levels are its own options and follow "
            f"nothing: take method 'edm', or a network with model.{KEY}=1"
        )
    config.method.distribution_options = {**options, KEY: scale}
    if "sample" in config:
        config.sample[KEY] = scale
    return config


def sample_options(sample: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
    """The options of a `sample` section with their levels rescaled, and the scale, taken out of them."""
    options = dict(sample)
    scale = options.pop(KEY, 1.0)
    return options | {key: scale * options[key] for key in _LEVELS if key in options}, scale
