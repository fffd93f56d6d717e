"""Chapter 1: an implicit classifier beside an explicit one, its certificate, its solver."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from .. import plot
from .._data import Dataset
from .._train import (
    Recipe,
    Warp,
    accuracy,
    matched_mlp,
    parameter_count,
    standardized,
    train,
)
from ..layers import ImplicitLayer
from ..maps import AffineMap
from ..solution import Solution
from ..solvers import Picard
from ..wellposed import Certificate, InfNormBall
from .report import Context, Section, table

# ||A||_inf <= kappa < 1 makes every step of x -> f(x) shrink distances by kappa.
_KAPPA = 0.95
# Test images whose way to the equilibrium is drawn.
_DRAWN = 500


def chapter(context: Context) -> Section:
    """Train both models, then say what is known of the implicit one.

    Args:
        context: what the user asked for.

    Returns:
        The section.
    """
    data = standardized(context.data)
    recipe, states = plan(context)
    torch.manual_seed(context.seed)
    implicit, explicit = pair(data, states)
    models: dict[str, nn.Module] = {"implicit": implicit, "explicit": explicit}
    with threads(None if many(data) else 1):
        history = {
            name: _train(context, name, model, data, recipe) for name, model in models.items()
        }

    section = Section(
        title="Handwritten digits, read from the equilibrium  x = relu(A x + B u + b)",
        models=models,
    )
    section.add("data", _describe(data))
    epochs = f"{recipe.epochs} epoch" + "s" * (recipe.epochs > 1)
    section.add("training", f"{epochs}, the same recipe for both models")
    widths = [m.out_features for m in explicit if isinstance(m, nn.Linear)]
    shapes = {
        "implicit": f"{states} states",
        "explicit": "-".join(map(str, [data.features, *widths])),
    }
    section.add(
        "test accuracy",
        *table(
            [
                (
                    f"{name}, {shapes[name]}",
                    f"{100 * accuracy(model, data.test_images, data.test_labels):.2f} %",
                    f"{parameter_count(model):,} parameters",
                    f"{history[name]['seconds'][-1]:.1f} s",
                )
                for name, model in models.items()
            ]
        ),
    )
    certificate = implicit.certificate()
    section.add("certificate of A", *_certificate_lines(certificate))
    with torch.no_grad():
        solution = implicit.solve(data.test_images)
        section.add("test states", *_solver_lines(implicit, data, solution, certificate))
        _draw(context, section, implicit, data, certificate, history)
    return section


def plan(context: Context) -> tuple[Recipe, int]:
    """The recipe and the number of states: the user's, or what suits the data.

    Args:
        context: what the user asked for.
    """
    if many(context.data):
        states, recipe = 100, Recipe(epochs=1 if context.quick else 8)
    else:
        states = 64
        recipe = Recipe(
            epochs=10 if context.quick else 80,
            batch_size=64,
            learning_rate=5e-3,
            warp=Warp(rotation=12.0, stretch=0.15, shear=0.15, shift=0.06, elastic=0.03, knots=3),
        )
    return replace(recipe, epochs=context.epochs or recipe.epochs), context.states or states


def many(data: Dataset) -> bool:
    """Whether the data set is of MNIST's size rather than that of the bundled digits."""
    return len(data.train_images) > 10_000


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Compute with that many threads; None changes nothing.

    Where every product takes microseconds, a second thread brings nothing on an idle machine, and
    on a busy one each product waits for the scheduler: a hundred times slower was seen.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train(
    context: Context, name: str, model: nn.Module, data: Dataset, recipe: Recipe
) -> dict[str, list[float]]:
    with context.progress(recipe.epochs, name) as bar:

        def show(history: Mapping[str, list[float]]) -> None:
            share = history["validation accuracy"][-1]
            bar.set_postfix_str(
                f"loss {history['loss'][-1]:.3f}, validation {100 * share:.1f} %", refresh=False
            )
            bar.update()

        return train(model, data, recipe, seed=context.seed, on_epoch=show)


def _describe(data: Dataset) -> str:
    height, width = data.image_shape
    return (
        f"{data.name}: {len(data.train_images):,} images to train on, "
        f"{len(data.validation_images):,} to validate, {len(data.test_images):,} to test, "
        f"{height} x {width} pixels"
    )


def _certificate_lines(certificate: Certificate) -> list[str]:
    """Which condition, which margin, which contraction factor."""
    if not certificate.well_posed:
        return str(certificate).splitlines()
    lines = [
        f"well-posed: one equilibrium for every input, by the condition {certificate.condition}",
        f"margin {certificate.margin:.4g}",
    ]
    if certificate.contraction is not None:
        lines[-1] += f", contraction factor {certificate.contraction:.4g} in the {certificate.norm}"
    return lines


def _solver_lines(
    layer: ImplicitLayer, data: Dataset, solution: Solution, certificate: Certificate
) -> list[str]:
    """Steps, residual and error bound, the last two measured here and in float64."""
    x = solution.value.double()
    residual = _map(layer, data.test_images)(x) - x
    scale = float(x.abs().max())
    steps = solution.steps.double()
    solver = solution.stats.get("solver", "solver")
    lines = [
        f"{int(solution.converged.sum()):,} of {len(x):,} solved by {solver} in "
        + f"{steps.median():.0f} steps (median), {steps.max():.0f} at most",
        f"residual |f(x) - x| at most {residual.abs().max():.1e}, states up to {scale:.1f}",
    ]
    if certificate.constant is not None:
        bound = certificate.error_bound(residual)
        lines.append(f"error bound |x - x*| at most {bound.max():.1e}, certified")
    return lines


def _map(layer: ImplicitLayer, u: Tensor) -> AffineMap:
    """f(x) = phi(A x + B u + b) in float64, so that rounding is not taken for a residual."""
    model = layer.model()
    return AffineMap(
        model.A.double(), u.double() @ model.B.double().mT + model.b.double(), model.phi
    )


def _draw(
    context: Context,
    section: Section,
    layer: ImplicitLayer,
    data: Dataset,
    certificate: Certificate,
    history: Mapping[str, Mapping[str, list[float]]],
) -> None:
    """Pictures of the training, of the way to the equilibria, and of |A|."""
    f = _map(layer, data.test_images[:_DRAWN])
    # Plain Picard, whose steps are the residuals that the certificate speaks of.
    solution = Picard(rtol=1e-9).solve(f, torch.zeros_like(f.v), record=True)
    figures = {
        "training.png": plot.training(history),
        "convergence.png": plot.convergence(
            solution, certificate.contraction, weights=certificate.weights
        ),
        "matrix.png": plot.matrix(f.A, bound=_KAPPA),
    }
    for name, figure in figures.items():
        section.pictures.append(plot.save(figure, context.out / name))


def pair(data: Dataset, states: int) -> tuple[ImplicitLayer, nn.Sequential]:
    """An implicit classifier, and a network with one hidden layer and about as many parameters."""
    implicit = ImplicitLayer(
        data.features, data.classes, states, activation="relu", well_posed=InfNormBall(kappa=_KAPPA)
    )
    return implicit, matched_mlp(data.features, data.classes, parameter_count(implicit))
