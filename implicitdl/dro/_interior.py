"""One interior-point method for convex fits in few variables to many samples.

    minimise  (1/N) sum_i f_i(u_i) + (1/N) sum_i max_j (A_ij u_i + B_j lam + C_ij) + g'w + eps lam
    over w = (theta, b, lam, tau),  u = X theta + b,  with  G w <= h  and, if asked, ||theta||_2 <= lam.

f is smooth and convex. The maxima are s_i with slacks t_ij = s_i - (...) > 0 and multipliers a_ij,
sum_j a_ij = 1/N. Each Newton step eliminates s_i sample by sample, so the only system is of the size
of w, and a step costs one weighted Gram matrix of X: memory and time are linear in the samples.

Reference:
    Mehrotra (1992), predictor and corrector; Nesterov, Todd (1997), scaling of the second-order cone,
    in the form of Vandenberghe (2010), "The CVXOPT linear and quadratic cone program solvers".
"""

# ruff: noqa: B023 - `direction` and `lengths` are called in the pass of the loop that defines them

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray
_CHUNK = 4096  # rows whose weighted copy stays in the cache


@dataclass(frozen=True, eq=False)
class Task:
    """The data of the problem above.

    Attributes:
        X: # (n, d)
        intercept: whether there is a b.
        eps: the price of lam.
        total: N, which may be more than n where g has the other samples.
        smooth: u -> (f, f', f''), one a sample; None for 0.
        A, B, C: the pieces; None where there are none.  # (n, J), (J,), (n, J)
        g: # (d + 2 + extra,), in the order of w; b has its place, with or without an intercept
        G, h: # (rows, d + 2 + extra), (rows,)
        extra: the number of tau.
        cone: whether ||theta||_2 <= lam is asked for.
        start: w, strictly feasible.
        soft: two pieces +-d r stand for Huber's loss, min over v of v^2/2 + d |r - v|.
    """

    X: Array
    intercept: bool
    eps: float
    total: int
    smooth: "Callable[[Array], tuple[Array, Array, Array]] | None"
    A: "Array | None"
    B: "Array | None"
    C: "Array | None"
    g: Array
    G: Array
    h: Array
    extra: int
    cone: bool
    start: Array
    soft: bool = False

    def scores(self, w: Array) -> Array:
        """u.  # (n,)"""
        d = self.X.shape[1]
        u: Array = self.X @ w[:d] + w[d]
        return u

    def values(self, u: Array, lam: float) -> Array:
        """The pieces.  # (n, J)"""
        v: Array = self.A * u[:, None] + self.B * lam + self.C
        return v

    def objective(self, w: Array) -> float:
        """The value at w."""
        d = self.X.shape[1]
        u, total = self.scores(w), self.g @ w + self.eps * w[d + 1]
        if self.smooth is not None:
            total += self.smooth(u)[0].sum() / self.total
        if self.A is not None:
            top = self.values(u, w[d + 1]).max(1)
            if self.soft:
                limit = np.abs(self.A[:, 0])
                inner = np.minimum(top / limit, limit)
                top = inner * (top / limit - 0.5 * inner)
            total += top.sum() / self.total
        return float(total)


@dataclass(frozen=True, eq=False)
class Found:
    """w, the multipliers of the pieces, and how far from optimal w may be."""

    w: Array
    a: "Array | None"
    gap: float
    residual: float
    steps: int


def weighted_gram(X: Array, weights: Array) -> Array:
    """X' diag(weights) X for weights >= 0, in pieces, without a copy of X."""
    d, root = X.shape[1], np.sqrt(weights)[:, None]
    out = np.zeros((d, d))
    for k in range(0, len(X), _CHUNK):
        part = root[k : k + _CHUNK] * X[k : k + _CHUNK]
        out += part.T @ part  # of a matrix with itself: half of the work
    return out


class _Cone:
    """The nonnegative rows and at most one second-order cone, with their scaling."""

    def __init__(self, task: Task, w: Array):
        self.task, d = task, task.X.shape[1]
        self.rows = task.G
        self.soc = np.r_[d + 1, 0:d] if task.cone else None
        self.z = np.full(len(task.h), 1.0)
        self.q = np.zeros(0)
        self.s = self.task.h - self.rows @ w
        self.v = w[self.soc] if self.soc is not None else np.zeros(0)

    def scale(self) -> None:
        """Nesterov and Todd's W of the cone: W z = W^-1 v = the scaled point."""
        if self.soc is None:
            return
        v, q = self.v, self.q
        dv, dq = _det(v), _det(q)
        vb, qb = v / dv, q / dq
        gamma = math.sqrt(max(float(1 + vb @ qb) / 2, 1e-300))
        wb = vb.copy()
        wb[0] += qb[0]
        wb[1:] -= qb[1:]
        self.wb, self.eta = wb / (2 * gamma), np.sqrt(dv / dq)
        self.point = self.forward(q)

    def forward(self, x: Array) -> Array:
        """W x."""
        w0, w1 = self.wb[0], self.wb[1:]
        along = w1 @ x[1:]
        return self.eta * np.r_[w0 * x[0] + along, x[1:] + (x[0] + along / (1 + w0)) * w1]

    def back(self, x: Array) -> Array:
        """W^-1 x."""
        w0, w1 = self.wb[0], self.wb[1:]
        along = w1 @ x[1:]
        return np.r_[w0 * x[0] - along, x[1:] + (-x[0] + along / (1 + w0)) * w1] / self.eta

    def hessian(self) -> Array:
        """W^-2 = (2 y y' - J) / eta^2, y = J w."""
        y = self.wb.copy()
        y[1:] *= -1
        H = 2 * np.outer(y, y)
        H[0, 0] -= 1
        H[1:, 1:] += np.eye(len(y) - 1)
        return H / self.eta**2


def _det(x: Array) -> float:
    n = np.linalg.norm(x[1:])
    return float(np.sqrt(max((x[0] - n) * (x[0] + n), 1e-300)))


def _arrow(x: Array, y: Array) -> Array:
    """The cone's product."""
    return np.r_[x @ y, x[0] * y[1:] + y[0] * x[1:]]


def _divided(x: Array, y: Array) -> Array:
    """The u with x o u = y."""
    n2 = max((x[0] - np.linalg.norm(x[1:])) * (x[0] + np.linalg.norm(x[1:])), 1e-300)
    u0 = (x[0] * y[0] - x[1:] @ y[1:]) / n2
    return np.r_[u0, (y[1:] - u0 * x[1:]) / x[0]]


def _longest(x: Array, dx: Array) -> float:
    """The largest step with x + step dx >= 0."""
    down = dx < 0
    return float(np.min(-x[down] / dx[down])) if down.any() else np.inf


def _longest_cone(x: Array, dx: Array) -> float:
    """The largest step with x + step dx in the second-order cone."""
    a = dx[0] ** 2 - dx[1:] @ dx[1:]
    b = x[0] * dx[0] - x[1:] @ dx[1:]
    c = _det(x) ** 2
    linear = -x[0] / dx[0] if dx[0] < 0 else np.inf
    if b * b - a * c < 0:
        return linear
    root = np.sqrt(b * b - a * c)
    # The roots of a t^2 + 2 b t + c, written so that nothing cancels.
    k = -(b + np.copysign(root, b))
    roots = [t for t in ((k / a if a != 0 else np.inf), (c / k if k != 0 else np.inf)) if t > 0]
    return float(min([linear, *roots]))


@np.errstate(all="ignore")  # a direction that is not finite ends it, with the best point so far
def solve(task: Task, tol: float = 1e-10, max_steps: int = 100) -> Found:
    """Minimise; see the module.

    Args:
        task: the problem.
        tol: of the gap and the stationarity, relative.
        max_steps: most Newton steps.

    Returns:
        Found; `gap` and `residual` say what was reached.
    """
    d = task.X.shape[1]
    w = task.start.astype(np.float64).copy()
    pieces = task.A is not None
    inv = 1.0 / task.total
    pairs = list(itertools.combinations(range(task.A.shape[1]), 2)) if pieces else []
    u = task.scores(w)
    cone = _Cone(task, w)
    t = a = None
    if pieces:
        values = task.values(u, w[d + 1])
        top = values.max(1)
        room = max(float(np.mean(top - values.min(1))), 1e-8 * (1 + float(np.abs(top).mean())))
        t = top[:, None] + room - values
        a = np.full(values.shape, inv / values.shape[1])
        base = inv * room
    else:
        base = 0.0
    count = len(task.h) + (1 if task.cone else 0) + (task.A.size if pieces else 0)
    if task.cone:
        cone.q = np.r_[task.eps, np.zeros(d)]
    scale = task.eps * abs(w[d + 1]) + (0 if base else 1.0) * abs(task.objective(w))
    each = max(scale / max(len(task.h), 1), 1e-12)
    cone.z = each / np.maximum(cone.s, 1e-12)
    # Without a constraint on lam nothing depends on it.
    priced = task.cone or len(task.h) > 0
    free = np.r_[np.ones(d, bool), task.intercept, priced, np.ones(task.extra, bool)]
    gap = residual = np.inf
    best: tuple[float, Any] = (np.inf, None)
    kept, idle = np.inf, 0
    for step in range(max_steps + 1):
        # Stationarity.
        curvature = np.zeros(len(u))
        slope = np.zeros(len(u))
        if task.smooth is not None:
            _, f1, f2 = task.smooth(u)
            slope, curvature = inv * f1, inv * f2
        r = task.g.copy()
        r[d + 1] += task.eps
        if pieces:
            slope = slope + (a * task.A).sum(1)
            r[d + 1] += a.sum(0) @ task.B
        size = np.abs(r).max() + 1e-300
        pull = np.r_[task.X.T @ slope, slope.sum()]
        r[: d + 1] += pull
        r += cone.rows.T @ cone.z
        if task.cone:
            r[cone.soc] -= cone.q
        r[~free] = 0.0
        gap = float(cone.s @ cone.z + cone.v @ cone.q + ((a * t).sum() if pieces else 0.0))
        value = task.objective(w)
        norm = max(float(np.abs(pull).max()), size, 1e-12)
        residual = float(np.abs(r).max()) / norm
        # w is always feasible, so `value` is attained, whatever the multipliers are: keep the least.
        if np.isfinite(value) and value < best[0]:
            best = (value, (w.copy(), None if a is None else a.copy(), gap, residual, step))
            idle = 0 if value < kept - 1e-12 * abs(value) else idle + 1
            kept = min(kept, value)
        else:
            idle += 1
        near = gap <= tol * (1e-12 + abs(value))
        if step == max_steps or not np.isfinite(gap + residual + value):
            break
        if near and (residual <= tol or (idle >= 2 and residual <= 1e-7) or idle >= 12):
            break
        mu = gap / max(count, 1)
        cone.scale()
        # The matrix of the system.
        M = np.zeros((len(w), len(w)))
        if pieces:
            # Sums over pairs of pieces, so that nothing cancels where one multiplier dominates.
            D = a / t
            share = D / D.sum(1, keepdims=True)
            W = [(j, k, D[:, j] * share[:, k]) for j, k in pairs]
            if task.soft:  # the spring v in series with the pieces
                ((j, k, weight),) = W
                dA = task.A[:, j] - task.A[:, k]
                W = [(j, k, weight / (1 + task.total * weight * dA * dA))]
            cross = np.zeros(len(u))
            for j, k, weight in W:
                dA, dB = task.A[:, j] - task.A[:, k], task.B[j] - task.B[k]
                curvature = curvature + weight * dA * dA
                cross += weight * dA * dB
                M[d + 1, d + 1] += weight.sum() * dB * dB
            M[:d, d + 1] = task.X.T @ cross
            M[d, d + 1] = cross.sum()
            M[d + 1, : d + 1] = M[: d + 1, d + 1]
        M[:d, :d] = weighted_gram(task.X, curvature)
        M[:d, d] = M[d, :d] = task.X.T @ curvature
        M[d, d] = curvature.sum()
        if len(task.h):
            M += cone.rows.T @ ((cone.z / cone.s)[:, None] * cone.rows)
        if task.cone:
            M[np.ix_(cone.soc, cone.soc)] += cone.hessian()
        M = M[np.ix_(free, free)]
        unit = 1.0 / np.sqrt(np.maximum(np.diag(M), 1e-300))
        M = M * unit * unit[:, None]
        factor = _factor(M)

        def direction(target: float, second: "tuple[Any, ...] | None") -> tuple[Any, ...]:
            """Newton's step to complementarity `target`, with second-order terms."""
            right = -r.copy()
            if pieces:
                rho = target - a * t
                if second is not None:
                    rho = rho - second[0]
                rho = rho / a
                lead = np.zeros(len(u))
                for j, k, weight in W:
                    change = weight * (rho[:, j] - rho[:, k])
                    lead += change * (task.A[:, j] - task.A[:, k])
                    right[d + 1] -= change.sum() * (task.B[j] - task.B[k])
                right[: d + 1] -= np.r_[task.X.T @ lead, lead.sum()]
            comp = target - cone.s * cone.z
            if second is not None:
                comp = comp - second[1]
            right -= cone.rows.T @ (comp / cone.s)
            if task.cone:
                unitc = np.zeros(len(cone.v))
                unitc[0] = target
                want = unitc - _arrow(cone.point, cone.point)
                if second is not None:
                    want = want - second[2]
                want = _divided(cone.point, want)
                right[cone.soc] += cone.back(want)
            dw = np.zeros(len(w))
            dw[free] = unit * _solve(factor, M, unit * right[free])
            du = task.X @ dw[:d] + dw[d]
            da: Any = None
            dt: Any = None
            if pieces:
                dg = task.A * du[:, None] + task.B * dw[d + 1]
                da = np.zeros_like(a)
                for j, k, weight in W:
                    change = weight * (rho[:, j] - rho[:, k] + dg[:, j] - dg[:, k])
                    da[:, j] += change
                    da[:, k] -= change
                if task.soft:
                    spring: Array = task.total * (da * task.A).sum(1, keepdims=True)
                    dg = dg - task.A * spring
                dt = (share * rho).sum(1, keepdims=True) + np.zeros_like(a)
                for j, k in pairs:
                    apart = dg[:, j] - dg[:, k]
                    dt[:, k] += share[:, j] * apart
                    dt[:, j] -= share[:, k] * apart
            dslack = -cone.rows @ dw
            dz = (comp - cone.z * dslack) / cone.s
            dv = dq = None
            if task.cone:
                dv = dw[cone.soc]
                dq = cone.back(want - cone.back(dv))
            return dw, du, dt, da, dslack, dz, dv, dq

        def lengths(move: tuple[Any, ...]) -> tuple[float, float]:
            _, _, dt, da, dslack, dz, dv, dq = move
            primal, dual = _longest(cone.s, dslack), _longest(cone.z, dz)
            if pieces:
                primal = min(primal, _longest(t.ravel(), dt.ravel()))
                dual = min(dual, _longest(a.ravel(), da.ravel()))
            if task.cone:
                primal, dual = (
                    min(primal, _longest_cone(cone.v, dv)),
                    min(dual, _longest_cone(cone.q, dq)),
                )
            return primal, dual

        move: tuple[Any, ...] = direction(0.0, None)
        p, q = (min(1.0, x) for x in lengths(move))
        if task.smooth is not None or task.soft:
            p = q = min(p, q)
        dw, du, dt, da, dslack, dz, dv, dq = move
        after = (cone.s + p * dslack) @ (cone.z + q * dz)
        if pieces:
            after += ((t + p * dt) * (a + q * da)).sum()
        if task.cone:
            after += (cone.v + p * dv) @ (cone.q + q * dq)
        sigma = min(1.0, max(after / gap, 0.0)) ** 3 if gap > 0 else 0.0
        sigma = max(sigma, 1e-8)
        second = (
            dt * da if pieces else None,
            dslack * dz,
            _arrow(cone.back(dv), cone.forward(dq)) if task.cone else None,
        )
        move = direction(sigma * mu, second)
        p, q = (min(1.0, 0.99 * x) for x in lengths(move))
        if task.smooth is not None or task.soft:
            p = q = min(p, q)
        dw, du, dt, da, dslack, dz, dv, dq = move
        w = w + p * dw
        u = u + p * du if step % 8 else task.scores(w)
        if pieces:
            # Not from s - (A u + ...): the difference of large numbers would lose what is left.
            t, a = t + p * dt, a + q * da
        cone.z = cone.z + q * dz
        if task.cone:
            cone.q = cone.q + q * dq
        cone.s = cone.s + p * dslack
        if task.cone:
            cone.v = w[cone.soc]
    found = best[1]
    if found is None:
        return Found(w, a, np.inf, np.inf, 0)
    return Found(*found)


def _factor(M: Array) -> Array:
    """A Cholesky factor, with as little added to the diagonal as it takes."""
    n, shift = len(M), 0.0
    for _ in range(12):
        try:
            return np.linalg.cholesky(M + shift * np.eye(n))
        except np.linalg.LinAlgError:
            shift = max(100 * shift, 1e-14)
    return np.linalg.cholesky(M + np.eye(n))


def _solve(L: Array, M: Array, b: Array) -> Array:
    """M^-1 b by its factor, refined once."""
    from scipy.linalg import solve_triangular

    def once(b: Array) -> Array:
        y = solve_triangular(L, b, lower=True, check_finite=False)
        x: Array = solve_triangular(L, y, lower=True, trans="T", check_finite=False)
        return x

    x = once(b)
    return x + once(b - M @ x)
