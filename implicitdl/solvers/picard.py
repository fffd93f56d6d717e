"""The fixed-point iteration itself."""

import math
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

    Args:
        damping: weight of the last iterate.
        rate: the factor per step to be expected, if there is an idea of it: where a step is cheap
            beside a look at convergence, the looks begin when it should be reached.
    """

    damping: float = 0.0
    rate: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.damping < 1:
            raise ValueError(f"Picard: damping={self.damping}, expected 0 <= damping < 1.")
        if self.rate is not None and not self.rate >= 0:
            raise ValueError(f"Picard: rate={self.rate}, expected rate >= 0.")

    def begin(self, f: Map, z: Tensor | None) -> tuple[Tensor, Tensor, Any]:
        """Two spare buffers, so that no step allocates (fz may belong to the caller)."""
        cold = z is None
        if cold:
            z = f.start()
        fz = f(z)
        first = 1
        if self.rate is not None and 0 < self.rate < 1:
            first = math.ceil(math.log(self.tolerance(z.dtype)) / math.log(self.rate))
        return z, fz, (torch.empty_like(fz), torch.empty_like(fz), _Schedule(first, cold))

    def overwrites(self, state: Any) -> bool:
        """The two buffers take turns."""
        return True

    def look(self, k: int, work: int, state: Any) -> bool:
        """Every step where a step is dear; else every other step from the one when convergence is
        expected, or, if nothing is expected, every fourth and later every eighth of the way."""
        first, cold = state[2].first, state[2].cold
        if work > 1 << 22:
            return k > 1 or not cold
        if k == 1:
            return not cold
        if first > 1:
            return k >= first and (k - first) % max(2, first // 4) == 0
        return k % max(4, 1 << max(0, k.bit_length() - 4)) == 0

    def describe(self, state: Any) -> dict[str, Any]:
        """With the damping, without which a step is f itself."""
        return {"solver": self.name, "damping": self.damping}

    def steps(
        self, f: Map, z: Tensor, fz: Tensor, state: Any, most: int, work: int, k: int
    ) -> tuple[Tensor, Tensor, Any, int]:
        """Where looks are far between, the steps to the next one without anything else."""
        count = 1
        while count < most and not self.look(k + count, work, state):
            count += 1
        a, b, schedule = state
        for _ in range(count):
            if self.damping:
                fz = torch.lerp(fz, z, self.damping)
            z, fz, a, b = fz, f(fz, out=a), b, a
        return z, fz, (a, b, schedule), count

    def step(self, f: Map, z: Tensor, fz: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        """One application; the buffer that z leaves takes the next value."""
        return self.steps(f, z, fz, state, 1, 0, 0)[:3]


@dataclass(frozen=True)
class _Schedule:
    first: int  # the evaluation at which convergence is expected
    cold: bool  # the start was nobody's guess
