"""Bounds on linear functions of states by two lines around each activation (implicit CROWN).

For any lam and w = al lam+ + be lam- with lines al s + p <= phi(s) <= be s + q on the range of s,

    lam'x >= w's + lam+'p + lam-'q,        s = A x + z,

so that with r = lam - g - A'w, zero once the fixed point lam = g + A'w is reached,

    g'x >= w'z + lam+'p + lam-'q - max over the box of r'x.

The last term makes it a bound for every lam: neither the solver nor rounding can spoil it. Nodes
are passed from the last to the first, w'z handing its coefficients to the nodes and inputs that z
reads, and the input's end in the support function of the region. Without loops this is CROWN.

Reference: Zhang et al. (2018), CROWN; Wei and Kolter (2022), bounds for equilibria; Chen et al.
(2022), CerDEQ, for an adjoint bound of this kind; Chiu and Zhang (2025), SDP-CROWN, theorem 4.1.
"""

import functools
import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..activations import Activation
from ..maps import AffineMap
from ..solvers import get_solver
from ._interval import Span
from ._loops import Loop
from ._nodes import EPS, Affine, Node
from ._points import Context
from ._region import INPUT, Region, dot
from ._relax import Lines, lines


@dataclass(frozen=True)
class TwoSlopes(Activation, register=False):
    """lam -> al lam+ + be lam-, the activation of the adjoint equation w = phi(A'w + g).

    One row of slopes for each row of lam; slopes within those of the model's phi.
    """

    al: Tensor  # (rows, n)
    be: Tensor
    slope: tuple[float, float] = (0.0, 1.0)  # type: ignore[assignment]

    homogeneous = True
    cheap_prox = True

    def __call__(self, z: Tensor) -> Tensor:
        return torch.where(z > 0, self.al, self.be) * z

    def derivative(self, z: Tensor) -> Tensor:
        return torch.where(z > 0, self.al, self.be)

    def prox(self, v: Tensor, t: "float | Tensor") -> Tensor:
        d = torch.where(v > 0, self.al, self.be)
        return v * d / (t + (1 - t) * d)

    def rows(self, index: Tensor) -> "TwoSlopes":
        return replace(self, al=self.al[index], be=self.be[index])


@dataclass(eq=False)
class Pass:
    """What one backward pass found: the bounds, and what the ascent of slopes needs."""

    value: Tensor  # (m, K)
    lam: dict[int, Tensor] = field(default_factory=dict)
    w: dict[int, Tensor] = field(default_factory=dict)
    coefficient: Tensor | None = None  # of the input  # (m, K, p)


Slopes = dict[int, Tensor]  # node -> lower slopes of its free entries  # (m, K, n)


def backward(
    context: Context,
    spans: list[Span],
    start: dict[int, Tensor],
    constant: Tensor,
    *,
    slopes: "Slopes | None" = None,
    warm: "dict[int, Tensor] | None" = None,
    steps: int | None = None,
    relaxed: "dict[int, Lines] | None" = None,
    multipliers: "dict[int, tuple[Tensor, Tensor, Tensor]] | None" = None,
    draft: bool = False,
) -> Pass:
    """A lower bound of sum_k g_k'x_k + h'u + constant over the region.

    Args:
        spans: bounds of the nodes that `start` reads, and of those before them.
        start: node, or INPUT -> coefficients.  # (m or 1, K, size)
        constant: # (m or 1, K)
        slopes: lower slopes to use in place of CROWN's choice.
        warm: w of loops to start from.
        steps: plain steps of loops that contract, in place of a solve to `tolerance`.
        relaxed: the lines, where they are known.
        multipliers: (below, above, most) >= 0 of a node's lower line, of its upper line, and of its
            steepest lower one, used as they are: lam'x with lam = below + most - above.
        draft: leave out rounding and what loops leave open: a value to steer by, and no bound.
    """
    graph, region = context.graph, context.region
    m = region.samples
    messages = {j: g.expand(m, *g.shape[1:]) for j, g in start.items()}
    total = constant.expand(m, constant.shape[-1])
    size = total.abs()
    out = Pass(total)
    for k in reversed(range(len(graph.nodes))):
        if k not in messages:
            continue
        node, loop, span = graph.nodes[k], context.loops[k], spans[k]
        g = messages.pop(k)
        line = lines_of(relaxed, k, node, span)
        al, be = line.lower_slope[:, None], line.upper_slope[:, None]
        if slopes is not None and k in slopes:
            al = slopes[k]
        given = None if multipliers is None else multipliers.get(k)
        if given is not None:
            lam = given[0] + given[2] - given[1]
        elif loop is None:
            lam = g
        else:
            before = None if warm is None else warm.get(k)
            lam = product(_adjoint(context, loop, g, al, be, before, steps), loop.A, g)
        if given is not None:
            below, above, most = given
            weight = below + above + most
            offset = dot(below, line.lower_offset) - dot(above, line.upper_offset)
            w = al * below - be * above + line.most[:, None] * most
        else:
            positive, negative = lam.clamp(min=0.0), lam.clamp(max=0.0)
            weight = positive if draft else positive - negative
            offset = dot(positive, line.lower_offset) + dot(negative, line.upper_offset)
            w = positive.mul_(al).add_(negative.mul_(be))
        if node.natural is not None:  # constants alone
            w = lam.new_zeros(*lam.shape[:-1], node.row.rows)
        if context.ball and given is None:
            better = _ball_offset(context, k, lam, w, al, be)
            if better is not None:
                offset = torch.maximum(offset, better)
        total = total + offset
        if (loop is not None or given is not None) and not draft:
            r = lam - (g if loop is None else product(w, loop.A, g))
            total = total - dot(r.clamp(min=0.0), span.above) - dot(r.clamp(max=0.0), span.below)
        out.lam[k], out.w[k] = lam, w
        total = total + w @ node.row.bias
        if not draft:
            size = size + dot(weight, _unit_error(node, loop, line, span, region, spans))
        if node.natural is None:
            hand_on(node.row, w, messages)
    if INPUT in messages:
        out.coefficient = messages[INPUT]
        total = total + region.lower(out.coefficient)
    fan = max((n.fan for n in graph.nodes), default=1)
    out.value = total if draft else total - size * ((fan + 40) * 4 * EPS)
    return out


def product(w: Tensor, A: Tensor, g: Tensor) -> Tensor:
    """g + A'w.  # (m, K, n)"""
    return torch.addmm(g.reshape(-1, g.shape[-1]), w.reshape(-1, A.shape[0]), A).view(g.shape)


def _unit_error(
    node: Node, loop: Loop | None, line: Lines, span: Span, region: Region, spans: list[Span]
) -> Tensor:
    """The size, for |lam_i| = 1, of the terms that rounding is relative to.  # (m, n)

    Every product that stands for M'w and A'w, g among them, is off by its rounding, and |w| is at
    most |lam| times the steepest slope.
    """
    terms = 3 * span.reach + torch.maximum(line.lower_offset.abs(), line.upper_offset.abs())
    if node.natural is not None:
        return terms
    inside = node.row.bias.abs()
    for j, gain in node.row.gains:
        inside = inside + gain * (region.largest if j == INPUT else spans[j].largest)
    if loop is not None:
        inside = inside + loop.rows * span.largest
    slopes = (line.lower_slope, line.upper_slope, line.least, line.most)
    steepest = functools.reduce(torch.maximum, (t.abs() for t in slopes))
    return terms + steepest * inside


def lines_of(relaxed: "dict[int, Lines] | None", k: int, node: Any, span: Span) -> Lines:
    """The lines of a node, made once."""
    if relaxed is None:
        return lines(node, span.low, span.high, span.below, span.above)
    if k not in relaxed:
        relaxed[k] = lines(node, span.low, span.high, span.below, span.above)
    return relaxed[k]


def hand_on(row: Affine, w: Tensor, messages: dict[int, Tensor]) -> None:
    """w'z = sum_j (M_j'w)'x_j + w'bias."""
    for j, M in row.terms:
        g = M.transpose(w)
        messages[j] = messages[j] + g if j in messages else g


def _adjoint(
    context: Context, loop: Loop, g: Tensor, al: Tensor, be: Tensor,
    before: Tensor | None, steps: int | None,
) -> Tensor:  # fmt: skip
    """w with w = sigma(g + A'w) as far as asked; any w serves."""
    A, g = loop.A, g.contiguous()
    if steps is not None:
        w = torch.zeros_like(g) if before is None else before
        return _plain_steps(A, g, al, be, w, steps, None)[0]
    if loop.contraction is not None and g.numel():
        # In float32 first: what it leaves open, a step or two in float64 take away.
        begin = torch.zeros_like(g) if before is None else before
        rough, done = _plain_steps(
            A.float(), g.float(), al.float(), be.float(), begin.float(), 300,
            max(context.tolerance, 1e-6),
        )  # fmt: skip
        before, fine = rough.to(g.dtype), context.tolerance < 1e-5
        if done:
            before, done = _plain_steps(
                A, g, al, be, before, 100 if fine else 2, context.tolerance if fine else None
            )
            if done:
                return before
    shape, n = g.shape, A.shape[0]
    low = min(float(al.min()), float(be.min())) if al.numel() else 0.0
    rows = g.reshape(-1, n)
    sigma = TwoSlopes(
        al.expand(shape).reshape(-1, n), be.expand(shape).reshape(-1, n),
        (min(low, 0.0), max(1.0, loop.slope)),
    )  # fmt: skip
    known = loop.monotone if loop.slope == 1 and low >= 0 else None
    f = AffineMap(A.mT, rows, sigma, None, known)
    start = None if before is None else before.reshape(-1, n).contiguous()
    return (
        get_solver(context.solver)
        .solve(f, start)
        .value.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        .reshape(shape)
    )


def _plain_steps(
    A: Tensor, g: Tensor, al: Tensor, be: Tensor, w: Tensor, most: int, tolerance: float | None
) -> tuple[Tensor, bool]:
    """w <- sigma(g + A'w), and whether the last change was below the tolerance."""
    scale = None if tolerance is None else tolerance * float(g.abs().amax()) + 1e-300
    lean = al - be  # sigma(lam) = be lam + (al - be) lam+, in two passes
    for k in range(most):
        lam = product(w, A, g)
        positive = lam.clamp(min=0.0)
        new = lam.mul_(be).addcmul_(positive, lean)
        if scale is not None and k % 3 == 2 and bool((new - w).abs_().amax() <= scale):
            return new, True
        w = new
    return w, tolerance is None


def _ball_offset(
    context: Context, k: int, lam: Tensor, w: Tensor, al: Tensor, be: Tensor
) -> Tensor | None:
    """-(t (rho^2 - |s^|^2) + sum phi_i^2 / t) / 2, phi = min(lam - w - t s^, w + t s^, 0), best t.

    It holds for all s with ||s - s^||_2 <= rho together, where the lines hold entry by entry; for
    ReLU (Chiu and Zhang 2025, theorem 4.1, with c = lam and g = w).
    """
    node, point, loop = context.graph.nodes[k], context.points[k], context.loops[k]
    if node.natural is not None or not all(is_relu(phi) for phi, _ in node.parts):
        return None
    s, rho = point.z, point.load
    if loop is not None:
        s = s + point.x @ loop.A.mT
        rounding = 2 * (node.fan + 8) * EPS * (point.x.abs() @ loop.size.mT + point.z.abs())
        rho = rho + loop.norm2 * point.euclidean + torch.linalg.vector_norm(rounding, dim=-1)
    if not bool(torch.isfinite(rho).all()):
        return None
    rho, s = rho[:, None] * (1 + 64 * EPS), s[:, None]
    inner = rho.square() - s.square().sum(-1)
    # At t = |lam| / rho both terms are of one size.
    scale = torch.linalg.vector_norm(lam, dim=-1) / rho.clamp(min=1e-12) + 1e-300
    best = torch.full_like(scale, -math.inf)
    for power in range(-8, 7):
        t = scale * 2.0 ** (power / 2)
        ts = t[..., None] * s
        phi = torch.minimum(lam - w - ts, w + ts).clamp(max=0.0)
        square = phi.square().sum(-1) / t
        value = -(t * inner + square) / 2
        slack = 1e-13 * (t * (rho.square() + s.square().sum(-1)) + square)
        best = torch.maximum(best, value - slack)
    return best


def is_relu(phi: Activation) -> bool:
    """Whether phi is max(z, 0), by the facts that it declares."""
    return phi.homogeneous and phi.entrywise and phi.slope == (0.0, 1.0) and phi.range[0] == 0.0
