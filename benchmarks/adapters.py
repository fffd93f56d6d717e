"""The columns of the citizenship table: how each library builds one small model.

Sizes are the same for all: n = 5 states, 3 inputs, 2 outputs. `build(tight=True)` asks for a
solve to 1e-12 in float64, so that a cell judges the derivative and not a tolerance; with
`tight=False` the library's own default tolerances are left alone.
"""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

STATES, INPUTS, OUTPUTS = 5, 3, 2
TIGHT = 1e-12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """One way to build a model of one library, and to look at its state."""

    name: str
    about: str
    package: str = "implicitdl"
    variant: str = ""
    inputs: int = INPUTS

    def missing(self) -> str:
        """Why this cannot run here, or nothing."""
        from importlib.util import find_spec

        return "" if find_spec(self.package) else f"no module named {self.package}"

    def build(
        self,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        tight: bool = True,
        active: bool = False,
        steps: int | None = None,
    ) -> nn.Module:
        """A model in training mode; `active` puts the weight outside its set, so that it acts."""
        torch.manual_seed(seed)
        model = self._build(tight, steps).to(dtype)
        if active:
            with torch.no_grad():
                for p in model.parameters():
                    if p.shape == (STATES, STATES):
                        p.copy_(3 * torch.randn_like(p))
        return model

    def _build(self, tight: bool, steps: int | None) -> nn.Module:
        raise NotImplementedError

    def solve(self, model: nn.Module, u: Tensor) -> Tensor:
        """The state as a user gets it.  # (batch, n)"""
        raise NotImplementedError

    def state(self, model: nn.Module, u: Tensor) -> Tensor:
        """The state without its graph, also where some samples could not be solved."""
        return self.solve(model, u).detach()

    def misspelt(self) -> object:
        """Build a model with an option whose name is misspelt."""
        raise NotImplementedError


class Ours(Adapter):
    """What our three columns share."""

    def solver(self, tight: bool, steps: int | None) -> object:
        """ "auto", or the same solver with another tolerance or number of steps."""
        if not tight and steps is None:
            return "auto"
        solvers = importlib.import_module("implicitdl.solvers")
        if steps is not None:
            return solvers.Picard(max_steps=steps)
        return solvers.Auto(rtol=TIGHT, atol=TIGHT)

    def solve(self, model: nn.Module, u: Tensor) -> Tensor:
        return model.solve(u).value

    def state(self, model: nn.Module, u: Tensor) -> Tensor:
        from implicitdl.solution import ConvergenceError

        try:
            return model.solve(u).value.detach()
        except ConvergenceError as error:  # names the samples; the others' states are inside
            return error.solution.value.detach()


class OurImplicitLayer(Ours):
    def _build(self, tight: bool, steps: int | None) -> nn.Module:
        from implicitdl.layers import ImplicitLayer

        return ImplicitLayer(
            INPUTS, OUTPUTS, STATES, activation="tanh", solver=self.solver(tight, steps)
        )

    def misspelt(self) -> object:
        from implicitdl.layers import ImplicitLayer

        return ImplicitLayer(INPUTS, OUTPUTS, STATES, max_step=3)


class OurMonotoneLayer(Ours):
    def _build(self, tight: bool, steps: int | None) -> nn.Module:
        from implicitdl.layers import MonotoneLayer

        return MonotoneLayer(
            INPUTS, OUTPUTS, STATES, activation="tanh", solver=self.solver(tight, steps)
        )

    def misspelt(self) -> object:
        from implicitdl.layers import MonotoneLayer

        return MonotoneLayer(INPUTS, OUTPUTS, STATES, max_step=3)

    def build(self, **options: Any) -> nn.Module:
        # Its weight is inside the set by construction, whatever the parameters: always active.
        return super().build(**(options | {"active": False}))


class Cell(nn.Module):
    """f(z, u) = tanh(A z + B u + b), a contraction at its initialisation."""

    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Linear(STATES, STATES, bias=False)
        self.B = nn.Linear(INPUTS, STATES)
        with torch.no_grad():
            self.A.weight.mul_(0.9 / self.A.weight.abs().sum(1).max())

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(self.A(z) + self.B(u))


class Readout(nn.Module):
    """C x + d on top of an equilibrium x(u)."""

    def __init__(self, equilibrium: nn.Module) -> None:
        super().__init__()
        self.equilibrium = equilibrium
        self.C = nn.Linear(STATES, OUTPUTS)

    def solve(self, u: Tensor) -> Any:
        return self.equilibrium.solve(u)

    def forward(self, u: Tensor) -> Tensor:
        return self.C(self.equilibrium(u))


class OurEquilibriumLayer(Ours):
    def _build(self, tight: bool, steps: int | None) -> nn.Module:
        from implicitdl.implicit import Implicit
        from implicitdl.layers import EquilibriumLayer

        solver = self.solver(tight, steps)
        return Readout(EquilibriumLayer(Cell(), STATES, solver=solver, adjoint=Implicit(order=2)))

    def build(self, **options: Any) -> nn.Module:
        # The module is the user's own: there is no set that could act on its weight.
        return super().build(**(options | {"active": False}))

    def misspelt(self) -> object:
        from implicitdl.layers import EquilibriumLayer

        return EquilibriumLayer(Cell(), STATES, max_step=3)


class TorchIDL(Adapter):
    def _build(self, tight: bool, steps: int | None) -> nn.Module:
        from torchidl import ImplicitModel

        options: dict[str, Any] = {}
        if tight:
            options |= {"mitr": 9000, "grad_mitr": 9000, "tol": 1e-14, "grad_tol": 1e-14}
        if steps is not None:
            options |= {"mitr": steps}
        model = ImplicitModel(INPUTS, OUTPUTS, STATES, bias=True, **options)
        with torch.no_grad():  # its own initialisation is nearly zero: make the state matter
            for p in model.parameters():
                p.mul_(STATES)
            model.A.mul_(0.9 / model.A.abs().sum(1).max())
        return model

    def solve(self, model: nn.Module, u: Tensor) -> Tensor:
        ones = torch.cat([u, u.new_ones(len(u), 1)], dim=1)
        x0 = u.new_zeros(STATES, len(u))
        return model.f.apply(model.A, model.B, x0, ones.mT).mT

    def misspelt(self) -> object:
        from torchidl import ImplicitModel

        return ImplicitModel(INPUTS, OUTPUTS, STATES, max_itr=3)


class TorchDEQModel(nn.Module):
    """A deep equilibrium model as torchdeq's documentation writes one."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        from torchdeq import get_deq

        self.f, self.C = Cell(), nn.Linear(STATES, OUTPUTS)
        self.deq = get_deq(**options)

    def solve(self, u: Tensor) -> Tensor:
        z = torch.zeros(*u.shape[:-1], STATES, dtype=u.dtype, device=u.device)
        states, _ = self.deq(lambda z: self.f(z, u), z)
        return states[-1]

    def forward(self, u: Tensor) -> Tensor:
        return self.C(self.solve(u))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchDEQ(Adapter):
    options: Callable[[], dict[str, Any]] = dict

    def _build(self, tight: bool, steps: int | None) -> nn.Module:
        options = self.options()
        if tight:
            options |= {"f_max_iter": 1000, "b_max_iter": 1000, "f_tol": TIGHT, "b_tol": TIGHT}
        if steps is not None:
            options |= {"f_max_iter": steps}
        return TorchDEQModel(**options)

    def build(self, **options: Any) -> nn.Module:
        return super().build(**(options | {"active": False}))

    def solve(self, model: nn.Module, u: Tensor) -> Tensor:
        return model.solve(u)

    def misspelt(self) -> object:
        from torchdeq import get_deq

        return get_deq(f_max_itr=3)


COLUMNS: dict[str, list[Adapter]] = {
    "ImplicitLayer": [
        OurImplicitLayer(
            name="ImplicitLayer",
            about="tanh, infinity-norm ball; active: a weight far outside the ball.",
        )
    ],
    "MonotoneLayer": [
        OurMonotoneLayer(
            name="MonotoneLayer",
            about="tanh; its parametrisation is active at every weight.",
        )
    ],
    "EquilibriumLayer": [
        OurEquilibriumLayer(
            name="EquilibriumLayer",
            about="f(z, u) = tanh(A z + B u + b) of the user, no constraint, a linear "
            "readout; adjoint=Implicit(order=2), since first derivatives are its default.",
        )
    ],
    "torchidl 0.0.4": [
        TorchIDL(
            name="torchidl",
            package="torchidl",
            about="ImplicitModel, ReLU (its only activation), infinity-norm ball.",
        )
    ],
    "torchdeq 0.1.0": [
        TorchDEQ(
            name="torchdeq",
            package="torchdeq",
            about="get_deq() with its defaults, the same f as EquilibriumLayer, no constraint.",
        ),
        TorchDEQ(
            name="torchdeq ift",
            package="torchdeq",
            variant="ift",
            about="the same with ift=True; shown where it differs.",
            options=lambda: {"ift": True},
        ),
        TorchDEQ(
            name="torchdeq hook_ift",
            package="torchdeq",
            variant="hook_ift",
            about="the same with hook_ift=True; shown where it differs.",
            options=lambda: {"hook_ift": True},
        ),
    ],
}
ADAPTERS: dict[str, Adapter] = {a.name: a for column in COLUMNS.values() for a in column}
OURS: list[str] = ["ImplicitLayer", "MonotoneLayer", "EquilibriumLayer"]
