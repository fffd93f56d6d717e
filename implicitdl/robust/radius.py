"""The largest uncertainty that a linear program can bear.

    r* = max over x of min over uncertain rows i of (b_i - a_i'x) / h_i(x)

is quasi-concave. With d_i > 0, F(r) = max over x of the largest s with a_i'x + r h_i(x) + d_i s <= b_i
is the optimum of one cone program, decreasing, and zero at r*. From r = radius(x_k) its solution has a
larger radius, and d_i = h_i(x_k) makes the steps converge superlinearly.

Reference:
    Crouzeix, Ferland, Schaible (1985), "An algorithm for generalized fractional programs"; for d,
    Crouzeix, Ferland, Schaible (1986), "A note on an algorithm for generalized fractional programs".
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..convex import Cones, ConeSolver
from ..solution import InfeasibleError, Solution, Status
from .base import UncertaintySet, finite
from .conic import Conic
from .rows import counterpart

if TYPE_CHECKING:
    from .programs import RobustLP

MAX_STEPS = 40
TOL = 1e-9  # of r, relative to 1 + r
ROUNDING = 1e-7
HUGE = 1e7  # a radius beyond which none is the largest


def ratio(slack: Tensor, h: Tensor, limit: Tensor) -> Tensor:
    """slack / h, infinite where h <= 0: a larger set then asks for no more.

    Such a row is broken where its slack is below -1e-7 (1 + |limit|): a solution meets its rows with
    equality up to rounding, and that is no violation.
    """
    held = h > 0
    out = slack / torch.where(held, h, torch.ones_like(h))
    met = slack >= -ROUNDING * (1 + limit.abs())
    return torch.where(held, out, torch.where(met, math.inf, -math.inf).to(out))


def largest_radius(
    program: "RobustLP",
    *,
    cost: "float | Tensor | None",
    solver: ConeSolver | None,
    on_failure: str,
) -> Solution:
    """See `RobustLP.largest_radius`."""
    if program._totals() is None and (cost is None or program.objective is None):
        raise ValueError(
            "largest_radius: got a program with no uncertain row, expected a set for the rows, or one "
            "for the objective together with `cost`."
        )
    program._require_members()
    if cost is not None:
        cost = torch.as_tensor(cost, dtype=program.c.dtype, device=program.c.device)
        finite("cost", cost)
    lead = program.lead if cost is None else torch.broadcast_shapes(program.lead, cost.shape)
    with torch.no_grad():
        r, x, d, codes, steps = _search(program, cost, lead, solver)
    finished = (codes == Status.CONVERGED.code) & torch.isfinite(r)
    radius = _attached(program, cost, r, d, finished, solver)
    solution = Solution(
        value=x, codes=codes, residual=torch.where(codes == Status.CONVERGED.code, 0.0, torch.inf),
        steps=steps, stats={"solver": "generalised Dinkelbach", "radius": radius},
    )  # fmt: skip
    if on_failure == "nan":
        return solution
    bad = torch.nonzero(codes.flatten() == Status.INFEASIBLE.code).flatten()
    if on_failure == "raise" and bad.numel():
        raise InfeasibleError(
            f"largest_radius: {bad.numel()} of {codes.numel()} programs have no solution even without "
            f"uncertainty (index {bad.tolist()[:8]}); relax their rows or `cost`, or take "
            "on_failure='nan'.",
            instances=bad,
        )
    return solution.check(on_failure)


def _search(
    program: "RobustLP", cost: Tensor | None, lead: torch.Size, solver: ConeSolver | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """r*, an x that bears it, the last weights d, the outcome and the steps of each instance."""
    n = program.c.shape[-1]
    conic, q = _nominal(program, cost)
    found, _ = conic.minimise(q, solver=solver, on_failure="return")
    found = _reshaped(found, lead)
    codes, rows = found.codes, program.b.shape[-1]
    # s has a bound, so the only failure is that of rows without uncertainty; below zero is another.
    size = program.b.abs().amax(-1) if rows else program.c.new_zeros(())
    contradiction = found.stats["objective"] > 1e-7 * (1 + size)
    codes = torch.where(
        (codes == Status.CONVERGED.code) & contradiction, Status.INFEASIBLE.code, codes
    )
    done = codes != Status.CONVERGED.code
    x = found.value[..., :n].masked_fill(done[..., None], torch.nan)
    safe = found.value[..., :n].nan_to_num(0.0)
    r, h = _radius(program, safe, cost)
    offset = _offset(program, cost)
    r = r.expand(lead).clamp_min(0.0).masked_fill(done, torch.nan)
    d, steps = _weights(h).expand(*lead, -1), codes.new_ones(lead)
    for _ in range(MAX_STEPS):
        done = done | (r > HUGE)
        if bool(done.all()):
            break
        conic, q = _with_slack(program, torch.where(done, 0.0, r), d, cost, offset)
        found, _ = conic.minimise(q, solver=solver, on_failure="return")
        found = _reshaped(found, lead)
        solved = (found.codes == Status.CONVERGED.code) & ~done
        point = torch.where(solved[..., None], found.value[..., :n], safe)
        new, h = _radius(program, point, cost)
        better = solved & (new > r)
        x = torch.where(better[..., None], point, x)
        safe = torch.where(better[..., None], point, safe)
        steps = steps + (~done).long()
        little = ~(new - r > TOL * (1 + r))  # NaN of what failed included
        r = torch.where(better, new, r)
        done = done | little
        d = torch.where(done[..., None], d, _weights(h))
    unfinished = ~done & (codes == Status.CONVERGED.code)
    codes = codes.masked_fill(unfinished, Status.MAX_STEPS.code)
    return torch.where(r > HUGE, torch.inf, r), x, d, codes, steps


def _attached(
    program: "RobustLP", cost: Tensor | None, r: Tensor, d: Tensor, finished: Tensor,
    solver: ConeSolver | None,
) -> Tensor:  # fmt: skip
    """r with its derivative -F_theta / F_r, from F(r, theta) = 0."""
    data: list[Any] = [program.c, program.A, program.b, program.low, program.high, cost]
    data += [*(program.equality or ()), *(program.certain or ()), *program._sets()]
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in data):
        return r
    at = torch.where(finished, r, 0.0).requires_grad_()
    conic, q = _with_slack(program, at, d, cost, _offset(program, cost))
    found, lead = conic.minimise(q, solver=solver, on_failure="return")
    F = -conic.value(q, found, lead).reshape(r.shape)
    good = finished & (found.codes == Status.CONVERGED.code).reshape(r.shape)
    F = torch.where(good, F, 0.0)
    (slope,) = torch.autograd.grad(F.sum(), at, retain_graph=True)
    slope = torch.where(good & (slope < 0), slope, -torch.inf)
    return torch.where(good, r - (F - F.detach()) / slope, r)


def _nominal(program: "RobustLP", cost: Tensor | None) -> tuple[Conic, Tensor]:
    """max s over a_i'x + s <= b_i, s <= 1 and the certain constraints, in (x, s)."""
    return _capped(program, _plain(program, cost, 1.0), program.c.new_ones(()), program.c.shape[-1])


def _plain(program: "RobustLP", cost: Tensor | None, weight: float) -> list[Conic]:
    """a_i'x + weight s <= b_i and c'x + weight s <= cost, in (x, s)."""
    pad = torch.nn.functional.pad
    A = pad(program.A, (0, 1), value=weight)
    parts = [Conic.of(Cones(A.shape[-2]), A, program.b)]
    if cost is not None:
        row = pad(program.c, (0, 1), value=weight)[..., None, :]
        parts.append(Conic.of(Cones(1), row, cost[..., None]))
    return parts


def _with_slack(
    program: "RobustLP", r: Tensor, d: Tensor, cost: Tensor | None, offset: bool
) -> tuple[Conic, Tensor]:
    """max s over a_i'x + r h_i(x) + d_i s <= b_i, s <= 1 + r and the certain constraints.

    With `offset`, a_i'x <= b_i too: it does not follow where a set is without the origin.
    """
    n, m = program.c.shape[-1], program.b.shape[-1]
    scaled = program.scaled(r)
    parts = scaled._rows(d[..., :m])
    if cost is not None:
        certain = program.objective is None
        last = torch.zeros_like(d[..., m:]) if certain else d[..., m:]
        width = torch.broadcast_shapes(program.c.shape[:-1], last.shape[:-1])
        row = torch.cat([program.c.expand(*width, n), last.expand(*width, 1)], -1)[..., None, :]
        if certain:
            parts.append(Conic.of(Cones(1), row, cost[..., None]))
        else:
            parts.append(counterpart(scaled.objective.widened(), row, cost[..., None], n))
    if offset:
        parts += _plain(program, cost, 0.0)
    return _capped(program, parts, 1 + r.detach(), n)


def _offset(program: "RobustLP", cost: Tensor | None) -> bool:
    """Whether one of the sets, rows' or objective's, may be without the origin."""
    totals = program._totals()
    sets = [totals] if totals is None or isinstance(totals, UncertaintySet) else totals
    if cost is not None:
        sets = [*sets, program.objective]
    return not all(
        bool(U.contains(program.c.new_zeros(U.dimension), 0.0).all())
        for U in sets if U is not None
    )  # fmt: skip


def _capped(program: "RobustLP", parts: list[Conic], cap: Tensor, n: int) -> tuple[Conic, Tensor]:
    """With the certain constraints and s <= cap."""
    x = torch.eye(n, n + 1, dtype=program.c.dtype, device=program.c.device)
    last = program.c.new_zeros(1, n + 1)
    last[0, n] = 1.0
    parts += [part.pulled(x) for part in program._certain()]
    parts.append(Conic.of(Cones(1), last, cap[..., None]))
    return Conic.meet(parts), -last[0]


def _radius(program: "RobustLP", x: Tensor, cost: Tensor | None) -> tuple[Tensor, Tensor]:
    """The largest r for x, and h_i(x) of all rows, that of the objective included."""
    limit = program.b
    slack, h = limit - (program.A @ x[..., None])[..., 0], program.protection(x)
    if cost is not None:
        U: UncertaintySet | None = program.objective
        left = cost - (program.c * x).sum(-1)
        own = torch.zeros_like(left) if U is None else U.support(x)
        slack, h, limit = (
            _beside(rows, last) for rows, last in ((slack, left), (h, own), (limit, cost))
        )
    return ratio(slack, h, limit).amin(-1), h


def _beside(rows: Tensor, last: Tensor) -> Tensor:
    """One more entry.  # (..., m), (...) -> (..., m + 1)"""
    lead = torch.broadcast_shapes(rows.shape[:-1], last.shape)
    return torch.cat([rows.expand(*lead, -1), last.expand(lead)[..., None]], -1)


def _weights(h: Tensor) -> Tensor:
    # A row that its data hardly move would else leave nothing to gain in the others.
    size = h.abs().amax(-1, keepdim=True)
    return torch.maximum(h, torch.where(size > 0, 1e-3 * size, torch.ones_like(size)))


def _reshaped(found: Solution, lead: torch.Size) -> Solution:
    return Solution(
        value=found.value.expand(math.prod(lead), -1).reshape(*lead, found.value.shape[-1]),
        codes=found.codes.expand(math.prod(lead)).reshape(lead),
        residual=found.residual, steps=found.steps,
        stats={"objective": found.stats["objective"].expand(math.prod(lead)).reshape(lead)},
    )  # fmt: skip
