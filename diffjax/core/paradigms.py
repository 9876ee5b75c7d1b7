"""Four ways to train a network as one table of settings: noise process, target, levels, weight and sampler.

A network sees alpha x0 + sigma eps and is fitted to a target; each of them becomes a denoiser (`core.prediction`), so
that methods, guidance and samplers are the same for all four:

    name      alpha, sigma                   target                    levels in training      samples by
    ddpm_eps  alpha^2 + sigma^2 = 1, table   eps                       those of the table      DDIM, uniform in index
    ddpm_v    the same                       alpha eps - sigma x0      the same                the same
    edm       1, sigma                       (x0 - c_skip x) / c_out   lognormal               Heun, Karras 2022, eq. 5
    flow      1 - u, u                       eps - x0                  logit-normal in u       Euler, uniform in u

Ho 2020; Salimans & Ho 2022; Karras 2022; Lipman 2023 and Esser 2024. Each loss is the squared error of the target. The
table is that of latent diffusion, betas scaled-linear from 0.00085 to 0.012 (Rombach 2022).

    of = sections("flow", calls=50)  # in a config: the keys of model, method and sample that depend on the choice
    config.model.update(of["model"])

A config may import this module, which is light.
"""

from typing import Any

from diffjax.core import names

_TABLE = {"process": "scaled_linear"}
_DDIM = {"solver": "euler", "grid": "discrete", **_TABLE, "sigma_min": 0.0292, "sigma_max": 14.6146, "to_zero": True}
_DISCRETE = {"distribution": "discrete", "distribution_options": _TABLE}

# name -> the keys that a paradigm gives to each section of a config
PARADIGMS: dict[str, dict[str, dict[str, Any]]] = {
    "ddpm_eps": {
        "model": {"precondition": "eps", **_TABLE}, "method": {**_DISCRETE, "weighting": "eps"}, "sample": _DDIM,
    },
    "ddpm_v": {
        "model": {"precondition": "v", **_TABLE}, "method": {**_DISCRETE, "weighting": "v"}, "sample": _DDIM,
    },
    "edm": {
        "model": {"precondition": "edm", "sigma_data": 0.5},
        "method": {"distribution": "lognormal", "weighting": "edm"},
        "sample": {
            "solver": "heun", "grid": "polynomial", "rho": 7.0, "sigma_min": 0.002, "sigma_max": 80.0, "to_zero": True,
        },
    },
    "flow": {
        "model": {"precondition": "velocity", "process": "flow", "label_scale": 1000.0},
        "method": {"distribution": "logit_normal", "weighting": "velocity"},
        # from u = 0.999 on, where a millionth of the variance is data
        "sample": {
            "solver": "euler", "grid": "discrete", "process": "flow", "sigma_min": 0.001, "sigma_max": 999.0,
            "to_zero": True,
        },
    },
}  # fmt: skip


def sections(name: str, calls: int) -> dict[str, dict[str, Any]]:
    """The keys of `model`, `method` and `sample` in a config, sampled by `calls` network calls, Heun by one less where
    that is even. Raises ValueError for an unknown name."""
    found = {key: dict(section) for key, section in names.lookup(PARADIGMS, name, "paradigm").items()}
    is_heun = found["sample"]["solver"] == "heun"  # two calls a step, one for the last
    found["sample"]["num_steps"] = (calls + 1) // 2 if is_heun else calls
    return found
