"""All rows of a state-matching program at once.

Row i of (A B) is found from its own pre-activation alone:

    min_w  1/2 ||z_i - F w||^2 + R(w)   over   sum_j weights_j |w_j| <= radius_i,

with F = (X, U), so that only F'F, F'Z and ||z_i||^2 are ever needed: the samples are gone. One
eigendecomposition of F'F serves every row and every step of the alternating directions; their copy
behind the proximity operator is exactly sparse and exactly inside the ball. Newton's method on the
support (`newton`) then ends at the optimum itself.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .._linalg import project_l1
from ..solution import ConvergenceError
from .newton import finish
from .penalties import Penalty

_RANK = 1e-10  # eigenvalues of F'F below this share of the largest are rounding


@dataclass(frozen=True, kw_only=True, eq=False)
class RowSolution:
    """Rows of (A B), or (C D).

    Attributes:
        W: exactly zero off the support, exactly inside the ball.  # (r, d)
        objective: of each row; of the whole program where its rows are coupled.  # (r,) or ()
        gap: how far it is from the optimum at most, of each row, by a dual feasible point; None
            where the penalty gives none.  # (r,)
        steps: of the alternating directions, and of Newton's method.
    """

    W: Tensor
    objective: Tensor
    gap: Tensor | None
    steps: tuple[int, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class RowProgram:
    """min_W sum_i 1/2 ||z_i - F w_i||^2 + R(W) over rows w_i in balls.

    Args:
        gram: F'F.  # (d, d)
        cross: Z'F.  # (r, d)
        energy: ||z_i||^2.  # (r,)
        weights: of the ball, zero where an entry is free; None for no ball.  # (d,)
        radius: of the ball, at least 0.  # (r,)
        allowed: which entries may be other than zero; None for all.  # (r, d) bool

    Example:
        >>> import torch
        >>> from implicitdl.states import L1, RowProgram
        >>> F, Z = torch.randn(50, 4).double(), torch.randn(50, 2).double()
        >>> program = RowProgram(gram=F.T @ F, cross=Z.T @ F, energy=(Z * Z).sum(0))
        >>> bool(program.solve(L1(weight=1.0)).gap.max() < 1e-8)
        True
    """

    gram: Tensor
    cross: Tensor
    energy: Tensor
    weights: Tensor | None = None
    radius: Tensor | None = None
    allowed: Tensor | None = None

    @functools.cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues, none negative, and eigenvectors of F'F: the one factorisation."""
        values, vectors = torch.linalg.eigh(self.gram)
        return values.clamp_min(0), vectors

    @functools.cached_property
    def padded(self) -> Tensor:
        """F'F with a row and a column of zeros, flat: where supports of several sizes are stacked,
        the last entry stands for those that are not there.  # ((d + 1)^2,)"""
        return torch.nn.functional.pad(self.gram, (0, 1, 0, 1)).reshape(-1)

    def fit(self, W: Tensor) -> Tensor:
        """1/2 ||z_i - F w_i||^2.  # (r, d) -> (r,)"""
        inner = ((W @ self.gram) * W).sum(1) - 2 * (self.cross * W).sum(1)
        return (0.5 * (inner + self.energy)).clamp_min(0)

    def objective(self, W: Tensor, penalty: Penalty) -> Tensor:
        """The fit and the penalty: of each row, or of all where the penalty couples rows."""
        fit = self.fit(W)
        return (fit.sum() if penalty.couples_rows else fit) + penalty.value(W)

    def rows(self, chosen: slice | Tensor) -> "RowProgram":
        """The program of some of the rows, with the same factorisation."""
        new = replace(
            self, cross=self.cross[chosen], energy=self.energy[chosen],
            radius=None if self.radius is None else self.radius[chosen],
            allowed=None if self.allowed is None else self.allowed[chosen],
        )  # fmt: skip
        for name in ("spectrum", "padded"):
            if name in self.__dict__:
                new.__dict__[name] = self.__dict__[name]
        return new

    def within(self, support: Tensor) -> "RowProgram":
        """The program of rows that are zero off a support.  # (r, d) bool"""
        new = replace(self, allowed=support)
        for name in ("spectrum", "padded"):
            if name in self.__dict__:
                new.__dict__[name] = self.__dict__[name]
        return new

    def inside(self, W: Tensor) -> Tensor:
        """The nearest rows in the balls; zeros stay zeros."""
        if self.allowed is not None:
            W = W.masked_fill(~self.allowed, 0.0)
        if self.weights is None or self.radius is None:
            return W
        return project_l1(W, self.radius, self.weights)

    def prox(self, penalty: Penalty, V: Tensor, t: float) -> Tensor:
        """argmin t R(W) + ||W - V||^2 / 2 over the balls, for entrywise penalties."""
        if self.allowed is not None:
            V = V.masked_fill(~self.allowed, 0.0)
        if self.weights is None or self.radius is None:
            return penalty.prox(V, t)
        return penalty.constrained(V, t, self.weights, self.radius)

    def solve(
        self, penalty: Penalty, *, tolerance: float = 1e-9, max_steps: int = 20000
    ) -> RowSolution:
        """The optimum of every row.

        Args:
            penalty: R.
            tolerance: of the gap to the optimum, relative to 1/2 ||z_i||^2.
            max_steps: of the alternating directions, where they are all there is (`Group`).

        Raises:
            ConvergenceError: it was not reached; the message says by which row, and what to do.
        """
        if not penalty.entrywise:
            W, steps = self._split(penalty, 1e-6, max_steps)
            return RowSolution(
                W=W, objective=self.objective(W, penalty), gap=None, steps=(steps, 0)
            )
        if penalty.nothing and self.radius is None and (least := self._least_norm()) is not None:
            return RowSolution(W=least, objective=self.fit(least), gap=None, steps=(0, 0))
        W, steps = self._split(penalty, 1e-3, 120, check=10)
        W, newton, reached = self._finished(penalty, W, tolerance, 60)
        # Signs and supports near a point may lead nowhere: then from others, and for longer.
        for start, most in (("zero", 60), ("split", 300), ("zero", 300)):
            left = (~reached).nonzero().flatten()
            if not len(left):
                break
            some = self.rows(left)
            begin = torch.zeros_like(W[left])
            if start == "split":
                begin, more = some._split(penalty, 1e-7, 3000)
                steps += more
            again, more, good = some._finished(penalty, begin, tolerance, most)
            newton += more
            better = good | (some.objective(again, penalty) < some.objective(W[left], penalty))
            W[left[better]], reached[left[good]] = again[better], True
        gap = self.gap(W, penalty)
        if not bool(reached.all()):
            raise self._stalled(penalty, W, gap, reached, tolerance)
        return RowSolution(
            W=W, objective=self.objective(W, penalty), gap=gap, steps=(steps, newton)
        )

    def _finished(
        self, penalty: Penalty, W: Tensor, tolerance: float, most: int
    ) -> tuple[Tensor, int, Tensor]:
        """Newton's method from W, and which rows are proved to be there."""
        W, steps, reached = finish(self, penalty, W, tolerance, most)
        gap = self.gap(W, penalty)
        if gap is not None:
            reached = gap <= tolerance * self._scale
        return W, steps, reached

    @property
    def _scale(self) -> Tensor:
        return 0.5 * self.energy.clamp_min(torch.finfo(self.energy.dtype).tiny)

    def _stalled(
        self, penalty: Penalty, W: Tensor, gap: Tensor | None, reached: Tensor, tolerance: float
    ) -> ConvergenceError:
        row = int((~reached).nonzero()[0])
        left = "" if gap is None else (
            f" (at most {float(gap[row] / self._scale[row]):.1e} of its energy above the optimum, "
            f"expected {tolerance:.0e})"
        )  # fmt: skip
        return ConvergenceError(
            f"{int((~reached).sum())} of {len(reached)} rows were not solved, row {row} first"
            f"{left}: the recorded states are too nearly dependent for {penalty}; raise its weight."
        )

    def gap(self, W: Tensor, penalty: Penalty) -> Tensor | None:
        """How far the objective is above its minimum at most, for each row.

        A dual point s (z - F w), 0 <= s <= 1, gives the lower bound s z'r - s^2 |r|^2 / 2 - R*(s F'r)
        with the conjugate of R and the ball together, at most theta radius + sum psi*(|F'r| - theta
        weights) for every theta >= 0. For psi that grow like a line s and theta make F'r feasible.
        """
        v = (self.cross - W @ self.gram).abs()
        if self.allowed is not None:
            v = v.masked_fill(~self.allowed, 0.0)
        inner = (self.cross * W).sum(1)
        rr = 2 * self.fit(W)
        zr = self.energy - inner
        theta = torch.zeros_like(rr)
        s = torch.ones_like(rr)
        start = penalty.slope(torch.zeros_like(v))
        line = penalty.conjugate(v) is None
        if line and not bool((start > 0).all()):
            return None
        if self.weights is not None and self.radius is not None:
            bound = self.weights > 0
            over = torch.where(bound, (v - penalty.slope(W.abs())) / self.weights, 0.0)
            on = (W != 0) if not line else torch.ones_like(v, dtype=torch.bool)
            theta = torch.where(on, over, 0.0).amax(1).clamp_min(0)
            v = (v - theta[:, None] * self.weights).clamp_min(0)
        if line:  # what is left over is scaled in
            s = (start / v.clamp_min(torch.finfo(v.dtype).tiny)).amin(1).clamp(max=1.0)
            charge = torch.zeros_like(rr)
        else:
            charge = penalty.conjugate(v).sum(1)  # type: ignore[union-attr]
        if self.radius is not None:
            charge = charge + s * theta * self.radius
        lower = s * zr - 0.5 * s * s * rr - charge
        return (self.objective(W, penalty) - lower).clamp_min(0)

    def _least_norm(self) -> Tensor | None:
        """Least squares, of all solutions the shortest: the same whatever the order of the samples.
        None where the rows may have different supports, or are not bounded below."""
        columns = torch.ones_like(self.gram[0], dtype=torch.bool)
        if self.allowed is not None:
            columns, rows = self.allowed.any(0), self.allowed.any(1)
            if not bool((self.allowed == (rows[:, None] & columns)).all()):
                return None
        values, Q = torch.linalg.eigh(self.gram * columns * columns[:, None])
        live = values > _RANK * values.amax().clamp_min(0)
        part = (self.cross * columns) @ Q
        if bool((part[:, ~live].abs() > 1e-6 * part.norm(dim=1, keepdim=True)).any()):
            return None
        W = (part * torch.where(live, 1 / values.clamp_min(1e-300), 0.0)) @ Q.mT
        return W * columns if self.allowed is None else W * self.allowed

    def _split(
        self, penalty: Penalty, tolerance: float, max_steps: int, check: int = 20
    ) -> tuple[Tensor, int]:
        """Alternating directions: the rows without penalty and ball, then each of these in turn.

        Each proximity operator has a copy V_k of W and a scaled multiplier; with the spectrum of F'F
        the first half step, (F'F + k rho I)^-1, is two products for any rho.

        Reference: Boyd, Parikh, Chu, Peleato and Eckstein 2011, sections 3.3 (stopping), 3.4.1
        (varying rho), 3.4.3 (over-relaxation) and 7.1 (consensus).
        """
        values, Q = self.spectrum
        top = float(values.max()) if values.numel() else 0.0
        if top == 0.0:
            return torch.zeros_like(self.cross), 0
        rho = float(values[values > 1e-8 * top].log().mean().exp())
        proxes: list[Callable[[Tensor, float], Tensor]]
        if penalty.entrywise:
            proxes = [lambda V, t: self.prox(penalty, V, t)]
        else:
            proxes = [penalty.prox]
            if self.radius is not None or self.allowed is not None:
                proxes.append(lambda V, t: self.inside(V))
        k = len(proxes)
        HQ = self.cross @ Q
        V = [torch.zeros_like(self.cross) for _ in proxes]
        Y = [torch.zeros_like(self.cross) for _ in proxes]
        step, reached = 0, False
        while step < max_steps and not reached:
            step += 1
            mean = sum(v - y for v, y in zip(V, Y, strict=True))
            W = ((HQ + rho * (mean @ Q)) / (values + k * rho)) @ Q.mT  # type: ignore[operator]
            change = 0.0
            for i, prox in enumerate(proxes):
                relaxed = 1.6 * W - 0.6 * V[i]
                new = prox(relaxed + Y[i], 1 / rho)
                Y[i] = Y[i] + relaxed - new
                if step % check == 0:
                    change += float((new - V[i]).square().sum())
                V[i] = new
            if step % check:
                continue
            apart = math.sqrt(sum(float((W - v).square().sum()) for v in V))
            size = max(float(W.norm()), *(float(v.norm()) for v in V), 1e-300)
            dual = max(math.sqrt(sum(float(y.square().sum()) for y in Y)), 1e-300)
            primal, moved = apart / size, math.sqrt(change) / dual
            reached = primal <= tolerance and moved <= tolerance
            factor = 2.0 if primal > 10 * moved else 0.5 if moved > 10 * primal else 1.0
            rho *= factor
            Y = [y / factor for y in Y]
        if k > 1 and not reached:
            raise ConvergenceError(
                f"{penalty}: {max_steps} steps did not reach the tolerance of {tolerance:.0e}; "
                "raise its weight, or record more samples."
            )
        # The copy behind the penalty has the zeros; the ball then only shrinks what is not zero.
        return (V[0] if k == 1 else self.inside(V[0])), step
