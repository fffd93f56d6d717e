"""Pictures of certificates and attacks: what is drawn is what was found."""

import re
from pathlib import Path

import pytest
import torch

from implicitdl import ImplicitLayer, _data, certify, plot, to_implicit
from implicitdl._demo import certificates, worst_case
from implicitdl._demo.report import Context
from implicitdl.robust import Box


@pytest.fixture
def layer() -> ImplicitLayer:
    torch.manual_seed(0)
    return ImplicitLayer(4, 3, 6, activation="relu").double()


def report(radius: float, method: str, certified: int, broken: int, norm: str = "inf"):
    """Ten samples, nine right; so many proved and so many broken."""
    flags = torch.arange(10)
    return certify.Report(
        radius, norm, (method,), flags < 9, flags < certified, (flags >= 9 - broken) & (flags < 9),
        torch.zeros(10, 3), torch.zeros(10), {},
    )  # fmt: skip


def curves(ax) -> dict[str, list[list[float]]]:
    return {
        line.get_label(): [list(line.get_xdata()), list(line.get_ydata())]
        for line in ax.get_lines()
    }


def test_certified_draws_shares_in_order_of_the_radius() -> None:
    reports = [
        report(0.2, "crown", 3, 4),
        report(0.1, "crown", 8, 0),
        report(0.1, "interval", 5, 1),
        report(0.2, "interval", 0, 0),
    ]
    (ax,) = plot.certified(reports, scale=2.0, unit="mm").axes
    drawn = curves(ax)
    assert drawn["clean"][1] == [90.0, 90.0]
    assert drawn["attacked"] == [[0.2, 0.4], [80.0, 50.0]]  # of several attacks the strongest
    assert drawn["proved by crown"] == [[0.2, 0.4], [80.0, 30.0]]
    assert drawn["proved by interval"] == [[0.2, 0.4], [50.0, 0.0]]
    assert ax.get_xlabel() == "radius in the infinity-norm (mm)"
    corners = ax.collections[0].get_paths()[0].vertices
    assert {tuple(map(float, c)) for c in corners} == {(0.2, 80.0), (0.4, 30.0), (0.4, 50.0)}


def test_certified_refuses_reports_that_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="reports: got 0 of 0 norms"):
        plot.certified([])
    with pytest.raises(ValueError, match="reports: got 2 of 2 norms"):
        plot.certified([report(0.1, "crown", 1, 0), report(0.1, "crown", 1, 0, norm="2")])


def test_bounds_are_outside_of_what_attacks_reach(layer, tmp_path: Path) -> None:
    u = torch.linspace(-1, 1, 4).double()[None]
    radii = torch.tensor([0.0, 0.1, 0.3])
    found = {
        method: [
            certify.bounds(layer, Box(low=u - float(r), high=u + float(r)), method) for r in radii
        ]
        for method in ("interval", "crown")
    }
    with torch.no_grad():
        draws = torch.stack(
            [layer(u + float(r) * (2 * torch.rand(50, 4).double() - 1))[:, 1] for r in radii]
        )
    reached = (draws.amin(1), draws.amax(1))
    figure = plot.bounds(radii, found, output=1, attacked=reached, unit="V")
    (ax,) = figure.axes
    lines = [list(line.get_ydata()) for line in ax.get_lines()]
    for k, method in enumerate(found):
        low, high = lines[2 * k : 2 * k + 2]
        assert low == [float(b.lower[0, 1]) for b in found[method]]
        assert high == [float(b.upper[0, 1]) for b in found[method]]
        assert all(a - 1e-9 <= b for a, b in zip(low, lines[4], strict=True))
        assert all(a + 1e-9 >= b for a, b in zip(high, lines[5], strict=True))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("radius (V)", "output 1")
    assert plot.save(figure, tmp_path / "b.png").stat().st_size > 5_000
    with pytest.raises(ValueError, match=r"found\['crown'\]: got 2, expected 3"):
        plot.bounds(radii, {"crown": found["crown"][:2]})
    with pytest.raises(ValueError, match="attacked: got 1, expected 3"):
        plot.bounds(radii, found, attacked=(radii[:1], radii))
    with pytest.raises(ValueError, match="radii: got shape"):
        plot.bounds(radii[None], found)


def test_margins_are_sorted_and_the_label_is_left_out(layer) -> None:
    u = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)).double()
    labels = layer(u).argmax(1)
    region = Box(low=u - 0.05, high=u + 0.05)
    found = certify.margins(layer, region, labels, "crown")
    attack = certify.pgd(layer, u, labels, 0.05)
    (ax,) = plot.margins({"crown": found}, attacked=attack.margin).axes
    drawn = curves(ax)
    proved, reached = drawn["proved by crown"], drawn["reached by attack"]
    assert proved[1] == sorted(found.amin(1).tolist())
    assert proved[0] == pytest.approx([12.5 * (k + 1) for k in range(8)])
    assert all(a <= b for a, b in zip(proved[1], reached[1], strict=True))
    # Samples that were not bounded are left out.
    found[3] = torch.nan
    (ax,) = plot.margins({"crown": found}).axes
    assert len(curves(ax)["proved by crown"][1]) == 7
    (ax,) = plot.margins({"crown": torch.full((8, 3), torch.nan)}).axes
    assert curves(ax)["proved by crown"][1] == []
    with pytest.raises(ValueError, match="attacked: got shape"):
        plot.margins({"crown": found}, attacked=attack.margin[:4])
    with pytest.raises(ValueError, match=r"proved\['crown'\]: got shape \(3,\)"):
        plot.margins({"crown": found[0]})


def test_sensitivity_shows_one_map_an_output(layer) -> None:
    S = certify.sensitivity(layer)
    figure = plot.sensitivity(S, (2, 2), labels=["a", "b", "c"])
    *maps, bar = figure.axes
    assert [ax.get_title() for ax in maps] == ["a", "b", "c"]
    for ax, row in zip(maps, S, strict=True):
        (image,) = ax.get_images()
        assert torch.equal(torch.tensor(image.get_array().tolist()).double().flatten(), row)
        assert image.get_clim() == (0.0, float(S.max()))
    assert "unit" in bar.get_ylabel()
    assert len(plot.sensitivity(torch.rand(7, 4), (2, 2)).axes) == 8  # 7 maps and the bar
    for wrong in ((3, 2), (1, 5)):
        with pytest.raises(ValueError, match="S: got shape"):
            plot.sensitivity(S, wrong)
    with pytest.raises(ValueError, match="labels: got 1, expected 3"):
        plot.sensitivity(S, (2, 2), labels=["a"])


def test_attacked_images_stand_below_the_first(tmp_path: Path) -> None:
    u = torch.rand(3, 6)
    other = u + 0.5
    figure = plot.attacked(u, {"pgd": other}, (2, 3), answers={"image": "abc", "pgd": [7, 8, 9]})
    assert len(figure.axes) == 6
    shown = [torch.tensor(ax.get_images()[0].get_array().tolist()).flatten() for ax in figure.axes]
    assert torch.allclose(torch.stack(shown), torch.cat([u, other]), atol=1e-7)
    assert [ax.get_title() for ax in figure.axes][3:] == ["answer 7", "answer 8", "answer 9"]
    assert figure.axes[3].get_ylabel() == "pgd"
    limits = {ax.get_images()[0].get_clim() for ax in figure.axes}
    assert limits == {(float(u.min()), float(other.max()))}
    assert plot.save(figure, tmp_path / "a.png").stat().st_size > 2_000
    with pytest.raises(ValueError, match="pgd: got shape"):
        plot.attacked(u, {"pgd": other[:2]}, (2, 3))
    with pytest.raises(ValueError, match="shape: got"):
        plot.attacked(u, {}, (2, 2))
    with pytest.raises(ValueError, match=r"answers\['image'\]: got 1, expected 3"):
        plot.attacked(u, {}, (2, 3), answers={"image": "a"})


def test_certificate_draws_proof_and_attack() -> None:
    radii = torch.tensor([0.0, 0.1])
    above = {"plain": torch.tensor([1.0, 4.0]), "WRM": torch.tensor([1.5, 2.0])}
    below = {"WRM": torch.tensor([1.5, 1.75]), "plain": torch.tensor([1.0, 2.0])}
    (ax,) = plot.certificate(radii, above, below, unit="mm").axes
    drawn = curves(ax)
    assert drawn["plain: proved bound"][1] == [1.0, 4.0]
    assert drawn["plain: found by attack"][1] == [1.0, 2.0]
    assert drawn["WRM: proved bound"][1] == [1.5, 2.0]
    assert drawn["WRM: found by attack"][1] == [1.5, 1.75]
    assert ax.get_yscale() == "log" and ax.get_xlabel() == "Wasserstein radius (mm)"
    (ax,) = plot.certificate(radii, {"a": radii}, {"a": radii}).axes
    assert ax.get_yscale() == "linear"  # a loss of zero
    with pytest.raises(ValueError, match="below: got"):
        plot.certificate(radii, above, {"plain": radii})
    with pytest.raises(ValueError, match=r"above\['a'\]: got shape \(1,\)"):
        plot.certificate(radii, {"a": radii[:1]}, {"a": radii})


@pytest.mark.usefixtures("float32")
def test_the_chapter_on_certificates_brackets_the_truth(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(certificates, "_RADII", (0.01, 0.05))
    torch.manual_seed(0)
    data = _data.digits(0)
    explicit = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10))
    models = {"implicit": ImplicitLayer(64, 10, 8, activation="relu"), "explicit": explicit}
    context = Context(data=data, out=tmp_path, quick=True, models=models)
    text = str(certificates.chapter(context))
    rows = re.findall(r"0\.0[15]((?: +[\d.]+ %)+) ", text)
    assert len(rows) == 4
    for row in rows:
        clean, attacked, *proved = (float(share) for share in re.findall(r"([\d.]+) %", row))
        assert clean >= attacked >= max(proved) and len(proved) == 4
    assert {path.name for path in tmp_path.iterdir()} == {
        "certified.png", "sensitivity.png", "attacked.png",
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"got \['explicit'\], expected 'implicit' and"):
        certificates.chapter(Context(data=data, out=tmp_path, models={"explicit": explicit}))


@pytest.mark.usefixtures("float32")
def test_a_method_that_does_not_apply_is_left_out(monkeypatch) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    u, labels = torch.rand(6, 4), torch.randint(3, (6,))
    model = to_implicit(net, u[:1])
    found = certificates._reports(model, u, labels, 0.01, (0.0, 1.0), 0)
    assert [r.method for r in found] == [(m,) for m in certificates._METHODS]
    with pytest.raises(ValueError, match="labels"):  # an error of another kind is not swallowed
        certificates._reports(model, u, labels + 3, 0.01, (0.0, 1.0), 0)
    monkeypatch.setattr(certificates, "_RADII", (0.01, 0.02))
    lines = certificates._lines([found[1:], found])
    assert all(method in lines[0] for method in certificates._METHODS)
    assert lines[1].split().count("-") == 1 and "-" not in lines[2].split()


@pytest.mark.usefixtures("float32")
def test_the_chapter_on_worst_cases_proves_more_than_attacks_find(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(worst_case, "_ATTACK", 3)
    monkeypatch.setattr(worst_case, "_TRAINING", 300)
    context = Context(data=_data.digits(0), out=tmp_path, quick=True, epochs=2)
    text = str(worst_case.chapter(context))
    rows = re.findall(r"(?:plain|WRM) training +([\d.]+) % +([\d.]+) +([\d.]+) +([\d.]+) ", text)
    assert len(rows) == 2
    for row in rows:
        _, loss, attacked, proved = map(float, row)
        assert loss <= attacked <= proved
    assert "below its bound" in text
    assert (tmp_path / "certificate.png").stat().st_size > 10_000
