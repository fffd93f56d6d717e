"""Products of nonnegative and second-order cones: vectors in them, their algebra, their projections.

A vector of K = R_+^l x Q^{q_1} x ... x Q^{q_m} is one row, its parts one after the other. Cones of the
same size that stand side by side are handled together.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .._linalg import project_second_order_cone


@dataclass(frozen=True)
class Cones:
    """K = R_+^l x Q^{q_1} x ... x Q^{q_m}, with Q^q = {(t, x): ||x|| <= t} in R^q.

    Args:
        nonnegative: l.
        second_order: q_1, ..., q_m, each at least 1.

    Raises:
        ValueError: a size that is no such number.
    """

    nonnegative: int = 0
    second_order: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "second_order", tuple(self.second_order))
        sizes = (self.nonnegative, *self.second_order)
        if (
            any(type(n) is not int for n in sizes)
            or self.nonnegative < 0
            or min(self.second_order, default=1) < 1
        ):
            raise ValueError(
                f"Cones: got nonnegative={self.nonnegative!r} and second_order="
                f"{self.second_order!r}, expected an integer >= 0 and integers >= 1."
            )

    @property
    def size(self) -> int:
        """The length of a vector."""
        return self.nonnegative + sum(self.second_order)

    @property
    def degree(self) -> int:
        """The degree of the barrier: l + m."""
        return self.nonnegative + len(self.second_order)

    @functools.cached_property
    def groups(self) -> tuple[tuple[int, int, int], ...]:
        """(start, count, size) of each run of second-order cones of one size."""
        out: list[tuple[int, int, int]] = []
        start = self.nonnegative
        for q in self.second_order:
            if out and out[-1][2] == q:
                out[-1] = (out[-1][0], out[-1][1] + 1, q)
            else:
                out.append((start, 1, q))
            start += q
        return tuple(out)

    def linear(self, x: Tensor) -> Tensor:
        """The nonnegative part.  # (..., size) -> (..., l)"""
        return x[..., : self.nonnegative]

    def blocks(self, x: Tensor) -> Iterator[Tensor]:
        """The second-order parts, run by run.  # (..., size) -> (..., count, q)"""
        for start, count, q in self.groups:
            yield x[..., start : start + count * q].unflatten(-1, (count, q))

    def joined(self, linear: Tensor, blocks: "list[Tensor]") -> Tensor:
        """The vector of these parts."""
        if not blocks:
            return linear
        return torch.cat([linear, *(b.flatten(-2) for b in blocks)], -1)

    def unit(self, like: Tensor) -> Tensor:
        """e, with x o e = x.  # (size,)"""
        blocks = []
        for _, count, q in self.groups:
            e = like.new_zeros(count, q)
            e[:, 0] = 1.0
            blocks.append(e)
        return self.joined(like.new_ones(self.nonnegative), blocks)

    def mirror_rows(self, G: Tensor) -> Tensor:
        """J G, the rows of second-order cones but for their first with the other sign."""
        if not self.groups:
            return G
        sign = G.new_full((self.size, 1), -1.0)
        sign[self.unit(G[..., 0]).bool()] = 1.0
        return sign * G

    def depth(self, x: Tensor) -> Tensor:
        """The smallest eigenvalue: x is in K where it is >= 0.  # (..., size) -> (...)"""
        parts = [x.new_full(x.shape[:-1], torch.inf)]
        if self.nonnegative:
            parts.append(self.linear(x).amin(-1))
        parts += [
            (b[..., 0] - torch.linalg.vector_norm(b[..., 1:], dim=-1)).amin(-1)
            for b in self.blocks(x)
        ]
        out = parts[0]
        for part in parts[1:]:
            out = torch.minimum(out, part)
        return out

    def project(self, v: Tensor) -> Tensor:
        """The nearest point of K.  # (..., size) -> (..., size)"""
        blocks = []
        for b in self.blocks(v):
            t, x = project_second_order_cone(b[..., 0], b[..., 1:])
            blocks.append(torch.cat([t[..., None], x], -1))
        return self.joined(self.linear(v).clamp_min(0.0), blocks)


def multiply(K: Cones, x: Tensor, y: Tensor) -> Tensor:
    """x o y, the Jordan product."""
    blocks = [
        torch.cat([(a * b).sum(-1, keepdim=True), a[..., :1] * b[..., 1:] + b[..., :1] * a[..., 1:]],
                  -1)
        for a, b in zip(K.blocks(x), K.blocks(y), strict=True)
    ]  # fmt: skip
    return K.joined(K.linear(x) * K.linear(y), blocks)


def divide(K: Cones, lam: Tensor, b: Tensor) -> Tensor:
    """x with lam o x = b, for lam inside K."""
    blocks = []
    for u, c in zip(K.blocks(lam), K.blocks(b), strict=True):
        u0, u1, c0, c1 = u[..., :1], u[..., 1:], c[..., :1], c[..., 1:]
        det = _determinant(u)[..., None]
        x0 = (u0 * c0 - (u1 * c1).sum(-1, keepdim=True)) / det
        blocks.append(torch.cat([x0, (c1 - x0 * u1) / u0], -1))
    return K.joined(K.linear(b) / K.linear(lam), blocks)


def _determinant(u: Tensor) -> Tensor:
    """u_0^2 - ||u_1||^2, without cancellation."""
    r = torch.linalg.vector_norm(u[..., 1:], dim=-1)
    return (u[..., 0] - r) * (u[..., 0] + r)


def longest_step(K: Cones, x: Tensor, d: Tensor) -> Tensor:
    """The largest t with x + t d in K, x inside; inf where there is none.  # (batch,)"""
    inf = x.new_full((), torch.inf)
    out = x.new_full(x.shape[:-1], torch.inf)
    if K.nonnegative:
        a, b = K.linear(x), K.linear(d)
        out = torch.where(b < 0, -a / b, inf).amin(-1)
    for u, v in zip(K.blocks(x), K.blocks(d), strict=True):
        # det(x + t d) = c + 2 b t + a t^2 with c > 0: the smaller positive root.
        apex = torch.where(v[..., 0] < 0, -u[..., 0] / v[..., 0], inf)
        out = torch.minimum(out, apex.amin(-1))
        if u.shape[-1] == 1:  # a half-line, whose determinant is a square
            continue
        a = v[..., 0] ** 2 - (v[..., 1:] ** 2).sum(-1)
        b = u[..., 0] * v[..., 0] - (u[..., 1:] * v[..., 1:]).sum(-1)
        c = _determinant(u)
        disc, low = b * b - a * c, -b + (b * b - a * c).clamp_min(0).sqrt()
        root = torch.where((disc >= 0) & (low > 0), c / low, inf)
        out = torch.minimum(out, root.amin(-1))
    return out


class Scaling:
    """Nesterov and Todd's W, symmetric, with W z = W^-1 s = lam, at s and z inside K.

    Reference: Vandenberghe (2010), "The CVXOPT linear and quadratic cone program solvers", 4.
    """

    def __init__(self, K: Cones, s: Tensor, z: Tensor):
        self.K = K
        tiny = torch.finfo(s.dtype).tiny
        sl, zl = K.linear(s), K.linear(z)
        self.w = (sl / zl).sqrt()
        self.parts: list[tuple[Tensor, Tensor]] = []
        lam = []
        for a, b in zip(K.blocks(s), K.blocks(z), strict=True):
            da, db = _determinant(a).clamp_min(tiny), _determinant(b).clamp_min(tiny)
            u, v = a / da.sqrt()[..., None], b / db.sqrt()[..., None]
            gamma = (0.5 * (1 + (u * v).sum(-1, keepdim=True))).sqrt()
            w = (u + _mirrored(v)) / (2 * gamma)
            w = torch.cat([w[..., :1] + 1, w[..., 1:]], -1) / (2 * (w[..., :1] + 1)).sqrt()
            beta = (da / db).pow(0.25)[..., None]
            self.parts.append((w, beta))
            lam.append(_reflected(w, b) * beta)
        self.lam = K.joined((sl * zl).sqrt(), lam)

    def times(self, x: Tensor) -> Tensor:
        """W x."""
        blocks = [_reflected(w, b) * beta for (w, beta), b in self._with(x)]
        return self.K.joined(self.w * self.K.linear(x), blocks)

    def solve(self, x: Tensor) -> Tensor:
        """W^-1 x."""
        blocks = [_reflected(_mirrored(w), b) / beta for (w, beta), b in self._with(x)]
        return self.K.joined(self.K.linear(x) / self.w, blocks)

    def solve_rows(self, G: Tensor, mirrored: Tensor) -> Tensor:
        """W^-1 G.

        Args:
            G: # (batch, size, n) or (size, n)
            mirrored: `K.mirror_rows(G)`, which is the same at every W.

        Returns:
            # (batch, size, n)
        """
        K, n = self.K, G.shape[-1]
        out = G.new_empty(self.w.shape[0], K.size, n)
        torch.div(G[..., : K.nonnegative, :], self.w[..., None], out=out[:, : K.nonnegative])
        for (w, beta), (start, count, q) in zip(self.parts, K.groups, strict=True):
            rows = slice(start, start + count * q)
            block = G[..., rows, :].unflatten(-2, (count, q))
            m = _mirrored(w)
            along = m[..., None, :] @ block  # (batch, count, 1, n)
            # (2 m m' - J) G / beta
            part = out[:, rows].unflatten(1, (count, q))
            flip = mirrored[..., rows, :].unflatten(-2, (count, q))
            torch.div(flip, -beta[..., None], out=part)
            part.addcmul_((2 / beta)[..., None] * m[..., None], along)
        return out

    def _with(self, x: Tensor) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
        return zip(self.parts, self.K.blocks(x), strict=True)


def _mirrored(u: Tensor) -> Tensor:
    """J u = (u_0, -u_1)."""
    return torch.cat([u[..., :1], -u[..., 1:]], -1)


def _reflected(w: Tensor, x: Tensor) -> Tensor:
    """(2 w w' - J) x."""
    return 2 * w * (w * x).sum(-1, keepdim=True) - _mirrored(x)


Function = Callable[[Tensor], Tensor]


class Derivative:
    """D, the derivative of the projection onto K at v, by its eigenspaces.

    On R_+ it is 0 or 1. On a second-order cone it has eigenvalue `up` along (1, u) / sqrt 2, `down`
    along (1, -u) / sqrt 2 and `side` across, u = v_1 / ||v_1||: all 1 inside, all 0 inside -K, else
    1, 0 and (1 + v_0 / ||v_1||) / 2.

    Reference: Malick, Sendov (2006); Brown, Zavala, Busseti, Moursi, Boyd (2019), section 3.
    """

    def __init__(self, K: Cones, v: Tensor):
        self.K = K
        self.line = (K.linear(v) > 0).to(v.dtype)
        self.parts: list[tuple[Tensor, Tensor]] = []  # u, (up, down, side)
        for b in K.blocks(v):
            r = torch.linalg.vector_norm(b[..., 1:], dim=-1, keepdim=True)
            u = b[..., 1:] / r.clamp_min(torch.finfo(v.dtype).tiny)
            u = torch.where(r > 0, u, torch.zeros_like(u))
            inside, below = b[..., :1] >= r, b[..., :1] <= -r
            one, zero = torch.ones_like(r), torch.zeros_like(r)
            side = 0.5 * (1 + b[..., :1] / r.clamp_min(torch.finfo(v.dtype).tiny))
            values = [
                torch.where(inside, one, torch.where(below, zero, between))
                for between in (one, zero, side)
            ]
            self.parts.append((u, torch.cat(values, -1)))

    def values(self) -> Tensor:
        """All eigenvalues, for how near they are to 0 or 1.  # (batch, ...)"""
        return torch.cat([self.line, *(e.flatten(-2) for _, e in self.parts)], -1)

    def function(self, f: Function, x: Tensor) -> Tensor:
        """f(D) x.  # (batch, size)"""
        blocks = []
        for (u, e), b in zip(self.parts, self.K.blocks(x), strict=True):
            c = f(e)
            along = (u * b[..., 1:]).sum(-1, keepdim=True)
            up, down = (
                0.5 * c[..., :1] * (b[..., :1] + along),
                0.5 * c[..., 1:2] * (b[..., :1] - along),
            )
            across = c[..., 2:] * (b[..., 1:] - along * u)
            blocks.append(torch.cat([up + down, (up - down) * u + across], -1))
        return self.K.joined(f(self.line) * self.K.linear(x), blocks)

    def function_rows(self, f: Function, G: Tensor) -> Tensor:
        """f(D) G.  # (batch, size, n) or (size, n) -> (batch, size, n)"""
        K = self.K
        out = [f(self.line)[..., None] * G[..., : K.nonnegative, :]]
        for (u, e), (start, count, q) in zip(self.parts, K.groups, strict=True):
            b = G[..., start : start + count * q, :].unflatten(-2, (count, q))
            c = f(e)[..., None, :]  # (batch, count, 1, 3)
            along = u[..., None, :] @ b[..., 1:, :]
            up, down = (
                0.5 * c[..., :1] * (b[..., :1, :] + along),
                0.5 * c[..., 1:2] * (b[..., :1, :] - along),
            )
            across = c[..., 2:] * (b[..., 1:, :] - u[..., None] * along)
            rows = torch.cat([up + down, u[..., None] * (up - down) + across], -2)
            out.append(rows.flatten(-3, -2))
        return torch.cat(out, -2) if len(out) > 1 else out[0]
