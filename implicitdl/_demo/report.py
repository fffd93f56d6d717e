"""What a chapter is given, and what it gives back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from .._data import Dataset


@dataclass(frozen=True, kw_only=True)
class Context:
    """What the user asked for.

    Attributes:
        data: the images, pixels in [0, 1].
        out: an existing folder for pictures.
        seed: of everything random.
        epochs: of training; None leaves it to the chapter.
        states: n of the implicit model; None leaves it to the chapter.
        quick: a few seconds instead of a good result.
        models: what the chapters before have trained, by name.
    """

    data: Dataset
    out: Path
    seed: int = 0
    epochs: int | None = None
    states: int | None = None
    quick: bool = False
    models: Mapping[str, nn.Module] = field(default_factory=dict)

    def progress(self, total: int, label: str) -> Any:
        """A tqdm bar on stderr; it draws nothing where stderr is not a terminal."""
        from tqdm import tqdm

        return tqdm(total=total, desc=label, disable=None, leave=False, unit="epoch")


@dataclass(kw_only=True)
class Section:
    """A chapter's part of the report: a title, then labelled lines, then the pictures it drew.

    Beside it stand the models that the chapter trained, for the chapters that follow.
    """

    title: str
    rows: list[tuple[str, list[str]]] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)
    models: dict[str, nn.Module] = field(default_factory=dict)

    def add(self, label: str, *lines: str) -> None:
        """Append lines; the label stands before the first of them."""
        self.rows.append((label, list(lines)))

    def __str__(self) -> str:
        rows = [*self.rows]
        if self.pictures:
            rows.append(("pictures", [str(path) for path in self.pictures]))
        width = max((len(label) for label, _ in rows), default=0)
        body = [
            f"  {label if i == 0 else '':<{width}}  {line}"
            for label, lines in rows
            for i, line in enumerate(lines)
        ]
        return "\n".join([self.title, "-" * len(self.title), *body, ""])


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns: the first set flush left, the others flush right.

    Args:
        rows: cells, the same number in each row.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "   ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
