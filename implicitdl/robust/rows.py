"""Rows of linear constraints, random or uncertain: their data, and their robust counterparts."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import UncertaintySet
from .combined import Image, Sum
from .conic import Conic, stacked


@dataclass(frozen=True, eq=False)
class Data:
    """What the data of a program turn out to be.

    Attributes:
        c: # (..., n)
        A: # (..., m, n)
        b: # (..., m)
    """

    c: Tensor
    A: Tensor
    b: Tensor

    def violation(self, x: Tensor) -> Tensor:
        """A x - b: what is above 0 is violated.  # (..., n) -> (..., m)"""
        return (self.A @ x[..., None])[..., 0] - self.b


def counterpart(U: UncertaintySet, A: Tensor, b: Tensor, n: int) -> Conic:
    """{x : h_i(v) <= b_i - a_i'x} with v = x or (x, -1); A may have one column more than x."""
    k, m = U.dimension, b.shape[-1]
    v = torch.eye(k, A.shape[-1], dtype=A.dtype, device=A.device)
    shift = A.new_zeros(k)
    if k == n + 1:
        v[n] = 0.0
        shift[n] = -1.0
    return U.counterpart(m).to(A.dtype).pulled(stacked([v, -A], -2), stacked([shift, b], -1))


def columns(A: Tensor, extra: Tensor | None, times: float = 1.0) -> Tensor:
    """A, or (A, times * extra)."""
    if extra is None:
        return A
    rows = times * extra if extra.shape[-1:] == A.shape[-2:-1] else A.new_zeros(A.shape[-2])
    rows = rows[..., None]
    lead = torch.broadcast_shapes(A.shape[:-2], rows.shape[:-2])
    return torch.cat([A.expand(*lead, *A.shape[-2:]), rows.expand(*lead, *rows.shape[-2:])], -1)


def total(sets: list[UncertaintySet], n: int) -> UncertaintySet | None:
    """Their sum, of dimension n + 1 where one is."""
    if not sets:
        return None
    if len({U.dimension for U in sets}) > 1:
        eye = torch.eye(n + 1, n, dtype=sets[0].dtype, device=sets[0].device)
        sets = [U if U.dimension == n + 1 else Image(of=U, matrix=eye) for U in sets]
    return sets[0] if len(sets) == 1 else Sum(parts=tuple(sets))


def lifted(x: Tensor) -> Tensor:
    """(x, -1), which (a_i, b_i) is multiplied by."""
    return torch.nn.functional.pad(x, (0, 1), value=-1.0)
