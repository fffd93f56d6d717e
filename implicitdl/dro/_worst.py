"""The distributions that attain the worst-case risk of a linear model.

A sample may be split: part of its mass stays, the rest moves or has its label flipped. What is
returned is checked by its own cost and its own mean loss, not by the formula.
"""

import math
from dataclasses import dataclass

import numpy as np

from ._losses import Ball, LinearLoss

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class WorstDistribution:
    """A law in the ball, and how near its mean loss is to the worst-case risk.

    Attributes:
        X, y: its points.  # (m, d), (m,)
        weights: their probabilities, which sum to one.  # (m,)
        origin: the sample that each point came from.  # (m,)
        distance: the Wasserstein cost of this plan, as a distance; at most the radius.
        loss: the mean loss, evaluated at the points.
        risk: the worst-case risk, which no law of the ball exceeds.
    """

    X: Array
    y: Array
    weights: Array
    origin: Array
    distance: float
    loss: float
    risk: float

    @property
    def gap(self) -> float:
        """risk - loss: 0 where the worst case is attained, else it is only approached."""
        return self.risk - self.loss


def direction(theta: Array, p: float) -> Array:
    """The v with ||v||_p = 1 and theta'v = ||theta||_q."""
    if not theta.any():
        v = np.zeros_like(theta)
        v[0] = 1.0
        return v
    if p == 2:
        out: Array = theta / np.linalg.norm(theta)
        return out
    if p == np.inf:
        return np.where(theta >= 0, 1.0, -1.0)
    v = np.zeros_like(theta)
    k = int(np.abs(theta).argmax())
    v[k] = math.copysign(1.0, theta[k])
    return v


def worst(
    X: Array,
    y: Array,
    loss: LinearLoss,
    ball: Ball,
    theta: Array,
    b: float,
    risk: float,
    tol: float,
) -> WorstDistribution:
    """A law of the ball whose mean loss is the risk, or as near as `tol` where none attains it.

    Args:
        X, y, loss, ball, theta, b: as in `_fits.fit`.
        risk: the worst-case risk of theta and b.
        tol: of the gap, relative to 1 + risk, where the worst case is only approached.
    """
    n = len(y)
    u = X @ theta + b
    points, labels = [X], [y]
    weights, origin = [np.full(n, 1.0 / n)], [np.arange(n)]
    left = ball.radius
    if loss.order == 2:
        moved, targets = _squares(X, y - u, y, ball, theta)
        return _checked(moved, targets, weights[0], origin[0], X, y, loss, ball, theta, b, risk)
    length = float(np.linalg.norm(theta, ball.q))
    base = weights[0].copy()
    if not loss.regression and math.isfinite(ball.flip) and ball.flip > 0:
        # Flips in the order of their gain, as long as they pay more than moving does.
        gain = loss.value(-u, y) - loss.value(u, y)
        order = np.argsort(-gain, kind="stable")
        order = order[gain[order] > ball.flip * length]
        mass = np.minimum(1.0 / n, np.maximum(left / ball.flip - np.arange(len(order)) / n, 0.0))
        order, mass = order[mass > 0], mass[mass > 0]
        base[order] -= mass
        left = max(left - ball.flip * float(mass.sum()), 0.0)
        points.append(X[order])
        labels.append(-y[order])
        weights.append(mass)
        origin.append(order)
    elif not loss.regression and ball.flip == 0:
        gain = loss.value(-u, y) - loss.value(u, y)
        order = np.flatnonzero(gain > 0)
        base[order] = 0.0
        points.append(X[order])
        labels.append(-y[order])
        weights.append(np.full(len(order), 1.0 / n))
        origin.append(order)
    weights[0] = base
    P, Y = np.concatenate(points), np.concatenate(labels)
    W, O = np.concatenate(weights), np.concatenate(origin)
    keep = W > 0
    P, Y, W, O = P[keep], Y[keep], W[keep], O[keep]
    if left > 0:
        P, Y, W, O = _moved(P, Y, W, O, left, loss, ball, theta, b, risk, tol)
    return _checked(P, Y, W, O, X, y, loss, ball, theta, b, risk)


def _moved(
    P: Array, Y: Array, W: Array, O: Array, left: float, loss: LinearLoss, ball: Ball, theta: Array,
    b: float, risk: float, tol: float,
) -> tuple[Array, Array, Array, Array]:  # fmt: skip
    """Mass moved to where the loss has its full slope, at the price `left` in all."""
    u = P @ theta + b
    length = float(np.linalg.norm(theta, ball.q))
    targets = loss.regression and math.isfinite(ball.flip) and 1 / ball.flip > length
    way = direction(theta, ball.p)
    # Which way raises the loss: against the label; away from the target.
    sign = -Y if not loss.regression else np.where(u - Y >= 0, 1.0, -1.0)
    if loss.regression:
        r = np.abs(u - Y)
        steep = r >= loss.delta if loss.smooth else np.ones(len(Y), bool)
    else:
        steep = (1 - Y * u >= 0) if not loss.smooth else np.zeros(len(Y), bool)
    if steep.any():  # all of these by the same distance: attained
        step = left / float(W[steep].sum())
        P, Y = P.copy(), Y.copy()
        if targets:
            Y[steep] -= sign[steep] * step / ball.flip
        else:
            P[steep] += (sign[steep] * step)[:, None] * way
        return P, Y, W, O
    # A little mass of one sample, far away: the gap falls as one over the distance.
    if loss.regression:
        k = int(np.abs(u - Y).argmax())
        short = 0.5 * loss.delta * loss.delta + loss.delta * float(np.abs(u - Y)[k])
    else:
        m = Y * u
        k = int(m.argmin())
        short = float(np.logaddexp(0.0, m[k])) if loss.smooth else float(max(m[k] - 1.0, 0.0)) + 1.0
    far = max(left * short / (tol * (1 + abs(risk))), 2 * left / float(W[k]))
    if length == 0 and not targets:
        far = max(2 * left / float(W[k]), left)
    mass = left / far
    P, Y = np.vstack([P, P[k : k + 1]]), np.append(Y, Y[k])
    W, O = np.append(W, mass), np.append(O, O[k])
    W[k] -= mass
    if targets:
        Y[-1] -= sign[k] * far / ball.flip
    else:
        P[-1] += sign[k] * far * way
    return P, Y, W, O


def _squares(X: Array, r: Array, y: Array, ball: Ball, theta: Array) -> tuple[Array, Array]:
    """Each sample moves in proportion to its residual."""
    root = math.sqrt(float(np.mean(r * r)))
    step = np.full(len(r), ball.radius) if root == 0 else ball.radius / root * r
    length = float(np.linalg.norm(theta, ball.q))
    if math.isfinite(ball.flip) and 1 / ball.flip > length:
        return X, y + step / ball.flip
    return X - step[:, None] * direction(theta, ball.p), y


def _checked(
    P: Array, Y: Array, W: Array, O: Array, X: Array, y: Array, loss: LinearLoss, ball: Ball,
    theta: Array, b: float, risk: float,
) -> WorstDistribution:  # fmt: skip
    """With its cost and its loss, from the points themselves."""
    cost = np.linalg.norm(P - X[O], ball.p, axis=1)
    if math.isfinite(ball.flip):
        cost = cost + ball.flip * (np.abs(Y - y[O]) if loss.regression else (y[O] != Y))
    distance = float((W * cost**loss.order).sum()) ** (1 / loss.order)
    mean = float((W * loss.value(P @ theta + b, Y)).sum())
    return WorstDistribution(P, Y, W, O, distance, mean, risk)
