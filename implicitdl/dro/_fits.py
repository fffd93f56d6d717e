"""Linear models that are best against the worst law of a Wasserstein ball, in closed form.

With cost ||x - x'||_p for the features, 1/p + 1/q = 1, and a loss of slope L in the residual,

    sup over W_1(Q, P) <= r of E_Q loss = E_P loss + r L ||theta||_q            labels fixed,
    ... = E_P loss + r L max(||theta||_q, 1/k)                                   targets move at price k,
    ... = min over lam >= ||theta||_q of r lam + E_P max(l(m), l(-m) - k lam)    labels flip at price k,
    sup over W_2(Q, P) <= r of (E_Q residual^2)^(1/2) = (E_P residual^2)^(1/2) + r max(||theta||_q, 1/k).

Reference:
    Shafieezadeh-Abadeh, Kuhn, Mohajerin Esfahani (2019), theorems 4, 11 and 14 and corollaries; Blanchet,
    Kang, Murthy (2019), propositions 2 and 3 (squares).
"""

import math
from dataclasses import replace

import numpy as np
from scipy.linalg import lapack

from ..solution import ConvergenceError
from . import _corners as corners
from ._interior import Found, Task, solve, weighted_gram
from ._losses import Ball, Fit, LinearLoss
from ._squares import squares

Array = np.ndarray
_DIRECT = 3000  # samples that the interior-point method takes at once


def fit(X: Array, y: Array, loss: LinearLoss, ball: Ball, intercept: bool) -> Fit:
    """The minimiser.

    Args:
        X: # (n, d), float64
        y: # (n,)
        loss: the loss.
        ball: the ball; features already in the coordinates in which the cost is a norm.
        intercept: whether there is a b.

    Raises:
        ConvergenceError: the risk has no minimum (a ball of radius 0 and separable classes), or the
            method failed.
    """
    if loss.order == 2:
        return squares(X, y, ball, intercept)
    if loss.smooth and (ball.q == 2 or ball.radius == 0):
        found = _newton(X, y, loss, ball, intercept)
        length = float(np.linalg.norm(found.theta))
        if ball.radius == 0 or math.isinf(ball.flip):
            return found
        if loss.regression and length >= 1 / ball.flip:
            return found
        u = X @ found.theta + found.b
        if not loss.regression and float((y * u).max()) <= ball.flip * length:
            return found  # no flip is worth its price
    if not loss.smooth and ball.q == 2 and ball.radius > 0:
        near = _corners(X, y, loss, ball, intercept)
        if near is not None:
            return near
    return _pieces(X, y, loss, ball, intercept)


def risk(
    X: Array, y: Array, loss: LinearLoss, ball: Ball, theta: Array, b: float
) -> tuple[float, float]:
    """The worst-case risk of any theta and b, and the multiplier of the radius.

    Where labels flip it is a minimum over lam, found by sorting the margins.
    """
    u = X @ theta + b
    length = float(np.linalg.norm(theta, ball.q))
    if loss.order == 2:
        size = length if loss.regression and math.isinf(ball.flip) else max(length, 1 / ball.flip)
        root = math.sqrt(float(np.mean((y - u) ** 2))) + ball.radius * size
        return root * root, size
    nominal = float(loss.value(u, y).mean())
    if loss.regression:
        size = max(length, 0.0 if math.isinf(ball.flip) else 1 / ball.flip)
        return nominal + ball.radius * loss.slope * size, size
    if math.isinf(ball.flip) or ball.radius == 0:
        return nominal + ball.radius * length, length
    lam = _price(y * u, loss, ball, length)
    m = y * u
    worse = np.maximum(
        loss.value(m, np.ones_like(m)), loss.value(-m, np.ones_like(m)) - ball.flip * lam
    )
    return float(worse.mean()) + ball.radius * lam, lam


def _price(m: Array, loss: LinearLoss, ball: Ball, length: float) -> float:
    """The best lam >= length: flips cost k/n each and there is r to spend.

    A sample flips where its gain l(-m) - l(m) is above k lam, so lam is the gain of the first sample
    that the budget does not reach, over k.
    """
    one = np.ones_like(m)
    gain = np.sort(loss.value(-m, one) - loss.value(m, one))[::-1]
    if ball.flip == 0:
        return length
    affordable = ball.radius * len(m) / ball.flip
    first = math.floor(affordable)
    last = gain[first] if first < len(m) else 0.0
    return max(length, float(last) / ball.flip)


# ---- smooth losses ---------------------------------------------------------------------------------


def _newton(X: Array, y: Array, loss: LinearLoss, ball: Ball, intercept: bool) -> Fit:
    """Newton's method on mean loss + r L ||theta||_2, which is smooth away from theta = 0."""
    n, d = X.shape
    price = ball.radius * loss.slope
    b = _constant(y, loss) if intercept else 0.0
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
            near = _newton(X[some], y[some], loss, ball, intercept)
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
    endless = not price and not loss.regression and bool((y * u > 0).all())
    if decrement > 1e-7 * (1e-3 + abs(value)) or endless:
        raise ConvergenceError(
            f"the fit did not converge: after {steps} Newton steps the risk is {value:.3g} and its "
            f"decrement {decrement:.1e}; of a radius of 0 and separable classes there is no minimum: "
            "take a radius > 0."
        )
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


def _constant(y: Array, loss: LinearLoss) -> float:
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


# ---- losses and norms with corners -----------------------------------------------------------------


def _corners(X: Array, y: Array, loss: LinearLoss, ball: Ball, intercept: bool) -> "Fit | None":
    """By active sets, where flips and moves of targets are not worth their price; else None."""
    one = np.ones(len(y))
    middle = float(np.median(y)) if intercept and loss.regression else 0.0
    c, s, low = (y - middle, -one, -1.0) if loss.regression else (one, -y, 0.0)
    found = corners.solve(X, c, s, low, 1.0, ball.radius, intercept)
    if found is None or not found.gap <= 1e-7 * (abs(found.value) + 1e-12):
        return None
    length = float(np.linalg.norm(found.theta))
    b = found.b + middle
    if math.isfinite(ball.flip):
        if loss.regression and length < 1 / ball.flip:
            return None
        if not loss.regression:
            u = X @ found.theta + b
            gain = loss.value(-u, y) - loss.value(u, y)
            if float(gain.max()) > ball.flip * length:
                return None
    return Fit(found.theta, b, length, found.value, found.gap, found.steps, "active set")


def _task(X: Array, y: Array, loss: LinearLoss, ball: Ball, intercept: bool) -> Task:
    """The problem in the form of `_interior`, with a feasible start."""
    n, d = X.shape
    q, price = ball.q, ball.radius * loss.slope
    flip = ball.flip if not loss.regression and price else math.inf
    pieces = loss.pieces(y, flip)
    least = 1 / ball.flip if loss.regression and math.isfinite(ball.flip) else 0.0
    extra = d if price and q == 1 else 0
    size = d + 2 + extra
    rows: list[Array] = []
    if price:
        eye = np.eye(d)
        if q == np.inf:
            one = np.zeros((2 * d, size))
            one[:d, :d], one[d:, :d], one[:, d + 1] = eye, -eye, -1.0
            rows.append(one)
        elif q == 1:
            one = np.zeros((2 * d + 1, size))
            one[:d, :d], one[d : 2 * d, :d] = eye, -eye
            one[:d, d + 2 :] = one[d : 2 * d, d + 2 :] = -eye
            one[2 * d, d + 2 :], one[2 * d, d + 1] = 1.0, -1.0
            rows.append(one)
    right = [np.zeros(len(r)) for r in rows]
    if price and least > 0:
        row = np.zeros((1, size))
        row[0, d + 1] = -1.0
        rows.append(row)
        right.append(np.array([-least]))
    G = np.concatenate(rows) if rows else np.zeros((0, size))
    h = np.concatenate(right) if right else np.zeros(0)
    start = np.zeros(size)
    start[d] = _constant(y, loss) if intercept and loss.smooth else 0.0
    if intercept and not loss.smooth and loss.regression:
        start[d] = float(np.median(y))
    # r lam is about as large as the risk at 0, which it cannot exceed at the optimum.
    at_zero = float(loss.value(np.full(n, start[d]), y).mean())
    start[d + 1] = max(at_zero, 1e-12) / price + 2 * least if price else 0.0
    if extra:
        start[d + 2 :] = 0.5 * start[d + 1] / d
    smooth = (lambda u: loss.derivatives(u, y)) if loss.smooth and not loss.regression else None
    A, B, C = pieces if pieces is not None else (None, None, None)
    return Task(
        X=X, intercept=intercept, eps=price, total=n, smooth=smooth, A=A, B=B, C=C,
        g=np.zeros(size), G=G, h=h, extra=extra, cone=bool(price) and q == 2, start=start,
        soft=loss.smooth and loss.regression,
    )  # fmt: skip


def _pieces(X: Array, y: Array, loss: LinearLoss, ball: Ball, intercept: bool) -> Fit:
    """By the interior-point method, on samples near a corner of their loss where there are many."""
    n, d = X.shape
    centre = X.mean(0) if intercept else np.zeros(d)
    X = X - centre
    task = _task(X, y, loss, ball, intercept)
    if loss.smooth or n <= _DIRECT or ball.radius == 0:  # smooth samples are never linear
        found, method = solve(task), "interior point"
    else:
        found, method = _working_set(task), "interior point, working set"
    w = found.w
    theta, b = w[:d], float(w[d])
    value, lam = risk(X, y, loss, ball, theta, b)
    lower = task.objective(w) - found.gap
    gap = max(value - lower, 0.0)
    if not gap <= 1e-5 * (1e-3 + abs(value)):
        raise ConvergenceError(
            f"the fit did not converge: after {found.steps} interior-point steps the risk is "
            f"{value:.6g}, which is proved only to {gap:.1e}; scale the features to similar sizes."
        )
    return Fit(theta, b - float(centre @ theta), lam, value, gap, found.steps, method)


def _working_set(task: Task) -> Found:
    """The same minimiser from few samples: far from the corners of its loss a sample is linear.

    A fit to some samples tells on which piece each of the others is. Those stay linear, summed into
    one vector, as long as the piece is the largest at the solution; where it is not they join, and
    the problem is solved again. At the end all conditions hold for all samples.
    """
    n, d = task.X.shape
    rng = np.random.default_rng(0)
    some = rng.permutation(n)[: max(1000, 10 * d)]
    found = solve(_part(task, some, len(some)), tol=1e-4)
    steps, inside = found.steps, np.zeros(n, bool)
    w = found.w
    # The fit to m samples has an error of about 1 / sqrt(m) of the data's spread.
    share = 0.15
    for _ in range(12):
        values = task.values(task.scores(w), w[d + 1])
        piece = values.argmax(1)
        near = _margin(values)
        count = min(n, max(int(share * n), 1000))
        inside |= near <= np.partition(near, count - 1)[count - 1]
        outside = np.flatnonzero(~inside)
        part = _part(task, np.flatnonzero(inside), n)
        chosen = task.A[outside, piece[outside]]
        g = task.g.copy()
        g[:d] += task.X[outside].T @ chosen / n
        g[d] += chosen.sum() / n if task.intercept else 0.0
        g[d + 1] += task.B[piece[outside]].sum() / n
        found = solve(replace(part, g=g))
        steps += found.steps
        w = found.w
        after = task.values(task.scores(w), w[d + 1])[outside]
        wrong = after.argmax(1) != piece[outside]
        excess = after[np.arange(len(outside)), piece[outside]] - after.max(1)
        if not bool((wrong & (excess < -1e-12 * (1 + np.abs(after).max(1)))).any()):
            return replace(found, steps=steps)
        inside[outside[wrong]] = True
        share = min(1.0, 0.5 * share)
    return solve(task)


def _margin(values: Array) -> Array:
    """By how much the largest piece is ahead of the next."""
    top = values.max(1)
    other = np.where(values == top[:, None], -np.inf, values).max(1)
    ties = (values == top[:, None]).sum(1) > 1
    return np.where(ties, 0.0, top - other)


def _part(task: Task, rows: Array, total: int) -> Task:
    return replace(task, X=task.X[rows], A=task.A[rows], C=task.C[rows], total=total)
