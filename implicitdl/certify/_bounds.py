"""Bounds on what a model may answer over a region of inputs."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..robust import UncertaintySet
from ..solution import unknown_name
from ..solvers import FixedPointSolver
from ._crown import Context, backward, optimise, refine
from ._graph import Graph, graph_of
from ._interval import Point, Span, interval_spans, nominal, outer_box, ranges
from ._loops import Loop
from ._norms import Query, block_lower, lipschitz_lower, sensitivity_spans
from ._programs import lp_lower, sdp_lower
from ._region import Region
from ._relax import image

METHODS = ("best", "crown", "interval", "lipschitz", "lp", "sdp", "sensitivity")
MARGIN = 1e-9  # a margin that certifies is above it: what is left of rounding is far below
SAMPLES = 512  # of a batch, that are bounded at a time


@dataclass(frozen=True, eq=False)
class Bounds:
    """lower <= F y(u) <= upper for every u of the region, y the model's exact answer.

    Attributes:
        lower, upper: of the outputs, or of the rows asked for.  # (m, q)
        state_lower, state_upper: of the equilibrium state, in the model's order.  # (m, n)
        method: what found them.
        sound: whether they are proved; True for whatever `bounds` returns.
        residual: the largest error of a solve that the bounds pay for.  # (m,)
        seconds: for all samples together.
    """

    lower: Tensor
    upper: Tensor
    state_lower: Tensor
    state_upper: Tensor
    method: str
    sound: bool
    residual: Tensor
    seconds: float = 0.0

    @property
    def width(self) -> Tensor:
        """upper - lower.  # (m, q)"""
        return self.upper - self.lower


@dataclass(frozen=True, kw_only=True)
class Options:
    """How `bounds` works; see there."""

    method: str
    solver: "str | FixedPointSolver"
    refinements: int
    steps: int
    sizes: tuple[int, ...] | None
    seconds: float


def bounds(
    model: Any,
    region: UncertaintySet,
    method: str = "best",
    *,
    around: Tensor | None = None,
    rows: Tensor | None = None,
    refinements: int = 1,
    steps: int = 0,
    sizes: Sequence[int] | None = None,
    seconds: float = math.inf,
    solver: "str | FixedPointSolver" = "auto",
) -> Bounds:
    """lower <= y(u) <= upper for every input u of a region, proved.

    - "sensitivity": |y - y0| <= |C| (I - |A|)^-1 |B| s + |D| s, Perron and Frobenius; with `sizes`
      its block version. Loose, cheap, and a map of what moves what.
    - "interval": the smallest box that the map sends into itself; of a network, one pass (IBP).
    - "lipschitz": ||C|| ||B|| r / m, in the infinity norm with the matrix measure, and in the 2-norm
      for monotone models; row by row.
    - "crown": two lines around each activation, carried back to the input (implicit CROWN); with
      `refinements` of the ranges of pre-activations, and `steps` of ascent over the slopes.
    - "lp", "sdp": the linear and semidefinite relaxation, for small models, by their multipliers.
    - "best": all but the last two that apply, the tighter of each row, as long as `seconds` allow.

    All of it in float64 whatever the model's dtype, about the exact equilibrium of the stored
    weights: what a solver leaves open is part of the bounds, rounding goes outward. A float32
    forward pass differs from that by its own `error_bound`.

    Args:
        model: an ImplicitModel, a converted network among them, an ImplicitLayer or a MonotoneLayer.
        region: the inputs, of flat vectors: one set, or a batch of m.
        method: one of the above.
        around: centres that are added to the set, as rows.  # (m, p)
        rows: F, to bound F y in place of y, as one matrix or one for each sample. Rows such as
            e_i - e_j are bounded directly, never as a difference of bounds.  # (k, q) or (m, k, q)
        refinements: passes over all pre-activations ("crown", "lp", "sdp"). 0 takes intervals, or
            for a monotone loop 2-norms; 1 is CROWN for a network.
        steps: of ascent over slopes for the rows asked for.
        sizes: of the blocks of the state, for "sensitivity".
        seconds: for "best", after which no further method starts.
        solver: of nominal states and boxes; however early it stops, the bounds hold.

    Returns:
        `Bounds`.

    Raises:
        TypeError: no model, or no set.
        ValueError: the method does not apply to the model, with the reason and the way out; the
            region is unbounded or of another dimension; NaN or infinite data; an unknown method.

    Example:
        >>> import torch, implicitdl
        >>> from implicitdl.certify import bounds
        >>> from implicitdl.robust import Ball
        >>> layer = implicitdl.ImplicitLayer(4, 2, state_features=8)
        >>> u = torch.randn(3, 4)
        >>> found = bounds(layer, Ball(radius=0.1, norm="inf", dimension=4), around=u)
        >>> bool((found.lower <= layer(u)).all() and (layer(u) <= found.upper).all())
        True

    Reference:
        El Ghaoui, Gu, Travacca, Askari, Tsai (2021), section 4; `implicitdl.certify` names the
        source of each method.
    """
    options = options_of(method, refinements, steps, sizes, seconds, solver)
    return bounded(model, region, around, rows, options, True)


def bounded(
    model: Any, region: UncertaintySet, around: Tensor | None, rows: Tensor | None, options: Options,
    upper: bool,
) -> Bounds:  # fmt: skip
    """`bounds`; without `upper`, at half of the cost, upper is infinite."""
    start = time.perf_counter()
    with torch.no_grad():
        graph = graph_of(model)
        loops = [None if node.A is None else Loop(node) for node in graph.nodes]
        whole = Region.of(region, around, graph)
        F = _rows(rows, graph, whole)
        query = Query.of(graph.output, F)
        parts = []
        for index in torch.arange(whole.samples, device=graph.example.device).split(SAMPLES):
            few = whole if len(index) == whole.samples else whole.rows(index)
            parts.append(_bounds(graph, loops, few, query.rows(index), options, upper))
        joined = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
    lower, top, below, above, residual = joined
    return Bounds(
        lower, torch.maximum(lower, top), below, above, options.method, True, residual,
        time.perf_counter() - start,
    )  # fmt: skip


def options_of(
    method: str, refinements: int = 1, steps: int = 0, sizes: Sequence[int] | None = None,
    seconds: float = math.inf, solver: "str | FixedPointSolver" = "auto",
) -> Options:  # fmt: skip
    """The options of `bounds`, checked."""
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    for name, value in (("refinements", refinements), ("steps", steps)):
        if type(value) is not int or value < 0:
            raise ValueError(f"{name}: got {value!r}, expected an integer >= 0.")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
        raise ValueError(f"seconds: got {seconds!r}, expected a positive number.")
    if sizes is not None and method != "sensitivity":
        raise ValueError(f"sizes: they are for method='sensitivity', got method={method!r}.")
    return Options(
        method=method, solver=solver, refinements=refinements, steps=steps,
        sizes=None if sizes is None else tuple(sizes), seconds=seconds,
    )  # fmt: skip


def _rows(rows: Tensor | None, graph: Graph, region: Region) -> Tensor | None:
    """F checked, with a dimension for the samples.  # (m or 1, k, q)"""
    if rows is None:
        return None
    q, m = graph.outputs, region.samples
    if not isinstance(rows, Tensor) or not rows.is_floating_point():
        got = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
        raise TypeError(f"rows: got {got}, expected a floating tensor (k, {q}) or (m, k, {q}).")
    F = rows.detach().to(graph.example)
    F = F[None] if F.dim() == 2 else F
    if F.dim() != 3 or F.shape[-1] != q or F.shape[0] not in (1, m):
        raise ValueError(
            f"rows: got shape {tuple(rows.shape)}, expected (k, {q}), or ({m}, k, {q}) for {m} samples."
        )
    if not bool(torch.isfinite(F).all()):
        at = tuple(torch.nonzero(~torch.isfinite(F))[0].tolist())
        raise ValueError(f"rows: got {float(F[at])} at index {at}, expected finite numbers.")
    return F


Found = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # lower, upper, states, residual


def _bounds(
    graph: Graph, loops: "list[Loop | None]", region: Region, query: Query, options: Options,
    upper: bool,
) -> Found:  # fmt: skip
    points = nominal(graph, loops, region, options.solver, _needs_norms(loops, region, options))
    residual = region.center.new_zeros(region.samples)
    for point in points:
        if point.residual.shape[-1]:
            residual = torch.maximum(residual, point.residual.amax(-1))
    run = _METHODS[options.method]
    both = query
    if upper:
        both = Query(
            {j: torch.cat([g, -g], 1) for j, g in query.start.items()},
            torch.cat([query.constant, -query.constant], -1), query.fan,
        )  # fmt: skip
    low, spans = run(graph, loops, points, region, both, options)
    k = query.constant.shape[-1]
    low = low.expand(region.samples, low.shape[-1])
    high = -low[:, k:] if upper else torch.full_like(low, math.inf)
    below = graph.joined([s.below.expand(region.samples, -1) for s in spans])
    above = graph.joined([s.above.expand(region.samples, -1) for s in spans])
    shape = (region.samples, graph.states)
    return low[:, :k], high, below.expand(shape), above.expand(shape), residual


def _needs_norms(loops: "list[Loop | None]", region: Region, options: Options) -> bool:
    """Whether a 2-norm can be of use: in a method that reads it, for a loop that has no other bound,
    or where the region is no box."""
    if options.method in ("best", "lipschitz"):
        return True
    if options.method in ("interval", "sensitivity"):
        return False
    return any(loop is not None and loop.weights is None for loop in loops) or _round(region)


def _round(region: Region) -> bool:
    """Whether the 2-norm ball around the region is much smaller than that around its box."""
    return bool((region.euclidean < 0.9 * torch.linalg.vector_norm(region.radius, dim=-1)).any())


Result = tuple[Tensor, list[Span]]


def _sensitivity(
    graph: Graph, loops: "list[Loop | None]", points: list[Point], region: Region, query: Query,
    options: Options,
) -> Result:  # fmt: skip
    if options.sizes is not None:
        return block_lower(query, graph, loops, points, region, options.sizes)
    spans = sensitivity_spans(graph, loops, points, region)
    return query.over(region, spans), spans


def _interval(
    graph: Graph, loops: "list[Loop | None]", points: list[Point], region: Region, query: Query,
    options: Options,
) -> Result:  # fmt: skip
    spans = interval_spans(graph, loops, points, region, options.solver, strict=True)
    return query.over(region, spans), spans


def _lipschitz(
    graph: Graph, loops: "list[Loop | None]", points: list[Point], region: Region, query: Query,
    options: Options,
) -> Result:  # fmt: skip
    return lipschitz_lower(query, graph, loops, points, region)


def context_of(
    graph: Graph, loops: "list[Loop | None]", points: list[Point], region: Region, options: Options
) -> Context:
    """What backward passes share; offsets over 2-norm balls where the region is no box."""
    return Context(graph, loops, points, region, options.solver, ball=_round(region))


def refined_spans(context: Context, refinements: int, steps: int = 0) -> list[Span]:
    """The nodes' ranges by intervals, then bounded by lines `refinements` times, in order."""
    graph, region = context.graph, context.region
    spans: list[Span] = []
    for k, (node, loop, point) in enumerate(
        zip(graph.nodes, context.loops, context.points, strict=True)
    ):
        low, high = ranges(node, region, spans)
        if loop is None:
            # With the 2-norm, every pre-activation is within `load` of the reference.
            load = point.load[:, None] * (1 + 1e-12) + 1e-15 * point.z.abs()
            low, high = torch.maximum(low, point.z - load), torch.minimum(high, point.z + load)
            spans.append(Span(low, torch.maximum(low, high), *image(node, low, high)))
            first = k > 0 or any(j >= 0 for j, _ in node.row.terms)
        else:
            spans.append(_loop(loop, point, low, high, context))
            first = True
        for _ in range(refinements if first else 0):
            spans[k] = refine(context, spans, k, steps)
            if loop is None:
                break  # a node that does not read itself is as tight as it gets
    return spans


def _loop(loop: Loop, point: Point, low: Tensor, high: Tensor, context: Context) -> Span:
    from ._interval import loop_span

    if outer_box(loop, point, low, high) is None:
        from ._interval import refusal

        raise ValueError("method: " + refusal(loop, "no bound"))
    return loop_span(loop, point, low, high, context.solver)


def _crown(
    graph: Graph, loops: "list[Loop | None]", points: list[Point], region: Region, query: Query,
    options: Options,
) -> Result:  # fmt: skip
    context = context_of(graph, loops, points, region, options)
    spans = refined_spans(context, options.refinements)
    return crown_lower(context, spans, query, options.steps), spans


def crown_lower(context: Context, spans: list[Span], query: Query, steps: int) -> Tensor:
    """The bound of the rows asked for, by CROWN's slopes, or the best found in `steps`."""
    size = query.constant.shape[-1]
    widest = max([n.row.rows for n in context.graph.nodes] + [context.graph.inputs])
    from ._crown import ROWS

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


def _lp(
    graph: Graph, loops: "list[Loop | None]", points: list[Point], region: Region, query: Query,
    options: Options,
) -> Result:  # fmt: skip
    context = context_of(graph, loops, points, region, options)
    spans = refined_spans(context, options.refinements)
    low = lp_lower(context, spans, query)[0]
    return low - query.slack(region, [s.reach for s in spans]), spans


def _sdp(
    graph: Graph, loops: "list[Loop | None]", points: list[Point], region: Region, query: Query,
    options: Options,
) -> Result:  # fmt: skip
    context = context_of(graph, loops, points, region, options)
    spans = refined_spans(context, options.refinements)
    low = torch.maximum(sdp_lower(context, spans, query), crown_lower(context, spans, query, 0))
    return low, spans


def _best(
    graph: Graph, loops: "list[Loop | None]", points: list[Point], region: Region, query: Query,
    options: Options,
) -> Result:  # fmt: skip
    start = time.perf_counter()
    best: Tensor | None = None
    spans: list[Span] = []
    refusals: list[str] = []

    def take(found: Callable[[], Result]) -> None:
        nonlocal best, spans
        if best is not None and time.perf_counter() - start > options.seconds:
            return
        try:
            low, own = found()
        except ValueError as error:
            refusals.append(str(error))
            return
        best = low if best is None else torch.maximum(best, low)
        spans = own if not spans else [_meet(a, b) for a, b in zip(spans, own, strict=True)]

    def again(refinements: int, steps: int) -> Callable[[], Result]:
        chosen = Options(**{**vars(options), "refinements": refinements, "steps": steps})
        return lambda: _crown(graph, loops, points, region, query, chosen)

    take(lambda: _lipschitz(graph, loops, points, region, query, options))
    take(lambda: _interval(graph, loops, points, region, query, options))
    for refinements, steps in sorted(
        {(0, 0), (options.refinements, 0), (options.refinements, options.steps)}
    ):
        take(again(refinements, steps))
    if best is None:
        raise ValueError(
            "method: 'best' found none that applies. " + " ".join(dict.fromkeys(refusals))
        )
    return best, spans


def _meet(a: Span, b: Span) -> Span:
    """What is in both."""
    low, below = torch.maximum(a.low, b.low), torch.maximum(a.below, b.below)
    return Span(
        low, torch.maximum(low, torch.minimum(a.high, b.high)),
        below, torch.maximum(below, torch.minimum(a.above, b.above)),
    )  # fmt: skip


_METHODS: dict[str, Callable[..., Result]] = {
    "best": _best,
    "crown": _crown,
    "interval": _interval,
    "lipschitz": _lipschitz,
    "lp": _lp,
    "sdp": _sdp,
    "sensitivity": _sensitivity,
}
