"""Solving a batch of cone programs, and the Solution that comes of it."""

import functools
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..implicit import attach_root, constant
from ..maps import inside_transform
from ..solution import (
    ConvergenceError,
    ConvergenceWarning,
    InfeasibleError,
    Solution,
    Status,
    _outside,
    check_on_failure,
    listed,
)
from . import interior, transforms
from .balance import balanced
from .newton import Factors, Inverse, polished
from .program import Program, chunks

# Relative error that the first interior-point steps, in float32, go down to, and how many of these
# there are at most.
_FIRST, _MOST_SHORT = 3e-3, 15
# What is solved to `tol`, but by more than this share of it, goes on: near degeneracy Newton's steps
# want to begin nearer, and gradients magnify what they leave.
_FINE = 0.03
# Error of (x, y, s - z) up to which x, y, s and z themselves are believed: s and z in one cone, both of
# them the root of what is left of s'z.
_ALIKE = 1e-4


@dataclass(frozen=True, kw_only=True)
class ConeSolver:
    """A primal-dual interior-point method for a batch, finished by Newton's on the active rows.

    The interior-point method finds which constraints are active; semismooth Newton steps on the
    optimality conditions then lead to rounding. An instance whose previous solution is given starts
    with these steps and needs no more where its active set has not changed. Work is in float64.

    Args:
        tol: relative error of the optimality conditions at which an instance is solved.
        max_steps: most interior-point steps.
        chunk: instances that are worked on together; None for what suits a CPU's cache.
    """

    tol: float = 1e-9
    max_steps: int = 60
    chunk: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.tol <= 1e-3:
            raise ValueError(f"tol: got {self.tol}, expected a number in (0, 1e-3].")
        for name in ("max_steps", "chunk"):
            value = getattr(self, name)
            if not (value is None and name == "chunk") and (type(value) is not int or value < 1):
                raise ValueError(f"{name}: got {value!r}, expected an integer >= 1.")

    def points(self, program: Program, start: Tensor | None = None, keep: bool = False) -> "Found":
        """The solutions of a batch of programs.

        Args:
            program: float64, without a graph.
            start: w of a nearby program, rows of NaN where there is none.
            keep: whether the factors of J are of use later.
        """
        units, scaled = balanced(program)
        if units is None:
            return self._points(program, start, keep)
        first = None if start is None else units.into(program, start)
        found = self._points(scaled, first, keep)
        w = units.out_of(program, found.w)
        solved = found.codes == Status.CONVERGED.code
        # In the old units a residual may weigh more, or less.
        error = torch.where(solved, program.judged(w)[1], found.error)
        codes = torch.where(solved & (error > self.tol), Status.STALLED.code, found.codes)
        found = replace(found, w=_unit(w, codes), error=error, codes=codes)
        again = torch.nonzero(error > self.tol).flatten()
        again = again[~_proof(codes[again])]
        if again.numel():
            other = self._points(program.select(again), None, False)
            better = (other.error < error[again]) | _proof(other.codes)
            take, rows = torch.nonzero(better).flatten(), again[better]
            found.w[rows], found.error[rows] = other.w[take], other.error[take]
            found.codes[rows] = other.codes[take]
            found.steps[again] += other.steps
            found = replace(found, L=None)
        return found

    def _points(self, program: Program, start: Tensor | None, keep: bool) -> "Found":
        parts = []
        for part in chunks(program, self.chunk):
            some = program if part.stop - part.start >= program.batch else program.select(part)
            parts.append(self._chunk(some, None if start is None else start[part], keep))
        if len(parts) == 1:
            return parts[0]
        if not parts:
            w = program.q.new_zeros(0, sum(program.sizes))
            none = torch.zeros(0, dtype=torch.long, device=w.device)
            return Found(w, none, w.new_zeros(0), none, None)
        known = [p.L for p in parts if p.L is not None]
        return Found(
            w=torch.cat([p.w for p in parts]), codes=torch.cat([p.codes for p in parts]),
            error=torch.cat([p.error for p in parts]), steps=torch.cat([p.steps for p in parts]),
            L=torch.cat(known) if len(known) == len(parts) else None,
        )  # fmt: skip

    def _chunk(self, program: Program, start: Tensor | None, keep: bool) -> "Found":
        batch, device = program.batch, program.q.device
        w = program.q.new_zeros(batch, sum(program.sizes))
        error = program.q.new_full((batch,), torch.inf)
        codes = torch.full((batch,), Status.MAX_STEPS.code, device=device)
        steps = torch.zeros(batch, dtype=torch.long, device=device)
        factors = None
        if keep and not program.cones.second_order:
            factors = Factors(program)
        if start is not None:
            near = torch.isfinite(start).all(1)
            w, error = polished(
                program, start.nan_to_num(), near, 4, self.tol * 1e-3, factors
            )  # fmt: skip
            error = torch.where(error <= self.tol, error, torch.inf)
            steps = steps + near
        rows = torch.nonzero(error > self.tol).flatten()
        part = program.select(rows) if rows.numel() < batch else program
        state: interior.State | None = None
        # Near enough for Newton's method at first; closer for those that it does not finish.
        for tol in (_FIRST, 1e-4, 1e-6, self.tol, _FINE * self.tol):
            if not rows.numel():
                break
            state, outcome, took = self._interior(part, tol, state)
            steps = steps.index_add(0, rows, took)
            solved = outcome == interior.SOLVED
            point, e = polished(part, state.point(), solved, 6, self.tol * 1e-3, factors, rows)
            worse = e > self.tol
            if bool(worse.any()):
                # Where s and z both vanish, s - z tells less of them than they do themselves.
                q = interior.quality(part, state)
                take = worse & (q <= self.tol) & (q < e) & solved
                other = _parted(part, state)
                fits = part.judged(other)[1] <= _ALIKE
                point = torch.where((take & fits)[:, None], other, point)
                e = torch.where(take & fits, q, e)
            better = e < error[rows]
            w[rows] = torch.where(better[:, None], point, w[rows])
            error[rows] = torch.where(better, e, error[rows])
            for which, status in ((interior.INFEASIBLE, Status.INFEASIBLE),
                                  (interior.UNBOUNDED, Status.UNBOUNDED)):  # fmt: skip
                hit = rows[outcome == which]
                if hit.numel():
                    codes[hit] = status.code
                    w[hit] = _certificate(state, outcome == which, which)
            more = solved if tol < _FIRST else torch.ones_like(solved)
            go = torch.nonzero((error[rows] > _FINE * self.tol) & more).flatten()
            if not go.numel():
                break
            rows, state, part = rows[go], state.select(go), part.select(go)
        codes[error <= self.tol] = Status.CONVERGED.code
        near = (error > self.tol) & (error < 1e-5) & (codes == Status.MAX_STEPS.code)
        codes[near] = Status.STALLED.code
        return Found(w, codes, error, steps, None if factors is None else factors.at(program, w))

    def _interior(
        self, program: Program, tol: float, state: interior.State | None
    ) -> tuple[interior.State, Tensor, Tensor]:
        """Interior-point steps to an error of tol, the first of them in float32: what they are to
        find is only which rows are active. What float32 does not solve begins anew."""
        if tol < _FIRST:
            return interior.solve(program, tol, 1e-9, self.max_steps, state)
        short = min(self.max_steps, _MOST_SHORT)
        found, outcome, steps = interior.solve(program.to(torch.float32), tol, 0.0, short)
        state = interior.State(found.data.to(torch.float64), found.sizes)
        failed = outcome != interior.SOLVED
        if bool(failed.any()):
            begin = interior.start(program).data
            state = interior.State(torch.where(failed[:, None], begin, state.data), state.sizes)
        return state, outcome, steps


@dataclass(frozen=True, eq=False)
class Found:
    """What comes of a batch.

    Attributes:
        w: (x, y, s - z); of an infeasible instance y and z, of an unbounded one x, are the
            certificate.
        codes: the status of each instance.
        error: relative, of the optimality conditions.
        steps: of the interior-point method.
        L: the factors of J at w, where they are known.
    """

    w: Tensor
    codes: Tensor
    error: Tensor
    steps: Tensor
    L: Tensor | None


def _parted(program: Program, state: interior.State) -> Tensor:
    """(x, y, v) with v = s or -z on a half-line, whichever is the larger, else s - z."""
    s, z = state.s / state.tau, state.z / state.tau
    v, k = s - z, program.cones.nonnegative
    v[:, :k] = torch.where(s[:, :k] >= z[:, :k], s[:, :k], -z[:, :k])
    return torch.cat([state.x / state.tau, state.y / state.tau, v], 1)


def _certificate(state: interior.State, hit: Tensor, which: int) -> Tensor:
    """(x, y, s - z) of the proof, of length one."""
    x, y, v = state.x[hit], state.y[hit], state.s[hit] - state.z[hit]
    if which == interior.INFEASIBLE:
        x, v = torch.zeros_like(x), -state.z[hit]
    else:
        y, v = torch.zeros_like(y), state.s[hit]
    w = torch.cat([x, y, v], 1)
    return w / _length(w)


def _length(w: Tensor) -> Tensor:
    return w.abs().amax(1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)


def _unit(w: Tensor, codes: Tensor) -> Tensor:
    """w, certificates at length one."""
    return torch.where(_proof(codes)[:, None], w / _length(w), w)


def _proof(codes: Tensor) -> Tensor:
    """Where w proves that there is no solution."""
    return (codes == Status.INFEASIBLE.code) | (codes == Status.UNBOUNDED.code)


def solve(
    program: Program,
    solver: ConeSolver,
    *,
    on_failure: str = "raise",
    order: int = 1,
    start: Solution | None = None,
) -> Solution:
    """The Solution of a batch of programs, differentiable in all data.

    See `ConeProgram.solve`.
    """
    if on_failure != "nan":
        check_on_failure(on_failure)
    work, eps = program.to(torch.float64), torch.finfo(program.q.dtype).eps
    if inside_transform():
        if start is not None:
            raise ValueError("start: got one inside a torch.func transform, expected None there.")
        check = functools.partial(_values, solver=solver, eps=eps, on_failure=on_failure)
        work, w, codes, error, steps, found = transforms.root(work, check, order, on_failure)
        extra: dict[str, Any] = {}
    else:
        if start is not None and "point" not in getattr(start, "stats", {}):
            raise TypeError(
                f"start: got {type(start).__name__}, expected the Solution of a convex layer."
            )
        guess = None if start is None else start.stats["point"].to(torch.float64)
        if guess is not None and guess.shape != (program.batch, sum(program.sizes)):
            raise ValueError(
                f"start: got a solution of shape {tuple(guess.shape)}, expected "
                f"{(program.batch, sum(program.sizes))}: one of the same batch and sizes."
            )
        work = _convex(work, eps)
        plain = work.detached()
        best = _found(plain, solver, guess, keep=not constant())
        found, codes, error, steps = best.w, best.codes, best.error, best.steps
        work, w, inverse = _attached(work, plain, best, order, on_failure)
        extra = {"inverse": inverse}
    # What was not solved is NaN at the very end: before, it would be in gradients of shared data.
    failed = codes != Status.CONVERGED.code
    gap = torch.where(failed, torch.nan, 0.0)[:, None].to(w)
    x, y, v = work.split(w)
    s = work.cones.project(v)
    objective = 0.5 * (x * work.quadratic(x)).sum(1) + (work.q * x).sum(1)
    dtype = program.q.dtype
    stats: dict[str, Any] = {
        "solver": "interior point and Newton",
        "objective": (objective + gap[:, 0]).to(dtype),
        "equality_dual": (y + gap).to(dtype),
        "dual": (s - v + gap).to(dtype),
        "slack": (s + gap).to(dtype),
        "error": error,
        "certificate": torch.where(_proof(codes)[:, None], found, torch.nan),
        **extra,
    }
    if extra:
        stats["point"] = (w + gap).detach()
    solution = Solution(
        value=(x + gap).to(dtype),
        codes=codes,
        residual=error / solver.tol,
        steps=steps,
        stats=stats,
    )
    if not inside_transform():  # where `_values` has looked already
        _check(solution, on_failure)
    return solution


def _found(
    program: Program, solver: ConeSolver, guess: Tensor | None = None, keep: bool = False
) -> Found:
    """What the solver makes of a program that may have data that are not finite."""
    sick = ~program.finite()
    hit = bool(sick.any())
    # What is done without a graph takes a fifth less time if torch is told so.
    with torch.inference_mode():
        found = solver.points(program.tamed(sick) if hit else program, guess, keep)
    found = replace(
        found, w=found.w.clone(), codes=found.codes.clone(), error=found.error.clone(),
        steps=found.steps.clone(),
    )  # fmt: skip
    if not hit:
        return found
    return replace(
        found,
        codes=torch.where(sick, Status.NONFINITE.code, found.codes),
        error=torch.where(sick, torch.inf, found.error),
    )


def _convex(program: Program, eps: float) -> Program:
    """The program, eigenvalues of P that rounding made negative set to zero.

    Raises:
        ValueError: an eigenvalue is more negative than that: the conditions that are solved hold at
            maxima and saddle points, too. eps is the rounding of the dtype that P came in.
    """
    if program.P is None:
        return program
    P = program.P.detach().nan_to_num(0.0, 0.0, 0.0)
    n = P.shape[-1]
    P = P.reshape(-1, n, n)
    size = P.abs().amax((-2, -1), keepdim=True)
    tiny = 16 * n * torch.finfo(P.dtype).eps * size + torch.finfo(P.dtype).tiny
    unsure = torch.linalg.cholesky_ex(P + tiny * torch.eye(n, dtype=P.dtype, device=P.device))[1]
    rows = torch.nonzero(unsure).flatten()
    if not rows.numel():
        return program
    values, vectors = torch.linalg.eigh(P[rows])
    bad = values[:, 0] < -16 * n * eps * size[rows, 0, 0]
    if bool(bad.any()):
        which = rows[bad].tolist()[:8]
        where = f"instances {which}" if program.P.dim() == 3 else "the one that all instances share"
        raise ValueError(
            f"P: got {where} with a negative eigenvalue ({float(values[bad, 0].min()):.3g}), expected "
            "positive semidefinite matrices: the program is not convex. L @ L.mT is one for every L."
        )
    near = (vectors * values.clamp_min(0.0)[:, None]) @ vectors.mT
    change = torch.zeros_like(P).index_copy(0, rows, near - P[rows])
    return replace(program, P=program.P + change.view(program.P.shape))


def _attached(
    work: Program, plain: Program, found: Found, order: int, on_failure: str
) -> tuple[Program, Tensor, Inverse]:
    """The program, harmless where it has no solution, and w with its derivatives."""
    failed, w = found.codes != Status.CONVERGED.code, found.w
    if not bool(failed.any()):
        inverse = Inverse(plain, w, failed, on_failure, found.L)
        return work, attach_root(work.residual, w, inverse, order), inverse
    work = work.tamed(failed)
    plain = work.detached()
    inverse = Inverse(plain, torch.where(failed[:, None], plain.trivial(), w), failed, on_failure)
    return work, attach_root(work.residual, inverse.w, inverse, order), inverse


def _values(
    program: Program, solver: ConeSolver, eps: float, on_failure: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a torch.func transform gets, checked where values can be looked at."""
    f = _found(_convex(program, eps), solver)
    _check(
        Solution(
            value=f.w, codes=f.codes, residual=f.error / solver.tol, steps=f.steps,
            stats={"certificate": f.w},
        ),
        on_failure,
    )  # fmt: skip
    return f.w, f.codes, f.error, f.steps


def _check(solution: Solution, on_failure: str) -> None:
    """As `Solution.check`; infeasible and unbounded instances have an error of their own."""
    if on_failure == "nan":
        return
    certificate = solution.stats["certificate"]
    impossible = _proof(solution.codes)
    if on_failure == "raise" and bool(impossible.any()):
        bad = torch.nonzero(impossible).flatten()
        parts = []
        for status in (Status.INFEASIBLE, Status.UNBOUNDED):
            some = torch.nonzero(solution.codes == status.code).flatten().tolist()
            if some:
                parts.append(f"{len(some)} {status.name.lower()} (index {listed(some)})")
        raise InfeasibleError(
            f"Of {solution.codes.numel()} programs, {' and '.join(parts)}: `.certificate` has the "
            "proof of each. on_failure='nan' gives NaN for these instances and leaves the others "
            "alone.",
            certificate=certificate[bad],
            instances=bad,
        )
    if on_failure == "return" or bool(solution.converged.all()):
        return
    bad = torch.nonzero(~solution.converged).flatten()
    names = sorted({s.name for s in solution.statuses if s is not Status.CONVERGED})
    worst = float((solution.residual[bad]).nan_to_num(nan=torch.inf).amax())
    message = (
        f"{bad.numel()} of {solution.codes.numel()} programs were not solved (index {listed(bad.tolist())}; "
        f"{', '.join(names)}): worst error {worst:.2g} times `tol`. NONFINITE is NaN or infinity in "
        "the data (leave out rows without a limit); else the data are near the border of what is "
        "feasible or bounded, or of very different sizes: look at `stats['error']`, loosen "
        "ConeSolver(tol=), or take on_failure='nan'."
    )
    if on_failure == "raise":
        raise ConvergenceError(message, replace(solution, value=solution.value.detach()))
    warnings.warn(message, ConvergenceWarning, stacklevel=_outside())


def gradient_certificate(solution: Solution) -> dict[str, Tensor]:
    """What is known of the derivative of each instance's solution.

    Args:
        solution: of `ConeProgram.solve` and its kind.

    Returns:
        `strict_complementarity`, the distance of s - z from where the projection onto the cone has
        no derivative, relative to its size; `adjoint_residual`, the relative residual of a solve
        with J' for a probe; `degenerate`, whether the first is below 1e-7 or the second above 1e-6:
        the solution is then not differentiable, or not unique, and a gradient is one of several.
    """
    inverse = solution.stats.get("inverse")
    if inverse is None and "program" in solution.stats:  # of a RobustLP and its kind
        return gradient_certificate(solution.stats["program"])
    if inverse is None:
        raise ValueError(
            "solution: got one without the derivative of its conditions, expected one that a convex "
            "layer solved outside of torch.func transforms."
        )
    probe = torch.randn(
        inverse.w.shape, dtype=inverse.w.dtype, generator=torch.Generator().manual_seed(0)
    ).to(inverse.w.device)
    residual = inverse.residual(probe)
    margin = inverse.margin()
    return {
        "strict_complementarity": margin,
        "adjoint_residual": residual,
        "degenerate": (margin < 1e-7) | (residual > 1e-6),
    }
