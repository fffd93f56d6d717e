"""The native solver inside cvxpylayers: `CvxpyLayer(problem, ..., solver=NativeCone())`."""

import functools
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ..solution import unknown_name
from .canonical import refuse_set_apart
from .cones import Cones
from .layers import ConeProgram
from .solver import ConeSolver


class NativeCone:
    """A `SolverInterface` of cvxpylayers that solves with `ConeProgram`.

    For problems of linear, quadratic and second-order cone constraints. What cvxpylayers does around
    it stays as it is: it differentiates once, and not under torch.func; `ConvexLayer` does more.
    An instance serves one layer.

    Args:
        solver: how programs are solved.
        on_failure: as in `ConeProgram`: `"raise"`, `"warn"`, `"return"` or `"nan"`.

    Raises:
        ImportError: cvxpylayers is not there, or has no `SolverInterface`.

    Example:
        >>> import cvxpy as cp, torch
        >>> from cvxpylayers.torch import CvxpyLayer
        >>> from implicitdl.convex import NativeCone
        >>> x, b = cp.Variable(2), cp.Parameter(2)
        >>> problem = cp.Problem(cp.Minimize(cp.sum_squares(x - b)), [x >= 0])
        >>> layer = CvxpyLayer(problem, [b], [x], solver=NativeCone())
        >>> layer(torch.tensor([1.0, -2.0]))[0].round(decimals=4)
        tensor([1., 0.])
    """

    # What cvxpylayers reads: whose canonical form it wants, and with 1/2 x'Px in it.
    canon_solver = "CLARABEL"
    supports_quad_obj = True

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """An instance that is a SolverInterface as well, cvxpylayers being imported only now."""
        return object.__new__(_joined())

    def __init__(self, solver: ConeSolver | None = None, *, on_failure: str = "raise"):
        self.program = ConeProgram(Cones(), solver=solver, on_failure=on_failure)
        self._layout: _Layout | None = None
        self._dtype: torch.dtype | None = None

    def setup(self, ctx: Any) -> None:
        """Called once, by the layer.

        Args:
            ctx: cvxpylayers' LayersContext.

        Raises:
            ValueError: the problem has cones of other kinds.
            RuntimeError: the canonical form keeps constraints beside its matrix.
        """
        if self._layout is not None and self._layout.context is not ctx:
            raise ValueError(
                "solver: got a NativeCone that serves another layer, expected one of its own: "
                "solver=NativeCone()."
            )
        _refuse_dropped(ctx)
        self._layout = _Layout(ctx)

    def set_params(self, params: list[Any]) -> None:
        """Called before each solve: the result takes the parameters' dtype.

        Args:
            params: their values, as arrays.
        """
        kinds = [torch.from_numpy(np.empty(0, p.dtype)).dtype for p in params]
        self._dtype = functools.reduce(torch.promote_types, kinds) if kinds else None

    def solve_torch_batch(
        self,
        P: Tensor | None,
        q: Tensor,
        A: Tensor,
        dims: Any,
        solver_args: Mapping[str, Any] | None,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor, Any]:
        """The solutions and duals of a batch, and what their derivative needs.

        Args:
            P, A: nonzeros of P and of [-M | r], in the layer's order.  # (batch, nonzeros)
            q: with the objective's constant as its last entry.  # (batch, n + 1)
            dims: the cones.
            solver_args: fields of `ConeSolver` that differ in this call.
            needs_grad: whether a derivative will be asked for.

        Returns:
            x, # (batch, n); the dual of M x + s = r, # (batch, m); and the state.
        """
        layout = self._layout
        options = dict(solver_args or {})
        known = [f.name for f in fields(ConeSolver)]
        for name in options:
            if name not in known:
                raise unknown_name("solver_args", name, known)
        solver = replace(self.program.solver, **options)
        program = ConeProgram(layout.cones, solver=solver, on_failure=self.program.on_failure)
        with torch.set_grad_enabled(needs_grad):
            leaves = [
                None if t is None else t.detach().double().requires_grad_(needs_grad)
                for t in (P, q, A)
            ]
            data = layout.data(*leaves)
            stats = (found := program.solve(*data)).stats
            outputs = [found.value, torch.cat([stats["equality_dual"], stats["dual"]], -1)]
        dtype = self._dtype or q.dtype
        x, y = (t.detach().to(dtype) for t in outputs)
        return x, y, (outputs, leaves, q.dtype) if needs_grad else None

    def derivative_torch_batch(
        self, dprimal: Tensor, ddual: Tensor, saved_state: Any
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """The gradients of P, q and A.

        Args:
            dprimal, ddual: of the loss in what `solve_torch_batch` returned.
            saved_state: its third value.

        Returns:
            dP, dq, dA: shaped as there; dP is None where P was.
        """
        outputs, leaves, dtype = saved_state
        given = [t for t in leaves if t is not None]
        above = [g.to(t.dtype) for g, t in zip((dprimal, ddual), outputs, strict=True)]
        found = torch.autograd.grad(
            outputs, given, above, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        grads = [g.to(dtype) for g in found]
        return (None if leaves[0] is None else grads.pop(0), *grads)  # type: ignore[return-value]


@functools.cache
def _joined() -> Any:
    """The class, with cvxpylayers' interface as its second base."""
    try:
        from cvxpylayers.interfaces.base import SolverInterface
    except ImportError as error:
        raise ImportError(
            "NativeCone: got no cvxpylayers.interfaces.base.SolverInterface, expected cvxpylayers "
            "1.2 or later: pip install -U cvxpylayers. `ConvexLayer` needs none."
        ) from error
    kind = type(SolverInterface)
    return kind(NativeCone.__name__, (NativeCone, SolverInterface), {"__doc__": NativeCone.__doc__})


class _Layout:
    """Where the nonzeros that cvxpylayers hands over stand in dense matrices."""

    def __init__(self, ctx: Any):
        self.context = ctx
        dims = ctx.cone_dims
        others = [
            name
            for name, there in (
                ("exponential", dims.exp),
                ("semidefinite", dims.psd),
                ("power", [*dims.p3d, *getattr(dims, "pnd", [])]),
            )
            if there
        ]
        if others:
            raise ValueError(
                f"problem: got {' and '.join(others)} cones, expected zero, nonnegative and "
                "second-order ones. ConvexLayer takes these as well."
            )
        self.cones = Cones(int(dims.nonneg), tuple(int(k) for k in dims.soc))
        self.p = int(dims.zero)
        self.m = self.p + self.cones.size
        self.n = int(ctx.q.shape[0]) - 1
        self.A = _positions(ctx.reduced_A.problem_data_index)
        self.P = _positions(ctx.reduced_P.problem_data_index)

    def data(
        self, P: Tensor | None, q: Tensor, A: Tensor
    ) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """P, q, G, h, A, b of a ConeProgram."""
        n, m, p = self.n, self.m, self.p
        quadratic = None if P is None else _dense(P, self.P, n, n)
        whole = _dense(A, self.A, m, n + 1)
        M, r = -whole[..., :n], whole[..., n]
        G, h = (M[:, p:], r[:, p:]) if m > p else (None, None)
        E, b = (M[:, :p], r[:, :p]) if p else (None, None)
        return quadratic, q[:, :n], G, h, E, b


def _positions(structure: Any) -> Tensor:
    """Row-major positions of nonzeros that come by compressed columns."""
    if structure is None:
        return torch.zeros(0, dtype=torch.long)
    rows, pointers, (_, width) = structure
    columns = np.repeat(np.arange(len(pointers) - 1), np.diff(pointers))
    return torch.from_numpy(np.asarray(rows, dtype=np.int64) * int(width) + columns)


def _dense(values: Tensor, at: Tensor, rows: int, columns: int) -> Tensor:
    """Matrices of these entries.  # (batch, nonzeros) -> (batch, rows, columns)"""
    flat = values.new_zeros(values.shape[0], rows * columns)
    return flat.index_add(1, at.to(values.device), values).unflatten(1, (rows, columns))


def _refuse_dropped(ctx: Any) -> None:
    """Canonicalise once more, to see what cvxpylayers does not look at."""
    import cvxpy as cp
    from cvxpy.utilities import scopes

    problem = ctx.problem
    if ctx.gp:
        problem, _ = cp.reductions.Dgp2Dcp(problem).apply(problem)
    with scopes.quad_form_dpp_scope():
        data, _, _ = problem.get_problem_data(solver=NativeCone.canon_solver)
    refuse_set_apart(data["param_prob"])
    rows = data["param_prob"].A.shape[0]
    got = ctx.reduced_A.matrix_data.shape[0]
    if got != rows:
        raise RuntimeError(
            f"cvxpy: got a canonical form of {got} entries, expected {rows}: constraints were "
            "dropped. Use ConvexLayer."
        )
