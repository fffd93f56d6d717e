"""The gradient of an equilibrium from a second, clamped equilibrium: no derivative of phi.

With F' = phi and the Fenchel divergence D(x, z) = F(z) + F*(x) - <x, z>, lift x = phi(A x + v) to

    J_c = min_X  c <g, X> + D(X, A X + v),        g = dL/dx at the free equilibrium x.

Its stationary point, with s = A^T u + g and u = (phi(A X + v) - X) / c, is the clamped equilibrium

    X = phi(A X + v - c s),                        dJ_c/dv / c = u,   dJ_c/dA / c = u X^T.

As c -> 0, u solves u = phi' (A^T u + g), the exact adjoint, for any A: equilibrium propagation needs
a symmetric one. One side, +c, is off by O(c); the mean of +c and -c by O(c^2).

Reference: Gu, Askari, El Ghaoui (2020), section 3 (the divergence); Scellier, Bengio (2017) and
Laborieux et al. (2021) for the nudge, one-sided and symmetric, of an energy with A = A^T.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import solvers
from ..activations import Activation
from ..maps import AffineMap, times
from ..solution import Solution
from ..solvers import FixedPointSolver
from .adjoints import _ADJOINTS, Adjoint
from .affine import _outer, constant, in_full_precision
from .closures import Limit, Map, checked, refuse_transforms, row_scale, spared


@dataclass(frozen=True, kw_only=True)
class Lifted(Adjoint):
    """Two equilibria, one free and one nudged, and their difference: phi is only evaluated.

    Every sample is nudged by c in its largest entry, in the units of the states, whatever the size
    of the loss. The relative error of the gradient is O(c), or O(c^2) with `two_sided`; below, the
    rounding of the states over c sets a floor. First derivatives only, of maps x -> phi(A x + v)
    with a monotone phi that is the gradient of a function; A need not be symmetric.

    Args:
        c: the nudge, positive.
        two_sided: nudge both ways and take the mean, at twice the cost.
        steps: stop the clamped iteration after so many steps, with a bias of the order of
            kappa^steps; None solves it.
        solver: of the clamped equation; None for "auto" with the tolerance of the free solve, where
            rounding over c allows it.

    Example:
        >>> import torch, implicitdl
        >>> from implicitdl.implicit.lifted import Lifted
        >>> layer = implicitdl.ImplicitLayer(4, 2, 8, adjoint=Lifted(c=0.01))
        >>> layer(torch.randn(3, 4)).sum().backward()
        >>> layer.W.grad.shape
        torch.Size([8, 8])
    """

    c: float = 0.01
    two_sided: bool = True
    steps: int | None = None
    solver: Any = None  # FixedPointSolver | str | None; a FixedPointSolver or None once made

    def __post_init__(self) -> None:
        number = isinstance(self.c, int | float) and not isinstance(self.c, bool)
        if not number or not 0 < self.c < math.inf:
            raise ValueError(f"Lifted: c={self.c!r}, expected a positive number such as 0.01.")
        if self.steps is not None and (type(self.steps) is not int or self.steps < 1):
            raise ValueError(f"Lifted: steps={self.steps!r}, expected an integer >= 1 or None.")
        if self.solver is not None:
            object.__setattr__(self, "solver", solvers.get_solver(self.solver))

    def run(
        self, f: "Map | AffineMap", z0: Tensor | None, solver: FixedPointSolver, **kwargs: Any
    ) -> Solution:
        """Solve the free equation; samples that fail get no gradient, and no sample theirs."""
        self._require(f)
        found = solver.solve(f, z0, **kwargs)
        failed = None if bool(found.converged.all()) else ~found.converged
        return replace(found, value=self._attach(f, found.value, solver, failed))

    def attach(self, f: "Map | AffineMap", z: Tensor, solver: FixedPointSolver) -> Tensor:
        """z, with the derivatives of the lifted problem."""
        self._require(f)
        return self._attach(f, z, solver, None)

    def _attach(self, f: Any, z: Tensor, solver: FixedPointSolver, failed: Tensor | None) -> Tensor:
        if constant():
            return z
        eps = torch.finfo(z.dtype).eps
        rtol = min(0.1, max(solver.tolerance(z.dtype), 8 * eps / min(self.c, 1.0)))
        clamped = self.solver or solvers.Auto(rtol=rtol)
        return _Clamped.apply(f.A, f.v, z.detach(), _Nudge(f.phi, self, clamped, failed))

    def _require(self, f: "Map | AffineMap") -> None:
        """Refuse what has no lifted form."""
        refuse_transforms("adjoint=Lifted")
        if not isinstance(f, AffineMap) or f.A.dim() != 2:
            raise TypeError(
                f"adjoint=Lifted: got {type(f).__name__}, expected a map x -> phi(A x + v) with one "
                "A (ImplicitLayer, MonotoneLayer, ImplicitModel); use adjoint='implicit'."
            )
        if not (f.phi.monotone and f.phi.symmetric):
            low, high = f.phi.slope
            raise ValueError(
                f"adjoint=Lifted: {f.phi} has slope range ({low:.6g}, {high:.6g}) and "
                f"{'a' if f.phi.symmetric else 'no'} symmetric Jacobian, expected the gradient of a "
                "convex function: it has no Fenchel divergence. Use adjoint='implicit'."
            )


@dataclass(frozen=True)
class _Nudge:
    """What the backward pass needs besides tensors."""

    phi: Activation
    how: Lifted
    solver: FixedPointSolver
    failed: Tensor | None

    def clamped(self, A: Tensor, v: Tensor, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """X and u of the clamped equilibria, +c above -c.  # (m, n) or (2m, n) each"""
        c = x.new_full((len(x), 1), self.how.c)
        if self.how.two_sided:
            c, v, x, g = torch.cat([c, -c]), v.repeat(2, 1), x.repeat(2, 1), g.repeat(2, 1)

        def step(w: Tensor) -> Tensor:
            # (X, u) at once. While the nudge crosses no kink, X contracts as the free iteration
            # does and u as its adjoint does; the two disturb each other by O(c).
            X, u = w.chunk(2, -1)
            z = torch.addmm(v, X, A.mT)
            nudged = self.phi(z - c * (times(u, A) + g))
            return torch.cat([nudged, (self.phi(z) - nudged) / c], -1)

        start = torch.cat([x, torch.zeros_like(x)], -1)
        if self.how.steps is None:
            w = checked(self.solver.solve(step, start)).value
        else:
            w = start
            for _ in range(self.how.steps):
                w = step(w)
        X, u = w.chunk(2, -1)
        return X, u


class _Clamped(torch.autograd.Function):
    """x, with u and u X^T as the gradients in v and A."""

    @staticmethod
    def forward(A: Tensor, v: Tensor, x: Tensor, nudge: _Nudge) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        A, v, _, ctx.nudge = inputs
        ctx.save_for_backward(A, v, output)

    @staticmethod
    @in_full_precision
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        A, v, x = ctx.saved_tensors
        nudge = ctx.nudge
        with torch.no_grad():
            rows, bias, state = g.to(x.dtype), v, x
            if nudge.failed is not None:
                state, bias = spared(nudge.failed, g, x), spared(nudge.failed, g, v)
            scale = row_scale(rows)
            X, u = nudge.clamped(A.detach(), bias.detach(), state, rows / scale)
            if nudge.failed is not None:
                u = u.masked_fill(nudge.failed.repeat(len(u) // len(x))[:, None], 0.0)
            sides = len(u) // max(len(x), 1) or 1
            u = u * scale.repeat(sides, 1) / sides
            A_bar = _outer(u, X, A) if ctx.needs_input_grad[0] else None
            v_bar = u.view(sides, *x.shape).sum(0)
        # First derivatives only: differentiating further raises, on the way to the parameters.
        if A_bar is not None:
            A_bar = Limit.apply(A_bar, x, 0)
        return A_bar, Limit.apply(v_bar, x, 0), None, None


_ADJOINTS["lifted"] = Lifted  # its name, beside the others
