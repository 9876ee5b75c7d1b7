"""Distance between two sets of points of the same size: optimal transport by scipy's linear assignment."""

import numpy as np
from scipy import optimize


def squared_w2(a: np.ndarray, b: np.ndarray) -> float:
    """Squared 2-Wasserstein distance of the empirical measures of a (N, ...) and b (N, ...): the smallest mean squared
    distance of pairs, float64. Takes time N^3; 0.1 s at N = 1000. Raises ValueError for sets of different size."""
    if len(a) != len(b):
        raise ValueError(f"expected sets of the same size, found {len(a)} and {len(b)} points")
    a, b = (np.asarray(points, np.float64).reshape(len(points), -1) for points in (a, b))
    costs = np.sum(a**2, axis=1)[:, None] + np.sum(b**2, axis=1)[None] - 2 * a @ b.T
    rows, columns = optimize.linear_sum_assignment(costs)
    return float(max(0.0, np.mean(costs[rows, columns])))
