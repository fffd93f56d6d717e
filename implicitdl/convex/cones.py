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
        TypeError: `second_order` is no tuple or list.
        ValueError: a size that is no such number.
    """

    nonnegative: int = 0
    second_order: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.second_order, tuple | list):
            raise TypeError(
                f"Cones: got second_order={self.second_order!r}, expected the sizes of the "
                "second-order cones, as (4,) or (3, 3)."
            )
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
    """The largest t with x + t d in K, x inside; inf where there is none.  # (..., size) -> (...)"""
    # 1 / t is max(0, -d / x) on a half-line, max(0, ||r_1|| - r_0) on a second-order cone, with r
    # the image of d under the hyperbolic rotation that takes x to (1, 0): Vandenberghe (2010), 8.3.
    parts = [d.new_zeros(d.shape[:-1])]
    if K.nonnegative:
        parts.append(-(K.linear(d) / K.linear(x)).amin(-1))
    for u, v in zip(K.blocks(x), K.blocks(d), strict=True):
        root = _determinant(u).sqrt()
        first = (u[..., 0] * v[..., 0] - (u[..., 1:] * v[..., 1:]).sum(-1)) / root
        share = (v[..., 0] + first) / (u[..., 0] + root)
        rest = torch.linalg.vector_norm(v[..., 1:] - share[..., None] * u[..., 1:], dim=-1)
        parts.append(((rest - first) / root).amax(-1))
    return 1 / functools.reduce(torch.maximum, parts)


@dataclass(frozen=True, eq=False)
class Spectral:
    """A symmetric map that is a number on each half-line and, on each second-order cone, has two
    eigenvectors (1, u) / sqrt 2 and (1, -u) / sqrt 2 and one eigenvalue across them.

    Nesterov and Todd's scaling is of this kind, and so is the derivative of the projection: what is
    done with functions of the one is done with those of the other.

    Attributes:
        cones: K.
        line: eigenvalues on the half-lines.  # (batch, l)
        parts: of each run of second-order cones the eigenvectors (batch, count, 2, q), their
            eigenvalues (batch, count, 2), and the one across (batch, count, 1).
    """

    cones: Cones
    line: Tensor
    parts: tuple[tuple[Tensor, Tensor, Tensor], ...]

    def mapped(self, f: Callable[[Tensor], Tensor]) -> "Spectral":
        """f of the map: the same eigenvectors, f of the eigenvalues."""
        parts = tuple((e, f(pair), f(side)) for e, pair, side in self.parts)
        return Spectral(self.cones, f(self.line), parts)

    def __call__(self, x: Tensor) -> Tensor:
        """The image of x.  # (batch, size) or (batch, k, size)"""
        K, line, parts = self.cones, self.line, self.parts
        if x.dim() == 3:
            line = line[:, None]
        blocks = []
        for (e, pair, side), b in zip(parts, K.blocks(x), strict=True):
            if x.dim() == 3:
                e, pair, side = e[:, None], pair[:, None], side[:, None]
            # As products and sums: for a few numbers each, matrix products would take longer.
            along = (e * b[..., None, :]).sum(-1) * (pair - side)
            blocks.append(side * b + (along[..., None] * e).sum(-2))
        return K.joined(line * K.linear(x), blocks)

    def select(self, index: Tensor) -> "Spectral":
        """Some of the instances."""
        parts = tuple((e[index], pair[index], side[index]) for e, pair, side in self.parts)
        return Spectral(self.cones, self.line[index], parts)


def scaling(K: Cones, s: Tensor, z: Tensor) -> Spectral:
    """Nesterov and Todd's W, with W z = W^-1 s, at s and z inside K.

    On a second-order cone W = beta (2 w w' - J) with w'J w = 1: at w = (cosh t, u sinh t) it has the
    eigenvalues beta e^(2t), beta e^(-2t) and, across, beta.

    Reference: Vandenberghe (2010), "The CVXOPT linear and quadratic cone program solvers", 4.
    """
    tiny = torch.finfo(s.dtype).tiny
    parts = []
    for a, b in zip(K.blocks(s), K.blocks(z), strict=True):
        da, db = _determinant(a).clamp_min(tiny), _determinant(b).clamp_min(tiny)
        a, b = a / da.sqrt()[..., None], b / db.sqrt()[..., None]
        # a + J b is along (cosh 2t, u sinh 2t).
        head = a[..., :1] + b[..., :1]
        tail = a[..., 1:] - b[..., 1:]
        r = torch.linalg.vector_norm(tail, dim=-1, keepdim=True)
        gamma = ((head - r) * (head + r)).clamp_min(tiny).sqrt()
        beta = (da / db).pow(0.25)[..., None]
        up = (head + r) / gamma  # e^(2t)
        pair = beta * torch.cat([up, 1 / up], -1)
        parts.append((_pair(tail, r), pair, beta))
    return Spectral(K, (K.linear(s) / K.linear(z)).sqrt(), tuple(parts))


def derivative(K: Cones, v: Tensor) -> Spectral:
    """The derivative of the projection onto K at v.

    On R_+ it is 0 or 1. On a second-order cone, with u = v_1 / ||v_1||, it has eigenvalue 1 along
    (1, u), 0 along (1, -u) and (1 + v_0 / ||v_1||) / 2 across, or all 1 inside K, all 0 inside -K.

    Reference: Malick, Sendov (2006); Brown, Zavala, Busseti, Moursi, Boyd (2019), section 3.
    """
    tiny = torch.finfo(v.dtype).tiny
    parts = []
    for b in K.blocks(v):
        t, r = b[..., :1], torch.linalg.vector_norm(b[..., 1:], dim=-1, keepdim=True)
        above, below = (t >= r).to(v.dtype), (t <= -r).to(v.dtype)
        side = (0.5 * (1 + t / r.clamp_min(tiny))).clamp(0.0, 1.0)
        side = torch.maximum(above, side * (1 - below))
        pair = torch.cat([1 - below * (1 - above), above], -1)
        parts.append((_pair(b[..., 1:], r), pair, side))
    return Spectral(K, (K.linear(v) > 0).to(v.dtype), tuple(parts))


def _pair(tail: Tensor, r: Tensor) -> Tensor:
    """(1, u) / sqrt 2 and (1, -u) / sqrt 2 with u along tail, of length r.  # (..., 2, q)"""
    u = tail * (0.5**0.5 / r.clamp_min(torch.finfo(tail.dtype).tiny))
    if tail.shape[-1]:  # any unit vector where the tail is zero
        u[..., :1] += (0.5**0.5) * (r == 0)
    head = torch.full_like(r, 0.5**0.5)
    return torch.stack([torch.cat([head, u], -1), torch.cat([head, -u], -1)], -2)
