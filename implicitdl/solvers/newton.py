"""Semismooth Newton: few steps, each a linear system."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._krylov import gcr
from ._loop import FixedPointSolver, Map


@dataclass(frozen=True, kw_only=True)
class Newton(FixedPointSolver):
    """Semismooth Newton: z+ = z + t (I - J)^-1 (f(z) - z), J an element of Clarke's Jacobian.

    For piecewise linear maps (ReLU, leaky ReLU, hard tanh) it ends once the active set is right.
    The system is solved by LU where it is small, else by a Krylov method to the relative accuracy
    `forcing`. A step that does not lower the residual is halved, five times at most, then a damped
    Picard step is taken instead.

    Args:
        linear: `"auto"`, `"direct"` or `"krylov"`.
        forcing: relative residual asked of the Krylov method.
        krylov_steps: its products at most, for each Newton step.

    Reference: Qi, Sun (1993); Dembo, Eisenstat, Steihaug (1982) for the inexact step.
    """

    linear: str = "auto"
    forcing: float = 1e-2
    krylov_steps: int = 100

    # Batched LU on the CPU may hang beyond some 150 rows once the number of threads was set, and
    # is slow well below that; one matrix at a time has no such trouble.
    _BATCHED = 128
    _SMALL = 1 << 21

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.linear not in ("auto", "direct", "krylov"):
            raise ValueError(
                f"Newton: linear={self.linear!r}, expected 'auto', 'direct' or 'krylov'."
            )
        if not 0 < self.forcing < 1:
            raise ValueError(f"Newton: forcing={self.forcing}, expected 0 < forcing < 1.")

    def init(self, f: Map, z: Tensor, fz: Tensor) -> Any:
        """The first iterate is accepted whatever its residual."""
        accept_any = z.new_full((z.shape[0], 1), torch.inf)
        return z, fz, torch.zeros_like(z), accept_any, torch.ones_like(accept_any)

    def step(self, f: Map, z: Tensor, fz: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        """Accept or halve, and a new direction where accepted."""
        base, f_base, direction, kept, t = state
        r = fz - z
        norm = torch.linalg.vector_norm(r, dim=1, keepdim=True)
        accept = norm <= (1 - 1e-3 * t) * kept
        give_up = ~accept & (t < 1 / 16)
        base, f_base = torch.where(accept, z, base), torch.where(accept, fz, f_base)
        kept = torch.where(accept, norm, kept)
        if bool(accept.any()):
            fresh = self._direction(f, z, r)
            direction = torch.where(accept, fresh, direction)
        t = torch.where(accept, 1.0, t / 2)
        z_next = base + t * direction
        # A halfway Picard step always moves on, and whatever it finds is the new base.
        z_next = torch.where(give_up, torch.lerp(base, f_base, 0.5), z_next)
        kept = torch.where(give_up, torch.inf, kept)
        t = torch.where(give_up, 1.0, t)
        return z_next, f(z_next), (base, f_base, direction, kept, t)

    def _direction(self, f: Map, z: Tensor, r: Tensor) -> Tensor:
        """(I - J)^-1 r, or r itself (a Picard step) for a sample where that fails."""
        m, n = z.shape
        jacobian = f.linearize(z)
        direct = self.linear == "direct"
        if self.linear == "auto":
            direct = m * n**3 <= self._SMALL and (m == 1 or n <= self._BATCHED)
        if direct:
            system = torch.eye(n, dtype=z.dtype, device=z.device) - jacobian.dense()
            parts = [slice(i, i + 1) for i in range(m)] if n > self._BATCHED else [slice(None)]
            solved = [torch.linalg.solve_ex(system[i], r[i, :, None])[0] for i in parts]
            d = torch.cat(solved)[..., 0]
        else:
            r = torch.where(torch.isfinite(r).all(dim=1, keepdim=True), r, 0.0)
            d, _ = gcr(
                lambda w: w - jacobian.jvp(w), r, rtol=self.forcing, max_steps=self.krylov_steps
            )
        return torch.where(torch.isfinite(d).all(dim=1, keepdim=True), d, r)
