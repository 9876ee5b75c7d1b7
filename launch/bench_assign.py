"""What assigned noise costs: every solver by batch, and a training step of DDPM++ (2.2 million parameters, 32x32) with noise
as drawn, assigned on the host beside the step, and assigned inside the step. The steps take turns in one run; a ratio is the
median over turns. Run by launch/bench.sh; writes runs/bench_assign/report.{md,json}.
"""

import argparse
import functools
import statistics
import time

from diffjax.runtime import xla

xla.set_flags()  # as the commands do, before JAX is imported

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffjax.assign import fields, host, pair
from diffjax.build import assign_tables
from diffjax.core import noise_levels, prediction, rng, trees
from diffjax.methods import edm
from diffjax.models.edm_unet import SongUNet
from diffjax.nn.functional import functionalize
from diffjax.runtime import report

PART = 128  # images whose activations are held at once: 1,024 need 28 GB
WAYS = {
    "none": {},
    "linear, host": {"assign": "linear", "assign_options": {"route": "host"}},
    "linear, callback": {"assign": "linear"},
}


class Stream:
    """The same images for ever, as a `data.loader.Batches`."""

    def __init__(self, images: np.ndarray):
        self._images = images

    def __next__(self) -> dict[str, np.ndarray]:
        return {"image": self._images}

    def get_state(self) -> dict:
        return {}

    def set_state(self, state: dict) -> None:
        del state


def inputs(batch: dict, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    return batch["image"], edm.split(rng.stream(0, "train", step)).noise


@functools.cache
def parts() -> tuple:
    """(init, accumulate, update) of a training step whose gradient is the sum of those of PART images each."""
    network, init = functionalize(
        lambda rngs: SongUNet(
            32, 3, 3, channels=32, channel_mult=(2, 2, 2), num_blocks=2, attention_sizes=(16,), dropout=0.0,
            rngs=rngs,
        )
    )  # fmt: skip
    denoise, optimizer = prediction.edm_denoiser(network), optax.adam(1e-4)

    def accumulate(params, total, image, noise, sigma):
        def objective(params):
            return jnp.sum(edm.loss(edm.Settings(), denoise, params, image, sigma, noise))

        return jax.tree.map(jnp.add, total, jax.grad(objective)(params))

    def update(params, opt_state, total):
        updates, opt_state = optimizer.update(total, opt_state)
        return optax.apply_updates(params, updates), opt_state

    def start():
        params = jax.jit(init)(jax.random.key(0))
        return params, optimizer.init(params)

    return start, jax.jit(accumulate, donate_argnums=1), jax.jit(update, donate_argnums=(0, 1))


def trainer(way: str, images: np.ndarray):
    """A function that makes a step of this way, its batch included, and returns when the weights are there."""
    start, accumulate, update = parts()
    settings = edm.Settings(**WAYS[way])

    @jax.jit
    def drawn(batch, step):
        keys, image = edm.split(rng.stream(0, "train", step)), batch["image"]
        noise, _ = pair.training_noise(keys.noise, image, batch, settings.assign, **settings.assign_options)
        return image, noise, noise_levels.draw(keys.level, len(image), settings.distribution)

    batches = host.Assigned(Stream(images), inputs) if way == "linear, host" else Stream(images)
    state, count = start(), 0

    def one() -> None:
        nonlocal state, count
        arrays = drawn(dict(next(batches)), jnp.uint32(count))
        total = jax.tree.map(jnp.zeros_like, state[0])
        for i in range(0, len(images), PART):
            total = accumulate(state[0], total, *(array[i : i + PART] for array in arrays))
        state, count = update(*state, total), count + 1
        jax.block_until_ready(state)

    one()  # compiled, and the host's first solve done
    return one, trees.count(state[0])


def steps(batch: int, turns: int) -> list[dict]:
    """Rows {way, batch, seconds, over_none}."""
    images = fields.images(batch)
    ways = {}
    for way in WAYS:
        ways[way], parameters = trainer(way, images)
    found = {way: [] for way in ways}
    for turn in range(turns):
        order = [*ways][turn % len(ways) :] + [*ways][: turn % len(ways)]  # each is first as often as the others
        for way in order:
            start = time.perf_counter()
            ways[way]()
            found[way].append(time.perf_counter() - start)
        print(f"turn {turn + 1}: " + ", ".join(f"{way} {found[way][-1]:.2f} s" for way in ways), flush=True)
    rows = []
    for way, seconds in found.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, found["none"], strict=True))
        row = {"assignment": way, "batch": batch, "parameters": parameters, "seconds": statistics.median(seconds)}
        rows.append(row | {"over_none": ratio, "turns": turns})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="+", type=int, default=[128, 256, 512, 1024])
    parser.add_argument("--batch", type=int, default=1024, help="of the training step")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", default="runs/bench_assign")
    arguments = parser.parse_args()
    tables = {
        "solvers": assign_tables.solvers(arguments.batches, lambda text: print(text, flush=True)),
        "steps": steps(arguments.batch, arguments.turns),
    }
    text = (
        "Images are random fields with the spectrum of photographs, 32x32x3, unit variance. quality_percent: the gain in the "
        "sum of products of image and noise over noise as drawn, the exact plan's being 100. matmul: the costs alone, from "
        "which scipy, lapx, auction and sinkhorn start; the callback has all in it.\n\n<!-- table: solvers -->\n\n"
        f"A training step of DDPM++ (EDM's loss, Adam, float32, gradients of {PART} images at a time added up), the batch's "
        "preparation in it; over_none is the median over turns of its time over that with noise as drawn.\n\n"
        "<!-- table: steps -->\n\nAgain: `bash launch/bench.sh assign`"
    )
    print(f"report: {report.write_report(arguments.out, 'Cost of assigned noise', [('Assignment', text)], tables)}")


if __name__ == "__main__":
    main()
