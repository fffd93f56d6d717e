"""Bounds from norms: how far a state moves at most, and what that does to an output.

    |y_i - y^_i| <= sum_j |g_ij| R_j,      or  ||g_i||_1 R_inf,  ||g_i||_2 R_2,  sum_G ||g_iG||_2 R_G

y^ is the output at any reference point x^, whose residual is part of R. A row g of a class pair,
c_i - c_j, is measured as it is: sqrt(2) times the constant of the whole C is far more.

Reference: El Ghaoui et al. (2021), theorem 3.1 and section 4.2 (states, blocks); Jafarpour et al.
(2021), theorem 5 (matrix measure); Pabbaraju, Winston and Kolter (2021), theorem 1 (2-norm).
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._crown import hand_on
from ._interval import Span
from ._loops import Loop
from ._nodes import EPS, Affine, Node
from ._points import Context, Point
from ._region import INPUT, Region, affine_slack, dot


@dataclass(frozen=True, eq=False)
class Query:
    """Linear functions sum_k g_k'x_k + h'u + constant, for which bounds are wanted.

    Attributes:
        start: node, or INPUT -> coefficients.  # (m or 1, K, size)
        constant: # (m or 1, K)
        rounding: relative size of what the coefficients are off by, over |coefficients| |values|.
    """

    start: dict[int, Tensor]
    constant: Tensor
    fan: int

    @classmethod
    def of(cls, output: Affine, rows: Tensor | None) -> "Query":
        """F y for y = output; the outputs themselves where rows is None.  # F (m or 1, K, q)"""
        q = output.rows
        eye = torch.eye(q, dtype=output.bias.dtype, device=output.bias.device)
        F = eye[None] if rows is None else rows
        start: dict[int, Tensor] = {}
        hand_on(output, F, start)
        return cls(start, F @ output.bias, output.fan + q)

    def both(self) -> "Query":
        """These, and minus these, whose lower bounds are minus their upper ones."""
        return Query(
            {j: torch.cat([g, -g], 1) for j, g in self.start.items()},
            torch.cat([self.constant, -self.constant], -1), self.fan,
        )  # fmt: skip

    def rows(self, index: Any) -> "Query":
        """For some of the samples."""

        def take(t: Tensor) -> Tensor:
            return t[index] if t.shape[0] > 1 else t

        return Query({j: take(g) for j, g in self.start.items()}, take(self.constant), self.fan)

    def slack(self, region: Region, reach: "list[Tensor]") -> Tensor:
        """What rounding may add to the coefficients and to the sum.  # (m, K)"""
        size = self.constant.abs()
        for j, g in self.start.items():
            if j == INPUT:
                size = size + g.abs().sum(-1) * region.largest
            else:
                size = size + dot(g.abs(), reach[j])
        return size * (self.fan + 16) * 2 * EPS

    def over(self, region: Region, spans: list[Span]) -> Tensor:
        """A lower bound over boxes of the states.  # (m, K)"""
        total = self.constant
        for j, g in self.start.items():
            if j == INPUT:
                total = total + region.lower(g)
                continue
            x = spans[j]
            center, half = (x.below + x.above) / 2, (x.above - x.below) / 2
            total = total + dot(g, center) - dot(g.abs(), half)
        return total - self.slack(region, [x.reach for x in spans])

    def around(self, region: Region, points: list[Point], move: dict[int, Tensor]) -> Tensor:
        """A lower bound: the value at the reference point less what states may move it.

        Args:
            move: node -> max |g_j'(x_j - x^_j)|.  # (m, K)
        """
        total = self.constant
        for j, g in self.start.items():
            own = region.lower(g) if j == INPUT else dot(g, points[j].x) - move[j]
            total = total + own
        return total - self.slack(region, [p.x.abs() for p in points])


def sensitivity_spans(context: Context) -> list[Span]:
    """x^ +- R with |x - x^| <= R = rho + K^-1 (|A| rho + |z - z^|)."""
    graph, loops, points, region = context.graph, context.loops, context.points, context.region
    spans: list[Span] = []
    far: list[Tensor] = []
    for node, loop, point in zip(graph.nodes, loops, points, strict=True):
        load = _load(node, points, region, lambda j: far[j])
        if loop is None:
            L = node.lipschitz
            half = L * (load if node.entrywise else load.amax(-1, keepdim=True))
            half = half.expand_as(point.x) + 16 * EPS * (point.x.abs() + 1)
            move = load
        else:
            if loop.weights is None:
                raise ValueError(
                    f"method: 'sensitivity' needs K = I/L - |A| (with the signed diagonal) to be an "
                    f"M-matrix, which the loop of {node.name} is not: ||A||_inf L = "
                    f"{float(loop.size.sum(1).max()) * loop.slope:.4g}. For a monotone model take "
                    "'lipschitz' or 'crown', or give the sizes of blocks."
                )
            load = load + point.residual @ loop.size.mT
            if not node.entrywise:
                load = load.amax(-1, keepdim=True).expand_as(load)
            half = point.residual + loop.moved(load * (1 + (node.fan + 8) * EPS))
            move = load + half @ loop.size.mT
        half = half * (1 + 16 * EPS)
        far.append(half)
        s = point.z if loop is None else point.z + point.x @ loop.A.mT
        move = move + (node.fan + 8) * EPS * s.abs()
        spans.append(Span(s - move, s + move, point.x - half, point.x + half))
    return spans


def _load(node: Node, points: list[Point], region: Region, far: Callable[[int], Any]) -> Tensor:
    """|z - z^|, entry by entry.  # (m, rows)"""

    def largest(j: int) -> Tensor:
        if j == INPUT:
            return region.largest
        return (points[j].x.abs() + far(j)).amax(-1, keepdim=True)

    load = affine_slack(node.row, largest, node.fan)
    for j, M in node.row.terms:
        if j == INPUT:
            low, high = region.spread(M)
            load = load + torch.maximum(-low, high)
        else:
            load = load + M.sized(far(j))
    return load.expand(region.samples, node.row.rows)


def block_radii(loop: Loop, point: Point, load: Tensor, sizes: tuple[int, ...]) -> Tensor | None:
    """R_G >= ||x_G - x^_G||_2 with R = rho_G + (I/L - N)^-1 (N rho_G + load_G), N_GH = ||A_GH||_2.

    None where I/L - N is no M-matrix.  # (m, groups)
    """
    edges = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    spans = [slice(a, b) for a, b in itertools.pairwise(edges)]
    n = loop.A.shape[0]
    N = loop.A.new_zeros(len(sizes), len(sizes))
    for i, rows in enumerate(spans):
        for j, columns in enumerate(spans):
            N[i, j] = torch.linalg.matrix_norm(loop.A[rows, columns], 2) * (1 + 8 * n * EPS)
    K = torch.eye(len(sizes), dtype=N.dtype, device=N.device) / loop.slope - N
    v, info = torch.linalg.solve_ex(K, torch.ones_like(N[0]))
    if int(info) or not bool((v > 0).all()) or not bool((K @ v >= 0.5).all()):
        return None

    def norms(x: Tensor) -> Tensor:
        return torch.stack([torch.linalg.vector_norm(x[:, s], dim=-1) for s in spans], -1)

    rho = norms(point.residual)
    right = (norms(load) + rho @ N.mT) * (1 + 64 * EPS)
    R = torch.linalg.solve(K, right.mT).mT
    defect = (right - R @ K.mT + (len(sizes) + 8) * EPS * (R.abs() @ K.abs().mT + right)).clamp(
        min=0.0
    )
    return (rho + R + 2 * defect.amax(-1, keepdim=True) * v) * (1 + 64 * EPS)


def block_lower(
    query: Query, context: Context, sizes: tuple[int, ...]
) -> tuple[Tensor, list[Span]]:
    """The block version for a model of one loop."""
    graph, loops, points, region = context.graph, context.loops, context.points, context.region
    if len(graph.nodes) != 1 or loops[0] is None or not graph.nodes[0].entrywise:
        raise ValueError(
            f"sizes: the block version is for a model of one loop of entrywise states, got one of "
            f"{len(graph.nodes)} blocks."
        )
    n = graph.nodes[0].size
    if sum(sizes) != n or min(sizes) < 1:
        raise ValueError(f"sizes: got {tuple(sizes)}, expected positive sizes that add up to {n}.")
    point, loop = points[0], loops[0]
    load = _load(graph.nodes[0], points, region, lambda j: 0.0)
    R = block_radii(loop, point, load, sizes)
    if R is None:
        raise ValueError(
            "method: 'sensitivity' with these sizes: I/L - N, N the matrix of the norms of the blocks "
            "of A, is no M-matrix; take larger blocks, 'lipschitz' or 'crown'."
        )
    half = torch.repeat_interleave(R, torch.tensor(sizes, device=R.device), dim=-1)
    move = {}
    for j, g in query.start.items():
        if j != INPUT:
            parts = torch.split(g, list(sizes), -1)
            gain = torch.stack([torch.linalg.vector_norm(t, dim=-1) for t in parts], -1)
            move[j] = (gain @ R[..., None])[..., 0] * (1 + 64 * EPS)
    s = point.z + point.x @ loop.A.mT
    reach = load + half @ loop.size.mT + (n + 8) * EPS * s.abs()
    spans = [Span(s - reach, s + reach, point.x - half, point.x + half)]
    return query.around(region, points, move), spans


def lipschitz_lower(query: Query, context: Context) -> tuple[Tensor, list[Span]]:
    """The better of the infinity norm with matrix measure, and of the 2-norm, for each row."""
    graph, loops, points, region = context.graph, context.loops, context.points, context.region
    top = _infinity_radii(context)
    halves, bounds = [], []
    for j, point in enumerate(points):
        halves.append(torch.minimum(top[j], point.euclidean)[:, None].expand_as(point.x))
    if any(not bool(torch.isfinite(h).all()) for h in halves):
        bad = next(k for k, h in enumerate(halves) if not bool(torch.isfinite(h).all()))
        loop = loops[bad] or next((x for x in loops if x is not None), None)
        if loop is None:
            raise ValueError(
                f"method: 'lipschitz' overflows at {graph.nodes[bad].name}: its weights are too large."
            )
        raise ValueError(
            f"method: 'lipschitz' has no constant for {graph.nodes[bad].name}: matrix measure and "
            f"||A||_inf = {float(loop.size.sum(1).max()):.4g} are not below 1/L = {1 / loop.slope:.4g}, "
            "and I - L A is not strongly monotone."
        )
    for radii, order in ((top, 1), ([p.euclidean for p in points], 2)):
        move = {}
        for j, g in query.start.items():
            if j != INPUT:
                gain = torch.linalg.vector_norm(g, order, dim=-1)
                move[j] = gain * radii[j][:, None] * (1 + (g.shape[-1] + 16) * EPS)
        bounds.append(query.around(region, points, move))
    spans = []
    for point, loop, half, node in zip(points, loops, halves, graph.nodes, strict=True):
        s = point.z if loop is None else point.z + point.x @ loop.A.mT
        load = point.load[:, None].expand_as(s)
        if loop is not None:
            load = load + half @ loop.size.mT
        load = load + (node.fan + 8) * EPS * s.abs()
        spans.append(Span(s - load, s + load, point.x - half, point.x + half))
    return torch.maximum(*bounds), spans


def _infinity_radii(context: Context) -> list[Tensor]:
    """R >= ||x_k - x^_k||_inf, with 1/L - mu_inf(A) where that is more than 1/L - ||A||_inf."""
    graph, loops, points, region = context.graph, context.loops, context.points, context.region
    radii: list[Tensor] = []
    for node, loop, point in zip(graph.nodes, loops, points, strict=True):
        load = _load(node, points, region, lambda j: radii[j][:, None].expand_as(points[j].x)).amax(
            -1
        )
        if loop is None:
            half = node.lipschitz * load + 16 * EPS * (point.x.abs().amax(-1) + 1)
        else:
            gap = float(loop.comparison.sum(1).min()) - (node.size + 8) * EPS * float(
                loop.comparison.abs().sum(1).max()
            )
            own = point.residual.amax(-1)
            through = float(loop.size.sum(1).max()) * own
            half = own + (load + through) / gap if gap > 0 else torch.full_like(own, math.inf)
        radii.append(half * (1 + 64 * EPS))
    return radii


__all__ = ["Query", "block_lower", "lipschitz_lower", "sensitivity_spans"]
