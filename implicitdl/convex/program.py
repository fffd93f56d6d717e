"""A batch of cone programs and their optimality conditions.

    minimise 1/2 x'P x + q'x    subject to    G x + s = h,  A x = b,  s in K

x, y, z solve it where, with v = s - z, s = Pi_K(v) and z = s - v,

    R(x, y, v) = ( P x + q + A'y + G'z,  A x - b,  G x + s - h ) = 0.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .cones import Cones


def product(M: Tensor, x: Tensor) -> Tensor:
    """M x, row by row.  # M (m, n) or (batch, m, n), x (batch, n) -> (batch, m)"""
    return x @ M.mT if M.dim() == 2 else (M @ x[..., None])[..., 0]


def transposed(M: Tensor, y: Tensor) -> Tensor:
    """M'y, row by row."""
    return y @ M if M.dim() == 2 else (M.mT @ y[..., None])[..., 0]


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
    def mirrored(self) -> Tensor:
        """J G, which every scaling of G needs."""
        return self.cones.mirror_rows(self.G)

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
        return self._mapped(lambda name, t: t[index] if self._batched(name, t) else t)

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
        """P x."""
        return torch.zeros_like(x) if self.P is None else product(self.P, x)

    def split(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x, y, v of w = (x, y, v)."""
        n, p, _ = self.sizes
        return w[:, :n], w[:, n : n + p], w[:, n + p :]

    def residual(self, w: Tensor) -> Tensor:
        """R(x, y, v).  # (batch, n + p + M)"""
        x, y, v = self.split(w)
        s = self.cones.project(v)
        r1 = self.quadratic(x) + self.q + transposed(self.A, y) + transposed(self.G, s - v)
        r2 = product(self.A, x) - self.b
        r3 = product(self.G, x) + s - self.h
        return torch.cat([r1, r2, r3], 1)

    def error(self, w: Tensor) -> Tensor:
        """The largest entry of R, each of its three parts relative to the terms that it sums.

        Scaled so that changing the units of an instance changes little; under 1e-12 is rounding.
        # (batch,)
        """
        x, y, v = self.split(w)
        s = self.cones.project(v)
        z = s - v
        Px, Aty, Gtz = self.quadratic(x), transposed(self.A, y), transposed(self.G, z)
        Ax, Gx = product(self.A, x), product(self.G, x)
        dual = _relative(Px + self.q + Aty + Gtz, Px, self.q, Aty, Gtz)
        out = torch.maximum(dual, _relative(Gx + s - self.h, Gx, s, self.h))
        if self.b.shape[1]:
            out = torch.maximum(out, _relative(Ax - self.b, Ax, self.b))
        return out


class _Replaced(torch.autograd.Function):
    """The value of one tensor with the gradient of another."""

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


def _relative(r: Tensor, *terms: Tensor) -> Tensor:
    if not r.shape[1]:
        return r.new_zeros(r.shape[0])
    size = torch.stack([t.abs().amax(1) for t in terms]).amax(0)
    return r.abs().amax(1) / (1 + size)
