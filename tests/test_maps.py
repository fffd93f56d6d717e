"""The maps, their Jacobians against automatic differentiation, and their parts."""

import dataclasses

import pytest
import torch
from problems import randn

from implicitdl.activations import Blocks, LeakyReLU, ReLU, SiLU, Softmax, Softplus, Tanh
from implicitdl.maps import AffineMap, LinearRows, RowMap, Scaled

PHIS = [
    ReLU(),
    Tanh(),
    SiLU(),
    Softmax(),
    Blocks(parts=((Tanh(), 2), (Softmax(), 3), (LeakyReLU(), 1))),
]
N = 6


def affine_map(phi, groups=None, m=4):
    shape = (N, N) if groups is None else (groups, N, N)
    return AffineMap(randn(*shape, seed=1) / 2, randn(m, N, seed=2), phi)


def jacobian(f, z):
    """df/dz of each row, by autograd.  # (m, n, n)"""
    full = torch.autograd.functional.jacobian(f, z)
    i = torch.arange(len(z))
    return full[i, :, i, :]


@pytest.mark.parametrize("groups", [None, 1, 2, 4])
@pytest.mark.parametrize("phi", PHIS, ids=lambda p: type(p).__name__)
def test_affine_values_and_jacobians(phi, groups):
    f, z, w = affine_map(phi, groups), randn(4, N, seed=3), randn(4, N, seed=4)
    A = f.A if groups is None else f.A.repeat_interleave(4 // groups, 0)
    expected = torch.einsum("...ij,mj->mi" if groups is None else "mij,mj->mi", A, z) + f.v
    torch.testing.assert_close(f.affine(z), expected)
    torch.testing.assert_close(f(z), phi(expected))
    out = torch.empty_like(z)
    torch.testing.assert_close(f(z, out=out), phi(expected))
    torch.testing.assert_close(f.affine(z, out), expected)
    J = jacobian(lambda z: phi(f.affine(z)), z)
    linear = f.linearize(z)
    torch.testing.assert_close(linear.dense(), J)
    torch.testing.assert_close(linear.jvp(w), torch.einsum("mij,mj->mi", J, w))
    torch.testing.assert_close(linear.vjp(w), torch.einsum("mij,mi->mj", J, w))


@pytest.mark.parametrize("phi", PHIS, ids=lambda p: type(p).__name__)
def test_the_transposed_map_is_the_adjoint_equation(phi):
    f, z, g = affine_map(phi), randn(4, N, seed=3), randn(4, N, seed=4)
    f = dataclasses.replace(f, contraction=0.5, monotone=0.1, acyclic=True)
    d = phi.derivative(f.affine(z))
    adjoint = f.transposed(d, g)
    s = randn(4, N, seed=5)
    expected = phi.product(d, s @ f.A + g)
    torch.testing.assert_close(adjoint(s), expected)
    assert (adjoint.contraction, adjoint.monotone, adjoint.acyclic) == (0.5, 0.1, True)
    # s = P_d (A^T s + g) makes A^T s + g the usual (I - J^T)^-1 g.
    J = f.linearize(z).dense()
    P = torch.stack([phi.product(d, e.expand_as(d)) for e in torch.eye(N)], -1)
    u = torch.linalg.solve(torch.eye(N) - J.mT, g)
    torch.testing.assert_close(adjoint((P @ u[..., None])[..., 0]), (P @ u[..., None])[..., 0])


@pytest.mark.parametrize("phi", PHIS, ids=lambda p: type(p).__name__)
def test_selecting_rows(phi):
    f, z, rows = affine_map(phi), randn(4, N, seed=3), torch.tensor([3, 1])
    torch.testing.assert_close(f.select(rows)(z[rows]), f(z)[rows])
    linear = f.transposed(phi.derivative(f.affine(z)), z)
    torch.testing.assert_close(linear.select(rows)(z[rows]), linear(z)[rows])
    assert affine_map(phi, 2).select(rows) is None


@pytest.mark.parametrize("phi", PHIS, ids=lambda p: type(p).__name__)
def test_scaled_is_the_jacobian_as_an_activation(phi):
    z, w = randn(4, N, seed=3), randn(4, N, seed=4)
    d = phi.derivative(z)
    linear = Scaled(phi=phi, d=d)
    torch.testing.assert_close(linear(w), phi.product(d, w))
    torch.testing.assert_close(linear.call_(w.clone()), linear(w))
    torch.testing.assert_close(linear(3 * w), 3 * linear(w))
    assert linear.homogeneous and linear.slope == phi.slope and linear.entrywise == phi.entrywise
    assert torch.equal(linear.derivative(w), d)
    torch.testing.assert_close(linear.product(d, w), linear(w))
    torch.testing.assert_close(linear.rows(torch.tensor([2]))(w[2:3]), linear(w)[2:3])


@pytest.mark.parametrize("t", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("phi", [ReLU(), Tanh(), Softplus(), LeakyReLU()])
def test_the_prox_of_a_scaled_activation(phi, t):
    """x = prox(v, t) solves t z + (1 - t) x = v with x = d z."""
    z, v = randn(4, N, seed=3), randn(4, N, seed=4)
    linear = Scaled(phi=phi, d=phi.derivative(z))
    x = linear.prox(v, t)
    torch.testing.assert_close(linear((v - (1 - t) * x) / t), x)
    torch.testing.assert_close(linear.prox(v), linear(v))


@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 3), (4,)])
def test_rows_of_a_closure(shape):
    W = randn(3, 3, seed=1)

    def f(z):
        return torch.sin(z @ W) if len(shape) > 1 else torch.sin(2 * z)

    z = randn(*shape, seed=2)
    rows = RowMap.of(f, z.shape)
    assert RowMap.of(rows, z.shape) is rows and rows.select(torch.tensor([0])) is None
    flat = z.reshape(4, -1)
    torch.testing.assert_close(rows(flat), f(z).reshape(4, -1))
    assert rows(z).shape == z.shape
    J, w = jacobian(lambda z: rows(z), flat), randn(*flat.shape, seed=3)
    linear = rows.linearize(flat)
    for _ in range(2):  # the graph is kept
        torch.testing.assert_close(linear.dense(), J)
        torch.testing.assert_close(linear.jvp(w), torch.einsum("mij,mj->mi", J, w))
        torch.testing.assert_close(linear.vjp(w), torch.einsum("mij,mi->mj", J, w))


def test_rows_of_a_constant_and_of_a_linear_closure():
    z, w = randn(4, 3), randn(4, 3, seed=1)
    still = RowMap(lambda z: torch.ones(4, 3), z.shape)
    with torch.enable_grad():
        still = RowMap(lambda z: torch.ones(4, 3) + 0 * z.detach() + 0 * z, z.shape)
    assert not bool(still.linearize(z).jvp(w).any()) and not bool(still.linearize(z).vjp(w).any())
    linear = RowMap(lambda z: 3 * z, z.shape).linearize(z)
    torch.testing.assert_close(linear.jvp(w), 3 * w)
    torch.testing.assert_close(linear.vjp(w), 3 * w)


def test_linear_rows():
    M, b, w = randn(3, 3), randn(4, 3, seed=1), randn(4, 3, seed=2)
    f = LinearRows(lambda u: u @ M.mT, lambda u: u @ M, b)
    torch.testing.assert_close(f(w), w @ M.mT + b)
    assert f.linearize(w) is f and f.select(torch.tensor([0])) is None
    torch.testing.assert_close(f.jvp(w), w @ M.mT)
    torch.testing.assert_close(f.vjp(w), w @ M)
    torch.testing.assert_close(f.dense(), M.expand(4, 3, 3))
