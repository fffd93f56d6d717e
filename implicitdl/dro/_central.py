"""The central path of `_corners`, and the active set at its end.

    minimise  (1/total) sum_i max(low v_i, high v_i) + outside'w + level + price ||theta||,  v = c + Z w

over w = (theta, b). With v = p - m and p, m >= 0, optimal are multipliers a in [low, high] with

    Z'a / total + outside + price theta / ||theta|| = 0,    (high - a) p = 0,    (a - low) m = 0.

A primal-dual path makes all products equal and sends them to zero; a step costs one weighted Gram
matrix of Z. Long before the end it shows which samples are at their corner, v_i = 0. With the other
a_i at an end only equations are left, solved by Newton steps with the Gram matrix of those few rows.
On the way, samples that are surely far from their corner leave: their a_i are set to an end, they
enter as one vector, and whether they are where they were put is checked at the solution.

Reference:
    Mehrotra (1992), "On the implementation of a primal-dual interior point method"; Bergounioux, Ito,
    Kunisch (1999), "Primal-dual strategy for constrained optimal control problems" (active sets).
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from scipy.linalg import blas, lapack

Array = np.ndarray
ROUGH = 1e-3  # relative gap from which on the active set is not looked for
_SCREEN = 0.1  # relative gap at which samples first leave
_DOWN_UP = np.array([[-1.0], [1.0]])


@dataclass(frozen=True, eq=False)
class Sum:
    """The data of the problem above.

    Attributes:
        Z: # (n, d), or (n, d + 1) with an intercept
        room: memory for a weighted copy of Z.  # as Z
        half: Z in single precision.
        c: # (n,)
        d: features.
        low, high, price: numbers, 0 in [low, high].
        total: samples, those in `outside` included.
        outside, level: the others, whose multipliers are at an end, are linear in w = (theta, b).
    """

    Z: Array
    room: Array
    half: Array
    c: Array
    d: int
    low: float
    high: float
    price: float
    total: int
    outside: Array
    level: float

    def fewer(self, keep: Array, ends: Array) -> "Sum":
        """The rows that are kept, the others at the ends given."""
        fixed = ends.copy()
        fixed[keep] = 0.0
        outside = self.outside + self.Z.T @ fixed / self.total
        level = self.level + float(fixed @ self.c) / self.total
        k = len(keep)
        return replace(
            self, Z=self.Z.take(keep, axis=0), room=self.room[:k], half=self.half.take(keep, axis=0),
            c=self.c.take(keep), outside=outside, level=level,
        )  # fmt: skip

    def gradient(self, a: Array, w: Array, length: float) -> Array:
        """By w, at multipliers a."""
        g: Array = self.Z.T @ a
        g /= self.total
        g += self.outside
        g[: self.d] += self.price / length * w[: self.d]
        return g

    def gram(self, weights: Array, exact: bool) -> Array:
        """Z' diag(weights) Z, in double or single precision."""
        if exact:
            np.multiply(self.Z, np.sqrt(weights)[:, None], out=self.room)
            H: Array = self.room.T @ self.room
            return H
        n, k = self.Z.shape
        part = self.room.reshape(-1).view(np.float32)[: n * k].reshape(n, k)
        np.multiply(self.half, np.sqrt(weights.astype(np.float32))[:, None], out=part)
        return (part.T @ part).astype(np.float64)

    def bend(self, H: Array, w: Array, length: float) -> None:
        """Add the Hessian of price ||theta|| to the lower half of H, in place."""
        d, size = self.d, len(H)
        rate = self.price / length
        theta = w.copy()
        theta[d:] = 0.0
        blas.dsyr(-rate / (length * length), theta, lower=1, a=H.T, overwrite_a=1)
        H.reshape(-1)[: d * size : size + 1] += (1 + 1e-10) * rate

    def length(self, w: Array) -> float:
        """||theta||."""
        return math.sqrt(float(w[: self.d] @ w[: self.d]))


def path(
    task: Sum, near: "tuple[Array, float] | None", tol: float
) -> "tuple[Array, Array, int] | None":
    """w and multipliers, along the central path to a relative gap, or by the active set to rounding.

    Args:
        task: the problem.
        near: a w, and how much the v at the solution may differ from those there.
        tol: relative gap; from `ROUGH` on the active set is not looked for.
    """
    low, span = task.low, task.high - task.low
    # Rounding of the matrix makes Newton's step inexact, not the point that it goes to: single
    # precision will do until the end is near.
    task.half[:] = task.Z
    begun = _begin(task) if near is None else (near[0], None)
    if begun is None:
        return None
    w, a = begun
    v = task.c + task.Z @ w
    width = (float(np.abs(v).mean()) + 1e-300) if near is None else near[1]
    tau = 0.2 * width * span
    # p and m with p - m = v and tau / p + tau / m = span.
    root = np.sqrt((span * v) ** 2 + 4 * tau * tau)
    both = np.empty((2, 2, len(v)))
    both[0, 0] = (root + span * v + 2 * tau) / (2 * span)
    both[0, 1] = (root - span * v + 2 * tau) / (2 * span)
    if a is None:
        a = low + tau / both[0, 1]  # then the products are tau
    both[1, 0], both[1, 1] = task.high - a, a - low
    return _follow(task, w, v, a, both, tol, width / span)


def _follow(
    task: Sum, w: Array, v: Array, a: Array, both: Array, tol: float, width: float,
    screen: float = _SCREEN, exact: bool = False,
) -> "tuple[Array, Array, int] | None":  # fmt: skip
    """As `path`, from a point on the way.

    Args:
        task: the problem.
        w, v, a: # (d,) or (d + 1,), (n,), (n,)
        both: p and m; their multipliers, high - a and a - low.  # (2, 2, n)
        tol: relative gap.
        width: of v, per a.
        screen: relative gap at which to look for rows that are surely at an end.
        exact: whether matrices are in double precision.
    """
    Z, low, high = task.Z, task.low, task.high
    (n, size), total, span = Z.shape, task.total, task.high - task.low
    both, v, a = both.copy(), v.copy(), a.copy()
    P, S = both
    change, ratio = np.empty_like(both), np.empty((2, 2 * n))
    dP, dS = change

    def lengths(most: float) -> tuple[float, float]:
        """The largest steps up to 1 that keep `most` of what is there."""
        np.divide(change.reshape(2, -1), both.reshape(2, -1), out=ratio)
        t, q = ratio.min(1).tolist()
        return min(1.0, -most / min(t, -1e-300)), min(1.0, -most / min(q, -1e-300))

    count = n
    for step in range(40):
        length = task.length(w)
        gap = float(np.vdot(S, P)) / total
        above, below = P.sum(1).tolist()
        value = (high * above - low * below) / total + task.price * length
        value += float(task.outside @ w) + task.level
        g = task.gradient(a, w, length)
        if not (length > 1e-12 * width and math.isfinite(gap + value)):
            return None
        if gap <= ROUGH * value and tol >= ROUGH:
            return w, a, step
        if gap <= 0.1 * value:  # which samples seem to be at their corner
            trial = a + v / (0.4 * width)
            free = (trial > low) & (trial < high)
            before, count = count, int(np.count_nonzero(free))
            if 0 < count <= size and before - count <= 3 and gap <= 1e-2 * value:  # it settles
                done = _active(task, w, a, v, trial, free, 0.4 * width)
                if done is not None:
                    return done[0], done[1], step + done[2]
            if gap <= tol * value and float(np.abs(g).max()) <= tol * task.price:
                return w, a, step
        R = P / S
        if gap <= screen * value and n > 8 * size and n * size > 20_000:
            # Where p is large for its multiplier, a will end high; where m is, low.
            far = R / width > 20.0
            keep = np.flatnonzero(~(far[0] | far[1]))
            if 0 < len(keep) <= 0.7 * n:
                ends = np.where(far[0], high, low)
                found = _follow(
                    task.fewer(keep, ends), w, v[keep], a[keep], both[:, :, keep], tol, width,
                    0.1 * screen, exact,
                )  # fmt: skip
                if found is not None:
                    at, own, more = found
                    there = task.c + Z @ at
                    wrong = np.where(far[0], there < 0, there > 0)
                    wrong[keep] = False
                    if not bool(wrong.any()):
                        ends[keep] = own
                        return at, ends, step + more
                screen = 0.0  # not so sure
            else:
                screen *= 0.1
        D = 1.0 / (R[0] + R[1])
        exact = exact or gap <= 1e-4 * value
        while True:
            H = task.gram(D / total, exact)
            task.bend(H, w, length)
            L, info = lapack.dpotrf(H.T, lower=1, clean=0, overwrite_a=1)
            if exact or not info:
                break
            exact = True
        if info:
            return None
        # Without a target: how far can we go?
        dv, da, dw = _move(task, L, D, v, g)
        np.multiply(_DOWN_UP, da, out=dS)
        np.multiply(R, dS, out=dP)
        dP += P
        np.negative(dP, out=dP)
        t, q = lengths(1.0)
        cross, along = float(np.vdot(dS, dP)) / total, float(np.vdot(S, dP)) / total
        after = gap + t * along - q * (gap + along) + t * q * cross
        target = max(after / gap, 1e-8) ** 3 * gap * total / (2 * n)
        # With one, and the product of the changes.
        K = target - dS * dP
        K /= S
        dv, da, dw = _move(task, L, D, v - (K[0] - K[1]), g)
        np.multiply(_DOWN_UP, da, out=dS)
        np.multiply(R, dS, out=dP)
        np.subtract(K, dP, out=dP)
        dP -= P
        if gap > 3e-2 * value:
            # Far from the end every sample goes as far as it can, at most to a fifth, by itself. As
            # p - m = v and the two multipliers have a constant sum, the other of the two follows.
            w = w + dw
            v += dv
            np.maximum(P + dP, 0.2 * P, out=P)
            off = v - (P[0] - P[1])
            P[0] += np.maximum(off, 0.0)
            P[1] -= np.minimum(off, 0.0)
            np.maximum(S + dS, 0.2 * S, out=S)
            over = S[0] + S[1] - span
            first = S[0] > S[1]
            S[0] -= first * over
            S[1] -= ~first * over
            np.subtract(high, S[0], out=a)
            continue
        t, q = lengths(0.99)
        w = w + t * dw
        v += t * dv
        change *= np.array([t, q])[:, None, None]
        both += change
        a += q * da
    return None


def _move(task: Sum, L: Array, D: Array, want: Array, g: Array) -> tuple[Array, Array, Array]:
    """dv, da, dw of a Newton step: da = D (want + dv), and w stationary."""
    right = task.Z.T @ (D * want)
    right /= -task.total
    right -= g
    dw = lapack.dpotrs(L, right, lower=1)[0]
    dv = task.Z @ dw
    da = want + dv
    da *= D
    return dv, da, dw


def _begin(task: Sum) -> "tuple[Array, Array] | None":
    """Ridge regression with the same v: w, and multipliers that are nearly feasible.

    Its residuals e satisfy Z'e / n = -rho theta. So a = k e has the gradient that the norm asks for
    where k rho ||theta|| = price, which fixes rho; a is then cut to its range.
    """
    Z, c, d = task.Z, task.c, task.d
    n, size = Z.shape
    span = task.high - task.low
    G = (task.half.T @ task.half).astype(np.float64)
    G /= n
    diagonal = G.reshape(-1)[:: size + 1]
    diagonal += 1e-6 * float(diagonal.sum()) / size
    right = Z.T @ c
    right /= -n
    rho = 0.0
    for _ in range(2):
        H = G.copy()
        H.reshape(-1)[:: size + 1][:d] += rho
        _, w, info = lapack.dposv(H.T, right, lower=1, overwrite_a=1)
        if info:
            return None
        e = c + Z @ w
        k = 0.5 / (float(np.abs(e).mean()) + 1e-300)
        rho = task.price / (k * task.length(w) + 1e-300)
    a = np.clip(k * e, task.low + 0.03 * span, task.high - 0.03 * span)
    # Least squares put the mean of y u below 1, where it ends above.
    return (2.0 if task.low == 0 else 1.0) * w, a


def _active(
    task: Sum, w: Array, a: Array, v: Array, trial: Array, free: Array, width: float
) -> "tuple[Array, Array, int] | None":
    """The solution by guesses of which v_i are 0: those whose trial, a_i + v_i / width, is no end.

    The others' a_i are at an end. Newton steps with the multipliers of the guessed ones kept in a
    quadratic penalty, which they make exact.
    """
    Z, low, high, size = task.Z, task.low, task.high, task.Z.shape[1]
    rows, changes = np.flatnonzero(free), size
    for step in range(1, 12):
        if not 0 < len(rows) <= size:
            return None
        part, own = Z.take(rows, axis=0), a.take(rows)
        a = np.clip(trial, low, high)
        a[rows] = own
        length = task.length(w)
        g = task.gradient(a, w, length)
        H = part.T @ part
        # Far stiffer than the norm, and far from the end of the digits.
        stiff = 1e6 * task.price / length * len(rows) / (float(H.trace()) + 1e-300)
        H *= stiff
        task.bend(H, w, length)
        away = v.take(rows)
        _, dw, info = lapack.dposv(H.T, -g - part.T @ (stiff * away), lower=1, overwrite_a=1)
        if info:
            return None
        w = w + dw
        dv = Z @ dw
        v = v + dv
        away += dv.take(rows)
        a[rows] += stiff * task.total * away
        trial = a + v / width
        before, free = free, (trial > low) & (trial < high)
        now = int(np.count_nonzero(free != before))
        if not now and float(np.abs(v.take(rows)).max()) <= 1e-9 * width:
            return w, a, step
        if 2 * now > changes:
            return None
        changes = max(now, 1)
        if now:
            rows = np.flatnonzero(free)
    return None
