"""A matrix of operators: A, B, C or D of a model whose states come in blocks."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._base import DENSE_LIMIT, Operator, require_small
from .dense import Zero


@dataclass(frozen=True)
class Space:
    """The place of a block among the rows or columns of a grid.

    Args:
        name: of the block, for pictures and messages.
        shape: of the block.
        size: how many entries it takes up; those beyond its own are zeros.
    """

    name: str
    shape: tuple[int, ...]
    size: int = -1

    def __post_init__(self) -> None:
        own = math.prod(self.shape)
        if self.size == -1:
            object.__setattr__(self, "size", own)
        if self.size < own:
            raise ValueError(f"{self.name}: got size {self.size} for {own} entries.")

    def flat(self, block: Tensor) -> Tensor:
        """The block as part of a vector.  # (m, *shape) -> (m, size)"""
        rows = block.reshape(block.shape[0], math.prod(self.shape))
        missing = self.size - rows.shape[1]
        return torch.nn.functional.pad(rows, (0, missing)) if missing else rows

    def block(self, part: Tensor) -> Tensor:
        """The block from its part of a vector.  # (m, size) -> (m, *shape)"""
        return part[:, : math.prod(self.shape)].reshape(part.shape[0], *self.shape)


@dataclass(frozen=True, eq=False, repr=False)
class Grid(Operator):
    """M = (M_ij), operators from the blocks of one vector to those of another; most are zero.

    As an operator it acts on vectors, blocks flattened one after the other.

    Args:
        rows, columns: the blocks.
        entries: (i, j) -> the operator from block j to block i; what is not there is zero.
    """

    rows: tuple[Space, ...]
    columns: tuple[Space, ...]
    entries: Mapping[tuple[int, int], Operator]

    def __post_init__(self) -> None:
        for (i, j), op in self.entries.items():
            expected = self.columns[j].shape, self.rows[i].shape
            if (op.in_shape, op.out_shape) != expected:
                raise ValueError(f"entry ({i}, {j}): got {op!r}, expected {expected}.")

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the matrix that it stands for."""
        return sum(s.size for s in self.rows), sum(s.size for s in self.columns)

    @property
    def in_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Of a sample that goes in."""
        return (self.shape[1],)

    @property
    def out_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Of a sample that comes out."""
        return (self.shape[0],)

    @property
    def cost(self) -> int:
        return sum(op.cost for op in self.entries.values())

    def __getitem__(self, at: tuple[int, int]) -> Operator:
        """The operator at (i, j), which may be a `Zero`."""
        i, j = (range(len(s))[k] for k, s in zip(at, (self.rows, self.columns), strict=True))
        zero = Zero(self.columns[j].shape, self.rows[i].shape)
        return self.entries.get((i, j), zero)

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        parts = x.split([s.size for s in self.columns], dim=1)
        blocks = [s.block(part) for s, part in zip(self.columns, parts, strict=True)]
        image = [self._row(i, blocks, x) for i in range(len(self.rows))]
        y = torch.cat(image, 1) if image else x[:, :0]
        return y if bias is None else y + bias

    def _row(self, i: int, blocks: list[Tensor], x: Tensor) -> Tensor:
        y = None
        for (row, j), op in self.entries.items():
            if row == i:
                term = op.apply(blocks[j])
                y = term if y is None else y + term
        space = self.rows[i]
        return x.new_zeros(x.shape[0], space.size) if y is None else space.flat(y)

    def abs(self) -> "Grid":
        """|M|, block by block."""
        absolute = {key: op.abs() for key, op in self.entries.items()}
        return Grid(self.rows, self.columns, absolute)

    def norms(self) -> Tensor:
        """||M_ij||_inf of each block, from above, in float64.  # (rows, columns) of the grid"""
        out = torch.zeros(len(self.rows), len(self.columns), dtype=torch.float64)
        for (i, j), op in self.entries.items():
            out[i, j] = op.norm()
        return out

    def dense(self, limit: int = DENSE_LIMIT, **kind: Any) -> Tensor:
        """The matrix.

        Args:
            limit: how many entries it may have.
            kind: dtype and device, for a grid without tensors of its own.

        Raises:
            ValueError: it would have more.
        """
        require_small(*self.shape, limit)
        own = next(self.tensors(), torch.empty(0, **kind))
        kind = {"dtype": kind.get("dtype") or own.dtype, "device": kind.get("device") or own.device}
        bands = []
        for i, row in enumerate(self.rows):
            cells = []
            for j, column in enumerate(self.columns):
                op = self.entries.get((i, j))
                if op is None:
                    cells.append(torch.zeros(row.size, column.size, **kind))
                else:
                    cell = op.dense(limit, **kind)
                    pad = (0, column.size - cell.shape[1], 0, row.size - cell.shape[0])
                    cells.append(torch.nn.functional.pad(cell, pad) if any(pad) else cell)
            bands.append(torch.cat(cells, 1) if cells else torch.zeros(row.size, 0, **kind))
        return torch.cat(bands) if bands else torch.zeros(*self.shape, **kind)

    def tensors(self) -> Iterator[Tensor]:
        """The tensors of all its blocks."""
        for op in self.entries.values():
            yield from op.tensors()

    @property
    def label(self) -> str:
        """How many blocks it has, and how many of them are there."""
        size = f"{len(self.rows)} x {len(self.columns)}"
        return f"grid of {size} blocks, {len(self.entries)} not zero"
