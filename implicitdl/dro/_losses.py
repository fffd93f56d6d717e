"""The losses of linear models, as functions of the score u = theta'x + b, and their facts; the ball."""

from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class LinearLoss:
    """What a fit needs to know of a loss.

    Attributes:
        name: as users write it.
        regression: whether targets are numbers, else they are -1 and 1.
        slope: the Lipschitz constant in the residual or margin, which is the slope at infinity.
        order: of the Wasserstein distance, 1, or 2 for squares.
        smooth: whether there is a second derivative.
        delta: of Huber's loss.
    """

    name: str
    regression: bool
    slope: float
    order: int
    smooth: bool
    delta: float = 1.0

    def value(self, u: Array, y: Array) -> Array:
        """The loss of each sample."""
        if not self.regression:
            m = y * u
            return np.logaddexp(0.0, -m) if self.smooth else np.maximum(0.0, 1.0 - m)
        r = y - u
        if self.order == 2:
            return r * r
        if not self.smooth:
            return np.abs(r)
        size = np.abs(r)
        inner = np.minimum(size, self.delta)
        return inner * (size - 0.5 * inner)

    def derivatives(self, u: Array, y: Array) -> tuple[Array, Array, Array]:
        """The loss and its first two derivatives by u, of a smooth one of order 1."""
        if not self.regression:
            m = y * u
            e = np.exp(-np.abs(m))
            p = np.where(m > 0, e, 1.0) / (1.0 + e)  # 1 / (1 + e^m), without overflow
            return np.logaddexp(0.0, -m), -y * p, e / (1.0 + e) ** 2
        r = y - u
        return (
            self.value(u, y),
            -np.clip(r, -self.delta, self.delta),
            (np.abs(r) <= self.delta) * 1.0,
        )

    def pieces(self, y: Array, flip: float) -> "tuple[Array, Array, Array] | None":
        """A, B, C of max_j (A_j u + B_j lam + C_j): the loss, or what flips of labels add to it.

        Args:
            y: targets.
            flip: the price of a flipped label, infinite where labels are fixed.
        """
        zero, one = np.zeros_like(y), np.ones_like(y)
        if self.regression:
            if self.order == 2:
                return None
            c = self.slope  # of Huber's loss these are the two ends, see `Task.soft`
            return np.stack([c * one, -c * one], 1), np.zeros(2), np.stack([-c * y, c * y], 1)
        flips = np.isfinite(flip)
        if self.smooth:  # l(-m) - k lam = l(m) + m - k lam
            if not flips:
                return None
            return np.stack([zero, y], 1), np.r_[0.0, -flip], np.stack([zero, zero], 1)
        A, B, C = [zero, -y], [0.0, 0.0], [zero, one]
        if flips:
            A, B, C = [*A, y], [*B, -flip], [*C, one]
        return np.stack(A, 1), np.array(B), np.stack(C, 1)


CLASSIFICATION = ("hinge", "logistic")
REGRESSION = ("absolute", "huber", "squares")


def linear_loss(name: str, delta: float = 1.0) -> LinearLoss:
    """The loss of that name."""
    return {
        "logistic": LinearLoss("logistic", False, 1.0, 1, True),
        "hinge": LinearLoss("hinge", False, 1.0, 1, False),
        "absolute": LinearLoss("absolute", True, 1.0, 1, False),
        "huber": LinearLoss("huber", True, delta, 1, True, delta),
        "squares": LinearLoss("squares", True, np.inf, 2, True),
    }[name]


@dataclass(frozen=True, eq=False)
class Ball:
    """The ball and the cost.

    Attributes:
        radius: r >= 0, a Wasserstein distance of the loss's order.
        p: of the norm that moves features.
        flip: k, the price of a flipped label, or of moving a target by 1; infinite: fixed.
    """

    radius: float
    p: float
    flip: float

    @property
    def q(self) -> float:
        """The dual exponent, of the norm of theta."""
        return {1.0: np.inf, 2.0: 2.0, np.inf: 1.0}[self.p]


@dataclass(frozen=True, eq=False)
class Fit:
    """theta, b, the multiplier lam of the ball's radius, and the worst-case risk.

    `gap` is a proof: by a feasible point of the dual (`_proof`) the risk is at most so much above the
    least possible, up to rounding. With a radius of 0 that is for theta up to 1000 times as long.
    """

    theta: Array
    b: float
    lam: float
    risk: float
    gap: float
    steps: int
    method: str


def norm_rows(d: int, q: float, size: int) -> Array:
    """G with ||theta||_q <= lam where G w <= 0, of w = (theta, one number, lam, sizes of theta if q = 1).

    None for q = 2, which takes a cone.  # (rows, size)
    """
    eye = np.eye(d)
    G = np.zeros(({np.inf: 2 * d, 1.0: 2 * d + 1}.get(q, 0), size))
    if q == np.inf:
        G[:d, :d], G[d:, :d], G[:, d + 1] = eye, -eye, -1.0
    elif q == 1:
        G[:d, :d], G[d : 2 * d, :d] = eye, -eye
        G[:d, d + 2 :] = G[d : 2 * d, d + 2 :] = -eye
        G[2 * d, d + 2 :], G[2 * d, d + 1] = 1.0, -1.0
    return G


def length_row(d: int, size: int) -> Array:
    """-lam, of the same w.  # (1, size)"""
    row = np.zeros((1, size))
    row[0, d + 1] = -1.0
    return row
