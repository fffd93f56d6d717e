"""Cone programs beyond the native solver: diffcp, with every answer checked.

    minimise q'x    subject to    M x + s = r,  s in K

with K of zero, nonnegative, second-order, semidefinite and exponential cones. diffcp, the engine of
cvxpylayers, solves it with Clarabel (or SCS, see below) and differentiates it; it never looks at
Clarabel's status (an infeasible instance returns its certificate as a solution), so the conditions

    M x + s = r,   M'y + q = 0,   q'x + r'y = 0,   s in K,   y in K*

are measured here, and certificates recognised, instance by instance.

Reference: Agrawal, Barratt, Boyd, Busseti, Moursi (2019), "Differentiating through a cone program".
"""

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..implicit import Limit, refuse_transforms
from ..solution import InfeasibleError, Solution, Status
from .canonical import Array, Canonical

# The relative error of the optimality conditions that a solution is held to.
_TOL = 1e-7
# What Clarabel is asked for. On a curved cone the error of x, and of its derivative, is of the order
# of the root of the gap: it goes on until rounding stops it.
_ASKED = 1e-12
# Of a semidefinite cone of this size or more, diffcp (1.1.9 and before) puts the entries of Clarabel's
# slack and dual back in the wrong order, and so differentiates at a wrong point; SCS's stay in place.
_MISPLACED = 4
_ASKED_OF_SCS = 1e-10
# Size of the dense derivative's matrix, past which it is left to an iterative method.
_DENSE = 2500


@dataclass
class _Answer:
    """What came of one instance."""

    x: Array
    y: Array
    s: Array
    code: int
    error: float
    adjoint: Callable[..., Any] | None


class Diffcp:
    """A parametrised cone program, solved by diffcp.

    Args:
        canonical: in diffcp's conventions, with a linear objective.
        on_failure: as in `ConeProgram`.
    """

    def __init__(self, canonical: Canonical, on_failure: str):
        c = canonical
        n, m = c.n, c.rows
        self.n, self.m, self.p, self.on_failure = n, m, c.zero, on_failure
        entries = c.constraints.tocoo()
        used = np.unique(entries.row[entries.data != 0])
        used = used[used < m * n]
        # Entries are numbered down the columns, so `used` is in the order of compressed columns.
        self.indices = (used % max(m, 1)).astype(np.int32)
        self.pointers = np.searchsorted(used, m * np.arange(n + 1)).astype(np.int32)
        at = np.full(m * (n + 1), -1)
        at[used] = np.arange(len(used))
        self.M = c.affine(c.constraints, at, len(used), -1.0)
        at = np.full(m * (n + 1), -1)
        at[m * n :] = np.arange(m)
        self.r = c.affine(c.constraints, at, m)
        self.objective = c.affine(c.objective, np.arange(n + 1), n + 1)
        sizes: dict[str, Any] = {
            "z": c.zero,
            "l": c.nonnegative,
            "q": list(c.second_order),
            "s": list(c.semidefinite),
            "ep": c.exponential,
        }
        self.cones = {key: value for key, value in sizes.items() if value}
        self.settings: dict[str, Any] = {
            "solve_method": "Clarabel",
            "tol_gap_abs": _ASKED,
            "tol_gap_rel": _ASKED,
            "tol_feas": _ASKED,
        }
        if max(c.semidefinite, default=0) >= _MISPLACED:
            self.settings = {
                "solve_method": "SCS",
                "eps_abs": _ASKED_OF_SCS,
                "eps_rel": _ASKED_OF_SCS,
                "max_iters": 50_000,
            }

    def solve(
        self,
        theta: list[Tensor],
        batch: int | None,
        device: torch.device,
        start: Solution | None,
    ) -> tuple[Solution, Tensor]:
        """The Solution, and the constant of the objective; as the native engine's."""
        refuse_transforms("A convex layer that is solved by diffcp")
        rows = batch if batch is not None else 1
        M, r, cost = (f(theta, device) for f in (self.M, self.r, self.objective))
        M, r, cost = (t if t.dim() == 2 else t.expand(rows, -1) for t in (M, r, cost))
        q = cost[:, : self.n]
        wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (M, r, q))
        arrays = [t.detach().cpu().numpy() for t in (M, r, q)]
        answers = self._answers(*arrays, wanted=wanted)

        def stacked(vectors: list[Array], width: int) -> Tensor:
            values = np.stack(vectors) if vectors else np.zeros((0, width))
            return torch.from_numpy(values).to(device)

        codes = torch.tensor([a.code for a in answers], dtype=torch.long, device=device)
        error = torch.tensor([a.error for a in answers], dtype=torch.float64, device=device)
        failed = codes != Status.CONVERGED.code
        certificate = stacked([self._certificate(a) for a in answers], self.n + self.m)
        found = [
            stacked([getattr(a, key) for a in answers], width)
            for key, width in (("x", self.n), ("y", self.m), ("s", self.m))
        ]
        nothing = torch.full((), torch.nan, dtype=torch.float64, device=device)
        found = [torch.where(failed[:, None], nothing, t) for t in found]
        if wanted:
            found = list(_Attached.apply(M, r, q, *found, answers, self))
        x, y, s = found
        stats: dict[str, Any] = {
            "solver": f"diffcp with {self.settings['solve_method']}",
            "objective": (q * x).sum(1),
            "equality_dual": y[:, : self.p],
            "dual": y[:, self.p :],
            "slack": s[:, self.p :],
            "error": error,
            "certificate": certificate,
        }
        offset = cost[:, self.n]
        steps = torch.zeros_like(codes)  # diffcp does not tell
        if batch is None:
            x, codes, error, steps, offset = (t[0] for t in (x, codes, error, steps, offset))
            stats = {k: t[0] if isinstance(t, Tensor) else t for k, t in stats.items()}
        solution = Solution(value=x, codes=codes, residual=error / _TOL, steps=steps, stats=stats)
        if self.on_failure != "nan":
            solution = _checked(solution, self.on_failure)
        return solution, offset

    def _answers(self, M: Array, r: Array, q: Array, *, wanted: bool) -> list[_Answer]:
        """Each instance's answer; one that breaks down does not stop the others."""
        count = len(q)
        workers = max(1, min(count, torch.get_num_threads()))

        def one(i: int) -> _Answer:
            return self._answer(M[i], r[i], q[i], wanted)

        # How accurate an answer is, is measured; a solver's own word on it is not passed on.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Solved/Inaccurate")
            if workers == 1:
                return [one(i) for i in range(count)]
            with ThreadPoolExecutor(workers) as pool:
                return list(pool.map(one, range(count)))

    def matrix(self, values: Array) -> Any:
        """M of these entries, zeros among them kept.  # (m, n), by columns"""
        import scipy.sparse as sp

        # diffcp drops zeros in place: the pattern must be the matrix's own.
        pattern = (values.copy(), self.indices.copy(), self.pointers.copy())
        return sp.csc_matrix(pattern, shape=(self.m, self.n))

    def _answer(self, values: Array, r: Array, q: Array, wanted: bool) -> _Answer:
        import diffcp

        m, n = self.m, self.n
        nothing = _Answer(np.zeros(n), np.zeros(m), np.zeros(m), 0, np.inf, None)
        if not all(np.isfinite(t).all() for t in (values, r, q)):
            nothing.code = Status.NONFINITE.code
            return nothing
        own = (r.copy(), q.copy(), self.cones)
        adjoint = None
        try:
            if wanted:
                mode = "dense" if n + m + 1 <= _DENSE else "lsmr"
                x, y, s, _, adjoint = diffcp.solve_and_derivative(
                    self.matrix(values), *own, mode=mode, **self.settings
                )
            else:
                x, y, s = diffcp.solve_only(self.matrix(values), *own, **self.settings)
        except diffcp.SolverError:  # SCS found a proof, which comes this way only
            found = diffcp.solve_internal(
                self.matrix(values), *own, raise_on_error=False, **self.settings
            )
            x, y, s = (np.nan_to_num(found[key]) for key in "xys")
        except (RuntimeError, ArithmeticError):
            nothing.code = Status.DIVERGED.code
            return nothing
        code, error = self._judge(self.matrix(values), r, q, x, y, s)
        return _Answer(x, y, s, code, error, adjoint if code == Status.CONVERGED.code else None)

    def _judge(self, M: Any, r: Array, q: Array, x: Array, y: Array, s: Array) -> tuple[int, float]:
        """The status code and the error, from the optimality conditions themselves."""
        from diffcp import cones as cone_lib

        if not all(np.isfinite(t).all() for t in (x, y, s)):
            return Status.DIVERGED.code, np.inf

        def size(*vectors: Array) -> float:
            return max((float(np.abs(v).max()) for v in vectors if v.size), default=0.0)

        Mx, back = M @ x, M.T @ y
        cost, bound = float(q @ x), float(r @ y)
        kinds = cone_lib.parse_cone_dict(self.cones)
        inside = (y - cone_lib.pi(y, kinds, dual=True), s - cone_lib.pi(s, kinds))
        error = max(
            size(Mx + s - r) / (1 + size(Mx, s, r)),
            size(back + q) / (1 + size(back, q)),
            abs(cost + bound) / (1 + min(abs(cost), abs(bound))),
            size(*inside) / (1 + size(y, s)),
        )
        if error <= _TOL:
            return Status.CONVERGED.code, error
        # The tolerances of a proof: absolute once it is scaled to r'y = -1, or q'x = -1.
        if bound < 0 and size(back) <= 1e-6 * -bound and size(y) * 1e-6 <= -bound:
            return Status.INFEASIBLE.code, error
        if cost < 0 and size(Mx + s) <= 1e-6 * -cost and size(x) * 1e-6 <= -cost:
            return Status.UNBOUNDED.code, error
        return (Status.STALLED if error < 1e-4 else Status.MAX_STEPS).code, error

    def _certificate(self, a: _Answer) -> Array:
        """(0, y, -z) or (x, 0, s), as the native solver's; NaN where there is none."""
        out = np.full(self.n + self.m, np.nan)
        if a.code == Status.INFEASIBLE.code:
            out = np.concatenate([np.zeros(self.n), a.y[: self.p], -a.y[self.p :]])
        elif a.code == Status.UNBOUNDED.code:
            out = np.concatenate([a.x, np.zeros(self.p), a.s[self.p :]])
        return out / max(float(np.abs(out).max()), np.finfo(float).tiny) if out.size else out


class _Attached(torch.autograd.Function):
    """A solution with diffcp's adjoint as its derivative; differentiated once."""

    @staticmethod
    def forward(
        ctx: Any, M: Tensor, r: Tensor, q: Tensor, x: Tensor, y: Tensor, s: Tensor,
        answers: list[_Answer], engine: Diffcp,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        ctx.answers, ctx.engine = answers, engine
        ctx.save_for_backward(M, r, q)
        return x.clone(), y.clone(), s.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        engine, device = ctx.engine, grads[0].device
        dx, dy, ds = (g.detach().cpu().numpy() for g in grads)
        count, entries = len(ctx.answers), len(engine.indices)
        dM = np.zeros((count, entries))
        dr, dq = np.zeros((count, engine.m)), np.zeros((count, engine.n))
        for i, a in enumerate(ctx.answers):
            if not (dx[i].any() or dy[i].any() or ds[i].any()):
                continue
            if a.adjoint is None:  # what was not solved has no derivative
                dM[i], dr[i], dq[i] = np.nan, np.nan, np.nan
                continue
            gM, dr[i], dq[i] = a.adjoint(dx[i], dy[i], ds[i])
            gM.sort_indices()
            dM[i] = gM.data
        made = [torch.from_numpy(g).to(device) for g in (dM, dr, dq)]
        if torch.is_grad_enabled():  # a derivative of these raises
            made = [Limit.apply(g, t, 0) for g, t in zip(made, ctx.saved_tensors, strict=True)]
        return (*made, None, None, None, None, None)


def _checked(solution: Solution, on_failure: str) -> Solution:
    """Infeasible and unbounded instances have an error of their own."""
    codes = solution.codes.reshape(-1)
    proved = (codes == Status.INFEASIBLE.code) | (codes == Status.UNBOUNDED.code)
    if on_failure == "raise" and bool(proved.any()):
        bad = torch.nonzero(proved).flatten()
        words = [f"{i} {list(Status)[int(codes[i])].name.lower()}" for i in bad.tolist()[:8]]
        raise InfeasibleError(
            f"Of {codes.numel()} programs, {bad.numel()} have no solution (index "
            f"{', '.join(words)}{', ...' if bad.numel() > 8 else ''}): `.certificate` has the proof "
            "of each. on_failure='nan' gives NaN for these instances and leaves the others alone.",
            certificate=solution.stats["certificate"].reshape(codes.numel(), -1)[bad],
            instances=bad,
        )
    return solution.check(on_failure)
