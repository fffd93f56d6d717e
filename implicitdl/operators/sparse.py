"""A matrix with few entries: products cost what the entries cost."""

import base64
import functools
import warnings
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from ._base import DENSE_LIMIT, Operator, Weight, added, read, require_small


@dataclass(frozen=True, eq=False, repr=False)
class Sparse(Operator):
    """x -> W x on vectors, W in compressed rows; `Sparse.of` makes it of a matrix.

    On a CPU it is faster than a dense product below about a tenth of the entries, and for a single
    sample only where W is large.

    Args:
        values: the entries, row after row.  # (entries,)
        columns, rows: of W, so that files and copies keep its shape.
        pattern: where the entries are, as text.

    Raises:
        ValueError: the pattern is not one of so many entries, rows and columns.

    Example:
        >>> import torch
        >>> from implicitdl.operators.sparse import Sparse
        >>> W = Sparse.of(torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]]))
        >>> W, W.apply(torch.tensor([[3.0, 5.0, 7.0]]))
        (sparse 3 -> 2, tensor([[10.,  3.]]))
    """

    values: Weight
    columns: int
    rows: int
    pattern: str

    def __post_init__(self) -> None:
        shape = (self.rows, self.columns)
        if any(type(n) is not int or n < 1 for n in shape) or type(self.pattern) is not str:
            raise ValueError(f"Sparse: got shape {shape}, expected positive integers, and a text.")
        entries = len(_positions(self.pattern, *shape)[1])
        if tuple(read(self.values).shape) != (entries,):
            raise ValueError(
                f"values: got shape {tuple(read(self.values).shape)}, expected ({entries},) as the "
                "pattern has entries."
            )

    @classmethod
    def of(cls, matrix: Tensor) -> "Sparse":
        """The entries of a matrix that are not zero; the gradient flows to them.

        Args:
            matrix: W.  # (rows, columns)

        Raises:
            ValueError: it is no matrix with rows and columns.
        """
        if matrix.dim() != 2 or 0 in matrix.shape:
            raise ValueError(f"matrix: got shape {tuple(matrix.shape)}, expected (rows, columns).")
        there = matrix.detach() != 0
        index = there.nonzero()
        crow = torch.cat([there.new_zeros(1, dtype=torch.long), there.sum(1).cumsum(0)])
        raw = torch.cat([crow, index[:, 1]]).cpu().numpy().astype("<i4").tobytes()
        text = base64.b64encode(zlib.compress(raw, 6)).decode("ascii")
        return cls(matrix[there], matrix.shape[1], matrix.shape[0], text)

    @property
    def in_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Of a sample that goes in."""
        return (self.columns,)

    @property
    def out_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Of a sample that comes out."""
        return (self.rows,)

    @property
    def cost(self) -> int:
        return read(self.values).numel()

    @property
    def light(self) -> bool:
        """Never: the entries are gathered from all over x."""
        return False

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        values = read(self.values)
        if _hidden():  # values or shapes that a transform hides: the matrix itself
            return added(F.linear(x, self._matrix(values)), bias)
        return added(_product(values, x, self, False), bias)

    def transpose(self, g: Tensor) -> Tensor:
        values = read(self.values)
        return g @ self._matrix(values) if _hidden() else _product(values, g, self, True)

    def abs(self) -> "Sparse":
        return Sparse(read(self.values).abs(), self.columns, self.rows, self.pattern)

    def dense(self, limit: int = DENSE_LIMIT, **kind: Any) -> Tensor:
        require_small(self.rows, self.columns, limit)
        return self._matrix(read(self.values))

    def _at(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        return _indices(self.pattern, self.rows, self.columns, device)

    def _matrix(self, values: Tensor) -> Tensor:
        _, columns, rows, *_ = self._at(values.device)
        flat = values.new_zeros(self.rows * self.columns)
        return flat.index_add(0, rows * self.columns + columns, values).view(
            self.rows, self.columns
        )


def _product(values: Tensor, x: Tensor, op: Sparse, turned: bool) -> Tensor:
    x = x.to(values.dtype)  # under autocast they may differ
    kind = values.dtype
    if kind in (torch.float16, torch.bfloat16):  # of which torch has no sparse product on a CPU
        return _product(values.float(), x.float(), op, turned).to(kind)
    if torch.is_grad_enabled() and (values.requires_grad or x.requires_grad):
        return _Product.apply(values, x, op, turned)  # type: ignore[no-any-return]
    return _multiplied(values, x, op, turned)


def _multiplied(values: Tensor, x: Tensor, op: Sparse, turned: bool) -> Tensor:
    """W x or W^T x, a sample a row. The result lies in memory as the next such product wants it."""
    _quiet()
    crow, column, _, turned_crow, turned_column, order = op._at(values.device)
    shape = (op.columns, op.rows) if turned else (op.rows, op.columns)
    if turned:
        crow, column, values = turned_crow, turned_column, values[order]
    if not values.numel() or not len(x):
        return x.new_zeros(len(x), shape[0])
    with torch.autocast(x.device.type, enabled=False):  # which would make them halves
        W = torch.sparse_csr_tensor(crow, column, values, shape, check_invariants=False)
        return torch.sparse.mm(W, x.mT.contiguous()).mT


class _Product(torch.autograd.Function):
    """W x with the gradient of the entries alone; differentiable as often as one likes."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, x: Tensor, op: Sparse, turned: bool) -> Tensor:
        ctx.save_for_backward(values, x)
        ctx.op, ctx.turned = op, turned
        return _multiplied(values, x, op, turned)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        values, x = ctx.saved_tensors
        op, turned = ctx.op, ctx.turned
        to_values = to_x = None
        if ctx.needs_input_grad[1]:
            to_x = _product(values, g, op, not turned)
        if ctx.needs_input_grad[0]:
            _, column, row, *_ = op._at(values.device)
            left, right = (x, g) if turned else (g, x)  # (m, rows), (m, columns)
            if len(x) * len(row) <= op.rows * op.columns:
                to_values = (left[:, row] * right[:, column]).sum(0)
            else:
                to_values = (left.mT @ right)[row, column]
        return to_values, to_x, None, None


def _hidden() -> bool:
    """Whether torch is to see a product that it can differentiate forward, batch or compile."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


@functools.cache
def _quiet() -> None:
    """torch says once that compressed rows are in beta: here, unheard."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = torch.zeros(1)
        torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), one, (1, 1),
                                check_invariants=False)  # fmt: skip


@functools.lru_cache(maxsize=256)
def _positions(pattern: str, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Row pointers and columns, checked: a file may hold anything.

    Raises:
        ValueError: it is no pattern of a matrix of that shape.
    """
    wrong = ValueError(
        f"pattern: it is not where the entries of a {rows} x {columns} matrix are; make the operator "
        "with Sparse.of."
    )
    most = 4 * (rows + 1 + min(rows * columns, 1 << 31))
    try:
        unpacker = zlib.decompressobj()
        raw = unpacker.decompress(base64.b64decode(pattern, validate=True), most + 1)
    except (ValueError, zlib.error) as error:
        raise wrong from error
    if len(raw) > most or len(raw) % 4 or len(raw) < 4 * (rows + 1):
        raise wrong
    index = np.frombuffer(raw, dtype="<i4").astype(np.int64)
    crow, column = index[: rows + 1], index[rows + 1 :]
    steps = np.diff(crow)
    if crow[0] != 0 or crow[-1] != len(column) or (steps < 0).any():
        raise wrong
    if len(column) and (column.min() < 0 or column.max() >= columns):
        raise wrong
    row = np.repeat(np.arange(rows), steps)
    if (np.diff(row * columns + column) <= 0).any():  # an entry twice, or out of order
        raise wrong
    return torch.from_numpy(crow), torch.from_numpy(column)


@functools.lru_cache(maxsize=256)
def _indices(
    pattern: str, rows: int, columns: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Row pointers, columns and rows of the entries; the first two of W^T, and its order."""
    crow, column = _positions(pattern, rows, columns)
    row = torch.repeat_interleave(torch.arange(rows), crow.diff())
    order = (column * rows + row).argsort()
    count = torch.bincount(column, minlength=columns)
    turned = torch.cat([count.new_zeros(1), count.cumsum(0)])
    found = (crow, column, row, turned, row[order], order)
    return tuple(t.to(device) for t in found)  # type: ignore[return-value]
