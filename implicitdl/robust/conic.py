"""Convex sets written with the nonnegative and second-order cones: what the native solver reads.

    {x : there is w with  h - G x - W w in K,  A x + B w = b}

Both descriptions of an uncertainty set U are of this kind: its members (x = z), and the epigraph of
its support function (x = (v, t) with h_U(v) <= t). Every operation on sets is an operation on these
matrices, which are built from the set's own tensors: gradients flow through them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..convex import ConeProgram, Cones, ConeSolver
from ..solution import Solution, Status


@dataclass(frozen=True, eq=False)
class Conic:
    """{x : there is w with h - G x - W w in K, A x + B w = b}; any leading dimensions.

    Attributes:
        G, W, h: # (..., M, n), (..., M, k), (..., M)
        A, B, b: # (..., p, n), (..., p, k), (..., p)
        cones: K, of size M.
    """

    G: Tensor
    W: Tensor
    h: Tensor
    A: Tensor
    B: Tensor
    b: Tensor
    cones: Cones

    @classmethod
    def of(
        cls, cones: Cones, G: Tensor, h: Tensor | None = None, W: Tensor | None = None,
        A: Tensor | None = None, B: Tensor | None = None, b: Tensor | None = None,
    ) -> "Conic":  # fmt: skip
        """From the parts that are not zero; the rest has the size that they imply."""
        n, M = G.shape[-1], G.shape[-2]
        k = next((t.shape[-1] for t in (W, B) if t is not None), 0)
        p = next((t.shape[-2] for t in (A, B) if t is not None), 0)
        zeros = G.new_zeros
        return cls(
            G=G, W=zeros(M, k) if W is None else W, h=zeros(M) if h is None else h,
            A=zeros(p, n) if A is None else A, B=zeros(p, k) if B is None else B,
            b=zeros(p) if b is None else b, cones=cones,
        )  # fmt: skip

    @property
    def lead(self) -> torch.Size:
        """The leading dimensions of all parts, broadcast."""
        return torch.broadcast_shapes(
            *(t.shape[:-2] for t in (self.G, self.W, self.A, self.B)),
            *(t.shape[:-1] for t in (self.h, self.b)),
        )

    def to(self, dtype: torch.dtype) -> "Conic":
        """The same in another dtype."""
        G, W, h, A, B, b = (t.to(dtype) for t in (self.G, self.W, self.h, self.A, self.B, self.b))
        return Conic(G, W, h, A, B, b, self.cones)

    def pulled(self, M: Tensor, c: Tensor | None = None) -> "Conic":
        """{x' : M x' + c in this set}."""
        h, b = self.h, self.b
        if c is not None:
            h, b = h - (self.G @ c[..., None])[..., 0], b - (self.A @ c[..., None])[..., 0]
        return Conic(self.G @ M, self.W, h, self.A @ M, self.B, b, self.cones)

    def hidden(self, k: int) -> "Conic":
        """The projection of this set along its last k coordinates."""
        n = self.G.shape[-1] - k
        W, B = wide([self.G[..., n:], self.W]), wide([self.A[..., n:], self.B])
        return Conic(self.G[..., :n], W, self.h, self.A[..., :n], B, self.b, self.cones)

    def expanded(self, lead: Sequence[int] | None = None) -> "Conic":
        """The same with all leading dimensions written out."""
        lead = self.lead if lead is None else lead
        matrices = [t.expand(*lead, *t.shape[-2:]) for t in (self.G, self.W, self.A, self.B)]
        h, b = (t.expand(*lead, t.shape[-1]) for t in (self.h, self.b))
        G, W, A, B = matrices
        return Conic(G, W, h, A, B, b, self.cones)

    def dual(self) -> "Conic":
        """{(v, t): h_U(v) <= t} of this set U, by duality.

        max v'x over h - G x - W w in K, A x + B w = b  is at most, for any y in K and u,
        h'y + b'u where G'y + A'u = v and W'y + B'u = 0, and equal to the least of these where a
        point of U is inside the second-order cones. (K is its own dual.)
        """
        n, k = self.G.shape[-1], self.W.shape[-1]
        M, p = self.cones.size, self.b.shape[-1]
        new = self.G.new_zeros
        eye = torch.eye(M, dtype=self.G.dtype, device=self.G.device)
        cost = stacked([self.h, self.b], -1)[..., None, :]
        ties = stacked([wide([self.G.mT, self.A.mT]), wide([self.W.mT, self.B.mT])], -2)
        v = torch.eye(n + k, n, dtype=self.G.dtype, device=self.G.device)
        G = new(1 + M, n + 1)
        G[0, n] = -1.0
        return Conic(
            G=G, h=new(1 + M),
            W=stacked([cost, torch.nn.functional.pad(-eye, (0, p))], -2),
            A=torch.nn.functional.pad(-v, (0, 1)), B=ties, b=new(n + k),
            cones=Cones(1 + self.cones.nonnegative, self.cones.second_order),
        )  # fmt: skip

    def spread(self) -> "Conic":
        """Sets in (v, t_1), ..., (v, t_m), along the last leading dimension, as one in (v, t)."""
        m = self.lead[-1]
        if m == 1:
            parts = self.expanded()
            return Conic(
                parts.G.squeeze(-3), parts.W.squeeze(-3), parts.h.squeeze(-2),
                parts.A.squeeze(-3), parts.B.squeeze(-3), parts.b.squeeze(-2), self.cones,
            )  # fmt: skip
        all_, k = self.expanded(), self.cones.nonnegative

        def rows(t: Tensor) -> Tensor:
            # All nonnegative rows, then the second-order ones: the order that Cones has.
            return torch.cat([t[..., :k, :].flatten(-3, -2), t[..., k:, :].flatten(-3, -2)], -2)

        def each(t: Tensor) -> Tensor:
            # Columns of its own for each: (..., m, M, k) to (..., m, M, m k).
            eye = torch.eye(m, dtype=t.dtype, device=t.device)
            return (t[..., None, :] * eye[:, None, :, None]).flatten(-2)

        def split(t: Tensor) -> Tensor:
            return torch.cat([t[..., :-1], each(t[..., -1:])], -1)

        return Conic(
            G=rows(split(all_.G)), W=rows(each(all_.W)), h=rows(all_.h[..., None])[..., 0],
            A=split(all_.A).flatten(-3, -2), B=each(all_.B).flatten(-3, -2),
            b=all_.b.flatten(-2),
            cones=Cones(m * k, self.cones.second_order * m),
        )  # fmt: skip

    @staticmethod
    def meet(parts: Sequence["Conic"]) -> "Conic":
        """The points that are in all of them."""
        first = [p.cones.nonnegative for p in parts]
        sizes = [p.W.shape[-1] for p in parts]

        def padded(t: Tensor, i: int) -> Tensor:
            left, right = sum(sizes[:i]), sum(sizes[i + 1 :])
            return torch.nn.functional.pad(t, (left, right))

        def rows(tensors: list[Tensor], dim: int) -> Tensor:
            # The nonnegative rows of all, then the second-order ones: the order that Cones has.
            linear = [t.narrow(dim, 0, k) for t, k in zip(tensors, first, strict=True)]
            rest = [t.narrow(dim, k, t.shape[dim] - k) for t, k in zip(tensors, first, strict=True)]
            return stacked(linear + rest, dim)

        return Conic(
            G=rows([p.G for p in parts], -2),
            W=rows([padded(p.W, i) for i, p in enumerate(parts)], -2),
            h=rows([p.h for p in parts], -1),
            A=stacked([p.A for p in parts], -2),
            B=stacked([padded(p.B, i) for i, p in enumerate(parts)], -2),
            b=stacked([p.b for p in parts], -1),
            cones=Cones(sum(first), sum((p.cones.second_order for p in parts), ())),
        )

    def minimise(
        self, q: Tensor, *, solver: ConeSolver | None = None, on_failure: str = "return",
        order: int = 1, start: Solution | None = None, dtype: torch.dtype | None = None,
    ) -> tuple[Solution, torch.Size]:  # fmt: skip
        """argmin q'x over the set by the native solver, all leading dimensions as one batch.

        Args:
            q: # (..., n), its leading dimensions broadcast against those of the set.
            solver, on_failure, order: as in `ConeProgram`.
            start: the Solution of a nearby problem.
            dtype: of the program; q's by default.

        Returns:
            The Solution, of value (x, w) and of one batch dimension, and the leading dimensions
            that this one stands for.
        """
        lead = torch.broadcast_shapes(q.shape[:-1], self.lead)
        dtype = dtype or q.dtype

        def flat(t: Tensor, own: int) -> Tensor:
            t = t.to(dtype)
            if t.dim() == own:
                return t  # shared by all
            own_shape = t.shape[t.dim() - own :]
            return t.expand(*lead, *own_shape).reshape(math.prod(lead), *own_shape)

        k = self.W.shape[-1]
        q = torch.cat([q, q.new_zeros(*q.shape[:-1], k)], -1).expand(*lead, -1)
        layer = ConeProgram(self.cones, solver=solver, on_failure=on_failure, order=order)
        solution = layer.solve(
            None, q.reshape(math.prod(lead), q.shape[-1]).to(dtype),
            flat(wide([self.G, self.W]), 2), flat(self.h, 1),
            flat(wide([self.A, self.B]), 2), flat(self.b, 1), start=start,
        )  # fmt: skip
        return solution, lead

    def value(self, q: Tensor, solution: Solution, lead: Sequence[int]) -> Tensor:
        """The least q'x that `minimise` found, with the derivative that it has.  # lead

        That is the derivative of the Lagrangian with the multipliers found, also where the minimiser
        is not unique or jumps (Danskin's theorem).
        """
        n = q.shape[-1]
        failed = (solution.codes != Status.CONVERGED.code).reshape(lead)

        def found(t: Tensor) -> Tensor:
            return t.to(q.dtype).reshape(*lead, t.shape[-1])

        # What was not solved is NaN, with the gradient that the engine has for it; it must not turn
        # that of data which others share to NaN.
        points = [solution.value, solution.stats["dual"], solution.stats["equality_dual"]]
        w, y, u = (torch.where(failed[..., None], 0.0, found(t)) for t in points)
        over = (wide([self.G, self.W]) @ w[..., None])[..., 0] - self.h
        off = (wide([self.A, self.B]) @ w[..., None])[..., 0] - self.b
        out = (q * w[..., :n]).sum(-1) + (y * over).sum(-1) + (u * off).sum(-1)
        return torch.where(failed, found(solution.value).sum(-1), out)

    def as_cvxpy(self, x: Any) -> list[Any]:
        """The cvxpy constraints that put x into the set; w is made here.

        Raises:
            ValueError: the set has a batch dimension.
        """
        import cvxpy as cp

        if self.lead:
            raise ValueError(
                f"as_cvxpy: got a set with leading dimensions {tuple(self.lead)}, expected one "
                "set; cvxpy's problems are not batched."
            )
        G, W, h, A, B, b = (array(t) for t in (self.G, self.W, self.h, self.A, self.B, self.b))
        s, e = h - G @ x, A @ x - b
        if W.shape[1]:
            w = cp.Variable(W.shape[1])
            s, e = s - W @ w, e + B @ w
        out = [e == 0] if len(b) else []
        start = self.cones.nonnegative
        if start:
            out.append(s[:start] >= 0)
        for size in self.cones.second_order:
            out.append(cp.SOC(s[start], s[start + 1 : start + size]))
            start += size
        return out


def array(t: Tensor) -> Any:
    """A tensor's numbers for cvxpy."""
    return t.detach().cpu().double().numpy()


def stacked(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """torch.cat along a dimension counted from the end, whatever the leading dimensions are."""
    own = -dim  # a matrix's rows are dim -2, a vector's -1
    lead = torch.broadcast_shapes(*(t.shape[: t.dim() - own] for t in tensors))
    return torch.cat([t.expand(*lead, *t.shape[t.dim() - own :]) for t in tensors], dim)


def wide(tensors: Sequence[Tensor]) -> Tensor:
    """Matrices side by side, whatever their leading dimensions are."""
    lead = torch.broadcast_shapes(*(t.shape[:-2] for t in tensors))
    return torch.cat([t.expand(*lead, *t.shape[-2:]) for t in tensors], -1)
