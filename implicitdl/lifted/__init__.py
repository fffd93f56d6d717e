"""Lifted training: the network's equations become penalties, its states variables.

    min  loss(y, z_L) + sum_l mu_l D_l(x_{l+1}, z_l),    z_l = W_l x_l + b_l

with D(x, z) = F(z) + F*(x) - <x, z> >= 0, zero iff x = phi(z). No derivative of phi is needed.

    local               one sweep gives targets, local gradients go into any optimiser of torch
    blocks              all states and weights by convex blocks, the objective never rising
    admm                pre-activations split off, too: every block in closed form
    gradients           of one batch, for a training loop of your own
    as_initialization   a few epochs of `local`, then any other training

All take an `nn.Sequential`; `local` and `blocks` take an `ImplicitLayer` or `ImplicitModel`, too.

Reference: Askari, Negiar, Sambharya, El Ghaoui (2018); Gu, Askari, El Ghaoui (2020); see the modules.
"""

from .admm import admm
from .blocks import blocks
from .chain import Activate
from .local import as_initialization, gradients, local
from .penalties import Askari, Fenchel, Penalty, Quadratic
from .report import Report
from .rows import Rows

__all__ = [
    "Activate",
    "Askari",
    "Fenchel",
    "Penalty",
    "Quadratic",
    "Report",
    "Rows",
    "admm",
    "as_initialization",
    "blocks",
    "gradients",
    "local",
]
