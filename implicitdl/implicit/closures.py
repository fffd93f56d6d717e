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

from ..maps import AffineMap, LinearRows, RowMap, inside_transform
from ..solution import ConvergenceError, Solution
from ..solvers import FixedPointSolver

Map = Callable[[Tensor], Tensor]


def as_rows(f: "Map | AffineMap", z: Tensor) -> "RowMap | AffineMap":
    """f as a map of rows: itself where it is one, else a RowMap with the shape of z."""
    return f if isinstance(f, AffineMap) else RowMap.of(f, z.shape)


def refuse_transforms(who: str) -> None:
    """Raise where values cannot be looked at."""
    if inside_transform():
        raise RuntimeError(
            f"{who} was called inside a torch.func transform (vmap, grad, jacrev, ...): the solve "
            "looks at values, which a transform hides. Batch along dim 0 and use torch.autograd "
            "(torch.autograd.functional.jacobian for Jacobians), or call an ImplicitLayer or a "
            "MonotoneLayer, which torch.func can see into."
        )


def flat(z: Tensor) -> Tensor:
    """One row a sample, for an empty batch too."""
    return z.reshape(z.shape[0], math.prod(z.shape[1:]))


class Inverse:
    """M = (I - J)^-1 at a constant z, applied by solving or, with `terms`, I + J + ... + J^terms.

    Args:
        f: the map.
        z: where.  # (batch, *)
        solver: of the linear equations.
        terms: where to cut off the series; None solves.
        graph: a leaf z and f there, recorded: J is that of the f that was evaluated, whatever
            happens to what it closes over.
        failed: samples that have no solution, and so no derivative.  # (batch,)
    """

    def __init__(
        self,
        f: "RowMap | AffineMap",
        z: Tensor,
        solver: FixedPointSolver,
        *,
        terms: int | None = None,
        graph: tuple[Tensor, Tensor] | None = None,
        failed: Tensor | None = None,
    ):
        self.solver, self.contraction, self.terms = solver, f.contraction, terms
        self.f, self.z, self.graph, self.failed = f, flat(z), graph, failed

    @functools.cached_property
    def jacobian(self) -> Any:
        """Linearised when it is first needed: a forward pass alone does not pay for it."""
        if self.graph is not None and isinstance(self.f, RowMap):
            return self.f.linearize(self.z, self.graph)
        return self.f.linearize(self.z)

    def apply(self, b: Tensor, transposed: bool) -> Tensor:
        """u = J u + b, or u = J^T u + b."""
        device = b.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self.apply(b, transposed)
        J, rows = self.jacobian, flat(b)
        op, back = (J.vjp, J.jvp) if transposed else (J.jvp, J.vjp)
        if self.failed is not None:
            rows = spared(self.failed, rows, rows)
            failed = self.failed[:, None]
            op, back = (functools.partial(_masked, each, failed) for each in (op, back))
        if self.terms is not None:
            u = rows
            for _ in range(self.terms):  # Horner's rule
                u = op(u) + rows
            return u.view(b.shape)
        # Each row is solved for its direction and scaled back: tolerances are then relative to it,
        # and a loss scaled by 1e-8 has gradients exactly 1e-8 times as large.
        scale = row_scale(rows)
        rows = rows / scale
        solution = self.solver.solve(LinearRows(op, back, rows, self.contraction), rows)
        return (checked(solution).value * scale).view(b.shape)


def _masked(op: Map, failed: Tensor, w: Tensor) -> Tensor:
    return op(w).masked_fill(failed, 0.0)


def spared(failed: Tensor, g: Tensor, t: Tensor) -> Tensor:
    """t with zeros for samples that were not solved, whose values mean nothing.

    Raises:
        ConvergenceError: such a sample has a cotangent g.
    """
    touched = failed & (g != 0).any(dim=-1)  # NaN counts
    if bool(touched.any()):
        bad = torch.nonzero(touched).flatten()[:8].tolist()
        raise ConvergenceError(
            f"A gradient flows into samples {bad}, which the solve did not solve. Leave them out "
            "of the loss: `solution.value[solution.converged]`."
        )
    return t.masked_fill(failed[:, None], 0.0)


def row_scale(rows: Tensor) -> Tensor:
    """The largest entry of each row; the smallest normal number for a row of zeros."""
    if not rows.shape[-1]:
        return rows.new_ones(1)
    return rows.abs().amax(dim=-1, keepdim=True).clamp_min_(torch.finfo(rows.dtype).tiny)


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
        ctx.save_for_forward(r)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        u = _LinearSolve.apply(g, ctx.inverse, True)
        return Limit.apply(u, ctx.saved_tensors[0], ctx.order - 1), None, None

    @staticmethod
    def jvp(ctx: Any, r: Tensor, *_: Any) -> Tensor:  # type: ignore[override]
        return Limit.apply(
            _LinearSolve.apply(r, ctx.inverse, False), ctx.saved_tensors[0], ctx.order - 1
        )


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


class Limit(torch.autograd.Function):
    """The identity, `left` times differentiable. `r` keeps it on the path to the parameters."""

    @staticmethod
    def forward(u: Tensor, r: Tensor, left: int) -> Tensor:
        return u.view_as(u)

    @staticmethod
    def vmap(info: Any, dims: Any, u: Tensor, r: Tensor, left: int) -> Any:
        return Limit.apply(u, r, left), dims[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _, r, ctx.left = inputs
        ctx.save_for_backward(r)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        if ctx.left == 0:
            raise RuntimeError(_ONCE_TOO_OFTEN)
        return Limit.apply(g, ctx.saved_tensors[0], ctx.left - 1), None, None

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:  # type: ignore[override]
        raise RuntimeError(
            "Forward mode over a derivative of an implicit solve through a closure cannot be had. "
            "Take the second derivative in reverse mode, with `adjoint=Implicit(order=2)`, or write "
            "the map as an AffineMap (ImplicitLayer, MonotoneLayer)."
        )


_ONCE_TOO_OFTEN = (
    "An implicit solve was differentiated more often than it was attached for. Raise the order: "
    "`adjoint=Implicit(order=2)`, or `order=2` of a convex layer, makes second derivatives exact."
)
