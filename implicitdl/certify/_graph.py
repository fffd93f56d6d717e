"""A model as a chain of nodes, x_k = phi_k(sum_j M_kj x_j + A_k x_k + b_k), the form bounds read.

A node is one block of states that does not read itself, or one strongly connected component with
its matrix A_k. Converted networks, layers and models given by matrices all come in this form, so
that one pass over the nodes is the forward pass of a network, and a loop costs one small fixed point.
Vectors are flat here, one sample a row.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..activations import Activation
from ..layers import ImplicitLayer, MonotoneLayer
from ..model import ImplicitModel
from ..model.structure import INPUT, Row, Structure, fitted
from ..operators import DENSE_LIMIT, Live, Operator, read, rebuilt

EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True, eq=False)
class Linear:
    """M on flat vectors, with its transpose and |M|; what a term of a row is."""

    op: Operator
    size: Operator  # |M|
    rows: int
    columns: int
    matrix: Tensor | None  # where the operator is one small enough

    @classmethod
    def of(cls, op: Operator, like: Tensor) -> "Linear":
        """The operator on flat vectors."""
        rows, columns = math.prod(op.out_shape), math.prod(op.in_shape)
        matrix = op.matrix if len(op.in_shape) == len(op.out_shape) == 1 else None
        if matrix is not None:
            matrix = matrix.to(like)
        return cls(op, op.abs(), rows, columns, matrix)

    def apply(self, x: Tensor) -> Tensor:
        """M x.  # (..., columns) -> (..., rows)"""
        if self.matrix is not None:
            return x @ self.matrix.mT
        flat = x.reshape(-1, *self.op.in_shape)
        return self.op.apply(flat).reshape(*x.shape[:-1], self.rows)

    def sized(self, x: Tensor) -> Tensor:
        """|M| x for x >= 0."""
        if self.matrix is not None:
            return x @ self.matrix.abs().mT
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
        return self.op.dense()


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
        for j, M in self.terms:
            z = z + M.apply(values(j))
        return z

    @property
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

    @property
    def entrywise(self) -> bool:
        """Whether x_i depends on z_i alone."""
        return self.natural is None

    @property
    def lipschitz(self) -> float:
        """In the infinity norm."""
        if self.natural is not None:
            return self.natural[0].infinity_lipschitz
        return max(phi.lipschitz for phi, _ in self.parts)

    @property
    def increasing(self) -> bool:
        """Whether phi is entrywise and non-decreasing."""
        return self.entrywise and all(phi.monotone for phi, _ in self.parts)

    @property
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
        out = flat.new_zeros(*flat.shape[:-1], self.states)
        index = torch.tensor(self.order, device=flat.device)
        return out.index_copy(-1, index, flat)


def as_model(model: Any) -> ImplicitModel:
    """The ImplicitModel of a layer or of a model.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(model, ImplicitModel):
        return model
    if isinstance(model, ImplicitLayer | MonotoneLayer):
        return model.model()
    raise TypeError(
        f"model: got {type(model).__name__}, expected an ImplicitModel, an ImplicitLayer or a "
        "MonotoneLayer; a network is converted first, implicitdl.to_implicit(network, u)."
    )


def graph_of(model: Any, *, dtype: torch.dtype = torch.float64, detach: bool = True) -> Graph:
    """The nodes of a model, its tensors in `dtype`.

    Raises:
        TypeError: no model.
        ValueError: NaN or infinite weights.
    """
    whole = as_model(model)
    if whole.structure is None:
        from ._matrices import graph_of_matrices

        return graph_of_matrices(whole, dtype, detach)
    f = whole.structure

    def cast(w: "Tensor | Live") -> Tensor:
        t = read(w)
        t = t.detach() if detach else t
        return t.to(dtype) if t.is_floating_point() else t

    f = rebuilt(f, cast)
    like = torch.empty(0, dtype=dtype, device=whole.device)
    start, at = [], 0
    for block in f.blocks:
        start.append(at)
        at += block.size
    nodes: list[Node] = []
    order: list[int] = []
    number = {INPUT: INPUT}
    for component in f.components:
        looped = component in f.loops
        members = sorted(component)
        node, own = _node(f, tuple(members), looped, like, number)
        nodes.append(node)
        for k in members:
            length = math.prod(f.blocks[k].shape)
            order += range(start[k], start[k] + length)
            number[k] = len(nodes) - 1
        finite(own, node)
    output = _affine([f.output.flat()], None, like, _located(f, number))
    finite(output, None)
    return Graph(tuple(nodes), output, f.inputs, f.outputs, like, tuple(order), whole.states)


def _located(f: Structure, number: dict[int, int]) -> Callable[[int], tuple[int, int, int]]:
    """Block -> (node, where it starts in the node, length of the node)."""
    members: dict[int, list[int]] = {}
    for k, node in number.items():
        if k != INPUT:
            members.setdefault(node, []).append(k)

    def find(j: int) -> tuple[int, int, int]:
        if j == INPUT:
            return INPUT, 0, f.inputs
        own = sorted(members[number[j]])
        sizes = {k: math.prod(f.blocks[k].shape) for k in own}
        return number[j], sum(sizes[k] for k in own if k < j), sum(sizes.values())

    return find


def _affine(
    rows: list[Row], inside: "set[int] | None", like: Tensor, find: Callable[[int], Any]
) -> Affine:
    """Rows, one after the other, as one affine map of what is outside the loop."""
    bias = []
    for row in rows:
        t = like.new_zeros(row.shape)
        for constant in row.constants:
            t = t + fitted(constant, row.shape)(like).expand(row.shape)
        bias.append(t.flatten())
    whole = torch.cat(bias)
    terms: list[tuple[int, Linear]] = []
    single = len(rows) == 1
    at = 0
    for row, t in zip(rows, bias, strict=True):
        for j, op in row.terms:
            if inside is not None and j in inside:
                continue
            node, start, length = find(j)
            M = Linear.of(op, like)
            if not single or length != M.columns:  # placed among the states of a component
                if M.matrix is None:
                    M = replace(M, matrix=op.dense().to(like))
                full = like.new_zeros(len(whole), length)
                full[at : at + len(t), start : start + M.columns] = M.matrix
                M = _from_matrix(full)
            terms.append((node, M))
        at += len(t)
    return Affine(tuple(terms), whole)


def _from_matrix(matrix: Tensor) -> Linear:
    from ..operators import Dense

    op = Dense(matrix)
    return Linear(op, op.abs(), matrix.shape[0], matrix.shape[1], matrix)


def _node(
    f: Structure,
    members: tuple[int, ...],
    looped: bool,
    like: Tensor,
    number: dict[int, int],
) -> tuple[Node, Affine]:
    blocks = [f.blocks[k] for k in members]
    rows = [block.row.flat() for block in blocks]
    find = _located(f, number)
    name = ", ".join(block.name for block in blocks)
    size = sum(math.prod(block.shape) for block in blocks)
    coupled = [block for block in blocks if not block.phi.entrywise]
    A = None
    if looped:
        if len(blocks) > 1 and coupled or any(b.row.shape != b.shape for b in blocks):
            raise ValueError(
                f"model: the loop of {name} has an activation that couples states of several "
                "blocks; no bound here covers it."
            )
        offset, at = {}, 0
        for k, block in zip(members, blocks, strict=True):
            offset[k] = at
            at += math.prod(block.shape)
        A = like.new_zeros(size, size)
        for k, row in zip(members, rows, strict=True):
            for j, op in row.terms:
                if j in offset:
                    M = op.dense()
                    A = A + _placed(M, offset[k], offset[j], size)
    affine = _affine(rows, set(members) if looped else None, like, find)
    natural = (blocks[0].phi, blocks[0].row.shape) if coupled else None
    parts: tuple[tuple[Activation, int], ...] = ()
    if natural is None:
        parts = tuple(part for block in blocks for part in block.phi.blocks(math.prod(block.shape)))
    return Node(name, affine, A, parts, natural, size), affine


def _placed(M: Tensor, row: int, column: int, size: int) -> Tensor:
    if M.shape == (size, size):
        return M
    pad = (column, size - column - M.shape[1], row, size - row - M.shape[0])
    return torch.nn.functional.pad(M, pad)


def finite(affine: Affine, node: Node | None) -> None:
    """Refuse NaN and infinite weights, naming the block."""
    tensors = [affine.bias, *(M.matrix for _, M in affine.terms if M.matrix is not None)]
    if node is not None and node.A is not None:
        tensors.append(node.A)
    if not all(bool(torch.isfinite(t).all()) for t in tensors):
        name = "the output" if node is None else f"block {node.name}"
        raise ValueError(f"model: {name} has NaN or infinite weights, expected finite ones.")
