"""A matrix, entry by entry."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._figures import COLOURS, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def matrix(
    A: Tensor, *, bound: float | None = None, axes: "Sequence[Axes] | None" = None
) -> "Figure":
    """|A| as a heat map, and the sum of each of its rows beside it.

    Args:
        A: of the model.  # (n, n)
        bound: drawn among the row sums, such as kappa of ||A||_inf <= kappa; None draws none.
        axes: of the heat map and of the row sums; None makes them.

    Returns:
        The figure.

    Raises:
        TypeError: A is no tensor.
        ValueError: A is not a matrix with entries.
    """
    if not isinstance(A, Tensor):
        raise TypeError(f"A: got {type(A).__name__}, expected a tensor (n, n).")
    if A.dim() != 2 or A.numel() == 0:
        raise ValueError(f"A: got shape {tuple(A.shape)}, expected a matrix (n, n) with n >= 1.")
    size = A.detach().abs().to("cpu", torch.float64)
    sums = size.sum(1).tolist()
    image_ax, sum_ax = _matrix_panels() if axes is None else axes
    # A few large entries would leave the rest black: the scale ends at the 99.5th percentile.
    largest = float(size.max())
    top = float(torch.quantile(size.flatten()[: 1 << 24], 0.995)) or largest or 1.0
    image = image_ax.imshow(
        size.numpy(), cmap="viridis", vmin=0.0, vmax=top, interpolation="nearest", aspect="auto"
    )
    image_ax.set(xlabel="column j (from state j)", ylabel="row i (to state i)")
    bar = image_ax.get_figure().colorbar(
        image, ax=image_ax, extend="max" if largest > top else "neither", fraction=0.05, pad=0.03
    )
    bar.set_label(r"$|A_{ij}|$")
    bar.outline.set_visible(False)
    image_ax.set_title(rf"$|A|$, {A.shape[0]} states", loc="left")
    sum_ax.barh(range(len(sums)), sums, height=1.0, color=COLOURS[0], linewidth=0)
    if bound is not None:
        sum_ax.axvline(bound, color=COLOURS[1], linestyle="--", label=f"bound {bound:.3g}")
        sum_ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    sum_ax.set(xlabel=r"row sum  $\sum_j |A_{ij}|$", xlim=(0, None))
    sum_ax.set_ylim(len(sums) - 0.5, -0.5)
    sum_ax.tick_params(labelleft=False, left=False)
    sum_ax.spines[["top", "right"]].set_visible(False)
    return image_ax.get_figure()


def _matrix_panels() -> "Sequence[Axes]":
    return new_figure(7.5, 4.8).subplots(1, 2, width_ratios=(3, 1))
