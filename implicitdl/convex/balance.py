"""Changing the units of a batch of programs so that the entries of its matrices are of one size.

With x = D x^, rows of G and A multiplied by E and the objective by c, all powers of two, so that no
rounding is added. A second-order cone has one factor, which keeps it a cone.

Reference: Ruiz (2001), "A scaling algorithm to equilibrate both rows and columns norms in matrices".
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .cones import Cones, Spectral
from .program import Program, size_of

# Ratio of the largest to the smallest entry's size, of rows or of columns, that is left alone.
_FINE = 100.0
_ROUNDS = 12


@dataclass(frozen=True, eq=False)
class Balance:
    """The factors.  # (n,), (p,), (size,), () or a batch of these

    Attributes:
        columns: D, of x.
        equalities: E of the rows of A.
        rows: E of the rows of G.
        cost: c, of the objective, with one more dimension of size 1.
    """

    columns: Tensor
    equalities: Tensor
    rows: Tensor
    cost: Tensor

    def scaled(self, program: Program) -> Program:
        """The program in the new units."""
        D, E, F, c = self.columns, self.rows, self.equalities, self.cost
        P = program.P
        if P is not None:
            P = c[..., None] * D[..., None] * P * D[..., None, :]
        return replace(
            program,
            P=P, q=c * D * program.q,
            G=E[..., None] * program.G * D[..., None, :], h=E * program.h,
            A=F[..., None] * program.A * D[..., None, :], b=F * program.b,
        )  # fmt: skip

    def into(self, program: Program, w: Tensor) -> Tensor:
        """w = (x, y, s - z) in the new units."""
        x, y, v = program.split(w)
        s = program.cones.project(v)
        v = self.rows * s - self.cost / self.rows * (s - v)
        return torch.cat([x / self.columns, self.cost / self.equalities * y, v], 1)

    def out_of(self, program: Program, w: Tensor) -> Tensor:
        """w in the old units; of a certificate, too."""
        x, y, v = program.split(w)
        s = program.cones.project(v)
        v = s / self.rows - self.rows / self.cost * (s - v)
        return torch.cat([self.columns * x, self.equalities / self.cost * y, v], 1)

    def residual(self, program: Program, r: Tensor) -> Tensor:
        """A residual of the optimality conditions in the new units: S r, with S diagonal."""
        r1, r2, r3 = program.split(r)
        return torch.cat(
            [self.cost * self.columns * r1, self.equalities * r2, self.rows * r3], 1
        )  # fmt: skip

    def step(self, program: Program, D: Spectral, w: Tensor) -> Tensor:
        """A small change of w in the old units, T w, with T symmetric; D is the derivative of the
        projection where it takes place."""
        x, y, v = program.split(w)
        s = D(v)
        v = s / self.rows + self.rows / self.cost * (v - s)
        return torch.cat([self.columns * x, self.equalities / self.cost * y, v], 1)


def balance(program: Program) -> Balance | None:
    """The factors for a program, or None where its units are fine."""
    P, G, A = (None if t is None else t.detach().abs() for t in (program.P, program.G, program.A))
    assert G is not None and A is not None
    K, (n, p, M) = program.cones, program.sizes
    if not n or not (M or p or P is not None):
        return None
    parts = [t.amax(-2) for t in (P, G, A) if t is not None and t.shape[-2]]
    first = _largest(parts)
    rows = [_grouped(K, G.amax(-1))] if M else []
    rows += [A.amax(-1)] if p else []
    if all(_even(t) for t in (first, *rows)):
        return None
    D, E, F = first.new_ones(n), G.new_ones(M), G.new_ones(p)
    for _ in range(_ROUNDS):
        Gs = E[..., None] * G * D[..., None, :]
        As = F[..., None] * A * D[..., None, :]
        sizes = [t.amax(-2) for t in (Gs, As) if t.shape[-2]]
        if P is not None:
            sizes.append((D[..., None] * P * D[..., None, :]).amax(-2))
        D = D * _root(_largest(sizes))
        E = E * _root(_grouped(K, Gs.amax(-1)))
        F = F * _root(As.amax(-1))
    D, E, F = (_rounded(t) for t in (D, E, F))
    top = size_of(D * program.q)
    if P is not None:
        top = torch.maximum(top, (D[..., None] * P * D[..., None, :]).amax((-2, -1)))
    cost = _rounded(1 / torch.where(top > 0, top, 1.0))[:, None]
    return Balance(D, F, E, cost)


def _largest(parts: list[Tensor]) -> Tensor:
    out = parts[0]
    for t in parts[1:]:
        out = torch.maximum(out, t)
    return out


def _even(t: Tensor) -> bool:
    low = torch.where(t > 0, t, torch.inf).amin(-1)
    return bool((t.amax(-1) <= _FINE * low).all())


def _grouped(K: Cones, rows: Tensor) -> Tensor:
    """The largest of each second-order cone's rows, in all of them."""
    blocks = [b.amax(-1, keepdim=True).expand_as(b) for b in K.blocks(rows)]
    return K.joined(K.linear(rows), blocks)


def _root(t: Tensor) -> Tensor:
    return torch.where(t > 0, t, 1.0).rsqrt()


def _rounded(t: Tensor) -> Tensor:
    return torch.exp2(torch.round(torch.log2(t)).clamp(-60, 60))
