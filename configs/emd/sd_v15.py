"""A one-step generator of Stable Diffusion v1.5 by EM distillation (Xie et al. 2024, tables 4, 5 and 9).

    python -m diffjax.cli.convert --kind=folder stable-diffusion-v1-5 runs/sd15
    python -m diffjax.cli.train --config=configs/emd/sd_v15.py --workdir=runs/emd_sd15 --config.data.path=captions.txt

captions.txt: a text a line, no pictures; the last 1,000 are held out, for sample grids.
Hardware and hours: not sourced. Expect (paper): FID 9.66 on COCO-30k with 8 steps of Langevin, one call. Ours: not run.
The teacher's guidance scale, learning rates and batch are not sourced: DMD2's 1.75 is set for the first.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """No variants."""
    if arg:
        raise ValueError(f"found {arg!r}: leave out what follows sd_v15.py")
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict({"name": "prompts", "path": "captions.txt", "held_out": 1000})
    config.model = ConfigDict({"name": "teacher", "compute_dtype": "bfloat16", "remat": "nothing"})
    config.method = ConfigDict(
        {
            "name": "emd",
            "teacher": "runs/sd15",
            "generator_sigma": 1.618,  # index 500 of 1000
            "langevin_steps": 8,
            "scheme": "eps_z",
            "noise_step": 0.3**2,
            "latent_step": 0.003**2,
            "distribution": "discrete",
            "distribution_options": {"process": "scaled_linear"},
            "weighting": "eps",
            "generator_weighting": "unit",
            "guidance_scale": 1.75,
        }
    )
    adam = {"name": "adam", "b1": 0.0, "b2": 0.99}
    config.method.score_optim = ConfigDict({**adam, "learning_rate": 1e-5})
    config.optim = ConfigDict({**adam, "learning_rate": 2e-6})
    config.ema = ConfigDict({"halflife_images": 500_000, "rampup_ratio": 0.05})
    config.train = ConfigDict(
        {
            "batch_size": 1024,
            "total_images": 30_000_000,
            "log_every_steps": 10,
            "checkpoint_every_steps": 500,
            "checkpoint_every_minutes": 20.0,
            "sample_every_steps": 500,
        }
    )
    return config
