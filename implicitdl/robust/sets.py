"""Uncertainty sets of a centre and a size: boxes, balls of three norms, ellipsoids."""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..convex import Cones
from ..solution import unknown_name
from .base import UncertaintySet, eye, nonnegative, same, shared, tensor
from .conic import Conic, stacked, wide


@dataclass(frozen=True, kw_only=True, eq=False)
class Box(UncertaintySet):
    """{z : low <= z <= high}, with h(v) = centre'v + radius'|v|.

    Args:
        low, high: # (..., k)

    Raises:
        ValueError: low > high somewhere.

    Example:
        >>> import torch
        >>> from implicitdl.robust import Box
        >>> U = Box(low=torch.tensor([-1.0, 0.0]), high=torch.tensor([1.0, 2.0]))
        >>> U.support(torch.tensor([2.0, -3.0])), U.worst(torch.tensor([2.0, -3.0]))
        (tensor(2.), tensor([1., 0.]))
    """

    low: Tensor
    high: Tensor
    own: ClassVar[dict[str, int]] = {"low": 1, "high": 1}

    def __post_init__(self) -> None:
        low, high = (tensor(n, getattr(self, n), 1, "(..., k)") for n in ("low", "high"))
        same(self, low=low.shape[-1], high=high.shape[-1])
        if bool((low > high).any()):
            worst = float((low - high).detach().max())
            raise ValueError(
                f"low: got entries up to {worst:.6g} above high, expected low <= high."
            )

    @property
    def dimension(self) -> int:
        return self.low.shape[-1]

    @property
    def centre(self) -> Tensor:
        """The middle.  # (..., k)"""
        return 0.5 * (self.low + self.high)

    @property
    def radius(self) -> Tensor:
        """Half of the widths.  # (..., k)"""
        return 0.5 * (self.high - self.low)

    def members(self) -> Conic:
        unit = eye(self.low, self.dimension)
        return Conic.of(
            Cones(2 * self.dimension), torch.cat([unit, -unit]), stacked([self.high, -self.low], -1)
        )

    def epigraph(self) -> Conic:
        return self.widened().counterpart(1)

    def counterpart(self, m: int) -> Conic:
        # w >= |v| serves all rows: centre_i'v + radius_i'w <= t_i.
        self._fits_rows(m)
        k = self.dimension
        centre, radius = (t if t.dim() > 1 else t[None] for t in (self.centre, self.radius))
        unit, t = eye(centre, k), -eye(centre, m)
        lead = torch.broadcast_shapes(centre.shape[:-2], radius.shape[:-2])
        rows = wide([centre.expand(*lead, m, k), t])
        absolute = torch.nn.functional.pad(torch.cat([unit, -unit]), (0, m))
        W = stacked([torch.cat([-unit, -unit]), radius.expand(*lead, m, k)], -2)
        return Conic.of(Cones(2 * k + m), stacked([absolute, rows], -2), W=W)

    def _support(self, v: Tensor) -> Tensor:
        return (self.centre * v + self.radius * v.abs()).sum(-1)

    def _worst(self, v: Tensor) -> Tensor:
        return self.centre + self.radius * v.sign()

    def _excess(self, z: Tensor) -> Tensor:
        return torch.maximum(self.low - z, z - self.high).amax(-1)

    def _sample(self, n: int, generator: torch.Generator | None) -> Tensor:
        u = torch.rand(
            n, *self.lead, self.dimension, generator=generator, dtype=self.dtype, device=self.device
        )
        return self.low + u * (self.high - self.low)

    def _scaled(self, r: Tensor) -> "Box":
        return Box(low=r[..., None] * self.low, high=r[..., None] * self.high)

    def _moved(self, shift: Tensor) -> "Box":
        return Box(low=self.low + shift, high=self.high + shift)

    def blocks(self, m: int) -> "Box":
        k = self._block_size(m)
        return Box(low=self.low.unflatten(-1, (m, k)), high=self.high.unflatten(-1, (m, k)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Ball(UncertaintySet):
    """{z : ||z - centre|| <= radius}, with h(v) = centre'v + radius times the dual norm of v.

    Args:
        radius: >= 0.  # a number or (...)
        norm: 1, 2 or "inf".
        centre: None for the origin.  # (..., k)
        dimension: k, where no centre says it.

    Example:
        >>> import torch
        >>> from implicitdl.robust import Ball
        >>> Ball(radius=0.5, dimension=2).support(torch.tensor([3.0, 4.0]))
        tensor(2.5000)
    """

    radius: "float | Tensor"
    norm: "int | str" = 2
    centre: Tensor | None = None
    dimension: int = 0  # type: ignore[misc]
    own: ClassVar[dict[str, int]] = {"radius": 0, "centre": 1}

    def __post_init__(self) -> None:
        norm = "inf" if self.norm == math.inf else self.norm
        if norm not in (1, 2, "inf"):
            raise unknown_name("norm", self.norm, ("1", "2", "inf"))
        radius = tensor("radius", self.radius, 0, "(...)", [self.centre])
        nonnegative("radius", radius)
        k = self.dimension
        if self.centre is not None:
            k = tensor("centre", self.centre, 1, "(..., k)").shape[-1]
        if type(k) is not int or k < 1 or self.dimension not in (0, k):
            raise ValueError(
                f"dimension: got {self.dimension!r} with centre of "
                f"{None if self.centre is None else tuple(self.centre.shape)}, expected a positive "
                "integer, that of the centre where there is one."
            )
        for name, value in (("norm", norm), ("radius", radius), ("dimension", k)):
            object.__setattr__(self, name, value)

    def to(self, like: Tensor) -> "Ball":
        out: Ball = super().to(like)
        if out.dtype == like.dtype:
            return out
        return replace(out, centre=like.new_zeros(self.dimension))  # numbers alone have no dtype

    @property
    def _size(self) -> Tensor:
        return self.radius  # type: ignore[return-value]  # __post_init__ made it a tensor

    @property
    def _middle(self) -> Tensor:
        zero = torch.zeros(self.dimension, dtype=self.dtype, device=self.device)
        return zero if self.centre is None else self.centre

    def members(self) -> Conic:
        k, c = self.dimension, self._middle
        r = self._size[..., None]
        unit = eye(c, k)
        if self.norm == 2:
            G = torch.cat([unit.new_zeros(1, k), -unit])
            return Conic.of(Cones(0, (k + 1,)), G, stacked([r, -c], -1))
        if self.norm == "inf":
            return Conic.of(Cones(2 * k), torch.cat([unit, -unit]), stacked([r + c, r - c], -1))
        # |z - c| <= w, sum w <= r
        G = torch.cat([unit, -unit, unit.new_zeros(1, k)])
        W = torch.cat([-unit, -unit, unit.new_ones(1, k)])
        return Conic.of(Cones(2 * k + 1), G, stacked([c, -c, r], -1), W)

    def epigraph(self) -> Conic:
        return self.widened().counterpart(1)

    def counterpart(self, m: int) -> Conic:
        self._fits_rows(m)
        k = self.dimension
        unit = eye(self._middle, k)
        ones = unit.new_ones(k, 1)
        if self.norm == 2:  # (s, v) in the cone
            dual = Conic.of(Cones(0, (k + 1,)), -eye(unit, k + 1).roll(1, 0))
        elif self.norm == 1:  # |v| <= s
            dual = Conic.of(Cones(2 * k), torch.cat([wide([unit, -ones]), wide([-unit, -ones])]))
        else:  # |v| <= w, sum w <= s
            G = torch.nn.functional.pad(torch.cat([unit, -unit]), (0, 1, 0, 1))
            G[-1, -1] = -1.0
            dual = Conic.of(Cones(2 * k + 1), G, W=torch.cat([-unit, -unit, ones.mT]))
        return shared(dual, self._middle, self._size, m)

    def _dual_norm(self, v: Tensor) -> Tensor:
        order = {1: math.inf, 2: 2, "inf": 1}[self.norm]
        return torch.linalg.vector_norm(v, order, dim=-1)

    def _support(self, v: Tensor) -> Tensor:
        return (self._middle * v).sum(-1) + self._size * self._dual_norm(v)

    def _worst(self, v: Tensor) -> Tensor:
        r = self._size[..., None]
        if self.norm == "inf":
            return self._middle + r * v.sign()
        if self.norm == 2:
            return self._middle + r * _direction(v)
        first = torch.nn.functional.one_hot(v.abs().argmax(-1), self.dimension).to(v)
        return self._middle + r * first * v.sign()

    def _excess(self, z: Tensor) -> Tensor:
        order = math.inf if self.norm == "inf" else self.norm
        return torch.linalg.vector_norm(z - self._middle, order, dim=-1) - self._size

    def _sample(self, n: int, generator: torch.Generator | None) -> Tensor:
        shape = (n, *self.lead, self.dimension)
        like: dict[str, Any] = {"generator": generator, "dtype": self.dtype, "device": self.device}
        if self.norm == "inf":
            u = 2 * torch.rand(shape, **like) - 1
        elif self.norm == 2:
            u = _in_ball(shape, like)
        else:  # a simplex's spacings, with signs
            e = -torch.rand((*shape[:-1], shape[-1] + 1), **like).clamp_min(1e-30).log()
            sign = torch.rand(shape, **like).sub(0.5).sign()
            u = sign * e[..., :-1] / e.sum(-1, keepdim=True)
        return self._middle + self._size[..., None] * u

    def _scaled(self, r: Tensor) -> "Ball":
        centre = None if self.centre is None else r[..., None] * self.centre
        return Ball(radius=r * self.radius, norm=self.norm, centre=centre, dimension=self.dimension)

    def _moved(self, shift: Tensor) -> "Ball":
        return Ball(radius=self.radius, norm=self.norm, centre=self._middle + shift)

    def blocks(self, m: int) -> "Ball":
        k = self._block_size(m)
        centre = None if self.centre is None else self.centre.unflatten(-1, (m, k))
        radius = self._size[..., None].expand(*self._size.shape, m)
        return Ball(radius=radius, norm=self.norm, centre=centre, dimension=k)


@dataclass(frozen=True, kw_only=True, eq=False)
class Ellipsoid(UncertaintySet):
    """{centre + shape u : ||u||_2 <= 1}, with h(v) = centre'v + ||shape'v||_2.

    Args:
        shape: a factor; flat and thin ones too.  # (..., k, r)
        centre: None for the origin.  # (..., k)

    Example:
        >>> import torch
        >>> from implicitdl.robust import Ellipsoid
        >>> U = Ellipsoid(shape=torch.diag(torch.tensor([3.0, 4.0])))
        >>> U.support(torch.ones(2)), U.worst(torch.ones(2))
        (tensor(5.), tensor([1.8000, 3.2000]))
    """

    shape: Tensor
    centre: Tensor | None = None
    own: ClassVar[dict[str, int]] = {"shape": 2, "centre": 1}

    def __post_init__(self) -> None:
        k = tensor("shape", self.shape, 2, "(..., k, r)").shape[-2]
        if self.centre is not None:
            same(self, shape=k, centre=tensor("centre", self.centre, 1, "(..., k)").shape[-1])

    @classmethod
    def of_covariance(
        cls, covariance: Tensor, size: "float | Tensor" = 1.0, centre: Tensor | None = None
    ) -> "Ellipsoid":
        """{z : (z - centre)' covariance^-1 (z - centre) <= size^2}.

        Args:
            covariance: symmetric, positive definite.  # (..., k, k)
            size: # a number or (...)
            centre: None for the origin.  # (..., k)
        """
        tensor("covariance", covariance, 2, "(..., k, k)")
        factor, bad = torch.linalg.cholesky_ex(covariance)
        if bool((bad > 0).any()):
            raise ValueError("covariance: got a matrix that is not positive definite; give a factor "
                             "as `shape`, which may be singular.")  # fmt: skip
        size = torch.as_tensor(size, dtype=factor.dtype, device=factor.device)
        return cls(shape=size[..., None, None] * factor, centre=centre)

    @property
    def dimension(self) -> int:
        return self.shape.shape[-2]

    @property
    def _middle(self) -> Tensor:
        return self.shape.new_zeros(self.dimension) if self.centre is None else self.centre

    def members(self) -> Conic:
        k, r = self.shape.shape[-2:]
        u = eye(self.shape, r)
        unit = u.new_zeros(r + 1)
        unit[0] = 1.0
        return Conic.of(
            Cones(0, (r + 1,)), u.new_zeros(r + 1, k), unit, torch.cat([u.new_zeros(1, r), -u]),
            A=eye(self.shape, k), B=-self.shape, b=self._middle,
        )  # fmt: skip

    def epigraph(self) -> Conic:
        # (t - centre'v, shape'v) in the cone
        r = self.shape.shape[-1]
        first = torch.nn.functional.pad(self._middle[..., None, :], (0, 1), value=-1.0)
        G = stacked([first, torch.nn.functional.pad(-self.shape.mT, (0, 1))], -2)
        return Conic.of(Cones(0, (r + 1,)), G)

    def _support(self, v: Tensor) -> Tensor:
        return (self._middle * v).sum(-1) + torch.linalg.vector_norm(self._pulled(v), dim=-1)

    def _worst(self, v: Tensor) -> Tensor:
        return self._middle + (self.shape @ _direction(self._pulled(v))[..., None])[..., 0]

    def _pulled(self, v: Tensor) -> Tensor:
        return (self.shape.mT @ v[..., None])[..., 0]

    def _excess(self, z: Tensor) -> Tensor:
        off = (z - self._middle)[..., None]
        u = torch.linalg.pinv(self.shape) @ off
        beside = (self.shape @ u - off).abs().amax((-1, -2))
        return torch.maximum(torch.linalg.vector_norm(u[..., 0], dim=-1) - 1, beside)

    def _sample(self, n: int, generator: torch.Generator | None) -> Tensor:
        like = {"generator": generator, "dtype": self.dtype, "device": self.device}
        u = _in_ball((n, *self.lead, self.shape.shape[-1]), like)
        return self._middle + (self.shape @ u[..., None])[..., 0]

    def _scaled(self, r: Tensor) -> "Ellipsoid":
        centre = None if self.centre is None else r[..., None] * self.centre
        return Ellipsoid(shape=r[..., None, None] * self.shape, centre=centre)

    def _moved(self, shift: Tensor) -> "Ellipsoid":
        return Ellipsoid(shape=self.shape, centre=self._middle + shift)

    def blocks(self, m: int) -> "Ellipsoid":
        k = self._block_size(m)
        centre = None if self.centre is None else self.centre.unflatten(-1, (m, k))
        return Ellipsoid(shape=self.shape.unflatten(-2, (m, k)), centre=centre)


def _direction(v: Tensor) -> Tensor:
    """v / ||v||, zero for zero, with a derivative elsewhere."""
    size = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    return v / torch.where(size > 0, size, torch.ones_like(size))


def _in_ball(shape: tuple[int, ...], like: dict[str, Any]) -> Tensor:
    u = _direction(torch.randn(shape, **like))
    return u * torch.rand((*shape[:-1], 1), **like).pow(1 / max(shape[-1], 1))
