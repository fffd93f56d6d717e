"""Three-splitting: closed forms are minimisers, block descent descends, multipliers become feasible."""

import itertools

import pytest
import torch
from torch import nn

from implicitdl import lifted
from implicitdl.activations import Identity, LeakyReLU, ReLU, Tanh
from implicitdl.lifted.admm import branches, two_branch


def mlp(phi=nn.ReLU, widths=(6, 12, 9, 4), **options):
    layers = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b, **options), phi()]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize(
    "phi",
    [ReLU(), LeakyReLU(negative_slope=0.2), LeakyReLU(negative_slope=-1.0), Identity()],
    ids=str,
)
@pytest.mark.parametrize(("gamma", "r"), [(1.0, 1.0), (0.1, 5.0), (7.0, 0.2)])
def test_the_two_branch_rule_finds_the_global_minimum(phi, gamma, r):
    """Against a fine grid: the function is not convex and may have two minima."""
    x, t = 2 * torch.randn(60), 2 * torch.randn(60)
    u = two_branch(x, t, gamma, r, branches(phi))

    def objective(u):
        return 0.5 * gamma * (x - phi(u)) ** 2 + 0.5 * r * (u - t) ** 2

    grid = torch.linspace(-40, 40, 80001)[:, None]
    assert bool((objective(u) <= objective(grid).amin(0) + 1e-12).all())
    assert float((objective(u) - objective(grid).amin(0)).abs().max()) < 1e-5


@pytest.mark.parametrize("phi", [nn.ReLU, lambda: nn.LeakyReLU(0.1)], ids=["relu", "leaky"])
@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
@pytest.mark.parametrize("bias", [True, False])
def test_zengs_descent_never_rises(phi, loss, bias):
    u, y = torch.randn(50, 6), torch.randint(0, 4, (50,))
    seen = []
    report = lifted.admm(
        mlp(phi, bias=bias), u, y, loss=loss, gamma=2.0, rho=0.5, alpha=1.0, ridge=1e-3, sweeps=12,
        on_epoch=lambda r: seen.append(r.objective[-1]),
    )  # fmt: skip
    for before, after in itertools.pairwise(seen):
        assert after <= before * (1 + 1e-12)
    assert seen[-1] < 0.9 * seen[0] and len(report.penalties[-1]) == 5
    assert report.objective[-1] >= report.loss[-1] + sum(report.penalties[-1]) - 1e-12


@pytest.mark.parametrize("variant", ["taylor", "dladmm"])
def test_multipliers_reach_a_feasible_fit(variant):
    u = torch.randn(80, 6)
    with torch.no_grad():
        y = mlp()(u)
    report = lifted.admm(mlp(), u, y, variant=variant, rho=1.0, sweeps=300, ridge=1e-6)
    assert report.feasibility[-1] < 0.3 * report.feasibility[0]
    assert report.loss[-1] < 0.2 * report.loss[0]


def test_taylors_multiplier_makes_the_output_exact():
    """With one layer the fixed point is the least squares fit, multiplier = minus the residual."""
    u, y = torch.randn(40, 5), torch.randn(40, 3)
    net = nn.Sequential(nn.Linear(5, 3))
    lifted.admm(net, u, y, variant="taylor", sweeps=400, ridge=0.0)
    design = torch.cat([u, torch.ones(40, 1)], 1)
    exact = torch.linalg.lstsq(design, y).solution.mT
    found = torch.cat([net[0].weight.detach(), net[0].bias.detach()[:, None]], 1)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)


def test_it_learns_digits():
    from implicitdl._data import digits

    d = digits(seed=0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    report = lifted.admm(net, d.train_images, d.train_labels, sweeps=25)
    assert report.accuracy[-1] > 0.95
    share = float((net(d.test_images).argmax(1) == d.test_labels).double().mean())
    assert share > 0.9


def test_refusals():
    u, y = torch.randn(8, 6), torch.randint(0, 4, (8,))
    with pytest.raises(ValueError, match=r"Tanh\(\) is not positively homogeneous"):
        lifted.admm(mlp(nn.Tanh), u, y)
    with pytest.raises(ValueError, match="not positively homogeneous"):
        branches(Tanh())
    with pytest.raises(ValueError, match="variant: got 'tailor'.*Did you mean 'taylor'"):
        lifted.admm(mlp(), u, y, variant="tailor")
    conv = nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3), nn.ReLU(), nn.Flatten(),
                         nn.Linear(8, 4))  # fmt: skip
    with pytest.raises(TypeError, match="expected a dense layer"):
        lifted.admm(conv, u, y)
    deep = nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Linear(3, 2), nn.ReLU(), nn.Flatten(),
                         nn.Linear(4, 4))  # fmt: skip
    with pytest.raises(TypeError, match="expected a dense layer"):
        lifted.admm(deep, u, y)
    deep = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="more than one dimension"):
        lifted.admm(deep, u.view(8, 2, 3), y)
    for name in ("rho", "gamma"):
        with pytest.raises(ValueError, match=f"{name}: got 0"):
            lifted.admm(mlp(), u, y, **{name: 0.0})
    with pytest.raises(ValueError, match="label 9 at sample 0"):
        lifted.admm(mlp(), u, torch.full((8,), 9))
