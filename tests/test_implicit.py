"""Gradients of fixed points: exact to the order asked for, in every mode, or an error."""

import math

import pytest
import torch
from problems import monotone_matrix, randn, row_sums
from torch.autograd import gradcheck, gradgradcheck

from implicitdl import ConvergenceError, EquilibriumLayer, attach, fixed_point
from implicitdl.activations import Blocks, LeakyReLU, ReLU, Sigmoid, Softmax, Tanh
from implicitdl.implicit import (
    Equation,
    Implicit,
    Neumann,
    OneStep,
    Unrolled,
    equilibrium,
    get_adjoint,
)
from implicitdl.maps import AffineMap
from implicitdl.solution import ConvergenceWarning
from implicitdl.solvers import (
    Anderson,
    Auto,
    Broyden,
    ForwardBackward,
    Newton,
    PeacemanRachford,
    Picard,
)

TIGHT = {"rtol": 1e-13, "atol": 1e-15}
GENERAL = [
    Picard(**TIGHT),
    Anderson(**TIGHT),
    Broyden(**TIGHT),
    Newton(**TIGHT),
    Newton(linear="krylov", forcing=1e-4, **TIGHT),
    Auto(**TIGHT),
]
SPLITTINGS = [ForwardBackward(max_steps=20000, **TIGHT), PeacemanRachford(**TIGHT)]
PHIS = [
    Tanh(),
    ReLU(),
    LeakyReLU(negative_slope=0.1),
    Softmax(),
    Blocks(parts=((Tanh(), 2), (Softmax(), 2))),
]
N, M = 4, 3


def named(x):
    return x.name if hasattr(x, "name") else type(x).__name__


def tensors(m=M):
    A = row_sums(randn(N, N, seed=1), 0.6).requires_grad_()
    return A, randn(m, N, seed=2).requires_grad_()


def equation(phi=None, solver=None, **facts):
    solver = solver or Auto(**TIGHT)
    return Equation(phi or Tanh(), **facts, solver=solver, adjoint_solver=solver).with_spec()


def structured(phi=None, solver=None, **facts):
    eq = equation(phi, solver, **facts)
    return lambda A, v: equilibrium(A, v, eq)


def closure(order=1, solver=None, adjoint=None):
    """A closure over a weight, something computed from it, and the input."""

    def g(W, v):
        other = W.sin() / 10
        return fixed_point(
            lambda z: torch.tanh(z @ W.mT + z @ other.mT + v),
            torch.zeros_like(v.detach()),
            solver=solver or Auto(**TIGHT),
            adjoint=adjoint or Implicit(order=order),
        ).value

    return g


# ---- finite differences -------------------------------------------------------------------------


@pytest.mark.parametrize("phi", PHIS, ids=named)
def test_structured_derivatives_of_orders_one_and_two(phi):
    A, v = tensors()
    f = structured(phi)
    assert gradcheck(f, (A, v), check_forward_ad=True)
    assert gradgradcheck(f, (A, v), check_fwd_over_rev=True)


@pytest.mark.parametrize("phi", [Tanh(), PHIS[-1]], ids=named)
def test_structured_derivatives_of_order_three(phi):
    A, v = tensors(1)
    A = A.detach()
    f = structured(phi)

    def second(v):
        y = (f(A, v) ** 2).sum()
        (g,) = torch.autograd.grad(y, v, create_graph=True)
        (h,) = torch.autograd.grad((g**2).sum(), v, create_graph=True)
        return h

    assert gradcheck(second, (v,))


@pytest.mark.parametrize("solver", [*GENERAL, *SPLITTINGS], ids=named)
def test_structured_derivatives_with_every_solver(solver):
    A, v = tensors()
    f = structured(Sigmoid() if solver in SPLITTINGS else Tanh(), solver)
    assert gradcheck(f, (A, v), check_forward_ad=True)
    assert gradgradcheck(f, (A, v))


@pytest.mark.parametrize("solver", SPLITTINGS, ids=named)
def test_structured_derivatives_of_a_monotone_equation(solver):
    A = monotone_matrix(N, 0.3).requires_grad_()
    v = randn(M, N, seed=2).requires_grad_()
    assert gradcheck(structured(ReLU(), solver, monotone=0.29), (A, v))


@pytest.mark.parametrize("solver", GENERAL, ids=named)
def test_closure_derivatives_with_every_solver(solver):
    W, v = tensors()
    assert gradcheck(closure(1, solver), (W, v), check_forward_ad=True)


@pytest.mark.parametrize("solver", [Anderson(**TIGHT), Newton(**TIGHT)], ids=named)
def test_second_derivatives_of_a_closure(solver):
    W, v = tensors(2)
    assert gradgradcheck(closure(2, solver), (W, v))


def test_third_derivatives_of_a_closure():
    a = torch.tensor([[0.3], [1.2]], requires_grad=True)
    x = fixed_point(
        lambda z: (z + a / z) / 2, torch.ones(2, 1), solver=Newton(**TIGHT), adjoint=Implicit(order=3)
    ).value
    expected = a.detach() ** 0.5
    for k in range(3):
        (x,) = torch.autograd.grad(x.sum(), a, create_graph=k < 2)
        expected = expected * (0.5 - k) / a.detach()
        torch.testing.assert_close(x.detach(), expected, rtol=1e-9, atol=0)


def test_deriving_a_closure_more_often_than_attached_raises():
    W, v = tensors()
    for order in (1, 2):
        g = (closure(order)(W, v) ** 2).sum()
        for _ in range(order):
            g = torch.autograd.grad(g, (W, v), create_graph=True)
            g = sum((t**2).sum() for t in g)
        with pytest.raises(RuntimeError, match=r"Implicit\(order=2\)"):
            torch.autograd.grad(g, (W, v))
    with pytest.raises(RuntimeError, match="more often than it was attached"):
        gradgradcheck(closure(1), (W, v))


def test_a_penalty_on_the_gradient_in_u_alone_is_guarded_too():
    """The guard lies on the path to the parameters, whichever of them is asked for."""
    W, v = tensors()
    (g,) = torch.autograd.grad(closure(1)(W, v).sum(), v, create_graph=True)
    with pytest.raises(RuntimeError, match="more often"):
        (g**2).sum().backward()


# ---- implicit = unrolled ------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: closure(1), lambda: structured()], ids=["rows", "affine"])
def test_implicit_equals_unrolled(make):
    W, v = tensors()
    c = randn(M, N, seed=5)
    if make()(W, v).grad_fn is None:
        pytest.fail("no graph")
    unrolled = closure(adjoint=Unrolled(steps=200))
    if make()(W, v).grad_fn.name() == "AttachBackward":
        eq = equation()

        def unrolled(W, v):
            f = eq.map(W, v)
            return fixed_point(f, adjoint=Unrolled(steps=200)).value

    got = torch.autograd.grad((make()(W, v) * c).sum(), (W, v))
    expected = torch.autograd.grad((unrolled(W, v) * c).sum(), (W, v))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_structured_equals_closure_to_second_order():
    A, v = tensors(2)
    f = structured(Tanh())

    def g(A, v):
        return fixed_point(
            lambda z: torch.tanh(z @ A.mT + v),
            torch.zeros(2, N),
            solver=Auto(**TIGHT),
            adjoint=Implicit(order=2),
        ).value

    for order in (1, 2):
        out = []
        for h in (f, g):
            y = (h(A, v) ** 3).sum()
            for _ in range(order):
                grads = torch.autograd.grad(y, (A, v), create_graph=True)
                y = sum((t**2).sum() for t in grads)
            out.append(grads)
        for a, b in zip(*out, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_fixed_point_of_an_affine_map_is_differentiable_and_starts_at_phi():
    A, v = tensors()
    f = AffineMap(A, v, Tanh())
    solution = fixed_point(f, solver=Auto(**TIGHT), record=True)
    assert torch.equal(solution.stats["trajectory"][0], torch.tanh(v.detach()))
    torch.testing.assert_close(solution.value, structured()(A, v))
    got = torch.autograd.grad(solution.value.sum(), (A, v))
    expected = torch.autograd.grad(structured()(A, v).sum(), (A, v))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    other = fixed_point(f, torch.ones(M, N), solver=Auto(**TIGHT), record=True)
    assert torch.equal(other.stats["trajectory"][0], torch.ones(M, N))


@pytest.mark.parametrize("order", [1, 2])
def test_attach_makes_any_solution_differentiable(order):
    a = torch.tensor([[2.0], [3.0]], requires_grad=True)
    z = attach(lambda z: (z + a / z) / 2, a.detach().sqrt(), order=order)
    torch.testing.assert_close(z.detach(), a.detach().sqrt())
    (g,) = torch.autograd.grad(z.sum(), a, create_graph=order > 1)
    torch.testing.assert_close(g.detach(), 0.5 / a.detach().sqrt(), rtol=1e-10, atol=0)
    if order > 1:
        (h,) = torch.autograd.grad(g.sum(), a)
        torch.testing.assert_close(h, -0.25 * a.detach() ** -1.5, rtol=1e-10, atol=0)
    with torch.no_grad():
        z = attach(lambda z: (z + a / z) / 2, a.sqrt())
        assert not z.requires_grad


# ---- one graph, used in many ways ---------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-8, 1e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["closure", "affine"])
def test_the_gradient_scales_with_the_loss(kind, dtype, scale):
    W = row_sums(randn(12, 12, seed=1), 0.9).to(dtype).requires_grad_()
    v = randn(6, 12, seed=2).to(dtype)
    c = randn(6, 12, seed=3).to(dtype)

    def gradient(s):
        if kind == "affine":
            x = fixed_point(AffineMap(W, v, Tanh())).value
        else:
            x = fixed_point(lambda z: torch.tanh(z @ W.mT + v), torch.zeros_like(v)).value
        return torch.autograd.grad((x * c).sum() * s, W)[0].double() / s

    base = gradient(1.0)
    assert float((gradient(scale) - base).norm() / base.norm()) < 1e-6


def test_one_loud_sample_does_not_drown_a_quiet_one():
    """The adjoint is solved to a relative tolerance of each sample's own gradient."""
    A, v = tensors()
    weights = torch.tensor([[1.0], [1e-9], [1e9]])
    f = structured(solver=Auto())
    (g,) = torch.autograd.grad((f(A, v) * weights).sum(), v)
    (each,) = torch.autograd.grad(f(A, v).sum(), v)
    torch.testing.assert_close(g / weights, each, rtol=1e-9, atol=0)
    x = closure(solver=Auto())
    (g,) = torch.autograd.grad((x(A, v) * weights).sum(), v)
    (each,) = torch.autograd.grad(x(A, v).sum(), v)
    torch.testing.assert_close(g / weights, each, rtol=1e-9, atol=0)


@pytest.mark.parametrize("make", [lambda: closure(2), structured], ids=["closure", "affine"])
def test_graphs_are_kept_shared_and_independent(make):
    W, v = tensors()
    f = make()
    y = f(W, v).pow(2).sum()
    first = torch.autograd.grad(y, (W, v), retain_graph=True)
    again = torch.autograd.grad(y, (W, v), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    # Two forwards, one backward.
    total = torch.autograd.grad(f(W, v).pow(2).sum() + 2 * f(W, 2 * v).sum(), W)[0]
    parts = first[0] + 2 * torch.autograd.grad(f(W, 2 * v).sum(), W)[0]
    torch.testing.assert_close(total, parts, rtol=1e-9, atol=1e-12)
    # Nested: the equilibrium of an equilibrium.
    assert gradcheck(lambda W, v: f(W, f(W, v)), (W, v))


@pytest.mark.parametrize("make", [closure, structured], ids=["closure", "affine"])
def test_no_graph_where_none_is_asked_for(make):
    W, v = tensors()
    with torch.no_grad():
        assert not make()(W, v).requires_grad
    assert not make()(W.detach(), v.detach()).requires_grad
    got = torch.autograd.grad(make()(W.detach(), v).sum(), v)[0]
    torch.testing.assert_close(got, torch.autograd.grad(make()(W, v).sum(), v)[0])


def test_zero_and_one_hot_gradients():
    W, v = tensors()
    for f in (closure(), structured()):
        g = torch.autograd.grad((f(W, v) * 0).sum(), (W, v))
        assert not any(bool(t.any()) for t in g)
        (g,) = torch.autograd.grad(f(W, v)[1].sum(), v)
        assert bool(g[1].any()) and not bool(g[[0, 2]].any())


def test_shapes_beyond_rows():
    a = randn(2, 3, 2, seed=1).requires_grad_()
    f = lambda a: fixed_point(  # noqa: E731
        lambda z: 0.5 * torch.cos(z.flip(1)) + a, torch.zeros(2, 3, 2), solver=Auto(**TIGHT)
    ).value
    assert gradcheck(f, (a,), check_forward_ad=True)
    flat = randn(3, seed=1).requires_grad_()
    g = lambda a: fixed_point(lambda z: 0.5 * torch.cos(z) + a, torch.zeros(3)).value  # noqa: E731
    assert gradcheck(g, (flat,))


def test_an_empty_batch_has_gradients_of_zero():
    A, _ = tensors()
    v = torch.zeros(0, N, requires_grad=True)
    for f in (closure(), structured()):
        g = torch.autograd.grad(f(A, v).sum(), (A, v))
        assert not bool(g[0].any()) and g[1].shape == (0, N)


def test_a_closure_that_does_not_use_its_argument():
    a = randn(M, N).requires_grad_()
    for solver in GENERAL:
        x = fixed_point(lambda z: 2 * a, torch.zeros(M, N), solver=solver).value
        (g,) = torch.autograd.grad(x.sum(), a)
        torch.testing.assert_close(g, torch.full_like(a, 2.0))


# ---- biased adjoints ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["closure", "affine"])
@pytest.mark.parametrize(
    "make, extra", [(lambda k: OneStep(steps=k), 0), (lambda k: Neumann(terms=k), 1)]
)
def test_the_bias_falls_at_the_documented_order(make, extra, kind):
    """On a scaled orthogonal map the relative bias is kappa^k, exactly."""
    kappa = 0.7
    Q = torch.linalg.qr(randn(N, N))[0] * kappa
    v = randn(M, N, seed=2).requires_grad_()
    c = randn(M, N, seed=3)

    def gradient(adjoint):
        if kind == "affine":
            from implicitdl.activations import Identity

            f = AffineMap(Q, v, Identity())
        else:
            f = lambda z: z @ Q.mT + v  # noqa: E731
        x = fixed_point(f, torch.zeros(M, N), solver=Auto(**TIGHT), adjoint=adjoint).value
        return torch.autograd.grad((x * c).sum(), v)[0]

    exact = gradient(Implicit())
    for k in (1, 2, 5, 10):
        bias = (gradient(make(k)) - exact).norm() / exact.norm()
        torch.testing.assert_close(bias, torch.tensor(kappa ** (k + extra)), rtol=1e-8, atol=0)


@pytest.mark.parametrize(
    "adjoint", [OneStep(steps=80), OneStep(steps=120, damping=0.3), Neumann(terms=80), Unrolled()]
)
def test_enough_of_a_biased_adjoint_is_exact(adjoint):
    W, v = tensors()
    assert gradcheck(closure(adjoint=adjoint), (W, v))


def test_damped_one_step_is_the_phantom_gradient():
    a = torch.tensor([[0.4]], requires_grad=True)
    x = fixed_point(
        lambda z: 0.5 * z + a, torch.zeros(1, 1), adjoint=OneStep(steps=2, damping=0.25)
    ).value
    # One damped step has slope s = 0.75 * 0.5 + 0.25 in z and 0.75 in a.
    (g,) = torch.autograd.grad(x.sum(), a)
    assert float(g) == pytest.approx(0.75 * (1 + 0.625))
    assert float(x.detach()) == pytest.approx(0.8)


def test_neumann_of_no_terms_is_one_step():
    W, v = tensors()
    a = torch.autograd.grad(closure(adjoint=Neumann(terms=0))(W, v).sum(), W)[0]
    b = torch.autograd.grad(closure(adjoint=OneStep())(W, v).sum(), W)[0]
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_unrolled_says_when_it_has_not_arrived():
    f = lambda z: 0.9 * z + 1  # noqa: E731
    with pytest.raises(ConvergenceError, match="within 5 steps"):
        fixed_point(f, torch.zeros(2, 1), adjoint=Unrolled(steps=5))
    solution = fixed_point(f, torch.zeros(2, 1), adjoint=Unrolled(steps=400))
    assert solution.steps.tolist() == [400, 400] and bool(solution.converged.all())


# ---- torch.func ---------------------------------------------------------------------------------


@pytest.mark.parametrize("phi", [Tanh(), ReLU(), PHIS[-1]], ids=named)
def test_functional_transforms(phi):
    A, v = (t.detach() for t in tensors())
    f = structured(phi)
    for arg in (0, 1):
        rev, fwd = torch.func.jacrev(f, arg)(A, v), torch.func.jacfwd(f, arg)(A, v)
        expected = torch.autograd.functional.jacobian(f, (A, v))[arg]
        torch.testing.assert_close(rev, expected, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(fwd, expected, rtol=1e-9, atol=1e-11)
    loss = lambda v: f(A, v).pow(3).sum()  # noqa: E731
    expected = torch.autograd.functional.hessian(loss, v)
    torch.testing.assert_close(torch.func.hessian(loss)(v), expected, rtol=1e-8, atol=1e-10)
    loss = lambda A: f(A, v[:1]).pow(3).sum()  # noqa: E731
    expected = torch.autograd.functional.hessian(loss, A)
    torch.testing.assert_close(torch.func.hessian(loss)(A), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("phi", [Tanh(), PHIS[-1]], ids=named)
def test_vmap_over_inputs_weights_and_both(phi):
    A, v = (t.detach() for t in tensors())
    f = structured(phi)
    loss = lambda A, v: f(A, v).pow(2).sum()  # noqa: E731
    As = torch.stack([A, A / 2, -A])
    vs = torch.stack([v, v + 1, 2 * v])
    for dims, pairs in (
        ((0, None), [(a, v) for a in As]),
        ((None, 0), [(A, w) for w in vs]),
        ((0, 0), list(zip(As, vs, strict=True))),
    ):
        args = (As if dims[0] == 0 else A, vs if dims[1] == 0 else v)
        got = torch.func.vmap(f, dims)(*args)
        torch.testing.assert_close(got, torch.stack([f(*p) for p in pairs]))
        for arg in (0, 1):
            got = torch.func.vmap(torch.func.grad(loss, arg), dims)(*args)
            expected = torch.stack([torch.func.grad(loss, arg)(*p) for p in pairs])
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    moved = torch.func.vmap(f, (2, 1))(As.movedim(0, 2), vs.movedim(0, 1))
    torch.testing.assert_close(moved, torch.stack([f(a, w) for a, w in zip(As, vs, strict=True)]))
    jac = torch.func.vmap(torch.func.jacfwd(f, 1), (0, None))(As, v)
    expected = torch.stack([torch.func.jacfwd(f, 1)(a, v) for a in As])
    torch.testing.assert_close(jac, expected, rtol=1e-9, atol=1e-11)
    twice = torch.func.vmap(torch.func.vmap(f, (None, 0)), (0, None))(As, vs)
    expected = torch.stack([torch.stack([f(a, w) for w in vs]) for a in As])
    torch.testing.assert_close(twice, expected)


def test_per_sample_gradients():
    A, v = tensors()
    f = structured(ReLU())
    loss = lambda A, v: f(A, v[None]).pow(2).sum()  # noqa: E731
    got = torch.func.vmap(torch.func.grad(loss), (None, 0))(A.detach(), v.detach())
    expected = torch.stack([torch.autograd.grad(loss(A, w), A)[0] for w in v.detach()])
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got.sum(0), torch.autograd.grad(f(A, v).pow(2).sum(), A)[0])


def test_transforms_over_a_closure_are_refused_with_the_reason():
    with pytest.raises(RuntimeError, match="inside a torch.func transform"):
        torch.func.vmap(lambda v: fixed_point(lambda z: torch.tanh(z / 2 + v), v).value)(randn(2, 3))
    with pytest.raises(RuntimeError, match="torch.func transform"):
        torch.func.grad(lambda v: fixed_point(lambda z: torch.tanh(z / 2 + v), v).value.sum())(
            randn(2, 3)
        )
    layer = EquilibriumLayer(lambda z, u: torch.tanh(z / 2 + u), 3)
    with pytest.raises(RuntimeError, match="torch.func transform"):
        torch.func.jacrev(layer)(randn(2, 3))


# ---- torch.compile and torch.export -------------------------------------------------------------


@pytest.mark.parametrize("phi", [Tanh(), PHIS[-1]], ids=named)
def test_compiled_equals_eager_forward_and_backward(phi):
    A, v = tensors()
    f = structured(phi)
    loss = lambda A, v: (f(A, v * 2) ** 2).sum()  # noqa: E731
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(A, v), loss(A, v))
    got = torch.autograd.grad(compiled(A, v), (A, v))
    expected = torch.autograd.grad(loss(A, v), (A, v))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_registered_operators_pass_torchs_own_check():
    A, v = tensors()
    torch.library.opcheck(torch.ops.implicitdl.equilibrium, (A, v, equation(solver=Auto()).spec))


def test_compiled_second_derivatives_are_refused_not_wrong():
    A, v = tensors()
    x = torch.ops.implicitdl.equilibrium(A, v, equation().spec)
    (g,) = torch.autograd.grad(x.pow(2).sum(), v, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(g.pow(2).sum(), v)


# ---- failures -----------------------------------------------------------------------------------


def test_failure_is_raised_warned_or_returned():
    f = lambda z: z + 1  # noqa: E731
    solver = Picard(max_steps=20)
    with pytest.raises(ConvergenceError) as caught:
        fixed_point(f, torch.zeros(2, 1), solver=solver)
    assert caught.value.solution.value.shape == (2, 1)
    with pytest.warns(ConvergenceWarning):
        fixed_point(f, torch.zeros(2, 1), solver=solver, on_failure="warn")
    solution = fixed_point(f, torch.zeros(2, 1), solver=solver, on_failure="return")
    assert not bool(solution.converged.any())


def test_a_failed_adjoint_raises_whatever_the_forward_was_told():
    """At the solution z = 1 of z = z - (z-1)^2 a the adjoint is singular."""
    a = torch.ones(1, 1, requires_grad=True)
    x = attach(lambda z: z - a * (z - 1) ** 2 + 0 * a, torch.ones(1, 1), solver=Anderson(max_steps=50))
    with pytest.raises(ConvergenceError, match="behind a derivative did not converge for samples"):
        x.sum().backward()
    A = torch.eye(2, requires_grad=True)
    f = AffineMap(A, torch.zeros(1, 2), LeakyReLU(negative_slope=1.0))
    x = attach(f, torch.ones(1, 2), solver=Anderson(max_steps=50))
    with pytest.raises(ConvergenceError, match="well-posedness"):
        x.sum().backward()


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: fixed_point(torch.cos), ValueError, "z0: got None"),
        (lambda: fixed_point(torch.cos, torch.ones(2, dtype=torch.int64)), ValueError, "z0: got"),
        (lambda: fixed_point(torch.cos, torch.tensor(1.0)), ValueError, "z0: got"),
        (lambda: fixed_point(lambda z: z[:1], torch.zeros(2, 1)), ValueError, r"f\(z0\): got \(1, 1\)"),
        (lambda: fixed_point(lambda z: z.float(), torch.zeros(2, 1)), ValueError, "float32"),
        (lambda: fixed_point(lambda z: None, torch.zeros(2, 1)), ValueError, "got NoneType"),
        (
            lambda: fixed_point(AffineMap(torch.eye(2), torch.zeros(3, 2), ReLU()), torch.zeros(2, 2)),
            ValueError,
            r"z0: got \(2, 2\).*expected \(3, 2\)",
        ),
        (lambda: fixed_point(torch.cos, torch.zeros(1, 1), solver="picart"), ValueError, "'picard'"),
        (lambda: fixed_point(torch.cos, torch.zeros(1, 1), adjoint="implict"), ValueError, "implicit"),
        (lambda: fixed_point(torch.cos, torch.zeros(1, 1), on_failure="x"), ValueError, "on_failure"),
        (lambda: Implicit(order=0), ValueError, "order=0"),
        (lambda: Implicit(order=1.5), ValueError, "order=1.5"),
        (lambda: OneStep(steps=0), ValueError, "steps=0"),
        (lambda: OneStep(damping=1.0), ValueError, "damping=1.0"),
        (lambda: Neumann(terms=-1), ValueError, "terms=-1"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_adjoints_by_name():
    assert get_adjoint("implicit") == Implicit() and get_adjoint("one_step") == OneStep()
    assert get_adjoint("neumann") == Neumann() and get_adjoint("unrolled") == Unrolled()
    own = Neumann(terms=2)
    assert get_adjoint(own) is own
    with pytest.raises(ValueError, match="Did you mean 'neumann'"):
        get_adjoint("neuman")


def test_a_declared_contraction_reaches_the_solver():
    f = lambda z: 0.5 * torch.cos(z)  # noqa: E731
    plain = fixed_point(f, torch.zeros(3, 2))
    told = fixed_point(f, torch.zeros(3, 2), contraction=0.5)
    assert "contraction" in told.stats["reason"] and "contraction" not in plain.stats["reason"]
    torch.testing.assert_close(plain.value, told.value)


def test_the_adjoint_has_a_solver_of_its_own():
    calls = []

    class Counting(Picard):
        def solve(self, f, z0, **kwargs):
            calls.append(self)
            return super().solve(f, z0, **kwargs)

    W, v = tensors()
    own = Counting(rtol=1e-10)
    x = closure(solver=Newton(), adjoint=Implicit(solver=own))(W, v)
    assert not calls
    x.sum().backward()
    assert calls == [own]


def test_equations_travel_as_json():
    eq = equation(PHIS[-1], Anderson(memory=3), contraction=0.5, monotone=0.1, acyclic=True)
    from implicitdl.implicit.affine import _equation

    back = _equation(eq.spec)
    for name in ("phi", "contraction", "monotone", "acyclic", "solver", "adjoint_solver"):
        assert getattr(back, name) == getattr(eq, name), name


def test_gradients_where_the_iteration_does_not_contract():
    """A monotone equation with spectral radius above one: forward and adjoint both accelerate."""
    A = monotone_matrix(6, 0.2, seed=7).requires_grad_()
    assert float(torch.linalg.eigvals(A.detach()).abs().max()) > 1
    v = randn(3, 6).requires_grad_()
    assert gradcheck(structured(Tanh(), monotone=0.199), (A, v))
    assert gradcheck(
        lambda A, v: fixed_point(
            lambda z: torch.tanh(z @ A.mT + v), torch.zeros(3, 6), solver=Newton(**TIGHT)
        ).value,
        (A, v),
    )
    assert math.isfinite(float(v.sum().detach()))
