"""A model, block by block."""

import itertools
import math
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..model import ImplicitModel, Structure
from ..operators import (
    Convolution,
    Dense,
    Gather,
    Identity,
    LowRank,
    Operator,
    Pooling,
    Product,
    Scale,
    Space,
    Sum,
)
from ._figures import COLOURS, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Kinds of operators: colour, and what stands in a cell that is too small for the operator's name.
# Where all parts of a product or sum are cheap, the one that comes first here is its main part.
_KINDS: Mapping[str, tuple[str, str]] = {
    "other": ("#F0E442", "O"),
    "convolution": (COLOURS[1], "C"),
    "dense": (COLOURS[0], "D"),
    "low rank": (COLOURS[3], "L"),
    "pooling": (COLOURS[2], "P"),
    "scale": (COLOURS[4], "S"),
    "gather": (COLOURS[5], "G"),
    "identity": ("#BBBBBB", "I"),
}
_CLASSES: Mapping[type[Operator], str] = {
    Convolution: "convolution",
    Dense: "dense",
    LowRank: "low rank",
    Pooling: "pooling",
    Scale: "scale",
    Gather: "gather",
    Identity: "identity",
}
_RULE, _FAINT, _STAIRS, _LOOP = "#606060", "#DDDDDD", "#909090", "#FFF3CC"

# In points: text that is read with ease, text that names an operator, the smallest that can be
# read; and the width of a letter over the height of its font.
_FONT, _NAMING, _SMALL, _LETTER = 9.0, 6.0, 5.0, 0.56
# In points: a cell where there is room, the narrowest matrix, the largest one of many cells.
_CELL, _NARROW, _MATRIX = 60.0, 216.0, 576.0
_LONGEST = 32  # letters of a block's name

_Place = tuple[int, int]  # row, column
_Size = tuple[float, float]  # width, height of a cell


def blocks(model: ImplicitModel, *, ax: "Axes | None" = None) -> "Figure":
    """The matrix [A B; C D] block by block, the states of the last layer first.

    Rows are the blocks of x, and y below them; columns are the blocks of x, and u to the right;
    beside their names stands how many numbers they are. A block that is not zero is a cell with the
    colour of its kind of operator, that of the main part where it is a product or a sum. All cells
    are of one size. The dotted stairs follow the diagonal: all of A lies above them where nothing
    loops. The blocks of a loop are framed, and so is each cell on or below the diagonal, which
    closes it.

    Blocks stand in the model's own order where A is then upper block-triangular but for its loops,
    and in the reverse order of their evaluation where it is not. A model of matrices is one block.

    Args:
        model: structured, as `implicitdl.to_implicit` returns it, or not.
        ax: where to draw; None makes one, of a size that suits the number of blocks.

    Returns:
        The figure.

    Raises:
        TypeError: the model is no `ImplicitModel`.

    Reference:
        El Ghaoui, Gu, Travacca, Askari, Tsai (2021), section 3.
    """
    if not isinstance(model, ImplicitModel):
        raise TypeError(
            f"model: got {type(model).__name__}, expected an ImplicitModel; "
            "implicitdl.to_implicit makes one of a network, .model() of an ImplicitLayer."
        )
    with torch.no_grad():
        layout = _layout(model)
    given = ax is not None
    if not given:
        ax, cell = _new_axes(layout)
    else:
        cell = _cell(ax, layout)
    _draw_parts(ax, layout)
    _draw_around(ax, layout, cell)
    if given:  # what stands around the cells takes its room from them
        ax.get_figure().canvas.figure.draw_without_rendering()
        cell = _cell(ax, layout)
        _draw_around(ax, layout, cell)
    _draw_rules(ax, layout, cell)
    _draw_cells(ax, layout, cell)
    return ax.get_figure()


# ---- what is drawn -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """What stands where.

    Attributes:
        rows, columns: from top to bottom, from left to right.
        cells: (row, column) -> the operator there.
        mains: (row, column) -> its main part.
        kinds: (row, column) -> the kind of that.
        loops: (first, last) block of each, as they stand.
    """

    rows: tuple[Space, ...]
    columns: tuple[Space, ...]
    cells: Mapping[_Place, Operator]
    mains: Mapping[_Place, Operator]
    kinds: Mapping[_Place, str]
    loops: tuple[tuple[int, int], ...]

    @property
    def last(self) -> int:
        """The number of blocks of x: the row of y, the column of u."""
        return len(self.rows) - 1


def _layout(model: ImplicitModel) -> _Layout:
    f = model.structured().structure
    loops = f.loops
    grids = {"A": f.A, "B": f.B, "C": f.C, "D": f.D}
    if model.structure is None:  # what of the matrices is zero is seen in their entries alone
        grids = {name: grid for name, grid in grids.items() if bool(getattr(model, name).any())}
        loops = loops if bool(model.A.tril().any()) else ()
    order = _order(f)
    at, n = {k: place for place, k in enumerate(order)}, len(order)
    cells = {
        (at[i] if name in "AB" else n, at[j] if name in "AC" else n): op
        for name, grid in grids.items()
        for (i, j), op in grid.entries.items()
        if not op.zero
    }
    mains = {place: _main(op) for place, op in cells.items()}
    spans = [sorted(at[k] for k in loop) for loop in loops]
    return _Layout(
        rows=(*(f.A.rows[k] for k in order), *f.C.rows),
        columns=(*(f.A.columns[k] for k in order), *f.B.columns),
        cells=cells,
        mains=mains,
        kinds={place: _kind(op) for place, op in mains.items()},
        loops=tuple((span[0], span[-1]) for span in spans),
    )


def _order(f: Structure) -> list[int]:
    """The blocks from top to bottom: a loop in one piece, what reads above what it reads."""
    of = {k: number for number, component in enumerate(f.components) for k in component}
    own = list(range(len(f.blocks)))
    pieces = sum(1 for _ in itertools.groupby(own, key=of.__getitem__))
    if pieces == len(f.components) and all(
        i < j or of[i] == of[j] for (i, j), op in f.A.entries.items() if not op.zero
    ):
        return own
    return [k for component in reversed(f.components) for k in sorted(component)]


def _main(op: Operator) -> Operator:
    """The part that costs most; where all cost a pass at the most, the first in order of kinds."""
    parts = list(_parts(op))
    heavy = [part for part in parts if not part.light]
    if heavy:
        return max(heavy, key=lambda part: part.cost)
    return min(parts, key=lambda part: list(_KINDS).index(_kind(part)))


def _parts(op: Operator) -> Iterator[Operator]:
    """The factors or terms, and theirs; itself where it has none."""
    inner = op.factors if isinstance(op, Product) else op.terms if isinstance(op, Sum) else ()
    if not inner:
        yield op
    for part in inner:
        yield from _parts(part)


def _kind(op: Operator) -> str:
    return next((kind for known, kind in _CLASSES.items() if isinstance(op, known)), "other")


def _title(layout: _Layout) -> list[str]:
    n = layout.last
    states = sum(space.size for space in layout.rows[:n])
    sizes = f"{_count(states, 'state')}, {_count(n, 'block')}"
    if layout.loops:
        return [sizes, _count(len(layout.loops), "loop")]
    blockwise = all(i < j for i, j in layout.cells if i < n)
    return [sizes, "A strictly upper " + "block-" * blockwise + "triangular"]


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + "s" * (number != 1)


def _name(space: Space) -> str:
    """A block's name, its middle left out where it is long, and size."""
    name = space.name
    if len(name) > _LONGEST:  # its end tells it from the others
        name = f"{name[: _LONGEST // 3]}..{name[-(2 * _LONGEST // 3 - 2) :]}"
    return f"{name} ({space.size:,})"


# ---- how it is drawn: all lengths in points, 72 of them an inch ----------------------------------


def _new_axes(layout: _Layout) -> "tuple[Axes, _Size]":
    """Axes of a size that suits the number of blocks, and the size of a cell."""
    count = len(layout.rows)
    side = min(_CELL, _MATRIX / count)
    width, height = max(side, _NARROW / count), side
    names = _LETTER * max(len(_name(s)) for s in (*layout.rows, *layout.columns))
    beside, above = names * _label_font(height), names * _label_font(width)
    figure = new_figure(
        (count * width + beside + 60) / 72,
        (count * height + above + 80) / 72,
    )
    return figure.subplots(), (width, height)


def _cell(ax: "Axes", layout: _Layout) -> _Size:
    """The size of a cell on these axes."""
    box, dpi = ax.get_window_extent(), ax.get_figure().canvas.figure.dpi
    scale = 72 / dpi / len(layout.rows)
    return scale * box.width, scale * box.height


def _draw_parts(ax: "Axes", layout: _Layout) -> None:
    """What parts A, B, C and D, and which is which."""
    n = layout.last
    ax.set(xlim=(0, n + 1), ylim=(n + 1, 0))
    ax.xaxis.tick_top()
    for line in (ax.axhline, ax.axvline):
        line(n, color=_RULE, linewidth=1.2, zorder=2.2)
    for middle, names in ((n / 2, "$A\\;|\\;B$"), (n + 0.5, "$C\\;|\\;D$")):
        ax.text(n + 1, middle, f"  {names}", ha="left", va="center", fontsize=_FONT + 1)


def _draw_around(ax: "Axes", layout: _Layout, cell: _Size) -> None:
    """Names on both axes, title and legend, in place of what is there."""
    n = layout.last
    for axis, spaces, side, rotation in (
        (ax.xaxis, layout.columns, cell[0], 90),
        (ax.yaxis, layout.rows, cell[1], 0),
    ):
        # Of every block, or where these would overlap of every second, third, ...
        font = _label_font(side)
        named = range(n, -1, -max(1, math.ceil(1.15 * font / side)))
        axis.set_ticks([k + 0.5 for k in named], [_name(spaces[k]) for k in named])
        axis.set_tick_params(length=0, labelsize=font, labelrotation=rotation)
    title = _title(layout)
    fits = _LETTER * (_FONT + 1) * sum(map(len, title)) < cell[0] * (n + 1)
    ax.set_title(("; " if fits else "\n").join(title), loc="left", fontsize=_FONT + 1)
    _draw_legend(ax, layout, cell)


def _label_font(side: float) -> float:
    """For names beside cells with sides of that length."""
    return max(_SMALL, min(_FONT, 0.8 * side))


def _draw_legend(ax: "Axes", layout: _Layout, cell: _Size) -> None:
    """The kinds that there are, with the letters that stand for them where there are any."""
    from matplotlib.patches import Patch

    _, named = _texts(layout, cell)
    handles: list[Any] = []
    for kind, (colour, letter) in _KINDS.items():
        if kind in layout.kinds.values():
            handles.append(Patch(color=colour, label=kind if named else f"{letter}  {kind}"))
    if layout.loops:
        handles.append(Patch(facecolor=_LOOP, edgecolor="black", linewidth=1.6, label="loop"))
    columns = int(cell[0] * len(layout.columns) / 90)
    if handles:
        ax.legend(
            handles=handles, loc="upper left", bbox_to_anchor=(0, -0.01), borderaxespad=0.4,
            ncols=max(1, min(columns, len(handles))), frameon=False, fontsize=_FONT,
        )  # fmt: skip


def _draw_rules(ax: "Axes", layout: _Layout, cell: _Size) -> None:
    """Lines between the blocks, the stairs, the frames of loops."""
    from matplotlib.patches import Rectangle

    n, pen = layout.last, _pen(cell)
    for k in range(1, n):
        for line in (ax.axhline, ax.axvline):
            line(k, color=_FAINT, linewidth=0.6 * pen, zorder=0.5)
    corners = [k for k in range(n + 1) for _ in range(2)]
    ax.plot(corners[1:], corners[:-1], ":", color=_STAIRS, linewidth=pen, zorder=2.2)
    for first, last in layout.loops:
        side = last + 1 - first
        ax.add_patch(Rectangle((first, first), side, side, color=_LOOP, linewidth=0, zorder=0.2))
        closing = [(i, j, 1) for i, j in layout.cells if first <= j <= i <= last]
        for i, j, size in [(first, first, side), *closing]:
            frame = Rectangle((j, i), size, size, fill=False, edgecolor="black", zorder=2.5)
            frame.set_linewidth(2.2 * pen)
            ax.add_patch(frame)


def _draw_cells(ax: "Axes", layout: _Layout, cell: _Size) -> None:
    from matplotlib.patches import Rectangle

    texts, _ = _texts(layout, cell)
    font = min((_fitting(text, cell) for text in texts.values()), default=_FONT)
    for (i, j), kind in layout.kinds.items():
        rectangle = Rectangle((j, i), 1, 1, facecolor=_KINDS[kind][0], edgecolor="white")
        rectangle.set_linewidth(0.8 * _pen(cell))
        ax.add_patch(rectangle)
        if font >= _SMALL - 1:
            ax.text(
                j + 0.5, i + 0.5, texts[i, j], ha="center", va="center", fontsize=font,
                linespacing=1.15, color="white" if kind == "dense" else "black",
            )  # fmt: skip


def _pen(cell: _Size) -> float:
    """The width of lines between cells, over that where there is room."""
    return min(1.0, min(cell) / 15)


def _texts(layout: _Layout, cell: _Size) -> tuple[dict[_Place, str], bool]:
    """What stands in the cells: what the operators are called, or else what their main parts are;
    where there is no room for that, a letter and the size of kernels, or else the letter.

    Returns:
        The texts, and whether they are names.
    """
    names, kernels, letters = {}, {}, {}
    for place, main in layout.mains.items():
        whole, part = (
            textwrap.fill(op.label, 12, break_long_words=False)
            for op in (layout.cells[place], main)
        )
        names[place] = whole if _fitting(whole, cell) >= _NAMING else part
        letters[place] = _KINDS[layout.kinds[place]][1]
        kernel = re.search(r" (\d+(x\d+)*)$", main.label)
        kernels[place] = f"{letters[place]}\n{kernel[1]}" if kernel else letters[place]
    for texts in (names, kernels):
        if all(_fitting(text, cell) >= _NAMING for text in texts.values()):
            return texts, texts is names
    return letters, False


def _fitting(text: str, cell: _Size) -> float:
    """The font in which a text fits into a cell."""
    lines = text.split("\n")
    width = 0.9 * cell[0] / (_LETTER * max(map(len, lines)))
    return min(_FONT, width, 0.9 * cell[1] / (1.25 * len(lines)))
