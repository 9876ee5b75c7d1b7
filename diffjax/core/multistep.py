"""Coefficients of the linear multistep solvers, on the host in float64.

With t_i the noise levels (decreasing), h = t_{i+1} - t_i, and m_i either the prediction D_i = D(x_i, t_i) ("data")
or the slope d_i = (x_i - D_i) / t_i ("noise"), every solver here is

    x_{i+1} = a_i x_i + sum_j b_ij m_{i-j},                                                     (1)

so a solver is a function that returns the table (a, b): a (n,), b (n, order), for the n = N - 1 steps of N levels.
`orders` says how many past values a step may use. Sources: Liu 2022 (PNDM) and Zhang 2023 (iPNDM, DEIS);
Lu 2022 (DPM-Solver++); the released code is Zhou 2024 (SFD), whose slips `parity=True` reproduces.
"""

from typing import NamedTuple

import numpy as np

from diffjax.core import grids

# Classical Adams-Bashforth weights on a uniform grid, newest first.
ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
# The released DEIS integrates with these limits whatever the grid is.
DEIS_PARITY_LIMITS = (0.002, 80.0)
DEIS_PARITY_POINTS = 10_000


class Table(NamedTuple):
    """Coefficients of (1): `a` (n,), `b` (n, order), both float64."""

    a: np.ndarray
    b: np.ndarray


def orders(num_steps: int, order: int, lower_order_final: bool = False) -> np.ndarray:
    """Order of each step, (num_steps,): 1, 2, ... up to `order`; with `lower_order_final` down again at the end.

    The lowering never touches the warm-up: 3 steps of order 3 are 1, 2, 1 and 4 are 1, 2, 2, 1.
    """
    step = np.arange(num_steps)
    after = np.minimum(order, num_steps - step) if lower_order_final else np.full(num_steps, order)
    return np.where(step + 1 < order, step + 1, after)


def ipndm(t: np.ndarray, order: int) -> Table:
    """Adams-Bashforth with the weights of a uniform grid. Liu 2022, eq. 9 without the Runge-Kutta start."""
    h = np.diff(t)
    return _noise_table(t, order, lambda i, k: h[i] * np.asarray(ADAMS_BASHFORTH[k - 1]))


def ipndm_v(t: np.ndarray, order: int, parity: bool = False) -> Table:
    """Variable-step Adams-Bashforth: weights of the actual grid. Zhang 2023, eq. 15 in the variable sigma (rho-AB)."""
    weights = _released_adams_weights if parity else _adams_weights
    return _noise_table(t, order, lambda i, k: (t[i + 1] - t[i]) * weights(t, i, k))


def _adams_weights(t: np.ndarray, i: int, k: int) -> np.ndarray:
    """c_j = (1/h) * integral of l_j over the step, l_j the Lagrange basis on t_i, t_{i-1}, ...: exact for degree < k.

    In u = (t - t_i) / h the condition is sum_j c_j u_j^p = 1 / (p + 1) for p = 0..k-1.
    """
    nodes = (t[i - np.arange(k)] - t[i]) / (t[i + 1] - t[i])
    powers = np.arange(k)
    return np.linalg.solve(nodes[None, :] ** powers[:, None], 1 / (powers + 1.0))


def _released_adams_weights(t: np.ndarray, i: int, k: int) -> np.ndarray:
    """The released weights: a misplaced bracket in A (order 3), a sign and a factor in B (order 4)."""
    if k == 1:
        return np.ones(1)
    h, h1 = t[i + 1] - t[i], t[i] - t[i - 1]
    c1, c2 = 1 + h / (2 * h1), -h / (2 * h1)
    if k == 2:
        return np.array([c1, c2])
    h2 = t[i - 1] - t[i - 2]
    q = h1 / h2
    a_right_order = h / (3 * (h + h1)) * h * (h + h1) / (h1 * (h1 + h2))
    a = 0.5 * (1 - a_right_order)  # the right one is 0.5 * (1 - h / (3 (h + h1))) * h (h + h1) / (h1 (h1 + h2))
    if k == 3:
        return np.array([c1 + a, c2 - (1 + q) * a, q * a])
    h3 = t[i - 2] - t[i - 3]
    bracket = 0.5 * (1 - h / (3 * (h + h1))) + (1 - h / (2 * (h + h1))) * h / (6 * (h + h1 + h2))
    b = bracket * h * (h + h1) * (h + h1 + h2) / (h1 * (h1 + h2) * (h1 + h2 + h3))
    k4 = h1 * (h1 + h2) / (h2 * (h2 + h3))
    third = q * a + (q + k4 * (1 + h2 / h3)) * b
    return np.array([c1 + a + b, c2 - (1 + q) * a - (1 + q + k4) * b, third, -q * k4 * b])


def deis(t: np.ndarray, order: int, parity: bool = False) -> Table:
    """DEIS tAB: b_ij = integral of l_j(tau) dsigma(tau), l_j the Lagrange basis in VP time. Zhang 2023, eq. 15.

    The VP process spans the ends of the grid. `parity` takes the released limits 0.002 and 80 and their Riemann sum
    of 10 000 points (both ends counted, weight width / 10 000). The rho-AB form of the same paper is `ipndm_v`.
    """
    process = grids.vp_time(*(DEIS_PARITY_LIMITS if parity else (t[-1], t[0])))
    tau = process.time(t)
    rule = _riemann if parity else _gauss_legendre

    def weights(i: int, k: int) -> np.ndarray:
        if k == 1:
            return np.array([t[i + 1] - t[i]])
        points, width = rule(tau[i], tau[i + 1])
        basis = _lagrange(tau[i - np.arange(k)], points)
        return basis @ (width * process.slope(points))

    return _noise_table(t, order, weights)


def _lagrange(nodes: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Lagrange basis on `nodes` (k,) at `points` (p,): (k, p)."""
    rows = []
    for j, node in enumerate(nodes):
        others = np.delete(nodes, j)
        rows.append(np.prod((points[None, :] - others[:, None]) / (node - others[:, None]), axis=0))
    return np.stack(rows)


def _riemann(start: float, stop: float) -> tuple[np.ndarray, np.ndarray]:
    width = (stop - start) / DEIS_PARITY_POINTS
    return np.linspace(start, stop, DEIS_PARITY_POINTS), np.full(DEIS_PARITY_POINTS, width)


def _gauss_legendre(start: float, stop: float) -> tuple[np.ndarray, np.ndarray]:
    # 64 points: the slope is smooth in tau, and the last step (nearest to the square root at 0) is exact to 1e-12.
    nodes, weights = np.polynomial.legendre.leggauss(64)
    half = (stop - start) / 2
    return start + half * (nodes + 1), half * weights


def dpmpp(
    t: np.ndarray, order: int, form: str = "data", lower_order_final: bool = True, parity: bool = False
) -> Table:
    """DPM-Solver++ multistep, order 1 to 3, in lambda = -log t. Lu 2022 (DPM-Solver++), algorithm 2 and appendix.

    `form` "data" integrates D, "noise" integrates the slope. At order 3 the released code (and those derived from
    it) lacks a factor 2 on the second divided difference D2, so its "3M" is of order 2; `parity` keeps it that way.
    """
    ranks = orders(len(t) - 1, order, lower_order_final)
    rows = [_dpmpp_step(t, i, k, form, 1.0 if parity else 2.0) for i, k in enumerate(ranks)]
    return Table(a=np.array([a for a, _ in rows]), b=np.stack([_widen(b, order) for _, b in rows]))


def _dpmpp_step(t: np.ndarray, i: int, k: int, form: str, d2_factor: float) -> tuple[float, np.ndarray]:
    """x' = a x + b_1 m_i + b_2 D1 + b_3 D2, the differences D1 and D2 written out over m_i, m_{i-1}, m_{i-2}."""
    a, base = dpmpp_first(t, i, form)
    if k == 1:
        return a, np.array([base])
    lam = -np.log(t[i + 1 - np.arange(k + 1)])  # lam[0] is the new level, lam[1] the current one
    h = lam[0] - lam[1]
    r0 = (lam[1] - lam[2]) / h
    d0 = np.array([1, -1, 0]) / r0
    if k == 2:
        return a, (base * np.array([1, 0, 0]) + base / 2 * d0)[:2]
    r1 = (lam[2] - lam[3]) / h
    d1 = np.array([0, 1, -1]) / r1
    slope = d0 + r0 / (r0 + r1) * (d0 - d1)
    curvature = d2_factor * (d0 - d1) / (r0 + r1)
    scale, sign = (1.0, -1.0) if form == "data" else (t[i + 1], 1.0)
    phi1 = np.expm1(sign * h)
    phi2 = phi1 / h - sign
    phi3 = phi2 / h - 0.5
    if form == "data":
        return a, base * np.array([1, 0, 0]) + phi2 * slope - phi3 * curvature
    return a, base * np.array([1, 0, 0]) - scale * (phi2 * slope + phi3 * curvature)


def dpmpp_first(t: np.ndarray, i: int, form: str) -> tuple[float, float]:
    """Order 1, which is Euler's step: x' = (t'/t) x + (1 - t'/t) D, or x' = x + (t' - t) d. Defined at t' = 0."""
    if form == "data":
        return t[i + 1] / t[i], 1 - t[i + 1] / t[i]
    return 1.0, t[i + 1] - t[i]


def _noise_table(t: np.ndarray, order: int, weights) -> Table:
    """(1) with a = 1 and b_i = weights(i, k), k the order of step i."""
    ranks = orders(len(t) - 1, order)
    return Table(a=np.ones(len(t) - 1), b=np.stack([_widen(weights(i, k), order) for i, k in enumerate(ranks)]))


def _widen(b: np.ndarray, order: int) -> np.ndarray:
    return np.pad(b, (0, order - len(b)))
