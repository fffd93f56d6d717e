"""What a network may be made of: hooks and own forwards are refused, parametrisations followed, frozen
parameters left alone, and a training that goes wrong says so."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from test_lifted_runs import data
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from implicitdl import ConvergenceError, ImplicitLayer, lifted, wellposed


def mlp():
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


TRAINERS = {
    "local": lambda net: lifted.local(net, *data(), epochs=1),
    "gradients": lambda net: lifted.gradients(net, *data()),
    "blocks": lambda net: lifted.blocks(net, *data(), sweeps=1),
    "admm": lambda net: lifted.admm(net, *data(), sweeps=1),
}


class Tripled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


class Own(nn.Sequential):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked():
    net = mlp()
    net[2].register_forward_hook(lambda module, args, out: 2 * out)
    return net


def pruned():
    net = mlp()
    prune.l1_unstructured(net[0], "weight", 0.5)
    return net


STRANGE = {
    "a hook": (hooked, "has hooks"),
    "pruning": (pruned, "has hooks"),
    "a forward": (lambda: nn.Sequential(Tripled(5, 4), nn.ReLU(), nn.Linear(4, 3)), "of its own"),
    "a sequence": (lambda: Own(*mlp()), "of its own"),
    "a part": (
        lambda: nn.Sequential(Own(nn.Linear(5, 4)), nn.ReLU(), nn.Linear(4, 3)),
        "of its own",
    ),
    "nothing to train": (lambda: mlp().requires_grad_(False), "frozen"),
}


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("what", STRANGE)
def test_modules_that_do_something_else_are_refused(what, trainer):
    make, message = STRANGE[what]
    net = make()
    before = [p.clone() for p in net.parameters()]
    with pytest.raises((TypeError, ValueError), match=message):
        TRAINERS[trainer](net)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def parametrised():
    net = mlp()
    parametrizations.weight_norm(net[0])

    class Thrice(nn.Module):
        def forward(self, b):
            return 3 * b

    parametrize.register_parametrization(net[2], "bias", Thrice())
    square = nn.Linear(6, 6)
    parametrize.register_parametrization(square, "weight", wellposed.InfNormBall(kappa=0.9))
    return nn.Sequential(*net[:4], square, nn.Tanh(), net[4])


def test_local_gradients_of_parametrised_weights_are_those_of_autograd():
    net, (u, y) = parametrised(), data()
    lifted.gradients(net, u, y, c=1e-5, two_sided=True)
    found = [p.grad.clone() for p in net.parameters()]
    expected = torch.autograd.grad(F.cross_entropy(net(u), y), list(net.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("trainer", ["blocks", "admm"])
def test_parametrised_weights_are_refused_where_they_are_fitted_as_they_are(trainer):
    with pytest.raises(TypeError, match="parametrised"):
        TRAINERS[trainer](parametrised())


def test_more_sweeps_need_plain_weights():
    with pytest.raises(ValueError, match="parametrised"):
        lifted.gradients(parametrised(), *data(), sweeps=2)


@pytest.mark.parametrize("trainer", ["local", "blocks", "admm"])
def test_frozen_layers_stay_as_they_are(trainer):
    net = mlp()
    net[2].requires_grad_(False)
    before = {k: t.clone() for k, t in net.state_dict().items()}
    TRAINERS[trainer](net)
    for key, t in net.state_dict().items():
        assert torch.equal(t, before[key]) == key.startswith("2.")


def test_frozen_layers_are_not_projected_and_the_objective_falls():
    net = mlp()
    net[0].requires_grad_(False)
    kept = net[0].weight.clone()
    report = lifted.blocks(net, *data(), sweeps=4, rows=lifted.Rows(radius=0.1))
    assert torch.equal(net[0].weight, kept) and net[2].weight.abs().sum(1).max() <= 0.1 + 1e-12
    assert all(b <= a + 1e-12 for a, b in zip(report.objective, report.objective[1:], strict=False))


@pytest.mark.parametrize("trainer", ["blocks", "admm"])
def test_half_precision_is_refused_where_gram_matrices_are_factored(trainer):
    net, (u, y) = mlp().to(torch.bfloat16), data()
    with pytest.raises(TypeError, match="bfloat16"):
        getattr(lifted, trainer)(net, u.to(torch.bfloat16), y, sweeps=1)


@pytest.mark.parametrize("trainer", ["blocks", "admm"])
def test_a_layer_half_frozen_is_refused(trainer):
    net = mlp()
    net[2].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="all or none"):
        TRAINERS[trainer](net)


def test_frozen_parts_of_an_implicit_layer():
    torch.manual_seed(1)
    layer = ImplicitLayer(5, 3, 6)
    for p in (layer.W, layer.B, layer.b):
        p.requires_grad_(False)
    before = {k: t.clone() for k, t in layer.state_dict().items()}
    report = lifted.blocks(layer, *data(), sweeps=3)
    assert report.objective[-1] < report.objective[0]
    for key in ("W", "B", "b"):
        assert torch.equal(layer.state_dict()[key], before[key])
    assert not torch.equal(layer.C, before["C"])
    layer.b.requires_grad_(True)
    with pytest.raises(ValueError, match="A, B and b"):
        lifted.blocks(layer, *data(), sweeps=1)


def test_a_run_with_frozen_parameters_resumes(tmp_path):
    def run(epochs, path=None):
        net = mlp()
        net[0].requires_grad_(False)
        stop = None if epochs is None else (lambda r: r.epochs == epochs)
        lifted.local(net, *data(), epochs=4, checkpoint=path, on_epoch=stop)
        return net.state_dict()

    run(2, tmp_path / "run")
    resumed, whole = run(None, tmp_path / "run"), run(None)
    assert all(torch.equal(resumed[k], whole[k]) for k in whole)


def test_a_checkpoint_knows_its_architecture(tmp_path):
    net = mlp()
    lifted.local(net, *data(), epochs=1, checkpoint=tmp_path / "run")
    other = nn.Sequential(*(nn.Tanh() if isinstance(m, nn.ReLU) else m for m in net))
    with pytest.raises(ValueError, match="model: "):
        lifted.local(other, *data(), epochs=1, checkpoint=tmp_path / "run")
    torch.manual_seed(1)
    lifted.local(ImplicitLayer(5, 3, 6), *data(), epochs=1, checkpoint=tmp_path / "layer")
    with pytest.raises(ValueError, match="model: "):
        lifted.local(
            ImplicitLayer(5, 3, 6, activation="tanh"), *data(), epochs=1,
            checkpoint=tmp_path / "layer",
        )  # fmt: skip


def test_a_schedule_is_known_by_its_values(tmp_path):
    def power(p, t):
        return (1 - t) ** p

    path = tmp_path / "run"
    lifted.local(mlp(), *data(), epochs=1, schedule=functools.partial(power, 2), checkpoint=path)
    lifted.local(mlp(), *data(), epochs=1, schedule=lambda t: (1 - t) ** 2, checkpoint=path)
    with pytest.raises(ValueError, match="schedule: "):
        lifted.local(mlp(), *data(), epochs=1, schedule=lambda t: 1 - t, checkpoint=path)
    with pytest.raises(ValueError, match="schedule: got nan at 0"):
        lifted.local(mlp(), *data(), epochs=1, schedule=lambda t: math.nan)


def test_the_best_epoch_is_that_of_the_parameters_that_are_kept():
    net, (u, y) = mlp(), data()
    optimizer = torch.optim.SGD(net.parameters(), lr=20.0)
    report = lifted.local(
        net, u, y, optimizer=optimizer, epochs=5, batch_size=60, keep="best", schedule="constant"
    )
    loss = float(F.cross_entropy(net(u), y).detach())
    assert loss == pytest.approx(min(report.objective), rel=1e-9)
    assert report.accuracy[report.best] == pytest.approx(
        float((net(u).argmax(1) == y).double().mean())
    )


def test_a_training_that_diverges_says_so_and_goes_back():
    net, (u, y) = mlp(), data()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e200)
    with pytest.raises(ConvergenceError, match="smaller learning rate"):
        lifted.local(net, u, y, optimizer=optimizer, epochs=20)
    assert all(bool(p.isfinite().all()) for p in net.parameters())


def test_what_is_traced_goes_on_after_a_resume(tmp_path):
    def run(sweeps, path):
        return lifted.blocks(mlp(), *data(), sweeps=sweeps, trace=True, checkpoint=path)

    run(2, tmp_path / "run")
    resumed, whole = run(5, tmp_path / "run"), run(5, None)
    assert resumed.details["steps"] == whole.details["steps"]
    assert resumed.details["steps"][-1][1] == pytest.approx(resumed.objective[-1], rel=1e-12)


def test_a_last_batch_of_one_is_refused_with_batch_normalisation():
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))
    u, y = data()
    with pytest.raises(ValueError, match="last batch of one"):
        lifted.local(net, u[:33], y[:33], batch_size=16)
    lifted.local(net, u[:33], y[:33], batch_size=20, epochs=1)


def test_a_model_is_left_in_its_mode_when_validation_is_interrupted(monkeypatch):
    net, (u, y) = mlp(), data()
    original = nn.Sequential.forward

    def forward(self, x):
        if not self.training:
            raise KeyboardInterrupt
        return original(self, x)

    monkeypatch.setattr(nn.Sequential, "forward", forward)
    report = lifted.blocks(net, u, y, sweeps=3, validation=(u, y))
    assert report.interrupted and net.training


def test_gradients_names_what_an_implicit_model_needs():
    with pytest.raises(TypeError, match="lifted.local"):
        lifted.gradients(ImplicitLayer(5, 3, 4).model(), *data())
