"""EM distillation (Xie et al., NeurIPS 2024, EMD): a teacher in one network call, by maximum likelihood.

The generator is the teacher's own network at one noise level, g(z) = D(sigma* z, sigma*) for unit noise z, trained.
With q the density of its samples at noise level sigma, p the teacher's, expectation-maximisation lowers KL(p | q)
without a sample of the teacher. An iteration, data-free, all in sigma space (see `emd_chain` for the E-step):

    score    D_q by denoising score matching on fresh g(z):  w(sigma) |D_q(g + sigma eps) - g|^2        (1)
    E-step   K Langevin steps from (z, eps) towards [p/q](x) q(x, z);   z^K and the residual R
    M-step   |g(z^K) - x0|^2 w~(sigma),  x0 = stop_gradient(g(z^K) + sigma R),  by its gradient
             -2 w~ sigma (dg/dparams)' R                                                                (2)

so that no small difference of large images is formed. Sums over pixels, means over the batch. Both networks start as
the teacher, both score networks have the same dropout, the generator none; Adam each.

From the same code, with z at rest, K = 1:

    Diff-Instruct, VSD   Settings(scheme="eps", langevin_steps=1): (2) is 2 a times its gradient (D_q - D_p)' dg
    SDS                  ... and student_score="delta", whose D_q is g(z) itself
    DMD                  ... and generator_weighting="dmd": each sample's gradient is divided by the mean over pixels
                         of |g - D_p| and their number (Yin 2024, eq. 8); v1 adds `Regression` to the teacher's ODE
    forward KL           ... and `ratio`: each sample's gradient times p/q (see `density_ratio`); needs images

    method = make(Settings(batch_size=128, image_shape=(8, 8, 1)), denoise, denoise, Update(adam, lr), Update(adam, lr))
    state = method.init(teacher_params)
    state, metrics = method.step(state, Frozen(teacher_params, StepSizes(0.16, 1.6e-5)), {}, key, iteration)
    images = generator(denoise, sigma=5.0)(state.params, z, cond)
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffjax.core import noise_levels, sharding, solvers, trees, weighting
from diffjax.core.broadcast import per_sample, squared_norm
from diffjax.core.types import Array, Batch, Cond, Denoiser, Key, Method, Metrics, Params
from diffjax.methods import density_ratio, edm, from_noise
from diffjax.methods.emd_chain import Generate, Report, Sample, StepSizes, Weights, check_scheme, decay, make_chain
from diffjax.methods.update import Update, descend
from diffjax.sampling.sample import sample as follow_plan

Distance = Callable[[Params, Array, Array], Array]  # (params, (B, ...), (B, ...)) -> (B,)

_STUDENT_SCORES = ("learned", "delta")
_LATENTS = ("sigma", "unit")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What one EMD iteration does. The defaults are those of ImageNet-64 (Xie 2024, table 7) where it gives them.

    batch_size, image_shape, num_classes: of the noise that is drawn; 0 classes = no labels.
    generator_sigma: sigma*, 5 = exp(-lambda*/2) at lambda* = -3.2189. latent: what the network is given there,
      "sigma" sigma* z, "unit" sqrt(1 + sigma*^2) z, which is z itself to a variance-preserving network.
    langevin_steps: K. scheme, sequential, half_step: see `emd_chain.make_step`. unroll: loops, as in `jax.lax.scan`.
    cancel: take the chain's noise out of the target. rescale: divide R by its total weight 1 - (1 - a)^K.
    student_score: "learned" (eq. 1) or "delta". score_updates: of eq. 1 for each one of eq. 2.
    distribution, weighting and their options: of eq. 1, as in `edm.Settings`.
    generator_distribution: of the E- and M-step; "" = as in eq. 1.
    generator_weighting: w~, a key of weighting.WEIGHTINGS or "dmd".
    dropout: in both score networks. log_raw_gradient: also the norm of (2) without cancellation, which costs one more
      backward pass.
    """

    batch_size: int
    image_shape: tuple[int, ...]
    num_classes: int = 0
    generator_sigma: float = 5.0
    latent: str = "sigma"
    langevin_steps: int = 16
    unroll: int = 1
    scheme: str = "eps_z"
    sequential: bool = False
    half_step: bool = False
    cancel: bool = True
    rescale: bool = False
    student_score: str = "learned"
    score_updates: int = 1
    distribution: str = "lognormal"
    distribution_options: Mapping[str, float] = dataclasses.field(default_factory=dict)
    weighting: str = "edm"
    weighting_options: Mapping[str, float] = dataclasses.field(default_factory=dict)
    generator_distribution: str = ""
    generator_distribution_options: Mapping[str, float] = dataclasses.field(default_factory=dict)
    generator_weighting: str = "unit"
    generator_weighting_options: Mapping[str, float] = dataclasses.field(default_factory=dict)
    dropout: bool = True
    log_raw_gradient: bool = False


class EMDState(NamedTuple):
    """params, opt_state: the generator's. score, score_opt_state: of D_q; {} and () for a "delta" score. ratio: of the
    density ratio, () without."""

    params: Params
    opt_state: Any
    score: Params
    score_opt_state: Any
    ratio: Any = ()


class Frozen(NamedTuple):
    """What is read: the teacher's parameters, the chain's step sizes, parameters of the regression's distance."""

    teacher: Params
    step_sizes: StepSizes
    perceptual: Params = {}


class Regression(NamedTuple):
    """DMD's second term, weight * distance(g(z), the end of the teacher's ODE from the same z along `plan`)."""

    plan: solvers.Plan
    weight: float = 0.25
    distance: Distance = lambda params, a, b: jnp.mean(jnp.square(a - b), axis=tuple(range(1, a.ndim)))


def make(
    settings: Settings,
    teacher_denoise: Denoiser,
    denoise: Denoiser,
    generator_update: Update,
    score_update: Update,
    *,
    regression: Regression | None = None,
    ratio: density_ratio.Ratio | None = None,
) -> Method:
    """EMD as a Method: frozen is a Frozen, state an EMDState; init takes the teacher's parameters. The batch is empty;
    with `ratio` it is what `ratio.prepare` takes.

    `denoise` is the network of generator and student score; `teacher_denoise` may be guided. What is drawn inside
    is spread over the devices of a mesh. Metrics, float32: loss (2), score_loss (1), grad_norm, score_grad_norm,
    residual (|R|), latent_move (|z^K - z|), gap (mean of sigma |s_p - s_q| along the chain), all norms L2 of one
    sample, mean over the batch; grad_norm_raw, regression, ratio_loss where on; learning_rate. int32, -1 = none:
    nonfinite_leaf, and nonfinite_sample, the first sample whose chain is not finite. Raises ValueError for settings
    that cannot work.
    """
    _check(settings)
    learned = settings.student_score == "learned"
    generate = generator(denoise, settings.generator_sigma, settings.latent)
    gradient = make_gradient(settings, teacher_denoise, denoise)
    score_step = _make_score_step(settings, denoise, generate, score_update)
    reweigh = _make_reweigh(generate, ratio)
    regress = _make_regress(settings, teacher_denoise, generate, regression)
    optimizer, learning_rate = generator_update

    def init(params: Params) -> EMDState:
        ratio_state = () if ratio is None else density_ratio.start(ratio, jax.random.key(0))
        score = jax.tree.map(jnp.copy, params) if learned else {}
        score_opt_state = score_update.optimizer.init(score) if learned else ()
        return EMDState(params, optimizer.init(params), score, score_opt_state, ratio_state)

    def step(state: EMDState, frozen: Frozen, batch: Batch, key: Key, iteration: Array) -> tuple[EMDState, Metrics]:
        score_key, chain_key, regression_key, ratio_key = jax.random.split(key, 4)
        state, metrics = score_step(state, batch, score_key, iteration) if learned else (state, {})
        drawn = sharding.spread(draw(settings, chain_key, batch))
        state, factors, found = reweigh(state, frozen, batch, drawn, ratio_key, iteration)
        metrics |= found
        weights = Weights(frozen.teacher, state.score, state.params)
        dropout_key = jax.random.fold_in(chain_key, 1) if settings.dropout else None
        grads, found = gradient(weights, *drawn, frozen.step_sizes, dropout_key, factors)
        metrics |= found
        grads, found = regress(state, frozen, grads, batch, regression_key)
        metrics |= found
        rate = learning_rate(iteration)
        params, opt_state = descend(optimizer, rate, state.params, state.opt_state, grads)
        state = state._replace(params=params, opt_state=opt_state)
        metrics |= {"grad_norm": optax.tree.norm(grads), "learning_rate": rate}
        sample = metrics.pop("nonfinite_sample")
        metrics = {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}
        return state, {**metrics, "nonfinite_leaf": trees.first_nonfinite(grads), "nonfinite_sample": sample}

    return Method(init, step)


def generator(denoise: Denoiser, sigma: float, latent: str = "sigma") -> Generate:
    """g(params, z, cond): the network `denoise` at noise level `sigma`, fed with unit noise z; see Settings.latent."""
    scale = latent_scale(sigma, latent)

    def generate(params: Params, z: Array, cond: Cond) -> Array:
        return denoise(params, scale * z, jnp.full(z.shape[:1], sigma, z.dtype), cond, None)

    return generate


def latent_scale(sigma: float, latent: str) -> float:
    """What unit noise is multiplied with for the network, see Settings.latent."""
    return sigma if latent == "sigma" else float(np.sqrt(1 + sigma**2))


def draw(
    settings: Settings, key: Key, batch: Batch | None = None
) -> tuple[Array, Array, Array, dict[str, Array], Key]:
    """z, eps (B, ...), sigma (B,), cond and the chain's keys (B,) of one E-step."""
    z, cond = from_noise.draw(settings, jax.random.fold_in(key, 2), batch)
    eps, _ = from_noise.draw(settings, jax.random.fold_in(key, 3))
    name, options = chain_distribution(settings)
    sigma = noise_levels.draw(jax.random.fold_in(key, 4), settings.batch_size, name, **options)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.fold_in(key, 5), jnp.arange(settings.batch_size))
    return z, eps, sigma, cond, keys


def chain_distribution(settings: Settings) -> tuple[str, Mapping[str, float]]:
    """Name and options of the distribution that the E-step's noise levels are drawn from."""
    if settings.generator_distribution:
        return settings.generator_distribution, settings.generator_distribution_options
    return settings.distribution, settings.distribution_options


def make_gradient(
    settings: Settings, teacher_denoise: Denoiser, denoise: Denoiser
) -> Callable[..., tuple[Params, Metrics]]:
    """E-step and gradient (2): gradient(weights, z, eps, sigma, cond, keys, step_sizes, dropout_key, factors=None) ->
    (grads, metrics).

    `factors` (B,) multiply each sample's gradient. grads are with respect to weights.generator; the metrics those of
    `make` that belong to the chain.
    """
    generate = generator(denoise, settings.generator_sigma, settings.latent)
    chain = make_chain(
        settings.langevin_steps, teacher_denoise, denoise if settings.student_score == "learned" else None, generate,
        scheme=settings.scheme, sequential=settings.sequential, half_step=settings.half_step, unroll=settings.unroll,
    )  # fmt: skip

    def gradient(
        weights: Weights, z: Array, eps: Array, sigma: Array, cond: Cond, keys: Key, step_sizes: StepSizes,
        dropout_key: Key | None, factors: Array | None = None,
    ) -> tuple[Params, Metrics]:  # fmt: skip
        end, report = chain(weights, z, eps, sigma, cond, keys, step_sizes, dropout_key)
        kept = end.residual if settings.cancel else end.eps
        if settings.rescale:
            kept = kept / decay(step_sizes, settings.langevin_steps, settings.half_step)
        weight = _generator_weight(settings, sigma, report)
        weight = weight if factors is None else weight * factors
        y, pull = jax.vjp(lambda params: generate(params, end.z, cond), weights.generator)

        def towards(kept: Array) -> Params:
            return pull(-2 * per_sample(weight * sigma, y) * kept / y.shape[0])[0]  # eq. 2

        grads = towards(kept)
        metrics = _chain_metrics(z, end, report) | {"loss": jnp.mean(weight * sigma**2 * squared_norm(kept))}
        if settings.log_raw_gradient:
            metrics["grad_norm_raw"] = optax.tree.norm(towards(end.eps))
        return grads, metrics

    return gradient


def teacher_images(denoise: Denoiser, plan: solvers.Plan, params: Params, z: Array, cond: Cond) -> Array:
    """The end (B, ...) of the teacher's ODE from unit noise z."""
    return jax.lax.stop_gradient(follow_plan(denoise, params, z * float(plan.sigmas[0]), plan, cond))


def _generator_weight(settings: Settings, sigma: Array, report: Report) -> Array:
    """w~ (B,) of eq. 2."""
    if settings.generator_weighting == "dmd":
        return 1 / (report.error * np.prod(settings.image_shape))
    return weighting.weigh(settings.generator_weighting, sigma, **settings.generator_weighting_options)


def _make_score_step(
    settings: Settings, denoise: Denoiser, generate: Generate, update: Update
) -> Callable[[EMDState, Batch, Key, Array], tuple[EMDState, Metrics]]:
    """`score_updates` steps of eq. 1, each on samples of its own."""
    dsm = edm.Settings(weighting=settings.weighting, weighting_options=settings.weighting_options)

    def objective(score: Params, image: Array, sigma: Array, noise: Array, cond: Cond, key: Key | None) -> Array:
        return jnp.sum(edm.loss(dsm, denoise, score, image, sigma, noise, cond, key)) / image.shape[0]

    def score_step(state: EMDState, batch: Batch, key: Key, iteration: Array) -> tuple[EMDState, Metrics]:
        rate = update.learning_rate(iteration)

        def body(carry: tuple[Params, Any], key: Key) -> tuple[tuple[Params, Any], Metrics]:
            z, cond = from_noise.draw(settings, jax.random.fold_in(key, 0), batch)
            noise, _ = from_noise.draw(settings, jax.random.fold_in(key, 1))
            sigma = noise_levels.draw(
                jax.random.fold_in(key, 2), settings.batch_size, settings.distribution, **settings.distribution_options
            )
            z, noise, sigma, cond = sharding.spread((z, noise, sigma, cond))
            image = jax.lax.stop_gradient(generate(state.params, z, cond))
            dropout_key = jax.random.fold_in(key, 3) if settings.dropout else None
            loss, grads = jax.value_and_grad(objective)(carry[0], image, sigma, noise, cond, dropout_key)
            metrics = {"score_loss": loss, "score_grad_norm": optax.tree.norm(grads)}
            return descend(update.optimizer, rate, *carry, grads), metrics

        keys = jax.random.split(key, settings.score_updates)
        start = state.score, state.score_opt_state
        (score, opt_state), metrics = jax.lax.scan(body, start, keys, unroll=settings.unroll)
        return state._replace(score=score, score_opt_state=opt_state), jax.tree.map(jnp.mean, metrics)

    return score_step


def _make_reweigh(
    generate: Generate, ratio: density_ratio.Ratio | None
) -> Callable[..., tuple[EMDState, Array | None, Metrics]]:
    """The factors p/q of the samples that the chain starts from; None without `ratio`."""

    def reweigh(
        state: EMDState, frozen: Frozen, batch: Batch, drawn: tuple, key: Key, iteration: Array
    ) -> tuple[EMDState, Array | None, Metrics]:
        if ratio is None:
            return state, None, {}
        z, eps, sigma, cond, _ = drawn
        noise_key, prepare_key = jax.random.split(key)
        real_cond = dict(ratio.prepare(batch, prepare_key))
        image = edm.take_image(real_cond)
        real = image + per_sample(sigma, image) * jax.random.normal(noise_key, image.shape, image.dtype)
        fake = generate(state.params, z, cond) + per_sample(sigma, eps) * eps
        ratio_state, factors, metrics = density_ratio.step(
            ratio, state.ratio, frozen.teacher, (real, real_cond), (fake, cond), sigma, iteration
        )
        return state._replace(ratio=ratio_state), factors, metrics

    return reweigh


def _make_regress(
    settings: Settings, teacher_denoise: Denoiser, generate: Generate, regression: Regression | None,
) -> Callable[[EMDState, Frozen, Params, Batch, Key], tuple[Params, Metrics]]:  # fmt: skip
    """Adds the gradient of `Regression`, on noise of its own."""

    def regress(state: EMDState, frozen: Frozen, grads: Params, batch: Batch, key: Key) -> tuple[Params, Metrics]:
        if regression is None:
            return grads, {}
        z, cond = sharding.spread(from_noise.draw(settings, key, batch))
        target = teacher_images(teacher_denoise, regression.plan, frozen.teacher, z, cond)

        def objective(params: Params) -> Array:
            return jnp.mean(regression.distance(frozen.perceptual, generate(params, z, cond), target))

        value, more = jax.value_and_grad(objective)(state.params)
        grads = jax.tree.map(lambda a, b: a + regression.weight * b, grads, more)
        return grads, {"regression": value}

    return regress


def _chain_metrics(z: Array, end: Sample, report: Report) -> Metrics:
    finite = jnp.isfinite(squared_norm(end.residual) + squared_norm(end.eps) + squared_norm(end.z))
    first = jnp.where(jnp.all(finite), -1, jnp.argmin(finite)).astype(jnp.int32)
    return {
        "residual": jnp.mean(jnp.sqrt(squared_norm(end.residual))),
        "latent_move": jnp.mean(jnp.sqrt(squared_norm(end.z - z))),
        "gap": jnp.mean(report.gap),
        "nonfinite_sample": first,
    }


def _check(settings: Settings) -> None:
    if settings.langevin_steps < 1:
        raise ValueError(
            f"langevin_steps is K, the length of the chain, at least 1, found {settings.langevin_steps}: without a step "
            "the residual and the gradient are zero. Diff-Instruct is langevin_steps=1 with scheme='eps'"
        )
    check_scheme(settings.scheme, settings.sequential)
    if settings.score_updates < 1:
        raise ValueError(f"score_updates must be at least 1, found {settings.score_updates}")
    if settings.student_score not in _STUDENT_SCORES:
        raise ValueError(f"student_score must be one of {_STUDENT_SCORES}, found {settings.student_score!r}")
    if settings.latent not in _LATENTS:
        raise ValueError(f"latent must be one of {_LATENTS}, found {settings.latent!r}")
    if not settings.generator_sigma > 0:
        raise ValueError(f"generator_sigma must be positive, found {settings.generator_sigma}")
    noise_levels.check(settings.distribution, settings.distribution_options)
    noise_levels.check(*chain_distribution(settings))
    weighting.check(settings.weighting, settings.weighting_options)
    if settings.generator_weighting != "dmd":
        weighting.check(settings.generator_weighting, settings.generator_weighting_options)
    from_noise.check(settings)
