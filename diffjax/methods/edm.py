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
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from diffjax.assign import pair
from diffjax.core import microbatches, noise_levels, schedules, sharding, trees, weighting
from diffjax.core.broadcast import per_sample
from diffjax.core.types import Array, Batch, Cond, Denoiser, Key, Method, Metrics, Params
from diffjax.methods import variance_bound
from diffjax.methods.update import descend
from diffjax.sampling.learned_variance import VarianceDenoiser

_QUARTERS = 4  # parts of the noise levels whose losses are logged apart


@dataclasses.dataclass(frozen=True)
class Settings:
    """What one EDM step draws and weighs. The defaults are Karras 2022's own.

    distribution, distribution_options: a key of noise_levels.DISTRIBUTIONS and its options.
    weighting, weighting_options: a key of weighting.WEIGHTINGS and its options.
    variance_weight: lambda of the hybrid loss (Nichol & Dhariwal 2021), where the network says its variance.
    label_dropout: probability that a label becomes the null class `num_classes` (0 where no guidance is wanted), or a
      text the empty one. texts: batches have texts in place of labels. control_dropout: that a sample's sizes, crop and
      flip are not told, see `nn.control`.
    assign, assign_options: how noise is given to images, a key of `assign.pair.METHODS` and the options of
      `assign.pair.training_noise`: immiscible diffusion.
    """

    distribution: str = "lognormal"
    distribution_options: Mapping[str, float] = dataclasses.field(default_factory=dict)
    weighting: str = "edm"
    weighting_options: Mapping[str, float] = dataclasses.field(default_factory=dict)
    variance_weight: float = 0.001
    label_dropout: float = 0.0
    control_dropout: float = 0.0
    texts: bool = False
    num_classes: int = 0
    assign: str = "none"
    assign_options: Mapping[str, str | int | float] = dataclasses.field(default_factory=dict)


class StepKeys(NamedTuple):
    """What a step draws from: augmentation, noise levels, noise, dropped labels, dropout."""

    prepare: Key
    level: Key
    noise: Key
    label: Key
    dropout: Key


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
    variance: VarianceDenoiser | None = None,
    masked: Sequence[Denoiser | VarianceDenoiser] = (),
) -> Method:
    """EDM as a Method. The batch holds image (B, H, W, C), or videos (B, T, H, W, C), float32 in [-1, 1] and optionally
    label (B,) int32 and augment (B, 9); `prepare(batch, key)` makes that of what the loader gives (augmentation, uint8
    to float). All but the image is passed to the network as its condition. The network's dropout is on. `variance`: of a network that
    says its variance, which then is trained too, by `variance_bound`; the levels must be "discrete". `masked`: passes
    of the same network that see some tokens only, as many of its kind as there are numbers of tokens; one, drawn for
    the step, has its loss at the same image and level but with other noise, and both losses are added (Gao 2023, MDTv2's
    code).

    `optimizer` has no learning rate of its own, `learning_rate` maps the iteration to it. Metrics, float32: loss;
    loss_sigma_0..3, its mean over each quarter of the batch in order of noise level (as many as samples in a smaller
    batch); grad_norm before clipping; learning_rate; those of an assignment, see `assign.pair.training_noise`;
    nonfinite_leaf (int32). Raises ValueError for settings that cannot work, and at the first call for a batch that does
    not fit.
    """
    _check(settings)
    if variance is not None and settings.distribution != "discrete":
        raise ValueError(
            f"a learned variance needs the levels of a table, found distribution={settings.distribution!r}: take "
            "'discrete'"
        )
    objective = _objective(settings, denoise if variance is None else variance, variance is not None, masked)

    def init(params: Params) -> EDMState:
        return EDMState(params, optimizer.init(params))

    def step(state: EDMState, frozen: Params, batch: Batch, key: Key, iteration: Array) -> tuple[EDMState, Metrics]:
        del frozen
        keys = split(key)
        batch = dict(batch) if prepare is None else dict(prepare(batch, keys.prepare))
        image = take_image(batch)
        noise, found = pair.training_noise(keys.noise, image, batch, settings.assign, **settings.assign_options)
        cond = drop_labels(keys.label, batch, settings.label_dropout, settings.num_classes)
        cond = drop_control(jax.random.fold_in(keys.label, 1), cond, settings.control_dropout, len(image))
        sigma = noise_levels.draw(keys.level, image.shape[0], settings.distribution, **settings.distribution_options)
        given = image, sigma, noise, cond
        (value, (per_sample_loss, extra)), grads = microbatches.value_and_grad(objective, state.params, (), given, keys)
        rate = learning_rate(iteration)
        params, opt_state = descend(optimizer, rate, *state, grads)
        values = {"loss": value, "grad_norm": optax.tree.norm(grads), "learning_rate": rate}
        values |= _loss_by_level(per_sample_loss, sharding.everywhere(sigma)) | found
        values |= {"loss_masked": jnp.mean(extra)} if masked else {}
        metrics = {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}
        return EDMState(params, opt_state), {**metrics, "nonfinite_leaf": trees.first_nonfinite(grads)}

    return Method(init, step)


def _objective(
    settings: Settings, network: Denoiser | VarianceDenoiser, is_hybrid: bool,
    masked: Sequence[Denoiser | VarianceDenoiser],
) -> Callable[..., tuple[Array, tuple[Array, Array]]]:  # fmt: skip
    """For `microbatches.value_and_grad`: (params, (), (image, sigma, noise, cond), keys) -> the loss, and of each sample
    (B,) that of the whole and of the masked pass."""
    pixels = hybrid_loss if is_hybrid else loss

    def objective(
        params: Params, fixed: tuple[()], batch: tuple[Array, Array, Array, Cond], keys: StepKeys
    ) -> tuple[Array, tuple[Array, Array]]:
        del fixed
        image, sigma, noise, cond = batch

        def summed(network: Denoiser | VarianceDenoiser, noise: Array, key: Key) -> Array:
            of_pixels = pixels(settings, network, params, image, sigma, noise, cond, key)
            return jnp.sum(of_pixels, axis=tuple(range(1, image.ndim)))

        whole = summed(network, noise, keys.dropout)
        if not masked:
            return jnp.mean(whole), (whole, jnp.zeros_like(whole))
        other = jax.random.normal(jax.random.fold_in(keys.noise, 1), noise.shape)
        passes = [functools.partial(summed, one, other) for one in masked]
        which = jax.random.randint(jax.random.fold_in(keys.dropout, 1), (), 0, len(passes))
        extra = jax.lax.switch(which, passes, jax.random.fold_in(keys.dropout, 2))
        return jnp.mean(whole) + jnp.mean(extra), (whole, extra)

    return objective


def split(key: Key) -> StepKeys:
    """The keys of a step. `assign.host` draws the same noise from them."""
    return StepKeys(*jax.random.split(key, 5))


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
    """lambda(sigma) (D - x0)^2 for every pixel, the shape of `image` (B, ..., C); sigma (B,), unit noise."""
    noisy = image + per_sample(sigma, image) * noise
    error = denoise(params, noisy, sigma, cond, key) - image
    weight = weighting.weigh(settings.weighting, sigma, **settings.weighting_options)
    return per_sample(weight, image) * error**2


def hybrid_loss(
    settings: Settings, variance: VarianceDenoiser, params: Params, image: Array, sigma: Array, noise: Array,
    cond: Cond | None = None, key: Key | None = None,
) -> Array:  # fmt: skip
    """`loss` plus lambda L_vlb, its bits per dimension at every pixel. Nichol & Dhariwal 2021, eq. 16."""
    noisy = image + per_sample(sigma, image) * noise
    data, fraction = variance(params, noisy, sigma, cond, key)
    weight = weighting.weigh(settings.weighting, sigma, **settings.weighting_options)
    options = settings.distribution_options
    table = schedules.table(options.get("process", "linear"), options.get("resolution_scale", 1.0))
    bits = variance_bound.bound(table, image, noisy, sigma, data, fraction)
    bits = per_sample(settings.variance_weight * table.num * bits, image)
    return per_sample(weight, image) * (data - image) ** 2 + bits


def drop_labels(key: Key, cond: Cond, probability: float, num_classes: int) -> Cond:
    """`cond` with each label replaced by the null class with `probability`, and each text by its "negative_<name>", the
    empty text. Ho & Salimans 2022, algorithm 1.

    Raises ValueError where labels or texts are to be dropped and there are none.
    """
    empty = {name.removeprefix("negative_"): value for name, value in cond.items() if name.startswith("negative_")}
    if empty:
        cond = {name: value for name, value in cond.items() if not name.startswith("negative_")}
    if probability == 0:
        return cond
    if "label" not in cond and not empty:
        raise ValueError(
            f"label_dropout={probability} needs labels or texts, found a batch with {sorted(cond)} beside the image: "
            "set label_dropout to 0, or data.num_classes"
        )
    if "label" in cond:
        empty["label"] = jnp.full_like(cond["label"], num_classes)
    some = next(iter(empty.values()))
    drop = jax.random.bernoulli(key, probability, some.shape[:1])
    return {**cond, **{name: jnp.where(per_sample(drop, value), value, cond[name]) for name, value in empty.items()}}


def drop_control(key: Key, cond: Cond, probability: float, num: int) -> Cond:
    """`cond` with drop_control (num,), true with `probability`; unchanged for 0. Berrada 2024, section 3.1."""
    return {**cond, "drop_control": jax.random.bernoulli(key, probability, (num,))} if probability else cond


def take_image(batch: dict[str, Array]) -> Array:
    """The image (B, H, W, C) or video (B, T, H, W, C), taken out of `batch`. Raises ValueError where there is none,
    or none to train on."""
    if "image" not in batch:
        raise ValueError(f"the batch must hold 'image', found {sorted(batch)}")
    image = batch.pop("image")
    if image.ndim not in (4, 5) or not jnp.issubdtype(image.dtype, jnp.floating):
        raise ValueError(
            f"image must be float32 (B, H, W, C) or (B, T, H, W, C) in [-1, 1], found {image.dtype} {image.shape}: give "
            "`prepare`"
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
    pair.check_options(settings.assign, settings.assign_options)
    for name in ("label_dropout", "control_dropout"):
        if not 0 <= getattr(settings, name) <= 1:
            raise ValueError(f"{name} is a probability, found {getattr(settings, name)}")
    if settings.label_dropout and not (settings.num_classes or settings.texts):
        raise ValueError("label_dropout needs labels: set data.num_classes, or label_dropout = 0")
