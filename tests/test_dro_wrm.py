"""WRM: smoothness constants that hold, certificates that no attack passes, gradients by Danskin."""

import math

import pytest
import torch
from torch import nn

import implicitdl
from implicitdl import dro
from implicitdl.activations import ELU, SiLU, Softplus, Tanh
from implicitdl.dro import wrm
from implicitdl.dro._sector import Sector
from implicitdl.dro.smoothness import smoothness
from implicitdl.dro.wrm import _LOSSES

CE = _LOSSES["cross_entropy"]
P, Q = 5, 3


def networks():
    loop = implicitdl.ImplicitLayer(P, Q, 6, activation="tanh")
    with torch.no_grad():
        loop.W.normal_(0, 0.3)
    deep = nn.Sequential(
        nn.Linear(P, 6), nn.SiLU(), implicitdl.ImplicitLayer(6, 4, 5, activation="elu")
    )
    return {
        "linear": nn.Linear(P, Q),
        "chain": nn.Sequential(
            nn.Linear(P, 6), nn.ELU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, Q)
        ),
        "gelu": nn.Sequential(nn.Linear(P, 8), nn.GELU(), nn.Linear(8, Q)),
        "implicit": loop,
        "monotone": implicitdl.MonotoneLayer(P, Q, 6, activation="softplus", margin=0.5),
        "mixed": nn.Sequential(*deep, nn.Softplus(), nn.Linear(4, Q)),
    }


NAMES = list(networks())


def batch(m=24):
    return torch.randn(m, P), torch.randint(0, Q, (m,))


def gradient(net, u, y, scale=None):
    u = u.detach().requires_grad_()
    loss = CE.function(net(u if scale is None else u * scale), y).sum()
    return torch.autograd.grad(loss, u)[0]


@pytest.mark.parametrize("phi", [ELU(), SiLU(), Softplus(), Tanh()], ids=str)
def test_curvatures_are_attained(phi):
    z = torch.linspace(-8, 8, 160_001)
    slopes = phi.derivative(z)
    seen = ((slopes[1:] - slopes[:-1]) / (z[1] - z[0])).abs().max()
    assert 0.999 * phi.curvature <= float(seen) <= phi.curvature * (1 + 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_changes_no_faster_than_L(name):
    """Differences of gradients at near and far inputs, found by ascent where they are steep."""
    net = networks()[name]
    scale = torch.rand(P) + 0.5
    for use in (None, scale):
        found = smoothness(net, torch.randn(1, P), CE, use)
        assert math.isfinite(found.L_zz) and found.L_zz <= found.product * (1 + 1e-9)
        u, y = torch.randn(200, P) * 2, torch.randint(0, Q, (200,))
        seen = 0.0
        for size in (1e-3, 0.1, 1.0):
            v = torch.nn.functional.normalize(torch.randn_like(u), dim=1) * size
            for _ in range(4):  # power steps towards the steepest direction
                change = gradient(net, u + v, y, use) - gradient(net, u, y, use)
                seen = max(seen, float((change.norm(dim=1) / v.norm(dim=1)).max()))
                v = torch.nn.functional.normalize(change, dim=1) * size
        assert 0 < seen <= found.L_zz


@pytest.mark.parametrize("slopes", [(0.0, 1.0), (-0.1, 1.1), (0.2, 0.9)])
def test_gains_of_sectors_hold_at_all_corners_and_are_near_them(slopes):
    """Every diagonal of extreme slopes, and some between: no gain above the bound."""
    n, m = 7, 3
    A = torch.randn(n, n)
    A = A - (torch.linalg.eigvalsh(0.5 * (A + A.mT))[-1] - 0.4) * torch.eye(n)  # monotone
    if slopes[0] < 0:
        A = 0.8 * A / torch.linalg.matrix_norm(A, 2)
    low, top = (torch.full((n,), x) for x in slopes)
    B, F, G = torch.randn(n, m), torch.randn(4, n), torch.randn(4, m)
    sector = Sector(A, B, low, top, torch.zeros(n, dtype=torch.long))
    bound, lam = sector.gain(F, G)
    single = sector.rows(F, G, lam)
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * n)
    D = low + (top - low) * torch.cat([corners, torch.rand(200, n)])
    s = torch.linalg.solve(torch.eye(n) - A * D[:, None, :], B)
    out = F @ (D[:, :, None] * s) + G
    seen = float(torch.linalg.matrix_norm(out, 2).max())
    assert seen <= bound <= 1.6 * seen
    rows = torch.linalg.vector_norm(out, dim=2).amax(0)
    assert bool((rows <= single).all()) and bool((single <= bound * (1 + 1e-6)).all())


def test_sectors_prove_nothing_of_a_loop_that_may_fail():
    A = torch.tensor([[0.0, 1.2], [1.2, 0.0]])  # I - A is singular for slopes of 1 / 1.2
    sector = Sector(A, torch.eye(2), torch.zeros(2), torch.ones(2), torch.zeros(2).long())
    assert sector.gain(A, torch.eye(2))[0] == math.inf


@pytest.mark.parametrize("name", ["chain", "implicit", "monotone", "mixed"])
def test_hessians_are_below_the_bound_which_is_far_below_norms(name):
    net = networks()[name]
    found = smoothness(net, torch.randn(1, P), CE)
    seen = 0.0
    for _ in range(12):
        u, t = 2 * torch.randn(P), torch.randint(0, Q, (1,))
        H = torch.autograd.functional.hessian(lambda z, t=t: CE.function(net(z[None]), t)[0], u)
        seen = max(seen, float(torch.linalg.matrix_norm(H, 2)))
    assert seen <= found.L_zz
    by_norms = math.fsum(found.levels)
    assert (
        found.L_zz < {"chain": 1.0, "implicit": 0.5, "monotone": 0.1, "mixed": 0.5}[name] * by_norms
    )


def test_the_bound_is_tight_where_it_can_be():
    """Two classes and a linear map: the Hessian is p (1 - p) (c_1 - c_2)(c_1 - c_2)'."""
    net = nn.Linear(P, 2)
    expected = 0.25 * float((net.weight[0] - net.weight[1]).detach().norm() ** 2)
    assert smoothness(net, torch.randn(1, P), CE).L_zz == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_no_attack_passes_a_certificate(name):
    net = networks()[name]
    u, y = batch()
    training = dro.WassersteinTraining(net, gamma=1.0)
    for radius in (0.05, 0.4):
        proof = training.certificate((u, y), radius=radius)
        assert proof.is_certificate and proof.inner_error < 1e-6
        worst = training.attack((u, y), radius)  # transport
        assert float(worst.costs.mean()) <= radius**2 * (1 + 1e-9)
        move = (worst.inputs - u).flatten(1).norm(dim=1)
        torch.testing.assert_close(move**2, worst.costs)
        found = [float(worst.losses.mean())]
        for kind in range(6):
            step = torch.randn_like(u) if kind % 2 else gradient(net, u, y)  # random, gradient
            step = step * torch.rand(len(u), 1) ** kind
            step = step * radius / (step**2).sum(1).mean().sqrt()
            found.append(float(CE.function(net(u + step), y).mean().detach()))
        assert max(found) <= proof.bound
        assert proof.nominal <= max(found)


@pytest.mark.parametrize("name", ["chain", "implicit"])
def test_the_certificate_is_tight_at_rho_hat(name):
    u, y = batch()
    training = dro.WassersteinTraining(networks()[name], gamma=1.0)
    gamma = 0.55 * training.smoothness(u).L_zz
    proof = training.certificate((u, y), gamma=gamma)
    bound, rho_hat, inner_error, L, is_certificate = proof
    assert is_certificate and rho_hat > 0 and pytest.approx(gamma / 0.55) == L
    assert bound - proof.attained == pytest.approx(0.0, abs=1e-7)
    assert 0 <= inner_error < 1e-7
    assert proof.at(math.sqrt(rho_hat)) == pytest.approx(bound)
    assert proof.at(1.0) == pytest.approx(bound + gamma * (1 - rho_hat))


def test_the_inner_error_is_honest():
    """Few steps: the bound of what is missing is no less than what is missing."""
    u, y = batch()
    net = networks()["chain"]
    training = dro.WassersteinTraining(net, gamma=1.0)
    L = training.smoothness(u).L_zz
    gamma = 0.55 * L
    exact = training.certificate((u, y), gamma=gamma)
    for steps in (1, 2, 4):
        rough = training.certificate((u, y), gamma=gamma, steps=steps)
        assert rough.is_certificate
        assert rough.bound - rough.gamma * rough.rho >= exact.bound - exact.gamma * exact.rho - 1e-7
        assert rough.inner_error >= exact.inner_error


def test_gradient_is_that_of_the_surrogate():
    """Danskin: differences of phi, the inner problem solved anew, give the gradient at T(z)."""
    u, y = batch(6)
    net = nn.Sequential(nn.Linear(P, 4), nn.Tanh(), nn.Linear(4, Q))
    training = dro.WassersteinTraining(net, gamma=2.0, steps=400, tol=1e-11)
    training(u, y).backward()
    weight = net[0].weight
    for i, j in ((0, 0), (2, 3)):
        values = []
        for h in (1e-5, -1e-5):
            with torch.no_grad():
                weight[i, j] += h
            values.append(float(training(u, y).detach()))
            with torch.no_grad():
                weight[i, j] -= h
        assert float(weight.grad[i, j]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


def test_an_attack_is_found_faster_from_a_good_gamma(monkeypatch):
    u, y = batch()
    training = dro.WassersteinTraining(networks()["chain"], gamma=30.0)
    calls = []
    plain = wrm.ascend
    monkeypatch.setattr(wrm, "ascend", lambda *args: calls.append(args[4]) or plain(*args))
    cold = training.attack((u, y), 0.3)
    count, gamma = len(calls), calls[-1]
    calls.clear()
    warm = training.attack((u, y), 0.3, gamma=1.05 * gamma)
    assert calls[0] == 1.05 * gamma and len(calls) <= count // 2 + 1
    assert float(warm.losses.mean()) == pytest.approx(float(cold.losses.mean()), rel=1e-3)
    assert float(warm.costs.mean()) <= 0.3**2 * (1 + 1e-9)


def test_features_that_are_fixed_or_dear():
    u, y = batch()
    net = networks()["chain"]
    cost = torch.tensor([1.0, math.inf, 4.0, 1.0, 1.0])
    training = dro.WassersteinTraining(net, gamma=2.0, cost=cost)
    worst = training.worst(u, y)
    move = worst.inputs - u
    assert bool((move[:, 1] == 0).all()) and bool((move[:, 0] != 0).any())
    finite = torch.tensor([0, 2, 3, 4])
    torch.testing.assert_close((cost[finite] * move[:, finite] ** 2).sum(1), worst.costs)
    free = dro.WassersteinTraining(net, gamma=2.0)
    assert training.smoothness(u).L_zz < free.smoothness(u).L_zz
    proof = training.certificate((u, y), radius=0.3)
    assert proof.is_certificate
    assert proof.bound >= float(training.attack((u, y), 0.3).losses.mean())


def test_labels_that_flip():
    u, y = batch()
    net = networks()["chain"]
    dear, cheap = (dro.WassersteinTraining(net, gamma=3.0, label_price=k) for k in (1e3, 1e-3))
    fixed = dro.WassersteinTraining(net, gamma=3.0)
    assert torch.equal(dear.worst(u, y).labels, y)
    torch.testing.assert_close(dear.worst(u, y).surrogate, fixed.worst(u, y).surrogate)
    worst = cheap.worst(u, y)
    flipped = worst.labels != y
    assert bool(flipped.any())
    assert bool((worst.surrogate >= fixed.worst(u, y).surrogate - 1e-9).all())
    move = ((worst.inputs - u) ** 2).sum(1)
    torch.testing.assert_close(worst.costs, move + 1e-3 * flipped)
    proof = cheap.certificate((u, y), gamma=cheap.smoothness(u).L_zz)
    assert proof.is_certificate and proof.bound >= proof.attained - 1e-9


def test_the_radius_moves_gamma():
    u, y = batch(64)
    net = nn.Sequential(nn.Linear(P, 6), nn.ELU(), nn.Linear(6, Q))
    training = dro.WassersteinTraining(net, radius=0.2)
    for _ in range(60):
        training(u, y)
    far = float(training.worst(u, y).costs.mean())
    assert math.sqrt(far) == pytest.approx(0.2, rel=0.05)
    other = dro.WassersteinTraining(net, radius=0.2)
    other.load_state_dict(training.state_dict())
    assert other.gamma == training.gamma
    training.eval()
    gamma = training.gamma
    training(u, y)
    assert training.gamma == gamma


def test_training_lowers_the_certificate():
    torch.manual_seed(1)
    u = torch.randn(120, P)
    y = (u[:, 0] + 0.3 * torch.randn(120) > 0).long()
    bounds = {}
    for gamma in (None, 1.0):
        torch.manual_seed(2)
        net = nn.Sequential(nn.Linear(P, 8), nn.ELU(), nn.Linear(8, 2))
        training = dro.WassersteinTraining(net, gamma=gamma or 1.0)
        optimiser = torch.optim.Adam(net.parameters(), 1e-2)
        for _ in range(120):
            loss = training(u, y) if gamma else CE.function(net(u), y).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        bounds[gamma] = training.certificate((u, y), radius=0.5).bound
    assert bounds[1.0] < bounds[None]


def test_batches_and_dtypes():
    u, y = batch(20)
    net = networks()["chain"]
    training = dro.WassersteinTraining(net, gamma=1.0)
    whole = training.certificate((u, y), radius=0.2)
    parts = training.certificate([(u[:7], y[:7]), (u[7:], y[7:])], radius=0.2)
    assert whole.bound == pytest.approx(parts.bound, rel=1e-9)
    single = dro.WassersteinTraining(net.float(), gamma=1.0)
    assert single.certificate((u.float(), y), radius=0.2).bound == pytest.approx(
        whole.bound, rel=1e-4
    )
    assert single.worst(u.float(), y).inputs.dtype == torch.float32


def test_what_is_not_smooth_is_called_a_heuristic():
    u, y = batch()
    for net in (
        nn.Sequential(nn.Linear(P, 6), nn.ReLU(), nn.Linear(6, Q)),
        nn.Sequential(nn.Linear(P, 6), nn.ELU(alpha=0.5), nn.Linear(6, Q)),
        nn.Sequential(nn.Linear(P, 6), nn.LayerNorm(6), nn.Linear(6, Q)),
    ):
        proof = dro.WassersteinTraining(net, gamma=2.0).certificate((u, y), radius=0.1)
        assert not proof.is_certificate and proof.reason and math.isinf(proof.L_zz)
    own = dro.WassersteinTraining(networks()["chain"], lambda o, t: CE.function(o, t), gamma=2.0)
    proof = own.certificate((u, y))
    assert not proof.is_certificate and "OutputLoss" in proof.reason
    declared = dro.OutputLoss(CE.function, math.sqrt(2), 0.5)
    proof = dro.WassersteinTraining(networks()["chain"], declared, gamma=50.0).certificate((u, y))
    assert proof.is_certificate


def test_gamma_too_small():
    u, y = batch()
    training = dro.WassersteinTraining(networks()["chain"], gamma=1e-3)
    L = training.smoothness(u).L_zz
    with pytest.raises(ValueError, match="not proved concave") as caught:
        training.certificate((u, y))
    least = float(str(caught.value).split("the smallest that works is ")[1].split(" ")[0][:-1])
    assert least == pytest.approx(L / 2, rel=2e-5)  # as printed, it works
    assert training.certificate((u, y), gamma=least).is_certificate
    guess = training.certificate((u, y), on_failure="return")
    assert not guess.is_certificate and math.isinf(guess.inner_error)
    assert training.certificate((u, y), gamma=0.501 * L).is_certificate


@pytest.mark.parametrize(
    "options, match",
    [
        ({"gamma": 0.0}, "gamma: got 0"),
        ({"radius": -1.0}, "radius: got -1"),
        ({}, "both or none"),
        ({"gamma": 1.0, "radius": 1.0}, "both or none"),
        ({"gamma": 1.0, "cost": -torch.ones(P)}, "cost: got -1"),
        ({"gamma": 1.0, "label_price": 0.0}, "label_price: got 0"),
        ({"gamma": 1.0, "loss": "cross_entropie"}, "Did you mean 'cross_entropy'"),
        ({"gamma": math.nan}, "gamma: got nan"),
        ({"gamma": 1.0, "steps": 0}, "steps: got 0"),
        ({"gamma": -1.0}, "gamma: got -1"),
        ({"radius": math.nan}, "radius: got nan"),
        ({"gamma": 1.0, "cost": torch.tensor([1.0, math.nan])}, r"cost: got nan at index \(1,\)"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        dro.WassersteinTraining(nn.Linear(P, Q), **options)


def test_bad_data():
    training = dro.WassersteinTraining(nn.Linear(P, Q), gamma=1.0, cost=torch.ones(P))
    u, y = batch(4)
    with pytest.raises(ValueError, match="cost: got shape"):
        training(torch.randn(4, P + 1), y)
    with pytest.raises(ValueError, match="labels: got shape"):
        training(u, y[:3])
    with pytest.raises(ValueError, match="no batches"):
        training.certificate([])
    model = training.model
    training.model = None  # what follows is refused before the model is asked anything
    with pytest.raises(ValueError, match="radius: got -1"):
        training.certificate((u, y), radius=-1.0)
    with pytest.raises(ValueError, match="gamma: got nan"):
        training.certificate((u, y), gamma=math.nan)
    with pytest.raises(ValueError, match="steps: got 0"):
        training.certificate((u, y), steps=0)
    with pytest.raises(ValueError, match="tol: got -1"):
        training.certificate((u, y), tol=-1)
    with pytest.raises(ValueError, match="radius: got 0"):
        training.attack((u, y), 0.0)
    with pytest.raises(ValueError, match="gamma: got 0"):
        training.attack((u, y), 0.1, gamma=0.0)
    with pytest.raises(ValueError, match="got 2 batches"):
        training.attack([(u, y), (u, y)], 0.1)
    with pytest.raises(ValueError, match=r"labels: got nan at index \(1,\)"):
        training(u, torch.tensor([0.0, math.nan, 1.0, 1.0]))
    training.model = model
    u[1, 2] = math.nan
    with pytest.raises(ValueError, match=r"nan at index \(1, 2\)"):
        training(u, y)


def test_an_implicit_model_in_single_precision_has_the_certificate_of_its_network():
    torch.manual_seed(0)
    u, y = torch.randn(8, P, dtype=torch.float32), torch.randint(Q, (8,))
    net = nn.Sequential(nn.Linear(P, 6), nn.Tanh(), nn.Linear(6, Q)).float()
    loop = implicitdl.ImplicitLayer(P, Q, 6, activation="tanh").float()
    for network, model in ((net, implicitdl.to_implicit(net, u)), (loop, loop.model())):
        one = dro.WassersteinTraining(network, gamma=50.0).certificate((u, y))
        two = dro.WassersteinTraining(model, gamma=50.0).certificate((u, y))
        assert two.is_certificate and two.bound == pytest.approx(one.bound, rel=1e-7)


def test_labels_and_dtypes_are_named():
    net = nn.Sequential(nn.Linear(P, 6), nn.Tanh(), nn.Linear(6, Q)).float()
    training = dro.WassersteinTraining(net, gamma=50.0)
    u, y = torch.randn(8, P, dtype=torch.float32), torch.full((8,), Q)
    with pytest.raises(ValueError, match=f"labels: got {Q}, expected numbers from 0 to {Q - 1}"):
        training(u, y)
    with pytest.raises(ValueError, match="labels: got 3"):
        training.certificate((u, y))
    with pytest.raises(ValueError, match=r"u: got torch.float64, expected torch.float32"):
        training(u.double(), y - 1)
    assert training.certificate((u.double(), y - 1)).is_certificate


def test_batch_norm_sees_a_batch_once():
    net = nn.Sequential(nn.Linear(P, 6), nn.BatchNorm1d(6), nn.ELU(), nn.Linear(6, Q))
    training = dro.WassersteinTraining(net, gamma=1.0)
    batch = torch.randn(8, P, dtype=net[0].weight.dtype), torch.zeros(8, dtype=torch.long)
    training(*batch)
    training.attack(batch, 0.1, steps=3)
    assert int(net[1].num_batches_tracked) == 1 and net[1].training


def test_a_forward_that_was_replaced_is_no_certificate():
    torch.manual_seed(0)
    layer = implicitdl.ImplicitLayer(P, Q, 6, activation="tanh").double()
    net = nn.Sequential(layer)
    old = layer.forward
    layer.forward = lambda u: 100 * old(u)
    found = smoothness(net, torch.zeros(1, P, dtype=torch.float64), CE)
    assert math.isinf(found.L_zz) and "something else" in found.reason


@pytest.mark.parametrize("value", [-1.0, math.nan, "a"])
def test_constants_of_a_loss_are_checked(value):
    with pytest.raises(ValueError, match="hessian: got"):
        dro.OutputLoss(lambda y, t: y.sum(1), 1.0, value)
