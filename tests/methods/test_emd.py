"""EMD on networks: gradients and one whole step derived again, the chain's options, and leaks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax.core import guidance, noise_levels, prediction, solvers, trees
from diffjax.methods import emd, emd_chain, from_noise
from diffjax.methods.emd_chain import StepSizes, Weights
from diffjax.models.toy import ResidualMLP
from diffjax.nn.functional import functionalize
from diffjax.runtime import guards

SHAPE, BATCH, SIGMA = (2, 2, 1), 4, 5.0
RATES = StepSizes(0.16, 0.02)  # a latent rate that is seen


def constructor(rngs):
    net = ResidualMLP(SHAPE, 8, 1, num_classes=3, dropout=0.3, rngs=rngs)
    net.label_embedding.dtype = None  # of its weights, which Flax would round to float32
    return net


network, init = functionalize(constructor)
denoise = prediction.edm_denoiser(network)


def settings(**changes):
    return dataclasses.replace(emd.Settings(BATCH, SHAPE, num_classes=3, langevin_steps=1), **changes)


def generate(params, z, cond):
    return denoise(params, SIGMA * z, jnp.full(z.shape[:1], SIGMA), cond)


@jax.jit
def random_weights(seed):
    """Weights of which no layer is zero, float64 where that is on."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(init, jax.random.key(0)))
    ends = np.cumsum([leaf.size for leaf in leaves])
    parts = jnp.split(jax.random.normal(jax.random.key(seed), (int(ends[-1]),)), ends[:-1])
    scale = lambda leaf: 0.3 if leaf.ndim == 1 else leaf.shape[0] ** -0.5  # noqa: E731
    return tree.unflatten([scale(leaf) * part.reshape(leaf.shape) for leaf, part in zip(leaves, parts, strict=True)])


def three():
    return Weights(random_weights(1), random_weights(2), random_weights(3))


@jax.jit
def start():
    """z, eps, sigma, cond and keys of an E-step."""
    keys = jax.random.split(jax.random.key(9), 5)
    z, eps = (jax.random.normal(key, (BATCH, *SHAPE)) for key in keys[:2])
    sigma = jnp.exp(jax.random.normal(keys[2], (BATCH,)))
    return z, eps, sigma, {"label": jax.random.randint(keys[3], (BATCH,), 0, 3)}, jax.random.split(keys[4], BATCH)


def assert_close(found, expected, tol=1e-11):
    """Float64 through a small network: far above its rounding, relative to the largest entry of a leaf."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tol, atol=tol * np.max(np.abs(b)))


def gradient_of(chosen, weights, drawn):
    return jax.jit(emd.make_gradient(chosen, denoise, denoise))(weights, *drawn, RATES, None)[0]


@functools.partial(jax.jit, static_argnames="teacher")
def seen(weights, z, eps, sigma, cond, teacher=denoise):
    """g, D_q and D_p of the samples that a chain starts from, all constant."""
    y = generate(weights.generator, z, cond)
    x = y + sigma[:, None, None, None] * eps
    score, known = denoise(weights.score, x, sigma, cond), teacher(weights.teacher, x, sigma, cond)
    return jax.lax.stop_gradient((y, score, known))


@jax.jit
def rival_gradient(direction, weights, z, cond, factor=1.0):
    """Of sum factor <direction, g> over the mean of the batch, by jax.grad."""
    return jax.grad(lambda p: jnp.sum(factor * direction * generate(p, z, cond)) / len(z))(weights.generator)


def scaled(tree, factor):
    return jax.tree.map(lambda leaf: factor * leaf, tree)


# Rivals, derived again -------------------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize(("weight", "scale"), [("unit", 3.0), ("edm", None)])
def test_one_step_without_latent_is_diff_instruct(weight, scale, x64):
    """C8, per example: 2 a times the gradient of w <sg(D_q - D_p), g>."""
    null = functools.partial(guidance.null_label, num_classes=3)
    teacher = denoise if scale is None else guidance.cfg(denoise, scale, null)
    chosen, weights = settings(scheme="eps", generator_weighting=weight), three()
    gradient = jax.jit(emd.make_gradient(chosen, teacher, denoise))
    for i in range(BATCH):
        z, eps, sigma, cond, keys = jax.tree.map(lambda leaf: leaf[i : i + 1], start())  # noqa: B023
        _, score, known = seen(weights, z, eps, sigma, cond, teacher)
        w = 1.0 if weight == "unit" else (sigma[0] ** 2 + 0.25) / (0.5 * sigma[0]) ** 2
        expected = scaled(rival_gradient(score - known, weights, z, cond, w), 2 * RATES.noise)
        assert_close(gradient(weights, z, eps, sigma, cond, keys, RATES, None)[0], expected)


def test_dmd_is_its_loss_as_released(x64):
    """0.5 mean (g - sg(g - grad))^2, grad = (D_q - D_p) / mean |g - D_p|; ours is 2 a times its gradient."""
    weights, drawn = three(), start()
    z, cond = drawn[0], drawn[3]
    y, score, known = seen(weights, *drawn[:4])
    grad = (score - known) / jnp.mean(jnp.abs(y - known), axis=(1, 2, 3), keepdims=True)
    released = jax.grad(lambda p: 0.5 * jnp.mean((generate(p, z, cond) - (y - grad)) ** 2))(weights.generator)
    found = gradient_of(settings(scheme="eps", generator_weighting="dmd"), weights, drawn)
    assert_close(found, scaled(released, 2 * RATES.noise))


def test_delta_score_is_score_distillation(x64):
    """The gap is sigma s_p + eps: no student score is called."""
    weights, drawn = three(), start()
    z, eps, sigma, cond, _ = drawn
    level = sigma[:, None, None, None]
    y, _, known = seen(weights, *drawn[:4])
    gap = level * (known - y - level * eps) / level**2 + eps
    expected = scaled(rival_gradient(-level * gap, weights, z, cond), 2 * RATES.noise)
    chosen = settings(scheme="eps", student_score="delta")
    assert_close(gradient_of(chosen, weights._replace(score={}), drawn), expected)


# The chain on networks -------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def by_hand(scheme, weights, z, eps, sigma, cond, noise):
    """x and x0 after each step, as the spec writes it in the space of x, gradients by jax.grad."""
    (a, b), level = RATES, sigma[:, None, None, None]
    g = functools.partial(generate, weights.generator, cond=cond)
    x, own, trail = g(z) + level * eps, eps, []
    for n_eps, n_z in noise:
        known, learned = (denoise(params, x, sigma, cond) for params in weights[:2])
        gap, y = (known - learned) / level**2, g(z)
        through = (x - y) / level**2 if scheme == "x_z" else gap
        pulled = jax.grad(lambda z, v: jnp.sum(g(z) * v))(z, through)
        rate = a * level**2
        moved = x + rate * (gap - (x - y) / level**2) + jnp.sqrt(2 * rate) * n_eps
        if scheme.endswith("_z"):
            z = z + b * (pulled - z) + np.sqrt(2 * b) * n_z
        x = g(z) + (moved - y) if scheme == "eps_z" else moved
        own = (1 - a) * own + np.sqrt(2 * a) * n_eps
        trail.append((x, x - level * own))
    return trail


@pytest.fixture
def trails(x64):
    """scheme -> (x, x0) after each of two steps of `make_step`, and by hand."""
    weights, (z, eps, sigma, cond, _) = three(), start()
    noise = [jax.random.normal(jax.random.key(k), (2, *z.shape)) for k in range(2)]
    found, level = {}, sigma[:, None, None, None]
    for scheme in emd_chain.SCHEMES:
        step = jax.jit(emd_chain.make_step(denoise, denoise, generate, scheme=scheme))
        sample, trail = emd_chain.Sample(eps, z, jnp.zeros_like(eps)), []
        for n_eps, n_z in noise:
            sample, _ = step(weights, sample, sigma, cond, RATES, n_eps, n_z)
            y = generate(weights.generator, sample.z, cond)
            trail.append((y + level * sample.eps, y + level * sample.residual))
        found[scheme] = trail, by_hand(scheme, weights, z, eps, sigma, cond, noise)
    return found


def test_schemes_as_they_are_written(trails):
    """C9: each scheme; `x` is `eps` step for step; with a latent they part at the first step."""
    for found, expected in trails.values():
        assert_close(found, expected)
    assert_close(trails["x"][0], trails["eps"][0])
    assert np.max(np.abs(trails["x_z"][0][0][1] - trails["eps_z"][0][0][1])) > 1e-3


def test_schemes_agree_on_a_latent_at_rest(x64):
    """C9: at b = 0 the real chain has the same target x0 = g + sigma R in all four."""
    weights, drawn = three(), start()
    ends = []
    for scheme in emd_chain.SCHEMES:
        chain = emd_chain.make_chain(4, denoise, denoise, generate, scheme=scheme)
        end, _ = jax.jit(chain)(weights, *drawn, StepSizes(0.16, 0.0))
        ends.append(generate(weights.generator, end.z, drawn[3]) + drawn[2][:, None, None, None] * end.residual)
    for end in ends[1:]:
        assert_close(end, ends[0])


def test_sequential_latent_sees_the_new_noise(x64):
    """One step: the same noise; the latent moves along the gap at x = g(z) + sigma (new eps)."""
    weights, (z, eps, sigma, cond, _) = three(), start()
    sample, noise = emd_chain.Sample(eps, z, 0 * eps), jax.random.normal(jax.random.key(0), (2, *z.shape))
    ends = []
    for sequential in (False, True):
        step = jax.jit(emd_chain.make_step(denoise, denoise, generate, sequential=sequential))
        ends.append(step(weights, sample, sigma, cond, RATES, *noise)[0])
    np.testing.assert_allclose(ends[0].eps, ends[1].eps, rtol=1e-12)  # float64
    assert np.max(np.abs(ends[0].z - ends[1].z)) > 1e-5
    _, score, known = seen(weights, z, ends[1].eps, sigma, cond)
    through = (known - score) / sigma[:, None, None, None] ** 2
    pulled = jax.grad(lambda z: jnp.sum(generate(weights.generator, z, cond) * through))(z)
    b = RATES.latent
    assert_close(ends[1].z, (1 - b) * z + b * pulled + np.sqrt(2 * b) * noise[1])


def test_half_steps_and_rescaling(x64):
    """half_step is half the rates; rescale divides by 1 - (1 - a)^K, with both by that of a / 2."""
    weights, drawn, half = three(), start(), StepSizes(RATES.noise / 2, RATES.latent / 2)

    def gradient(**changes):
        return jax.jit(emd.make_gradient(settings(langevin_steps=3, **changes), denoise, denoise))

    plain = gradient()
    whole, halved = (plain(weights, *drawn, rates, None)[0] for rates in (RATES, half))
    assert_close(scaled(gradient(rescale=True)(weights, *drawn, RATES, None)[0], 1 - 0.84**3), whole)
    both = gradient(rescale=True, half_step=True)(weights, *drawn, RATES, None)[0]
    assert_close(scaled(both, 1 - 0.92**3), halved)


def test_both_score_networks_have_the_same_dropout():
    """Equal weights leave no gap under any mask, and other masks are other chains."""
    weights, drawn = three(), start()
    chain = jax.jit(emd_chain.make_chain(2, denoise, denoise, generate))
    same, _ = chain(weights._replace(score=weights.teacher), *drawn, RATES, jax.random.key(0))
    assert not np.any(same.residual)
    ends = [chain(weights, *drawn, RATES, key)[0].residual for key in (None, jax.random.key(0), jax.random.key(1))]
    assert np.max(np.abs(ends[0] - ends[1])) > 1e-3 and np.max(np.abs(ends[1] - ends[2])) > 1e-3


# Leaks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [0, 2])
def test_no_gradient_passes_the_chain(num_steps):
    """C17, and a chain of no steps has no residual."""
    chain, drawn = emd_chain.make_chain(num_steps, denoise, denoise, generate), start()

    def total(weights):
        end, _ = chain(weights, *drawn, RATES)
        return sum(jnp.sum(leaf) for leaf in end), end.residual

    (_, residual), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(three())
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads)) and np.any(residual) == (num_steps > 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"langevin_steps": 0}, "the residual and the gradient are zero. Diff-Instruct is langevin_steps=1"),
        ({"scheme": "z"}, "the scheme must be one of"),
        ({"scheme": "eps", "sequential": True}, "leaves z at rest"),
        ({"student_score": "fake"}, "student_score must be one of"),
        ({"latent": "vp"}, "latent must be one of"),
        ({"generator_sigma": 0.0}, "generator_sigma must be positive"),
        ({"score_updates": 0}, "score_updates must be at least 1"),
        ({"generator_distribution": "uniform"}, "noise distribution"),
        ({"generator_weighting": "dmd2"}, "weighting"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    update = emd.Update(optax.identity(), lambda iteration: 1.0)
    with pytest.raises(ValueError, match=message):
        emd.make(settings(**changes), denoise, denoise, update, update)


# One whole step --------------------------------------------------------------------------------------------------


def make(chosen, optimizer=None, teacher=denoise, **options):
    """Rates 0.1 for the generator and 0.01 for the score."""
    optimizer = optax.identity() if optimizer is None else optimizer
    updates = (emd.Update(optimizer, lambda iteration, rate=rate: jnp.float32(rate)) for rate in (0.1, 0.01))
    return emd.make(chosen, teacher, denoise, *updates, **options)


@pytest.fixture
def fixed(monkeypatch):
    """Every draw of noise is the same z, every level and label too."""
    z, _, sigma, _, _ = start()
    cond = {"label": jnp.array([0, 1, 2, 2])}
    monkeypatch.setattr(from_noise, "draw", lambda settings, key, batch=None: (z, cond))
    monkeypatch.setattr(noise_levels, "draw", lambda *_, **__: sigma)
    return z, sigma, cond


@jax.jit
def matching(score, y, z, sigma, cond):
    """Denoising score matching of images y with noise z, Karras 2022's weight, and its gradient."""
    level = sigma[:, None, None, None]
    weight = (level**2 + 0.25) / (0.5 * level) ** 2
    objective = lambda p: jnp.sum(weight * (denoise(p, y + level * z, sigma, cond) - y) ** 2) / BATCH  # noqa: E731
    return jax.value_and_grad(objective)(score)


@jax.jit
def regression_by_hand(weights, z, cond):
    """Towards the end of two Euler steps of the teacher from z."""
    x = 3.0 * z
    for above, below in ((3.0, 1.0), (1.0, 0.2)):
        x = x + (below - above) * (x - denoise(weights.teacher, x, jnp.float64(above), cond)) / above
    return jax.value_and_grad(lambda p: jnp.mean((generate(p, z, cond) - x) ** 2))(weights.generator)


def down(params, grads, rate):
    return jax.tree.map(lambda p, g: p - np.float32(rate) * g, params, grads)


@pytest.mark.parametrize(("score_updates", "regressed"), [(1, False), (2, True)])
def test_step_by_hand(score_updates, regressed, x64, fixed):
    """Score on images of the generator, generator by the new score, and nothing else; plain gradient descent."""
    z, sigma, cond = fixed
    term = emd.Regression(solvers.make_plan("euler", np.array([3.0, 1.0, 0.2])), 0.5) if regressed else None
    method = make(settings(scheme="eps", score_updates=score_updates, dropout=False), regression=term)
    teacher, score, params = three()
    state = method.init(params)._replace(score=score)
    found, metrics = jax.jit(method.step)(state, emd.Frozen(teacher, RATES), {}, jax.random.key(0), jnp.int32(0))

    losses, y = [], generate(params, z, cond)
    for _ in range(score_updates):
        loss, grads = matching(score, y, z, sigma, cond)
        losses, score = [*losses, float(loss)], down(score, grads, 0.01)
    weights = Weights(teacher, score, params)
    _, learned, known = seen(weights, z, z, sigma, cond)
    grads = scaled(rival_gradient(learned - known, weights, z, cond), 2 * RATES.noise)
    if regressed:
        value, more = regression_by_hand(weights, z, cond)
        grads = jax.tree.map(lambda a, b: a + 0.5 * b, grads, more)
        assert metrics["regression"] == pytest.approx(float(value), rel=1e-6)  # metrics are float32
    assert_close(found.score, score)
    assert_close(found.params, down(params, grads, 0.1))
    assert metrics["score_loss"] == pytest.approx(np.mean(losses), rel=1e-6)


def test_step_sizes_are_traced_and_the_teacher_is_read_only():
    """One program for all rates, the same numbers each time; the state is donated, as in training."""
    method, teacher = make(settings(langevin_steps=2), optax.scale_by_adam()), random_weights(1)
    kept, step, moved = jax.tree.map(np.array, teacher), jax.jit(method.step, donate_argnums=0), []
    for a, b in ((0.16, 1.6e-5), (0.09, 0.0), (0.16, 1.6e-5)):
        state = method.init(jax.tree.map(jnp.copy, teacher))
        frozen = emd.Frozen(teacher, StepSizes(jnp.float32(a), jnp.float32(b)))
        moved.append(step(state, frozen, {}, jax.random.key(4), jnp.int32(0)))
    assert step._cache_size() == 1
    jax.tree.map(np.testing.assert_array_equal, moved[0], moved[2])
    assert moved[0][1]["residual"] != moved[1][1]["residual"]
    jax.tree.map(np.testing.assert_array_equal, teacher, kept)


def test_metrics_have_their_names():
    chosen = settings(langevin_steps=2, log_raw_gradient=True)
    plan = solvers.make_plan("euler", np.array([3.0, 0.2]))
    names = {"loss", "grad_norm", "residual", "latent_move", "gap", "grad_norm_raw", "learning_rate"}
    names |= {"nonfinite_leaf", "nonfinite_sample"}
    cases = ((chosen, None, {"score_loss", "score_grad_norm"}),
             (dataclasses.replace(chosen, student_score="delta"), emd.Regression(plan), {"regression"}))  # fmt: skip
    for chosen, regression, more in cases:
        method = make(chosen, regression=regression)
        state = jax.eval_shape(method.init, random_weights(3))
        arguments = emd.Frozen(random_weights(1), RATES), {}, jax.random.key(0), jnp.int32(0)
        _, metrics = jax.eval_shape(method.step, state, *arguments)
        assert set(metrics) == names | more
        for name, value in metrics.items():
            assert (value.shape, value.dtype) == ((), jnp.int32 if name.startswith("nonfinite") else jnp.float32)


def test_samples_do_not_depend_on_the_batch():
    """The draws bit by bit; the chains to the rounding of float32 products of another shape."""
    weights = three()
    chain = jax.jit(emd_chain.make_chain(3, denoise, denoise, generate))
    drawn = [jax.jit(functools.partial(emd.draw, settings(batch_size=num)))(jax.random.key(5)) for num in (4, 64)]
    drawn[1] = jax.tree.map(lambda leaf: leaf[:4], drawn[1])
    as_bits = [(*rest, jax.random.key_data(keys)) for *rest, keys in drawn]
    jax.tree.map(np.testing.assert_array_equal, *as_bits)
    part = jax.tree.map(lambda leaf: leaf[1:3], drawn[0])
    for a, b in zip(chain(weights, *drawn[0], RATES)[0], chain(weights, *part, RATES)[0], strict=True):
        np.testing.assert_allclose(a[1:3], b, rtol=1e-4, atol=1e-4)
    other = {"generator_distribution": "ve", "generator_distribution_options": {"sigma_min": 0.3, "sigma_max": 0.3}}
    np.testing.assert_allclose(emd.draw(settings(**other), jax.random.key(5))[2], 0.3, rtol=1e-6)  # float32


def test_a_sample_that_is_not_finite_is_named(fixed):
    """A teacher that fails for class 2: samples 2 and 3 of the batch."""

    def teacher(params, x, sigma, cond, key=None):
        return jnp.where((cond["label"] == 2)[:, None, None, None], jnp.nan, denoise(params, x, sigma, cond))

    method = make(settings(), teacher=teacher)
    state = method.init(random_weights(3))
    frozen = emd.Frozen(random_weights(1), RATES)
    _, metrics = jax.jit(method.step)(state, frozen, {}, jax.random.key(0), jnp.int32(0))
    assert metrics["nonfinite_sample"] == 2 and metrics["nonfinite_leaf"] >= 0 and np.isfinite(metrics["score_loss"])
    values = {name: float(value) for name, value in metrics.items()}
    with pytest.raises(guards.NonFiniteError, match=r"step 7: .*first sample of the batch that is not finite: 2\."):
        guards.check_finite(7, values, trees.paths(state.params))
