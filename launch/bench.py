"""Speed of DDPM++ beside eager PyTorch: forward pass and train step, ms per image, and their ratio.

Both sides hold the same random weights and are first shown to agree (output, loss, norm of the gradient).
Then each measures a few repetitions in turn, so that a busy machine slows both; the ratio is the median of
the ratios of neighbouring turns. Run by launch/bench.sh; writes runs/bench/report.{md,json}.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from diffjax.runtime import xla

xla.set_flags()  # as the commands do, before JAX is imported

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffjax.core import prediction, trees
from diffjax.methods import edm
from diffjax.models.edm_unet import SongUNet
from diffjax.nn.functional import functionalize
from diffjax.runtime import report

SIZE = 32
NETWORKS = {  # name: channels, blocks, batch
    "2.2M": dict(channels=32, blocks=2, batch=16),
    "55.7M": dict(channels=128, blocks=4, batch=4),
}
MULTS, ATTENTION, AUGMENT = (2, 2, 2), 16, 9
LEARNING_RATE = 1e-4


class Peer:
    """The PyTorch worker (launch/bench_torch.py) of one network."""

    def __init__(self, folder: str, params: dict, inputs: dict[str, np.ndarray], channels: int, blocks: int):
        arrays, self.answer = os.path.join(folder, "arrays.npz"), os.path.join(folder, "answer.npz")
        images = {name: np.transpose(v, (0, 3, 1, 2)) if v.ndim == 4 else v for name, v in inputs.items()}
        np.savez(arrays, **images, **torch_names(params))
        network = dict(size=SIZE, channels=channels, mults=MULTS, blocks=blocks, attention=ATTENTION, augment=AUGMENT)
        job = dict(arrays=arrays, answer=self.answer, network=network, learning_rate=LEARNING_RATE, threads=os.cpu_count())
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("bench_torch.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.facts = self._ask(json.dumps(job))

    def measure(self, what: str, repetitions: int) -> list[float]:
        return self._ask(f"{what} {repetitions}")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def _ask(self, line: str):
        print(line, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError("the PyTorch worker ended, its own error is above")
        return json.loads(answer)


def torch_names(params: dict) -> dict[str, np.ndarray]:
    """Our parameters under the released names and layouts."""
    leaf = {"kernel": "weight", "scale": "weight", "bias": "bias"}
    axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}
    named = {}
    for path, value in trees.flatten(params).items():
        *parents, last = path.split("/")
        named[".".join([*parents, leaf[last]])] = np.transpose(np.asarray(value), axes[value.ndim])
    return named


def random_params(init) -> dict:
    """Weights that make every layer matter: the initial ones of the last layers are close to zero."""
    random = np.random.default_rng(0)

    def draw(shape):
        return (random.standard_normal(shape.shape) / np.sqrt(np.prod(shape.shape[:-1]) or 1)).astype(np.float32)

    return jax.tree.map(draw, jax.eval_shape(init, jax.random.key(0)))


def agree(peer: Peer, network, params: dict, inputs: dict[str, np.ndarray]) -> float:
    """Largest relative difference of output, loss and gradient norm; raises where it is more than rounding."""
    settings, denoise = edm.Settings(), prediction.edm_denoiser(network)

    def objective(params):
        loss = edm.loss(settings, denoise, params, inputs["image"], inputs["sigma"], inputs["noise"])
        return jnp.sum(loss) / loss.shape[0]

    loss, grads = jax.jit(jax.value_and_grad(objective))(params)
    output = np.asarray(jax.jit(network)(params, inputs["image"], inputs["label"]))
    theirs = np.load(peer.answer)
    expected = np.transpose(theirs["output"], (0, 2, 3, 1))
    pairs = [(loss, theirs["loss"]), (optax.global_norm(grads), theirs["gradient"])]
    worst = max([np.abs(output - expected).max() / np.abs(expected).max(), *(abs(a / b - 1) for a, b in pairs)])
    if not worst < 1e-3:  # float32 through sixty convolutions: about 1e-5
        raise RuntimeError(f"the two sides differ by {worst:.1e} (relative), expected less than 1e-3: not the same network")
    return float(worst)


def ours(network, params: dict, inputs: dict[str, np.ndarray]):
    """what -> function that measures n repetitions, compiled and run once."""
    method = edm.make(
        edm.Settings(), prediction.edm_denoiser(network), optax.scale_by_adam(), lambda i: jnp.float32(LEARNING_RATE)
    )
    step, forward = jax.jit(method.step, donate_argnums=0), jax.jit(network)
    params = jax.tree.map(jnp.array, params)
    state = [jax.jit(method.init)(jax.tree.map(jnp.copy, params))]
    batch, key = {"image": jnp.asarray(inputs["image"])}, jax.random.key(1)

    def run(what: str) -> None:
        if what == "forward":
            jax.block_until_ready(forward(params, batch["image"], inputs["label"]))
        else:
            state[0], metrics = step(state[0], {}, batch, key, jnp.int32(0))
            jax.block_until_ready((state[0], metrics))

    def measure(what: str, repetitions: int) -> list[float]:
        times = []
        for _ in range(repetitions):
            start = time.perf_counter()
            run(what)
            times.append(time.perf_counter() - start)
        return times

    return measure


def compare(name: str, turns: int, seconds: float) -> list[dict]:
    """Rows of one network: train step and forward pass."""
    channels, blocks, batch = (NETWORKS[name][key] for key in ("channels", "blocks", "batch"))
    network, init = functionalize(
        lambda rngs: SongUNet(
            SIZE, 3, 3, augment_dim=AUGMENT, channels=channels, channel_mult=MULTS, num_blocks=blocks,
            attention_sizes=(ATTENTION,), dropout=0.0, rngs=rngs,
        )
    )  # fmt: skip
    params, random = random_params(init), np.random.default_rng(1)
    inputs = {key: random.standard_normal((batch, SIZE, SIZE, 3), np.float32) for key in ("image", "noise")}
    inputs |= {"sigma": np.exp(np.linspace(-3, 1, batch, dtype=np.float32)), "label": np.linspace(-1, 1, batch, dtype=np.float32)}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        peer = Peer(folder, params, inputs, channels, blocks)
        try:
            difference = agree(peer, network, params, inputs)
            measure = ours(network, params, inputs)
            for what in ("train", "forward"):
                sides = {"torch": peer.measure, "jax": measure}
                # a turn lasts about `seconds`; the first repetitions compile and warm up
                counts = {side: max(1, round(seconds / min(f(what, 3)))) for side, f in sides.items()}
                found = {side: [] for side in sides}
                for _ in range(turns):
                    for side, f in sides.items():
                        found[side].append(statistics.median(f(what, counts[side])) / batch * 1e3)
                ratio = statistics.median(a / b for a, b in zip(found["torch"], found["jax"], strict=True))
                rows.append({
                    "network": name, "parameters": trees.count(params), "batch": batch, "what": what,
                    "jax_ms_per_image": statistics.median(found["jax"]),
                    "torch_ms_per_image": statistics.median(found["torch"]),
                    "torch_over_jax": ratio, "turns": turns, "relative_difference": difference,
                })  # fmt: skip
                row = rows[-1]
                print(
                    f"{name:>6} {what:>7}: diffjax {row['jax_ms_per_image']:8.2f} ms/image, "
                    f"PyTorch {row['torch_ms_per_image']:8.2f}, ratio {ratio:.2f}", flush=True,
                )  # fmt: skip
        finally:
            peer.close()
    return [row | {"torch": peer.facts["torch"]} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--turns", type=int, default=9, help="alternations of the two sides")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one turn")
    parser.add_argument("--out", default="runs/bench")
    arguments = parser.parse_args()
    rows = [row for name in arguments.networks for row in compare(name, arguments.turns, arguments.seconds)]
    text = (
        f"DDPM++ at {SIZE}x{SIZE}, float32, no dropout, all cores. Train: EDM loss, gradients, Adam. PyTorch runs eagerly, "
        "in its own process, with the same weights; the sides take turns. Medians; `torch_over_jax` is the median over "
        "turns of PyTorch's time over ours (above 1: we are faster).\n\n<!-- table: speed -->\n\nAgain: `bash launch/bench.sh`"
    )
    print(f"report: {report.write_report(arguments.out, 'Speed', [('DDPM++ beside PyTorch', text)], {'speed': rows})}")


if __name__ == "__main__":
    main()
