"""Chapter 4: the digits classifier by back-propagation, by implicit differentiation, by lifting."""

import copy
import time
from collections.abc import Callable

import torch
from torch import nn

from .. import lifted, plot
from .._train import Recipe, accuracy, standardized, train
from .classifier import many, pair, threads
from .report import Context, Section, table

_RATE, _BATCH = 3e-3, 64
# Images that the full-batch descent of `lifted.blocks` is given at most.
_BLOCKS = 2_000


def chapter(context: Context) -> Section:
    """Train the same two classifiers with and without derivatives of their activation.

    Args:
        context: what the user asked for.

    Returns:
        The section.
    """
    data = standardized(context.data)
    large = many(data)
    epochs = context.epochs or ((1 if large else 8) if context.quick else (4 if large else 30))
    sweeps = max(10, epochs) if large else epochs  # few images: sweeps are cheap
    states = context.states or (100 if large else 64)
    torch.manual_seed(context.seed)
    implicit, explicit = pair(data, states)
    reports: dict[str, lifted.Report] = {}

    def gradient(model: nn.Module) -> None:
        recipe = Recipe(epochs=epochs, batch_size=_BATCH, learning_rate=_RATE, warp=None)
        with context.progress(epochs, "by derivatives") as bar:
            train(model, data, recipe, seed=context.seed, validate=False,
                  on_epoch=lambda history: bar.update())  # fmt: skip

    def local(model: nn.Module) -> None:
        with context.progress(epochs, "lifted, local") as bar:
            lifted.local(
                model, data.train_images, data.train_labels, epochs=epochs, batch_size=_BATCH,
                schedule="cosine", optimizer=torch.optim.AdamW(model.parameters(), lr=_RATE),
                seed=context.seed, on_epoch=lambda report: bool(bar.update()),
            )  # fmt: skip

    def blocks(model: nn.Module) -> None:
        images, labels = data.train_images[:_BLOCKS], data.train_labels[:_BLOCKS]
        with context.progress(sweeps, "lifted, blocks") as bar:
            reports["blocks"] = lifted.blocks(
                model, images, labels, sweeps=sweeps, on_epoch=lambda report: bool(bar.update())
            )

    ways: list[tuple[str, str, nn.Module, Callable[[nn.Module], None]]] = [
        ("explicit", "back-propagation", explicit, gradient),
        ("explicit", "lifted, local gradients", explicit, local),
        ("explicit", "lifted, convex blocks", explicit, blocks),
        ("implicit", "implicit differentiation", implicit, gradient),
        ("implicit", "lifted, clamped equilibrium", implicit, local),
    ]
    rows = [("", "test accuracy", "time")]
    with threads(None if large else 1):
        for kind, name, start, fit in ways:
            model = copy.deepcopy(start)
            began = time.perf_counter()
            fit(model)
            seconds = time.perf_counter() - began
            share = accuracy(model, data.test_images, data.test_labels)
            rows.append((f"{kind} by {name}", f"{100 * share:.2f} %", f"{seconds:.1f} s"))

    section = Section(title="The classifier, trained with and without derivatives")
    section.add(
        "training",
        f"{epochs} epoch{'s' * (epochs > 1)} from the same start, no deformed images; AdamW where "
        "there are gradients",
        "lifted: x = relu(z) becomes a penalty that is zero where it holds; relu has no derivative "
        "taken",
        f"convex blocks: {sweeps} sweep{'s' * (sweeps > 1)} over {min(_BLOCKS, len(data.train_images)):,} of the "
        "images at once",
    )
    section.add("by method", *table(rows))
    report = reports["blocks"]
    section.add(
        "objective of blocks",
        f"from {report.objective[0]:.3g} to {report.objective[-1]:.3g}, "
        f"{_rises(report)} of {report.epochs - 1} sweeps raised it",
    )
    section.pictures.append(plot.save(plot.penalties(report), context.out / "penalties.png"))
    return section


def _rises(report: lifted.Report) -> int:
    """Sweeps after which the objective was above that before by more than rounding."""
    pairs = zip(report.objective, report.objective[1:], strict=False)
    return sum(b > a + 1e-5 * (1 + abs(a)) for a, b in pairs)
