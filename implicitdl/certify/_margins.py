"""Margins between classes over balls around inputs."""

import math
from typing import Any

import torch
from torch import Tensor

from ..robust import Ball, Box, UncertaintySet
from ._bounds import bounded, context_of, options_of
from ._crown import backward
from ._graph import as_model, known
from ._norms import Query
from ._programs import lp_lower
from ._refine import refined_spans
from ._region import Region


def pair_rows(labels: Tensor, classes: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The rows e_label - e_j of all j but the label, and these j.  # (m, q - 1, q), (m, q - 1)"""
    j = torch.arange(classes - 1, device=labels.device)
    others = j + (j >= labels[:, None])
    eye = torch.eye(classes, dtype=like.dtype, device=like.device)
    return eye[labels][:, None] - eye[others], others


def margins(
    model: Any,
    region: UncertaintySet,
    labels: Tensor,
    method: str = "best",
    *,
    around: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """A lower bound of y_label - y_j over the region for each class j, proved.  # (m, q)

    Each is a bound of the pair's own row c_label - c_j. The entry of the label is infinite. An answer
    is certified where all are above 1e-9.

    Args:
        model, region, method, around, options: as in `bounds`.
        labels: of each sample.  # (m,)

    Raises:
        TypeError, ValueError: as `bounds`; or labels that are no classes of the model, or not one a
            sample.

    Example:
        >>> import torch, implicitdl
        >>> from implicitdl.certify import margins
        >>> from implicitdl.robust import Ball
        >>> layer, u = implicitdl.ImplicitLayer(4, 3, 8), torch.randn(2, 4)
        >>> ball = Ball(radius=0.01, norm="inf", dimension=4)
        >>> margins(layer, ball, torch.tensor([0, 2]), around=u).shape
        torch.Size([2, 3])
    """
    q = as_model(model).outputs
    counts = [len(t) for t in (around,) if isinstance(t, Tensor) and t.dim() == 2]
    counts += [region.lead[0]] if isinstance(region, UncertaintySet) and region.lead else []
    check_labels(labels, q, max(counts, default=1))
    rows, others = pair_rows(labels, q, torch.empty(0, dtype=torch.float64, device=labels.device))
    found = bounded(model, region, around, rows, options_of(method, **options), False).lower
    out = found.new_full((len(labels), q), math.inf)
    return out.scatter(1, others, found)


def ball(
    u: Tensor, radius: "float | Tensor", norm: "str | int", clip: tuple[float, float] | None = None
) -> UncertaintySet:
    """The ball around each row of u; with `clip` and the infinity norm, its part in that range.

    In the 2-norm the range is left out, which makes the set larger and the certificate no less
    sound.
    """
    u = u.detach().double()
    r = torch.as_tensor(radius, dtype=u.dtype, device=u.device).expand(len(u))
    if norm == "inf":
        low, high = u - r[:, None], u + r[:, None]
        if clip is not None:
            low, high = low.clamp(min=clip[0]), high.clamp(max=clip[1])
        return Box(low=low, high=torch.maximum(low, high))
    return Ball(radius=r, norm=norm, centre=u)


def worst_inputs(
    model: Any, u: Tensor, labels: Tensor, radius: "float | Tensor", norm: "str | int", method: str
) -> Tensor:
    """Where the relaxation of y_label - y_j is smallest, for each other j.  # (m, q - 1, p)"""
    with torch.no_grad():
        graph, loops = known(model)
        region = Region.of(ball(u, radius, norm), None, graph)
        context = context_of(graph, loops, region, options_of("crown"))
        spans = refined_spans(context, 1)
        query = Query.of(graph.output, pair_rows(labels, graph.outputs, graph.example)[0])
        if method == "lp":
            return lp_lower(context, spans, query)[1]
        found = backward(context, spans, query.start, query.constant)
        if found.coefficient is None:
            return region.center[:, None].expand(-1, query.constant.shape[-1], -1)
        return region.worst(-found.coefficient)


def check_labels(labels: Tensor, classes: int, samples: int) -> None:
    """Refuse what is not one class of the model for each sample."""
    whole = isinstance(labels, Tensor) and not (
        labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool
    )
    if not whole or tuple(labels.shape) != (samples,):
        got = (
            f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else repr(labels)
        )
        raise ValueError(f"labels: got {got}, expected integers ({samples},), one a sample.")
    if len(labels) and int(labels.min()) < 0:
        raise ValueError(f"labels: got {int(labels.min())}, expected class numbers >= 0.")
    if len(labels) and int(labels.max()) >= classes:
        raise ValueError(
            f"labels: got class {int(labels.max())}, the model has {classes} outputs, 0..{classes - 1}."
        )
