"""A tiny real run for the tests of the loop, also as a program for those that kill it.

    python loop_example.py WORKDIR '{"total_images": 48, ...}'
"""

import json
import os
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffjax.core import prediction, rng
from diffjax.data import loader
from diffjax.methods import edm
from diffjax.train import ema, loop, optim, state, step

BATCH_SIZE, WIDTH, PIXELS = 8, 16, 16


class Arrays:
    """Random images as a source of the loader."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        random = np.random.default_rng(int(index))
        return {"image": random.uniform(-1, 1, (4, 4, 1)).astype(np.float32)}


def network(params, x, noise_label, cond=None, key=None):
    h = x.reshape(x.shape[0], PIXELS) @ params["in"]["kernel"] + noise_label[:, None] * params["in"]["bias"][None]
    return (jnp.tanh(h) @ params["out"]["kernel"]).reshape(x.shape)


def make_params(seed):
    key = rng.stream(seed, "params")
    kernel = jax.random.normal(key, (PIXELS, WIDTH)) / 4
    return {"in": {"kernel": kernel, "bias": jnp.full(WIDTH, 0.1)}, "out": {"kernel": kernel.T * 0.1}}


def make_config(**train):
    settings = {
        "batch_size": BATCH_SIZE, "total_images": 96, "log_every_steps": 3, "checkpoint_every_steps": 5,
        "checkpoint_every_minutes": 0, "num_devices": 1,
    }
    return {"seed": 7, "train": settings | train}


def make_experiment(config, poison_at=None, **fields):
    """poison_at: step (from 0) whose batch holds a NaN."""
    method = edm.make(
        edm.Settings(),
        prediction.edm_denoiser(network, sigma_data=0.5),
        optimizer=optax.scale_by_adam(),
        learning_rate=optim.make_learning_rate(0.01, BATCH_SIZE, 96),
    )

    def init():
        return state.create(method, make_params(config["seed"]), config["seed"], averaged=True)

    train_step = step.make_train_step(method, ema.make_decay(BATCH_SIZE, 100))

    def poisoned(current, frozen, batch):
        factor = jnp.where(current.step == poison_at, jnp.nan, 1.0)
        return train_step(current, frozen, batch | {"image": batch["image"] * factor})

    return loop.Experiment(
        init=init,
        step=train_step if poison_at is None else poisoned,
        frozen={},
        batches=lambda: loader.make_batches(Arrays(), BATCH_SIZE, config["seed"], num_threads=1),
        batch_size=BATCH_SIZE,
        **fields,
    )


def main():
    workdir, train = sys.argv[1], json.loads(sys.argv[2])
    end = train.pop("end", None)
    config = make_config(**train)

    def at_step(step_now, images, params):
        if end == [step_now, "SIGTERM"]:
            os.kill(os.getpid(), signal.SIGTERM)
        if end == [step_now, "SIGKILL"]:
            # the checkpoint of step 5 is written in the background: dying before it is another test
            while not os.path.exists(os.path.join(workdir, "checkpoints", "5")):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    loop.run(make_experiment(config, hooks=[loop.Hook(1, at_step)]), config, workdir)


if __name__ == "__main__":
    main()
