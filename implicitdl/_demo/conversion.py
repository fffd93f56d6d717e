"""Chapter 2: the explicit classifier of chapter 1 is an implicit model, too."""

import copy

import torch
from torch import Tensor, nn

from .. import plot
from .._train import standardized
from ..convert import to_implicit
from ..model import ImplicitModel
from .report import Context, Section, table


def chapter(context: Context) -> Section:
    """Convert the network that chapter 1 has trained, and compare the two.

    Args:
        context: what the user asked for; its `models` hold the network as "explicit".

    Returns:
        The section.

    Raises:
        ValueError: the chapter that trains the network did not come before.
    """
    if "explicit" not in context.models:
        raise ValueError(
            f"context.models: got {sorted(context.models)}, expected 'explicit'; the classifier's "
            "chapter comes first."
        )
    network = context.models["explicit"]
    u = standardized(context.data).test_images
    model = to_implicit(network, u[:1])
    certificate = model.certificate()
    blocks = len(model.structure.blocks)

    section = Section(title="The explicit network, written as  x = relu(A x + B u + b)")
    section.add(
        "states",
        f"{model.states}, its hidden neurons, in {blocks} block" + "s" * (blocks != 1),
    )
    section.add(
        "certificate of A", f"{certificate.status}, by the condition {certificate.condition}"
    )
    section.add("test outputs", *_comparison(network, model, u))
    figure = plot.blocks(model)
    section.pictures.append(plot.save(figure, context.out / "blocks.png"))
    return section


def _comparison(network: nn.Module, model: ImplicitModel, u: Tensor) -> list[str]:
    """How far the outputs of the two are apart, as they are and as copies in float64."""
    double = copy.deepcopy(network).double()
    pairs = [(network, model, u), (double, to_implicit(double, u[:1].double()), u.double())]
    rows = []
    with torch.no_grad():
        for explicit, implicit, inputs in pairs:
            y = explicit(inputs)
            gap = (implicit(inputs) - y).abs().max()
            kind = str(y.dtype).removeprefix("torch.")
            size = f"of outputs up to {y.abs().max():.1f}"
            rows.append((kind, f"largest difference {gap:.2g}", size))
    return table(rows)
