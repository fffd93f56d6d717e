"""On a GPU: the same answers and gradients as on the processor. Skipped where there is none."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from implicitdl import (
    EquilibriumLayer,
    ImplicitLayer,
    ImplicitRNN,
    MonotoneLayer,
    certify,
    dro,
    lifted,
    to_implicit,
)
from implicitdl.convex import Projection, QuadraticProgram
from implicitdl.robust import Ball, Box, Budget, Ellipsoid, RobustLP
from implicitdl.states import fit_states

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def on_both(work: Callable[[str], Any], rtol: float = 1e-8) -> None:
    """The tensors that `work` returns on each device are equal, and where they were asked for."""
    torch.manual_seed(0)
    expected = work("cpu")
    torch.manual_seed(0)
    got = work("cuda")
    assert len(expected) == len(got)
    for a, b in zip(expected, got, strict=True):
        assert b.device.type == "cuda"
        torch.testing.assert_close(b.cpu(), a, rtol=rtol, atol=rtol)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "inf-norm": lambda: ImplicitLayer(6, 3, 10),
    "low rank": lambda: ImplicitLayer(6, 3, 10, low_rank=2),
    "monotone": lambda: MonotoneLayer(6, 3, 10),
    "tanh": lambda: ImplicitLayer(6, 3, 10, activation="tanh"),
    "anderson": lambda: ImplicitLayer(6, 3, 10, solver="anderson"),
    "broyden": lambda: ImplicitLayer(6, 3, 10, solver="broyden"),
    "picard": lambda: ImplicitLayer(6, 3, 10, solver="picard"),
    "newton": lambda: ImplicitLayer(6, 3, 10, solver="newton"),
    "converted": lambda: ImplicitLayer.from_model(to_implicit(network().eval(), drawn(1, 6))),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    torch.manual_seed(1)
    made = LAYERS[name]()

    def work(device: str) -> list[Tensor]:
        layer = copy.deepcopy(made).to(device)
        u = drawn(5, 6).to(device).requires_grad_()
        y = layer(u)
        return [y, *torch.autograd.grad(y.square().sum(), [u, *layer.parameters()])]

    on_both(work, 1e-6)


def test_equilibrium_and_rnn() -> None:
    def work(device: str) -> list[Tensor]:
        torch.manual_seed(1)
        f = nn.Linear(8, 4)
        with torch.no_grad():
            f.weight.mul_(0.3)
        layer = EquilibriumLayer(lambda x, u: torch.tanh(f.to(device)(torch.cat([x, u], -1))), 4)
        u = drawn(5, 4).to(device).requires_grad_()
        x = layer(u)
        rnn = ImplicitRNN(4, 3, 6).to(device)
        y, _ = rnn(drawn(7, 5, 4).to(device))
        return [x, torch.autograd.grad(x.square().sum(), u)[0], y]

    on_both(work, 1e-6)


def test_programs() -> None:
    q, h, c, along = drawn(4, 6), drawn(8).abs() + 0.5, -drawn(4, 3).abs(), drawn(4, 6)
    M, G, rows = drawn(6, 6), drawn(8, 6).flip(0), drawn(6, 3).abs() + 0.2

    def work(device: str) -> list[Tensor]:
        a, b = (t.to(device).requires_grad_() for t in (q, h))
        P = (M @ M.mT + torch.eye(6)).to(device)
        x = QuadraticProgram()(P, a, G.to(device), b)
        out = [
            x,
            *torch.autograd.grad((x * along.to(device)).sum(), [a, b]),
            Projection("simplex")(a),
        ]
        cost, shape = c.to(device), (0.1 * torch.eye(3)).to(device).requires_grad_()
        right = torch.ones(6, device=device)
        program = RobustLP(
            cost, rows.to(device), right, uncertainty=Ellipsoid(shape=shape), low=0.0
        )
        x = program.solve().value
        return [*out, x, torch.autograd.grad((cost * x).sum(), shape)[0]]

    on_both(work, 1e-6)


REGIONS = {
    "box": lambda: Box(low=drawn(4, 6) - 0.1, high=drawn(4, 6) + 0.1),
    "ball": lambda: Ball(radius=0.2, norm=2, dimension=6),
    "budget": lambda: Budget(budget=2.0, scale=0.1 * torch.ones(6)),
}


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("method", ["sensitivity", "interval", "crown", "lipschitz", "best"])
def test_bounds(method: str, region: str) -> None:
    torch.manual_seed(1)
    made, u = ImplicitLayer(6, 3, 10), drawn(4, 6)

    def work(device: str) -> list[Tensor]:
        layer = copy.deepcopy(made).to(device)
        ball = REGIONS[region]().to(torch.zeros((), device=device))
        around = None if region == "box" else u.to(device)
        found = certify.bounds(layer, ball, method, around=around)
        return [found.lower, found.upper, found.state_lower, found.state_upper]

    on_both(work, 1e-3 if method == "best" else 1e-7)


def test_certified_accuracy_and_training() -> None:
    torch.manual_seed(1)
    made, u, y = ImplicitLayer(6, 3, 10), drawn(20, 6), torch.arange(20) % 3

    def work(device: str) -> list[Tensor]:
        layer = copy.deepcopy(made).to(device)
        a, b = u.to(device), y.to(device)
        report = certify.certify_accuracy(layer, (a, b), 0.02)
        assert report.certified_accuracy <= report.attacked_accuracy
        grads = []
        for method in ("interval", "crown"):
            loss = certify.robust_loss(layer, 0.02, a, b, method=method)
            grads += torch.autograd.grad(loss, list(layer.parameters()))
        return [report.certified.to(device), *grads, certify.sensitivity_penalty(layer)]

    on_both(work, 1e-5)


@pytest.mark.parametrize("trainer", ["local", "blocks", "admm"])
def test_lifted(trainer: str) -> None:
    torch.manual_seed(1)
    made, u, y = network(), drawn(64, 6), torch.arange(64) % 3

    def work(device: str) -> list[Tensor]:
        net = copy.deepcopy(made).to(device)
        options = {"epochs": 2} if trainer == "local" else {"sweeps": 3}
        report = getattr(lifted, trainer)(net, u.to(device), y.to(device), **options)
        assert report.objective[-1] == report.objective[-1]
        return [p.detach() for p in net.parameters()]

    on_both(work, 1e-6)


def test_states() -> None:
    torch.manual_seed(1)
    made, u, y = network().eval(), drawn(64, 6), torch.arange(64) % 3

    def work(device: str) -> list[Tensor]:
        layer, report = fit_states(copy.deepcopy(made).to(device), u.to(device), y.to(device))
        assert report is not None
        return [layer(u.to(device)).detach()]

    on_both(work, 1e-6)


def test_dro() -> None:
    torch.manual_seed(1)
    made = nn.Sequential(nn.Linear(6, 8), nn.Softplus(), nn.Linear(8, 3))
    u, y = drawn(16, 6), torch.arange(16) % 3

    def work(device: str) -> list[Tensor]:
        net, a, b = copy.deepcopy(made).to(device), u.to(device), y.to(device)
        losses = nn.functional.cross_entropy(net(a), b, reduction="none")
        grads = []
        for risk in (dro.CVaR(0.25), dro.ChiSquare(0.5), dro.KL(0.3)):
            grads += torch.autograd.grad(risk(losses), list(net.parameters()), retain_graph=True)
        training = dro.WassersteinTraining(net, "cross_entropy", gamma=50.0)
        proof = training.certificate((a, b))
        return [*grads, torch.as_tensor(proof.bound, device=device)]

    on_both(work, 1e-6)
