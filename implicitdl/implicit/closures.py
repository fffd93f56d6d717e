"""Derivatives of a fixed point through a closure: chord steps with a solve behind each.

z <- z + M (f(z) - z) with M = (I - J)^-1 held constant at z leaves the value alone, the residual
being zero, and makes one more derivative exact, whatever f closes over: no parameter list.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..maps import AffineMap, LinearRows, RowMap
from ..solution import ConvergenceError, Solution
from ..solvers import Auto, FixedPointSolver

Map = Callable[[Tensor], Tensor]


def as_rows(f: "Map | AffineMap", z: Tensor) -> "RowMap | AffineMap":
    """f as a map of rows: itself where it is one, else a RowMap with the shape of z."""
    return f if isinstance(f, AffineMap) else RowMap.of(f, z.shape)


def flat(z: Tensor) -> Tensor:
    """One row a sample, for an empty batch too."""
    return z.reshape(z.shape[0], math.prod(z.shape[1:]))


class Inverse:
    """M = (I - J)^-1 at a constant z, applied by solving."""

    def __init__(self, f: "RowMap | AffineMap", z: Tensor, solver: FixedPointSolver):
        self.shape, self.solver, self.contraction = z.shape, solver, f.contraction
        self.f, self.z = f, flat(z)

    @functools.cached_property
    def jacobian(self) -> Any:
        """Linearised when it is first needed: a forward pass alone does not pay for it."""
        return self.f.linearize(self.z)

    def apply(self, b: Tensor, transposed: bool) -> Tensor:
        """u = J u + b, or u = J^T u + b."""
        J, rows = self.jacobian, flat(b)
        ops = (J.vjp, J.jvp) if transposed else (J.jvp, J.vjp)
        # Each row is solved for its direction and scaled back: tolerances are then relative to it,
        # and a loss scaled by 1e-8 has gradients exactly 1e-8 times as large.
        scale = row_scale(rows)
        rows = rows / scale
        solution = self.solver.solve(LinearRows(*ops, rows, self.contraction), rows)
        return (checked(solution).value * scale).view(b.shape)


class Series(Inverse):
    """M = I + J + ... + J^terms."""

    def __init__(self, f: "RowMap | AffineMap", z: Tensor, terms: int):
        super().__init__(f, z, Auto())
        self.terms = terms

    def apply(self, b: Tensor, transposed: bool) -> Tensor:
        """The sum, by Horner's rule."""
        rows = flat(b)
        product = self.jacobian.vjp if transposed else self.jacobian.jvp
        u = rows
        for _ in range(self.terms):
            u = product(u) + rows
        return u.view(b.shape)


def row_scale(rows: Tensor) -> Tensor:
    """The largest entry of each row, 1 for a row of zeros."""
    scale = rows.abs().amax(dim=-1, keepdim=True) if rows.shape[-1] else rows.new_ones(1)
    return torch.where(scale > 0, scale, 1.0)


def checked(solution: Solution) -> Solution:
    """The adjoint or tangent solve is held to the honesty of the forward one."""
    if bool(solution.converged.all()):
        return solution
    bad = torch.nonzero(~solution.converged).flatten()[:8].tolist()
    raise ConvergenceError(
        f"The linear solve behind a derivative did not converge for samples {bad}: worst scaled "
        f"residual {float(solution.residual.max()):.2g}, expected below 1. {solution.status.value} "
        "If the incoming gradient is finite, I - J is (nearly) singular at the solution: the "
        "equation is close to losing well-posedness. `adjoint=Implicit(solver=...)` chooses "
        "another solver.",
        solution,
    )


class Chord(torch.autograd.Function):
    """r -> M r at r = 0: free forward, an adjoint solve backward, a tangent solve in forward mode."""

    @staticmethod
    def forward(r: Tensor, inverse: Inverse, order: int) -> Tensor:
        return torch.zeros_like(r)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        r, ctx.inverse, ctx.order = inputs
        ctx.save_for_backward(r)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        u = _LinearSolve.apply(g, ctx.inverse, True)
        return _Limit.apply(u, ctx.saved_tensors[0], ctx.order - 1), None, None

    @staticmethod
    def jvp(ctx: Any, r: Tensor, *_: Any) -> Tensor:  # type: ignore[override]
        return _LinearSolve.apply(r, ctx.inverse, False)


class _LinearSolve(torch.autograd.Function):
    """b -> u = J u + b; linear, so its derivative is the transposed solve."""

    @staticmethod
    def forward(b: Tensor, inverse: Inverse, transposed: bool) -> Tensor:
        return inverse.apply(b.detach(), transposed)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _, ctx.inverse, ctx.transposed = inputs

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:  # type: ignore[override]
        return _LinearSolve.apply(v, ctx.inverse, not ctx.transposed), None, None

    @staticmethod
    def jvp(ctx: Any, b: Tensor, *_: Any) -> Tensor:  # type: ignore[override]
        return _LinearSolve.apply(b, ctx.inverse, ctx.transposed)


class _Limit(torch.autograd.Function):
    """The identity, `left` times differentiable. `r` keeps it on the path to the parameters."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, r: Tensor, left: int) -> Tensor:  # type: ignore[override]
        ctx.left = left
        ctx.save_for_backward(r)
        return u.view_as(u)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        if ctx.left == 0:
            raise RuntimeError(
                "An implicit solve was differentiated more often than it was attached for. Raise "
                "the order: `adjoint=Implicit(order=2)` makes second derivatives exact."
            )
        return _Limit.apply(g, ctx.saved_tensors[0], ctx.left - 1), None, None
