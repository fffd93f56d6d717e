"""Operators given by a matrix, by two thin ones, by a diagonal, or by nothing."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._base import DENSE_LIMIT, Operator, Weight, added, read, require_small


@dataclass(frozen=True, eq=False, repr=False)
class Dense(Operator):
    """x -> W x on the last dimension of x.

    Args:
        weight: W.  # (out, in)
        lead: the dimensions before the last, on each of which W acts alike.
    """

    weight: Weight
    lead: tuple[int, ...] = ()

    @property
    def in_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Of a sample that goes in."""
        return (*self.lead, read(self.weight).shape[1])

    @property
    def out_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Of a sample that comes out."""
        return (*self.lead, read(self.weight).shape[0])

    @property
    def cost(self) -> int:
        return math.prod(self.lead) * read(self.weight).numel()

    @property
    def light(self) -> bool:
        """Never: a matrix is a matrix, however thin."""
        return False

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        weight = read(self.weight)
        if bias is None or (bias.dim() == 1 and bias.shape[0] == weight.shape[0]):
            return F.linear(x, weight, bias)
        return F.linear(x, weight) + bias

    def transpose(self, g: Tensor) -> Tensor:
        return g @ read(self.weight)

    @property
    def matrix(self) -> Tensor:
        """W."""
        return read(self.weight)

    def as_module(self, bias: Tensor | None) -> nn.Module | None:
        """A linear layer, where the bias is one number an entry of the last dimension."""
        if bias is not None and bias.dim() > 1:
            return None
        weight = read(self.weight)
        kind: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, **kind)
        with torch.no_grad():
            layer.weight.copy_(weight)
            if bias is not None:
                layer.bias.copy_(bias.expand(weight.shape[0]))
        return layer

    def abs(self) -> "Dense":
        return replace(self, weight=read(self.weight).abs())

    def dense(self, limit: int = DENSE_LIMIT, **kind: object) -> Tensor:
        if self.lead:
            return super().dense(limit, **kind)  # type: ignore[arg-type]
        weight = read(self.weight)
        require_small(weight.shape[0], weight.shape[1], limit)
        return weight


@dataclass(frozen=True, eq=False, repr=False)
class LowRank(Operator):
    """x -> L R^T x on vectors, by two thin products.

    Args:
        left: L.  # (out, r)
        right: R.  # (in, r)
    """

    left: Weight
    right: Weight

    label = "low rank"

    @property
    def in_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Of a sample that goes in."""
        return (read(self.right).shape[0],)

    @property
    def out_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Of a sample that comes out."""
        return (read(self.left).shape[0],)

    @property
    def cost(self) -> int:
        return read(self.left).numel() + read(self.right).numel()

    @property
    def light(self) -> bool:
        """Never: two products."""
        return False

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return added((x @ read(self.right)) @ read(self.left).mT, bias)

    def transpose(self, g: Tensor) -> Tensor:
        return (g @ read(self.left)) @ read(self.right).mT

    def abs(self) -> "Dense":
        return Dense((read(self.left) @ read(self.right).mT).abs())


@dataclass(frozen=True, eq=False, repr=False)
class Scale(Operator):
    """x -> s * x, a diagonal.

    Args:
        weight: s, broadcast against a sample; None for ones.
        shape: of a sample.
        factor: a number that s is multiplied by.
    """

    weight: Weight | None
    shape: tuple[int, ...]
    factor: float = 1.0

    diagonal = True

    @property
    def in_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Of a sample that goes in."""
        return self.shape

    @property
    def out_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Of a sample that comes out."""
        return self.shape

    @property
    def cost(self) -> int:
        return math.prod(self.shape)

    def values(self) -> "Tensor | float":
        """s times the factor, as it broadcasts."""
        if self.weight is None:
            return self.factor
        s = read(self.weight)
        return s if self.factor == 1.0 else s * self.factor

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        s = self.values()
        if bias is None:
            return x * s
        if not isinstance(s, Tensor):
            return bias + x * s
        channels = (self.shape[0],) + (1,) * (len(self.shape) - 1)
        if x.dim() > 2 and tuple(s.shape) == tuple(bias.shape) == channels:
            # One pass, forward and backward: the normalisation by mean 0 and variance 1.
            zero, one = s.new_zeros(channels[0]), s.new_ones(channels[0])
            return F.batch_norm(x, zero, one, s.reshape(-1), bias.reshape(-1), False, 0.0, 0.0)
        return x * s + bias

    def transpose(self, g: Tensor) -> Tensor:
        return g * self.values()

    def abs(self) -> "Scale":
        size = None if self.weight is None else read(self.weight).abs()
        return replace(self, weight=size, factor=abs(self.factor))


@dataclass(frozen=True, eq=False, repr=False)
class Identity(Operator):
    """x -> x.

    Args:
        shape: of a sample.
    """

    shape: tuple[int, ...]

    identity = True
    diagonal = True

    @property
    def in_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Of a sample that goes in."""
        return self.shape

    @property
    def out_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Of a sample that comes out."""
        return self.shape

    @property
    def cost(self) -> int:
        return 0

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return added(x, bias)

    def transpose(self, g: Tensor) -> Tensor:
        return g

    def abs(self) -> "Identity":
        return self


@dataclass(frozen=True, eq=False, repr=False)
class Zero(Operator):
    """x -> 0, a block that is not there.

    Args:
        in_shape, out_shape: of a sample.
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]

    zero = True

    @property
    def cost(self) -> int:
        return 0

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return added(x.new_zeros(x.shape[0], *self.out_shape), bias)

    def transpose(self, g: Tensor) -> Tensor:
        return g.new_zeros(g.shape[0], *self.in_shape)

    def abs(self) -> "Zero":
        return self
