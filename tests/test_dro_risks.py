"""Risks of a vector of losses: against a convex solver, by proofs from both sides, by differences."""

import math

import cvxpy as cp
import numpy as np
import pytest
import torch

from implicitdl import dro

MEMBERS = [
    dro.CVaR(0.3),
    dro.CVaR(1.0),
    dro.ChiSquare(0.4),
    dro.ChiSquare(0.0),
    dro.KL(0.2),
    dro.KL(0.0),
]
LARGE = [dro.CVaR(1e-3), dro.ChiSquare(1e3), dro.KL(50.0)]
SMOOTH = [dro.ChiSquare(0.4), dro.ChiSquare(0.05), dro.KL(0.2), dro.KL(1e-4)]


def data(n, ties=False):
    l, p = torch.randn(n), torch.rand(n) + 0.05
    return (l.round() if ties else l), p / p.sum()


def convex(member, l, p):
    """The largest sum q l, by a solver that knows only the set."""
    q, p = cp.Variable(len(l), nonneg=True), p.numpy()
    if isinstance(member, dro.CVaR):
        near = [q <= p / member.alpha]
    elif isinstance(member, dro.ChiSquare):
        near = [0.5 * cp.sum(cp.multiply(1 / p, cp.square(q - p))) <= member.radius]
    else:
        near = [cp.sum(cp.rel_entr(q, p)) <= member.radius]
    problem = cp.Problem(cp.Maximize(q @ l.numpy()), [cp.sum(q) == 1, *near])
    return problem.solve(solver="CLARABEL")


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("member", MEMBERS[:1] + SMOOTH[:3] + LARGE, ids=str)
def test_value_is_that_of_a_convex_solver(member, ties):
    for n in (2, 5, 12):
        l, p = data(n, ties)
        assert float(member(l, p)) == pytest.approx(convex(member, l, p), abs=3e-6)


@pytest.mark.parametrize("member", MEMBERS + LARGE, ids=str)
@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_proofs_from_both_sides_meet(member, n):
    for ties in (False, True):
        l, p = data(n, ties)
        r = member.bracket(l, p)
        assert float(r.upper - r.lower) == pytest.approx(0.0, abs=1e-10)
        assert float(r.value) == pytest.approx(float(r.lower), abs=1e-12)
        assert float(r.weights.sum()) == pytest.approx(1.0, abs=1e-12)
        assert bool((r.weights >= 0).all())


@pytest.mark.parametrize("member", [MEMBERS[0], MEMBERS[2], MEMBERS[4]], ids=str)
def test_any_dual_number_and_any_weights_bound(member):
    l, p = data(15)
    value = float(member(l, p))
    for dual in (0.1, 0.5, 1.0, 3.0):
        assert float(member.upper(l, torch.tensor(dual), p)) >= value - 1e-12
    worst = member.weights(l, p)
    for t in (0.0, 0.3, 1.0):
        assert float(member.lower(l, (1 - t) * p + t * worst, p)) <= value + 1e-12
    with pytest.raises(ValueError, match="exceed the limit"):
        member.lower(l, torch.nn.functional.one_hot(l.argmin(), 15).double(), p)


@pytest.mark.parametrize("member", SMOOTH, ids=str)
def test_derivatives_of_value_and_weights(member):
    l, p = data(6)
    l.requires_grad_()
    assert torch.autograd.gradcheck(lambda l: member(l, p), l)
    assert torch.autograd.gradcheck(lambda l: member.weights(l, p), l)
    assert torch.autograd.gradgradcheck(lambda l: member(l, p), l)
    (g,) = torch.autograd.grad(member(l, p), l)
    torch.testing.assert_close(g, member.weights(l, p).detach())


@pytest.mark.parametrize("member", [*MEMBERS[:1], *SMOOTH[:1], *SMOOTH[2:3]], ids=str)
def test_batches_dtypes_and_scale(member):
    l = torch.randn(3, 4, 9)
    one = torch.stack([member(row) for row in l.flatten(0, 1)]).view(3, 4)
    torch.testing.assert_close(member(l), one)
    assert member(l.float()).dtype == torch.float32
    torch.testing.assert_close(member(1e-8 * l), 1e-8 * member(l))
    torch.testing.assert_close(member(l + 1e4), member(l) + 1e4)
    assert bool((member(l) >= l.mean(-1) - 1e-12).all())


def test_known_values():
    l = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert float(dro.cvar(l, 0.5)) == 3.5
    assert float(dro.cvar(l, 0.375)) == pytest.approx((4 * 0.25 + 3 * 0.125) / 0.375)
    # Small chi-square balls: mean + sqrt(2 rho variance), exactly while no weight is zero.
    assert float(dro.chi_square(l, 0.01)) == pytest.approx(2.5 + math.sqrt(0.02 * 1.25))
    assert float(dro.kl(l, math.log(4))) == pytest.approx(4.0)
    assert float(dro.kl(torch.full((5,), 2.0), 0.3)) == pytest.approx(2.0)


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda: dro.cvar(torch.ones(3), 0.0), "alpha: got 0"),
        (lambda: dro.chi_square(torch.ones(3), -1.0), "radius: got -1"),
        (lambda: dro.kl(torch.tensor([1.0, math.nan]), 0.1), r"nan at index \(1,\)"),
        (lambda: dro.cvar(torch.tensor(1.0), 0.5), "reduction='none'"),
        (lambda: dro.kl(torch.ones(2), 0.1, reference=torch.ones(2)), "sum to 2, expected 1"),
        (lambda: dro.kl(torch.ones(2), 0.1, reference=torch.tensor([1.5, -0.5])), ">= 0"),
        (lambda: dro.maximin(torch.ones(2), torch.ones(3, 2)), "sum to 2, expected 1"),
        (lambda: dro.GroupDRO(torch.tensor([3, 0, 2])), r"no samples \(group 1\)"),
        (
            lambda: dro.reweighted(torch.ones(2), torch.zeros(2).long(), torch.tensor([2, 0])),
            "no samples",
        ),
        (lambda: dro.GroupDRO(torch.tensor([3]), eta=-1.0), "eta: got -1"),
        (lambda: dro.GroupDRO.of_groups(torch.tensor([0, 2])), r"no samples \(group 1\)"),
        (lambda: dro.GroupDRO(torch.tensor([3.0, math.nan])), r"sizes: got nan at index \(1,\)"),
        (
            lambda: dro.group_means(torch.ones(2), torch.zeros(2).long(), 0),
            "number_of_groups: got 0",
        ),
        (lambda: dro.CVaR(0.5).upper(torch.ones(2), torch.tensor(math.nan)), "dual: got nan"),
        (lambda: dro.CVaR(0.5).lower(torch.ones(2), torch.ones(2)), "sum to 2, expected 1"),
        (lambda: dro.KL(0.1).bracket(torch.ones(2), weights=torch.ones(2)), "sum to 2, expected 1"),
        (lambda: dro.maximin(torch.ones(2), weights=torch.ones(2), certified=True), "sum to 2"),
        (
            lambda: dro.maximin(
                torch.ones(2), weights=torch.tensor([math.nan, 1.0]), certified=True
            ),
            r"weights: got nan at index \(0,\)",
        ),
        (lambda: dro.GroupDRO(torch.tensor([3]))(torch.ones(1), torch.tensor([4])), "got 4"),
    ],
)
def test_bad_input(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_maximin():
    l = torch.tensor([1.0, 5.0, 3.0], requires_grad=True)
    family = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.2, 0.8]])
    r = dro.maximin(l, family, certified=True, weights=torch.tensor([0.5, 0.5]))
    assert float(r.value.detach()) == pytest.approx(3.4)
    assert float(r.lower.detach()) == pytest.approx(3.2)
    assert float(r.upper.detach()) == pytest.approx(3.4)
    (g,) = torch.autograd.grad(dro.maximin(l, family), l)
    torch.testing.assert_close(g, family[1])


def test_group_means_and_reweighting():
    l, g = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 2])
    means, counts = dro.group_means(l, g, 3)
    assert means.tolist() == [2.0, 0.0, 5.0] and counts.tolist() == [2, 0, 1]
    two = torch.stack([l, 2 * l])
    torch.testing.assert_close(dro.group_means(two, g, 3)[0][1], 2 * means)
    sizes = torch.tensor([2, 1])
    groups = torch.tensor([0, 0, 1])
    assert float(dro.reweighted(l, groups, sizes)) == pytest.approx(3.5)  # the mean of 2 and 5


def test_group_weights_follow_the_reference_rule():
    risk = dro.GroupDRO(torch.tensor([50, 40, 10]), eta=0.3, adjustment=2.0)
    l, g = torch.tensor([0.5, 1.5, 2.0], requires_grad=True), torch.tensor([0, 0, 2])
    value = risk(l, g)
    adjusted = np.array([1.0 + 2 / math.sqrt(50), 0.0, 2.0 + 2 / math.sqrt(10)])
    q = np.exp(0.3 * adjusted) / np.exp(0.3 * adjusted).sum()  # the absent group's factor is 1
    np.testing.assert_allclose(risk.weights.numpy(), q)
    assert float(value.detach()) == pytest.approx(q[0] * adjusted[0] + q[2] * adjusted[2])
    (grad,) = torch.autograd.grad(value, l)
    np.testing.assert_allclose(grad.numpy(), [q[0] / 2, q[0] / 2, q[2]])
    risk.eval()
    risk(l, g)
    np.testing.assert_allclose(risk.weights.numpy(), q)
    other = dro.GroupDRO(torch.tensor([50, 40, 10]))
    other.load_state_dict(risk.state_dict())
    torch.testing.assert_close(other.weights, risk.weights)
    r = risk.bracket(l.detach(), g)
    assert float(r.lower) <= float(r.upper) == pytest.approx(adjusted[2])


def test_group_weights_reach_the_worst_group():
    risk = dro.GroupDRO.of_groups(torch.tensor([0, 0, 1, 1, 1]), eta=0.5)
    for _ in range(200):
        risk(torch.tensor([0.1, 0.1, 1.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1, 1]))
    assert float(risk.weights[1]) > 0.999
    r = risk.bracket(torch.tensor([0.1, 0.1, 1.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1, 1]))
    assert float(r.upper - r.lower) < 1e-3


@pytest.mark.parametrize("member", MEMBERS)
def test_under_vmap(member):
    l = torch.rand(3, 6, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(member)(l), member(l))
    slopes = torch.func.vmap(torch.func.grad(member))(l)
    leaf = l.clone().requires_grad_()
    torch.testing.assert_close(slopes, torch.autograd.grad(member(leaf).sum(), leaf)[0])


@pytest.mark.parametrize("member", MEMBERS + LARGE)
def test_losses_that_differ_by_rounding(member):
    l = 1e6 + 1e-8 * torch.randn(4, 40, dtype=torch.float64)
    r = member.bracket(l)
    assert bool((r.lower <= r.upper + 1e-6).all())
    torch.testing.assert_close(r.value, torch.full((4,), 1e6, dtype=torch.float64))
