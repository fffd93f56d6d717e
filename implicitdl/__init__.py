"""Implicit deep learning for PyTorch: x = phi(A x + B u + b),  y = C x + D u + d.

The map, in reading order:

    ImplicitLayer, MonotoneLayer, EquilibriumLayer, ImplicitRNN     layers
    ImplicitModel, stack                                            the algebra
    to_implicit                                                     networks as implicit models
    fixed_point, attach, Implicit, OneStep                          solves with gradients
    solvers, activations, wellposed, convert, convex, plot          modules
    Solution, Status, and the errors                                what comes back
"""

import importlib
from typing import Any

from . import activations, convert, convex, solvers, wellposed
from .convert import to_implicit
from .implicit import Implicit, OneStep, attach, fixed_point
from .layers import EquilibriumLayer, ImplicitLayer, ImplicitRNN, MonotoneLayer
from .model import ImplicitModel, stack
from .solution import (
    ConvergenceError,
    ConversionError,
    ImplicitDLError,
    InfeasibleError,
    NotWellPosedError,
    Solution,
    Status,
)

__version__ = "0.1.0"

__all__ = [
    "ConvergenceError",
    "ConversionError",
    "EquilibriumLayer",
    "Implicit",
    "ImplicitDLError",
    "ImplicitLayer",
    "ImplicitModel",
    "ImplicitRNN",
    "InfeasibleError",
    "MonotoneLayer",
    "NotWellPosedError",
    "OneStep",
    "Solution",
    "Status",
    "activations",
    "attach",
    "convert",
    "convex",
    "fixed_point",
    "plot",
    "solvers",
    "stack",
    "to_implicit",
    "wellposed",
]


def __getattr__(name: str) -> Any:
    if name == "plot":  # its names are looked up once it is used
        return importlib.import_module(".plot", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
