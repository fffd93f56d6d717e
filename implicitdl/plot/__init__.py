"""Pictures of training, of solves, of models and of robust programs.

Every function draws on the Axes that it is given, or on a new Figure of its own, and returns the
Figure. Nothing here touches pyplot, so no window opens and no global state is left behind.
matplotlib is imported inside the functions: it is an optional dependency.
"""

from ._figures import save
from .certify import attacked, bounds, certified, margins, sensitivity
from .heatmap import matrix
from .history import training
from .lifted import penalties
from .steps import convergence
from .structure import blocks
from .uncertainty import attack, feasible, trade_off
from .worst_case import certificate

__all__ = [
    "attack",
    "attacked",
    "blocks",
    "bounds",
    "certificate",
    "certified",
    "convergence",
    "feasible",
    "margins",
    "matrix",
    "penalties",
    "save",
    "sensitivity",
    "trade_off",
    "training",
]
