"""The numbers that the citizenship table is judged by."""

from collections.abc import Callable

import torch
from adapters import Adapter
from torch import Tensor, nn
from torch.func import functional_call

Outcome = tuple[bool, str]


def inputs(adapter: Adapter, batch: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, adapter.inputs, dtype=dtype, generator=generator)


def relative(got: Tensor, expected: Tensor) -> float:
    if got.shape != expected.shape:
        return float("inf")
    error = torch.linalg.vector_norm((got - expected).double())
    return float(error / torch.linalg.vector_norm(expected.double()).clamp_min(1e-30))


def judge(error: float, bound: float) -> Outcome:
    return error <= bound, "" if error <= bound else f"wrong: {percent(error)}"


def percent(error: float) -> str:
    return f"{100 * error:.0f} %" if 0.005 <= error < 100 else f"{error:.1g}"


def flat(tensors: list[Tensor | None], like: list[Tensor]) -> Tensor:
    pairs = zip(tensors, like, strict=True)
    return torch.cat([(torch.zeros_like(p) if t is None else t).reshape(-1) for t, p in pairs])


def function(model: nn.Module) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """(u, *parameters) -> y, and the parameters: what gradcheck and torch.func want."""
    names = [name for name, _ in model.named_parameters()]

    def call(u: Tensor, *values: Tensor) -> Tensor:
        return functional_call(model, dict(zip(names, values, strict=True)), (u,))

    return call, [p.detach().clone() for p in model.parameters()]


def gradient(model: nn.Module, u: Tensor, scale: float = 1.0) -> Tensor:
    """The gradient of scale * sum(w y) by all parameters, as one vector."""
    parameters = list(model.parameters())
    y = model(u)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    loss = (weights * y).sum() * scale
    return flat(list(torch.autograd.grad(loss, parameters, allow_unused=True)), parameters)


def loss(call: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    y = call(*arguments)
    return (torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y) * y.sin()).sum()


def difference(value: Callable[..., Tensor], at: list[Tensor], along: list[Tensor]) -> Tensor:
    """Central differences of fourth order along a direction."""
    h = 2e-4

    def shifted(t: float) -> Tensor:
        moved = [(x + t * h * d).detach().requires_grad_() for x, d in zip(at, along, strict=True)]
        return value(*moved).detach()

    return (8 * (shifted(1) - shifted(-1)) - (shifted(2) - shifted(-2))) / (12 * h)


def differences(value: Callable[..., Tensor], at: list[Tensor]) -> Tensor:
    """The gradient by central differences, one coordinate after the other."""
    columns = []
    for i, x in enumerate(at):
        for j in range(x.numel()):
            along = [torch.zeros_like(y) for y in at]
            along[i].view(-1)[j] = 1
            columns.append(difference(value, at, along))
    return torch.stack(columns)
