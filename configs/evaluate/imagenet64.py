"""FID of 50,000 images on ImageNet 64x64 by EDM's protocol: three seed ranges, the best of them is the score (Karras
2022).

    python -m diffjax.cli.evaluate --config=configs/evaluate/imagenet64.py --workdir=runs/fid_imagenet64 \
        --config.spaces.inception.weights=pt_inception-2015-12-05-6726825d.pth

Needs the run of configs/edm/imagenet64_adm.py, EDM's statistics fid-refs/imagenet-64x64.npz at the place below, and
FID's Inception network, the file that pytorch-fid releases. Hardware: several GPUs or TPUs; 150,000 samples of 511
calls with the variant "stochastic", 79 without. Paper: FID 1.36 at 511 calls. Ours: not run, the weights are not at
hand. The variant "adm" has FID, sFID, Inception score, precision and recall against ADM's batch of images in place of
EDM's file.
"""

from ml_collections import ConfigDict

VARIANTS = ("deterministic", "stochastic", "adm")


def get_config(arg: str = "deterministic") -> ConfigDict:
    """`arg`: of VARIANTS."""
    if arg not in VARIANTS:
        raise ValueError(f"found variant {arg!r}, expected one of {', '.join(VARIANTS)}: type imagenet64.py:stochastic")
    config = ConfigDict()
    config.report = "metrics"
    section = {"run": "runs/edm_imagenet64", "images": ""}
    if arg == "stochastic":
        churn = {"s_churn": 40.0, "s_min": 0.05, "s_max": 50.0, "s_noise": 1.003}
        section["sample"] = {"solver": "edm_stochastic", "num_steps": 256, **churn}
    config.sets = ConfigDict({"samples": section})
    space = {"metrics": ("fid",), "weights": "", "resize": "tf1"}
    config.reference = ConfigDict({"path": "imagenet-64x64.npz"})
    if arg == "adm":
        space |= {"metrics": ("fid", "sfid", "is", "prdc"), "options": {"prdc": {"k": 3, "equal": False}}}
        file = "VIRTUAL_imagenet64_labeled.npz"  # statistics of all images, and 10,000 of them
        config.reference = ConfigDict({"path": file, "images": file})
    config.spaces = ConfigDict({"inception": space})
    config.beside = ()
    config.seeds = (0, 1, 2)
    config.num_samples = 50_000
    config.batch_size = 125  # of a device
    config.num_devices = 0  # all
    config.save_every_s = 60.0
    return config
