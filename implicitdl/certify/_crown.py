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

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..activations import Activation
from ..maps import AffineMap, Scaled
from ..solvers import FixedPointSolver, Picard, get_solver
from ._graph import EPS, Affine, Graph, Linear
from ._interval import Point, Span
from ._loops import Loop
from ._region import INPUT, Region
from ._relax import Lines, image, lines

ROWS = 1 << 19  # numbers of one message, (samples, rows, states), that are held at a time


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


@dataclass(frozen=True, eq=False)
class Context:
    """What all backward passes share."""

    graph: Graph
    loops: "list[Loop | None]"
    points: list[Point]
    region: Region
    solver: "FixedPointSolver | str"
    tolerance: float = 1e-8
    ball: bool = False  # whether 2-norm offsets are tried

    def rows(self, index: Any) -> "Context":
        """The same for some of the samples."""
        points = [
            Point(*(getattr(p, f)[index] for f in Point.__dataclass_fields__)) for p in self.points
        ]
        return replace(self, points=points, region=self.region.rows(index))


@dataclass(eq=False)
class Pass:
    """What one backward pass found: the bounds, and what the ascent of slopes needs."""

    value: Tensor  # (m, K)
    lam: dict[int, Tensor] = field(default_factory=dict)
    w: dict[int, Tensor] = field(default_factory=dict)
    coefficient: Tensor | None = None  # of the input  # (m, K, p)
    residual: float = 0.0


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
) -> Pass:
    """A lower bound of sum_k g_k'x_k + h'u + constant over the region.

    Args:
        spans: bounds of the nodes that `start` reads, and of those before them.
        start: node, or INPUT -> coefficients.  # (m or 1, K, size)
        constant: # (m or 1, K)
        slopes: lower slopes to use in place of CROWN's choice.
        warm: w of loops to start from.
        steps: plain steps of a loop, in place of a solve to `tolerance`.
        relaxed: the lines, where they are known.
        multipliers: (below, above, most) >= 0 of a node's lower line, of its upper line, and of its
            steepest lower one, used as they are: lam'x with lam = below + most - above.
    """
    graph, region = context.graph, context.region
    m = region.samples
    messages = {j: g.expand(m, *g.shape[1:]) for j, g in start.items()}
    total = constant.expand(m, constant.shape[-1]).clone()
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
            al = torch.where(line.free[:, None], slopes[k], al)
        given = None if multipliers is None else multipliers.get(k)
        if given is not None:
            lam = given[0] + given[2] - given[1]
        elif loop is None:
            lam = g
        else:
            before = None if warm is None else warm.get(k)
            w = _adjoint(context, loop, g, al, be, before, steps)
            lam = g + w @ loop.A
        positive, negative = lam.clamp(min=0.0), lam.clamp(max=0.0)
        p, q = line.lower_offset[:, None], line.upper_offset[:, None]
        offset = (positive * p).sum(-1) + (negative * q).sum(-1)
        size = size + (lam.abs() * torch.maximum(p.abs(), q.abs())).sum(-1)
        if node.natural is not None:  # constants alone
            w = lam.new_zeros(*lam.shape[:-1], node.row.rows)
        else:
            w = al * positive + be * negative
        if given is not None:
            below, above, most = given
            offset = (below * p).sum(-1) - (above * q).sum(-1)
            w = (
                w * 0
                if node.natural is not None
                else al * below - be * above + line.most[:, None] * most
            )
            size = size + ((below + above) * torch.maximum(p.abs(), q.abs())).sum(-1)
            size = size + ((below + above + most) * span.reach[:, None]).sum(-1)
        if context.ball and given is None:
            better = _ball_offset(context, k, lam, w, al, be)
            if better is not None:
                offset = torch.maximum(offset, better)
        total = total + offset
        reach = span.reach[:, None]
        if loop is not None or given is not None:
            r = lam - g if loop is None else lam - g - w @ loop.A
            lost = torch.where(r > 0, r * span.above[:, None], r * span.below[:, None]).sum(-1)
            total = total - lost
            out.residual = max(out.residual, float(r.abs().amax()) if r.numel() else 0.0)
        out.lam[k], out.w[k] = lam, w
        total = total + (w * node.row.bias).sum(-1)
        # Every product that stands for M'w and A'w, g among them, is off by its rounding.
        inside = _reach(node.row, region, spans)
        if loop is not None:
            inside = inside + span.reach @ loop.size.mT
        size = size + (w.abs() * inside[:, None]).sum(-1) + 3 * (lam.abs() * reach).sum(-1)
        if node.natural is None:
            hand_on(node.row, w, messages)
    fan = max((n.fan for n in graph.nodes), default=1)
    size = size * (fan + 40) * 4 * EPS
    if INPUT in messages:
        h = messages[INPUT]
        out.coefficient = h
        total = total + (h @ region.center[..., None])[..., 0] - region.support(-h)
        size = size + (graph.inputs + 8) * 4 * EPS * (h.abs() @ region.reach[..., None])[..., 0]
    out.value = total - size
    return out


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


def _reach(row: Affine, region: Region, spans: list[Span]) -> Tensor:
    """|bias| + sum_j |M_j| max |x_j|.  # (m, rows)"""
    size = row.bias.abs()
    for j, M in row.terms:
        size = size + M.sized(region.reach if j == INPUT else spans[j].reach)
    return size.expand(region.samples, row.rows)


def _adjoint(
    context: Context, loop: Loop, g: Tensor, al: Tensor, be: Tensor,
    before: Tensor | None, steps: int | None,
) -> Tensor:  # fmt: skip
    """w with w = sigma(g + A'w) as far as asked; any w serves."""
    A = loop.A
    low = min(float(al.min()), float(be.min())) if al.numel() else 0.0
    n, contracts = A.shape[0], loop.contraction is not None
    if contracts and steps is not None:
        w = torch.zeros_like(g) if before is None else before
        return _plain_steps(A, g, al, be, w, steps, None)[0]
    if contracts and g.numel():
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
    shape = g.shape
    rows = g.reshape(-1, n)
    sigma = TwoSlopes(
        al.expand(shape).reshape(-1, n), be.expand(shape).reshape(-1, n),
        (min(low, 0.0), max(1.0, loop.slope)),
    )  # fmt: skip
    known = loop.monotone if loop.slope == 1 and low >= 0 else None
    f = AffineMap(A.mT, rows, sigma, None, known)
    start = None if before is None else before.reshape(-1, n).contiguous()
    chosen = get_solver(context.solver) if steps is None else Picard(max_steps=max(steps, 1))
    return chosen.solve(f, start).value.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).reshape(shape)


def _plain_steps(
    A: Tensor, g: Tensor, al: Tensor, be: Tensor, w: Tensor, most: int, tolerance: float | None
) -> tuple[Tensor, bool]:
    """w <- sigma(g + A'w), and whether the last change was below the tolerance."""
    scale = None if tolerance is None else tolerance * float(g.abs().amax()) + 1e-300
    for k in range(most):
        lam = torch.matmul(w, A).add_(g)
        new = torch.where(lam > 0, al, be).mul_(lam)
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
    if node.natural is not None or not all(_is_relu(phi) for phi, _ in node.parts):
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


def _is_relu(phi: Activation) -> bool:
    """Whether phi is max(z, 0), by the facts that it declares."""
    return phi.homogeneous and phi.entrywise and phi.slope == (0.0, 1.0) and phi.range[0] == 0.0


# ---- refinement ------------------------------------------------------------------------------------


def rows_of(
    row: Affine, A: Tensor | None, index: Tensor, k: int
) -> tuple[dict[int, Tensor], Tensor]:
    """s_i for the entries i of index, other ones for each sample, as functions of nodes and input.

    Args:
        index: # (m, c)

    Returns:
        coefficients, (m, c, size) each, and constants.  # (m, c)
    """
    unit = row.bias.new_zeros(*index.shape, row.rows).scatter_(-1, index[..., None], 1.0)
    messages: dict[int, Tensor] = {}
    for j, M in row.terms:
        g = M.matrix[index] if M.matrix is not None else M.transpose(unit)
        messages[j] = messages[j] + g if j in messages else g
    if A is not None:
        messages[k] = A[index]
    return messages, row.bias[index]


def refine(context: Context, spans: list[Span], k: int, steps: int = 0) -> Span:
    """The span of node k, its pre-activations bounded again by lines.

    Only entries whose sign is open are bounded, where phi is piecewise linear in one kink at 0
    (homogeneous); all of them otherwise.
    """
    node, loop, span = context.graph.nodes[k], context.loops[k], spans[k]
    if node.entrywise and all(phi.homogeneous for phi, _ in node.parts):
        open_ = (span.low < 0) & (span.high > 0)
    else:
        open_ = span.high > span.low
    count = int(open_.sum(1).max()) if open_.numel() else 0
    if not count:
        return span
    # The open entries of each sample first; what fills up the rows is bounded, too.
    order = torch.argsort(open_.to(torch.int8), dim=1, descending=True, stable=True)[:, :count]
    low, high = span.low.clone(), span.high.clone()
    m = context.region.samples
    widest = max(n.row.rows for n in context.graph.nodes) + context.graph.inputs
    chunk = max(1, ROWS // max(1, 2 * m * widest))
    relaxed: dict[int, Lines] = {}
    rough = replace(context, tolerance=max(context.tolerance, 1e-5))
    for part in order.split(chunk, 1):
        start, constant = rows_of(node.row, None if loop is None else loop.A, part, k)
        both = {j: torch.cat([g, -g], 1) for j, g in start.items()}
        sides = torch.cat([constant, -constant], 1)
        if steps:
            found = optimise(context, spans, both, sides, steps, relaxed=relaxed)
        else:
            found = backward(rough, spans, both, sides, relaxed=relaxed).value
        a, b = found[:, : part.shape[1]], -found[:, part.shape[1] :]
        low.scatter_(1, part, torch.maximum(low.gather(1, part), a))
        high.scatter_(1, part, torch.minimum(high.gather(1, part), b))
    high = torch.maximum(low, high)
    below, above = image(node, low, high)
    below = torch.maximum(below, span.below)
    return Span(low, high, below, torch.maximum(below, torch.minimum(above, span.above)))


# ---- the best slopes -------------------------------------------------------------------------------


def optimise(
    context: Context,
    spans: list[Span],
    start: dict[int, Tensor],
    constant: Tensor,
    steps: int,
    *,
    relaxed: "dict[int, Lines] | None" = None,
) -> Tensor:
    """The largest bound over lower slopes, by gradient ascent; each value seen is a bound.

    At its optimum the bound is the LP's (Salman et al. 2019). The derivative with respect to al_i
    is lam_i+ s^_i, s^ the point at which the lines in use are tight: one forward pass, x^ = D (A x^
    + z^) + d, so no graph is recorded (envelope theorem: u^ is the worst input).
    """
    relaxed = {} if relaxed is None else relaxed
    found = backward(context, spans, start, constant, relaxed=relaxed)
    best = found.value
    nodes = context.graph.nodes
    free = {k: relaxed[k].free for k in found.lam if bool(relaxed[k].free.any())}
    if not free:
        return best
    slopes = {k: relaxed[k].lower_slope[:, None].expand(found.lam[k].shape).clone() for k in free}
    mean = {k: torch.zeros_like(a) for k, a in slopes.items()}
    square = {k: torch.zeros_like(a) for k, a in slopes.items()}
    warm: dict[int, Tensor] = dict(found.w)
    points: dict[int, Tensor] = {}
    rough = (
        4 if all(loop is None or loop.contraction is not None for loop in context.loops) else None
    )
    for step in range(steps):
        gradient = _gradient(context, found, slopes, relaxed, points)
        rate = 0.4 * (1 - step / steps) ** 1.5 * 0.1 ** (step / steps) + 1e-4
        for k, g in gradient.items():
            mean[k].mul_(0.7).add_(g, alpha=0.3)
            square[k].mul_(0.99).addcmul_(g, g, value=0.01)
            seen = 1 - 0.99 ** (step + 1)
            move = mean[k] / (1 - 0.7 ** (step + 1)) / ((square[k] / seen).sqrt() + 1e-12)
            least, most = relaxed[k].least[:, None], relaxed[k].most[:, None]
            slopes[k] = (slopes[k] + rate * move).clamp(least, most)
        last = step == steps - 1
        found = backward(
            context, spans, start, constant, slopes=slopes, warm=warm,
            steps=None if last else rough, relaxed=relaxed,
        )  # fmt: skip
        warm = {k: found.w[k] for k in found.w if nodes[k].A is not None}
        best = torch.maximum(best, found.value)
    return best


def _gradient(
    context: Context, found: Pass, slopes: Slopes, relaxed: dict[int, Lines],
    points: dict[int, Tensor],
) -> dict[int, Tensor]:  # fmt: skip
    """d value / d al, node by node, from the point at which the bound is attained."""
    graph, region = context.graph, context.region
    h = found.coefficient
    u = region.center[:, None] if h is None else region.worst(-h)
    gradient: dict[int, Tensor] = {}
    values: dict[int, Tensor] = {INPUT: u}

    def apply(M: Linear, x: Tensor) -> Tensor:
        return M.apply(x)

    for k in sorted(found.lam):
        node, loop, line = graph.nodes[k], context.loops[k], relaxed[k]
        lam = found.lam[k]
        if node.natural is not None:
            values[k] = torch.where(lam > 0, line.lower_offset[:, None], line.upper_offset[:, None])
            continue
        z = node.row.bias
        for j, M in node.row.terms:
            if j in values:
                z = z + apply(M, values[j])
        al = line.lower_slope[:, None]
        if k in slopes:
            al = torch.where(line.free[:, None], slopes[k], al)
        d = torch.where(lam > 0, al, line.upper_slope[:, None])
        e = torch.where(lam > 0, line.lower_offset[:, None], line.upper_offset[:, None])
        if loop is None:
            s = z
            values[k] = d * s + e
        else:
            x = _forward_loop(context, loop, z, d, e, points.get(k))
            points[k] = x
            s = z + x @ loop.A.mT
            values[k] = d * s + e
        if k in slopes:
            gradient[k] = lam.clamp(min=0.0) * s * line.free[:, None]
    return gradient


def _forward_loop(
    context: Context, loop: Loop, z: Tensor, d: Tensor, e: Tensor, before: Tensor | None
) -> Tensor:
    """x = d (A x + z) + e, roughly: a direction of ascent need not be exact."""
    shape = torch.broadcast_shapes(z.shape, d.shape)
    if loop.contraction is not None:
        x = z.new_zeros(shape) if before is None else before
        for _ in range(60 if before is None else 5):
            x = torch.matmul(x, loop.A.mT).add_(z).mul_(d).add_(e)
        return x
    n = shape[-1]
    # y = x - e solves y = d (A y + z + A e).
    rows = (z + e @ loop.A.mT).expand(shape).reshape(-1, n)
    phi = Scaled(phi=loop.equation().phi, d=d.expand(shape).reshape(-1, n))
    f = AffineMap(loop.A, rows, phi, None, loop.monotone if loop.slope == 1 else None)
    y = get_solver(context.solver).solve(f, None).value.nan_to_num(nan=0.0)
    return y.reshape(shape) + e
