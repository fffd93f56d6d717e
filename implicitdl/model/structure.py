"""A model whose states come in blocks, as the equations of its blocks.

    x_k = phi_k( sum_j A_kj x_j + B_k u + b_k ),     y = sum_j C_j x_j + D u + d

Only the A_kj, B_k, C_j that are not zero are held, as operators. Blocks stand in the order in which
the paper writes them, the last one evaluated first, so that A is strictly upper block-triangular
where nothing loops. What is computed, and in which order, is in `evaluate`; A, B, C and D are views.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .._linalg import strong_components
from ..activations import Activation, Blocks
from ..implicit import Equation
from ..operators import (
    DENSE_LIMIT,
    Gather,
    Grid,
    Operator,
    Space,
    Weight,
    product,
    read,
    total,
    weights,
)

INPUT = -1  # the source of a term that reads u


@dataclass(frozen=True, eq=False)
class Constant:
    """M_k ... M_1 t, a bias t and what is applied to it, computed anew at each use.

    Attributes:
        value: t, or a number; broadcasts against the last factor's input, or against the row where
            there is none.
        factors: M_k, ..., M_1.
    """

    value: Weight | float
    factors: tuple[Operator, ...] = ()

    def __call__(self, like: Tensor) -> Tensor:
        """The constant; a number in the dtype and on the device of `like`."""
        t = read(self.value) if isinstance(self.value, Weight) else like.new_full((), self.value)
        if all(op.diagonal for op in self.factors):
            for op in reversed(self.factors):
                t = op.apply(t)
            return t
        t = t.expand(self.factors[-1].in_shape)[None]
        for op in reversed(self.factors):
            t = op.apply(t)
        return t[0]

    def after(self, op: Operator) -> "Constant":
        """op applied to it."""
        return replace(self, factors=(op, *self.factors))


@dataclass(frozen=True, eq=False)
class Row:
    """z = sum_j M_j x_j + sum of constants, one row of (A, B, b), or (C, D, d).

    Attributes:
        shape: of z, without the batch.
        terms: (j, M_j), with j the index of a block or `INPUT`.
        constants: of b.
    """

    shape: tuple[int, ...]
    terms: tuple[tuple[int, Operator], ...] = ()
    constants: tuple[Constant, ...] = ()

    def __call__(self, values: Sequence[Tensor | None]) -> Tensor:
        """z at these blocks; the last value is u."""
        bias = None
        for constant in self.constants:
            like = values[self.terms[0][0] if self.terms else INPUT]
            t = constant(like)  # type: ignore[arg-type]
            bias = t if bias is None else bias + t
        if not self.terms:
            u = values[INPUT]
            zero = u.new_zeros(u.shape[0], *self.shape)
            return zero if bias is None else zero + bias
        (source, op), *others = self.terms
        z = op.apply(values[source], bias)
        for source, op in others:
            z = z + op.apply(values[source])
        return z

    def sources(self) -> set[int]:
        """The blocks that it reads."""
        return {source for source, _ in self.terms}

    def flat(self) -> "Row":
        """Itself: sums of terms are flat already."""
        return self

    def split(self, inside: set[int]) -> "tuple[Row, Row]":
        """The part that reads blocks of `inside`, and all the rest."""
        loop = tuple(term for term in self.terms if term[0] in inside)
        rest = tuple(term for term in self.terms if term[0] not in inside)
        return Row(self.shape, loop), Row(self.shape, rest, self.constants)

    def moved(self, where: Callable[[int], int]) -> "Row":
        """The same with other numbers for the blocks."""
        return replace(self, terms=tuple((where(j), op) for j, op in self.terms))

    @property
    def cost(self) -> int:
        """Multiplications for one sample."""
        return sum(op.cost for _, op in self.terms)


@dataclass(frozen=True, eq=False)
class Join:
    """z = (z_1, ..., z_k), rows one after the other along a dimension.

    Attributes:
        dim: of a sample.
        parts: the rows.
    """

    dim: int
    parts: "tuple[Row | Join, ...]"

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """Of z."""
        first = self.parts[0].shape
        length = sum(part.shape[self.dim] for part in self.parts)
        return (*first[: self.dim], length, *first[self.dim + 1 :])

    def __call__(self, values: Sequence[Tensor | None]) -> Tensor:
        """z at these blocks; the last value is u."""
        return torch.cat([part(values) for part in self.parts], self.dim + 1)

    def sources(self) -> set[int]:
        """The blocks that it reads."""
        return set().union(*(part.sources() for part in self.parts))

    def flat(self) -> Row:
        """The same as a sum, each part placed among zeros."""
        terms: list[tuple[int, Operator]] = []
        constants: list[Constant] = []
        start, length = 0, self.shape[self.dim]
        for part in self.parts:
            row = part.flat()
            place = Gather(row.shape, "place", (self.dim, start, length))
            terms += [(j, product(place, op)) for j, op in row.terms]
            constants += [fitted(c, row.shape).after(place) for c in row.constants]
            start += row.shape[self.dim]
        return Row(self.shape, tuple(terms), tuple(constants))

    def split(self, inside: set[int]) -> "tuple[Join, Join]":
        """The part that reads blocks of `inside`, and all the rest."""
        pairs = [part.split(inside) for part in self.parts]
        loops, rests = zip(*pairs, strict=True)
        return Join(self.dim, loops), Join(self.dim, rests)

    def moved(self, where: Callable[[int], int]) -> "Join":
        """The same with other numbers for the blocks."""
        return Join(self.dim, tuple(part.moved(where) for part in self.parts))

    @property
    def cost(self) -> int:
        """Multiplications for one sample."""
        return sum(part.cost for part in self.parts)


AnyRow = Row | Join


def fitted(constant: Constant, shape: tuple[int, ...]) -> Constant:
    """The constant with its full shape, so that any operator may follow."""
    return constant.after(Gather(shape, "expand", shape)) if not constant.factors else constant


@dataclass(frozen=True, eq=False)
class Block:
    """x = phi(z), one block of states.

    Attributes:
        name: for reports and pictures: the module's path.
        row: of z.
        phi: the activation, for states in their own shape.
        shape: of x.
        equation: facts and solvers for a block that loops, from the layer that it was.
    """

    name: str
    row: AnyRow
    phi: Activation
    shape: tuple[int, ...]
    equation: Equation | None = None

    @property
    def size(self) -> int:
        """The number of states: where phi returns fewer numbers than it takes, zeros follow."""
        return max(math.prod(self.row.shape), math.prod(self.shape))

    @property
    def parts(self) -> tuple[tuple[Activation, int], ...]:
        """phi on the block flattened."""
        if self.phi.entrywise and self.phi.size is None or self.phi.size == self.size:
            return self.phi.blocks(self.size)
        return self.phi.blocks(self.shape[-1]) * math.prod(self.shape[:-1])  # along the last


@dataclass(frozen=True, eq=False)
class Structure:
    """The blocks of a model and its output.

    Attributes:
        blocks: the last one evaluated first.
        output: the row of y.
        input_shape: of u, one sample.
    """

    blocks: tuple[Block, ...]
    output: AnyRow
    input_shape: tuple[int, ...]

    def __post_init__(self) -> None:
        # Found once here, where torch.compile does not look: it cannot follow a cached property.
        _ = self.plan, self.loops, self.probe, self.output.shape

    # ---- the graph -------------------------------------------------------------------------------

    @functools.cached_property
    def components(self) -> tuple[tuple[int, ...], ...]:
        """The strongly connected components of "block i reads block j", in evaluation order."""
        count = len(self.blocks)
        mask = np.zeros((count, count), dtype=bool)
        for i, block in enumerate(self.blocks):
            for j in block.row.sources() - {INPUT}:
                mask[i, j] = True
        return tuple(tuple(c.tolist()) for c in strong_components(mask))

    @functools.cached_property
    def loops(self) -> tuple[tuple[int, ...], ...]:
        """The components with a loop: more than one block, or one that reads itself."""
        return tuple(
            c for c in self.components if len(c) > 1 or c[0] in self.blocks[c[0]].row.sources()
        )

    @functools.cached_property
    def plan(self) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
        """(component, the blocks that nobody reads once it is evaluated), in evaluation order."""
        last: dict[int, int] = {}
        for step, component in enumerate(self.components):
            for k in component:
                last[k] = step
                for j in self.blocks[k].row.sources():
                    last[j] = step
        kept = self.output.sources() | {INPUT}
        over: list[list[int]] = [[] for _ in self.components]
        for j, step in last.items():
            if j not in kept:
                over[step].append(j)
        return tuple(
            (component, tuple(done)) for component, done in zip(self.components, over, strict=True)
        )

    # ---- sizes and views -------------------------------------------------------------------------

    @property
    def states(self) -> int:
        """n."""
        return sum(block.size for block in self.blocks)

    @property
    def inputs(self) -> int:
        """p."""
        return math.prod(self.input_shape)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Of y, one sample."""
        return self.output.shape

    @property
    def outputs(self) -> int:
        """q."""
        return math.prod(self.output_shape)

    @functools.cached_property
    def phi(self) -> Blocks:
        """The activation of all states."""
        return Blocks(parts=tuple(part for block in self.blocks for part in block.parts))

    @functools.cached_property
    def A(self) -> Grid:
        """State to state."""
        return grid_of(self._rows, self._columns, [b.row for b in self.blocks], False)

    @functools.cached_property
    def B(self) -> Grid:
        """Input to state."""
        return grid_of(self._rows, self._source, [b.row for b in self.blocks], True)

    @functools.cached_property
    def C(self) -> Grid:
        """State to output."""
        return grid_of(self._target, self._columns, [self.output], False)

    @functools.cached_property
    def D(self) -> Grid:
        """Input to output."""
        return grid_of(self._target, self._source, [self.output], True)

    @property
    def b(self) -> "BlockVector":
        """The bias of the states."""
        return BlockVector(self._rows, tuple(b.row for b in self.blocks), self.example)

    @property
    def d(self) -> "BlockVector":
        """The bias of the output."""
        return BlockVector(self._target, (self.output,), self.example)

    @property
    def _rows(self) -> tuple[Space, ...]:
        return tuple(Space(b.name, b.row.shape, b.size) for b in self.blocks)

    @property
    def _columns(self) -> tuple[Space, ...]:
        return tuple(Space(b.name, b.shape, b.size) for b in self.blocks)

    @property
    def _source(self) -> tuple[Space, ...]:
        return (Space("u", self.input_shape),)

    @property
    def _target(self) -> tuple[Space, ...]:
        return (Space("y", self.output_shape),)

    # ---- tensors ---------------------------------------------------------------------------------

    @functools.cached_property
    def probe(self) -> Weight | None:
        """One of its tensors, not yet read, of a floating dtype and best one that is not computed;
        None where it has none."""
        floating = [w for w in weights(self) if read(w).is_floating_point()]
        cheap = [w for w in floating if isinstance(w, Tensor) or w.cheap]
        return next(iter(cheap or floating), None)

    @property
    def example(self) -> Tensor | None:
        """One of its tensors, for dtype and device; None where it has none."""
        return None if self.probe is None else read(self.probe)

    @property
    def cost(self) -> int:
        """Multiplications for one sample, each loop counted once."""
        return self.output.cost + sum(block.row.cost for block in self.blocks)


def grid_of(
    rows: tuple[Space, ...], columns: tuple[Space, ...], equations: list[AnyRow], of_input: bool
) -> Grid:
    """The operators of some rows, those from blocks or those from the input."""
    found: dict[tuple[int, int], list[Operator]] = {}
    for i, equation in enumerate(equations):
        for j, op in equation.flat().terms:
            if (j == INPUT) == of_input:
                found.setdefault((i, 0 if of_input else j), []).append(op)
    return Grid(rows, columns, {key: total(*ops) for key, ops in found.items()})


@dataclass(frozen=True, eq=False)
class BlockVector:
    """b or d of a structured model.

    Attributes:
        spaces: the blocks.
        rows: whose constants it consists of.
        like: one of the model's tensors, for numbers and zeros.
    """

    spaces: tuple[Space, ...]
    rows: tuple[AnyRow, ...]
    like: Tensor | None = None

    @property
    def shape(self) -> tuple[int]:
        """(n,)."""
        return (sum(space.size for space in self.spaces),)

    def dense(self, limit: int = DENSE_LIMIT, *, like: Tensor | None = None) -> Tensor:
        """The vector, where it has a constant; zeros need a tensor to be like.

        Args:
            limit: how many entries it may have.
            like: dtype and device of the zeros.

        Raises:
            ValueError: it would have more.
        """
        (n,) = self.shape
        if n > limit:
            raise ValueError(f"dense: the vector would have {n} entries, more than {limit}.")
        kind = torch.empty(0) if self.like is None else self.like
        kind = kind if like is None else like
        known: list[Tensor | None] = []
        for space, row in zip(self.spaces, self.rows, strict=True):
            flat = row.flat()
            constants = [fitted(c, flat.shape)(kind).expand(flat.shape) for c in flat.constants]
            whole = functools.reduce(torch.add, constants) if constants else None
            known.append(None if whole is None else space.flat(whole[None])[0])
        sizes = [space.size for space in self.spaces]
        parts = [kind.new_zeros(n) if t is None else t for t, n in zip(known, sizes, strict=True)]
        return torch.cat(parts) if parts else kind.new_zeros(0)
