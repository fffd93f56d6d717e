"""Lifted training: what the objective is made of, epoch by epoch."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ._figures import COLOURS, DASHES, finish, log_axis, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..lifted import Report


def penalties(report: "Report", *, axes: "Sequence[Axes] | None" = None) -> "Figure":
    """Objective and loss after each epoch on the left, the penalty of each block on the right.

    Args:
        report: of `lifted.local`, `lifted.blocks` or `lifted.admm`. For `local` the objective is the
            loss, and penalties are those of each epoch's last batch.
        axes: two; None makes them.

    Returns:
        The figure.

    Raises:
        TypeError: it is no report of a lifted training.
        ValueError: no epoch was finished, or not two axes were given.
    """
    from ..lifted import Report

    if not isinstance(report, Report):
        raise TypeError(f"report: got {type(report).__name__}, expected a lifted.Report.")
    if not report.epochs:
        raise ValueError("report: got one without epochs, expected at least one to draw.")
    axes = panels(2) if axes is None else list(axes)
    if len(axes) != 2:
        raise ValueError(f"axes: got {len(axes)}, expected 2, for the objective and the penalties.")
    left, right = axes
    totals = {"objective": report.objective, "loss": report.loss}
    if report.objective == report.loss:
        del totals["objective"]
    step = "epoch" if report.method == "local" else "sweep"
    _lines(left, totals, step)
    left.set(ylabel=f"{report.method}: mean over the samples")
    blocks = [list(block) for block in zip(*report.penalties, strict=True)]
    _lines(right, {f"block {k + 1}": values for k, values in enumerate(blocks)}, step)
    right.set(ylabel="penalty, mean over the samples")
    return left.get_figure()


def _lines(ax: "Axes", series: dict[str, list[float]], step: str) -> None:
    """Logarithmic where all is positive."""
    for k, (name, values) in enumerate(series.items()):
        ax.plot(
            range(1, len(values) + 1), values, DASHES[k % len(DASHES)], label=name,
            color=COLOURS[k % len(COLOURS)], marker="o" if len(values) == 1 else None,
        )  # fmt: skip
    ax.set(xlabel=step)
    if series and all(math.isfinite(v) and v > 0 for values in series.values() for v in values):
        log_axis(ax)
    ax.xaxis.get_major_locator().set_params(integer=True)
    finish(ax)
    if series:
        ax.legend(frameon=False, loc="upper right")
