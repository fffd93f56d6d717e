"""The Krylov method: what GMRES promises, row by row."""

import pytest
import torch
from problems import randn

from implicitdl._krylov import gcr


def system(m, n, seed=0, shift=0.5):
    """I - J of every row, with a definite symmetric part."""
    J = randn(m, n, n, seed=seed) * (shift / n**0.5)
    return torch.eye(n) - J


def times(M):
    return lambda w: torch.einsum("mij,mj->mi", M, w)


@pytest.mark.parametrize("memory", [3, 20])
@pytest.mark.parametrize("m, n", [(1, 1), (1, 7), (4, 30)])
def test_it_solves_every_row(m, n, memory):
    M, b = system(m, n), randn(m, n, seed=1)
    x, steps = gcr(times(M), b, rtol=1e-11, max_steps=500, memory=memory)
    assert torch.allclose(times(M)(x), b, atol=1e-9)
    assert bool((torch.linalg.norm(b - times(M)(x), dim=1) <= 1.01e-11 * b.norm(dim=1)).all())
    assert 1 <= steps < 60


def test_it_stops_at_the_tolerance_and_not_before():
    M, b = system(3, 40, shift=0.9), randn(3, 40, seed=1)
    counts = []
    for rtol in (1e-1, 1e-3, 1e-6):
        x, steps = gcr(times(M), b, rtol=rtol, max_steps=200)
        residual = (b - times(M)(x)).norm(dim=1) / b.norm(dim=1)
        assert bool((residual <= rtol).all()) and bool((residual > rtol * 1e-3).any())
        counts.append(steps)
    assert counts == sorted(set(counts))


def test_without_a_restart_it_is_gmres():
    """The residual after k products is the least over the Krylov space."""
    n = 12
    M, b = system(1, n, shift=0.9), randn(1, n, seed=1)
    basis = [b[0]]
    for k in range(1, 9):
        basis.append(M[0] @ basis[-1])
        V = torch.linalg.qr(torch.stack(basis[:k], dim=1)).Q
        y = torch.linalg.lstsq(M[0] @ V, b[0]).solution
        least = torch.linalg.norm(b[0] - M[0] @ V @ y)
        x, steps = gcr(times(M), b, rtol=1e-14, max_steps=k)
        assert steps == k
        found = torch.linalg.norm(b - times(M)(x))
        assert float(found) == pytest.approx(float(least), rel=1e-6, abs=1e-13)
    x, steps = gcr(times(M), b, rtol=1e-10, max_steps=100)
    assert steps <= n


def test_products_are_counted_and_limited():
    calls = []
    M, b = system(2, 30, shift=0.95), randn(2, 30, seed=1)

    def counted(w):
        calls.append(1)
        return times(M)(w)

    _, steps = gcr(counted, b, rtol=1e-15, max_steps=7)
    assert steps == 7 == len(calls)


def test_rows_do_not_see_each_other():
    M, b = system(4, 10), randn(4, 10, seed=1)
    x, _ = gcr(times(M), b, rtol=1e-10, max_steps=9)
    b[2] = torch.nan
    ill, _ = gcr(times(M), b, rtol=1e-10, max_steps=9)
    assert torch.equal(ill[[0, 1, 3]], x[[0, 1, 3]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_that_is_done_stays(dtype):
    """Zeros, a row that one step solves, and hard ones: no division by zero, no drift."""
    M, b = system(4, 25, shift=0.9).to(dtype), randn(4, 25, seed=1).to(dtype)
    b[0] = 0
    M[1] = 2 * torch.eye(25)
    x, steps = gcr(times(M), b, rtol=1e-5, max_steps=100)
    assert steps > 5 and bool(x.isfinite().all()) and bool((x[0] == 0).all())
    assert torch.allclose(x[1], b[1] / 2, rtol=1e-5)
    assert torch.allclose(times(M)(x), b, atol=1e-3)


def test_tiny_right_hand_sides():
    """Nothing absolute: a system scaled by 1e-30 is solved as well as any."""
    M, b = system(2, 10), randn(2, 10, seed=1)
    x, steps = gcr(times(M), b, rtol=1e-8, max_steps=50)
    small, same = gcr(times(M), b * 1e-30, rtol=1e-8, max_steps=50)
    assert steps == same and torch.allclose(small * 1e30, x)


def test_a_restart_forgets_everything():
    """Six products with a memory of three are twice three, the second from where the first ended."""
    M, b = system(2, 30, shift=0.95), randn(2, 30, seed=1)
    whole, _ = gcr(times(M), b, rtol=1e-15, max_steps=6, memory=3)
    first, _ = gcr(times(M), b, rtol=1e-15, max_steps=3)
    second, _ = gcr(times(M), b - times(M)(first), rtol=1e-15, max_steps=3)
    assert torch.allclose(whole, first + second, atol=1e-13)


def test_an_ill_conditioned_system_is_solved_as_far_as_rounding_allows():
    """Condition 1e6: what is believed to be the residual is still the true one to nine digits."""
    n = 40
    Q = torch.linalg.qr(randn(n, n, seed=1))[0]
    M = (Q * torch.logspace(-6, 0, n, dtype=torch.float64)) @ Q.mT
    b = randn(3, n, seed=2).double()
    x, spent = gcr(lambda w: w @ M.mT, b, rtol=1e-9, max_steps=n + 2, memory=n)
    r = (b - x @ M.mT).norm(dim=1) / b.norm(dim=1)
    assert spent <= n + 2 and bool((r < 1e-7).all()), r
