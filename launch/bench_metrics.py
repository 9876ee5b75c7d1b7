"""Features/s of FID's Inception network beside pytorch-fid's on the same CPU; memory of the moments of its features.

Both sides hold the same random weights, in one process, on as many threads, take images of 299x299 and give the 2048
features; they are first shown to agree. Then each measures one batch in turn, so that a busy machine slows both; the
ratio is the median of the ratios of neighbouring turns. The moments are those of an evaluation, summed batch by batch.
Run by launch/bench.sh; writes runs/bench_metrics/report.{md,json}.
"""

import argparse
import os
import statistics
import time
import tracemalloc
import unittest.mock
import warnings
from collections.abc import Callable

from diffjax.runtime import xla

xla.set_flags()  # as the commands do, before JAX is imported

import jax
import numpy as np
import torch

from diffjax.core import trees
from diffjax.metrics import inception, stats
from diffjax.nn.functional import functionalize
from diffjax.runtime import report
from diffjax.weights import inception as inception_weights

TOLERANCE = 1e-5  # largest difference over the features' deviation; float32 through 48 convolutions differs by 3e-6
MEMORY_BATCH = 64


def peer() -> tuple[torch.nn.Module, torch.nn.Module]:
    """pytorch-fid's classifier with drawn weights in place of those it downloads, and its wrapper of [0, 1] images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _declare_operators()
        from pytorch_fid import inception as published
    patch = unittest.mock.patch.object
    with (
        patch(published, "load_state_dict_from_url", lambda *_, **__: None),
        patch(torch.nn.Module, "load_state_dict", lambda module, _: _draw(module)),
    ):
        network = published.fid_inception_v3().eval()
    with patch(published, "fid_inception_v3", lambda: network):
        return network, published.InceptionV3(resize_input=False).eval()


def _declare_operators() -> None:
    """torchvision built for CUDA beside torch for CPUs: its operators do not load, and two of them end its import."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        _declare_operators.library = library  # undone where it is collected
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _draw(module: torch.nn.Module) -> None:
    """He's deviation, so that features do not die out; statistics of the normalisations that matter."""
    generator = torch.Generator().manual_seed(0)
    for name, values in module.state_dict().items():
        if values.ndim > 1:
            values.normal_(0, (2 / values[0].numel()) ** 0.5, generator=generator)
        elif name.endswith("running_var"):
            values.uniform_(0.5, 1.5, generator=generator)
        elif not name.endswith("num_batches_tracked"):
            values.normal_(float(name.endswith("bn.weight")), 0.1, generator=generator)


def sides(batch: int) -> tuple[dict[str, Callable[[], np.ndarray]], int]:
    """(one batch's features (batch, 2048) by side, number of parameters)."""
    classifier, wrapper = peer()
    network, init = functionalize(lambda rngs: inception.InceptionV3(rngs=rngs))
    shapes = jax.eval_shape(init, jax.random.key(0))
    weights = {name: tensor.numpy() for name, tensor in classifier.state_dict().items()}
    params = jax.device_put(inception_weights.to_params(weights, shapes))
    pixels = np.random.default_rng(0).uniform(0, 255, (batch, inception.SIZE, inception.SIZE, 3)).astype(np.float32)
    given = torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, -1, 1)) / np.float32(255))
    features = jax.jit(lambda params, x: network(params, inception.normalise(x, "torch")).pool)
    x = jax.device_put(pixels)

    def theirs() -> np.ndarray:
        with torch.no_grad():
            return wrapper(given)[0].flatten(1).numpy()

    return {"torch": theirs, "jax": lambda: np.asarray(features(params, x))}, trees.count(shapes)


def compare(batch: int, turns: int) -> dict:
    """The row of one batch size. Raises RuntimeError where the sides do not agree."""
    both, parameters = sides(batch)
    expected, found = (both[side]() for side in ("torch", "jax"))  # compiles
    difference = float(np.abs(found - expected).max() / expected.std())
    if not difference < TOLERANCE:
        raise RuntimeError(f"features differ by {difference:.1e} deviations, expected less than {TOLERANCE}")
    seconds: dict[str, list[float]] = {side: [] for side in both}
    for _ in range(turns):
        for side, one in both.items():
            start = time.perf_counter()
            one()
            seconds[side].append(time.perf_counter() - start)
    ratio = statistics.median(a / b for a, b in zip(seconds["torch"], seconds["jax"], strict=True))
    rates = {f"{side}_per_s": batch / statistics.median(times) for side, times in seconds.items()}
    least = min(seconds["torch"]) / min(seconds["jax"])
    print(
        f"batch {batch}: diffjax {rates['jax_per_s']:.2f} features/s, pytorch-fid {rates['torch_per_s']:.2f}, ratio "
        f"{ratio:.2f}, of minima {least:.2f}", flush=True,
    )  # fmt: skip
    figures = {"jax_over_torch": ratio, "of_minima": least, "turns": turns, "difference": difference}
    return {"batch": batch, "parameters": parameters} | rates | figures


def moments(samples: int, width: int) -> dict:
    """Peak of NumPy's memory while the moments of `samples` drawn features are summed, their covariance included."""
    tracemalloc.start()
    start, state = time.perf_counter(), stats.running()
    for first in range(0, samples, MEMORY_BATCH):
        shape = min(MEMORY_BATCH, samples - first), width
        state = stats.update(state, np.random.default_rng(first).standard_normal(shape, np.float32))
    found = stats.total(state)
    trace = float(np.trace(found.covariance))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    if found.count != samples or not abs(trace / width - 1) < 0.01:
        raise RuntimeError(f"{found.count} features have mean variance {trace / width:.3f}, expected {samples} and 1")
    row = {"samples": samples, "width": width, "peak_mb": peak / 1e6, "seconds": time.perf_counter() - start}
    print(f"moments of {samples} x {width} features: {row['peak_mb']:.0f} MB, {row['seconds']:.0f} s", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="*", default=[8, 32])
    parser.add_argument("--turns", type=int, default=9, help="alternations of the two sides")
    parser.add_argument("--samples", type=int, default=50_000, help="whose moments are summed")
    parser.add_argument("--out", default="runs/bench_metrics")
    arguments = parser.parse_args()
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(threads)
    tables = {
        "speed": [compare(batch, arguments.turns) for batch in arguments.batches],
        "moments": [moments(arguments.samples, inception.POOL)],
    }
    text = (
        f"float32, {threads} threads, images of 299x299, eager PyTorch {torch.__version__} with pytorch-fid's network "
        "and the same weights; the sides take turns. `jax_over_torch` is the median over turns of PyTorch's time over "
        "ours (above 1: we are faster).\n\n<!-- table: speed -->\n\nMoments in float64 as an evaluation sums them, the "
        "peak of NumPy's memory:\n\n<!-- table: moments -->\n\nAgain: `bash launch/bench.sh metrics`"
    )
    path = report.write_report(arguments.out, "Speed and memory of metrics", [("Inception features", text)], tables)
    print(f"report: {path}")


if __name__ == "__main__":
    main()
