"""Gradients: three ways that must agree, every order, every transform, every habit of autograd."""

import copy
import dataclasses

import pytest
import torch
from problems import affine, monotone_matrix, rand, randn, row_sums
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from implicitdl import ConvergenceError, Implicit, OneStep, attach, fixed_point
from implicitdl.activations import (
    ELU,
    Blocks,
    Identity,
    LeakyReLU,
    ReLU,
    Sigmoid,
    Softmax,
    Softplus,
    Tanh,
)
from implicitdl.implicit import Adjoint, Equation, Neumann, Unrolled, equilibrium, get_adjoint
from implicitdl.maps import AffineMap
from implicitdl.solvers import Anderson, Auto, Newton, Picard

# torch's own, once a process, the first time that forward mode is used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

M, N = 3, 4
TIGHT = Auto(rtol=1e-13, atol=1e-15)
MIXED = Blocks(parts=((Softmax(), 2), (Tanh(), 1), (Softplus(), 1)))
SMALL = Blocks(parts=((Softmax(), 2), (Softplus(), 1)))
SMOOTH = [Tanh(), Sigmoid(), Softplus(), Softmax(), MIXED]
KINKED = [ReLU(), LeakyReLU(), ELU(alpha=0.7)]


def tensors(kappa=0.8, m=M, n=N):
    return row_sums(randn(n, n, seed=1), kappa).requires_grad_(), randn(
        m, n, seed=2
    ).requires_grad_()


def structured(phi, **facts):
    equation = Equation(phi, solver=TIGHT, adjoint_solver=TIGHT, **facts)
    return lambda A, v: equilibrium(A, v, equation)


def closure(phi, order=1):
    """The same equation, as something that only says what it computes."""

    def solve(A, v):
        f = lambda z: phi(z @ A.mT + v)
        adjoint = Implicit(order=order)
        return fixed_point(f, torch.zeros_like(v), solver=TIGHT, adjoint=adjoint).value

    return solve


def through_map(phi):
    return lambda A, v: fixed_point(AffineMap(A, v, phi), solver=TIGHT).value


def plain_loop(phi, steps=160):
    """The reference: nothing of the library but phi."""

    def solve(A, v):
        z = torch.zeros_like(v)
        for _ in range(steps):
            z = phi(z @ A.mT + v)
        return z

    return solve


def loss_of(x):
    return (torch.linspace(-1, 1, x.numel()).view_as(x) * x.sin()).sum()


def gradient(solve, *at, **kwargs):
    return torch.autograd.grad(loss_of(solve(*at)), at, **kwargs)


def close(got, expected, tolerance=1e-9):
    for a, b in zip(got, expected, strict=True):
        error = float((a - b).detach().norm() / b.detach().norm().clamp_min(1e-30))
        assert error < tolerance, error


# --- implicit = unrolled = finite differences


def by_unrolling(phi):
    adjoint = Unrolled(steps=160)
    return lambda A, v: fixed_point(AffineMap(A, v, phi), solver=TIGHT, adjoint=adjoint).value


@pytest.mark.parametrize("make", [structured, closure, through_map, by_unrolling])
@pytest.mark.parametrize("phi", [*SMOOTH, *KINKED], ids=str)
def test_implicit_is_unrolled(phi, make):
    at = tensors()
    close(gradient(make(phi), *at), gradient(plain_loop(phi), *at))


@pytest.mark.parametrize("phi", [*SMOOTH, *KINKED], ids=str)
def test_gradcheck_structured(phi):
    assert gradcheck(structured(phi), tensors(m=2), check_forward_ad=True)


@pytest.mark.parametrize("phi", [Tanh(), ReLU(), SMALL], ids=str)
def test_gradcheck_closure(phi):
    assert gradcheck(closure(phi), tensors(m=2, n=3))


@pytest.mark.parametrize("phi", [Tanh(), Softmax(), SMALL, ReLU()], ids=str)
def test_gradgradcheck_structured(phi):
    assert gradgradcheck(structured(phi), tensors(m=2, n=3), check_fwd_over_rev=True)


@pytest.mark.parametrize("phi", [Tanh(), SMALL], ids=str)
def test_gradgradcheck_closure(phi):
    assert gradgradcheck(closure(phi, order=2), tensors(m=2, n=3))


def derivatives(solve, at, order, direction):
    """d^order/dt^order of the loss along a direction, by nested reverse mode."""
    t = torch.zeros((), requires_grad=True)
    value = loss_of(solve(*(x.detach() + t * d for x, d in zip(at, direction, strict=True))))
    for _ in range(order):
        (value,) = torch.autograd.grad(value, t, create_graph=True)
    return value


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("phi", [Tanh(), MIXED], ids=str)
@pytest.mark.parametrize("make", [structured, closure])
def test_nested_derivatives_are_those_of_the_unrolled_loop(make, phi, order):
    at = [x.detach() for x in tensors(kappa=0.5)]
    direction = [randn(*x.shape, seed=9) for x in at]
    solve = make(phi) if make is structured else closure(phi, order)
    got = derivatives(solve, at, order, direction)
    expected = derivatives(plain_loop(phi), at, order, direction)
    assert float(got.detach()) == pytest.approx(float(expected.detach()), rel=1e-8)


@pytest.mark.parametrize("order", [1, 2])
def test_one_derivative_too_many_raises(order):
    """Also where only a parameter is differentiated twice, or another than the first time."""
    A, v = tensors()
    solve = closure(Tanh(), order)
    for first, second in ((A, A), (v, v), (A, v), (v, A)):
        (g,) = torch.autograd.grad(loss_of(solve(A, v)), first, create_graph=True)
        for _ in range(order - 1):
            (g,) = torch.autograd.grad(g.square().sum(), second, create_graph=True)
        with pytest.raises(RuntimeError, match=rf"order.*Implicit\(order={order + 1}\)|order=2"):
            torch.autograd.grad(g.square().sum(), second)


MODES = {
    "reverse over reverse": lambda f: jacrev(jacrev(f)),
    "forward over reverse": lambda f: jacfwd(grad(f)),
    "reverse over forward": lambda f: jacrev(jacfwd(f)),
    "forward over forward": lambda f: jacfwd(jacfwd(f)),
    "hessian": hessian,
}


@pytest.mark.parametrize("argument", [0, 1])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("phi", [Tanh(), LeakyReLU(), Softmax()], ids=str)
def test_hessians_by_every_pair_of_modes(phi, mode, argument):
    at = [x.detach() for x in tensors(0.6)]

    def of(solve):
        return lambda x: loss_of(solve(*at[:argument], x, *at[argument + 1 :]))

    expected = torch.autograd.functional.hessian(of(plain_loop(phi)), at[argument])
    if mode == "forward over forward":
        with pytest.raises(RuntimeError, match="Forward mode inside forward mode"):
            MODES[mode](of(structured(phi)))(at[argument])
        return
    got = MODES[mode](of(structured(phi)))(at[argument])
    assert torch.allclose(got, expected, atol=1e-9)


# --- torch.func


@pytest.mark.parametrize("phi", [Tanh(), ReLU(), MIXED], ids=str)
def test_jacobians(phi):
    A, v = (x.detach() for x in tensors())
    f = structured(phi)
    expected = torch.autograd.functional.jacobian(lambda *x: plain_loop(phi)(*x), (A, v))
    for mode in (jacrev, jacfwd):
        close(mode(f, argnums=(0, 1))(A, v), expected)


def test_jvp_and_vjp_are_adjoint():
    A, v = (x.detach() for x in tensors())
    f = structured(Tanh())
    tangents, cotangent = (randn(N, N, seed=5), randn(M, N, seed=6)), randn(M, N, seed=7)
    x, forward = jvp(f, (A, v), tangents)
    y, back = vjp(f, A, v)
    assert torch.equal(x, y)
    backward = back(cotangent)
    left = (forward * cotangent).sum()
    right = sum((t * b).sum() for t, b in zip(tangents, backward, strict=True))
    assert float(left) == pytest.approx(float(right), rel=1e-10)
    for i in (0, 1):  # one argument alone
        one = lambda x, i=i: f(*(x if j == i else (A, v)[j] for j in (0, 1)))
        alone = jvp(one, ((A, v)[i],), (tangents[i],))[1]
        zero = [torch.zeros_like(t) for t in tangents]
        zero[i] = tangents[i]
        assert torch.allclose(alone, jvp(f, (A, v), tuple(zero))[1], atol=1e-11)


DIMS = [(0, 0), (None, 0), (0, None), (None, 1), (1, 0), (2, 2)]


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("phi", [Tanh(), MIXED], ids=str)
def test_vmap(phi, dims):
    k, f = 3, structured(phi)
    A = torch.stack([row_sums(randn(N, N, seed=s), 0.8) for s in range(k)])
    v = randn(k, M, N, seed=7)
    each = [(A[i] if dims[0] is not None else A[0], v[i] if dims[1] is not None else v[0])
            for i in range(k)]  # fmt: skip
    at = tuple(x[0] if d is None else x.movedim(0, d) for x, d in zip((A, v), dims, strict=True))
    assert torch.allclose(vmap(f, dims)(*at), torch.stack([f(*x) for x in each]), atol=1e-10)
    loss = lambda A, v: loss_of(f(A, v))
    for argnums in (0, 1):
        got = vmap(grad(loss, argnums=argnums), dims)(*at)
        expected = torch.stack([grad(loss, argnums=argnums)(*x) for x in each])
        assert torch.allclose(got, expected, atol=1e-9)
    tangents = (randn(N, N, seed=8), randn(M, N, seed=9))
    got = vmap(lambda A, v: jvp(f, (A, v), tangents)[1], dims)(*at)
    assert torch.allclose(got, torch.stack([jvp(f, x, tangents)[1] for x in each]), atol=1e-9)


def test_vmap_in_vmap():
    f = structured(Tanh())
    A = torch.stack([row_sums(randn(N, N, seed=s), 0.8) for s in range(2)])
    v = randn(3, M, N, seed=7)
    got = vmap(lambda A: vmap(lambda v: f(A, v))(v))(A)
    expected = torch.stack([torch.stack([f(a, x) for x in v]) for a in A])
    assert torch.allclose(got, expected, atol=1e-10)
    got = vmap(lambda A: vmap(lambda v: hessian(lambda v: loss_of(f(A, v)))(v))(v))(A)
    expected = torch.stack(
        [torch.stack([hessian(lambda v, a=a: loss_of(f(a, v)))(x) for x in v]) for a in A]
    )
    assert torch.allclose(got, expected, atol=1e-8)


def test_a_closure_inside_a_transform_is_refused_with_the_reason():
    A, v = (x.detach() for x in tensors())
    for transform in (
        vmap(lambda v: closure(Tanh())(A, v[None])),
        jacrev(lambda v: closure(Tanh())(A, v)),
    ):
        with pytest.raises(
            RuntimeError, match="closure was called inside a torch.func transform.*MonotoneLayer"
        ):
            transform(v)


# --- honesty of the backward solve


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [structured, closure])
def test_the_gradient_of_a_scaled_loss(make, dtype):
    """No absolute tolerance in the adjoint: 1e-8 times the loss, 1e-8 times the gradient."""
    A, v = (x.detach().to(dtype).requires_grad_() for x in tensors(0.95, m=5, n=12))
    equation = Equation(Tanh())

    def solve():
        if make is structured:
            return equilibrium(A, v, equation)
        return fixed_point(lambda z: torch.tanh(z @ A.mT + v), torch.zeros_like(v)).value

    weights = randn(5, 12, seed=3).to(dtype)
    expected = torch.autograd.grad((weights * solve()).sum(), (A, v))
    for scale in (1e-2, 1e-5, 1e-8):
        got = torch.autograd.grad((weights * solve()).sum() * scale, (A, v))
        close([g / scale for g in got], expected, 1e-6)
    # One sample's loss far smaller than another's.
    rows = torch.tensor([1.0, 1e-4, 1e-8, 1.0, 1e4], dtype=dtype)[:, None]
    got = torch.autograd.grad((rows * weights * solve()).sum(), v)[0] / rows
    close(got, expected[1], 2e-6)


def test_float32_gradients_near_the_boundary():
    A = row_sums(rand(24, 24, seed=1), 0.99)
    v = rand(6, 24, seed=2)
    g = randn(6, 24, seed=3)
    equation = Equation(ReLU(), contraction=0.9901)
    at = [x.float().requires_grad_() for x in (A, v)]
    got = torch.autograd.grad((g.float() * equilibrium(*at, equation)).sum(), at)
    s = torch.linalg.solve(torch.eye(24) - at[0].double().mT, g.mT).mT  # all states are active
    x = torch.linalg.solve(torch.eye(24) - at[0].double(), at[1].double().mT).mT
    close([t.double() for t in got], [s.mT @ x, s], 1e-4)


def test_zero_and_missing_gradients():
    A, v = tensors()
    g = torch.autograd.grad((structured(Tanh())(A, v) * 0).sum(), (A, v))
    assert all(bool((t == 0).all()) for t in g)
    weights = torch.zeros(M, N)
    weights[1] = 1
    (g,) = torch.autograd.grad((structured(Tanh())(A, v) * weights).sum(), v)
    assert bool((g[[0, 2]] == 0).all()) and bool((g[1] != 0).all())
    for solve in (structured(Tanh()), closure(Tanh())):
        x = solve(A.detach(), v)
        assert torch.autograd.grad(x.sum(), v)[0].shape == v.shape
        assert not solve(A.detach(), v.detach()).requires_grad


@pytest.mark.parametrize("make", ["structured", "closure"])
def test_an_adjoint_solve_that_fails_raises(make):
    A, v = tensors(0.99)
    few = Picard(max_steps=3)
    adjoint = Implicit(solver=few)
    f = AffineMap(A, v, Tanh()) if make == "structured" else lambda z: torch.tanh(z @ A.mT + v)
    x = fixed_point(f, torch.zeros(M, N), solver=TIGHT, adjoint=adjoint).value
    with pytest.raises(
        ConvergenceError, match="derivative did not converge for samples .*expected"
    ):
        x.sum().backward()
    # An ill gradient of one sample is an error too, and named.
    x = fixed_point(f, torch.zeros(M, N), solver=TIGHT).value
    g = torch.ones(M, N)
    g[1, 2] = torch.nan
    with pytest.raises(ConvergenceError, match=r"samples \[1\]"):
        x.backward(g)


def test_a_singular_adjoint_raises():
    """z = 2 sin(z / 2) + u - ... at the fold: I - J = 0 there, no derivative exists."""
    u = torch.zeros(1, 1, requires_grad=True)
    z = attach(lambda z: z + u, torch.zeros(1, 1))
    with pytest.raises(ConvergenceError, match="singular"):
        z.sum().backward()


# --- closures


def test_a_weight_and_something_computed_from_it():
    """Neither counted twice nor forgotten."""
    W = (0.3 * randn(N, N, seed=1)).requires_grad_()
    u = randn(M, N, seed=2).requires_grad_()
    deep = (W @ W).tanh()

    def solve(W, u, deep):
        f = lambda z: torch.tanh(z @ W + (z @ deep) / 4 + u + W[0])
        return fixed_point(f, torch.zeros(M, N), solver=TIGHT, adjoint=Implicit(order=2)).value

    def loop(W, u, deep):
        z = torch.zeros(M, N)
        for _ in range(150):
            z = torch.tanh(z @ W + (z @ deep) / 4 + u + W[0])
        return z

    got = torch.autograd.grad(loss_of(solve(W, u, deep)), (W, u), create_graph=True)
    deep = (W @ W).tanh()
    expected = torch.autograd.grad(loss_of(loop(W, u, deep)), (W, u), create_graph=True)
    close(got, expected)
    second = [
        torch.autograd.grad(sum(g.square().sum() for g in first), (W, u), retain_graph=True)
        for first in (got, expected)
    ]
    close(*second, 1e-8)


def test_a_closure_of_any_shape():
    weight = (0.1 * randn(2, 2, 3, 3, seed=1)).requires_grad_()
    u = randn(3, 2, 5, 5, seed=2).requires_grad_()
    f = lambda z: torch.tanh(torch.nn.functional.conv2d(z, weight, padding=1) + u)
    got = torch.autograd.grad(
        loss_of(fixed_point(f, torch.zeros(3, 2, 5, 5), solver=TIGHT).value), (weight, u)
    )
    z = torch.zeros(3, 2, 5, 5)
    for _ in range(100):
        z = f(z)
    close(got, torch.autograd.grad(loss_of(z), (weight, u)))


def test_a_map_that_does_not_depend_on_its_state():
    u = randn(M, N, seed=2).requires_grad_()
    for solver in (TIGHT, Newton(), Anderson()):
        x = fixed_point(lambda z: u.sin(), torch.zeros(M, N), solver=solver).value
        close(torch.autograd.grad(loss_of(x), u), torch.autograd.grad(loss_of(u.sin()), u))


@pytest.mark.parametrize("make", [structured, closure])
def test_the_habits_of_autograd(make):
    A, v = tensors()
    solve = make(Tanh())
    single = gradient(solve, A, v)
    # The same solution used twice.
    x = solve(A, v)
    twice = torch.autograd.grad(loss_of(x) + loss_of(x), (A, v), retain_graph=True)
    close(twice, [2 * g for g in single], 1e-11)
    # Backward again through a kept graph.
    first = torch.autograd.grad(loss_of(x), (A, v), retain_graph=True)
    second = torch.autograd.grad(loss_of(x), (A, v))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    # Two forward passes before one backward.
    both = torch.autograd.grad(loss_of(solve(A, v)) + loss_of(solve(A, 2 * v)), (A, v))
    other = torch.autograd.grad(loss_of(solve(A, 2 * v)), (A, v))
    close(both, [a + b for a, b in zip(single, other, strict=True)], 1e-10)
    # One solve on top of another.
    A.grad = None
    loss_of(solve(A, solve(A, v))).backward()
    nested = A.grad.clone()
    loop = plain_loop(Tanh())
    close([nested], torch.autograd.grad(loss_of(loop(A, loop(A, v))), A))


def test_an_input_changed_in_place_before_backward_is_noticed():
    A, v = tensors()
    w = v * 1
    x = structured(Tanh())(A, w)
    with torch.no_grad():
        w.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()


def test_nothing_is_recorded_without_grad():
    A, v = tensors()
    with torch.no_grad():
        for solve in (structured(Tanh()), closure(Tanh()), through_map(Tanh()), closure(Tanh(), 2)):
            assert not solve(A, v).requires_grad
    with torch.inference_mode():
        assert torch.allclose(closure(Tanh())(A, v), structured(Tanh())(A, v))


def test_memory_does_not_hold_the_loop():
    """O(1): the graph behind a solve of 400 steps has a handful of nodes."""
    A, v = tensors(0.97)

    def nodes(x):
        seen, todo = set(), [x.grad_fn]
        while todo:
            node = todo.pop()
            if node is not None and node not in seen:
                seen.add(node)
                todo += [parent for parent, _ in node.next_functions]
        return len(seen)

    slow = Picard(max_steps=5000, rtol=1e-12)
    x = fixed_point(lambda z: torch.tanh(z @ A.mT + v), torch.zeros(M, N), solver=slow).value
    assert nodes(x) < 20
    assert nodes(fixed_point(AffineMap(A, v, Tanh()), solver=slow).value) < 6


# --- attach


@pytest.mark.parametrize("make", ["structured", "closure"])
def test_attach_to_a_solution_found_by_other_means(make):
    A, v = tensors()
    with torch.no_grad():
        z = torch.zeros(M, N)
        for _ in range(400):
            z = torch.tanh(z @ A.mT + v)
    f = AffineMap(A, v, Tanh()) if make == "structured" else lambda z: torch.tanh(z @ A.mT + v)
    x = attach(f, z, solver=TIGHT)
    assert torch.allclose(x, z, atol=1e-15)
    close(torch.autograd.grad(loss_of(x), (A, v)), gradient(plain_loop(Tanh()), A, v))
    # A graph that z brings along is dropped: its derivatives are no part of the answer.
    scale = torch.ones((), requires_grad=True)
    x = attach(f, z * scale, solver=TIGHT)
    assert torch.autograd.grad(x.sum(), scale, allow_unused=True) == (None,)


def test_attach_counts_evaluations_by_order():
    _, v = tensors()
    calls = []
    f = lambda z: calls.append(1) or torch.tanh(z / 2 + v)
    z = fixed_point(lambda z: torch.tanh(z / 2 + v.detach()), torch.zeros(M, N)).value
    for order in (1, 2, 3):
        calls.clear()
        attach(f, z, order=order)
        assert len(calls) == order


# --- the other adjoints


def errors(adjoint, kappa=0.6):
    A = row_sums(rand(8, 8, seed=1), kappa).requires_grad_()
    v = rand(2, 8, seed=2).requires_grad_()  # all states active: J = A
    w = rand(2, 8, seed=3)

    def g(adjoint):
        x = fixed_point(AffineMap(A, v, ReLU()), solver=TIGHT, adjoint=adjoint).value
        return torch.cat([t.flatten() for t in torch.autograd.grad((w * x).sum(), (A, v))])

    exact = g(Implicit())
    return float((g(adjoint) - exact).norm() / exact.norm())


def test_the_bias_of_one_step_is_of_the_order_of_kappa_to_the_steps():
    found = [errors(OneStep(steps=k)) for k in (1, 2, 4, 8)]
    for k, error in zip((1, 2, 4, 8), found, strict=True):
        assert 0.3 * 0.6**k < error < 1.5 * 0.6**k
    assert errors(OneStep(steps=4, damping=0.5)) > found[2]
    assert found[2] < errors(OneStep(steps=4, damping=0.1)) < errors(OneStep(steps=4, damping=0.6))


def test_the_bias_of_neumann_is_of_the_order_of_kappa_to_the_terms():
    for k in (0, 1, 3, 7):
        assert 0.3 * 0.6 ** (k + 1) < errors(Neumann(terms=k)) < 1.5 * 0.6 ** (k + 1)
    assert errors(Neumann(terms=0)) == pytest.approx(errors(OneStep()), rel=1e-9)
    assert errors(Neumann(terms=60)) < 1e-10 and errors(Unrolled(steps=80)) < 1e-10


@pytest.mark.parametrize("adjoint", [OneStep(), OneStep(steps=3, damping=0.3), Neumann()], ids=str)
def test_biased_adjoints_keep_the_value(adjoint):
    A, v = tensors()
    for f in (AffineMap(A, v, Tanh()), lambda z: torch.tanh(z @ A.mT + v)):
        x = fixed_point(f, torch.zeros(M, N), solver=TIGHT, adjoint=adjoint).value
        assert torch.allclose(x, structured(Tanh())(A, v), atol=1e-11) and x.requires_grad
        with torch.no_grad():
            assert not fixed_point(f, torch.zeros(M, N), adjoint=adjoint).value.requires_grad


@pytest.mark.parametrize("adjoint", ["one_step", "neumann", "unrolled", "implicit"])
@pytest.mark.parametrize("phi", [MIXED, Softmax(), ReLU()], ids=str)
def test_every_adjoint_takes_every_activation(adjoint, phi):
    A, v = tensors(0.3)
    x = fixed_point(AffineMap(A, v, phi), adjoint=adjoint).value
    close(torch.autograd.grad(loss_of(x), (A, v)), gradient(structured(phi), A, v), 0.4)


def test_unrolled_is_honest_about_its_steps():
    A, v = tensors(0.95)
    with pytest.raises(ConvergenceError):
        fixed_point(AffineMap(A, v, Tanh()), adjoint=Unrolled(steps=5))
    solution = fixed_point(AffineMap(A, v, Tanh()), adjoint=Unrolled(steps=5), on_failure="return")
    assert solution.steps.tolist() == [5] * M and not solution.converged.any()
    fx = torch.tanh(solution.value @ A.mT + v)
    size = 1e-12 * fx.norm(dim=1)
    expected = (fx - solution.value).norm(dim=1) / size
    assert torch.allclose(solution.residual, expected, rtol=0.05)


def test_an_adjoint_of_ones_own():
    @dataclasses.dataclass(frozen=True)
    class Straight(Adjoint):
        """d x / d v taken for the identity, times a factor."""

        def attach(self, f, z, solver):
            return z + 2 * (f.v - f.v.detach())

    A, v = tensors()
    x = fixed_point(AffineMap(A, v, Tanh()), adjoint=Straight()).value
    assert torch.equal(torch.autograd.grad(x.sum(), v)[0], torch.full((M, N), 2.0))


# --- arguments


def test_adjoint_names_and_options():
    assert get_adjoint("one_step") == OneStep() and get_adjoint("implicit") == Implicit()
    own = Neumann(terms=3)
    assert get_adjoint(own) is own
    with pytest.raises(ValueError, match="Did you mean 'implicit'"):
        get_adjoint("implict")
    for make, words in (
        (lambda: Implicit(order=0), "Implicit: order=0, expected"),
        (lambda: Implicit(order=1.5), "Implicit: order=1.5, expected"),
        (lambda: OneStep(steps=0), "OneStep: steps=0, expected"),
        (lambda: OneStep(damping=1.0), "OneStep: damping=1.0, expected"),
        (lambda: OneStep(damping=-0.1), "OneStep: damping=-0.1, expected"),
        (lambda: Neumann(terms=-1), "Neumann: terms=-1, expected"),
        (lambda: Unrolled(steps=0), "Unrolled: steps=0, expected"),
        (lambda: Unrolled(steps=-2), "Unrolled: steps=-2, expected"),
    ):
        with pytest.raises(ValueError) as error:
            make()
        assert str(error.value).startswith(words)


@pytest.mark.parametrize(
    "f, z0, words",
    [
        (lambda z: z[:, :2], torch.zeros(M, N), "f(z0): got (3, 2) float64 on cpu, expected (3, 4)"),
        (lambda z: z.float(), torch.zeros(M, N), "got (3, 4) float32 on cpu, expected (3, 4) float64"),
        (lambda z: z.to("meta"), torch.zeros(M, N), "on meta, expected (3, 4) float64 on cpu"),
        (lambda z: 3, torch.zeros(M, N), "f(z0): got int, expected"),
        (lambda z: z, torch.zeros(M, N, dtype=torch.long), "z0: got (3, 4) int64 on cpu, expected"),
        (lambda z: z, torch.zeros(()), "z0: got () float64 on cpu, expected"),
        (lambda z: z, None, "z0: got None, expected"),
        (AffineMap(torch.zeros(N, N), torch.zeros(M, N), ReLU()), torch.zeros(M, 2),
         "z0: got (3, 2) float64 on cpu, expected (3, 4) float64 on cpu"),
        (AffineMap(torch.zeros(N, N), torch.zeros(M, N), ReLU()), torch.zeros(M, N).float(),
         "z0: got (3, 4) float32 on cpu, expected (3, 4) float64 on cpu"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(f, z0, words):
    with pytest.raises(ValueError) as error:
        fixed_point(f, z0)
    assert words in str(error.value)


def test_options_of_fixed_point():
    f, z0 = (lambda z: z / 2 + 1), torch.zeros(2, 1)
    for options, words in (
        ({"solver": "piccard"}, "picard"),
        ({"adjoint": "phantom"}, "adjoint: got 'phantom'"),
        ({"on_failure": "ignore"}, "on_failure: got 'ignore'"),
    ):
        with pytest.raises(ValueError, match=words):
            fixed_point(f, z0, **options)
    with pytest.raises(TypeError):
        fixed_point(f, z0, max_steps=3)
    with pytest.raises(ConvergenceError, match="index 0, 1"):
        fixed_point(f, z0, solver=Picard(max_steps=2))
    assert fixed_point(f, z0, record=True).stats["trajectory"].shape[1:] == (2, 1)
    assert fixed_point(f, z0, contraction=0.5).stats["solver"] == "Picard"
    assert torch.allclose(fixed_point(f, z0, contraction=0.5).value, torch.full((2, 1), 2.0))


def test_a_certified_closure_keeps_its_derivatives():
    _, v = tensors()
    f = lambda z: torch.tanh(z / 2 + v)
    plain = fixed_point(f, torch.zeros(M, N), solver=TIGHT).value
    told = fixed_point(f, torch.zeros(M, N), solver=TIGHT, contraction=0.5).value
    close(torch.autograd.grad(loss_of(told), v), torch.autograd.grad(loss_of(plain), v))


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(batch):
    A, v = row_sums(randn(N, N), 0.8).requires_grad_(), torch.zeros(batch, N).requires_grad_()
    for solve in (structured(Tanh()), closure(Tanh()), through_map(Tanh())):
        g = torch.autograd.grad(solve(A, v).sum(), (A, v))
        assert g[0].shape == (N, N) and g[1].shape == (batch, N)
        assert bool(g[0].isfinite().all())


# --- compiled and exported


def test_compiled_in_one_graph():
    equation = Equation(Tanh(), contraction=0.81).with_spec()
    A, v = tensors()
    compiled = torch.compile(
        lambda A, v: equilibrium(A, v * 2, equation), fullgraph=True, backend="aot_eager"
    )
    plain = lambda A, v: equilibrium(A, v * 2, equation)
    assert torch.equal(compiled(A, v), plain(A, v))
    close(gradient(compiled, A, v), gradient(plain, A, v), 1e-11)
    torch.compiler.reset()


@pytest.mark.parametrize("phi", [Tanh(), LeakyReLU(negative_slope=0.2), MIXED], ids=str)
def test_the_spec_carries_everything(phi):
    """What a compiled graph holds is the whole equation: activation, facts, solvers."""
    loose = Anderson(rtol=1e-2, atol=0.0, memory=2)
    equation = Equation(phi, 0.5, 0.3, False, loose, TIGHT).with_spec()
    A, v = (x.detach() for x in tensors(0.5))
    x = torch.ops.implicitdl.equilibrium(A, v, equation.spec)
    assert torch.equal(x, equilibrium(A, v, equation))
    assert float((x - structured(phi)(A, v)).abs().max()) > 1e-9  # loose indeed
    g = randn(M, N, seed=3)
    s = torch.ops.implicitdl.adjoint(A, v, x, g, equation.spec)
    d = phi.derivative(x @ A.mT + v)
    residual = phi.product(d, s @ A + g) - s
    assert float(residual.norm()) < 1e-10  # the adjoint's own, tight solver


def test_registered_operators():
    equation = Equation(Tanh()).with_spec()
    A, v = tensors()
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        torch.ops.implicitdl.equilibrium.default, (A, v, equation.spec), test_utils=tests
    )
    x, g = torch.zeros(M, N), torch.ones(M, N)
    torch.library.opcheck(
        torch.ops.implicitdl.adjoint.default,
        (A.detach(), v.detach(), x, g, equation.spec),
        test_utils=tests[:2],
    )


def test_equations_copy_and_compare():
    equation = Equation(Tanh(), contraction=0.5).with_spec()
    assert copy.deepcopy(equation) == equation
    assert equation.map(torch.zeros(2, 2), torch.zeros(1, 2)).contraction == 0.5


def test_monotone_and_triangular_maps_have_gradients_too():
    for A, facts in (
        (monotone_matrix(3), {"monotone": 0.59}),
        (torch.triu(3 * randn(3, 3), diagonal=1), {"acyclic": True}),
    ):
        for phi in (ReLU(), Tanh()):
            at = (A.clone().requires_grad_(), randn(M, 3, seed=2).requires_grad_())
            assert gradcheck(structured(phi, **facts), at, check_forward_ad=True)


def test_the_answer_is_the_problem_s():
    problem = affine("check", row_sums(randn(N, N), 0.9), Tanh(), 10.0)
    x = equilibrium(problem.f.A, problem.f.v, Equation(Tanh()))
    assert torch.allclose(x, problem.exact, atol=1e-10)


@pytest.mark.parametrize("make", [structured, closure, through_map])
def test_a_gradient_far_below_every_absolute_tolerance(make):
    """Each adjoint is solved for its own direction; a sample's size does not hide another's."""
    A, v = tensors()
    x = make(Tanh())(A, v)
    (exact,) = torch.autograd.grad(x.sum(), v, retain_graph=True)
    sizes = torch.tensor([[1.0], [1e-25], [1e20]])
    (g,) = torch.autograd.grad((x * sizes).sum(), v)
    assert torch.allclose(g / sizes, exact, rtol=1e-9, atol=0)


def test_damped_one_step_is_the_phantom_gradient():
    a = torch.tensor([[0.4]], requires_grad=True)
    adjoint = OneStep(steps=2, damping=0.25)
    x = fixed_point(lambda z: 0.5 * z + a, torch.zeros(1, 1), adjoint=adjoint).value
    # One damped step has slope 0.75 * 0.5 + 0.25 in z and 0.75 in a.
    (g,) = torch.autograd.grad(x.sum(), a)
    assert float(g) == pytest.approx(0.75 * (1 + 0.625)) and float(x.detach()) == pytest.approx(0.8)


# --- no derivative of something else


class Body(torch.nn.Module):
    """f(z, u) = tanh(0.4 W z + V u), in the dtype of the tests."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.W, self.V = torch.nn.Linear(4, 4), torch.nn.Linear(3, 4)

    def forward(self, z, u):
        return torch.tanh(0.4 * self.W(z) + self.V(u))


def test_reverse_over_forward_mode_of_a_closure_is_held_to_its_order():
    body, u, t = Body(), randn(5, 3).requires_grad_(), randn(5, 3, seed=1)

    def tangent(order):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(u, t)
            z = fixed_point(
                lambda z: body(z, dual), torch.zeros(5, 4), adjoint=Implicit(order=order)
            )
            return forward_ad.unpack_dual(z.value.square().sum()).tangent

    with pytest.raises(RuntimeError, match="differentiated more often"):
        torch.autograd.grad(tangent(1), u)
    (got,) = torch.autograd.grad(tangent(2), u)

    def loss(u):
        z = fixed_point(lambda z: body(z, u), torch.zeros(5, 4), adjoint=Implicit(order=2))
        return z.value.square().sum()

    (slope,) = torch.autograd.grad(loss(u), u, create_graph=True)
    (expected,) = torch.autograd.grad((slope * t).sum(), u)
    assert torch.allclose(got, expected, atol=1e-9)


def test_a_parameter_that_changed_before_backward_is_noticed():
    body, u = Body(), randn(5, 3)
    z = fixed_point(lambda z: body(z, u), torch.zeros(5, 4)).value
    with torch.no_grad():
        body.W.weight.mul_(0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_a_switch_thrown_before_backward_changes_nothing():
    body, u = Body(), randn(5, 3)
    body.scale = 1.0

    def f(z):
        return body.scale * body(z, u)

    def gradient(at_backward):
        body.scale = 1.0
        z = fixed_point(f, torch.zeros(5, 4)).value
        body.scale = at_backward
        return torch.autograd.grad(z.sum(), body.W.weight)[0]

    assert torch.equal(gradient(0.2), gradient(1.0))


def test_f_may_not_write_into_its_argument():
    for solver in ("auto", "picard", "anderson", "broyden", "newton"):
        with pytest.raises(ValueError, match="f wrote into its argument"):
            fixed_point(lambda z: z.mul_(0.5).add_(1), torch.zeros(2, 2), solver=solver)


def test_rows_that_depend_on_each_other_are_noticed():
    shift = torch.arange(4.0)[:, None].requires_grad_()
    with pytest.raises(ConvergenceError, match="the rows of f depend on each other"):
        fixed_point(lambda z: 0.5 * z.mean(0, keepdim=True).expand_as(z) + shift, torch.zeros(4, 1))


@pytest.mark.parametrize("order", [0, -1, 1.5, True])
def test_orders_are_counted(order):
    for make in (lambda: Implicit(order=order), lambda: attach(torch.cos, root(), order=order)):
        with pytest.raises(ValueError, match=r"order=.*expected an integer >= 1"):
            make()


def root():
    return fixed_point(torch.cos, torch.ones(2, 1)).value


def test_attach_refuses_what_is_no_solution():
    a = torch.tensor(0.5, requires_grad=True)
    for f, z in (
        (lambda z: a * z + 1, torch.full((2, 1), 2.0)),
        (AffineMap(a.view(1, 1), torch.ones(2, 1), Identity()), torch.full((2, 1), 2.0)),
    ):
        assert attach(f, z).requires_grad
        with pytest.raises(ValueError, match="expected z = f"):
            attach(f, z + 0.1)


def test_no_gradient_enters_a_failed_sample_and_none_is_spoilt_by_one():
    body, u = Body(), randn(6, 3)
    A, v = tensors()
    v = v.detach().clone()
    v[1] = torch.nan
    v.requires_grad_()
    s = fixed_point(AffineMap(A, v, Tanh()), on_failure="return")
    assert s.converged.tolist() == [True, False, True]
    grads = torch.autograd.grad(s.value[s.converged].square().sum(), (A, v), retain_graph=True)
    assert all(bool(g.isfinite().all()) for g in grads) and not grads[1][1].any()
    alone = fixed_point(AffineMap(A, v[s.converged], Tanh())).value
    expected = torch.autograd.grad(alone.square().sum(), A)[0]
    assert torch.allclose(grads[0], expected, atol=1e-10)
    with pytest.raises(ConvergenceError, match=r"A gradient flows into samples \[1\]"):
        torch.autograd.grad(s.value.sum(), A)
    sick = torch.zeros(6, 1, dtype=torch.bool)
    sick[2] = True

    def f(z):
        return body(z, u).masked_fill(sick, torch.nan)

    s = fixed_point(f, torch.zeros(6, 4), on_failure="return")
    grad = torch.autograd.grad(s.value[s.converged].sum(), body.W.weight, retain_graph=True)[0]
    assert bool(grad.isfinite().all()) and int(s.converged.sum()) == 5
    with pytest.raises(ConvergenceError, match=r"A gradient flows into samples \[2\]"):
        torch.autograd.grad(s.value.sum(), body.W.weight)


def test_an_adjoint_takes_the_name_of_a_solver_and_an_unrolled_solve_can_be_recorded():
    assert Implicit(solver="newton").solver == Newton()
    A, v = tensors()
    s = fixed_point(AffineMap(A, v, Tanh()), adjoint=Unrolled(steps=150), record=True)
    assert s.stats["trajectory"].shape == (151, *v.shape) and s.stats["evaluations"] == 151


def test_a_backward_pass_under_autocast_solves_in_full_precision():
    A, v = (t.detach().float().requires_grad_() for t in tensors())
    x = fixed_point(AffineMap(A, v, Tanh())).value
    plain = torch.autograd.grad(x.square().sum(), (A, v), retain_graph=True)
    loss = x.square().sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = torch.autograd.grad(loss, (A, v))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(plain, cast, strict=True))
