"""Implicit models as `torch.nn` layers. They own parameters and delegate.

Every layer takes `(*, features)` as `nn.Linear` does, raises ConvergenceError where a sample fails,
and has `solve(u)` for the state with its residual, steps and error bound.
"""

from ..convert import register
from ..convert.modules import implicit_layer, implicit_rnn, refuse
from .affine import ImplicitLayer, MonotoneLayer
from .equilibrium import EquilibriumLayer
from .rnn import ImplicitRNN

__all__ = ["EquilibriumLayer", "ImplicitLayer", "ImplicitRNN", "MonotoneLayer"]

register(ImplicitLayer, MonotoneLayer)(implicit_layer)  # so that networks with them convert
register(ImplicitRNN)(implicit_rnn)
refuse(
    "its state solves an equation of any form, of which the blocks are not known", EquilibriumLayer
)
