"""Implicit layers from the states of trained networks: programs, layers, refusals, processes."""

import itertools
import math
import os
import tempfile
from dataclasses import replace

import pytest
import torch
from problems import randn
from torch import Tensor, nn

from implicitdl import ConvergenceError, ImplicitLayer, ImplicitModel, to_implicit
from implicitdl.states import (
    L1,
    FitReport,
    Group,
    LowRank,
    Penalty,
    Perspective,
    RowProgram,
    fit_states,
)
from implicitdl.states.recording import Sharing, gather
from implicitdl.states.unique import least_squares, shortest

KAPPA = 0.5


def program(
    samples: int = 80, n: int = 8, p: int = 9, r: int = 5, ball: bool = True, noise: float = 0.3
) -> RowProgram:
    """Rows whose balls bind for some and not for others, two features nearly equal, one dead."""
    F = torch.cat([torch.relu(randn(samples, n)), randn(samples, p, seed=1)], 1)
    F[:, 3] = F[:, 4] + 1e-3 * randn(samples, seed=2)
    F[:, n + 2] = 0.0
    W = randn(n + p, r, seed=3) * (randn(n + p, r, seed=4) > 0.3)
    Z = F @ W + noise * randn(samples, r, seed=5)
    weights = torch.zeros(n + p)
    weights[:n] = torch.linspace(0.5, 1.5, n)
    return RowProgram(
        gram=F.mT @ F / samples, cross=Z.mT @ F / samples, energy=Z.square().sum(0) / samples,
        weights=weights if ball else None, radius=torch.linspace(0.3, 4.0, r) if ball else None,
    )  # fmt: skip


def optimum(problem: RowProgram, penalty: Penalty) -> Tensor:
    """The objective of each row, or of all, by a general solver."""
    import cvxpy as cp

    r, d = problem.cross.shape
    W = cp.Variable((r, d))
    values, Q = torch.linalg.eigh(problem.gram)
    root = (values.clamp_min(0).sqrt()[:, None] * Q.mT).numpy()  # root' root = F'F
    fits = [
        0.5 * cp.sum_squares(root @ W[i]) - problem.cross[i].numpy() @ W[i]
        + 0.5 * float(problem.energy[i])
        for i in range(r)
    ]  # fmt: skip
    if isinstance(penalty, Group):
        extra = penalty.weight * math.sqrt(r) * cp.sum(cp.norm(W, axis=0))
        parts = [sum(fits) + extra]
    elif isinstance(penalty, Perspective):
        # Not the closed form: the perspective itself, s t >= m^2, with mu t + gamma s.
        t, s = cp.Variable((r, d)), cp.Variable((r, d))
        cones = [t >= 0, t <= 1]
        cones += [cp.SOC(t[i] + s[i], cp.vstack([2 * W[i], t[i] - s[i]]), axis=0) for i in range(r)]
        mu = penalty.weight**2 / (4 * penalty.ridge)
        parts = [f + mu * cp.sum(t[i]) + penalty.ridge * cp.sum(s[i]) for i, f in enumerate(fits)]
    else:
        parts = [f + penalty.weight * cp.norm1(W[i]) for i, f in enumerate(fits)]
    within = cones if isinstance(penalty, Perspective) else []
    if problem.radius is not None:
        v = problem.weights.numpy()
        within += [v @ cp.abs(W[i]) <= float(problem.radius[i]) for i in range(r)]
    cp.Problem(cp.Minimize(sum(parts)), within).solve(
        solver="CLARABEL", tol_gap_abs=1e-9, tol_gap_rel=1e-9, tol_feas=1e-9
    )
    return torch.tensor([float(part.value) for part in parts])


def length(problem: RowProgram, W: Tensor) -> Tensor:
    return (W.abs() * problem.weights).sum(1)


# ---- the programs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ball", [True, False], ids=["ball", "free"])
@pytest.mark.parametrize("penalty", [
    L1(weight=0.1), L1(weight=1e-3), Perspective(weight=0.1, ridge=0.05),
    Perspective(weight=1e-2, ridge=0.3), Group(weight=0.1),
], ids=str)  # fmt: skip
def test_programs_are_solved_to_their_optimum(penalty, ball):
    problem = program(ball=ball)
    solution = problem.solve(penalty)
    expected = optimum(problem, penalty)
    allowed = 2e-8 if penalty.entrywise else 1e-6
    torch.testing.assert_close(solution.objective.reshape(-1), expected, rtol=allowed, atol=2e-8)
    if ball:
        assert bool((length(problem, solution.W) <= problem.radius * (1 + 1e-14)).all())
        tight = length(problem, solution.W) > problem.radius * (1 - 1e-9)
        assert bool(tight.any()) and not bool(tight.all())
    assert not solution.W[:, 10].any()  # the dead feature
    if penalty.entrywise:
        assert float(solution.gap.max()) < 1e-11


@pytest.mark.parametrize("weight", [1e-3, 1e-6, 1e-9, 1e-12])
def test_a_tiny_penalty_does_not_stall(weight):
    """More features than samples, and equal ones: least squares alone would have many answers."""
    F = randn(30, 40)
    F[:, 5] = F[:, 6]
    Z = randn(30, 6, seed=1)
    ball = torch.cat([torch.ones(20), torch.zeros(20)])
    problem = RowProgram(
        gram=F.mT @ F, cross=Z.mT @ F, energy=Z.square().sum(0), weights=ball,
        radius=torch.full((6,), 0.5),
    )  # fmt: skip
    if weight == 1e-12:  # below the rounding of F'F w: the support is not to be had
        with pytest.raises(ConvergenceError, match="of its energy above.*raise its weight"):
            problem.solve(L1(weight=weight))
        return
    solution = problem.solve(L1(weight=weight))
    assert float((solution.gap / problem.energy).max()) <= 1e-9
    assert int((solution.W != 0).sum(1).max()) <= 31  # no more than samples, and the ball's one
    assert bool((length(problem, solution.W) <= 0.5 + 1e-12).all())
    assert solution.steps[1] < 300


@pytest.mark.parametrize("phi", [nn.ReLU(), nn.LeakyReLU()], ids=str)
def test_dependent_supports_do_not_stall(phi):
    """An always-on unit makes a support dependent to the last digit on the way: no face to go on."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), phi, nn.Linear(12, 8), phi, nn.Linear(8, 3))
    _, report = fit_states(net, torch.randn(400, 6))
    assert report.gap < 1e-9 * 20 and report.agreement > 0.95


@pytest.mark.parametrize("penalty", [L1(0.01), Perspective(0.01, ridge=0.05)], ids=str)
@pytest.mark.parametrize("works", ["zero", "a better point"])
def test_a_start_that_leads_nowhere_is_left_for_another(penalty, works, monkeypatch):
    """Newton's method made to stay where it is, but from one kind of start."""
    from implicitdl.states import rows

    calls, whole = [], rows.finish

    def stuck(program, penalty, W, *rest):
        zero = not bool(W.any())
        calls.append(zero)
        if zero == (works == "zero") and len(calls) > 1:
            return whole(program, penalty, W, *rest)
        return W, 1, torch.zeros(len(W), dtype=torch.bool)

    monkeypatch.setattr(rows, "finish", stuck)
    problem = program()
    solution = problem.solve(penalty)
    assert calls == ([False, True] if works == "zero" else [False, True, False])
    torch.testing.assert_close(solution.objective, optimum(problem, penalty), rtol=2e-8, atol=2e-8)


@pytest.mark.parametrize("seed", range(12))
def test_random_networks_are_all_fitted(seed):
    g = torch.Generator().manual_seed(seed)

    def one(*choices):
        return choices[int(torch.randint(len(choices), (), generator=g))]

    torch.manual_seed(seed)
    sizes, phi = (one(2, 6), one(3, 8, 12), one(3, 8)), (nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.ELU)
    net = mlp(one(*phi)(), (*sizes, 2))
    u = one(0.1, 1.0, 3.0) * randn(one(20, 60, 203), sizes[0], seed=seed)
    kappa = one(0.1, 0.5, 0.9)
    weight = one(0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    _, report = fit_states(net, u, penalty=weight, kappa=kappa)
    assert report.norm <= kappa and report.certificate.well_posed
    assert weight == 0 or report.gap <= 1e-9 * len(report.fit)


@pytest.mark.parametrize("seed", range(12))
def test_programs_of_many_kinds(seed):
    """Few samples or many, dead, equal and dependent features, scales far apart, all penalties."""
    g = torch.Generator().manual_seed(seed)

    def one(*choices):
        return choices[int(torch.randint(len(choices), (), generator=g))]

    m, n, p, r = one(10, 40, 200), one(1, 5, 30), one(4, 40), one(1, 4, 20)
    F = torch.cat([torch.relu(randn(m, n, seed=seed) + one(-2, 0, 2)), randn(m, p, seed=99)], 1)
    if one(True, False):
        F[:, 1] = F[:, 0]
        F[:, 2] = F[:, 0] + F[:, -1]
    F = F * torch.exp(one(0, 3) * randn(n + p, seed=seed + 50))
    Z = F @ randn(n + p, r, seed=seed + 60) * one(0, 1) + one(1e-3, 1) * randn(m, r, seed=seed + 70)
    F, Z = F / F.norm(dim=0).clamp_min(1e-9), Z / Z.norm(dim=0)
    weights = torch.cat([randn(n, seed=seed + 80).exp(), torch.zeros(p)])
    problem = RowProgram(
        gram=F.mT @ F, cross=Z.mT @ F, energy=Z.square().sum(0), weights=weights,
        radius=10.0 ** one(-3, -1, 1) * torch.linspace(0.1, 1, r),
    )  # fmt: skip
    weight = one(1e-6, 1e-4, 1e-2, 0.3)
    for penalty in (L1(weight=weight), Perspective(weight=weight, ridge=one(1e-4, 1e-2, 1.0))):
        solution = problem.solve(penalty)
        assert float((solution.gap / problem.energy).max()) <= 1e-9
        assert bool((length(problem, solution.W) <= problem.radius * (1 + 1e-13)).all())


def test_an_unbounded_program_is_refused():
    bad = RowProgram(
        gram=torch.diag(torch.tensor([1.0, 0.0])), cross=torch.ones(1, 2), energy=torch.ones(1)
    )
    with pytest.raises(ConvergenceError, match="1 of 1 rows were not solved.*raise its weight"):
        bad.solve(L1(weight=0.0))


def test_the_gap_is_a_bound_at_any_point():
    problem = program()
    for penalty in (L1(weight=0.05), Perspective(weight=0.05, ridge=0.1)):
        best = problem.solve(penalty)
        for seed in range(5):
            W = problem.inside(best.W + 0.3**seed * randn(*best.W.shape, seed=seed))
            above = problem.objective(W, penalty) - best.objective
            assert bool((above >= -1e-13).all())
            assert bool((problem.gap(W, penalty) >= above - 1e-13).all())


@pytest.mark.parametrize("penalty", [L1(weight=0.3), Perspective(weight=0.3, ridge=0.2)], ids=str)
def test_proximity_operators_are_where_nothing_nearby_is_lower(penalty):
    problem = replace(program(), allowed=randn(5, 17, seed=9) > -1)
    V = 3 * randn(5, 17)
    for t in (0.1, 1.0, 7.0):
        W = problem.prox(penalty, V, t)
        value = t * penalty.value(W) + 0.5 * (W - V).square().sum(1)
        assert bool((length(problem, W) <= problem.radius + 1e-13).all())
        assert not W[~problem.allowed].any()
        for seed in range(40):
            other = problem.inside(W + 10.0 ** -(seed % 5) * randn(5, 17, seed=seed))
            there = t * penalty.value(other) + 0.5 * (other - V).square().sum(1)
            assert bool((there >= value - 1e-12).all())


def test_the_reversed_huber_function_is_the_perspective():
    penalty = Perspective(weight=0.4, ridge=0.5)
    mu, m = penalty.price, torch.linspace(-2, 2, 41)
    t = torch.linspace(1e-4, 1, 20001)[:, None]
    least = (mu * t + penalty.ridge * m**2 / t).amin(0)
    torch.testing.assert_close(penalty.value(m[:, None]), least, rtol=0, atol=1e-4)
    size = m.abs().requires_grad_()
    slope = torch.autograd.grad(penalty.value(size[:, None]).sum(), size)[0]
    inside = m != 0
    torch.testing.assert_close(slope[inside], penalty.slope(m.abs())[inside])
    v = torch.linspace(0, 3, 31)
    s = torch.linspace(0, 5, 50001)[:, None]
    sup = (v * s - penalty.value(s.reshape(-1, 1)).reshape(-1, 1)).amax(0)
    torch.testing.assert_close(penalty.conjugate(v), sup, rtol=0, atol=1e-6)


@pytest.mark.parametrize("make, words", [
    (lambda: L1(weight=-1.0), "weight: got -1.0, expected a finite number at least 0"),
    (lambda: L1(weight=math.nan), "weight: got nan"),
    (lambda: Perspective(ridge=0.0), "ridge: got 0.0, expected a finite number above 0"),
    (lambda: Group(weight=math.inf), "weight: got inf"),
    (lambda: LowRank(rank=0), "rank: got 0"),
    (lambda: LowRank(0), "rank: got 0"), (lambda: L1(-2.0), "weight: got -2.0"),
    (lambda: Group(0.0), "weight: got 0.0"), (lambda: Perspective(-1.0), "weight: got -1.0"),
])  # fmt: skip
def test_penalties_refuse_what_is_no_weight(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# ---- one answer of many ------------------------------------------------------------------------------


def dependent(samples: int = 60) -> RowProgram:
    """Columns 6 and 7 are sums of others, 2 and 3 are equal; the rows' energy is one."""
    F = randn(samples, 8)
    F[:, 3] = F[:, 2]
    F[:, 6], F[:, 7] = F[:, 0] - F[:, 1], F[:, 2] + 0.5 * F[:, 4] - F[:, 5]
    F = F / F.norm(dim=0)
    Z = F @ randn(8, 4, seed=1) + 0.1 * randn(samples, 4, seed=2)
    Z = Z / Z.norm(dim=0)
    weights = torch.cat([torch.linspace(0.8, 1.2, 6), torch.zeros(2)])
    return RowProgram(
        gram=F.mT @ F, cross=Z.mT @ F, energy=torch.ones(4), weights=weights,
        radius=torch.tensor([0.05, 0.3, 0.8, 100.0]),
    )  # fmt: skip


def test_least_squares_is_the_shortest_there_is():
    problem = dependent()
    W = least_squares(problem, torch.ones(4, 8, dtype=torch.bool)).W
    shortest = torch.linalg.lstsq(problem.gram, problem.cross.mT, rcond=1e-12, driver="gelsd")
    torch.testing.assert_close(W[3], shortest.solution[:, 3], rtol=1e-9, atol=1e-9)  # free
    assert bool((length(problem, W) <= problem.radius * (1 + 1e-14)).all())
    import cvxpy as cp

    values, Q = torch.linalg.eigh(problem.gram)
    root = (values.clamp_min(0).sqrt()[:, None] * Q.mT).numpy()
    for i in range(3):  # lexicographic, by a general solver: the fit, then the length
        w, v = cp.Variable(8), problem.weights.numpy()
        inside = [v @ cp.abs(w) <= float(problem.radius[i])]
        fit = 0.5 * cp.sum_squares(root @ w) - problem.cross[i].numpy() @ w + 0.5
        cp.Problem(cp.Minimize(fit + 0.5e-6 * cp.sum_squares(w)), inside).solve(
            solver="CLARABEL", tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11
        )
        assert float(problem.fit(W)[i]) <= float(fit.value) + 1e-9
        torch.testing.assert_close(W[i], torch.as_tensor(w.value), rtol=0, atol=1e-4)


@pytest.mark.parametrize("penalty", [
    L1(0.02), L1(1e-4), L1(0.0), Perspective(0.02, ridge=0.01)
], ids=str)  # fmt: skip
def test_the_answer_does_not_depend_on_where_newton_begins(penalty):
    problem = dependent()
    answers = []
    for seed in range(4):
        start = problem.inside(torch.sign(randn(4, 8, seed=seed)) * randn(4, 8, seed=seed + 9))
        answers.append(shortest(problem, penalty, start)[0])
    for other in answers[1:]:
        torch.testing.assert_close(other, answers[0], rtol=0, atol=1e-10)
    best = problem.objective(problem.solve(penalty).W, penalty) if not penalty.nothing else None
    if best is not None:  # the ridge does not show
        torch.testing.assert_close(problem.objective(answers[0], penalty), best, rtol=0, atol=1e-9)
        twins = answers[0][3, 2:4]  # their weights in the ball do not count where it is not full
        assert float((twins[0] - twins[1]).abs()) < 1e-9


def awkward(kind: str) -> nn.Sequential:
    net = mlp(sizes=(6, 12, 8, 3))
    with torch.no_grad():
        if kind == "units that are always on":
            net[0].bias[:3], net[2].bias[:2] = 9.0, 20.0
        if kind == "units that are never on":
            net[0].bias[:3], net[2].bias[:2] = -20.0, -40.0
        if kind == "twin units":
            for layer in (net[0], net[2]):
                layer.weight[1], layer.bias[1] = layer.weight[0], layer.bias[0]
            net[2].weight[:, 1] = net[2].weight[:, 0]
    return net


AWKWARD = ("any", "units that are always on", "units that are never on", "twin units")


@pytest.mark.parametrize("kind", [*AWKWARD, "twin features"])
@pytest.mark.parametrize("penalty, refit", [
    (1e-2, True), (1e-3, True), (1e-2, False), (0.0, True), (LowRank(3), True),
], ids=str)  # fmt: skip
def test_the_order_of_samples_does_not_matter(kind, penalty, refit):
    net, u = awkward(kind), randn(203, 6)
    if kind == "twin features":
        u[:, 1] = u[:, 0]
    first, one = fit_states(net, u, penalty=penalty, refit=refit)
    other, two = fit_states(net, u[torch.randperm(203)], penalty=penalty, refit=refit)
    assert one.entries == two.entries or penalty == 0.0  # where all entries may be there
    # Eigenvalues of 1e-6 of what all states and features span make rounding that much larger.
    near = 1e-10 if penalty in (1e-2, 1e-3) else 1e-8
    for name, value in matrices(first).items():
        torch.testing.assert_close(
            getattr(other, name).detach(), value, rtol=near, atol=near, msg=f"{kind} {name}"
        )


# ---- what is recorded ------------------------------------------------------------------------------


def test_moments_of_batches_are_those_of_all_samples():
    F, Z = 1e4 + randn(60, 4), randn(60, 3, seed=1) - 1e5
    batches = zip(F.split(7), Z.split(7), strict=True)
    m = gather(batches, Sharing(), (4, 3), F)
    f, z = F - F.mean(0), Z - Z.mean(0)
    assert m.count == 60
    torch.testing.assert_close(m.gram, f.mT @ f, rtol=1e-10, atol=1e-8)
    torch.testing.assert_close(m.cross, z.mT @ f, rtol=1e-10, atol=1e-8)
    torch.testing.assert_close(m.energy, z.square().sum(0), rtol=1e-10, atol=1e-8)


def test_sums_of_products_are_rounded_once():
    """Against fractions, which round nothing; plain products are off by tens of last places."""
    from fractions import Fraction

    F = 3 + randn(3000, 2) * torch.tensor([1.0, 1e-3])
    F = F - F.mean(0)
    moments = gather(iter([(F, F)]), Sharing(), (2, 2), F)
    f = F - F.mean(0)
    columns = [[Fraction(v) for v in f[:, j].tolist()] for j in range(2)]
    for i, j in ((0, 0), (0, 1), (1, 1)):
        true = float(sum(a * b for a, b in zip(columns[i], columns[j], strict=True)))
        scale = float(f[:, i].norm() * f[:, j].norm())
        assert abs(float(moments.gram[i, j]) - true) <= 2.3e-16 * max(abs(true), 1e-3 * scale)
        assert abs(float(moments.cross[i, j]) - true) <= 2.3e-16 * max(abs(true), 1e-3 * scale)


def test_a_feature_that_only_rounding_moves_is_none():
    u = randn(100, 6)
    u[:, 2] = 0.1 + 1e-16 * torch.sign(u[:, 2])
    u[:, 3] = 1e9
    layer, _ = fit_states(mlp(), u, penalty=1e-4)
    assert not layer.B[:, 2:4].any() and float(layer.B.detach().abs().max()) < 100


# ---- layers ----------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.out = nn.Linear(6, 7), nn.Linear(7, 7), nn.Linear(7, 3)

    def forward(self, u):
        x = torch.relu(self.first(u))
        return self.out(torch.relu(x + self.second(x)))


def mlp(phi: nn.Module | None = None, sizes: tuple[int, ...] = (6, 8, 7, 3)) -> nn.Sequential:
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), phi or nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def looped() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), ImplicitLayer(4, 3, 5))


def normalised() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.LeakyReLU(0.2), nn.Linear(8, 3))
    net(2 + randn(50, 6))
    return net.eval()


NETWORKS = {
    "perceptron": mlp,
    "tanh": lambda: mlp(nn.Tanh()),
    "residual": Residual,
    "batch normalisation": normalised,
    "a layer with a loop": looped,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_matched_where_nothing_is_asked_but_the_ball(name):
    """The scaling makes exact matching feasible: outputs agree to what the tiny penalty costs."""
    net, u = NETWORKS[name](), randn(300, 6)
    layer, report = fit_states(net, u, kappa=0.9, penalty=1e-7)
    assert report.scaled and float(report.fit.max()) < 1e-3
    new = randn(50, 6, seed=5)
    torch.testing.assert_close(layer(new), net(new), rtol=0, atol=1e-3)
    assert report.norm <= 0.9 and layer.certificate().well_posed
    assert report.certificate.well_posed and report.agreement > 0.99


def test_images_and_convolutions():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 3)
    )
    u = randn(400, 1, 6, 6)
    layer, report = fit_states(net, u, penalty=1e-6)
    torch.testing.assert_close(layer(u.flatten(1)), net(u), rtol=0, atol=1e-2)
    assert float(report.fit.max()) < 1e-2 and (layer.in_features, layer.out_features) == (36, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("penalty, kappa", [
    (0.3, 0.95), (1e-5, 0.2), (1e-2, 0.5), (Perspective(weight=0.1, ridge=0.1), 0.2),
    (Group(weight=0.2), 0.95), (LowRank(rank=3), 0.2), (LowRank(rank=5), 0.95),
], ids=str)  # fmt: skip
def test_the_constraint_holds_exactly(penalty, kappa, dtype):
    net = mlp().to(dtype)
    layer, report = fit_states(net, randn(200, 6).to(dtype), penalty=penalty, kappa=kappa)
    assert layer.A.dtype == dtype
    norm = float(layer.A.detach().double().abs().sum(1).max())
    assert norm <= kappa + 1e-12 and report.norm == pytest.approx(norm, abs=1e-12)
    if not isinstance(penalty, LowRank):
        torch.testing.assert_close(layer.A, layer.W, rtol=0, atol=0)  # nothing left to scale


def test_a_weighted_ball_where_the_scaling_cannot_be_absorbed():
    layer, report = fit_states(mlp(nn.Tanh()), randn(200, 6), penalty=1e-3, kappa=0.9)
    v = layer.well_posed.weights
    assert float(((layer.A.detach().abs() * v).sum(1) / v).max()) <= 0.9 + 1e-12
    assert float(layer.A.detach().abs().sum(1).max()) > 0.9 and layer.certificate().well_posed
    assert "weights" in str(layer.well_posed) and report.norm <= 0.9


def test_penalties_do_what_they_say():
    net, u = mlp(sizes=(12, 16, 14, 3)), randn(400, 12)
    with torch.no_grad():
        net[0].weight[:, :4] = 0.0  # four features that nobody reads
        net[2].weight[:, 5:] *= 1e-3  # states that hardly matter
    totals = []
    for weight in (1e-6, 1e-2, 0.1, 0.5):
        layer, report = fit_states(net, u, penalty=weight)
        totals.append(report.total)
        assert report.entries["A"] == int((layer.A != 0).sum())
        assert report.total == sum(int((t != 0).sum()) for t in
                                   (layer.A, layer.B, layer.C, layer.D, layer.b, layer.d))  # fmt: skip
    assert totals == sorted(totals, reverse=True) and totals[0] > 2 * totals[-1]
    layer, report = fit_states(net, u, penalty=Group(weight=0.1))
    assert len(report.states) < 25 and set(report.features) <= set(range(4, 12))
    assert layer.state_features == len(report.states)
    assert not layer.B[:, :4].any() and not layer.D[:, :4].any()
    layer, report = fit_states(net, u, penalty=LowRank(rank=2))
    assert layer.low_rank == 2 and int(torch.linalg.matrix_rank(layer.A.detach())) <= 2
    layer, report = fit_states(net, u, penalty=1e-2, connections="upper")
    assert report.certificate.condition == "strictly block-triangular"
    assert len(report.certificate.components) == 0


def test_low_rank_rows_are_the_best_of_their_rank():
    """Against alternating least squares from many starts, where the ball does not bind."""
    from implicitdl.states.fitting import normed
    from implicitdl.states.lowrank import fit_low_rank

    X, U, Z = randn(60, 6), randn(60, 3, seed=1), randn(60, 6, seed=2)
    moments = gather(iter([(torch.cat([X, U], 1), Z)]), Sharing(), (9, 6), X)
    weights = torch.cat([torch.ones(6), torch.zeros(3)])
    rows = normed(moments, weights, torch.full((6,), 1e3), None)
    (L, R, B), _ = fit_low_rank(rows, 6, 2, Sharing())
    W = torch.cat([L @ R.mT, B], 1)
    found = float(rows.program.fit(W).sum())
    G, H = rows.program.gram, rows.program.cross
    best = math.inf
    for seed in range(6):
        right = randn(6, 2, seed=10 + seed)
        for _ in range(400):
            T = torch.block_diag(right, torch.eye(3))
            left = torch.linalg.solve(T.mT @ G @ T, (H @ T).mT).mT
            l, b = left[:, :2], left[:, 2:]
            # With l fixed, right solves vec equations: G_xx right (l'l) = (H_x - b G_ux)' l.
            right = torch.linalg.solve(
                G[:6, :6], torch.linalg.solve(l.mT @ l, ((H[:, :6] - b @ G[6:, :6]).mT @ l).mT).mT
            )
        W = torch.cat([l @ right.mT, b], 1)
        best = min(best, float(rows.program.fit(W).sum()))
    assert found == pytest.approx(best, rel=1e-8)
    tight = replace(rows, program=replace(rows.program, radius=torch.full((6,), 0.2)))
    (L, R, _), _ = fit_low_rank(tight, 6, 2, Sharing())
    lengths = ((L @ R.mT).abs() * tight.program.weights[:6]).sum(1)
    assert bool((lengths <= 0.2 + 1e-14).all()) and float(lengths.max()) > 0.2 - 1e-8


def test_the_readout_is_fitted_on_the_new_states():
    """C, D and d are the least squares of y on the states that the layer has, not the network's."""
    net, u = mlp(), randn(150, 6)
    layer, report = fit_states(net, u, penalty=0.2, readout=0.0)
    x = layer.solve(u).value.detach()
    F = torch.cat([x, u, torch.ones(150, 1)], 1)
    best = torch.linalg.lstsq(F, net(u).detach(), driver="gelsd").solution
    torch.testing.assert_close(layer(u), F @ best, rtol=0, atol=1e-7)
    y = net(u).detach()
    rest = (y - F @ best).norm(dim=0) / (y - y.mean(0)).norm(dim=0)
    torch.testing.assert_close(report.readout_fit, rest, rtol=1e-6, atol=1e-8)


def test_the_fit_of_each_row_is_what_its_support_allows():
    net, u = mlp(), randn(150, 6)
    model = to_implicit(net, u[:1])
    layer, report = fit_states(net, u, penalty=0.1)
    x = model.solve(u).value.detach()
    M = model.dense()
    z = (x @ M.A.mT + u @ M.B.mT + M.b).detach()
    at = list(report.states)
    A = torch.zeros(15, 15)
    s = report.scaling
    A[torch.tensor(at)[:, None], torch.tensor(at)] = layer.A.detach() * s[:, None] / s
    B = torch.zeros(15, 6)
    B[at] = layer.B.detach() * s[:, None]
    for i in at:
        on = torch.cat([A[i], B[i]]) != 0
        F = torch.cat([x, u], 1)[:, on]
        F = torch.cat([F, torch.ones(150, 1)], 1)
        rest = z[:, i] - F @ torch.linalg.lstsq(F, z[:, i : i + 1]).solution[:, 0]
        least = float(rest.norm() / (z[:, i] - z[:, i].mean()).norm())
        assert float(report.fit[i]) >= least - 1e-9
        row = float((A[i].abs() * 1).sum())
        if (layer.A[at.index(i)].abs().sum() < KAPPA - 1e-6) or row == 0:  # the ball does not bind
            assert float(report.fit[i]) == pytest.approx(least, rel=1e-6)


def test_scores_and_text():
    net, u = mlp(), randn(120, 6)
    labels = net(u).argmax(1)
    labels[:12] = (labels[:12] + 1) % 3
    layer, report = fit_states(net, u, labels, penalty=0.05)
    assert report.before == pytest.approx(0.9)
    assert report.after == pytest.approx(float((layer(u).argmax(1) == labels).double().mean()))
    assert report.samples == 120 and report.parameters == sum(p.numel() for p in net.parameters())
    for word in ("states of 15", "score 90.00 %", "well-posed", "same answer"):
        assert word in str(report)
    y = net(u).detach()
    numbers = y + randn(*y.shape, seed=4)
    _, report = fit_states(net, u, numbers, penalty=0.05)
    left = (numbers - y).square().sum() / (numbers - numbers.mean(0)).square().sum()
    assert report.before == pytest.approx(float(1 - left))
    assert isinstance(report, FitReport)


def test_a_model_may_be_the_teacher():
    model = ImplicitModel(0.2 * randn(4, 4), randn(4, 3), randn(2, 4), b=randn(4, seed=6))
    u = randn(200, 3)
    layer, report = fit_states(model, u, penalty=1e-8, kappa=0.99)
    torch.testing.assert_close(layer(u), model(u), rtol=0, atol=1e-4)
    assert report.parameters is None and report.share is None


def test_states_that_cannot_all_be_matched_are_said_to_be():
    A = torch.tensor([[-2.0, 0.5], [0.3, -1.5]])  # well-posed by its measure, with a large root
    layer, report = fit_states(
        ImplicitModel(A, randn(2, 2), torch.eye(2)), randn(200, 2), penalty=1e-6, kappa=0.9
    )
    assert not report.scaled and "cannot all be matched" in str(report)
    assert float(layer.A.detach().abs().sum(1).max()) <= 0.9 + 1e-12
    assert float(report.fit.max()) > 1e-2


# ---- refusals --------------------------------------------------------------------------------------


class Untouched(nn.Module):
    """Says so if it is run."""

    def forward(self, u):
        raise AssertionError("work was done before the arguments were looked at")


def spoiled(value: float) -> Tensor:
    u = randn(20, 6)
    u[7, 2] = value
    return u


@pytest.mark.parametrize("arguments, kind, words", [
    ({"data": spoiled(math.nan)}, ValueError, "data: 1 of 20 samples have NaN.*sample 7"),
    ({"data": spoiled(math.inf)}, ValueError, "sample 7"),
    ({"data": randn(20, 6).long()}, ValueError, "data: got torch.int64"),
    ({"data": randn(6)}, ValueError, r"shape \(6,\)"),
    ({"data": [1.0]}, TypeError, "data: got list"),
    ({"kappa": 1.0}, ValueError, r"kappa: got 1.0, expected a number in \(0, 1\)"),
    ({"kappa": 0.0}, ValueError, "kappa: got 0.0"),
    ({"kappa": math.nan}, ValueError, "kappa: got nan"),
    ({"penalty": "l1"}, TypeError, "penalty: got 'l1'"),
    ({"penalty": -1.0}, ValueError, "weight: got -1.0"),
    ({"readout": Group()}, TypeError, "readout: got Group"),
    ({"connections": "uper"}, ValueError, "Did you mean 'upper'"),
    ({"penalty": LowRank(rank=2), "connections": "upper"}, ValueError, "has not the rank"),
    ({"shard": "sample"}, ValueError, "Did you mean 'samples'"),
    ({"shard": "rows"}, ValueError, "torch.distributed is not initialised"),
    ({"shard": "rows", "penalty": Group()}, ValueError, "ties the rows"),
], ids=lambda v: v if isinstance(v, str) else "")  # fmt: skip
def test_what_is_refused_before_the_network_is_run(arguments, kind, words):
    data = arguments.pop("data", randn(20, 6))
    with pytest.raises(kind, match=words):
        fit_states(Untouched(), data, **arguments)


@pytest.mark.parametrize("targets, kind, words", [
    (torch.arange(20) % 4, ValueError, "label 3 at sample 3, expected labels from 0 to 2"),
    (torch.arange(20) % 3 - 1, ValueError, "label -1 at sample 0"),
    (torch.zeros(19, dtype=torch.long), ValueError, r"shape \(19,\), expected labels of shape \(20,\)"),
    (randn(20, 2), ValueError, r"numbers of shape \(20, 3\)"),
    (torch.full((20, 3), math.nan), ValueError, "targets: 20 of 20 samples"),
    ([0] * 20, TypeError, "targets: got list"),
], ids=lambda v: v if isinstance(v, str) else "")  # fmt: skip
def test_targets_that_do_not_fit(targets, kind, words):
    with pytest.raises(kind, match=words):
        fit_states(mlp(), randn(20, 6), targets)


def test_penalties_take_their_number_by_position():
    assert (L1(0.1), Group(0.2)) == (L1(weight=0.1), Group(weight=0.2))
    assert LowRank(3) == LowRank(rank=3)
    assert Perspective(0.1, ridge=0.2) == Perspective(weight=0.1, ridge=0.2)


@pytest.mark.parametrize("network, data, words", [
    (mlp, randn(20, 5), r"data: the network does not take samples of shape \(5,\) in torch.float64"),
    (lambda: to_implicit(mlp(), randn(1, 6)), randn(20, 5),
     r"data: got samples of shape \(5,\), expected 6 numbers each, of shape \(6,\)"),
    (lambda: mlp().float(), torch.full((20, 6), 1e300, dtype=torch.float64), "data.*float32, as the network.*sample 0"),
    (mlp, torch.full((20, 6), 1e200, dtype=torch.float64), "its states or outputs at the data are not finite"),
], ids=["features", "features of a model", "range", "squares"])  # fmt: skip
def test_data_that_does_not_fit(network, data, words):
    with pytest.raises(ValueError, match=words):
        fit_states(network(), data)


@pytest.mark.parametrize("network", [mlp, lambda: to_implicit(mlp().float(), randn(1, 6).float())])
def test_data_is_cast_to_the_network(network):
    net = network()
    if isinstance(net, nn.Module):
        net = net.float()
    u = randn(100, 6)
    layer, _ = fit_states(net, u, penalty=1e-2)
    same, _ = fit_states(net, u.float(), penalty=1e-2)
    assert layer.A.dtype == torch.float32 and torch.equal(layer.A, same.A)


def test_a_bound_that_no_solver_copes_with_is_named():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))

    def nothing(self, u, **options):
        raise ConvergenceError("300 of 300 samples did not converge.")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ConvergenceError) as caught:
        patch.setattr(ImplicitModel, "solve", nothing)
        fit_states(net, randn(300, 6), kappa=0.999999)
    assert "kappa" in str(caught.value) and "0.999999" in str(caught.value)
    assert "a smaller kappa" in str(caught.value) and "300 of 300" in str(caught.value)


def test_one_output_has_no_largest():
    net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1))
    _, report = fit_states(net, randn(50, 6))
    assert math.isnan(report.agreement) and "same answer" not in str(report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("penalty", [1e-3, LowRank(3), Group(0.1)], ids=str)
def test_the_constraint_holds_in_sums_of_the_dtype(penalty, dtype):
    """The bound, as a sum of the entries as they are stored, and with nothing allowed for rounding."""
    net = mlp().to(dtype)
    layer, _ = fit_states(net, randn(200, 6).to(dtype), penalty=penalty, kappa=0.3)
    A = layer.A.detach()
    for size in (A.double().abs(), A.float().abs()):
        assert float(size.sum(1).max()) <= 0.3
    assert float(A.double().abs().sum(1).max()) > 0.29


def test_networks_that_do_not_fit():
    pooled = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)
    )
    with pytest.raises(ValueError, match="Jacobian is not symmetric.*average pooling"):
        fit_states(pooled, randn(20, 1, 6, 6))
    with pytest.raises(ValueError, match="kappa times the Lipschitz constant.*take kappa < 0.8"):
        fit_states(mlp(nn.GELU()), randn(20, 6), kappa=0.9)
    layer, _ = fit_states(mlp(nn.GELU()), randn(200, 6), kappa=0.5, penalty=1e-4)
    assert layer.certificate().well_posed
    with pytest.raises(ValueError, match="20000 together"):
        fit_states(nn.Sequential(nn.Linear(20000, 1), nn.ReLU()), torch.zeros(2, 20000))


# ---- several processes -----------------------------------------------------------------------------


def matrices(layer: ImplicitLayer) -> dict[str, Tensor]:
    return {name: getattr(layer, name).detach() for name in "ABCDbd"}


def shared(rank: int, size: int, folder: str) -> None:
    """What each process does; the parts are compared with the answer of one process."""
    from torch import distributed

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size
    )
    try:
        net, u = mlp(), randn(201, 6)
        labels = net(u).argmax(1)
        share = slice(rank * 150 // size, 201 if rank == size - 1 else (rank + 1) * 150 // size)
        found = {}
        for name, penalty in PENALTIES.items():
            found[name, "samples"] = fit_states(
                net, u[share], labels[share], penalty=penalty, shard="samples"
            )
            if not (isinstance(penalty, Penalty) and penalty.couples_rows):
                found[name, "rows"] = fit_states(net, u, labels, penalty=penalty, shard="rows")
        for kind in AWKWARD:
            net2 = awkward(kind)
            found[kind, "samples"] = fit_states(net2, u[share], penalty=1e-2, shard="samples")
            found[kind, "rows"] = fit_states(net2, u, penalty=1e-2, shard="rows")
        failures = []
        for error in (ConvergenceError("row 3 first"), OverflowError("too large")):
            with pytest.MonkeyPatch.context() as patch:
                if rank == size - 1:  # one process alone, in the middle of its work

                    def solve(self, *_, error=error, **__):
                        raise error

                    patch.setattr(RowProgram, "solve", solve)
                try:
                    fit_states(net, u, shard="rows")
                except (ConvergenceError, ValueError, OverflowError) as raised:
                    failures.append(f"{type(raised).__name__}: {raised}")
        bad = u[share].clone()
        if rank == size - 1:
            bad[3] = math.nan
        try:
            fit_states(net, bad, shard="samples")
            refused = "not at all"
        except ValueError as error:
            refused = str(error)
        states = {key: matrices(layer) for key, (layer, _) in found.items()}
        scores = {key: (r.before, r.after, r.samples) for key, (_, r) in found.items()}
        torch.save((states, scores, refused, failures), f"{folder}/{rank}.pt")
    finally:
        distributed.destroy_process_group()


PENALTIES = {"l1": 0.05, "group": Group(weight=0.1), "low rank": LowRank(rank=3)}


def compare(size: int) -> None:
    import torch.multiprocessing as processes

    net, u = mlp(), randn(201, 6)
    labels = net(u).argmax(1)
    alone = {k: fit_states(net, u, labels, penalty=p) for k, p in PENALTIES.items()}
    alone |= {kind: fit_states(awkward(kind), u, penalty=1e-2) for kind in AWKWARD}
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(shared, (size, folder), nprocs=size)
        answers = [
            torch.load(os.path.join(folder, f"{rank}.pt"), weights_only=True)
            for rank in range(size)
        ]
    for rank, (states, scores, refused, failures) in enumerate(answers):
        assert len(states) == 5 + 2 * len(AWKWARD)
        for (name, shard), state in states.items():
            layer, report = alone[name]
            for key, value in matrices(layer).items():
                torch.testing.assert_close(
                    state[key], value, rtol=1e-10, atol=1e-10, msg=f"{name} {shard} {key}"
                )
            assert scores[name, shard] == (report.before, report.after, 201)
        own = rank == size - 1
        if own:
            assert failures == ["ConvergenceError: row 3 first", "OverflowError: too large"]
        else:
            assert failures[0] == (
                f"ConvergenceError: process {size - 1} found no solution; see its own error."
            )
            assert failures[1].startswith(f"ValueError: data: process {size - 1} refused")
        assert (
            ("sample 3" in refused) == own and ("process 1 refused" in refused) != own or size > 2
        )


def test_two_processes_give_the_answer_of_one():
    compare(2)


@pytest.mark.slow
def test_four_processes_give_the_answer_of_one():
    compare(4)
