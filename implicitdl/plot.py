"""Pictures of training, of solves and of models.

Every function draws on the Axes that it is given, or on a new Figure of its own, and returns the
Figure. Nothing here touches pyplot, so no window opens and no global state is left behind.
matplotlib is imported inside the functions: it is an optional dependency.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .solution import Solution

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart in every common form of colour blindness; the second
# difference between two lines is always their dash, so that grey prints read too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("-", "--", "-.", ":")
_GREY = "#808080"

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
    axes = _panels(len(quantities)) if axes is None else list(axes)
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
                _DASHES[i % len(_DASHES)],
                color=_COLOURS[i % len(_COLOURS)],
                marker="o" if len(values) == 1 else None,
                label=model,
            )
        ax.set(xlabel="epoch", ylabel=label)
        if logarithmic and all(v > 0 for m in models.values() for v in m.get(quantity, ())):
            _log_axis(ax)
        elif factor == 100.0:
            _accuracy_limits(ax)
        ax.xaxis.get_major_locator().set_params(integer=True)
        _finish(ax)
        if len(models) > 1:
            ax.legend(frameon=False, loc="upper right" if logarithmic else "lower right")
    return axes[0].get_figure()


def convergence(
    solution: Solution,
    contraction: float | None = None,
    *,
    weights: Tensor | None = None,
    samples: int = 200,
    ax: "Axes | None" = None,
) -> "Figure":
    """||x_{k+1} - x_k|| against k for each sample, with the median and the certified rate.

    For a solve by undamped Picard steps that is the residual ||f(x_k) - x_k||. On a contraction with
    factor c the residual of every sample falls below c^k times its first one; the line drawn is c^k
    times the largest first residual, so no curve may cross it. Other solvers, and Picard with
    damping, take other steps: for them the curves are step lengths, the certificate says nothing
    about these, and no line is drawn. Nor is it where a curve falls by less than c: then c is not
    the factor of this map in this norm, which the legend says.

    Args:
        solution: a solve with `record=True`.
        contraction: a certified factor c, such as `Certificate.contraction`, for a Picard solve.
        weights: v > 0 of the norm max_i |x_i| / v_i in which c is certified, such as
            `Certificate.weights`; ones if None.  # (n,)
        samples: thin lines at most, evenly spread over the batch; the median is over all.
        ax: where to draw; None makes one.

    Returns:
        The figure.

    Raises:
        ValueError: the solution has no trajectory, or an empty one; c is not in [0, 1); weights do
            not fit.
    """
    if contraction is not None and not 0 <= contraction < 1:
        raise ValueError(f"contraction: got {contraction}, expected a factor in [0, 1).")
    lengths = _step_lengths(solution, weights)  # (steps, batch)
    ax = _panels(1)[0] if ax is None else ax
    batch = lengths.shape[1]
    shown = torch.linspace(0, batch - 1, min(samples, batch)).round().long().unique()
    steps = range(len(lengths))
    ax.plot(steps, lengths[:, shown].numpy(), color=_GREY, alpha=0.25, linewidth=0.7)
    some = f"{len(shown)} of {batch} samples" if len(shown) < batch else f"{batch} samples"
    ax.plot([], [], color=_GREY, linewidth=0.7, label=some if batch > 1 else "1 sample")
    median = lengths.nan_to_num(nan=0.0).median(dim=1).values
    ax.plot(
        steps,
        median.where(median > 0, torch.nan).tolist(),
        color=_COLOURS[0],
        lw=2.2,
        label="median",
    )
    # The solver and those that took over from it; an undamped Picard step is f itself.
    solvers = solution.stats.get("tried", (solution.stats.get("solver", "unknown solver"),))
    plain_steps = tuple(solvers) == ("Picard",) and not solution.stats.get("damping")
    if contraction is not None and plain_steps:
        label, line = f"certified: factor {contraction:.3g} a step", "--"
        if not _falls(lengths, contraction, _rounding(solution, weights)):
            plain_steps, line = False, "none"
            label = f"slower than {contraction:.3g} a step: another norm?"
        first = float(lengths[0].nan_to_num(nan=0.0).max())
        bound = [first * contraction**k if plain_steps else torch.nan for k in steps]
        ax.plot(steps, bound, linestyle=line, color=_COLOURS[1], linewidth=2.0, label=label)
    # The certified line may fall far more slowly than the curves, which set the scale.
    finite = lengths[lengths.isfinite()]
    _log_axis(ax)
    if finite.numel():
        ax.set_ylim(float(finite.min()) / 3, float(finite.max()) * 3)
    plain = weights is None or bool((weights == 1).all())
    norm = r"\infty" if plain else "v"
    what = "residual" if plain_steps else "step"
    ax.set(xlabel="step k", ylabel=rf"{what}  $\|x_{{k+1}} - x_k\|_{{{norm}}}$")
    ax.xaxis.get_major_locator().set_params(integer=True)
    _finish(ax)
    kind = str(solution.value.dtype).removeprefix("torch.")
    ax.set_title(f"convergence of the states: {', '.join(solvers)}, {kind}", loc="left")
    ax.legend(frameon=False, loc="lower left")
    return ax.get_figure()


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
    sum_ax.barh(range(len(sums)), sums, height=1.0, color=_COLOURS[0], linewidth=0)
    if bound is not None:
        sum_ax.axvline(bound, color=_COLOURS[1], linestyle="--", label=f"bound {bound:.3g}")
        sum_ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    sum_ax.set(xlabel=r"row sum  $\sum_j |A_{ij}|$", xlim=(0, None))
    sum_ax.set_ylim(len(sums) - 0.5, -0.5)
    sum_ax.tick_params(labelleft=False, left=False)
    sum_ax.spines[["top", "right"]].set_visible(False)
    return image_ax.get_figure()


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


def _by_model(history: Mapping) -> dict[str, Mapping[str, Sequence[float]]]:
    """Histories by model; a single one is of a model without a name."""
    nested = all(isinstance(value, Mapping) for value in history.values())
    return dict(history) if nested else {"": history}


def _figure(width: float, height: float) -> "Figure":
    """A figure that no window and no list in pyplot knows of."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'pictures need matplotlib, which is not installed: pip install "implicitdl[plot]"'
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def _panels(count: int) -> "list[Axes]":
    return list(_figure(5.0 * count, 3.6).subplots(1, count, squeeze=False)[0])


def _matrix_panels() -> "Sequence[Axes]":
    return _figure(7.5, 4.8).subplots(1, 2, width_ratios=(3, 1))


def _log_axis(ax: "Axes") -> None:
    """Logarithmic, with plain numbers where the range is under two decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    ax.set_yscale("log")
    low, high = ax.get_ylim()
    if high < 100 * low:
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))


def _accuracy_limits(ax: "Axes") -> None:
    """Leave the first epochs out of the range where they would flatten all the rest."""
    values = [v for line in ax.get_lines() for v in line.get_ydata()[len(line.get_ydata()) // 4 :]]
    values = [v for v in values if math.isfinite(v)]
    if values:
        low, high = min(values), max(values)
        room = max(0.08 * (high - low), 0.2)
        ax.set_ylim(max(0.0, low - room), min(100.0 + room / 2, high + room))


def _finish(ax: "Axes") -> None:
    ax.grid(True, which="major", color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _falls(lengths: Tensor, factor: float, rounding: Tensor) -> bool:
    """Whether every step is at most `factor` of the one before, but for rounding."""
    before, after = lengths[:-1].nan_to_num(nan=0.0), lengths[1:].nan_to_num(nan=0.0)
    return bool((after <= factor * before + rounding).all())


def _rounding(solution: Solution, weights: Tensor | None) -> Tensor:
    """What the difference of two iterates may be off by, generously.  # (batch,)"""
    x = solution.stats["trajectory"].detach().to("cpu", torch.float64).abs()
    x = x.reshape(len(x), -1, x.shape[-1])
    if weights is not None:
        x = x / weights.detach().to("cpu", torch.float64)
    size = x.amax(dim=(0, 2)).nan_to_num(nan=torch.inf)
    return 8 * x.shape[-1] * torch.finfo(solution.value.dtype).eps * size


def _step_lengths(solution: Solution, weights: Tensor | None) -> Tensor:
    """||x_{k+1} - x_k|| in the norm, NaN from where a sample stands still.  # (steps, batch)"""
    trajectory = solution.stats.get("trajectory")
    if trajectory is None:
        raise ValueError(
            "solution: got one without a trajectory, expected stats['trajectory']; solve with "
            "record=True."
        )
    if trajectory.shape[0] < 2 or trajectory.numel() == 0:
        raise ValueError(
            f"solution: got a trajectory of shape {tuple(trajectory.shape)}, expected at least two "
            "iterates of at least one sample."
        )
    steps = trajectory.detach().to("cpu", torch.float64).diff(dim=0)
    steps = steps.reshape(len(steps), -1, trajectory.shape[-1]).abs()
    if weights is not None:
        n = trajectory.shape[-1]
        if (
            not isinstance(weights, Tensor)
            or weights.shape != (n,)
            or not bool((weights > 0).all())
        ):
            got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise ValueError(f"weights: got {got}, expected {n} positive numbers, one a state.")
        steps = steps / weights.detach().to("cpu", torch.float64)
    lengths = steps.amax(dim=-1)
    # What a failed sample ends with is its best iterate, which need not be the next one.
    lengths[-1, ~solution.converged.flatten().cpu()] = torch.nan
    return lengths.where(lengths > 0, torch.nan)
