"""The penalties of lifted training: one divergence for all activations, and its two rivals."""

import dataclasses

import pytest
import torch
from torch import nn

from implicitdl import lifted
from implicitdl.activations import (
    ELU,
    GELU,
    Activation,
    Blocks,
    HardTanh,
    Identity,
    LeakyReLU,
    MaxPool,
    ReLU,
    Sigmoid,
    SiLU,
    Softmax,
    Softplus,
    SoftShrink,
    Tanh,
)
from implicitdl.lifted.penalties import Askari, Fenchel, Quadratic, get_loss, get_penalty

MONOTONE = [
    Identity(),
    ReLU(),
    LeakyReLU(negative_slope=0.1),
    ELU(),
    ELU(alpha=1.7),
    HardTanh(),
    HardTanh(low=0.0, high=6.0),
    SoftShrink(threshold=0.3),
    Sigmoid(),
    Tanh(),
    Softplus(),
    Softmax(),
    Blocks(parts=((ReLU(), 3), (Tanh(), 2))),
]
PROJECTIONS = [Identity(), ReLU(), HardTanh(), HardTanh(low=0.0, high=6.0)]


def points(phi, samples=40):
    """x in the range of phi and z anywhere, with z bounded away from kinks at whole numbers."""
    z = 2.5 * torch.randn(samples, 5)
    x = phi(2.0 * torch.randn(samples, 5))
    return x, z


@pytest.mark.parametrize("phi", MONOTONE, ids=str)
def test_fenchel_is_a_divergence_with_the_stated_gradient_and_convexity(phi):
    penalty = Fenchel()
    penalty.check(phi)
    x, z = points(phi)
    value = penalty.value(phi, x, z)
    gap = (x - phi(z)).square().sum(1)
    assert bool((value >= gap / (2 * penalty.curvature(phi)) - 1e-12).all())
    assert float(penalty.value(phi, phi(z), z).abs().max()) < 1e-14
    z.requires_grad_()
    (slope,) = torch.autograd.grad(penalty.value(phi, x, z).sum(), z)
    torch.testing.assert_close(slope, penalty.residual(phi, x, z.detach()))


@pytest.mark.parametrize(
    ("penalty", "phi"),
    [(Fenchel(), phi) for phi in MONOTONE]
    + [(Askari(), phi) for phi in PROJECTIONS]
    + [(Quadratic(), phi) for phi in (GELU(), ReLU(), Softmax())],
    ids=str,
)
@pytest.mark.parametrize("L", [0.0, 0.7, 30.0])
def test_the_step_in_x_is_a_minimiser(penalty, phi, L):
    """Nothing in the range nearby is better, and no other point of the range is."""
    x, z = points(phi, 12)
    q = torch.randn_like(z)

    def objective(x):
        return penalty.value(phi, x, z) + 0.5 * L * x.square().sum(1) - (q * x).sum(1)

    best = penalty.minimise(phi, z, q, L)
    least = objective(best)
    assert bool(least.isfinite().all())
    for other in (x, phi(z), phi(z + q), penalty.minimise(phi, z + 0.01 * torch.randn(5), q, L)):
        for t in (1.0, 0.1, 1e-3):
            assert bool((objective(best + t * (other - best)) >= least - 1e-10).all())


@pytest.mark.parametrize(
    ("penalty", "phi"), [(Fenchel(), Tanh()), (Askari(), ReLU()), (Quadratic(), SiLU())], ids=str
)
def test_the_sweeps_target_is_the_step_without_the_square(penalty, phi):
    _, z = points(phi)
    s = torch.randn_like(z)
    torch.testing.assert_close(penalty.target(phi, z, s), penalty.minimise(phi, z, -s, 0.0))


@pytest.mark.parametrize("phi", [GELU(), SiLU(), ReLU(), Tanh(), Softmax()], ids=str)
def test_the_quadratic_penalty_has_the_stated_gradient(phi):
    x, z = points(phi)
    z.requires_grad_()
    (slope,) = torch.autograd.grad(Quadratic().value(phi, x, z).sum(), z)
    torch.testing.assert_close(slope, Quadratic().residual(phi, x, z.detach()))


def test_askari_is_fenchel_and_what_is_below_zero():
    x, z = points(ReLU())
    below = 0.5 * z.clamp(max=0.0).square().sum(1)
    torch.testing.assert_close(Askari().value(ReLU(), x, z), Fenchel().value(ReLU(), x, z) + below)


def test_askaris_bias_pushes_an_exact_network_off():
    """At the exact states Fenchel's J has no slope in the first layer but the loss's; Askari's
    drives the pre-activations up, and the trained network is nearer to a linear one."""
    u = torch.randn(200, 6)
    torch.manual_seed(1)
    teacher = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 2))
    with torch.no_grad():
        y = teacher(u)
    share = {}
    for name in ("fenchel", "askari"):
        net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 2))
        net.load_state_dict(teacher.state_dict())
        report = lifted.blocks(net, u, y, loss="squared", penalty=name, sweeps=20, mu=1.0)
        with torch.no_grad():
            share[name] = float((net[0](u) > 0).double().mean())
            error = float((net(u) - y).square().mean())
        if name == "fenchel":  # the teacher is a minimum of J, with value zero
            assert report.objective[-1] < 1e-12 and error < 1e-12
        else:
            assert error > 1e-3
    assert share["askari"] > share["fenchel"] + 0.05, share


@pytest.mark.parametrize("phi", [GELU(), SiLU(), LeakyReLU(negative_slope=-0.5)], ids=str)
def test_what_has_no_divergence_is_refused_with_the_way_out(phi):
    with pytest.raises(ValueError, match=r"not monotone.*penalty='quadratic'"):
        Fenchel().check(phi)
    Quadratic().check(phi)


def test_other_refusals():
    pool = MaxPool(
        shape=(1, 4, 4), kernel_size=(2, 2), stride=(2, 2), padding=(0, 0), dilation=(1, 1)
    )
    for penalty in (Fenchel(), Quadratic()):
        with pytest.raises(ValueError, match="average pooling"):
            penalty.check(pool)
    with pytest.raises(ValueError, match="not the projection onto its range"):
        Askari().check(Tanh())
    with pytest.raises(ValueError, match="Did you mean 'fenchel'"):
        get_penalty("fenchl")
    with pytest.raises(ValueError, match="Did you mean 'cross_entropy'"):
        get_loss("crossentropy")

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class _Bare(Activation):
        slope = (0.0, 1.0)

        def __call__(self, z):
            return z.relu()

    with pytest.raises(ValueError, match="does not define its divergence"):
        Fenchel().check(_Bare())
    Fenchel().check(_Bare(), value=False)


def test_losses_are_the_usual_ones_with_their_gradients():
    z = torch.randn(7, 4, requires_grad=True)
    labels = torch.randint(0, 4, (7,))
    one_hot = nn.functional.one_hot(labels, 4).double()
    soft = torch.softmax(torch.randn(7, 4), 1)
    cross, squared = get_loss("cross_entropy"), get_loss("squared")
    torch.testing.assert_close(
        cross.value(one_hot, z), nn.functional.cross_entropy(z, labels, reduction="none")
    )
    torch.testing.assert_close(squared.value(soft, z), 0.5 * (z - soft).square().sum(1))
    for loss in (cross, squared):
        (slope,) = torch.autograd.grad(loss.value(soft, z).sum(), z)
        torch.testing.assert_close(slope, loss.residual(soft, z.detach()))
