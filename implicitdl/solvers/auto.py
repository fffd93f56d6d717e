"""Choosing a solver by what is known of the map."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..maps import AffineMap
from ._loop import FixedPointSolver, Map
from .anderson import Anderson
from .broyden import Broyden
from .newton import Newton
from .picard import Picard
from .splittings import PeacemanRachford


@dataclass(frozen=True, kw_only=True)
class Auto(FixedPointSolver):
    """Chooses by declared facts, says in `stats["reason"]` why, and changes over when stuck.

    - A strictly triangular: Picard, exact after at most n steps.
    - a certified contraction whose rate (the certificate's, or for a small map an estimate of
      ||A||_2 times the largest slope) is at most 0.6: Picard, where one product is cheap beside
      the arithmetic of an acceleration.
    - a small system (n <= 32, or 128 for one sample): Newton with LU.
    - strongly monotone, slopes in [0, 1], a prox in closed form, a batch large enough to pay for
      one inverse:
      Peaceman-Rachford.
    - any other certified contraction: Broyden; anything else: Anderson.
    A solver that has used up its budget hands the unfinished samples to the next: Anderson, then
    Newton, until `max_steps`.
    """

    reuses = True
    # Multiply-adds of one evaluation below which the bookkeeping of an acceleration costs more.
    CHEAP = 1 << 24
    # Of factorising the whole batch, below which a Newton step by LU is cheaper than several others.
    SMALL = 1 << 18  # m n^3

    def choose(self, f: Map, samples: int, states: int) -> tuple[list[tuple[Any, float]], str]:
        """The solvers to try, each with the evaluations it may spend, and the reason."""
        common: dict[str, Any] = {
            "rtol": self.rtol, "atol": self.atol, "max_steps": self.max_steps
        }  # fmt: skip
        picard, anderson = Picard(**common), Anderson(**common)
        rest = [(anderson, 200), (Newton(**common), math.inf)]
        kappa, work = f.contraction, samples * states**2
        affine = isinstance(f, AffineMap)
        if f.acyclic:
            return [(picard, states + 1), *rest], "A is strictly triangular"
        if kappa is not None and work <= self.CHEAP:
            rate = kappa
            if isinstance(f, AffineMap) and kappa > 0.6 and samples > 1:
                rate = min(rate, _estimate(f))
            if rate <= 0.6:
                return [(picard, 60), *rest], f"a contraction of rate about {rate:.2g}, cheap steps"
        if affine and states <= (128 if samples == 1 else 32) and samples * states**3 <= self.SMALL:
            return [(Newton(**common), 40), *rest], "a small system: LU is cheapest"
        if kappa is not None:
            plan = [(Broyden(**common), 200), *rest]
            return plan, f"a certified contraction of factor {kappa:.3g}"
        if f.monotone is None:
            return rest, "nothing certified"
        reason = f"strongly monotone, m = {f.monotone:.3g}"
        prox = f.phi.cheap_prox and f.phi.monotone and f.phi.nonexpansive and f.A.dim() == 2
        if prox and states <= 8 * samples:
            plan = [(PeacemanRachford(**common), 200), *rest]
            return plan, f"{reason}; {samples} samples pay for an inverse"
        return rest, reason

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


def _estimate(f: AffineMap) -> float:
    """||A||_2 times the largest slope, from below, by four steps of the power method."""
    A = f.A if f.A.dim() == 2 else f.A[0]
    w = torch.ones(A.shape[0], 1, dtype=A.dtype, device=A.device)
    w[1::2] = 0.5  # not orthogonal to the leading vector of a row-symmetric A
    for _ in range(4):
        w = A.mT @ (A @ w)
        w = w / torch.linalg.vector_norm(w).clamp_min(torch.finfo(A.dtype).tiny)
    return float(torch.linalg.vector_norm(A @ w)) * f.phi.lipschitz
