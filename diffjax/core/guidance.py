"""Guidance: a conditional and an unconditional estimate of one denoiser, extrapolated.

    D_w(x) = D_u(x) + w (D_c(x) - D_u(x))                                                           (1)

w = 1 is the conditional denoiser, w = 0 the unconditional one. (1) is linear, so it is the same in eps, x0, v and
F. All functions here take and return a `Denoiser`, so they compose; each guided call is two network calls. They are
made one after the other, so that a batch split over devices stays where it is and both conditions may differ in form.

`guidance_scale` and the ends of an interval may be traced: changing them does not recompile.

>>> import functools, jax.numpy as jnp
>>> from diffjax.core import guidance
>>> denoise = lambda params, x, sigma, cond=None, key=None: x * cond["label"][0]
>>> uncond = functools.partial(guidance.null_label, num_classes=3)
>>> guided = guidance.cfg(denoise, 2.0, uncond)
>>> float(guided({}, jnp.ones(()), 1.0, {"label": jnp.array([1])}))  # 3 + 2 (1 - 3)
-1.0
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffjax.core.broadcast import per_sample
from diffjax.core.types import Array, Cond, Denoiser, Key, Params

Uncond = Callable[[Cond], Cond]
Scale = Array | float | Callable[[Array], Array]


def cfg(denoise: Denoiser, guidance_scale: Scale, uncond: Uncond | None, channels: int = 0) -> Denoiser:
    """Classifier-free guidance (1) at every noise level. Ho 2022, eq. 6 with w = 1 for no guidance.

    `guidance_scale` scalar, (B,), or a function of sigma that gives one; `uncond` makes the unconditional condition of
    the conditional one, as `null_label`. channels: how many of the last axis are guided, from the first on; 0 = all.
    Published samples of DiT, MDT and PixArt guide 3 of their 4 latent channels. Raises ValueError where `uncond` is
    None, or where there are fewer channels.
    """
    uncond = _checked(uncond)

    def guided(params: Params, x: Array, sigma: Array, cond: Cond | None = None, key: Key | None = None) -> Array:
        conditional = denoise(params, x, sigma, cond, key)
        scale = guidance_scale(sigma) if callable(guidance_scale) else guidance_scale
        extrapolated = _extrapolate(conditional, denoise(params, x, sigma, uncond(cond), key), scale)
        if not channels:
            return extrapolated
        if not 0 < channels <= conditional.shape[-1]:
            raise ValueError(f"found channels={channels}, expected 0 (all) to {conditional.shape[-1]}")
        return jnp.concatenate([extrapolated[..., :channels], conditional[..., channels:]], axis=-1)

    return guided


def two_strengths(
    denoise: Denoiser, guidance_scale: Scale, control_strength: Array | float, without_semantics: Uncond,
    without_all: Uncond,
) -> Denoiser:  # fmt: skip
    """Guidance of strength b towards semantics c alone, of strength w towards semantics and control s together. Berrada
    2024, section 3.1; three calls.

        D = w [b D(c, s) + (1 - b) D(0, s)] + (1 - w) D(0, 0)                                         (3)

    b = `control_strength` = 1 is (1) from (0, 0) to (c, s). The last two make the conditions (0, s) and (0, 0) of
    (c, s).
    """

    def guided(params: Params, x: Array, sigma: Array, cond: Cond | None = None, key: Key | None = None) -> Array:
        scale = guidance_scale(sigma) if callable(guidance_scale) else guidance_scale
        both, control, neither = (
            denoise(params, x, sigma, cond if null is None else null(cond), key)
            for null in (None, without_semantics, without_all)
        )
        return _extrapolate(_extrapolate(both, control, control_strength), neither, scale)

    return guided


def power_cosine(u: Array | float, guidance_scale: Array | float, power: Array | float = 4.0) -> Array:
    """1 at pure noise (u = 1) rising to `guidance_scale` at u = 0, the later the larger `power` is. Gao 2023's code.

        w(u) = 1 + (w0 - 1) gamma(u)                                                                  (2)

    gamma that of `rising`. MDTv2 takes u = t / 1000 of the index t, w0 = 3.8 and power 4. In `cfg`, with a function
    that gives u of sigma:

        cfg(denoise, lambda sigma: power_cosine(u_of(sigma), 3.8), uncond)
    """
    return 1 + (guidance_scale - 1) * rising(u, power)


def rising(u: Array | float, power: Array | float) -> Array:
    """gamma(u) = (1 - cos(pi (1 - u)^power)) / 2: 0 at pure noise (u = 1), 1 at u = 0, the later the larger `power`."""
    return (1 - jnp.cos(math.pi * (1 - u) ** power)) / 2


def rescaled(guidance_scale: float, resolution_scale: float) -> float:
    """1 + s (w - 1): where to begin a search for the scale of images s times as large, w the best in pre-training.

    Berrada et al. 2024, section 3.4: a rule of thumb. Nothing applies it unasked.
    """
    return 1 + resolution_scale * (guidance_scale - 1)


def interval(
    denoise: Denoiser, guidance_scale: Array | float, uncond: Uncond | None, low: Array | float, high: Array | float
) -> Denoiser:
    """Guidance (1) where low < sigma <= high, the conditional denoiser elsewhere. Kynkaanniemi 2024.

    Where all of a batch shares one sigma (sampling), the unconditional call is skipped outside the interval. Raises
    as `cfg`, and ValueError where low and high are numbers that are not 0 <= low < high.
    """
    uncond = _checked(uncond)
    if isinstance(low, (int, float)) and isinstance(high, (int, float)) and not 0 <= low < high:
        raise ValueError(f"a guidance interval needs 0 <= low < high, found ({low}, {high}]")

    def guided(params: Params, x: Array, sigma: Array, cond: Cond | None = None, key: Key | None = None) -> Array:
        conditional = denoise(params, x, sigma, cond, key)
        inside = jnp.logical_and(low < sigma, sigma <= high)

        def extrapolated() -> Array:
            return _extrapolate(conditional, denoise(params, x, sigma, uncond(cond), key), guidance_scale)

        if inside.ndim == 0:
            return jax.lax.cond(inside, extrapolated, lambda: conditional)
        return jnp.where(per_sample(inside, conditional), extrapolated(), conditional)

    return guided


def null_label(cond: Cond | None, num_classes: int | None) -> Cond:
    """`cond` with every label replaced by the null class, whose index is `num_classes`.

    Raises ValueError where there is no label to replace, or where the network has no null class (`num_classes` None).
    """
    if num_classes is None:
        raise ValueError(
            "guidance needs a null class, and this network was trained without one: train with label dropout, "
            "or sample with guidance_scale=None"
        )
    if cond is None or cond.get("label") is None:
        raise ValueError(f"guidance needs cond['label'] to replace, found {sorted(cond or {})}")
    return {**cond, "label": jnp.full_like(cond["label"], num_classes)}


def negative(cond: Cond | None) -> Cond:
    """`cond` with each condition "negative_<name>" in the place of <name>: the text that samples are led away from.

    Raises ValueError where there is none.
    """
    found = {name.removeprefix(_NEGATIVE): value for name, value in (cond or {}).items() if name.startswith(_NEGATIVE)}
    if not found:
        raise ValueError(f"guidance of texts needs cond['negative_text'], found {sorted(cond or {})}")
    return {**cond, **found}


_NEGATIVE = "negative_"


def null_control(cond: Cond | None) -> Cond:
    """`cond` without sizes, crops and flips: all are replaced by the network's own null, see `nn.control`."""
    some = next((value for value in (cond or {}).values() if value.ndim), None)
    if some is None:
        raise ValueError(
            "guidance of control metadata needs conditions, found none: give cond['height'] and the others"
        )
    return {**cond, "drop_control": jnp.ones(some.shape[0], bool)}


def dynamic_threshold(data: Array, quantile: float = 0.995) -> Array:
    """Clip each sample of `data` (B, ...) to its quantile q of |D|, at least 1, and divide by q. Saharia 2022, 2.3.

    For pixels in [-1, 1], as the `transform` of `sample`; latents have no such range. The result is in [-1, 1].
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile must be in (0, 1], found {quantile}")
    magnitude = jnp.abs(data.reshape(data.shape[0], -1))
    limit = per_sample(jnp.maximum(jnp.quantile(magnitude, quantile, axis=1), 1).astype(data.dtype), data)
    return jnp.clip(data, -limit, limit) / limit


def _checked(uncond: Uncond | None) -> Uncond:
    if uncond is None:
        raise ValueError(
            "guidance needs an unconditional condition, found none: give uncond (null_label for a network with a "
            "null class) or sample with guidance_scale=None"
        )
    return uncond


def _extrapolate(conditional: Array, unconditional: Array, scale: Array | float) -> Array:
    scale = per_sample(jnp.asarray(scale, conditional.dtype), conditional)
    return unconditional + scale * (conditional - unconditional)
