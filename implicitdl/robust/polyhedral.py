"""Polyhedral uncertainty sets: budgets, hulls of points, polytopes."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..convex import Cones
from .base import UncertaintySet, eye, nonnegative, same, tensor
from .conic import Conic, stacked, wide


@dataclass(frozen=True, kw_only=True, eq=False)
class Budget(UncertaintySet):
    """{centre + scale * u : |u_j| <= 1, sum_j |u_j| <= budget}: at most `budget` entries at their worst.

    h(v) - centre'v is the sum of the floor(budget) largest scale_j |v_j| and the fraction of the next.

    Args:
        budget: Gamma >= 0; from k on, the set is a box.  # a number or (...)
        scale: the largest deviations, >= 0.  # (..., k)
        centre: None for the origin.  # (..., k)

    Reference:
        Bertsimas, Sim (2004), "The price of robustness", section 3.
    """

    budget: "float | Tensor"
    scale: Tensor
    centre: Tensor | None = None
    own: ClassVar[dict[str, int]] = {"budget": 0, "scale": 1, "centre": 1}

    def __post_init__(self) -> None:
        k = tensor("scale", self.scale, 1, "(..., k)").shape[-1]
        budget = tensor("budget", self.budget, 0, "(...)", [self.scale])
        nonnegative("scale", self.scale)
        nonnegative("budget", budget)
        if self.centre is not None:
            same(self, scale=k, centre=tensor("centre", self.centre, 1, "(..., k)").shape[-1])
        object.__setattr__(self, "budget", budget)

    @property
    def dimension(self) -> int:
        return self.scale.shape[-1]

    @property
    def _total(self) -> Tensor:
        return self.budget  # type: ignore[return-value]  # __post_init__ made it a tensor

    @property
    def _middle(self) -> Tensor:
        return self.scale.new_zeros(self.dimension) if self.centre is None else self.centre

    def members(self) -> Conic:
        # |z - c| <= scale * w, w <= 1, sum w <= budget
        k = self.dimension
        c, unit = self._middle, eye(self.scale, k)
        G = torch.cat([unit, -unit, unit.new_zeros(k + 1, k)])
        scale = torch.diag_embed(self.scale)
        W = stacked([-scale, -scale, unit, unit.new_ones(1, k)], -2)
        h = stacked([c, -c, c.new_ones(k), self._total[..., None]], -1)
        return Conic.of(Cones(3 * k + 1), G, h, W)

    def epigraph(self) -> Conic:
        # w = (q, p) >= 0 with q + p_j >= scale_j |v_j| and c'v + budget q + 1'p <= t
        k = self.dimension
        unit, scale = eye(self.scale, k), torch.diag_embed(self.scale)
        first = self._middle[..., None, :]
        G = torch.nn.functional.pad(
            stacked([first, scale, -scale, unit.new_zeros(k + 1, k)], -2), (0, 1)
        )
        G[..., 0, -1] = -1.0
        dual = wide([unit.new_ones(k, 1), unit])
        cost = stacked([self._total[..., None], unit.new_ones(k)], -1)[..., None, :]
        W = stacked([cost, -dual, -dual, -eye(self.scale, k + 1)], -2)
        return Conic.of(Cones(3 * k + 2), G, W=W)

    def _weights(self) -> Tensor:
        # How much of the j-th largest counts. Of the two one-sided derivatives in a whole budget,
        # the one from below: clamp would add both.
        d = self._total[..., None] - torch.arange(
            self.dimension, dtype=self.dtype, device=self.device
        )
        return torch.where(d > 1, torch.ones_like(d), torch.where(d > 0, d, torch.zeros_like(d)))

    def _support(self, v: Tensor) -> Tensor:
        size = (self.scale * v.abs()).sort(-1, descending=True).values
        return (self._middle * v).sum(-1) + (self._weights() * size).sum(-1)

    def _worst(self, v: Tensor) -> Tensor:
        rank = (self.scale * v.abs()).detach().argsort(-1, descending=True).argsort(-1)
        w = self._weights()
        w = w.expand(*torch.broadcast_shapes(w.shape[:-1], rank.shape[:-1]), -1)
        u = w.gather(-1, rank.expand(w.shape))
        return self._middle + self.scale * u * v.sign()

    def _excess(self, z: Tensor) -> Tensor:
        d = (z - self._middle).abs()
        held = self.scale > 0
        u = d / torch.where(held, self.scale, torch.ones_like(self.scale))
        over = torch.maximum(u.amax(-1) - 1, torch.where(held, u, 0.0).sum(-1) - self._total)
        return torch.where(
            held.all(-1), over, torch.maximum(over, torch.where(held, 0.0, d).amax(-1))
        )

    def _scaled(self, r: Tensor) -> "Budget":
        centre = None if self.centre is None else r[..., None] * self.centre
        return Budget(budget=self.budget, scale=r[..., None] * self.scale, centre=centre)

    def _moved(self, shift: Tensor) -> "Budget":
        return Budget(budget=self.budget, scale=self.scale, centre=self._middle + shift)

    def blocks(self, m: int) -> "Budget":
        k = self._block_size(m)
        centre = None if self.centre is None else self.centre.unflatten(-1, (m, k))
        budget = self._total[..., None].expand(*self._total.shape, m)
        return Budget(budget=budget, scale=self.scale.unflatten(-1, (m, k)), centre=centre)


@dataclass(frozen=True, kw_only=True, eq=False)
class Hull(UncertaintySet):
    """The convex hull of points, observed data or scenarios: h(v) = max_i points_i'v.

    Args:
        points: # (..., N, k), N >= 1
    """

    points: Tensor
    own: ClassVar[dict[str, int]] = {"points": 2}

    def __post_init__(self) -> None:
        if not tensor("points", self.points, 2, "(..., N, k)").shape[-2]:
            raise ValueError(
                f"points: got {tuple(self.points.shape)}, expected at least one point."
            )

    @property
    def dimension(self) -> int:
        return self.points.shape[-1]

    def members(self) -> Conic:
        # z = points'w, w >= 0, 1'w = 1
        N, k = self.points.shape[-2:]
        w = eye(self.points, N)
        B = stacked([-self.points.mT, w.new_ones(1, N)], -2)
        b = w.new_zeros(k + 1)
        b[k] = 1.0
        A = torch.nn.functional.pad(eye(self.points, k), (0, 0, 0, 1))
        return Conic.of(Cones(N), w.new_zeros(N, k), W=-w, A=A, B=B, b=b)

    def epigraph(self) -> Conic:
        G = torch.nn.functional.pad(self.points, (0, 1), value=-1.0)
        return Conic.of(Cones(G.shape[-2]), G)

    def _support(self, v: Tensor) -> Tensor:
        return (self.points @ v[..., None])[..., 0].amax(-1)

    def _worst(self, v: Tensor) -> Tensor:
        best = (self.points @ v[..., None])[..., 0].argmax(-1)[..., None, None]
        points = self.points.expand(*best.shape[:-2], *self.points.shape[-2:])
        return points.gather(-2, best.expand(*best.shape[:-1], self.dimension))[..., 0, :]

    def _sample(self, n: int, generator: torch.Generator | None) -> Tensor:
        shape = (n, *self.lead, self.points.shape[-2])
        u = torch.rand(shape, generator=generator, dtype=self.dtype, device=self.device)
        e = -u.clamp_min(1e-30).log()
        return ((e / e.sum(-1, keepdim=True))[..., None, :] @ self.points)[..., 0, :]

    def _scaled(self, r: Tensor) -> "Hull":
        return Hull(points=r[..., None, None] * self.points)

    def _moved(self, shift: Tensor) -> "Hull":
        return Hull(points=self.points + shift[..., None, :])

    def blocks(self, m: int) -> "Hull":
        self._block_size(m)
        return Hull(points=self.points.unflatten(-1, (m, -1)).movedim(-2, -3))


@dataclass(frozen=True, kw_only=True, eq=False)
class Polytope(UncertaintySet):
    """{z : F z <= g}; h(v) = min g'y over F'y = v, y >= 0, by the native solver.

    An unbounded one has an infinite support function in some directions: no x has a robust
    constraint there, and a program that needs one is reported as infeasible.

    Args:
        F: # (..., M, k)
        g: # (..., M)
    """

    F: Tensor
    g: Tensor
    own: ClassVar[dict[str, int]] = {"F": 2, "g": 1}

    def __post_init__(self) -> None:
        F, g = tensor("F", self.F, 2, "(..., M, k)"), tensor("g", self.g, 1, "(..., M)")
        same(self, F=F.shape[-2], g=g.shape[-1])

    @property
    def dimension(self) -> int:
        return self.F.shape[-1]

    def members(self) -> Conic:
        return Conic.of(Cones(self.g.shape[-1]), self.F, self.g)

    def _excess(self, z: Tensor) -> Tensor:
        return ((self.F @ z[..., None])[..., 0] - self.g).amax(-1)

    def _moved(self, shift: Tensor) -> "Polytope":
        return Polytope(F=self.F, g=self.g + (self.F @ shift[..., None])[..., 0])

    def require_nonempty(self) -> None:
        if bool((self.g >= 0).all()):
            return  # the origin is a member
        self._solved(self.F.new_zeros(self.dimension))
