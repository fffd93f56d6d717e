"""Ranges of pre-activations bounded again by lines, and the bounds of what was asked for."""

import torch
from torch import Tensor

from ._ascent import optimise
from ._crown import backward
from ._interval import Span, loop_span, ranges
from ._nodes import Affine
from ._norms import Query
from ._points import Context
from ._relax import Lines, image

ROWS = 1 << 19  # numbers of one message, (samples, rows, states), that are held at a time


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
    rough = context.rougher(1e-5)
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


def refined_spans(context: Context, refinements: int, steps: int = 0) -> list[Span]:
    """The nodes' ranges by intervals, then bounded by lines `refinements` times, in order."""
    graph, region = context.graph, context.region
    spans: list[Span] = []
    for k, (node, loop) in enumerate(zip(graph.nodes, context.loops, strict=True)):
        low, high = ranges(node, region, spans)
        if loop is None:
            if context.norms:
                # With the 2-norm, every pre-activation is within `load` of the reference.
                point = context.points[k]
                load = point.load[:, None] * (1 + 1e-12) + 1e-15 * point.z.abs()
                low, high = torch.maximum(low, point.z - load), torch.minimum(high, point.z + load)
                high = torch.maximum(low, high)
            spans.append(Span(low, high, *image(node, low, high)))
            first = any(j >= 0 for j, _ in node.row.terms)
        else:
            spans.append(loop_span(loop, context.points[k], low, high, context.solver))
            first = True
        for _ in range(refinements if first else 0):
            spans[k] = refine(context, spans, k, steps)
            if loop is None:
                break  # a node that does not read itself is as tight as it gets
    return spans


def crown_lower(context: Context, spans: list[Span], query: Query, steps: int) -> Tensor:
    """The bound of the rows asked for, by CROWN's slopes, or the best found in `steps`."""
    size = query.constant.shape[-1]
    widest = max([n.row.rows for n in context.graph.nodes] + [context.graph.inputs])
    chunk = max(1, ROWS // max(1, context.region.samples * widest))
    found = []
    for index in torch.arange(size).split(chunk):
        at = index.tolist()
        start = {j: g[:, at] for j, g in query.start.items()}
        constant = query.constant[..., at]
        if steps:
            found.append(optimise(context, spans, start, constant, steps))
        else:
            found.append(backward(context, spans, start, constant).value)
    low = torch.cat(found, -1)
    return low - query.slack(context.region, [s.reach for s in spans])
