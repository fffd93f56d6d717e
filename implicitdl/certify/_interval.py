"""Intervals that contain every state and pre-activation over a region.

A node without a loop takes one pass. A loop takes a box X with F(X) inside X for the interval
extension F of its map; then every equilibrium is in X, since the map sends X into itself (Brouwer) and
there is only one. Iterating F from a point approaches such a box from inside and is never a bound by
itself, so the box found that way is inflated by its residual t v with L |A| v <= c v,
t >= residual / (1 - c), and the inclusion is checked.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..activations import Activation, Blocks
from ..implicit import Equation, get_adjoint
from ..solvers import FixedPointSolver, get_solver
from ._loops import Loop
from ._nodes import EPS, Node
from ._points import Context, Point
from ._region import INPUT, Region, affine_slack
from ._relax import image


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

    @functools.cached_property
    def reach(self) -> Tensor:
        """max |x|."""
        return torch.maximum(self.below.abs(), self.above.abs())

    @functools.cached_property
    def largest(self) -> Tensor:
        """The largest of these.  # (m, 1)"""
        return self.reach.amax(-1, keepdim=True)


def ranges(node: Node, region: Region, spans: list[Span]) -> tuple[Tensor, Tensor]:
    """The range of z = sum_j M_j x_j + bias, rounded outward.  # (m, rows) each"""
    middle = node.row.bias
    slack = affine_slack(
        node.row, lambda j: region.largest if j == INPUT else spans[j].largest, node.fan
    )
    up = down = slack
    for k, (j, M) in enumerate(node.row.terms):
        if j == INPUT:
            low, high = region.spread(M)
            center = region.center
        else:
            x = spans[j]
            center = (x.below + x.above) / 2
            high = M.sized((x.above - x.below) / 2)
            low = -high
        middle = M.apply(center, middle) if k == 0 else middle + M.apply(center)
        down, up = down - low, up + high
    shape = (region.samples, node.row.rows)
    return (middle - down).expand(shape), (middle + up).expand(shape)


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
    positive, negative = A.clamp(min=0.0), A.clamp(max=0.0)
    double = torch.cat([torch.cat([positive, negative], 1), torch.cat([negative, positive], 1)])
    phi: Activation = _twice(equation.phi, A.shape[0])
    facts = Equation(phi, equation.contraction)
    z = torch.cat([low, high], -1)
    return get_adjoint("implicit").run(facts.map(double, z), None, get_solver(solver)).value


def _twice(phi: Activation, n: int) -> Activation:
    return phi if phi.size is None else Blocks(parts=phi.blocks(n) * 2)


def refusal(loop: Loop, what: str) -> str:
    """Why a loop has no bound, with numbers."""
    row = float(loop.size.sum(1).max()) * loop.slope
    return (
        f"method: {what} for the loop of {loop.node.name}: K = I/L - |A| is no M-matrix (||A||_inf L = "
        f"{row:.4g}) and I - L A is not strongly monotone; keep A in a set of implicitdl.wellposed, "
        "such as InfNormBall or Monotone."
    )


def interval_spans(context: Context, strict: bool) -> list[Span]:
    """Bounds of all nodes by intervals.

    Args:
        strict: refuse a loop whose box only the 2-norm gives, which is no interval argument.
    """
    spans: list[Span] = []
    for k, (node, loop) in enumerate(zip(context.graph.nodes, context.loops, strict=True)):
        low, high = ranges(node, context.region, spans)
        if loop is None:
            spans.append(Span(low, high, *image(node, low, high)))
            continue
        if strict and loop.weights is None:
            raise ValueError(
                refusal(loop, "'interval' has no bound")
                + " For a monotone model take 'crown' or 'lipschitz'."
            )  # fmt: skip
        spans.append(loop_span(loop, context.points[k], low, high, context.solver))
    return spans
