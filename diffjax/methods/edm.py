"""Denoising score matching in sigma space (Karras et al. 2022, EDM).

For an image x0, a noise level sigma of the training distribution and unit noise n

    loss = lambda(sigma) |D(x0 + sigma n, sigma) - x0|^2                                 (eq. 2 and 8)

summed over pixels and channels and averaged over the batch, as the authors train (`loss` itself is per
pixel). `distribution` and `weighting` select their three variants: (lognormal, edm), (vp, eps), (ve, eps).

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
from diffjax.methods.update import descend

_QUARTERS = 4  # parts of the noise levels whose losses are logged apart


@dataclasses.dataclass(frozen=True)
class Settings:
    """What one EDM step draws and weighs. The defaults are Karras 2022's own.

    distribution, distribution_options: a key of noise_levels.DISTRIBUTIONS and its options.
    weighting, weighting_options: a key of weighting.WEIGHTINGS and its options.
    label_dropout: probability that a label becomes the null class `num_classes` (0 where no guidance is wanted).
    """

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
    """EDM as a Method. The batch holds image (B, H, W, C) float32 in [-1, 1] and optionally label (B,) int32 and
    augment (B, 9); `prepare(batch, key)` makes that of what the loader gives (augmentation, uint8 to float). All
    but the image is passed to the network as its condition. The network's dropout is on.

    `optimizer` has no learning rate of its own, `learning_rate` maps the iteration to it. Metrics, float32: loss;
    loss_sigma_0..3, its mean over each quarter of the batch in order of noise level (as many as samples in a smaller
    batch); grad_norm before clipping; learning_rate; nonfinite_leaf (int32). Raises ValueError for settings that
    cannot work, and at the first call for a batch that does not fit.
    """
    _check(settings)

    def init(params: Params) -> EDMState:
        return EDMState(params, optimizer.init(params))

    def step(state: EDMState, frozen: Params, batch: Batch, key: Key, iteration: Array) -> tuple[EDMState, Metrics]:
        del frozen
        prepare_key, sigma_key, noise_key, label_key, dropout_key = jax.random.split(key, 5)
        batch = dict(batch) if prepare is None else dict(prepare(batch, prepare_key))
        image = take_image(batch)
        cond = drop_labels(label_key, batch, settings.label_dropout, settings.num_classes)
        sigma = noise_levels.draw(sigma_key, image.shape[0], settings.distribution, **settings.distribution_options)
        noise = jax.random.normal(noise_key, image.shape, image.dtype)

        def objective(params: Params) -> tuple[Array, Array]:
            pixels = loss(settings, denoise, params, image, sigma, noise, cond, dropout_key)
            per_sample_loss = jnp.sum(pixels, axis=(1, 2, 3))
            return jnp.mean(per_sample_loss), per_sample_loss

        (value, per_sample_loss), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
        rate = learning_rate(iteration)
        params, opt_state = descend(optimizer, rate, *state, grads)
        values = {"loss": value, "grad_norm": optax.tree.norm(grads), "learning_rate": rate}
        values |= _loss_by_level(per_sample_loss, sigma)
        metrics = {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}
        return EDMState(params, opt_state), {**metrics, "nonfinite_leaf": trees.first_nonfinite(grads)}

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
    """lambda(sigma) (D - x0)^2 for every pixel, the shape of `image` (B, H, W, C); sigma (B,), unit noise."""
    noisy = image + per_sample(sigma, image) * noise
    error = denoise(params, noisy, sigma, cond, key) - image
    weight = weighting.weigh(settings.weighting, sigma, **settings.weighting_options)
    return per_sample(weight, image) * error**2


def drop_labels(key: Key, cond: Cond, probability: float, num_classes: int) -> Cond:
    """`cond` with each label replaced by the null class with `probability`. Ho & Salimans 2022, algorithm 1.

    Raises ValueError where labels are to be dropped and there are none.
    """
    if probability == 0:
        return cond
    if "label" not in cond:
        raise ValueError(
            f"label_dropout={probability} needs labels, found a batch with {sorted(cond)} beside the image: "
            "set label_dropout to 0, or data.num_classes"
        )
    drop = jax.random.bernoulli(key, probability, cond["label"].shape)
    return {**cond, "label": jnp.where(drop, jnp.int32(num_classes), cond["label"])}


def take_image(batch: dict[str, Array]) -> Array:
    """The image (B, H, W, C), taken out of `batch`. Raises ValueError where there is none, or none to train on."""
    if "image" not in batch:
        raise ValueError(f"the batch must hold 'image', found {sorted(batch)}")
    image = batch.pop("image")
    if image.ndim != 4 or not jnp.issubdtype(image.dtype, jnp.floating):
        raise ValueError(
            f"image must be float32 (B, H, W, C) in [-1, 1], found {image.dtype} {image.shape}: give `prepare`"
        )
    return image


def _loss_by_level(per_sample_loss: Array, sigma: Array) -> dict[str, Array]:
    """Mean loss of each quarter of the samples in order of sigma; parts differ by one sample at most."""
    num = sigma.shape[0]
    ordered = per_sample_loss[jnp.argsort(sigma)]
    parts = min(_QUARTERS, num)
    edges = [num * part // parts for part in range(parts + 1)]
    return {f"loss_sigma_{part}": jnp.mean(ordered[edges[part] : edges[part + 1]]) for part in range(parts)}


def _check(settings: Settings) -> None:
    noise_levels.check(settings.distribution, settings.distribution_options)
    weighting.check(settings.weighting, settings.weighting_options)
    if not 0 <= settings.label_dropout <= 1:
        raise ValueError(f"label_dropout is a probability, found {settings.label_dropout}")
    if settings.label_dropout and not settings.num_classes:
        raise ValueError("label_dropout needs labels: set data.num_classes, or label_dropout = 0")
