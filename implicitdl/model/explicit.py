"""An explicit torch module that computes what a model without loops computes."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import activations
from ..operators import (
    Gather,
    Operator,
    Product,
    Weight,
    read,
    rebuilt,
    weights,
)
from . import sweep, wiring
from .structure import INPUT, Constant, Row, Structure

if TYPE_CHECKING:
    from . import ImplicitModel


def sequential(model: "ImplicitModel") -> nn.Module:
    """See `ImplicitModel.to_sequential`."""
    f = model.structure if model.structure is not None else wiring.layered(model)
    if f.loops:
        names = "; ".join(", ".join(f.blocks[k].name for k in c) for c in f.loops)
        raise ValueError(
            f"to_sequential: {len(f.loops)} loops among the blocks ({names}), expected none: A must "
            "be strictly triangular in some order of its blocks. A model with loops is used as it "
            "is, or as `ImplicitLayer.from_model(model)`."
        )
    chain = _chain(f)
    return Explicit(f) if chain is None else nn.Sequential(*chain)


class Explicit(nn.Module):
    """A network evaluated block by block, with parameters of its own.

    Args:
        structure: without loops; its tensors are copied.
    """

    def __init__(self, structure: Structure):
        super().__init__()
        self.structure, self.weights = _owned(structure)

    def forward(self, u: Tensor) -> Tensor:
        """y.  # (batch, *input) -> (batch, *output)"""
        self.structure = _bound(self.structure, self.weights)
        return sweep.call(self.structure, u)

    def extra_repr(self) -> str:
        """The number of blocks."""
        return f"{len(self.structure.blocks)} blocks"


class Apply(nn.Module):
    """x -> M x + bias with parameters of its own, where torch has no module for M.

    Args:
        op: M.
        bias: broadcasts against a sample; None for none.
    """

    def __init__(self, op: Operator, bias: Tensor | None = None):
        super().__init__()
        (self.op, self.bias), self.weights = _owned((op, () if bias is None else (bias,)))

    def forward(self, x: Tensor) -> Tensor:
        """M x + bias."""
        self.op, self.bias = _bound((self.op, self.bias), self.weights)
        return self.op.apply(x, *self.bias)

    def extra_repr(self) -> str:
        """The operator."""
        return repr(self.op)


def _owned(thing: Any) -> tuple[Any, nn.ParameterList]:
    """The same with a parameter in place of each tensor, and these parameters."""
    own = nn.ParameterList()

    def copied(weight: Weight) -> Tensor:
        now = read(weight).detach().clone()
        own.append(nn.Parameter(now, requires_grad=now.is_floating_point()))
        return own[-1]

    return rebuilt(thing, copied), own


def _bound(thing: Any, own: nn.ParameterList) -> Any:
    """The same with these parameters, which the user may have replaced."""
    held = weights(thing)
    if all(a is b for a, b in zip(held, own, strict=True)):
        return thing
    new = dict(zip(map(id, held), own, strict=True))
    return rebuilt(thing, lambda weight: new[id(weight)])


# ---- chains ----------------------------------------------------------------------------------------


def _chain(f: Structure) -> list[nn.Module] | None:
    """The modules of a network in which each block reads only the one before it."""
    before, out = INPUT, []
    like = torch.empty(0) if f.example is None else f.example
    for (k,) in f.components:
        block = f.blocks[k]
        modules = _modules(block.row, before, like)
        phi = activations.as_module(block.phi)
        if modules is None or phi is None:
            return None
        out += modules + ([] if block.phi.linear and block.phi.entrywise else [phi])
        before = k
    modules = _modules(f.output, before, like)
    return None if modules is None else out + modules


def _modules(row: Any, source: int, like: Tensor) -> list[nn.Module] | None:
    """The modules of M x + bias, if that is all of the row."""
    if not isinstance(row, Row) or len(row.terms) != 1 or row.terms[0][0] != source:
        return None
    op = row.terms[0][1]
    factors = op.factors if isinstance(op, Product) else (op,)
    places: list[list[Constant]] = [[] for _ in factors]
    for constant in row.constants:
        outer = tuple(f for f in constant.factors if not _expands(f))
        depth = len(outer)
        if depth >= len(factors) or any(a is not b for a, b in zip(outer, factors, strict=False)):
            depth, outer = 0, ()
            whole = constant
        else:  # what follows it follows the product, too: it belongs behind an earlier factor
            whole = Constant(constant.value)
        places[depth].append(whole)
    out: list[nn.Module] = []
    for factor, constants in reversed(list(zip(factors, places, strict=True))):
        bias = None
        for constant in constants:
            t = constant(like).detach()
            bias = t if bias is None else bias + t
        if bias is not None or not factor.identity:
            out.append(_factor(factor, bias))
    return out


def _expands(op: Operator) -> bool:
    return isinstance(op, Gather) and op.method == "expand" and op.in_shape == op.out_shape


def _factor(op: Operator, bias: Tensor | None) -> nn.Module:
    """torch's module for one operator and its bias, or `Apply`."""
    module = op.as_module(bias)
    return Apply(op, bias) if module is None else module
