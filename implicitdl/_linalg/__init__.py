"""Shared tensor mathematics: Perron roots, strong components, projections onto l1 balls and cones.

Plain functions on tensors. Nothing here knows of activations, models or solvers.
"""

from .compiling import reverse_only
from .perron import EPS, Perron, balanced, perron, perron_root, resolvent_vector, strong_components
from .projections import (
    project_l1,
    project_matrix_measure,
    project_second_order_cone,
    project_simplex,
)

__all__ = [
    "EPS",
    "Perron",
    "balanced",
    "perron",
    "perron_root",
    "project_l1",
    "project_matrix_measure",
    "project_second_order_cone",
    "project_simplex",
    "resolvent_vector",
    "reverse_only",
    "strong_components",
]
