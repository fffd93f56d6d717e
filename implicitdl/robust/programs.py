"""Linear programs whose data are only known to lie in a set: solved, attacked, differentiated."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..convex import Cones, ConeSolver
from ..solution import Solution
from .base import UncertaintySet, finite, tensor
from .conic import Conic, array
from .radius import largest_radius, ratio
from .rows import Data, columns, counterpart, lifted, total


@dataclass(frozen=True, eq=False)
class RobustLP:
    """min c'x over A x <= b for all data in a set; its counterpart is one cone program.

    With z_i in U_i (`uncertainty`), the row a_i + z_i asks for a_i'x + h_i(x) <= b_i, h_i the support
    function of U_i. All sets are of deviations: what is added to the data given. Each row meets its
    own worst case, so a set of whole matrices protects as much as its projections on the rows do.

    Args:
        c: objective.  # (*batch, n)
        A, b: rows.  # (*batch, m, n), (*batch, m)
        uncertainty: of the rows of A: a set of dimension n, whose leading dimensions broadcast
            against (*batch, m), so that one set is for each row of each instance; or a sequence of m
            sets with leading dimensions (*batch), None for a row that is certain. A set of dimension
            n + 1 is for (a_i, b_i).
        matrix: of the whole of A, row by row: a set of dimension m n, leading dimensions (*batch);
            m (n + 1) for the rows of (A, b).
        rhs: of b: a set of dimension m.
        objective: of c: a set of dimension n.
        equality: (E, d) for rows E x = d without uncertainty; no x but a trivial one satisfies an
            uncertain equality for all data.  # (*batch, p, n), (*batch, p)
        certain: (F, g) for rows F x <= g without uncertainty.  # (*batch, p, n), (*batch, p)
        low, high: bounds on x, without uncertainty.  # numbers or (*batch, n)

    Several sources of uncertainty are independent of each other: their support functions add.

    Raises:
        ValueError, TypeError: data that do not fit together, or are not finite.

    Example:
        >>> import torch
        >>> from implicitdl.robust import Ball, RobustLP
        >>> c, A, b = torch.tensor([-1.0, -1.0]), torch.eye(2), torch.ones(2)
        >>> program = RobustLP(c, A, b, uncertainty=Ball(radius=0.5, dimension=2))
        >>> x = program.solve().value
        >>> x.round(decimals=4), program.radius(x).round(decimals=4)
        (tensor([0.5858, 0.5858]), tensor(1.))

    Reference:
        Ben-Tal, El Ghaoui, Nemirovski (2009), "Robust optimization", theorem 1.3.4.
    """

    c: Tensor
    A: Tensor
    b: Tensor
    _: KW_ONLY
    uncertainty: "UncertaintySet | Sequence[UncertaintySet | None] | None" = None
    matrix: UncertaintySet | None = None
    rhs: UncertaintySet | None = None
    objective: UncertaintySet | None = None
    equality: "tuple[Tensor, Tensor] | None" = None
    certain: "tuple[Tensor, Tensor] | None" = None
    low: "float | Tensor | None" = None
    high: "float | Tensor | None" = None

    def __post_init__(self) -> None:
        c = tensor("c", self.c, 1, "(..., n)")
        A, b = tensor("A", self.A, 2, "(..., m, n)"), tensor("b", self.b, 1, "(..., m)")
        n, m = c.shape[-1], b.shape[-1]
        if A.shape[-2:] != (m, n):
            raise ValueError(
                f"A: got shape {tuple(A.shape)}, expected (..., {m}, {n}) with m={m} from b and n={n} "
                "from c."
            )
        for name in ("A", "b"):
            _alike(name, getattr(self, name), c)
        self._accept_certain(n)
        uncertain: dict[str, Any] = {
            name: _set(name, getattr(self, name), sizes, c)
            for name, sizes in {
                "matrix": (m * n, m * (n + 1)), "rhs": (m,), "objective": (n,)
            }.items()
        }  # fmt: skip
        rows = self.uncertainty
        if rows is None or isinstance(rows, UncertaintySet):
            rows = _set("uncertainty", rows, (n, n + 1), c)
            if rows is not None:
                rows._fits_rows(m)
        else:
            rows = tuple(_set(f"uncertainty[{i}]", U, (n, n + 1), c) for i, U in enumerate(rows))
            if len(rows) != m:
                raise ValueError(
                    f"uncertainty: got {len(rows)} sets, expected {m}, one for each row (None for a "
                    "row that is certain), or one set for all rows."
                )
        for name, value in {**uncertain, "uncertainty": rows}.items():
            object.__setattr__(self, name, value)
        try:
            self.lead  # noqa: B018
        except RuntimeError as error:
            raise ValueError(
                f"batch: got leading dimensions that do not broadcast ({error}); those of c, A, b, "
                "equality, low, high, matrix, rhs and objective are (*batch), those of a set for all "
                "rows (*batch, m or 1)."
            ) from None

    def _accept_certain(self, n: int) -> None:
        for name in ("equality", "certain"):
            pair = getattr(self, name)
            if pair is None:
                continue
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise TypeError(
                    f"{name}: got {type(pair).__name__}, expected a matrix and a vector."
                )
            M = tensor(f"{name}[0]", pair[0], 2, "(..., p, n)")
            v = tensor(f"{name}[1]", pair[1], 1, "(..., p)")
            if M.shape[-2:] != (v.shape[-1], n):
                raise ValueError(
                    f"{name}: got {tuple(M.shape)} and {tuple(v.shape)}, expected (..., p, {n}) and "
                    "(..., p)."
                )
            for i, t in enumerate((M, v)):
                _alike(f"{name}[{i}]", t, self.c)
            object.__setattr__(self, name, (M, v))
        for name in ("low", "high"):
            value = getattr(self, name)
            if value is None:
                continue
            value = torch.as_tensor(value, dtype=self.c.dtype, device=self.c.device)
            finite(name, value)
            value = value if value.dim() else value[None]
            if value.shape[-1] not in (1, n):
                raise ValueError(f"{name}: got {tuple(value.shape)}, expected (..., {n}).")
            object.__setattr__(self, name, value)

    # ---- the program -------------------------------------------------------------------------

    @property
    def lead(self) -> torch.Size:
        """(*batch): the leading dimensions of all data and sets."""
        shapes = [self.c.shape[:-1], self.A.shape[:-2], self.b.shape[:-1]]
        for pair in (self.equality, self.certain):
            if pair is not None:
                shapes += [pair[0].shape[:-2], pair[1].shape[:-1]]
        shapes += [t.shape[:-1] for t in (self.low, self.high) if isinstance(t, Tensor)]
        shapes += [U.lead for U in (self.matrix, self.rhs, self.objective) if U is not None]
        if isinstance(self.uncertainty, UncertaintySet):
            shapes.append(self.uncertainty.lead[:-1])
        elif self.uncertainty is not None:
            shapes += [U.lead for U in self.uncertainty if U is not None]
        return torch.broadcast_shapes(*shapes)

    def solve(
        self, *, solver: ConeSolver | None = None, on_failure: str = "raise", order: int = 1,
        start: Solution | None = None,
    ) -> Solution:  # fmt: skip
        """The robust solution, differentiable with respect to all data and the tensors of all sets.

        Args:
            solver, on_failure, order: as in `ConeProgram`.
            start: the Solution of a nearby program of the same kind, to start from.

        Returns:
            Solution: `value` is x; `stats` has `objective`, the worst-case objective, and `program`,
            the Solution of the cone program, with its duals and certificates.

        Raises:
            InfeasibleError: for an instance no x satisfies all rows for all data, or the objective
                has no bound; or a set is empty.
            ConvergenceError: an instance was not solved to the tolerance.
        """
        self._require_members()
        conic, q = self._conic()
        inner, lead = conic.minimise(
            q, solver=solver, on_failure=on_failure, order=order,
            start=None if start is None else start.stats["program"],
        )  # fmt: skip
        x = inner.value[:, : self.c.shape[-1]].reshape(*lead, self.c.shape[-1])
        return _outer(inner, x, lead, objective=conic.value(q, inner, lead))

    def _require_members(self) -> None:
        for U in self._sets():
            U.require_nonempty()

    def _sets(self) -> list[UncertaintySet]:
        rows = self.uncertainty
        some = [rows] if rows is None or isinstance(rows, UncertaintySet) else list(rows)
        return [U for U in (*some, self.matrix, self.rhs, self.objective) if U is not None]

    def _totals(self) -> "UncertaintySet | list[UncertaintySet | None] | None":
        """All that is uncertain in the rows: one set for all, or one for each, of one dimension."""
        n, m = self.A.shape[-1], self.b.shape[-1]
        own = self.uncertainty
        common = [] if self.matrix is None else [self.matrix.blocks(m)]
        if self.rhs is not None:
            last = self.c.new_zeros(n + 1, 1)
            last[n] = 1.0
            common.append(last @ self.rhs.blocks(m))
        if own is None or isinstance(own, UncertaintySet):
            return total([U for U in (own, *common) if U is not None], n)
        return [
            total([U for U in (one, *(V.row(i) for V in common)) if U is not None], n)
            for i, one in enumerate(own)
        ]

    def _rows(self, extra: Tensor | None = None) -> list[Conic]:
        """The robust rows over x, or A x + extra s <= b over (x, s), s in uncertain rows alone."""
        n, m = self.A.shape[-1], self.b.shape[-1]
        totals = self._totals()
        A = columns(self.A, extra)
        if isinstance(totals, UncertaintySet):
            return [counterpart(totals, A, self.b, n)]
        if totals is None:
            return [Conic.of(Cones(m), columns(self.A, extra, 0.0), self.b)] if m else []
        out = []
        for i, U in enumerate(totals):
            row, at = A[..., i : i + 1, :], self.b[..., i : i + 1]
            if U is None:
                row = columns(self.A[..., i : i + 1, :], extra, 0.0)
                out.append(Conic.of(Cones(1), row, at))
            else:
                out.append(counterpart(U.widened(), row, at, n))
        return out

    def _certain(self) -> list[Conic]:
        """Bounds, rows and equalities without uncertainty, over x."""
        n = self.c.shape[-1]
        eye = torch.eye(n, dtype=self.c.dtype, device=self.c.device)
        out = []
        for sign, bound in ((1.0, self.high), (-1.0, self.low)):
            if isinstance(bound, Tensor):
                h = sign * bound.expand(*bound.shape[:-1], n)
                out.append(Conic.of(Cones(n), sign * eye, h))
        if self.certain is not None:
            F, g = self.certain
            out.append(Conic.of(Cones(g.shape[-1]), F, g))
        if self.equality is not None:
            E, d = self.equality
            out.append(Conic.of(Cones(0), eye[:0], A=E, b=d))
        return out

    def _conic(self) -> tuple[Conic, Tensor]:
        """The feasible set and the objective, over x or, the objective uncertain, (x, t)."""
        n = self.c.shape[-1]
        parts = [*self._rows(), *self._certain()]
        if not parts:
            parts = [Conic.of(Cones(0), self.c.new_zeros(0, n))]
        q = self.c
        if self.objective is not None:
            x = torch.eye(n, n + 1, dtype=self.c.dtype, device=self.c.device)
            parts = [part.pulled(x) for part in parts] + [self.objective.epigraph()]
            q = torch.nn.functional.pad(q, (0, 1), value=1.0)
        return Conic.meet(parts), q

    # ---- attack ------------------------------------------------------------------------------

    def protection(self, x: Tensor) -> Tensor:
        """h_i(x), what the worst data add to each row.  # (..., n) -> (..., m)"""
        x = self._point(x)
        totals, v = self._totals(), lifted(x)
        if totals is None:
            return x.new_zeros(*x.shape[:-1], self.b.shape[-1])
        if isinstance(totals, UncertaintySet):
            out = totals.support(v[..., None, : totals.dimension])
            return out.expand(*out.shape[:-1], self.b.shape[-1])
        rows = [
            x.new_zeros(x.shape[:-1]) if U is None else U.support(v[..., : U.dimension])
            for U in totals
        ]
        return torch.stack(torch.broadcast_tensors(*rows), -1)

    def violation(self, x: Tensor) -> Tensor:
        """a_i'x + h_i(x) - b_i, by how much each row is broken by its worst data; below 0 it holds.

        # (..., n) -> (..., m)
        """
        x = self._point(x)
        return (self.A @ x[..., None])[..., 0] - self.b + self.protection(x)

    def worst_case(self, x: Tensor) -> Data:
        """The data that are worst for x: of each row, and of the objective, its own.

        Rows of a `matrix` set are each the row of some member; of different members, in general.

        Raises:
            InfeasibleError: a set is empty, or unbounded along x.
        """
        x = self._point(x)
        n, m = self.c.shape[-1], self.b.shape[-1]
        totals, v = self._totals(), lifted(x)
        c = self.c if self.objective is None else self.c + self.objective.worst(x)
        if totals is None:
            return Data(c, self.A, self.b)
        if isinstance(totals, UncertaintySet):
            z = totals.worst(v[..., None, : totals.dimension])
            z = z.expand(*z.shape[:-2], m, z.shape[-1])
            z = torch.nn.functional.pad(z, (0, n + 1 - z.shape[-1]))
        else:
            rows = [
                torch.zeros_like(v) if U is None
                else torch.nn.functional.pad(
                    U.worst(v[..., : U.dimension]), (0, n + 1 - U.dimension))
                for U in totals
            ]  # fmt: skip
            z = torch.stack(torch.broadcast_tensors(*rows), -2)
        return Data(c, self.A + z[..., :n], self.b + z[..., n])

    def sample(
        self, count: int, *, boundary: bool = False, generator: torch.Generator | None = None
    ) -> Data:
        """Random data: c, A and b with a first dimension of `count`, to attack a solution with.

        Args:
            count, boundary, generator: as in `UncertaintySet.sample`.
        """
        n, m = self.c.shape[-1], self.b.shape[-1]
        size = (count, *self.lead)
        rows = self.c.new_zeros(*size, m, n + 1)

        def drawn(U: UncertaintySet, *inner: int) -> Tensor:
            # Expanded: independent draws for all that share a set.
            U = U.expand(*self.lead, *inner)
            return U.sample(count, boundary=boundary, generator=generator)

        own = self.uncertainty
        if isinstance(own, UncertaintySet):
            rows[..., : own.dimension] += drawn(own, m)
        elif own is not None:
            for i, U in enumerate(own):
                if U is not None:
                    rows[..., i, : U.dimension] += drawn(U)
        if self.matrix is not None:
            z = drawn(self.matrix).unflatten(-1, (m, -1))
            rows[..., : z.shape[-1]] += z
        if self.rhs is not None:
            rows[..., n] += drawn(self.rhs)
        c = self.c.expand(*size, n)
        if self.objective is not None:
            c = c + drawn(self.objective)
        return Data(c, self.A + rows[..., :n], self.b + rows[..., n])

    # ---- how much ----------------------------------------------------------------------------

    def scaled(self, r: "float | Tensor") -> "RobustLP":
        """The program with all its sets r times as large, about the data given.

        Args:
            r: >= 0.  # a number, or of dimensions that broadcast against (*batch)
        """
        r = torch.as_tensor(r, dtype=self.c.dtype, device=self.c.device)
        new: dict[str, Any] = {
            name: r * getattr(self, name)
            for name in ("matrix", "rhs", "objective") if getattr(self, name) is not None
        }  # fmt: skip
        if isinstance(self.uncertainty, UncertaintySet):
            new["uncertainty"] = r[..., None] * self.uncertainty
        elif self.uncertainty is not None:
            new["uncertainty"] = [None if U is None else r * U for U in self.uncertainty]
        return replace(self, **new)

    def radius(self, x: Tensor) -> Tensor:
        """min_i (b_i - a_i'x) / h_i(x): the largest r for which x satisfies all rows of `scaled(r)`.

        And of all smaller sizes: for a set without the origin, that is more. In units of the sets
        given: 1 says that x bears them as they are. Infinite where no size of the sets breaks a row; negative (of no meaning but that) where x
        breaks a row without uncertainty.  # (..., n) -> (...)
        """
        x = self._point(x)
        slack = self.b - (self.A @ x[..., None])[..., 0]
        return ratio(slack, self.protection(x), self.b).amin(-1)

    def trade_off(
        self, radii: Tensor, *, solver: ConeSolver | None = None, on_failure: str = "nan"
    ) -> Solution:
        """The robust solutions at each radius, the whole curve as one batch.

        Args:
            radii: # (R,)
            solver, on_failure: as in `solve`; by default a radius that no x can bear gives NaN.

        Returns:
            Solution, `value` (R, *batch, n), `stats["objective"]` (R, *batch).
        """
        if not self._sets():
            raise ValueError(
                "trade_off: got a program without uncertainty, expected a set to scale."
            )
        radii = tensor("radii", radii, 1, "(R,)").to(self.c)
        if radii.dim() != 1:
            raise ValueError(f"radii: got shape {tuple(radii.shape)}, expected (R,).")
        program = self.scaled(radii.reshape(-1, *(1,) * len(self.lead)))
        return program.solve(solver=solver, on_failure=on_failure)

    def largest_radius(
        self, *, cost: "float | Tensor | None" = None, solver: ConeSolver | None = None,
        on_failure: str = "raise",
    ) -> Solution:  # fmt: skip
        """The largest r for which an x satisfies `scaled(r)`, with worst-case objective <= cost.

        And all of smaller size: the largest `radius` of an x.

        Args:
            cost: None for no limit.  # a number or (*batch)
            solver: of each step's cone program.
            on_failure: of an instance without a solution at r = 0; as in `ConeProgram`.

        Returns:
            Solution: `value` an x that bears this radius; `stats["radius"]`  # (*batch), infinite
            where there is no largest one; differentiable with respect to all data and sets.

        Raises:
            InfeasibleError: an instance has no solution even without uncertainty.
        """
        return largest_radius(self, cost=cost, solver=solver, on_failure=on_failure)

    # ---- other forms -------------------------------------------------------------------------

    def as_cvxpy(self) -> tuple[Any, Any]:
        """The counterpart as a cvxpy problem of constant data, and its variable x.

        Raises:
            ValueError: the program has a batch dimension.
        """
        import cvxpy as cp

        if self.lead:
            raise ValueError(
                f"as_cvxpy: got leading dimensions {tuple(self.lead)}, expected one program; cvxpy's "
                "problems are not batched."
            )
        n, m = self.c.shape[-1], self.b.shape[-1]
        x = cp.Variable(n)
        A, b, c = array(self.A), array(self.b), array(self.c)
        totals, limits = self._totals(), []
        for i in range(m):
            U = totals.row(i) if isinstance(totals, UncertaintySet) else (totals or [None] * m)[i]
            if isinstance(totals, UncertaintySet) and not totals.lead:
                U = totals
            if U is None:
                limits.append(A[i] @ x <= b[i])
                continue
            t, more = U.support_cvxpy(x if U.dimension == n else cp.hstack([x, -1.0]))
            limits += [A[i] @ x + t <= b[i], *more]
        for part in self._certain():
            limits += part.as_cvxpy(x)
        cost = c @ x
        if self.objective is not None:
            t, more = self.objective.support_cvxpy(x)
            cost, limits = cost + t, limits + more
        return cp.Problem(cp.Minimize(cost), limits), x

    def _point(self, x: Tensor) -> Tensor:
        n = self.c.shape[-1]
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x: got {got}, expected a floating tensor (..., {n}).")
        if x.dim() < 1 or x.shape[-1] != n:
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected (..., {n}).")
        return x.to(self.c)


def _alike(name: str, t: Tensor, like: Tensor) -> None:
    if (t.dtype, t.device) != (like.dtype, like.device):
        raise ValueError(
            f"{name}: got {t.dtype} on {t.device}, expected {like.dtype} on {like.device} as c."
        )


def _set(name: str, U: Any, sizes: tuple[int, ...], like: Tensor) -> UncertaintySet | None:
    if U is None:
        return None
    if not isinstance(U, UncertaintySet):
        raise TypeError(f"{name}: got {type(U).__name__}, expected an UncertaintySet or None.")
    if U.dimension not in sizes:
        raise ValueError(
            f"{name}: got a {type(U).__name__} of dimension {U.dimension}, expected "
            f"{' or '.join(map(str, sizes))}."
        )
    return U.to(like)  # type: ignore[no-any-return]


def _outer(inner: Solution, x: Tensor, lead: torch.Size, **stats: Any) -> Solution:
    """The Solution of a program in its own dimensions."""
    return Solution(
        value=x, codes=inner.codes.reshape(lead), residual=inner.residual.reshape(lead),
        steps=inner.steps.reshape(lead),
        stats={"solver": inner.stats["solver"], **stats, "program": inner},
    )  # fmt: skip
