"""AMED on ImageNet 64x64, class-conditional (Zhou et al., CVPR 2024): learned middle points.

    python -m diffjax.cli.train --config=configs/amed/imagenet64.py:plugin5 --workdir=runs/amed_imagenet64_plugin5
    python -m diffjax.cli.train --config=configs/amed/imagenet64.py:solver5 --workdir=runs/amed_imagenet64_solver5

The argument: plugin (on iPNDM-4) or solver (AMED-Solver), and the network calls: 3, 5, 7, 9 with an analytical first
step, 4, 6, 8, 10 without.
Hardware and hours (paper): 4x A100; 0.18 and 0.32 A100 hours for the plugin at 5 and 10 calls.
Expect (paper): FID of the plugin 13.83 / 5.01 at 5 / 10 calls, of the solver
38.10 / 10.74 / 6.66 / 5.44 at 3 / 5 / 7 / 9. Ours: not run.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: see the module; two calls a step, one fewer with the analytical first step."""
    arg = arg or "plugin5"
    if arg not in [f"{kind}{calls}" for kind in ("plugin", "solver") for calls in range(3, 11)]:
        raise ValueError(f"found {arg!r}, expected plugin or solver and 3 to 10 calls: type imagenet64.py:plugin5")
    plugin, calls = arg.startswith("plugin"), int(arg.removeprefix("plugin").removeprefix("solver"))
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict({"name": "none"})
    config.model = ConfigDict({"name": "teacher"})  # the predictor sees its bottleneck
    config.method = ConfigDict(
        {
            "name": "amed",
            "teacher": "runs/edm_imagenet64",
            "num_steps": (calls + 1) // 2 + 1,
            "afs": calls % 2 == 1,
            "solver": "ipndm" if plugin else "amed",
            "order": 4 if plugin else 2,
            "scale_dir": 0.01,
            "scale_time": 0.0 if plugin else 0.0,
            "sigma_min": 0.002,
            "sigma_max": 80.0,
            "grid": "polynomial" if plugin else "time_uniform",
            "rho": 7.0 if plugin else 1.0,
            "teacher_solver": "ipndm" if plugin else "heun",
            "teacher_order": 4 if plugin else 2,
            "teacher_factor": 3 if plugin else 2,
        }
    )
    config.optim = ConfigDict({"name": "adam", "learning_rate": 5e-3, "schedule": "constant"})
    config.ema = ConfigDict({"halflife_images": 0})
    config.train = ConfigDict(
        {
            "batch_size": 64,
            "total_images": 10_000,
            "log_every_steps": 10,
            "checkpoint_every_steps": 0,
            "checkpoint_every_minutes": 10.0,
            "sample_every_steps": 0,
        }
    )
    return config
