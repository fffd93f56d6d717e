"""A batch of cone programs and their optimality conditions.

    minimise 1/2 x'P x + q'x    subject to    G x + s = h,  A x = b,  s in K

x, y, z solve it where, with v = s - z, s = Pi_K(v) and z = s - v,

    R(x, y, v) = ( P x + q + A'y + G'z,  A x - b,  G x + s - h ) = 0.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .cones import Cones, Spectral


def product(M: Tensor, x: Tensor) -> Tensor:
    """M x, row by row.  # M (m, n) or (batch, m, n), x (batch, n) -> (batch, m)"""
    return x @ M.mT if M.dim() == 2 else (x[:, None] @ M.mT)[:, 0]


def transposed(M: Tensor, y: Tensor) -> Tensor:
    """M'y, row by row."""
    return y @ M if M.dim() == 2 else (y[:, None] @ M)[:, 0]


def cholesky(H: Tensor, play: float) -> tuple[Tensor, Tensor]:
    """L with L L' = H, and what is added to H's diagonal, in place, for that: `play` times its
    largest entry, or times one.  # (batch, n, n) -> (batch, n, n), (batch, 1)"""
    d = H.diagonal(dim1=-2, dim2=-1)
    extra = play * d.amax(-1, keepdim=True).clamp_min(1.0)
    d += extra
    return torch.linalg.cholesky_ex(H)[0], extra


def cholesky_solve(L: Tensor, b: Tensor) -> Tensor:
    """(L L')^-1 b, row by row; torch's own copies L.  # (batch, n, n), (batch, k, n)"""
    y = torch.linalg.solve_triangular(L, b.mT, upper=False)
    return torch.linalg.solve_triangular(L.mT, y, upper=True).mT


class Rows:
    """A matrix whose rows are coordinates of K, stored for products with many vectors.

    Args:
        M: # (size, n) or (batch, size, n)
        cones: K; None for a matrix that only products are taken with.
    """

    def __init__(self, M: Tensor, cones: Cones | None = None):
        self.M, self.cones = M.contiguous(), cones
        # A row times a matrix is several times as fast as a matrix times a column, if the matrix
        # lies in memory in the order it is read.
        self._flipped = M if M.dim() == 2 else M.mT.contiguous()

    def select(self, index: Tensor | slice) -> "Rows":
        """Some of the instances."""
        if self.M.dim() == 2:
            return self
        new = object.__new__(Rows)
        new.M, new.cones, new._flipped = self.M[index], self.cones, self._flipped[index]
        if "_grams" in self.__dict__:
            new.__dict__["_grams"] = [g if g is None else g[index] for g in self._grams]
        return new

    def times(self, x: Tensor) -> Tensor:
        """M x.  # (batch, n) or (batch, k, n) -> (batch, size) or (batch, k, size)"""
        if self.M.dim() == 2:
            return x @ self.M.mT
        return (x[:, None] @ self._flipped)[:, 0] if x.dim() == 2 else x @ self._flipped

    def back(self, z: Tensor) -> Tensor:
        """M'z.  # (batch, size) or (batch, k, size) -> (batch, n) or (batch, k, n)"""
        if self.M.dim() == 2:
            return z @ self.M
        return (z[:, None] @ self.M)[:, 0] if z.dim() == 2 else z @ self.M

    def square(self, batch: int) -> Tensor:
        """M'M, to be written on.  # (batch, n, n)"""
        H = self.M.mT @ self.M
        return H.expand(batch, -1, -1).clone() if H.dim() == 2 else H

    @functools.cached_property
    def _grams(self) -> list[Tensor | None]:
        """Of each run of second-order cones M_c'M_c, one a cone, where that is no larger than some
        copies of M_c; else None.  # (count, n * n) or (batch, count, n * n)"""
        assert self.cones is not None
        n = self.M.shape[-1]
        out: list[Tensor | None] = []
        for start, count, q in self.cones.groups:
            block = self.M[..., start : start + count * q, :].unflatten(-2, (count, q))
            out.append((block.mT @ block).flatten(-2) if n <= 4 * q else None)
        return out

    def normal(self, F: Spectral) -> Tensor:
        """M'F M for positive semidefinite F.  # (batch, n, n)

        A cone adds its Gram matrix times the eigenvalue across and two matrices of rank one.
        """
        K = self.cones
        assert K is not None
        l, n, batch = K.nonnegative, self.M.shape[-1], F.line.shape[0]
        rows = [self.M[..., :l, :].expand(batch, -1, -1)] if l else []
        weights = [F.line] if l else []
        total: Tensor | float = 0.0
        for (e, pair, side), (start, count, q), gram in zip(
            F.parts, K.groups, self._grams, strict=True
        ):
            block = self.M[..., start : start + count * q, :].unflatten(-2, (count, q))
            along = e @ block  # (batch, count, 2, n)
            rows.append(along.flatten(1, 2))
            weights.append((pair - side).flatten(1))
            if gram is None:
                rows.append(block.flatten(-3, -2).expand(batch, -1, -1))
                weights.append(side.expand(-1, -1, q).flatten(1))
            else:
                weighed = side[..., 0] @ gram if gram.dim() == 2 else transposed(gram, side[..., 0])
                total = total + weighed.unflatten(-1, (n, n))
        if not rows:
            return self.M.new_zeros(batch, n, n) + total
        all_rows = torch.cat(rows, 1) if len(rows) > 1 else rows[0]
        w = torch.cat(weights, 1) if len(weights) > 1 else weights[0]
        scaled = all_rows * w[..., None]
        if isinstance(total, float):
            return scaled.mT @ all_rows
        return torch.baddbmm(total, scaled.mT, all_rows)


@dataclass(frozen=True, eq=False)
class Program:
    """The data of a batch of programs; each datum with a batch dimension or shared.

    Attributes:
        P: symmetric, positive semidefinite; None for zero.  # (n, n) or (batch, n, n)
        q: linear objective.  # (batch, n)
        G, h: cone constraints.  # (M, n) or (batch, M, n); (batch, M)
        A, b: equalities, of p rows, which may be 0.  # (p, n) or (batch, p, n); (batch, p)
        cones: K, of size M.
    """

    P: Tensor | None
    q: Tensor
    G: Tensor
    h: Tensor
    A: Tensor
    b: Tensor
    cones: Cones

    @functools.cached_property
    def rows(self) -> tuple[Rows, Rows]:
        """G and A, for products with many vectors."""
        return Rows(self.G, self.cones), Rows(self.A)

    @functools.cached_property
    def gram(self) -> Tensor:
        """A'A."""
        return self.A.mT @ self.A

    @property
    def batch(self) -> int:
        """The number of instances."""
        return self.q.shape[0]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(n, p, M)."""
        return self.q.shape[1], self.b.shape[1], self.h.shape[1]

    def select(self, index: Tensor | slice) -> "Program":
        """Some of the instances."""
        new = self._mapped(lambda name, t: t[index] if self._batched(name, t) else t)
        if "rows" in self.__dict__:
            new.__dict__["rows"] = tuple(r.select(index) for r in self.rows)
        if "gram" in self.__dict__:
            new.__dict__["gram"] = self.gram if self.gram.dim() == 2 else self.gram[index]
        return new

    def detached(self) -> "Program":
        """The same without a graph."""
        return self._mapped(lambda name, t: t.detach())

    def to(self, dtype: torch.dtype) -> "Program":
        """The same in another dtype."""
        return self._mapped(lambda name, t: t.to(dtype))

    def finite(self) -> Tensor:
        """Which instances have no NaN and no infinity in their data.  # (batch,)"""
        out = torch.ones(self.batch, dtype=torch.bool, device=self.q.device)
        for f in fields(self):
            t = getattr(self, f.name)
            if isinstance(t, Tensor):
                good = torch.isfinite(t)
                out = out & (good.flatten(1).all(1) if self._batched(f.name, t) else good.all())
        return out

    def tamed(self, which: Tensor) -> "Program":
        """Some instances replaced by one that x = y = z = 0 and s = e solve; their data's gradients
        are what reaches them, be it NaN.

        Args:
            which: the instances.  # (batch,) bool
        """
        e = self.cones.unit(self.q.detach())

        def tame(name: str, t: Tensor) -> Tensor:
            if not self._batched(name, t):
                return _Replaced.apply(t, t.detach().nan_to_num(0.0, 0.0, 0.0))
            new = e if name == "h" else t.new_zeros(())
            rows = which.view(-1, *(1,) * (t.dim() - 1))
            return _Replaced.apply(t, torch.where(rows, new, t.detach()))

        return self._mapped(tame)

    def trivial(self) -> Tensor:
        """w = (0, 0, e), which solves what `tamed` puts in."""
        n, p, _ = self.sizes
        e = self.cones.unit(self.q)
        return torch.cat([self.q.new_zeros(n + p), e]).expand(self.batch, -1)

    @staticmethod
    def _batched(name: str, t: Tensor) -> bool:
        return name in "qhb" or t.dim() == 3

    def _mapped(self, change: Callable[[str, Tensor], Tensor]) -> "Program":
        own: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        new: dict[str, Any] = {k: change(k, t) for k, t in own.items() if isinstance(t, Tensor)}
        return replace(self, **new)

    def quadratic(self, x: Tensor) -> Tensor:
        """P x; P is symmetric."""
        return torch.zeros_like(x) if self.P is None else transposed(self.P, x)

    def split(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x, y, v of w = (x, y, v)."""
        n, p, _ = self.sizes
        return w[:, :n], w[:, n : n + p], w[:, n + p :]

    def residual(self, w: Tensor) -> Tensor:
        """R(x, y, v).  # (batch, n + p + M)"""
        x, y, v = self.split(w)
        s = self.cones.project(v)
        r1 = self.quadratic(x) + self.q + transposed(self.G, s - v)
        r3 = product(self.G, x) + s - self.h
        if not self.b.shape[1]:
            return torch.cat([r1, r3], 1)
        r1 = r1 + transposed(self.A, y)
        return torch.cat([r1, product(self.A, x) - self.b, r3], 1)

    def judged(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """R, without a graph, and its largest entry in each instance, each of the three parts
        relative to the terms that it sums.

        Scaled so that changing the units of an instance changes little; under 1e-12 is rounding.
        # (batch, n + p + M), (batch,)
        """
        G, A = self.rows
        x, y, v = self.split(w)
        s = self.cones.project(v)
        Px, Gtz, Gx = self.quadratic(x), G.back(s - v), G.times(x)
        terms, r1 = [Px, self.q, Gtz], Px + self.q + Gtz
        r3 = Gx + s - self.h
        parts, error = [r3], _relative(r3, Gx, s, self.h)
        if self.b.shape[1]:
            Aty, Ax = A.back(y), A.times(x)
            r1, r2 = r1 + Aty, Ax - self.b
            terms, parts = [*terms, Aty], [r2, r3]
            error = torch.maximum(error, _relative(r2, Ax, self.b))
        error = torch.maximum(error, _relative(r1, *terms))
        return torch.cat([r1, *parts], 1), error.nan_to_num(nan=torch.inf)


class _Replaced(torch.autograd.Function):
    """The value of one tensor with the gradient of another."""

    generate_vmap_rule = True

    @staticmethod
    def forward(old: Tensor, new: Tensor) -> Tensor:
        return new.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        return g, None

    @staticmethod
    def jvp(ctx: Any, t: Tensor, *_: Any) -> Tensor:  # type: ignore[override]
        return t.clone()


def size_of(t: Tensor) -> Tensor:
    """The largest entry of each row; 0 of a row without entries.  # (batch, m) -> (batch,)"""
    return torch.linalg.vector_norm(t, torch.inf, 1) if t.shape[1] else t.new_zeros(t.shape[0])


def _relative(r: Tensor, *terms: Tensor) -> Tensor:
    size = size_of(terms[0])
    for t in terms[1:]:
        size = torch.maximum(size, size_of(t))
    return size_of(r) / (1 + size)


def chunks(program: Program, size: int | None = None) -> list[slice]:
    """The batch in parts of one size or, by default, of as many instances as a CPU's cache is good
    for: more are slower, and so are far fewer."""
    n, p, M = program.sizes
    batch = program.batch
    if size is None and program.q.device.type == "cpu":
        most = max(16, int(1e6 / max(1, n * (n + p + M))))
        size = math.ceil(batch / max(1, math.ceil(batch / most)))
    size = max(1, batch if size is None else size)
    return [slice(i, i + size) for i in range(0, batch, size)]
