"""What every solver owes, whatever it is. A member that passes is done."""

import dataclasses
from collections.abc import Callable

import torch
from problems import Problem, rms
from torch import Tensor

from implicitdl.maps import AffineMap
from implicitdl.solution import Solution, Status
from implicitdl.solvers import (
    Anderson,
    Auto,
    Broyden,
    FixedPointSolver,
    ForwardBackward,
    Newton,
    NewtonPicard,
    PeacemanRachford,
    Picard,
)

RTOL = {torch.float32: 1e-6, torch.float64: 1e-12}


@dataclasses.dataclass(frozen=True)
class Member:
    """A solver, and the problems that its documentation claims."""

    solver: FixedPointSolver
    claims: Callable[[Problem], bool]

    def __str__(self) -> str:
        changed = {
            f.name: getattr(self.solver, f.name)
            for f in dataclasses.fields(self.solver)
            if getattr(self.solver, f.name) != f.default
        }
        return f"{self.solver.name}{changed or ''}"


def _contractive(problem: Problem) -> bool:
    return problem.contractive


def _monotone(problem: Problem) -> bool:
    return problem.monotone_condition > 0


def _monotone_entrywise(problem: Problem) -> bool:
    return _monotone(problem) and problem.f.phi.entrywise


def _well_conditioned(problem: Problem) -> bool:
    """Forward-backward takes some (L/m)^2 steps a digit."""
    return problem.monotone_condition > 0.15 and problem.f.phi.entrywise


def _contractive_affine(problem: Problem) -> bool:
    return _contractive(problem) and isinstance(problem.f, AffineMap) and not problem.acyclic


def _every(problem: Problem) -> bool:
    return True


MEMBERS = [
    Member(Picard(max_steps=3000), _contractive),
    # The average of an acyclic map and the identity is not acyclic: not claimed.
    Member(Picard(damping=0.3, max_steps=3000), lambda p: p.contractive and not p.acyclic),
    Member(Anderson(), _every),
    Member(Anderson(memory=2), _contractive),
    Member(Broyden(), _every),
    Member(Broyden(memory=4), _contractive),
    Member(Newton(), _every),
    Member(Newton(linear="direct"), _every),
    Member(Newton(linear="krylov"), _every),
    Member(NewtonPicard(), _contractive_affine),
    Member(NewtonPicard(inner=1), _contractive_affine),
    Member(ForwardBackward(max_steps=9000), _well_conditioned),
    Member(PeacemanRachford(max_steps=5000), _monotone),
    Member(PeacemanRachford(alpha=0.3, max_steps=5000), _monotone_entrywise),
    Member(Auto(), _every),
]


def check_answer(solution: Solution, problem: Problem, dtype: torch.dtype) -> None:
    """Solved, to the accuracy that was asked for, and described as it is."""
    x = solution.value
    assert x.shape == problem.z0.shape and x.dtype == dtype and not x.requires_grad
    assert solution.status is Status.CONVERGED and bool(solution.converged.all()), solution.statuses
    assert solution.codes.shape == solution.residual.shape == solution.steps.shape == x.shape[:1]
    assert bool((solution.residual < 1).all()) and bool((solution.steps >= 1).all())
    assert int(solution.steps.max()) <= solution.stats["evaluations"]
    eps = torch.finfo(dtype).eps
    size = rms(problem.exact)
    allowed = 10 * problem.constant * ((RTOL[dtype] + 20 * eps) * size + 1e-10)
    error = rms(x.double() - problem.exact)
    assert bool((error <= allowed).all()), (error / allowed).max()


def check_honest(
    solution: Solution, problem: Problem, solver: FixedPointSolver, dtype: torch.dtype
) -> None:
    """The residual that is claimed covers the one that float64 arithmetic finds."""
    x = solution.value
    rtol = solver.rtol if solver.rtol is not None else RTOL[dtype]
    unit = solver.atol + rtol * rms(x.double())
    found = problem.residual(x)
    rounding = 40 * torch.finfo(dtype).eps * (rms(x.double()) + 1)
    if isinstance(problem.f, AffineMap):
        rounding = rounding + 4 * torch.finfo(dtype).eps * rms(problem.f.v.double())
    claimed = solution.residual.double() * unit
    assert bool((found <= 1.05 * claimed + rounding).all()), (found / unit, solution.residual)
    certified = isinstance(problem.f, AffineMap) and problem.f.contraction is not None
    if not certified:  # there the value is one step ahead of the residual
        assert bool(((found - claimed).abs() <= 0.05 * claimed + rounding).all())


def check_solver(member: Member, problem: Problem, dtype: torch.dtype) -> Solution:
    """Everything above, and the recorded trajectory."""
    solution = member.solver.solve(problem.f, problem.z0)
    check_answer(solution, problem, dtype)
    check_honest(solution, problem, member.solver, dtype)
    return solution


def check_trajectory(member: Member, problem: Problem) -> None:
    """One frame an evaluation, from the start to the answer, without changing the answer."""
    plain = member.solver.solve(problem.f, problem.z0)
    solution = member.solver.solve(problem.f, problem.z0, record=True)
    frames = solution.stats["trajectory"]
    assert "trajectory" not in plain.stats
    assert torch.equal(plain.value, solution.value) and torch.equal(plain.steps, solution.steps)
    assert frames.shape == (solution.stats["evaluations"] + 1, *problem.z0.shape)
    assert torch.equal(frames[0], problem.z0) and torch.equal(frames[-1], solution.value)
    # A frame is an iterate, not a copy of a buffer that has moved on.
    error = torch.stack([rms(frame - problem.exact) for frame in frames])
    assert bool((error[-1] <= error[0] + 1e-12).all()) and error.unique().numel() > 3


def poisoned(problem: Problem, sample: int, value: float) -> tuple[AffineMap | Callable, Tensor]:
    """The same problem with one sample's data replaced."""
    f = problem.f
    if isinstance(f, AffineMap):
        v = f.v.clone()
        v[sample] = value
        return dataclasses.replace(f, v=v), problem.z0

    def ill(z: Tensor) -> Tensor:
        out = f(z).clone()
        out[sample] = out[sample] * 0 + value
        return out

    return ill, problem.z0
