"""Coefficients of the solvers: what each step integrates exactly, the published slips, identities, bad input."""

import re

import jax
import numpy as np
import pytest
from scipy import integrate

from diffjax.core import grids, multistep, solvers

GRID = grids.polynomial(9, 0.006, 80.0)
MULTISTEP = ["ipndm", "ipndm_v", "deis", "dpmpp", "dpmpp_noise", "unipc"]
ALL = ["euler", "heun", "dpm2s", "edm_stochastic", *MULTISTEP]


def last_history(table, t, step, values):
    """x_{i+1} of equation (1) of `multistep` for x_i = 0, with the history given as a function of the level."""
    past = t[step - np.arange(table.b.shape[1])]
    return table.b[step] @ values(past)


# Orders ---------------------------------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize(
    "num, expected",
    [(3, [1, 2]), (4, [1, 2, 1]), (5, [1, 2, 2, 1]), (6, [1, 2, 3, 2, 1]), (13, [1, 2] + [3] * 8 + [2, 1])],
)
def test_orders_with_lower_order_final(num, expected):
    assert multistep.orders(num - 1, 3, lower_order_final=True).tolist() == expected


def test_orders_without_lower_order_final():
    assert multistep.orders(5, 3).tolist() == [1, 2, 3, 3, 3]


# Local exactness ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ipndm_v_integrates_polynomials_in_sigma(order):
    table = multistep.ipndm_v(GRID, order)
    for degree in range(order):
        found = last_history(table, GRID, 6, lambda t, p=degree: t**p)
        exact = (GRID[7] ** (degree + 1) - GRID[6] ** (degree + 1)) / (degree + 1)
        assert found == pytest.approx(exact, rel=1e-10)  # a 4x4 system in float64


@pytest.mark.parametrize("order", [2, 3, 4])
def test_deis_integrates_polynomials_in_time(order):
    process = grids.vp_time(GRID[-1], GRID[0])
    table = multistep.deis(GRID, order)
    for step in (order - 1, len(GRID) - 2):
        for degree in range(order):
            found = last_history(table, GRID, step, lambda t, p=degree: process.time(t) ** p)
            start, stop = process.time(GRID[step]), process.time(GRID[step + 1])
            exact, _ = integrate.quad(
                lambda tau, p=degree: tau**p * process.slope(np.array(tau)), start, stop, epsabs=0, epsrel=1e-12
            )
            # 1e-9: the Gauss rule in the last step, where sigma(tau) comes near its square root at 0
            assert found == pytest.approx(exact, rel=1e-9)


def exact_step(t, step, form, power):
    """The step from x_i = 0 for m = (lambda - lambda_i)^power: variation of constants, by quadrature."""
    start, stop = -np.log(t[step]), -np.log(t[step + 1])
    if form == "data":
        value, _ = integrate.quad(lambda u: np.exp(u) * (u - start) ** power, start, stop, epsabs=0, epsrel=1e-12)
        return t[step + 1] * value
    value, _ = integrate.quad(lambda u: np.exp(-u) * (u - start) ** power, start, stop, epsabs=0, epsrel=1e-12)
    return -value


@pytest.mark.parametrize("form", ["data", "noise"])
@pytest.mark.parametrize("parity", [False, True])
def test_dpmpp_third_order_is_exact_to_its_degree(form, parity):
    table = multistep.dpmpp(GRID, 3, form, lower_order_final=False, parity=parity)
    step = 5
    for power in range(3):
        found = last_history(table, GRID, step, lambda t, p=power: (np.log(GRID[step]) - np.log(t)) ** p)
        exact = exact_step(GRID, step, form, power)
        if parity and power == 2:  # the released D2 is half of what a quadratic needs
            assert abs(found / exact - 1) > 0.01
        else:
            assert found == pytest.approx(exact, rel=1e-10)  # quadrature and rounding


@pytest.mark.parametrize("form", ["data", "noise"])
def test_dpmpp_second_order_is_exact_for_constants(form):
    table = multistep.dpmpp(GRID, 2, form, lower_order_final=False)
    assert last_history(table, GRID, 5, np.ones_like) == pytest.approx(exact_step(GRID, 5, form, 0), rel=1e-12)


@pytest.mark.parametrize("form", ["data", "noise"])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_unipc_is_exact_to_its_degree(form, variant):
    """The order-3 predictor integrates quadratics in lambda, the corrector with its new value cubics."""
    plan = solvers.make_plan("unipc", GRID, form=form, variant=variant, lower_order_final=False)
    step = 5
    new_first = GRID[step + 1 - np.arange(4)]  # m_{i+1} (of the prediction), m_i, m_{i-1}, m_{i-2}
    for power in range(4):
        exact = exact_step(GRID, step, form, power)
        polynomial = lambda t, p=power: (np.log(GRID[step]) - np.log(t)) ** p  # noqa: E731
        if power < 3:
            # with the corrected x_i = 0: the prediction is what `advance` adds to its multiple of `keep`
            scale = plan.advance[step, 0] / plan.keep[step, 0]
            weights = (plan.advance[step] - scale * plan.keep[step])[2:5]
            assert weights @ polynomial(new_first[1:]) == pytest.approx(exact, rel=1e-9)  # 3x3 systems in float64
        assert plan.keep[step + 1, 2:] @ polynomial(new_first) == pytest.approx(exact, rel=1e-9)


# Identities and parity ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["data", "noise"])
def test_dpmpp_of_order_one_is_euler(form):
    euler = solvers.make_plan("euler", GRID)
    plan = solvers.make_plan("dpmpp", GRID, order=1, form=form)
    if form == "noise":
        np.testing.assert_allclose(plan.advance, euler.advance, rtol=1e-12)  # t' (t/t' - 1) against t - t'
    else:  # x + h (x - D) / t as weights of x and D
        ratio = GRID[1:] / GRID[:-1]
        np.testing.assert_allclose(plan.advance[:, 1:], np.stack([ratio, 1 - ratio], axis=1), rtol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_on_a_uniform_grid_both_ipndm_are_adams_bashforth(order):
    uniform = np.linspace(9.0, 1.0, 9)
    constant, variable = multistep.ipndm(uniform, order), multistep.ipndm_v(uniform, order)
    np.testing.assert_allclose(variable.b, constant.b, rtol=1e-12, atol=1e-12)  # 4x4 systems of small integers
    np.testing.assert_allclose(constant.b.sum(axis=1), np.diff(uniform), rtol=1e-12)


def test_the_released_ipndm_v_weights():
    uniform = np.linspace(9.0, 1.0, 9)
    released = multistep.ipndm_v(uniform, 4, parity=True).b[-1] / -1.0
    np.testing.assert_allclose(released, np.array([57, -65, 43, -11]) / 24, rtol=1e-12)  # as published
    for order in (1, 2):
        np.testing.assert_allclose(
            multistep.ipndm_v(GRID, order, parity=True).b, multistep.ipndm_v(GRID, order).b, rtol=1e-10
        )
    third = multistep.ipndm_v(GRID, 3, parity=True).b[4]
    h = np.diff(GRID)[4]
    assert third.sum() == pytest.approx(h, rel=1e-12)  # consistent, but of order 2:
    assert abs(third @ GRID[[4, 3, 2]] / ((GRID[5] ** 2 - GRID[4] ** 2) / 2) - 1) < 1e-10
    assert abs(third @ GRID[[4, 3, 2]] ** 2 / ((GRID[5] ** 3 - GRID[4] ** 3) / 3) - 1) > 1e-3


def test_the_released_deis_differs_by_its_limits_and_its_sum():
    sigmas = grids.time_uniform(8, 0.002, 80.0, rho=2.0)
    right, released = multistep.deis(sigmas, 4), multistep.deis(sigmas, 4, parity=True)
    # with the hard-wired limits as the limits only the sum of 10 000 points is left, good to about 1e-3
    np.testing.assert_allclose(released.b, right.b, rtol=5e-3)
    assert not np.allclose(released.b, right.b, rtol=1e-9)
    other = grids.time_uniform(8, 0.05, 20.0, rho=2.0)
    assert not np.allclose(multistep.deis(other, 4, parity=True).b, multistep.deis(other, 4).b, rtol=1e-2)


@pytest.mark.parametrize("name, order", [("dpmpp", 3), ("dpmpp_noise", 3), ("ipndm_v", 3), ("deis", 3)])
def test_parity_changes_the_coefficients(name, order):
    right, released = (solvers.make_plan(name, GRID, order=order, parity=p) for p in (False, True))
    assert not np.allclose(right.advance, released.advance, rtol=1e-6)


@pytest.mark.parametrize("churn", [0.0, 3.0, 1e3])
def test_edm_stochastic_raises_the_level_as_karras(churn):
    sigmas = grids.append_zero(grids.polynomial(6, 0.002, 80.0))
    plan = solvers.make_plan("edm_stochastic", sigmas, s_churn=churn, s_min=0.1, s_max=50.0, s_noise=1.1)
    gamma = [min(churn / 6, np.sqrt(2) - 1) if 0.1 <= s <= 50 else 0.0 for s in sigmas[:-1]]
    raised = sigmas[:-1] * (1 + np.array(gamma))
    np.testing.assert_allclose(plan.levels[::2], raised, rtol=1e-15)
    np.testing.assert_allclose(plan.noise[::2], 1.1 * np.sqrt(raised**2 - sigmas[:-1] ** 2), rtol=1e-12)
    np.testing.assert_array_equal(plan.noise[1::2], 0)


def test_without_churn_edm_stochastic_is_heun():
    sigmas = grids.append_zero(GRID)
    heun, edm = solvers.make_plan("heun", sigmas), solvers.make_plan("edm_stochastic", sigmas)
    for name in ("levels", "advance", "keep"):
        np.testing.assert_array_equal(getattr(heun, name), getattr(edm, name))


@pytest.mark.parametrize("name", ALL)
def test_a_plan_holds_float64_numbers_and_the_same_structure_for_other_levels(name):
    one = solvers.make_plan(name, GRID)
    other = solvers.make_plan(name, grids.logsnr(9, 0.1, 20.0))
    assert all(leaf.dtype == np.float64 for leaf in jax.tree.leaves(one))
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert one.num_steps == 8


# Network calls --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("name", ["euler", "heun", "dpm2s", *MULTISTEP])
def test_nfe(name, afs):
    per_step = 2 if name in ("heun", "dpm2s") else 1
    assert solvers.make_plan(name, GRID, afs=afs).nfe == per_step * 8 - afs


def test_nfe_of_the_plain_last_step():
    sigmas = grids.append_zero(grids.polynomial(18, 0.002, 80.0))
    assert solvers.make_plan("heun", sigmas).nfe == 35  # Karras 2022, table 2
    assert solvers.make_plan("edm_stochastic", sigmas, s_churn=40.0).nfe == 35


# Bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize(
    "sigmas, message",
    [
        ([2.0, 1.0, -0.5], "not negative"),
        ([2.0, 1.0, 1.0], "decrease strictly, found 1 then 1 at index 1"),
        ([1.0, 2.0], "decrease strictly"),
        ([2.0, np.nan, 1.0], "finite"),
        ([np.inf, 1.0], "finite"),
        ([2.0], "at least 2 sigmas"),
        ([], "at least 2 sigmas"),
        ([[2.0, 1.0]], "one array"),
    ],
)
def test_bad_sigmas(sigmas, message):
    for name in ALL:
        with pytest.raises(ValueError, match=message):
            solvers.make_plan(name, np.array(sigmas))


@pytest.mark.parametrize("found, nearest", [("eular", "euler"), ("dpm++", "dpmpp"), ("iPNDM", "ipndm"), ("UniPC", "unipc")])
def test_unknown_solver_names_the_nearest(found, nearest):
    with pytest.raises(ValueError, match=re.escape(f"unknown solver '{found}'; did you mean '{nearest}'?")):
        solvers.make_plan(found, GRID)


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("dpmpp", {"order": 4}, "has order 1 or 2 or 3, found order=4"),
        ("euler", {"order": 2}, "has order 1, found"),
        ("ipndm", {"order": 0}, "found order=0"),
        ("ipndm", {"r": 0.3}, "no option 'r'"),
        ("dpmpp", {"lower_order": True}, "no option 'lower_order'.*lower_order_final"),
        ("dpmpp", {"form": "eps"}, "'data' or 'noise'"),
        ("unipc", {"variant": "bh3"}, "'bh1' or 'bh2'"),
        ("dpm2s", {"r": 0.0}, "must be in"),
        ("edm_stochastic", {"s_churn": -1.0}, "not be negative"),
        ("edm_stochastic", {"afs": True}, "deterministic"),
    ],
)
def test_bad_options(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        solvers.make_plan(name, GRID, **arguments)


@pytest.mark.parametrize("name", ["euler", "ipndm", "dpmpp", "unipc"])
def test_too_few_levels_for_an_analytic_first_step(name):
    with pytest.raises(solvers.TooFewSteps, match="at least 3 sigmas"):
        solvers.make_plan(name, GRID[:2], afs=True)
    assert solvers.make_plan(name, GRID[:2]).nfe == 1


def test_too_few_levels_for_the_released_unipc():
    with pytest.raises(solvers.TooFewSteps, match="at least 4 sigmas"):
        solvers.make_plan("unipc", GRID[:3], parity=True)
    assert solvers.make_plan("unipc", GRID[:3]).nfe == 2


def test_a_last_level_of_zero_where_the_solver_has_no_limit():
    sigmas = grids.append_zero(GRID)
    for name in ("dpm2s", "deis"):
        with pytest.raises(ValueError, match="no limit at sigma 0"):
            solvers.make_plan(name, sigmas)
    for name in ("dpmpp", "dpmpp_noise", "unipc"):
        with pytest.raises(ValueError, match="order 1 only"):
            solvers.make_plan(name, sigmas, lower_order_final=False)
        assert np.all(np.isfinite(solvers.make_plan(name, sigmas).advance))
