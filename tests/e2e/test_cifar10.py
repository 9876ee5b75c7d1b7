"""Training on CIFAR-10 through tensorflow-datasets, with the published recipe on a small network."""

import json

import numpy as np

from diffjax.cli import flags
from diffjax.cli.train import train_and_evaluate


def test_cifar10_trains(cifar10_dir, tmp_path):
    config = flags.load_config("configs/edm/cifar10_ddpmpp.py")
    config.data.data_dir = str(cifar10_dir)
    config.model.update({"channels": 16, "channel_mult": (1, 2), "num_blocks": 1, "attention_sizes": (16,)})
    config.optim.warmup_images = 0
    config.train.update({"batch_size": 16, "total_images": 16 * 12, "log_every_steps": 4, "sample_every_steps": 0})
    config.train.num_devices = 1  # eight fake ones share two cores
    config.sample.num_steps = 2  # of the pictures at the end
    train_and_evaluate(config, tmp_path / "run")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3 and np.all(np.isfinite(losses)) and losses[-1] < losses[0]
