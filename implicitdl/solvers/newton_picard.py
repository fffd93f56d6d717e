"""Newton in the dominant direction of A, Picard in the rest."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..maps import AffineMap
from ._loop import FixedPointSolver, Map


@dataclass(frozen=True, kw_only=True)
class NewtonPicard(FixedPointSolver):
    """For x = phi(A x + v) with one slow direction, such as the Perron vector of an A >= 0.

    With U the direction that A maps to most, V = A^T U and A = U V^T + E, each step solves

        z+ = phi(U V^T z+ + E z + v)

    for z+ by Newton's method on the one number V^T z+ of each sample, which costs a few passes over
    the batch and no product with A. What the step leaves of an error is what E leaves: for a dense
    A >= 0 with row sums kappa about kappa / sqrt(n) of it, whatever kappa < 1. The dominant
    direction comes from the power method, a few products with one vector.

    Where sum |U_i V_i| times the largest slope is not below 1 the equation for V^T z+ might have
    several solutions; U is then taken to be zero, which makes a step Picard's.

    Args:
        inner: Newton steps for V^T z+. None means two where a product with A is cheap and three
            where it is dear. One is exact where phi is linear, as in an adjoint equation.

    Reference: Shroff, Keller (1993), the recursive projection method; Lust, Roose, Spence,
    Champneys (1998), Newton-Picard.
    """

    inner: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inner is not None and not (isinstance(self.inner, int) and self.inner >= 1):
            raise ValueError(f"NewtonPicard: inner={self.inner!r}, expected an integer >= 1.")

    def begin(self, f: Map, z: Tensor | None) -> tuple[Tensor, Tensor, Any]:
        """From nowhere, the first iterate is a step with E z = 0."""
        if not isinstance(f, AffineMap) or f.A.dim() != 2:
            raise TypeError(
                "NewtonPicard needs x = phi(A x + v) with one A for the batch; it was given "
                f"{type(f).__name__}. Use Anderson or Newton for a general map."
            )
        found = f.factors.dominant(quick=f.v.shape[0] <= 8)
        coarse = found.spread * f.phi.lipschitz < 1 and f.phi.entrywise
        cheap = f.v.shape[0] * f.A.shape[0] ** 2 < 1 << 22
        inner = self.inner or (1 if f.phi.linear else 2 if cheap else 3)
        fixed = _Fixed(
            V=found.V,
            U=found.U,
            minus=found.UV.neg(),
            inner=inner if coarse else 0,
            fresh=not cheap or self.inner is not None,
            # Steps that E alone makes necessary: before, a look is not worth its passes.
            early=1 if z is not None else self._expected(found.rest * f.phi.lipschitz, cheap, f),
        )
        if z is None:
            z = self._coarse(f, fixed, f.phi(f.v), f.v, None) if coarse else f.start()
        s = f.affine(z)
        fz = f.phi(s)
        return z, fz, (fixed, s)

    def _expected(self, rate: float, cheap: bool, f: AffineMap) -> int:
        """Evaluations before which a cold start will hardly have converged."""
        if not 0 < rate < 1:
            return 1
        steps = math.log(self.tolerance(f.v.dtype)) / math.log(rate)
        return round(steps if cheap else 0.75 * steps)

    def step(self, f: Map, z: Tensor, fz: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        """Solve for V^T z+, evaluate."""
        assert isinstance(f, AffineMap)
        fixed, s = state
        z = self._coarse(f, fixed, fz, s, torch.mv(z, fixed.V)) if fixed.inner else fz
        s = f.affine(z)
        return z, f.phi(s), (fixed, s)

    @staticmethod
    def _coarse(f: AffineMap, fixed: "_Fixed", x: Tensor, s: Tensor, at: Tensor | None) -> Tensor:
        """phi(s + t U) with t = V^T phi(s + t U) - at, from x = phi(s).  # t (m,)"""
        phi, y, t, slope = f.phi, s, None, None
        for _ in range(fixed.inner):
            if slope is None or fixed.fresh:
                d = phi.derivative_at(x)
                slope = torch.mv(phi.derivative(y) if d is None else d, fixed.minus).add_(1.0)
            change = torch.mv(x, fixed.V)
            if at is not None:
                change.sub_(at)
            if t is None:
                t = change.div_(slope)
            else:
                t.addcdiv_(change.sub_(t), slope)
            y = torch.addr(s, t, fixed.U)
            x = phi(y)
        return x

    def look(self, k: int, work: int, state: Any) -> bool:
        """Not before E has had its steps."""
        return k >= state[0].early


@dataclass(frozen=True, eq=False)
class _Fixed:
    """What does not belong to any sample, and stays when the batch is compacted."""

    V: Tensor
    U: Tensor
    minus: Tensor  # - U_i V_i
    inner: int
    fresh: bool  # whether each inner step has a derivative of its own
    early: int
