"""How gradients flow through a solve: exactly, cut short, or unrolled."""

import abc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import solvers
from ..maps import AffineMap, inside_transform
from ..solution import ConvergenceError, Solution, unknown_name
from ..solvers import FixedPointSolver
from .affine import Attach, Equation, constant
from .closures import Chord, Inverse, Map, as_rows, flat


def attach(
    f: "Map | AffineMap",
    z: Tensor,
    *,
    solver: "str | FixedPointSolver" = "auto",
    order: int = 1,
) -> Tensor:
    """Make a solution differentiable, however it was found.

    Args:
        f: the map that z solves.
        z: a solution of z = f(z); its own graph, if any, is dropped.  # (batch, *)
        solver: for the adjoint equation.
        order: how many derivatives a closure gets; differentiating further raises. The forward
            costs `order` evaluations of f. An `AffineMap` has all orders.

    Returns:
        z, with the derivatives of the fixed point in everything f closes over.

    Raises:
        ValueError: z is no solution (||f(z) - z|| > 1e-3 ||f(z)||), or a wrong option.
    """
    return _attach(f, z, solvers.get_solver(solver), _order("attach", order), None)


def attach_root(
    residual: Callable[[Tensor], Tensor], w: Tensor, inverse: Any, order: int = 1
) -> Tensor:
    """Make a root of R(w) = 0 differentiable, with a solver of its derivative's equations given.

    The same chord steps as `attach`'s, w <- w - J^-1 R(w) with J = dR/dw held constant at w.

    Args:
        residual: R, which closes over what w depends on.
        w: the root.  # (batch, n)
        inverse: `apply(b, transposed)` returns J^-1 b or J^-T b, row by row.
        order: how many derivatives are exact; differentiating further raises.
    """
    w = w.detach()
    if constant():
        return w
    for _ in range(order):
        w = w + Chord.apply(-residual(w), inverse, order)
    return w


def _order(who: str, order: int) -> int:
    if isinstance(order, bool) or not isinstance(order, int) or order < 1:
        raise ValueError(f"{who}: order={order!r}, expected an integer >= 1.")
    return order


def _attach(
    f: "Map | AffineMap", z: Tensor, solver: FixedPointSolver, order: int, found: Solution | None
) -> Tensor:
    """`attach`, for what was `found` or, if that is None, for what is to be checked."""
    if constant():
        return z
    z = z.detach()
    if isinstance(f, AffineMap):
        equation = Equation.of(f, solver, found)
        if found is None and not inside_transform():
            with torch.no_grad():
                _check_solution(f(z), z)
        return Attach.apply(f.A, f.v, z, equation)
    # One evaluation serves the derivatives in what f closes over and those in z.
    leaf = z.detach().requires_grad_() if torch.is_grad_enabled() else z
    fz = f(leaf)
    if found is None:
        _check_solution(fz, z)
    else:
        _check_repeated(fz, z, found, solver)
    if leaf.requires_grad and not _reads_more(fz, leaf) and forward_ad._current_level < 0:
        return z
    failed = None if found is None or bool(found.converged.all()) else ~found.converged
    graph = (leaf, fz) if leaf.requires_grad else None
    inverse = Inverse(as_rows(f, z), z, solver, graph=graph, failed=failed)
    z = z + Chord.apply(fz - z, inverse, order)
    for _ in range(order - 1):
        z = z + Chord.apply(f(z) - z, inverse, order)
    return z


def _check_solution(fz: Tensor, z: Tensor) -> None:
    """Refuse what is far from being a solution."""
    change, size = flat((fz - z).detach()).norm(dim=1), flat(fz.detach()).norm(dim=1)
    wrong = ~(change <= 1e-3 * size + torch.finfo(z.dtype).tiny)
    if bool(wrong.any()):
        worst = float((change / size.clamp_min(torch.finfo(z.dtype).tiny)).max())
        raise ValueError(
            f"z: got ||f(z) - z|| = {worst:.2g} ||f(z)||, expected z = f(z) to 1e-3 in every "
            "sample: the derivatives are those of a solution. Solve first, or use fixed_point."
        )


def _check_repeated(fz: Tensor, z: Tensor, found: Solution, solver: FixedPointSolver) -> None:
    """Refuse an f that gives something else at the solution than it gave during the solve."""
    change, size = flat((fz - z).detach()).norm(dim=1), flat(fz.detach()).norm(dim=1)
    eps = torch.finfo(z.dtype).eps
    unit = solver.atol * flat(z).shape[1] ** 0.5 + solver.tolerance(z.dtype) * size
    wrong = found.converged & ~(change <= 10 * unit + 100 * eps * size)
    if bool(wrong.any()):
        bad = torch.nonzero(wrong).flatten()[:8].tolist()
        raise ConvergenceError(
            f"f(z) at the solution differs from what it was during the solve, for samples {bad}: "
            "the rows of f depend on each other, or f is random or has a state (dropout or batch "
            "statistics in training mode). Expected independent rows and a fixed f.",
            found,
        )


def _reads_more(fz: Tensor, leaf: Tensor) -> bool:
    """Whether the graph of fz ends in anything but that leaf."""
    waiting, seen = [fz.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", leaf)
        if variable is not leaf:
            return True
        waiting += [upstream for upstream, _ in node.next_functions]
    return False


class Adjoint(abc.ABC):
    """How gradients flow through a solve. An adjoint *runs* the solver.

    Attributes:
        exact: whether the derivatives are those of the solution.
    """

    exact = False

    @abc.abstractmethod
    def attach(self, f: "Map | AffineMap", z: Tensor, solver: FixedPointSolver) -> Tensor:
        """z, with derivatives. `solver` is the one that found z."""

    def run(
        self, f: "Map | AffineMap", z0: Tensor | None, solver: FixedPointSolver, **kwargs: Any
    ) -> Solution:
        """Solve without a graph, then attach."""
        solution = solver.solve(f, z0, **kwargs)
        return replace(solution, value=self.attach(f, solution.value, solver))


@dataclass(frozen=True, kw_only=True)
class Implicit(Adjoint):
    """The implicit function theorem: one adjoint solve, O(1) memory, exact at the fixed point.

    Args:
        order: derivatives that a general closure gets; asking for more raises. An `AffineMap`
            (`ImplicitLayer`, `MonotoneLayer`, `ImplicitModel`) has all orders whatever this says.
        solver: for the adjoint equation; None means the forward one.
    """

    exact = True
    order: int = 1
    solver: Any = None  # FixedPointSolver | str | None; a FixedPointSolver or None once made

    def __post_init__(self) -> None:
        _order("Implicit", self.order)
        if self.solver is not None:
            object.__setattr__(self, "solver", solvers.get_solver(self.solver))

    def attach(self, f: "Map | AffineMap", z: Tensor, solver: FixedPointSolver) -> Tensor:
        """Exact derivatives."""
        return _attach(f, z, self.solver or solver, self.order, None)

    def run(
        self, f: "Map | AffineMap", z0: Tensor | None, solver: FixedPointSolver, **kwargs: Any
    ) -> Solution:
        """Solve, then attach with what the solve has found."""
        found = solver.solve(f, z0, **kwargs)
        value = _attach(f, found.value, self.solver or solver, self.order, found)
        return replace(found, value=value)


@dataclass(frozen=True, kw_only=True)
class OneStep(Adjoint):
    """Differentiate `steps` damped applications of f at the solution. Biased, cheap.

    steps=1, damping=0 is Jacobian-free backpropagation (Fung et al. 2022); more steps with damping
    are phantom gradients (Geng et al. 2021). The relative bias is of the order kappa^steps.
    """

    steps: int = 1
    damping: float = 0.0

    def __post_init__(self) -> None:
        if not (isinstance(self.steps, int) and self.steps >= 1):
            raise ValueError(f"OneStep: steps={self.steps!r}, expected an integer >= 1.")
        if not 0 <= self.damping < 1:
            raise ValueError(f"OneStep: damping={self.damping}, expected 0 <= damping < 1.")

    def attach(self, f: "Map | AffineMap", z: Tensor, solver: FixedPointSolver) -> Tensor:
        """The last steps, with their graph."""
        if torch.is_grad_enabled():
            z = z.detach()
            for _ in range(self.steps):
                z = torch.lerp(f(z), z, self.damping) if self.damping else f(z)
        return z


@dataclass(frozen=True, kw_only=True)
class Neumann(Adjoint):
    """(I - J)^-1 cut off after J^terms: `terms` products in place of the adjoint solve. Biased.

    The relative bias is of the order kappa^(terms + 1).
    """

    terms: int = 5

    def __post_init__(self) -> None:
        if not (isinstance(self.terms, int) and self.terms >= 0):
            raise ValueError(f"Neumann: terms={self.terms!r}, expected an integer >= 0.")

    def attach(self, f: "Map | AffineMap", z: Tensor, solver: FixedPointSolver) -> Tensor:
        """One chord step with the truncated series."""
        if not torch.is_grad_enabled():
            return z
        z = z.detach()
        return z + Chord.apply(f(z) - z, Inverse(as_rows(f, z), z, solver, terms=self.terms), 1)


@dataclass(frozen=True, kw_only=True)
class Unrolled(Adjoint):
    """Backpropagate through `steps` plain applications of f from z0. O(steps) memory.

    The reference that tests compare with; only for contractions. Where the iteration has not
    converged by then, the solution says so. The solver lends its tolerances.
    """

    steps: int = 100

    def __post_init__(self) -> None:
        if not (isinstance(self.steps, int) and self.steps >= 1):
            raise ValueError(f"Unrolled: steps={self.steps!r}, expected an integer >= 1.")

    def run(
        self, f: "Map | AffineMap", z0: Tensor | None, solver: FixedPointSolver, **kwargs: Any
    ) -> Solution:
        """Iterate with a graph; the residual is measured at the end."""
        z = f.start().detach() if z0 is None else z0
        frames = [z.detach()]
        for _ in range(self.steps):
            z = f(z)
            if kwargs.get("record"):
                frames.append(z.detach())
        check = solvers.Picard(rtol=solver.rtol, atol=solver.atol, max_steps=1)
        with torch.no_grad():
            measured = check.solve(f, z)
        steps = torch.full_like(measured.steps, self.steps)
        stats: dict[str, Any] = {"solver": "Unrolled", "evaluations": self.steps + 1}
        if kwargs.get("record"):
            stats["trajectory"] = torch.stack(frames)
        return replace(measured, value=z, steps=steps, stats=stats)

    def attach(self, f: "Map | AffineMap", z: Tensor, solver: FixedPointSolver) -> Tensor:
        """Unroll from the solution."""
        for _ in range(self.steps):
            z = f(z)
        return z


_ADJOINTS = {
    "implicit": Implicit,
    "one_step": OneStep,
    "neumann": Neumann,
    "unrolled": Unrolled,
}


def get_adjoint(adjoint: "str | Adjoint") -> Adjoint:
    """An adjoint from its name (`"implicit"`, `"one_step"`, `"neumann"`, `"unrolled"`) or itself."""
    if isinstance(adjoint, Adjoint):
        return adjoint
    if adjoint not in _ADJOINTS:
        raise unknown_name("adjoint", adjoint, _ADJOINTS)
    return _ADJOINTS[adjoint]()
