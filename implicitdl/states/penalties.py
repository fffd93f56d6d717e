"""What is added to the fit of a row so that the model is sparse, or of low rank.

Coefficients are in units of the deviations of what they multiply and of what is fitted, so that one
number means the same for every layer: with `L1(weight=1)` nothing is left.
"""

import abc
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._linalg import project_l1

_STEPS = 200  # of a bisection: more than the bits of a double


def soft(V: Tensor, level: float | Tensor) -> Tensor:
    """sign(v) max(|v| - level, 0), entry by entry."""
    return V - V.clamp(min=-level, max=level) if isinstance(level, Tensor) else (
        torch.nn.functional.softshrink(V, level) if level else V
    )  # fmt: skip


class Penalty(abc.ABC):
    """R(W), convex, with its proximity operator.

    An entrywise penalty is sum_ij psi(|w_ij|) with psi convex, increasing and piecewise quadratic on
    [0, inf); it also tells `slope` and `curvature`, from which Newton's method finishes the solve.

    Attributes:
        entrywise: whether R is such a sum.
        nothing: whether R = 0, so that rows are fitted by least squares.
        couples_rows: whether R ties rows to each other, so that they are not to be solved apart.
    """

    entrywise = True
    couples_rows = False

    @property
    def nothing(self) -> bool:
        """Whether R = 0."""
        return False

    @abc.abstractmethod
    def value(self, W: Tensor) -> Tensor:
        """R(W), as a sum over rows where it is one.  # (r, d) -> (r,) or ()"""

    @abc.abstractmethod
    def prox(self, V: Tensor, t: float) -> Tensor:
        """argmin_W t R(W) + ||W - V||^2 / 2.  # (r, d) -> (r, d)"""

    def slope(self, size: Tensor) -> Tensor:
        """psi'(size), at zero from the right."""
        raise NotImplementedError(f"{type(self).__name__} is no sum over entries")

    def curvature(self, size: Tensor) -> Tensor:
        """psi''(size)."""
        return torch.zeros_like(size)

    def conjugate(self, v: Tensor) -> Tensor | None:
        """sup_{s >= 0} v s - psi(s) for v >= 0; None where psi grows like a line, so that it is
        zero up to `slope(0)` and infinite beyond."""
        return None

    def constrained(self, V: Tensor, t: float, weights: Tensor, radius: Tensor) -> Tensor:
        """argmin_W t R(W) + ||W - V||^2 / 2 over sum_j weights_j |w_ij| <= radius_i.

        With the multiplier theta it is prox(soft(v, theta weights)), whose length falls with theta:
        bisection down to neighbouring numbers, from the side that is inside.
        """
        W = self.prox(V, t)
        out = (W.abs() * weights).sum(1) > radius
        if not bool(out.any()):
            return W
        v, r = V[out], radius[out, None]
        positive = torch.where(weights > 0, weights, math.inf)
        low = torch.zeros_like(r)
        high = (v.abs() / positive).amax(1, keepdim=True)
        for _ in range(_STEPS):
            middle = (low + high) / 2
            w = self.prox(soft(v, middle * weights), t)
            inside = (w.abs() * weights).sum(1, keepdim=True) <= r
            low, high = torch.where(inside, low, middle), torch.where(inside, middle, high)
            if bool(((high - low) <= 4e-16 * high).all()):
                break
        W[out] = self.prox(soft(v, high * weights), t)
        return W


def _weight(name: str, value: Any, *, zero: bool = False) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value < 0 or (value == 0 and not zero):
        least = "at least" if zero else "above"
        raise ValueError(f"{name}: got {value!r}, expected a finite number {least} 0.")


@dataclass(frozen=True)
class L1(Penalty):
    """weight sum_ij |w_ij|: few entries.

    Args:
        weight: between 0, plain least squares, and 1, where nothing is left.

    Raises:
        ValueError: weight is negative or not finite.
    """

    weight: float = 1e-3

    def __post_init__(self) -> None:
        _weight("weight", self.weight, zero=True)

    @property
    def nothing(self) -> bool:
        """Whether the weight is zero."""
        return self.weight == 0

    def value(self, W: Tensor) -> Tensor:
        return self.weight * W.abs().sum(1)

    def prox(self, V: Tensor, t: float) -> Tensor:
        return soft(V, t * self.weight)

    def slope(self, size: Tensor) -> Tensor:
        return torch.full_like(size, self.weight)

    def constrained(self, V: Tensor, t: float, weights: Tensor, radius: Tensor) -> Tensor:
        """The soft threshold, then the nearest point of the ball: both thresholds add up."""
        return project_l1(self.prox(V, t), radius, weights)


@dataclass(frozen=True)
class Perspective(Penalty):
    """sum_ij psi(w_ij), psi(m) = min over 0 <= t <= 1 of mu t + gamma m^2 / t: few entries, and those
    that stay are hardly shrunk.

    The perspective relaxation of "mu for every entry that is not zero, plus gamma m^2" (s t >= m^2).
    In closed form it is the reversed Huber function: 2 sqrt(mu gamma) |m| up to |m| = sqrt(mu/gamma),
    gamma m^2 + mu beyond.

    Args:
        weight: 2 sqrt(mu gamma), the slope at zero, as the weight of `L1`.
        ridge: gamma.

    Raises:
        ValueError: one of them is not positive and finite.

    Reference:
        Owen 2007 (the reversed Huber function); Frangioni and Gentile 2006 (perspective cuts).
    """

    weight: float = 1e-3
    ridge: float = field(default=1e-3, kw_only=True)

    def __post_init__(self) -> None:
        _weight("weight", self.weight)
        _weight("ridge", self.ridge)

    @property
    def knee(self) -> float:
        """sqrt(mu / gamma), where the line becomes a parabola."""
        return self.weight / (2 * self.ridge)

    @property
    def price(self) -> float:
        """mu, the price of an entry."""
        return self.weight**2 / (4 * self.ridge)

    def value(self, W: Tensor) -> Tensor:
        size = W.abs()
        line = self.weight * size
        return torch.where(size <= self.knee, line, self.ridge * size**2 + self.price).sum(1)

    def prox(self, V: Tensor, t: float) -> Tensor:
        line = soft(V, t * self.weight)
        return torch.where(line.abs() <= self.knee, line, V / (1 + 2 * t * self.ridge))

    def slope(self, size: Tensor) -> Tensor:
        return (2 * self.ridge * size).clamp_min(self.weight)

    def curvature(self, size: Tensor) -> Tensor:
        return torch.where(size > self.knee, 2 * self.ridge, 0.0).to(size.dtype)

    def conjugate(self, v: Tensor) -> Tensor:
        return torch.where(v <= self.weight, 0.0, v**2 / (4 * self.ridge) - self.price)


@dataclass(frozen=True)
class Group(Penalty):
    """weight sqrt(r) sum_j ||W_:j||_2: few columns, that is few states and few features.

    A column of (A; C) that is zero is a state that nobody reads, one of (B; D) a feature. The
    factor sqrt(r) makes weights comparable with those of `L1`: with weight 1 nothing is left.

    Args:
        weight: above 0.

    Raises:
        ValueError: weight is not positive and finite.

    Reference:
        El Ghaoui, Gu, Travacca, Askari and Tsai 2021, section 5 (removal of states and features).
    """

    weight: float = 1e-2
    entrywise = False
    couples_rows = True

    def __post_init__(self) -> None:
        _weight("weight", self.weight)

    def value(self, W: Tensor) -> Tensor:
        return self.weight * math.sqrt(W.shape[0]) * torch.linalg.vector_norm(W, dim=0).sum()

    def prox(self, V: Tensor, t: float) -> Tensor:
        length = torch.linalg.vector_norm(V, dim=0)
        level = t * self.weight * math.sqrt(V.shape[0])
        tiny = torch.finfo(V.dtype).tiny
        return V * (1 - level / length.clamp_min(tiny)).clamp_min(0)


@dataclass(frozen=True)
class LowRank:
    """A = L R^T with so many columns; B, C and D dense.

    L R^T is the best of that rank for the recorded states: the leading directions of A X in the
    regression of Z on (X, U), which the singular values of one matrix give. The rows are then fitted
    again in these directions, inside the ball.

    Args:
        rank: r.

    Raises:
        ValueError: rank is no integer above 0.

    Reference:
        Izenman 1975 (reduced-rank regression).
    """

    rank: int

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"rank: got {self.rank!r}, expected an integer above 0.")
