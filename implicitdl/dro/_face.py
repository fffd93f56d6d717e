"""Newton's method on a face of the norm's ball, where the 1-norm and the largest entry are linear.

Once it is known which theta_j are 0 (1-norm), or which are as large as any (infinity norm), the price
of theta is linear in what is left, and a smooth loss has a last-digit minimiser by a few steps.
"""

import numpy as np

from ._interior import weighted_gram
from ._losses import Ball, LinearLoss

Array = np.ndarray


def on_face(
    X: Array, y: Array, loss: LinearLoss, ball: Ball, intercept: bool, theta: Array, b: float,
    rel: float,
) -> "tuple[Array, float, int] | None":  # fmt: skip
    """theta, b and the steps, from a point nearby; None where the face is a guess that goes wrong.

    Args:
        X, y, loss, ball, intercept: as of `_fits.fit`, labels and targets fixed, q of 1 or infinity.
        theta, b: where to begin.
        rel: entries nearer than this to 0, or to the largest, count as there.
    """
    size = np.abs(theta)
    top, d = float(size.max()), len(theta)
    if top == 0:
        return None
    price = ball.radius * loss.slope
    sign = np.where(theta >= 0, 1.0, -1.0)
    if ball.q == 1:
        B = np.diag(sign)[:, size > rel * top]
        cost = np.full(B.shape[1], price)
    else:
        full = size >= (1 - rel) * top
        B = np.column_stack([np.where(full, sign, 0.0), np.eye(d)[:, ~full]])
        cost = np.r_[price, np.zeros(B.shape[1] - 1)]
    Z = X @ B
    v = np.linalg.lstsq(B, theta, rcond=None)[0]
    m = len(v)
    n, free = len(y), m + 1 if intercept else m

    def value_at(v: Array, b: float) -> float:
        return float(loss.value(Z @ v + b, y).mean() + cost @ v)

    value = value_at(v, b)
    steps = 0
    for steps in range(1, 61):  # noqa: B007
        _, first, second = loss.derivatives(Z @ v + b, y)
        g = np.r_[Z.T @ first / n + cost, first.mean()]
        H = np.empty((m + 1, m + 1))
        H[:m, :m] = weighted_gram(Z, second / n)
        H[:m, m] = H[m, :m] = Z.T @ second / n
        H[m, m] = second.mean()
        unit = 1.0 / np.sqrt(np.maximum(np.diag(H), 1e-300))
        scaled = (H * unit * unit[:, None])[:free, :free]
        move = np.zeros(m + 1)
        move[:free] = -unit[:free] * np.linalg.lstsq(scaled, unit[:free] * g[:free], rcond=1e-13)[0]
        drop, t = float(-g[:free] @ move[:free]), 1.0
        if not drop > 1e-16 * abs(value):
            # One more step, whatever the values say: they have no more digits, the slopes do.
            if drop >= 0:
                v, b = v + move[:m], b + float(move[m])
            break
        while t > 1e-10 and not value_at(v + t * move[:m], b + t * move[m]) < value:
            t *= 0.5
        if t <= 1e-10:
            break
        v, b = v + t * move[:m], b + float(t * move[m])
        value = value_at(v, b)
    out: Array = B @ v
    return (out, float(b), steps) if np.isfinite(out).all() else None
