"""Bounds on what a model may answer over a region of inputs."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..robust import UncertaintySet
from ..solution import unknown_name
from ..solvers import FixedPointSolver, get_solver
from ._graph import known
from ._interval import Span, interval_spans
from ._loops import Loop
from ._nodes import Graph
from ._norms import Query, block_lower, lipschitz_lower, sensitivity_spans
from ._points import Context
from ._programs import lp_lower, sdp_lower
from ._refine import crown_lower, refined_spans
from ._region import Region

METHODS = ("best", "crown", "interval", "lipschitz", "lp", "sdp", "sensitivity")
READS = {  # the options that each method reads; all of them, the solver
    "best": ("refinements", "steps", "range_steps", "seconds"),
    "crown": ("refinements", "steps", "range_steps"),
    "interval": (),
    "lipschitz": (),
    "lp": ("refinements", "range_steps"),
    "sdp": ("refinements", "range_steps"),
    "sensitivity": ("sizes",),
}
OPTIONS = ("refinements", "steps", "range_steps", "sizes", "seconds", "solver")
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
    range_steps: int
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
    range_steps: int = 0,
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
    - "crown": two lines around each activation, carried back to the input (implicit CROWN), or the
      box of the states where that is tighter; with `refinements` of the ranges of pre-activations,
      and ascent over the slopes: `steps` for the rows asked for, after which the bound is about that
      of the LP, and `range_steps` for ranges.
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
        refinements: passes over all pre-activations, for "crown", "lp", "sdp" and "best". 0 takes
            intervals, or for a monotone loop 2-norms; 1 is CROWN for a network, of which more change
            nothing; a loop gains from 2 or 3.
        steps: of ascent over the slopes for the rows asked for, for "crown" and "best"; about 20 are
            worth their time, 150 come within 1e-3 of the LP.
        range_steps: the same for each range in each refinement, for "crown", "lp", "sdp" and "best";
            5 take a few times longer than none. Ranges are then tighter than the LP of fixed ones.
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
    options = options_of(
        method, refinements=refinements, steps=steps, range_steps=range_steps, sizes=sizes,
        seconds=seconds, solver=solver,
    )  # fmt: skip
    return bounded(model, region, around, rows, options, True)


def bounded(
    model: Any, region: UncertaintySet, around: Tensor | None, rows: Tensor | None, options: Options,
    upper: bool,
) -> Bounds:  # fmt: skip
    """`bounds`; without `upper`, at half of the cost, upper is infinite."""
    start = time.perf_counter()
    with torch.no_grad():
        graph, loops = known(model)
        whole = Region.of(region, around, graph)
        if not whole.samples:
            raise ValueError("around: got no inputs, expected one at least.")
        F = _rows(rows, graph, whole)
        query = Query.of(graph.output, F)
        parts = []
        for index in torch.arange(whole.samples, device=graph.example.device).split(SAMPLES):
            few = whole if len(index) == whole.samples else whole.rows(index)
            context = context_of(graph, loops, few, options)
            parts.append(_bounds(context, query.rows(index), options, upper))
        joined = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
    lower, top, below, above, residual = joined
    if bool(lower.isnan().any() | top.isnan().any()):
        raise ValueError(
            f"model: sums overflow in {options.method!r}, so that nothing is proved; its weights or the "
            "inputs are too large."
        )
    return Bounds(
        lower, torch.maximum(lower, top), below, above, options.method, True, residual,
        time.perf_counter() - start,
    )  # fmt: skip


def options_of(
    method: str, *, refinements: int = 1, steps: int = 0, range_steps: int = 0,
    sizes: Sequence[int] | None = None, seconds: float = math.inf, solver: "str | FixedPointSolver" = "auto",
) -> Options:  # fmt: skip
    """The options of `bounds`, checked."""
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    counts = {"refinements": refinements, "steps": steps, "range_steps": range_steps}
    for name, value in counts.items():
        if type(value) is not int or value < 0:
            raise ValueError(f"{name}: got {value!r}, expected an integer >= 0.")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
        raise ValueError(f"seconds: got {seconds!r}, expected a positive number.")
    solver = get_solver(solver)
    if sizes is not None and method != "sensitivity":
        raise ValueError(f"sizes: they are for method='sensitivity', got method={method!r}.")
    return Options(
        method=method, solver=solver, seconds=seconds, **counts,
        sizes=None if sizes is None else tuple(sizes),
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


Result = tuple[Tensor, list[Span]]


def _bounds(
    context: Context, query: Query, options: Options, upper: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(lower, upper, lower of the states, upper of the states, residual)."""
    graph, m = context.graph, context.region.samples
    both = query.both() if upper else query
    low, spans = _METHODS[options.method](context, both, options)
    k = query.constant.shape[-1]
    low = low.expand(m, low.shape[-1])
    high = -low[:, k:] if upper else torch.full_like(low, math.inf)
    below = graph.joined([s.below.expand(m, -1) for s in spans])
    above = graph.joined([s.above.expand(m, -1) for s in spans])
    shape = (m, graph.states)
    return low[:, :k], high, below.expand(shape), above.expand(shape), context.residual


def context_of(
    graph: Graph, loops: "tuple[Loop | None, ...]", region: Region, options: Options
) -> Context:
    """A model over a region; with 2-norms where they can be of use: in a method that reads them, for
    a loop that has no other bound, or where the region is no box."""
    if options.method in ("best", "lipschitz"):
        norms = True
    elif options.method in ("interval", "sensitivity"):
        norms = False
    else:
        wild = any(loop is not None and loop.weights is None for loop in loops)
        norms = wild or region.round
    return Context(graph, loops, region, options.solver, norms)


def _sensitivity(context: Context, query: Query, options: Options) -> Result:
    if options.sizes is not None:
        return block_lower(query, context, options.sizes)
    spans = sensitivity_spans(context)
    return query.over(context.region, spans), spans


def _interval(context: Context, query: Query, options: Options) -> Result:
    spans = interval_spans(context, strict=True)
    return query.over(context.region, spans), spans


def _lipschitz(context: Context, query: Query, options: Options) -> Result:
    return lipschitz_lower(query, context)


def _crown(context: Context, query: Query, options: Options) -> Result:
    spans = refined_spans(context, options.refinements, options.range_steps)
    low = crown_lower(context, spans, query, options.steps)
    # Lines around a saturated activation lose to its range, which is known already.
    return torch.maximum(low, query.over(context.region, spans)), spans


def _lp(context: Context, query: Query, options: Options) -> Result:
    spans = refined_spans(context, options.refinements, options.range_steps)
    low = lp_lower(context, spans, query)[0]
    return low - query.slack(context.region, [s.reach for s in spans]), spans


def _sdp(context: Context, query: Query, options: Options) -> Result:
    spans = refined_spans(context, options.refinements, options.range_steps)
    low = torch.maximum(sdp_lower(context, spans, query), crown_lower(context, spans, query, 0))
    return low, spans


def _best(context: Context, query: Query, options: Options) -> Result:
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

    def again(refinements: int, steps: int, range_steps: int) -> Callable[[], Result]:
        chosen = replace(options, refinements=refinements, steps=steps, range_steps=range_steps)
        return lambda: _crown(context, query, chosen)

    take(lambda: _lipschitz(context, query, options))
    take(lambda: _interval(context, query, options))
    for stage in stages(options.refinements, options.steps, options.range_steps):
        take(again(*stage))
    if best is None:
        raise ValueError(
            "method: 'best' found none that applies. " + " ".join(dict.fromkeys(refusals))
        )
    return best, spans


def stages(refinements: int, steps: int, range_steps: int) -> list[tuple[int, int, int]]:
    """ "crown" in steps of growing cost, the last one as asked."""
    few = min(refinements, 1)
    all_ = [(0, 0, 0), (few, 0, 0), (refinements, 0, 0), (refinements, steps, 0)]
    return list(dict.fromkeys([*all_, (refinements, steps, range_steps)]))


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
