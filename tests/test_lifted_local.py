"""Local training: gradients against back-propagation, hard activations, sweeps, bad input."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn

from implicitdl import ImplicitLayer, ImplicitModel, lifted, to_implicit
from implicitdl.activations import Activation
from implicitdl.lifted.chain import Chain
from implicitdl.lifted.penalties import Fenchel, get_loss
from implicitdl.lifted.sweep import Settings, sweep


def mlp(phi=nn.Tanh, widths=(6, 9, 7, 4)):
    layers = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), phi()]
    return nn.Sequential(*layers[:-1])


def conv(phi=nn.Tanh):
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), phi(), nn.AvgPool2d(2),
        nn.Sequential(nn.Conv2d(3, 4, 2, stride=2, bias=False), phi()), nn.Flatten(),
        nn.Linear(16, 4),
    )  # fmt: skip


def conv1d():
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, groups=2), nn.BatchNorm1d(4), nn.Softplus(), nn.AvgPool1d(2),
        nn.Flatten(), nn.Linear(8, 5), nn.Sigmoid(), nn.Linear(5, 4),
    )  # fmt: skip


NETWORKS = {
    "mlp": (mlp, (6,)),
    "softmax": (lambda: nn.Sequential(*mlp()[:3], nn.Softmax(-1), nn.Linear(7, 4)), (6,)),
    "ends in an activation": (lambda: nn.Sequential(*mlp(), nn.ELU()), (6,)),
    "convolution": (conv, (1, 8, 8)),
    "dense on rows": (
        lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Flatten(), nn.Linear(10, 4)),
        (2, 3),
    ),
    "nothing between": (
        lambda: nn.Sequential(nn.Identity(), *mlp()[:2], nn.Softplus(), *mlp(nn.Tanh)[2:]),
        (6,),
    ),
    "batch normalisation": (conv1d, (2, 6)),
}


def exact(net, u, y, loss):
    net.zero_grad()
    out = net(u)
    if loss == "cross_entropy":
        value = nn.functional.cross_entropy(out, y)
    else:
        value = 0.5 * (out - y).square().sum(1).mean()
    value.backward()
    return grads(net), float(value.detach())


def grads(net):
    return torch.cat([p.grad.flatten() for p in net.parameters()])


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("loss", ["cross_entropy", "squared"])
@pytest.mark.parametrize("coupling", [1.0, 0.5])
def test_the_gradients_tend_to_those_of_back_propagation(name, loss, coupling):
    make, shape = NETWORKS[name]
    net, u = make(), torch.randn(11, *shape)
    y = torch.randint(0, 4, (11,)) if loss == "cross_entropy" else torch.randn(11, 4)
    wanted, value = exact(net, u, y, loss)
    for two_sided, order in ((False, 1.0), (True, 2.0)):
        errors = []
        for c in (0.02, 0.005):
            net.zero_grad()
            got = lifted.gradients(
                net, u, y, loss=loss, c=c, two_sided=two_sided, coupling=coupling
            )
            assert got == pytest.approx(value, rel=1e-12)
            errors.append(float((grads(net) - wanted).norm() / wanted.norm()))
        assert math.log(errors[0] / errors[1], 4) == pytest.approx(order, abs=0.2), errors


def test_piecewise_linear_networks_are_exact_between_kinks():
    net, u, y = mlp(nn.ReLU), torch.randn(5, 6), torch.randint(0, 4, (5,))
    wanted, _ = exact(net, u, y, "cross_entropy")
    net.zero_grad()
    lifted.gradients(net, u, y, c=1e-5)
    torch.testing.assert_close(grads(net), wanted, rtol=1e-7, atol=1e-9)


def test_the_quadratic_penalty_in_one_sweep_is_back_propagation():
    net = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 7), nn.SiLU(), nn.Linear(7, 4))
    u, y = torch.randn(8, 6), torch.randint(0, 4, (8,))
    wanted, _ = exact(net, u, y, "cross_entropy")
    net.zero_grad()
    lifted.gradients(net, u, y, penalty="quadratic", c=0.5)
    torch.testing.assert_close(grads(net), wanted, rtol=1e-9, atol=1e-12)


def test_gradients_add_up_as_those_of_backward():
    net, u, y = mlp(), torch.randn(8, 6), torch.randint(0, 4, (8,))
    lifted.gradients(net, u, y)
    once = grads(net).clone()
    lifted.gradients(net, u, y)
    torch.testing.assert_close(grads(net), 2 * once)
    for p in net[0].parameters():
        p.requires_grad_(False)
    net.zero_grad()
    lifted.gradients(net, u, y)
    assert net[0].weight.grad is None and net[2].weight.grad is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Step(Activation):
    """phi(z) = 1 for z > 0, else 0: monotone, with derivative zero wherever there is one."""

    slope = (0.0, math.inf)
    range = (0.0, 1.0)

    def __call__(self, z):
        return (z > 0).to(z.dtype)

    def derivative(self, z):
        raise AssertionError("a derivative was asked for")


def test_hard_activations_train_where_back_propagation_cannot_move():
    """All steps are on at first: the readout sees a constant, and every derivative is zero."""
    torch.manual_seed(2)
    u = torch.rand(600, 2) * 2 - 1
    y = (u[:, 0] > 0.3 * u[:, 1]).long()
    share = {}
    for trained in (False, True):
        net = nn.Sequential(nn.Linear(2, 12), lifted.Activate(_Step()), nn.Linear(12, 2))
        with torch.no_grad():
            net[0].bias.fill_(2.0)
        net[0].requires_grad_(trained)
        options = {"optimizer": torch.optim.Adam(net.parameters(), lr=0.01), "batch_size": 32}
        report = lifted.local(net, u, y, c=10.0, two_sided=True, epochs=20, **options)
        share[trained] = report.accuracy[-1]
    assert share[False] < 0.6 and share[True] > 0.75, share


def settings(**changes):
    how = {
        "loss": get_loss("cross_entropy"), "penalty": Fenchel(), "c": 0.5, "two_sided": False,
        "sweeps": 1, "coupling": 1.0,
    }  # fmt: skip
    return Settings(**(how | changes))


def test_more_sweeps_are_made_only_where_they_are_certified_to_contract():
    net, u = mlp(widths=(6, 9, 7, 5, 4)), torch.randn(8, 6)
    y = nn.functional.one_hot(torch.randint(0, 4, (8,)), 4).double()

    def swept(sweeps):
        net.zero_grad()
        found = sweep(Chain(net), u, y, settings(sweeps=sweeps), measure=True)
        return grads(net), found

    with torch.no_grad():
        for k in (2, 4):
            net[k].weight.mul_(0.5 / torch.linalg.matrix_norm(net[k].weight, 2))
        net[6].weight.mul_(0.9 / torch.linalg.matrix_norm(net[6].weight, 2))
    one, found = swept(1)
    assert found.certified == 0
    many, found = swept(60)
    assert found.certified == 3
    assert float((one - many).norm()) > 1e-4 * float(one.norm())
    more, _ = swept(61)
    torch.testing.assert_close(many, more, rtol=1e-10, atol=1e-13)  # it has converged
    with torch.no_grad():
        net[4].weight.mul_(2.001)
        net[6].weight.mul_(10.0)
    _, found = swept(5)
    assert found.certified == 1  # of three


@pytest.mark.parametrize("name", ["mlp", "convolution"])
def test_the_norm_that_certifies_is_a_bound(name):
    make, shape = NETWORKS[name]
    chain, u = Chain(make()), torch.randn(3, *shape)
    states, _ = chain.forward(u)
    for stage, x in zip(chain.stages, states, strict=True):
        zero = torch.zeros_like(x[:1])
        J = torch.autograd.functional.jacobian(stage, zero).reshape(-1, zero.numel())
        norm = float(torch.linalg.matrix_norm(J, 2))
        assert norm <= stage.norm_bound(x) <= 3 * norm
        r = torch.randn(1, *stage(zero).shape[1:])
        torch.testing.assert_close(
            stage.adjoint(r, zero).flatten(), (r.flatten() @ J), rtol=1e-10, atol=1e-12
        )


def moons(samples=300):
    """Two half circles, one in the other, and which of them."""
    t = math.pi * torch.rand(samples)
    y = torch.arange(samples) % 2
    s = (1 - 2 * y).double()
    u = torch.stack([s * t.cos() + 0.5 - 0.5 * s, s * t.sin() + 0.25 - 0.25 * s], 1)
    return u + 0.1 * torch.randn(samples, 2), y


@pytest.mark.parametrize("kind", ["mlp", "implicit", "model"])
def test_training_learns(kind):
    u, y = moons()
    model = mlp(nn.ReLU, (2, 32, 32, 2)) if kind == "mlp" else ImplicitLayer(2, 2, 16)
    if kind == "model":
        layer = model
        model = ImplicitModel(*(t.detach() for t in (layer.A, layer.B, layer.C)))
        before = model.A.clone()
    report = lifted.local(
        model, u[:200], y[:200], epochs=12, batch_size=16, validation=(u[200:], y[200:])
    )
    assert report.epochs == 12 and report.kept == "best" and not report.interrupted
    assert report.objective[-1] < 0.6 * report.objective[0]
    assert max(report.validation) == report.validation[report.best] > 0.9
    trained = report.model
    share = float((trained(u[200:]).argmax(1) == y[200:]).double().mean())
    assert share == pytest.approx(report.validation[report.best])
    if kind == "model":
        assert isinstance(trained, ImplicitModel) and torch.equal(model.A, before)
    else:
        assert trained is model and model.training
    assert f"{report.accuracy[-1]:.4f}" in str(report)


def test_regression_and_the_losses_of_the_report():
    u = torch.randn(100, 3)
    y = torch.stack([u.prod(1), u.sum(1)], 1)
    net = mlp(nn.ReLU, (3, 24, 2))
    report = lifted.local(
        net, u, y, loss="squared", epochs=15, batch_size=10, validation=(u, y), keep="last"
    )
    assert all(map(math.isnan, report.accuracy))
    with torch.no_grad():
        error = 0.5 * float((net(u) - y).square().sum(1).mean())
    assert -report.validation[-1] == pytest.approx(error)
    assert report.objective[-1] < 0.5 * report.objective[0]
    assert len(report.penalties[-1]) == 1 and report.penalties[-1][0] > 0
    assert 0 < report.feasibility[-1] < 1


def test_as_initialization_then_any_optimiser():
    u, y = moons()
    net = mlp(nn.ReLU, (2, 32, 32, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    report = lifted.as_initialization(net, u, y, epochs=3, batch_size=16, optimizer=optimizer)
    assert report.epochs == 3 and optimizer.param_groups[0]["lr"] == 0.3
    value = float(nn.functional.cross_entropy(net(u), y).detach())
    assert value < report.objective[0]
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(u), y)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < value


def refused(error, match, model=None, u=None, y=None, **options):
    model = mlp() if model is None else model
    u = torch.randn(4, 6) if u is None else u
    y = torch.tensor([0, 1, 2, 3]) if y is None else y
    before = [p.clone() for p in model.parameters()] if isinstance(model, nn.Module) else []
    with pytest.raises(error, match=match):
        lifted.local(model, u, y, epochs=1, **options)
    if before:
        assert all(map(torch.equal, before, model.parameters()))


def test_bad_data_is_refused_before_any_work():
    u = torch.randn(4, 6)
    u[2, 1], u[3, 0] = torch.nan, torch.inf
    refused(ValueError, r"data: 2 of 4 samples .* \(sample 2, 3\)", u=u)
    refused(ValueError, "the label 4 at sample 1, expected labels from 0 to 3",
            y=torch.tensor([0, 4, 0, 0]))  # fmt: skip
    refused(ValueError, "the label -1 at sample 0", y=torch.tensor([-1, 0, 0, 0]))
    refused(ValueError, r"targets: got torch.int64 of shape \(3,\)", y=torch.tensor([0, 1, 2]))
    refused(ValueError, r"numbers of shape \(4, 4\)", y=torch.randn(4, 3), loss="squared")
    refused(ValueError, "expected probabilities", y=torch.randn(4, 4))
    y = torch.randn(4, 4)
    y[1, 1] = torch.nan
    refused(ValueError, r"targets: 1 of 4 samples .* \(sample 1\)", y=y, loss="squared")
    refused(TypeError, "data: got list", u=[[1.0]])
    refused(TypeError, "targets: got list", y=[0, 1, 2, 3])
    refused(ValueError, "got torch.float32", u=torch.randn(4, 6, dtype=torch.float32))
    refused(ValueError, "does not take samples of shape", u=torch.randn(4, 5))
    refused(ValueError, "expected\\s+\\(5,\\)", ImplicitLayer(5, 4, 3))
    refused(ValueError, "validation data: 1 of 1", validation=(u[2:3], torch.tensor([0])))
    refused(TypeError, "expected a pair", validation=u)


def test_bad_models_are_refused_before_any_work():
    gelu = mlp(nn.GELU)
    refused(ValueError, r"GELU\(\) has slope range .* not monotone", gelu)
    refused(TypeError, r"1 \(LayerNorm\) is LayerNorm",
            nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4)))  # fmt: skip
    refused(TypeError, "MaxPool2d", nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 4)))
    refused(TypeError, "got Linear, expected an nn.Sequential", nn.Linear(6, 4))
    refused(ValueError, "no parameters", nn.Sequential(nn.ReLU(), nn.Flatten()))
    refused(ValueError, "acts on states of shape",
            nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Softmax(-1), nn.Flatten(), nn.Linear(6, 4)))  # fmt: skip
    refused(ValueError, "structured ImplicitModel", to_implicit(mlp(), torch.randn(1, 6)))
    refused(ValueError, "expected 'fenchel' for an implicit layer", ImplicitLayer(6, 4, 3),
            penalty="quadratic")  # fmt: skip
    refused(ValueError, "no Fenchel", ImplicitLayer(6, 4, 3, activation="gelu", well_posed=None))
    dropout = nn.Sequential(nn.Dropout(0.5), *mlp())
    refused(ValueError, "with dropout", dropout, sweeps=2)


def test_bad_options_are_refused_before_any_work():
    for options, match in (
        ({"c": 0.0}, "c: got 0.0, expected a number > 0"),
        ({"c": math.nan}, "c: got nan"),
        ({"sweeps": 0}, "sweeps: got 0"),
        ({"coupling": -1}, "coupling: got -1"),
        ({"two_sided": 2}, "two_sided: got 2"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"seed": -1}, "seed: got -1"),
        ({"schedule": "linaer"}, "Did you mean 'linear'"),
        ({"keep": "first"}, "keep: got 'first'"),
        ({"penalty": "fenchl"}, "Did you mean 'fenchel'"),
        ({"loss": "mse"}, "loss: got 'mse'"),
        ({"optimizer": torch.optim.SGD(mlp().parameters(), lr=0.1)}, "none of the model's"),
    ):
        refused(ValueError, match, **options)
    refused(TypeError, "optimizer: got str", optimizer="adam")
    net = mlp()
    refused(TypeError, "LBFGS evaluates a closure", net,
            optimizer=torch.optim.LBFGS(net.parameters()))  # fmt: skip
