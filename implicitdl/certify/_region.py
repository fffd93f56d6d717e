"""The inputs that a bound covers, read through a support function, and what rounding may add."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..model.structure import INPUT
from ..robust import Ball, Box, Budget, Ellipsoid, Hull, UncertaintySet
from ._graph import EPS, Affine, Graph, Linear

_CLOSED = (Box, Ball, Budget, Ellipsoid, Hull)  # whose support is a formula, exact to rounding
_LOOSE = 1e-6  # what the support of other sets, found by a solver, is widened by


@dataclass(frozen=True, eq=False)
class Region:
    """u = center + z, z in Z, one for each of m samples.

    Attributes:
        center: the middle of the box around the inputs.  # (m, p)
        low, high: of that box, rounded outward.  # (m, p)
        set, around, middle: Z - middle is what `support` is about.
        pad: relative allowance for a support that a solver found.
    """

    center: Tensor
    low: Tensor
    high: Tensor
    set: UncertaintySet
    middle: Tensor  # (lead or 1, p)
    pad: float
    samples: int

    @classmethod
    def of(cls, region: Any, around: Tensor | None, graph: Graph) -> "Region":
        """The region checked against the model.

        Raises:
            TypeError, ValueError: another kind of object, dimension, or unbounded.
        """
        p, like = graph.inputs, graph.example
        if not isinstance(region, UncertaintySet):
            raise TypeError(
                f"region: got {type(region).__name__}, expected an UncertaintySet of "
                "implicitdl.robust, for instance Ball(center, radius, p=math.inf)."
            )
        if region.dimension != p:
            raise ValueError(
                f"region: got a set of dimension {region.dimension}, the model takes {p} inputs."
            )
        if len(region.lead) > 1:
            raise ValueError(
                f"region: got leading dimensions {tuple(region.lead)}, expected one set, or one for "
                "each sample, (m,)."
            )
        with torch.no_grad():
            own = region.to(like)
            low, high = _box(own)
            if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
                raise ValueError(
                    "region: it is unbounded; intersect it with a Box: region & Box(...)."
                )
            u = _around(around, p, like, region)
            shape = torch.broadcast_shapes((1, p), low.shape, u.shape)
            middle = (low + high) / 2
            size = torch.maximum(low.abs(), high.abs()) + u.abs()
            pad = 0.0 if isinstance(region, _CLOSED) else _LOOSE
            slack = (8 * EPS + pad) * size.expand(shape)
            center = (u + middle).expand(shape)
            return cls(
                center, u + low - slack, u + high + slack, own,
                middle.reshape(-1, p), pad, shape[0],
            )  # fmt: skip

    @property
    def reach(self) -> Tensor:
        """max |u_i| over the region.  # (m, p)"""
        return torch.maximum(self.low.abs(), self.high.abs())

    @property
    def radius(self) -> Tensor:
        """max |u_i - center_i|.  # (m, p)"""
        return torch.maximum(self.high - self.center, self.center - self.low)

    def rows(self, index: Any) -> "Region":
        """The region of some of the samples."""

        def take(t: Tensor, own: int = 1) -> Tensor:
            return t[index] if t.dim() > own and t.shape[0] > 1 else t

        def chosen_of(s: UncertaintySet) -> UncertaintySet:
            return s._mapped(take, chosen_of)

        chosen = chosen_of(self.set)
        center = self.center[index]
        return Region(
            center, self.low[index], self.high[index], chosen, take(self.middle), self.pad,
            center.shape[0],
        )  # fmt: skip

    def support(self, v: Tensor) -> Tensor:
        """max of v'(u - center), rounded up.  # (m, K, p) -> (m, K), or (K, p) -> (lead or 1, K)"""
        own = self.set.widened() if self.set.lead else self.set
        if v.dim() == 2 and self.set.lead:
            v = v[None]
        value = own.support(v) - (
            v * self.middle[:, None] if v.dim() == 3 else v * self.middle
        ).sum(-1)
        size = v.abs() @ self._size()
        return value + ((self.set.dimension + 8) * EPS + self.pad) * size

    def _size(self) -> Tensor:
        return self.radius.amax(0) + 2 * self.middle.abs().amax(0) + self.center.abs().amax(0)

    def worst(self, v: Tensor) -> Tensor:
        """An input that attains the support.  # (m, K, p) -> (m, K, p)"""
        own = self.set.widened() if self.set.lead else self.set
        return self.center[:, None] - self.middle[:, None] + own.worst(v)

    def spread(self, M: Linear) -> tuple[Tensor, Tensor]:
        """The range of M (u - center).  # (m, rows) each"""
        wide = M.sized(self.radius)
        if isinstance(self.set, Box) or (isinstance(self.set, Ball) and self.set.norm == "inf"):
            return -wide, wide
        matrix = M.dense()
        if matrix is None:
            return -wide, wide
        up, down = self.support(matrix), self.support(-matrix)
        shape = (self.samples, matrix.shape[0])
        return torch.maximum(-down.reshape(-1, shape[1]).expand(shape), -wide), torch.minimum(
            up.reshape(-1, shape[1]).expand(shape), wide
        )

    @property
    def euclidean(self) -> Tensor:
        """A bound of ||u - center||_2.  # (m,)"""
        box = self.radius.square().sum(-1).sqrt()
        if isinstance(self.set, Ball) and self.set.norm in (1, 2):
            box = torch.minimum(box, self.set.radius.reshape(-1).expand(box.shape))
        elif isinstance(self.set, Budget):  # ||z||^2 <= ||z||_inf ||z||_1
            one = self.support(torch.sign(torch.ones_like(self.radius[:1])))
            box = torch.minimum(box, (self.radius.amax(-1) * one.reshape(-1)).sqrt())
        return box * (1 + (self.set.dimension + 8) * EPS)


def _box(region: UncertaintySet) -> tuple[Tensor, Tensor]:
    """`region.bounds()`, by a formula where there is one."""
    if isinstance(region, Box):
        return region.low, region.high
    if isinstance(region, Ball):
        half = torch.as_tensor(region.radius)[..., None].expand(*region.lead, region.dimension)
    elif isinstance(region, Budget):
        half = region.scale * torch.as_tensor(region.budget)[..., None].clamp(max=1.0)
    else:
        return region.bounds()
    centre = torch.zeros_like(half) if region.centre is None else region.centre
    return centre - half, centre + half


def _around(around: Tensor | None, p: int, like: Tensor, region: UncertaintySet) -> Tensor:
    if around is None:
        return like.new_zeros(1, p)
    if not isinstance(around, Tensor) or not around.is_floating_point():
        got = around.dtype if isinstance(around, Tensor) else type(around).__name__
        raise TypeError(f"around: got {got}, expected a floating tensor (batch, {p}).")
    if around.device != like.device:
        raise ValueError(f"around: got a tensor on {around.device}, the model is on {like.device}.")
    u = around.detach().to(like)
    if u.shape[-1:] != (p,) and u.dim() > 1:
        u = u.flatten(1)
    u = u[None] if u.dim() == 1 else u
    if u.dim() != 2 or u.shape[-1] != p:
        raise ValueError(f"around: got shape {tuple(around.shape)}, expected (batch, {p}).")
    bad = torch.nonzero(~torch.isfinite(u))
    if len(bad):
        i, j = bad[0].tolist()
        raise ValueError(
            f"around: got {float(u[i, j])} at index ({i}, {j}), expected finite numbers."
        )
    if region.lead and region.lead[0] not in (1, u.shape[0]) and u.shape[0] != 1:
        raise ValueError(
            f"around: got {u.shape[0]} inputs for {region.lead[0]} sets, expected one for each."
        )
    return u


def affine_slack(row: Affine, sizes: Any, fan: int) -> Tensor:
    """What rounding may add to a sum over a row, |bias| + sum |M| |x|, times the number of terms.

    A sum of k products is off by at most (k + 1) eps sum |terms| (Higham 2002, section 3.1).
    """
    size = row.bias.abs()
    for j, M in row.terms:
        size = size + M.sized(sizes(j))
    return size * ((fan + 6) * EPS)


__all__ = ["INPUT", "Region", "affine_slack"]
