"""Training, epoch by epoch."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ._figures import COLOURS, DASHES, finish, log_axis, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Unit of what a training history may hold: axis label, factor, and whether it is drawn on a
# logarithmic axis.
_QUANTITIES = {
    "loss": ("training loss (nats)", 1.0, True),
    "validation accuracy": ("validation accuracy (%)", 100.0, False),
    "accuracy": ("accuracy (%)", 100.0, False),
}


def training(
    history: Mapping[str, Sequence[float]] | Mapping[str, Mapping[str, Sequence[float]]],
    *,
    axes: "Sequence[Axes] | None" = None,
) -> "Figure":
    """What was measured after each epoch, one panel a quantity, one line a model.

    Args:
        history: quantity -> one number an epoch; or model -> such a history. Shares whose name
            ends in "accuracy" are drawn in per cent; `seconds` is left out.
        axes: one for each quantity; None makes them.

    Returns:
        The figure.

    Raises:
        ValueError: there is nothing to draw, or as many axes as panels were not given.
    """
    models = _by_model(history)
    quantities = list(dict.fromkeys(q for h in models.values() for q in h if q != "seconds"))
    if not quantities:
        raise ValueError("history: got nothing but seconds, expected a quantity an epoch.")
    axes = panels(len(quantities)) if axes is None else list(axes)
    if len(axes) != len(quantities):
        raise ValueError(
            f"axes: got {len(axes)}, expected {len(quantities)}, one for each of "
            f"{', '.join(quantities)}."
        )
    for ax, quantity in zip(axes, quantities, strict=True):
        label, factor, logarithmic = _QUANTITIES.get(quantity, (quantity, 1.0, False))
        for i, (model, measured) in enumerate(models.items()):
            values = [factor * v for v in measured.get(quantity, ())]
            ax.plot(
                range(1, len(values) + 1),
                values,
                DASHES[i % len(DASHES)],
                color=COLOURS[i % len(COLOURS)],
                marker="o" if len(values) == 1 else None,
                label=model,
            )
        ax.set(xlabel="epoch", ylabel=label)
        if logarithmic and all(v > 0 for m in models.values() for v in m.get(quantity, ())):
            log_axis(ax)
        elif factor == 100.0:
            _accuracy_limits(ax)
        ax.xaxis.get_major_locator().set_params(integer=True)
        finish(ax)
        if len(models) > 1:
            ax.legend(frameon=False, loc="upper right" if logarithmic else "lower right")
    return axes[0].get_figure()


def _by_model(history: Mapping) -> dict[str, Mapping[str, Sequence[float]]]:
    """Histories by model; a single one is of a model without a name."""
    nested = all(isinstance(value, Mapping) for value in history.values())
    return dict(history) if nested else {"": history}


def _accuracy_limits(ax: "Axes") -> None:
    """Leave the first epochs out of the range where they would flatten all the rest."""
    values = [v for line in ax.get_lines() for v in line.get_ydata()[len(line.get_ydata()) // 4 :]]
    values = [v for v in values if math.isfinite(v)]
    if values:
        low, high = min(values), max(values)
        room = max(0.08 * (high - low), 0.2)
        ax.set_ylim(max(0.0, low - room), min(100.0 + room / 2, high + room))
