"""Implicit deep learning for PyTorch: x = phi(A x + B u + b),  y = C x + D u + d.

The map, in reading order:

    ImplicitLayer, MonotoneLayer, EquilibriumLayer, ImplicitRNN     layers
    ImplicitModel, stack                                            the algebra
    to_implicit                                                     networks as implicit models
    fixed_point, attach, Implicit, OneStep                          solves with gradients
    Solution, Status, and the errors                                what comes back

and its modules, each imported when it is first used:

    activations, solvers, wellposed, operators     what models consist of
    convert, states, compress                      networks into implicit models, and smaller ones
    lifted                                         training without back-propagation
    convex, robust, dro                            convex programs, uncertain ones, uncertain data
    certify                                        bounds, attacks, certified accuracy
    estimators                                     scikit-learn's interface
    plot                                           pictures
"""

import importlib
from typing import Any

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
    "attach",
    "fixed_point",
    "stack",
    "to_implicit",
]


_MODULES = (
    "activations", "certify", "compress", "convert", "convex", "dro", "estimators", "lifted",
    "operators", "plot", "robust", "solvers", "states", "wellposed",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
