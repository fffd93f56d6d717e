"""A cvxpy problem as a cone program whose data are affine in the parameters.

cvxpy canonicalises a disciplined parametrised program (DPP) once, into

    minimise 1/2 x'P x + q'x + d    subject to    M x + s = r,  s in K,

K = {0} x R_+ x second-order cones x others, every datum an affine map of the parameters. Here those
maps become torch operations, differentiable to every order, and positions where variables, and the
dual variables of constraints, stand in x and in the dual of M x + s = r.

Reference: Agrawal, Amos, Barratt, Boyd, Diamond, Kolter (2019), "Differentiable convex optimization
layers", section 4 (affine-solver-affine form).
"""

import contextlib
import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]


class Affine:
    """v = base + sum_i T_i theta_i, with sparse T_i and the theta_i given flat.

    A theta_i that all instances share stays shared: v has a batch dimension only where a theta_i
    that it depends on has one.

    Args:
        base: # (size,)
        terms: for each i that v depends on, the rows, columns and values of T_i.
    """

    def __init__(self, base: Array, terms: dict[int, tuple[Array, Array, Array]]):
        self._base = torch.from_numpy(np.ascontiguousarray(base, dtype=np.float64))
        self._terms = {
            i: (torch.from_numpy(rows), torch.from_numpy(columns), torch.from_numpy(values))
            for i, (rows, columns, values) in terms.items()
        }
        # The terms of several theta_i at once, on a device: what is shared, or not, changes rarely.
        self._joined: dict[Any, tuple[Tensor, ...]] = {}

    def __call__(self, theta: Sequence[Tensor], device: torch.device) -> Tensor:
        """v.  # (size,) or (batch, size)

        Args:
            theta: float64.  # each (k_i,) or (batch, k_i)
            device: where.
        """
        shared = tuple(i for i in self._terms if theta[i].dim() == 1)
        batched = tuple(i for i in self._terms if theta[i].dim() == 2)
        v = self._base.to(device)
        for group in (shared, batched):
            if not group:
                continue
            flat = torch.cat([theta[i] for i in group], -1) if len(group) > 1 else theta[group[0]]
            rows, columns, values = self._terms_of(
                group, [theta[i].shape[-1] for i in group], device
            )
            part = flat.index_select(-1, columns) * values
            v = (v if part.dim() == 1 else v.expand(part.shape[0], -1)).index_add(-1, rows, part)
        return v

    def _terms_of(
        self, group: tuple[int, ...], sizes: list[int], device: torch.device
    ) -> tuple[Tensor, ...]:
        """The rows, columns and values of some of the T_i, side by side."""
        key = (group, device)
        if key not in self._joined:
            starts = np.cumsum([0, *sizes]).tolist()
            parts = [
                (rows, columns + start, values)
                for (rows, columns, values), start in zip(
                    (self._terms[i] for i in group), starts, strict=False
                )
            ]
            joined = (torch.cat(each).to(device) for each in zip(*parts, strict=True))
            self._joined[key] = tuple(joined)
        return self._joined[key]


@dataclass(frozen=True, eq=False)
class Place:
    """Where a variable stands in a vector: its entries, in row-major order, one index each.

    Attributes:
        dual: whether the vector is the dual of M x + s = r, not x.
        index: -1 where the entry is zero.  # (size,)
        scale: what entries are multiplied by; None for one.  # (size,)
        shape: of the variable.
        log: whether the vector has the logarithm of the variable.
    """

    dual: bool
    index: Tensor
    scale: Tensor | None
    shape: tuple[int, ...]
    log: bool = False

    @functools.cached_property
    def holes(self) -> bool:
        """Whether some entries are always zero."""
        return bool((self.index < 0).any())

    def read(self, x: Tensor, y: Tensor) -> Tensor:
        """The variable.  # (*batch, *shape)"""
        v = y if self.dual else x
        index = self.index.to(v.device)
        out = v.index_select(-1, index.clamp_min(0) if self.holes else index)
        if self.holes:
            out = torch.where(index < 0, torch.zeros_like(out), out)
        if self.scale is not None:
            out = out * self.scale.to(v.device)
        return (out.exp() if self.log else out).reshape((*v.shape[:-1], *self.shape))


@dataclass(frozen=True, eq=False)
class Canonical:
    """The parametrised cone program of a cvxpy problem.

    Attributes:
        n: the length of x.
        zero, nonnegative, second_order, semidefinite, exponential: K, in this order; the sizes of
            matrices for `semidefinite`, the number of cones for `exponential`.
        maximise: whether the objective's sign was changed.
        log: whether x has logarithms: a geometric program.
        logarithms: parameters that enter by their logarithm.
        objective: [q; d] of the parameters, as a map from columns to rows.
        constraints: [-M | r], column after column.
        quadratic: P, column after column, or None.
        owners, sources: for each column of these, which parameter, and which of its entries in
            row-major order; owner -1 is the constant 1.
        places: of the variables that were asked for.
    """

    n: int
    zero: int
    nonnegative: int
    second_order: tuple[int, ...]
    semidefinite: tuple[int, ...]
    exponential: int
    maximise: bool
    log: bool
    logarithms: frozenset[int]
    objective: Any
    constraints: Any
    quadratic: Any
    owners: Array
    sources: Array
    places: tuple[Place, ...]

    @property
    def rows(self) -> int:
        """The number of rows of M."""
        return int(self.constraints.shape[0]) // (self.n + 1)

    def affine(
        self, matrix: Any, target: Array, size: int, factor: "float | Array" = 1.0
    ) -> Affine:
        """A map to a vector of `size`, row i of the matrix going to entry target[i], or nowhere.

        Args:
            matrix: one of `objective`, `constraints`, `quadratic`.
            target: -1 for nowhere.
            size: of the vector.
            factor: what is multiplied by it: all, or each row by its own.
        """
        entries = matrix.tocoo()
        rows = target[entries.row]
        keep = (rows >= 0) & (entries.data != 0)
        factors = np.broadcast_to(factor, target.shape)[entries.row[keep]]
        rows, columns, values = rows[keep], entries.col[keep], factors * entries.data[keep]
        owner = self.owners[columns]
        base = np.zeros(size)
        constant = owner < 0
        np.add.at(base, rows[constant], values[constant])
        terms = {}
        for i in np.unique(owner[~constant]):
            own = owner == i
            terms[int(i)] = (
                rows[own].astype(np.int64),
                self.sources[columns[own]].astype(np.int64),
                values[own].astype(np.float64),
            )
        return Affine(base, terms)


def canonicalise(
    problem: Any, parameters: Sequence[Any], variables: Sequence[Any], gp: bool, solver: str
) -> Canonical:
    """The cone program of a problem.

    Args:
        problem, parameters, variables: of cvxpy; checked before.
        gp: whether it is a geometric program.
        solver: whose conventions the cones follow: "CLARABEL", with a quadratic objective, or
            "DIFFCP", with a linear one and semidefinite and exponential cones as diffcp takes them.

    Raises:
        NotImplementedError: a variable, parameter or cone that has no place in it.
    """
    import cvxpy as cp
    from cvxpy.utilities import scopes

    outer: dict[int, int] = {}
    first: dict[int, int] = {}
    original = problem
    if gp:
        reduction = cp.reductions.Dgp2Dcp(problem)
        problem, _ = reduction.apply(problem)
        outer = {k: v[0] for k, v in reduction.var_id_map.items()}
        outer |= {k: v[0] for k, v in reduction.param_id_map.items()}
        first = dict(getattr(reduction, "cons_id_map", {}))
    if solver != "CLARABEL" and not problem.constraints:  # cvxpy wants one for such a solver
        problem = cp.Problem(problem.objective, [cp.Variable() == 0])
    scope = scopes.quad_form_dpp_scope() if solver == "CLARABEL" else contextlib.nullcontext()
    with warnings.catch_warnings(), scope:
        # What cvxpy says of its own doings: sparse variables, and arrays of three dimensions.
        for words in (
            "Reading from a sparse CVXPY expression",
            ".*Defaulting to the SCIPY backend",
        ):
            warnings.filterwarnings("ignore", words)
        data, chain, _ = problem.get_problem_data(solver=solver)
    program = data["param_prob"]
    refuse_set_apart(program)

    def inner(i: int, maps: dict[int, list[int]]) -> int:
        i = outer.get(i, i)
        return maps.get(i, [i])[0]

    owners, sources = _columns(program, parameters, chain.compose_param_id_map(), inner)
    variable_ids, constraint_ids = chain.compose_var_id_map(), chain.compose_constr_id_map()
    if any(len(v) > 1 for v in variable_ids.values()):
        raise NotImplementedError("variables: got complex ones, expected real ones.")
    dims = program.cone_dims
    if list(dims.p3d) or list(getattr(dims, "pnd", [])):
        raise NotImplementedError(
            "problem: got power cones, whose derivative neither solver has. Where cvxpy offers it, "
            "state the power with approx=True, which uses second-order cones."
        )
    duals = {
        dual.id: (c, k) for c in original.constraints for k, dual in enumerate(c.dual_variables)
    }
    rows, total = _rows(program)
    if total * (int(program.x.size) + 1) != program.A.shape[0]:
        raise NotImplementedError("problem: got constraints of kinds that are not known here.")
    places = []
    for variable in variables:
        if variable.id in duals:
            constraint, k = duals[variable.id]
            i = first.get(constraint.id, constraint.id)
            places.append(_dual_place(constraint, k, rows.get(constraint_ids.get(i, i))))
        else:
            start = program.var_id_to_col[inner(variable.id, variable_ids)]
            index = torch.from_numpy(_full(variable, start))
            places.append(Place(False, index, None, tuple(variable.shape), gp))
    return Canonical(
        n=int(program.x.size),
        zero=int(dims.zero),
        nonnegative=int(dims.nonneg),
        second_order=tuple(int(k) for k in dims.soc),
        semidefinite=tuple(int(k) for k in dims.psd),
        exponential=int(dims.exp),
        maximise=type(problem.objective) is cp.Maximize,
        log=gp,
        logarithms=frozenset(i for i, p in enumerate(parameters) if p.id in outer),
        objective=program.q,
        constraints=program.A,
        quadratic=None if program.P is None or not program.P.nnz else program.P,
        owners=owners,
        sources=sources,
        places=tuple(places),
    )


def refuse_set_apart(program: Any) -> None:
    """Refuse a canonical form that does not have all its constraints in its matrix.

    cvxpy 1.9.3 moves cones that stand on variables themselves (x >= 0) aside for solvers that take
    them so; who reads only the matrix drops them without a word.

    Args:
        program: cvxpy's ParamConeProg.

    Raises:
        RuntimeError: it has cones or bounds beside the matrix.
    """
    apart = len(getattr(program, "dir_cones", ()))
    bounds = [
        name
        for name in ("lower_bounds", "upper_bounds")
        if (b := getattr(program, name, None)) is not None and np.isfinite(b).any()
    ]
    if apart or bounds:
        what = f"{apart} cones (dir_cones)" if apart else " and ".join(bounds)
        raise RuntimeError(
            f"cvxpy: got a canonical form with {what} beside its matrix, expected every constraint "
            "in the matrix: they would be dropped silently. Canonicalise for CLARABEL, or use "
            "cvxpy 1.9.0 to 1.9.2."
        )


def _columns(
    program: Any, parameters: Sequence[Any], ids: dict[int, list[int]], inner: Any
) -> tuple[Array, Array]:
    """Whose, and which, each column of the parameter maps is."""
    count = int(program.q.shape[1])
    owners, sources = np.full(count, -1), np.zeros(count, dtype=np.int64)
    known = np.zeros(count, dtype=bool)
    known[program.param_id_to_col[-1]] = True  # the constant
    for i, parameter in enumerate(parameters):
        column = program.param_id_to_col.get(inner(parameter.id, ids))
        if column is None:
            continue  # nothing depends on it
        index = _reduced(parameter)
        part = slice(column, column + len(index))
        owners[part], sources[part], known[part] = i, index, True
    if not known.all():
        raise NotImplementedError(
            "parameters: cvxpy's canonical form has parameters that none of these explains."
        )
    return owners, sources


def _reduced(parameter: Any) -> Array:
    """Which entries, row-major, of a parameter its canonical form keeps (of a symmetric one, say,
    the upper triangle), in that form's order."""
    from cvxpy.reductions.cvx_attr2constr import lower_value

    entries = np.arange(parameter.size).reshape(parameter.shape)
    if getattr(parameter, "_has_dim_reducing_attr", False):
        entries = np.asarray(lower_value(parameter, entries))
    return entries.flatten(order="F")


def _full(variable: Any, start: int) -> Array:
    """The position in x of each entry, row-major, of a variable; -1 for one that is always zero."""
    from cvxpy.reductions.cvx_attr2constr import recover_value_for_leaf

    if not getattr(variable, "_has_dim_reducing_attr", False):
        index = np.arange(variable.size).reshape(variable.shape, order="F")
        return start + index.flatten()
    # A copy of the kept entries 1, 2, ... to all places, zero elsewhere.
    kept = recover_value_for_leaf(variable, np.arange(1.0, variable._reduced_size + 1))
    kept = kept.toarray() if hasattr(kept, "toarray") else np.asarray(kept)
    index = np.rint(kept).astype(np.int64).reshape(variable.shape).flatten()
    return np.where(index > 0, start + index - 1, -1)


def _rows(program: Any) -> tuple[dict[int, slice], int]:
    """The rows of each constraint of the canonical form, and how many these are."""
    import cvxpy as cp

    found, start = {}, 0
    for constraint in program.constraints:
        size = constraint.size
        if type(constraint) is cp.constraints.PSD:
            n = constraint.shape[-1]
            size = size // n * (n + 1) // 2  # one triangle
        found[constraint.id] = slice(start, start + size)
        start += size
    return found, start


def _dual_place(constraint: Any, k: int, rows: slice | None) -> Place:
    """Where the k-th dual variable of a constraint stands."""
    import cvxpy as cp

    variable = constraint.dual_variables[k]
    size = sum(dual.size for dual in constraint.dual_variables)
    scale = None
    if rows is None:
        raise NotImplementedError(
            f"variables: got a dual variable of {constraint}, which has no rows of its own."
        )
    index = np.arange(rows.start, rows.stop)
    if isinstance(constraint, cp.constraints.PSD):
        # svec: the lower triangle column by column, what is off the diagonal times sqrt 2
        n = variable.shape[-1]
        i, j = np.triu_indices(n)
        if len(index) != len(i) or len(variable.shape) != 2:
            raise NotImplementedError("variables: got the dual of a batch of matrices.")
        square = np.zeros((n, n), dtype=np.int64)
        square[i, j] = square[j, i] = index
        index = square.flatten()
        off = 1.0 - np.eye(n)
        scale = torch.from_numpy((np.eye(n) + off / np.sqrt(2)).flatten())
    elif len(index) != size:
        raise NotImplementedError(
            f"variables: got a dual variable of {constraint}, of {size} entries, whose canonical "
            f"form has {len(index)}."
        )
    elif isinstance(constraint, cp.SOC):
        # each cone's t stands before its x
        cones = index.reshape(constraint.num_cones(), -1)
        part = cones[:, 0] if k == 0 else cones[:, 1:]
        part = part.T if k == 1 and constraint.axis == 0 else part
        index = part.reshape(variable.shape).flatten()
    elif isinstance(constraint, cp.constraints.ExpCone):
        cones = index.reshape(-1, 3)[:, k]
        index = cones.reshape(variable.shape, order="F").flatten()
    else:
        index = index.reshape(variable.shape, order="F").flatten()
    return Place(True, torch.from_numpy(index.astype(np.int64)), scale, tuple(variable.shape))
