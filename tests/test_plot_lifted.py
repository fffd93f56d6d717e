"""Pictures of lifted training, and the demo's chapter that compares it with derivatives."""

import re
from pathlib import Path

import pytest
import torch

from implicitdl import _data, lifted, plot
from implicitdl._demo import training
from implicitdl._demo.report import Context


def report(method: str = "blocks", epochs: int = 3) -> lifted.Report:
    """Objective 3 -> 1, of which the loss is two thirds and the rest two penalties."""
    made = lifted.Report(method=method, model=None)
    for k in range(epochs):
        total = 3.0 - k
        made.objective.append(total)
        made.loss.append(total * 2 / 3)
        made.penalties.append([total / 4, total / 12])
    return made


def curves(ax) -> dict[str, list[float]]:
    return {line.get_label(): list(line.get_ydata()) for line in ax.get_lines()}


def test_penalties_draw_what_the_report_has() -> None:
    figure = plot.penalties(report())
    left, right = figure.axes
    assert curves(left) == {"objective": [3.0, 2.0, 1.0], "loss": [2.0, 4 / 3, 2 / 3]}
    assert curves(right) == {"block 1": [0.75, 0.5, 0.25], "block 2": [0.25, 2 / 12, 1 / 12]}
    assert left.get_yscale() == right.get_yscale() == "log"
    assert left.get_xlabel() == "sweep"
    assert [list(line.get_xdata()) for line in left.get_lines()] == [[1, 2, 3]] * 2


def test_of_local_the_loss_is_the_objective_and_is_drawn_once() -> None:
    made = report("local", epochs=1)
    made.loss[:] = made.objective
    made.penalties[0][1] = 0.0  # no logarithm
    left, right = plot.penalties(made).axes
    assert set(curves(left)) == {"loss"} and left.get_xlabel() == "epoch"
    assert right.get_yscale() == "linear"
    assert right.get_lines()[0].get_marker() == "o"  # a line of one point would not be seen


def test_penalties_of_a_real_training_add_up(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
    u = torch.randn(40, 3)
    got = lifted.blocks(net, u, (u[:, 0] > 0).long(), sweeps=4)
    drawn = curves(plot.penalties(got).axes[0])
    parts = curves(plot.penalties(got).axes[1])
    for k in range(4):
        total = drawn["loss"][k] + sum(values[k] for values in parts.values())
        assert drawn["objective"][k] == pytest.approx(total, rel=1e-5)
    assert plot.save(plot.penalties(got), tmp_path / "p.png").stat().st_size > 5_000


def test_penalties_refuse_what_they_cannot_draw() -> None:
    with pytest.raises(TypeError, match=r"report: got dict, expected a lifted\.Report"):
        plot.penalties({})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="report: got one without epochs"):
        plot.penalties(report(epochs=0))
    axes = plot.penalties(report()).axes
    with pytest.raises(ValueError, match="axes: got 1, expected 2"):
        plot.penalties(report(), axes=axes[:1])
    assert plot.penalties(report(), axes=axes) is axes[0].get_figure()


@pytest.mark.usefixtures("float32")
def test_the_chapter_trains_every_way(tmp_path: Path) -> None:
    context = Context(data=_data.digits(0), out=tmp_path, epochs=4, states=12)
    threads = torch.get_num_threads()
    section = training.chapter(context)
    assert torch.get_num_threads() == threads
    text = str(section)
    shares = {
        name: float(share)
        for name, share in re.findall(r"((?:ex|im)plicit by .*?) {2,}([\d.]+) %", text)
    }
    assert len(shares) == 5
    assert min(shares.values()) > 50, shares  # one in ten by chance
    assert "0 of 3 sweeps raised it" in text
    assert [path.name for path in section.pictures] == ["penalties.png"]
    assert section.pictures[0].stat().st_size > 10_000
