"""Proofs of how far a fit may be from optimal: lower bounds by dual points that are made feasible.

With phi_i the loss of a sample as a function of u_i = theta'x_i + b and of lam (flips of labels), for
all multipliers  phi_i(u, lam) >= alpha_i u + beta_i lam + c_i.  Where  sum_i alpha_i = 0  (with an
intercept) and  ||X'alpha / n||_p <= e = r + mean beta,  summation gives

    min over theta, b, lam >= max(||theta||_q, least) of mean phi + r lam
        >= mean c + (e - ||X'alpha / n||_p) least.

Multipliers are P and W, of a class y in {-1, 1} or of a residual:

    logistic    alpha = y (W - P), beta = -k W, c = entropy(P),   P, W in [0, 1]
    hinge       alpha = y (W - P), beta = -k W, c = P + W,        P, W, 1 - P - W >= 0
    absolute    alpha = -P,        c = P y,                       |P| <= 1
    Huber       alpha = -P,        c = P y - P^2 / 2,             |P| <= delta

The sum is made 0 by shrinking what pulls b to one side, the norm small enough by shrinking all; both keep P and W
feasible, whatever they were. What rounding leaves of the sum is charged with a bound of |b|.

Reference:
    Rockafellar (1970), "Convex analysis", section 31 (Fenchel duality).
"""

import math

import numpy as np
from scipy.special import xlog1py, xlogy

from ._losses import Ball, LinearLoss

Array = np.ndarray
_LONGER = 1e3  # with r = 0 the proof is for theta up to this many times as long as the one found
_ROUNDS = 6  # of the correction in `_nearer`


def multipliers(
    u: Array, y: Array, loss: LinearLoss, pieces: "Array | None" = None
) -> list[tuple[Array, Array]]:
    """P and W from the slopes at u, or from multipliers of `LinearLoss.pieces`, or both.

    Args:
        u, y: # (n,)
        pieces: sums of 1 over each sample.  # (n, J)
    """
    none = np.zeros_like(u)
    if loss.regression:
        out = []
        if pieces is not None:
            out.append((loss.slope * (pieces[:, 1] - pieces[:, 0]), none))
        if loss.smooth:
            out.append((np.clip(y - u, -loss.slope, loss.slope), none))
        elif pieces is None:
            out.append((np.sign(y - u), none))
        return out
    if loss.smooth:
        m = y * u
        e = np.exp(-np.abs(m))
        P = np.where(m > 0, e, 1.0) / (1.0 + e)
        return [(P, none if pieces is None else pieces[:, 1])]
    if pieces is None:
        return [((y * u < 1) * 1.0, none)]
    return [(pieces[:, 1], pieces[:, 2] if pieces.shape[1] > 2 else none)]


def lower(
    X: Array, y: Array, loss: LinearLoss, ball: Ball, intercept: bool, theta: Array, value: float,
    found: list[tuple[Array, Array]], enough: float,
) -> float:  # fmt: skip
    """A proved lower bound of the least worst-case risk.

    Args:
        X, y, loss, ball, intercept: the problem, of order 1.
        theta: what was found; only used where the radius is 0.
        value: a risk that is attained, so that optimal theta and b have at most this.
        found: nearly optimal P and W; any will do.
        enough: do not try harder once the bound is this high.
    """
    best = 0.0  # losses are not negative
    for P, W in found:
        if not (np.isfinite(P).all() and np.isfinite(W).all()):
            continue
        case = _Case(X, y, loss, ball, intercept, theta, value)
        P, W = case.inside(P, W)
        best = max(best, case.bound(P, W))
        for _ in range(_ROUNDS):
            if best >= enough:
                return best
            P = case.nearer(P, W)
            best = max(best, case.bound(P, W))
    return best


class _Case:
    def __init__(
        self, X: Array, y: Array, loss: LinearLoss, ball: Ball, intercept: bool, theta: Array,
        value: float,
    ):  # fmt: skip
        self.X, self.y, self.loss, self.p, self.intercept = X, y, loss, ball.p, intercept
        self.n, self.d = X.shape
        self.price = ball.radius * loss.slope
        flips = not loss.regression and math.isfinite(ball.flip) and ball.radius > 0
        self.flip = ball.flip if flips else 0.0
        self.flips = flips
        self.least = 1 / ball.flip if loss.regression and math.isfinite(ball.flip) else 0.0
        self.theta, self.value = theta, value
        self.centre = np.full(self.n, 1.0 / self.n) @ X if intercept else np.zeros(self.d)
        # Optimal theta and b may be anywhere, so y may be measured from anywhere.
        self.middle = float(y.mean()) if loss.regression and intercept else 0.0

    def inside(self, P: Array, W: Array) -> tuple[Array, Array]:
        """In their ranges."""
        if self.loss.regression:
            return np.clip(P, -self.loss.slope, self.loss.slope), W
        W = np.clip(W, 0.0, 1.0) if self.flips else np.zeros_like(P)
        return np.clip(P, 0.0, 1.0 if self.loss.smooth else 1.0 - W), W

    def alpha(self, P: Array, W: Array) -> Array:
        out: Array = -P if self.loss.regression else self.y * (W - P)
        return out

    def pull(self, alpha: Array) -> Array:
        """X'alpha / n of the centred features."""
        g: Array = (alpha @ self.X - float(alpha.sum()) * self.centre) / self.n
        return g

    def bound(self, P: Array, W: Array) -> float:
        """The dual value once P and W are feasible."""
        if self.intercept:
            P, W = self.balanced(P, W)
        alpha = self.alpha(P, W)
        g = self.pull(alpha)
        size = float(np.linalg.norm(g, self.p))
        weight = self.flip * float(W.mean())
        charge = 0.0
        if self.price > 0:
            t = min(1.0, self.price / max(size + weight, 1e-300))
            P, W, size, weight, alpha = t * P, t * W, t * size, t * weight, t * alpha
            longest = self.value / self.price
        else:
            longest = _LONGER * float(np.linalg.norm(self.theta, 2))
            charge += float(np.linalg.norm(g)) * longest
        if self.intercept:
            charge += abs(float(alpha.sum())) / self.n * self._reach(longest)
        if self.loss.regression:
            gain = P * (self.y - self.middle)
            if self.loss.smooth:
                gain = gain - 0.5 * P * P
        elif self.loss.smooth:
            gain = -xlogy(P, P) - xlog1py(1 - P, -P)
        else:
            gain = P + W
        slack = max(self.price - weight - size, 0.0)
        return float(gain.mean()) + slack * self.least - charge

    def balanced(self, P: Array, W: Array) -> tuple[Array, Array]:
        """With sum alpha = 0: what pulls b up and what pulls it down, the stronger one shrunk."""
        if self.loss.regression:
            up, down = np.maximum(-P, 0.0), np.maximum(P, 0.0)
        else:
            above = self.y > 0
            up, down = np.where(above, W, P), np.where(above, P, W)
        most, other = float(up.sum()), float(down.sum())
        if most > other:
            up = up * (other / most)
        elif other > most:
            down = down * (most / other)
        if self.loss.regression:
            return down - up, W
        return np.where(above, down, up), np.where(above, up, down)

    def _reach(self, longest: float) -> float:
        """A bound of |b| (less `middle`) of all fits that are as good, of centred features.

        Of a regression the mean of u is b, and mean |y - u| is bounded by the risk. In each class the
        mean of the wrong side is at most the risk over the share of the class.
        """
        if self.loss.regression:
            L = self.loss.slope
            return self.value / L + (0.5 * L if self.loss.smooth else 0.0)
        far = 0.0
        for sign in (-1.0, 1.0):
            rows = (self.y == sign) * 1.0
            count = float(rows.sum())
            if not count:
                return math.inf
            mean = rows @ self.X / count - self.centre
            norm = float(np.linalg.norm(mean, self.p if self.price > 0 else 2))
            far = max(far, self.value * self.n / count + norm * longest)
        return far

    def nearer(self, P: Array, W: Array) -> Array:
        """P with the gradient that it should have, moved least where it is near an end."""
        L = self.loss.slope
        if self.loss.regression:
            room = np.minimum(L - P, L + P)
        else:
            room = np.minimum(P, (1.0 if self.loss.smooth else 1.0 - W) - P)
        room = np.maximum(room, 0.0)
        alpha = self.alpha(P, W)
        g = self.pull(alpha)
        size = float(np.linalg.norm(g, self.p))
        e = max(self.price - self.flip * float(W.mean()), 0.0) * (1 - 1e-12)
        goal = np.clip(g, -e, e) if self.p == math.inf else g * min(1.0, e / max(size, 1e-300))
        Z, off = self.X - self.centre, g - goal
        if self.intercept:
            Z = np.column_stack([Z, np.ones(self.n)])
            off = np.append(off, alpha.sum() / self.n)
        scale = np.sqrt((Z * Z).mean(0)) + 1e-300
        root = np.sqrt(room) if self.loss.smooth else room
        try:
            move = (
                root
                * np.linalg.lstsq(
                    (root[:, None] * (Z / scale)).T, self.n * off / scale, rcond=1e-14
                )[0]
            )
        except np.linalg.LinAlgError:
            return P
        # alpha is to change by -move.
        change = move if self.loss.regression else self.y * move
        return self.inside(P + change, W)[0]
