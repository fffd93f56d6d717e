"""Maps: the same three questions asked of each, and answered by autograd."""

import dataclasses

import pytest
import torch
from problems import randn, rows_equal

from implicitdl.activations import ELU, Blocks, Identity, ReLU, Sigmoid, Softmax, Tanh
from implicitdl.maps import AffineMap, LinearRows, RowMap, Scaled

# torch's own, once a process, the first time that forward mode is used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

M, N = 4, 6
BLOCKS = Blocks(parts=((Softmax(), 3), (Tanh(), 1), (Softmax(), 2)))
PHIS = [Identity(), ReLU(), Tanh(), Sigmoid(), Softmax(), BLOCKS]


def affine(phi, groups=None):
    A = randn(N, N, seed=1) if groups is None else randn(groups, N, N, seed=1)
    return AffineMap(A, randn(M, N, seed=2), phi)


def closure(z):
    return torch.tanh(z @ randn(N, N, seed=3)) * z.roll(1, -1)


MAPS = {
    **{str(phi): affine(phi) for phi in PHIS},
    "grouped": affine(Tanh(), groups=2),
    "grouped, softmax": affine(Softmax(), groups=2),
    "one A a sample": affine(Tanh(), groups=M),
    "closure": RowMap(closure, torch.Size((M, N))),
    "closure, shaped": RowMap(
        lambda z: closure(z.flatten(1)).view_as(z), torch.Size((M, 2, N // 2))
    ),
    "constant": RowMap(lambda z: torch.ones(M, N), torch.Size((M, N))),
    "constant with a graph": RowMap(lambda z: 0 * z + 1, torch.Size((M, N))),
}


def jacobians(f, z):
    """J of each row, by autograd on the map as a whole; rows must not mix."""
    J = torch.autograd.functional.jacobian(lambda z: f(z) + 0 * z, z)
    rows = J.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    assert float(J.abs().sum()) == pytest.approx(float(rows.abs().sum()))
    return rows


def adjoint_map(f, d, g):
    return dataclasses.replace(f, A=f.A.mT, v=g, phi=Scaled(phi=f.phi, d=d))


@pytest.mark.parametrize("name", MAPS)
def test_linearize(name):
    f, z, w = MAPS[name], randn(M, N, seed=4), randn(M, N, seed=5)
    J = jacobians(f, z)
    got = f.linearize(z)
    for _ in range(2):  # a graph that is recorded once is used as often as asked for
        assert torch.allclose(got.jvp(w), torch.einsum("mij,mj->mi", J, w), atol=1e-12)
        assert torch.allclose(got.vjp(w), torch.einsum("mij,mi->mj", J, w), atol=1e-12)
    assert got.dense().shape == (M, N, N)
    assert torch.allclose(got.dense(), J, atol=1e-12)
    assert not got.jvp(w).requires_grad and not got.vjp(w).requires_grad


@pytest.mark.parametrize("name", MAPS)
def test_select(name):
    f, z, index = MAPS[name], randn(M, N, seed=4), torch.tensor([3, 1])
    smaller = f.select(index)
    if smaller is None:
        assert not isinstance(f, AffineMap) or f.A.dim() == 3
        return
    assert isinstance(f, AffineMap) and f.A.dim() == 2
    rows_equal(smaller(z[index]), f(z)[index])
    rows_equal(smaller.linearize(z[index]).dense(), f.linearize(z).dense()[index])
    assert smaller.contraction == f.contraction


@pytest.mark.parametrize("name", [k for k in MAPS if isinstance(MAPS[k], AffineMap)])
def test_affine_values(name):
    f, z = MAPS[name], randn(M, N, seed=4)
    A = f.A if f.A.dim() == 2 else None
    rows = [
        f.phi((A if A is not None else f.A[i // (M // len(f.A))]) @ z[i] + f.v[i]) for i in range(M)
    ]
    expected, v = torch.stack(rows), f.v.clone()
    out = torch.full((M, N), torch.nan)
    assert torch.allclose(f(z), expected, atol=1e-13)
    with torch.no_grad():  # as a solver calls it
        got = f(z, out=out)
    assert torch.allclose(got, expected, atol=1e-13)
    if f.phi.entrywise and f.A.dim() == 2:
        assert got.data_ptr() == out.data_ptr()  # no step allocates
    assert torch.equal(f.v, v) and torch.equal(z, randn(M, N, seed=4))  # nothing in place


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("phi", PHIS, ids=str)
def test_scaled_makes_the_adjoint_equation(phi, groups):
    """s = P_d (A^T s + g) against a dense solve: (I - J^T) u = x_bar with s = P_d u."""
    f = affine(phi, groups)
    f = AffineMap(f.A * 0.1, f.v, phi, contraction=0.7, monotone=0.3)
    z, g = randn(M, N, seed=4), randn(M, N, seed=5)
    d = f.linearize(z).d
    adjoint = adjoint_map(f, d, g)
    assert (adjoint.contraction, adjoint.monotone) == (0.7, 0.3)
    assert torch.equal(adjoint.phi.derivative_at(z), d)
    s = torch.zeros(M, N)
    for _ in range(200):
        s = adjoint(s)
    J = f.linearize(z).dense()
    u = torch.linalg.solve(torch.eye(N) - J.mT, g)
    assert torch.allclose(s, phi.product(d, u), atol=1e-12)


@pytest.mark.parametrize("phi", [ReLU(), Tanh(), ELU(alpha=0.5), BLOCKS], ids=str)
def test_scaled(phi):
    z, w = randn(M, N, seed=4), randn(M, N, seed=5)
    d = phi.derivative(z)
    linear = Scaled(phi=phi, d=d)
    expected = torch.func.jvp(phi, (z,), (w,))[1]
    assert torch.allclose(linear(w), expected) and torch.allclose(linear.product(d, w), expected)
    assert torch.equal(linear(w), linear.call_(w.clone()))
    assert torch.equal(linear.derivative(w), d)
    assert linear.slope == phi.slope and linear.entrywise == phi.entrywise and linear.homogeneous
    rows_equal(linear.rows(torch.tensor([2, 0]))(w[[2, 0]]), linear(w)[[2, 0]])


@pytest.mark.parametrize("t", [0.2, 1.0, 4.0])
def test_scaled_prox(t):
    """argmin_x t (x^2/d - x^2)/2 + (x - v)^2/2, by its optimality condition; d = 0 pins x to 0."""
    d = torch.tensor([[0.0, 0.1, 0.5, 1.0]])
    v = torch.tensor([[2.0, -1.0, 3.0, 0.7]])
    x = Scaled(phi=ReLU(), d=d).prox(v, t)
    assert x[0, 0] == 0
    gradient = t * (x / d - x) + x - v
    assert torch.allclose(gradient[0, 1:], torch.zeros(3), atol=1e-12)
    if t == 1.0:
        assert torch.allclose(x, d * v)


def test_linear_rows():
    J, b = 0.3 * randn(N, N, seed=1), randn(M, N, seed=2)
    f = LinearRows(lambda w: w @ J.mT, lambda w: w @ J, b)
    w = randn(M, N, seed=3)
    assert torch.allclose(f(w), w @ J.mT + b)
    assert torch.allclose(f.linearize(w).jvp(w), w @ J.mT)
    assert torch.allclose(f.linearize(w).vjp(w), w @ J)
    assert torch.allclose(f.dense(), J.expand(M, N, N))
    assert f.select(torch.tensor([0])) is None


def test_row_map_of():
    f = RowMap.of(closure, torch.Size((M, N)), 0.5)
    assert f.contraction == 0.5 and RowMap.of(f, torch.Size((1, 1))) is f
    assert RowMap.of(closure, torch.Size((M, N))).contraction is None


def test_a_row_map_takes_rows_and_its_own_shape():
    f = MAPS["closure, shaped"]
    z = randn(M, N, seed=4)
    assert f(z).shape == (M, N) and f(z.view(f.shape)).shape == f.shape
    assert torch.equal(f(z), f(z.view(f.shape)).view(M, N))


def test_the_graph_of_a_closure_is_not_built_while_solving():
    weight = randn(N, N, seed=3).requires_grad_()
    f = RowMap(lambda z: torch.tanh(z @ weight), torch.Size((M, N)))
    with torch.no_grad():
        got = f.linearize(randn(M, N))
        assert not got.jvp(torch.ones(M, N)).requires_grad
    assert weight.grad is None


@pytest.mark.parametrize("phi", PHIS, ids=str)
def test_selecting_rows_of_an_adjoint_equation_selects_its_derivatives(phi):
    f, z, rows = affine(phi), randn(M, N, seed=4), torch.tensor([3, 1])
    adjoint = adjoint_map(f, phi.derivative(f.affine(z)), randn(M, N, seed=5))
    assert torch.allclose(adjoint.select(rows)(z[rows]), adjoint(z)[rows])
