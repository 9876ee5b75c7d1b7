"""Images/s of reading cached latents beside those that training consumes: DiT with 4 blocks of S/2 (width 384).

A cache of random moments of 32x32x4 latents, 16 kB a record, is written to a temporary folder and read in shuffled
batches of 256, from the system's cache of files. Then a training step (DDPM's loss of eps, Adam, float32) is repeated
on one batch, and on the batches that are read beside it. The three take turns, so that a busy machine slows all; a
ratio is the median over turns. Run by launch/bench.sh; writes runs/bench_data/report.{md,json}.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from diffjax.runtime import xla

xla.set_flags()  # as the commands do, before JAX is imported

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffjax.build import networks
from diffjax.core import rng, trees
from diffjax.data import latents, loader, sources
from diffjax.methods import edm
from diffjax.models import vae
from diffjax.runtime import report

SHAPE = sources.DataShape(32, 4, 10)
NETWORK = {
    "name": "dit", "precondition": "eps", "process": "scaled_linear", "width": 384, "depth": 4, "heads": 6, "metadata":
    {"high": ("top", "left", "flip"), "low": ("height", "width")},
}  # fmt: skip
READ_BATCH = 256


def write_cache(folder: str, num: int) -> sources.Source:
    """`num` records of random moments with classes and metadata."""
    layout = latents.Layout((*SHAPE.shape[:2], 2 * SHAPE.channels))

    def records(first: int, last: int) -> Iterator[list[tuple[str, dict]]]:
        for index in range(first, last):
            moments = np.random.default_rng(index).standard_normal(layout.moments, np.float32)
            told = {"height": 300 + index % 200, "width": 400, "top": 0, "left": 18, "flip": index % 2}
            yield [(f"picture {index}", {"moments": moments, "label": index % SHAPE.num_classes, **told})]

    for _ in latents.write(folder, {"random": num}, layout, num, records):
        pass
    return sources.load("latents", SHAPE, path=folder)


def trainer(batch: int) -> tuple[Callable[[dict], None], int]:
    """(a training step on a batch as it is read, which returns when the weights are there; parameters)."""
    denoise, init = networks.denoiser(NETWORK, SHAPE)
    settings = edm.Settings("discrete", {"process": "scaled_linear"}, "eps", num_classes=SHAPE.num_classes)

    def prepare(batch: dict, key: jax.Array) -> dict:
        mean, logvar = jnp.split(batch.pop("moments").astype(jnp.float32), 2, axis=-1)
        return {"image": vae.draw(mean, logvar, key, 0.18215), **batch}

    method = edm.make(settings, denoise, optax.scale_by_adam(), lambda i: jnp.float32(1e-4), prepare)
    keyed = lambda state, batch, i: method.step(state, {}, batch, rng.stream(0, "train", i), i)  # noqa: E731
    step = jax.jit(keyed, donate_argnums=0)
    held = [jax.jit(method.init)(jax.jit(init)(jax.random.key(0))), 0]

    def one(batch: dict) -> None:
        held[0], _ = step(held[0], dict(batch), jnp.uint32(held[1]))
        jax.block_until_ready(held[0])
        held[1] += 1

    return one, trees.count(held[0].params)


def rate(one: Callable[[], int], seconds: float) -> float:
    """Images/s of a call that returns how many it took, for at least so long."""
    images, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds or not images:
        images += one()
    return images / spent


def measure(num: int, batch: int, turns: int, seconds: float) -> list[dict]:
    """Rows {what, batch, images_per_s, over_training}."""
    with tempfile.TemporaryDirectory() as folder:
        source = write_cache(str(Path(folder) / "cache"), num)
        step, parameters = trainer(batch)
        batches = {size: loader.make_batches(source, size, seed=0) for size in (READ_BATCH, batch)}
        same = next(batches[batch])
        ways = {
            "read": lambda: len(next(batches[READ_BATCH])["moments"]),
            "train on one batch": lambda: step(same) or batch,
            "read and train": lambda: step(next(batches[batch])) or batch,
        }
        for one in ways.values():
            one()  # compiles, fills the loader
        found = {way: [] for way in ways}
        for turn in range(turns):
            for way, one in ways.items():
                found[way].append(rate(one, seconds))
                batches[READ_BATCH].close()  # no reading ahead beside the next way
            line = ", ".join(f"{way} {rates[-1]:,.0f} images/s" for way, rates in found.items())
            print(f"turn {turn + 1}: {line}", flush=True)
        for reader in batches.values():
            reader.close()
    training = found["train on one batch"]
    return [
        {
            "what": way, "batch": READ_BATCH if way == "read" else batch, "parameters": parameters, "turns": turns,
            "images_per_s": statistics.median(rates),
            "over_training": statistics.median(a / b for a, b in zip(rates, training, strict=True)),
        }
        for way, rates in found.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=8192, help="records of the cache")
    parser.add_argument("--batch", type=int, default=32, help="of the training step")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="length of a turn of one of the three")
    parser.add_argument("--out", default="runs/bench_data")
    arguments = parser.parse_args()
    rows = measure(arguments.num, arguments.batch, arguments.turns, arguments.seconds)
    print(f"reading is {rows[0]['over_training']:.0f} times as fast as training (wanted: 10 times)")
    text = (
        f"{arguments.num:,} records of 32x32x4 latents (mean and log variance in float16, classes, sizes, crops, "
        "flips), shuffled, from the system's cache of files; DiT with 4 blocks of S/2, float32. `over_training` is the "
        "median over turns of images/s over those of training on a batch that is there.\n\n<!-- table: data -->\n\n"
        "Again: `bash launch/bench.sh data`"
    )
    path = report.write_report(arguments.out, "Reading cached latents", [("Latents", text)], {"data": rows})
    print(f"report: {path}")


if __name__ == "__main__":
    main()
