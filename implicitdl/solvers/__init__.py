"""Fixed-point solvers: z = f(z), one independent problem a row. They know nothing of gradients.

`FixedPointSolver` holds the one loop; each member is a file that writes `init` and `step`.
"""

from ._loop import FixedPointSolver, from_config, get_solver
from .anderson import Anderson
from .auto import Auto
from .broyden import Broyden
from .newton import Newton
from .newton_picard import NewtonPicard
from .picard import Picard
from .splittings import ForwardBackward, PeacemanRachford

__all__ = [
    "Anderson",
    "Auto",
    "Broyden",
    "FixedPointSolver",
    "ForwardBackward",
    "Newton",
    "NewtonPicard",
    "PeacemanRachford",
    "Picard",
    "from_config",
    "get_solver",
]
