"""What all pictures share: figures, colours, axes, and how they are written to files."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart in every common form of colour blindness; the second
# difference between two lines is always their dash, so that grey prints read too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", ":")
GREY = "#808080"


def save(figure: "Figure", path: str | os.PathLike[str]) -> Path:
    """Write the figure to a file; its kind follows from the name's ending.

    Args:
        figure: as the functions here return it.
        path: of the file; its folder must exist.

    Returns:
        The path.

    Raises:
        FileNotFoundError: the folder is not there.
        ValueError: no kind of picture has that ending.
    """
    path = Path(path)
    figure.savefig(path, dpi=150)
    return path


def new_figure(width: float, height: float) -> "Figure":
    """A figure that no window and no list in pyplot knows of."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'pictures need matplotlib, which is not installed: pip install "implicitdl[plot]"'
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def panels(count: int) -> "list[Axes]":
    """So many axes side by side on a new figure."""
    return list(new_figure(5.0 * count, 3.6).subplots(1, count, squeeze=False)[0])


def log_axis(ax: "Axes") -> None:
    """Logarithmic, with plain numbers where the range is under two decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    ax.set_yscale("log")
    low, high = ax.get_ylim()
    if high < 100 * low:
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))


def finish(ax: "Axes") -> None:
    """A faint grid behind the lines, and no frame above and on the right."""
    ax.grid(True, which="major", color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
