"""Batched cone programs: right, honest, and differentiable to every order that is asked for."""

import clarabel
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch.autograd import gradcheck, gradgradcheck

from implicitdl import ConvergenceError
from implicitdl.convex import (
    ConeProgram,
    Cones,
    ConeSolver,
    LinearProgram,
    Projection,
    QuadraticProgram,
    gradient_certificate,
    projections,
)
from implicitdl.convex.cones import derivative, divide, longest_step, multiply, scaling
from implicitdl.convex.program import Rows
from implicitdl.solution import InfeasibleError, Status

# torch itself compiles a helper of forward mode with the deprecated torch.jit.script.
SCRIPT = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
CONES = [Cones(4), Cones(0, (3,)), Cones(2, (1, 3, 3, 2)), Cones(3, (4, 2, 4))]
cones = pytest.mark.parametrize("K", CONES, ids=str)


def inside(K, batch, seed, depth=0.1):
    """Points of K, `depth` from its boundary at least."""
    x = torch.randn(batch, K.size, generator=torch.Generator().manual_seed(seed))
    return x + (depth - K.depth(x)).clamp_min(0)[:, None] * K.unit(x)


def quadratic(batch, n, m, p=0, seed=0):
    """Feasible strictly convex programs, about half of their rows active."""
    g = torch.Generator().manual_seed(seed)
    L = torch.randn(batch, n, n, generator=g)
    P = L @ L.mT / n + 0.1 * torch.eye(n)
    G, A = torch.randn(batch, m, n, generator=g), torch.randn(batch, p, n, generator=g)
    x = torch.randn(batch, n, 1, generator=g)
    h = (G @ x)[..., 0] + torch.rand(batch, m, generator=g)
    return P, 3 * torch.randn(batch, n, generator=g), G, h, A, (A @ x)[..., 0]


def robust(batch, n=4, k=3, q=5, seed=0):
    """min c'x over a_i'x + ||P_i x|| <= b_i and |x| <= 5."""
    g = torch.Generator().manual_seed(seed)
    c = torch.randn(batch, n, generator=g)
    P = 0.15 * torch.randn(batch, k, q - 1, n, generator=g)
    a = torch.randn(batch, k, 1, n, generator=g)
    b = 1 + torch.rand(batch, k, 1, generator=g)
    G = torch.cat([a, -P], 2).flatten(1, 2)
    h = torch.cat([b, torch.zeros(batch, k, q - 1)], 2).flatten(1)
    box = torch.cat([torch.eye(n), -torch.eye(n)]).expand(batch, -1, -1)
    h = torch.cat([torch.full((batch, 2 * n), 5.0), h], 1)
    return c, torch.cat([box, G], 1), h, Cones(2 * n, (q,) * k)


def symmetric(P):
    return 0.5 * (P + P.mT)


# ---- cones -----------------------------------------------------------------------------------------


@cones
def test_projection_is_the_nearest_point(K):
    v = 2 * torch.randn(50, K.size, generator=torch.Generator().manual_seed(1))
    s = K.project(v)
    z = s - v
    assert K.depth(s).min() >= -1e-14 and K.depth(z).min() >= -1e-14  # Moreau: s in K, s - v in K*
    assert (s * z).sum(1).abs().max() < 1e-13


def inverted(W):
    return W.mapped(torch.reciprocal)


def matrix(F):
    """F written out.  # (batch, size, size)"""
    eye = torch.eye(F.cones.size, dtype=F.line.dtype)
    return torch.stack([F(e.expand(F.line.shape[0], -1)) for e in eye], -1)


@cones
def test_scaling_maps_both_to_one_point(K):
    s, z, x = inside(K, 20, 2), inside(K, 20, 3), torch.randn(20, K.size)
    W = scaling(K, s, z)
    torch.testing.assert_close(W(z), inverted(W)(s))
    torch.testing.assert_close(inverted(W)(W(x)), x)
    # W maps K onto itself, and is symmetric and positive definite.
    assert K.depth(W(inside(K, 20, 8, 0.0))).min() > -1e-12
    full = matrix(W)
    torch.testing.assert_close(full, full.mT)
    assert torch.linalg.eigvalsh(full).min() > 0
    torch.testing.assert_close(W(torch.stack([x, s], 1)), torch.stack([W(x), W(s)], 1))


@cones
def test_normal_matrices(K):
    F = scaling(K, inside(K, 20, 2), inside(K, 20, 3)).mapped(lambda e: e**-2)
    for n in (3, 40):  # with the Gram matrices of the cones, and without
        G = torch.randn(20, K.size, n)
        torch.testing.assert_close(Rows(G, K).normal(F), G.mT @ matrix(F) @ G)
        torch.testing.assert_close(Rows(G[0], K).normal(F), G[0].mT @ matrix(F) @ G[0])
        some = torch.tensor([3, 7])
        rows = Rows(G, K)
        rows.normal(F)
        torch.testing.assert_close(rows.select(some).normal(F.select(some)), rows.normal(F)[some])
        x, z = torch.randn(20, n), torch.randn(20, K.size)
        torch.testing.assert_close(rows.times(x), (G @ x[..., None])[..., 0])
        torch.testing.assert_close(rows.back(z), (G.mT @ z[..., None])[..., 0])


@cones
def test_jordan_algebra(K):
    lam, b = inside(K, 20, 4), torch.randn(20, K.size)
    torch.testing.assert_close(multiply(K, lam, divide(K, lam, b)), b)
    torch.testing.assert_close(multiply(K, K.unit(b).expand_as(b), b), b)


@cones
def test_longest_step_ends_on_the_boundary(K):
    x, d = inside(K, 200, 5), torch.randn(200, K.size)
    t = longest_step(K, x, d)
    far = torch.isinf(t)
    assert (K.depth(x[far] + 1e6 * d[far]) >= 0).all()
    end = x[~far] + t[~far, None] * d[~far]
    size = 1 + end.abs().amax(1)
    assert (K.depth(end).abs() <= 1e-10 * size).all()
    assert (K.depth(x[~far] + 0.999 * t[~far, None] * d[~far]) > 0).all()


@SCRIPT
@cones
def test_derivative_of_the_projection(K):
    v = torch.randn(30, K.size, generator=torch.Generator().manual_seed(6))
    w = torch.randn(30, K.size)
    D = derivative(K, v)
    _, exact = torch.func.jvp(K.project, (v,), (w,))
    torch.testing.assert_close(D(w), exact)


@pytest.mark.parametrize("bad", [(-1, ()), (2, (0,)), (1.5, ()), (1, (2.0,))])
def test_cones_refuse_what_is_no_size(bad):
    with pytest.raises(ValueError, match="expected an integer"):
        Cones(*bad)


# ---- solutions -------------------------------------------------------------------------------------


def reference(P, q, G, h, A, b, K):
    """Clarabel's status and objective."""
    kinds = [clarabel.ZeroConeT(len(b))] if len(b) else []
    kinds += [clarabel.NonnegativeConeT(K.nonnegative)] if K.nonnegative else []
    kinds += [clarabel.SecondOrderConeT(k) for k in K.second_order]
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-10
    rows = sp.csc_matrix(np.vstack([A, G]))
    solver = clarabel.DefaultSolver(
        sp.triu(sp.csc_matrix(P)).tocsc(), q, rows, np.concatenate([b, h]), kinds, settings
    )
    found = solver.solve()
    return str(found.status).removeprefix("Almost"), found.obj_val


STATUS = {
    "Solved": Status.CONVERGED,
    "PrimalInfeasible": Status.INFEASIBLE,
    "DualInfeasible": Status.UNBOUNDED,
}


def zoo(rng):
    """A random program: feasible or not, bounded or not, degenerate, with rows twice or empty."""
    n, linear = int(rng.integers(1, 15)), int(rng.integers(0, 20))
    K = Cones(linear, tuple(map(int, rng.integers(1, 7, size=rng.integers(0, 4)))))
    p, M = int(rng.integers(0, max(1, n // 2))), K.size
    kind = rng.choice(["bounded", "random", "degenerate", "twice"])
    L = rng.normal(size=(n, int(rng.integers(0, n + 1))))
    P = L @ L.T if rng.random() < 0.6 else np.zeros((n, n))
    G, A, q = rng.normal(size=(M, n)), rng.normal(size=(p, n)), rng.normal(size=n)
    if kind == "twice" and linear > 1:
        G[1] = G[0]
    if rng.random() < 0.3:
        G, q = np.round(G), np.round(q)

    def point():
        return K.project(torch.from_numpy(rng.normal(size=(1, M))))[0].numpy()

    x = rng.normal(size=n)
    h, b = (
        (rng.normal(size=M), rng.normal(size=p)) if kind == "random" else (G @ x + point(), A @ x)
    )
    if kind in ("bounded", "degenerate"):
        q = -(P @ x + G.T @ point() + A.T @ rng.normal(size=p))
    if kind == "degenerate":
        h = G @ x
    return P, q, G, h, A, b, K


COUNTS = [50, pytest.param(400, marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", COUNTS)
def test_zoo_agrees_with_clarabel(count):
    rng, seen = np.random.default_rng(1), set()
    for _ in range(count):
        *data, K = zoo(rng)
        status, objective = reference(*data, K)
        if status not in STATUS:  # it does not know
            continue
        layer = ConeProgram(K, on_failure="nan")
        found = layer.solve(*(torch.from_numpy(t)[None] for t in data))
        assert found.statuses == [STATUS[status]], (status, found.stats["error"])
        seen.add(status)
        if found.converged.all():
            gap = abs(found.stats["objective"].item() - objective)
            assert gap <= 1e-6 * (1 + abs(objective))
    assert seen == set(STATUS)


@pytest.mark.parametrize("count", COUNTS)
def test_certificates_are_proofs(count):
    rng, seen = np.random.default_rng(2), {Status.INFEASIBLE: 0, Status.UNBOUNDED: 0}
    for _ in range(count):
        *data, K = zoo(rng)
        P, q, G, h, A, b = (torch.from_numpy(t) for t in data)
        found = ConeProgram(K, on_failure="nan").solve(*(t[None] for t in (P, q, G, h, A, b)))
        (status,) = found.statuses
        if status not in seen:
            assert found.stats["certificate"].isnan().all()
            continue
        seen[status] += 1
        w = found.stats["certificate"][0]
        x, y, v = w.split([len(q), len(b), len(h)])
        if status is Status.INFEASIBLE:
            z, weight = -v, -(b @ y - h @ v)
            assert weight > 0 and K.depth(z) >= -1e-9
            assert (A.T @ y + G.T @ z).abs().max() <= 1e-8 * weight
        else:
            fall = -(q @ x)
            assert fall > 0 and K.depth(-(G @ x)) >= -1e-8 * fall
            assert torch.cat([P @ x, A @ x]).abs().max() <= 1e-8 * fall
    assert min(seen.values()) > 2


@pytest.mark.parametrize("n, m, p", [(4, 5, 0), (20, 20, 3), (50, 70, 5)])
def test_optimality_conditions_to_rounding(n, m, p):
    P, q, G, h, A, b = quadratic(32, n, m, p)
    found = QuadraticProgram().solve(P, q, G, h, A, b)
    x, z, s, y = (found.value, *(found.stats[k] for k in ("dual", "slack", "equality_dual")))
    assert (s >= 0).all() and (z >= 0).all() and (s * z).abs().max() == 0
    stationary = (P @ x[..., None] + G.mT @ z[..., None] + A.mT @ y[..., None])[..., 0] + q
    assert stationary.abs().max() < 1e-11
    assert ((G @ x[..., None])[..., 0] + s - h).abs().max() < 1e-11
    assert found.residual.max() < 1 and found.converged.all()


def test_an_ill_instance_changes_no_other():
    c = torch.ones(7, 2)
    G = torch.cat([torch.eye(2), -torch.eye(2)])
    h = torch.ones(7, 4)
    h[1, 1], h[1, 3] = 1.0, -2.0  # 2 <= x <= 1
    h[2] = torch.nan
    c[3] = torch.inf
    well = [0, 4, 5, 6]
    layer = LinearProgram(on_failure="nan")
    c.requires_grad_()
    found = layer.solve(c, G, h)
    assert [s.name for s in found.statuses[:4]] == [
        "CONVERGED",
        "INFEASIBLE",
        "NONFINITE",
        "NONFINITE",
    ]
    alone = LinearProgram()(c[well], G, h[well])
    torch.testing.assert_close(found.value[well], alone, rtol=0, atol=1e-12)
    assert found.value[[1, 2, 3]].isnan().all()
    found.value[well].sum().backward()
    assert torch.isfinite(c.grad).all()  # nothing was asked of the others


def test_a_gradient_asked_of_a_failed_instance_is_nan():
    G, h = torch.cat([torch.eye(2), -torch.eye(2)]), torch.ones(2, 4)
    h[1, 2] = -2.0
    c = torch.ones(2, 2, requires_grad=True)
    LinearProgram(on_failure="nan", smoothing=0.1)(c, G, h).sum().backward()
    assert torch.isfinite(c.grad[0]).all() and c.grad[1].isnan().all()


def test_failures_raise_by_default_and_name_instances():
    G, h = torch.cat([torch.eye(2), -torch.eye(2)]), torch.ones(3, 4)
    h[1, 2] = -2.0
    with pytest.raises(InfeasibleError, match=r"1 infeasible \(index 1\)") as caught:
        LinearProgram()(torch.ones(3, 2), G, h)
    assert caught.value.instances.tolist() == [1] and caught.value.certificate.shape == (1, 6)
    with pytest.raises(InfeasibleError, match=r"3 unbounded"):
        LinearProgram()(torch.ones(3, 2), torch.eye(2), torch.ones(2))
    P, q, G, h, _, _ = quadratic(3, 6, 6)
    with pytest.raises(ConvergenceError, match="3 of 3"):
        QuadraticProgram(solver=ConeSolver(max_steps=1))(P, q, G, h)


def test_float32_in_and_out():
    data = [t.float() for t in quadratic(8, 10, 10, 2)]
    found = QuadraticProgram().solve(*data)
    assert found.value.dtype == torch.float32
    exact = QuadraticProgram()(*(t.double() for t in data))
    torch.testing.assert_close(found.value, exact.float(), rtol=1e-6, atol=1e-6)


def test_shared_data_and_single_programs():
    P, q, G, h, A, b = quadratic(6, 5, 6, 2)
    shared = QuadraticProgram()(P[0], q, G[0], h, A[0], b[0].expand(6, -1))
    apart = torch.stack([QuadraticProgram()(P[0], q[i], G[0], h[i], A[0], b[0]) for i in range(6)])
    torch.testing.assert_close(shared, apart, rtol=1e-9, atol=1e-10)
    Q = P[0].clone().requires_grad_()  # the gradient of what is shared is a sum over the batch
    QuadraticProgram()(symmetric(Q), q, G[0], h).square().sum().backward()
    whole = Q.grad
    parts = torch.zeros_like(whole)
    for i in range(6):
        R = P[0].clone().requires_grad_()
        QuadraticProgram()(symmetric(R), q[i], G[0], h[i]).square().sum().backward()
        parts += R.grad
    torch.testing.assert_close(whole, parts, rtol=1e-8, atol=1e-10)


def test_start_from_a_nearby_solution_takes_newton_steps_alone():
    P, q, G, h, _, _ = quadratic(32, 20, 20)
    layer = QuadraticProgram()
    before = layer.solve(P, q, G, h)
    cold = layer.solve(P, 1.001 * q, G, h)
    warm = layer.solve(P, 1.001 * q, G, h, start=before)
    torch.testing.assert_close(warm.value, cold.value, rtol=1e-9, atol=1e-11)
    assert (warm.steps <= 1).double().mean() > 0.9 and cold.steps.min() > 3
    with pytest.raises(ValueError, match="start"):
        layer.solve(P[:4], q[:4], G[:4], h[:4], start=before)


# ---- derivatives -----------------------------------------------------------------------------------


def loose(layer):
    return lambda P, *rest: layer(symmetric(P), *rest)


@SCRIPT
def test_gradients_of_quadratic_programs():
    data = [t.requires_grad_() for t in quadratic(2, 4, 4, 1)]
    # Along random directions, which costs a few solves and not one an entry.
    assert gradcheck(loose(QuadraticProgram()), data, atol=1e-6, fast_mode=True)
    assert gradcheck(loose(QuadraticProgram()), [t.detach()[:2].requires_grad_() for t in data],
                     check_forward_ad=True, check_backward_ad=False, atol=1e-6,
                     fast_mode=True)  # fmt: skip
    one = [t.detach()[:1].requires_grad_() for t in data]
    assert gradcheck(loose(QuadraticProgram()), one, atol=1e-6)


def test_only_the_symmetric_part_of_the_objective_counts():
    P, q, G, h, _, _ = quadratic(2, 4, 4)
    skew = torch.randn(2, 4, 4)
    torch.testing.assert_close(
        QuadraticProgram()(P + skew - skew.mT, q, G, h), QuadraticProgram()(P, q, G, h)
    )
    P.requires_grad_()
    (g,) = torch.autograd.grad(QuadraticProgram()(P, q, G, h).sum(), P)
    torch.testing.assert_close(g, g.mT)
    assert gradcheck(lambda P: QuadraticProgram()(P, q, G, h), P, atol=1e-6)


def test_second_derivatives_of_quadratic_programs():
    data = [t[:2].clone().requires_grad_() for t in quadratic(2, 3, 4, 1)]
    assert gradgradcheck(loose(QuadraticProgram(order=2)), data, atol=1e-5, fast_mode=True)
    x = loose(QuadraticProgram())(*data)
    (g,) = torch.autograd.grad(x.square().sum(), data[1], create_graph=True)
    with pytest.raises(RuntimeError, match="order"):
        torch.autograd.grad(g.sum(), data[1])


def test_gradients_of_second_order_cone_programs():
    c, G, h, K = robust(2, n=3, k=2, q=3)
    data = [t.clone().requires_grad_() for t in (c, G, h)]
    layer = ConeProgram(K)
    assert gradcheck(lambda c, G, h: layer(None, c, G, h), data, atol=1e-5, fast_mode=True)


@pytest.mark.slow
def test_second_derivatives_of_second_order_cone_programs():
    c, G, h, K = robust(1, n=3, k=2, q=3)
    data = [t.clone().requires_grad_() for t in (c, G, h)]
    layer = ConeProgram(K, order=2)
    assert gradgradcheck(lambda c, G, h: layer(None, c, G, h), data, atol=1e-4)


def test_duals_and_objective_have_gradients():
    P, q, G, h, A, b = quadratic(3, 4, 5, 1)
    h.requires_grad_()
    found = QuadraticProgram().solve(P, q, G, h, A, b)
    (g,) = torch.autograd.grad(found.stats["objective"].sum(), h, retain_graph=True)
    torch.testing.assert_close(g, -found.stats["dual"].detach())  # the envelope theorem
    assert torch.autograd.grad(found.stats["dual"].sum(), h)[0].abs().max() > 0


def test_the_size_of_the_loss_is_no_matter():
    P, q, G, h, _, _ = quadratic(4, 6, 6)
    q.requires_grad_()
    x = QuadraticProgram()(P, q, G, h)
    (g,) = torch.autograd.grad(x.sum(), q, retain_graph=True)
    (small,) = torch.autograd.grad(1e-8 * x.sum(), q)
    torch.testing.assert_close(small * 1e8, g, rtol=1e-12, atol=0)


def test_gradient_certificate_flags_degenerate_solutions():
    P, q, G, h, _, _ = quadratic(8, 6, 6)
    sound = gradient_certificate(QuadraticProgram().solve(P, q, G, h))
    assert not sound["degenerate"].any() and (sound["adjoint_residual"] < 1e-10).all()
    # min (x - 1)^2 / 2 over x <= 1: the constraint holds with equality and has no force.
    x = QuadraticProgram().solve(torch.eye(1), -torch.ones(1, 1), torch.eye(1), torch.ones(1))
    assert gradient_certificate(x)["degenerate"].all()


def test_smoothing_of_linear_programs():
    c = torch.tensor([[0.3, -0.2, 0.1]], requires_grad=True)
    G, h = -torch.eye(3), torch.zeros(3)
    A, b = torch.ones(1, 3), torch.ones(1)
    vertex = LinearProgram()(c, G, h, A, b)
    torch.testing.assert_close(vertex.detach(), torch.tensor([[0.0, 1.0, 0.0]]))
    assert torch.autograd.grad(vertex.sum(), c)[0].abs().max() < 1e-10
    soft = LinearProgram(smoothing=0.5)
    x = soft(c, G, h, A, b)  # sparsemax of -c / 0.5
    assert (x > 0).sum() == 2
    assert gradcheck(lambda c: soft(c, G, h, A, b), c, atol=1e-7)
    with pytest.raises(ValueError, match="smoothing"):
        LinearProgram(smoothing=-1.0)


@pytest.mark.parametrize("kind", ["quadratic", "robust"])
def test_units_do_not_matter(kind):
    """Rows, columns and the objective in units of 1e-3 to 1e3: the same solution and gradients."""
    g = torch.Generator().manual_seed(5)
    if kind == "quadratic":
        P, q, G, h, A, b = quadratic(6, 5, 8, 2)
        K, E = Cones(8), 10 ** (6 * torch.rand(6, 8, generator=g) - 3)
    else:
        (q, G, h, K), P, A, b = robust(6), None, torch.zeros(6, 0, 4), torch.zeros(6, 0)
        each = 10 ** (6 * torch.rand(6, 8 + 3, generator=g) - 3)
        E = each[:, [*range(8), *(8 + i // 5 for i in range(15))]]
    D = 10 ** (6 * torch.rand(6, q.shape[1], generator=g) - 3)
    F = 10 ** (6 * torch.rand(6, b.shape[1], generator=g) - 3)
    data = [None if t is None else t.requires_grad_() for t in (P, q, G, h, A, b)]
    P, q, G, h, A, b = data
    layer = ConeProgram(K)
    plain = layer(*data)
    units = [
        None if P is None else 1e4 * D[:, :, None] * P * D[:, None],
        1e4 * D * q, E[:, :, None] * G * D[:, None], E * h, F[:, :, None] * A * D[:, None], F * b,
    ]  # fmt: skip
    found = layer.solve(*units)
    assert found.stats["error"].max() < 1e-9
    torch.testing.assert_close(found.value * D, plain, rtol=1e-6, atol=1e-7)
    leaves = [t for t in data if t is not None and t.numel()]
    weight = torch.randn(plain.shape, generator=g)
    expected = torch.autograd.grad((plain * weight).sum(), leaves)
    got = torch.autograd.grad((found.value * D * weight).sum(), leaves)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    again = layer.solve(*units, start=found)
    assert again.steps.max() <= 1


@SCRIPT
def test_transforms():
    """vmap over any of the data, gradients inside of it, forward mode, second derivatives."""
    c, G, h, K = robust(3)
    layer = ConeProgram(K, order=2)
    vmap, grad, jvp, jacrev, jacfwd = (
        getattr(torch.func, f) for f in ("vmap", "grad", "jvp", "jacrev", "jacfwd")
    )

    def loss(c, G, h):
        return layer(None, c, G, h).pow(3).sum()

    plain = layer(None, c, G, h)
    torch.testing.assert_close(vmap(layer, (None, 0, 0, 0))(None, c, G, h), plain)
    shared = vmap(layer, (None, 0, None, None))(None, c, G[0], h[0])  # what is shared stays so
    torch.testing.assert_close(shared, layer(None, c, G[0], h[0]))
    stacked = torch.stack([c, 2 * c], 1)  # a batch inside, vmap's dimension elsewhere
    both = vmap(lambda c: layer(None, c, G, h), 1, out_dims=1)(stacked)
    torch.testing.assert_close(both, torch.stack([plain, plain], 1))

    for i, at in enumerate((c, G, h)):
        at.requires_grad_()
        (expected,) = torch.autograd.grad(loss(c, G, h), at, create_graph=True)
        each = vmap(grad(loss, i))(c, G, h)
        torch.testing.assert_close(each, expected.detach())
        t = torch.randn_like(at)
        ts = [torch.zeros_like(x) if x is not at else t for x in (c, G, h)]
        _, slope = jvp(loss, (c, G, h), tuple(ts))
        torch.testing.assert_close(slope, (expected * t).sum().detach())
        second = jacrev(grad(loss, i), i)(c[0], G[0], h[0])
        (row,) = torch.autograd.grad(expected[0].sum(), at)
        torch.testing.assert_close(second.flatten(0, at.dim() - 2).sum(0), row[0])
        at.requires_grad_(False)
    J = jacfwd(lambda c: layer(None, c, G[0], h[0]))(c[0])
    torch.testing.assert_close(J, jacrev(lambda c: layer(None, c, G[0], h[0]))(c[0]))


def test_what_is_barely_infeasible_is_proved_to_be():
    """x in the unit disc with x_1 >= t: feasible to t = 1, and proved not to be right after."""
    G = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [-1.0, 0.0], [0.0, -1.0]])
    t = torch.tensor([0.999, 1.0001, 1.001, 1.1])
    h = torch.stack([-t, torch.ones(4), torch.zeros(4), torch.zeros(4)], 1)
    found = ConeProgram(Cones(1, (3,)), on_failure="nan").solve(None, torch.ones(2), G, h)
    assert found.statuses == [Status.CONVERGED] + 3 * [Status.INFEASIBLE]
    z = -found.stats["certificate"][1:, 2:]
    down = -(z * h[1:]).sum(1)
    assert ((z @ G).abs().amax(1) < 1e-9 * down).all()
    assert Cones(1, (3,)).depth(z).min() >= 0


def test_what_failed_does_not_touch_gradients_of_shared_data():
    c, G, h, K = robust(3)
    G, h = G[0].requires_grad_(), h.clone()
    h[1, 0] = -6.0  # no feasible point
    found = ConeProgram(K, on_failure="nan").solve(None, c, G, h)
    alone = ConeProgram(K).solve(None, c[::2], G, h[::2])
    for key in ("dual", "slack", "objective"):
        assert found.stats[key][1].isnan().all()
        (g,) = torch.autograd.grad(found.stats[key][::2].pow(2).sum(), G, retain_graph=True)
        (e,) = torch.autograd.grad(alone.stats[key].pow(2).sum(), G, retain_graph=True)
        torch.testing.assert_close(g, e)


@SCRIPT
def test_forward_over_reverse_is_refused_with_the_reason():
    P, q, G, h, _, _ = quadratic(1, 3, 4)
    layer = QuadraticProgram(order=2)
    with pytest.raises(RuntimeError, match="Forward mode over a derivative"):
        torch.func.hessian(lambda v: layer(P[0], v, G[0], h[0]).pow(2).sum())(q[0])


def test_gradients_that_are_not_found_are_told_of():
    """A constraint that is there twice: x has a derivative, how the multiplier is shared has none."""
    G = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    h = torch.tensor([1.0, 1.0, 2.0], requires_grad=True)
    found = LinearProgram().solve(torch.tensor([-1.0, -1.0]), G, h)
    torch.testing.assert_close(found.value.detach(), torch.tensor([1.0, 2.0]))
    assert gradient_certificate(found)["degenerate"]
    with pytest.raises(ConvergenceError, match=r"index 0\) was not found"):
        torch.autograd.grad(found.stats["dual"][0], h)
    quiet = LinearProgram(on_failure="nan").solve(torch.tensor([-1.0, -1.0]), G, h)
    assert torch.autograd.grad(quiet.stats["dual"][0], h)[0].isnan().any()
    flat = torch.zeros(2, requires_grad=True)  # every point is optimal
    with pytest.raises(ConvergenceError, match="was not found"):
        LinearProgram()(
            flat, torch.cat([torch.eye(2), -torch.eye(2)]), torch.ones(4)
        ).sum().backward()


def test_uniform_units_do_not_matter():
    """Objective, rows and lengths in units of 1e-8 to 1e8: the same answer, status and gradients."""
    P, q, G, h, A, b = quadratic(4, 4, 7, 1)
    weight = torch.randn(4, 4)
    runs = {}
    for key in ((1, 1, 1), (1e-8, 1, 1), (1e6, 1, 1), (1, 1e-6, 1), (1, 1e8, 1), (1, 1, 1e-5),
                (1, 1, 1e5)):  # fmt: skip
        cost, rows, length = key
        data = [cost * P, cost * length * q, rows * G, rows * length * h, A, length * b]
        data = [t.clone().requires_grad_() for t in data]
        found = QuadraticProgram().solve(*data)
        grads = torch.autograd.grad((found.value * weight).sum() / length, data)
        units = (cost, cost * length, rows, rows * length, 1, length)
        runs[key] = [found.value / length, *(g * u for g, u in zip(grads, units, strict=True))]
        assert not gradient_certificate(found)["degenerate"].any()
        torch.testing.assert_close(runs[key], runs[1, 1, 1], rtol=1e-7, atol=1e-8)


def test_certificates_do_not_depend_on_units():
    unbounded = LinearProgram(on_failure="nan")
    assert unbounded.solve(torch.tensor([1e-9]), torch.ones(1, 1), torch.ones(1)).status is (
        Status.UNBOUNDED
    )
    G, h = 1e-10 * torch.tensor([[1.0], [-1.0]]), 1e-10 * torch.tensor([-2.0, 1.0])
    for layer, args in ((QuadraticProgram, (torch.eye(1), torch.zeros(1))),
                        (LinearProgram, (torch.ones(1),))):  # fmt: skip
        assert layer(on_failure="nan").solve(*args, G, h).status is Status.INFEASIBLE


def test_a_program_that_is_not_convex_is_refused():
    box, one = torch.cat([torch.eye(2), -torch.eye(2)]), torch.ones(4)
    with pytest.raises(ValueError, match="all instances share with a negative eigenvalue"):
        QuadraticProgram()(-torch.eye(2), torch.zeros(2), box, one)
    P = torch.stack([torch.eye(2), torch.diag(torch.tensor([1.0, -1e-3]))])
    with pytest.raises(ValueError, match=r"instances \[1\]"):
        QuadraticProgram()(P, torch.zeros(2), box, one)
    with pytest.raises(ValueError, match="negative eigenvalue"):
        torch.func.vmap(lambda P: QuadraticProgram()(P, torch.zeros(2), box, one))(P)
    L = torch.randn(50, 6, 2, dtype=torch.float32)  # singular, as float32 rounds it
    x = QuadraticProgram()(
        L @ L.mT,
        torch.zeros(6, dtype=torch.float32),
        torch.eye(6, dtype=torch.float32),
        torch.ones(6, dtype=torch.float32),
    )
    assert x.isfinite().all()


def test_transforms_and_failure():
    P, q, G, h, _, _ = quadratic(3, 3, 4)
    G[1], h[1] = 0.0, -1.0  # no feasible point
    with pytest.raises(InfeasibleError, match="index 1"):
        torch.func.vmap(QuadraticProgram())(P, q, G, h)
    layer = QuadraticProgram(on_failure="nan")
    x = torch.func.vmap(layer)(P, q, G, h)
    assert x[1].isnan().all() and x[[0, 2]].isfinite().all()
    g = torch.func.vmap(torch.func.grad(lambda q, P, G, h: layer(P, q, G, h).sum()))(q, P, G, h)
    assert g[1].isnan().all() and g[[0, 2]].isfinite().all()
    with pytest.raises(ValueError, match="start"):
        start = layer.solve(P, q, G, h)
        torch.func.vmap(lambda q: layer.solve(P, q, G, h, start=start).value)(q[None])


def test_projections_of_large_entries():
    v = torch.tensor([1e8, 1e8 + 8, 3.0], dtype=torch.float32)
    expected = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float32)
    torch.testing.assert_close(Projection("simplex")(v), expected)
    torch.testing.assert_close(Projection("ball", norm=1)(v), expected)
    far = Projection("ball")(torch.tensor([3e30, 4e30], dtype=torch.float32))
    torch.testing.assert_close(far, torch.tensor([0.6, 0.8], dtype=torch.float32))
    with pytest.raises(ValueError, match="lo"):
        Projection("box", lo=1.0)


# ---- what does not fit -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"q": torch.ones(2, 4)}, ValueError, "n=4"),
        ({"q": [1.0]}, TypeError, "q: got list"),
        ({"q": torch.ones(2, 3, dtype=torch.long)}, TypeError, "floating"),
        ({"G": None}, ValueError, "expected both or none"),
        ({"h": torch.ones(2, 5)}, ValueError, "as many rows"),
        ({"h": torch.ones(3, 4)}, ValueError, "one size"),
        ({"P": torch.eye(3, dtype=torch.float32)}, ValueError, "float32"),
        ({"P": torch.ones(2, 4, 3)}, ValueError, "P: got shape"),
        ({"G": torch.ones(4)}, ValueError, "G: got shape"),
    ],
)
def test_data_that_do_not_fit(change, error, match):
    P, q, G, h, _, _ = quadratic(2, 3, 4)
    data = {"P": P, "q": q, "G": G, "h": h} | change
    with pytest.raises(error, match=match):
        QuadraticProgram()(**data)


def test_options_are_checked():
    with pytest.raises(ValueError, match="tol"):
        ConeSolver(tol=0.0)
    with pytest.raises(ValueError, match="max_steps"):
        ConeSolver(max_steps=0)
    with pytest.raises(ValueError, match="order"):
        QuadraticProgram(order=0)
    with pytest.raises(ValueError, match="Did you mean 'return'"):
        QuadraticProgram(on_failure="retrun")(*quadratic(1, 2, 2)[:4])
    with pytest.raises(ValueError, match="expected 3"):
        ConeProgram(Cones(0, (3,)))(None, torch.ones(1, 2), torch.ones(2, 2), torch.ones(2))


def test_an_empty_batch_and_no_constraints():
    P, q, G, h, _, _ = quadratic(2, 3, 4)
    assert QuadraticProgram()(P[:0], q[:0], G[:0], h[:0]).shape == (0, 3)
    torch.testing.assert_close(
        QuadraticProgram()(P, q), -torch.linalg.solve(P, q[..., None])[..., 0]
    )


# ---- projections -----------------------------------------------------------------------------------


def by_program(v, G, h, A=None, b=None):
    return projections.polytope(v, G=G, h=h, A=A, b=b)


EYE = torch.eye(6)
ROW = torch.ones(1, 6)
BOX = torch.cat([-EYE, EYE])


@pytest.mark.parametrize("total, cap", [(1.0, 1.0), (2.5, 1.0), (3.0, 0.5), (2.0, 0.7), (6.0, 1.0)])
def test_capped_simplex(total, cap):
    v = 2 * torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
    h = torch.cat([torch.zeros(6), torch.full((6,), cap)])
    found = projections.capped_simplex(v, total=total, cap=cap)
    torch.testing.assert_close(
        found, by_program(v, BOX, h, ROW, torch.tensor([total])), rtol=0, atol=1e-10
    )
    torch.testing.assert_close(found.sum(-1), torch.full((100,), total))
    ties = projections.capped_simplex(torch.tensor([1.0, 1, 1, 0]), total=2.0)
    torch.testing.assert_close(ties, torch.tensor([2.0, 2, 2, 0]) / 3)


def test_simplex_box_and_balls():
    v = 2 * torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    exact = by_program(v, -EYE, torch.zeros(6), ROW, torch.tensor([2.0]))
    torch.testing.assert_close(Projection("simplex", total=2.0)(v), exact, rtol=0, atol=1e-10)
    low, high = -0.5 * torch.ones(6), torch.linspace(0, 1, 6)
    exact = by_program(v, BOX, torch.cat([-low, high]))
    torch.testing.assert_close(Projection("box", low=low, high=high)(v), exact, rtol=0, atol=1e-10)
    for norm in (1, 2, "inf"):
        x = Projection("ball", radius=0.8, center=0.1, norm=norm)(v)
        order = torch.inf if norm == "inf" else norm
        assert torch.linalg.vector_norm(x - 0.1, order, dim=-1).max() <= 0.8 + 1e-12
        # The nearest point: <v - x, p - x> <= 0 for all p in the set.
        p = Projection("ball", radius=0.8, center=0.1, norm=norm)(torch.randn(50, 6))
        assert ((v - x)[:, None] * (p[None] - x[:, None])).sum(-1).max() < 1e-10
    t = Projection("second-order-cone")(v)
    torch.testing.assert_close(t, Cones(0, (6,)).project(v))


@pytest.mark.parametrize(
    "project",
    [
        Projection("simplex"),
        Projection("capped-simplex", total=2.0, cap=0.7),
        Projection("ball", radius=0.7, norm=1),
        Projection("ball", radius=0.7),
        Projection("second-order-cone"),
        Projection("polytope", G=BOX, h=torch.ones(12), A=ROW, b=torch.tensor([2.0])),
    ],
    ids=repr,
)
def test_gradients_of_projections(project):
    v = 2 * torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
    assert gradcheck(project, v.requires_grad_(), atol=1e-6)


def test_projections_refuse():
    v = torch.ones(3)
    for call in (
        lambda: Projection("simplexx"),
        lambda: projections.simplex(v, total=-1.0),
        lambda: projections.capped_simplex(v, total=4.0),
        lambda: projections.ball(v, norm=3),
        lambda: projections.ball(v, radius=0.0),
        lambda: projections.box(v, low=1.0, high=0.0),
    ):
        with pytest.raises(ValueError, match="expected|Did you mean"):
            call()
