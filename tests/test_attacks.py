"""Attacks find what is there, stay in their ball, and have exact gradients; losses bound them."""

import math

import pytest
import torch
from torch import nn

from implicitdl import ImplicitLayer, ImplicitModel, MonotoneLayer, to_implicit
from implicitdl.certify import (
    bounds,
    fgsm,
    lipschitz_penalty,
    margins,
    minimise,
    pgd,
    relaxation_attack,
    robust_loss,
    sensitivity,
    sensitivity_penalty,
    sparse_attack,
    worst_margins,
)
from implicitdl.certify.accuracy import ball
from implicitdl.certify.attacks import margin_of
from implicitdl.robust import Ball, Budget
from implicitdl.wellposed import InfNormBall

P, Q, N = 6, 4, 10


def problem(cls=ImplicitLayer, m: int = 12):
    torch.manual_seed(0)
    layer = cls(P, Q, N)
    u = torch.randn(m, P)
    with torch.no_grad():
        return layer, u, layer(u).argmax(1)


def size(z, norm):
    return z.abs().amax(1) if norm == "inf" else torch.linalg.vector_norm(z, dim=1)


ATTACKS = {
    "fgsm": fgsm,
    "pgd": lambda *a, **k: pgd(*a, restarts=2, steps=10, **k),
    "relaxation": lambda *a, **k: relaxation_attack(*a, steps=5, **k),
    "lp": lambda *a, **k: relaxation_attack(*a, steps=0, method="lp", **k),
}


@pytest.mark.parametrize("norm", ["inf", 2])
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_stay_in_the_ball_and_report_what_they_found(name, norm):
    layer, u, labels = problem(m=2 if name == "lp" else 12)
    found = ATTACKS[name](layer, u, labels, 0.2, norm)
    assert (size(found.inputs - u, norm) <= 0.2 * (1 + 1e-9)).all()
    with torch.no_grad():
        torch.testing.assert_close(margin_of(layer(found.inputs), labels), found.margin)
        assert (found.margin <= margin_of(layer(u), labels) + 1e-12).all()
    proved = margins(layer, ball(u, 0.2, norm), labels, "crown").amin(1)
    assert (found.margin >= proved - 1e-9).all()
    assert torch.equal(found.success, found.margin <= 0)


def test_a_linear_model_is_attacked_exactly():
    torch.manual_seed(0)
    D = torch.randn(2, P)
    f = ImplicitModel(torch.zeros(1, 1), torch.zeros(1, P), torch.zeros(2, 1), D)
    u = torch.randn(8, P)
    labels = f(u).argmax(1)
    row = (D[0] - D[1]) * torch.where(labels == 0, 1.0, -1.0)[:, None]
    for norm, dual in (("inf", 1), (2, 2)):
        drop = 0.1 * torch.linalg.vector_norm(row, dual, dim=1)
        least = (row * u).sum(1) - drop
        assert torch.allclose(fgsm(f, u, labels, 0.1, norm).margin, least)
        # Steps stop at a sample once it is wrong.
        got = pgd(f, u, labels, 0.1, norm, steps=20).margin
        close = 1e-9 if norm == "inf" else 0.02 * float(drop.max())  # along a sphere it only nears
        assert torch.allclose(got[least > 0], least[least > 0], rtol=0, atol=close)
        assert (got[least <= 0] <= 0).all()


def test_gradients_are_exact_through_the_equilibrium_in_eval_mode():
    layer, u, labels = problem(MonotoneLayer)
    layer.eval()
    x = u.clone().requires_grad_()
    margin = margin_of(layer(x), labels).sum()
    (g,) = torch.autograd.grad(margin, x)
    h, direction = 1e-6, torch.randn_like(u)
    with torch.no_grad():
        ends = [margin_of(layer(u + s * h * direction), labels).sum() for s in (1, -1)]
    assert float((ends[0] - ends[1]) / (2 * h)) == pytest.approx(
        float((g * direction).sum()), rel=1e-4
    )


def test_pgd_is_at_least_as_strong_as_one_step_and_takes_masks_and_ranges():
    layer, u, labels = problem()
    u = u.clamp(0, 1)
    labels = layer(u).argmax(1)
    one = fgsm(layer, u, labels, 0.3, clip=(0.0, 1.0))
    many = pgd(layer, u, labels, 0.3, restarts=3, clip=(0.0, 1.0))
    assert float(many.margin.clamp(min=0).sum()) <= float(one.margin.clamp(min=0).sum()) + 1e-6
    assert float(many.inputs.min()) >= 0 and float(many.inputs.max()) <= 1
    mask = torch.zeros_like(u, dtype=torch.bool)
    mask[:, 2] = True
    held = pgd(layer, u, labels, 0.3, mask=mask)
    assert torch.equal(held.inputs[~mask], u[~mask])
    again = [
        pgd(layer, u, labels, 0.1, generator=torch.Generator().manual_seed(3)).margin
        for _ in range(2)
    ]
    assert torch.equal(*again)


def test_sparse_attacks_change_k_inputs_and_stay_above_the_certificate():
    layer, u, labels = problem()
    for k in (1, 3):
        found = sparse_attack(layer, u, labels, 0.4, k)
        assert int((found.inputs != u).sum(1).max()) <= k
        assert float((found.inputs - u).abs().max()) <= 0.4 + 1e-12
        region = Budget(budget=float(k), scale=0.4 * torch.ones(P))
        proved = margins(layer, region, labels, "crown", around=u).amin(1)
        assert (found.margin >= proved - 1e-9).all()
    all_ = sparse_attack(layer, u, labels, 0.4, P)
    assert float(all_.margin.sum()) <= float(found.margin.sum()) + 1e-6
    # A monotone model outside the sets with a sensitivity matrix is attacked by its gradient.
    mono, v, own = problem(MonotoneLayer)
    with torch.no_grad():
        mono.P.mul_(3)
    own = mono(v).argmax(1)
    assert int((sparse_attack(mono, v, own, 0.4, 2).inputs != v).sum(1).max()) <= 2


def test_sensitivity_chooses_the_input_that_matters():
    B = torch.zeros(2, P)
    B[0, 4] = 5.0
    f = ImplicitModel(torch.zeros(2, 2), B, torch.eye(2), b=torch.tensor([1.0, 0.5]))
    S = sensitivity(f)
    assert int(S.sum(0).argmax()) == 4 and float(S[:, :4].abs().max()) == 0
    u, labels = torch.zeros(1, P), torch.tensor([0])
    found = sparse_attack(f, u, labels, 0.5, 1)
    assert found.inputs[0].nonzero().flatten().tolist() == [4] and bool(found.success)


def test_conditional_gradients_attack_any_set():
    layer, u, _ = problem()
    region = Ball(radius=0.3, norm=1, dimension=P)
    rows = torch.eye(Q)
    low, inputs = minimise(layer, region, rows, around=u, steps=10)
    assert region.contains(inputs - u[:, None]).all()
    with torch.no_grad():
        torch.testing.assert_close(layer(inputs)[:, range(Q), range(Q)], low)
        assert (low <= layer(u) + 1e-6).float().mean() > 0.9
    assert (low >= bounds(layer, region, "crown", around=u).lower - 1e-9).all()


# ---- training --------------------------------------------------------------------------------------


def network():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(P, N), nn.ReLU(), nn.Linear(N, N), nn.ReLU(), nn.Linear(N, Q))
    return net, to_implicit(net, torch.randn(2, P))


@pytest.mark.parametrize("norm", ["inf", 2])
@pytest.mark.parametrize("method", ["interval", "crown"])
def test_worst_margins_are_those_of_bounds(method, norm):
    layer, u, labels = problem()
    for model in (layer, network()[1]):
        got = worst_margins(model, 0.1, u, labels, norm=norm, method=method)
        options = {"refinements": 0} if method == "crown" else {}
        ref = margins(model, ball(u, 0.1, norm), labels, method, **options)
        ref = ref[ref.isfinite()].reshape(len(u), -1)
        # A certificate may also use 2-norms and sharper boxes; it is no looser than the loss.
        assert (ref >= got.detach() - 1e-6).all()
        if norm == "inf":
            torch.testing.assert_close(got.detach(), ref, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("method", ["interval", "crown"])
def test_the_gradient_of_the_loss_is_that_of_finite_differences(method):
    layer, u, labels = problem(m=4)
    loss = robust_loss(layer, 0.1, u, labels, method=method)
    loss.backward()
    for name in ("W", "B", "C", "b"):
        parameter = getattr(layer, name)
        direction = torch.randn_like(parameter)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * 1e-5 * direction)
                values.append(float(robust_loss(layer, 0.1, u, labels, method=method)))
                parameter.sub_(sign * 1e-5 * direction)
        slope = (values[0] - values[1]) / 2e-5
        assert slope == pytest.approx(float((parameter.grad * direction).sum()), rel=2e-3, abs=1e-6)


def test_at_radius_zero_the_loss_is_cross_entropy():
    layer, u, labels = problem()
    for model in (layer, network()[1]):
        plain = nn.functional.cross_entropy(model(u), labels)
        for method in ("interval", "crown"):
            loss = robust_loss(model, 0.0, u, labels, method=method)
            assert loss.item() == pytest.approx(plain.item(), rel=1e-5)


def test_training_for_certificates_raises_the_certified_share():
    torch.manual_seed(0)
    layer = ImplicitLayer(P, 2, N, well_posed=InfNormBall(kappa=0.9))
    u = torch.randn(200, P)
    labels = (u[:, 0] + 0.3 * u[:, 1] > 0).long()
    u[:, 0] += 0.3 * (2 * labels - 1)

    def share() -> float:
        return float(
            (margins(layer, ball(u, 0.2, "inf"), labels, "interval") > 0).all(1).double().mean()
        )

    before = share()
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = robust_loss(layer, 0.2, u, labels) + 1e-3 * sensitivity_penalty(layer)
        loss.backward()
        optimizer.step()
    assert layer.certificate().well_posed
    assert share() > max(0.6, before + 0.2)


def test_penalties_are_the_constants_they_stand_for():
    layer, u, _ = problem()
    S = (
        layer.C.abs() @ torch.linalg.inv(torch.eye(N) - layer.A.abs()) @ layer.B.abs()
        + layer.D.abs()
    )
    assert sensitivity_penalty(layer).item() == pytest.approx(S.sum(1).max().item())
    v = u + 0.1 * torch.randn_like(u)
    moved = (layer(v) - layer(u)).abs().amax(1)
    assert (moved <= lipschitz_penalty(layer) * (v - u).abs().amax(1)).all()
    lipschitz_penalty(layer).backward()
    assert layer.W.grad is not None and bool(layer.W.grad.abs().sum() > 0)
    mono, u, _ = problem(MonotoneLayer)
    moved = torch.linalg.vector_norm(mono(v) - mono(u), dim=1)
    assert (moved <= lipschitz_penalty(mono, 2) * torch.linalg.vector_norm(v - u, dim=1)).all()
    with pytest.raises(ValueError, match="MonotoneLayer"):
        lipschitz_penalty(layer, 2)
    with pytest.raises(ValueError, match="InfNormBall"):
        wild = ImplicitModel(torch.eye(2), torch.randn(2, P), torch.randn(Q, 2))
        lipschitz_penalty(wild)


@pytest.mark.parametrize(("cls", "norm"), [(ImplicitLayer, "inf"), (MonotoneLayer, 2)])
def test_the_lipschitz_loss_is_no_tighter_than_the_certificate(cls, norm):
    layer, u, labels = problem(cls)
    got = worst_margins(layer, 0.1, u, labels, norm=norm, method="lipschitz")
    ref = margins(layer, ball(u, 0.1, norm), labels, "lipschitz")
    ref = ref[ref.isfinite()].reshape(len(u), -1)
    assert (ref >= got.detach() - 1e-5).all()
    if cls is MonotoneLayer:  # m is the layer's own where the certificate measures it
        assert ((ref - got.detach()) / got.detach().abs().clamp(min=1)).mean() < 1
    robust_loss(layer, 0.1, u, labels, norm=norm, method="lipschitz").backward()
    assert bool(layer.C.grad.abs().sum() > 0) and bool(layer.B.grad.abs().sum() > 0)


# ---- refusals --------------------------------------------------------------------------------------


def test_bad_input_is_named():
    layer, u, labels = problem()
    with pytest.raises(ValueError, match="radius"):
        fgsm(layer, u, labels, -0.1)
    with pytest.raises(ValueError, match="norm: got 'l2'"):
        pgd(layer, u, labels, 0.1, "l2")
    with pytest.raises(ValueError, match="steps: got 0"):
        pgd(layer, u, labels, 0.1, steps=0)
    with pytest.raises(ValueError, match="labels: got"):
        pgd(layer, u, labels[:3], 0.1)
    with pytest.raises(ValueError, match="clip"):
        pgd(layer, u, labels, 0.1, clip=(0.0, 0.01))
    with pytest.raises(ValueError, match=r"k: got 7"):
        sparse_attack(layer, u, labels, 0.1, 7)
    bad = u.clone()
    bad[2, 1] = math.inf
    with pytest.raises(ValueError, match=r"index \(2, 1\)"):
        fgsm(layer, bad, labels, 0.1)
    with pytest.raises(ValueError, match="'crown', 'interval', 'lipschitz'"):
        robust_loss(layer, 0.1, u, labels, method="lp")
    with pytest.raises(ValueError, match="expected"):
        relaxation_attack(layer, u, labels, 0.1, method="sdp")
    with pytest.raises(ValueError, match="interval bound"):
        mono, v, own = problem(MonotoneLayer)
        with torch.no_grad():
            mono.P.mul_(3)
        robust_loss(mono, 0.1, v, own)
    with pytest.raises(ValueError, match="not monotone"):
        silu = ImplicitLayer(P, Q, N, activation="silu", well_posed=InfNormBall(kappa=0.5))
        robust_loss(silu, 0.1, u, labels)
