"""The fixed-point iteration itself."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._loop import FixedPointSolver, Map


@dataclass(frozen=True, kw_only=True)
class Picard(FixedPointSolver):
    """z <- (1 - damping) f(z) + damping z. Converges linearly where f is a contraction.

    With 0 < damping < 1 it is the averaged iteration, which also converges for monotone models
    with slopes in [0, 1] (Jafarpour, Davydov, Bullo 2021, theorem 2).
    """

    damping: float = 0.0
    reuses = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.damping < 1:
            raise ValueError(f"Picard: damping={self.damping}, expected 0 <= damping < 1.")

    def init(self, f: Map, z: Tensor, fz: Tensor) -> tuple[Tensor, ...]:
        """Two spare buffers, so that no step allocates (fz may belong to the caller)."""
        return torch.empty_like(fz), torch.empty_like(fz)

    def look(self, k: int, work: int, state: Any) -> bool:
        """Every step where a step is dear; else every fourth, and later every eighth of the way."""
        return work > 1 << 24 or k == 1 or k % max(4, 1 << max(0, k.bit_length() - 4)) == 0

    def step(self, f: Map, z: Tensor, fz: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        """One application; the buffer that z leaves takes the next value."""
        a, b = state
        if self.damping:
            fz = torch.lerp(fz, z, self.damping)
        return fz, f(fz, out=a), (b, a)
