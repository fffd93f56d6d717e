"""Anderson acceleration, safeguarded."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._loop import FixedPointSolver, Map


@dataclass(frozen=True, kw_only=True)
class Anderson(FixedPointSolver):
    """Anderson acceleration over up to `memory` differences, type II (Walker, Ni 2011).

    z+ = f(z) - dF g  with g = argmin |r - dR g|, r = f(z) - z. On an affine map this is GMRES
    (truncated), so it also solves maps that do not contract. The differences dR are kept
    orthonormal by Gram-Schmidt, with dF transformed alike, so there is no normal matrix to square
    the conditioning and no small system to be singular: a sample that is done early (dR = 0), or
    whose new difference lies in the span of the old ones up to rounding, adds a zero column and
    goes on with the rest. When the memory is full it starts again from the newest difference:
    older ones belong to another active set.

    Safeguard: a step is undone, and f at the best iterate taken instead, where the residual exceeds
    `growth` times the best so far, or, where f is a certified contraction of factor kappa, where it
    is worse than the best so far and than what Picard guarantees by then,
    `growth` kappa^k |r_0|. So acceleration never does worse than Picard by more than a constant.

    Args:
        memory: differences kept, at most a few dozen.
        growth: tolerated growth of the residual over the reference above.
    """

    memory: int = 8
    growth: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.memory, int) and self.memory >= 1):
            raise ValueError(f"Anderson: memory={self.memory!r}, expected an integer >= 1.")
        if not self.growth >= 1:
            raise ValueError(f"Anderson: growth={self.growth}, expected growth >= 1.")

    def init(self, f: Map, z: Tensor, fz: Tensor) -> Any:
        """No history. Columns [dR | dF] lie side by side, so that one product transforms both."""
        m, n = z.shape
        columns = z.new_empty(self.memory, m, 2 * n)
        r = fz - z
        norm = torch.linalg.vector_norm(r, dim=1, keepdim=True)
        return 0, columns, torch.cat([r, fz], dim=1), fz, norm, norm

    def step(self, f: Map, z: Tensor, fz: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        """Mix, evaluate."""
        count, columns, last, f_best, best, first = state
        if count == 0:  # nothing to mix: a Picard step
            z_next = fz.clone()
            return z_next, f(z_next), (1, columns, last, f_best, best, first)
        n = z.shape[1]
        pair = torch.cat([fz - z, fz], dim=1)
        slot = (count - 1) % self.memory
        used = slot + 1
        self._append(columns[:used], slot, pair - last, n)
        r = pair[:, :n]
        history = columns[:used].permute(1, 0, 2)  # (m, used, 2n)
        weights = torch.bmm(r[:, None], history[:, :, :n].mT)
        z_next = torch.baddbmm(fz[:, None], weights, history[:, :, n:], alpha=-1)[:, 0]
        norm = torch.linalg.vector_norm(r, dim=1, keepdim=True)
        if f.contraction is None:
            bound = best * self.growth
        else:
            bound = torch.maximum(best, first * (self.growth * f.contraction**count))
        # On a NaN the comparison is false, and the sample goes back too.
        z_next = torch.where(norm <= bound, z_next, f_best)
        f_best = torch.where(norm < best, fz, f_best)
        best = torch.fmin(norm, best)
        return z_next, f(z_next), (count + 1, columns, pair, f_best, best, first)

    @staticmethod
    def _append(columns: Tensor, slot: int, new: Tensor, n: int) -> None:
        """Orthonormalise the difference `new` against the columns, and put it in its slot."""
        before = torch.linalg.vector_norm(new[:, :n], dim=1, keepdim=True)
        if columns.shape[0] > 1:
            others = columns if slot != columns.shape[0] - 1 else columns[:-1]
            past = others.permute(1, 0, 2)
            h = torch.bmm(new[:, None, :n], past[:, :, :n].mT)
            new = torch.baddbmm(new[:, None], h, past, alpha=-1)[:, 0]
        after = torch.linalg.vector_norm(new[:, :n], dim=1, keepdim=True)
        # What is left of a difference that lay in the span is rounding, and would be blown up.
        floor = before * (10 * torch.finfo(new.dtype).eps ** 0.5)
        scale = torch.where(after > floor, after.reciprocal(), 0.0)
        torch.mul(new, scale, out=columns[slot])
