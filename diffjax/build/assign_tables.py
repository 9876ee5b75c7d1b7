"""What assignment does to a batch, and what it takes: the tables `reduction` and `solvers`.

reduction   rows {images, batch, method, percent}: by how much the mean |x - n| of a batch falls
solvers     rows {batch, method, milliseconds, quality_percent}: on fields with the spectrum of photographs (D = 3072),
            the gain in sum x . n over the noise as drawn, in per cent of the exact plan's. A permutation can have 100 at
            most; knn, which draws more noise, is no permutation, and its figure may be higher.
"""

import functools
import importlib.util
import time
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.assign import approx, costs, exact, fields, pair
from diffjax.core.types import Array

Rows = list[dict]

_REPETITIONS = 3
_REDUCED = ("linear", "auction", "knn", "knn_dot")


def reduction(images: Mapping[str, np.ndarray], batches: Iterable[int], draws: int = 3) -> Rows:
    """Means over `draws` batches of images (N, ...), name -> float32 as trained on. Batches above N are left out."""
    rows = []
    for name, found in images.items():
        for num in (num for num in batches if num <= len(found)):
            for method in _REDUCED:
                assign = jax.jit(lambda key, x, method=method: pair.pair(key, x, method)[2]["assign_reduction"])
                values = []
                for draw in range(draws):
                    chosen = np.random.default_rng(draw).permutation(len(found))[:num]
                    values.append(float(assign(jax.random.key(draw), jnp.asarray(found[chosen]))))
                rows.append({"images": name, "batch": num, "method": method, "percent": float(np.mean(values))})
    return rows


def solvers(batches: Iterable[int], progress: Callable[[str], None] = lambda text: None) -> Rows:
    """Each way to pair a batch, the best of three repetitions, compiled; in turn, so that a busy machine slows all."""
    rows = []
    for num in batches:
        progress(f"solvers of {num} pairs")
        x, key = jnp.asarray(fields.images(num)), jax.random.key(0)
        drawn = pair.draw(pair.row_keys(key, num), x.shape[1:])
        ways = _ways(x, drawn, key)
        noises = {name: way() for name, way in ways.items()}  # compiles, warms up
        best = {name: float("inf") for name in ways}
        for _ in range(_REPETITIONS):
            for name, way in ways.items():
                start = time.perf_counter()
                jax.block_until_ready(way())
                best[name] = min(best[name], time.perf_counter() - start)
        total = {name: float(jnp.vdot(x, noise)) for name, noise in noises.items() if name != "matmul"}
        plain, top = float(jnp.vdot(x, drawn)), total["scipy"]
        for name, seconds in best.items():
            quality = 100 * (total[name] - plain) / (top - plain) if name in total else None
            rows.append({"batch": num, "method": name, "milliseconds": 1e3 * seconds, "quality_percent": quality})
    return rows


def _ways(x: Array, drawn: Array, key: Array) -> dict[str, Callable[[], Array]]:
    """name -> what gives the noise (or, "matmul", the costs that the solvers start from) for images x."""
    keys = pair.row_keys(key, len(x))
    matrix = jax.jit(costs.cost_matrix)
    ready = matrix(x, drawn)
    host = np.asarray(ready)

    def on_host(solve: Callable[[np.ndarray], np.ndarray]) -> Callable[[], Array]:
        return lambda: drawn[solve(host)]

    ways = {"matmul": lambda: matrix(x, drawn), "scipy": on_host(exact.solve)}
    if _has_lapx():
        ways["lapx"] = on_host(_lapjvs)
    for name in ("auction", "sinkhorn"):
        ways[name] = functools.partial(jax.jit(lambda ready, name=name: drawn[pair.permute(ready, name)]), ready)
    for name in ("knn", "knn_dot"):
        nearest = jax.jit(functools.partial(approx.nearest, k=8, dot=name == "knn_dot"))
        ways[f"{name} (k = 8)"] = functools.partial(nearest, keys, x, drawn)
    ways["scipy, callback"] = functools.partial(jax.jit(lambda x, drawn: drawn[pair.assign(x, drawn, "linear")]), x, drawn)
    return ways


def _has_lapx() -> bool:
    if not importlib.util.find_spec("lap"):
        return False
    import lap

    return hasattr(lap, "lapjvs")  # lapx's; the older package of the same name has none


def _lapjvs(cost: np.ndarray) -> np.ndarray:
    import lap

    return lap.lapjvs(cost - cost.min(axis=1, keepdims=True))[2]  # (cost, rows, columns); slow on raw products
