"""Eight Gaussians on a circle: what assigned noise does to flow matching where everything can be seen.

Radius 2, standard deviation 0.1; a network of three layers of 128, batches of 256, Adam at 1e-3. The figure is the squared
2-Wasserstein distance of samples to as many data points; two sets of 1,000 data points are about 0.15 apart.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffjax.core import grids, prediction, rng, schedules, solvers
from diffjax.core.types import Array, Cond, Key, Params
from diffjax.methods import edm
from diffjax.metrics import wasserstein
from diffjax.sampling.sample import sample

_RADIUS, _STD, _WIDTHS, _BATCH, _RATE = 2.0, 0.1, (3, 128, 128, 128, 2), 256, 1e-3
_ENDS = 1e-4, 9999.0  # noise levels of sampling: the flow's times 0.0001 and 0.9999
OPTIONS = {"none": {}, "linear": {}, "auction": {}, "knn": {"k": 4}}


def curve(
    assign: str, seed: int, *, at: Sequence[int] = range(250, 4001, 250), steps: Sequence[int] = (1, 100), num: int = 1000
) -> Iterator[dict]:
    """Rows {assign, seed, updates, euler_steps, squared_w2, loss} along one training: after `at` updates, for each
    number of Euler steps, from `num` samples. loss: mean of the squared error of the velocity over the last 100 updates."""
    denoise = prediction.process_denoiser(_network, "velocity", schedules.process(schedules.Flow()))
    settings = edm.Settings(
        distribution="uniform_flow", weighting="velocity", assign=assign, assign_options=OPTIONS[assign]
    )
    method = edm.make(settings, denoise, optax.scale_by_adam(), lambda iteration: jnp.float32(_RATE))

    def body(state: edm.EDMState, iteration: Array) -> tuple[edm.EDMState, Array]:
        batch = {"image": points(rng.stream(seed, "data", iteration), _BATCH)}
        state, metrics = method.step(state, {}, batch, rng.stream(seed, "train", iteration), iteration)
        return state, metrics["loss"]

    train = jax.jit(functools.partial(jax.lax.scan, body))
    state = method.init(_init(rng.stream(seed, "init")))
    data = points(rng.stream(seed, "reference"), num)
    noise = jax.random.normal(rng.stream(seed, "noise"), data.shape)
    follow = jax.jit(functools.partial(sample, denoise))
    for start, end in itertools.pairwise([0, *at]):
        state, losses = train(state, jnp.arange(start, end, dtype=jnp.uint32))
        for count in steps:
            found = follow(state.params, noise * _ENDS[1], _plan(count))
            row = {"assign": assign, "seed": seed, "updates": end, "euler_steps": count}
            yield row | {"squared_w2": wasserstein.squared_w2(found, data), "loss": float(jnp.mean(losses[-100:]))}


def points(key: Key, num: int) -> Array:
    """(num, 1, 1, 2) float32: as an image of one pixel."""
    which, near = jax.random.split(key)
    angle = jax.random.randint(which, (num,), 0, 8) * (np.pi / 4)
    centre = _RADIUS * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)
    return (centre + _STD * jax.random.normal(near, (num, 2)))[:, None, None]


def _plan(count: int) -> solvers.Plan:
    """Euler steps of equal length in the flow's time; the last ends at the data."""
    flow = schedules.Flow()
    times = np.linspace(float(flow.time(_ENDS[1])), 0.0, count + 1)
    return solvers.make_plan("euler", grids.append_zero(flow.level(times[:-1])))


def _init(key: Key) -> Params:
    layers = {}
    for index, (inputs, outputs) in enumerate(zip(_WIDTHS[:-1], _WIDTHS[1:], strict=True)):
        weight = jax.random.normal(jax.random.fold_in(key, index), (inputs, outputs)) / inputs**0.5
        layers[f"layer_{index}"] = {"kernel": weight, "bias": jnp.zeros(outputs)}
    return layers


def _network(params: Params, x: Array, noise_label: Array, cond: Cond | None = None, key: Key | None = None) -> Array:
    time = jnp.broadcast_to(noise_label, x.shape[:1])[:, None]
    h = jnp.concatenate([x.reshape(len(x), -1), time], axis=1)
    last = len(_WIDTHS) - 2
    for index in range(last + 1):
        layer = params[f"layer_{index}"]
        h = h @ layer["kernel"] + layer["bias"][None]
        h = h if index == last else jax.nn.silu(h)
    return h.reshape(x.shape)
