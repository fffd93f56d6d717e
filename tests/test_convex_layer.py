"""The door to cvxpy: the same answers as cvxpy, the derivatives that finite differences find."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import cvxpy as cp
import numpy as np
import pytest
import torch
from cvxpy.reductions.solvers.conic_solvers.clarabel_conif import CLARABEL
from cvxpy.reductions.solvers.conic_solvers.conic_solver import ConicSolver
from cvxpylayers.torch import CvxpyLayer
from torch.autograd import gradcheck, gradgradcheck

from implicitdl import ConvergenceError
from implicitdl.convex import (
    ConeSolver,
    ConvexLayer,
    NativeCone,
    QuadraticProgram,
    door_diffcp,
    gradient_certificate,
)
from implicitdl.convex.canonical import refuse_set_apart
from implicitdl.solution import InfeasibleError, Status

TIGHT = {"tol_gap_abs": 1e-10, "tol_gap_rel": 1e-10, "tol_feas": 1e-10}
RIGHT = {"solve_method": "Clarabel", "mode": "dense", **TIGHT}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def by_cvxpy(problem, parameters, values, variables=()):
    """Clarabel's status, objective and variables, instance by instance."""
    batch = max((v.shape[0] for p, v in zip(parameters, values, strict=True) if v.dim() > p.ndim))
    statuses, objectives, found = [], [], []
    for i in range(batch):
        for p, v in zip(parameters, values, strict=True):
            p.value = (v[i] if v.dim() > p.ndim else v).detach().numpy()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Solution may be inaccurate")
            problem.solve("CLARABEL", **TIGHT)
        statuses.append(problem.status.removesuffix("_inaccurate"))
        objectives.append(problem.value)
        found.append([v.value for v in variables])
    return statuses, torch.tensor(np.array(objectives, dtype=float)), found


# ---- a zoo of random problems -----------------------------------------------------------------------


@dataclass
class Case:
    """A parametrised problem, random values for it, and whether its solution is a function."""

    name: str
    build: Callable
    unique: bool = True
    unique_dual: bool = True
    batch: int = 16


def lp_box():
    x, c, A, b = cp.Variable(4), cp.Parameter(4), cp.Parameter((6, 4)), cp.Parameter(6)
    problem = cp.Problem(cp.Minimize(c @ x), [A @ x <= b, cp.abs(x) <= 1])
    return problem, [c, A, b], [x], lambda B: (randn(B, 4), randn(B, 6, 4, seed=1), rand(B, 6))


def lp_standard():
    x, c, A, b = cp.Variable(6, nonneg=True), cp.Parameter(6), cp.Parameter((3, 6)), cp.Parameter(3)
    problem = cp.Problem(cp.Maximize(c @ x - 2), [A @ x == b, cp.sum(x) <= 10])

    def draw(B):
        A = randn(B, 3, 6)
        return randn(B, 6, seed=1), A, (A @ rand(B, 6, 1, seed=2))[..., 0]

    return problem, [c, A, b], [x], draw


def transport():
    # supplies and demands sum to the same: one equality follows from the others; many bases
    X, C = cp.Variable((3, 4)), cp.Parameter((3, 4))
    problem = cp.Problem(
        cp.Minimize(cp.sum(cp.multiply(C, X))),
        [cp.sum(X, axis=1) == np.full(3, 4.0), cp.sum(X, axis=0) == np.full(4, 3.0), X >= 0],
    )
    return problem, [C], [X], lambda B: (randn(B, 3, 4),)


def l1_regression():
    x, A, b = cp.Variable(3), cp.Parameter((7, 3)), cp.Parameter(7)
    problem = cp.Problem(cp.Minimize(cp.norm1(A @ x - b)))
    return problem, [A, b], [x], lambda B: (randn(B, 7, 3), randn(B, 7, seed=1))


def chebyshev():
    x, A, b = cp.Variable(3), cp.Parameter((7, 3)), cp.Parameter(7)
    problem = cp.Problem(cp.Minimize(cp.norm_inf(A @ x - b)))
    return problem, [A, b], [x], lambda B: (randn(B, 7, 3), randn(B, 7, seed=1))


def duplicate_rows():
    x, c = cp.Variable(3), cp.Parameter(3)
    ones = np.ones(3)
    problem = cp.Problem(
        cp.Minimize(cp.sum_squares(x - c) + 1),
        [ones @ x == 1, 2 * ones @ x == 2, x >= 0, x >= 0, np.zeros((2, 3)) @ x <= 1],
    )
    return problem, [c], [x], lambda B: (randn(B, 3),)


def box_least_squares():
    x, A, b = cp.Variable(4), cp.Parameter((6, 4)), cp.Parameter(6)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b)), [x >= -0.3, x <= 0.3])
    return problem, [A, b], [x], lambda B: (randn(B, 6, 4), randn(B, 6, seed=1))


def markowitz():
    w, mu = cp.Variable(5, nonneg=True), cp.Parameter(5)
    S = cp.Parameter((5, 5), PSD=True)
    problem = cp.Problem(cp.Maximize(mu @ w - 0.5 * cp.quad_form(w, S)), [cp.sum(w) == 1])

    def draw(B):
        L = randn(B, 5, 5)
        return randn(B, 5, seed=1), L @ L.mT / 5 + 0.1 * torch.eye(5)

    return problem, [mu, S], [w], draw


def flat_quadratic():
    # a rank-one objective: many solutions
    x, a = cp.Variable(3), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.square(a @ x - 1)), [cp.abs(x) <= 5])
    return problem, [a], [x], lambda B: (randn(B, 3),)


def robust_lp(n=4, m=3):
    x, c = cp.Variable(n), cp.Parameter(n)
    rows = [(cp.Parameter(n), cp.Parameter((n, n)), cp.Parameter()) for _ in range(m)]
    cones = [a @ x + cp.norm(P @ x) <= b for a, P, b in rows]
    problem = cp.Problem(cp.Minimize(c @ x), [*cones, cp.abs(x) <= 5])

    def draw(B):
        drawn = [randn(B, n)]
        for k in range(m):
            drawn += [randn(B, n, seed=3 * k + 1), 0.2 * randn(B, n, n, seed=3 * k + 2)]
            drawn += [1 + rand(B, seed=3 * k + 3)]
        return tuple(drawn)

    return problem, [c, *(p for row in rows for p in row)], [x], draw


def group_lasso():
    x, A, b, t = cp.Variable(6), cp.Parameter((8, 6)), cp.Parameter(8), cp.Parameter(nonneg=True)
    groups = cp.norm(x[:2]) + cp.norm(x[2:4]) + cp.norm(x[4:])
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(A @ x - b) + t * groups))
    return problem, [A, b, t], [x], lambda B: (randn(B, 8, 6), randn(B, 8, seed=1), 3 * rand(B))


def facility():
    x, a = cp.Variable(2), cp.Parameter((5, 2))
    far = sum(cp.norm(x - a[i]) for i in range(5))
    problem = cp.Problem(cp.Minimize(far), [x[0] + x[1] <= 0.2])
    return problem, [a], [x], lambda B: (randn(B, 5, 2),)


def huber():
    x, A, b = cp.Variable(3), cp.Parameter((8, 3)), cp.Parameter(8)
    problem = cp.Problem(cp.Minimize(cp.sum(cp.huber(A @ x - b, 0.5)) + 0.1 * cp.sum_squares(x)))
    return problem, [A, b], [x], lambda B: (randn(B, 8, 3), randn(B, 8, seed=1))


def norms_in_constraints():
    # variables that cvxpy adds, in chains: max, sums of norms, the largest entry, a power
    x, y, c, A, b = (
        cp.Variable(4),
        cp.Variable(2),
        cp.Parameter(4),
        cp.Parameter((3, 4)),
        cp.Parameter(),
    )
    constraints = [
        cp.max(A @ x) + 2 * cp.norm(x[:2]) + cp.norm(x[2:] - y) <= b,
        cp.norm1(x) <= 3,
        cp.norm_inf(cp.hstack([x, y])) <= 1.2,
        cp.pnorm(x, 3) <= 2,
        3 * cp.abs(y[0]) - 1 <= b,
    ]
    problem = cp.Problem(cp.Maximize(c @ x + 0.3 * cp.sum(y)), constraints)
    draw = lambda B: (randn(B, 4), randn(B, 3, 4, seed=1), 1 + rand(B, seed=2))
    return problem, [c, A, b], [x], draw


def symmetric_matrix():
    X, C = cp.Variable((3, 3), symmetric=True), cp.Parameter((3, 3), symmetric=True)
    problem = cp.Problem(
        cp.Minimize(cp.sum_squares(X - C)), [cp.trace(X) == 1, X >= 0, cp.norm(X, "fro") <= 0.9]
    )

    def draw(B):
        M = randn(B, 3, 3)
        return (M + M.mT,)

    return problem, [C], [X], draw


ZOO = [
    Case("LP in a box", lp_box),
    Case("LP, standard form, maximised", lp_standard),
    Case("transport", transport, unique_dual=False),
    Case("l1 regression", l1_regression),
    Case("Chebyshev approximation", chebyshev),
    Case("duplicate rows", duplicate_rows, unique_dual=False),
    Case("box least squares", box_least_squares),
    Case("Markowitz", markowitz),
    Case("flat quadratic", flat_quadratic, unique=False, unique_dual=False),
    Case("robust LP", robust_lp),
    Case("group lasso", group_lasso),
    Case("facility", facility),
    Case("Huber", huber),
    Case("norms in constraints", norms_in_constraints),
    Case("symmetric matrix", symmetric_matrix),
]
zoo = pytest.mark.parametrize("case", ZOO, ids=lambda case: case.name)


def test_the_zoo_is_large_enough():
    # and the mixed LPs below, a third of which have no solution
    assert sum(case.batch for case in ZOO) >= 200


@zoo
def test_random_problems_agree_with_clarabel(case):
    problem, parameters, variables, draw = case.build()
    values = draw(case.batch)
    layer = ConvexLayer(problem, parameters, variables)
    assert layer.engine == "native"
    solution = layer.solve(*values)
    statuses, objectives, found = by_cvxpy(problem, parameters, values, variables)
    assert statuses == ["optimal"] * case.batch
    size = 1 + objectives.abs()
    assert ((solution.stats["objective"] - objectives).abs() / size).max() < 1e-6
    if case.unique:
        for i, expected in enumerate(found):
            for value, wanted in zip(solution.stats["variables"], expected, strict=True):
                torch.testing.assert_close(value[i], torch.tensor(wanted), atol=3e-5, rtol=1e-5)


def test_infeasible_and_unbounded_instances_of_a_batch():
    x, c, A, b = cp.Variable(2), cp.Parameter(2), cp.Parameter((3, 2)), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(c @ x), [A @ x <= b])
    values = randn(60, 2), randn(60, 3, 2, seed=1), randn(60, 3, seed=2)
    layer = ConvexLayer(problem, [c, A, b], [x], on_failure="nan")
    solution = layer.solve(*values)
    statuses, objectives, _ = by_cvxpy(problem, [c, A, b], values)
    names = {
        Status.CONVERGED: "optimal",
        Status.INFEASIBLE: "infeasible",
        Status.UNBOUNDED: "unbounded",
    }
    got = [names[status] for status in solution.statuses]
    # Of a program that is both, either may be said.
    both = [problem_is_infeasible(values[1][i], values[2][i]) for i in range(60)]
    for i in range(60):
        assert got[i] == statuses[i] or (both[i] and "optimal" not in (got[i], statuses[i])), i
    assert {"optimal", "infeasible", "unbounded"} <= set(got)
    good = solution.converged
    torch.testing.assert_close(
        solution.stats["objective"][good], objectives[good], rtol=1e-6, atol=1e-6
    )
    assert solution.stats["objective"][~good].isnan().all()


def problem_is_infeasible(A, b):
    x = cp.Variable(2)
    return cp.Problem(cp.Minimize(0), [A.numpy() @ x <= b.numpy()]).solve("CLARABEL") == np.inf


DUALS = [case for case in ZOO if case.unique_dual and case.build()[0].constraints]


@pytest.mark.parametrize("case", DUALS, ids=lambda case: case.name)
def test_duals_and_their_signs_are_those_of_cvxpy(case):
    problem, parameters, _, draw = case.build()
    duals = [dual for c in problem.constraints for dual in c.dual_variables]
    layer = ConvexLayer(problem, parameters, duals)
    values = draw(3)
    got = layer(*values)
    _, _, expected = by_cvxpy(problem, parameters, values, duals)
    for i in range(3):
        for dual, value, wanted in zip(duals, got, expected[i], strict=True):
            assert value.shape == (3, *dual.shape)
            torch.testing.assert_close(value[i], torch.as_tensor(wanted), atol=1e-4, rtol=1e-4)


# ---- derivatives ------------------------------------------------------------------------------------

# What cvxpylayers takes: constraints, and no parameter inside quad_form.
SHARED = [c for c in ZOO if c.unique and (b := c.build()[0]).is_dpp() and b.constraints]


@pytest.mark.parametrize("case", SHARED, ids=lambda case: case.name)
def test_gradients_agree_with_cvxpylayers(case):
    problem, parameters, variables, draw = case.build()
    values = [v.requires_grad_() for v in draw(3)]
    ours = ConvexLayer(problem, parameters, variables)
    theirs = CvxpyLayer(problem, parameters, variables, solver_args=RIGHT)
    weight = randn(*ours(*values)[0].shape, seed=9)
    grads = [
        torch.autograd.grad((weight * layer(*values)[0]).sum(), values) for layer in (ours, theirs)
    ]
    for p, a, b in zip(parameters, *grads, strict=True):
        if p.ndim == 2 and p.is_symmetric():  # cvxpylayers reads one triangle of it
            a, b = a + a.mT, b + b.mT
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def small(name):
    """A layer of the zoo and two instances for it."""
    build = next(case.build for case in ZOO if case.name == name)
    problem, parameters, variables, draw = build()
    return problem, parameters, variables, [v.requires_grad_() for v in draw(2)]


@pytest.mark.parametrize(
    "build", [lp_standard, box_least_squares, lambda: robust_lp(2, 2), facility]
)
def test_gradients_are_those_of_finite_differences(build):
    problem, parameters, variables, draw = build()
    values = [v.requires_grad_() for v in draw(2)]
    duals = [dual for c in problem.constraints for dual in c.dual_variables]
    layer = ConvexLayer(problem, parameters, variables + duals)

    def everything(*values):
        stats = layer.solve(*values).stats
        return *stats["variables"], stats["objective"]

    # in a random direction of parameters and results; box least squares in every one below
    assert gradcheck(everything, values, atol=1e-5, rtol=1e-4, fast_mode=True)


def test_every_entry_of_a_gradient():
    values = [v.requires_grad_() for v in (randn(1, 3, 2), randn(1, 3, seed=1))]
    assert gradcheck(ConvexLayer(*least_squares(2, 3)), values, atol=1e-6, rtol=1e-5)


def test_symmetric_parameters_have_symmetric_gradients():
    problem, parameters, variables, values = small("Markowitz")
    layer = ConvexLayer(problem, parameters, variables)
    assert gradcheck(lambda mu, S: layer(mu, (S + S.mT) / 2), values, atol=1e-6, fast_mode=True)
    gradient = torch.autograd.grad(layer(*values)[0].square().sum(), values)[1]
    torch.testing.assert_close(gradient, gradient.mT)


def test_second_derivatives():
    A, b = randn(1, 4, 3).requires_grad_(), randn(1, 4, seed=1).requires_grad_()
    layer = ConvexLayer(*least_squares(3, 4), order=2)
    assert gradgradcheck(lambda A, b: layer(A, b)[0], (A, b), atol=1e-5, fast_mode=True)
    with pytest.raises(ValueError, match="order: got 2, expected 1: diffcp"):
        ConvexLayer(*entropy(3), order=2)


@pytest.mark.parametrize("make", [lambda: least_squares(3, 4), lambda: entropy(3)])
def test_one_derivative_more_raises(make):
    layer = ConvexLayer(*make())
    values = [0.3 * rand(2, *p.shape).requires_grad_() for p in layer._parameters_of_problem]
    x = layer(*values)[0]
    (gradient,) = torch.autograd.grad(x[:, 0].sum(), values[-1], create_graph=True)
    with pytest.raises(RuntimeError, match="more often than it was attached for"):
        (gradient.sum() + values[-1].sum()).backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_forward_mode():
    problem, parameters, variables, values = small("group lasso")
    layer = ConvexLayer(problem, parameters, variables)
    tangents = [randn(*v.shape, seed=5) for v in values]
    weight = randn(2, 6, seed=6)
    x = layer(*values)[0]
    grads = torch.autograd.grad((weight * x).sum(), values)
    expected = sum((g * t).sum() for g, t in zip(grads, tangents, strict=True))
    with torch.autograd.forward_ad.dual_level():
        dual = [
            torch.autograd.forward_ad.make_dual(v.detach(), t)
            for v, t in zip(values, tangents, strict=True)
        ]
        tangent = torch.autograd.forward_ad.unpack_dual(layer(*dual)[0]).tangent
    torch.testing.assert_close((weight * tangent).sum(), expected)


def test_vmap_and_what_is_made_of_it():
    layer = ConvexLayer(*least_squares(3, 4))
    A, b = randn(4, 3), randn(5, 4, seed=1)
    point = lambda b: layer(A, b)[0]
    torch.testing.assert_close(torch.func.vmap(point)(b), layer(A, b)[0], atol=1e-9, rtol=1e-9)
    expected = torch.autograd.functional.jacobian(point, b[0])
    torch.testing.assert_close(torch.func.jacrev(point)(b[0]), expected)
    with pytest.raises(RuntimeError, match="torch.func"):
        torch.func.vmap(lambda c: ConvexLayer(*entropy(3))(c)[0])(b[:, :3])


def test_gradients_of_shared_parameters_are_summed():
    problem, parameters, variables, (A, b) = small("box least squares")
    layer = ConvexLayer(problem, parameters, variables)
    one = A[0].detach().requires_grad_()
    many = one.detach().expand(2, -1, -1).clone().requires_grad_()
    shared = torch.autograd.grad(layer(one, b)[0].square().sum(), one)[0]
    apart = torch.autograd.grad(layer(many, b)[0].square().sum(), many)[0]
    torch.testing.assert_close(shared, apart.sum(0))
    assert not torch.allclose(shared, apart.mean(0))
    single = layer(one, b[0])[0]
    assert single.shape == (4,)
    torch.testing.assert_close(single, layer(one, b)[0][0])


def least_squares(n, m):
    x, A, b = cp.Variable(n), cp.Parameter((m, n)), cp.Parameter(m)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b)), [x >= -0.3, x <= 0.3])
    return problem, [A, b], [x]


def entropy(n):
    x, c = cp.Variable(n), cp.Parameter(n)
    problem = cp.Problem(cp.Minimize(-c @ x - cp.sum(cp.entr(x))), [cp.sum(x) == 1])
    return problem, [c], [x]


# ---- the examples of cvxpylayers' papers and tutorial, from their maths --------------------------------


def test_relu_as_a_projection():
    x, y = cp.Variable(5), cp.Parameter(5)
    layer = ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [x >= 0]), [y], [x])
    y = randn(3, 5).requires_grad_()
    (x,) = layer(y)
    torch.testing.assert_close(x, y.relu())
    x.sum().backward()
    torch.testing.assert_close(y.grad, (y > 0).double())


def test_sigmoid_by_the_binary_entropy():
    x, y = cp.Variable(4), cp.Parameter(4)
    objective = -y @ x - cp.sum(cp.entr(x) + cp.entr(1 - x))
    layer = ConvexLayer(cp.Problem(cp.Minimize(objective)), [y], [x])
    assert layer.engine == "diffcp" and "exponential" in layer.why
    y = randn(2, 4).requires_grad_()
    (x,) = layer(y)
    torch.testing.assert_close(x, y.sigmoid(), atol=1e-6, rtol=1e-6)
    (gradient,) = torch.autograd.grad(x.sum(), y)
    torch.testing.assert_close(gradient, y.sigmoid() * (1 - y.sigmoid()), atol=1e-5, rtol=1e-5)


def test_softmax_by_the_entropy_and_sparsemax_by_the_square():
    layer = ConvexLayer(*entropy(5))
    c = randn(3, 5).requires_grad_()
    (x,) = layer(c)
    torch.testing.assert_close(x, c.softmax(1), atol=1e-7, rtol=1e-6)
    weight = randn(3, 5, seed=1)
    (got,) = torch.autograd.grad((weight * x).sum(), c)
    (wanted,) = torch.autograd.grad((weight * c.softmax(1)).sum(), c)
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-6)
    x, v = cp.Variable(5), cp.Parameter(5)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - v)), [cp.sum(x) == 1, x >= 0])
    (x,) = ConvexLayer(problem, [v], [x])(c)
    for row, point in zip(c.detach(), x, strict=True):
        tau = root_of_the_simplex(row)
        torch.testing.assert_close(point, (row - tau).clamp_min(0))


def root_of_the_simplex(v):
    """tau with sum (v - tau)_+ = 1, by bisection."""
    low, high = v.min() - 1, v.max()
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if (v - middle).clamp_min(0).sum() > 1 else (low, middle)
    return low


def test_a_quadratic_program_as_in_optnet():
    n, m, p = 4, 3, 1
    x, L, q = cp.Variable(n), cp.Parameter((n, n)), cp.Parameter(n)
    G, h, A, b = cp.Parameter((m, n)), cp.Parameter(m), cp.Parameter((p, n)), cp.Parameter(p)
    objective = 0.5 * cp.sum_squares(L @ x) + q @ x
    problem = cp.Problem(cp.Minimize(objective), [G @ x <= h, A @ x == b])
    layer = ConvexLayer(problem, [L, q, G, h, A, b], [x])
    shapes = (n, n), (n,), (m, n), (m,), (p, n), (p,)
    values = [randn(2, *shape, seed=k).requires_grad_() for k, shape in enumerate(shapes)]
    (got,) = layer(*values)
    Lv, qv, Gv, hv, Av, bv = values
    direct = QuadraticProgram()(Lv.mT @ Lv, qv, Gv, hv, Av, bv)
    torch.testing.assert_close(got, direct, atol=1e-7, rtol=1e-7)
    weight = randn(2, n, seed=9)
    for a, b in zip(
        torch.autograd.grad((weight * got).sum(), values),
        torch.autograd.grad((weight * direct).sum(), values),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_learning_a_portfolio_with_limited_risk():
    n, k = 4, 2
    w, mu, F, d = (
        cp.Variable(n),
        cp.Parameter(n),
        cp.Parameter((k, n)),
        cp.Parameter(n, nonneg=True),
    )
    risk = cp.norm(cp.hstack([F @ w, cp.multiply(d, w)]))
    problem = cp.Problem(cp.Maximize(mu @ w), [cp.sum(w) == 1, w >= 0, risk <= 0.4])
    layer = ConvexLayer(problem, [mu, F, d], [w])
    values = [0.1 * randn(2, n), 0.4 * randn(2, k, n, seed=1), 0.1 + 0.2 * rand(2, n, seed=2)]
    values = [v.requires_grad_() for v in values]
    solution = layer.solve(*values)
    _, objectives, _ = by_cvxpy(problem, [mu, F, d], values)
    torch.testing.assert_close(solution.stats["objective"], objectives, atol=1e-6, rtol=1e-6)
    assert gradcheck(layer, values, atol=1e-5, rtol=1e-4, fast_mode=True)


def test_logistic_regression_with_its_data_as_parameters():
    # data poisoning: how the weights move with the training points
    w, X = cp.Variable(2), cp.Parameter((6, 2))
    labels = np.array([1.0, 1, 1, -1, -1, -1])
    loss = cp.sum(cp.logistic(-cp.multiply(labels, X @ w))) / 6 + 0.1 * cp.sum_squares(w)
    layer = ConvexLayer(cp.Problem(cp.Minimize(loss)), [X], [w])
    X = randn(6, 2).requires_grad_()
    (w,) = layer(X)
    y = torch.tensor(labels)
    margin = (-y * (X @ w)).sigmoid()
    gradient = -(margin * y) @ X / 6 + 0.2 * w
    assert gradient.abs().max() < 1e-7
    # the implicit function theorem, by hand
    H = (X.mT * (margin * (1 - margin))) @ X / 6 + 0.2 * torch.eye(2)
    fixed = w.detach()
    stationary = lambda X: -((-y * (X @ fixed)).sigmoid() * y) @ X / 6 + 0.2 * fixed
    J = torch.autograd.functional.jacobian(stationary, X.detach())
    expected = -torch.linalg.solve(H.detach(), J.flatten(1)).unflatten(1, (6, 2))
    for k in range(2):
        (got,) = torch.autograd.grad(w[k], X, retain_graph=True)
        torch.testing.assert_close(got, expected[k], atol=1e-5, rtol=1e-4)


def test_a_geometric_program():
    x, y, z = (cp.Variable(pos=True) for _ in range(3))
    a, b, c = cp.Parameter(pos=True), cp.Parameter(pos=True), cp.Parameter()
    problem = cp.Problem(
        cp.Minimize(1 / (x * y * z)), [a * (x * y + x * z + y * z) <= b, x >= y**c]
    )
    layer = ConvexLayer(problem, [a, b, c], [x, y, z], gp=True)
    values = [torch.tensor(v, requires_grad=True) for v in (2.0, 1.0, 0.5)]
    solution = layer.solve(*values)
    for p, v in zip((a, b, c), values, strict=True):
        p.value = v.item()
    problem.solve("CLARABEL", gp=True, **TIGHT)
    for got, variable in zip(solution.stats["variables"], (x, y, z), strict=True):
        torch.testing.assert_close(got, torch.tensor(float(variable.value)), atol=1e-5, rtol=1e-5)
    assert abs(solution.stats["objective"].item() - problem.value) < 1e-5
    assert gradcheck(layer, values, eps=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"to be positive"):
        layer(torch.tensor(-1.0), *values[1:])
    # of monomials only: a linear program in the logarithms
    problem = cp.Problem(cp.Minimize(x * y), [a * x >= b, y >= x])
    layer = ConvexLayer(problem, [a, b], [x, y], gp=True)
    assert layer.engine == "native"
    two, three = torch.tensor(2.0, requires_grad=True), torch.tensor(3.0)
    got, _ = layer(two, three)
    torch.testing.assert_close(got.detach(), torch.tensor(1.5))
    got.backward()
    torch.testing.assert_close(two.grad, torch.tensor(-0.75))


@pytest.mark.parametrize("n", [2, 4])
def test_semidefinite_programs(n):
    # min <C, X> over X >= 0, tr X = 1: the eigenvector of the smallest eigenvalue
    X, C = cp.Variable((n, n), PSD=True), cp.Parameter((n, n), symmetric=True)
    constraints = [cp.trace(X) == 1, X << np.eye(n)]
    problem = cp.Problem(cp.Minimize(cp.trace(C @ X)), constraints)
    layer = ConvexLayer(problem, [C], [X])
    assert layer.engine == "diffcp" and "semidefinite" in layer.why
    M = randn(2, n, n)
    M = (M + M.mT).requires_grad_()
    (X,) = layer(M)
    _, vectors = torch.linalg.eigh(M)
    u = vectors[..., 0]
    projector = u[..., None] * u[..., None, :]
    torch.testing.assert_close(X, projector, atol=1e-6, rtol=1e-6)
    weight = randn(n, n, seed=1)
    weight = weight + weight.mT
    (got,) = torch.autograd.grad((weight * X).sum(), M)
    (wanted,) = torch.autograd.grad((weight * projector).sum(), M)
    torch.testing.assert_close(got, (wanted + wanted.mT) / 2, atol=1e-5, rtol=1e-4)


# ---- the engine beyond the native one -----------------------------------------------------------------


def beyond(**options):
    x, b, q = cp.Variable(2), cp.Parameter(), cp.Parameter(2)
    constraints = [x >= b, x[0] <= 1, cp.exp(x[1]) <= 3]
    problem = cp.Problem(cp.Minimize(q @ x + cp.exp(x[0])), constraints)
    return ConvexLayer(problem, [b, q], [x], **options)


def test_both_engines_give_the_same():
    problem, parameters, variables, values = small("group lasso")
    duals = [c.dual_variables[0] for c in problem.constraints]
    layers = [
        ConvexLayer(problem, parameters, variables + duals, engine=engine)
        for engine in ("native", "diffcp")
    ]
    assert [layer.engine for layer in layers] == ["native", "diffcp"]
    solutions = [layer.solve(*values) for layer in layers]
    for key in ("objective", "variables"):
        for a, b in zip(*(s.stats[key] for s in solutions), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    grads = [
        torch.autograd.grad(s.stats["variables"][0].sum() + s.stats["objective"].sum(), values)
        for s in solutions
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_diffcp_per_instance():
    b = torch.tensor([0.0, 2.0, 0.1, torch.nan], requires_grad=True)
    q = torch.ones(2, requires_grad=True)
    with pytest.raises(InfeasibleError, match="index 1 infeasible") as raised:
        beyond()(b, q)
    assert raised.value.instances.tolist() == [1]
    layer = beyond(on_failure="nan")
    solution = layer.solve(b, q)
    codes = [Status.CONVERGED, Status.INFEASIBLE, Status.CONVERGED, Status.NONFINITE]
    assert solution.statuses == codes
    x = solution.stats["variables"][0]
    torch.testing.assert_close(x[[0, 2]], torch.tensor([[0.0, 0], [0.1, 0.1]]), atol=1e-6, rtol=0)
    assert x[[1, 3]].isnan().all()
    (gradient,) = torch.autograd.grad(x[[0, 2]].sum(), b, retain_graph=True)
    torch.testing.assert_close(gradient, torch.tensor([2.0, 0, 2, 0]), atol=1e-6, rtol=0)
    (gradient,) = torch.autograd.grad(x[1].sum(), b)
    assert gradient.isnan().tolist() == [False, True, False, False]
    certificate = solution.stats["certificate"]
    assert certificate.isfinite().all(1).tolist() == [False, True, False, False]
    with pytest.raises(ConvergenceError):
        beyond()(b[2:], q)
    x, q = cp.Variable(2), cp.Parameter(2)
    problem = cp.Problem(cp.Minimize(q @ x + cp.exp(x[0])), [x[0] <= 1])
    unbounded = ConvexLayer(problem, [q], [x], on_failure="return").solve(torch.ones(2))
    assert unbounded.statuses == [Status.UNBOUNDED]


def test_a_solution_that_diffcp_misplaces_is_not_believed(monkeypatch):
    # diffcp puts Clarabel's duals of a 4 x 4 matrix back in the wrong order: hence SCS.
    n = 4
    X, C = cp.Variable((n, n), PSD=True), cp.Parameter((n, n), symmetric=True)
    problem = cp.Problem(cp.Minimize(cp.trace(C @ X)), [X << np.diag([1.0, 2, 3, 4])])
    M = randn(n, n)
    M = M + M.mT
    layer = ConvexLayer(problem, [C], [X])
    assert layer.solve(M).stats["solver"] == "diffcp with SCS"
    monkeypatch.setattr(door_diffcp, "_MISPLACED", 99)
    trusting = ConvexLayer(problem, [C], [X], on_failure="return").solve(M)
    assert trusting.stats["solver"] == "diffcp with Clarabel"
    same = torch.allclose(trusting.stats["variables"][0], layer(M)[0], atol=1e-5)
    assert same or not bool(trusting.converged)


# ---- what a module has to be ---------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: ConvexLayer(*least_squares(3, 4)), beyond])
def test_copies_state_and_dtype(make):
    layer = make()
    twin = copy.deepcopy(layer)
    assert layer.state_dict() == {} and not list(layer.parameters())
    shapes = [p.shape for p in layer._parameters_of_problem]
    values = [0.3 * rand(2, *shape, seed=k) for k, shape in enumerate(shapes)]
    torch.testing.assert_close(layer(*values), twin(*values))
    assert type(layer).__name__ in repr(layer) and layer.engine in repr(layer)
    single = [v.float().requires_grad_() for v in values]
    got = layer.float()(*single)[0]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), twin(*values)[0], atol=1e-6, rtol=1e-6)
    got.sum().backward()
    assert all(v.grad.dtype == torch.float32 and v.grad.isfinite().all() for v in single)
    solution = layer.solve(*single)
    assert {solution.value.dtype, solution.stats["objective"].dtype} == {torch.float32}
    mixed = layer(values[0], single[1])[0]
    assert mixed.dtype == torch.float64


def test_a_batch_of_none_and_a_problem_without_parameters():
    layer = ConvexLayer(*least_squares(3, 4))
    assert layer(torch.zeros(0, 4, 3), torch.zeros(0, 4))[0].shape == (0, 3)
    x = cp.Variable(2)
    (got,) = ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - 1)), [x <= 0.5]), [], [x])()
    torch.testing.assert_close(got, torch.full((2,), 0.5))


def test_variables_that_an_equality_defines_are_put_in_and_found_again():
    x, y, A, b = cp.Variable(3), cp.Variable(5), cp.Parameter((5, 3)), cp.Parameter(5)
    t = cp.Parameter(nonneg=True)
    constraints = [2 * y == A @ x - b, x >= -0.3, cp.sum(x) == 0.1]
    objective = t * cp.sum_squares(y) + cp.sum(y) + cp.sum_squares(x - 1) + 4
    problem = cp.Problem(cp.Minimize(objective), constraints)
    variables = [x, y, *(c.dual_variables[0] for c in constraints)]
    layer = ConvexLayer(problem, [A, b, t], variables)
    assert layer._solver.sizes[:2] == (
        3,
        layer.solve(*[torch.zeros(p.shape) for p in (A, b, t)]).value.shape[0] - 3,
    )
    values = randn(3, 5, 3), randn(3, 5, seed=1), 0.5 + rand(3, seed=2)
    solution = layer.solve(*values)
    _, objectives, expected = by_cvxpy(problem, [A, b, t], values, variables)
    torch.testing.assert_close(solution.stats["objective"], objectives, atol=1e-7, rtol=1e-7)
    for i in range(3):
        for got, wanted in zip(solution.stats["variables"], expected[i], strict=True):
            torch.testing.assert_close(got[i], torch.as_tensor(wanted), atol=1e-5, rtol=1e-5)
    values = [v[:1].requires_grad_() for v in values]
    assert gradcheck(layer, values, atol=1e-5, rtol=1e-4, fast_mode=True)
    # none of them left: still a program
    y = cp.Variable(2)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(y)), [y == cp.hstack([b[0], 2 * b[1]])])
    (got,) = ConvexLayer(problem, [b], [y])(torch.arange(5.0))
    torch.testing.assert_close(got, torch.tensor([0.0, 2.0]))


def test_a_norm_in_a_constraint_costs_no_variable():
    problem, parameters, variables, draw = robust_lp(4, 3)  # 3 norms and 4 absolute values
    layer = ConvexLayer(problem, parameters, variables)
    assert layer._solver.sizes == (4, 7, 0, 8 + 3 * 5)
    values = list(draw(3))
    values[3] = torch.tensor([1.0, -40, 1])  # b of one row, out of reach for the second instance
    solution = ConvexLayer(problem, parameters, variables, on_failure="nan").solve(*values)
    assert [s.name for s in solution.statuses] == ["CONVERGED", "INFEASIBLE", "CONVERGED"]
    assert solution.stats["slack"].shape == solution.stats["dual"].shape == (3, 3 + 12 + 3 * 5)
    certificate = gradient_certificate(layer.solve(*(v[:1] for v in values)))
    assert not bool(certificate["degenerate"])
    # a variable that is asked for stays, and so does the last one
    x, t, b = cp.Variable(2), cp.Variable(), cp.Parameter()
    problem = cp.Problem(cp.Minimize(cp.sum(x)), [cp.norm(x) <= t, t <= b])
    point, bound = ConvexLayer(problem, [b], [x, t])(torch.tensor(2.0))
    torch.testing.assert_close(point, torch.full((2,), -(2.0**0.5)))
    torch.testing.assert_close(bound, torch.tensor(2.0))
    problem = cp.Problem(cp.Minimize(0), [t <= b])
    layer = ConvexLayer(problem, [b], [problem.constraints[0].dual_variables[0]])
    torch.testing.assert_close(layer(torch.tensor(2.0))[0], torch.tensor(0.0))


def test_warm_start():
    layer = ConvexLayer(*least_squares(3, 4))
    A, b = randn(5, 4, 3), randn(5, 4, seed=1)
    first = layer.solve(A, b)
    second = layer.solve(A, b + 1e-3, start=first)
    assert second.steps.max() < first.steps.max()
    torch.testing.assert_close(second.value, layer.solve(A, b + 1e-3).value, atol=1e-8, rtol=1e-8)
    with pytest.raises(ValueError, match="start"):
        beyond().solve(torch.tensor(0.0), torch.ones(2), start=first)


@pytest.mark.parametrize("engine", ["native", "diffcp"])
def test_declared_structure_of_variables_and_parameters(engine):
    # diagonal, sparse, nonnegative, three-dimensional; a parameter of shape ()
    D, S = cp.Variable((2, 2), diag=True), cp.Variable((2, 3), sparsity=[(0, 1), (2, 0)])
    y, T = cp.Variable((2, 1), nonneg=True), cp.Variable((2, 2, 2))
    d, t, Y = cp.Parameter((2, 2), diag=True), cp.Parameter(), cp.Parameter((2, 1))
    B = np.arange(6.0).reshape(2, 3)
    cube = np.arange(8.0).reshape(2, 2, 2)
    problem = cp.Problem(
        cp.Minimize(
            cp.sum_squares(D - d) + cp.sum_squares(S - t * B) + cp.sum_squares(y - Y)
            + cp.sum_squares(T - t * cube)
        ),
        [D[0, 0] <= 10],
    )  # fmt: skip
    layer = ConvexLayer(problem, [t, Y, d], [D, S, y, T], engine=engine)
    diagonal = torch.diag(torch.tensor([3.0, 4.0]))
    Dv, Sv, yv, Tv = layer(torch.tensor([2.0, -1.0]), torch.tensor([[-1.0], [5.0]]), diagonal)
    scale = torch.tensor([2.0, -1.0])
    mask = torch.tensor([[0.0, 0, 1], [1, 0, 0]])
    close = {"atol": 1e-6, "rtol": 1e-6}
    torch.testing.assert_close(Dv, diagonal.expand(2, -1, -1), **close)
    torch.testing.assert_close(Sv, scale[:, None, None] * torch.tensor(B) * mask, **close)
    torch.testing.assert_close(yv, torch.tensor([[0.0], [5.0]]).expand(2, -1, -1), **close)
    torch.testing.assert_close(Tv, scale[:, None, None, None] * torch.tensor(cube), **close)
    with pytest.raises(ValueError, match="sparsity"):
        layer(torch.tensor(1.0), torch.zeros(2, 1), torch.ones(2, 2))


def test_failures_of_the_native_engine_are_one_instances_own():
    x, b = cp.Variable(2), cp.Parameter()
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x)), [x >= b, x <= 1])
    b_values = torch.tensor([0.5, 2.0, 0.25], requires_grad=True)
    with pytest.raises(InfeasibleError, match="infeasible"):
        ConvexLayer(problem, [b], [x])(b_values)
    for choice in ("nan", "return"):
        layer = ConvexLayer(problem, [b], [x], on_failure=choice)
        (got,) = layer(b_values)
        assert got[1].isnan().all()
        good = torch.tensor([[0.5, 0.5], [0.25, 0.25]])
        torch.testing.assert_close(got[[0, 2]], good)
        (gradient,) = torch.autograd.grad(got[[0, 2]].sum(), b_values)
        torch.testing.assert_close(gradient, torch.tensor([2.0, 0.0, 2.0]))


# ---- bad input ---------------------------------------------------------------------------------------


def test_bad_problems():
    x, p, q = cp.Variable(2), cp.Parameter(2), cp.Parameter()
    good = cp.Problem(cp.Minimize(cp.sum_squares(x - p)), [x >= 0])

    def refused(error, match, *arguments, **options):
        with pytest.raises(error, match=match):
            ConvexLayer(*arguments, **options)

    refused(TypeError, "problem: got str", "min x", [p], [x])
    refused(TypeError, "parameters: got Parameter", good, p, [x])
    refused(TypeError, "variables: got Parameter, expected each a cvxpy.Variable", good, [p], [p])
    refused(ValueError, "missing", good, [], [x])
    refused(ValueError, "not of the problem", good, [p, q], [x])
    refused(ValueError, "once", good, [p, p], [x])
    refused(ValueError, "variables: got none", good, [p], [])
    refused(ValueError, "dual variables of its", good, [p], [cp.Variable(name="other")])
    refused(ValueError, "order", good, [p], [x], order=0)
    refused(ValueError, "Did you mean 'raise'", good, [p], [x], on_failure="rise")
    refused(ValueError, "engine", good, [p], [x], engine="nativ")
    refused(TypeError, "solver", good, [p], [x], solver="SCS")
    refused(ValueError, "Did you mean 'eps'", good, [p], [x], solver_args={"epss": 1})
    product = cp.Problem(cp.Minimize(cp.sum_squares(x - p)), [q * p @ x <= 1])
    refused(ValueError, "not DPP", product, [p, q], [x])
    refused(ValueError, "gp=True", cp.Problem(cp.Minimize(cp.sqrt(x[0]) + p @ x)), [p], [x])
    whole = cp.Variable(2, integer=True)
    refused(ValueError, "integer", cp.Problem(cp.Minimize(p @ whole), [whole >= 0]), [p], [whole])
    z = cp.Variable(2, complex=True)
    refused(ValueError, "complex", cp.Problem(cp.Minimize(cp.norm(z - p))), [p], [z])
    Q = cp.Parameter((2, 2), PSD=True)
    both = cp.Problem(cp.Minimize(cp.quad_form(x, Q) + cp.sum(cp.exp(x))))
    refused(ValueError, "sum_squares", both, [Q], [x])
    refused(ValueError, "exponential", *entropy(3), engine="native")


def test_bad_parameters():
    x, p = cp.Variable(2), cp.Parameter(2, name="p")
    t, S = cp.Parameter(nonneg=True, name="t"), cp.Parameter((2, 2), PSD=True, name="S")
    problem = cp.Problem(cp.Minimize(cp.quad_form(x, S) + t * cp.norm1(x) - p @ x))
    layer = ConvexLayer(problem, [p, t, S], [x])
    one, eye = torch.tensor(1.0), torch.eye(2)

    def refused(error, match, *values):
        with pytest.raises(error, match=match):
            layer(*values)

    refused(ValueError, "got 2 tensors, expected 3: p, t, S", torch.ones(2), one)
    refused(TypeError, "p: got ndarray", np.ones(2), one, eye)
    refused(TypeError, "p: got torch.int64", torch.ones(2, dtype=torch.long), one, eye)
    refused(
        ValueError, r"p: got shape \(3,\), expected \(2,\) or \(batch, 2\)", torch.ones(3), one, eye
    )
    refused(ValueError, r"p: got shape \(1, 1, 2\)", torch.ones(1, 1, 2), one, eye)
    refused(ValueError, r"got \{'p': 3, 't': 4\}", torch.ones(3, 2), torch.ones(4), eye)
    refused(ValueError, "t: .*nonnegative", torch.ones(2), -one, eye)
    refused(ValueError, "S: .*symmetric", torch.ones(2), one, torch.tensor([[1.0, 1], [0, 1]]))
    refused(ValueError, "S: .*semidefinite", torch.ones(2), one, -eye)
    refused(ValueError, "S: got a tensor on meta", torch.ones(2), one, eye.to("meta"))
    with pytest.raises(ValueError, match="solver_args"):
        layer(torch.ones(2), one, eye, solver_args={"precision": 1})
    got = layer(torch.ones(2), one, eye, solver_args={"eps": 1e-8, "max_iters": 10})[0]
    torch.testing.assert_close(got, torch.zeros(2))


# ---- inside cvxpylayers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["LP in a box", "Markowitz", "box least squares", "robust LP", "symmetric matrix"]
)
def test_the_native_solver_inside_an_unchanged_cvxpylayer(name):
    problem, parameters, variables, values = small(name)
    duals = [problem.constraints[0].dual_variables[0]]
    theirs = CvxpyLayer(problem, parameters, variables + duals, solver=NativeCone())
    ours = ConvexLayer(problem, parameters, variables + duals)
    results = [layer(*values) for layer in (ours, theirs)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)
    weights = [randn(*r.shape, seed=k) for k, r in enumerate(results[0])]
    grads = [
        torch.autograd.grad(
            sum((w * r).sum() for w, r in zip(weights, result, strict=True)), values
        )
        for result in results
    ]
    for p, a, b in zip(parameters, *grads, strict=True):
        if p.ndim == 2 and p.is_symmetric():
            a, b = a + a.mT, b + b.mT
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-7)


def test_native_cone_keeps_the_dtype_and_takes_single_instances():
    layer = CvxpyLayer(*least_squares(3, 4), solver=NativeCone())
    A, b = randn(4, 3).float().requires_grad_(), randn(4, seed=1).float()
    (x,) = layer(A, b)
    assert x.shape == (3,) and x.dtype == torch.float32
    x.sum().backward()
    assert A.grad.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(layer(A, b, solver_args={"tol": 1e-6})[0], x.detach())


def test_native_cone_fails_as_it_is_told_to():
    x, b = cp.Variable(2), cp.Parameter()
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x)), [x >= b, x <= 1])
    values = torch.tensor([0.5, 2.0], requires_grad=True)
    with pytest.raises(InfeasibleError):
        CvxpyLayer(problem, [b], [x], solver=NativeCone())(values)
    (got,) = CvxpyLayer(problem, [b], [x], solver=NativeCone(on_failure="nan"))(values)
    assert got.isnan().tolist() == [[False, False], [True, True]]
    (gradient,) = torch.autograd.grad(got[0].sum(), values)
    torch.testing.assert_close(gradient, torch.tensor([2.0, 0.0]))
    solver = NativeCone(ConeSolver(max_steps=1))
    with pytest.raises(ConvergenceError):
        CvxpyLayer(problem, [b], [x], solver=solver)(values[:1])
    with pytest.raises(ValueError, match="one of its own"):
        CvxpyLayer(problem, [b], [x], solver=solver)
    with pytest.raises(ValueError, match="solver_args: got 'eps'"):
        CvxpyLayer(problem, [b], [x], solver=NativeCone())(values[:1], solver_args={"eps": 1e-6})
    problem, parameters, variables = entropy(3)
    with pytest.raises(ValueError, match="exponential cones, expected zero"):
        CvxpyLayer(problem, parameters, variables, solver=NativeCone())


def test_constraints_set_apart_are_refused(monkeypatch):
    # cvxpy 1.9.3 moves x >= 0 beside the matrix for solvers that say they take it so.
    x, b = cp.Variable(3), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - b)), [x >= 0])
    point = torch.tensor([-1.0, 2.0, -3.0])
    for layer in (
        ConvexLayer(problem, [b], [x]),
        CvxpyLayer(problem, [b], [x], solver=NativeCone()),
    ):
        torch.testing.assert_close(layer(point)[0], point.clamp_min(0))
    kinds = frozenset({"nonneg", "soc"})
    monkeypatch.setattr(CLARABEL, "DIR_CONE_KINDS", kinds, raising=False)
    fresh = cp.Problem(cp.Minimize(cp.sum_squares(x - b)), [x >= 0])
    if not hasattr(ConicSolver, "DIR_CONE_KINDS"):
        pytest.skip("this cvxpy sets nothing apart")
    with pytest.raises(RuntimeError, match="dropped silently"):
        ConvexLayer(fresh, [b], [x])
    with pytest.raises(RuntimeError, match="dropped silently"):
        CvxpyLayer(fresh, [b], [x], solver=NativeCone())


def test_a_form_with_anything_beside_its_matrix_is_refused():
    class Form:
        dir_cones = ()
        lower_bounds = None
        upper_bounds = np.array([np.inf, np.inf])

    refuse_set_apart(Form())
    for name, value in (("dir_cones", [object()]), ("lower_bounds", np.array([0.0, -np.inf]))):
        bad = Form()
        setattr(bad, name, value)
        with pytest.raises(RuntimeError, match=name):
            refuse_set_apart(bad)
