"""SFD of the latent diffusion model of LSUN-Bedroom 256x256 (Zhou et al. 2024, table 4), one number of steps.

    python -m diffjax.cli.convert --kind=ldm_bedroom --companions=ldm-folder model.ckpt runs/ldm_bedroom
    python -m diffjax.cli.train --config=configs/sfd/lsun_bedroom.py:2 --workdir=runs/sfd_bedroom_2

model.ckpt: CompVis's file of LSUN-Bedroom, whose averages are taken; ldm-folder: any LDM folder of diffusers, for its VQ
autoencoder. The argument: 2 to 5, the student's network calls, 2 where absent. Both networks start from the teacher's averaged
weights (the release starts the student from the others). Hardware and hours: not sourced.
Expect: the paper's table 4; its values are not sourced. Ours: not run. Values are CIFAR-10's with a discrete grid.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: see the module."""
    arg = arg or "2"
    if arg not in ("2", "3", "4", "5"):
        raise ValueError(f"found {arg!r}, expected 2, 3, 4 or 5: type lsun_bedroom.py:2")
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict({"name": "none"})
    config.model = ConfigDict({"name": "teacher", "compute_dtype": "bfloat16"})
    config.method = ConfigDict(
        {
            "name": "sfd",
            "teacher": "runs/ldm_bedroom",
            "num_steps": int(arg) + 2,
            "teacher_factor": 4,
            "sigma_min": 0.006,
            "sigma_max": 83.8225,
            "grid": "discrete",
            "process": "ldm",
            "rho": 1.0,
            "afs": True,
            "teacher_solver": "dpmpp",
            "teacher_order": 3,
        }
    )
    config.optim = ConfigDict({"name": "adam", "learning_rate": 5e-5, "schedule": "half_drop"})
    config.ema = ConfigDict({"halflife_images": 0})
    config.train = ConfigDict(
        {
            "batch_size": 128,
            "total_images": 200_000,
            "log_every_steps": 10,
            "checkpoint_every_steps": 250,
            "checkpoint_every_minutes": 20.0,
            "sample_every_steps": 250,
        }
    )
    return config
