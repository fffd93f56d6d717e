"""Hinge and absolute losses with a 2-norm: the method of multipliers, Newton inside.

    mean_i max over a in [lo, hi] of a v_i + r ||theta||_2,      v = c + s (X theta + b)

(hinge: v = 1 - y u, a in [0, 1]; absolute: v = y - u, a in [-1, 1]). With multipliers a, width mu and

    e(v) = max over a' in [lo, hi] of a' v - mu (a' - a)^2 / 2,     a' = clip(a + v / mu),

minimise mean e(v_i) + r ||theta||, then a <- a'. A Newton step costs products with X and the Gram
matrix of those rows alone whose a' is not clipped, and these become few: at the solution, as many as
there are corners. Where the inner minimum is exact, a' is feasible in the dual, whose value is
mean a'_i c_i, so that each round proves how far it is from the end.

Reference:
    Rockafellar (1976), "Augmented Lagrangians and applications of the proximal point algorithm";
    Li, Sun, Toh (2018), "A highly efficient semismooth Newton augmented Lagrangian method for solving
    Lasso problems".
"""

import math
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class Corner:
    """theta, b, the value and a proved bound of its distance from the least; how many Newton steps."""

    theta: Array
    b: float
    value: float
    gap: float
    steps: int


def solve(
    X: Array, c: Array, s: Array, low: float, high: float, price: float, intercept: bool,
    start: "Array | None" = None, tol: float = 1e-8,
) -> "Corner | None":  # fmt: skip
    """The minimiser, or None where theta = 0 may be it or the method does not get there.

    Args:
        X: # (n, d)
        c, s: of v.  # (n,)
        low, high: the range of the multipliers.
        price: r > 0.
        intercept: whether there is a b.
        start: theta and b.  # (d + 1,)
        tol: of the gap, relative.
    """
    n, d = X.shape
    w = np.zeros(d + 1)
    if start is not None:
        w[:] = start
    u = X @ w[:d] + w[d]
    v = c + s * u
    spread = float(np.abs(v).mean()) + 1e-12
    mu = 0.5 * spread if start is None else 0.1 * spread
    a = np.clip(0.5 * (low + high) + v / mu, low, high)
    if start is None:
        a = np.full(n, 0.5 * (low + high))
        g = X.T @ (s * np.clip(a + v / mu, low, high)) / n
        if np.linalg.norm(g) <= price:
            return None
        scale = float(np.mean(np.einsum("ij,ij->i", X[:1000], X[:1000])))
        w[:d] = -g * mu / max(scale, 1e-300)
        u = X @ w[:d] + w[d]
    free = d + 1 if intercept else d
    steps, best, inner = 0, math.inf, 1e-4
    for _round in range(60):
        for _ in range(50):
            v = c + s * u
            trial = a + v / mu
            new = np.clip(trial, low, high)
            length = float(np.linalg.norm(w[:d]))
            if length <= 1e-12 * spread:
                return None
            pull = s * new / n
            g = np.r_[X.T @ pull, pull.sum()]
            g[:d] += price / length * w[:d]
            value = float((new * v - 0.5 * mu * (new - a) ** 2).mean()) + price * length
            rows = np.flatnonzero((trial > low) & (trial < high))
            part = X[rows]
            H = np.zeros((d + 1, d + 1))
            H[:d, :d] = part.T @ part
            H[:d, d] = H[d, :d] = part.sum(0)
            H[d, d] = len(rows)
            H *= 1 / (mu * n)
            unit = w[:d] / length
            H[:d, :d] += price / length * (np.eye(d) - np.outer(unit, unit))
            top = np.diag(H).max()
            H[np.diag_indices(d + 1)] += 1e-10 * top + 1e-14
            move = np.zeros(d + 1)
            try:
                move[:free] = -np.linalg.solve(H[:free, :free], g[:free])
            except np.linalg.LinAlgError:
                return None
            decrement = float(-g @ move)
            if not np.isfinite(decrement) or decrement < 0:
                return None
            steps += 1
            if decrement <= inner * min(best, abs(value)) + 1e-15 * abs(value):
                break
            du, t = X @ move[:d] + move[d], 1.0
            while t > 1e-10:
                at = c + s * (u + t * du)
                clipped = np.clip(a + at / mu, low, high)
                there = float((clipped * at - 0.5 * mu * (clipped - a) ** 2).mean())
                there += price * float(np.linalg.norm(w[:d] + t * move[:d]))
                if there <= value - 1e-4 * t * decrement:
                    break
                t *= 0.5
            if t <= 1e-10:
                break
            w, u = w + t * move, u + t * du
        v = c + s * u
        a = np.clip(a + v / mu, low, high)
        primal = float(np.maximum(low * v, high * v).mean()) + price * float(np.linalg.norm(w[:d]))
        gap = _gap(X, c, s, a, price, intercept, primal, low, high)
        best = min(best, max(gap, 0.0))
        if gap <= tol * (abs(primal) + 1e-12):
            return Corner(w[:d], float(w[d]), primal, max(gap, 0.0), steps)
        if math.isfinite(gap):
            mu, inner = max(0.2 * mu, 1e-5 * spread), 1e-4
        else:  # not near enough to the inner minimum for a dual point
            inner *= 1e-3
            if inner < 1e-20:
                return None
    return None


def _gap(
    X: Array, c: Array, s: Array, a: Array, price: float, intercept: bool, primal: float,
    low: float, high: float,
) -> float:  # fmt: skip
    """primal less the dual value of multipliers made feasible.

    Feasible are a in [low, high] with sum s_i a_i = 0 (an intercept) and ||X'(s a)|| / n <= r. The
    first is mended by moving the entries that are not at an end, the second by scaling towards the
    feasible a that is constant within each sign of s.
    """
    n = len(c)
    if intercept:
        off = float((s * a).sum())
        inside = (a > low) & (a < high)
        count = int(inside.sum())
        if off != 0.0:
            if count == 0:
                return math.inf
            a = a.copy()
            a[inside] -= off / count * s[inside]
            if a[inside].min() < low or a[inside].max() > high:
                return math.inf
    size = float(np.linalg.norm(X.T @ (s * a))) / n
    if size > price:
        if size > price * (1 + 1e-3):
            return math.inf
        if low > 0 or high < 0:
            return math.inf
        a = a * (price / size)  # 0 is feasible and the set is convex
    return primal - float((a * c).mean())
