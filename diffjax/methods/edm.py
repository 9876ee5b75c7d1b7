"""Denoising score matching in sigma space (Karras et al. 2022, EDM).

For an image x0, a noise level sigma of the training distribution and unit noise n

    loss = lambda(sigma) |D(x0 + sigma n, sigma) - x0|^2                                 (eq. 2 and 8)

summed over pixels and averaged over the batch, as the authors train. `distribution` and `weighting`
select their three variants: (lognormal, edm), (vp, eps), (ve, eps).

    method = make(Settings(), denoise, optax.scale_by_adam(), learning_rate=lambda i: 1e-3)
    state = method.init(params)
    state, metrics = method.step(state, {}, {"image": x_BHWC, "label": y_B}, key, iteration)
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from diffjax.core import noise_levels, trees, weighting
from diffjax.core.broadcast import per_sample
from diffjax.core.types import Array, Batch, Cond, Denoiser, Key, Method, Metrics, Params


@dataclasses.dataclass(frozen=True)
class Settings:
    """distribution, distribution_options: a key of noise_levels.DISTRIBUTIONS and its options.
    weighting, weighting_options: a key of weighting.WEIGHTINGS and its options.
    label_dropout: probability that a label becomes the null class `num_classes` (0 where no guidance is wanted)."""

    distribution: str = "lognormal"
    distribution_options: Mapping[str, float] = dataclasses.field(default_factory=dict)
    weighting: str = "edm"
    weighting_options: Mapping[str, float] = dataclasses.field(default_factory=dict)
    label_dropout: float = 0.0
    num_classes: int = 0


class EDMState(NamedTuple):
    """params: the network's weights. opt_state: the optimiser's."""

    params: Params
    opt_state: Any


def make(
    settings: Settings,
    denoise: Denoiser,
    optimizer: optax.GradientTransformation,
    learning_rate: Callable[[Array], Array],
    prepare: Callable[[Batch, Key], Batch] | None = None,
) -> Method:
    """EDM as a Method. The batch holds image (B, H, W, C) in [-1, 1] and optionally label (B,) int32 and
    augment (B, 9); `prepare(batch, key)` makes that of what the loader gives (augmentation, uint8 to float).

    `optimizer` has no learning rate of its own, `learning_rate` maps the iteration to it. Metrics, float32:
    loss, grad_norm; nonfinite_leaf. Raises ValueError for settings that cannot work.
    """
    _check(settings)

    def init(params: Params) -> EDMState:
        return EDMState(params, optimizer.init(params))

    def step(state: EDMState, frozen: Params, batch: Batch, key: Key, iteration: Array) -> tuple[EDMState, Metrics]:
        del frozen
        prepare_key, sigma_key, noise_key, label_key, dropout_key = jax.random.split(key, 5)
        batch = dict(batch) if prepare is None else dict(prepare(batch, prepare_key))
        image = batch.pop("image")
        cond = drop_labels(label_key, batch, settings.label_dropout, settings.num_classes)
        sigma = noise_levels.draw(sigma_key, image.shape[0], settings.distribution, **settings.distribution_options)
        noise = jax.random.normal(noise_key, image.shape, image.dtype)

        def objective(params: Params) -> Array:
            return jnp.sum(loss(settings, denoise, params, image, sigma, noise, cond, dropout_key)) / image.shape[0]

        value, grads = jax.value_and_grad(objective)(state.params)
        direction, opt_state = optimizer.update(grads, state.opt_state, state.params)
        rate = learning_rate(iteration)
        params = jax.tree.map(lambda p, u: (p - rate * u).astype(p.dtype), state.params, direction)
        metrics = {
            "loss": value,
            "grad_norm": optax.global_norm(grads),
            "learning_rate": jnp.asarray(rate, jnp.float32),
            "nonfinite_leaf": trees.first_nonfinite(grads),
        }
        return EDMState(params, opt_state), metrics

    return Method(init, step)


def loss(
    settings: Settings,
    denoise: Denoiser,
    params: Params,
    image: Array,
    sigma: Array,
    noise: Array,
    cond: Cond | None = None,
    key: Key | None = None,
) -> Array:
    """The weighted squared error of every pixel, the shape of `image` (B, H, W, C); sigma (B,), noise of unit variance."""
    noisy = image + per_sample(sigma, image) * noise
    error = denoise(params, noisy, sigma, cond, key) - image
    weight = weighting.WEIGHTINGS[settings.weighting](sigma, **settings.weighting_options)
    return per_sample(weight, image) * error**2


def drop_labels(key: Key, cond: Cond, probability: float, num_classes: int) -> Cond:
    """`cond` with each label replaced by the null class with `probability`. Ho & Salimans 2022, algorithm 1."""
    if probability == 0 or "label" not in cond:
        return cond
    drop = jax.random.bernoulli(key, probability, cond["label"].shape)
    return {**cond, "label": jnp.where(drop, jnp.int32(num_classes), cond["label"])}


def _check(settings: Settings) -> None:
    if settings.distribution not in noise_levels.DISTRIBUTIONS:
        raise ValueError(
            f"unknown distribution {settings.distribution!r}, expected one of {sorted(noise_levels.DISTRIBUTIONS)}"
        )
    if settings.weighting not in weighting.WEIGHTINGS:
        raise ValueError(f"unknown weighting {settings.weighting!r}, expected one of {sorted(weighting.WEIGHTINGS)}")
    if not 0 <= settings.label_dropout <= 1:
        raise ValueError(f"label_dropout is a probability, found {settings.label_dropout}")
    if settings.label_dropout and not settings.num_classes:
        raise ValueError("label_dropout needs labels: set data.num_classes, or label_dropout = 0")
