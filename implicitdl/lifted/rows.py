"""Convex fits of rows, the W-steps: min_Theta D(Theta) + l1, ridge and l1 balls of its rows.

D(Theta) = (mu / m) sum_k pen(t_k, Theta r_k) is a generalised linear model with regressors r_k. With
G its gradient and H = (mu / m) sum_k r_k r_k^T, whose Cholesky factor all rows and all steps share,

    D(Theta + E) <= D(Theta) + <G, E> + (beta / 2) <E H, E>.

Without constraints a step is E = -(G + R Theta) (beta H + R)^-1, R the ridge: exact where the
penalty is quadratic. With an l1 norm or ball the right side is minimised by accelerated proximal
steps in a diagonal metric, which cost no pass over the data; their prox is exact, so every iterate
is feasible. Steps are extrapolated, and taken again without where the objective has risen.

Reference: Gu, Askari, El Ghaoui (2020), section 4.1; Bohning, Lindsay (1988) for the majorisation;
Beck, Teboulle (2009) and O'Donoghue, Candes (2015) for the acceleration with restarts.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._linalg import project_l1
from .checks import check_number


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What rows of weights are kept small by; biases are free.

    Args:
        l1: weight of the sum of absolute values.
        ridge: weight of half the sum of squares.
        radius: bound on every row's (weighted) l1 norm, ||w_i||_1 <= radius; None for none.
    """

    l1: float = 0.0
    ridge: float = 0.0
    radius: float | None = None

    def __post_init__(self) -> None:
        check_number("l1", self.l1, zero=True)
        check_number("ridge", self.ridge, zero=True)
        if self.radius is not None:
            check_number("radius", self.radius)


@dataclass(frozen=True, kw_only=True)
class Region:
    """Regularisation of a matrix Theta, column by column, and its feasible rows.

    Attributes:
        l1, ridge: weights, a column each.  # (r,)
        radius: of the l1 ball of each row, or None.  # (rows,)
        ball: the weights in the ball; 0 leaves a column free.  # (r,)
    """

    l1: Tensor
    ridge: Tensor
    radius: Tensor | None = None
    ball: Tensor | None = None

    @staticmethod
    def of(rows: Rows, theta: Tensor, width: int) -> "Region":
        """For Theta = (W, b) with W the first `width` columns."""
        on = theta.new_zeros(theta.shape[1])
        on[:width] = 1.0
        if rows.radius is None:
            return Region(l1=rows.l1 * on, ridge=rows.ridge * on)
        radius = theta.new_full((len(theta),), rows.radius)
        return Region(l1=rows.l1 * on, ridge=rows.ridge * on, radius=radius, ball=on)

    @property
    def smooth(self) -> bool:
        """Whether there is a ridge at most."""
        return self.radius is None and not bool(self.l1.any())

    def value(self, theta: Tensor) -> Tensor:
        """Ridge and l1 norm; the balls are left to `prox`."""
        return (self.l1 * theta.abs() + 0.5 * self.ridge * theta * theta).sum()

    def prox(self, v: Tensor, d: Tensor) -> Tensor:
        """argmin_w sum_j d_j (w_j - v_j)^2 / 2 + l1, ridge and ball, exactly, row by row.

        The shrinkage by l1 and the multiplier of the ball are both soft thresholds and add up;
        with w_j = s_j / d_j^(1/2) the ball is that of the projection with weights a_j / d_j^(1/2).
        """
        scale = d + self.ridge
        w = v * (d / scale)
        w = w - w.clamp(-self.l1 / scale, self.l1 / scale)
        if self.radius is None or self.ball is None:
            return w
        if bool(((self.ball * w.abs()).sum(-1) <= self.radius).all()):
            return w
        root = scale.sqrt()
        return project_l1(w * root, self.radius, (self.ball / root).expand_as(w)) / root

    def inside(self, theta: Tensor) -> Tensor:
        """The nearest feasible point; what is feasible stays as it is."""
        if self.radius is None or self.ball is None:
            return theta
        return project_l1(theta, self.radius, self.ball.expand_as(theta))


def fit_rows(
    theta: Tensor,  # (k, r)
    regressors: Tensor,  # (rows, r)
    value: Callable[[Tensor], Tensor],
    gradient: Callable[[Tensor], Tensor],
    beta: float,
    region: Region,
    *,
    weight: float,
    steps: int,
    convex: bool = True,
    damping: float = 0.0,
    add_up: Callable[[Tensor], Tensor] = lambda t: t,
) -> Tensor:
    """A few steps down from a feasible Theta; never up.

    Args:
        theta: (W, b), where to start.
        regressors: with a column of ones where there is a bias.
        value: sum of the penalties from pre-activations.  # (rows, k) -> ()
        gradient: the penalties' gradients in the pre-activations.  # (rows, k) -> (rows, k)
        beta: Lipschitz constant of `gradient`, or, where it is not `convex`, a first guess.
        region: regularisation and feasible set.
        weight: mu / m.
        steps: how many.
        convex: whether beta is certain.
        damping: of a step, over the mean of H's diagonal: it moves less where there are few data.
        add_up: sums a tensor over the processes that share the samples.
    """
    H = add_up(regressors.mT @ regressors) * weight
    step = _Steps(H, region, damping)

    def total(z: Tensor, at: Tensor) -> float:
        return float(weight * add_up(value(z).reshape(1)) + region.value(at))

    def slope(z: Tensor) -> Tensor:
        return weight * add_up(gradient(z).mT @ regressors)

    z = regressors @ theta.mT
    start = total(z, theta)
    if convex:
        new = _accelerated(theta, z, lambda p, at: step(p, slope(at), beta), regressors, steps)
        if total(regressors @ new.mT, new) <= start:
            return new
    return _guarded(theta, z, start, step, slope, total, regressors, beta, steps, convex)


def _accelerated(
    theta: Tensor, z: Tensor, step: Callable[[Tensor, Tensor], Tensor], regressors: Tensor,
    steps: int,
) -> Tensor:  # fmt: skip
    """Steps with momentum, that starts anew where a step turns against it; values are not asked for.

    Pre-activations are linear in Theta, so those of an extrapolated point cost no product.
    """
    point, at, t = theta, z, 1.0
    for k in range(steps):
        new = step(point, at)
        if k == steps - 1:
            return new
        z_new = regressors @ new.mT
        turned = bool(((point - new) * (new - theta)).sum() > 0)
        t_new = (1 + math.sqrt(1 + 4 * t * t)) / 2
        pull = 0.0 if turned else (t - 1) / t_new
        t = 1.0 if turned else t_new
        point = torch.add(new, new - theta, alpha=pull)
        at = torch.add(z_new, z_new - z, alpha=pull)
        theta, z = new, z_new
    return theta


def _guarded(
    theta: Tensor, z: Tensor, best: float, step: Callable[[Tensor, Tensor, float], Tensor],
    slope: Callable[[Tensor], Tensor], total: Callable[[Tensor, Tensor], float],
    regressors: Tensor, beta: float, steps: int, certain: bool,
) -> Tensor:  # fmt: skip
    """Plain steps, each held to going down; beta doubles where one does not and none is certain."""
    done = tries = 0
    G = slope(z)
    while done < steps and tries < 40:
        new = step(theta, G, beta)
        z_new = regressors @ new.mT
        now = total(z_new, new)
        if now <= best:
            theta, z, best, done = new, z_new, now, done + 1
            G = slope(z) if done < steps else G
            continue
        if certain:  # only rounding can raise it
            break
        beta, tries = 2.0 * beta, tries + 1
    return theta


class _Steps:
    """Minimisers of the majorant, with what they share: a Cholesky factor, or a metric."""

    def __init__(self, H: Tensor, region: Region, damping: float):
        self.H, self.region = H, region
        eps = torch.finfo(H.dtype).eps
        # An H that is singular in this precision is lifted, which only makes the majorant larger.
        lift = (10 * eps * H.shape[0] + damping) * float(H.diagonal().mean())
        self.lift = lift + torch.finfo(H.dtype).tiny
        self.factor: tuple[float, Tensor] | None = None
        self.metric: tuple[Tensor, float] | None = None

    def __call__(self, theta: Tensor, G: Tensor, beta: float) -> Tensor:
        if self.region.smooth:
            if self.factor is None or self.factor[0] != beta:
                M = beta * self.H
                M.diagonal().add_(self.region.ridge + beta * self.lift)
                self.factor = beta, torch.linalg.cholesky(M)
            full = G + self.region.ridge * theta
            return theta - torch.cholesky_solve(full.mT, self.factor[1]).mT
        return self._inner(theta, G, beta)

    def _inner(self, theta: Tensor, G: Tensor, beta: float, most: int = 10) -> Tensor:
        """argmin_W <G, W - Theta> + (beta / 2) <(W - Theta) H, W - Theta> + region."""
        if self.metric is None:
            d = self.H.diagonal() + self.lift
            root = d.rsqrt()
            top = float(torch.linalg.eigvalsh(root[:, None] * self.H * root)[-1])
            self.metric = d, 1.0001 * max(top, 1e-3)
        d, top = self.metric
        scale = beta * top * d
        W, point, t = self.region.inside(theta), theta, 1.0
        for _ in range(most):
            move = point - theta
            slope = G + beta * (move @ self.H + self.lift * move)
            new = self.region.prox(point - slope / scale, scale)
            up = ((point - new) * scale * (new - W)).sum() > 0
            t_new = (1 + math.sqrt(1 + 4 * t * t)) / 2
            change = new - W
            point = new if bool(up) else new + (t - 1) / t_new * change
            t = 1.0 if bool(up) else t_new
            W = new
            if float(change.abs().max()) <= 1e-6 * float(W.abs().max()):
                break
        return W
