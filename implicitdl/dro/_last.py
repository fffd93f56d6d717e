"""The last resort for a fit: a cone program for cvxpy and Clarabel, whose answer is then proved.

Slower than the other methods by far, and only tried where they got stuck.
"""

import math
import warnings
from typing import Any

import numpy as np

from ._losses import Ball, LinearLoss

Array = np.ndarray
_OPTIONS = (
    {"tol_gap_rel": 1e-11, "tol_gap_abs": 1e-13, "tol_feas": 1e-11, "max_iter": 200},
    {"tol_gap_rel": 1e-9, "tol_gap_abs": 1e-10, "tol_feas": 1e-9, "max_iter": 400},
)


def _solved(problem: Any, theta: Any) -> bool:
    import cvxpy as cp

    for options in _OPTIONS:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                problem.solve(solver="CLARABEL", **options)
        except (cp.SolverError, ValueError, ArithmeticError, RuntimeError):
            continue  # with the next
        if theta.value is not None and np.isfinite(theta.value).all():
            return True
    return False


def by_cones(
    X: Array, y: Array, loss: LinearLoss, ball: Ball, intercept: bool
) -> "tuple[Array, float, Array | None] | None":
    """theta, b and multipliers of `LinearLoss.pieces`, each sample's with sum 1; None where it fails.

    Args:
        X, y, loss, ball, intercept: of order 1, as of `_fits.fit`.
    """
    import cvxpy as cp

    n, d = X.shape
    price = ball.radius * loss.slope
    theta, b, lam = cp.Variable(d), cp.Variable(), cp.Variable(nonneg=True)
    u = X @ theta + (b if intercept else 0.0)
    rules = [cp.norm(theta, ball.q) <= lam] if price > 0 else []
    if loss.regression and math.isfinite(ball.flip):
        rules.append(lam >= 1 / ball.flip)
    flip = ball.flip if price > 0 and not loss.regression else math.inf
    pieces = loss.pieces(y, flip)
    mean: Any = 0.0
    rows = []
    if pieces is not None:
        A, B, C = pieces
        s = cp.Variable(n)
        v = cp.Variable(n) if loss.regression and loss.smooth else 0.0
        at = u if isinstance(v, float) else u + v
        rows = [s >= cp.multiply(A[:, j], at) + B[j] * lam + C[:, j] for j in range(A.shape[1])]
        mean = cp.sum(s) / n
        if not isinstance(v, float):
            mean = mean + cp.sum_squares(v) / (2 * n)
    if loss.smooth and not loss.regression:
        mean = mean + cp.sum(cp.logistic(-cp.multiply(y, u))) / n
    problem = cp.Problem(cp.Minimize(mean + price * lam), rules + rows)
    if not _solved(problem, theta):
        return None
    weights = None
    if rows and all(row.dual_value is not None for row in rows):
        weights = n * np.maximum(np.stack([row.dual_value for row in rows], 1), 0.0)
        weights = weights / np.maximum(weights.sum(1, keepdims=True), 1e-300)
    return np.asarray(theta.value), float(b.value) if intercept else 0.0, weights


def squares_by_cones(R: Array, ball: Ball, least: float) -> "tuple[Array, Array | None] | None":
    """theta and the multipliers of ||R [theta; -1]||, of `_squares`; None where it fails."""
    import cvxpy as cp

    d = R.shape[1] - 1
    theta, root, lam = cp.Variable(d), cp.Variable(), cp.Variable()
    miss = cp.Variable(len(R))
    equal = miss == R[:, d] - R[:, :d] @ theta
    rules = [equal, cp.norm(miss, 2) <= root, cp.norm(theta, ball.q) <= lam, lam >= least]
    over = max(1.0, ball.radius)
    problem = cp.Problem(cp.Minimize(root / over + ball.radius / over * lam), rules)
    if not _solved(problem, theta):
        return None
    dual = None if equal.dual_value is None else over * np.asarray(equal.dual_value)
    return np.asarray(theta.value), dual
