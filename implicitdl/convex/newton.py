"""The derivative of the optimality conditions, solved with: for Newton steps and for gradients.

At w = (x, y, v), with D the derivative of the projection onto K at v,

    J = [ P   A'  -G'(I - D) ]        J' = [ P        A'  G' ]
        [ A   0    0         ]             [ A        0   0  ]
        [ G   0    D         ]             [-(I - D)G  0   D  ]

both come down to H = P + G'(I - D) D^-1 G with the constraints A and those rows of G where D is zero.
An eigenvalue of D below delta is taken for delta, and A x = b is given as much play, which makes H
positive definite; refinement with J itself then leads to the exact solution.
"""

import functools
import warnings

import torch
from torch import Tensor

from ..solution import ConvergenceError, ConvergenceWarning, listed
from .balance import balanced
from .cones import derivative
from .program import Program, cholesky, cholesky_solve, chunks, size_of

# Relative residual at which a solve with J is as good as the data of most problems. A step of
# refinement about squares it, so one that starts below the root of this is not checked: looking at
# what it left takes as long as the step.
_ENOUGH = 1e-12
# Relative residual that is no solution.
_BAD = 1e-4


class KKT:
    """J at w, factorised.

    Args:
        program: without a graph.
        w: (x, y, v).
        L: the factor, where it is known.
    """

    def __init__(self, program: Program, w: Tensor, L: Tensor | None = None):
        self.program = program
        self.x, self.y, self.v = program.split(w)
        self.D = derivative(program.cones, self.v)
        eps = torch.finfo(w.dtype).eps
        self.delta = eps**0.45
        self.inverse = self.D.mapped(lambda e: 1 / e.clamp_min(self.delta))
        self.ratio = self.D.mapped(lambda e: (1 - e) / e.clamp_min(self.delta))
        if L is None:
            H = program.rows[0].normal(self.ratio)
            if program.P is not None:
                H += program.P
            if program.b.shape[1]:
                H += program.gram / self.delta
            L, _ = cholesky(H, 16 * eps)
        self.L = L

    def apply(self, w: Tensor, back: bool) -> Tensor:
        """J w, or J'w."""
        p, (G, A) = self.program, self.program.rows
        x, y, v = p.split(w)
        Gx, Dv = G.times(x), self.D(v)
        if back:
            top, last = p.quadratic(x) + G.back(v), Dv - Gx + self.D(Gx)
        else:
            top, last = p.quadratic(x) + G.back(Dv - v), Gx + Dv
        if not y.shape[1]:
            return torch.cat([top, last], 1)
        return torch.cat([top + A.back(y), A.times(x), last], 1)

    def rough(self, r: Tensor, back: bool = False) -> Tensor:
        """w with J w = r, or J'w = r, but for what delta does to it."""
        p, (G, A) = self.program, self.program.rows
        r1, r2, r3 = p.split(r)
        half = self.inverse(r3) if back else self.ratio(r3)
        rhs = r1 - G.back(half) if back else r1 + G.back(half)
        if r2.shape[1]:
            rhs = rhs + A.back(r2) / self.delta
        x = cholesky_solve(self.L, rhs[:, None])[:, 0]
        y = (A.times(x) - r2) / self.delta if r2.shape[1] else r2
        Gx = G.times(x)
        v = half + self.ratio(Gx) if back else self.inverse(r3 - Gx)
        return torch.cat([x, y, v], 1)

    def solve(self, r: Tensor, back: bool = False, refine: int = 8) -> tuple[Tensor, Tensor]:
        """w with J w = r, or J'w = r, and a bound on the relative residual of each instance."""
        size = size_of(r).clamp_min(torch.finfo(r.dtype).tiny)
        w = self.rough(r, back)
        left, error = self._left(w, r, size, back)
        for _ in range(refine):
            if bool((error < _ENOUGH).all()):
                break
            new = w + self.rough(left, back)
            if bool((error**2 < _ENOUGH).all()):
                return new, error
            rest, e = self._left(new, r, size, back)
            better = e < error
            if not bool(better.any()):
                break
            w, left = (torch.where(better[:, None], a, b) for a, b in ((new, w), (rest, left)))
            error = torch.where(better, e, error)
        return w, error

    def _left(self, w: Tensor, r: Tensor, size: Tensor, back: bool) -> tuple[Tensor, Tensor]:
        """What is left of r, and its size."""
        left = r - self.apply(w, back)
        return left, (size_of(left) / size).nan_to_num(nan=torch.inf)

    def margin(self) -> Tensor:
        """How far v is from where the projection has no derivative, relative to its size: the
        strict-complementarity margin, 0 where the solution is degenerate.  # (batch,)"""
        K = self.program.cones
        parts = [K.linear(self.v).abs()]
        for b in K.blocks(self.v):
            r = torch.linalg.vector_norm(b[..., 1:], dim=-1)
            parts.append(torch.minimum((b[..., 0] - r).abs(), (b[..., 0] + r).abs()))
        gaps = torch.cat(parts, 1)
        if not gaps.shape[1]:
            return gaps.new_ones(gaps.shape[0])
        return gaps.amin(1) / (1 + self.v.abs().amax(1))


class Factors:
    """The factors of J from the last Newton steps, for the gradient.

    They are those at the solution where K has no second-order cone, so that D is zeros and ones, and
    the active rows did not change after.
    """

    def __init__(self, program: Program):
        n, _, M = program.sizes
        self.L = program.q.new_zeros(program.batch, n, n)
        self.line = program.q.new_full((program.batch, M), torch.nan)

    def keep(self, rows: Tensor, kkt: KKT) -> None:
        """These instances' factors."""
        if rows.numel() == self.line.shape[0]:
            self.L, self.line = kkt.L, kkt.D.line
        else:
            self.L, self.line = self.L.clone(), self.line.clone()
            self.L[rows], self.line[rows] = kkt.L, kkt.D.line

    def at(self, program: Program, w: Tensor) -> Tensor | None:
        """The factors at w, if they are those of all instances."""
        same = (program.split(w)[2] > 0).to(w.dtype) == self.line
        return self.L if bool(same.all()) else None


def polished(
    program: Program, w: Tensor, which: Tensor, steps: int, tol: float,
    factors: Factors | None = None, offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The best w of some semismooth Newton steps, and its error; a step may well make the error
    larger before the right rows are found to be active.

    Args:
        program: without a graph.
        w: where to begin.  # (batch, n + p + M)
        which: the instances to work on.  # (batch,) bool
        steps: most factorisations; each serves two steps.
        tol: error at which an instance is done.
        factors: where to put the factors.
        offset: the instances' numbers there.
    """
    R, error = program.judged(w)
    error = torch.where(which, error, torch.inf)
    rows = torch.nonzero(which & (error > tol)).flatten()
    part, here, R, now = program.select(rows), w[rows], R[rows], error[rows]
    for _ in range(steps):
        if not rows.numel():
            break
        kkt = KKT(part, here)
        if factors is not None:
            factors.keep(rows if offset is None else offset[rows], kkt)
        before, here = now, here - kkt.rough(R)
        R, now = part.judged(here)
        # Where the step was a good one, the same factors serve for another.
        if bool(((now < 0.1 * before) & (now > tol)).any()):
            next_ = here - kkt.rough(R)
            R2, e = part.judged(next_)
            better = (now < 0.1 * before) & (e < now)
            here, R = (torch.where(better[:, None], a, b) for a, b in ((next_, here), (R2, R)))
            now = torch.where(better, e, now)
        better = now < error[rows]
        w = w.index_copy(0, rows, torch.where(better[:, None], here, w[rows]))
        error = error.index_copy(0, rows, torch.where(better, now, error[rows]))
        go = torch.nonzero(now > tol).flatten()
        if go.numel() < rows.numel():
            rows, part, here, R, now = rows[go], part.select(go), here[go], R[go], now[go]
    return w, error


class Inverse:
    """J^-1 at a solution, factorised when it is first needed.

    Args:
        program: without a graph.
        w: the solution.
        failed: instances that have none, and so no derivative.  # (batch,) bool
        on_failure: what to do where the equations of the derivative have no solution: "raise", or
            NaN for these instances, with a warning unless it is "nan".
        L: the factors, in the units of `balance`, where they are known.
    """

    def __init__(
        self, program: Program, w: Tensor, failed: Tensor, on_failure: str, L: Tensor | None = None
    ):
        self.program, self.w, self.failed, self.L = program, w.detach(), failed, L
        self.on_failure = on_failure

    @functools.cached_property
    def _parts(self) -> list[tuple[slice, KKT]]:
        """J there, in the units of `balance`, some instances at a time."""
        w, (u, p) = self.w, balanced(self.program)
        if u is not None:
            w = u.into(self.program, w)
        L, self.L = self.L, None
        out = []
        for part in chunks(p):
            some = p if part.stop >= p.batch and not part.start else p.select(part)
            out.append((part, KKT(some, w[part], None if L is None else L[part])))
        return out

    @torch.no_grad()
    def solve(self, r: Tensor, back: bool) -> tuple[Tensor, Tensor]:
        """As `KKT.solve`, in the units of `balance`."""
        found = [kkt.solve(r[part], back) for part, kkt in self._parts]
        return _joined([w for w, _ in found], r), _joined([e for _, e in found], r[:, 0])

    @torch.no_grad()
    def residual(self, r: Tensor) -> Tensor:
        """What a solve with J' leaves of r, relative, in the units of `balance`.  # (batch,)"""
        out = []
        for part, kkt in self._parts:
            left = r[part] - kkt.apply(kkt.solve(r[part], True)[0], True)
            out.append(size_of(left) / size_of(r[part]).clamp_min(torch.finfo(r.dtype).tiny))
        return _joined(out, r[:, 0])

    @torch.no_grad()
    def margin(self) -> Tensor:
        """As `KKT.margin`, in the units of `balance`."""
        return _joined([kkt.margin() for _, kkt in self._parts], self.w[:, 0])

    @torch.no_grad()
    def apply(self, b: Tensor, transposed: bool) -> Tensor:
        """w with J w = b, or J'w = b; NaN where one is asked for that does not exist."""
        hit = bool(self.failed.any())
        rows = self.failed[:, None]
        p, (u, _) = self.program, balanced(self.program)
        r = torch.where(rows, 0.0, b) if hit else b
        if u is None:
            w, error = self.solve(r, transposed)
        else:
            D = derivative(p.cones, p.split(u.into(p, self.w))[2])
            r = u.step(p, D, r) if transposed else u.residual(p, r)
            w, error = self.solve(r, transposed)
            w = u.residual(p, w) if transposed else u.step(p, D, w)
        lost = error > _BAD
        if bool(lost.any()):
            _tell(error, self.on_failure)
            w = torch.where(lost[:, None], torch.nan, w)
        if not hit:
            return w
        return torch.where(rows & (b != 0).any(1, keepdim=True), torch.nan, w)


def _tell(error: Tensor, on_failure: str) -> None:
    """Say which derivatives were not found."""
    if on_failure == "nan":
        return
    bad = torch.nonzero(error > _BAD).flatten().tolist()
    message = (
        f"The derivative of {len(bad)} of {error.numel()} solutions (index {listed(bad)}) was not found: "
        f"relative residual {float(error.amax()):.0e}. They are degenerate or not unique, and what the "
        "loss asks for has no derivative there; `gradient_certificate` names such instances. "
        "LinearProgram(smoothing=) or a positive definite P makes solutions smooth, "
        "on_failure='nan' gives NaN for their gradients alone."
    )
    if on_failure == "raise":
        raise ConvergenceError(message)
    warnings.warn(message, ConvergenceWarning, stacklevel=2)


def _joined(parts: list[Tensor], like: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([like[:0], *parts])
