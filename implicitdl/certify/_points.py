"""What all bounds of one call share: the model, the region, and the states at its centre."""

import functools
import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..operators import rebuilt
from ..solvers import FixedPointSolver
from ._loops import Loop
from ._nodes import EPS, Graph
from ._region import INPUT, Region, affine_slack


@dataclass(frozen=True, eq=False)
class Point:
    """A node at the centre of the region, as a solver found it: no more than a reference point.

    Attributes:
        z, x: what goes into the loop or phi, and the state.  # (m, rows), (m, size)
        residual: |phi(A x + z) - x|, 0 without a loop.  # (m, size)
        euclidean: a bound of ||x' - x||_2 over the region, infinite where none is known.  # (m,)
        load: a bound of ||z' - z||_2.  # (m,)
    """

    z: Tensor
    x: Tensor
    residual: Tensor
    euclidean: Tensor
    load: Tensor


@dataclass(frozen=True, eq=False)
class Context:
    """A model over a region.

    Attributes:
        graph, loops: of the model.
        solver: of nominal states, boxes and adjoint equations.
        norms: whether 2-norms are of use; they cost a spectral norm a matrix, and are infinite else.
        tolerance: of adjoint equations.
    """

    graph: Graph
    loops: "tuple[Loop | None, ...]"
    region: Region
    solver: "str | FixedPointSolver" = "auto"
    norms: bool = False
    tolerance: float = 1e-8
    known: "list[Point] | None" = field(default=None, repr=False)

    @functools.cached_property
    def points(self) -> list[Point]:
        """The nodes at the centre, found when they are first asked for: a network may not need them."""
        return _nominal(self) if self.known is None else self.known

    @property
    def ball(self) -> bool:
        """Whether offsets over 2-norm balls are tried."""
        return self.norms and self.region.round

    @functools.cached_property
    def sketch(self) -> "Context | None":
        """The same in float32, to find slopes by; None where a loop does not contract."""
        if any(loop is not None and loop.contraction is None for loop in self.loops):
            return None
        graph = single(self.graph)
        loops = tuple(None if node.A is None else Loop(node) for node in graph.nodes)
        r = self.region
        region = Region(
            r.center.float(), r.radius.float(), r.set.to(graph.example), r.middle.float(), r.pad,
            r.samples,
        )  # fmt: skip
        return Context(graph, loops, region, self.solver, tolerance=self.tolerance)

    @property
    def residual(self) -> Tensor:
        """The largest error of a solve at the centre.  # (m,)"""
        found = self.region.center.new_zeros(self.region.samples)
        if any(loop is not None for loop in self.loops):
            for point in self.points:
                if point.residual.shape[-1]:
                    found = torch.maximum(found, point.residual.amax(-1))
        return found

    def rows(self, index: Any) -> "Context":
        """The same for some of the samples."""
        points = [
            Point(*(getattr(p, f)[index] for f in Point.__dataclass_fields__)) for p in self.points
        ]
        return replace(self, known=points, region=self.region.rows(index))

    def rougher(self, tolerance: float) -> "Context":
        """The same with adjoint equations solved less sharply."""
        return replace(self, known=self.points, tolerance=max(self.tolerance, tolerance))


def single(thing: Any) -> Any:
    """The same in float32."""
    if isinstance(thing, list):
        return [single(part) for part in thing]
    return rebuilt(thing, lambda t: t.float() if t.is_floating_point() else t)


def _nominal(context: Context) -> list[Point]:
    """The nodes at the centre, and how far they move in the 2-norm over the region."""
    graph, loops, region, norms = context.graph, context.loops, context.region, context.norms
    points: list[Point] = []
    far = region.euclidean if norms else region.center.new_full((region.samples,), math.inf)

    def value(j: int) -> Tensor:
        return region.center if j == INPUT else points[j].x

    for node, loop in zip(graph.nodes, loops, strict=True):
        m = region.samples
        z = node.row.apply(value).expand(m, node.row.rows)
        # Rounding of z moves it, too: in the 2-norm by at most the norm of the slack.
        slack = affine_slack(node.row, lambda j: value(j).abs().amax(-1, keepdim=True), node.fan)
        load = torch.linalg.vector_norm(slack, dim=-1).expand(m)
        for j, M in node.row.terms if norms else ():
            load = load + M.norm2 * (far if j == INPUT else points[j].euclidean)
        load = load * (1 + 64 * EPS) if norms else torch.full_like(load, math.inf)
        if loop is None:
            x = node.phi(z)
            L = node.natural[0].lipschitz if node.natural else node.lipschitz
            rounding = 16 * EPS * torch.linalg.vector_norm(x.abs() + 1, dim=-1)
            points.append(Point(z, x, torch.zeros_like(x), L * load + rounding, load))
            continue
        x, residual = loop.solve(z, context.solver)
        gain = loop.euclidean_gain() if norms else None
        own = torch.linalg.vector_norm(residual, dim=-1) * (1 + 64 * EPS)
        if gain is None:
            reach = torch.full_like(load, math.inf)
        else:
            reach = own + gain * (loop.norm2 * own + load)
        points.append(Point(z, x, residual, reach * (1 + 64 * EPS), load))
    return points
