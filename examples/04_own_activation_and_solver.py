"""A new activation and a new solver take at most 20 lines each and pass gradcheck; it prints both.

An activation states its slope range (certificates rest on it) and a formula; a solver writes one
step (stopping, per-sample freezing, best iterate and statistics are in the loop that all solvers
share). Both are then known by name, and gradients of every order come from the same engine.

    python examples/04_own_activation_and_solver.py [--seed N] [--quick]
"""

import argparse
import inspect
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitdl import ImplicitLayer
from implicitdl.activations import Activation, get_activation
from implicitdl.solvers import FixedPointSolver


@dataclass(frozen=True, kw_only=True)
class Arctan(Activation):
    """phi(z) = s atan(z / s), with range (-s pi/2, s pi/2)."""

    scale: float = 1.0
    slope = (0.0, 1.0)  # phi' = 1 / (1 + (z / s)^2)

    @property
    def range(self) -> tuple[float, float]:
        return (-self.scale * math.pi / 2, self.scale * math.pi / 2)

    def __call__(self, z: Tensor) -> Tensor:
        return self.scale * torch.atan(z / self.scale)

    def derivative(self, z: Tensor) -> Tensor:
        return 1 / (1 + (z / self.scale) ** 2)


@dataclass(frozen=True, kw_only=True)
class Aitken(FixedPointSolver):
    """Picard, with an over-relaxation estimated for each sample (Irons and Tuck 1969)."""

    largest: float = 4.0

    def init(self, f, z: Tensor, fz: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(fz), torch.ones_like(fz[:, :1])  # last residual, relaxation

    def step(self, f, z: Tensor, fz: Tensor, state) -> tuple[Tensor, Tensor, tuple]:
        last, omega = state
        r = fz - z
        change = r - last
        size = (change * change).sum(1, keepdim=True)
        better = (
            -omega
            * (last * change).sum(1, keepdim=True)
            / size.clamp_min(torch.finfo(z.dtype).tiny)
        )
        moved = (last * last).sum(1, keepdim=True) > 0
        omega = torch.where(moved, better.clamp(0.1, self.largest), omega)
        z = z + omega * r
        return z, f(z), (r, omega)


def lines(cls: type) -> int:
    """Lines of code of a class: no empty ones."""
    return sum(1 for line in inspect.getsource(cls).splitlines() if line.strip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="check along one random direction")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)

    layer = ImplicitLayer(
        3, 2, state_features=5, activation=Arctan(scale=0.5), solver=Aitken(rtol=1e-12),
        dtype=torch.float64,
    )  # fmt: skip
    with torch.no_grad():
        layer.W.mul_(4)  # rows longer than kappa: the constraint on A is active
    names = [name for name, _ in layer.named_parameters()]

    def output(u: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (u,))

    u = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    leaves = (u, *(p.detach().clone().requires_grad_() for p in layer.parameters()))
    first = torch.autograd.gradcheck(output, leaves, fast_mode=arguments.quick)
    second = torch.autograd.gradgradcheck(output, leaves, fast_mode=arguments.quick)
    print(f"Arctan: {lines(Arctan)} lines; {get_activation('arctan')!r}; gradcheck {first}")
    print(f"Aitken: {lines(Aitken)} lines; gradgradcheck {second}")
    print(layer.certificate())

    # A longer way to the equilibrium: rows of A of length 0.9, all entries positive.
    steps = {}
    for solver in ("picard", "aitken"):
        layer = ImplicitLayer(64, 1, 64, activation=Arctan(), solver=solver)
        with torch.no_grad():
            layer.W.fill_(0.9 / 64)
            layer.B.abs_().mul_(0.01)
        steps[solver] = int(layer.solve(torch.rand(256, 64)).steps.max())
    print(
        f"steps on a contraction of factor 0.9: picard {steps['picard']}, aitken {steps['aitken']}"
    )

    assert first and second
    assert lines(Arctan) <= 20 and lines(Aitken) <= 20
    assert steps["aitken"] < steps["picard"]


if __name__ == "__main__":
    main()
