"""Operators without weights: entries moved about (`Gather`), or averaged (`Pooling`)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..solution import unknown_name
from ._base import Operator, added


def _reshape(x: Tensor, *shape: int) -> Tensor:
    return x.reshape(x.shape[0], *shape)


def _permute(x: Tensor, *order: int) -> Tensor:
    return x.permute(0, *(1 + i for i in order))


def _pad(x: Tensor, pad: tuple[int, ...], mode: str) -> Tensor:
    return F.pad(x, pad, mode)


def _index(x: Tensor, *index: Any) -> Tensor:
    return x[(slice(None), *(slice(*i) if isinstance(i, tuple) else i for i in index))]


def _expand(x: Tensor, *shape: int) -> Tensor:
    x = x.reshape(x.shape[0], *(1,) * (len(shape) - x.dim() + 1), *x.shape[1:])
    return x.expand(x.shape[0], *shape)


def _repeat(x: Tensor, *repeats: int) -> Tensor:
    return x.repeat(1, *repeats)


def _place(x: Tensor, dim: int, start: int, total: int) -> Tensor:
    """x as a slice of zeros that are `total` long along `dim`."""
    after = total - start - x.shape[dim + 1]
    return F.pad(x, (0, 0) * (x.dim() - dim - 2) + (start, after))


def _flip(x: Tensor, *dims: int) -> Tensor:
    return x.flip([1 + i for i in dims])


def _roll(x: Tensor, shifts: tuple[int, ...], dims: tuple[int, ...]) -> Tensor:
    return x.roll(shifts, [1 + i for i in dims])


def _nearest(x: Tensor, *size: int) -> Tensor:
    return F.interpolate(x, size)


def _interpolate(x: Tensor, size: tuple[int, ...], mode: str, corners: bool | None) -> Tensor:
    return F.interpolate(x, size, mode=mode, align_corners=corners)


def _mean(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    return x.mean([1 + i for i in dims], keep)


def _sum(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    return x.sum([1 + i for i in dims], keep)


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
