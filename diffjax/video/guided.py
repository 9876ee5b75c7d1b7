"""Networks of video as functions, and guidance of both halves in one call.

A network of video can be run whole, run whole with one of its features kept, or run from that feature on. Guidance (see
`core.guidance`, eq. 1) is applied to what it gives, per frame where the scale has a value for each:

    F = F_u + g_t (F_c - F_u)                                          Blattmann 2023, section 4.3             (1)

Both halves have one feature together: a kept one of the unconditional half never meets a new one of the other.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from diffjax.core.types import Array, Cond, Key, Params
from diffjax.nn.functional import functionalize
from diffjax.nn.groups import Runner
from diffjax.video import offload

Feature = Any  # what a network keeps: arrays in a pytree


class VideoNetwork(NamedTuple):
    """x (B, T, H, W, C), noise_label (B,), out (B, T, H, W, C).

    full   (params, x, noise_label, cond, key) -> out
    keep   (params, x, noise_label, cond, anchor) -> (out, feature); anchor: the name of the place in the network
    reuse  (params, feature, x, noise_label, cond, anchor) -> out, from the layers behind the anchor alone
    halves: 2 with guidance, whose features are (2 B, ...) or (2, B, ...)
    """

    full: Callable[..., Array]
    keep: Callable[..., tuple[Array, Feature]]
    reuse: Callable[..., Array]
    halves: int = 1


def functions(constructor: Callable[[nnx.Rngs], nnx.Module]) -> VideoNetwork:
    """Those of the module that `constructor(rngs)` makes, as models.svd and models.motion_unet have it; they also take
    `run`, see `run_by`."""
    return VideoNetwork(*(functionalize(constructor, name)[0] for name in ("__call__", "keep", "reuse")))


def run_by(network: VideoNetwork, run: Runner) -> VideoNetwork:
    """The same with its groups of operators run by `run`, in slices or not. Parameters may lie in the host's memory."""

    def runs(method: Callable) -> Callable:
        return lambda params, *args, **kwargs: method(offload.on_device(params), *args, run=run, **kwargs)

    return VideoNetwork(runs(network.full), runs(network.keep), runs(network.reuse), network.halves)


def guided(network: VideoNetwork, guidance_scale: Array | float, sequential: bool = False) -> VideoNetwork:
    """(1) as a network, whose cond is that of `halves`; features are of both halves.

    guidance_scale: scalar, (T,) or (B, T). sequential: one half after the other, so that only one is in memory; the
    same numbers but for the order of sums.
    """
    both = _one_by_one if sequential else _as_one_batch

    def extrapolated(out: Array) -> Array:
        unconditional, conditional = out
        scale = jnp.asarray(guidance_scale, out.dtype)
        if scale.ndim > 2 or scale.shape != conditional.shape[2 - scale.ndim : 2]:
            known = f"(), (T,) or (B, T) with {conditional.shape[:2]}"
            raise ValueError(f"found a guidance scale of shape {scale.shape}, expected {known}")
        scale = scale.reshape(*(1,) * (2 - scale.ndim), *scale.shape, 1, 1, 1)
        return unconditional + scale * (conditional - unconditional)

    def full(params: Params, x: Array, noise_label: Array, cond: Cond, key: Key | None = None) -> Array:
        call = lambda x, label, cond, _: (network.full(params, x, label, cond, key), ())  # noqa: E731
        return extrapolated(both(call, x, noise_label, cond, ())[0])

    def keep(params: Params, x: Array, noise_label: Array, cond: Cond, anchor: str) -> tuple[Array, Feature]:
        call = lambda x, label, cond, _: network.keep(params, x, label, cond, anchor)  # noqa: E731
        out, feature = both(call, x, noise_label, cond, ())
        return extrapolated(out), feature

    def reuse(params: Params, feature: Feature, x: Array, noise_label: Array, cond: Cond, anchor: str) -> Array:
        def call(x: Array, label: Array, cond: Cond, feature: Feature) -> tuple[Array, tuple]:
            return network.reuse(params, feature, x, label, cond, anchor), ()

        return extrapolated(both(call, x, noise_label, cond, feature)[0])

    return VideoNetwork(full, keep, reuse, halves=2)


def halves(uncond: Cond, cond: Cond) -> Cond:
    """Both conditions in one, (2, B, ...) each, the unconditional one first. Raises ValueError where they differ."""
    shapes = [{name: jnp.shape(value) for name, value in half.items()} for half in (uncond, cond)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"both halves of guidance need conditions of one form, found {shapes[0]} and {shapes[1]}")
    return {name: jnp.stack([uncond[name], value]) for name, value in cond.items()}


def _as_one_batch(call: Callable, x: Array, noise_label: Array, cond: Mapping[str, Array], feature: Feature) -> tuple:
    """((2, B, T, H, W, C), feature) of call(x, noise_label, cond, feature) for both halves at once."""
    double = lambda a: jnp.concatenate([a, a])  # noqa: E731
    joined = {name: value.reshape(-1, *value.shape[2:]) for name, value in cond.items()}
    out, feature = call(double(x), double(noise_label), joined, feature)
    return out.reshape(2, *x.shape[:1], *out.shape[1:]), feature


def _one_by_one(call: Callable, x: Array, noise_label: Array, cond: Mapping[str, Array], feature: Feature) -> tuple:
    """The same for one half after the other; features have the axis of halves in front."""
    return jax.lax.map(lambda half: call(x, noise_label, *half), (dict(cond), feature))
