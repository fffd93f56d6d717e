"""Generalised conjugate residuals against a direct solve."""

import pytest
import torch
from problems import randn

from implicitdl._krylov import gcr


def systems(m=6, n=20, seed=0):
    """Definite, far from symmetric."""
    W = randn(m, n, n, seed=seed) / n**0.5
    return torch.eye(n) * 1.5 + (W - W.mT) + 0.2 * W


def apply(M):
    return lambda x: torch.einsum("mij,mj->mi", M, x)


@pytest.mark.parametrize("memory", [20, 5])
def test_solves_to_the_asked_accuracy(memory):
    M, b = systems(), randn(6, 20, seed=1)
    for rtol in (1e-2, 1e-6, 1e-11):
        x, spent = gcr(apply(M), b, rtol=rtol, max_steps=500, memory=memory)
        r = (b - apply(M)(x)).norm(dim=1) / b.norm(dim=1)
        assert bool((r <= rtol * 1.01).all()) and spent < 500
    torch.testing.assert_close(x, torch.linalg.solve(M, b), rtol=0, atol=1e-9)


def test_n_products_are_enough_and_no_more_are_spent():
    M, b = systems(n=8), randn(6, 8, seed=1)
    _, spent = gcr(apply(M), b, rtol=1e-10, max_steps=100)
    assert spent <= 8
    _, loose = gcr(apply(M), b, rtol=0.3, max_steps=100)
    assert loose < spent
    x, spent = gcr(lambda w: 2 * w, b, rtol=1e-10, max_steps=100)
    assert spent == 1
    torch.testing.assert_close(x, b / 2)


def test_the_residual_never_grows():
    M, b = systems(seed=3), randn(6, 20, seed=1)
    last = b.norm(dim=1)
    for steps in range(1, 30):
        x, spent = gcr(apply(M), b, rtol=1e-14, max_steps=steps, memory=4)
        now = (b - apply(M)(x)).norm(dim=1)
        assert bool((now <= last * (1 + 1e-9)).all()) and spent == steps
        last = now


def test_it_is_gmres_in_the_first_steps():
    """The k-th residual is the smallest that k products can give."""
    M, b = systems(m=1, n=12), randn(1, 12, seed=4)
    for k in range(1, 8):
        x, _ = gcr(apply(M), b, rtol=1e-15, max_steps=k)
        basis = [b[0]]
        for _ in range(k):
            basis.append(M[0] @ basis[-1])
        V = torch.linalg.qr(torch.stack(basis[1:], 1))[0]
        best = (b[0] - V @ (V.mT @ b[0])).norm()
        torch.testing.assert_close((b - apply(M)(x)).norm(), best, rtol=1e-7, atol=1e-12)


def test_finished_and_zero_rows_stand_still():
    M, b = systems(), randn(6, 20, seed=1)
    b[2] = 0.0
    M[3] = torch.eye(20)
    x, _ = gcr(apply(M), b, rtol=1e-12, max_steps=200)
    assert not bool(x[2].any()) and bool(torch.isfinite(x).all())
    torch.testing.assert_close(x[3], b[3])
    torch.testing.assert_close(x, torch.linalg.solve(M, b), rtol=0, atol=1e-9)
    x, spent = gcr(apply(M), torch.zeros_like(b), rtol=1e-12, max_steps=200)
    assert spent == 1 and not bool(x.any())
