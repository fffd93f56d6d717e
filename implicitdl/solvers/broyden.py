"""Broyden's method with a fixed memory."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._loop import FixedPointSolver, Map


@dataclass(frozen=True, kw_only=True)
class Broyden(FixedPointSolver):
    """Limited-memory Broyden, "good" update, for g(z) = f(z) - z = 0.

    The inverse Jacobian is H = -I + sum u_i v_i^T, with
        u = (dz - H dg) / (dz^T H dg),   v = H^T dz,
    and z+ = z - H g. After `memory` updates H starts again from -I, so memory does not grow with
    `max_steps`. An update whose denominator is not safely away from zero is left out, and growth of
    the residual beyond `growth` goes back to the best iterate and forgets that sample's updates.

    Args:
        memory: updates kept before a restart.
        growth: tolerated growth of the residual in one step.

    Reference: Broyden (1965); Kelley (1995), section 7.3.
    """

    memory: int = 16
    growth: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.memory, int) and self.memory >= 1):
            raise ValueError(f"Broyden: memory={self.memory!r}, expected an integer >= 1.")
        if not self.growth >= 1:
            raise ValueError(f"Broyden: growth={self.growth}, expected growth >= 1.")

    def init(self, f: Map, z: Tensor, fz: Tensor) -> Any:
        """No updates yet: H = -I, a Picard step."""
        U = z.new_zeros(self.memory, *z.shape)
        kept = z.new_full((z.shape[0], 1), torch.inf)
        return 0, U, torch.zeros_like(U), z, fz, fz, kept

    def step(self, f: Map, z: Tensor, fz: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        """Update H by the last step, then take the next."""
        count, U, V, z_last, f_last, f_kept, kept = state
        g = fz - z
        norm = torch.linalg.vecdot(g, g)[:, None]
        reject = ~(norm <= self.growth**2 * kept)
        used = (count - 1) % self.memory if count else 0
        if count:
            if used == 0:
                U.zero_(), V.zero_()
            dz, dg = z - z_last, g - (f_last - z_last)
            Hdg = _apply(U, V, used, dg)
            Hdz = _apply(V, U, used, dz)  # H^T dz
            denominator = torch.linalg.vecdot(dz, Hdg)[:, None]
            size = torch.linalg.vector_norm(dz, dim=1, keepdim=True)
            size = size * torch.linalg.vector_norm(Hdg, dim=1, keepdim=True)
            safe = denominator.abs() > 1e-4 * size  # False where nothing moved
            U[used] = torch.where(safe, (dz - Hdg) / torch.where(safe, denominator, 1.0), 0.0)
            V[used] = torch.where(safe, Hdz, 0.0)
            used += 1
        z_next = torch.where(reject, f_kept, z - _apply(U, V, used, g))
        if bool(reject.any()):
            U.masked_fill_(reject, 0.0), V.masked_fill_(reject, 0.0)
        better = norm < kept
        f_kept = torch.where(better, fz, f_kept)
        kept = torch.where(better, norm, kept)
        return z_next, f(z_next), (count + 1, U, V, z, fz, f_kept, kept)


def _apply(U: Tensor, V: Tensor, used: int, g: Tensor) -> Tensor:
    """(-I + sum_i u_i v_i^T) g for every row."""
    if not used:
        return -g
    weights = torch.bmm(g[:, None], V[:used].permute(1, 2, 0))
    return torch.baddbmm(g[:, None], weights, U[:used].permute(1, 0, 2), beta=-1)[:, 0]
