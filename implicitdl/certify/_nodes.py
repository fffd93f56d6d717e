"""A model as a chain of nodes, x_k = phi_k(sum_j M_kj x_j + A_k x_k + b_k), the form bounds read.

A node is one block of states that does not read itself, or one strongly connected component with
its matrix A_k. Converted networks, layers and models given by matrices all come in this form, so
that one pass over the nodes is the forward pass of a network, and a loop costs one small fixed point.
Vectors are flat here, one sample a row.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..activations import Activation
from ..operators import DENSE_LIMIT, Dense, Operator

EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True, eq=False)
class Linear:
    """M on flat vectors, with its transpose and |M|; what a term of a row is."""

    op: Operator
    rows: int
    columns: int
    matrix: Tensor | None  # where the operator is one small enough
    like: Tensor  # of the dtype and on the device of the others

    @classmethod
    def of(cls, op: Operator, like: Tensor) -> "Linear":
        """The operator on flat vectors."""
        rows, columns = math.prod(op.out_shape), math.prod(op.in_shape)
        matrix = op.matrix if len(op.in_shape) == len(op.out_shape) == 1 else None
        if matrix is not None:
            matrix = matrix.to(like)
        return cls(op, rows, columns, matrix, like.new_empty(0))

    @classmethod
    def of_matrix(cls, matrix: Tensor) -> "Linear":
        """x -> matrix x."""
        rows, columns = matrix.shape
        return cls(Dense(matrix), rows, columns, matrix, matrix.new_empty(0))

    @functools.cached_property
    def size(self) -> Operator:
        """|M|."""
        return self.op.abs()

    @functools.cached_property
    def absolute(self) -> Tensor:
        """|M| where M is a matrix."""
        return self.matrix.abs()

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """M x + bias.  # (..., columns) -> (..., rows)"""
        if self.matrix is not None:
            return functional.linear(x, self.matrix, bias)
        flat = x.reshape(-1, *self.op.in_shape)
        z = self.op.apply(flat).reshape(*x.shape[:-1], self.rows)
        return z if bias is None else z + bias

    def sized(self, x: Tensor) -> Tensor:
        """|M| x for x >= 0."""
        if self.matrix is not None:
            return x @ self.absolute.mT
        flat = x.reshape(-1, *self.op.in_shape)
        return self.size.apply(flat).reshape(*x.shape[:-1], self.rows)

    def transpose(self, g: Tensor) -> Tensor:
        """M^T g.  # (..., rows) -> (..., columns)"""
        if self.matrix is not None:
            return g @ self.matrix
        flat = g.reshape(-1, *self.op.out_shape)
        return self.op.transpose(flat).reshape(*g.shape[:-1], self.columns)

    def dense(self) -> Tensor | None:
        """The matrix, or None where it would be large."""
        if self.matrix is not None:
            return self.matrix
        if self.rows * self.columns > DENSE_LIMIT // 16:
            return None
        return self.op.dense(dtype=self.like.dtype, device=self.like.device).to(self.like)

    @functools.cached_property
    def norm2(self) -> float:
        """||M||_2, from above."""
        matrix = self.dense()
        if matrix is None or matrix.numel() > 1 << 22:
            return math.sqrt(self.op.norm(1) * self.op.norm(math.inf)) * (1 + 8 * EPS)
        if not matrix.numel():
            return 0.0
        value = float(torch.linalg.matrix_norm(matrix.double(), 2))
        return value * (1 + 8 * max(matrix.shape) * EPS)


@dataclass(frozen=True, eq=False)
class Affine:
    """z = sum_j M_j x_j + bias."""

    terms: tuple[tuple[int, Linear], ...]
    bias: Tensor  # (rows,)

    @property
    def rows(self) -> int:
        """The length of z."""
        return self.bias.shape[0]

    def apply(self, values: Callable[[int], Tensor]) -> Tensor:
        """z at these values.  # (m, rows)"""
        z = self.bias
        for k, (j, M) in enumerate(self.terms):
            z = M.apply(values(j), z) if k == 0 else z + M.apply(values(j))
        return z

    @functools.cached_property
    def gains(self) -> tuple[tuple[int, Tensor], ...]:
        """(j, |M_j| 1) of each term: |M_j x| <= |M_j| 1 max |x|.  # (rows,) each"""
        return tuple((j, M.sized(self.bias.new_ones(1, M.columns))[0]) for j, M in self.terms)

    @functools.cached_property
    def fan(self) -> int:
        """The number of terms that a sum may have, for rounding."""
        return sum(M.columns for _, M in self.terms) + 2


@dataclass(frozen=True, eq=False)
class Node:
    """x = phi(z + A x), one block of states.

    Attributes:
        name: for messages.
        row: of z, from nodes before it and from the input.
        A: the matrix of its loop, or None.
        parts: (phi, n) for entrywise phi, along the flat block.
        natural: the whole activation where it couples entries, and the shape it takes.
        size: of x; that of z is `row.rows`.
    """

    name: str
    row: Affine
    A: Tensor | None
    parts: tuple[tuple[Activation, int], ...]
    natural: tuple[Activation, tuple[int, ...]] | None
    size: int

    @functools.cached_property
    def entrywise(self) -> bool:
        """Whether x_i depends on z_i alone."""
        return self.natural is None

    @functools.cached_property
    def lipschitz(self) -> float:
        """In the infinity norm."""
        if self.natural is not None:
            return self.natural[0].infinity_lipschitz
        return max(phi.lipschitz for phi, _ in self.parts)

    @functools.cached_property
    def increasing(self) -> bool:
        """Whether phi is entrywise and non-decreasing."""
        return self.entrywise and all(phi.monotone for phi, _ in self.parts)

    @functools.cached_property
    def fan(self) -> int:
        """The number of terms of a sum."""
        return self.row.fan + (0 if self.A is None else self.size)

    def phi(self, z: Tensor) -> Tensor:
        """x.  # (m, rows) -> (m, size)"""
        if self.natural is not None:
            phi, shape = self.natural
            return phi.natural(z.reshape(-1, *shape)).reshape(*z.shape[:-1], self.size)
        if len(self.parts) == 1:
            return self.parts[0][0](z)
        pieces = z.split([n for _, n in self.parts], -1)
        return torch.cat([phi(p) for (phi, _), p in zip(self.parts, pieces, strict=True)], -1)


@dataclass(frozen=True, eq=False)
class Graph:
    """The nodes of a model in evaluation order, and its output."""

    nodes: tuple[Node, ...]
    output: Affine
    inputs: int
    outputs: int
    example: Tensor
    order: tuple[int, ...]  # where the states of the nodes, joined, stand in those of the model
    states: int

    def joined(self, parts: list[Tensor]) -> Tensor:
        """One tensor in the model's order of states.  # (m, n)"""
        if not parts:
            return self.example.new_zeros(1, self.states)
        flat = torch.cat(parts, -1)
        if self.place is None:
            return flat
        out = flat.new_zeros(*flat.shape[:-1], self.states)
        return out.index_copy(-1, self.place, flat)

    @functools.cached_property
    def place(self) -> Tensor | None:
        """`order` as a tensor; None where it is the model's own."""
        if self.order == tuple(range(self.states)):
            return None
        return torch.tensor(self.order, device=self.example.device)


def finite(affine: Affine, node: Node | None) -> None:
    """Refuse NaN and infinite weights, naming the block."""
    tensors = [affine.bias, *(t for _, M in affine.terms for t in M.op.tensors())]
    if node is not None and node.A is not None:
        tensors.append(node.A)
    if not all(bool(torch.isfinite(t).all()) for t in tensors if t.is_floating_point()):
        name = "the output" if node is None else f"block {node.name}"
        raise ValueError(f"model: {name} has NaN or infinite weights, expected finite ones.")
