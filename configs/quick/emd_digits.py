"""One-step generators of the digits teacher by EM distillation (Xie et al. 2024), and their rivals from the same code.

    python -m diffjax.cli.train --config=configs/quick/emd_digits.py:emd_16 --workdir=runs/emd_digits/seed_0/emd_16 \
        --config.method.teacher=runs/quickstart/teacher

The argument: emd_1, emd_4, emd_16 (K Langevin steps), emd_16_raw (the chain's noise stays in the target),
diff_instruct, dmd, sds; forward_kl: diff_instruct with each gradient times the ratio of the densities, which is
learned from the teacher's images.
Hardware: any laptop CPU; 5 (diff_instruct) to 17 minutes (emd_16) on one core.
Expect: see the table of `bash launch/emd_digits.sh` in README.md.
"""

from ml_collections import ConfigDict

VARIANTS = ("emd_1", "emd_4", "emd_16", "emd_16_raw", "diff_instruct", "forward_kl", "dmd", "sds")


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: see the module."""
    arg = arg or "emd_16"
    if arg not in VARIANTS:
        raise ValueError(f"found {arg!r}, expected one of {VARIANTS}: type emd_digits.py:emd_16")
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict({"name": "none"})  # distillation needs noise and labels only
    config.model = ConfigDict({"name": "teacher"})  # the same network, started from the teacher's weights
    method = {
        "name": "emd",
        "teacher": "runs/quickstart/teacher",
        "generator_sigma": 5.0,
        "langevin_steps": int(arg.split("_")[1]) if arg.startswith("emd") else 1,
        "scheme": "eps_z" if arg.startswith("emd") else "eps",
        "noise_step": 0.4**2,
        "latent_step": 0.004**2,
        "rescale": True,
        "score_updates": 4,  # with one the score lags behind: distance 0.20 in the place of 0.13 for diff_instruct
    }
    if arg in ("emd_16", "emd_16_raw"):
        method |= {"cancel": arg == "emd_16", "log_raw_gradient": arg == "emd_16"}
    if arg == "dmd":
        method["generator_weighting"] = "dmd"
    if arg == "sds":
        method["student_score"] = "delta"
    method["score_optim"] = {"name": "adam", "b1": 0.0, "b2": 0.99, "learning_rate": 1e-3, "schedule": "cosine"}
    if arg == "forward_kl":
        config.data = ConfigDict({"name": "teacher"})
        method["ratio_optim"] = {"name": "adam", "learning_rate": 1e-3}
    config.method = ConfigDict(method)
    config.optim = ConfigDict({"name": "adam", "b1": 0.0, "b2": 0.99, "learning_rate": 1e-3, "schedule": "cosine"})
    config.ema = ConfigDict({"halflife_images": 10_000, "rampup_ratio": 0.05})
    config.train = ConfigDict(
        {
            "batch_size": 128,
            "total_images": 256_000,
            "log_every_steps": 50,
            "checkpoint_every_steps": 500,
            "checkpoint_every_minutes": 10.0,
            "sample_every_steps": 500,
        }
    )
    return config
