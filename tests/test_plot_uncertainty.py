"""Pictures of uncertainty: what is drawn is what the program says."""

import numpy as np
import pytest
import torch

from implicitdl import plot
from implicitdl.robust import Ball, RobustLP


@pytest.fixture
def program() -> RobustLP:
    """max x_1 + x_2 over two rows x_i <= 1, each with a ball of radius 1/2; x >= 0, x_1 <= 3/4."""
    c, A, b = -torch.ones(2), torch.eye(2), torch.ones(2)
    certain = (torch.tensor([[1.0, 0.0]]), torch.tensor([0.75]))
    return RobustLP(
        c, A, b, uncertainty=Ball(radius=0.5, dimension=2), low=0.0, certain=certain, high=5.0
    )


def corners(ax, colour: str) -> np.ndarray:
    """The largest x_1 and x_2 on the boundary drawn in this colour."""
    import matplotlib.colors

    wanted = matplotlib.colors.to_rgba(colour)
    points = [
        path.vertices
        for collection in ax.collections
        for path in collection.get_paths()
        if len(collection.get_edgecolor()) and tuple(collection.get_edgecolor()[0]) == wanted
    ]
    return np.concatenate(points).max(0)


def test_feasible_sets_end_where_the_rows_do(program) -> None:
    x = program.solve().value
    figure = plot.feasible(
        program, radii=(1.0, 0.0), points={"x": x}, window=(-0.2, 1.2, -0.2, 1.2)
    )
    (ax,) = figure.axes
    assert corners(ax, "#0072B2") == pytest.approx([0.75, 1.0], abs=0.01)  # r = 0 comes first
    # With r = 1: x_2 + ||x|| / 2 <= 1 at x_1 = 0, and x_1 + ||x|| / 2 <= 1 at x_2 = 0.
    assert corners(ax, "#D55E00") == pytest.approx([2 / 3, 2 / 3], abs=0.01)
    marks = {line.get_label(): line.get_xydata() for line in ax.get_lines()}
    assert marks["x"][0] == pytest.approx(x.tolist())
    arrow = next(text for text in ax.texts if text.arrow_patch is not None)
    assert (np.array(arrow.xy) > np.array(arrow.xyann)).all()  # -c = (1, 1)


def test_feasible_refuses_what_is_no_plane(program) -> None:
    three = RobustLP(torch.ones(3), torch.eye(3), torch.ones(3))
    with pytest.raises(ValueError, match="program: got 3 variables"):
        plot.feasible(three)
    with pytest.raises(ValueError, match="leading dimensions \\(4,\\)"):
        plot.feasible(program.scaled(torch.ones(4)))
    for radii in ((), range(7)):
        with pytest.raises(ValueError, match="radii: got"):
            plot.feasible(program, radii=radii)


def test_feasible_chooses_a_window(program, tmp_path) -> None:
    figure = plot.feasible(program, points={"far": torch.tensor([3.0, 2.0])})
    (ax,) = figure.axes
    assert ax.get_xlim()[0] < 0 and ax.get_xlim()[1] > 3 and ax.get_ylim()[1] > 2
    flat = RobustLP(torch.zeros(2), torch.eye(2), torch.ones(2))  # no direction: no arrow
    assert not plot.feasible(flat, radii=(0.0,)).axes[0].texts
    assert plot.save(figure, tmp_path / "a.png").stat().st_size > 5000


def test_attack_draws_what_was_measured() -> None:
    radii = torch.linspace(0, 2, 5)
    values = {"one": radii - 1, "two": 2 * radii}
    (ax,) = plot.attack(radii, values, sampled={"one": radii - 1.5}).axes
    drawn = {line.get_label(): line.get_ydata() for line in ax.get_lines()}
    assert list(drawn["one"]) == (radii - 1).tolist() and list(drawn["two"]) == (2 * radii).tolist()
    dots = [line for line in ax.get_lines() if line.get_marker() == "." and len(line.get_xdata())]
    assert list(dots[0].get_ydata()) == (radii - 1.5).tolist()
    with pytest.raises(ValueError, match=r"violations\['one'\]: got \(3,\)"):
        plot.attack(radii, {"one": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"sampled\['one'\]: got list"):
        plot.attack(radii, values, sampled={"one": [0.0]})


@pytest.mark.parametrize("count", [1, 2, 40])
def test_trade_off_draws_both_ways_and_names_its_ends(count: int, tmp_path) -> None:
    radii = torch.linspace(0, 2, count)
    nominal, worst = 3 - radii**2, radii - 4
    figure = plot.trade_off(radii, nominal, worst, also={"measured": radii}, label="profit")
    left, right = figure.axes
    assert list(left.get_lines()[0].get_xdata()) == pytest.approx(worst.tolist())
    assert list(left.get_lines()[0].get_ydata()) == pytest.approx(nominal.tolist())
    labels = [line.get_label() for line in right.get_lines()]
    assert labels == ["nominal", "worst case", "measured"]
    named = [text.get_text() for text in left.texts]
    assert named[0] == "r = 0" and len(named) <= 12
    assert count == 1 or named[-1] == "r = 2"
    plot.save(figure, tmp_path / "a.png")
    with pytest.raises(ValueError, match="curves"):
        plot.trade_off(radii, nominal, torch.zeros(count + 1))
