"""What `print(model)` shows of a structured model."""

from . import blockwise
from .structure import INPUT, AnyRow, Structure

_MOST = 60  # rows shown of a long table


def text(f: Structure) -> str:
    """Blocks, what each reads, components, certificate."""
    kind = "" if f.example is None else f", {str(f.example.dtype).removeprefix('torch.')}"
    lines = [
        f"ImplicitModel with {f.states} states in {len(f.blocks)} blocks{kind}",
        f"u: {f.inputs} inputs {_shape(f.input_shape)}, "
        + f"y: {f.outputs} outputs {_shape(f.output_shape)}",
        "",
    ]
    rows = [("block", "states", "shape", "phi", "reads")]
    order = [k for component in f.components for k in component][::-1]
    shown = order if len(order) <= _MOST else order[: _MOST // 2] + order[-_MOST // 2 :]
    for k in shown:
        block = f.blocks[k]
        phi = type(block.phi).__name__
        if phi == "Identity":
            phi = "linear"
        reads = _reads(f, block.row)
        rows.append((block.name, f"{block.size}", _shape(block.shape), phi, reads))
    rows.append(("y", f"{f.outputs}", _shape(f.output_shape), "", _reads(f, f.output)))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for at, row in enumerate(rows):
        cells = [row[0].ljust(widths[0]), row[1].rjust(widths[1]), row[2].ljust(widths[2]),
                 row[3].ljust(widths[3]), row[4]]  # fmt: skip
        lines.append("  ".join(cells).rstrip())
        if len(order) > len(shown) and at == _MOST // 2:
            lines.append(f"... {len(order) - len(shown)} more blocks ...")
    lines.append("")
    pairs = len(f.blocks) ** 2
    lines.append(
        f"A is {f.states} x {f.states}, {len(f.A.entries)} of its {pairs} blocks are not zero; "
        f"{f.cost:.3g} multiplications a sample"
    )
    loops = [", ".join(f.blocks[k].name for k in c) for c in f.loops]
    lines.append(
        f"{len(f.components)} components, "
        + (f"{len(loops)} with a loop: {'; '.join(loops)}" if loops else "none with a loop")
    )
    lines.append(str(blockwise.certificate(f, refute=False)))
    return "\n".join(lines)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) if shape else "1"


def _reads(f: Structure, row: AnyRow) -> str:
    """The operators of a row and what they read, and whether there is a bias."""
    flat = row.flat()
    terms = [f"{op.label} {'u' if j == INPUT else f.blocks[j].name}" for j, op in flat.terms]
    if flat.constants:
        terms.append("bias")
    shown = terms if len(terms) <= 6 else [*terms[:5], f"{len(terms) - 5} more"]
    return " + ".join(shown) if terms else "nothing"
