"""Pictures: what is drawn is what was measured, and nothing is left behind."""

import itertools
import sys
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from implicitdl import ImplicitLayer, ImplicitModel, operators, plot, stack, to_implicit
from implicitdl.activations import Identity, get_activation
from implicitdl.maps import AffineMap
from implicitdl.model import Structure
from implicitdl.model.structure import INPUT, Block, Row
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


# ---- blocks --------------------------------------------------------------------------------------


def chain(*widths: int) -> ImplicitModel:
    """A ReLU network with these widths, as blocks."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return to_implicit(nn.Sequential(*layers[:-1]), torch.randn(2, widths[0]))


class Residual(nn.Module):
    """What a residual network has, once."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.first, self.second = (nn.Conv2d(4, 4, k, padding=k // 2) for k in (1, 3))
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(self.stem(u).relu(), 2)
        x = (x + self.norm(self.second(self.first(x).relu()))).relu()
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


def residual() -> ImplicitModel:
    """Its model."""
    return to_implicit(Residual().eval(), torch.randn(2, 2, 8, 8))


def drawn(ax) -> dict[tuple[int, int], str]:
    """(row, column) -> kind, by the legend, of every cell."""
    legend = ax.get_legend()
    kinds = {
        handle.get_facecolor(): text.get_text().split("  ")[-1]
        for handle, text in zip(legend.get_patches(), legend.get_texts(), strict=True)
    }
    assert len(kinds) == len(legend.get_texts()), "two kinds of one colour"
    cells = {}
    for patch in ax.patches:
        if patch.get_fill() and kinds[patch.get_facecolor()] != "loop":
            assert patch.get_width() == patch.get_height() == 1
            cells[int(patch.get_y()), int(patch.get_x())] = kinds[patch.get_facecolor()]
    assert {*cells.values()} == {*kinds.values()} - {"loop"}
    return cells


def frames(ax) -> set[tuple[int, int, int]]:
    """(first row, first column, side) of what is outlined."""
    shapes = [(p.get_y(), p.get_x(), p.get_width()) for p in ax.patches if not p.get_fill()]
    return {tuple(map(int, shape)) for shape in shapes}  # type: ignore[misc]


def names(ax) -> tuple[list[str], list[str]]:
    """Of the rows and of the columns."""
    rows, columns = ax.get_yticklabels(), ax.get_xticklabels()
    return [t.get_text() for t in rows][::-1], [t.get_text() for t in columns][::-1]


def entries(model: ImplicitModel) -> set[tuple[int, int]]:
    """(row, column) of what is not zero in [A B; C D]."""
    n = len(model.structure.blocks)
    moved = {"A": (0, 0), "B": (0, n), "C": (n, 0), "D": (n, n)}
    return {
        (i + down, j + right)
        for name, (down, right) in moved.items()
        for i, j in getattr(model, name).entries
    }


def test_blocks_of_a_chain() -> None:
    model = chain(7, 5, 4, 3)
    (ax,) = plot.blocks(model).axes
    assert drawn(ax) == {(0, 1): "dense", (1, 2): "dense", (2, 0): "dense"}
    assert names(ax) == (["3 (4)", "1 (5)", "y (3)"], ["3 (4)", "1 (5)", "u (7)"])
    assert ax.get_xlim() == (0, 3) and ax.get_ylim() == (3, 0), "the first row is on top"
    assert frames(ax) == set()
    title = ax.get_title(loc="left").replace("\n", "; ")
    assert title == "9 states, 2 blocks; A strictly upper block-triangular"


def test_blocks_of_a_residual_network() -> None:
    """Composed operators have the colour of their main part."""
    model = residual()
    (ax,) = plot.blocks(model).axes
    assert drawn(ax) == {
        (0, 1): "convolution",  # scale of convolution
        (0, 2): "identity",
        (1, 2): "convolution",
        (2, 3): "identity",  # the maximum is in the activation
        (3, 4): "convolution",
        (4, 0): "dense",  # of reshape of pooling
    }
    assert set(drawn(ax)) == entries(model)
    rows, columns = names(ax)
    assert rows == [f"{s.name} ({s.size:,})" for s in (*model.A.rows, *model.C.rows)]
    assert columns == [f"{s.name} ({s.size:,})" for s in (*model.A.columns, *model.B.columns)]
    texts = {" ".join(t.get_text().split()) for t in ax.texts}
    assert {"scale of convolution 3x3", "convolution 1x1", "identity"} <= texts


class Doubling(operators.Operator):
    """An operator that the library does not know."""

    in_shape = out_shape = (4,)
    cost = 4

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return 2 * x

    def abs(self) -> "Doubling":
        return self


def single(op: operators.Operator) -> ImplicitModel:
    """x = M u, y = x."""
    block = Block("x", Row((4,), ((INPUT, op),)), Identity(), (4,))
    output = Row((4,), ((0, operators.Identity((4,))),))
    return ImplicitModel(structure=Structure((block,), output, op.in_shape))


@pytest.mark.parametrize(
    ("op", "kind"),
    [
        (operators.Dense(torch.ones(4, 4)), "dense"),
        (operators.LowRank(torch.ones(4, 1), torch.ones(4, 1)), "low rank"),
        (operators.Scale(torch.ones(4), (4,)), "scale"),
        (operators.Gather((4,), "flip", (0,)), "gather"),
        (operators.Pooling((4, 1), "mean", ((1,), False)), "pooling"),
        (operators.Identity((4,)), "identity"),
        (Doubling(), "other"),
        (operators.product(Doubling(), operators.Dense(torch.ones(4, 4))), "dense"),
        (
            operators.product(
                operators.Gather((4,), "flip", (0,)), operators.Scale(torch.ones(4), (4,))
            ),
            "scale",
        ),
        (operators.total(operators.Identity((4,)), operators.Dense(torch.ones(4, 4))), "dense"),
        (
            operators.product(operators.Dense(torch.ones(4, 4)), operators.Dense(torch.ones(4, 4))),
            "dense",
        ),
        (
            operators.product(
                operators.Dense(torch.ones(4, 4)), operators.LowRank(*torch.ones(2, 4, 1))
            ),
            "dense",
        ),
        (operators.Zero((4,), (4,)), None),
    ],
)
def test_blocks_tell_kinds_of_operators(op: operators.Operator, kind: str | None) -> None:
    (ax,) = plot.blocks(single(op)).axes
    assert drawn(ax) == {(1, 0): "identity", **({(0, 1): kind} if kind else {})}


def test_blocks_name_the_main_part_where_the_whole_is_long() -> None:
    flip = operators.Gather((4,), "flip", (0,))
    dense = operators.Dense(torch.ones(4, 4))
    (short,), (long,) = (
        plot.blocks(single(op)).axes
        for op in (operators.product(flip, dense), operators.product(*[flip] * 20, dense))
    )
    assert "flip of\ndense" in [text.get_text() for text in short.texts]
    assert "dense" in [text.get_text() for text in long.texts]


def test_blocks_frame_what_loops() -> None:
    """The blocks of a loop, and its cells on or below the diagonal."""
    loop = chain(6, 5, 4, 3).feedback(torch.ones(6, 3))
    (ax,) = plot.blocks(loop).axes
    assert set(drawn(ax)) == entries(loop) == {(0, 1), (1, 2), (2, 0), (1, 3), (3, 2)}
    assert frames(ax) == {(0, 0, 3), (2, 0, 1)}
    assert ax.get_title(loc="left") == "12 states, 3 blocks; 1 loop"
    assert "loop" in [t.get_text() for t in ax.get_legend().get_texts()]

    inside = chain(3, 7, 2) @ loop @ chain(2, 8, 6)
    (ax,) = plot.blocks(inside).axes
    assert set(drawn(ax)) == entries(inside)
    assert frames(ax) == {(1, 1, 3), (3, 1, 1)}

    layer = ImplicitLayer(4, 3, 5)
    model = to_implicit(nn.Sequential(nn.Linear(2, 4), nn.ReLU(), layer), torch.randn(2, 2))
    (ax,) = plot.blocks(model).axes
    assert frames(ax) == {(0, 0, 1)}
    loop = model.feedback(torch.ones(2, 3))  # around a block that reads itself
    (ax,) = plot.blocks(loop).axes
    closing = {(i, j, 1) for i, j in loop.A.entries if i >= j}
    assert (0, 0, 1) in closing and frames(ax) == {(0, 0, 3), *closing}


def test_blocks_are_put_in_order() -> None:
    """A is drawn upper block-triangular, however its blocks are numbered."""
    model = residual()
    first = np.cumsum([0, *(space.size for space in model.A.rows)])
    order = [i for k in (2, 0, 3, 1) for i in range(first[k], first[k + 1])]
    mixed = model.permute(order)
    assert any(i > j for i, j in mixed.A.entries)
    (ax,), (mixed_ax,) = plot.blocks(model).axes, plot.blocks(mixed).axes
    assert names(mixed_ax) == names(ax) and drawn(mixed_ax) == drawn(ax)
    assert frames(mixed_ax) == set()
    both = stack(chain(3, 4, 2), chain(3, 5, 6, 2))
    (ax,) = plot.blocks(both).axes
    assert names(ax)[0] == ["1 (4)", "3 (6)", "1 (5)", "y (4)"], "the model's own order"
    assert set(drawn(ax)) == entries(both)
    # A loop whose blocks stand apart is drawn in one piece.
    loop = chain(2, 7, 2) @ chain(6, 5, 2).feedback(torch.ones(6, 2)) @ chain(2, 8, 6)
    sizes = [space.size for space in loop.A.rows]
    first = np.cumsum([0, *sizes])
    mixed = loop.permute([i for k in (1, 0, 3, 2, 4) for i in range(first[k], first[k + 1])])
    (ax,) = plot.blocks(mixed).axes
    (whole,) = (frame for frame in frames(ax) if frame[2] > 1)
    assert whole == (1, 1, 2) and frames(ax) == {whole, (2, 1, 1)}
    assert all(i < j for i, j in set(drawn(ax)) - {(2, 1)} if i < len(sizes))


def test_blocks_of_matrices() -> None:
    """One block; what is zero is blank, and what is strictly triangular does not loop."""
    A, B, C = torch.ones(4, 4), torch.ones(4, 2), torch.ones(3, 4)
    one = {(0, 0): "dense", (0, 1): "dense", (1, 0): "dense"}
    for model, cells, loop, title in (
        (ImplicitModel(A, B, C), one, {(0, 0, 1)}, "4 states, 1 block; 1 loop"),
        (ImplicitModel(A, B, C, torch.ones(3, 2)), {**one, (1, 1): "dense"}, {(0, 0, 1)}, "1 loop"),
        (ImplicitModel(A.triu(1), B, C), one, set(), "A strictly upper triangular"),
        (ImplicitModel(0 * A, B, 0 * C), {(0, 1): "dense"}, set(), "upper block-triangular"),
    ):
        (ax,) = plot.blocks(model).axes
        assert drawn(ax) == cells and frames(ax) == loop
        assert ax.get_title(loc="left").endswith(title)
        assert names(ax) == (["x (4)", "y (3)"], ["x (4)", "u (2)"])
    plot.blocks(ImplicitModel(0 * A, 0 * B, 0 * C))


def rendered(figure):
    """What measures the texts of a figure once it is drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas.get_renderer()


def overlaps(artists, renderer) -> list[tuple[str, str]]:
    """Pairs of neighbours whose texts touch."""
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in artists if t.get_text()]
    return [(a, b) for (a, x), (b, y) in itertools.pairwise(boxes) if x.overlaps(y)]


def stay_inside(ax, renderer) -> None:
    """No text leaves its cell."""
    for text in (t for t in ax.texts if t.get_position()[0] < ax.get_xlim()[1]):
        box = ax.transData.inverted().transform(text.get_window_extent(renderer))
        assert np.all(abs(box - text.get_position()) < 0.5), text


@pytest.mark.parametrize("depth", [1, 2, 6, 17, 50, 120])
def test_blocks_read_well_at_every_depth(depth: int) -> None:
    """No name touches the next, no text leaves its cell, and nothing leaves the picture."""
    figure = plot.blocks(chain(9, *[8] * depth, 5))
    (ax,) = figure.axes
    renderer = rendered(figure)
    for labels in (ax.get_xticklabels(), ax.get_yticklabels()):
        assert overlaps(labels, renderer) == []
        assert len(labels) >= min(depth + 1, 40)
    assert names(ax)[0][-1] == "y (5)" and names(ax)[1][-1] == "u (9)"
    stay_inside(ax, renderer)
    (kind,) = (text.get_text() for text in ax.get_legend().get_texts())
    assert kind == ("dense" if depth <= 17 else "D  dense")
    for text in (ax.title, ax._left_title, *ax.texts, *ax.get_legend().get_texts()):
        box = text.get_window_extent(renderer)
        assert figure.bbox.containsx(box.x0) and figure.bbox.containsx(box.x1), text
        assert figure.bbox.containsy(box.y0) and figure.bbox.containsy(box.y1), text


def test_blocks_shorten_long_names() -> None:
    long = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    for name in ("backbone", "encoder", "projection", "feedforward"):
        long = nn.Sequential(OrderedDict({name: long}))
    (ax,) = plot.blocks(to_implicit(long, torch.randn(1, 2))).axes
    (name, _), _ = names(ax)
    assert (
        len(name) < 40
        and name.startswith("feedforwar..")
        and name.endswith("encoder.backbone.1 (3)")
    )


def test_blocks_on_axes_of_the_caller() -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.text(0.5, 0.5, "mine", fontsize=1)
    assert plot.blocks(residual(), ax=left) is figure
    assert "mine" in [text.get_text() for text in left.texts]
    assert plot.blocks(chain(9, 8, 7), ax=right) is figure
    assert figure.axes == [left, right]
    renderer = rendered(figure)
    for ax in (left, right):
        stay_inside(ax, renderer)
        assert overlaps(ax.get_xticklabels(), renderer) == []
        assert overlaps(ax.get_yticklabels(), renderer) == []
    part, _ = Figure(figsize=(9, 4)).subfigures(1, 2)
    assert plot.blocks(residual(), ax=part.subplots()) is part


def test_blocks_leave_the_model_alone() -> None:
    """They follow weights that are trained, and build no graph."""
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    model = to_implicit(network, torch.randn(1, 3))
    before = sys.modules.get("matplotlib.pyplot")
    plot.blocks(model)
    assert sys.modules.get("matplotlib.pyplot") is before
    assert all(p.grad is None for p in network.parameters())
    model(torch.randn(5, 3)).sum().backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("thing", [torch.eye(2), nn.Linear(2, 2), None])
def test_blocks_refuse_what_is_no_model(thing: object) -> None:
    with pytest.raises(TypeError, match=f"model: got {type(thing).__name__}, .*to_implicit"):
        plot.blocks(thing)  # type: ignore[arg-type]
