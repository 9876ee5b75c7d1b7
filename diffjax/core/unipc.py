"""Coefficients of UniPC, on the host in float64. Zhao 2023, algorithms 1 (corrector) and 2 (predictor).

With lambda = -log t, h = lambda_{i+1} - lambda_i and the values m_i of `multistep`, one step of order o has nodes
r_j = (lambda_{i-j} - lambda_i) / h for j = 1..o-1 and r_o = 1 (the new point), and

    base = first-order step,   hh = -h (data) or h (noise),   s = 1 (data) or t_{i+1} (noise)
    predictor  y = base - s B sum_{j<o} rho^p_j (m_{i-j} - m_i) / r_j                             (1)
    corrector  x = base - s B (sum_{j<o} rho^c_j (m_{i-j} - m_i) / r_j + rho^c_o (m(y) - m_i))    (2)
    R rho = b,  R_kj = r_j^(k-1),  b_k = k! g_k / B,  B = hh (bh1) or e^hh - 1 (bh2)              (3)
    g_1 = (e^hh - 1) / hh - 1,  g_{k+1} = g_k / hh - 1 / (k+1)!                                   (4)

m(y) is also the next history entry, so a step costs one call. The last step is a prediction: correcting it would
cost a call of its own.
"""

import math

import numpy as np

from diffjax.core import multistep


def tables(
    t: np.ndarray, order: int, form: str, lower_order_final: bool, variant: str
) -> tuple[np.ndarray, np.ndarray]:
    """Rows (advance, keep), each (n, 2 + order + 1), on (x, y, m_0, m_1, ...) as `solvers.Plan` defines them.

    Row i is called with y = the prediction of x_i and x = the corrected x_{i-1}: `keep` gives the corrected x_i, by (2)
    of step i-1, and `advance` the prediction (1) of x_{i+1} from it.
    """
    ranks = multistep.orders(len(t) - 1, order, lower_order_final)
    keep, advance = [], []
    for i, rank in enumerate(ranks):
        corrected = np.zeros(3 + order)
        if i == 0:
            corrected[1] = 1.0  # the start is exact
        else:
            corrected[0], newest, older = _corrector(t, i - 1, ranks[i - 1], form, variant)
            corrected[2] = newest
            corrected[3 : 3 + len(older)] = older
        a, b = _predictor(t, i, rank, form, variant)
        keep.append(corrected)
        advance.append(a * corrected + np.pad(b, (2, 1 + order - len(b))))
    return np.stack(advance), np.stack(keep)


def _predictor(t: np.ndarray, i: int, order: int, form: str, variant: str) -> tuple[float, np.ndarray]:
    """(1) as x' = a x + b . (m_i, m_{i-1}, ...)."""
    a, base = multistep.dpmpp_first(t, i, form)
    if order == 1:
        return a, np.array([base])
    nodes, scale, matrix, rhs = _system(t, i, order, form, variant)
    # at order 2 the condition of the first row alone is replaced by its limit, as published
    rho = np.array([0.5]) if order == 2 else np.linalg.solve(matrix[:-1, :-1], rhs[:-1])
    return a, _over_history(base, -scale * rho, nodes[:-1])


def _corrector(t: np.ndarray, i: int, order: int, form: str, variant: str) -> tuple[float, float, np.ndarray]:
    """(2) as x' = a x + newest * m(y) + older . (m_i, m_{i-1}, ...)."""
    a, base = multistep.dpmpp_first(t, i, form)
    nodes, scale, matrix, rhs = _system(t, i, order, form, variant)
    rho = np.array([0.5]) if order == 1 else np.linalg.solve(matrix, rhs)
    weights = -scale * rho
    older = _over_history(base, weights[:-1], nodes[:-1])
    older[0] -= weights[-1]
    return a, weights[-1], older


def _system(
    t: np.ndarray, i: int, order: int, form: str, variant: str
) -> tuple[np.ndarray, float, np.ndarray, np.ndarray]:
    """Nodes (o,), the factor s B, and (3) as matrix (o, o) and right side (o,)."""
    lam = -np.log(t[i + 1 - np.arange(order + 1)])
    h = lam[0] - lam[1]
    nodes = np.append((lam[2:] - lam[1]) / h, 1.0)
    hh, s = (-h, 1.0) if form == "data" else (h, t[i + 1])
    factor = hh if variant == "bh1" else np.expm1(hh)
    g, rhs = np.expm1(hh) / hh - 1, []
    for k in range(1, order + 1):
        rhs.append(math.factorial(k) * g / factor)
        g = g / hh - 1 / math.factorial(k + 1)
    matrix = nodes[None, :] ** np.arange(order)[:, None]
    return nodes, s * factor, matrix, np.array(rhs)


def _over_history(base: float, weights: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """base * m_i + sum_j weights_j (m_{i-j} - m_i) / r_j, as weights on (m_i, m_{i-1}, ...)."""
    scaled = weights / nodes
    return np.concatenate([[base - scaled.sum()], scaled])
