"""Solves, step by step."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..solution import Solution
from ._figures import COLOURS, GREY, finish, log_axis, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
    ax = panels(1)[0] if ax is None else ax
    batch = lengths.shape[1]
    shown = torch.linspace(0, batch - 1, min(samples, batch)).round().long().unique()
    steps = range(len(lengths))
    ax.plot(steps, lengths[:, shown].numpy(), color=GREY, alpha=0.25, linewidth=0.7)
    some = f"{len(shown)} of {batch} samples" if len(shown) < batch else f"{batch} samples"
    ax.plot([], [], color=GREY, linewidth=0.7, label=some if batch > 1 else "1 sample")
    median = lengths.nan_to_num(nan=0.0).median(dim=1).values
    ax.plot(
        steps,
        median.where(median > 0, torch.nan).tolist(),
        color=COLOURS[0],
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
        ax.plot(steps, bound, linestyle=line, color=COLOURS[1], linewidth=2.0, label=label)
    # The certified line may fall far more slowly than the curves, which set the scale.
    finite = lengths[lengths.isfinite()]
    log_axis(ax)
    if finite.numel():
        ax.set_ylim(float(finite.min()) / 3, float(finite.max()) * 3)
    plain = weights is None or bool((weights == 1).all())
    norm = r"\infty" if plain else "v"
    what = "residual" if plain_steps else "step"
    ax.set(xlabel="step k", ylabel=rf"{what}  $\|x_{{k+1}} - x_k\|_{{{norm}}}$")
    ax.xaxis.get_major_locator().set_params(integer=True)
    finish(ax)
    kind = str(solution.value.dtype).removeprefix("torch.")
    ax.set_title(f"convergence of the states: {', '.join(solvers)}, {kind}", loc="left")
    ax.legend(frameon=False, loc="lower left")
    return ax.get_figure()


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
