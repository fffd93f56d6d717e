"""Losses and norms with corners, by the interior-point method of `_interior`."""

import math
from dataclasses import replace

import numpy as np

from ._interior import Found, Task, solve
from ._losses import Ball, LinearLoss, length_row, norm_rows
from ._newton import constant
from ._proof import multipliers

Array = np.ndarray
DIRECT = 3000  # samples that the interior-point method takes at once
Got = tuple[Array, float, int, str, list[tuple[Array, Array]]]  # theta, b, steps, method, duals


def _task(X: Array, y: Array, loss: LinearLoss, ball: Ball, intercept: bool) -> Task:
    """The problem in the form of `_interior`, with a feasible start."""
    n, d = X.shape
    q, price = ball.q, ball.radius * loss.slope
    flip = ball.flip if not loss.regression and price else math.inf
    pieces = loss.pieces(y, flip)
    least = 1 / ball.flip if loss.regression and math.isfinite(ball.flip) else 0.0
    extra = d if price and q == 1 else 0
    size = d + 2 + extra
    G = norm_rows(d, q, size) if price else np.zeros((0, size))
    h = np.zeros(len(G))
    if price and least > 0:
        G, h = np.concatenate([G, length_row(d, size)]), np.append(h, -least)
    start = np.zeros(size)
    start[d] = constant(y, loss) if intercept and loss.smooth else 0.0
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


def by_pieces(X: Array, y: Array, loss: LinearLoss, ball: Ball, intercept: bool) -> "Got | None":
    """By the interior-point method, on samples near a corner of their loss where there are many."""
    n, d = X.shape
    task = _task(X, y, loss, ball, intercept)
    if loss.smooth or n <= DIRECT or ball.radius == 0:  # smooth samples are never linear
        found, method = solve(task), "interior point"
    else:
        found, method = _working_set(task), "interior point, working set"
    theta, b = found.w[:d], float(found.w[d])
    a = None if found.a is None else n * found.a
    return theta, b, found.steps, method, multipliers(X @ theta + b, y, loss, a)


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
            a = np.zeros(task.A.shape)
            a[outside, piece[outside]] = 1.0 / n
            a[np.flatnonzero(inside)] = found.a
            return replace(found, a=a, steps=steps)
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
