"""Differentiable convex programs, batched: quadratic, linear and second-order cone programs.

One interior-point method solves a whole batch, Newton steps on the active rows finish it to
rounding, and the optimality conditions, through the library's one engine, give its derivatives.
"""

from .cones import Cones
from .door import ConvexLayer
from .door_interface import NativeCone
from .layers import ConeProgram, LinearProgram, QuadraticProgram
from .projections import Projection
from .solver import ConeSolver, gradient_certificate

__all__ = [
    "ConeProgram",
    "ConeSolver",
    "Cones",
    "ConvexLayer",
    "LinearProgram",
    "NativeCone",
    "Projection",
    "QuadraticProgram",
    "gradient_certificate",
]
