"""Robust linear programs: against cvxpy, against every vertex, by attack, and their derivatives."""

import math

import cvxpy as cp
import pytest
import torch
from scipy.optimize import linprog
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from implicitdl.robust import (
    Ball,
    Box,
    Budget,
    Ellipsoid,
    Hull,
    Polytope,
    RobustLP,
    maximin,
    maximin_oracle,
)
from implicitdl.solution import ConvergenceError, InfeasibleError, Status

N, M = 3, 4


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def positive(*shape, seed=0):
    return 0.2 + torch.rand(shape, generator=torch.Generator().manual_seed(seed))


C, A, B = normal(N, seed=1), normal(M, N, seed=2), 1 + positive(M, seed=3)


def polytope(k, seed=0):
    eye = torch.eye(k)
    F = torch.cat([normal(2, k, seed=seed), eye, -eye])
    return Polytope(F=F, g=0.3 * positive(2 + 2 * k, seed=seed))


CASES = {
    "ball": {"uncertainty": Ball(radius=0.3, dimension=N)},
    "balls": {"uncertainty": Ball(radius=positive(M), centre=0.05 * normal(M, N))},
    "ball1": {"uncertainty": Ball(radius=positive(M), norm=1, dimension=N)},
    "ballinf": {"uncertainty": Ball(radius=positive(M), norm="inf", dimension=N)},
    "box": {"uncertainty": Box(low=-positive(M, N), high=positive(N, seed=1))},
    "ellipsoid": {"uncertainty": Ellipsoid(shape=0.4 * normal(M, N, N))},
    "budget": {"uncertainty": Budget(budget=1.5, scale=positive(M, N))},
    "polytope": {"uncertainty": polytope(N)},
    "rows": {
        "uncertainty": [polytope(N), None, Ball(radius=0.3, dimension=N + 1),
                        polytope(N) & Ball(radius=0.2, dimension=N)],
        "rhs": Ball(radius=0.1, dimension=M),
    },
    "with_b": {"uncertainty": Ellipsoid(shape=0.3 * normal(M, N + 1, 2))},
    "matrix": {
        "matrix": Ellipsoid(shape=0.2 * normal(M * N, 5)),
        "rhs": Box(low=-0.1 * torch.ones(M), high=0.2 * torch.ones(M)),
    },
    "all": {
        "uncertainty": 0.5 * Hull(points=normal(M, 5, N)), "rhs": polytope(M),
        "matrix": Budget(budget=2.0, scale=0.1 * positive(M * (N + 1))),
        "objective": Ball(radius=0.3, dimension=N),
        "equality": (torch.ones(1, N), torch.zeros(1)), "certain": (-A[:1], torch.ones(1)),
    },
    "factors": {"uncertainty": 0.3 * normal(M, N, 2) @ Ball(radius=1.0, norm=1, dimension=2)},
}  # fmt: skip
cases = pytest.mark.parametrize("name", CASES)


def program(name, **changes):
    return RobustLP(C, A, B, **{"low": -2.0, "high": 2.0, **CASES[name], **changes})


@cases
def test_the_solution_is_that_of_cvxpy(name):
    p = program(name)
    solution = p.solve()
    problem, x = p.as_cvxpy()
    problem.solve(solver=cp.CLARABEL)
    assert float(solution.stats["objective"]) == pytest.approx(problem.value, abs=1e-6)
    torch.testing.assert_close(solution.value, torch.as_tensor(x.value), atol=2e-5, rtol=1e-5)
    assert solution.value.shape == (N,) and solution.status is Status.CONVERGED


@cases
def test_no_attack_breaks_the_solution_and_a_larger_set_does(name):
    p = program(name)
    x = p.solve().value
    g = torch.Generator().manual_seed(5)
    for boundary in (False, True):
        data = p.sample(50, boundary=boundary, generator=g)
        assert data.violation(x).max() <= 1e-7
        assert (data.c @ x).max() <= p.solve().stats["objective"] + 1e-7
    worst = p.worst_case(x)
    torch.testing.assert_close(worst.violation(x), p.violation(x), atol=1e-8, rtol=0)
    assert p.violation(x).max() <= 1e-7
    # The attack has teeth: an uncertain row is tight, and the worst data of a set 2 % larger break it.
    r = p.radius(x)
    assert r == pytest.approx(1, abs=1e-6)
    assert p.scaled(1.02).worst_case(x).violation(x).max() > 1e-3
    assert p.scaled(0.98).worst_case(x).violation(x).max() <= 1e-7


def test_worst_data_are_members():
    p = program("box")
    x = p.solve().value
    assert p.uncertainty.contains(p.worst_case(x).A - A, 1e-9).all()
    q = program("matrix")
    worst = q.worst_case(x)
    rows = q.matrix.blocks(M)
    assert rows.contains(worst.A - A, 1e-7).all()
    assert ((worst.b - B) >= -0.1 - 1e-9).all()


@pytest.mark.parametrize("kind", ["box", "budget"])
def test_all_vertices_at_once(kind):
    """The robust program is the linear program with a row for each vertex; x has both signs."""
    scale = 0.3 * positive(M, N, seed=7)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * N)
    if kind == "box":
        U, vertices = Box(low=-scale, high=scale), signs[signs.abs().sum(1) == N]
    else:
        U = Budget(budget=2.0, scale=scale)
        vertices = signs[signs.abs().sum(1) == 2]
        assert len(vertices) == 12
    c = normal(N, seed=8)
    solution = RobustLP(c, A, B, uncertainty=U, low=-2.0, high=2.0).solve()
    rows = (A + vertices[:, None] * scale).reshape(-1, N)
    found = linprog(c.numpy(), rows.numpy(), B.repeat(len(vertices)).numpy(), bounds=(-2, 2))
    assert float(solution.stats["objective"]) == pytest.approx(found.fun, abs=1e-7)
    x = solution.value
    assert (x > 1e-3).any() and (x < -1e-3).any()


def test_sources_add_up():
    """Row, matrix and right-hand side together: support functions of each, from their definitions."""
    U, V = Ball(radius=0.2, dimension=N), Ellipsoid(shape=0.2 * normal(M * N, 6))
    W = Box(low=-0.1 * positive(M), high=torch.zeros(M))
    p = RobustLP(C, A, B, uncertainty=U, matrix=V, rhs=W)
    x = normal(5, N, seed=9)
    big = torch.stack([torch.kron(torch.eye(M)[i], x_) for x_ in x for i in range(M)])
    expected = 0.2 * x.norm(dim=1, keepdim=True) + (big @ V.shape).norm(dim=1).reshape(5, M) - W.low
    torch.testing.assert_close(p.protection(x), expected)
    torch.testing.assert_close(p.violation(x), x @ A.T - B + expected)


def test_a_batch_is_its_instances_and_a_bad_one_is_named():
    c, b = normal(4, N, seed=10), B.repeat(4, 1)
    b[2] = -1.0  # with |x| <= 0.1: no x
    U = Ball(radius=positive(4, 1, seed=11), dimension=N)
    low, high = -torch.ones(4, N), torch.ones(4, N)
    low[2], high[2] = -0.1, 0.1
    data = {"uncertainty": U, "low": low, "high": high}
    p = RobustLP(c, A, b, **data)
    assert p.lead == (4,)
    with pytest.raises(InfeasibleError) as caught:
        p.solve()
    assert caught.value.instances.tolist() == [2]
    solution = p.solve(on_failure="nan")
    assert solution.statuses[2] is Status.INFEASIBLE
    assert torch.isnan(solution.value[2]).all() and torch.isnan(solution.stats["objective"][2])
    for i in (0, 1, 3):
        one = RobustLP(c[i], A, b[i], uncertainty=U.row(0).row(i), low=-1.0, high=1.0).solve()
        torch.testing.assert_close(solution.value[i], one.value, atol=1e-7, rtol=1e-7)
        torch.testing.assert_close(solution.stats["objective"][i], one.stats["objective"])


def test_a_failed_instance_leaves_the_gradients_of_shared_data_alone():
    b = torch.stack([B, torch.full((M,), -5.0)])
    shared = A.clone().requires_grad_()
    alone = A.clone().requires_grad_()
    U = Ball(radius=0.2, dimension=N)
    s = RobustLP(C, shared, b, uncertainty=U, low=-1.0, high=1.0).solve(on_failure="nan")
    (s.value[0].sum() + s.stats["objective"][0]).backward()
    one = RobustLP(C, alone, B, uncertainty=U, low=-1.0, high=1.0).solve()
    (one.value.sum() + one.stats["objective"]).backward()
    torch.testing.assert_close(shared.grad, alone.grad, atol=1e-7, rtol=1e-6)


def test_an_empty_batch():
    solution = RobustLP(torch.zeros(0, N), A, B, **CASES["ball"], low=-1.0, high=1.0).solve()
    assert solution.value.shape == (0, N) and solution.stats["objective"].shape == (0,)


def test_unbounded_and_empty():
    with pytest.raises(InfeasibleError, match="unbounded"):
        RobustLP(
            C, torch.zeros(1, N), torch.ones(1), uncertainty=Ball(radius=0.0, dimension=N)
        ).solve()
    F, g = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]]), torch.tensor([-1.0, 0.0])
    with pytest.raises(InfeasibleError, match="empty set"):
        program("ball", uncertainty=Polytope(F=F, g=g)).solve()
    # An unbounded set leaves only the x that it does not see.
    half = Polytope(F=-torch.eye(N)[:1], g=torch.ones(1))
    x = (
        RobustLP(
            C, A, B, uncertainty=[half, None, None, None], low=0.0, high=torch.tensor([2.0, 0, 0])
        )
        .solve()
        .value
    )
    torch.testing.assert_close(x, torch.zeros(N), atol=1e-7, rtol=0)
    with pytest.raises((InfeasibleError, ConvergenceError)):
        program("ball", uncertainty=half, low=0.1).solve()


LEARNED = {
    "ball": (lambda r: {"uncertainty": Ball(radius=r, dimension=N)}, positive()),
    "box": (lambda r: {"uncertainty": Box(low=-r, high=2 * r)}, 0.5 * positive(M, N)),
    "ellipsoid": (
        lambda L, c: {"uncertainty": Ellipsoid(shape=L, centre=c)},
        0.4 * normal(M, N, N), 0.05 * normal(M, N, seed=1),
    ),
    "budget": (
        lambda g, s: {"uncertainty": Budget(budget=g, scale=s)}, torch.tensor(1.4), positive(M, N)
    ),
    "polytope": (
        lambda F, g: {"uncertainty": Polytope(F=F, g=g)}, polytope(N).F, polytope(N).g
    ),
    "matrix": (
        lambda L, r: {"matrix": Ellipsoid(shape=L), "objective": Ball(radius=r, dimension=N)},
        0.2 * normal(M * N, 4), positive(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEARNED)
def test_gradients_in_the_data_and_in_the_set(name):
    make, *tensors = LEARNED[name]

    def solved(c, A, b, *t):
        p = RobustLP(c, A, b, low=-2.0, high=2.0, **make(*t))
        s = p.solve()
        return s.value, s.stats["objective"], p.violation(normal(N, seed=4)).sum()

    inputs = [t.clone().requires_grad_() for t in (C, A, B, *tensors)]
    assert gradcheck(solved, inputs, eps=1e-5, atol=1e-5, rtol=1e-4, fast_mode=True)


def test_second_derivatives_where_they_are_asked_for():
    def solved(order):
        def run(c, b, r):
            p = RobustLP(c, A, b, uncertainty=Ball(radius=r, dimension=N), low=-2.0, high=2.0)
            s = p.solve(order=order)
            return s.value, s.stats["objective"]

        return run

    inputs = [t.clone().requires_grad_() for t in (C, B, torch.tensor(0.8))]
    assert gradgradcheck(solved(2), inputs, eps=1e-5, atol=1e-4, rtol=1e-3)
    (g,) = torch.autograd.grad(solved(1)(*inputs)[1], inputs[2], create_graph=True)
    with pytest.raises(RuntimeError, match="order"):
        torch.autograd.grad(g, inputs[2])


def test_gradient_of_the_largest_radius():
    def radius(c, A, b, r, L):
        p = RobustLP(
            c, A, b, uncertainty=Ellipsoid(shape=L), objective=Ball(radius=r, dimension=N),
            low=-2.0, high=2.0,
        )  # fmt: skip
        return p.largest_radius(cost=-0.7).stats["radius"]

    inputs = [t.clone().requires_grad_() for t in (C, A, B, positive(), 0.4 * normal(M, N, N))]
    assert gradcheck(radius, inputs, eps=1e-5, atol=1e-5, rtol=1e-4, fast_mode=True)


@pytest.mark.parametrize("name", ["balls", "polytope", "rows", "matrix", "all"])
def test_largest_radius_is_where_the_objective_passes_the_cost(name):
    p = program(name)
    at_one = float(p.solve().stats["objective"])
    cost = 0.8 * at_one
    found = p.largest_radius(cost=cost)
    r = found.stats["radius"]
    assert r > 1 and not r.requires_grad
    near = p.trade_off(torch.stack([0.99 * r, r, 1.01 * r])).stats["objective"]
    assert near[0] < cost - 1e-6 and near[2] > cost + 1e-6
    assert float(near[1]) == pytest.approx(cost, abs=1e-6)
    assert p.radius(found.value) >= r - 1e-6


def test_largest_radius_of_a_batch():
    """One instance with no x at all, one with no largest radius (x = 0 satisfies everything)."""
    E, d = torch.ones(1, N), torch.tensor([[1.0], [0.0], [9.0]])
    p = RobustLP(
        C, A, B.expand(3, M), uncertainty=Ball(radius=1.0, dimension=N), equality=(E, d),
        low=-2.0, high=2.0,
    )  # fmt: skip
    found = p.largest_radius(on_failure="nan")
    r = found.stats["radius"]
    assert math.isinf(r[1]) and math.isnan(r[2]) and found.statuses[2] is Status.INFEASIBLE
    assert p.radius(found.value)[0] == pytest.approx(float(r[0]), rel=1e-7)
    # The ball at each x: (b - a'x) / ||x||, by brute force over the plane sum x = 1.
    t = torch.linspace(-2, 2, 161)
    x = torch.cartesian_prod(t, t)
    x = torch.cat([x, 1 - x.sum(1, keepdim=True)], 1)
    x = x[x[:, 2].abs() <= 2]
    ratio = ((B - x @ A.T) / x.norm(dim=1, keepdim=True)).amin(1).max()
    assert ratio <= r[0] + 1e-9 and ratio == pytest.approx(float(r[0]), rel=1e-2)
    with pytest.raises(InfeasibleError, match="1 of 3") as caught:
        p.largest_radius()
    assert caught.value.instances.tolist() == [2]


@pytest.mark.parametrize("seed", [0, 11])
def test_largest_radius_of_sets_without_the_origin(seed):
    """A size that x bears may follow one that it does not: what counts is all sizes up to r."""
    U = Ball(radius=0.05, centre=0.2 * normal(M, N, seed=seed + 50))
    E, d = torch.ones(1, N), torch.ones(1)
    p = RobustLP(C, A, B, uncertainty=U, equality=(E, d), low=-2.0, high=2.0)
    found = p.largest_radius()
    r = found.stats["radius"]
    assert p.radius(found.value) == pytest.approx(float(r), rel=1e-7)
    t = torch.linspace(-2, 2, 161)
    x = torch.cartesian_prod(t, t)
    x = torch.cat([x, 1 - x.sum(1, keepdim=True)], 1)
    x = x[x[:, 2].abs() <= 2]
    assert r >= p.radius(x).max()
    for size in (0.0, 0.3, 0.9):
        part = p.scaled(size * (r if torch.isfinite(r) else 1e3))
        assert part.violation(found.value).max() <= 1e-6


def test_rounding_is_no_violation():
    """A row without uncertainty that is met with equality does not bound the radius."""
    p = program("rows")
    x = p.solve().value
    x[0] += float((B - A @ x)[1] / A[1, 0])  # onto the certain row, and a rounding beyond it
    x[0] += 1e-12 * float(A[1, 0].sign())
    assert (A @ x - B)[1] > 0 and torch.isfinite(program("rows", rhs=None).radius(x))


def test_radius_by_hand():
    p = RobustLP(
        torch.zeros(2), torch.eye(2), torch.tensor([1.0, 2.0]),
        uncertainty=[Ball(radius=1.0, dimension=2), None],
    )  # fmt: skip
    x = torch.tensor([[0.5, 0.0], [0.0, 0.0], [0.0, 2.0], [0.0, 2.5], [2.0, 0.0]])
    expected = torch.tensor([1.0, math.inf, 0.5, -math.inf, -0.5])
    torch.testing.assert_close(p.radius(x), expected)


def test_the_trade_off_is_one_batch():
    p, radii = program("all", objective=None), torch.tensor([0.0, 0.5, 1.0, 2.0])
    curve = p.trade_off(radii)
    value = curve.stats["objective"]
    assert curve.value.shape == (4, N) and (value.diff() >= -1e-8).all() and value[3] > value[0]
    for r, v in zip(radii, value, strict=True):
        torch.testing.assert_close(p.scaled(r).solve().stats["objective"], v, atol=1e-7, rtol=1e-7)
    far = RobustLP(
        C, A, B.expand(2, M), uncertainty=Ball(radius=1.0, dimension=N),
        equality=(torch.ones(1, N), torch.ones(1)), low=-2.0, high=2.0,
    ).trade_off(torch.tensor([0.0, 100.0, 0.5]))  # fmt: skip
    assert far.value.shape == (3, 2, N)
    assert torch.isnan(far.stats["objective"][1]).all()
    assert torch.isfinite(far.stats["objective"][[0, 2]]).all()


def test_a_nearby_solution_is_a_start():
    p = program("ellipsoid")
    first = p.solve()
    again = RobustLP(C + 1e-6, A, B, **CASES["ellipsoid"], low=-2.0, high=2.0)
    warm, cold = again.solve(start=first), again.solve()
    torch.testing.assert_close(warm.value, cold.value, atol=1e-6, rtol=1e-6)
    assert warm.steps <= cold.steps


def test_one_set_for_all_rows_costs_one_cone():
    one, m_ = program("ball"), program("ball", uncertainty=CASES["ball"]["uncertainty"].expand(M))
    small, large = (p._conic()[0].cones for p in (one, m_))
    assert len(small.second_order) == len(large.second_order) == 1  # a ball's radius is a factor
    box = program("box")._conic()[0]
    assert box.W.shape[-1] == N  # |x| is shared by all rows
    torch.testing.assert_close(one.solve().value, m_.solve().value, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept_and_sets_follow(dtype):
    c, A_, b = (t.to(dtype) for t in (C, A, B))
    U = Ellipsoid(shape=0.4 * normal(M, N, N).float())
    s = RobustLP(c, A_, b, uncertainty=U, low=-2.0, high=2.0).solve()
    assert s.value.dtype == s.stats["objective"].dtype == dtype
    exact = RobustLP(C, A, B, uncertainty=U, low=-2.0, high=2.0).solve()
    torch.testing.assert_close(s.value.double(), exact.value, atol=1e-5, rtol=1e-5)


def test_a_layer_learns_the_shape_of_its_set():
    """What a user writes: the set's shape is a parameter, and solutions teach it."""

    class Planner(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.log_width = nn.Parameter(torch.full((n,), -2.0))

        def forward(self, c, A, b):
            U = Ellipsoid(shape=torch.diag(self.log_width.exp()))
            return RobustLP(c, A, b, uncertainty=U, low=-2.0, high=2.0).solve().value

    c = normal(8, N, seed=20)
    truth = Ellipsoid(shape=torch.diag(torch.tensor([0.5, 0.1, 0.3])))
    wanted = RobustLP(c, A, B, uncertainty=truth, low=-2.0, high=2.0).solve().value
    layer = Planner(N)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    losses = []
    for _ in range(45):
        optimizer.zero_grad()
        loss = (layer(c, A, B) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]


# ---- maximin ---------------------------------------------------------------------------------------


def simplex(n):
    return torch.ones(1, n), torch.ones(1)


def test_matrix_games_are_those_of_linear_programming():
    Q = normal(5, 3, 4, seed=30)
    s = maximin(Q, Hull(points=torch.eye(4)), equality=simplex(3), low=0.0)
    for i in range(5):
        # max t over Q'x >= t, x in the simplex
        rows = torch.cat([-Q[i].T, torch.ones(4, 1)], 1)
        found = linprog(
            [0, 0, 0, -1], rows, torch.zeros(4), [[1, 1, 1, 0]], [1],
            bounds=[(0, None)] * 3 + [(None, None)],
        )  # fmt: skip
        assert float(s.stats["objective"][i]) == pytest.approx(-found.fun, abs=1e-7)


def test_maximin_is_a_saddle_point_of_its_dual():
    """max min = min max: the same game from the other side, whose set is a ball."""
    Q, U = normal(3, 4, seed=31), Ball(radius=1.0, centre=torch.ones(4))
    s = maximin(Q, U, equality=simplex(3), low=0.0, gain=0.1 * torch.ones(3))
    z = cp.Variable(4)
    dual = cp.Problem(cp.Minimize(cp.max(Q.numpy() @ z + 0.1)), U.as_cvxpy(z))
    dual.solve(solver=cp.CLARABEL)
    assert float(s.stats["objective"]) == pytest.approx(dual.value, abs=1e-6)
    worst, x = s.stats["worst"], s.value
    assert U.contains(worst, 1e-7)
    torch.testing.assert_close(x @ Q @ worst + 0.1, s.stats["objective"])
    assert (U.sample(100) @ (x @ Q) + 0.1 >= s.stats["objective"] - 1e-8).all()


def test_gradient_of_a_maximin_value():
    def value(Q, r):
        return maximin(Q, Ball(radius=r, centre=torch.ones(4)), equality=simplex(3), low=0.0).stats[
            "objective"
        ]

    inputs = [normal(3, 4, seed=31).requires_grad_(), torch.tensor(0.5, requires_grad=True)]
    assert gradcheck(value, inputs, eps=1e-5, atol=1e-6, rtol=1e-5)


def test_cutting_planes_reach_the_dual_solution():
    Q = normal(4, 3, 4, seed=32)

    def worst(x):  # over the ball about 1, by its formula
        v = torch.einsum("bi,bij->bj", x, Q)
        return v.sum(-1) - v.norm(dim=-1)

    limits = {"equality": simplex(3), "low": 0.0}
    exact = maximin(Q, Ball(radius=1.0, centre=torch.ones(4)), **limits).stats["objective"]
    s = maximin_oracle(worst, torch.zeros(4, 3), high=1.0, **limits)
    assert (s.stats["objective"] <= exact + 1e-9).all() and (s.stats["bound"] >= exact - 1e-9).all()
    torch.testing.assert_close(s.stats["objective"], exact, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(worst(s.value), s.stats["objective"])
    with pytest.raises(ConvergenceError, match="did not converge"):
        maximin_oracle(worst, torch.zeros(4, 3), high=1.0, max_steps=2, **limits)


# ---- what is wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, error, text",
    [
        (lambda: RobustLP(C, A.T, B), ValueError, r"A: got shape \(3, 4\)"),
        (lambda: RobustLP(C, A.float(), B), ValueError, "A: got torch.float32"),
        (lambda: RobustLP(C * math.nan, A, B), ValueError, "c: got nan at index"),
        (lambda: program("ball", uncertainty=Ball(radius=1.0, dimension=7)), ValueError,
         "uncertainty: got a Ball of dimension 7, expected 3 or 4"),
        (lambda: program("ball", uncertainty=Ball(radius=torch.ones(3), dimension=N)), ValueError,
         "for 4 rows"),
        (lambda: program("ball", uncertainty=[None]), ValueError, "got 1 sets, expected 4"),
        (lambda: program("ball", uncertainty=[0.1] * M), TypeError, r"uncertainty\[0\]: got float"),
        (lambda: program("ball", rhs=Ball(radius=1.0, dimension=N)), ValueError, "rhs: got a Ball"),
        (lambda: program("ball", matrix=3.0), TypeError, "matrix: got float"),
        (lambda: program("ball", equality=torch.ones(1, N)), TypeError, "equality: got Tensor"),
        (lambda: program("ball", certain=(torch.ones(1, 2), torch.ones(1))), ValueError, "certain"),
        (lambda: program("ball", low=torch.ones(2)), ValueError, "low: got"),
        (lambda: program("ball", high=math.inf), ValueError, "high: got inf"),
        (lambda: RobustLP(C.expand(2, N), A.expand(3, M, N), B), ValueError, "batch: got"),
        (lambda: program("ball").violation(torch.ones(2)), ValueError, "x: got shape"),
        (lambda: program("ball").radius([1.0]), TypeError, "x: got list"),
        (lambda: program("ball").scaled(-1.0), ValueError, "r [*] U: got -1"),
        (lambda: program("ball").trade_off(torch.ones(2, 2)), ValueError, "radii: got shape"),
        (lambda: RobustLP(C, A, B).trade_off(torch.ones(2)), ValueError, "without uncertainty"),
        (lambda: RobustLP(C, A, B).largest_radius(), ValueError, "no uncertain row"),
        (lambda: program("ball").solve(on_failure="ignore"), ValueError, "on_failure"),
        (lambda: RobustLP(C.expand(2, N), A, B).as_cvxpy(), ValueError, "not batched"),
        (lambda: maximin(C, Ball(radius=1.0, dimension=N)), TypeError, "payoff: got"),
        (lambda: maximin_oracle(lambda x: x, torch.zeros(2, 2), low=0.0, high=1.0), ValueError,
         "one payoff a row"),
        (lambda: maximin_oracle(lambda x: torch.zeros(2), torch.zeros(2, 2), low=0.0, high=1.0),
         ValueError, "cannot differentiate"),
        (lambda: maximin_oracle(torch.sum, torch.zeros(2), low=0.0, high=1.0), TypeError, "x0"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(make, error, text):
    with pytest.raises(error, match=text):
        make()
