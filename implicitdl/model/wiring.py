"""The algebra of structured models: blocks are wired to each other, nothing is multiplied out.

An output that another part reads becomes a block of linear states of its own, unless reading it
costs nothing; it is then computed once, however many blocks read it.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .._linalg import strong_components
from ..activations import Blocks, Identity
from ..operators import Dense, Gather, Live, Operator, Scale, product, read, rebuilt
from ..operators import Identity as Unchanged
from . import matrices
from .matrices import closing
from .structure import INPUT, AnyRow, Block, Constant, Join, Row, Structure, fitted

if TYPE_CHECKING:
    from . import ImplicitModel


def structured(model: "ImplicitModel") -> Structure:
    """The model as blocks: itself, or one block of all its states."""
    if model.structure is not None:
        return model.structure
    n, p, q = model.states, model.inputs, model.outputs
    block = Block(
        "x",
        Row((n,), ((0, Dense(model.A)), (INPUT, Dense(model.B))), (Constant(model.b),)),
        model.activation if model.phi.entrywise else model.phi,
        (n,),
    )
    output = Row((q,), ((0, Dense(model.C)), (INPUT, Dense(model.D))), (Constant(model.d),))
    return Structure((block,), output, (p,))


def layered(model: "ImplicitModel") -> Structure:
    """The matrices of a model cut into blocks of states that do not read each other, by depth; as
    one block where A has a loop."""
    n, q = model.states, model.outputs
    depth = _depths(model)
    if depth is None:
        return structured(model)
    levels = [[i for i in range(n) if depth[i] == level] for level in range(max(depth), -1, -1)]
    order = [i for level in levels for i in level]
    sorted_ = matrices.permuted(model, order)
    ends = [sum(map(len, levels[: k + 1])) for k in range(len(levels))]
    spans = [slice(end - len(level), end) for level, end in zip(levels, ends, strict=True)]
    parts = sorted_.phi.parts
    blocks = []
    for k, rows in enumerate(spans):
        terms = [(INPUT, Dense(sorted_.B[rows]))]
        terms += [
            (j, Dense(sorted_.A[rows, columns]))
            for j, columns in enumerate(spans)
            if bool(sorted_.A[rows, columns].any())
        ]
        own, taken = [], 0
        while taken < rows.stop - rows.start:
            phi, size = parts[0]
            size = min(size, rows.stop - rows.start - taken)
            own.append((phi, size))
            taken += size
            rest = parts[0][1] - size
            parts = ((phi, rest), *parts[1:]) if rest else parts[1:]
        phi = own[0][0] if len(own) == 1 else Blocks(parts=tuple(own))
        terms = [(j, op) for j, op in terms if bool(op.dense().any())] or terms[:1]
        row = Row((taken,), tuple(terms), (Constant(sorted_.b[rows]),))
        blocks.append(Block(f"x{len(spans) - k}", row, phi, (taken,)))
    outputs: list[tuple[int, Operator]] = [
        (j, Dense(sorted_.C[:, columns]))
        for j, columns in enumerate(spans)
        if bool(sorted_.C[:, columns].any())
    ]
    if bool(model.D.any()) or not outputs:
        outputs.append((INPUT, Dense(model.D)))
    output = Row((q,), tuple(outputs), (Constant(model.d),))
    return Structure(tuple(blocks), output, (model.inputs,))


def _depths(model: "ImplicitModel") -> list[int] | None:
    """How many states stand before each on the longest way to it; None where A has a loop.

    States that an activation couples count as one.
    """
    mask = (model.A.detach() != 0).cpu().numpy()
    node: list[int] = []
    for phi, size in model.phi.parts:
        first = node[-1] + 1 if node else 0
        node += list(range(first, first + size)) if phi.entrywise else [first] * size
    if len(set(node)) < len(node):
        count = node[-1] + 1
        small = np.zeros((count, count), dtype=bool)
        i, j = np.nonzero(mask)
        small[np.asarray(node)[i], np.asarray(node)[j]] = True
        mask = small
    components = strong_components(mask)
    if len(components) < len(mask) or mask.diagonal().any():
        return None
    depth = np.zeros(len(mask), dtype=int)
    for (i,) in components:
        read_ = np.flatnonzero(mask[i])
        depth[i] = 1 + depth[read_].max() if len(read_) else 0
    return [int(depth[k]) for k in node]


def free(row: AnyRow) -> bool:
    """Whether reading the row costs nothing: one block, or u, with its entries moved about."""
    return (
        isinstance(row, Row)
        and len(row.terms) == 1
        and not row.constants
        and row.terms[0][1].cost == 0
        and row.terms[0][1].light
    )


def reshaped(shape: tuple[int, ...], new: tuple[int, ...]) -> tuple[Operator, ...]:
    """The operator between two shapes of as many entries, as factors: none where they are equal."""
    return () if shape == new else (Gather(shape, "reshape", new),)


def substituted(row: AnyRow, source: int, term: tuple[int, Operator]) -> AnyRow:
    """The row with what it reads from `source` read from another one through an operator."""
    if isinstance(row, Join):
        return Join(row.dim, tuple(substituted(part, source, term) for part in row.parts))
    new, op = term
    return replace(
        row,
        terms=tuple((new, product(own, op)) if j == source else (j, own) for j, own in row.terms),
    )


def _moved(structure: Structure, by: int) -> tuple[tuple[Block, ...], AnyRow]:
    """Blocks and output with all numbers of blocks raised."""

    def where(j: int) -> int:
        return j if j == INPUT else j + by

    blocks = tuple(replace(b, row=b.row.moved(where)) for b in structure.blocks)
    return blocks, structure.output.moved(where)


def _link(name: str, row: AnyRow) -> Block:
    """A block of linear states."""
    return Block(name, row, Identity(), row.shape)


def cascade(g: Structure, f: Structure) -> Structure:
    """u -> f -> g; the blocks of g, then those of f."""
    own, count = g.blocks, len(g.blocks)
    shape = reshaped(f.output_shape, g.input_shape)
    linked = not free(f.output)
    behind, output = _moved(f, count + linked)
    if linked:
        behind = (_link("f", output), *behind)
        term: tuple[int, Operator] = (count, _through(shape, f.output_shape))
    else:
        ((source, op),) = output.terms  # type: ignore[union-attr]
        term = (source, product(*shape, op))
    blocks = tuple(replace(b, row=substituted(b.row, INPUT, term)) for b in own)
    return Structure(blocks + behind, substituted(g.output, INPUT, term), f.input_shape)


def _through(factors: tuple[Operator, ...], shape: tuple[int, ...]) -> Operator:
    return product(*factors, Unchanged(shape))


def _beside(
    f: Structure, g: Structure
) -> tuple[tuple[Block, ...], AnyRow, tuple[Block, ...], AnyRow]:
    """The blocks and outputs of both, g's numbered behind f's and reading u in f's shape."""
    blocks, output = _moved(g, len(f.blocks))
    if f.input_shape != g.input_shape:
        term = (INPUT, Gather(f.input_shape, "reshape", g.input_shape))
        blocks = tuple(replace(b, row=substituted(b.row, INPUT, term)) for b in blocks)
        output = substituted(output, INPUT, term)
    return f.blocks, f.output, blocks, output


def added(f: Structure, g: Structure) -> Structure:
    """y_f + y_g, in the shape of y_f."""
    first, y, second, z = _beside(f, g)
    blocks = first + second
    if z.shape != y.shape:
        blocks, z = _as_block("g", z, blocks)
        (term,) = z.terms
        through = _through(reshaped(z.shape, y.shape), z.shape)
        z = Row(y.shape, ((term[0], product(through, term[1])),))
    y, z = y.flat(), z.flat()
    output = Row(y.shape, y.terms + z.terms, y.constants + z.constants)
    return Structure(blocks, output, f.input_shape)


def stacked(f: Structure, g: Structure) -> Structure:
    """(y_f, y_g), both flattened."""
    first, y, second, z = _beside(f, g)
    blocks = first + second
    parts: list[AnyRow] = []
    for name, row in (("f", y), ("g", z)):
        if len(row.shape) != 1:
            blocks, row = _as_block(name, row, blocks)
            (term,) = row.terms
            flat = Gather(row.shape, "reshape", (math.prod(row.shape),))
            row = Row(flat.out_shape, ((term[0], product(flat, term[1])),))
        parts.append(row)
    return Structure(blocks, Join(0, tuple(parts)), f.input_shape)


def _as_block(name: str, row: AnyRow, blocks: tuple[Block, ...]) -> tuple[tuple[Block, ...], Row]:
    """The row as one term: a block of linear states, appended, unless it is one already."""
    if free(row):
        return blocks, row  # type: ignore[return-value]
    block = _link(name, row)
    return (*blocks, block), Row(row.shape, ((len(blocks), _through((), row.shape)),))


def feedback(f: Structure, K: Tensor) -> Structure:
    """The loop u = v + K y closed, y a block of its own that the blocks of f read through K."""
    count = len(f.blocks)
    size, output = f.outputs, f.output
    flat = reshaped(output.shape, (size,))
    back = reshaped((f.inputs,), f.input_shape)
    if not f.D.entries:
        blocks: tuple[Block, ...] = (_link("fed back", output),)
        y = count
    else:  # y = M (C x + D v + d)
        closing(f.D.dense(dtype=K.dtype, device=K.device), K)  # raises where it is singular
        D = f.D
        M = Live(lambda: closing(D.dense(dtype=K.dtype, device=K.device), K))
        whole = product(*reshaped((size,), output.shape), Dense(M), _through(flat, output.shape))
        blocks = (
            _link("C x + D v + d", output),
            _link("fed back", Row(output.shape, ((count, whole),))),
        )
        y = count + 1
    loop = product(*back, Dense(K), _through(flat, output.shape))

    def closed(row: AnyRow) -> AnyRow:
        if isinstance(row, Join):
            return Join(row.dim, tuple(closed(part) for part in row.parts))
        extra = tuple((y, product(op, loop)) for j, op in row.terms if j == INPUT)
        return replace(row, terms=row.terms + extra)

    own = tuple(replace(b, row=closed(b.row)) for b in f.blocks)
    result = Row(output.shape, ((y, _through((), output.shape)),))
    return Structure(own + blocks, result, f.input_shape)


def rescaled(f: Structure, kappa: float | None) -> Structure:
    """The same map with ||A||_inf <= kappa: x' = S x with (kappa I - |A|) v = 1 and s = 1 / v.

    Raises:
        ValueError: a loop, or numbers beyond the range of the dtype.
    """
    if f.loops:
        raise ValueError(
            "rescale: a structured model with a loop; write it as matrices first: model.dense()."
        )
    kappa = 0.5 if kappa is None else kappa  # halfway between the Perron root, 0, and 1
    if not 0 < kappa < 1:
        raise ValueError(f"kappa: got {kappa}, expected a number between 0 and 1.")
    count = len(f.blocks)
    kind = f.example if f.example is not None else torch.empty(0)
    one = torch.zeros((), dtype=torch.float64, device=kind.device)
    v: list[Tensor | None] = [None] * count
    with torch.no_grad():
        exact = rebuilt(f, lambda w: read(w).detach().double())
        for (k,) in f.components:
            row, load = exact.blocks[k].row.flat(), one
            for j, op in row.terms:
                if j != INPUT:
                    load = load + op.abs().apply(v[j])
            v[k] = ((1 + load) / kappa).expand(1, *row.shape)
        scales = [(1 / t[0]).to(kind.dtype) for t in v]  # type: ignore[index]
        back = [t[0].to(kind.dtype) for t in v]  # type: ignore[index]
    if not all(bool(torch.isfinite(t).all() and (s > 0).all())
               for s, t in zip(scales, back, strict=True)):  # fmt: skip
        raise ValueError(
            f"rescale: the scaling of {count} blocks leaves the range of {kind.dtype}; convert the "
            "network to float64 first."
        )

    def changed(row: AnyRow, own: Callable[[Row], Row]) -> Row:
        flat = row.flat()
        terms = tuple(
            (j, op if j == INPUT else product(op, Scale(back[j], f.blocks[j].shape)))
            for j, op in flat.terms
        )
        return own(replace(flat, terms=terms))

    def block(k: int, b: Block) -> Block:
        s = Scale(scales[k], b.row.shape)

        def own(row: Row) -> Row:
            constants = tuple(fitted(c, row.shape).after(s) for c in row.constants)
            return Row(row.shape, tuple((j, product(s, op)) for j, op in row.terms), constants)

        return replace(b, row=changed(b.row, own))

    blocks = tuple(block(k, b) for k, b in enumerate(f.blocks))
    return Structure(blocks, changed(f.output, lambda row: row), f.input_shape)


def permuted(f: Structure, order: list[int]) -> Structure:
    """The blocks in another order, which must keep each together.

    Raises:
        ValueError: the order takes a block apart.
    """
    first, at = {}, 0
    for k, block in enumerate(f.blocks):
        first[at] = k
        at += block.size
    new, position = [], 0
    while position < len(order):
        k = first.get(order[position])
        size = 0 if k is None else f.blocks[k].size
        run = order[position : position + size]
        if k is None or run != list(range(order[position], order[position] + size)):
            raise ValueError(
                "permute: a structured model keeps the states of a block together and in order; "
                "write it as matrices first: model.dense()."
            )
        new.append(k)
        position += size
    return arranged(f, new)


def arranged(f: Structure, order: list[int]) -> Structure:
    """Block i of the result is block order[i] of f."""
    where = {old: i for i, old in enumerate(order)} | {INPUT: INPUT}
    blocks = tuple(
        replace(f.blocks[k], row=f.blocks[k].row.moved(where.__getitem__)) for k in order
    )
    return Structure(blocks, f.output.moved(where.__getitem__), f.input_shape)
