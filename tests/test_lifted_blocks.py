"""Block descent: J never rises, W-steps and X-steps are minimisers, constraints hold exactly."""

import itertools
import math

import pytest
import torch
from torch import nn

from implicitdl import ImplicitLayer, ImplicitModel, lifted
from implicitdl.activations import ReLU, Sigmoid, Softmax, Tanh
from implicitdl.lifted.penalties import Askari, Fenchel, Quadratic
from implicitdl.lifted.rows import Region, Rows, fit_rows
from implicitdl.lifted.states import descend
from implicitdl.wellposed import InfNormBall, PerronFrobenius


def mlp(phi=nn.ReLU, widths=(6, 9, 7, 4), **options):
    layers = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b, **options), phi()]
    return nn.Sequential(*layers[:-1])


def conv(phi=nn.ReLU):
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), phi(), nn.AvgPool2d(2),
        nn.Conv2d(3, 4, 2, stride=2, dilation=1), nn.Flatten(), phi(), nn.Linear(16, 4),
    )  # fmt: skip


def conv1d():
    return nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 2, padding=1), nn.Tanh(), nn.AvgPool1d(2),
        nn.Flatten(), nn.Linear(8, 4, bias=False),
    )  # fmt: skip


def data(shape=(6,), samples=40, loss="cross_entropy"):
    u = torch.randn(samples, *shape)
    return u, torch.randint(0, 4, (samples,)) if loss != "squared" else torch.randn(samples, 4)


def descended(model, u, y, **options):
    """Train, and hold J after every block and every sweep to never rising."""
    seen = []

    def watch(report):
        seen.extend(value for _, value in report.details["steps"])
        assert report.details["steps"][-1][1] == pytest.approx(report.objective[-1], rel=1e-12)

    report = lifted.blocks(model, u, y, trace=True, on_epoch=watch, **options)
    for before, after in itertools.pairwise(seen):
        assert after <= before + 1e-12 * abs(before), (before, after)
    assert seen[-1] < seen[0]
    return report


CASES = {
    "relu": (mlp, (6,), {}),
    "sigmoid": (lambda: mlp(nn.Sigmoid), (6,), {}),
    "softplus": (lambda: mlp(nn.Softplus), (6,), {"mu": 1.0}),
    "steep elu": (lambda: mlp(lambda: nn.ELU(1.5)), (6,), {}),
    "no bias": (lambda: mlp(bias=False), (6,), {}),
    "softmax inside": (lambda: nn.Sequential(*mlp()[:3], nn.Softmax(-1), nn.Linear(7, 4)), (6,), {}),
    "ends in an activation": (lambda: nn.Sequential(*mlp(), nn.Tanh()), (6,), {}),
    "convolution": (conv, (1, 8, 8), {}),
    "one-dimensional": (conv1d, (6,), {}),
    "dense on rows": (
        lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Flatten(), nn.Linear(10, 4)),
        (2, 3), {},
    ),
    "nothing between": (
        lambda: nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Softplus(), nn.Linear(9, 4)), (6,), {},
    ),
    "askari": (mlp, (6,), {"penalty": "askari"}),
    "gelu": (lambda: mlp(nn.GELU), (6,), {"penalty": "quadratic"}),
    "silu": (lambda: conv(nn.SiLU), (1, 8, 8), {"penalty": "quadratic"}),
    "squared": (mlp, (6,), {"loss": "squared"}),
    "ridge": (mlp, (6,), {"rows": Rows(ridge=1e-2)}),
    "l1": (mlp, (6,), {"rows": Rows(l1=1e-2)}),
    "ball": (conv, (1, 8, 8), {"rows": Rows(l1=1e-3, ridge=1e-3, radius=0.7)}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_objective_never_rises(name):
    make, shape, options = CASES[name]
    u, y = data(shape, loss=options.get("loss", ""))
    report = descended(make(), u, y, sweeps=3, **options)
    value = report.loss[-1] + math.fsum(report.penalties[-1])
    assert report.objective[-1] >= value - 1e-12
    if "rows" not in options:
        assert report.objective[-1] == pytest.approx(value)


def test_float32_descends_to_rounding():
    u, y = data()
    net = mlp(nn.Tanh).float()
    report = lifted.blocks(net, u.float(), y, sweeps=8)
    for a, b in zip(report.objective, report.objective[1:], strict=False):
        assert b <= a * (1 + 1e-5)


def test_the_minimum_bounds_training_from_below_and_rises_with_mu():
    """J at states that the network computes is the loss, so J's minimum is not above it."""
    u, y = data(samples=60)
    values = []
    for mu in (0.1, 1.0, 10.0):
        torch.manual_seed(0)
        net = mlp()
        with torch.no_grad():
            start = float(nn.functional.cross_entropy(net(u), y))
        report = lifted.blocks(net, u, y, mu=mu, sweeps=12)
        assert report.objective[-1] < start
        values.append(report.objective[-1])
    assert values == sorted(values)
    torch.manual_seed(0)
    net = mlp()
    report = lifted.blocks(net, u, y, mu=1.0, growth=1.5, sweeps=15)
    assert report.feasibility[-1] < report.feasibility[2]


# ---- the blocks --------------------------------------------------------------------------------


@pytest.mark.parametrize("phi", [ReLU(), Sigmoid(), Tanh(), Softmax()], ids=str)
def test_w_steps_reach_the_minimum(phi):
    """Many steps end where the gradient, by autograd of the objective itself, is zero."""
    r = torch.cat([torch.randn(200, 6), torch.ones(200, 1)], 1)
    wanted = phi(r @ torch.randn(7, 4) + 0.5 * torch.randn(200, 4))
    region = Region.of(Rows(ridge=1e-2), torch.zeros(4, 7), 6)
    penalty, weight = Fenchel(), 1 / 200

    def objective(theta):
        return weight * penalty.value(phi, wanted, r @ theta.mT).sum() + region.value(theta)

    theta = fit_rows(
        torch.zeros(4, 7), r, lambda z: penalty.value(phi, wanted, z).sum(),
        lambda z: penalty.residual(phi, wanted, z), penalty.curvature(phi), region,
        weight=weight, steps=400,
    ).requires_grad_()  # fmt: skip
    (slope,) = torch.autograd.grad(objective(theta), theta)
    assert float(slope.abs().max()) < 1e-7


def test_a_quadratic_w_step_is_exact_ridge_at_once():
    r, wanted = torch.randn(50, 6), torch.randn(50, 3)
    region = Region.of(Rows(ridge=0.3), torch.zeros(3, 6), 6)
    theta = fit_rows(
        torch.randn(3, 6), r, lambda z: 0.5 * (z - wanted).square().sum(), lambda z: z - wanted,
        1.0, region, weight=1.0, steps=1,
    )  # fmt: skip
    exact = torch.linalg.solve(r.mT @ r + 0.3 * torch.eye(6), r.mT @ wanted).mT
    torch.testing.assert_close(theta, exact)


def test_w_steps_with_l1_and_balls_agree_with_a_conic_solver():
    import cvxpy as cp

    r = torch.cat([torch.randn(60, 5), torch.ones(60, 1)], 1)
    wanted = (r @ torch.randn(6, 3) + 0.1 * torch.randn(60, 3)).relu()
    v = torch.rand(5) + 0.5
    radius = torch.tensor([0.4, 1.0, 2.0])
    on = torch.tensor([1.0] * 5 + [0.0])
    ball = torch.cat([v, torch.zeros(1)])
    region = Region(l1=0.05 * on, ridge=0.02 * on, radius=radius, ball=ball)
    theta = fit_rows(
        torch.zeros(3, 6), r, lambda z: Fenchel().value(ReLU(), wanted, z).sum(),
        lambda z: z.relu() - wanted, 1.0, region, weight=1 / 60, steps=300,
    )  # fmt: skip
    assert bool(((ball * theta.abs()).sum(1) <= radius * (1 + 1e-14)).all())
    W = cp.Variable((3, 6))
    z = r.numpy() @ W.T
    value = cp.sum(0.5 * cp.square(cp.pos(z)) - cp.multiply(wanted.numpy(), z)) / 60
    value += 0.05 * cp.sum(cp.abs(W[:, :5])) + 0.01 * cp.sum_squares(W[:, :5])
    balls = [cp.sum(cp.multiply(v.numpy(), cp.abs(W[i, :5]))) <= float(radius[i]) for i in range(3)]
    cp.Problem(cp.Minimize(value), balls).solve(
        solver="CLARABEL", tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11
    )
    torch.testing.assert_close(theta, torch.from_numpy(W.value), atol=2e-5, rtol=0)


def test_the_prox_of_rows_is_a_minimiser():
    d, v = torch.rand(6) + 0.2, 2 * torch.randn(4, 6)
    ball = torch.tensor([1.0, 2.0, 0.5, 1.0, 0.0, 0.0])
    l1 = torch.tensor([0.3, 0.3, 0.3, 0.3, 0.3, 0.0])
    region = Region(l1=l1, ridge=0.2 * (l1 > 0), radius=torch.full((4,), 0.9), ball=ball)

    def objective(w):
        return (0.5 * d * (w - v).square() + l1 * w.abs() + 0.5 * region.ridge * w * w).sum(1)

    best = region.prox(v, d)
    assert bool(((ball * best.abs()).sum(1) <= 0.9 + 1e-14).all())
    for _ in range(300):
        other = region.inside(best + torch.randn(4, 6) * 10.0 ** float(-4 * torch.rand(())))
        assert bool((objective(other) >= objective(best) - 1e-12).all())


@pytest.mark.parametrize(
    ("penalty", "phi"), [(Fenchel(), ReLU()), (Fenchel(), Tanh()), (Askari(), ReLU())], ids=str
)
def test_x_steps_reach_the_minimum_of_each_sample(penalty, phi):
    W, b, p = 0.5 * torch.randn(5, 8), torch.randn(5), torch.randn(10, 8)
    t = torch.tanh(torch.randn(10, 5))
    above = Tanh()
    x = phi(torch.randn(10, 8))

    def value(x):
        return penalty.value(phi, x, p) + Fenchel().value(above, t, x @ W.mT + b)

    def step(x, L):
        slope = (above(x @ W.mT + b) - t) @ W
        return penalty.minimise(phi, p, L * x - slope, L)

    L = float(torch.linalg.matrix_norm(W, 2)) ** 2
    few = descend(x, step, value, L, penalty.strong(phi), 3)
    assert bool((value(few) <= value(x)).all())
    best = descend(x, step, value, L, penalty.strong(phi), 250)
    torch.testing.assert_close(step(best, L), best, rtol=0, atol=1e-7)
    plain = x
    for _ in range(40):
        plain = step(plain, L)
    fast = descend(x, step, value, L, penalty.strong(phi), 40)
    gap = [float((value(s) - value(best)).sum()) for s in (fast, plain)]
    assert gap[0] < 0.2 * gap[1], gap  # the acceleration accelerates


def test_a_wrong_constant_is_doubled_until_it_descends():
    x = torch.randn(10, 3)

    def value(x):
        return 50 * x.square().sum(1)

    def step(x, L):
        return x - 100 * x / (1 + L)

    best = descend(x, step, value, 1.0, 0.0, 60, certain=False)
    assert bool((value(best) < 1e-6 * value(x)).all())


# ---- constraints and implicit models -------------------------------------------------------------


def test_row_bounds_hold_exactly_and_biases_are_free():
    u, y = data()
    net = mlp()
    with torch.no_grad():
        net[0].bias.fill_(3.0)
    lifted.blocks(net, 3 * u, y, rows=Rows(radius=0.5), sweeps=4)
    for layer in (net[0], net[2], net[4]):
        assert float(layer.weight.detach().abs().sum(1).max()) <= 0.5 * (1 + 1e-14)
    assert float(net[0].bias.detach().abs().max()) > 0.5
    lifted.blocks(net, u, y, rows=Rows(l1=0.05), sweeps=8)
    assert float((net[0].weight == 0).double().mean()) > 0.3


SETS = {
    "ball": InfNormBall(0.8),
    "perron": PerronFrobenius(0.8),
    "weighted": PerronFrobenius(0.8, weights=torch.tensor([1.0, 2.0, 0.5, 1.0, 1.0, 3.0, 1.0])),
}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("lean", [False, True])
def test_implicit_models_descend_inside_their_set(name, lean):
    u, y = data()
    layer = ImplicitLayer(
        6, 4, 7, well_posed=SETS[name], bias=not lean, direct=not lean,
        activation="tanh" if lean else "relu",
    )  # fmt: skip
    with torch.no_grad():  # on the boundary, where the bounds are at work
        layer.W.copy_(SETS[name].project(5 * torch.randn(7, 7)))
    before = layer.W.detach().clone()
    report = descended(layer, u, y, mu=1.0, sweeps=3, rows=Rows(ridge=1e-4))
    A = layer.A.detach()
    assert float((A - before).norm()) > 1e-3
    assert float(layer.well_posed.margin(A)) >= -1e-12
    torch.testing.assert_close(A, layer.W.detach(), rtol=1e-12, atol=1e-14)
    assert bool(layer.solve(u).converged.all())
    assert len(report.penalties[-1]) == 1


def test_an_implicit_model_comes_back_as_one():
    u, y = data()
    A = 0.9 * torch.rand(5, 5).triu(1)
    model = ImplicitModel(A, torch.randn(5, 6), torch.randn(4, 5))
    report = lifted.blocks(model, u, y, sweeps=4)
    assert isinstance(report.model, ImplicitModel) and torch.equal(model.A, A)
    share = float((report.model(u).argmax(1) == y).double().mean())
    assert share == pytest.approx(report.accuracy[-1])
    wild = ImplicitModel(3 * torch.eye(5), torch.randn(5, 6), torch.randn(4, 5))
    with pytest.raises(ValueError, match="stays well-posed in training"):
        lifted.blocks(wild, u, y)


def test_blocks_learn_digits():
    from implicitdl._data import digits

    d = digits(seed=0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    report = lifted.blocks(net, d.train_images, d.train_labels, sweeps=20)
    assert report.accuracy[-1] > 0.98
    share = float((net(d.test_images).argmax(1) == d.test_labels).double().mean())
    assert share > 0.93


def test_refusals():
    u, y = data()
    for model, match in (
        (nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), r"\(Linear, Linear\)"),
        (nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 4)), "Dropout"),
        (nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4)), "BatchNorm"),
        (nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 2, groups=2), nn.ReLU(),
                       nn.Flatten(), nn.Linear(8, 4)), "one group"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=match):
            lifted.blocks(model, u, y)
    shared = nn.Linear(6, 6)
    with pytest.raises(ValueError, match="share a weight"):
        lifted.blocks(nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(6, 4)), u, y)
    for options, match in (
        ({"mu": 0.0}, "mu: got 0.0"),
        ({"growth": 0.5}, "growth: got 0.5"),
        ({"sweeps": -1}, "sweeps: got -1"),
        ({"state_steps": 0}, "state_steps: got 0"),
        ({"penalty": "askar"}, "Did you mean 'askari'"),
    ):
        with pytest.raises(ValueError, match=match):
            lifted.blocks(mlp(), u, y, **options)
    with pytest.raises(TypeError, match=r"expected lifted\.Rows"):
        lifted.blocks(mlp(), u, y, rows=1.0)
    for bad in ({"l1": -1.0}, {"ridge": math.nan}, {"radius": 0.0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}: got"):
            Rows(**bad)
    with pytest.raises(ValueError, match=r"GELU\(\) has slope range"):
        lifted.blocks(mlp(nn.GELU), u, y)
    with pytest.raises(ValueError, match="expected 'inf-norm' or 'perron-frobenius'"):
        lifted.blocks(ImplicitLayer(6, 4, 3, well_posed="monotone"), u, y)
    with pytest.raises(ValueError, match="low_rank or a mask"):
        lifted.blocks(ImplicitLayer(6, 4, 3, low_rank=1), u, y)
    with pytest.raises(ValueError, match="the layer's own set"):
        lifted.blocks(ImplicitLayer(6, 4, 3), u, y, rows=Rows(radius=1.0))
    with pytest.raises(ValueError, match="label 4 at sample 0"):
        lifted.blocks(mlp(), u, torch.full_like(y, 4))
    assert Quadratic().convex is False
