"""The dense batched cone program of a cvxpy problem, without the variables that it need not have.

cvxpy writes ||A x - b||^2 as ||y||^2 with y = A x - b, and ||P x|| + a'x <= b as ||P x|| <= t with
t + a'x <= b. Both kinds of variables are put in from the row that gives them:

* t, of which the objective knows nothing, that only one row holds from above (or from below) while
  the rest, linear rows or first rows of second-order cones, only gain by its going there: it may be
  as large as that row lets it be. (Left in, it is not unique where its cone is not active.)
* y_j that stands in one equality and, on its own, in the objective: with y = E x + r, and D the
  diagonal of its part of P,

      1/2 y'D y + q_y'y = 1/2 x'(E'D E) x + (q_y + D r)'E x + (1/2 D r + q_y)'r.

Afterwards they are found again, and so are the duals: of R (M x + s) = R r, with R the operations on
rows that took a variable out of all rows but its own, R' times the dual is one of M x + s = r, and the
row a_j y_j + ... = b_j has -(D y + q_y)_j / a_j. What remains is as small as one would write it by hand.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..solution import Solution
from .canonical import Affine, Array, Canonical
from .cones import Cones
from .layers import ConeProgram
from .program import product, transposed
from .solver import ConeSolver

# A coefficient below this is not divided by.
_SMALL = 1e-3


class Native:
    """A parametrised cone program, solved by `ConeProgram`.

    Args:
        canonical: with a quadratic objective; zero, nonnegative and second-order cones.
        solver, on_failure, order: as in `ConeProgram`.
    """

    def __init__(self, canonical: Canonical, solver: ConeSolver, on_failure: str, order: int):
        c, gone, by, scale, operations = _reduced(canonical)
        n, m, p = c.n, c.rows, c.zero
        kept = np.setdiff1d(np.arange(n), gone)
        rows = np.setdiff1d(np.arange(p), by)
        cone = np.setdiff1d(np.arange(p, m), by)
        self.on_failure = on_failure
        cones = Cones(c.nonnegative - int((by >= p).sum()), c.second_order)
        self.program = ConeProgram(cones, solver=solver, on_failure=on_failure, order=order)
        self.sizes, self.zero = (len(kept), len(gone), len(rows), len(cone)), p
        self.kept, self.gone, self.scale = (torch.from_numpy(t) for t in (kept, gone, scale))
        # where each variable, and each row, is once what is gone stands behind what is kept
        self.order = torch.from_numpy(np.argsort(np.concatenate([kept, gone])))
        self.row_order = torch.from_numpy(np.argsort(np.concatenate([rows, cone, by])))
        self.operations = tuple(torch.from_numpy(t) for t in operations)
        self.objective = c.affine(c.objective, np.arange(n + 1), n + 1)
        column, row = np.divmod(np.arange(m * (n + 1)), max(m, 1))

        def part(chosen: Array, right: bool, factor: "float | Array") -> Affine:
            """Those rows, of the matrix or of the right side."""
            at = _position(chosen, m)[row]
            if right:
                at = np.where(column == n, at, -1)
                return c.affine(c.constraints, at, len(chosen), factor)
            place = _position(kept, n + 1)[column]
            at = np.where((at >= 0) & (place >= 0), at * len(kept) + place, -1)
            return c.affine(c.constraints, at, len(chosen) * len(kept), factor)

        self.A, self.b = part(rows, False, -1.0), part(rows, True, 1.0)
        self.G, self.h = part(cone, False, -1.0), part(cone, True, 1.0)
        divided = np.ones(m)
        divided[by] = 1 / scale
        self.E, self.r = part(by, False, divided[row]), part(by, True, divided[row])
        self.P = self.D = None
        if c.quadratic is not None:
            j, i = np.divmod(np.arange(n * n), n)
            place, k = _position(kept, n), len(kept)
            inside = (place[i] >= 0) & (place[j] >= 0)
            self.P = c.affine(c.quadratic, np.where(inside, place[i] * k + place[j], -1), k * k)
            at = np.where(i == j, _position(gone, n)[i], -1)
            self.D = c.affine(c.quadratic, at, len(gone))

    def solve(
        self,
        theta: list[Tensor],
        batch: int | None,
        device: torch.device,
        start: Solution | None,
    ) -> tuple[Solution, Tensor]:
        """The cone program's Solution, and the constant of the objective.

        Args:
            theta: the parameters, as `Affine` takes them.
            batch: its size, None for a single instance.
            device: of the result.
            start: as in `ConeProgram.solve`.
        """
        n, gone, p, m = self.sizes
        cost = self.objective(theta, device)
        if batch is not None and cost.dim() == 1:
            cost = cost.expand(batch, -1)
        q, offset = cost.index_select(-1, self.kept.to(device)), cost[..., -1]
        P = None if self.P is None else self.P(theta, device).unflatten(-1, (n, n))
        if gone:
            qy = cost.index_select(-1, self.gone.to(device))
            E = self.E(theta, device).unflatten(-1, (gone, n))
            r = self.r(theta, device)
            D = None if self.D is None else self.D(theta, device)
            Dr = torch.zeros_like(r) if D is None else D * r
            if P is not None:
                P = P + (E.mT * D[..., None, :]) @ E
            q = q + _applied(E, qy + Dr, back=True)
            offset = offset + ((0.5 * Dr + qy) * r).sum(-1)
        A, b, G, h = None, None, None, None
        if p:
            A, b = self.A(theta, device).unflatten(-1, (p, n)), self.b(theta, device)
        if m:
            G, h = self.G(theta, device).unflatten(-1, (m, n)), self.h(theta, device)
        found = self.program.solve(P, q, G, h, A, b, start=start)
        if not gone:
            return found, offset
        y = _applied(E, found.value) + r
        slope = qy if D is None else D * y + qy
        stats = dict(found.stats)
        parts = [stats["equality_dual"], stats["dual"], -slope / self.scale.to(device)]
        dual = torch.cat(parts, -1)[..., self.row_order.to(device)]
        to, of, factor = (t.to(device) for t in self.operations)
        dual = dual.index_add(-1, to, dual.index_select(-1, of) * factor)
        nothing = torch.zeros_like(stats["equality_dual"])
        parts = [nothing, stats["slack"], torch.zeros_like(y)]
        slack = torch.cat(parts, -1)[..., self.row_order.to(device)]
        stats |= {
            "equality_dual": dual[..., : self.zero],
            "dual": dual[..., self.zero :],
            "slack": slack[..., self.zero :],
        }
        value = torch.cat([found.value, y], -1)[..., self.order.to(device)]
        return replace(found, value=value, stats=stats), offset


def _applied(E: Tensor, x: Tensor, back: bool = False) -> Tensor:
    """E x or E'x, of one or of a batch."""
    if x.dim() == 1:
        return (E.mT if back else E) @ x
    return transposed(E, x) if back else product(E, x)


def _position(chosen: Array, size: int) -> Array:
    """Where each of 0, ..., size - 1 stands among those chosen; -1 for nowhere."""
    at = np.full(size, -1)
    at[chosen] = np.arange(len(chosen))
    return at


def _reduced(
    c: Canonical,
) -> tuple[Canonical, Array, Array, Array, tuple[Array, Array, Array]]:
    """R M x + R s = R r, the variables to put in, the row of each, and its coefficient there.

    The last are the entries of R' off its diagonal: rows, columns, values.
    """
    import scipy.sparse as sp

    n, m = c.n, c.rows
    table = _Table(c)
    chosen = [*table.bounded(), *table.defined()]
    if len(chosen) == n:  # nothing would be left to solve for; the last one has its own equality
        chosen.pop()
    entries = [(k, u, f) for k, row in table.R.items() for u, f in row.items() if k != u]
    to, of, factor = (
        np.array([e[i] for e in entries], dtype=kind)
        for i, kind in ((1, np.int64), (0, np.int64), (2, np.float64))
    )
    if entries:
        R = sp.eye_array(m) + sp.coo_array((factor, (of, to)), shape=(m, m))
        whole = sp.kron(sp.eye_array(n + 1), R, format="csr") @ sp.csr_array(c.constraints)
        c = replace(c, constraints=whole)
    gone = np.array([j for j, _ in chosen], dtype=np.int64)
    by = np.array([i for _, i in chosen], dtype=np.int64)
    return c, gone, by, table.M[by, gone], (to, of, factor)


class _Table:
    """The constant entries of M, which entries are not, and R, while variables are taken out."""

    def __init__(self, c: Canonical):
        self.c = c
        self.R: dict[int, dict[int, float]] = {}
        n, m = c.n, c.rows
        entries = c.constraints.tocoo()
        used = (entries.data != 0) & (entries.row < m * n)
        j, i = np.divmod(entries.row[used], max(m, 1))
        owner, value = c.owners[entries.col[used]], entries.data[used]
        self.M, self.varies = np.zeros((m, n)), np.zeros((m, n), dtype=bool)
        np.add.at(self.M, (i[owner < 0], j[owner < 0]), -value[owner < 0])
        self.varies[i[owner >= 0], j[owner >= 0]] = True
        # Off the diagonal, and at all, in the objective.
        self.mixed, self.costs = np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
        if c.quadratic is not None:
            left, right = np.divmod(np.unique(c.quadratic.tocoo().row), n)
            self.mixed[left[left != right]] = True
            self.mixed[right[left != right]] = True
            self.costs[left] = True
        linear = np.unique(c.objective.tocoo().row)
        self.costs[linear[linear < n]] = True

    def bounded(self) -> Iterator[tuple[int, int]]:
        """Variables that may go as far as one linear row lets them, and that row."""
        c, p = self.c, self.c.zero
        line = np.zeros(c.rows, dtype=bool)
        line[p : p + c.nonnegative] = True
        soft = line.copy()  # rows that gain where they grow
        soft[p + c.nonnegative + np.cumsum([0, *c.second_order])[:-1].astype(int)] = True
        asked = np.zeros(c.n + 1, dtype=bool)
        for place in c.places:
            if not place.dual:
                asked[place.index.numpy()] = True  # -1, for none, is the one that is not there
        gone = np.zeros(c.rows, dtype=bool)  # rows that have become definitions
        for j in np.flatnonzero(~self.costs & ~asked[:-1]):
            if gone.sum() == c.n - 1:  # one is left to solve for
                return
            rows = np.flatnonzero((self.M[:, j] != 0) | self.varies[:, j])
            free = rows[~gone[rows]]
            if self.varies[rows, j].any() or not soft[free].all():
                continue
            signs = np.sign(self.M[free, j])
            for sign in (1.0, -1.0):
                one = free[signs == sign]
                if len(one) == 1 and line[one[0]] and abs(self.M[one[0], j]) > _SMALL:
                    self._take_out(int(j), int(one[0]), rows)
                    gone[one[0]] = True
                    yield int(j), int(one[0])
                    break

    def defined(self) -> Iterator[tuple[int, int]]:
        """Variables that stand in one equality only, and that one."""
        there = (self.M != 0) | self.varies
        taken = set()
        for j in np.flatnonzero((there.sum(0) == 1) & ~self.mixed):
            i = int(np.flatnonzero(there[:, j])[0])
            fixed = not self.varies[i, j] and abs(self.M[i, j]) > _SMALL
            if i < self.c.zero and i not in taken and fixed:
                taken.add(i)
                yield int(j), i

    def _take_out(self, j: int, u: int, rows: Array) -> None:
        """Row operations that leave variable j in row u only."""
        for k in rows[rows != u].tolist():
            f = -self.M[k, j] / self.M[u, j]
            self.M[k] += f * self.M[u]
            self.M[k, j] = 0.0
            self.varies[k] |= self.varies[u]
            row = self.R.setdefault(k, {k: 1.0})
            for column, value in self.R.get(u, {u: 1.0}).items():
                row[column] = row.get(column, 0.0) + f * value
