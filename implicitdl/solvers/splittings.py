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


def _constants(f: AffineMap) -> tuple[float, float]:
    """(m, L): the strong monotonicity of I - A and a bound on its 2-norm."""
    G = torch.eye(f.A.shape[0], dtype=f.A.dtype, device=f.A.device) - f.A
    L = math.sqrt(float(G.abs().sum(0).amax() * G.abs().sum(1).amax()))
    if G.shape[0] <= 256:
        L = min(L, float(torch.linalg.matrix_norm(G, 2)))
    if f.monotone is not None:
        return f.monotone, L
    symmetric = (G + G.mT) / 2
    return float(torch.linalg.eigvalsh(symmetric)[0]), L


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
        m, L = _constants(f)
        if not m > 0:
            raise ValueError(
                f"ForwardBackward: I - A is not strongly monotone (m = {m:.3g}, expected > 0). "
                "Pass `alpha`, or use Anderson or Newton."
            )
        return m / L**2

    def step(self, f: Map, z: Tensor, fz: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        """Forward, then the prox."""
        alpha = state
        z = f.phi.prox(torch.lerp(z, f.affine(z), alpha), alpha)
        return z, f(z), state


@dataclass(frozen=True, kw_only=True)
class PeacemanRachford(FixedPointSolver):
    """Peaceman-Rachford splitting: one product with V = (I + a (I - A))^-1 a step.

        x = V (u + a v),  w = prox_{a g}(2 x - u),  u <- u + 2 (w - x).

    V is computed once a solve, so it pays for large batches. f(x) comes for free from
    A x + v = x + (x - u) / a; what looks converged is checked against f itself.

    Args:
        alpha: step a > 0, any converges; None means 1 / sqrt(m L).
    """

    alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"PeacemanRachford: alpha={self.alpha}, expected alpha > 0.")

    def init(self, f: Map, z: Tensor, fz: Tensor) -> Any:
        """The inverse, and the part of every step that does not change."""
        f = _monotone(self, f)
        alpha = self.alpha
        if alpha is None:
            m, L = _constants(f)
            if not m > 0:
                raise ValueError(
                    f"PeacemanRachford: I - A is not strongly monotone (m = {m:.3g}, expected > 0)."
                    " Use Anderson or Newton."
                )
            alpha = 1 / math.sqrt(m * L)
        eye = torch.eye(f.A.shape[0], dtype=z.dtype, device=z.device)
        VT = torch.linalg.inv((1 + alpha) * eye - alpha * f.A.mT)
        # Start from the u whose resolvent is z: its first x is z again.
        u = z + alpha * (z - f.affine(z))
        return _Fixed(VT, alpha), u, (alpha * f.v) @ VT

    def step(self, f: Map, z: Tensor, fz: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        """Both reflections."""
        fixed, u, shift = state
        alpha = fixed.alpha
        u = u + 2 * (f.phi.prox(2 * z - u, alpha) - z)
        x = torch.addmm(shift, u, fixed.VT)
        return x, f.phi(torch.lerp(x, u, -1 / alpha)), (fixed, u, shift)

    def exact(self, state: Any) -> bool:
        """f(x) is reconstructed."""
        return False


@dataclass(frozen=True, eq=False)
class _Fixed:
    """What does not belong to any sample, and stays when the batch is compacted."""

    VT: Tensor
    alpha: float
