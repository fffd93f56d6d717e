"""The linear and the semidefinite relaxation, each turned into a bound that needs no trust.

Both are solved by cvxpy, and only the multipliers are used. Of the LP they are slopes of the lower
lines, at which the backward pass is evaluated, a bound for any slopes. Of the SDP they are a quadratic
function that the multipliers make nearly convex; what is missing is added and paid for.

Reference: Salman et al. (2019), for the LP; Raghunathan, Steinhardt and Liang (2018) and Dathathri et
al. (2020), for the SDP and for bounds from its approximate dual.
"""

import contextlib
import math
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..robust import Ball
from ._crown import backward, is_relu, lines_of
from ._interval import Span
from ._nodes import EPS
from ._norms import Query
from ._points import Context
from ._region import INPUT
from ._relax import Lines

LP_STATES = 4000
SDP_SIZE = 120  # states and inputs: at 70, 20 s a row
SDP_EXACT = 40  # up to which an interior-point method is the faster one


def lp_lower(context: Context, spans: list[Span], query: Query) -> tuple[Tensor, Tensor]:
    """Bounds at the multipliers of the LP, and the inputs at which the LP is attained.

    Returns:
        (lower, u)  # (m, K), (m, K, p)
    """
    import cvxpy as cp
    import numpy as np

    graph, region = context.graph, context.region
    states = sum(node.size for node in graph.nodes)
    if states > LP_STATES:
        raise ValueError(
            f"method: 'lp' is for small models, got {states} states, more than {LP_STATES}; "
            "'crown' with steps > 0 reaches the same bound."
        )
    relaxed: dict[int, Lines] = {}
    for k, (node, span) in enumerate(zip(graph.nodes, spans, strict=True)):
        lines_of(relaxed, k, node, span)
    m, K = region.samples, query.constant.shape[-1]
    dense = [[(j, M.dense()) for j, M in node.row.terms] for node in graph.nodes]
    if any(M is None for row in dense for _, M in row):
        raise ValueError("method: 'lp' needs the blocks as matrices, and one would be too large.")
    values, inputs = [], []
    for i in range(m):
        one = context.rows(slice(i, i + 1))
        own = [Span(*(getattr(s, f)[i : i + 1] for f in Span.__dataclass_fields__)) for s in spans]
        mine = {
            k: Lines(*(getattr(v, f)[i : i + 1] for f in Lines.__dataclass_fields__))
            for k, v in relaxed.items()
        }
        usual = dict(mine)
        asked = query.rows(slice(i, i + 1))
        z = cp.Variable(graph.inputs)
        u = one.region.center[0].cpu().numpy() - one.region.middle[0].cpu().numpy() + z
        x = [cp.Variable(node.size) for node in graph.nodes]
        chosen = one.region.set.row(0) if one.region.set.lead else one.region.set
        constraints, pairs = list(chosen.as_cvxpy(z)), {}
        for k, (node, loop) in enumerate(zip(graph.nodes, context.loops, strict=True)):
            line = mine[k]
            s: Any = node.row.bias.cpu().numpy()
            for j, M in dense[k]:
                s = s + M.cpu().numpy() @ (u if j == INPUT else x[j])
            if loop is not None:
                s = s + loop.A.cpu().numpy() @ x[k]
            if node.natural is not None:
                s = 0 * x[k]
            # The flattest lower line of a free entry, and the steepest one beside it.
            slope = torch.where(line.free, line.least, line.lower_slope)
            mine[k] = line = replace(line, lower_slope=slope)
            a, p, b, q, most = (
                getattr(line, name)[0].cpu().numpy()
                for name in ("lower_slope", "lower_offset", "upper_slope", "upper_offset", "most")
            )
            free = line.free[0].cpu().numpy()
            steep = np.where(free, most, a)
            pairs[k] = (
                x[k] >= cp.multiply(a, s) + p,
                x[k] <= cp.multiply(b, s) + q,
                x[k] - cp.multiply(steep, s) >= np.where(free, 0.0, p),
            )
            constraints += pairs[k]
            span = own[k]
            constraints += [
                x[k] >= span.below[0].cpu().numpy(),
                x[k] <= span.above[0].cpu().numpy(),
            ]
        g = {j: cp.Parameter(t.shape[-1]) for j, t in asked.start.items()}
        objective = sum(g[j] @ (u if j == INPUT else x[j]) for j in g)
        problem = cp.Problem(cp.Minimize(objective), constraints)
        found, where = [], []
        for row in range(K):
            for j, t in asked.start.items():
                g[j].value = t[0, row].cpu().numpy()
            _solve(problem, solver=cp.CLARABEL)
            single = {j: t[:, row : row + 1] for j, t in asked.start.items()}
            constant = asked.constant[:, row : row + 1]
            options: dict[str, Any] = {"relaxed": dict(mine)}
            value = backward(one, own, single, constant, relaxed=dict(usual)).value
            if all(c.dual_value is not None for group in pairs.values() for c in group):
                multipliers = {}
                for k, group in pairs.items():
                    low, high, top = (_multipliers(c.dual_value, mine[k].most) for c in group)
                    # Where there is one lower line, both constraints are it.
                    open_ = mine[k].free[:, None]
                    multipliers[k] = (
                        torch.where(open_, low, low + top),
                        high,
                        torch.where(open_, top, 0.0),
                    )
                better = backward(one, own, single, constant, multipliers=multipliers, **options)
                value = torch.maximum(value, better.value)
            found.append(value)
            at = one.region.center[0] if u.value is None else torch.as_tensor(u.value)
            where.append(at.to(one.region.center))
        values.append(torch.cat(found, 1))
        inputs.append(torch.stack(where)[None])
    return torch.cat(values), torch.cat(inputs)


def _multipliers(value: Any, like: Tensor) -> Tensor:
    """As a tensor, none negative.  # (1, 1, n)"""
    found = torch.as_tensor(value).to(like).clamp(min=0.0)
    return found.nan_to_num(nan=0.0, posinf=0.0)[None, None]


def _solve(problem: Any, **options: Any) -> None:
    """Solved as well as it goes: whatever multipliers there are, they give a bound."""
    import cvxpy as cp

    with contextlib.suppress(cp.SolverError), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "solution may be inaccurate"
        problem.solve(**options)


def sdp_lower(context: Context, spans: list[Span], query: Query) -> Tensor:
    """Dual-corrected bounds of the SDP relaxation of a ReLU model.  # (m, K)

    With y = (1, u, x), s = A x + B u + b and multipliers, the function

        g'x + h'u - a'x - c'(x - s) - e'(x * (x - s)) - t'(chord(s) - x)
            + f'((u - l) * (u - h)) + q'((x - xl) * (x - xh)) + k'((s - sl) * (s - sh))

    is below g'x + h'u on every y of the region, for a, c, t, f, q, k >= 0 and every e. It is y'M y;
    where M's quadratic part H is positive semidefinite but for delta, adding delta I costs at most
    delta sum max y_i^2, and a convex quadratic is above its tangent plane at any point.
    """
    graph, region = context.graph, context.region
    n, p = sum(node.size for node in graph.nodes), graph.inputs
    if n + p > SDP_SIZE:
        raise ValueError(
            f"method: 'sdp' is for at most {SDP_SIZE} states and inputs, got {n} and {p}; take "
            "'lp' or 'crown'."
        )
    if not all(
        node.entrywise and all(is_relu(phi) for phi, _ in node.parts) for node in graph.nodes
    ):
        raise ValueError("method: 'sdp' is for ReLU models, got another activation; take 'crown'.")
    A, B, b, starts = _joined(context)
    rows = []
    for i in range(region.samples):
        box = [torch.cat([getattr(s, f)[i] for s in spans]) for f in Span.__dataclass_fields__]
        one = region.rows(slice(i, i + 1))
        asked = query.rows(slice(i, i + 1))
        own = []
        for row in range(query.constant.shape[-1]):
            g, h = A.new_zeros(n), A.new_zeros(p)
            for j, t in asked.start.items():
                if j == INPUT:
                    h = t[0, row]
                else:
                    g[starts[j] : starts[j] + t.shape[-1]] = t[0, row]
            own.append(_sdp_one(A, B, b, box, one, g, h) + asked.constant[0, row])
        rows.append(torch.stack(own))
    return torch.stack(rows) - query.slack(region, [s.reach for s in spans])


def _joined(context: Context) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """A, B, b of all nodes together, and where each starts."""
    nodes = context.graph.nodes
    sizes = [node.size for node in nodes]
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    b = torch.cat([node.row.bias for node in nodes])
    n = len(b)
    A, B = b.new_zeros(n, n), b.new_zeros(n, context.graph.inputs)
    for k, (node, loop) in enumerate(zip(nodes, context.loops, strict=True)):
        rows = slice(starts[k], starts[k] + sizes[k])
        for j, M in node.row.terms:
            matrix = M.dense()
            if j == INPUT:
                B[rows] += matrix
            else:
                A[rows, starts[j] : starts[j] + sizes[j]] += matrix
        if loop is not None:
            A[rows, rows] += loop.A
    return A, B, b, starts


def _sdp_one(
    A: Tensor, B: Tensor, b: Tensor, box: list[Tensor], region: Any, g: Tensor, h: Tensor
) -> Tensor:
    import cvxpy as cp
    import numpy as np

    low, high, below, above = (t.cpu().numpy() for t in box)
    below = below.clip(min=0.0)
    center, radius = region.center[0].cpu().numpy(), region.radius[0].cpu().numpy()
    a_, b_, c_ = A.cpu().numpy(), B.cpu().numpy(), b.cpu().numpy()
    n, p = b_.shape
    c_ = c_ + b_ @ center
    ball = isinstance(region.set, Ball) and region.set.norm == 2
    # z = (1, v, x) with u = center + v; s = c + B v + A x as rows of z.
    S = np.concatenate([c_[:, None], b_, a_], 1)
    X = np.concatenate([np.zeros((n, 1 + p)), np.eye(n)], 1)
    V = np.concatenate([np.zeros((p, 1)), np.eye(p), np.zeros((p, n))], 1)
    one = np.eye(1 + p + n)[0]
    slope = np.where(low >= 0, 1.0, np.where(high <= 0, 0.0, high / np.maximum(high - low, 1e-300)))
    rise = np.where((low < 0) & (high > 0), -slope * low, 0.0)
    chord = slope[:, None] * S + rise[:, None] * one  # x <= chord, as a row
    names = ("a", "c", "t", "q", "k")
    size = float(torch.linalg.vector_norm(torch.cat([g * box[3], h * region.radius[0]]))) + 1e-12
    mu = {name: cp.Variable(n, nonneg=True) for name in names}
    e = cp.Variable(n)
    f = cp.Variable(1 if ball else p, nonneg=True)
    gamma = cp.Variable()

    def assemble(mu: Any, e: Any, f: Any, lib: Any) -> Any:
        diag = cp.diag if lib is cp else np.diag
        linear = (
            X.T @ (g.cpu().numpy() - mu["a"] - mu["c"] + mu["t"]) + S.T @ mu["c"] - chord.T @ mu["t"]
            + V.T @ h.cpu().numpy()
        )  # fmt: skip
        quad = X.T @ diag(-e) @ X
        cross = X.T @ diag(e) @ S
        quad = quad + (cross + cross.T) / 2
        quad = quad + X.T @ diag(mu["q"]) @ X
        mean = (below + above) / 2
        linear = linear - 2 * (X.T @ (diag(mean) @ mu["q"]))
        quad = quad + S.T @ diag(mu["k"]) @ S
        linear = linear - S.T @ (diag(low + high) @ mu["k"])
        constant = (below * above) @ mu["q"] + (low * high) @ mu["k"]
        if ball:
            quad = quad + f[0] * (V.T @ V)
            constant = constant - float(region.euclidean[0]) ** 2 * f[0]
        else:
            quad = quad + V.T @ diag(f) @ V
            constant = constant - (radius**2) @ f
        if lib is cp:
            first = cp.reshape(linear, (1 + p + n, 1), order="C") @ one[None]
        else:
            first = np.outer(linear, one)
        return quad + (first + first.T) / 2 + constant * np.outer(one, one)

    # In units in which inputs, states and what is minimised have size 1, and multipliers with them.
    unit = np.concatenate([[1.0], np.maximum(radius, 1e-9), np.maximum(above, 1e-9)])
    M = cp.multiply(assemble(mu, e, f, cp), np.outer(unit, unit) / size)
    problem = cp.Problem(cp.Maximize(gamma), [M - gamma * np.outer(one, one) >> 0])
    if 1 + p + n <= SDP_EXACT:
        _solve(problem, solver=cp.CLARABEL)
    else:
        _solve(problem, solver=cp.SCS, eps=1e-4, max_iters=20000)
    found = [e.value, f.value, *(v.value for v in mu.values())]
    if any(v is None or not np.isfinite(v).all() for v in found):
        return torch.as_tensor(-math.inf).to(A)
    got = {name: v.value.clip(min=0.0) for name, v in mu.items()}
    quadratic = f.value.clip(min=0.0)
    M = torch.as_tensor(assemble(got, e.value, quadratic, np)).to(A)
    M = (M + M.mT) / 2
    # The sizes of what was added up, which may be far more than the sum.
    reach = np.abs(c_) + np.abs(b_) @ radius + np.abs(a_) @ above
    reach = 1 + reach + above + np.abs(low) + np.abs(high)
    steep = np.abs(e.value) + got["q"] + got["k"]
    terms = (steep * reach**2).sum() + ((got["a"] + got["c"] + got["t"]) * reach).sum()
    terms += (quadratic * (radius**2 if not ball else float(region.euclidean[0]) ** 2)).sum()
    rounding = 16 * (1 + p + n) * EPS * terms
    r = region.radius[0]
    least = torch.cat([-r, box[2].clamp(min=0.0)])
    most = torch.maximum(torch.cat([r, box[3]]), least)
    return _quadratic_lower(M, least, most) - float(rounding) + h @ region.center[0]


def _quadratic_lower(M: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """A lower bound of (1, y)'M (1, y) over the box low <= y <= high.

    y'H y + 2 m'y >= y'(H + S) y + 2 m'y - sum S_ii max y_i^2, whose first part is convex, and at
    least its tangent at any point of the box: the better that point, the less is given away. The
    shift S is in the scale of y, so that small entries cost little.
    """
    H, m, c = M[1:, 1:], M[0, 1:], M[0, 0]
    scale = torch.maximum(low.abs(), high.abs()).clamp(min=1e-12)
    H, m, low, high = H * scale[:, None] * scale, m * scale, low / scale, high / scale
    n = len(m)
    size = float(torch.linalg.matrix_norm(H)) + 1e-300
    delta = max(0.0, -float(torch.linalg.eigvalsh(H)[0])) + 16 * n * EPS * size
    H = H + delta * torch.eye(n, dtype=H.dtype, device=H.device)
    step = 1 / (float(torch.linalg.matrix_norm(H, 2)) + 1e-300)
    y = last = torch.zeros_like(m).clamp(low, high)
    for k in range(2000):  # accelerated projected gradient steps
        z = y + (k / (k + 3)) * (y - last)
        last, y = y, torch.minimum(torch.maximum(z - step * (H @ z + m), low), high)
    slope = 2 * (H @ y + m)
    tangent = torch.minimum(slope * (low - y), slope * (high - y)).sum()
    value = c + (2 * m + H @ y) @ y + tangent
    terms = c.abs() + 4 * m.abs().sum() + 4 * H.abs().sum()
    return value - delta * n - 16 * n * EPS * (terms + size)
