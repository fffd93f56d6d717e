"""Choosing a solver by what is known of the map."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..maps import AffineMap
from ._loop import FixedPointSolver, Map
from .anderson import Anderson
from .newton import Newton
from .newton_picard import NewtonPicard
from .picard import Picard
from .splittings import PeacemanRachford


@dataclass(frozen=True, kw_only=True)
class Auto(FixedPointSolver):
    """Chooses by what is declared of the map and by a few products of A with one vector.

    - A strictly triangular: Picard, exact after at most n steps.
    - one A for the batch: the power method tells how fast plain steps converge, and how fast once
      the dominant direction of A is taken out; Picard or NewtonPicard, whichever should take less
      time, if it should take at most `STEPS` steps.
    - strongly monotone, slopes in [0, 1], a prox in closed form, n <= 512 or a batch large enough
      to pay for one inverse: Peaceman-Rachford.
    - a small system (n <= 32, or 128 for one sample): Newton with LU.
    - anything else: Anderson.

    The choice depends on A and on the size of the batch, not on the values in it. A solver that has
    used up its budget hands the unfinished samples, each from the better of its start and its last
    iterate, to the next: Anderson, then Newton, both once more, until `max_steps`. `stats` say which
    solvers ran, and the reason for the first.
    """

    # Most steps that a linear rate, measured on A, may need: beyond, an accelerated method wins.
    STEPS = 14
    # Entries of the state, n <= 128, below which looking for something better takes longer.
    CHEAP = 1 << 13
    # Of factorising the whole batch, below which a Newton step by LU is cheaper than several others.
    SMALL = 1 << 18  # m n^3

    def _make(self, cls: type[FixedPointSolver], **options: Any) -> FixedPointSolver:
        """A solver of that class with the tolerances of this one."""
        return _member(cls, self.rtol, self.atol, self.max_steps, **options)

    def choose(self, f: Map, samples: int, states: int) -> tuple[list[tuple[Any, float]], str]:
        """The solvers to try, each with the evaluations it may spend, and the reason."""
        make = self._make
        anderson, newton = make(Anderson), make(Newton)
        rest: list[tuple[Any, float]] = [(anderson, 120), (newton, 60), (anderson, 120)]
        rest.append((newton, math.inf))
        if f.acyclic:
            return [(make(Picard), states + 1), *rest], "A is strictly triangular"
        kappa, matrix = f.contraction, isinstance(f, AffineMap) and f.A.dim() == 2
        if kappa is not None and kappa <= 0.6 and states <= 128 and samples * states <= self.CHEAP:
            plan = [(make(Picard, rate=kappa), 60), *rest]
            return plan, f"a contraction of factor {kappa:.2g}, cheap steps"
        if matrix and f.monotone is None:
            best, steps, reason = self._linear_rate(f, samples, states)
            if best is not None:
                return [(best, 2 * steps + 6), *rest], reason
        limit = 128 if samples == 1 and f.monotone is None else 32
        if isinstance(f, AffineMap) and states <= limit and samples * states**3 <= self.SMALL:
            return [(newton, 60), *rest], "a small system: LU is cheapest"
        if f.monotone is not None:
            reason = f"strongly monotone, m = {f.monotone:.3g}"
            prox = f.phi.cheap_prox and f.phi.monotone and f.phi.nonexpansive
            if matrix and prox and states <= max(512, 32 * samples):
                return [(make(PeacemanRachford), 100), *rest], f"{reason}; one inverse pays"
            return rest, reason
        if kappa is not None:
            return rest, f"a certified contraction of factor {kappa:.3g}"
        return rest, "nothing certified"

    def _linear_rate(
        self, f: Map, samples: int, states: int
    ) -> tuple[FixedPointSolver | None, float, str]:
        """Picard or NewtonPicard, by the time that they should take, with the steps that they
        should need and the reason; None where both take long."""
        slope, digits = f.phi.lipschitz, math.log(self.tolerance(f.v.dtype))
        entries = samples * states

        def steps(rate: float) -> float:
            return digits / math.log(min(max(rate, 1e-6), 0.999)) + 1

        # A product with one vector reads all of A, as does one with a few: then one such product
        # has to do, and Picard a small budget to prove it right.
        if samples <= (128 if states > 1024 else 8) and steps(f.factors.gain() * slope) <= 8:
            plain = f.factors.gain() * slope
            reason = f"plain steps seem to contract by {plain:.2g}"
            return self._make(Picard, rate=plain), 0.5 * steps(plain) - 1, reason
        found = f.factors.dominant(quick=samples <= 8)
        if steps(found.rest * slope) > 7:  # one step of E on a probe says little of slow directions
            found = f.factors.dominant()
        plain, without = found.rate * slope, found.rest * slope
        if f.contraction is not None:
            plain = min(plain, f.contraction)

        # A step's passes over the batch and calls of an operator, in multiply-adds.
        picard = steps(plain) * (entries * (states + 8) + (1 << 18))
        newton = steps(without) * (entries * (states + 64) + (1 << 20))
        usable = found.spread * slope < 1 and f.phi.entrywise and steps(without) <= self.STEPS
        if steps(plain) <= self.STEPS and not (usable and newton < picard):
            reason = f"plain steps contract by about {plain:.2g}"
            return self._make(Picard, rate=plain), steps(plain), reason
        if not usable:
            return None, 0.0, ""
        reason = f"one direction of A contracts by {plain:.2g}, the others by about {without:.2g}"
        return self._make(NewtonPicard), steps(without), reason

    def begin(self, f: Map, z: Tensor | None) -> tuple[Tensor, Tensor, Any]:
        """The plan, and the start of its first solver."""
        plan, reason = self.choose(f, *(f.v.shape if z is None else z.shape))
        z, fz, inner = plan[0][0].begin(f, z)
        # A copy, since buffers are used again.
        return z, fz, (plan, reason, 0, 0, z if len(plan) == 1 else z.clone(), inner)

    def step(self, f: Map, z: Tensor, fz: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        """A step of the solver whose turn it is."""
        plan, reason, turn, spent, start, inner = state
        if spent >= plan[turn][1]:
            turn, spent = turn + 1, 0
            f_start = f(start)
            better = _residual(z, fz) < _residual(start, f_start)  # False for NaN
            z, fz = torch.where(better, z, start), torch.where(better, fz, f_start)
            z, fz, inner = plan[turn][0].begin(f, z)
        z, fz, inner = plan[turn][0].step(f, z, fz, inner)
        return z, fz, (plan, reason, turn, spent + 1, start, inner)

    def steps(
        self, f: Map, z: Tensor, fz: Tensor, state: Any, most: int, work: int, k: int
    ) -> tuple[Tensor, Tensor, Any, int]:
        """As the solver whose turn it is, within its budget."""
        plan, reason, turn, spent, start, inner = state
        if spent >= plan[turn][1]:
            return *self.step(f, z, fz, state), 1
        most = int(min(most, plan[turn][1] - spent))
        z, fz, inner, taken = plan[turn][0].steps(f, z, fz, inner, most, work, k)
        return z, fz, (plan, reason, turn, spent + taken, start, inner), taken

    def exact(self, state: Any) -> bool:
        """As the solver whose turn it is."""
        plan, _, turn, _, _, inner = state
        return plan[turn][0].exact(inner)

    def look(self, k: int, work: int, state: Any) -> bool:
        """As the solver whose turn it is."""
        plan, _, turn, _, _, inner = state
        return plan[turn][0].look(k, work, inner)

    def overwrites(self, state: Any) -> bool:
        """As the solver whose turn it is."""
        plan, _, turn, _, _, inner = state
        return plan[turn][0].overwrites(inner)

    def describe(self, state: Any) -> dict[str, Any]:
        """Which solvers ran, and why the first was chosen."""
        plan, reason, turn, *_ = state
        names = [solver.name for solver, _ in plan[: turn + 1]]
        return {"solver": names[-1], "reason": reason, "tried": tuple(names)}


@functools.lru_cache(maxsize=256)
def _member(
    cls: type[FixedPointSolver], rtol: float | None, atol: float, max_steps: int, **options: Any
) -> FixedPointSolver:
    return cls(rtol=rtol, atol=atol, max_steps=max_steps, **options)


def _residual(z: Tensor, fz: Tensor) -> Tensor:
    return torch.linalg.vector_norm(fz - z, dim=1, keepdim=True)
