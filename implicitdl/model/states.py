"""Solving for the state over any batch shape, for models and layers alike."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..activations import Activation
from ..implicit import Adjoint as AdjointType
from ..implicit import Equation, equilibrium, get_adjoint
from ..maps import AffineMap, RowMap, inside_transform
from ..solution import Solution, check_on_failure
from ..solvers import FixedPointSolver, get_solver


def in_full_precision(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The operator, outside autocast: a model's blocks keep its dtype."""

    @functools.wraps(operator)
    def wrapped(self: Any, *args: Any) -> Any:
        device = self.device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return operator(self, *args)
        with torch.autocast(device, enabled=False):
            return operator(self, *args)

    return wrapped


def accept(u: Tensor, width: int, like: Tensor) -> Tensor:
    """The input u, checked; under autocast, in the dtype of the weights `like`."""
    u = cast(u, like)
    check_input(u, width, like, "u")
    return u


def cast(t: Tensor, like: Tensor) -> Tensor:
    """t; under autocast, where inputs come in any dtype, in that of the weights `like`."""
    here = isinstance(t, Tensor) and t.device == like.device
    return t.to(like.dtype) if here and torch.is_autocast_enabled(t.device.type) else t


def check_input(u: Tensor, width: int, like: Tensor, name: str) -> None:
    """Refuse an input of the wrong kind in one line."""
    if not isinstance(u, Tensor):
        raise TypeError(f"{name}: got {type(u).__name__}, expected a tensor (*batch, {width}).")
    if u.dim() == 0 or u.shape[-1] != width:
        raise ValueError(f"{name}: got shape {tuple(u.shape)}, expected (*batch, {width}).")
    if u.dtype != like.dtype:
        raise ValueError(
            f"{name}: got {u.dtype}, expected {like.dtype} as the weights; convert with .to()."
        )
    if u.device != like.device:
        raise ValueError(
            f"{name}: got a tensor on {u.device}, expected {like.device} where the weights are."
        )


def solve_state(
    A: Tensor,
    v: Tensor,
    equation: Equation,
    x0: Tensor | None,
    solver: "str | FixedPointSolver",
    adjoint: "str | AdjointType",
    on_failure: str,
    record: bool,
    bound: "Callable[[Tensor], Tensor] | None" = None,
) -> Solution:
    """x = phi(A x + v) over any batch shape, with the error bound where there is one.

    Args:
        bound: from the residual f(x) - x, in float64, to the bound of each row.
    """
    check_on_failure(on_failure)
    solver, adjoint = get_solver(solver), get_adjoint(adjoint)
    batch, n = v.shape[:-1], v.shape[-1]
    if x0 is not None:
        check_input(x0, n, v, "x0")
        if x0.shape != v.shape:
            raise ValueError(f"x0: got shape {tuple(x0.shape)}, expected {tuple(v.shape)}.")
        x0 = x0.reshape(-1, n)
    rows = v.reshape(-1, n)
    f: AffineMap | RowMap = equation.map(A, rows)
    if not equation.phi.symmetric:  # whose adjoint is not an equation of the same kind
        f, phi = RowMap(lambda x: phi(torch.addmm(rows, x, A.mT)), rows.shape), equation.phi
        x0 = phi(rows.detach()) if x0 is None else x0
    solution = adjoint.run(f, x0, solver, record=record)
    error = None
    if bound is not None and not inside_transform():
        with torch.no_grad():
            error = bound(
                _residual_at_most(A, v.reshape(-1, n), equation.phi, solution.value)
            ).view(batch)
            # A norm over n states and a product, rounded up; of NaN nothing is known.
            error = error * (1 + (n + 16) * torch.finfo(torch.float64).eps)
            error = error.nan_to_num(nan=torch.inf, posinf=torch.inf)
    stats = dict(solution.stats)
    if record:
        frames = stats["trajectory"]
        stats["trajectory"] = frames.view(len(frames), *batch, n)
    return replace(
        solution,
        value=solution.value.view(*batch, n),
        codes=solution.codes.view(batch),
        residual=solution.residual.view(batch),
        steps=solution.steps.view(batch),
        image=None if solution.image is None else solution.image.view(*batch, n),
        error_bound=error,
        stats=stats,
    ).check(on_failure)


def state_alone(A: Tensor, v: Tensor, equation: Equation) -> Tensor:
    """x = phi(A x + v) over any batch shape, under `torch.func`, too."""
    return equilibrium(A, v.reshape(-1, v.shape[-1]), equation).reshape(v.shape)


def _residual_at_most(A: Tensor, v: Tensor, phi: Activation, x: Tensor) -> Tensor:
    """|f(x) - x|, entry by entry, rounded up: its float64 evaluation with an allowance for the
    rounding of the sum, of phi and of the difference.

    A sum of n + 1 terms is off by at most (n + 2) eps sum |terms| (Higham 2002, section 3.1); phi
    passes that on with its Lipschitz constant and adds a few roundings of its own. What underflows
    is off by the smallest normal number at most.
    """
    eps, tiny = torch.finfo(torch.float64).eps, torch.finfo(torch.float64).tiny
    A, v, x = A.detach().double(), v.detach().double(), x.detach().double()
    fx = AffineMap(A, v, phi)(x)
    size = x.abs() @ A.abs().mT + v.abs()
    n, own = A.shape[-1], 8 if phi.entrywise else A.shape[-1] + 8
    slack = (n + 4) * phi.lipschitz * (eps * size + tiny) + eps * (own * fx.abs() + x.abs())
    if not phi.entrywise:  # the constant is that of the 2-norm, which the sum bounds
        slack = slack.sum(-1, keepdim=True).expand_as(slack)
    return (fx - x).abs() + slack
