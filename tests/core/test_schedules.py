"""Noise processes: one consistent set of maps each, the trained tables of latent diffusion, JAX against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import grids, schedules

SD = schedules.Discrete(schedules.scaled_linear(0.00085, 0.0120))
LSUN = schedules.Discrete(schedules.scaled_linear(0.0015, 0.0195))
ALL = {
    "vp": schedules.VP(),
    "cosine": schedules.Cosine(),
    "ve": schedules.VE(),
    "edm": schedules.EDM(),
    "flow": schedules.Flow(),
    "discrete": SD,
    "shifted_cosine": schedules.Shifted(schedules.Cosine(), 4.0),
    "shifted_flow": schedules.Shifted(schedules.Flow(), 3.0),
    "rescaled_discrete": schedules.rescaled(SD, 2.0),
}
PRESERVING = ("vp", "cosine", "discrete", "shifted_cosine", "rescaled_discrete")
TIMES = np.linspace(0.01, 0.99, 50)


@pytest.mark.fast
@pytest.mark.parametrize("name", ALL)
def test_the_maps_of_a_process_agree(name):
    schedule = ALL[name]
    alpha, sigma, level = schedule.alpha(TIMES), schedule.sigma(TIMES), schedule.level(TIMES)
    assert alpha.dtype == sigma.dtype == level.dtype == np.float64
    # float64 rounding, at most a few hundred times amplified (tan near pi/2, tables read between knots)
    np.testing.assert_allclose(sigma / alpha, level, rtol=1e-12)
    np.testing.assert_allclose(schedule.time(level), TIMES, rtol=1e-12)
    np.testing.assert_allclose(schedule.scale(level), alpha, rtol=1e-12)
    np.testing.assert_allclose(schedules.logsnr(schedule, TIMES), 2 * np.log(alpha / sigma), rtol=0, atol=1e-11)
    assert np.all(np.diff(level) > 0)
    if name in PRESERVING:
        np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-14)


@pytest.mark.parametrize("name", ALL)
def test_float32_in_jax_follows_float64(name):
    schedule = ALL[name]
    u = jnp.asarray(TIMES, jnp.float32).reshape(5, 10)
    exact = np.asarray(u, np.float64)
    level = jnp.asarray(schedule.level(exact), jnp.float32)
    for method, x in (("alpha", u), ("sigma", u), ("level", u), ("time", level), ("scale", level)):
        found = jax.jit(getattr(schedule, method))(x)
        assert found.dtype == jnp.float32 and found.shape == x.shape
        # float32 has 6e-8; tan and exp(10 u) near their ends multiply the rounding of the argument by up to 20
        np.testing.assert_allclose(found, getattr(schedule, method)(np.asarray(x, np.float64)), rtol=3e-6)
    found = jax.jit(lambda u: schedules.logsnr(schedule, u))(u)
    np.testing.assert_allclose(found, schedules.logsnr(schedule, exact), rtol=1e-5, atol=1e-5)


def test_process_gives_the_factors_and_the_label():
    sigma = jnp.asarray([0.006, 0.5, 80.0], jnp.float32)
    alpha, sigma_t, label = schedules.process(LSUN, LSUN.label)(sigma)
    np.testing.assert_allclose(sigma_t / alpha, sigma, rtol=2e-7)  # one float32 rounding each
    # float32: the index is of order 1000, so 1e-4 absolute
    np.testing.assert_allclose(label, LSUN.label(LSUN.time(np.float64(sigma))), rtol=0, atol=1e-4)
    np.testing.assert_allclose(schedules.process(schedules.Flow())(sigma)[2], sigma / (1 + sigma), rtol=2e-7)


def test_vp_integrates_its_rate():
    schedule = schedules.VP(beta_d=19.9, beta_min=0.1)
    u = np.linspace(0, 0.7, 20001)
    beta = 0.1 + 19.9 * u
    integral = np.sum((beta[1:] + beta[:-1]) / 2 * np.diff(u))  # exact for a straight line
    np.testing.assert_allclose(schedule.alpha(0.7), np.exp(-integral / 2), rtol=1e-10)


def test_vp_time_keeps_its_digits_at_small_levels():
    level = np.float32(1e-3)
    found = schedules.VP().time(jnp.asarray(level))
    # the usual form of the root subtracts 0.1 from 0.1001 here and loses three digits of float32
    np.testing.assert_allclose(found, schedules.VP().time(np.float64(level)), rtol=5e-7)


def test_published_ends_of_latent_diffusion():
    # to the digits of the reference
    np.testing.assert_allclose(SD.level(1e-3), 0.0291672, atol=5e-8)
    np.testing.assert_allclose(SD.level(1.0), 14.6146412, atol=5e-8)
    np.testing.assert_allclose(SD.time(0.1), 0.0113717, atol=5e-8)
    np.testing.assert_allclose(LSUN.level(1e-3), 0.0387589, atol=5e-8)
    np.testing.assert_allclose(LSUN.level(1.0), 83.8224945, atol=5e-8)
    np.testing.assert_allclose(LSUN.time(0.006), 2.90567e-5, atol=5e-11)
    np.testing.assert_allclose(LSUN.label(LSUN.time(0.006)), -0.97, atol=1e-2)


@pytest.mark.parametrize(
    ("schedule", "sigma_min", "sigmas", "labels"),
    [
        (SD, 0.1, [14.6146, 4.13155, 1.64383, 0.715497, 0.1], [999, 751.843, 504.686, 257.529]),
        (LSUN, 0.006, [83.8225, 6.46032, 1.37427, 0.006], [999, 665.676, 332.353]),
    ],
)
def test_published_discrete_grids(schedule, sigma_min, sigmas, labels):
    sigma_max = float(schedule.level(1.0))
    maps = {"sigma_to_time": schedule.time, "time_to_sigma": schedule.level}
    found = grids.discrete(len(sigmas), sigma_min, sigma_max, **maps)
    np.testing.assert_allclose(found, sigmas, rtol=5e-6)  # six digits are published
    np.testing.assert_allclose(schedule.label(schedule.time(found))[: len(labels)], labels, rtol=2e-6)


def test_a_table_is_exact_at_its_knots_and_linear_between():
    u = np.arange(1, 1001) / 1000
    np.testing.assert_allclose(SD.alpha(u) ** 2, SD.alpha_bar, rtol=1e-12)
    np.testing.assert_allclose(SD.label(SD.time(SD.level(u))), np.arange(1000), rtol=0, atol=1e-10)
    inside = np.linspace(u[0], u[-1], 777)
    np.testing.assert_allclose(np.log(SD.alpha(inside)), np.interp(inside, u, np.log(SD.alpha_bar) / 2), rtol=1e-11)


def test_a_table_goes_on_linearly_outside():
    log_alpha = np.log(SD.alpha_bar) / 2
    below = log_alpha[0] - 0.4 * (log_alpha[1] - log_alpha[0])
    above = log_alpha[-1] + 2.5 * (log_alpha[-1] - log_alpha[-2])
    np.testing.assert_allclose(np.log(SD.alpha([0.6e-3, 1.0025])), [below, above], rtol=1e-11)
    level = SD.level([0.6e-3, 1.0025])
    np.testing.assert_allclose(SD.time(level), [0.6e-3, 1.0025], rtol=1e-11)


@pytest.mark.parametrize("table", [[0.9], [0.9, 0.95], [1.0, 0.5], [0.5, 0.0], [[0.9, 0.8]], [0.9, np.nan]])
def test_a_bad_table_is_refused(table):
    with pytest.raises(ValueError, match=r"alpha_bar must be at least 2 decreasing numbers inside \(0, 1\), found"):
        schedules.Discrete(np.asarray(table))


def test_tables():
    beta = 1e-4 + (0.02 - 1e-4) * np.arange(1000) / 999
    np.testing.assert_allclose(schedules.linear(), [np.prod(1 - beta[: k + 1]) for k in range(1000)], rtol=1e-12)
    np.testing.assert_allclose(schedules.linear()[-1], 4.036e-5, rtol=1e-4)  # the published end of DDPM's schedule
    root = np.sqrt(0.0015) + (np.sqrt(0.0195) - np.sqrt(0.0015)) * np.arange(1000) / 999
    np.testing.assert_allclose(LSUN.alpha_bar[500], np.prod(1 - root[:501] ** 2), rtol=1e-12)
    wave = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(schedules.cosine()[:900], wave[1:901] / wave[0], rtol=1e-10)
    assert schedules.cosine()[-1] > 0  # the last beta would be 1 without its cut


def test_a_shift_moves_logsnr_and_is_the_time_shift_of_flows():
    base = schedules.Cosine()
    shifted = schedules.Shifted(base, 4.0)
    difference = schedules.logsnr(shifted, TIMES) - schedules.logsnr(base, TIMES)
    np.testing.assert_allclose(difference, -2 * np.log(4.0), rtol=1e-10)
    # Esser 2024: t' = a t / (1 + (a - 1) t)
    flow = schedules.Shifted(schedules.Flow(), 3.0)
    np.testing.assert_allclose(flow.sigma(TIMES), 3 * TIMES / (1 + 2 * TIMES), rtol=1e-13)


# Other resolutions ---------------------------------------------------------------------------------------------

# alpha_bar at the indices 0, 250, 500, 750, 999 and at twice the size, to the digits that are known
KNOWN = {
    "linear": ([0.9999, 0.5214230306, 0.0777966584, 0.0033001584, 4.03583e-5],
               [0.99960012, 0.2140725106, 0.0206542907, 0.0008270867, 1.00899e-5]),
    "scaled_linear": ([0.99915, 0.6737926252, 0.2763326838, 0.0561698480, 0.0046600985],
                      [0.9966086479, 0.3405362838, 0.0871436500, 0.0146600517, 0.0011691108]),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_tables_at_twice_the_size(name):
    before, after = schedules.table(name), schedules.table(name, 2.0)
    index = [0, 250, 500, 750, 999]
    np.testing.assert_allclose(before.alpha_bar[index], KNOWN[name][0], rtol=0, atol=1e-9)
    # but for the value printed with eight digits, 0.99960012
    np.testing.assert_allclose(after.alpha_bar[index], KNOWN[name][1], rtol=0, atol=4e-9 if name == "linear" else 1e-9)
    last = {"linear": 157.40728081, "scaled_linear": 14.61464123}[name]
    np.testing.assert_allclose([before.level(1.0), after.level(1.0)], [last, 2 * last], rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", schedules.PROCESSES)
def test_a_scale_lowers_logsnr_everywhere_and_scales_multiply(name):
    base = schedules.named(name)
    u = np.arange(1, 1001) / 1000 if isinstance(base, schedules.Discrete) else TIMES
    for scale, shift in ((2.0, -1.38629436112), (0.5, 1.38629436112), (3.0, -2 * np.log(3))):
        found = schedules.rescaled(base, scale)
        assert isinstance(found, schedules.Discrete) == isinstance(base, schedules.Discrete)
        # float64; alpha_bar near 1 leaves 1 - alpha_bar twelve digits
        np.testing.assert_allclose(schedules.logsnr(found, u) - schedules.logsnr(base, u), shift, rtol=0, atol=1e-10)
        np.testing.assert_allclose(found.time(scale * base.level(u)), u, rtol=1e-10)  # a level's time is kept
    twice, once = schedules.rescaled(schedules.rescaled(base, 2.0), 1.5), schedules.rescaled(base, 3.0)
    np.testing.assert_allclose(twice.level(u), once.level(u), rtol=1e-11)
    assert schedules.rescaled(base, 1.0) is base


def test_flows_at_twice_the_size():
    """t' = 2 t / (1 + t), and the release of Stable Diffusion 3 is the flow at three times the size."""
    sigma = np.array([0.25, 0.5, 0.75])
    np.testing.assert_allclose(schedules.named("flow", 2.0).sigma(sigma), [0.4, 2 / 3, 6 / 7], rtol=1e-14)
    tripled, release = schedules.named("flow", 3.0), schedules.named("sd3")
    np.testing.assert_allclose(tripled.sigma(TIMES), release.sigma(TIMES), rtol=1e-14)


def test_the_mean_of_four_pixels_has_a_quarter_of_the_variance():
    """What the scale makes up for. 2e5 draws know a variance to sqrt(2 / 2e5) = 0.3 %, three times that is allowed."""
    for scale in (2, 3):
        means = np.random.default_rng(0).normal(size=(200_000, scale**2)).mean(axis=1)
        np.testing.assert_allclose(scale**2 * means.var(), 1, rtol=0.01)


@pytest.mark.parametrize("scale", [0, -2.0, np.inf, np.nan])
def test_a_bad_scale_is_refused(scale):
    with pytest.raises(ValueError, match=f"found resolution_scale={scale}, expected above 0"):
        schedules.rescaled(schedules.Flow(), scale)
