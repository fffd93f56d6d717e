"""Fixed points with gradients: `fixed_point` solves, `attach` differentiates.

At z = f(z, theta) the implicit function theorem gives, with J = df/dz,

    dz/dtheta = (I - J)^-1 df/dtheta,      theta_bar = (df/dtheta)^T u,   u = J^T u + z_bar.

`attach` puts these derivatives on a solution that was found by any means. A closure gets them by
chord steps that leave the value alone: z <- z + M (f(z) - z) with M = (I - J)^-1 held constant
makes one more derivative exact each time, whatever f closes over. An `AffineMap` names its tensors,
so its rule is written in differentiable operations and is exact to every order; it also serves
forward mode, `torch.func` and, as registered operators, `torch.compile` and `torch.export`.

Reference: El Ghaoui et al. (2021), section 5; Bai, Kolter, Koltun (2019), theorem 1.
"""

import torch
from torch import Tensor

from .. import solvers
from ..maps import AffineMap, RowMap
from ..solution import Solution, check_on_failure
from ..solvers import FixedPointSolver
from .adjoints import (
    Adjoint,
    Implicit,
    Neumann,
    OneStep,
    Unrolled,
    attach,
    attach_root,
    get_adjoint,
)
from .affine import Equation, constant, equilibrium
from .closures import Limit, Map, refuse_transforms
from .lifted import Lifted

__all__ = [
    "Adjoint",
    "Equation",
    "Implicit",
    "Lifted",
    "Limit",
    "Neumann",
    "OneStep",
    "Unrolled",
    "attach",
    "attach_root",
    "constant",
    "equilibrium",
    "fixed_point",
    "get_adjoint",
    "refuse_transforms",
]


def fixed_point(
    f: "Map | AffineMap",
    z0: Tensor | None = None,  # (batch, *)
    *,
    solver: "str | FixedPointSolver" = "auto",
    adjoint: "str | Adjoint" = "implicit",
    on_failure: str = "raise",
    record: bool = False,
    contraction: float | None = None,
) -> Solution:
    """Solve z = f(z), differentiably in everything f closes over.

    Args:
        f: the map, (batch, *) -> (batch, *), rows independent; or an `AffineMap`.
        z0: where to start; None, for an `AffineMap`, leaves it to the solver.
        solver: a solver or its name.
        adjoint: how gradients are computed.
        on_failure: `"raise"`, `"warn"` or `"return"` when a sample does not converge. The adjoint
            solve of the backward pass always raises.
        record: keep the iterates in `stats["trajectory"]`.
        contraction: for a closure, a factor it is known to contract by (an `AffineMap` says so
            itself).

    Returns:
        Solution with a differentiable `value`.

    Raises:
        ConvergenceError: a sample did not converge and `on_failure="raise"`.
        ValueError: f changes shape, dtype or device, or writes into z; z0 does not fit.

    Example:
        >>> import torch, implicitdl
        >>> a = torch.tensor(2.0, requires_grad=True)
        >>> z = implicitdl.fixed_point(lambda z: (z + a / z) / 2, torch.ones(1, 1)).value
        >>> z.backward()
        >>> round(z.item(), 4), round(a.grad.item(), 4)
        (1.4142, 0.3536)
    """
    check_on_failure(on_failure)
    if contraction is not None and not 0 <= contraction < 1:
        raise ValueError(f"contraction: got {contraction}, expected a number in [0, 1).")
    solver, adjoint = solvers.get_solver(solver), get_adjoint(adjoint)
    z0 = _start(f, z0)
    if contraction is not None and not isinstance(f, AffineMap):
        f = RowMap.of(f, z0.shape, contraction)
    return adjoint.run(f, z0, solver, record=record).check(on_failure)


def _start(f: "Map | AffineMap", z0: Tensor | None) -> Tensor | None:
    """The start, checked against f."""
    if isinstance(f, AffineMap):
        if z0 is None:
            return None
        if z0.shape != f.v.shape or z0.dtype != f.v.dtype or z0.device != f.v.device:
            raise ValueError(
                f"z0: got {_describe(z0)}, expected {_describe(f.v)} like v of the AffineMap."
            )
        return z0
    if z0 is None:
        raise ValueError("z0: got None, expected a tensor (batch, *): only an AffineMap has a "
                         "start of its own.")  # fmt: skip
    if not isinstance(z0, Tensor):
        raise TypeError(f"z0: got {type(z0).__name__}, expected a tensor (batch, *).")
    if z0.dim() < 1 or not z0.is_floating_point():
        raise ValueError(f"z0: got {_describe(z0)}, expected a real floating tensor (batch, *).")
    refuse_transforms("fixed_point with a closure")
    with torch.no_grad():
        out = f(z0)
    if not isinstance(out, Tensor) or _describe(out) != _describe(z0):
        got = _describe(out) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"f(z0): got {got}, expected {_describe(z0)} as z0: f must keep it.")
    return z0


def _describe(t: Tensor) -> str:
    return f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}"
