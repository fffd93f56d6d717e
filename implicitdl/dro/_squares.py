"""Least squares against the worst law: sqrt(MSE) + r max(||theta||_q, 1/k), in d dimensions.

The data enter by R alone, ||R [theta; -1]|| the root mean square. With q = 2 the solution lies on the
path of ridge regressions and is one root of one function; otherwise a small cone program gives it.

Reference:
    Blanchet, Kang, Murthy (2019), "Robust Wasserstein profile inference", proposition 2.
"""

import math

import numpy as np

from ..solution import ConvergenceError
from ._last import squares_by_cones
from ._losses import Ball, Fit, length_row, norm_rows

Array = np.ndarray


def squares(X: Array, y: Array, ball: Ball, intercept: bool) -> Fit:
    """The minimiser; arguments as of `_fits.fit`."""
    d = X.shape[1]
    mx, my = (X.mean(0), float(y.mean())) if intercept else (np.zeros(d), 0.0)
    R = _triangle(X, y, mx, my)  # (d + 1, d + 1): ||R [theta; -1]|| = RMSE
    # In units in which all numbers are near 1.
    s = float(np.linalg.norm(R[:, :d])) / math.sqrt(d) or 1.0
    t = float(np.linalg.norm(R[:, d])) or 1.0
    R = np.column_stack([R[:, :d] / s, R[:, d] / t])
    least = 0.0 if math.isinf(ball.flip) else s / (t * ball.flip)
    ball = Ball(ball.radius / s, ball.p, ball.flip)
    best, low, steps, method = None, 0.0, 0, ""
    for name, solver in (
        ("closed form", _closed),
        ("cone program", _native),
        ("cone program", _last),
    ):
        try:
            got = solver(R, ball, least)
        except (RuntimeError, ValueError, ArithmeticError, np.linalg.LinAlgError):
            continue  # the next one
        if got is None or not np.isfinite(got[0]).all():
            continue
        theta, dual, count = got
        if best is None or _root(R, theta, ball, least) < _root(R, best, ball, least):
            best, steps, method = theta, count, name
        miss = R[:, d] - R[:, :d] @ theta
        low = max(low, ball.radius * least)  # z = 0
        for z in (miss, dual, None if dual is None else -dual):
            if z is not None:
                low = max(low, _dual(R, z, ball, least), _dual(R, _nearer(R, z, ball), ball, least))
        if _root(R, best, ball, least) - low <= 1e-8 * low:
            break
    if best is None:
        raise ConvergenceError("the fit did not converge: no method found a finite risk.")
    root, size = _root(R, best, ball, least), max(float(np.linalg.norm(best, ball.q)), least)
    value = root * root
    gap = max(value - low * low, 0.0) + 2e-15 * value
    theta = best * t / s
    b = my - float(mx @ theta)
    return Fit(theta, b, size * t / s, value * t * t, gap * t * t, steps, method)


_Got = tuple[Array, "Array | None", int]


def _root(R: Array, theta: Array, ball: Ball, least: float) -> float:
    """The root of the risk."""
    d = len(theta)
    size = max(float(np.linalg.norm(theta, ball.q)), least)
    return float(np.linalg.norm(R[:, :d] @ theta - R[:, d])) + ball.radius * size


def _closed(R: Array, ball: Ball, least: float) -> "_Got | None":
    d = R.shape[1] - 1
    A, c = R[:, :d], R[:, d]
    if ball.radius == 0:
        return np.linalg.lstsq(A, c, rcond=1e-12)[0], None, 0
    if least:  # no price is paid for a theta that is shorter
        theta = np.linalg.lstsq(A, c, rcond=1e-12)[0]
        if float(np.linalg.norm(theta, ball.q)) <= least:
            return theta, None, 0
    elif float(np.linalg.norm(A.T @ c, ball.p)) <= ball.radius * np.linalg.norm(c):
        return np.zeros(d), None, 0
    if ball.q == 2:
        theta = _ridge_path(R, ball.radius)
        return None if np.linalg.norm(theta) < least else (theta, None, 0)
    return None


def _native(R: Array, ball: Ball, least: float) -> "_Got | None":
    theta, steps = _cone_squares(R, ball, least)
    return theta, None, steps


def _last(R: Array, ball: Ball, least: float) -> "_Got | None":
    found = squares_by_cones(R, ball, least)
    return None if found is None else (*found, 1)


def _nearer(R: Array, z: Array, ball: Ball) -> Array:
    """z / ||z|| with ||A'z||_p <= r, by the least change of z rather than its length."""
    d = R.shape[1] - 1
    z = z / max(float(np.linalg.norm(z)), 1e-300)
    g = R[:, :d].T @ z
    size = float(np.linalg.norm(g, ball.p))
    if size <= ball.radius:
        return z
    goal = np.clip(g, -ball.radius, ball.radius) if math.isinf(ball.p) else g * ball.radius / size
    try:
        moved: Array = z - np.linalg.lstsq(R[:, :d].T, g - goal, rcond=1e-14)[0]
    except np.linalg.LinAlgError:
        return z
    return moved


def _dual(R: Array, z: Array, ball: Ball, least: float) -> float:
    """A lower bound of the root: z'c + (r - ||A'z||_p) least for any ||z|| <= 1, ||A'z||_p <= r.

    R = [A c]; z is a direction, as that of the residual c - A theta, shortened until it is feasible.
    """
    d = R.shape[1] - 1
    z = z / max(float(np.linalg.norm(z)), 1e-300)
    size = float(np.linalg.norm(R[:, :d].T @ z, ball.p))
    if size > 1e-12 * float(np.linalg.norm(R[:, :d])):  # else it is 0 but for rounding
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
    lines = [norm_rows(d, q, size), length_row(d, size)]
    h = [np.zeros(len(lines[0])), np.array([-least])]
    count = sum(len(t) for t in lines)
    cones = [len(R) + 1]
    block = np.zeros((len(R) + 1, size))
    block[0, d], block[1:, :d] = -1.0, -R[:, :d]
    lines.append(block)
    h.append(np.r_[0.0, -R[:, d]])
    if q == 2:
        block = np.zeros((d + 1, size))
        block[0, d + 1], block[1:, :d] = -1.0, -np.eye(d)
        lines.append(block)
        h.append(np.zeros(d + 1))
        cones.append(d + 1)
    cost = np.zeros(size)
    over = max(1.0, ball.radius)
    cost[d], cost[d + 1] = 1.0 / over, ball.radius / over
    tensors = (cost, np.concatenate(lines), np.concatenate(h))
    c, G, right = (torch.from_numpy(t) for t in tensors)
    with torch.no_grad():
        found = ConeProgram(Cones(count, tuple(cones))).solve(None, c, G, right)
    x: Array = found.value.numpy()[:d]
    return x, int(found.steps)
