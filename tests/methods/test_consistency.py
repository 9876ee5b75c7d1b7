"""Consistency training: its curriculum, draws and step by hand, distillation of a Gaussian, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from diffjax.assign import pair
from diffjax.core import gaussian, prediction
from diffjax.methods import consistency

SHAPE, NUM = (4, 4, 2), 16
BATCH = {"image": 0.5 * jax.random.normal(jax.random.key(0), (NUM, *SHAPE))}
CIFAR = consistency.Settings(total_steps=800_000)
ICT = consistency.Settings(
    total_steps=400_000, curriculum="double", first_scale=10, last_scale=1280, mu=0.0, levels="lognormal",
    metric="pseudo_huber", inverse_gap=True,
)  # fmt: skip


def scale(params, x, sigma, cond=None, key=None):
    """The least consistency function: one number."""
    return params["a"] * x


def make(settings, denoise=scale, **options):
    return consistency.make(settings, denoise, optax.identity(), lambda iteration: jnp.float32(0.1), **options)


def step(settings, denoise=scale, params=None, iteration=0, frozen=None, **options):
    method = make(settings, denoise, **options)
    state = method.init({"a": jnp.float32(0.7)} if params is None else params)
    frozen = consistency.Frozen() if frozen is None else frozen
    return jax.jit(method.step)(state, frozen, BATCH, jax.random.key(5), jnp.int32(iteration))


# Curriculum ------------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_the_curriculum_of_2023():
    """Spec check 9: N along 800,000 steps, and the released mu."""
    found = [consistency.schedule(CIFAR, jnp.int32(k)) for k in (0, 1000, 100_000, 400_000, 800_000)]
    assert [int(scales.num) for scales in found] == [2, 6, 54, 107, 151]
    assert float(found[0].decay) == pytest.approx(0.81, rel=1e-6)
    assert float(found[-1].decay) == pytest.approx(0.998596, abs=1e-6)


def test_the_other_curricula():
    found = [int(consistency.schedule(ICT, jnp.int32(k)).num) for k in (0, 49_999, 50_000, 100_000, 350_000, 400_000)]
    assert found == [11, 11, 21, 41, 1281, 1281]
    assert float(consistency.schedule(ICT, jnp.int32(7)).decay) == 0
    fixed = consistency.Settings(total_steps=10, curriculum="fixed", last_scale=120, mu=0.99)
    scales = consistency.schedule(fixed, jnp.int32(3))
    assert int(scales.num) == 120 and float(scales.decay) == pytest.approx(0.99)


@pytest.mark.parametrize("num", [2, 11, 151])
def test_levels_are_neighbours_on_the_grid(num):
    draw = jax.jit(lambda key, num: consistency.draw_levels(CIFAR, key, 4096, num))
    high, low = (np.asarray(part, np.float64) for part in draw(jax.random.key(0), jnp.int32(num)))
    ramp = (80 ** (1 / 7) + np.arange(num) / (num - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    index = np.argmin(np.abs(np.log(ramp)[None] - np.log(high)[:, None]), axis=1)
    np.testing.assert_allclose(high, ramp[index], rtol=1e-5)  # float32 powers
    np.testing.assert_allclose(low, ramp[index + 1], rtol=1e-5)
    assert np.min(low) == np.float32(0.002) and np.max(high) == pytest.approx(80, rel=1e-5)
    counts = np.bincount(index, minlength=num - 1)
    assert num == 2 or stats.chisquare(counts).pvalue > 1e-3


def test_ict_draws_small_levels_as_often_as_the_lognormal():
    """Shares by scipy's normal distribution, at a number of levels below the largest; they sum to 1."""
    num = 41
    shares = np.asarray(jax.jit(lambda num: consistency._lognormal_shares(ICT, num))(jnp.int32(num)))
    ramp = (80 ** (1 / 7) + np.arange(num) / (num - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    cumulative = stats.norm(-1.1, 2).cdf(np.log(ramp))
    expected = -np.diff(cumulative) / (cumulative[0] - cumulative[-1])
    np.testing.assert_allclose(shares[: num - 1], expected, rtol=1e-3, atol=1e-6)  # differences of float32 erf
    assert np.all(shares[num - 1 :] == 0) and shares.sum() == pytest.approx(1, rel=1e-5)
    high, low = consistency.draw_levels(ICT, jax.random.key(1), 1 << 15, jnp.int32(num))
    assert np.all(np.asarray(high) > np.asarray(low))
    index = np.argmin(np.abs(np.log(ramp)[None] - np.log(np.asarray(high))[:, None]), axis=1)
    counts = np.bincount(index, minlength=num - 1)
    kept = expected * len(index) > 5
    total = counts[kept].sum()
    assert stats.chisquare(counts[kept], expected[kept] / expected[kept].sum() * total).pvalue > 1e-3


# The step --------------------------------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize("assign", ["none", "linear"])
def test_a_step_by_hand(assign):
    """Both calls have the same noise: with f = a x the difference is a (t_i - t_{i+1}) z, target included."""
    settings = consistency.Settings(total_steps=1000, assign=assign)
    state, metrics = step(settings, iteration=300)
    _, level_key, noise_key, *_ = jax.random.split(jax.random.key(5), 5)
    noise = pair.pair(noise_key, BATCH["image"], assign)[0] if assign == "linear" else jax.random.normal(
        noise_key, BATCH["image"].shape
    )  # fmt: skip
    num, decay = consistency.schedule(settings, jnp.int32(300))
    high, low = (t[:, None, None, None] for t in consistency.draw_levels(settings, level_key, NUM, num))
    image, known = BATCH["image"], 0.7 * (BATCH["image"] + low * noise)
    loss = lambda a: jnp.mean((a * (image + high * noise) - known) ** 2)  # noqa: E731
    assert float(metrics["loss"]) == pytest.approx(float(loss(0.7)), rel=1e-5)  # float32 sums
    moved = 0.7 - 0.1 * float(jax.grad(loss)(0.7))
    assert float(state.params["a"]) == pytest.approx(moved, rel=1e-4)
    assert float(state.target["a"]) == pytest.approx(float(decay) * 0.7 + (1 - float(decay)) * moved, rel=1e-4)
    assert (metrics["levels"], metrics["nonfinite_leaf"]) == (int(num), -1)
    assert ("assign_reduction" in metrics) == (assign == "linear")


def test_improved_training_by_hand():
    """No average, pseudo-Huber over all pixels, divided by the gap."""
    settings = consistency.Settings(**{**vars(ICT), "total_steps": 1000})
    state, metrics = step(settings)
    _, level_key, noise_key, *_ = jax.random.split(jax.random.key(5), 5)
    noise = jax.random.normal(noise_key, BATCH["image"].shape)
    high, low = consistency.draw_levels(settings, level_key, NUM, jnp.int32(11))
    high, low, noise = (np.asarray(part, np.float64) for part in (high, low, noise))
    difference = 0.7 * (high - low)[:, None, None, None] * noise
    c = 0.00054 * np.sqrt(32)
    huber = np.sqrt(np.sum(np.square(difference), axis=(1, 2, 3)) + c**2) - c
    assert float(metrics["loss"]) == pytest.approx(float(np.mean(huber / (high - low))), rel=1e-5)  # float32 sums
    assert state.target == {} and metrics["target_decay"] == 0


def test_a_constant_function_has_no_loss_and_dropout_is_shared():
    """Spec check 9; and a network whose dropout alone decides agrees with itself."""
    constant = lambda params, x, sigma, cond=None, key=None: jnp.zeros_like(x) + params["a"]  # noqa: E731
    dropped = lambda params, x, sigma, cond=None, key=None: jax.random.normal(key, x.shape) * params["a"]  # noqa: E731
    for denoise in (constant, dropped):
        _, metrics = step(CIFAR, denoise, iteration=5)
        assert metrics["loss"] < 1e-12  # float32 rounding of the draws, squared


def test_the_end_of_the_trajectory_is_kept():
    """Spec check 9: f(x, 0.002) = x to 1e-6, whatever the network; and EDM's coefficients far above it."""
    network = lambda params, x, label, cond, key: 5 * jnp.cos(7 * x) + label[:, None, None, None]  # noqa: E731
    f = prediction.consistency_function(network)
    x = BATCH["image"]
    np.testing.assert_allclose(f({}, x, jnp.full(NUM, 0.002)), x, atol=1e-6)
    far = prediction.edm_denoiser(network)({}, 80 * x, jnp.full(NUM, 80.0))
    np.testing.assert_allclose(f({}, 80 * x, jnp.full(NUM, 80.0)), far, rtol=1e-3, atol=1e-3)  # 0.002 / 80


# Distillation ----------------------------------------------------------------------------------------------------


def test_the_exact_trajectory_has_the_loss_of_the_solver():
    """A Gaussian's ODE is known: f = its solution at sigma_min. Heun's error falls as the cube of the step, so that
    from 40 to 80 levels the square of the mismatch falls by more than 2^4, and noise alone (training) leaves more."""
    params = {"mean": jnp.float32(0.1), "std": jnp.float32(0.5)}
    exact = lambda params, x, sigma, cond=None, key=None: gaussian.gaussian_solution(  # noqa: E731
        params, x, sigma, jnp.full(x.shape[:1], 0.002)
    )
    losses = {}
    for num in (40, 80):
        settings = consistency.Settings(total_steps=1, curriculum="fixed", last_scale=num, mu=0.5)
        options = {"teacher_denoise": gaussian.gaussian_denoiser}
        frozen = consistency.Frozen(params)
        losses[num] = float(step(settings, exact, params, frozen=frozen, **options)[1]["loss"])
        losses[f"training {num}"] = float(step(settings, exact, params)[1]["loss"])
    assert losses[80] < losses[40] / 2**4 and losses[80] < losses["training 80"] / 100


def test_training_finds_the_map_of_a_gaussian():
    """Data N(0, 0.5^2) per pixel. With f of the right form, one gain for each level is to be learned: at 80 the best
    is std / sqrt(std^2 + 80^2), at which samples have the data's spread."""
    settings = consistency.Settings(total_steps=600, last_scale=20, mu=0.5)

    def denoise(params, x, sigma, cond=None, key=None):
        features = jnp.stack([jnp.log(sigma) ** i / 4.0**i for i in range(5)], axis=1)
        network = lambda params, x, *_: x * (features @ params["w"])[:, None, None, None]  # noqa: E731
        return prediction.consistency_function(network)(params, x, sigma)

    method = consistency.make(settings, denoise, optax.scale_by_adam(), lambda iteration: jnp.float32(0.05))

    @functools.partial(jax.jit, donate_argnums=0)
    def run(state):
        def body(state, iteration):
            image = 0.5 * jax.random.normal(jax.random.fold_in(jax.random.key(2), iteration), (256, *SHAPE))
            key = jax.random.fold_in(jax.random.key(3), iteration)
            return method.step(state, consistency.Frozen(), {"image": image}, key, iteration)

        return jax.lax.scan(body, state, jnp.arange(600))

    state, _ = run(method.init({"w": jnp.zeros(5)}))
    start = 80 * jax.random.normal(jax.random.key(4), (512, *SHAPE))
    spread = lambda params: float(jnp.std(denoise(params, start, jnp.full(512, 80.0))))  # noqa: E731
    assert spread(state.params) == pytest.approx(0.5, abs=0.12)  # the gain is a polynomial of degree 4 in log sigma
    assert spread({"w": jnp.zeros(5)}) < 0.01


# Refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"curriculum": "doubled"}, "unknown curriculum 'doubled'; did you mean 'double'"),
        ({"metric": "lpips"}, "unknown metric 'lpips'"),
        ({"metric": "perceptual"}, "go together: set both, or none"),
        ({"levels": "normal"}, "unknown levels 'normal'; did you mean 'lognormal'"),
        ({"first_scale": 1}, "expected 1 < first_scale <= last_scale, found 1, 150"),
        ({"total_steps": 0}, "total_steps must be positive"),
        ({"mu": 1.0}, "mu in .0, 1., found 800000, 1.0"),
        ({"sigma_min": 0.0}, "expected 0 < sigma_min < sigma_max, found 0.0, 80.0"),
        ({"assign": "linea"}, "the assignment must be one of"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make(consistency.Settings(**{"total_steps": 800_000, **changes}))
