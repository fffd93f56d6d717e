"""How gradients flow through a solve: exactly, cut short, or unrolled."""

import abc
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import solvers
from ..maps import AffineMap
from ..solution import Solution, unknown_name
from ..solvers import FixedPointSolver
from .affine import Attach, Equation, constant
from .closures import Chord, Inverse, Map, Series, as_rows


def attach(
    f: "Map | AffineMap",
    z: Tensor,
    *,
    solver: "str | FixedPointSolver" = "auto",
    order: int = 1,
    image: Tensor | None = None,
) -> Tensor:
    """Make a solution differentiable, however it was found.

    Args:
        f: the map that z solves.
        z: a solution of z = f(z); its own graph, if any, is dropped.  # (batch, *)
        solver: for the adjoint equation.
        order: how many derivatives a closure gets; differentiating further raises. The forward
            costs `order` evaluations of f. An `AffineMap` has all orders.
        image: f(z), where it is at hand: an `AffineMap` then needs one product less.

    Returns:
        z, with the derivatives of the fixed point in everything f closes over.
    """
    if constant():
        return z
    solver = solvers.get_solver(solver)
    if isinstance(f, AffineMap):
        facts = (f.phi, f.contraction, f.monotone, f.acyclic)
        equation = Equation(*facts, solver, solver, factors=f.factors, image=image)
        return Attach.apply(f.A, f.v, z.detach(), equation)
    z = z.detach()
    inverse = Inverse(as_rows(f, z), z, solver)
    for _ in range(order):
        z = z + Chord.apply(f(z) - z, inverse, order)
    return z


class Adjoint(abc.ABC):
    """How gradients flow through a solve. An adjoint *runs* the solver."""

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

    order: int = 1
    solver: FixedPointSolver | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.order, int) and self.order >= 1):
            raise ValueError(f"Implicit: order={self.order!r}, expected an integer >= 1.")

    def attach(self, f: "Map | AffineMap", z: Tensor, solver: FixedPointSolver) -> Tensor:
        """Exact derivatives."""
        return attach(f, z, solver=self.solver or solver, order=self.order)

    def run(
        self, f: "Map | AffineMap", z0: Tensor | None, solver: FixedPointSolver, **kwargs: Any
    ) -> Solution:
        """Solve, then attach with f(z) as the solver left it."""
        found = solver.solve(f, z0, **kwargs)
        options: dict[str, Any] = {"solver": self.solver or solver, "order": self.order}
        return replace(found, value=attach(f, found.value, image=found.image, **options))


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
        return z + Chord.apply(f(z) - z, Series(as_rows(f, z), z, self.terms), 1)


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
        for _ in range(self.steps):
            z = f(z)
        check = solvers.Picard(rtol=solver.rtol, atol=solver.atol, max_steps=1)
        with torch.no_grad():
            measured = check.solve(f, z)
        steps = torch.full_like(measured.steps, self.steps)
        return replace(measured, value=z, steps=steps, stats={"solver": "Unrolled"})

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
