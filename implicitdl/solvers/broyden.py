"""Broyden's method with a fixed memory."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._loop import FixedPointSolver, Map


@dataclass(frozen=True, kw_only=True)
class Broyden(FixedPointSolver):
    """Limited-memory Broyden, "good" update, for g(z) = f(z) - z = 0.

    With H the inverse Jacobian, s the last step and w = H g at the new iterate,

        z+ = z - t w,   t = s^T s / (s^T s + s^T w),   H+ = H - w (H^T s)^T / (s^T s + s^T w),

    from H = -I, which makes the first step a Picard step. After `memory` updates H starts again
    from -I, so memory does not grow with `max_steps`. An update whose denominator is not safely
    away from zero is left out, and a step that raised the residual beyond `growth` times the best
    is undone: f at the best iterate is taken, and that sample's updates are forgotten.

    Args:
        memory: updates kept before a restart.
        growth: tolerated growth of the residual over the best so far.

    Reference: Broyden (1965); Kelley (1995), sections 7.1 and 7.3.
    """

    memory: int = 8
    growth: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.memory, int) and self.memory >= 1):
            raise ValueError(f"Broyden: memory={self.memory!r}, expected an integer >= 1.")
        if not self.growth >= 1:
            raise ValueError(f"Broyden: growth={self.growth}, expected growth >= 1.")

    def init(self, f: Map, z: Tensor, fz: Tensor) -> Any:
        """No updates, and no last step."""
        U = z.new_empty(self.memory, *z.shape)
        best = torch.linalg.vector_norm(fz - z, dim=1, keepdim=True)
        return 0, U, torch.empty_like(U), torch.zeros_like(z), fz, best

    def step(self, f: Map, z: Tensor, fz: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        """The step, and the update of H for the next one."""
        count, U, V, s, f_best, best = state
        used = count % self.memory
        g = fz - z
        norm = torch.linalg.vector_norm(g, dim=1, keepdim=True)
        # Negated, so that a NaN goes back too.
        back = ~(norm <= best * self.growth)
        w = _apply(U[:used], V[:used], g)
        ss, sw = torch.linalg.vecdot(s, s)[:, None], torch.linalg.vecdot(s, w)[:, None]
        total = ss + sw
        safe = total.abs() > 1e-3 * ss  # false where there was no step
        inverse = torch.where(safe, total.reciprocal(), 0.0)
        step = w * torch.where(safe, -ss * inverse, -1.0)
        torch.mul(w, -inverse, out=U[used])
        V[used] = _apply(V[:used], U[:used], s)  # H^T s
        if bool(back.any()):
            for history in (U, V):
                history[: used + 1].masked_fill_(back, 0.0)
            z_next = torch.where(back, f_best, z + step)
            s = torch.where(back, 0.0, step)
        else:
            z_next, s = z + step, step
        f_best = torch.where(norm < best, fz, f_best)
        best = torch.fmin(norm, best)
        return z_next, f(z_next), (count + 1, U, V, s, f_best, best)


def _apply(U: Tensor, V: Tensor, g: Tensor) -> Tensor:
    """(-I + sum_i u_i v_i^T) g for every row; U, V are (used, m, n)."""
    if not U.shape[0]:
        return -g
    weights = torch.bmm(g[:, None], V.permute(1, 2, 0))
    return torch.baddbmm(g[:, None], weights, U.permute(1, 0, 2), beta=-1)[:, 0]
