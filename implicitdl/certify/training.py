"""Losses that make a model certifiable: the worst case over a region, bounded, as a training loss.

What is bounded here is differentiated, in the model's own dtype and without rounding allowances: a
loss is no certificate. Measure with `certify_accuracy`. The weight A stays in the set of its layer,
so that the equation is well-posed all along.

Reference: Gowal et al. (2018), interval training; Zhang et al. (2020), CROWN-IBP; Wei and Kolter
(2022), intervals for equilibria; Jafarpour et al. (2021), the Lipschitz constant as a penalty.
"""

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..implicit import attach
from ..layers import MonotoneLayer
from ..model import ImplicitModel
from ..solution import unknown_name
from ._graph import Affine, Graph, Linear, Node, as_model, graph_of
from ._interval import doubled_equilibrium
from ._loops import Loop
from ._margins import pair_rows
from ._region import INPUT
from .attacks import checked

METHODS = ("crown", "interval", "lipschitz")
NORMS = ("inf", 2)
Box = tuple[Tensor, Tensor]  # (low, high)


def robust_loss(
    model: Any,
    radius: "float | Tensor",
    x: Tensor,
    y: Tensor,
    *,
    norm: "str | int" = "inf",
    method: str = "interval",
    clip: tuple[float, float] | None = None,
) -> Tensor:
    """Cross entropy of the worst logits: log sum_j exp(-min over the ball of y_label - y_j).

    The minima are bounded for each pair of classes by its own row. At radius 0 it is the plain cross
    entropy; let the radius grow over the first epochs.

    Args:
        model: as in `bounds`; its parameters get gradients.
        radius: of the ball around each input.
        x: inputs.  # (m, p)
        y: labels.  # (m,)
        norm: "inf" or 2.
        method: "interval"; "crown", with the ranges of pre-activations by intervals, and lines for
            ReLU and its kind (for other activations, constants: the loss of "interval"); or
            "lipschitz", ||c_i - c_j|| ||B|| / m for a `MonotoneLayer` and the 2-norm, or its
            infinity-norm twin.
        clip: range of the inputs, for the infinity norm.

    Returns:
        The mean over the batch, differentiable.

    Raises:
        ValueError: data that do not fit (NaN is named by its index), or a loop that has no interval
            bound.

    Example:
        >>> import torch, implicitdl
        >>> from implicitdl.certify import robust_loss
        >>> layer = implicitdl.ImplicitLayer(4, 2, state_features=8)
        >>> loss = robust_loss(layer, 0.1, torch.randn(3, 4), torch.tensor([0, 1, 1]))
        >>> loss.backward()
    """
    low = worst_margins(model, radius, x, y, norm=norm, method=method, clip=clip)
    logits = torch.cat([low.new_zeros(len(low), 1), -low], 1)
    return F.cross_entropy(logits, torch.zeros(len(low), dtype=torch.long, device=low.device))


def worst_margins(
    model: Any, radius: "float | Tensor", x: Tensor, y: Tensor, *, norm: "str | int" = "inf",
    method: str = "interval", clip: tuple[float, float] | None = None,
) -> Tensor:  # fmt: skip
    """Differentiable lower bounds of y_label - y_j over the ball, for the other j in order.

    Args:
        model, radius, x, y, norm, method, clip: as in `robust_loss`.

    Returns:
        # (m, q - 1), in the dtype of x

    Raises:
        ValueError: as `robust_loss`.
    """
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    x = x.flatten(1) if isinstance(x, Tensor) and x.dim() > 2 else x
    f = as_model(model)  # once: a layer computes its matrices anew each time
    checked(x, y, radius.detach() if isinstance(radius, Tensor) else radius, norm, clip, f.outputs)
    if method == "lipschitz":
        return _lipschitz_margins(model, f, radius, x, y, norm)
    graph = graph_of(f, dtype=x.dtype, detach=False)
    if x.shape[-1] != graph.inputs:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (m, {graph.inputs}).")
    r = torch.as_tensor(radius, dtype=x.dtype, device=x.device).expand(len(x))
    low, high = x - r[:, None], x + r[:, None]
    if clip is not None and norm == "inf":
        low, high = low.clamp(min=clip[0]), high.clamp(max=clip[1])
    ball = (low, high) if norm == "inf" else (x, r)
    spans = _spans(graph, ball, norm)
    rows = pair_rows(y, graph.outputs, x)[0]
    start: dict[int, Tensor] = {}
    for j, M in graph.output.terms:
        g = M.transpose(rows)
        start[j] = start[j] + g if j in start else g
    total = rows @ graph.output.bias
    if method == "crown":
        return _crown(graph, spans, ball, norm, start, total)
    for j, g in start.items():
        box = None if j == INPUT else spans[j][1]
        total = total + (_least(g, ball, norm) if box is None else _over(g, box))
    return total


def _lipschitz_margins(
    model: Any, f: ImplicitModel, radius: "float | Tensor", x: Tensor, y: Tensor, norm: "str | int"
) -> Tensor:
    """The margins at x less what the state and D move them: pair by pair."""
    gain = _gain(model, f, norm)
    rows = pair_rows(y, f.outputs, x)[0]
    r = torch.as_tensor(radius, dtype=x.dtype, device=x.device).expand(len(x))
    dual = 1 if norm == "inf" else 2
    sizes = [torch.linalg.vector_norm(rows @ M, dual, dim=-1) for M in (f.C, f.D)]
    plain = (rows @ model(x)[..., None])[..., 0]
    return plain - r[:, None] * (sizes[0] * gain + sizes[1])


def _gain(model: Any, f: ImplicitModel, norm: "str | int") -> Tensor:
    """How far the state moves in the norm for inputs that move by 1.

    Args:
        model: as users have it.
        f: its matrices.
    """
    if f.structure is not None:
        raise ValueError("model: got one in blocks, expected matrices; take 'interval'.")
    if norm == 2:
        if not isinstance(model, MonotoneLayer):
            raise ValueError(
                f"model: got {type(model).__name__} with norm=2, expected a MonotoneLayer, whose "
                "margin is known; take norm='inf'."
            )
        # |dx|^2 / L <= dx'dz = dx'(A dx + dv) <= (1 - m) |dx|^2 + |dx| |dv|.
        rest = 1 / f.phi.lipschitz - (1 - model.margin)
        return torch.linalg.matrix_norm(f.B, 2) / rest
    A, B = f.A.abs().sum(1).amax(), f.B.abs().sum(1).amax()
    L = f.phi.infinity_lipschitz
    if not math.isfinite(L) or (L * A).item() >= 1:
        raise ValueError(
            f"model: L ||A||_inf = {(L * A).item():.4g}, expected below 1; keep A in InfNormBall."
        )
    return B * L / (1 - L * A)


def _over(g: Tensor, box: Box) -> Tensor:
    """min of g'x over a box.  # (m, k, n)"""
    middle, half = (box[0] + box[1]) / 2, (box[1] - box[0]) / 2
    return (g @ middle[..., None] - g.abs() @ half[..., None])[..., 0]


def _least(h: Tensor, ball: tuple[Tensor, Tensor], norm: "str | int") -> Tensor:
    """min of h'u over the ball.  # (m, k, p)"""
    if norm == "inf":
        return _over(h, ball)
    return (h @ ball[0][..., None])[..., 0] - ball[1][:, None] * torch.linalg.vector_norm(h, dim=-1)


def _input_term(M: Linear, ball: tuple[Tensor, Tensor], norm: "str | int") -> Box:
    """M u over the ball: middle and half width."""
    if norm == "inf":
        return M.apply((ball[0] + ball[1]) / 2), M.sized((ball[1] - ball[0]) / 2)
    matrix = M.dense()
    if matrix is None:
        raise ValueError("norm: 2-norm balls need the first block as a matrix; take norm='inf'.")
    return M.apply(ball[0]), ball[1][:, None] * torch.linalg.vector_norm(matrix, dim=-1)


def _row(row: Affine, spans: list[tuple[Box, Box]], ball: tuple[Tensor, Tensor], norm: Any) -> Box:
    middle, half = row.bias, torch.zeros_like(row.bias)
    for j, M in row.terms:
        if j == INPUT:
            m, h = _input_term(M, ball, norm)
        else:
            below, above = spans[j][1]
            m, h = M.apply((below + above) / 2), M.sized((above - below) / 2)
        middle, half = middle + m, half + h
    return middle - half, middle + half


def _spans(graph: Graph, ball: tuple[Tensor, Tensor], norm: Any) -> list[tuple[Box, Box]]:
    """(range of s, range of x) of each node."""
    spans: list[tuple[Box, Box]] = []
    for node in graph.nodes:
        low, high = _row(node.row, spans, ball, norm)
        isotone = node.natural is not None and node.natural[0].isotone
        if not (node.increasing or isotone):
            raise ValueError(
                f"model: block {node.name} has an activation that is not monotone, for which the "
                "loss is not written; train with a monotone one such as relu or tanh."
            )
        if node.A is None:
            spans.append(((low, high), (node.phi(low), node.phi(high))))
            continue
        loop = Loop(_detached(node))
        n = node.size
        row = float(loop.size.sum(1).max()) * node.lipschitz
        if row >= 1 and loop.contraction is None:
            raise ValueError(
                f"model: the loop of {node.name} has ||A||_inf L = {row:.4g} and no weights in which "
                "it contracts, so that it has no interval bound; use InfNormBall or PerronFrobenius."
            )
        x = doubled_equilibrium(node.A, low, high, loop.equation(), "auto")
        below, above = x[:, :n], x[:, n:]
        middle = (below + above) / 2 @ node.A.mT
        half = (above - below) / 2 @ node.A.abs().mT
        spans.append(((low + middle - half, high + middle + half), (below, above)))
    return spans


def _detached(node: Node) -> Node:
    return replace(node, A=node.A.detach().double())


def _crown(
    graph: Graph, spans: list[tuple[Box, Box]], ball: tuple[Tensor, Tensor], norm: Any,
    start: dict[int, Tensor], total: Tensor,
) -> Tensor:  # fmt: skip
    """The backward pass of `bounds(method="crown")`, recorded."""
    messages = dict(start)
    for k in reversed(range(len(graph.nodes))):
        if k not in messages:
            continue
        node, g = graph.nodes[k], messages.pop(k)
        (low, high), (below, above) = spans[k]
        al, p, be, q = _lines(node, low, high, below, above)
        lam = g
        if node.A is not None:
            A = node.A

            def sigma(
                w: Tensor, g: Tensor = g, A: Tensor = A, al: Tensor = al, be: Tensor = be
            ) -> Tensor:
                lam = g + w @ A
                return torch.where(lam > 0, al, be) * lam

            with torch.no_grad():
                w = torch.zeros_like(g)
                for _ in range(200):
                    new = sigma(w)
                    done = bool((new - w).abs().amax() <= 1e-6 * (1e-30 + g.abs().amax()))
                    w = new
                    if done:
                        break
            w = attach(sigma, w) if torch.is_grad_enabled() else w
            lam = g + w @ A
        positive, negative = lam.clamp(min=0.0), lam.clamp(max=0.0)
        total = total + (positive * p).sum(-1) + (negative * q).sum(-1)
        w = al * positive + be * negative
        total = total + w @ node.row.bias
        for j, M in node.row.terms:
            h = M.transpose(w)
            messages[j] = messages[j] + h if j in messages else h
    if INPUT in messages:
        total = total + _least(messages[INPUT], ball, norm)
    return total


def _lines(
    node: Node, low: Tensor, high: Tensor, below: Tensor, above: Tensor
) -> tuple[Tensor, ...]:
    """Slopes and offsets of the two lines, (m, 1, n) each; differentiable in the range."""
    if not node.entrywise or not all(phi.homogeneous for phi, _ in node.parts):
        # The band between the ends of a monotone phi, by constants.
        zero = torch.zeros_like(below)
        return zero[:, None], below[:, None], zero[:, None], above[:, None]
    a = node.phi(torch.ones_like(low[:1])).detach()
    b = -node.phi(-torch.ones_like(low[:1])).detach()
    unstable = (low < 0) & (high > 0)
    width = torch.where(unstable, high - low, torch.ones_like(low))
    slope = torch.where(low >= 0, a, b)
    chord = torch.where(unstable, (a * high - b * low) / width, slope)
    offset = torch.where(unstable, (a - chord) * high, torch.zeros_like(low))
    near = torch.where(unstable, torch.where(high > -low, a, b), slope)
    zero = torch.zeros_like(low)
    convex = a >= b
    parts = (
        torch.where(convex, near, chord), torch.where(convex, zero, offset),
        torch.where(convex, chord, near), torch.where(convex, offset, zero),
    )  # fmt: skip
    return tuple(t[:, None] for t in parts)


# ---- regularisers ----------------------------------------------------------------------------------


def sensitivity_penalty(model: Any) -> Tensor:
    """max_i sum_j S_ij, S = |C| (I - L |A|)^-1 L |B| + |D|: how far any output can move for inputs
    that move by 1, differentiable.

    Args:
        model: a layer or model of one loop, or without loops.

    Raises:
        ValueError: L |A| has no Perron root below 1.
    """
    graph = graph_of(model, dtype=_dtype(model), detach=False)
    moves: list[Tensor] = []
    one = graph.example.new_ones(1, graph.inputs)

    def through(row: Affine) -> Tensor:
        total = graph.example.new_zeros(1, row.rows)
        for j, M in row.terms:
            total = total + M.sized(one if j == INPUT else moves[j])
        return total

    for node in graph.nodes:
        load = node.lipschitz * through(node.row)
        if not node.entrywise:
            load = load.amax(-1, keepdim=True).expand(-1, node.size)
        if node.A is not None:
            if Loop(_detached(node)).contraction is None:
                raise ValueError(
                    f"model: the loop of {node.name} has no Perron root L |A| below 1; keep A in "
                    "InfNormBall or PerronFrobenius."
                )
            eye = torch.eye(node.size, dtype=load.dtype, device=load.device)
            load = torch.linalg.solve(eye - node.lipschitz * node.A.abs(), load[0])[None]
        moves.append(load)
    return through(graph.output).amax()


def lipschitz_penalty(model: Any, norm: "str | int" = "inf") -> Tensor:
    """A Lipschitz constant of u -> y, differentiable.

    In the infinity norm ||C|| ||B|| L / (1 - L ||A||) + ||D||; in the 2-norm, for a `MonotoneLayer`,
    ||C|| ||B|| / (1/L - 1 + m) + ||D||, m its margin, which for ReLU is ||C|| ||B|| / m + ||D||.

    Args:
        model: an ImplicitModel of matrices, an ImplicitLayer or a MonotoneLayer.
        norm: "inf" or 2.

    Raises:
        ValueError: L ||A||_inf >= 1, or another layer with norm 2.
    """
    if norm not in NORMS:
        raise unknown_name("norm", norm, map(str, NORMS))
    f = as_model(model)
    gain = _gain(model, f, norm)
    if norm == 2:
        return torch.linalg.matrix_norm(f.C, 2) * gain + torch.linalg.matrix_norm(f.D, 2)
    return f.C.abs().sum(1).amax() * gain + f.D.abs().sum(1).amax()


def _dtype(model: Any) -> torch.dtype:
    return as_model(model).dtype
