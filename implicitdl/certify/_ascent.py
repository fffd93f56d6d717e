"""The best slopes of lower lines, by ascent on the bound that they give."""

import torch
from torch import Tensor

from ..maps import AffineMap, Scaled
from ..solvers import get_solver
from ._crown import Pass, Slopes, backward
from ._interval import Span
from ._loops import Loop
from ._points import Context, single
from ._region import INPUT
from ._relax import Lines

STEPS = 4  # plain steps of a loop's adjoint equation for each step of ascent


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
    free = [k for k in found.lam if bool(relaxed[k].free.any())]
    if not free or not steps:
        return best
    sketch = context.sketch
    exact = sketch is None  # loops that do not contract are solved at each step
    few: Problem = (context, spans, start, constant, relaxed, found)
    near = few if sketch is None else (sketch, *map(single, few[1:]))
    slopes, warm = _climb(near, free, steps, exact)
    for k, a in slopes.items():
        line = relaxed[k]  # between its ends in float64, too
        ends = (
            torch.where(line.free, t, line.lower_slope)[:, None] for t in (line.least, line.most)
        )
        slopes[k] = a.to(best).clamp(*ends)
    warm = {k: w.to(best) for k, w in warm.items()}
    last = backward(context, spans, start, constant, slopes=slopes, warm=warm, relaxed=relaxed)
    return torch.maximum(best, last.value)


Problem = tuple[
    Context, list[Span], dict[int, Tensor], Tensor, dict[int, Lines], Pass
]  # what `backward` takes, and what it found at CROWN's slopes


def _climb(
    problem: Problem, free: list[int], steps: int, exact: bool
) -> tuple[Slopes, dict[int, Tensor]]:
    """Slopes after some steps of Adam at a rate that falls to 1e-4, and the w of loops there.

    The last slopes, not those with the largest value seen: values on the way leave out what loops
    leave open, and flatter slopes that were far from the last.
    """
    context, spans, start, constant, relaxed, found = problem
    nodes = context.graph.nodes
    shape = {k: found.lam[k].shape for k in free}
    slopes = {k: relaxed[k].lower_slope[:, None].expand(shape[k]).clone() for k in free}
    ends = {
        k: tuple(
            torch.where(relaxed[k].free, t, relaxed[k].lower_slope)[:, None]
            for t in (relaxed[k].least, relaxed[k].most)
        )
        for k in free
    }
    mean = {k: torch.zeros_like(a) for k, a in slopes.items()}
    square = {k: torch.zeros_like(a) for k, a in slopes.items()}
    warm = {k: w for k, w in found.w.items() if nodes[k].A is not None}
    points: dict[int, Tensor] = {}
    for step in range(steps):
        gradient = _gradient(context, found, slopes, relaxed, points, exact)
        rate = 0.4 * (1 - step / steps) ** 1.5 * 0.1 ** (step / steps) + 1e-4
        moved = {}
        for k, g in gradient.items():
            mean[k].mul_(0.7).add_(g, alpha=0.3)
            square[k].mul_(0.99).addcmul_(g, g, value=0.01)
            scale = rate / (1 - 0.7 ** (step + 1)) * (1 - 0.99 ** (step + 1)) ** 0.5
            move = mean[k] / square[k].sqrt().add_(1e-12)
            moved[k] = move.mul_(scale).add_(slopes[k]).clamp_(*ends[k])
        slopes = moved
        found = backward(
            context, spans, start, constant, slopes=slopes, warm=warm,
            steps=None if exact else STEPS, relaxed=relaxed, draft=True,
        )  # fmt: skip
        warm = {k: found.w[k] for k in warm}
    return slopes, warm


def _gradient(
    context: Context, found: Pass, slopes: Slopes, relaxed: dict[int, Lines],
    points: dict[int, Tensor], exact: bool,
) -> dict[int, Tensor]:  # fmt: skip
    """d value / d al, node by node, from the point at which the bound is attained."""
    graph, region = context.graph, context.region
    h = found.coefficient
    u = region.center[:, None] if h is None else region.worst(-h).to(h)
    gradient: dict[int, Tensor] = {}
    values: dict[int, Tensor] = {INPUT: u}

    for k in sorted(found.lam):
        node, loop, line = graph.nodes[k], context.loops[k], relaxed[k]
        lam = found.lam[k]
        if node.natural is not None:
            values[k] = torch.where(lam > 0, line.lower_offset[:, None], line.upper_offset[:, None])
            continue
        z = node.row.bias
        for j, M in node.row.terms:
            if j in values:
                z = z + M.apply(values[j])
        al = slopes.get(k, line.lower_slope[:, None])
        d = torch.where(lam > 0, al, line.upper_slope[:, None])
        e = torch.where(lam > 0, line.lower_offset[:, None], line.upper_offset[:, None])
        if loop is None:
            s = z
            values[k] = d * s + e
        else:
            x = _forward_loop(context, loop, z, d, e, points.get(k), exact)
            points[k] = x
            s = z + x @ loop.A.mT
            values[k] = d * s + e
        if k in slopes:
            gradient[k] = lam.clamp(min=0.0) * s * line.free[:, None]
    return gradient


def _forward_loop(
    context: Context,
    loop: Loop,
    z: Tensor,
    d: Tensor,
    e: Tensor,
    before: Tensor | None,
    exact: bool,
) -> Tensor:
    """x = d (A x + z) + e, roughly: a direction of ascent need not be exact."""
    shape = torch.broadcast_shapes(z.shape, d.shape)
    if not exact:
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
