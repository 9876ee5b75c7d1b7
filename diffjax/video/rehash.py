"""Step rehash: most steps of a sampling run use a feature of an earlier one again. Zhan 2024, section 4.3.

A schedule says which steps are *full*: they run the whole network, and keep a feature of its last block. The steps
behind one run the layers behind that feature alone, up to the next full step. What is kept, and what is run again:

    output     the network's output, of both halves of guidance; nothing is run
    literal    the paper's feature, behind the last skip. What follows it reads neither x nor its noise level, so the
               results are those of "output", and its products are spent for nothing
    temporal   the feature before that: x enters again by the skip of the first convolution
    deepcache  the input of the last block but its first layer; Ma 2024 (DeepCache), with `uniform` schedules

Full steps are those that `search` finds in a map of similarities between steps, which `record` makes. "Just fewer
steps" is what all of this competes with: `fewer`. For an ODE solver on predicted noise it *is* the mode "output".

    similarity = rehash.record(prediction.edm_v_denoiser, network, params, x, plan, cond, "temporal")
    schedule = rehash.of_count(similarity, 13, "temporal")
    x = rehash.sample(prediction.edm_v_denoiser, network, params, x, plan, schedule, cond)
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core import names
from diffjax.core.solvers import Plan
from diffjax.core.types import Array, Cond, Denoiser, Key, Network, Params
from diffjax.models.video_blocks import ANCHORS
from diffjax.video.guided import Feature, VideoNetwork

MODES = ("output", *ANCHORS)

Precondition = Callable[[Network], Denoiser]  # as prediction.edm_v_denoiser


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which of `num_steps` steps are full, and what the others reuse, one of MODES.

    Raises ValueError unless the full steps are increasing, the first is 0 and the last is the last of all.
    """

    num_steps: int
    full: tuple[int, ...]
    mode: str = "temporal"

    def __post_init__(self) -> None:
        names.lookup(dict.fromkeys(MODES), self.mode, "mode of reuse")
        full = tuple(int(step) for step in self.full)
        is_whole = full == tuple(self.full) and self.num_steps == int(self.num_steps)
        ends = full[:1] + full[-1:]
        if not is_whole or ends != (0, self.num_steps - 1) or list(full) != sorted(set(full)):
            raise ValueError(
                f"found full steps {list(self.full)} of {self.num_steps}, expected increasing numbers from 0 to "
                f"{self.num_steps - 1}: the first step has nothing to reuse, and the last makes the finest detail"
            )
        object.__setattr__(self, "full", full)

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many steps reuse the feature of each full step."""
        return tuple(int(n) for n in np.diff(np.append(self.full, self.num_steps)) - 1)


def write(path: str | Path, schedule: Schedule) -> None:
    """As JSON that a person can edit."""
    Path(path).write_text(json.dumps(dataclasses.asdict(schedule)) + "\n", encoding="utf-8")


def read(path: str | Path) -> Schedule:
    """Raises FileNotFoundError, ValueError for what is no schedule."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    known = [field.name for field in dataclasses.fields(Schedule)]
    if not isinstance(found, dict) or sorted(found) != sorted(known) or not isinstance(found["full"], list):
        example = json.dumps({"num_steps": 5, "full": [0, 2, 4], "mode": "temporal"})
        raise ValueError(f"{path} is no schedule of steps: expected for example {example}")
    return Schedule(found["num_steps"], tuple(found["full"]), found["mode"])


# Which steps are full -------------------------------------------------------------------------------------------


def uniform(num_steps: int, count: int, mode: str = "temporal") -> Schedule:
    """`count` full steps as evenly spread as they can be. Raises ValueError for a count that is not 2..num_steps."""
    if not 2 <= count <= num_steps:
        raise ValueError(f"found {count} full steps of {num_steps}, expected 2 to {num_steps}: the first and the last")
    return Schedule(num_steps, tuple(np.linspace(0, num_steps - 1, count).round().astype(int).tolist()), mode)


def search(similarity: np.ndarray, gamma: float) -> tuple[int, ...]:
    """The full steps of a map (K, K): one after the other, each the first whose likeness to the full step before is
    below gamma, and the last. Zhan 2024, algorithm 1. Raises ValueError for a map or gamma that is none."""
    similarity = np.asarray(similarity, np.float64)
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1] or not np.all(np.isfinite(similarity)):
        raise ValueError(f"found similarities of shape {similarity.shape}, expected finite (K, K) of K steps")
    if not gamma <= 1:
        raise ValueError(f"found gamma={gamma}: similarities are at most 1")
    full = [0]
    for step in range(1, len(similarity)):
        if similarity[step, full[-1]] < gamma:
            full.append(step)
    return tuple(dict.fromkeys([*full, len(similarity) - 1]))


def of_count(similarity: np.ndarray, count: int, mode: str = "temporal") -> Schedule:
    """The schedule of the largest gamma with at most `count` full steps; fewer of them where steps are equally alike.

    Bisection over the values that are in the map (K, K): between two of them nothing changes. More full steps come with
    a larger gamma where likeness falls with distance; elsewhere it is one such gamma. Raises ValueError as `search` and
    `uniform`.
    """
    num_steps = len(similarity)
    uniform(num_steps, count, mode)  # for its check
    if len(search(similarity, 1.0)) <= count:
        return Schedule(num_steps, search(similarity, 1.0), mode)
    gammas = np.unique(np.clip(np.asarray(similarity, np.float64), None, 1.0))
    low, high = 0, len(gammas) - 1  # the least value of all makes 2 full steps
    while high - low > 1:
        middle = (low + high) // 2
        few = len(search(similarity, gammas[middle])) <= count
        low, high = (middle, high) if few else (low, middle)
    return Schedule(num_steps, search(similarity, gammas[low]), mode)


def record(
    precondition: Precondition, network: VideoNetwork, params: Params, x: Array, plan: Plan, cond: Cond | None,
    anchor: str,
) -> np.ndarray:  # fmt: skip
    """Cosines (K, K) float32 of the feature at `anchor` between the K steps of a run with every step full, meaned over
    samples; both halves of guidance are one feature. Those of all steps are held by the host. Arguments as `sample`."""
    rows = _rows(plan, x.dtype)

    @jax.jit
    def step(params: Params, state: tuple, row: Mapping[str, Array], cond: Cond | None) -> tuple:
        data, cache = _denoisers(precondition, network, anchor)[0](params, state[0], row["level"], cond)
        return _advance(row, state, data, plan.form), cache.feature

    state, features = _start(x, plan), []
    for i in range(plan.num_steps):
        state, feature = step(params, state, {name: value[i] for name, value in rows.items()}, cond)
        leaves = [np.asarray(leaf, np.float32).reshape(network.halves, len(x), -1) for leaf in jax.tree.leaves(feature)]
        features.append(np.concatenate([half for leaf in leaves for half in leaf], axis=1))
    return cosines(np.stack(features))


def cosines(features: np.ndarray) -> np.ndarray:
    """(K, K) of features (K, B, n): the cosine between steps, meaned over the B samples."""
    unit = (features / np.linalg.norm(features, axis=-1, keepdims=True)).reshape(len(features), -1)
    return unit @ unit.T / features.shape[1]


# Steps ----------------------------------------------------------------------------------------------------------


@functools.partial(jax.tree_util.register_dataclass, data_fields=["feature"], meta_fields=["mode", "made_for"])
@dataclasses.dataclass(frozen=True)
class Cache:
    """What a full step keeps, and the shapes of latents and conditions it is for."""

    feature: Feature
    mode: str
    made_for: tuple


def keep(
    network: VideoNetwork, mode: str, params: Params, x: Array, noise_label: Array, cond: Cond | None
) -> tuple[Array, Cache]:
    """(output, cache) of a full step."""
    if mode == "output":
        out = feature = network.full(params, x, noise_label, cond)
    else:
        out, feature = network.keep(params, x, noise_label, cond, anchor=mode)
    return out, Cache(feature, mode, _shapes(x, cond))


def reuse(
    network: VideoNetwork, cache: Cache, params: Params, x: Array, noise_label: Array, cond: Cond | None
) -> Array:
    """The output of a step that reuses a cache. Raises ValueError for a stale one: of latents of another size or number
    of frames, or of other conditions, as with guidance on or off. Of another prompt or picture it is stale too, and
    nothing can see it."""
    if cache.made_for != _shapes(x, cond):
        made_for, found = _text(cache.made_for), _text(_shapes(x, cond))
        raise ValueError(
            f"stale cache of step rehash: made for {made_for}, found {found}; make a full step first wherever the size "
            "or number of frames, the conditions or guidance change"
        )
    if cache.mode == "output":
        return cache.feature
    return network.reuse(params, cache.feature, x, noise_label, cond, anchor=cache.mode)


def sample(
    precondition: Precondition, network: VideoNetwork, params: Params, x: Array, plan: Plan, schedule: Schedule,
    cond: Cond | None = None,
) -> Array:  # fmt: skip
    """Follow `plan` from x (B, ...) at its first level, as `sampling.sample.sample` does, with the full steps of
    `schedule` alone.

    precondition makes a denoiser of a raw network. Solvers of one call a step: Euler, DDIM, DPM-Solver++ and their kin.
    One full step and one other are compiled, whatever their numbers: a loop over full steps with a loop inside. Raises
    ValueError for a schedule of another number of steps, and for other solvers.
    """
    if schedule.num_steps != plan.num_steps:
        raise ValueError(
            f"found a schedule of {schedule.num_steps} steps for a plan of {plan.num_steps}: take --steps="
            f"{schedule.num_steps}, or record one for this number"
        )
    rows, (full, partial) = _rows(plan, x.dtype), _denoisers(precondition, network, schedule.mode)

    def at(i: Array) -> dict[str, Array]:
        return {name: jax.lax.dynamic_index_in_dim(value, i, keepdims=False) for name, value in rows.items()}

    def segment(state: tuple, bounds: Array) -> tuple[tuple, None]:
        """A full step, and those that reuse it."""
        row = at(bounds[0])
        data, cache = full(params, state[0], row["level"], cond)
        state = _advance(row, state, data, plan.form)
        if not any(schedule.lengths):
            return state, None

        def again(i: Array, state: tuple) -> tuple:
            row = at(i)
            return _advance(row, state, partial(params, cache, state[0], row["level"], cond), plan.form)

        return jax.lax.fori_loop(bounds[0] + 1, bounds[1], again, state), None

    bounds = jnp.asarray(list(zip(schedule.full, (*schedule.full[1:], schedule.num_steps), strict=True)), jnp.int32)
    return jax.lax.scan(segment, _start(x, plan), bounds)[0][0]


def fewer(plan: Plan, schedule: Schedule) -> Plan:
    """The full steps alone, each as long as itself and those that would reuse it. Raises ValueError for solvers with
    more than Euler's one value."""
    if plan.form != "noise" or plan.history != 1 or plan.keep is not None or plan.num_steps != schedule.num_steps:
        raise ValueError(f"fewer steps are made of {schedule.num_steps} steps of euler or ddim, found another plan")
    advance = []
    for start, more in zip(schedule.full, schedule.lengths, strict=True):
        ratio, value = 1.0, 0.0
        for _, r, h in plan.advance[start : start + more + 1]:  # y <- r y + h m, one after the other with one m
            ratio, value = r * ratio, r * value + h
        advance.append([0.0, ratio, value])
    steps = list(schedule.full)
    return dataclasses.replace(
        plan, sigmas=plan.sigmas[[*steps, -1]], levels=plan.levels[steps], advance=np.array(advance),
        steps=tuple(range(1, len(steps) + 1)),
    )  # fmt: skip


def _denoisers(precondition: Precondition, network: VideoNetwork, mode: str) -> tuple[Callable, Callable]:
    """(params, x, sigma, cond) -> (D, cache), and (params, cache, x, sigma, cond) -> D."""

    def full(params: Params, x: Array, sigma: Array, cond: Cond | None) -> tuple[Array, Cache]:
        kept = []

        def called(params: Params, x: Array, noise_label: Array, cond: Cond | None, key: Key | None) -> Array:
            out, cache = keep(network, mode, params, x, noise_label, cond)
            kept.append(cache)
            return out

        return precondition(called)(params, x, sigma, cond), kept[0]

    def partial(params: Params, cache: Cache, x: Array, sigma: Array, cond: Cond | None) -> Array:
        def called(params: Params, x: Array, noise_label: Array, cond: Cond | None, key: Key | None) -> Array:
            return reuse(network, cache, params, x, noise_label, cond)

        return precondition(called)(params, x, sigma, cond)

    return full, partial


def _rows(plan: Plan, dtype: Any) -> dict[str, Array]:
    """Level and weights of each step, see `core.solvers` eq. 4."""
    if plan.keep is not None or plan.noise is not None or plan.afs_scale is not None:
        raise ValueError("steps are reused by solvers of one network call a step, without noise: take euler or dpmpp")
    return {"level": jnp.asarray(plan.levels, dtype), "advance": jnp.asarray(plan.advance, dtype)}


def _start(x: Array, plan: Plan) -> tuple[Array, tuple[Array, ...]]:
    return x, (jnp.zeros_like(x),) * (plan.history - 1)


def _advance(row: Mapping[str, Array], state: tuple, data: Array, form: str) -> tuple[Array, tuple[Array, ...]]:
    """(y, older values) after a new D."""
    y, older = state
    values = (data if form == "data" else (y - data) / row["level"], *older)
    weights = row["advance"]
    y = weights[1] * y + sum(weights[2 + i] * value for i, value in enumerate(values))
    return y, values[:-1]


def _shapes(x: Array, cond: Cond | None) -> tuple:
    return x.shape, tuple(sorted((name, value.shape) for name, value in (cond or {}).items()))


def _text(shapes: tuple) -> str:
    return f"latents {shapes[0]} with {', '.join(f'{name} {shape}' for name, shape in shapes[1]) or 'no conditions'}"
