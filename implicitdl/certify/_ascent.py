"""The best slopes of lower lines, by ascent on the bound that they give."""

import torch
from torch import Tensor

from ..maps import AffineMap, Scaled
from ..solvers import get_solver
from ._crown import Pass, Slopes, backward
from ._interval import Span
from ._loops import Loop
from ._nodes import Linear
from ._points import Context
from ._region import INPUT
from ._relax import Lines


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
