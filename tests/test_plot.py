"""Pictures: what is drawn is what was measured, and nothing is left behind."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from implicitdl import plot
from implicitdl.activations import Identity, get_activation
from implicitdl.maps import AffineMap
from implicitdl.solution import Solution, Status
from implicitdl.solvers import Anderson, NewtonPicard, Picard
from implicitdl.wellposed import certificate


@pytest.fixture
def solution() -> Solution:
    """A Picard solve on a contraction with factor 0.5 in the infinity norm."""
    A = torch.randn(6, 6)
    A = 0.5 * A / A.abs().sum(1, keepdim=True)
    f = AffineMap(A, torch.randn(30, 6), get_activation("relu"))
    return Picard(rtol=1e-8).solve(f, torch.zeros(30, 6), record=True)


def lines(ax) -> dict[str, np.ndarray]:
    """Labelled lines of an Axes."""
    return {
        line.get_label(): np.asarray(line.get_ydata(), dtype=float)
        for line in ax.get_lines()
        if not line.get_label().startswith("_")
    }


def test_training_draws_one_panel_a_quantity_and_one_line_a_model() -> None:
    history = {
        "implicit": {"loss": [1.0, 0.1], "validation accuracy": [0.5, 0.9], "seconds": [1, 2]},
        "explicit": {"loss": [2.0, 0.2], "validation accuracy": [0.4, 0.8], "seconds": [1, 2]},
    }
    loss, accuracy = plot.training(history).axes
    assert lines(loss)["implicit"].tolist() == [1.0, 0.1]
    assert lines(accuracy)["explicit"].tolist() == [40.0, 80.0]
    assert loss.get_yscale() == "log"
    assert "%" in accuracy.get_ylabel()


def test_training_of_one_model_needs_no_name() -> None:
    (ax,) = plot.training({"loss": [3.0, 2.0, 1.0]}).axes
    assert list(ax.get_lines()[0].get_ydata()) == [3.0, 2.0, 1.0]
    assert ax.get_legend() is None


@pytest.mark.parametrize("values", [[0.7], [float("nan")] * 3, [0.0, 0.0], [1.0, 1.0, 1.0]])
def test_training_survives_degenerate_histories(values: list[float], tmp_path) -> None:
    figure = plot.training({"loss": values, "validation accuracy": values})
    plot.save(figure, tmp_path / "a.png")


def test_training_refuses_what_it_cannot_draw() -> None:
    with pytest.raises(ValueError, match="nothing but seconds"):
        plot.training({"seconds": [1.0]})
    with pytest.raises(ValueError, match="got 1, expected 2"):
        axes = plot.training({"loss": [1.0]}).axes
        plot.training({"loss": [1.0], "accuracy": [1.0]}, axes=axes)


def test_convergence_draws_residuals_under_the_certified_line(solution: Solution) -> None:
    (ax,) = plot.convergence(solution, 0.5).axes
    drawn = lines(ax)
    certified = next(v for k, v in drawn.items() if k.startswith("certified"))
    iterates = solution.stats["trajectory"]
    residual = (iterates[1:] - iterates[:-1]).abs().amax(-1)
    assert drawn["median"][0] == pytest.approx(float(residual[0].median()))
    assert certified[:3] == pytest.approx(float(residual[0].max()) * 0.5 ** np.arange(3))
    curves = [np.asarray(line.get_ydata(), dtype=float) for line in ax.get_lines()]
    assert all(np.nanmax(c - certified[: len(c)]) < 1e-12 for c in curves if len(c))


def test_convergence_thins_large_batches_and_weighs_states(solution: Solution) -> None:
    (ax,) = plot.convergence(solution, samples=10).axes
    assert any("10 of 30 samples" in label for label in lines(ax))
    (ax,) = plot.convergence(solution, weights=torch.full((6,), 2.0)).axes
    (plain,) = plot.convergence(solution).axes
    assert lines(ax)["median"] * 2 == pytest.approx(lines(plain)["median"], nan_ok=True)


def test_convergence_needs_a_trajectory(solution: Solution) -> None:
    without = Solution(solution.value, solution.codes, solution.residual, solution.steps)
    with pytest.raises(ValueError, match="record=True"):
        plot.convergence(without)
    one = {"trajectory": solution.stats["trajectory"][:1]}
    with pytest.raises(ValueError, match="at least two"):
        plot.convergence(
            Solution(solution.value, solution.codes, solution.residual, solution.steps, stats=one)
        )


def test_matrix_draws_sizes_and_row_sums() -> None:
    A = torch.tensor([[0.5, -0.25], [0.0, -1.0]])
    image_ax, sum_ax, _ = plot.matrix(A, bound=1.0).axes
    assert np.asarray(image_ax.get_images()[0].get_array()).tolist() == A.abs().tolist()
    assert [bar.get_width() for bar in sum_ax.patches] == [0.75, 1.0]
    assert list(sum_ax.get_lines()[0].get_xdata()) == [1.0, 1.0]


@pytest.mark.parametrize("A", [torch.zeros(3, 3), torch.ones(1, 1), torch.eye(3).float()])
def test_matrix_survives_flat_matrices(A: torch.Tensor, tmp_path) -> None:
    plot.save(plot.matrix(A.requires_grad_()), tmp_path / "a.png")


def test_matrix_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"got shape \(3,\)"):
        plot.matrix(torch.zeros(3))


def test_axes_of_the_caller_are_drawn_on(solution: Solution) -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert plot.training({"loss": [1.0, 0.5]}, axes=[left]) is figure
    assert plot.convergence(solution, ax=right) is figure
    assert plot.matrix(torch.eye(2), axes=Figure().subplots(1, 2)) is not figure


def test_save_writes_a_picture_and_returns_its_path(solution: Solution, tmp_path) -> None:
    path = plot.save(plot.convergence(solution), tmp_path / "a.png")
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_no_window_system_is_touched(solution: Solution) -> None:
    before = sys.modules.get("matplotlib.pyplot")
    plot.convergence(solution)
    plot.matrix(torch.eye(3))
    assert sys.modules.get("matplotlib.pyplot") is before
    if before is not None:
        assert before.get_fignums() == []


def test_no_certified_line_where_the_steps_are_not_residuals() -> None:
    """An Anderson step may be longer than the contraction allows a residual to be."""
    f = AffineMap(0.5 * torch.eye(3), torch.ones(2, 3), Identity(), contraction=0.5)
    for solver, drawn in ((Picard(), True), (Anderson(), False), (NewtonPicard(), False)):
        solution = solver.solve(f, torch.zeros(2, 3), record=True)
        (ax,) = plot.convergence(solution, 0.5).axes
        labels = [line.get_label() for line in ax.get_lines()]
        assert any("certified" in str(label) for label in labels) == drawn, solver
        assert ("residual" in ax.get_ylabel()) == drawn
        assert solver.name in ax.get_title(loc="left") and "float" in ax.get_title(loc="left")
    with pytest.raises(TypeError, match="A: got list"):
        plot.matrix([[1.0]])


def test_no_certified_line_where_the_curves_would_cross_it() -> None:
    """Damped steps, and steps in another norm than that of the factor, fall more slowly."""
    f = AffineMap(0.5 * torch.eye(3), torch.ones(2, 3), Identity(), contraction=0.5)
    damped = Picard(damping=0.5).solve(f, torch.zeros(2, 3), record=True)
    A, v = torch.tensor([[0.2, 5.0], [0.05, 0.2]]), torch.tensor([[1.0, 1.0]])
    proof = certificate(A, "relu")
    other = Picard().solve(AffineMap(A, v, get_activation("relu")), torch.zeros(1, 2), record=True)
    for solution, factor, weights, drawn in (
        (damped, 0.5, None, False),
        (other, proof.contraction, None, False),
        (other, proof.contraction, proof.weights, True),
    ):
        (ax,) = plot.convergence(solution, factor, weights=weights).axes
        labels = " ".join(lines(ax))
        assert ("certified" in labels) == drawn
        assert ("slower than" in labels) == (solution is other and not drawn)
        assert ("residual" in ax.get_ylabel()) == drawn
    (ax,) = plot.convergence(replace(damped, stats={**damped.stats, "damping": 0.5}), 0.9).axes
    assert "certified" not in " ".join(lines(ax)) and "residual" not in ax.get_ylabel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(10))
def test_rounding_takes_no_certified_line_away(seed: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    A = torch.randn(40, 40)
    A = (0.9 * A / A.abs().sum(1, keepdim=True)).to(dtype)
    f = AffineMap(A, 10 * torch.randn(30, 40).to(dtype), get_activation("relu"))
    solution = Picard().solve(f, torch.zeros(30, 40, dtype=dtype), record=True)
    (ax,) = plot.convergence(solution, 0.9).axes
    assert any(label.startswith("certified") for label in lines(ax))


def test_convergence_refuses_what_does_not_fit(solution: Solution) -> None:
    with pytest.raises(ValueError, match=r"contraction: got 1\.5, expected a factor"):
        plot.convergence(solution, 1.5)
    for weights in (torch.ones(5), torch.zeros(6), [1.0] * 6):
        with pytest.raises(ValueError, match="weights: got .*expected 6 positive numbers"):
            plot.convergence(solution, weights=weights)


def test_the_best_iterate_of_a_failed_sample_is_no_step() -> None:
    codes = torch.tensor([Status.CONVERGED.code, Status.MAX_STEPS.code])
    frames = torch.tensor([[[4.0], [4.0]], [[2.0], [1.0]], [[1.0], [2.5]], [[0.5], [1.0]]])
    solution = Solution(
        frames[-1], codes, torch.ones(2), torch.ones(2), stats={"trajectory": frames}
    )
    (ax,) = plot.convergence(solution).axes
    curves = [line.get_ydata() for line in ax.get_lines()][:2]
    assert np.asarray(curves[0]).tolist() == [2.0, 1.0, 0.5]
    assert np.asarray(curves[1])[:2].tolist() == [3.0, 1.5] and np.isnan(curves[1][2])
