"""The mean loss over a Wasserstein ball: a certificate above, an attack below."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from ._figures import COLOURS, finish, log_axis, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SHADE = 0.12


def certificate(
    radii: Tensor,
    above: Mapping[str, Tensor],
    below: Mapping[str, Tensor],
    *,
    unit: str = "",
    ax: "Axes | None" = None,
) -> "Figure":
    """Worst-case loss against the radius: it is in the coloured part, between proof and attack.

    Args:
        radii: of the balls, distances.  # (R,)
        above: model -> what is proved, as `dro.Certificate.at` or `.bound`.  # (R,) each
        below: model -> the mean loss of the worst law found.  # (R,) each, the same models
        unit: of the radii, as it is to be written.
        ax: where to draw; None makes one.

    Returns:
        The figure.

    Raises:
        ValueError: the two are of different models, or not one number for each radius.
    """
    if set(above) != set(below) or not above:
        raise ValueError(
            f"below: got {sorted(below)}, expected the models of `above`, {sorted(above)}, one at "
            "least."
        )
    x = radii.detach().double().cpu()
    for side, curves in (("above", above), ("below", below)):
        for name, values in curves.items():
            if x.dim() != 1 or values.shape != x.shape:
                raise ValueError(
                    f"{side}[{name!r}]: got shape {tuple(values.shape)}, expected "
                    f"{tuple(x.shape)}, one number for each radius."
                )
    ax = new_figure(5.4, 3.9).subplots() if ax is None else ax
    positive = True
    for k, name in enumerate(above):
        high, low = (v.detach().double().cpu() for v in (above[name], below[name]))
        positive = positive and bool((low > 0).all())
        colour = COLOURS[k % len(COLOURS)]
        ax.plot(x.tolist(), high.tolist(), "-", color=colour, label=f"{name}: proved bound")
        ax.plot(x.tolist(), low.tolist(), "--", color=colour, marker=".",
                label=f"{name}: found by attack")  # fmt: skip
        ax.fill_between(x.tolist(), low.tolist(), high.tolist(), color=colour, alpha=_SHADE,
                        linewidth=0)  # fmt: skip
    ax.set(xlabel="Wasserstein radius" + (f" ({unit})" if unit else ""), ylabel="mean loss (nats)")
    ax.margins(x=0)
    if positive:
        log_axis(ax)
    finish(ax)
    ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=9)
    return ax.get_figure()
