"""Convex programs written in cvxpy, as layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..maps import inside_transform
from ..solution import Solution, check_on_failure, unknown_name
from .canonical import Canonical, canonicalise
from .door_diffcp import Diffcp
from .door_native import Native
from .solver import ConeSolver

# Entries of the matrices of one instance, above which dense linear algebra is the wrong tool.
_DENSE = 4_000_000
_ENGINES = ("auto", "native", "diffcp")
# How the solvers of cvxpylayers are told to work, by those who are used to tell them.
_SOLVER_ARGS = frozenset(
    [
        "abstol",
        "acceleration_interval",
        "acceleration_lookback",
        "adaptive_scale",
        "alpha",
        "eps",
        "eps_abs",
        "eps_infeas",
        "eps_rel",
        "feastol",
        "max_iter",
        "max_iters",
        "mode",
        "n_jobs_backward",
        "n_jobs_forward",
        "normalize",
        "reltol",
        "rho_x",
        "scale",
        "solve_method",
        "time_limit_secs",
        "tol_feas",
        "tol_gap_abs",
        "tol_gap_rel",
        "use_indirect",
        "verbose",
        "warm_starts",
    ]
)


class ConvexLayer(nn.Module):
    """The solution of a parametrised convex problem, as a function of its parameters.

    Any disciplined parametrised program (DPP) of cvxpy. It is canonicalised once; a call evaluates
    the cone program's data and solves the whole batch. Problems of linear, quadratic and
    second-order cone constraints are solved by `ConeProgram` ("native": derivatives of every order
    that is asked for); those with exponential or semidefinite cones, and those too large for dense
    matrices, by diffcp, the engine of cvxpylayers, with Clarabel and the dense derivative (SCS for
    semidefinite cones of size 4 or more, which diffcp mixes up with Clarabel), every
    instance's answer checked. `engine` and `why` say which.

    Args:
        problem: a `cvxpy.Problem`.
        parameters: all its parameters, in the order of the arguments of a call.
        variables: what a call returns, in this order: variables of the problem, or dual variables
            of its constraints (`constraint.dual_variables[0]`).
        gp: whether it is a disciplined geometric program (DGP).
        on_failure: what becomes of an instance that has no solution or was not solved: `"raise"`,
            `"warn"`, `"return"` or `"nan"`, as in `ConeProgram`.
        order: how many derivatives are exact; one more raises. Above 1 for native problems only.
        solver: for native problems.
        engine: `"native"` or `"diffcp"` insist on one; `"auto"` chooses.
        solver_args: as of a call.

    Raises:
        TypeError, ValueError: the problem is not DPP, or the arguments do not fit it.

    Example:
        >>> import cvxpy as cp, torch
        >>> from implicitdl.convex import ConvexLayer
        >>> x, b = cp.Variable(2), cp.Parameter(2)
        >>> layer = ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - b)), [x >= 0]), [b], [x])
        >>> layer(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))[0].round(decimals=4)
        tensor([[1., 0.],
                [3., 4.]])

    Reference:
        Agrawal, Amos, Barratt, Boyd, Diamond, Kolter (2019), "Differentiable convex optimization
        layers".
    """

    def __init__(
        self,
        problem: Any,
        parameters: Sequence[Any],
        variables: Sequence[Any],
        *,
        gp: bool = False,
        on_failure: str = "raise",
        order: int = 1,
        solver: ConeSolver | None = None,
        engine: str = "auto",
        solver_args: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        if on_failure != "nan":
            check_on_failure(on_failure)
        if type(order) is not int or order < 1:
            raise ValueError(f"order: got {order!r}, expected an integer >= 1.")
        if engine not in _ENGINES:
            raise unknown_name("engine", engine, _ENGINES)
        if solver is not None and not isinstance(solver, ConeSolver):
            raise TypeError(
                f"solver: got {type(solver).__name__}, expected a ConeSolver or None. For a solver "
                "of cvxpylayers use cvxpylayers.torch.CvxpyLayer."
            )
        _check_solver_args(solver_args)
        _check_problem(problem, parameters, variables, gp)
        solver = solver or ConeSolver()
        canonical, why = _choose(problem, parameters, variables, gp, engine)
        self.why = why
        if canonical.semidefinite or canonical.exponential or why.startswith("diffcp"):
            self.engine = "diffcp"
            if order > 1:
                raise ValueError(f"order: got {order}, expected 1: {why}.")
            self._solver: Native | Diffcp = Diffcp(canonical, on_failure)
        else:
            self.engine = "native"
            self._solver = Native(canonical, solver, on_failure, order)
        self._parameters_of_problem = tuple(
            _Parameter.of(p, i in canonical.logarithms) for i, p in enumerate(parameters)
        )
        self._places = canonical.places
        self._sign, self._log = (-1.0 if canonical.maximise else 1.0), canonical.log

    def forward(
        self, *parameters: Tensor, solver_args: Mapping[str, Any] | None = None
    ) -> tuple[Tensor, ...]:
        """The variables at the solution.  # each (batch, *shape), or (*shape,) without a batch

        Args:
            parameters: each of its parameter's shape, or one a batch of these; those without a
                batch dimension are shared by all instances, and their gradients summed.
            solver_args: settings that cvxpylayers' solvers would have taken. Not used: they say
                how to solve, and less exactly than is done here. An unknown one raises.

        Raises:
            InfeasibleError: an instance has no feasible point, or no bound.
            ConvergenceError: an instance was not solved to the tolerance.
            TypeError, ValueError: parameters that do not fit; the message says which.
        """
        _check_solver_args(solver_args)
        return self.solve(*parameters).stats["variables"]

    def solve(self, *parameters: Tensor, start: Solution | None = None) -> Solution:
        """The solution with all that is known of it.

        Args:
            parameters: as in `forward`.
            start: the Solution of nearby programs, to start from; native problems only.

        Returns:
            Solution: `value` is the vector x of the cone program; `stats` has `variables` (what
            `forward` returns), `objective` (of the problem, with its constant and its sign),
            `dual`, `equality_dual`, `slack`, `error` and `certificate` of the cone program, as in
            `ConeProgram.solve` (the last two of what is solved, without the variables that an
            equality defines), `engine` ("native" or "diffcp"), and `why`.
        """
        theta, batch, like = self._accept(parameters)
        if start is not None and self.engine != "native":
            raise ValueError(f"start: got a solution, expected None: {self.why}.")
        solution, offset = self._solver.solve(theta, batch, like.device, start)
        stats = dict(solution.stats)
        dual = torch.cat([stats["equality_dual"], stats["dual"]], -1)
        objective = self._sign * (stats["objective"] + offset)
        stats["objective"] = objective.exp() if self._log else objective
        places = tuple(place.read(solution.value, dual) for place in self._places)
        for key in ("objective", "dual", "equality_dual", "slack"):
            stats[key] = stats[key].to(like.dtype)
        stats |= {
            "variables": tuple(v.to(like.dtype) for v in places),
            "engine": self.engine,
            "why": self.why,
        }
        return replace(solution, value=solution.value.to(like.dtype), stats=stats)

    def _accept(self, values: tuple[Tensor, ...]) -> tuple[list[Tensor], int | None, Tensor]:
        """The parameters as float64 vectors, the batch size, and a tensor like the results."""
        own = self._parameters_of_problem
        if len(values) != len(own):
            names = ", ".join(p.name for p in own)
            raise ValueError(
                f"parameters: got {len(values)} tensors, expected {len(own)}: {names}."
            )
        sizes: dict[str, int] = {}
        for p, v in zip(own, values, strict=True):
            size = p.batch_of(v, values[0].device if isinstance(values[0], Tensor) else None)
            if size is not None:
                sizes[p.name] = size
        if len(set(sizes.values())) > 1:
            raise ValueError(
                f"batch: got {sizes}, expected one size for all parameters that have a batch "
                "dimension."
            )
        if not inside_transform():
            for p, v in zip(own, values, strict=True):
                p.check(v.detach())
        batch = next(iter(sizes.values()), None)
        dtype = torch.get_default_dtype()
        for k, v in enumerate(values):
            dtype = torch.promote_types(dtype, v.dtype) if k else v.dtype
        like = torch.empty(0, dtype=dtype, device=values[0].device if values else None)
        return [p.vector(v) for p, v in zip(own, values, strict=True)], batch, like

    def extra_repr(self) -> str:
        """The parameters and the engine."""
        names = ", ".join(f"{p.name} {p.shape}" for p in self._parameters_of_problem)
        return f"{names}, engine={self.engine!r}, on_failure={self._solver.on_failure!r}"


@dataclass(frozen=True)
class _Parameter:
    """What a parameter of the problem asks of its tensor."""

    name: str
    shape: tuple[int, ...]
    facts: frozenset[str]
    log: bool
    zeros: tuple[int, ...] = ()  # entries, row-major, that are zero by declaration

    @staticmethod
    def of(parameter: Any, log: bool) -> "_Parameter":
        facts = frozenset(
            key for key, value in parameter.attributes.items() if value is not None and value is not False
        )  # fmt: skip
        zeros: tuple[int, ...] = ()
        if facts & {"diag", "sparsity"}:
            kept = np.zeros(parameter.shape, dtype=bool)
            where = np.diag_indices(parameter.shape[0]) if "diag" in facts else parameter.sparse_idx
            kept[where] = True
            zeros = tuple(int(i) for i in np.flatnonzero(~kept))
        return _Parameter(parameter.name(), tuple(parameter.shape), facts, log, zeros)

    @property
    def symmetric(self) -> bool:
        return bool(self.facts & {"symmetric", "PSD", "NSD"})

    def batch_of(self, value: Tensor, device: torch.device | None) -> int | None:
        """The batch size, None without one; refuses what is not such a tensor."""
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{self.name}: got {got}, expected a floating tensor.")
        if value.device != device:
            raise ValueError(
                f"{self.name}: got a tensor on {value.device}, expected {device} as the first."
            )
        lead = value.dim() - len(self.shape)
        if lead not in (0, 1) or tuple(value.shape[lead:]) != self.shape:
            batched = ", ".join(map(str, ("batch", *self.shape)))
            raise ValueError(
                f"{self.name}: got shape {tuple(value.shape)}, expected {self.shape} or ({batched})."
            )
        return value.shape[0] if lead else None

    def check(self, value: Tensor) -> None:
        """Refuse values that the problem's convexity does not hold for; NaN is left to the solver."""
        if not value.numel():
            return
        slack = torch.finfo(value.dtype).eps ** 0.5 * max(
            1.0, float(value.abs().nan_to_num().max())
        )
        bad, wanted = None, ""
        if self.log:
            bad, wanted = value <= 0, "a parameter of a geometric program to be positive"
        elif self.facts & {"nonneg", "pos"}:
            bad, wanted = value < -slack, "nonnegative values, as declared"
        elif self.facts & {"nonpos", "neg"}:
            bad, wanted = value > slack, "nonpositive values, as declared"
        elif self.symmetric:
            bad, wanted = (value - value.mT).abs() > slack, "a symmetric matrix, as declared"
            if not bool(bad.any()) and self.facts & {"PSD", "NSD"} and bool(value.isfinite().all()):
                sign = 1.0 if "PSD" in self.facts else -1.0
                eye = torch.eye(value.shape[-1], dtype=torch.float64, device=value.device)
                bad = torch.linalg.cholesky_ex(sign * value.double() + slack * eye).info != 0
                wanted = "a semidefinite matrix, as declared"
        elif self.zeros:
            flat = value.reshape(-1, int(np.prod(self.shape)))
            bad, wanted = flat[:, list(self.zeros)] != 0, "zeros where the sparsity has them"
        if bad is not None and bool(bad.any()):
            at = torch.nonzero(bad)[0].tolist()
            raise ValueError(
                f"{self.name}: got a value that is not so at index {at}, expected {wanted}."
            )

    def vector(self, value: Tensor) -> Tensor:
        """The entries, row-major, as they enter the canonical form.  # (k,) or (batch, k)"""
        value = value.double()
        if self.symmetric:  # the canonical form reads one triangle; both count
            value = 0.5 * (value + value.mT)
        if self.log:
            value = value.log()
        lead = value.dim() - len(self.shape)
        return value.reshape(*value.shape[:lead], int(np.prod(self.shape)))


def _choose(
    problem: Any, parameters: Sequence[Any], variables: Sequence[Any], gp: bool, engine: str
) -> tuple[Canonical, str]:
    """The canonical form for one of the engines, and why it is that one."""
    first = canonicalise(problem, parameters, variables, gp, "CLARABEL")
    entries = (first.rows + first.n) * first.n
    others = [
        name
        for name, there in (
            ("exponential", first.exponential),
            ("semidefinite", first.semidefinite),
        )
        if there
    ]
    if others:
        reason = f"the problem has {' and '.join(others)} cones"
    elif entries > _DENSE:
        reason = f"{first.n} variables and {first.rows} rows are too many for dense matrices"
    elif engine == "diffcp":
        reason = "asked for"
    else:
        return first, "native: linear, quadratic and second-order cone constraints"
    if engine == "native" and others:
        raise ValueError(f"engine: got 'native', expected 'auto' or 'diffcp': {reason}.")
    if engine == "native":
        return first, "native: asked for"
    if not gp and not problem.is_dpp():
        raise ValueError(
            f"problem: got quad_form(x, P) with a parameter P where {reason}, expected a problem "
            "that is DPP without it: write sum_squares(L @ x) with P = L'L."
        )
    second = canonicalise(problem, parameters, variables, gp, "DIFFCP")
    return second, f"diffcp, the engine of cvxpylayers: {reason}"


def _check_solver_args(solver_args: Mapping[str, Any] | None) -> None:
    for name in solver_args or ():
        if name not in _SOLVER_ARGS:
            raise unknown_name("solver_args", name, _SOLVER_ARGS)


def _check_problem(
    problem: Any, parameters: Sequence[Any], variables: Sequence[Any], gp: bool
) -> None:
    """One clear error for what is no such problem."""
    import cvxpy as cp

    if not isinstance(problem, cp.Problem):
        raise TypeError(f"problem: got {type(problem).__name__}, expected a cvxpy.Problem.")
    for what, given, kind in (
        ("parameters", parameters, cp.Parameter),
        ("variables", variables, cp.Variable),
    ):
        if not isinstance(given, list | tuple):
            raise TypeError(f"{what}: got {type(given).__name__}, expected a list or tuple.")
        for leaf in given:
            if not isinstance(leaf, kind):
                raise TypeError(
                    f"{what}: got {type(leaf).__name__}, expected each a cvxpy.{kind.__name__}."
                )
    own = {p.id: p.name() for p in problem.parameters()}
    given_ids = [p.id for p in parameters]
    missing = [name for i, name in own.items() if i not in given_ids]
    extra = [p.name() for p in parameters if p.id not in own]
    if missing or extra or len(set(given_ids)) < len(given_ids):
        raise ValueError(
            f"parameters: got {[p.name() for p in parameters]}, expected each parameter of the "
            f"problem once; missing {missing}, not of the problem {extra}."
        )
    if not variables:
        raise ValueError("variables: got none, expected at least one to return.")
    known = {v.id for v in problem.variables()}
    known |= {dual.id for c in problem.constraints for dual in c.dual_variables}
    strange = [v.name() for v in variables if v.id not in known]
    if strange:
        raise ValueError(
            f"variables: got {strange}, expected variables of the problem, or dual variables of its "
            "constraints."
        )
    if problem.is_mixed_integer():
        raise ValueError("problem: got boolean or integer variables, expected continuous ones.")
    leaves = (*problem.variables(), *problem.parameters())
    if any(leaf.is_complex() for leaf in leaves):
        raise ValueError("problem: got complex variables or parameters, expected real ones.")
    if gp:
        follows, dpp = problem.is_dgp(), problem.is_dpp("dgp")
    else:
        follows, dpp = problem.is_dcp(), problem.is_dpp(quad_form_dpp="qp")
    kind = "geometric programming (DGP)" if gp else "convex programming (DCP)"
    if not follows and not dpp:
        raise ValueError(
            f"problem: got one that does not follow the rules of disciplined {kind}. "
            + ("" if gp else "A geometric program needs gp=True.")
        )
    if not dpp:
        raise ValueError(
            "problem: got one that is convex at fixed parameters but not DPP: its data are not "
            "affine in the parameters (a product of two of them, or one inside a nonlinear "
            "function). Make such an expression a parameter of its own and compute it in torch."
        )
