"""Newton's method on smooth losses with the price of a 2-norm, or none."""

import math

import numpy as np
from scipy.linalg import lapack

from ..solution import ConvergenceError
from ._interior import weighted_gram
from ._losses import Ball, Fit, LinearLoss

Array = np.ndarray


def newton(X: Array, y: Array, loss: LinearLoss, ball: Ball, intercept: bool) -> Fit:
    """Newton's method on mean loss + r L ||theta||_2, which is smooth away from theta = 0."""
    n, d = X.shape
    price = ball.radius * loss.slope
    b = constant(y, loss) if intercept else 0.0
    _, slope, _ = loss.derivatives(np.full(n, b), y)
    gradient = X.T @ slope / n
    size = float(np.linalg.norm(gradient))
    if size <= price:  # 0 is stationary
        value = float(loss.value(np.full(n, b), y).mean())
        return Fit(np.zeros(d), b, 0.0, value, 0.0, 0, "closed form")
    w = np.zeros(d + 1)
    w[d] = b
    if n > 20 * max(d, 500):  # a start from a tenth of the samples
        some = np.random.default_rng(0).permutation(n)[: max(n // 10, 10 * d)]
        classes = np.unique(y[some]) if not loss.regression else [0, 1]
        if len(classes) == 2:
            near = newton(X[some], y[some], loss, ball, intercept)
            w = np.r_[near.theta, near.b]

    def value_at(w: Array, u: Array) -> float:
        return float(loss.value(u, y).mean()) + price * float(np.linalg.norm(w[:d]))

    if not w[:d].any():
        # From 0 along the negative gradient, as far as it goes down.
        length = 1.0 / max(float(np.mean(np.einsum("ij,ij->i", X[:1000], X[:1000]))), 1e-300)
        for _ in range(60):
            trial = w.copy()
            trial[:d] = -length * gradient
            if value_at(trial, X @ trial[:d] + trial[d]) < value_at(w, np.full(n, b)):
                w = trial
                break
            length *= 0.25
    u = X @ w[:d] + w[d]
    value, steps, decrement = value_at(w, u), 0, math.inf
    free = d + 1 if intercept else d
    for steps in range(1, 101):  # noqa: B007
        _, first, second = loss.derivatives(u, y)
        length = float(np.linalg.norm(w[:d]))
        g = np.r_[X.T @ first, first.sum()] / n
        H = np.empty((d + 1, d + 1))
        H[:d, :d] = weighted_gram(X, second / n)
        H[:d, d] = H[d, :d] = X.T @ second / n
        H[d, d] = second.sum() / n
        if price:
            unit = w[:d] / length
            g[:d] += price * unit
            H[:d, :d] += price / length * (np.eye(d) - np.outer(unit, unit))
        step = _newton_step(H[:free, :free], g[:free])
        decrement = float(-g[:free] @ step)
        move = np.zeros(d + 1)
        move[:free] = step
        if decrement <= 1e-15 * (abs(value) + 1e-300):
            break
        du, t = X @ move[:d] + move[d], 1.0
        while t > 1e-12:
            new = value_at(w + t * move, u + t * du)
            if new <= value - 1e-4 * t * decrement:
                break
            t *= 0.5
        if t <= 1e-12 or new >= value:
            break
        w, u, value = w + t * move, u + t * du, new
    if not decrement <= 1e-7 * (1e-3 + abs(value)) and price:
        raise ConvergenceError(f"after {steps} Newton steps the decrement is {decrement:.1e}.")
    return Fit(
        w[:d],
        float(w[d]),
        float(np.linalg.norm(w[:d])),
        value,
        max(decrement, 0.0),
        steps,
        "Newton",
    )


def _newton_step(H: Array, g: Array) -> Array:
    """-H^-1 g, with a little on the diagonal where H is singular."""
    unit = 1.0 / np.sqrt(np.maximum(np.diag(H), 1e-300))
    scaled = H * unit * unit[:, None]
    for shift in (0.0, 1e-13, 1e-11, 1e-9, 1e-6, 1.0):
        scaled.flat[:: len(g) + 1] = 1.0 + shift
        _, x, info = lapack.dposv(scaled, unit * g, lower=1)
        if not info:
            step: Array = -unit * x
            return step
    return -g


def constant(y: Array, loss: LinearLoss) -> float:
    """The best b with theta = 0."""
    if not loss.regression:
        share = float(np.mean(y > 0))
        return math.log(share / (1 - share)) if 0 < share < 1 else 0.0
    b = float(np.median(y))
    for _ in range(200):
        r = y - b
        inside = float(np.mean(np.abs(r) <= loss.delta))
        slope = float(np.mean(np.clip(r, -loss.delta, loss.delta)))
        step = slope / inside if inside > 0 else 0.0
        if abs(step) <= 1e-15 * (1 + abs(b)):
            break
        b += step
    return b
