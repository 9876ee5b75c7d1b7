"""Pictures from seeds: sample i is the same whatever the batch size, the chunks or the devices.

Each sample has its own key, made of the seed and its id, and every draw for it (start noise, label, noise of a
stochastic solver) comes from that key. Samples are made in chunks of one fixed size, the last one padded, so two
compiled programs (the draws, the sampling) serve any number of them:

    images = generate(denoise, params, plan, range(50), (32, 32, 3), batch_size=16, num_classes=10)
    null = functools.partial(guidance.null_label, num_classes=10)
    images = generate(..., guidance_scale=2.0, uncond=null)

The programs are cached on the functions given (`denoise`, `uncond`, `transform`, `finish`, `sampler`) by identity, so make them
once. Plan, parameters, seed, labels and guidance scale are traced: changing their values does not recompile. Start
noise is bit-equal in all cases; outputs are bit-equal for equal chunk sizes on one device, and agree to rounding
otherwise, since XLA orders the sums of a matrix product by its shape. Several processes each make their own ids.
"""

import contextlib
import functools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core import guidance, rng, sharding, trees
from diffjax.core.solvers import Plan
from diffjax.core.types import Array, Cond, Denoiser, Key, Params
from diffjax.sampling.sample import sample


def initial_noise(seed: int | Array, sample_ids: Array, shape: Sequence[int]) -> Array:
    """Unit noise (B, *shape) float32 for the samples `sample_ids` (B,) of `seed`; each row depends on its id alone."""
    keys = _stream(seed, sample_ids, "noise")
    return jax.vmap(lambda key: jax.random.normal(key, tuple(shape), jnp.float32))(keys)


def draw_labels(seed: int | Array, sample_ids: Array, num_classes: int) -> Array:
    """Uniform labels (B,) int32 in 0..num_classes-1 for the samples `sample_ids` (B,) of `seed`."""
    keys = _stream(seed, sample_ids, "label")
    return jax.vmap(lambda key: jax.random.randint(key, (), 0, num_classes, jnp.int32))(keys)


def generate(
    denoise: Denoiser, params: Params, plan: Plan, sample_ids: Sequence[int], shape: Sequence[int], **options
) -> np.ndarray:
    """All samples as one host array (n, ...); arguments as `generate_chunks`, which does not hold them all."""
    return np.concatenate(list(generate_chunks(denoise, params, plan, sample_ids, shape, **options)))


def generate_chunks(
    denoise: Denoiser,
    params: Params,
    plan: Plan,
    sample_ids: Sequence[int],
    shape: Sequence[int],
    *,
    batch_size: int,
    seed: int = 0,
    cond: Cond | None = None,
    num_classes: int | None = None,
    guidance_scale: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
    guidance_channels: int = 0,
    guidance_curve: Callable[[Array, Array], Array] | None = None,
    control_strength: float | None = None,
    uncond: guidance.Uncond | None = None,
    transform: Callable[[Array], Array] | None = None,
    finish: Callable[[Array], Array] | None = None,
    sampler: Callable = sample,
    mesh: jax.sharding.Mesh | None = None,
) -> Iterator[np.ndarray]:
    """Yield host arrays (b, ...), b <= batch_size, of the samples `sample_ids` in order, each of `shape` (H, W, C).

    cond               per-sample entries (n, ...) with n ids, or scalars that hold for all
    num_classes        labels are drawn per sample where cond has none; given labels must be 0..num_classes
    guidance_scale     see `guidance.cfg`; None is no guidance. Needs `uncond`; `guidance_interval` is (low, high],
                       `guidance_channels` how many channels are guided, 0 = all, `guidance_curve` a function of
                       (guidance_scale, sigma) that gives the scale at sigma. control_strength: that of
                       `guidance.two_strengths`, whose (0, s) is `uncond`, and (0, 0) that without control metadata too
    transform, finish  of each D, and of the final samples (B, ...) inside the compiled program, as `to_uint8`
    sampler            follows the plan, with the signature of `sampling.sample.sample`
    mesh               splits every chunk over its axes data and fsdp; parameters are laid out on it by their paths, see
                       `core.sharding`, unless they are on its devices already
    Raises ValueError, before any sampling, for a seed or ids outside 0..2^32-1, lengths or sizes that do not fit,
    labels out of range, and guidance without `uncond`.
    """
    ids = _check_ids(sample_ids)
    if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be an integer in 0..2^32-1, found {seed!r}")
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes must be positive, or None for a network without classes, found {num_classes}")
    _check_sizes(batch_size, mesh)
    how = (guidance_channels, guidance_curve, control_strength)
    scale, interval = _check_guidance(guidance_scale, guidance_interval, uncond, how)
    cond = _check_cond(cond, len(ids), num_classes)
    if mesh is not None:
        params = _on_mesh(params, mesh)
    draw = num_classes if num_classes is not None and "label" not in cond else None
    fixed = (sampler, denoise, uncond if scale is not None else None, how, transform, finish)

    def make(ids: Array, cond: dict[str, Array]) -> Array:
        x, cond, key = _start(tuple(shape), draw, plan.noise is not None, mesh, np.uint32(seed), ids, cond)
        with contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return _chunk(*fixed, params, plan, x, key, cond, scale, interval)

    return _chunks(make, ids, cond, batch_size, mesh)


def trace(
    denoise: Denoiser, params: Params, plan: Plan, x: Any, cond: Mapping[str, Any], guidance_scale: float | None = None,
    uncond: guidance.Uncond | None = None, sampler: Callable = sample,
) -> jax.stages.Traced:  # fmt: skip
    """The program that makes a chunk, of the shapes of its parameters, noise x (B, H, W, C) and conditions: for plans of what
    it needs. Arguments as `generate_chunks`; nothing is computed."""
    key = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), x.shape[0])) if plan.noise is not None else None
    fixed = sampler, denoise, uncond if guidance_scale is not None else None, (0, None, None), None, None
    scale = None if guidance_scale is None else np.float32(guidance_scale)
    return _chunk.trace(*fixed, params, plan, x, key, dict(cond), scale, None)


def to_uint8(images: Array) -> Array:
    """[-1, 1] to 0..255 as published scores have it: clip(127.5 x + 128), truncated. Karras 2022, released code."""
    return jnp.clip(127.5 * images + 128, 0, 255).astype(jnp.uint8)


def _chunks(
    make: Callable[[Array, dict], Array], ids: np.ndarray, cond: dict, batch_size: int, mesh: jax.sharding.Mesh | None
) -> Iterator[np.ndarray]:
    """Start chunk i+1 before waiting for chunk i: the host copies while the device works."""
    waiting: list[tuple[Array, int]] = []
    for start in range(0, len(ids), batch_size):
        part = functools.partial(_part, start=start, size=batch_size, mesh=mesh)
        images = make(part(ids), {name: part(value) for name, value in cond.items()})
        waiting.append((images, min(batch_size, len(ids) - start)))
        if len(waiting) > 1:
            images, count = waiting.pop(0)
            yield np.asarray(images)[:count]
    images, count = waiting.pop(0)
    yield np.asarray(images)[:count]


def _part(values: np.ndarray, start: int, size: int, mesh: jax.sharding.Mesh | None) -> Array | np.ndarray:
    """Rows start..start+size, the last one repeated where they run out, split over the mesh. Scalars hold for all."""
    spec = jax.sharding.PartitionSpec()
    if values.ndim:
        spec = _batch_spec(mesh)
        values = values[start : start + size]
        values = np.pad(values, [(0, size - len(values))] + [(0, 0)] * (values.ndim - 1), mode="edge")
    return values if mesh is None else jax.device_put(values, jax.sharding.NamedSharding(mesh, spec))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _start(
    shape: tuple[int, ...], draw_classes: int | None, stochastic: bool, mesh: jax.sharding.Mesh | None,
    seed: Array, ids: Array, cond: dict,
) -> tuple[Array, dict, Key | None]:  # fmt: skip
    """Unit noise, conditions and keys of one chunk. Apart from `_chunk`, since it takes longer to compile than a small
    network and is the same for all plans."""
    x = initial_noise(seed, ids, shape)
    if mesh is not None:
        x = jax.lax.with_sharding_constraint(x, jax.sharding.NamedSharding(mesh, _batch_spec(mesh)))
    if draw_classes is not None:
        cond = {**cond, "label": draw_labels(seed, ids, draw_classes)}
    return x, cond, _stream(seed, ids, "solver") if stochastic else None


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def _chunk(
    sampler: Callable, denoise: Denoiser, uncond: guidance.Uncond | None, how: tuple[int, Callable | None, float | None],
    transform: Callable | None, finish: Callable | None, params: Params, plan: Plan, x: Array, key: Key | None, cond: dict,
    scale: Array | None, interval: tuple[Array, Array] | None,
) -> Array:  # fmt: skip
    """One chunk from unit noise: sampling and `finish` in one program."""
    channels, curve, strength = how
    scale_at = scale if curve is None else functools.partial(curve, scale)
    if uncond is not None and strength is not None:
        neither = lambda cond: guidance.null_control(uncond(cond))  # noqa: E731
        denoise = guidance.two_strengths(denoise, scale_at, strength, uncond, neither)
    elif uncond is not None and interval is None:
        denoise = guidance.cfg(denoise, scale_at, uncond, channels)
    elif uncond is not None:
        denoise = guidance.interval(denoise, scale, uncond, *interval)
    x = x * jnp.asarray(plan.sigmas[0], x.dtype)
    x = sampler(denoise, params, x, plan, cond or None, key=key, transform=transform)
    return x if finish is None else finish(x)


def _stream(seed: int | Array, sample_ids: Array, name: str) -> Key:
    """One key (B,) per sample and purpose."""
    keys = rng.sample_keys(seed, jnp.asarray(sample_ids))
    return jax.vmap(lambda key: jax.random.fold_in(key, zlib.crc32(name.encode())))(keys)


def _on_mesh(params: Params, mesh: jax.sharding.Mesh) -> Params:
    """Lay out what is not on the devices of `mesh` already, so that a layout of the caller is kept."""
    devices, sizes = set(mesh.devices.flat), dict(mesh.shape)

    def place(path: str, leaf: Array) -> Array:
        there = isinstance(leaf, jax.Array) and leaf.sharding.device_set == devices
        where = jax.sharding.NamedSharding(mesh, sharding.spec(path, leaf.shape, sizes))
        return leaf if there else jax.device_put(leaf, where)

    placed = [place(path, leaf) for path, leaf in trees.flatten(params).items()]
    return jax.tree.unflatten(jax.tree.structure(params), placed)


def _batch_spec(mesh: jax.sharding.Mesh | None) -> jax.sharding.PartitionSpec:
    return jax.sharding.PartitionSpec(None if mesh is None else tuple(axis for axis in sharding.BATCH if axis in mesh.shape))


def _check_ids(sample_ids: Sequence[int]) -> np.ndarray:
    ids = np.asarray(sample_ids)
    if ids.ndim != 1 or not len(ids) or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"sample_ids must be a non-empty list of integers, found {ids.dtype} of shape {ids.shape}")
    if ids.min() < 0 or ids.max() >= 2**32:
        raise ValueError(f"sample_ids must be in 0..2^32-1, found {ids.min()}..{ids.max()}")
    return ids.astype(np.uint32)


def _check_sizes(batch_size: int, mesh: jax.sharding.Mesh | None) -> None:
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a positive integer, found {batch_size!r}")
    if mesh is None:
        return
    if "data" not in mesh.shape:
        raise ValueError(f"mesh must have an axis 'data', found {tuple(mesh.shape)}")
    parts = mesh.shape["data"] * mesh.shape.get("fsdp", 1)
    if batch_size % parts:
        raise ValueError(
            f"batch_size {batch_size} does not divide over the {parts} devices that share it: take a multiple of it (a last, "
            "smaller chunk is padded)"
        )


def _check_guidance(
    scale: float | None, interval: tuple[float, float] | None, uncond: guidance.Uncond | None,
    how: tuple[int, Callable | None, float | None],
) -> tuple[np.ndarray | None, tuple[np.ndarray, np.ndarray] | None]:  # fmt: skip
    if scale is None:
        if interval is not None or how != (0, None, None):
            raise ValueError("guidance_interval, _channels, _curve and control_strength need a guidance_scale")
        return None, None
    if interval is not None and how != (0, None, None):
        raise ValueError("guidance_interval is of one scale, all channels and one strength: leave the other options out")
    if how[0] and how[2] is not None:
        raise ValueError("control_strength guides all channels: leave guidance_channels out")
    if uncond is None:
        raise ValueError(
            f"guidance_scale={scale} needs a null class: give uncond (see guidance.null_label), or guidance_scale=None "
            "for a network trained without one"
        )
    if interval is None:
        return np.float32(scale), None
    if not 0 <= interval[0] < interval[1]:
        raise ValueError(f"guidance_interval (low, high] needs 0 <= low < high, found {interval}")
    return np.float32(scale), tuple(np.float32(end) for end in interval)


def _check_cond(cond: Cond | None, num: int, num_classes: int | None) -> dict[str, np.ndarray]:
    cond = {name: np.asarray(value) for name, value in (cond or {}).items() if value is not None}
    for name, value in cond.items():
        if value.ndim and len(value) != num:
            raise ValueError(f"cond[{name!r}] must have one entry for each of {num} samples, found {value.shape}")
    label = cond.get("label")
    if label is None:
        return cond
    if label.ndim != 1 or not np.issubdtype(label.dtype, np.integer):
        raise ValueError(f"labels must be integers of shape ({num},), found {label.dtype} {label.shape}")
    highest = np.inf if num_classes is None else num_classes
    if label.min() < 0 or label.max() > highest:
        raise ValueError(f"labels must be 0..{highest} (the null class), found {label.min()}..{label.max()}")
    cond["label"] = label.astype(np.int32)
    return cond
