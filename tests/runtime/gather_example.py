"""One of two processes that hold a part of the samples each, as a program: python gather_example.py PORT PROCESS OUT.

It writes what both gave, the moments of all samples and what a float64 array became.
"""

import functools
import sys

import numpy as np

NUM_SAMPLES, WIDTH, BLOCK = 100, 5, 8
RANGES = ((0, 40), (40, 100))  # of sample ids


def features() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((NUM_SAMPLES, WIDTH)).astype(np.float32)


def given(process: int) -> dict[str, np.ndarray]:
    """Arrays whose shapes, types and names differ between processes."""
    odd = {"small": np.float64([1 + 2**-52, np.pi, -0.0]), "text": np.asarray("färbig")}
    other = {"bytes": np.arange(5, dtype=np.uint8), "none": np.zeros((0, 3)), "half": np.float16([[0.5], [np.nan]])}
    return odd if process == 0 else other


def main(port: str, process: int, out: str) -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
    from diffjax.metrics import array_files, stats
    from diffjax.runtime import gather

    gather._PIECE = 30  # words: several pieces to an array
    start, stop = RANGES[process]
    state = stats.running(start, BLOCK)
    for at in range(start, stop, 7):  # batches that are no blocks
        state = stats.update(state, features()[at : min(at + 7, stop)])
    states = map(stats.from_arrays, gather.gather(stats.to_arrays(state)))
    total = stats.total(functools.reduce(stats.join, states))
    arrays = {"count": np.asarray(total.count), "mean": total.mean, "scatter": total.scatter}
    for i, found in enumerate(gather.gather(given(process))):
        arrays |= {f"{i}_{name}": array for name, array in found.items()}
    array_files.write(out, arrays)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
