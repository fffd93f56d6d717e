"""The worst mean of given losses over reweightings of the samples, and proofs of it from both sides.

With reference weights p (1/n each) and losses l, each risk is

    R(l) = max over q in Q of sum_i q_i l_i,    Q = {q >= 0, sum q = 1, q near p},

by duality also a minimum over one number. Any dual number bounds R from above, any q in Q from
below; the optimal ones, found here to rounding, meet.

Reference:
    Rockafellar, Uryasev (2000), theorem 1 (CVaR); Namkoong, Duchi (2017), "Variance-based
    regularization with convex objectives" (chi-square); Hu, Hong (2013), theorem 1 (KL).
"""

import abc
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..maps import inside_transform
from ._checks import distribution, losses_of, number

_OUTSIDE = 1e-6  # by how much weights may be outside of the set
_STEPS = 100  # of bisection and Newton on one number; about 10 are taken


@dataclass(frozen=True, eq=False)
class Risk:
    """A worst mean with its proofs; `lower <= value <= upper` up to rounding.

    Attributes:
        value: R(l), differentiable.  # (...)
        weights: the worst q, differentiable.  # (..., n)
        dual: the optimal dual number.  # (...)
        lower: sum_i q_i l_i at feasible weights.  # (...)
        upper: the dual function at a dual number.  # (...)
    """

    value: Tensor
    weights: Tensor
    dual: Tensor
    lower: Tensor
    upper: Tensor


class Reweighting(abc.ABC):
    """A set Q of weights near the reference weights p.

    A member gives the best weights, its dual function and how far weights are outside.
    """

    def __call__(self, losses: Tensor, reference: "Tensor | None" = None) -> Tensor:
        """R(l), differentiable in l to every order.  # (..., n) -> (...)

        Args:
            losses: one a sample.
            reference: p; uniform where None.  # (..., n)

        Raises:
            ValueError: NaN among the losses, or a p that is negative or does not sum to one.
        """
        l, p = self._accept(losses, reference)
        q, _ = self._solve(l, p)
        return (q * l).sum(-1).to(losses.dtype)

    def weights(self, losses: Tensor, reference: "Tensor | None" = None) -> Tensor:
        """The worst q, differentiable; where several are worst, one of them.  # (..., n)"""
        l, p = self._accept(losses, reference)
        return self._solve(l, p)[0].to(losses.dtype)

    def dual(self, losses: Tensor, reference: "Tensor | None" = None) -> Tensor:
        """The optimal dual number.  # (...)"""
        l, p = self._accept(losses, reference)
        return self._solve(l, p)[1].detach().to(losses.dtype)

    def upper(self, losses: Tensor, dual: Tensor, reference: "Tensor | None" = None) -> Tensor:
        """A bound from above, whatever the dual number.  # (..., n), (...) -> (...)"""
        l, p = self._accept(losses, reference)
        return self._above(l, p, _number_of(dual, l)).to(losses)

    def lower(self, losses: Tensor, weights: Tensor, reference: "Tensor | None" = None) -> Tensor:
        """A bound from below, sum_i q_i l_i, for weights in Q.  # (..., n), (..., n) -> (...)

        Raises:
            ValueError: the weights are not in Q; the message says by how much.
        """
        l, p = self._accept(losses, reference)
        q = distribution("weights", weights, l)
        excess = self._excess(q, p).max()
        if not inside_transform() and bool(excess > _OUTSIDE):
            raise ValueError(
                f"weights: got weights that exceed the limit of {self} by {float(excess):.6g}, "
                "expected weights in the set; mix them with the reference weights."
            )
        return (q * l).sum(-1).to(losses.dtype)

    def bracket(
        self, losses: Tensor, reference: "Tensor | None" = None, *,
        dual: "Tensor | None" = None, weights: "Tensor | None" = None,
    ) -> Risk:  # fmt: skip
        """R with its proofs from both sides.

        Args:
            losses: # (..., n)
            reference: p.  # (..., n)
            dual: the number for the upper bound; the optimal one where None.  # (...)
            weights: q for the lower bound; the worst where None.  # (..., n)

        Raises:
            ValueError: as `lower`.
        """
        l, p = self._accept(losses, reference)
        q, best = self._solve(l, p)
        at = best.detach() if dual is None else _number_of(dual, l)
        chosen = self._into(q, p) if weights is None else weights
        return Risk(
            value=(q * l).sum(-1).to(losses.dtype),
            weights=q.to(losses.dtype),
            dual=best.detach().to(losses.dtype),
            lower=self.lower(l, chosen, p).to(losses.dtype),
            upper=self._above(l, p, at).to(losses.dtype),
        )

    def _into(self, q: Tensor, p: Tensor) -> Tensor:
        """q, mixed with p where losses that are equal but for rounding took it out of the set."""
        out = p
        for share in (0.0, 0.5, 1 - 1e-3, 1 - 1e-6, 1.0):
            mixed = p + share * (q - p) if share < 1 else q
            out = torch.where((self._excess(mixed, p) <= _OUTSIDE)[..., None], mixed, out)
        return out

    @staticmethod
    def _accept(losses: Tensor, reference: "Tensor | None") -> tuple[Tensor, Tensor]:
        l = losses_of(losses)
        return l, distribution("reference", reference, l).expand(l.shape)

    @abc.abstractmethod
    def _solve(self, l: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """The worst weights and the optimal dual number."""

    @abc.abstractmethod
    def _above(self, l: Tensor, p: Tensor, dual: Tensor) -> Tensor:
        """The dual function."""

    @abc.abstractmethod
    def _excess(self, q: Tensor, p: Tensor) -> Tensor:
        """By how much weights are outside of Q; at most 0 inside."""


def _number_of(dual: Tensor, like: Tensor) -> Tensor:
    """A dual number, infinite where that is a limit, but not NaN."""
    dual = torch.as_tensor(dual).to(like)
    if not inside_transform() and bool(dual.isnan().any()):
        raise ValueError("dual: got nan, expected a number.")
    return dual


def _largest(l: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """max of l where p > 0, and p restricted to where it is attained."""
    top = l.masked_fill(p == 0, -math.inf).amax(-1, keepdim=True)
    return top, torch.where((l == top) & (p > 0), p, torch.zeros_like(p))


@dataclass(frozen=True)
class CVaR(Reweighting):
    """0 <= q <= p / alpha: the mean of the worst share alpha of the losses.

    R(l) = min over eta of eta + sum_i p_i (l_i - eta)_+ / alpha. The worst weights are piecewise
    constant in l, so their derivative is zero.

    Args:
        alpha: the share, in (0, 1]; 1 gives the mean.
    """

    alpha: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", number("alpha", self.alpha, 0, 1, open_low=True))

    def _solve(self, l: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            ordered, index = l.detach().masked_fill(p == 0, -math.inf).sort(-1, descending=True)
            cap = p.gather(-1, index) / self.alpha
            before = cap.cumsum(-1) - cap
            taken = torch.minimum(cap, (1 - before).clamp_min(0))
            # Rounding of the sum goes to the worst sample that has room, or is divided out.
            taken = taken / taken.sum(-1, keepdim=True)
            q = torch.zeros_like(taken).scatter(-1, index, taken)
            last = (taken > 0).sum(-1, keepdim=True) - 1
            eta = ordered.gather(-1, last)[..., 0]
        return q, eta

    def _above(self, l: Tensor, p: Tensor, dual: Tensor) -> Tensor:
        return dual + (p * (l - dual[..., None]).clamp_min(0)).sum(-1) / self.alpha

    def _excess(self, q: Tensor, p: Tensor) -> Tensor:
        return (q * self.alpha - p).amax(-1) / p.amax(-1)


@dataclass(frozen=True)
class ChiSquare(Reweighting):
    """1/2 sum_i p_i (q_i / p_i - 1)^2 <= radius.

    R(l) = min over eta of sqrt(1 + 2 radius) (sum_i p_i (l_i - eta)_+^2)^(1/2) + eta, with
    q_i proportional to p_i (l_i - eta)_+.

    Args:
        radius: >= 0; 0 gives the mean.
    """

    radius: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "radius", number("radius", self.radius, 0))

    def _solve(self, l: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        c = 1 + 2 * self.radius
        if self.radius == 0:  # eta goes to minus infinity
            return p, torch.full_like(l[..., 0], -math.inf)
        top, peak = _largest(l.detach(), p.detach())
        mass = peak.sum(-1, keepdim=True)
        concentrated = c * mass >= 1  # all weight on the largest losses is allowed
        with torch.no_grad():
            span = top - l.detach().masked_fill(p == 0, math.inf).amin(-1, keepdim=True)
            span = torch.where(span > 0, span, torch.ones_like(span))
            # l_j is above eta exactly where the weights cut at l_j would be too concentrated.
            u = ((l.detach() - top) / span).clamp_min(-1)
            ordered, index = u.masked_fill(p == 0, -1.0).sort(-1, descending=True)
            w = p.gather(-1, index)
            P, m1, m2 = (t.cumsum(-1) for t in (w, w * ordered, w * ordered * ordered))
            first = m1 - P * ordered
            second = m2 - 2 * ordered * m1 + ordered * ordered * P
            sharp = (second > c * first * first) | (first <= 0)
            last = sharp.sum(-1, keepdim=True) - 1
            cut = ordered.gather(-1, last)
            active = (u >= cut) & (p > 0)
        # (mean - eta)^2 = variance / (c P - 1) over the active losses, of total weight P.
        w = torch.where(active, p, torch.zeros_like(p))
        P = w.sum(-1, keepdim=True)
        mean = (w * l).sum(-1, keepdim=True) / P
        variance = (w * (l - mean) ** 2).sum(-1, keepdim=True) / P
        free = ~concentrated & (variance > 0) & (c * P > 1)
        one = torch.ones_like(P)
        ratio = torch.where(free, variance, one) / torch.where(free, c * P - 1, one)
        eta = torch.where(free, mean - ratio.sqrt(), top)
        above = w * (l - eta).clamp_min(0)
        total = above.sum(-1, keepdim=True)
        spread = above / torch.where(free, total, one)
        q = torch.where(free, spread, peak / mass)
        return q, eta[..., 0]

    def _above(self, l: Tensor, p: Tensor, dual: Tensor) -> Tensor:
        if self.radius == 0:  # the limit for eta to minus infinity, where the given one is that
            mean = (p * l).sum(-1)
            at = torch.where(torch.isfinite(dual), dual, mean - 1)
            value = at + (p * (l - at[..., None]).clamp_min(0) ** 2).sum(-1).sqrt()
            return torch.where(torch.isfinite(dual), value, mean)
        over = (p * (l - dual[..., None]).clamp_min(0) ** 2).sum(-1)
        return math.sqrt(1 + 2 * self.radius) * over.sqrt() + dual

    def _excess(self, q: Tensor, p: Tensor) -> Tensor:
        off = torch.where(
            p > 0, (q - p) ** 2 / p.clamp_min(1e-300), torch.where(q > 0, math.inf, 0.0)
        )
        return (0.5 * off.sum(-1) - self.radius) / (1 + self.radius)


@dataclass(frozen=True)
class KL(Reweighting):
    """sum_i q_i log(q_i / p_i) <= radius.

    R(l) = min over t > 0 of t log sum_i p_i e^(l_i / t) + t radius, with q_i proportional to
    p_i e^(l_i / t).

    Args:
        radius: >= 0; 0 gives the mean.
    """

    radius: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "radius", number("radius", self.radius, 0))

    def _solve(self, l: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        if self.radius == 0:
            return p, torch.full_like(l[..., 0], math.inf)
        top, peak = _largest(l.detach(), p.detach())
        mass = peak.sum(-1, keepdim=True)
        concentrated = -mass.log() <= self.radius
        logs = p.log()
        log_t = self._root(l.detach(), logs.detach(), top, concentrated)
        # Newton steps with autograd make the derivatives exact; see `Activation.prox`. The step's
        # own slope is only differentiated where it multiplies a residual that is zero.
        for _ in range(2):
            divergence, slope = self._divergence(l, logs, log_t)
            step = (divergence - self.radius) / torch.where(concentrated, -1.0, slope)
            log_t = log_t - torch.where(concentrated, torch.zeros_like(step), step)
        q = torch.softmax(logs + l * torch.exp(-log_t), -1)
        q = torch.where(concentrated, peak / mass, q)
        t = torch.where(concentrated, torch.zeros_like(log_t), log_t.exp())
        return q, t[..., 0]

    @staticmethod
    def _divergence(l: Tensor, logs: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
        """KL(q(t) || p) and its derivative by log t, minus the variance of l / t under q."""
        u = (l - l.detach().amax(-1, keepdim=True)) * torch.exp(-log_t)
        z = logs + u
        total = torch.logsumexp(z, -1, keepdim=True)
        q = torch.exp(z - total)
        mean = (q * u).sum(-1, keepdim=True)
        return mean - total, -(q * (u - mean) ** 2).sum(-1, keepdim=True)

    def _root(self, l: Tensor, logs: Tensor, top: Tensor, skip: Tensor) -> Tensor:
        """log t with KL(q(t) || p) = radius: Newton's method inside a bracket."""
        with torch.no_grad():
            p = logs.exp()
            mean = (p * l).sum(-1, keepdim=True)
            deviation = (p * (l - mean) ** 2).sum(-1, keepdim=True).sqrt()
            one = torch.ones_like(top)
            # For large t the divergence is about variance / (2 t^2).
            x = torch.where(skip, one, deviation / math.sqrt(2 * self.radius)).log()
            low, high = x - 40.0, x + 40.0
            for _ in range(_STEPS):
                value, slope = self._divergence(l, logs, x)
                gap = value - self.radius
                low, high = torch.where(gap > 0, x, low), torch.where(gap <= 0, x, high)
                # In log of the divergence the curve is nearly a line where t is large.
                safe = value.clamp_min(1e-300)
                step = (safe / self.radius).log() * safe / slope.clamp_max(-1e-300)
                new = x - step
                new = torch.where((new > low) & (new < high), new, 0.5 * (low + high))
                done = (new - x).abs() <= 1e-14 * (1 + x.abs())
                x = torch.where(skip, x, new)
                if not inside_transform() and bool((done | skip).all()):
                    break
        return x

    def _above(self, l: Tensor, p: Tensor, dual: Tensor) -> Tensor:
        if not inside_transform() and bool((dual < 0).any()):
            raise ValueError(f"dual: got {float(dual.min()):.6g}, expected temperatures >= 0.")
        top, _ = _largest(l, p)
        usable = (dual > 0) & torch.isfinite(dual)
        t = torch.where(usable, dual, torch.ones_like(dual))
        value = t * torch.logsumexp(p.log() + (l - top) / t[..., None], -1) + t * self.radius
        value = torch.where(dual == 0, torch.zeros_like(value), value) + top[..., 0]
        if self.radius == 0:
            return torch.where(torch.isinf(dual), (p * l).sum(-1), value)
        return torch.where(torch.isinf(dual), math.inf, value)

    def _excess(self, q: Tensor, p: Tensor) -> Tensor:
        outside = ((q > 0) & (p == 0)).any(-1)
        ratio = torch.where((q > 0) & (p > 0), q / p.clamp_min(1e-300), torch.ones_like(q))
        divergence = (q * ratio.log()).sum(-1) - self.radius
        return torch.where(outside, math.inf, divergence / (1 + self.radius))


def cvar(losses: Tensor, alpha: float, *, reference: "Tensor | None" = None) -> Tensor:
    """The mean of the worst share alpha of the losses; see `CVaR`, whose `bracket` proves it.

    Args:
        losses: one a sample.  # (..., n)
        alpha: in (0, 1].
        reference: weights of the samples; uniform where None.  # (..., n)

    Returns:
        # (...), differentiable

    Raises:
        TypeError, ValueError: a losses tensor that is not floating or has NaN, an alpha outside
            (0, 1], reference weights that do not sum to one.

    Example:
        >>> import torch
        >>> from implicitdl import dro
        >>> dro.cvar(torch.tensor([1.0, 2.0, 3.0, 4.0]), 0.5)
        tensor(3.5000)
    """
    return CVaR(alpha)(losses, reference)


def chi_square(losses: Tensor, radius: float, *, reference: "Tensor | None" = None) -> Tensor:
    """The worst mean over 1/2 sum_i p_i (q_i / p_i - 1)^2 <= radius; see `ChiSquare`.

    Args:
        losses: one a sample.  # (..., n)
        radius: >= 0.
        reference: p; uniform where None.  # (..., n)

    Returns:
        # (...), differentiable

    Raises:
        TypeError, ValueError: as `cvar`, or a negative radius.
    """
    return ChiSquare(radius)(losses, reference)


def kl(losses: Tensor, radius: float, *, reference: "Tensor | None" = None) -> Tensor:
    """The worst mean over sum_i q_i log(q_i / p_i) <= radius; see `KL`.

    Args:
        losses: one a sample.  # (..., n)
        radius: >= 0.
        reference: p; uniform where None.  # (..., n)

    Returns:
        # (...), differentiable

    Raises:
        TypeError, ValueError: as `cvar`, or a negative radius.
    """
    return KL(radius)(losses, reference)
