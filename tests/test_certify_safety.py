"""Certificates under torch's own default dtype, on the second call, and with data that do not fit.

The other tests run with float64 as the default, where a float32 tensor made by mistake does not show.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from implicitdl import (
    ImplicitLayer,
    ImplicitModel,
    MonotoneLayer,
    activations,
    certify,
    to_implicit,
)
from implicitdl.robust import Ball, Box, Budget, Ellipsoid
from implicitdl.wellposed import InfNormBall

METHODS = ("sensitivity", "interval", "lipschitz", "crown", "lp", "best")


class Residual(nn.Module):
    def __init__(self, width, phi):
        super().__init__()
        self.linear, self.phi = nn.Linear(width, width), phi

    def forward(self, x):
        return x + self.phi(self.linear(x))


def leaky(slope, ball="inf-norm"):
    phi = activations.LeakyReLU(negative_slope=slope)
    return ImplicitLayer(5, 3, 7, activation=phi, well_posed=ball)


MODELS = {
    "leaky 0.01": lambda: leaky(0.01),
    "leaky 0.3": lambda: leaky(0.3),
    "leaky 1.3": lambda: leaky(1.3, InfNormBall(kappa=0.6)),
    "monotone": lambda: MonotoneLayer(5, 3, 7, margin=0.5),
    "residual": lambda: nn.Sequential(Residual(5, nn.LeakyReLU(0.1)), nn.Linear(5, 3)),
    "tanh": lambda: ImplicitLayer(5, 3, 7, activation="tanh"),
}
REGIONS = {
    "box": lambda: Box(low=-0.1 * torch.ones(5), high=0.2 * torch.ones(5)),
    "ball": lambda: Ball(radius=0.3, norm=2, dimension=5),
    "budget": lambda: Budget(budget=2.0, scale=0.1 * torch.ones(5)),
    "both": lambda: Ball(radius=0.3, norm=2, dimension=5) & Ball(radius=0.1, norm="inf", dimension=5),
    "sum": lambda: Ball(radius=0.1, norm=2, dimension=5) + Box(low=-0.1 * torch.ones(5), high=torch.zeros(5)),
    "ellipsoid": lambda: Ellipsoid(shape=0.1 * torch.randn(5, 5)),
}  # fmt: skip


def stored(net: nn.Module) -> nn.Module | ImplicitModel:
    """What the float32 numbers of a network or a layer say, in float64."""
    if isinstance(net, nn.Sequential):
        return copy.deepcopy(net).double()
    f = net.model()
    parts = {name: getattr(f, name).detach().double() for name in "ABCDbd"}
    return ImplicitModel(**parts, phi=f.activation)


@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("name", MODELS)
def test_bounds_hold_under_the_default_dtype(name, region):
    torch.manual_seed(5)
    net = MODELS[name]()
    model = to_implicit(net, torch.zeros(1, 5)) if name == "residual" else net
    around, made = torch.randn(3, 5), REGIONS[region]()
    wide = made.to(torch.zeros((), dtype=torch.float64))
    z = wide.sample(300, boundary=True, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():  # the stored weights, evaluated in float64
        y = stored(net)((around.double() + z[:, None]).reshape(-1, 5)).reshape(-1, 3, 3)
    for method in METHODS:
        try:
            found = certify.bounds(model, made, method, around=around)
        except ValueError:
            continue
        assert found.lower.dtype == torch.float64
        assert (found.lower <= y.amin(0) + 1e-11).all(), method
        assert (y.amax(0) <= found.upper + 1e-11).all(), method


@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize("method", ["crown", "lp", "best", "interval"])
def test_a_point_is_inside_its_own_bounds(method):
    """y = leaky(u) at u = -1 is -0.01 in float64; that slope is no float32 number."""
    one = torch.eye(1, dtype=torch.float64)
    model = ImplicitModel(0 * one, one, one, phi=activations.LeakyReLU(negative_slope=0.01))
    point = Box(low=-one[0], high=-one[0])
    found = certify.bounds(model, point, method)
    assert found.lower.item() <= -0.01 <= found.upper.item()


# ---- resuming ------------------------------------------------------------------------------------


def case() -> tuple[ImplicitModel, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    A = torch.randn(7, 7, generator=g)
    model = ImplicitModel(
        0.7 * A / A.abs().sum(1, keepdim=True), torch.randn(7, 5, generator=g),
        torch.randn(3, 7, generator=g),
    )  # fmt: skip
    u = torch.randn(12, 5, generator=g)
    return model, u, model(u).argmax(1)


def changed(model: ImplicitModel, what: str) -> ImplicitModel:
    parts = {name: getattr(model, name).clone() for name in "ABCDbd"}
    if what == "phi":
        return ImplicitModel(**parts, phi="tanh")
    if what == "column":  # the one that a symmetric probe does not see
        parts["B"][:, 2] *= -5
    else:
        parts[what] *= 1.01
    return ImplicitModel(**parts)


@pytest.mark.parametrize("what", ["phi", "column", "A", "C"])
def test_a_run_of_another_model_is_not_taken_up(what, tmp_path):
    model, u, y = case()
    certify.certify_accuracy(model, (u, y), 0.05, path=tmp_path / "run")
    certify.certify_accuracy(model, (u, y), 0.05, path=tmp_path / "run")
    with pytest.raises(ValueError, match="another run"):
        certify.certify_accuracy(changed(model, what), (u, y), 0.05, path=tmp_path / "run")


def test_a_network_in_blocks_knows_its_file(tmp_path):
    def net(phi):
        torch.manual_seed(0)
        return to_implicit(nn.Sequential(nn.Linear(5, 8), phi, nn.Linear(8, 3)), torch.zeros(1, 5))

    u, y = torch.randn(6, 5), torch.zeros(6, dtype=torch.long)
    certify.certify_accuracy(net(nn.ReLU()), (u, y), 0.05, path=tmp_path / "run")
    with pytest.raises(ValueError, match="another run"):
        certify.certify_accuracy(net(nn.Tanh()), (u, y), 0.05, path=tmp_path / "run")


def test_a_method_that_does_not_apply_says_so_every_time(tmp_path):
    torch.manual_seed(0)
    model, u = MonotoneLayer(5, 3, 7, margin=0.1), torch.randn(8, 5)
    with torch.no_grad():
        model.S.mul_(20)
        y = model(u).argmax(1)
    for _ in range(2):
        with pytest.raises(ValueError, match="none applies"):
            certify.certify_accuracy(model, (u, y), 0.05, method="interval", path=tmp_path / "run")
    for _ in range(2):
        report = certify.certify_accuracy(
            model, (u, y), 0.001, method=("interval", "lipschitz"), path=tmp_path / "more"
        )
        assert report.method == ("lipschitz",) and "interval" in report.refused


def test_files_and_folders_that_are_none(tmp_path):
    model, u, y = case()
    (tmp_path / "junk").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="no file of"):
        certify.certify_accuracy(model, (u, y), 0.05, path=tmp_path / "junk")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        certify.certify_accuracy(model, (u, y), 0.05, path=tmp_path / "no" / "run")


# ---- what does not fit ---------------------------------------------------------------------------


LABELS = {
    "negative": torch.tensor([0, -1, 1, 2]),
    "too large": torch.tensor([0, 3, 1, 2]),
    "one": torch.tensor([1]),
    "floats": torch.zeros(4),
    "bools": torch.zeros(4, dtype=torch.bool),
    "a list": [0, 1, 2, 0],
}


@pytest.mark.parametrize("what", LABELS)
def test_labels_are_checked_everywhere(what):
    model, u, _ = case()
    u, y = u[:4], LABELS[what]
    ball = Ball(radius=0.1, norm="inf", dimension=5)
    for work in (
        lambda: certify.margins(model, ball, y, around=u),
        lambda: certify.robust_loss(model, 0.1, u, y),
        lambda: certify.certify_accuracy(model, (u, y), 0.1),
        lambda: certify.robust_radius(model, u, y),
    ):
        with pytest.raises((ValueError, TypeError), match="label"):
            work()


@pytest.mark.parametrize("options, message", [
    ({"radius": -0.1}, "radius"), ({"radius": math.nan}, "radius"), ({"clip": (5.0, 6.0)}, "clip"),
    ({"x": math.nan}, r"u: got nan at index \(1, 2\)"),
])  # fmt: skip
def test_a_robust_loss_of_bad_data_is_refused(options, message):
    model, u, y = case()
    u = u.clone()
    if "x" in options:
        u[1, 2] = options["x"]
    with pytest.raises(ValueError, match=message):
        certify.robust_loss(model, options.get("radius", 0.1), u, y, clip=options.get("clip"))


def test_options_are_checked():
    model, u, y = case()
    ball = Ball(radius=0.1, norm="inf", dimension=5)
    with pytest.raises(ValueError, match="solver"):
        certify.bounds(model, ball, around=u, solver="foo")
    with pytest.raises(ValueError, match="no inputs"):
        certify.bounds(model, ball, around=u[:0])
    for bisections in (-1, 1.5, True):
        with pytest.raises(ValueError, match="bisections"):
            certify.robust_radius(model, u, y, bisections=bisections)
    with pytest.raises(ValueError, match="most"):
        certify.robust_radius(model, u, y, most=True)
    with pytest.raises(ValueError, match="k: "):
        certify.certify_accuracy(model, (u, y), 0.1, attacks=("sparse",), k=0)
    for norm in ("2", 2.0, 1):
        with pytest.raises(ValueError, match="norm: got"):
            certify.certify_accuracy(model, (u, y), 0.1, norm)


@pytest.mark.parametrize("method", ["interval", "crown", "lipschitz", "best"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e308])
def test_weights_that_overflow_prove_nothing(value, method):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3)).double()
    model = to_implicit(net, torch.zeros(1, 1, 4, 4))
    with torch.no_grad():
        net[0].weight[0, 0, 0, 0] = value
    region = Ball(radius=0.1, norm=2, dimension=16)
    try:
        found = certify.bounds(model, region, method, around=torch.ones(2, 16))
    except ValueError as error:
        assert "model:" in str(error) or "method:" in str(error)
        return
    assert math.isfinite(value)
    assert not found.lower.isnan().any() and not found.upper.isnan().any()


@pytest.mark.parametrize("slope", [1.5, 1.9])
def test_slopes_above_one_count_in_the_lipschitz_loss(slope):
    """(1 - m) L < 1 is enough for a monotone layer; the gain is then 1 / (1/L - 1 + m), not 1 / m."""
    torch.manual_seed(0)
    phi = activations.LeakyReLU(negative_slope=slope)
    layer = MonotoneLayer(5, 3, 7, margin=0.5, activation=phi)
    x, y = torch.randn(8, 5), torch.arange(8) % 3
    bound = certify.lipschitz_penalty(layer, 2).item()
    for point in x:
        J = torch.autograd.functional.jacobian(lambda v: layer(v[None])[0], point)
        assert torch.linalg.matrix_norm(J, 2) <= bound * (1 + 1e-9)
    loss = certify.robust_loss(layer, 0.5, x, y, norm=2, method="lipschitz")
    attack = certify.pgd(layer, x, y, 0.5, 2, steps=30)
    assert loss >= F.cross_entropy(layer(attack.inputs), y)


@pytest.mark.parametrize("phi", ["hardtanh", "tanh", "relu"])
def test_crown_is_never_behind_intervals(phi):
    torch.manual_seed(0)
    layer = ImplicitLayer(5, 3, 20, activation=phi)
    with torch.no_grad():
        layer.B.mul_(4)  # saturated states
    u, ball = torch.randn(20, 5), Ball(radius=0.3, norm="inf", dimension=5)
    box = certify.bounds(layer, ball, "interval", around=u)
    lines = certify.bounds(layer, ball, "crown", around=u, refinements=0)
    assert (lines.lower >= box.lower - 1e-9).all() and (lines.upper <= box.upper + 1e-9).all()
