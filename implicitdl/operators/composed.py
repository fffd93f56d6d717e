"""Products and sums of operators."""

import itertools
from dataclasses import dataclass

from torch import Tensor

from ._base import Operator, added
from .dense import Zero


@dataclass(frozen=True, eq=False, repr=False)
class Product(Operator):
    """x -> M_k ... M_1 x, one after the other; `product` makes it.

    Args:
        factors: M_k, ..., M_1, the first applied last.
    """

    factors: tuple[Operator, ...]

    @property
    def in_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Of a sample that goes in."""
        return self.factors[-1].in_shape

    @property
    def out_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Of a sample that comes out."""
        return self.factors[0].out_shape

    @property
    def cost(self) -> int:
        return sum(op.cost for op in self.factors)

    @property
    def light(self) -> bool:
        """Where all factors are."""
        return all(op.light for op in self.factors)

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        for op in self.factors[:0:-1]:
            x = op.apply(x)
        return self.factors[0].apply(x, bias)

    def transpose(self, g: Tensor) -> Tensor:
        for op in self.factors:
            g = op.transpose(g)
        return g

    def abs(self) -> Operator:
        return product(*(op.abs() for op in self.factors))

    @property
    def label(self) -> str:
        return " of ".join(op.label for op in self.factors)


@dataclass(frozen=True, eq=False, repr=False)
class Sum(Operator):
    """x -> M_1 x + ... + M_k x; `total` makes it.

    Args:
        terms: operators of one shape.
    """

    terms: tuple[Operator, ...]

    @property
    def in_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Of a sample that goes in."""
        return self.terms[0].in_shape

    @property
    def out_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Of a sample that comes out."""
        return self.terms[0].out_shape

    @property
    def cost(self) -> int:
        return sum(op.cost for op in self.terms)

    @property
    def light(self) -> bool:
        """Where all terms are."""
        return all(op.light for op in self.terms)

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = self.terms[0].apply(x)
        for op in self.terms[1:]:
            y = y + op.apply(x)
        return added(y, bias)

    def transpose(self, g: Tensor) -> Tensor:
        x = self.terms[0].transpose(g)
        for op in self.terms[1:]:
            x = x + op.transpose(g)
        return x

    def abs(self) -> Operator:
        return total(*(op.abs() for op in self.terms))

    @property
    def label(self) -> str:
        return " + ".join(op.label for op in self.terms)


def product(*factors: Operator) -> Operator:
    """M_k ... M_1 with identities left out and products flattened.

    Raises:
        ValueError: the shapes between two factors differ.
    """
    flat: list[Operator] = []
    for op in factors:
        flat.extend(op.factors if isinstance(op, Product) else (op,))
    for left, right in itertools.pairwise(flat):
        if left.in_shape != right.out_shape:
            raise ValueError(
                f"product: {left!r} after {right!r}, expected {left.in_shape} between them."
            )
    if any(op.zero for op in flat):
        return Zero(flat[-1].in_shape, flat[0].out_shape)
    kept = [op for op in flat if not op.identity]
    if not kept:
        return flat[0]
    return kept[0] if len(kept) == 1 else Product(tuple(kept))


def total(*terms: Operator) -> Operator:
    """M_1 + ... + M_k with zeros left out and sums flattened.

    Raises:
        ValueError: their shapes differ.
    """
    flat: list[Operator] = []
    for op in terms:
        flat.extend(op.terms if isinstance(op, Sum) else (op,))
    for op in flat[1:]:
        if (op.in_shape, op.out_shape) != (flat[0].in_shape, flat[0].out_shape):
            raise ValueError(f"total: {op!r} beside {flat[0]!r}, expected the same shapes.")
    kept = [op for op in flat if not op.zero]
    if not kept:
        return flat[0]
    return kept[0] if len(kept) == 1 else Sum(tuple(kept))
