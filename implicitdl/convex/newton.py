"""The derivative of the optimality conditions, solved with: for Newton steps and for gradients.

At w = (x, y, v), with D the derivative of the projection onto K at v,

    J = [ P   A'  -G'(I - D) ]        J' = [ P        A'  G' ]
        [ A   0    0         ]             [ A        0   0  ]
        [ G   0    D         ]             [-(I - D)G  0   D  ]

both come down to H = P + G'(I - D) D^-1 G with the constraints A and those rows of G where D is zero.
An eigenvalue of D below delta is taken for delta, and A x = b is given as much play, which makes H
positive definite; refinement with J itself then leads to the exact solution.
"""

import torch
from torch import Tensor

from .cones import Derivative
from .program import Program, product, transposed

# Relative residual at which a solve with J is as good as the data of most problems; the next step of
# refinement would take as long as the first.
_ENOUGH = 1e-12


class KKT:
    """J at w, factorised.

    Args:
        program: without a graph.
        w: (x, y, v).
        refine: the most steps of refinement.
    """

    def __init__(self, program: Program, w: Tensor, refine: int = 8):
        self.program, self.refine = program, refine
        self.x, self.y, self.v = program.split(w)
        self.D = Derivative(program.cones, self.v)
        eps = torch.finfo(w.dtype).eps
        self.delta = eps**0.45
        self.rows = self.D.function_rows(self._weight, program.G)
        H = self.rows.mT @ self.rows
        if program.P is not None:
            H = H + program.P
        if program.b.shape[1]:
            H = H + (program.A.mT @ program.A) / self.delta
        d = H.diagonal(dim1=-2, dim2=-1)
        d += 16 * eps * d.amax(-1, keepdim=True).clamp_min(1.0)
        self.L, self.info = torch.linalg.cholesky_ex(H)

    def _inverse(self, e: Tensor) -> Tensor:
        return 1 / e.clamp_min(self.delta)

    def _weight(self, e: Tensor) -> Tensor:
        return ((1 - e) * self._inverse(e)).sqrt()

    def _ratio(self, e: Tensor) -> Tensor:
        return (1 - e) * self._inverse(e)

    def apply(self, w: Tensor, back: bool) -> Tensor:
        """J w, or J'w."""
        p, D = self.program, self.D
        x, y, v = p.split(w)
        Dv = D.function(lambda e: e, v)
        if back:
            top = p.quadratic(x) + transposed(p.A, y) + transposed(p.G, v)
            Gx = product(p.G, x)
            return torch.cat([top, product(p.A, x), Dv - Gx + D.function(lambda e: e, Gx)], 1)
        top = p.quadratic(x) + transposed(p.A, y) + transposed(p.G, Dv - v)
        return torch.cat([top, product(p.A, x), product(p.G, x) + Dv], 1)

    def _approximate(self, r: Tensor, back: bool) -> Tensor:
        p, D = self.program, self.D
        r1, r2, r3 = p.split(r)
        half = D.function(self._inverse if back else self._ratio, r3)
        rhs = r1 - transposed(p.G, half) if back else r1 + transposed(p.G, half)
        if p.b.shape[1]:
            rhs = rhs + transposed(p.A, r2) / self.delta
        x = torch.cholesky_solve(rhs[..., None], self.L)[..., 0]
        y = (product(p.A, x) - r2) / self.delta
        Gx = product(p.G, x)
        v = half + D.function(self._ratio, Gx) if back else D.function(self._inverse, r3 - Gx)
        return torch.cat([x, y, v], 1)

    def solve(self, r: Tensor, back: bool = False) -> tuple[Tensor, Tensor]:
        """w with J w = r, or J'w = r, and the relative residual of each instance."""
        size = r.abs().amax(1, keepdim=True).clamp_min(torch.finfo(r.dtype).tiny)
        w = self._approximate(r, back)
        left = r - self.apply(w, back)
        error = (left.abs().amax(1, keepdim=True) / size).nan_to_num(nan=torch.inf)
        for _ in range(self.refine):
            if bool((error < _ENOUGH).all()):
                break
            new = w + self._approximate(left, back)
            rest = r - self.apply(new, back)
            e = (rest.abs().amax(1, keepdim=True) / size).nan_to_num(nan=torch.inf)
            better = e < error
            if not bool(better.any()):
                break
            w, left = torch.where(better, new, w), torch.where(better, rest, left)
            error = torch.where(better, e, error)
        return w, error[:, 0]

    def margin(self) -> Tensor:
        """How far v is from where the projection has no derivative, relative to its size: the
        strict-complementarity margin, 0 where the solution is degenerate.  # (batch,)"""
        K = self.program.cones
        parts = [K.linear(self.v).abs()]
        for b in K.blocks(self.v):
            r = torch.linalg.vector_norm(b[..., 1:], dim=-1)
            parts.append(torch.minimum((b[..., 0] - r).abs(), (b[..., 0] + r).abs()))
        gaps = torch.cat(parts, 1)
        if not gaps.shape[1]:
            return gaps.new_ones(gaps.shape[0])
        return gaps.amin(1) / (1 + self.v.abs().amax(1))


def polished(
    program: Program, w: Tensor, error: Tensor, steps: int, tol: float
) -> tuple[Tensor, Tensor]:
    """The best w of some semismooth Newton steps; a step may well make the error larger before the
    right rows are found to be active."""
    at, now = w, error
    for _ in range(steps):
        going = now > tol
        if not bool(going.any()):
            break
        rows = torch.nonzero(going).flatten()
        part = program.select(rows)
        here = at[rows]
        step, _ = KKT(part, here).solve(-part.residual(here))
        here = here + step
        e = part.error(here).nan_to_num(nan=torch.inf)
        at, now = at.index_copy(0, rows, here), now.index_copy(0, rows, e)
        better = now < error
        w, error = torch.where(better[:, None], at, w), torch.where(better, now, error)
    return w, error
