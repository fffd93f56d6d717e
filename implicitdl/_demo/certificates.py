"""Chapter 5: what the trained classifiers answer when pixels move, proved and attacked."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import certify, plot
from .._train import standardized
from ..convert import to_implicit
from .classifier import many, threads
from .report import Context, Section, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Radii in the infinity norm, in shares of the range from black to white.
_RADII = (0.01, 0.03, 0.05, 0.1)
_METHODS = ("sensitivity", "lipschitz", "interval", "crown")
_DRAWN, _DRAWN_AT = 6, 0.1  # attacked images, and their radius


def chapter(context: Context) -> Section:
    """Bound and attack both classifiers of chapter 1 on some test images.

    Args:
        context: what the user asked for; its `models` hold "implicit" and "explicit".

    Returns:
        The section.

    Raises:
        ValueError: the chapter that trains the models did not come before.
    """
    if not {"implicit", "explicit"} <= set(context.models):
        raise ValueError(
            f"context.models: got {sorted(context.models)}, expected 'implicit' and 'explicit'; the "
            "classifier's chapter comes first."
        )
    data = standardized(context.data)
    count = 50 if context.quick else 200
    u, labels = data.test_images[:count], data.test_labels[:count]
    raw = context.data.train_images
    deviation = float(raw.std(correction=0)) or 1.0
    clip = (float(-raw.mean() / deviation), float((1 - raw.mean()) / deviation))

    section = Section(title="What the classifiers answer when every pixel may move")
    section.add(
        "question",
        "do all images within the radius (infinity norm, range from black to white = 1) get the "
        "right answer?",
        f"{len(u)} test images; attacked bounds the share from above, each method from below",
    )
    with threads(None if many(data) else 1):
        for name in ("implicit", "explicit"):
            model: Any = context.models[name]
            if name == "explicit":
                model = to_implicit(model, u[:1])
            found = [
                _reports(model, u, labels, radius / deviation, clip, context.seed)
                for radius in _RADII
            ]
            section.add(f"{name}, certified by", *_lines(found))
            if name == "implicit":
                figure = plot.certified(
                    [r for row in found for r in row], scale=deviation, unit="of the pixels' range"
                )
                section.pictures.append(plot.save(figure, context.out / "certified.png"))
                shape = data.image_shape
                figure = plot.sensitivity(certify.sensitivity(model), shape)
                section.pictures.append(plot.save(figure, context.out / "sensitivity.png"))
                figure = _images(model, u, labels, _DRAWN_AT / deviation, clip, shape, context.seed)
                section.pictures.append(plot.save(figure, context.out / "attacked.png"))
    return section


def _reports(
    model: Any, u: Tensor, labels: Tensor, radius: float, clip: tuple[float, float], seed: int
) -> list[certify.Report]:
    """One a method that applies to the model, the first of them with an attack."""
    reports: list[certify.Report] = []
    for method in _METHODS:
        try:
            report = certify.certify_accuracy(
                model, (u, labels), radius, method=method, clip=clip, seed=seed,
                attacks=() if reports else ("pgd",),
            )  # fmt: skip
        except ValueError as error:
            if "none applies" not in str(error):
                raise
            continue
        reports.append(report)
    return reports


def _lines(found: Sequence[Sequence[certify.Report]]) -> list[str]:
    """A row a radius, a column a method, the time at the end."""
    used = [m for m in _METHODS if any(r.method == (m,) for reports in found for r in reports)]
    rows = [("radius", "clean", "attacked", *used, "time")]
    for radius, reports in zip(_RADII, found, strict=True):
        shares = {r.method[0]: r.certified_accuracy for r in reports}
        cells = [reports[0].clean_accuracy, reports[0].attacked_accuracy]
        cells += [shares.get(method, math.nan) for method in used]
        seconds = sum(float(r.seconds.sum()) for r in reports)
        rows.append(
            (
                f"{radius:g}",
                *("-" if math.isnan(c) else f"{100 * c:.1f} %" for c in cells),
                f"{seconds:.1f} s",
            )
        )
    return table(rows)


def _images(
    model: Any, u: Tensor, labels: Tensor, radius: float, clip: tuple[float, float],
    shape: tuple[int, int], seed: int,
) -> "Figure":  # fmt: skip
    """Some images before and after two attacks, with the answers."""
    few, own = u[:_DRAWN], labels[:_DRAWN]
    generator = torch.Generator().manual_seed(seed)
    attacks = {
        "one step": certify.fgsm(model, few, own, radius, clip=clip).inputs,
        "many steps": certify.pgd(model, few, own, radius, clip=clip, generator=generator).inputs,
    }
    with torch.no_grad():
        answers = {
            name: model(x).argmax(1).tolist() for name, x in {"image": few, **attacks}.items()
        }
    return plot.attacked(few, attacks, shape, answers=answers)
