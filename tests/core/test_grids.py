"""Grids against published numbers, and what every grid must satisfy."""

import numpy as np
import pytest

from diffjax.core import grids


def discrete_maps(beta_start, beta_end):
    """sigma <-> time of a network trained on 1000 levels, straight from its definition: interpolate log alpha in
    tau = k / 1000, k = 1..1000, and go on linearly outside."""
    alpha_bar = np.cumprod(1 - np.linspace(beta_start**0.5, beta_end**0.5, 1000) ** 2)
    tau, log_alpha = np.arange(1, 1001) / 1000, 0.5 * np.log(alpha_bar)

    def interpolate(x, xs, ys):
        at = np.clip(np.searchsorted(xs, x) - 1, 0, len(xs) - 2)
        return ys[at] + (x - xs[at]) * (ys[at + 1] - ys[at]) / (xs[at + 1] - xs[at])

    def sigma_to_time(sigma):
        return interpolate(-0.5 * np.log1p(sigma**2), log_alpha[::-1], tau[::-1])

    def time_to_sigma(time):
        return np.sqrt(np.expm1(-2 * interpolate(time, tau, log_alpha)))

    return {"sigma_to_time": sigma_to_time, "time_to_sigma": time_to_sigma}


STABLE_DIFFUSION, LSUN = (0.00085, 0.0120), (0.0015, 0.0195)

# Zhou 2024, grids of the published students; printed to six digits.
PUBLISHED = [
    (3, 0.006, [80, 3.10712, 0.006]),
    (4, 0.006, [80, 10.9293, 0.669886, 0.006]),
    (5, 0.006, [80, 19.0034, 3.10712, 0.268292, 0.006]),
    (6, 0.006, [80, 25.9633, 6.78769, 1.28913, 0.145405, 0.006]),
    (7, 0.006, [80, 31.7298, 10.9293, 3.10712, 0.669886, 0.093615, 0.006]),
    (4, 0.002, [80, 9.7232, 0.469979, 0.002]),
]


@pytest.mark.fast
@pytest.mark.parametrize("num, sigma_min, expected", PUBLISHED)
def test_polynomial_matches_the_published_grids(num, sigma_min, expected):
    # 5.1e-6: half a unit of the sixth digit, relative to a leading digit of 1
    np.testing.assert_allclose(grids.make_grid("polynomial", num, sigma_min, 80.0), expected, rtol=5.1e-6)


@pytest.mark.parametrize(
    "betas, num, sigma_min, expected",
    [
        (STABLE_DIFFUSION, 5, 0.1, [14.6146, 4.13155, 1.64383, 0.715497, 0.1]),
        (LSUN, 4, 0.006, [83.8225, 6.46032, 1.37427, 0.006]),
    ],
)
def test_discrete_matches_the_published_grids(betas, num, sigma_min, expected):
    maps = discrete_maps(*betas)
    sigma_max = float(maps["time_to_sigma"](1.0))
    sigmas = grids.make_grid("discrete", num, sigma_min, sigma_max, **maps)
    np.testing.assert_allclose(sigmas, expected, rtol=5.1e-6)


def test_discrete_is_uniform_in_the_time_of_the_network():
    maps = discrete_maps(*STABLE_DIFFUSION)
    sigmas = grids.discrete(5, 0.1, float(maps["time_to_sigma"](1.0)), **maps)
    times = 1000 * maps["sigma_to_time"](sigmas) - 1
    # published to three decimals
    np.testing.assert_allclose(times[:4], [999, 751.843, 504.686, 257.529], atol=5.1e-4)


ALL = [
    ("polynomial", {"rho": 7.0}),
    ("polynomial", {"rho": 3.0}),
    ("logsnr", {}),
    ("time_uniform", {"rho": 1.0}),
    ("time_uniform", {"rho": 2.0}),
    ("discrete", discrete_maps(*STABLE_DIFFUSION)),
]


@pytest.mark.parametrize("name, options", ALL)
@pytest.mark.parametrize("steps_within", [2, 4])
def test_a_finer_grid_contains_the_coarser_one(name, options, steps_within):
    low, high = 0.1, float(discrete_maps(*STABLE_DIFFUSION)["time_to_sigma"](1.0))
    coarse = grids.make_grid(name, 6, low, high, **options)
    fine = grids.make_grid(name, 5 * steps_within + 1, low, high, **options)
    # both are float64 formulas of the same numbers i/(N-1), up to their rounding
    np.testing.assert_allclose(fine[::steps_within], coarse, rtol=1e-12)


    grids.check_nested(coarse, fine, steps_within)


def test_a_grid_that_does_not_nest_is_refused():
    coarse = grids.polynomial(3, 0.1, 1.0)
    fine = grids.polynomial(5, 0.1, 1.0)
    fine[2] *= 1 + 1e-9
    message = "noise level 2 i of the fine grid must be level i .* difference of 1.0e-09: the maps"
    with pytest.raises(ValueError, match=message):
        grids.check_nested(coarse, fine, 2)


@pytest.mark.parametrize("name, options", ALL)
def test_grids_decrease_between_exact_ends_in_float64(name, options):
    low, high = 0.1, float(discrete_maps(*STABLE_DIFFUSION)["time_to_sigma"](1.0))
    sigmas = grids.make_grid(name, 9, low, high, **options)
    assert sigmas.dtype == np.float64 and sigmas.shape == (9,)
    assert sigmas[0] == high and sigmas[-1] == low
    assert np.all(np.diff(sigmas) < 0)


def test_logsnr_is_geometric():
    sigmas = grids.logsnr(7, 0.006, 80.0)
    # rounding of float64 only
    np.testing.assert_allclose(np.diff(np.log(sigmas)), np.log(0.006 / 80) / 6, rtol=1e-12)


def test_the_vp_process_of_time_uniform():
    process = grids.vp_time(0.002, 80.0)
    tau = np.linspace(grids.VP_EPSILON, 1, 50)
    # 1e-9: inverting log(1 + sigma^2) near sigma = 0.002 amplifies rounding by 1 / sigma^2
    np.testing.assert_allclose(process.time(process.sigma(tau)), tau, rtol=1e-9)
    assert process.sigma(np.array(grids.VP_EPSILON)) == pytest.approx(0.002, rel=1e-9)
    assert process.sigma(np.array(1.0)) == pytest.approx(80.0, rel=1e-12)
    sigmas = grids.time_uniform(6, 0.002, 80.0, rho=2.0)
    np.testing.assert_allclose(np.diff(np.sqrt(process.time(sigmas)), 2), 0, atol=1e-9)
    step = 1e-6  # a central difference is good to the square of its step, and to rounding / step
    slope = (process.sigma(tau[1:-1] + step) - process.sigma(tau[1:-1] - step)) / (2 * step)
    np.testing.assert_allclose(process.slope(tau[1:-1]), slope, rtol=1e-7)


def test_append_zero():
    np.testing.assert_array_equal(grids.append_zero(np.array([2.0, 1.0])), [2.0, 1.0, 0.0])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("polynomail", 4, 0.1, 1.0), "did you mean 'polynomial'"),
        (("polynomial", 1, 0.1, 1.0), "at least 2 noise levels"),
        (("logsnr", 4, 0.0, 1.0), "append_zero"),
        (("polynomial", 4, 2.0, 1.0), "sigma_min < sigma_max"),
        (("polynomial", 4, -1.0, 1.0), "sigma_min < sigma_max"),
        (("time_uniform", 4, 0.1, np.inf), "sigma_min < sigma_max"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        grids.make_grid(*arguments)


def test_bad_rho():
    with pytest.raises(ValueError, match="rho must be positive"):
        grids.polynomial(4, 0.1, 1.0, rho=0.0)
