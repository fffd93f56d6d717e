"""Operator splittings for monotone models.

With phi = prox of a convex g, x = phi(A x + v) says  0 in (I - A) x - v + dg(x):  a sum of two
monotone operators whenever (A + A^T)/2 <= (1 - m) I.

Reference: Winston, Kolter (2020), sections 3.1 and A; Ryu, Boyd (2016).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..maps import AffineMap
from ._loop import FixedPointSolver, Map


def _monotone(solver: FixedPointSolver, f: Map) -> AffineMap:
    """The map as one that a splitting can take, or the reason why not."""
    who = type(solver).__name__
    if not isinstance(f, AffineMap) or f.A.dim() != 2:
        raise TypeError(
            f"{who} splits x = phi(A x + v) with one A for the batch; it was given {type(f).__name__}. "
            "Use Anderson or Newton for a general map."
        )
    lo, hi = f.phi.slope
    if lo < 0 or hi > 1:
        raise ValueError(
            f"{who} needs slopes in [0, 1] (phi a proximal operator); {type(f.phi).__name__} has "
            f"[{lo:.4g}, {hi:.4g}]. Use Anderson or Newton."
        )
    return f


def _strength(solver: FixedPointSolver, f: AffineMap) -> float:
    """m > 0 with (I - A) strongly monotone of that constant, or the reason why there is none."""
    if f.monotone is not None:
        return f.monotone
    G = torch.eye(f.A.shape[0], dtype=f.A.dtype, device=f.A.device) - f.A
    m = float(torch.linalg.eigvalsh((G + G.mT) / 2)[0])
    if not m > 0:
        raise ValueError(
            f"{type(solver).__name__}: I - A is not strongly monotone (m = {m:.3g}, expected > 0). "
            "Pass `alpha`, or use Anderson or Newton."
        )
    return m


def _length(A: Tensor) -> float:
    """A bound on ||I - A||_2, no power method being one."""
    G = torch.eye(A.shape[0], dtype=A.dtype, device=A.device) - A
    L = math.sqrt(float(G.abs().sum(0).amax() * G.abs().sum(1).amax()))
    return min(L, float(torch.linalg.matrix_norm(G, 2))) if G.shape[0] <= 256 else L


@dataclass(frozen=True, kw_only=True)
class ForwardBackward(FixedPointSolver):
    """x <- prox_{a g}(x - a ((I - A) x - v)): one product a step, linear for a < 2 m / L^2.

    Args:
        alpha: step a; None means m / L^2 from the constants of I - A.
    """

    alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"ForwardBackward: alpha={self.alpha}, expected alpha > 0.")

    def init(self, f: Map, z: Tensor, fz: Tensor) -> Any:
        """The step length."""
        f = _monotone(self, f)
        if self.alpha is not None:
            return self.alpha
        return _strength(self, f) / _length(f.A) ** 2

    def step(self, f: Map, z: Tensor, fz: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        """Forward, then the prox."""
        alpha = state
        z = f.phi.prox(torch.lerp(z, f.affine(z), alpha), alpha)
        return z, f(z), state


@dataclass(frozen=True, kw_only=True)
class PeacemanRachford(FixedPointSolver):
    """Peaceman-Rachford splitting: one product with V = (I + a (I - A))^-1 a step.

        x = V (u + a v),  r = 2 x - u,  w = prox_{a g}(r),  u <- 2 w - r.

    The product taken is r = (2 V - I) u + 2 a V v. V is computed once and shared with the adjoint
    equation, so it pays for large batches. f(x) comes for free from A x + v = x + (x - u) / a; what
    looks converged is checked against f itself.

    Args:
        alpha: step a > 0, any converges; None means 0.6 / sqrt(m L), L about ||I - A||_2, which
            lies between the best step for a symmetric and for a skew A.
    """

    alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"PeacemanRachford: alpha={self.alpha}, expected alpha > 0.")

    def begin(self, f: Map, z: Tensor | None) -> tuple[Tensor, Tensor, Any]:
        """The inverse, and the u whose resolvent is z."""
        f = _monotone(self, f)
        alpha = self.alpha
        if alpha is None:
            alpha = 0.6 / math.sqrt(_strength(self, f) * max(f.factors.norm(), 1e-6))
        V = f.factors.resolvent(alpha)
        R = (2 * V.mT).contiguous()
        R.diagonal().sub_(1.0)
        fixed, shift = _Fixed(R, alpha), torch.mm(f.v, V.mT).mul_(2 * alpha)
        if z is None:
            return self._evaluate(f, f.start(), fixed, shift)
        s = f.affine(z)
        u = z + alpha * (z - s)
        return z, f.phi(s), (fixed, 2 * z - u, shift)

    def step(self, f: Map, z: Tensor, fz: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        """Both reflections."""
        assert isinstance(f, AffineMap)
        fixed, r, shift = state
        return self._evaluate(f, torch.lerp(r, f.phi.prox(r, fixed.alpha), 2.0), fixed, shift)

    @staticmethod
    def _evaluate(
        f: AffineMap, u: Tensor, fixed: "_Fixed", shift: Tensor
    ) -> tuple[Tensor, Tensor, Any]:
        """x = (r + u) / 2, f(x), and the state."""
        r = torch.addmm(shift, u, fixed.R)
        s = torch.lerp(r, u, 0.5 - 0.5 / fixed.alpha)
        return torch.lerp(r, u, 0.5), f.phi.call_(s), (fixed, r, shift)

    def exact(self, state: Any) -> bool:
        """f(x) is reconstructed."""
        return False

    def look(self, k: int, work: int, state: Any) -> bool:
        """Every third step: what looks converged costs a product to check."""
        return k == 1 or k % 3 == 0


@dataclass(frozen=True, eq=False)
class _Fixed:
    """What does not belong to any sample, and stays when the batch is compacted."""

    R: Tensor  # (2 V - I)^T
    alpha: float
