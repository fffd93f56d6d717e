"""The inputs that a bound covers, read through a support function, and what rounding may add."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..model.structure import INPUT
from ..robust import Ball, Box, Budget, Ellipsoid, Hull, UncertaintySet
from ._nodes import EPS, Affine, Graph, Linear

_CLOSED = (Box, Ball, Budget, Ellipsoid, Hull)  # whose support is a formula, exact to rounding
_LOOSE = 1e-6  # what the support of other sets, found by a solver, is widened by


@dataclass(frozen=True, eq=False)
class Region:
    """u = center + z, z in Z, one for each of m samples.

    Attributes:
        center: the middle of the box around the inputs.  # (m, p)
        radius: at least |u_i - center_i|; one row where it is that of all samples.  # (m or 1, p)
        set, around, middle: Z - middle is what `support` is about.
        pad: relative allowance for a support that a solver found.
    """

    center: Tensor
    radius: Tensor
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
                "implicitdl.robust, for instance Ball(radius=0.1, norm='inf', dimension=p)."
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
            low, high = (t.reshape(-1, p) for t in _box(own))
            if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
                raise ValueError(
                    "region: it is unbounded; intersect it with a Box: region & Box(...)."
                )
            u = None if around is None else _around(around, p, like, region)
            middle = (low + high) / 2
            pad = 0.0 if isinstance(region, _CLOSED) else _LOOSE
            half = torch.maximum(high - middle, middle - low)
            half = half + (8 * EPS + pad) * torch.maximum(low.abs(), high.abs())
            center = middle
            if u is not None:
                center = u + middle
                if bool((middle != 0).any()):  # the sum is rounded, for each sample otherwise
                    half = half + 2 * EPS * (u.abs() + middle.abs())
            return cls(center, half, own, middle, pad, center.shape[0])

    @functools.cached_property
    def reach(self) -> Tensor:
        """max |u_i| over the region.  # (m, p)"""
        return (self.center.abs() + self.radius) * (1 + 2 * EPS)

    @functools.cached_property
    def largest(self) -> Tensor:
        """max |u| over the region, at least.  # (m, 1)"""
        low, high = torch.aminmax(self.center, dim=-1, keepdim=True)
        top = torch.maximum(high, -low)
        return (top + self.radius.amax(-1, keepdim=True)) * (1 + 2 * EPS)

    def rows(self, index: Any) -> "Region":
        """The region of some of the samples."""

        def take(t: Tensor, own: int = 1) -> Tensor:
            return t[index] if t.dim() > own and t.shape[0] > 1 else t

        def chosen_of(s: UncertaintySet) -> UncertaintySet:
            return s._mapped(take, chosen_of)

        center = self.center[index]
        return Region(
            center, take(self.radius), chosen_of(self.set), take(self.middle), self.pad,
            center.shape[0],
        )  # fmt: skip

    def support(self, v: Tensor) -> Tensor:
        """max of v'(u - center), rounded up.  # (m, K, p) -> (m, K), or (K, p) -> (lead or 1, K)"""
        own = self.set.widened() if self.set.lead else self.set
        if v.dim() == 2 and self.set.lead:
            v = v[None]
        value = own.support(v)
        if self._shifted:
            value = value - (v * self.middle[:, None] if v.dim() == 3 else v * self.middle).sum(-1)
        size = v.abs() @ self._size
        return value + ((self.set.dimension + 8) * EPS + self.pad) * size

    @functools.cached_property
    def _shifted(self) -> bool:
        return bool((self.middle != 0).any())

    @functools.cached_property
    def _size(self) -> Tensor:
        return self.radius.amax(0) + 2 * self.middle.abs().amax(0) + self.center.abs().amax(0)

    def lower(self, h: Tensor) -> Tensor:
        """min of h'u over the region, rounded down.  # (m or 1, K, p) -> (m, K)"""
        one = h.shape[0] == 1 and not (self.set.lead and self.samples > 1)
        least = self.support(-h[0] if one else -h)
        sums = h.abs().sum(-1) * self.largest
        slack = (self.set.dimension + 8) * 4 * EPS * sums
        return dot(h, self.center) - least - slack

    def worst(self, v: Tensor) -> Tensor:
        """An input that attains the support.  # (m, K, p) -> (m, K, p)"""
        own = self.set.widened() if self.set.lead else self.set
        return self.center[:, None] - self.middle[:, None] + own.worst(v)

    @functools.cached_property
    def box(self) -> bool:
        """Whether the set is a box."""
        return isinstance(self.set, Box) or isinstance(self.set, Ball) and self.set.norm == "inf"

    def spread(self, M: Linear) -> tuple[Tensor, Tensor]:
        """The range of M (u - center).  # (m or 1, rows) each"""
        wide = M.sized(self.radius)
        matrix = None if self.box else M.dense()
        if matrix is None:
            return -wide, wide
        up, down = self.support(matrix), self.support(-matrix)
        rows = matrix.shape[0]
        return torch.maximum(-down.reshape(-1, rows), -wide), torch.minimum(
            up.reshape(-1, rows), wide
        )

    @functools.cached_property
    def euclidean(self) -> Tensor:
        """A bound of ||u - center||_2.  # (m,)"""
        box = torch.linalg.vector_norm(self.radius, dim=-1).expand(self.samples)
        if isinstance(self.set, Ball) and self.set.norm in (1, 2):
            box = torch.minimum(box, self.set.radius.reshape(-1).expand(box.shape))
        elif isinstance(self.set, Budget):  # ||z||^2 <= ||z||_inf ||z||_1
            one = self.support(torch.ones_like(self.radius[:1]))
            box = torch.minimum(box, (self.radius.amax(-1) * one.reshape(-1)).sqrt())
        return box * (1 + (self.set.dimension + 8) * EPS)

    @functools.cached_property
    def round(self) -> bool:
        """Whether the 2-norm ball around it is much smaller than that around its box."""
        return bool((self.euclidean < 0.9 * torch.linalg.vector_norm(self.radius, dim=-1)).any())


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


def _around(around: Tensor, p: int, like: Tensor, region: UncertaintySet) -> Tensor:
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
    if not bool(torch.isfinite(u).all()):
        i, j = torch.nonzero(~torch.isfinite(u))[0].tolist()
        raise ValueError(
            f"around: got {float(u[i, j])} at index ({i}, {j}), expected finite numbers."
        )
    if region.lead and region.lead[0] not in (1, u.shape[0]) and u.shape[0] != 1:
        raise ValueError(
            f"around: got {u.shape[0]} inputs for {region.lead[0]} sets, expected one for each."
        )
    return u


def dot(g: Tensor, x: Tensor) -> Tensor:
    """g'x, row by row.  # (m or 1, K, n), (m, n) -> (m, K)"""
    if g.shape[0] == 1:
        return x @ g[0].mT
    return torch.linalg.vecdot(g, x[:, None]) if g.shape[1] == 1 else (g @ x[..., None])[..., 0]


def affine_slack(row: Affine, largest: Callable[[int], Tensor], fan: int) -> Tensor:
    """What rounding may add to a sum over a row: |bias| + sum_j |M_j| 1 max |x_j| times the number
    of terms.

    A sum of k products is off by at most (k + 1) eps sum |terms| (Higham 2002, section 3.1), and
    the sum of sizes is at most the gain |M_j| 1 times the largest entry: no product of matrices.

    Args:
        largest: j -> max |x_j|.  # (m, 1)
    """
    size = row.bias.abs()
    for j, gain in row.gains:
        size = size + largest(j) * gain
    return size * ((fan + 6) * EPS)


__all__ = ["INPUT", "Region", "affine_slack", "dot"]
