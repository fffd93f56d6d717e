"""Operators without weights: entries moved about (`Gather`), or averaged (`Pooling`)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..solution import unknown_name
from ._base import Operator, added


def _after_batch(dims: tuple[int, ...]) -> list[int]:
    """Dimensions of a sample, counted from 0, as those of the batch."""
    if any(i < 0 for i in dims):
        raise IndexError(f"dimensions {dims}, expected such of a sample, counted from 0")
    return [1 + i for i in dims]


def _reshape(x: Tensor, *shape: int) -> Tensor:
    return x.reshape(x.shape[0], *shape)


def _permute(x: Tensor, *order: int) -> Tensor:
    return x.permute(0, *_after_batch(order))


def _pad(x: Tensor, pad: tuple[int, ...], mode: str) -> Tensor:
    return F.pad(x, pad, mode)


def _index(x: Tensor, *index: Any) -> Tensor:
    return x[(slice(None), *(slice(*i) if isinstance(i, tuple) else i for i in index))]


def _expand(x: Tensor, *shape: int) -> Tensor:
    x = x.reshape(x.shape[0], *(1,) * (len(shape) - x.dim() + 1), *x.shape[1:])
    return x.expand(x.shape[0], *shape)


def _repeat(x: Tensor, *repeats: int) -> Tensor:
    if len(repeats) != x.dim() - 1:
        raise ValueError(f"{len(repeats)} numbers for {x.dim() - 1} dimensions")
    return x.repeat(1, *repeats)


def _place(x: Tensor, dim: int, start: int, total: int) -> Tensor:
    """x as a slice of zeros that are `total` long along `dim`."""
    after = total - start - x.shape[dim + 1]
    return F.pad(x, (0, 0) * (x.dim() - dim - 2) + (start, after))


def _flip(x: Tensor, *dims: int) -> Tensor:
    return x.flip(_after_batch(dims))


def _roll(x: Tensor, shifts: tuple[int, ...], dims: tuple[int, ...]) -> Tensor:
    return x.roll(shifts, _after_batch(dims))


def _nearest(x: Tensor, *size: int) -> Tensor:
    return F.interpolate(x, size)


def _interpolate(x: Tensor, size: tuple[int, ...], mode: str, corners: bool | None) -> Tensor:
    return F.interpolate(x, size, mode=mode, align_corners=corners)


def _mean(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    return x.mean(_after_batch(dims), keep)


def _sum(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    return x.sum(_after_batch(dims), keep)


_GATHER: dict[str, Callable[..., Tensor]] = {
    "reshape": _reshape,
    "permute": _permute,
    "pad": _pad,
    "index": _index,
    "expand": _expand,
    "repeat": _repeat,
    "place": _place,
    "flip": _flip,
    "roll": _roll,
    "nearest": _nearest,
    "pixel_shuffle": F.pixel_shuffle,
    "pixel_unshuffle": F.pixel_unshuffle,
}
_POOLING: dict[str, Callable[..., Tensor]] = {
    "mean": _mean,
    "sum": _sum,
    "interpolate": _interpolate,
    **{f"avg_pool{k}d": getattr(F, f"avg_pool{k}d") for k in (1, 2, 3)},
    **{f"adaptive_avg_pool{k}d": getattr(F, f"adaptive_avg_pool{k}d") for k in (1, 2, 3)},
}


_MODULES = {"avg_pool": "AvgPool", "adaptive_avg_pool": "AdaptiveAvgPool"}


class _Fixed(Operator):
    """A function of torch by name, linear with entries >= 0, with its arguments."""

    in_shape: tuple[int, ...]
    method: str
    arguments: tuple[Any, ...]

    def _table(self) -> dict[str, Callable[..., Tensor]]:
        raise NotImplementedError

    def __post_init__(self) -> None:
        table = self._table()
        if self.method not in table:
            raise unknown_name("method", self.method, table)
        try:
            image = table[self.method](torch.empty(1, *self.in_shape, device="meta"),
                                       *self.arguments)  # fmt: skip
        except (RuntimeError, TypeError, IndexError, ValueError, NotImplementedError) as error:
            raise ValueError(
                f"{self.method}: {self.arguments} does not fit {self.in_shape} ({error})."
            ) from error
        divisor = self.arguments[5] if self.method in ("avg_pool2d", "avg_pool3d") and len(
            self.arguments) > 5 else None  # fmt: skip
        if divisor is not None and divisor < 0:
            raise ValueError(f"{self.method}: got the divisor {divisor}, expected one above zero.")
        object.__setattr__(self, "_out", tuple(image.shape[1:]))
        object.__setattr__(self, "_function", table[self.method])

    @property
    def out_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Of a sample that comes out."""
        return self._out  # type: ignore[attr-defined,no-any-return]

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return added(self._function(x, *self.arguments), bias)  # type: ignore[attr-defined]

    def abs(self) -> "_Fixed":
        return self

    @property
    def label(self) -> str:
        return self.method.replace("_", " ")


@dataclass(frozen=True, eq=False, repr=False)
class Gather(_Fixed):
    """Every entry of the result is one entry of x, or zero.

    Args:
        in_shape: of a sample.
        method: "reshape", "permute", "pad", "index", "expand", "repeat", "place" (into zeros, along
            a dimension), "flip", "roll", "nearest" (upsampling), "pixel_shuffle",
            "pixel_unshuffle".
        arguments: dimensions are those of a sample, counted from 0; slices are (start, stop, step).
    """

    in_shape: tuple[int, ...]
    method: str
    arguments: tuple[Any, ...] = ()

    def _table(self) -> dict[str, Callable[..., Tensor]]:
        return _GATHER

    @property
    def cost(self) -> int:
        return 0

    def as_module(self, bias: Tensor | None) -> nn.Module | None:
        """`Flatten` or `Unflatten`."""
        if bias is not None or self.method != "reshape":
            return None
        if len(self.out_shape) == 1:
            return nn.Flatten()
        return nn.Unflatten(1, self.out_shape) if len(self.in_shape) == 1 else None


@dataclass(frozen=True, eq=False, repr=False)
class Pooling(_Fixed):
    """Every entry of the result is a sum of entries of x with weights >= 0.

    Args:
        in_shape: of a sample.
        method: "avg_pool1d" to "avg_pool3d", "adaptive_avg_pool1d" to "adaptive_avg_pool3d",
            "mean", "sum", "interpolate".
        arguments: as the function of that name takes them.
    """

    in_shape: tuple[int, ...]
    method: str
    arguments: tuple[Any, ...] = ()

    def _table(self) -> dict[str, Callable[..., Tensor]]:
        return _POOLING

    @property
    def cost(self) -> int:
        return max(math.prod(self.in_shape), math.prod(self.out_shape))

    @property
    def light(self) -> bool:
        """Always: a pass over x."""
        return True

    def as_module(self, bias: Tensor | None) -> nn.Module | None:
        """torch's pooling of that name."""
        name = _MODULES.get(self.method.rstrip("123d"))
        if bias is not None or name is None:
            return None
        return getattr(nn, f"{name}{self.method[-2:]}")(*self.arguments)
