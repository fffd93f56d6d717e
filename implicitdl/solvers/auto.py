"""Choosing a solver by what is known of the map."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..maps import AffineMap
from ._loop import FixedPointSolver, Map
from .anderson import Anderson
from .newton import Newton
from .picard import Picard
from .splittings import PeacemanRachford


@dataclass(frozen=True, kw_only=True)
class Auto(FixedPointSolver):
    """Chooses by declared facts, says in `stats["reason"]` why, and changes over when stuck.

    - A strictly triangular: Picard, exact after at most n steps.
    - a certified contraction factor up to 0.6: Picard; acceleration would cost more than it saves.
    - strongly monotone, slopes in [0, 1], a batch large enough to pay for one inverse:
      Peaceman-Rachford.
    - a single small system: Newton with LU.
    - else Anderson, with a longer memory where no contraction is certified.
    A solver that has used up its budget hands the unfinished samples to the next: Anderson, then
    Newton, until `max_steps`.
    """

    def choose(self, f: Map, samples: int, states: int) -> tuple[list[tuple[Any, float]], str]:
        """The solvers to try, each with the evaluations it may spend, and the reason."""
        common: dict[str, Any] = {"rtol": self.rtol, "atol": self.atol, "max_steps": self.max_steps}
        anderson, newton = Anderson(memory=6, **common), Newton(**common)
        rest = [(anderson, 200), (newton, math.inf)]
        kappa = f.contraction
        if not isinstance(f, AffineMap):
            if kappa is not None and kappa <= 0.6:
                return [(Picard(**common), 60), *rest], f"certified contraction {kappa:.3g}"
            return rest, "a general map, nothing certified"
        if f.acyclic:
            return [(Picard(**common), states + 1), *rest], "A is strictly triangular"
        if kappa is not None and kappa <= 0.6:
            return [(Picard(**common), 60), *rest], f"certified contraction {kappa:.3g}"
        if samples == 1 and states <= 128:
            return [(newton, 40), *rest], f"one sample of {states} states: LU is cheapest"
        if kappa is not None:
            return [
                (Anderson(memory=3, **common), 200),
                *rest,
            ], f"certified contraction {kappa:.3g}"
        prox = f.phi.monotone and f.phi.nonexpansive and f.A.dim() == 2
        if f.monotone is not None and prox and states <= 8 * samples:
            reason = (
                f"strongly monotone, m = {f.monotone:.3g}; {samples} samples pay for an inverse"
            )
            return [(PeacemanRachford(**common), 200), *rest], reason
        if f.monotone is not None:
            return rest, f"strongly monotone, m = {f.monotone:.3g}"
        return rest, "nothing certified"

    def init(self, f: Map, z: Tensor, fz: Tensor) -> Any:
        """The plan, and the state of its first solver."""
        plan, reason = self.choose(f, *z.shape)
        return plan, reason, 0, 0, plan[0][0].init(f, z, fz)

    def step(self, f: Map, z: Tensor, fz: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        """A step of the solver whose turn it is."""
        plan, reason, turn, spent, inner = state
        if spent >= plan[turn][1]:
            turn, spent = turn + 1, 0
            fz = f(z)
            inner = plan[turn][0].init(f, z, fz)
        z, fz, inner = plan[turn][0].step(f, z, fz, inner)
        return z, fz, (plan, reason, turn, spent + 1, inner)

    def exact(self, state: Any) -> bool:
        """As the solver whose turn it is."""
        plan, _, turn, _, inner = state
        return plan[turn][0].exact(inner)

    def look(self, k: int, work: int, state: Any) -> bool:
        """As the solver whose turn it is."""
        plan, _, turn, _, inner = state
        return plan[turn][0].look(k, work, inner)

    def describe(self, state: Any) -> dict[str, Any]:
        """Which solvers ran, and why the first was chosen."""
        plan, reason, turn, _, _ = state
        names = [solver.name for solver, _ in plan[: turn + 1]]
        return {"solver": names[-1], "reason": reason, "tried": tuple(names)}
