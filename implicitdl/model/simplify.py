"""Fewer states, the same map: what no output sees is removed, linear states are merged."""

from dataclasses import replace

from ..operators import product
from .structure import INPUT, AnyRow, Block, Constant, Join, Row, Structure, fitted


def simplified(f: Structure, grow: float) -> Structure:
    """The structure without blocks that no output sees and without linear ones.

    A linear block is written into the rows that read it where the arithmetic of a sample is then
    at most `grow` times what it was: two matrices one after the other may be cheap where their
    product, or the same convolution in several rows, is not.
    """
    f = seen(f)
    k = 0
    while k < len(f.blocks):
        new = _merged(f, k) if _linear(f, k) else None
        if new is not None and new.cost <= grow * max(f.cost, 1):
            f = new
        else:
            k += 1
    return f


def seen(f: Structure) -> Structure:
    """Without the blocks that the output reads neither itself nor through others."""
    kept, todo = set(), list(f.output.sources() - {INPUT})
    while todo:
        k = todo.pop()
        if k not in kept:
            kept.add(k)
            todo.extend(f.blocks[k].row.sources() - {INPUT})
    return _restricted(f, [k for k in range(len(f.blocks)) if k in kept])


def _restricted(f: Structure, kept: list[int]) -> Structure:
    where = {k: i for i, k in enumerate(kept)} | {INPUT: INPUT}
    blocks = tuple(replace(f.blocks[k], row=f.blocks[k].row.moved(where.__getitem__)) for k in kept)
    return Structure(blocks, f.output.moved(where.__getitem__), f.input_shape)


def _linear(f: Structure, k: int) -> bool:
    block = f.blocks[k]
    return block.phi.linear and block.phi.entrywise and k not in block.row.sources()


def _merged(f: Structure, k: int) -> Structure | None:
    """Block k written into the rows that read it; None where that would be the last block."""
    if len(f.blocks) == 1:
        return None

    def changed(block: Block) -> Block:
        # What a layer knew of its own loop is no longer known of the longer one.
        return replace(block, row=_written(block.row, k, f.blocks[k].row), equation=None)

    blocks = tuple(changed(b) if k in b.row.sources() else b for b in f.blocks)
    output = _written(f.output, k, f.blocks[k].row)
    kept = [i for i in range(len(blocks)) if i != k]
    return _restricted(Structure(blocks, output, f.input_shape), kept)


def _written(row: AnyRow, k: int, inner: AnyRow) -> AnyRow:
    """The row with x_k replaced by the row that defines it."""
    if k not in row.sources():
        return row
    if isinstance(row, Join):
        return Join(row.dim, tuple(_written(part, k, inner) for part in row.parts))
    if len(row.terms) == 1 and not row.constants and row.terms[0][1].identity:
        return inner  # a row that is x_k itself: a join stays a join
    flat = inner.flat()
    terms: list = []
    constants: list[Constant] = list(row.constants)
    for j, op in row.terms:
        if j != k:
            terms.append((j, op))
            continue
        terms += [(i, product(op, own)) for i, own in flat.terms]
        constants += [fitted(c, flat.shape).after(op) for c in flat.constants]
    return Row(row.shape, tuple(terms), tuple(constants))
