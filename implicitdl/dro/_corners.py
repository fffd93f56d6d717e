"""Hinge and absolute losses with a 2-norm, to the last digit: a central path, then the active set.

    minimise  mean_i max over a in [lo, hi] of a v_i  +  r ||theta||_2,      v = c + s (X theta + b)

(hinge: v = 1 - y u, a in [0, 1]; absolute: v = y - u, a in [-1, 1]). `_central` solves it; of very many
samples a fit to a tenth tells which are far from their corner, so that few are left. The duality gap
of what is found, zero but for rounding, is computed from all samples and proves the value.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from ._central import ROUGH, Sum, path

Array = np.ndarray
_AT_ONCE = 20_000  # samples, above which a fit to some of them comes first
_TOL = 1e-9  # relative gap of a fit


@dataclass(frozen=True, eq=False)
class Corner:
    """theta, b, the value and a proved bound of its distance from the least; how many Newton steps."""

    theta: Array
    b: float
    value: float
    gap: float
    steps: int


def solve(
    X: Array, c: Array, s: Array, low: float, high: float, price: float, intercept: bool
) -> "Corner | None":
    """The minimiser, or None where the method does not get there, as where theta is nearly 0.

    Args:
        X: # (n, d)
        c, s: of v.  # (n,)
        low, high: the range of the multipliers, 0 in it.
        price: r > 0.
        intercept: whether there is a b.
    """
    n, d = X.shape
    centre = np.full(n, 1.0 / n) @ X if intercept else np.zeros(d)
    data = _Data(X, c, s, centre, low, high, price, intercept)
    constant = _constant(data)
    if constant is not None:
        return constant
    with np.errstate(all="ignore"):
        found = path(data.task(None, n), None, _TOL) if n <= _AT_ONCE else _many(data)
        if found is None:
            return None
        w, a, steps = found
        value, gap = data.proof(w, a)
    b = float(w[d] - centre @ w[:d]) if intercept else 0.0
    return Corner(w[:d], b, value, gap, steps)


@dataclass(frozen=True, eq=False)
class _Data:
    """The arguments of `solve`, with features less `centre`, which is not subtracted from all of X."""

    X: Array
    c: Array
    s: Array
    centre: Array
    low: float
    high: float
    price: float
    intercept: bool

    def task(self, rows: "Array | None", total: int, ends: "Array | None" = None) -> Sum:
        """The sum over some rows; the multipliers of all others are at an end, or they do not count."""
        outside, level = np.zeros(self.X.shape[1] + self.intercept), 0.0
        if ends is not None:
            fixed = ends.copy()
            fixed[rows] = 0.0
            outside, level = self.pull(fixed) / total, float(fixed @ self.c) / total
        if rows is None:
            X, s, c = self.X, self.s, self.c
        else:
            X, s, c = self.X.take(rows, axis=0), self.s.take(rows), self.c.take(rows)
        n, d = X.shape
        k = d + 1 if self.intercept else d
        # One block for all large arrays: an allocator that takes it once tends to keep it.
        block = np.empty((5 * n * k + 1) // 2)
        Z, room = block[: 2 * n * k].reshape(2, n, k)
        half = block[2 * n * k :].view(np.float32)[: n * k].reshape(n, k)
        np.subtract(X, self.centre, out=Z[:, :d])
        Z[:, :d] *= s[:, None]
        if self.intercept:
            Z[:, d] = s
        return Sum(Z, room, half, c, d, self.low, self.high, self.price, total, outside, level)

    def away(self, w: Array) -> Array:
        """v of all rows.  # (n,)"""
        d = self.X.shape[1]
        v: Array = self.X @ w[:d]
        v += (w[d] if self.intercept else 0.0) - float(self.centre @ w[:d])
        v *= self.s
        v += self.c
        return v

    def pull(self, a: Array) -> Array:
        """Z'a of all rows.  # (d,) or (d + 1,)"""
        sa = self.s * a
        total = float(sa.sum())
        g: Array = sa @ self.X
        g -= total * self.centre
        return np.append(g, total) if self.intercept else g

    def proof(self, w: Array, a: Array) -> tuple[float, float]:
        """The value, and how far it is above that of the multipliers made feasible.

        Feasible are a in [low, high] with a gradient by b of 0 and one by theta of at most `price`. The
        first is mended by moving the entries that are not at an end, the second by scaling: 0 is
        feasible.
        """
        n, d = self.X.shape
        v = self.away(w)
        value = float(np.maximum(self.low * v, self.high * v).sum()) / n
        value += self.price * math.sqrt(float(w[:d] @ w[:d]))
        a = np.clip(a, self.low, self.high)
        if self.intercept:
            inside = np.flatnonzero((a > self.low) & (a < self.high))
            off = float(self.s @ a)
            if off != 0.0 and len(inside):
                a[inside] -= off / len(inside) * self.s[inside]
                np.clip(a, self.low, self.high, out=a)
        g = self.pull(a)
        if self.intercept and abs(g[d]) > 1e-13 * n:
            return value, math.inf
        share = min(1.0, self.price * n / (float(np.linalg.norm(g[:d])) + 1e-300))
        return value, max(value - share * float(a @ self.c) / n, 0.0)


def _constant(data: _Data) -> "Corner | None":
    """theta = 0 with the best b, where multipliers that come to mind prove that it is best."""
    n, d = data.X.shape
    low, high, c, s = data.low, data.high, data.c, data.s
    b = 0.0
    if data.intercept and low == 0:  # classes: b = -1 or 1, where the larger is at its corner
        b = 1.0 if float(s.sum()) < 0 else -1.0
    elif data.intercept:
        b = float(np.median(c / -s))
    v = c + s * b
    a = np.where(v > 0, high, low)
    corner = np.flatnonzero(v == 0)
    if data.intercept and len(corner):
        a[corner] = 0.0
        a[corner] = np.clip(-float(s @ a) / len(corner) * s[corner], low, high)
    g = data.pull(a)
    if float(np.linalg.norm(g[:d])) > data.price * n or (data.intercept and abs(g[d]) > 1e-12 * n):
        return None
    value = float(np.maximum(low * v, high * v).mean())
    return Corner(np.zeros(d), b, value, 0.0, 0)


def _many(data: _Data) -> "tuple[Array, Array, int] | None":
    """As `path`, from few samples: those near their corner, and the others at an end."""
    n, d = data.X.shape
    low, high = data.low, data.high
    size = max(n // 10, 1000, 10 * d)
    if 2 * size > n:
        return path(data.task(None, n), None, _TOL)
    some = np.sort(np.random.default_rng(0).permutation(n)[:size])
    if size <= _AT_ONCE:
        found = path(data.task(some, size), None, ROUGH)
    else:
        found = _many(replace(data, X=data.X[some], c=data.c[some], s=data.s[some]))
    if found is None:
        return None
    w, _, steps = found
    v = data.away(w)
    # The error of a fit to m samples is sqrt(d / m) of what it leaves unexplained; twice that.
    far, count = np.abs(v), int(2 * n * math.sqrt(d / size))
    a = np.where(v > 0, high, low)
    inside, reach = np.zeros(n, bool), 0.0
    for _ in range(12):
        if not inside.any():
            count = min(n, max(count, 1000))
            reach = float(np.partition(far, count - 1)[count - 1])
            inside = far <= reach
        rows = np.flatnonzero(inside)
        found = path(data.task(rows, n, a), (w, reach), _TOL)
        if found is None:  # too many were on the wrong side
            if len(rows) == n:
                return None
            inside, count = np.zeros(n, bool), 2 * len(rows)
            continue
        w, a[rows], more = found
        steps += more
        v = data.away(w)
        wrong = v * np.where(a > 0.5 * (low + high), 1.0, -1.0) < 0
        wrong[rows] = False
        if not bool(wrong.any()):
            return w, a, steps
        inside |= wrong
        far = np.abs(v)
        reach = float(far[wrong].max())
        a = np.where(v > 0, high, low)
    return None
