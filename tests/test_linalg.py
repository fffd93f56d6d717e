"""Perron roots, strong components and projections, judged by brackets and optimality conditions."""

import numpy as np
import pytest
import torch

from implicitdl._linalg import (
    perron,
    perron_root,
    project_l1,
    project_matrix_measure,
    project_second_order_cone,
    project_simplex,
    resolvent_vector,
    strong_components,
)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cycle(weights):
    n = len(weights)
    M = torch.zeros(n, n)
    M[torch.arange(n), (torch.arange(n) + 1) % n] = torch.as_tensor(weights)
    return M


# ------------------------------------------------------------------ Perron root


@pytest.mark.parametrize("n", [1, 2, 7, 60, 320])
@pytest.mark.parametrize("density", [1.0, 0.2])
def test_perron_matches_eigenvalues(n, density):
    M = rand(n, n).abs() * (torch.rand(n, n, generator=torch.Generator().manual_seed(1)) < density)
    p = perron(M)
    assert p.root == pytest.approx(float(torch.linalg.eigvals(M).abs().max()), rel=1e-9, abs=1e-9)
    assert p.lower <= p.root * (1 + 1e-12) and p.root - p.lower <= 1e-9 * max(1, p.root)
    torch.testing.assert_close(M @ p.right, p.root * p.right, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(M.T @ p.left, p.root * p.left, rtol=1e-8, atol=1e-8)
    assert (p.right >= 0).all() and (p.left >= 0).all() and p.right.max() == 1 == p.left.max()


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_perron_of_a_periodic_matrix(scale):
    weights = torch.rand(50, generator=torch.Generator().manual_seed(0)) * scale
    p = perron(cycle(weights))
    assert p.root == pytest.approx(float(weights.log().mean().exp()), rel=1e-10)


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_perron_of_a_nilpotent_matrix_is_zero(scale):
    M = rand(40, 40).abs().triu(1) * scale
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    p = perron(M[order][:, order])
    assert p.root == 0.0
    assert float((M[order][:, order] @ p.right).abs().max()) == 0.0


def test_perron_of_zero_and_empty():
    assert perron(torch.zeros(3, 3)).root == 0.0
    assert perron(torch.zeros(0, 0)).root == 0.0


def test_perron_of_reducible_matrix_has_eigenvectors():
    M = torch.block_diag(
        torch.tensor([[0.5]]), torch.tensor([[0.1, 0.9], [0.9, 0.1]]), torch.eye(1)
    )
    M[0, 1], M[1, 3] = 3.0, 2.0
    M[3, 3] = 0.2
    p = perron(M)
    assert p.root == pytest.approx(1.0)
    torch.testing.assert_close(M @ p.right, p.right)
    torch.testing.assert_close(M.T @ p.left, p.left)


def test_perron_root_gradients():
    M = (rand(5, 5).abs() + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(perron_root, M)
    assert torch.autograd.gradgradcheck(perron_root, M)
    batch = rand(3, 4, 4).abs().requires_grad_()
    assert torch.autograd.gradcheck(perron_root, batch)
    assert torch.autograd.gradgradcheck(perron_root, batch)
    g = torch.func.vmap(torch.func.grad(perron_root))(batch.detach())
    (expected,) = torch.autograd.grad(perron_root(batch).sum(), batch)
    torch.testing.assert_close(g, expected)


def test_perron_root_gradient_of_reducible_matrix():
    M = torch.tensor([[2.0, 5.0], [0.0, 1.0]], requires_grad=True)
    (g,) = torch.autograd.grad(perron_root(M), M)
    # lambda_1 of [[2, 5], [e, 1]] is 2 + 5 e + O(e^2).
    torch.testing.assert_close(g, torch.tensor([[1.0, 0.0], [5.0, 0.0]]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, in forward mode
def test_perron_root_among_equal_components_is_that_of_one_of_them():
    B = rand(3, 3).abs() + 0.1
    B = B / B.sum(1, keepdim=True)  # rows of length 1: the power method ends at once
    M = torch.block_diag(B, B)
    for bridge in (0.0, 0.5):
        M[0, 4] = bridge
        gradient, hessian = torch.func.grad(perron_root)(M), torch.func.hessian(perron_root)(M)
        (c,) = (c for c in (slice(0, 3), slice(3, 6)) if bool((gradient[c, c] != 0).any()))
        torch.testing.assert_close(gradient[c, c], torch.func.grad(perron_root)(B))
        torch.testing.assert_close(hessian[c, c, c, c], torch.func.hessian(perron_root)(B))
        assert gradient.count_nonzero() == gradient[c, c].count_nonzero()


def test_perron_root_in_float32_of_vectors_that_float32_cannot_hold():
    M = cycle([1e30, 1e-30, 1e30, 1e-30, 1e30, 1e-30])
    exact, got = torch.func.grad(perron_root)(M), torch.func.grad(perron_root)(M.float())
    # M_ij d root / d M_ij = root / n on every cycle of n.
    torch.testing.assert_close(M * exact, (M > 0) / 6.0)
    torch.testing.assert_close(M.float() * got, (M > 0).float() / 6)


def test_resolvent_vector_certifies():
    M = rand(30, 30).abs()
    root = perron(M).root
    v = resolvent_vector(M, root * 1.01)
    assert (v > 0).all() and (M @ v < root * 1.01 * v).all()
    assert resolvent_vector(M, root * 0.99) is None
    deep = rand(30, 30).abs().triu(1) * 1e4
    v = resolvent_vector(deep, 0.5)
    assert (v > 0).all() and v.max() > 1e50
    assert resolvent_vector(deep * 1e12, 0.5) is None  # overflows: refused, not wrong


def test_strong_components_in_evaluation_order():
    rng = np.random.default_rng(0)
    for density in (0.02, 0.05, 0.1, 1.0):
        mask = rng.uniform(size=(40, 40)) < density
        order = strong_components(mask)
        assert sorted(np.concatenate(order).tolist()) == list(range(40))
        place = np.empty(40, dtype=int)
        for k, c in enumerate(order):
            place[c] = k
        rows, cols = np.nonzero(mask)
        assert (place[cols] <= place[rows]).all()
    assert strong_components(torch.zeros(0, 0, dtype=torch.bool)) == []


# ------------------------------------------------------------------ projections


def variational_gap(W, P, Q):
    """max over Q of <W - P, Q - P>, which is <= 0 exactly at the projection."""
    return float(((W - P) * (Q - P)).sum(-1).max())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("radius", [0.0, 0.3, 2.0, 1e3])
def test_project_l1_is_the_projection(weighted, radius):
    W = rand(50, 12)
    w = torch.rand(12, generator=torch.Generator().manual_seed(3)) + 0.05 if weighted else None
    one = torch.ones(12) if w is None else w
    P = project_l1(W, radius, w)
    assert float((P.abs() @ one).max()) <= radius * (1 + 1e-14) + 1e-14
    # <W - P, P> equals the support function of the ball at W - P: radius max_j |.|_j / w_j.
    support = radius * ((W - P).abs() / one).amax(-1)
    torch.testing.assert_close(((W - P) * P).sum(-1), support, rtol=1e-11, atol=1e-11)
    for k in range(20):
        Q = rand(50, 12, seed=k + 10)
        Q = Q * (radius / (Q.abs() @ one).clamp_min(1e-300))[:, None]
        assert variational_gap(W, P, Q) <= 1e-11
    inside = (W.abs() @ one) <= radius
    assert torch.equal(P[inside], W[inside])


def test_project_l1_row_radii_weights_batches_and_free_entries():
    W = rand(2, 5, 7)
    radius = torch.rand(2, 5, generator=torch.Generator().manual_seed(1))
    w = torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(2)) + 0.1
    P = project_l1(W, radius, w)
    for i in range(2):
        for j in range(5):
            one = project_l1(W[i, j], float(radius[i, j]), w[i, j])
            torch.testing.assert_close(P[i, j], one)
    free = torch.tensor([1.0, 0.0, 1.0])
    P = project_l1(torch.tensor([[3.0, 9.0, 0.0]]), 1.0, free)
    torch.testing.assert_close(P, torch.tensor([[1.0, 9.0, 0.0]]))


def test_project_l1_ties_zeros_and_bad_arguments():
    torch.testing.assert_close(project_l1(torch.ones(4), 1.0), torch.full((4,), 0.25))
    assert torch.equal(project_l1(torch.zeros(3), 0.0), torch.zeros(3))
    assert project_l1(torch.zeros(2, 0), 1.0).shape == (2, 0)
    with pytest.raises(ValueError, match="radius"):
        project_l1(torch.ones(3), -1.0)
    with pytest.raises(ValueError, match="weights"):
        project_l1(torch.ones(3), 1.0, torch.tensor([1.0, -1.0, 1.0]))


def test_project_l1_geometric_rows_and_float32():
    W = (2.0 ** torch.arange(-60, 10)).repeat(3, 1) * torch.tensor([[1.0], [1e-3], [1e3]])
    P = project_l1(W, 1.0)
    torch.testing.assert_close(P.abs().sum(-1)[[0, 2]], torch.ones(2))
    assert torch.equal(P[1], W[1]) or float(P[1].abs().sum()) <= 1 + 1e-12
    torch.testing.assert_close(((W - P) * P).sum(-1), (W - P).amax(-1), rtol=1e-12, atol=0)
    big = rand(64, 2048).float()
    P = project_l1(big, 0.95)
    assert P.dtype == torch.float32
    reference = project_l1(big.double(), 0.95)
    assert float((P - reference).abs().max()) < 1e-5 and float(P.abs().sum(-1).max()) < 0.95001


def test_projection_gradients():
    w = torch.rand(6, generator=torch.Generator().manual_seed(3)) + 0.3
    W = (rand(4, 6) * 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: project_l1(x, 1.0), W)
    assert torch.autograd.gradcheck(lambda x, r: project_l1(x, r, w), (W, torch.tensor(0.7)))
    assert torch.autograd.gradcheck(project_simplex, W)
    square = (rand(5, 5) * 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: project_matrix_measure(x, 0.2, w[:5]), square)
    t = rand(4).requires_grad_()
    assert torch.autograd.gradcheck(project_second_order_cone, (t, W))


@pytest.mark.parametrize("gamma", [-2.0, 0.0, 0.9])
def test_project_matrix_measure_is_the_projection(gamma):
    v = torch.rand(9, generator=torch.Generator().manual_seed(5)) + 0.2
    W = rand(3, 9, 9)
    P = project_matrix_measure(W, gamma, v)
    ratio = (v[None, :] / v[:, None]) * (1 - torch.eye(9))

    def rows(A):
        return A.diagonal(dim1=-2, dim2=-1) + (A.abs() * ratio).sum(-1)

    assert float((rows(P) - gamma).max()) <= 1e-13
    inside = rows(W) <= gamma
    assert torch.equal(P[inside], W[inside])
    for k in range(30):
        Q = rand(3, 9, 9, seed=k + 20) * 3
        Q = Q - torch.diag_embed((rows(Q) - gamma).clamp_min(0))
        assert variational_gap(W, P, Q) <= 1e-11
    # Q = P scaled about the apex gamma I stays in the set: complementary slackness.
    apex = gamma * torch.eye(9)
    assert float((((W - P) * (P - apex)).sum(-1)).abs().max()) <= 1e-11


def test_project_simplex_and_cone():
    W = rand(40, 8) * 3
    P = project_simplex(W, 2.0)
    torch.testing.assert_close(P.sum(-1), torch.full((40,), 2.0))
    assert (P >= 0).all()
    for k in range(8):
        corner = torch.zeros(8)
        corner[k] = 2.0
        assert variational_gap(W, P, corner) <= 1e-12
    t, x = rand(40, seed=1) * 2, rand(40, 3, seed=2)
    s, y = project_second_order_cone(t, x)
    assert float((torch.linalg.vector_norm(y, dim=-1) - s).max()) <= 1e-14
    slack_t, slack_x = s - t, y - x  # must lie in the (self-dual) cone, orthogonal to (s, y)
    assert float((torch.linalg.vector_norm(slack_x, dim=-1) - slack_t).max()) <= 1e-14
    assert float((s * slack_t + (y * slack_x).sum(-1)).abs().max()) <= 1e-13
