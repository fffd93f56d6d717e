"""Derivatives of x = phi(A x + v) to every order, in every mode of torch.

    s = P_d (A^T s + x_bar),  A_bar = s x^T,  v_bar = s        backward, d = phi'(A x + v)
    x' = P_d (A x' + A' x + v')                                forward

Both equations are again affine equilibria, with the linear activation w -> P_d w, so the code that
solves the equation solves them too.

Reference: El Ghaoui et al. (2021), section 5.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import activations, solvers
from .._linalg import reverse_only
from ..maps import AffineMap, Factors, Scaled, inside_transform
from ..solution import Solution, Status
from ..solvers import Auto, FixedPointSolver
from .closures import checked, row_scale, spared


@dataclass(frozen=True)
class Equation:
    """x = phi(A x + v) without its tensors: the activation, the facts, the solvers.

    Attributes:
        phi, contraction, monotone, acyclic: as in `AffineMap`.
        solver: of the equation.
        adjoint_solver: of its adjoint and tangent equations.
        spec: all of this as JSON, which is how compiled and exported graphs carry it.
        factors: what the solve found out about A, for the adjoint to use.
        image: f(x) at the solution x, from the solve.
        failed: which samples were not solved, or None: no gradient may flow into them.
    """

    phi: activations.Activation
    contraction: float | None = None
    monotone: float | None = None
    acyclic: bool = False
    solver: FixedPointSolver = field(default_factory=Auto)
    adjoint_solver: FixedPointSolver = field(default_factory=Auto)
    spec: str = field(default="", compare=False)
    factors: Factors | None = field(default=None, compare=False, repr=False)
    image: Tensor | None = field(default=None, compare=False, repr=False)
    failed: Tensor | None = field(default=None, compare=False, repr=False)

    def map(self, A: Tensor, v: Tensor, phi: activations.Activation | None = None) -> AffineMap:
        """f at these tensors."""
        factors = self.factors if A.dim() == 2 else None
        phi = self.phi if phi is None else phi
        return AffineMap(A, v, phi, self.contraction, self.monotone, self.acyclic, factors)

    @classmethod
    def of(
        cls, f: AffineMap, solver: FixedPointSolver, found: "Solution | None" = None
    ) -> "Equation":
        """The equation that f stands for, with what a solve of it has found."""
        facts = (f.phi, f.contraction, f.monotone, f.acyclic, solver, solver, "", f.factors)
        if found is None:
            return cls(*facts)
        failed = None if found.status is Status.CONVERGED else ~found.converged
        return cls(*facts, found.image, failed)

    @functools.cached_property
    def mT(self) -> "Equation":
        """The same for A^T."""
        factors = None if self.factors is None else self.factors.mT
        return replace(self, factors=factors, image=None, failed=None)

    def derivative(self, A: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """phi' at the solution x, as a function of all three where a graph is recorded."""
        if self.image is not None and not torch.is_grad_enabled():
            d = self.phi.derivative_at(self.image)
            if d is not None:
                return d
        return self.phi.derivative(AffineMap(A, v, self.phi).affine(x))

    def linear(self, M: Tensor, d: Tensor, c: Tensor) -> Tensor:
        """The solution of y = P_d (M y + c), row by row.  # (m, n)"""
        scale = row_scale(c)
        c = c / scale
        f = self.map(M, c, Scaled(phi=self.phi, d=d))
        return checked(self.adjoint_solver.solve(f)).value * scale

    def with_spec(self) -> "Equation":
        """The same with `spec` filled in, which `torch.compile` and `torch.export` need."""
        facts = {
            "phi": self.phi.to_config(),
            "contraction": self.contraction,
            "monotone": self.monotone,
            "acyclic": self.acyclic,
            "solver": self.solver.to_config(),
            "adjoint_solver": self.adjoint_solver.to_config(),
        }
        spec = json.dumps(facts)
        if _equation(spec) != self:
            raise TypeError(f"{self.phi} is not what its configuration describes")
        return replace(self, spec=spec)

    @staticmethod
    def from_spec(spec: str) -> "Equation":
        """The equation that `spec` described.

        Raises:
            ValueError, TypeError, KeyError: it describes none.
        """
        return _equation(spec)


@functools.lru_cache(maxsize=256)
def _equation(spec: str) -> Equation:
    """The equation that `Equation.spec` described."""
    facts = json.loads(spec)
    facts["phi"] = activations.from_config(facts["phi"])
    for key in ("solver", "adjoint_solver"):
        facts[key] = solvers.from_config(facts[key])
    return Equation(**facts)


def equilibrium(A: Tensor, v: Tensor, equation: Equation) -> Tensor:
    """The solution of x = phi(A x + v), differentiable to every order in A and v.

    The way a layer calls the engine: it returns the tensor alone, raises where a sample fails, and
    works in eager mode, under `torch.func`, `torch.compile` and `torch.export`.

    Args:
        A: the weight.  # (n, n)
        v: B u + b.  # (m, n)
        equation: activation, facts and solvers.

    Raises:
        ConvergenceError: a sample did not converge, forward or in a derivative.
    """
    if reverse_only("An implicit solve"):
        if not equation.spec:
            raise RuntimeError(
                f"torch.compile and torch.export carry an equation as JSON, which {equation.phi} or "
                "a solver cannot be written as: make it a registered dataclass of plain numbers."
            )
        return torch.ops.implicitdl.equilibrium(A, v, equation.spec)
    if inside_transform():
        x = _Solve.apply(A.detach(), v.detach(), equation)
        return Attach.apply(A, v, x, equation)
    f = equation.map(A.detach(), v.detach())
    solution = equation.solver.solve(f).check()
    if constant():
        return solution.value
    found = Equation.of(f, equation.adjoint_solver, solution)
    return Attach.apply(A, v, solution.value, found)


def constant() -> bool:
    """Whether no kind of derivative can be asked of what is computed now."""
    return not (torch.is_grad_enabled() or forward_ad._current_level >= 0 or inside_transform())


def _outer(s: Tensor, x: Tensor, A: Tensor) -> Tensor:
    """The gradient in A of <s, x A^T>, for one A or for one a group."""
    if A.dim() == 2:
        return s.mT @ x
    grouped = (A.shape[0], -1, A.shape[-1])
    return s.reshape(grouped).mT @ x.reshape(grouped)


def _fold(info: Any, dims: tuple[int | None, ...], A: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
    """Samples of all mapped instances as one batch, with an A a group where A is mapped too."""
    size = info.batch_size
    folded = []
    for t, dim in zip(rows, dims[1:], strict=False):
        t = t.movedim(dim, 0) if dim is not None else t.expand(size, *t.shape)
        folded.append(t.reshape(-1, t.shape[-1]))
    if dims[0] is not None or A.dim() == 3:
        A = A.movedim(dims[0], 0) if dims[0] is not None else A.expand(size, *A.shape)
        A = A.reshape(-1, *A.shape[-2:])
    return A, *folded


def _refuse_nested_forward_mode() -> None:
    """What a Function saves for forward mode has lost the tangents of an outer forward mode, so
    that torch.func.jacfwd(jacfwd(...)) would be wrong without a word."""
    functorch = torch._C._functorch
    modes = [level.key() for level in functorch.get_interpreter_stack() or []]
    if modes.count(functorch.TransformType.Jvp) > 1:
        raise RuntimeError(
            "Forward mode inside forward mode cannot be had through an implicit solve. For second "
            "derivatives use torch.func.hessian, which is jacfwd(jacrev(...)), or reverse mode."
        )


def in_full_precision(rule: Callable[..., Any]) -> Callable[..., Any]:
    """The rule of an autograd.Function, outside autocast whatever the backward pass runs under."""

    @functools.wraps(rule)
    def wrapped(ctx: Any, *args: Any) -> Any:
        device = ctx.saved_tensors[0].device.type
        if not torch.is_autocast_enabled(device):
            return rule(ctx, *args)
        with torch.autocast(device, enabled=False):
            return rule(ctx, *args)

    return wrapped


class _Rule(torch.autograd.Function):
    """An autograd.Function whose call is cheap: torch binds arguments by `inspect.signature` on
    every one, for defaults that there are none of here."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if inside_transform() or torch.compiler.is_compiling():
            return super().apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]


class _Solve(_Rule):
    """The solve alone, for transforms: a constant, of which `Attach` makes a function."""

    @staticmethod
    def forward(A: Tensor, v: Tensor, equation: Equation) -> Tensor:
        return equation.solver.solve(equation.map(A, v)).check().value

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        return None, None, None

    @staticmethod
    def vmap(info: Any, dims: Any, A: Tensor, v: Tensor, equation: Equation) -> Any:
        size = info.batch_size
        x = _Solve.apply(*_fold(info, dims, A, v), equation)
        return x.view(size, -1, x.shape[-1]), 0


class Attach(_Rule):
    """x, with the derivatives of the solution of x = phi(A x + v).

    s = P_d (A^T s + x_bar),  A_bar = s x^T,  v_bar = s;   x' = P_d (A x' + A' x + v').
    All in differentiable operations of (A, v, x), x being the output itself: so every order.
    """

    @staticmethod
    def forward(A: Tensor, v: Tensor, x: Tensor, equation: Equation) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        A, v, _, ctx.equation = inputs
        ctx.save_for_backward(A, v, output)
        ctx.save_for_forward(A, v, output)

    @staticmethod
    @in_full_precision
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        A, v, x = ctx.saved_tensors
        d = ctx.equation.derivative(A, v, x)
        if (failed := ctx.equation.failed) is not None:
            d, x = spared(failed, g, d), spared(failed, g, x)
        s = _Linear.apply(A.mT, d, g, ctx.equation.mT)
        return _outer(s, x, A) if ctx.needs_input_grad[0] else None, s, None, None

    @staticmethod
    @in_full_precision
    def jvp(ctx: Any, dA: Any, dv: Any, *_: Any) -> Tensor:  # type: ignore[override]
        A, v, x = ctx.saved_tensors
        _refuse_nested_forward_mode()
        d = ctx.equation.derivative(A, v, x)
        if (failed := ctx.equation.failed) is not None:
            d, x = d.masked_fill(failed[:, None], 0.0), x.masked_fill(failed[:, None], 0.0)
        c = torch.zeros_like(x) if dv is None else dv
        if dA is not None:
            c = AffineMap(dA, c, ctx.equation.phi).affine(x)
        return _Linear.apply(A, d, c, ctx.equation)

    @staticmethod
    def vmap(info: Any, dims: Any, A: Tensor, v: Tensor, x: Tensor, equation: Equation) -> Any:
        out = Attach.apply(*_fold(info, dims, A, v, x), equation)
        return out.view(info.batch_size, -1, out.shape[-1]), 0


class _Linear(_Rule):
    """(M, d, c) -> y = P_d (M y + c), the linearised equation or, with M = A^T, its adjoint."""

    @staticmethod
    def forward(M: Tensor, d: Tensor, c: Tensor, equation: Equation) -> Tensor:
        return equation.linear(M, d.detach(), c.detach())

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        M, d, c, ctx.equation = inputs
        ctx.save_for_backward(M, d, c, output)
        ctx.save_for_forward(M, d, c, output)

    @staticmethod
    @in_full_precision
    def backward(ctx: Any, h: Tensor) -> Any:  # type: ignore[override]
        M, d, c, y = ctx.saved_tensors
        phi = ctx.equation.phi
        t = _Linear.apply(M.mT, d, h, ctx.equation.mT)
        d_bar = None
        if ctx.needs_input_grad[1]:
            q = AffineMap(M, c, phi).affine(y)
            y_bar = AffineMap(M.mT, h, phi).affine(t)
            if phi.entrywise:
                d_bar = q * y_bar
            else:
                d_bar = torch.func.vjp(lambda d: phi.product(d, q), d)[1](y_bar)[0]
        return _outer(t, y, M) if ctx.needs_input_grad[0] else None, d_bar, t, None

    @staticmethod
    @in_full_precision
    def jvp(ctx: Any, dM: Any, dd: Any, dc: Any, *_: Any) -> Tensor:  # type: ignore[override]
        M, d, c, y = ctx.saved_tensors
        _refuse_nested_forward_mode()
        phi = ctx.equation.phi
        shift = torch.zeros_like(y) if dc is None else dc
        if dM is not None:
            shift = AffineMap(dM, shift, phi).affine(y)
        if dd is None:
            return _Linear.apply(M, d, shift, ctx.equation)
        q = AffineMap(M, c, phi).affine(y)
        if phi.entrywise:
            extra = q * dd
        else:
            # Two reverse passes: forward mode does not nest in forward mode.
            pull = torch.func.vjp(lambda d: phi.product(d, q), d)[1]
            push = torch.func.vjp(lambda w: pull(w)[0], torch.zeros_like(q))[1]
            extra = push(dd)[0]
        shift = AffineMap(M, shift, phi).affine(extra)
        return extra + _Linear.apply(M, d, shift, ctx.equation)

    @staticmethod
    def vmap(info: Any, dims: Any, M: Tensor, d: Tensor, c: Tensor, equation: Equation) -> Any:
        out = _Linear.apply(*_fold(info, dims, M, d, c), equation)
        return out.view(info.batch_size, -1, out.shape[-1]), 0


# Registered operators: one node in a compiled or exported graph.


@torch.library.custom_op("implicitdl::equilibrium", mutates_args=())
def _equilibrium_op(A: Tensor, v: Tensor, spec: str) -> Tensor:
    equation = _equation(spec)
    return equation.solver.solve(equation.map(A, v)).check().value


@torch.library.custom_op("implicitdl::adjoint", mutates_args=())
def _adjoint_op(A: Tensor, v: Tensor, x: Tensor, g: Tensor, spec: str) -> Tensor:
    equation = _equation(spec)
    return equation.linear(A.mT, equation.phi.derivative(equation.map(A, v).affine(x)), g)


@_equilibrium_op.register_fake
def _(A: Tensor, v: Tensor, spec: str) -> Tensor:
    return torch.empty_like(v)


@_adjoint_op.register_fake
def _(A: Tensor, v: Tensor, x: Tensor, g: Tensor, spec: str) -> Tensor:
    return torch.empty_like(v)


def _op_setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    A, v, ctx.spec = inputs
    ctx.save_for_backward(A, v, output)


def _op_backward(ctx: Any, g: Tensor) -> Any:
    A, v, x = ctx.saved_tensors
    s = torch.ops.implicitdl.adjoint(A, v, x, g, ctx.spec)
    return s.mT @ x, s, None


_equilibrium_op.register_autograd(_op_backward, setup_context=_op_setup)
