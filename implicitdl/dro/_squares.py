"""Least squares against the worst law: sqrt(MSE) + r max(||theta||_q, 1/k), in d dimensions.

The data enter by R alone, ||R [theta; -1]|| the root mean square. With q = 2 the solution lies on the
path of ridge regressions and is one root of one function; otherwise a small cone program gives it.

Reference:
    Blanchet, Kang, Murthy (2019), "Robust Wasserstein profile inference", proposition 2.
"""

import math

import numpy as np

from ._losses import Ball, Fit

Array = np.ndarray


def squares(X: Array, y: Array, ball: Ball, intercept: bool) -> Fit:
    """The minimiser; arguments as of `_fits.fit`."""
    d = X.shape[1]
    mx, my = (X.mean(0), float(y.mean())) if intercept else (np.zeros(d), 0.0)
    R = _triangle(X, y, mx, my)  # (d + 1, d + 1): ||R [theta; -1]|| = RMSE
    least = 0.0 if math.isinf(ball.flip) else 1 / ball.flip
    theta, steps, method = None, 0, "closed form"
    if ball.radius == 0:
        theta = np.linalg.lstsq(R[:, :d], R[:, d], rcond=1e-12)[0]
    elif ball.q == 2:
        theta = _ridge_path(R, ball.radius)
        if np.linalg.norm(theta) < least:
            theta = None
    if theta is None:
        theta, steps = _cone_squares(R, ball, least)
        method = "cone program"
    root = float(np.linalg.norm(R[:, :d] @ theta - R[:, d]))
    size = max(float(np.linalg.norm(theta, ball.q)), least)
    value = root + ball.radius * size
    lower = _dual(R, theta, ball, least)
    gap = max(value * value - max(lower, 0.0) ** 2, 0.0)
    return Fit(theta, my - float(mx @ theta), size, value * value, gap, steps, method)


def _dual(R: Array, theta: Array, ball: Ball, least: float) -> float:
    """A lower bound of the root: z'c + (r - ||A'z||_p) / k for any ||z|| <= 1, ||A'z||_p <= r.

    R = [A c]; z is the direction of the residual c - A theta, shortened until it is feasible.
    """
    d = R.shape[1] - 1
    z = R[:, d] - R[:, :d] @ theta
    z = z / max(float(np.linalg.norm(z)), 1e-300)
    size = float(np.linalg.norm(R[:, :d].T @ z, ball.p))
    if size > 1e-10 * float(np.linalg.norm(R[:, :d])):  # else it is 0 but for rounding
        z = z * min(1.0, ball.radius / size)
    size = min(size, ball.radius)
    return float(z @ R[:, d]) + least * (ball.radius - size)


def _triangle(X: Array, y: Array, mx: Array, my: float) -> Array:
    """R with ||R [theta; -1]||^2 the mean square: by Cholesky where that is accurate, else by QR."""
    n, d = X.shape
    M = np.empty((d + 1, d + 1))
    step = 8192
    M[:] = 0.0
    for k in range(0, n, step):
        part = np.column_stack([X[k : k + step] - mx, y[k : k + step] - my])
        M += part.T @ part
    unit = 1.0 / np.sqrt(np.maximum(np.diag(M), 1e-300))
    try:
        L = np.linalg.cholesky(M * unit * unit[:, None])
        if float(np.diag(L).min()) > 1e-5:
            R: Array = L.T / unit / math.sqrt(n)
            return R
    except np.linalg.LinAlgError:
        pass
    full = np.asarray(np.linalg.qr(np.column_stack([X - mx, y - my]), mode="r")) / math.sqrt(n)
    if len(full) < d + 1:
        full = np.vstack([full, np.zeros((d + 1 - len(full), d + 1))])
    return full


def _ridge_path(R: Array, r: float) -> Array:
    """argmin ||A theta - c|| + r ||theta||: theta of ridge at mu = r ||A theta - c|| / ||theta||."""
    from scipy.optimize import brentq

    d = R.shape[1] - 1
    U, s, Vt = np.linalg.svd(R[:, :d], full_matrices=False)
    c = R[:, d]
    k, square = U.T @ c, s * s
    off = float(np.linalg.norm(c - U @ k))
    if float(np.linalg.norm(s * k)) <= r * float(np.linalg.norm(c)):
        return np.zeros(d)

    def parts(log_mu: float) -> tuple[Array, float]:
        mu = math.exp(log_mu)
        t = k / (square + mu)
        root = math.hypot(off, mu * math.sqrt(float(t @ t)))
        return s * t, root

    def gap(log_mu: float) -> float:
        t, root = parts(log_mu)
        return log_mu + 0.5 * math.log(float(t @ t)) - math.log(max(r * root, 1e-300))

    low = high = 2 * math.log(max(float(s.max()), 1e-150))
    while gap(high) < 0 and high < low + 200:
        high += 2.0
    while gap(low) > 0 and low > high - 90:
        low -= 2.0
    at = brentq(gap, low, high, xtol=1e-14, rtol=1e-14) if gap(low) < 0 < gap(high) else low
    x: Array = Vt.T @ parts(at)[0]
    return x


def _cone_squares(R: Array, ball: Ball, least: float) -> tuple[Array, int]:
    """The native cone solver: min tau + r lam over ||R [theta; -1]|| <= tau, ||theta||_q <= lam."""
    import torch

    from ..convex import ConeProgram, Cones

    d, q = R.shape[1] - 1, ball.q
    extra = d if q == 1 else 0
    size = d + 2 + extra  # theta, tau, lam, the sizes |theta_j|
    lines: list[Array] = []
    eye = np.eye(d)
    if q == np.inf:
        one = np.zeros((2 * d, size))
        one[:d, :d], one[d:, :d], one[:, d + 1] = eye, -eye, -1.0
        lines.append(one)
    elif q == 1:
        one = np.zeros((2 * d + 1, size))
        one[:d, :d], one[d : 2 * d, :d] = eye, -eye
        one[:d, d + 2 :] = one[d : 2 * d, d + 2 :] = -eye
        one[2 * d, d + 2 :], one[2 * d, d + 1] = 1.0, -1.0
        lines.append(one)
    h = [np.zeros(len(t)) for t in lines]
    row = np.zeros((1, size))
    row[0, d + 1] = -1.0
    lines.append(row)
    h.append(np.array([-least]))
    count = sum(len(t) for t in lines)
    cones = [len(R) + 1]
    block = np.zeros((len(R) + 1, size))
    block[0, d], block[1:, :d] = -1.0, -R[:, :d]
    lines.append(block)
    h.append(np.r_[0.0, -R[:, d]])
    if q == 2:
        block = np.zeros((d + 1, size))
        block[0, d + 1], block[1:, :d] = -1.0, -eye
        lines.append(block)
        h.append(np.zeros(d + 1))
        cones.append(d + 1)
    cost = np.zeros(size)
    cost[d], cost[d + 1] = 1.0, ball.radius
    tensors = (cost, np.concatenate(lines), np.concatenate(h))
    c, G, right = (torch.from_numpy(t) for t in tensors)
    with torch.no_grad():
        found = ConeProgram(Cones(count, tuple(cones))).solve(None, c, G, right)
    x: Array = found.value.numpy()[:d]
    return x, int(found.steps)
