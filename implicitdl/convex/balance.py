"""Changing the units of a batch of programs so that its data are of the size of one.

With x = l D x^, rows of G and A multiplied by E, h and b by E / l, and the objective by c, all powers of
two, so that no rounding is added. A second-order cone has one factor, which keeps it a cone. D and E
make the entries of the matrices even, l those of the right-hand sides, c those of the objective.

Reference: Ruiz (2001), "A scaling algorithm to equilibrate both rows and columns norms in matrices".
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .cones import Cones, Spectral
from .program import Program, size_of

# Ratio of the largest to the smallest entry's size, of rows or of columns, that is left alone.
_FINE = 100.0
# Sizes within [1 / _NEAR, _NEAR] are left alone.
_NEAR = 16.0
_ROUNDS = 12


@dataclass(frozen=True, eq=False)
class Balance:
    """The factors.  # (n,), (p,), (size,), () or a batch of these

    Attributes:
        columns: D, of x.
        equalities: E of the rows of A.
        rows: E of the rows of G.
        length: l, of x.  # (batch, 1)
        cost: c, of the objective.  # (batch, 1)
    """

    columns: Tensor
    equalities: Tensor
    rows: Tensor
    length: Tensor
    cost: Tensor

    def scaled(self, program: Program) -> Program:
        """The program in the new units."""
        D, E, F, l, c = self.columns, self.rows, self.equalities, self.length, self.cost
        P = program.P
        if P is not None:
            P = (c * l * l)[..., None] * D[..., None] * P * D[..., None, :]
        return replace(
            program,
            P=P, q=c * l * D * program.q,
            G=E[..., None] * program.G * D[..., None, :], h=E / l * program.h,
            A=F[..., None] * program.A * D[..., None, :], b=F / l * program.b,
        )  # fmt: skip

    # In the new units x^ = x / (l D), s^ = E s / l, z^ = c l z / E, y^ = c l y / E.

    def into(self, program: Program, w: Tensor) -> Tensor:
        """w = (x, y, s - z) in the new units."""
        x, y, v = program.split(w)
        l, c = self.length, self.cost
        s = program.cones.project(v)
        v = self.rows / l * s - c * l / self.rows * (s - v)
        return torch.cat([x / (l * self.columns), c * l / self.equalities * y, v], 1)

    def out_of(self, program: Program, w: Tensor) -> Tensor:
        """w in the old units; of a certificate, too."""
        x, y, v = program.split(w)
        s = program.cones.project(v)
        return self._out(x, y, s, s - v)

    def _out(self, x: Tensor, y: Tensor, s: Tensor, z: Tensor) -> Tensor:
        l, c = self.length, self.cost
        v = l / self.rows * s - self.rows / (c * l) * z
        return torch.cat([l * self.columns * x, self.equalities / (c * l) * y, v], 1)

    def residual(self, program: Program, r: Tensor) -> Tensor:
        """A residual of the optimality conditions in the new units: S r, with S diagonal."""
        r1, r2, r3 = program.split(r)
        l, c = self.length, self.cost
        return torch.cat(
            [c * l * self.columns * r1, self.equalities / l * r2, self.rows / l * r3], 1
        )  # fmt: skip

    def step(self, program: Program, D: Spectral, w: Tensor) -> Tensor:
        """A small change of w in the old units, T w, with T symmetric; D is the derivative of the
        projection where it takes place."""
        x, y, v = program.split(w)
        s = D(v)
        return self._out(x, y, s, s - v)


def balanced(program: Program) -> tuple[Balance | None, Program]:
    """The factors for a program and the program in these units; None and itself where its units are
    fine. Worked out once a program: its solve and its derivatives ask for them."""
    kept = program.__dict__
    if "balanced" not in kept:
        units = _balance(program)
        kept["balanced"] = units, None if units is None else units.scaled(program)
    units, scaled = kept["balanced"]
    return units, program if scaled is None else scaled


def _balance(program: Program) -> Balance | None:
    P, G, A = (None if t is None else t.detach().abs() for t in (program.P, program.G, program.A))
    assert G is not None and A is not None
    K, (n, p, M) = program.cones, program.sizes
    if not n:
        return None
    parts = [t.amax(-2) for t in (P, G, A) if t is not None and t.shape[-2]]
    first = _largest(parts) if parts else program.q.new_ones(n)
    rows = [_grouped(K, G.amax(-1))] if M else []
    rows += [A.amax(-1)] if p else []
    even = all(_even(t) for t in (first, *rows))
    near = all(_near(t) for t in rows)
    length, top = _typical(program), size_of(program.q)
    if P is not None:
        top = torch.maximum(top, P.amax((-2, -1)))
    if even and near and _near(length) and _near(top):
        return None
    D, E, F = first.new_ones(n), G.new_ones(M), G.new_ones(p)
    for _ in range(1 if even else _ROUNDS):
        Gs = E[..., None] * G * D[..., None, :]
        As = F[..., None] * A * D[..., None, :]
        if not even:
            sizes = [t.amax(-2) for t in (Gs, As) if t.shape[-2]]
            if P is not None:
                sizes.append((D[..., None] * P * D[..., None, :]).amax(-2))
            D = D * _inverse(_largest(sizes), 0.5) if sizes else D
        power = 1.0 if even else 0.5
        E = E * _inverse(_grouped(K, Gs.amax(-1)), power)
        F = F * _inverse(As.amax(-1), power)
    D, E, F = (_rounded(t) for t in (D, E, F))
    length = _rounded(_typical(replace(program, h=E * program.h, b=F * program.b)))[:, None]
    top = size_of(length * D * program.q)
    if P is not None:
        top = torch.maximum(
            top, length[:, 0] ** 2 * (D[..., None] * P * D[..., None, :]).amax((-2, -1))
        )
    cost = _rounded(_inverse(top, 1.0))[:, None]
    return Balance(D, F, E, length, cost)


def _typical(program: Program) -> Tensor:
    """The geometric mean of what is not zero in h and b, of each instance; 1 where nothing is: a few
    bounds that are far away do not matter.  # (batch,)"""
    t = torch.cat([program.h, program.b], 1).abs()
    some = t > 0
    logs = torch.where(some, t, 1.0).log().sum(1)
    return (logs / some.sum(1).clamp_min(1)).exp()


def _near(t: Tensor) -> bool:
    """Whether all that is not zero is within the sizes that are left alone."""
    return bool(((t == 0) | ((t <= _NEAR) & (t * _NEAR >= 1))).all())


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


def _inverse(t: Tensor, power: float) -> Tensor:
    return torch.where(t > 0, t, 1.0) ** -power


def _rounded(t: Tensor) -> Tensor:
    return torch.exp2(torch.round(torch.log2(t)).clamp(-200, 200))
