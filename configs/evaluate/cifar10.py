"""FID of 50,000 images on CIFAR-10 by EDM's protocol: three seed ranges, the best of them is the score (Karras et al.
2022).

    python -m diffjax.cli.evaluate --config=configs/evaluate/cifar10.py:uncond --workdir=runs/fid_cifar10 \
        --config.spaces.inception.weights=pt_inception-2015-12-05-6726825d.pth

Needs the run of configs/edm/cifar10_ddpmpp.py, EDM's statistics fid-refs/cifar10-32x32.npz at the place below, and
FID's Inception network, the file that pytorch-fid releases. Hardware: a GPU or TPU; 150,000 samples of 35 calls and
their features. Paper: FID 1.97 unconditional, 1.79 conditional. Ours: not run, the weights are not at hand. For samples
that are there already: --config.sets.samples.run= --config.sets.samples.images=FOLDER
"""

from ml_collections import ConfigDict


def get_config(arg: str = "uncond") -> ConfigDict:
    """`arg`: "uncond" or "cond", the variant of the teacher."""
    if arg not in ("uncond", "cond"):
        raise ValueError(f"found variant {arg!r}, expected uncond or cond: type cifar10.py:uncond")
    config = ConfigDict()
    config.report = "metrics"
    run = "runs/edm_cifar10" if arg == "uncond" else "runs/edm_cifar10_cond"
    config.sets = ConfigDict({"samples": {"run": run, "images": "", "num_steps": (18,)}})
    # EDM's features are resized as TensorFlow 1 did, from images in uint8
    config.spaces = ConfigDict({"inception": {"metrics": ("fid",), "weights": "", "resize": "tf1"}})
    config.reference = ConfigDict({"path": "cifar10-32x32.npz"})
    config.beside = ()
    config.seeds = (0, 1, 2)
    config.num_samples = 50_000
    config.batch_size = 250  # of a device
    config.num_devices = 0  # all
    config.save_every_s = 60.0
    return config
