"""Intervals that contain every state and pre-activation over a region.

A node without a loop takes one pass. A loop takes a box X with F(X) inside X for the interval
extension F of its map; then every equilibrium is in X, since the map sends X into itself (Brouwer) and
there is only one. Iterating F from a point approaches such a box from inside and is never a bound by
itself, so the box found that way is inflated by its residual t v with L |A| v <= c v,
t >= residual / (1 - c), and the inclusion is checked.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..activations import Activation
from ..implicit import Equation
from ..solvers import FixedPointSolver, get_solver
from ._graph import EPS, Graph, Linear, Node
from ._loops import Loop
from ._region import INPUT, Region, affine_slack
from ._relax import image


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
class Span:
    """Bounds of a node.

    Attributes:
        low, high: of s = z + A x, what phi is applied to.  # (m, rows)
        below, above: of x.  # (m, size)
    """

    low: Tensor
    high: Tensor
    below: Tensor
    above: Tensor

    @property
    def reach(self) -> Tensor:
        """max |x|."""
        return torch.maximum(self.below.abs(), self.above.abs())


def norm2(M: Linear) -> float:
    """||M||_2, from above."""
    matrix = M.dense()
    if matrix is None or matrix.numel() > 1 << 22:
        return math.sqrt(M.op.norm(1) * M.op.norm(math.inf)) * (1 + 8 * EPS)
    if not matrix.numel():
        return 0.0
    value = float(torch.linalg.matrix_norm(matrix.double(), 2))
    return value * (1 + 8 * max(matrix.shape) * EPS)


def nominal(
    graph: Graph,
    loops: "list[Loop | None]",
    region: Region,
    solver: "str | FixedPointSolver",
    norms: bool = True,
) -> list[Point]:
    """The nodes at the centre, and how far they move in the 2-norm over the region.

    Args:
        norms: whether the latter is wanted; it costs a spectral norm a matrix, and is infinite else.
    """
    points: list[Point] = []
    far = region.euclidean

    def value(j: int) -> Tensor:
        return region.center if j == INPUT else points[j].x

    for node, loop in zip(graph.nodes, loops, strict=True):
        m = region.samples
        z = node.row.apply(value).expand(m, node.row.rows)
        # Rounding of z moves it, too: in the 2-norm by at most the norm of the slack.
        slack = affine_slack(node.row, lambda j: value(j).abs(), node.fan)
        load = torch.linalg.vector_norm(slack, dim=-1).expand(m)
        for j, M in node.row.terms if norms else ():
            load = load + norm2(M) * (far if j == INPUT else points[j].euclidean)
        load = load * (1 + 64 * EPS) if norms else torch.full_like(load, math.inf)
        if loop is None:
            x = node.phi(z)
            L = node.natural[0].lipschitz if node.natural else node.lipschitz
            rounding = 16 * EPS * torch.linalg.vector_norm(x.abs() + 1, dim=-1)
            points.append(Point(z, x, torch.zeros_like(x), L * load + rounding, load))
            continue
        x, residual = loop.solve(z, solver)
        gain = loop.euclidean_gain() if norms else None
        own = torch.linalg.vector_norm(residual, dim=-1) * (1 + 64 * EPS)
        if gain is None:
            reach = torch.full_like(load, math.inf)
        else:
            reach = own + gain * (loop.norm2 * own + load)
        points.append(Point(z, x, residual, reach * (1 + 64 * EPS), load))
    return points


def ranges(node: Node, region: Region, spans: list[Span]) -> tuple[Tensor, Tensor]:
    """The range of z = sum_j M_j x_j + bias, rounded outward.  # (m, rows) each"""
    middle = node.row.bias
    up = down = torch.zeros(region.samples, node.row.rows, dtype=middle.dtype, device=middle.device)
    for j, M in node.row.terms:
        if j == INPUT:
            middle = middle + M.apply(region.center)
            low, high = region.spread(M)
            down, up = down - low, up + high
        else:
            x = spans[j]
            center, half = (x.below + x.above) / 2, (x.above - x.below) / 2
            middle = middle + M.apply(center)
            wide = M.sized(half)
            down, up = down + wide, up + wide

    def reach(j: int) -> Tensor:
        return region.reach if j == INPUT else spans[j].reach

    slack = affine_slack(node.row, reach, node.fan)
    return middle - down - slack, middle + up + slack


def through(
    loop: Loop, low: Tensor, high: Tensor, below: Tensor, above: Tensor
) -> tuple[Tensor, Tensor]:
    """The range of s = z + A x, rounded outward."""
    center, half = (below + above) / 2, (above - below) / 2
    middle, wide = center @ loop.A.mT, half @ loop.size.mT
    reach = torch.maximum(below.abs(), above.abs()) @ loop.size.mT
    slack = (loop.node.fan + 8) * EPS * (reach + torch.maximum(low.abs(), high.abs()))
    return low + middle - wide - slack, high + middle + wide + slack


def outer_box(loop: Loop, point: Point, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor] | None:
    """A box of x from |x - x^| <= rho + K^-1 (|A| rho + |z - z^|) or its 2-norm version, the
    intersection of what applies; None where nothing does."""
    boxes = []
    if loop.weights is not None:
        move = torch.maximum(high - point.z, point.z - low).clamp(min=0.0)
        load = (move + point.residual @ loop.size.mT) * (1 + (loop.node.fan + 8) * EPS)
        if not loop.node.entrywise:
            load = load.amax(-1, keepdim=True).expand_as(load)
        boxes.append(point.residual + loop.moved(load))
    gain = loop.euclidean_gain()
    if gain is not None:
        move = torch.maximum(high - point.z, point.z - low).clamp(min=0.0)
        box = torch.linalg.vector_norm(move, dim=-1) * (1 + 64 * EPS)
        own = torch.linalg.vector_norm(point.residual, dim=-1) * (1 + 64 * EPS)
        load = torch.minimum(box, point.load)
        reach = (own + gain * (loop.norm2 * own + load)) * (1 + 64 * EPS)
        boxes.append(reach[:, None].expand_as(point.x))
    if not boxes:
        return None
    half = boxes[0] if len(boxes) == 1 else torch.minimum(*boxes)
    slack = 4 * EPS * (half + point.x.abs())
    return point.x - half - slack, point.x + half + slack


def loop_span(
    loop: Loop,
    point: Point,
    low: Tensor,
    high: Tensor,
    solver: "str | FixedPointSolver",
    steps: int = 50,
) -> Span:
    """A box of the loop, the smallest that its map sends into itself where that is found."""  # fmt: skip
    box = outer_box(loop, point, low, high)
    if box is None:
        raise ValueError(refusal(loop, "no bound"))
    below, above = box
    found = invariant_box(loop, low, high, solver)
    if found is not None:
        below, above = torch.maximum(below, found[0]), torch.minimum(above, found[1])
        steps = 2
    width = (above - below).sum()
    for _ in range(steps):
        s = through(loop, low, high, below, above)
        a, b = image(loop.node, *s)
        below, above = torch.maximum(below, a), torch.minimum(above, b)
        new = (above - below).sum()
        if new > width * (1 - 1e-4):
            break
        width = new
    s = through(loop, low, high, below, above)
    return Span(*s, below, above)


def invariant_box(
    loop: Loop, low: Tensor, high: Tensor, solver: "str | FixedPointSolver"
) -> tuple[Tensor, Tensor] | None:
    """X with F(X) inside X; +-inf for a sample whose box fails the check.

    For increasing phi, (l, h) -> (phi(A+ l - A- h + low), phi(A+ h - A- l + high)), the interval
    extension, is in (l, h) itself an implicit model of 2 n states, and any solver finds its
    equilibrium; its error is part of the inflation.
    """
    c = loop.contraction
    if c is None or not loop.node.increasing:
        return None
    n = loop.A.shape[0]
    x = doubled_equilibrium(loop.A, low, high, loop.equation(), solver)
    below, above = x[:, :n], x[:, n:]
    below, above = torch.minimum(below, above), torch.maximum(below, above)
    a, b = image(loop.node, *through(loop, low, high, below, above))
    beyond = torch.maximum(below - a, b - above).clamp(min=0.0) / loop.weights
    t = beyond.amax(-1, keepdim=True) / (1 - c) * (1 + 1e-6) + 1e-13 * above.abs().amax(
        -1, keepdim=True
    )
    below, above = below - t * loop.weights, above + t * loop.weights
    a, b = image(loop.node, *through(loop, low, high, below, above))
    good = ((a >= below) & (b <= above)).all(-1, keepdim=True)
    return (
        torch.where(good, torch.maximum(a, below), -math.inf),
        torch.where(good, torch.minimum(b, above), math.inf),
    )


def doubled_equilibrium(
    A: Tensor, low: Tensor, high: Tensor, equation: Equation, solver: "str | FixedPointSolver"
) -> Tensor:
    """(l, h) of the interval map, differentiable in A, low and high.  # (m, 2 n)"""
    from ..implicit import get_adjoint

    positive, negative = A.clamp(min=0.0), A.clamp(max=0.0)
    double = torch.cat([torch.cat([positive, negative], 1), torch.cat([negative, positive], 1)])
    phi: Activation = _twice(equation.phi, A.shape[0])
    facts = Equation(phi, equation.contraction)
    z = torch.cat([low, high], -1)
    return get_adjoint("implicit").run(facts.map(double, z), None, get_solver(solver)).value


def _twice(phi: Activation, n: int) -> Activation:
    from ..activations import Blocks

    return phi if phi.size is None else Blocks(parts=phi.blocks(n) * 2)


def refusal(loop: Loop, what: str) -> str:
    """Why a loop has no bound, with numbers."""
    row = float(loop.size.sum(1).max()) * loop.slope
    return (
        f"{what} for the loop of {loop.node.name}: K = I/L - |A| is no M-matrix (||A||_inf L = "
        f"{row:.4g}) and I - L A is not strongly monotone; keep A in a set of implicitdl.wellposed, "
        "such as InfNormBall or Monotone."
    )


def interval_spans(
    graph: Graph,
    loops: "list[Loop | None]",
    points: list[Point],
    region: Region,
    solver: "str | FixedPointSolver",
    strict: bool,
) -> list[Span]:
    """Bounds of all nodes by intervals.

    Args:
        strict: refuse a loop whose box only the 2-norm gives, which is no interval argument.
    """  # fmt: skip
    spans: list[Span] = []
    for node, loop, point in zip(graph.nodes, loops, points, strict=True):
        low, high = ranges(node, region, spans)
        if loop is None:
            spans.append(Span(low, high, *image(node, low, high)))
            continue
        if strict and loop.weights is None:
            raise ValueError(
                "method: " + refusal(loop, "'interval' has no bound")
                + " For a monotone model take 'crown' or 'lipschitz'."
            )  # fmt: skip
        spans.append(loop_span(loop, point, low, high, solver))
    return spans
