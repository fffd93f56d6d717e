"""Anderson acceleration, safeguarded."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._loop import FixedPointSolver, Map


@dataclass(frozen=True, kw_only=True)
class Anderson(FixedPointSolver):
    """Anderson acceleration over the last `memory` differences, type II (Walker, Ni 2011).

    z+ = f(z) - dF g  with g = argmin |r - dR g|, r = f(z) - z. On an affine map this is GMRES
    (truncated), so it also solves maps that do not contract. The small systems are scaled to unit
    diagonal before they are regularised, so neither the size of the states nor float32 matters,
    and a sample that is done early (dR = 0) takes a plain step instead of dividing by zero.

    Safeguard: a step is undone, and f at the best iterate taken instead, where the residual exceeds
    `growth` times the best so far, or, where f is a certified contraction of factor kappa, where it
    is worse than the best so far and than what Picard guarantees by then,
    `growth` kappa^k |r_0|. So acceleration never does worse than Picard by more than a constant.

    Args:
        memory: differences kept, at most a few dozen.
        growth: tolerated growth of the residual over the reference above.
    """

    memory: int = 5
    growth: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.memory, int) and self.memory >= 1):
            raise ValueError(f"Anderson: memory={self.memory!r}, expected an integer >= 1.")
        if not self.growth >= 1:
            raise ValueError(f"Anderson: growth={self.growth}, expected growth >= 1.")

    def init(self, f: Map, z: Tensor, fz: Tensor) -> Any:
        """Empty history; the last slot of dR is the current residual, so one product gives both
        the Gram matrix and the right-hand side."""
        m, n = z.shape
        dR = z.new_zeros(self.memory + 1, m, n)
        dF = z.new_zeros(self.memory, m, n)
        kept = z.new_full((m, 1), torch.inf)
        return 0, dF, dR, fz, fz, kept, kept

    def step(self, f: Map, z: Tensor, fz: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        """Mix, evaluate."""
        count, dF, dR, f_last, f_kept, kept, first = state
        if count:
            slot = (count - 1) % self.memory
            torch.sub(fz, f_last, out=dF[slot])
            r_last = dR[-1].clone()
            r = torch.sub(fz, z, out=dR[-1])
            torch.sub(r, r_last, out=dR[slot])
        else:
            r = torch.sub(fz, z, out=dR[-1])
        used = min(count, self.memory)
        history = torch.cat([dR[:used], dR[-1:]]) if used < self.memory else dR
        gram = torch.bmm(history.permute(1, 0, 2), history.permute(1, 2, 0))  # (m, used+1, used+1)
        norm = gram[:, -1:, -1]  # |r|^2
        if f.contraction is None:
            bound = self.growth**2 * kept
        else:
            first = norm if count == 0 else first
            bound = torch.maximum(kept, self.growth**2 * f.contraction ** (2 * count) * first)
        # Negated, so that a NaN counts as rejected too and stays in its own row.
        reject = ~(norm <= bound)
        z_next = fz - self._correction(gram, dF[:used]) if used else fz.clone()
        z_next = torch.where(reject, f_kept, z_next)
        better = norm < kept
        f_kept = torch.where(better, fz, f_kept)
        kept = torch.where(better, norm, kept)
        return z_next, f(z_next), (count + 1, dF, dR, fz, f_kept, kept, first)

    @staticmethod
    def _correction(gram: Tensor, dF: Tensor) -> Tensor:
        """dF g, with (dR^T dR + small) g = dR^T r.  # (m, n)"""
        eps = torch.finfo(gram.dtype).eps
        normal, target = gram[:, :-1, :-1], gram[:, :-1, -1:]
        diagonal = normal.diagonal(dim1=1, dim2=2)
        scale = torch.where(diagonal > 0, diagonal.rsqrt(), 0.0)[..., None]
        scaled = scale * normal * scale.mT
        # Rows of zeros (no history there, or an underflow) become rows of the identity.
        shift = torch.where(diagonal > 0, 8 * eps, 1.0)
        scaled = scaled + torch.diag_embed(shift)
        factor, info = torch.linalg.cholesky_ex(scaled)
        weights = torch.cholesky_solve(scale * target, factor) * scale
        usable = (info == 0) & torch.isfinite(weights).all(dim=1)[:, 0]
        weights = torch.where(usable[:, None, None], weights, 0.0)
        return torch.bmm(weights.mT, dF.permute(1, 0, 2))[:, 0]
