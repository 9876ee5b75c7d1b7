"""SFD-v of Stable Diffusion v1.5 (Zhou et al. 2024, section 4.3): one student for 4 to 7 noise levels, told which.

    python -m diffjax.cli.convert --kind=folder stable-diffusion-v1-5 runs/sd15
    python -m diffjax.cli.train --config=configs/sfd/sd_v15.py:v --workdir=runs/sfd_sd15 --config.data.path=captions.txt
    python -m diffjax.cli.sample --workdir=runs/sfd_sd15 --num_steps=5 --guidance_scale=7.5 --prompt="a red fox" \
        --out=runs/fox

captions.txt: a text a line; the paper's are MS-COCO's of val2014. The last 1,000 are held out, for sample grids.
Trained without guidance, sampled with it: one student serves any scale. Hardware and hours: not sourced.
Expect: the paper's table 5 (FID and CLIP score at guidance 7.5); its values are not sourced. Ours: not run.
Teacher solver, learning rate and number of trajectories are CIFAR-10's: the paper's for this model are not sourced.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: v, or nothing."""
    if arg not in ("", "v"):
        raise ValueError(f"found {arg!r}, expected v: type sd_v15.py:v")
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict({"name": "prompts", "path": "captions.txt", "held_out": 1000})
    config.model = ConfigDict({"name": "teacher", "step_condition": True, "compute_dtype": "bfloat16", "remat": "nothing"})
    config.method = ConfigDict(
        {
            "name": "sfd",
            "teacher": "runs/sd15",
            "num_steps": (4, 5, 6, 7),
            "step_condition": "num_steps",
            "teacher_factor": 4,
            "sigma_min": 0.1,
            "sigma_max": 14.6146,
            "grid": "discrete",
            "process": "scaled_linear",
            "rho": 1.0,
            "afs": True,
            "teacher_solver": "dpmpp",
            "teacher_order": 2,
        }
    )
    config.optim = ConfigDict({"name": "adam", "learning_rate": 5e-5, "schedule": "half_drop"})
    config.ema = ConfigDict({"halflife_images": 0})
    config.train = ConfigDict(
        {
            "batch_size": 128,
            "total_images": 800_000,
            "log_every_steps": 10,
            "checkpoint_every_steps": 500,
            "checkpoint_every_minutes": 20.0,
            "sample_every_steps": 500,
        }
    )
    return config
