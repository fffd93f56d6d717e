"""What uncertainty does to a linear program: feasible sets, attacks, the price of protection."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..robust import RobustLP
from ._figures import COLOURS, DASHES, GREY, finish, new_figure, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKS, _DARK = "osD^v", "#404040"
_GRID = 300  # points along a side of a feasible set's picture
_NAMED = 6  # radii that are written beside a trade-off curve


def feasible(
    program: RobustLP,
    *,
    radii: Sequence[float] = (0.0, 1.0),
    points: Mapping[str, Tensor] | None = None,
    window: tuple[float, float, float, float] | None = None,
    ax: "Axes | None" = None,
) -> "Figure":
    """The x in the plane that satisfy all rows for all data in the sets, at several sizes of these.

    An arrow shows -c, the way in which the objective falls.

    Args:
        program: of two variables, without batch dimension and equalities.
        radii: sizes of the sets, up to six; 0 is the program without uncertainty.
        points: name -> x, marked.  # (2,) each
        window: left, right, bottom, top; None leaves room around the points and the origin.
        ax: where to draw; None makes one.

    Returns:
        The figure.

    Raises:
        ValueError: the program is not of this kind, or there are too many radii.
    """
    if program.lead or program.c.shape[-1] != 2 or program.equality is not None:
        raise ValueError(
            f"program: got {program.c.shape[-1]} variables, leading dimensions "
            f"{tuple(program.lead)} and {'no ' if program.equality is None else ''}equality, "
            "expected one program of two variables without equality."
        )
    if not 0 < len(radii) <= len(COLOURS):
        raise ValueError(f"radii: got {len(radii)}, expected 1 to {len(COLOURS)}.")
    points = {name: x.detach().cpu().double() for name, x in (points or {}).items()}
    ax = new_figure(5.0, 4.4).subplots() if ax is None else ax
    left, right, bottom, top = _window(points) if window is None else window
    across, up = torch.linspace(left, right, _GRID), torch.linspace(bottom, top, _GRID)
    grid = torch.cartesian_prod(across, up).to(program.c)
    for k, r in enumerate(sorted(radii)):
        with torch.no_grad():
            excess = _excess(program.scaled(r), grid).reshape(_GRID, _GRID).mT.cpu().numpy()
        x, y = across.numpy(), up.numpy()
        ax.contourf(x, y, excess, levels=[-torch.inf, 0], colors=[COLOURS[k]], alpha=0.15)
        ax.contour(x, y, excess, levels=[0], colors=[COLOURS[k]], linestyles=[DASHES[k % 4]])
        label = "no uncertainty" if r == 0 else f"robust, r = {r:.3g}"
        ax.plot([], [], DASHES[k % 4], color=COLOURS[k], label=label)
    for k, (name, point) in enumerate(points.items()):
        ax.plot(*point.tolist(), _MARKS[k % 5], color="black", label=name, zorder=3,
                markerfacecolor="white", markeredgewidth=1.5)  # fmt: skip
    _arrow(ax, program.c, (left, right, bottom, top))
    ax.set(xlim=(left, right), ylim=(bottom, top), xlabel="$x_1$", ylabel="$x_2$")
    finish(ax)
    ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return ax.get_figure()


def attack(
    radii: Tensor,
    violations: Mapping[str, Tensor],
    *,
    sampled: Mapping[str, Tensor] | None = None,
    ax: "Axes | None" = None,
) -> "Figure":
    """By how much the worst data of each size break the worst row; above zero, x is broken.

    Args:
        radii: sizes of the attack.  # (R,)
        violations: name of a solution -> the largest entry of `RobustLP.violation`.  # (R,) each
        sampled: the same, by random data: drawn as dots, which cannot be above the line.
        ax: where to draw; None makes one.

    Returns:
        The figure.
    """
    ax = new_figure(5.0, 3.8).subplots() if ax is None else ax
    r = radii.detach().cpu().numpy()
    for k, (name, values) in enumerate(violations.items()):
        _check("violations", name, values, radii)
        style = {"color": COLOURS[k % len(COLOURS)]}
        ax.plot(r, values.detach().cpu().numpy(), DASHES[k % 4], label=name, **style)
        if sampled is not None and name in sampled:
            _check("sampled", name, sampled[name], radii)
            ax.plot(r, sampled[name].detach().cpu().numpy(), ".", markersize=5, **style)
    if sampled:
        ax.plot([], [], ".", color=GREY, label="worst of random data")
    ax.axhline(0.0, color="black", linewidth=0.8)
    low, high = ax.get_ylim()
    ax.axhspan(0.0, high, color=COLOURS[1], alpha=0.08, linewidth=0)
    ax.set(xlabel="radius of the attack", ylabel="largest violation", ylim=(low, high))
    ax.margins(x=0)
    ax.text(float(r.max()), 0.0, "broken ", ha="right", va="bottom", color=COLOURS[1])
    finish(ax)
    ax.legend(frameon=False, loc="upper left")
    return ax.get_figure()


def trade_off(
    radii: Tensor,
    nominal: Tensor,
    worst: Tensor,
    *,
    also: Mapping[str, Tensor] | None = None,
    label: str = "objective",
    axes: "Sequence[Axes] | None" = None,
) -> "Figure":
    """What protection costs: the nominal objective against the worst case, and both by radius.

    Args:
        radii: sizes of the sets that solutions are robust against.  # (R,)
        nominal: objective of these solutions for the data given.  # (R,)
        worst: the same for the worst data, at one common size or each at its own.  # (R,)
        also: other quantities by radius, in the same units, such as what was measured.  # (R,) each
        label: what the objective is, with its unit.
        axes: two; None makes them.

    Returns:
        The figure.
    """
    curves = {"nominal": nominal, "worst case": worst, **(also or {})}
    for name, values in curves.items():
        _check("curves", name, values, radii)
    left, right = panels(2) if axes is None else axes
    r, x, y = (t.detach().cpu().tolist() for t in (radii, worst, nominal))
    left.plot(x, y, "-o", color=COLOURS[0], markersize=4)
    for k in _spread(x, y):
        left.annotate(f"r = {r[k]:.3g}", (x[k], y[k]), xytext=(6, 4), textcoords="offset points",
                      fontsize=9)  # fmt: skip
    left.margins(0.16, 0.12)
    left.set(xlabel=f"worst case: {label}", ylabel=f"nominal: {label}")
    for k, (name, values) in enumerate(curves.items()):
        right.plot(r, values.detach().cpu().tolist(), DASHES[k % 4],
                   color=COLOURS[k % len(COLOURS)], label=name)  # fmt: skip
    right.set(xlabel="radius of the uncertainty", ylabel=label)
    right.legend(frameon=False)
    for ax in (left, right):
        finish(ax)
    return left.get_figure()


def _check(what: str, name: str, values: Tensor, radii: Tensor) -> None:
    if not isinstance(values, Tensor) or values.shape != radii.shape or radii.dim() != 1:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"{what}[{name!r}]: got {got}, expected a tensor {tuple(radii.shape)}, one number for "
            "each radius."
        )


def _excess(program: RobustLP, x: Tensor) -> Tensor:
    """The largest violation among all constraints, those without uncertainty included."""
    parts = [program.violation(x)]
    if program.low is not None:
        parts.append(program.low - x)
    if program.high is not None:
        parts.append(x - program.high)
    if program.certain is not None:
        F, g = program.certain
        parts.append(x @ F.mT - g)
    return torch.cat(parts, -1).amax(-1)


def _window(points: Mapping[str, Tensor]) -> tuple[float, float, float, float]:
    """With some room around the origin and the points."""
    shown = torch.stack([torch.zeros(2).double(), *points.values()])
    low, high = shown.amin(0), shown.amax(0)
    room = 0.4 * (high - low).clamp_min(1e-9 if points else 1.0)
    (left, bottom), (right, top) = (low - room).tolist(), (high + room).tolist()
    return left, right, bottom, top


def _arrow(ax: "Axes", c: Tensor, window: tuple[float, float, float, float]) -> None:
    """-c, from the middle of the lower left quarter."""
    left, right, bottom, top = window
    span = torch.tensor([right - left, top - bottom]).double()
    way = -c.detach().cpu().double()
    size = float(torch.linalg.vector_norm(way / span))
    if size == 0:
        return
    start = torch.tensor([left, bottom]).double() + 0.3 * span
    end = start + 0.15 * way / size
    ax.annotate("", tuple(end.tolist()), tuple(start.tolist()),
                arrowprops={"arrowstyle": "->", "color": _DARK, "linewidth": 1.5})  # fmt: skip
    ax.annotate("$-c$", tuple(start.tolist()), xytext=(-3, -3), textcoords="offset points",
                color=_DARK, ha="right", va="top")  # fmt: skip


def _spread(x: Sequence[float], y: Sequence[float]) -> list[int]:
    """Points of a curve, the first and last among them, that are apart enough to be named."""
    width = max(max(x) - min(x), 1e-300), max(max(y) - min(y), 1e-300)
    last, out = len(x) - 1, [0]
    for k in range(1, len(x)):
        far = [
            abs(a[k] - a[j]) / w
            for j in (out[-1], last)
            for a, w in zip((x, y), width, strict=True)
        ]
        if k == last or (max(far[:2]) > 1 / _NAMED and max(far[2:]) > 1 / _NAMED):
            out.append(k)
    return out
