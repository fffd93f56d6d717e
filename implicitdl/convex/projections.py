"""Euclidean projections as layers: by formula or by sorting where there is one, else as a program."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._linalg import project_l1, project_second_order_cone, project_simplex
from ..solution import unknown_name
from .layers import QuadraticProgram


def simplex(v: Tensor, *, total: float = 1.0) -> Tensor:
    """The nearest point of {x >= 0, sum x = total}: sparsemax.  # (..., n)

    Reference:
        Duchi, Shalev-Shwartz, Singer, Chandra (2008), figure 1; Martins, Astudillo (2016).
    """
    _positive("total", total)
    return project_simplex(v, total)


def capped_simplex(v: Tensor, *, total: float = 1.0, cap: float = 1.0) -> Tensor:
    """The nearest point of {0 <= x <= cap, sum x = total}: soft choice of total / cap entries.

    x_i = clip(v_i - t, 0, cap) with the t for which they add up; the sum falls with t and is linear
    between the points v_i and v_i - cap.

    Raises:
        ValueError: total > n cap, or a number that is not positive.
    """
    _positive("total", total)
    _positive("cap", cap)
    n = v.shape[-1]
    if total > n * cap:
        raise ValueError(f"total: got {total}, expected at most n cap = {n} * {cap}.")
    with torch.no_grad():
        knots = torch.cat([v, v - cap], -1).sort(-1).values  # (..., 2 n), the sum falls along them
        sums = (v[..., None, :] - knots[..., None]).clamp(0.0, cap).sum(-1)
        # The last knot at which the sum is still enough starts the piece with the solution.
        last = ((sums >= total).sum(-1, keepdim=True) - 1).clamp(0, 2 * n - 1)
        t = knots.gather(-1, last)
        # Just above that knot; compared with the very numbers that the knots are.
        free, full = (v > t) & (v - cap <= t), v - cap > t
    count = free.sum(-1, keepdim=True)
    above = (torch.where(free, v, 0.0).sum(-1, keepdim=True)
             + cap * full.sum(-1, keepdim=True) - total)  # fmt: skip
    level = torch.where(count > 0, above / count.clamp_min(1), t)
    return (v - level).clamp(0.0, cap)


def box(v: Tensor, *, low: "float | Tensor" = 0.0, high: "float | Tensor" = 1.0) -> Tensor:
    """The nearest point of {low <= x <= high}.

    Raises:
        ValueError: low > high somewhere.
    """
    lower, upper = (torch.as_tensor(t, dtype=v.dtype, device=v.device) for t in (low, high))
    if bool((lower > upper).any()):
        raise ValueError(f"low: got {low} above high={high}, expected an interval.")
    return torch.minimum(torch.maximum(v, lower), upper)


def ball(
    v: Tensor, *, radius: float = 1.0, center: "float | Tensor" = 0.0, norm: "str | int" = 2
) -> Tensor:
    """The nearest point of {||x - center|| <= radius}, in the 1-, 2- or infinity norm.

    Raises:
        ValueError: another norm, or a radius that is not positive.
    """
    _positive("radius", radius)
    kinds: dict[Any, Callable[[Tensor], Tensor]] = {
        1: lambda w: project_l1(w, radius),
        2: lambda w: w * (radius / torch.linalg.vector_norm(w, dim=-1, keepdim=True)
                          .clamp_min(torch.finfo(w.dtype).tiny)).clamp(max=1.0),
        "inf": lambda w: w.clamp(-radius, radius),
    }  # fmt: skip
    if norm not in kinds:
        raise unknown_name("norm", norm, map(str, kinds))
    return center + kinds[norm](v - center)


def second_order_cone(v: Tensor) -> Tensor:
    """The nearest point of {||x|| <= t}, with v = (t, x).  # (..., 1 + n)"""
    t, x = project_second_order_cone(v[..., 0], v[..., 1:])
    return torch.cat([t[..., None], x], -1)


def polytope(
    v: Tensor, *, G: Tensor | None = None, h: Tensor | None = None, A: Tensor | None = None,
    b: Tensor | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """The nearest point of {G x <= h, A x = b}, by a quadratic program; see `QuadraticProgram`.

    Args:
        v: # (batch, n) or (n,)
        G, h, A, b: shared or batched, as in `ConeProgram.forward`.
        options: of `QuadraticProgram`.
    """
    eye = torch.eye(v.shape[-1], dtype=v.dtype, device=v.device)
    return QuadraticProgram(**options)(eye, -v, G, h, A, b)


_KINDS: dict[str, Callable[..., Tensor]] = {
    "simplex": simplex,
    "capped-simplex": capped_simplex,
    "box": box,
    "ball": ball,
    "second-order-cone": second_order_cone,
    "polytope": polytope,
}


class Projection(nn.Module):
    """The Euclidean projection onto a convex set, along the last dimension, as a layer.

    Args:
        onto: "simplex", "capped-simplex", "box", "ball", "second-order-cone" or "polytope".
        options: of the function of that name in `implicitdl.convex.projections`.

    Raises:
        ValueError: another set, or an option that it does not have.

    Example:
        >>> import torch
        >>> from implicitdl.convex import Projection
        >>> Projection("simplex")(torch.tensor([0.9, 0.3, -1.0])).round(decimals=4)
        tensor([0.8000, 0.2000, 0.0000])
    """

    def __init__(self, onto: str, **options: Any):
        super().__init__()
        if onto not in _KINDS:
            raise unknown_name("onto", onto, _KINDS)
        known = inspect.signature(_KINDS[onto]).parameters
        extra = [name for name in options if name not in known or name == "v"]
        if extra and "options" not in known:
            raise unknown_name("option", extra[0], [name for name in known if name != "v"])
        self.onto, self.options = onto, options

    def forward(self, v: Tensor) -> Tensor:
        """The nearest point.  # (..., n) -> (..., n)

        In float64: large entries that nearly agree, and squares of large ones, lose nothing.
        """
        if self.onto == "polytope" or not v.is_floating_point():
            return _KINDS[self.onto](v, **self.options)
        options = {
            k: t.to(torch.float64) if isinstance(t, Tensor) and t.is_floating_point() else t
            for k, t in self.options.items()
        }
        return _KINDS[self.onto](v.to(torch.float64), **options).to(v.dtype)

    def extra_repr(self) -> str:
        """The set."""
        return repr(self.onto)


def _positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: got {value}, expected a positive finite number.")
