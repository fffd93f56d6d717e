"""What is proved of a classifier near its inputs, and what attacks find there."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ._figures import COLOURS, DASHES, GREY, finish, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..certify import Bounds, Report

_COLUMNS = 5  # pictures beside each other
_SHADE = 0.12


def certified(
    reports: "Iterable[Report]", *, scale: float = 1.0, unit: str = "", ax: "Axes | None" = None
) -> "Figure":
    """Clean, attacked and certified accuracy against the radius; the truth lies in the grey part.

    Args:
        reports: of `certify.certify_accuracy` for one model, data and norm: any radii and methods.
            Where several have a radius, the strongest attack counts.
        scale: factor of the radii on the axis, as the deviation by which inputs were divided.
        unit: of the scaled radii, as it is to be written.
        ax: where to draw; None makes one.

    Returns:
        The figure.

    Raises:
        ValueError: there is no report, or their norms or numbers of samples differ.
    """
    reports = sorted(reports, key=lambda report: report.radius)
    kinds = {(report.norm, len(report.correct)) for report in reports}
    if len(kinds) != 1:
        raise ValueError(
            f"reports: got {len(reports)} of {len(kinds)} norms and numbers of samples, expected "
            "some of a single one."
        )
    radii = sorted({report.radius for report in reports})
    attacked = [min(r.attacked_accuracy for r in reports if r.radius == radius) for radius in radii]
    best = [max(r.certified_accuracy for r in reports if r.radius == radius) for radius in radii]
    ax = new_figure(7.0, 3.9).subplots() if ax is None else ax
    x = [scale * radius for radius in radii]
    ax.fill_between(x, [100 * v for v in best], [100 * v for v in attacked], color=GREY,
                    alpha=_SHADE, linewidth=0)  # fmt: skip
    ax.axhline(100 * reports[0].clean_accuracy, color="black", linewidth=0.8, label="clean")
    ax.plot(x, [100 * v for v in attacked], "-", color=COLOURS[1], marker="v", label="attacked")
    methods = dict.fromkeys(report.method for report in reports)
    for k, method in enumerate(methods):
        own = [report for report in reports if report.method == method]
        ax.plot(
            [scale * report.radius for report in own],
            [100 * report.certified_accuracy for report in own],
            DASHES[(k + 1) % 4], marker="o", markersize=4, label="proved by " + ", ".join(method),
            color=[c for c in COLOURS if c != COLOURS[1]][k % (len(COLOURS) - 1)],
        )  # fmt: skip
    kind = reports[0].norm
    ax.set(xlabel=f"radius in the {'infinity' if kind == 'inf' else kind}-norm{_of(unit)}",
           ylabel="accuracy (%)", ylim=(-2, 102))  # fmt: skip
    finish(ax)
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return ax.get_figure()


def bounds(
    radii: Tensor,
    found: "Mapping[str, Sequence[Bounds]]",
    *,
    sample: int = 0,
    output: int = 0,
    attacked: "tuple[Tensor, Tensor] | None" = None,
    scale: float = 1.0,
    unit: str = "",
    ax: "Axes | None" = None,
) -> "Figure":
    """Lower and upper bounds of one output against the radius of the region.

    Args:
        radii: of the regions.  # (R,)
        found: method -> what `certify.bounds` gave at each radius.
        sample, output: which entry of `lower` and `upper` is drawn.
        attacked: smallest and largest output that was reached: dots, between the lines.  # (R,) each
        scale, unit: as in `certified`.
        ax: where to draw; None makes one.

    Returns:
        The figure.

    Raises:
        ValueError: as many bounds or attacks as radii were not given.
    """
    ax = new_figure(5.4, 3.9).subplots() if ax is None else ax
    if radii.dim() != 1:
        raise ValueError(f"radii: got shape {tuple(radii.shape)}, expected (R,).")
    x = (scale * radii.detach().double().cpu()).tolist()
    for k, (method, several) in enumerate(found.items()):
        _count(f"found[{method!r}]", several, len(x))
        low = [float(b.lower[sample, output]) for b in several]
        high = [float(b.upper[sample, output]) for b in several]
        style = {"color": COLOURS[k % len(COLOURS)], "linestyle": DASHES[k % 4]}
        ax.plot(x, low, label=method, **style)
        ax.plot(x, high, **style)
        ax.fill_between(x, low, high, color=COLOURS[k % len(COLOURS)], alpha=0.06, linewidth=0)
    for k, values in enumerate(attacked or ()):
        _count("attacked", values, len(x))
        ax.plot(x, values.detach().double().cpu().tolist(), ".", color="black", markersize=5,
                label="reached by attack" if k == 0 else None)  # fmt: skip
    ax.margins(x=0.02)
    ax.set(xlabel=f"radius{_of(unit)}", ylabel=f"output {output}")
    finish(ax)
    ax.legend(frameon=False, loc="upper left")
    return ax.get_figure()


def margins(
    proved: Mapping[str, Tensor], *, attacked: Tensor | None = None, ax: "Axes | None" = None
) -> "Figure":
    """Each sample's smallest margin y_label - y_j, from small to large; above zero it is certified.

    Args:
        proved: method -> what `certify.margins` gave; of several, columns may be infinite or NaN,
            and a sample without a number is left out.  # (N, q)
        attacked: the smallest margin that an attack reached, an upper bound.  # (N,)
        ax: where to draw; None makes one.

    Returns:
        The figure.

    Raises:
        ValueError: margins that are no matrix, or an attack of other samples.
    """
    ax = new_figure(5.4, 3.9).subplots() if ax is None else ax
    curves = {}
    for method, values in proved.items():
        if values.dim() != 2:
            raise ValueError(
                f"proved[{method!r}]: got shape {tuple(values.shape)}, expected (N, q)."
            )
        curves[f"proved by {method}"] = values.detach().amin(1)
    if attacked is not None:
        if any(len(v) != len(attacked) for v in curves.values()) or attacked.dim() != 1:
            raise ValueError(
                f"attacked: got shape {tuple(attacked.shape)}, expected one number for each sample."
            )
        curves["reached by attack"] = attacked.detach()
    for k, (name, values) in enumerate(curves.items()):
        values = values.double().cpu()
        y = values[values.isfinite()].sort().values.tolist()
        colour = "black" if name == "reached by attack" else COLOURS[k % len(COLOURS)]
        ax.plot([100 * (i + 1) / len(y) for i in range(len(y))], y, DASHES[k % 4],
                color=colour, label=name)  # fmt: skip
    ax.axhline(0.0, color="black", linewidth=0.8)
    ax.set(xlabel="share of the samples (%)", ylabel="smallest margin", xlim=(0, 100))
    finish(ax)
    ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=9)
    return ax.get_figure()


def sensitivity(
    S: Tensor, shape: tuple[int, int], *, labels: Sequence[str] | None = None
) -> "Figure":
    """How far each pixel can move each output, one map an output, all on one scale.

    Args:
        S: of `certify.sensitivity`.  # (q, p)
        shape: of the image, (height, width), height x width = p.
        labels: names of the outputs; None numbers them.

    Returns:
        The figure.

    Raises:
        ValueError: S is no matrix of such images, or the names are not as many as its rows.
    """
    if S.dim() != 2 or not len(S) or S.shape[1] != shape[0] * shape[1]:
        raise ValueError(
            f"S: got shape {tuple(S.shape)}, expected (q, {shape[0] * shape[1]}), one column for "
            f"each of {shape[0]} x {shape[1]} pixels."
        )
    names = [f"output {i}" for i in range(len(S))] if labels is None else list(labels)
    _count("labels", names, len(S))
    maps = S.detach().double().cpu().reshape(len(S), *shape).numpy()
    top = float(maps.max()) or 1.0
    axes, figure = _grid(len(S), _COLUMNS, 1.5)
    for ax, image, name in zip(axes, maps, names, strict=True):
        shown = ax.imshow(image, cmap="viridis", vmin=0.0, vmax=top, interpolation="nearest")
        ax.set_title(name, fontsize=9)
    bar = figure.colorbar(shown, ax=axes, fraction=0.05, pad=0.03)
    bar.set_label("most that the output moves for a pixel's unit")
    bar.outline.set_visible(False)
    return figure


def attacked(
    images: Tensor,
    attacks: Mapping[str, Tensor],
    shape: tuple[int, int],
    *,
    answers: Mapping[str, Sequence[object]] | None = None,
) -> "Figure":
    """Images and what attacks made of them, side by side: a column each, a row for each attack.

    Args:
        images: as they were.  # (m, p)
        attacks: name -> the inputs it found.  # (m, p)
        shape: (height, width).
        answers: name of an attack, or "image", -> what the model says, written above.  # m each

    Returns:
        The figure.

    Raises:
        ValueError: shapes that do not fit.
    """
    rows = {"image": images, **attacks}
    for name, values in rows.items():
        if values.shape != images.shape or images.dim() != 2 or not len(images):
            raise ValueError(
                f"{name}: got shape {tuple(values.shape)}, expected (m, p), as images."
            )
    if images.shape[1] != shape[0] * shape[1]:
        raise ValueError(
            f"shape: got {shape}, expected height x width = {images.shape[1]}, the pixels."
        )
    low = min(float(v.min()) for v in rows.values())
    high = max(float(v.max()) for v in rows.values())
    axes, figure = _grid(len(rows) * len(images), len(images), 1.3)
    for i, (name, values) in enumerate(rows.items()):
        said = None if answers is None else answers.get(name)
        if said is not None:
            _count(f"answers[{name!r}]", said, len(images))
        for j, image in enumerate(values.detach().double().cpu().reshape(-1, *shape).numpy()):
            ax = axes[i * len(images) + j]
            ax.imshow(image, cmap="gray", vmin=low, vmax=high, interpolation="nearest")
            if said is not None:
                ax.set_title(f"answer {said[j]}", fontsize=9)
            if j == 0:
                ax.set_ylabel(name)
    return figure


def _grid(count: int, columns: int, size: float) -> "tuple[list[Axes], Figure]":
    """Axes for pictures, without ticks; those that are not needed are taken away."""
    rows, columns = math.ceil(count / columns), min(columns, count)
    figure = new_figure(size * columns + 1.2, (size + 0.3) * rows)
    every = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in every:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    for ax in every[count:]:
        ax.remove()
    return every[:count], figure


def _of(unit: str) -> str:
    return f" ({unit})" if unit else ""


def _count(name: str, values: "Sequence[object] | Tensor", expected: int) -> None:
    if len(values) != expected:
        raise ValueError(f"{name}: got {len(values)}, expected {expected}.")
