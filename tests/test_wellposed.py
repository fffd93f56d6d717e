"""Sets: projections by their optimality conditions. Certificates: attacked from random starts."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

from implicitdl import ImplicitLayer
from implicitdl.activations import (
    ELU,
    GELU,
    Blocks,
    HardTanh,
    Identity,
    LeakyReLU,
    ReLU,
    Sigmoid,
    SiLU,
    Softmax,
    Softplus,
    Tanh,
)
from implicitdl.solution import NotWellPosedError
from implicitdl.solvers import Auto
from implicitdl.wellposed import (
    Certificate,
    InfNormBall,
    MatrixMeasure,
    Monotone,
    PerronFrobenius,
    StrictlyUpper,
    WellPosedSet,
    certificate,
    get_well_posed,
    rescale,
)
from implicitdl.wellposed._conditions import Component
from implicitdl.wellposed._counterexample import _verified

V = torch.tensor([0.3, 1.0, 2.0, 0.7, 1.4])
SETS = [
    InfNormBall(kappa=0.9),
    PerronFrobenius(kappa=0.9),
    PerronFrobenius(kappa=0.9, weights=V),
    MatrixMeasure(gamma=0.9),
    MatrixMeasure(gamma=-0.5, weights=V),
    Monotone(m=0.2),
    StrictlyUpper(),
    StrictlyUpper(sizes=(2, 1, 2)),
]
CONVEX = [s for s in SETS if not (isinstance(s, PerronFrobenius) and s.weights is None)]


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def name(s):
    return str(s)


# ------------------------------------------------------------------ sets


@pytest.mark.parametrize("s", SETS, ids=name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_maps_end_in_the_set_and_fix_its_members(s, dtype):
    tol = 1e-12 if dtype == torch.float64 else 1e-5
    for seed in range(5):
        W = (rand(5, 5, seed=seed) * 2).to(dtype)
        for A in (s(W), s.project(W)):
            assert A.dtype == dtype
            assert float(s.margin(A)) >= -tol
            again = A if tol < float(s.margin(A)) else A * (1 - 1e-4)
            if s.contains(again, 0.0):
                assert torch.equal(s(again), again)
                torch.testing.assert_close(s.project(again), again, rtol=tol, atol=tol)
        near, far = (s.project(W) - W).norm(), (s(W) - W).norm()
        assert float(near) <= float(far) + tol


@pytest.mark.parametrize("s", CONVEX, ids=name)
def test_projection_satisfies_the_variational_inequality(s):
    W = rand(5, 5) * 2
    P = s.project(W)
    for seed in range(40):
        Q = s(rand(5, 5, seed=seed + 100) * 10.0 ** (seed % 4 - 2))
        assert float(((W - P) * (Q - P)).sum()) <= 1e-11


def test_inf_norm_projection_meets_the_support_function():
    W = rand(6, 8) * 2
    P = InfNormBall(kappa=0.9).project(W)
    support = 0.9 * (W - P).abs().amax(-1)
    torch.testing.assert_close(((W - P) * P).sum(-1), support)


def test_perron_frobenius_projection_is_stationary_and_beats_scaling():
    ball = PerronFrobenius(kappa=0.9)
    for seed in range(4):
        W = rand(6, 6, seed=seed)
        P = ball.project(W)
        assert float(ball.margin(P)) == pytest.approx(0, abs=1e-9)
        assert float((W - P).norm()) < float((W - ball(W)).norm())
        # No rescaled projection nearby is closer.
        for k in range(30):
            Q = ball(P + 1e-2 * rand(6, 6, seed=k))
            assert float((W - P).norm()) <= float((W - Q).norm()) + 1e-6


@pytest.mark.parametrize("s", SETS, ids=name)
def test_gradient_goes_through_the_active_constraint(s):
    W = (rand(5, 5) * 2).requires_grad_()
    assert float(s.margin(W).detach()) < 0
    assert torch.autograd.gradcheck(s, W)
    assert torch.autograd.gradgradcheck(s, W)
    inside = (0.05 * rand(5, 5)).requires_grad_()
    if s.contains(inside, 0.0):
        assert torch.equal(
            torch.autograd.functional.jacobian(s, inside).reshape(25, 25), torch.eye(25)
        )
    grad = torch.func.vmap(torch.func.grad(lambda w: s(w).square().sum()))(rand(3, 5, 5) * 2)
    assert grad.shape == (3, 5, 5) and bool(grad.isfinite().all())


def test_monotone_gradient_at_repeated_eigenvalues():
    W = (2.0 * torch.eye(4)).requires_grad_()
    (g,) = torch.autograd.grad(Monotone(m=0.1)(W).diagonal().sum(), W)
    assert bool(g.isfinite().all())
    torch.testing.assert_close(g, torch.zeros(4, 4))
    mixed = torch.diag(torch.tensor([3.0, 3.0, -1.0, -1.0])).requires_grad_()
    assert torch.autograd.gradcheck(Monotone(m=0.1), mixed)


@pytest.mark.parametrize("s", SETS, ids=name)
def test_parametrization_batches_copies(s):
    layer = torch.nn.Linear(5, 5, bias=False)
    with torch.no_grad():
        layer.weight.mul_(20)
    parametrize.register_parametrization(layer, "weight", copy.deepcopy(s))
    assert s.contains(layer.weight, 1e-9)
    layer.weight = 50 * rand(5, 5)
    assert s.contains(layer.weight, 1e-9)
    W = rand(3, 5, 5)
    torch.testing.assert_close(s(W), torch.stack([s(w) for w in W]))
    torch.testing.assert_close(s.project(W), torch.stack([s.project(w) for w in W]))
    assert s.margin(W).shape == (3,)
    again = pickle.loads(pickle.dumps(s))
    assert torch.equal(again(W), s(W)) and str(again) == str(s)


@pytest.mark.parametrize("s", [s for s in SETS if getattr(s, "weights", None) is None
                               and getattr(s, "sizes", None) is None], ids=name)  # fmt: skip
def test_empty_and_require(s):
    empty = torch.zeros(0, 0)
    assert s(empty).shape == (0, 0) == s.project(empty).shape
    bad = 9 * torch.eye(3) + rand(3, 3).abs()
    with pytest.raises(NotWellPosedError, match="margin") as error:
        s.require(bad)
    assert error.value.margin == pytest.approx(float(s.margin(bad)))
    assert s.require(s.project(bad)) is not None


def test_speed_of_large_projections_is_vectorised():
    W = rand(512, 512).float()
    for s in (
        InfNormBall(),
        MatrixMeasure(),
        StrictlyUpper(),
        PerronFrobenius(weights=torch.ones(512)),
    ):
        assert s.contains(s.project(W), 1e-5)


def test_facts_and_refusals():
    assert InfNormBall(kappa=0.9).facts(ReLU())["contraction"] == 0.9
    assert InfNormBall(kappa=2.0).facts(Sigmoid())["contraction"] == 0.5
    assert Monotone(m=0.2).facts(Tanh())["strongly_monotone"] == 0.2
    assert StrictlyUpper().facts(SiLU())["acyclic"] is True
    for s, phi, way_out in [
        (InfNormBall(kappa=0.95), SiLU(), "kappa < 0.909"),
        (InfNormBall(kappa=1.0), ReLU(), "kappa < 1"),
        (PerronFrobenius(kappa=1.5), Tanh(), "kappa < 1"),
        (PerronFrobenius(), Softmax(), "Monotone"),
        (MatrixMeasure(), SiLU(), "InfNormBall"),
        (MatrixMeasure(gamma=1.0), ReLU(), "gamma < 1"),
        (Monotone(), GELU(), "monotone activation"),
        (StrictlyUpper(), Softmax(), "sizes"),
    ]:
        with pytest.raises(ValueError, match=way_out):
            s.check(phi)
    blocks = Blocks(parts=((ReLU(), 1), (Softmax(), 2), (Tanh(), 2)))
    StrictlyUpper(sizes=(1, 2, 2)).check(blocks)
    with pytest.raises(ValueError):
        StrictlyUpper(sizes=(2, 1, 2)).check(blocks)
    for make in (
        lambda: InfNormBall(kappa=0.0),
        lambda: InfNormBall(kappa=math.nan),
        lambda: Monotone(m=-1.0),
        lambda: PerronFrobenius(weights=torch.tensor([1.0, 0.0])),
        lambda: StrictlyUpper(sizes=(0,)),
    ):
        with pytest.raises(ValueError):
            make()
    with pytest.raises(ValueError, match="states"):
        PerronFrobenius(weights=V)(rand(3, 3))
    with pytest.raises(ValueError, match="block sizes"):
        StrictlyUpper(sizes=(2, 2))(rand(3, 3))


def test_get_well_posed():
    assert get_well_posed("inf-norm", kappa=0.5).kappa == 0.5
    s = Monotone()
    assert get_well_posed(s) is s
    names = ("inf-norm", "perron-frobenius", "matrix-measure", "monotone", "strictly-upper")
    assert all(isinstance(get_well_posed(n), WellPosedSet) for n in names)
    with pytest.raises(ValueError, match="inf-norm"):
        get_well_posed("infnorm")
    with pytest.raises(ValueError, match="kappa"):
        get_well_posed("inf-norm", kapa=0.5)
    with pytest.raises(TypeError):
        get_well_posed(s, m=1.0)
    with pytest.raises(TypeError):
        get_well_posed(3)


# ------------------------------------------------------------------ rescaling


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rescale_keeps_the_model(dtype):
    for A in (rand(8, 8).triu(1) * 30, rand(8, 8) * 0.08, torch.zeros(3, 3)):
        A = A.to(dtype)
        B, s = rescale(A, 0.95)
        assert float(B.double().abs().sum(-1).max()) <= 0.95
        tol = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(B, s[:, None] * A / s, rtol=tol, atol=tol)
    assert rescale(torch.zeros(0, 0))[0].shape == (0, 0)
    with pytest.raises(NotWellPosedError) as error:
        rescale(torch.eye(3) * 2, 0.9)
    assert error.value.margin == pytest.approx(-1.1)
    with pytest.raises(ValueError, match="kappa"):
        rescale(A, 1.5)


# ------------------------------------------------------------------ certificates


def newton(A, phi, b, starts, steps=200):
    """Solutions of x = phi(A x + b) from many starts: damped Newton on z, then a few checks."""
    eye = torch.eye(len(A))
    found = []
    for z in starts:
        r = z - A @ phi(z) - b
        for _ in range(steps):
            J = phi.product(phi.derivative(z), eye)
            step = torch.linalg.solve(eye - A @ J, r)
            t = 1.0
            while t > 1e-4 and (z - t * step - A @ phi(z - t * step) - b).norm() >= r.norm():
                t /= 2
            z = z - t * step
            r = z - A @ phi(z) - b
            if r.norm() < 1e-12 * (1 + z.norm()):
                found.append(phi(z))
                break
    return found


def attack(A, phi, c: Certificate, seed=0):
    """Everything a well-posed certificate claims, tried at random."""
    n = len(A)
    A = A.double()
    for k in range(3):
        b = rand(n, seed=seed + k) * 3
        found = newton(A, phi, b, [rand(n, seed=97 * j) * 10.0 ** (j % 4 - 1) for j in range(6)])
        assert found, "no equilibrium found"
        for x in found:
            torch.testing.assert_close(x, found[0], rtol=1e-6, atol=1e-6)
        if c.constant is None:
            continue
        x = found[0] + rand(64, n, seed=k) * (10.0 ** (uniform(64, 1, seed=k) * 6 - 4))
        x = torch.cat([x, phi(x)])
        residual = phi(x @ A.T + b) - x
        error = c.measure(x - found[0])
        assert bool((error <= c.error_bound(residual) * (1 + 1e-9) + 1e-9).all())
        if c.contraction is not None:
            y = rand(len(x), n, seed=k + 9)
            gap = c.measure(phi(x @ A.T + b) - phi(y @ A.T + b))
            assert bool((gap <= c.contraction * c.measure(x - y) * (1 + 1e-9) + 1e-12).all())


def confirm(A, phi, c: Certificate):
    """Both equilibria that an ill-posed certificate shows."""
    b, x1, x2 = c.equilibria
    for x in (x1, x2):
        assert float((phi(A.double() @ x + b) - x).abs().max()) < 1e-10
    assert float((x1 - x2).abs().max()) > 1e-4


def check(A, phi, **options):
    c = certificate(A, phi, **options)
    if c.status == "well-posed":
        attack(A, phi, c)
    elif c.status == "ill-posed":
        confirm(A, phi, c)
    return c


def rotation(angle, scale=1.0):
    s, c = math.sin(angle), math.cos(angle)
    return scale * torch.tensor([[c, -s], [s, c]])


CYCLE = torch.roll(torch.eye(6), 1, 1)
SKEW = rand(12, 12) - rand(12, 12).T
KNOWN = {
    "0.9 rotation": (rotation(0.8, 0.9), ReLU(), "well-posed", "block norm matrix"),
    "1.2 rotation": (rotation(0.8, 1.2), Tanh(), "well-posed", "strong monotonicity"),
    "cycle": (0.9 * CYCLE, ReLU(), "well-posed", "infinity norm"),
    "uneven cycle": (
        CYCLE * torch.tensor([1e6, 1e-3, 1e-1, 1, 1e-3, 0.5]), ReLU(),
        "well-posed", "Perron-Frobenius",
    ),
    "cycle of one": (CYCLE, ReLU(), "ill-posed", ""),
    "cycle above one": (1.1 * CYCLE, ReLU(), "ill-posed", ""),
    "long cycle": (1.1 * torch.roll(torch.eye(20), 1, 1), LeakyReLU(), "ill-posed", ""),
    "nilpotent": (rand(6, 6).triu(1) * 1e2, ReLU(), "well-posed", "strictly block-triangular"),
    "SiLU 0.99": (torch.tensor([[0.99]]), SiLU(), "ill-posed", ""),
    "SiLU 0.9": (torch.tensor([[0.9]]), SiLU(), "well-posed", "infinity norm"),
    "SiLU -5": (torch.tensor([[-5.0]]), SiLU(), "well-posed", "matrix measure"),
    "SiLU -11": (torch.tensor([[-11.0]]), SiLU(), "ill-posed", ""),
    "GELU 0.95": (torch.tensor([[0.95]]), GELU(), "ill-posed", ""),
    "ReLU 2": (torch.tensor([[2.0]]), ReLU(), "ill-posed", ""),
    "ReLU 1": (torch.tensor([[1.0]]), ReLU(), "ill-posed", ""),
    "ReLU -5": (torch.tensor([[-5.0]]), ReLU(), "well-posed", "matrix measure"),
    "identity": (torch.eye(4), Identity(), "ill-posed", ""),
    "leaky 200": (torch.tensor([[200.0]]), LeakyReLU(), "well-posed", "P-matrix"),
    "tanh 2": (torch.tensor([[2.0]]), Tanh(), "ill-posed", ""),
    "sigmoid 3.9": (torch.tensor([[3.9]]), Sigmoid(), "well-posed", "infinity norm"),
    "sigmoid 5": (torch.tensor([[5.0]]), Sigmoid(), "ill-posed", ""),
    "softplus 1.01": (torch.tensor([[1.01]]), Softplus(), "ill-posed", ""),
    "hard tanh 1.5": (torch.tensor([[1.5]]), HardTanh(), "ill-posed", ""),
    "monotone": (
        0.8 * torch.eye(12) - 0.2 * rand(12, 12) @ rand(12, 12).T + 3 * SKEW, ReLU(),
        "well-posed", "strong monotonicity",
    ),
    "softmax 1.9": (1.9 * torch.eye(5), Softmax(), "well-posed", "infinity norm"),
    "softmax 1.9 reflected": (
        1.9 * (torch.eye(5) - 0.4 * torch.ones(5, 5)), Softmax(), "well-posed", "block norm matrix",
    ),
    "softmax 8": (8 * torch.eye(5), Softmax(), "ill-posed", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", KNOWN)
def test_known_cases(case):
    A, phi, status, condition = KNOWN[case]
    c = check(A, phi)
    assert (c.status, c.condition) == (status, condition), str(c)
    assert c.well_posed == (status == "well-posed")
    assert (c.margin > 0) == c.well_posed
    assert 1 <= len(str(c).splitlines()) <= 3


def test_three_equilibria_of_silu_at_the_published_input():
    phi = SiLU()
    A, b = torch.tensor([[0.99]]), torch.tensor([0.075])
    found = newton(A, phi, b, [torch.tensor([t]) for t in torch.linspace(-5, 30, 60)])
    distinct = {round(float(x), 4) for x in found}
    assert len(distinct) == 3
    assert certificate(A, phi).status == "ill-posed"


def test_a_block_triangular_mixture_combines_its_conditions():
    A = torch.zeros(9, 9)
    A[0, 0] = -5.0
    A[1:3, 1:3] = rotation(0.8, 0.9)
    A[3:6, 3:6] = 0.2 * rand(3, 3)
    A[6:8, 6:8] = rotation(0.8, 1.2)
    A[0, 1:], A[1:3, 3:], A[3:6, 6:], A[6:8, 8] = 7.0, 3.0, -2.0, 5.0
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    for A_ in (A, A[order][:, order]):
        c = check(A_, ReLU())
        assert c.well_posed and c.condition.startswith("block-triangular: ")
        assert "matrix measure" in c.condition and "strong monotonicity" in c.condition
        assert c.contraction is None and c.constant is not None
        assert sorted(len(p.states) for p in c.components) == [1, 2, 2, 3]
    A[1:3, 1:3] = 1.7 * torch.eye(2) + 0.1
    c = check(A, ReLU())
    assert c.status == "ill-posed"
    assert [p.states for p in c.components if p.status == "ill-posed"] == [(1, 2)]


PHIS = [ReLU(), LeakyReLU(negative_slope=0.1), LeakyReLU(negative_slope=-0.5), Tanh(), Sigmoid(),
        SiLU(), GELU(), Softplus(), HardTanh()]  # fmt: skip


@pytest.mark.parametrize("phi", PHIS, ids=name)
@pytest.mark.parametrize("seed", range(6))
def test_random_attack(phi, seed):
    n = (1, 2, 3, 4, 6, 9)[seed]
    for k, scale in enumerate((0.7, 1.4, 3.0)):
        A = rand(n, n, seed=10 * seed + k) * scale / math.sqrt(n)
        if k == 1:
            A = A * (uniform(n, n, seed=seed) < 0.5)
        check(A, phi, seed=seed)


def test_relu_is_decided_for_small_matrices():
    open_cases = 0
    for seed in range(40):
        A = rand(4, 4, seed=seed) * 1.2
        c = check(A, ReLU()) if seed < 15 else certificate(A, ReLU())
        open_cases += c.status == "unknown"
        minors = [
            torch.det((torch.eye(4) - A)[list(i)][:, list(i)])
            for i in ([j for j in range(4) if m >> j & 1] for m in range(1, 16))
        ]
        assert c.well_posed == bool((torch.stack(minors) > 0).all())
    assert open_cases == 0


def test_blocks_with_softmax():
    phi = Blocks(parts=((ReLU(), 3), (Softmax(), 4), (Tanh(), 2)))
    assert check(0.15 * rand(9, 9), phi).well_posed
    feedforward = rand(9, 9) * (
        torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2])[:, None]
        < torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2])[None, :]
    )
    c = check(5 * feedforward, phi)
    assert c.condition == "strictly block-triangular" and c.constant is not None
    # Upper triangular within the softmax block is a loop: softmax couples its states.
    c = check(20 * rand(9, 9).triu(1), phi)
    assert c.condition != "strictly block-triangular"


def test_softmax_lipschitz_constants():
    z = rand(2000, 6) * 5
    p = torch.softmax(z, -1)
    J = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    assert float(torch.linalg.matrix_norm(J, 2).max()) <= 0.5 + 1e-12
    # Row i sums to p_i (1 - p_i) + p_i sum_{j != i} p_j = 2 p_i (1 - p_i) <= 1/2.
    torch.testing.assert_close(J.abs().sum(-1), 2 * p * (1 - p))


def test_block_sizes():
    A = torch.block_diag(rotation(0.8, 0.9), rotation(2.0, 0.9))
    A[:2, 2:], A[2:, :2] = 0.4 * rotation(1.0), 0.02 * rotation(0.3)
    c = check(A, ReLU(), sizes=(2, 2))
    assert c.well_posed and c.condition == "block norm matrix"
    assert c.contraction < 1
    with pytest.raises(ValueError, match="add up"):
        certificate(A, ReLU(), sizes=(2, 3))


def test_float32_and_margins_at_the_edge():
    A = (uniform(5, 5) * 0.19).float()
    c = check(A, ReLU())
    assert c.well_posed and c.weights.dtype == torch.float64
    bound = c.error_bound(torch.ones(3, 5, dtype=torch.float32))
    assert bound.shape == (3,) and bound.dtype == torch.float64
    edge = torch.tensor([[1 - 1e-16]])  # rounds to 1 - 1.1e-16
    assert not certificate(edge, Tanh()).well_posed
    assert certificate(torch.tensor([[1 - 1e-12]]), Tanh()).well_posed


@pytest.mark.parametrize("n", [128, 512])
def test_larger_matrices(n):
    W = rand(n, n) / math.sqrt(n)
    assert certificate(W / W.abs().sum(-1, keepdim=True) * 0.9, ReLU()).condition == "infinity norm"
    assert certificate(0.45 * W, ReLU()).condition == "block norm matrix"
    assert certificate(4 * (W - W.T), Tanh()).condition == "strong monotonicity"
    c = certificate(2 * W, ReLU())
    assert c.status == "ill-posed"
    confirm(2 * W, ReLU(), c)


def test_nilpotent_with_huge_entries():
    for n, size in ((8, 1e6), (40, 1e8)):
        A = rand(n, n).triu(1) * size
        order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
        c = certificate(A[order][:, order], SiLU())
        assert c.condition == "strictly block-triangular" and c.well_posed
        assert (c.constant is None) == (n == 40)  # the weights overflow: no bound, not a wrong one


def test_error_bound_with_huge_weights_in_float32():
    A = (rand(12, 12).triu(1) * 1e4).float()
    c = certificate(A, ReLU())
    assert float(c.weights.max()) > 1e40
    bound = c.error_bound(torch.full((12,), 1e-3, dtype=torch.float32))
    assert float(bound) > 0


def test_empty_and_refused_arguments():
    c = certificate(torch.zeros(0, 0), ReLU())
    assert c.well_posed and c.error_bound(torch.zeros(3, 0)).shape == (3,)
    with pytest.raises(ValueError, match="square"):
        certificate(torch.zeros(2, 3), ReLU())
    with pytest.raises(ValueError, match="1 of 4"):
        certificate(torch.tensor([[0.0, math.nan], [0.0, 0.0]]), ReLU())
    with pytest.raises(TypeError, match="floating"):
        certificate(torch.zeros(2, 2, dtype=torch.int64), ReLU())
    with pytest.raises(TypeError, match="activation: got 3"):
        certificate(torch.zeros(2, 2), 3)
    with pytest.raises(ValueError, match="states"):
        certificate(torch.zeros(2, 2), Blocks.of(ReLU(), 3))


def test_require_bool_and_error_bound_refusals():
    good, bad = certificate(0.5 * torch.eye(2), ReLU()), certificate(2 * torch.eye(2), ReLU())
    assert good.require() is good
    with pytest.raises(NotWellPosedError) as error:
        bad.require()
    assert error.value.margin == bad.margin <= 0
    with pytest.raises(NotWellPosedError):
        bad.error_bound(torch.zeros(2))
    with pytest.raises(TypeError, match="well_posed"):
        bool(good)
    with pytest.raises(ValueError, match="2 states"):
        good.error_bound(torch.zeros(3))
    assert certificate(2 * torch.eye(2), ReLU(), refute=False).status == "unknown"


# ---------------------------------------------------------------- what a fresh reader broke


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, in forward mode
@pytest.mark.parametrize("W", [
    torch.triu(rand(4, 4), 1),  # nilpotent: root 0, strictly inside
    torch.tensor([[2.0, 1.0], [0.0, 2.0]]),  # two components with the largest root
    torch.triu(torch.ones(3, 3)) * 2,
    torch.zeros(3, 3),
    2 * torch.eye(3),  # the power method's vectors mix the components
    torch.block_diag(2 * uniform(3, 3), torch.zeros(2, 2)),
], ids=str)  # fmt: skip
def test_perron_frobenius_has_a_finite_gradient_everywhere(W):
    ball, W = PerronFrobenius(0.9), W.double().requires_grad_()
    weights = rand(*W.shape, seed=7).double()
    (got,) = torch.autograd.grad((weights * ball(W)).sum(), W)
    assert bool(got.isfinite().all())
    if float(ball.margin(W.detach())) > 0:
        assert torch.equal(got, weights)  # the identity's
    else:  # along W itself forward is constant
        assert abs(float((got * W.detach()).sum())) < 1e-9
    # With a second derivative in view the same one, and that is finite, too.
    (again,) = torch.autograd.grad((weights * ball(W)).sum(), W, create_graph=True)
    torch.testing.assert_close(again.detach(), got)
    W = W.detach()
    for derivative in (torch.func.grad, torch.func.jacfwd):
        torch.testing.assert_close(derivative(lambda W: (weights * ball(W)).sum())(W), got)
    assert bool(torch.func.hessian(lambda W: (weights * ball(W)).sum())(W).isfinite().all())


SETS_OUTSIDE = [InfNormBall(0.5), PerronFrobenius(0.5), MatrixMeasure(0.2), Monotone(0.7),
                PerronFrobenius(0.5, torch.tensor([1.0, 2.0, 0.5, 1.0])), StrictlyUpper()]  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # gradcheck's own
@pytest.mark.parametrize("s", SETS_OUTSIDE, ids=name)
def test_forward_mode_and_hessians_go_through_every_set(s):
    W, T, weights = (rand(4, 4, seed=k).double() + 0.1 for k in range(3))

    def loss(W):
        return (weights * s(W)).sin().sum()

    assert torch.autograd.gradcheck(s, W.requires_grad_(), check_forward_ad=True)
    W = W.detach()
    tangent = torch.func.jvp(loss, (W,), (T,))[1]
    assert torch.allclose(tangent, (torch.func.grad(loss)(W) * T).sum(), atol=1e-12)
    step = 1e-5
    ahead, behind = (torch.func.grad(loss)(W + k * step * T) for k in (1, -1))
    hessian = torch.func.hessian(loss)(W)
    got = (hessian * T).sum((-2, -1))
    assert torch.allclose(got, (ahead - behind) / (2 * step), atol=1e-5)


@pytest.mark.parametrize("A", [
    [[0.0, 1e200], [1e-201, 0.0]], [[0.5, 5e-324], [1e308, 0.5]], [[1.7e308, 1.7e308]] * 2, [[-1e300]],
], ids=str)  # fmt: skip
def test_entries_of_any_size_get_an_answer(A):
    report = certificate(torch.tensor(A, dtype=torch.float64), ReLU())
    assert report.status in ("well-posed", "unknown", "ill-posed")
    if A[0][0] == 0.0:
        assert report.well_posed


def test_error_constants_of_huge_entries_are_finite():
    A = -1e160 * torch.tensor([[1.0, -3.0], [3.0, 1.0]])
    report = certificate(A, ReLU())
    # (1 + ||I - A||) / m with m = 1e160 and ||A|| = 1e160 sqrt(10)
    assert report.condition == "strong monotonicity"
    assert report.constant == pytest.approx(math.sqrt(10))


def test_a_certificate_takes_the_names_that_layers_take():
    A = torch.tensor([[0.3, -0.2], [0.1, 0.4]])
    for phi in ("relu", torch.nn.ReLU(), ReLU()):
        assert certificate(A, phi).condition == "infinity norm"
    assert certificate(A, ReLU()) != certificate(A, ReLU())  # they are not compared by tensors


LAYER_SETS = [*SETS_OUTSIDE[:4], PerronFrobenius(0.5, torch.tensor([1.0, 2.0, 0.5, 1.0])),
              StrictlyUpper(sizes=(1, 2, 1))]  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # gradcheck's own
@pytest.mark.parametrize("s", LAYER_SETS, ids=name)
def test_forward_mode_by_the_weight_of_a_layer(s):
    tight = Auto(rtol=1e-13, atol=1e-15)
    layer = ImplicitLayer(2, 1, 4, activation="tanh", well_posed=s, solver=tight)
    W, T, u = rand(4, 4, seed=3) + 0.1, rand(4, 4, seed=4), rand(3, 2, seed=5)
    assert not s.contains(W)  # the constraint is active

    def loss(W):
        return torch.func.functional_call(layer, {"W": W}, (u,)).square().sum()

    assert torch.autograd.gradcheck(loss, W.clone().requires_grad_(), check_forward_ad=True)
    gradient = torch.func.grad(loss)
    torch.testing.assert_close(torch.func.jacfwd(loss)(W), gradient(W), rtol=1e-8, atol=1e-10)
    got = (torch.func.hessian(loss)(W) * T).sum((-2, -1))
    expected = (gradient(W + 1e-5 * T) - gradient(W - 1e-5 * T)) / 2e-5
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("s", LAYER_SETS, ids=name)
def test_every_set_compiles_into_one_graph(s, dtype):
    torch._dynamo.reset()
    W = (rand(4, 4, seed=3) + 0.1).to(dtype).requires_grad_()
    weights = rand(4, 4, seed=4)
    expected = s(W)
    got = torch.compile(lambda W: s(W), fullgraph=True, backend="aot_eager")(W)
    torch.testing.assert_close(got, expected)
    gradients = [torch.autograd.grad((weights * A).sum(), W)[0] for A in (got, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("s", [
    InfNormBall(0.9), PerronFrobenius(0.9), PerronFrobenius(0.9, uniform(40) + 0.2),
    MatrixMeasure(0.9), MatrixMeasure(-0.9, uniform(40) + 0.2), Monotone(0.2),
], ids=name)  # fmt: skip
def test_half_precision_does_not_leave_the_set(s, dtype):
    for seed in range(4):
        W = (rand(40, 40, seed=seed) * 10.0 ** (seed % 4 - 2)).to(dtype)
        for A, exact in ((s(W), s(W.double())), (s.project(W), s.project(W.double()))):
            assert A.dtype == dtype
            assert float(s.margin(A.double())) > -1e-5 * (1 + float(W.abs().max()))  # of float32
            assert float((A.double() - exact).norm()) < 0.2 * (1 + float(exact.norm()))
        small = (rand(40, 40, seed=seed) * 1e-3 - 2 * torch.eye(40)).to(dtype)
        if s.contains(small.double(), 0.0):
            assert torch.equal(s(small), small) and torch.equal(s.project(small), small)
    # The gradient is that of the formula, not of the steps that rounding makes.
    W = rand(40, 40).to(dtype).requires_grad_()
    weights = rand(40, 40, seed=1)
    (got,) = torch.autograd.grad((weights * s(W).double()).sum(), W)
    wide = W.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad((weights * s(wide)).sum(), wide)
    assert float((got - expected).norm()) < 0.02 * float(expected.norm())


@pytest.mark.parametrize("s", [InfNormBall(0.9), PerronFrobenius(0.9, uniform(40) + 0.2),
                               MatrixMeasure(0.9, uniform(40) + 0.2), Monotone(0.2)], ids=name)  # fmt: skip
def test_autocast_leaves_the_sets_alone(s):
    W = rand(40, 40).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        A, P, margin = s(W), s.project(W), s.margin(W)
    assert torch.equal(A, s(W)) and torch.equal(P, s.project(W))
    assert torch.equal(margin, s.margin(W))


def test_perron_frobenius_projection_leaves_what_no_cycle_goes_through():
    ball = PerronFrobenius(0.9)
    A = rand(6, 6).triu(1) * 1e6
    A[:2, :2] = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    A[4, 4] = -7.0
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    P = torch.empty_like(A)
    P[order[:, None], order] = ball.project(A[order[:, None], order])
    assert ball.contains(P, 1e-9)
    expected = A.clone()
    expected[:2, :2] = ball.project(A[:2, :2])
    expected[4, 4] = -0.9
    torch.testing.assert_close(P, expected)


@pytest.mark.parametrize("n, seed, reached, one_start", [
    (5, 1, 2.19, 2.38), (12, 4, 6.79, 7.23), (12, 8, 5.56, 6.02), (12, 10, 5.57, 5.95),
])  # fmt: skip
def test_perron_frobenius_projection_tries_more_than_one_start(n, seed, reached, one_start):
    """The set is not convex: from one start the search ends further away."""
    A = rand(n, n, seed=seed)
    P = PerronFrobenius(0.9).project(A)
    assert PerronFrobenius(0.9).contains(P, 1e-9)
    assert float((A - P).norm()) < reached < one_start


@pytest.mark.parametrize("s, states", [
    (PerronFrobenius(0.9, V), 5), (MatrixMeasure(0.9, V), 5), (StrictlyUpper(sizes=(2, 3)), 5),
    (InfNormBall(), None), (PerronFrobenius(), None), (MatrixMeasure(), None), (Monotone(), None),
    (StrictlyUpper(), None),
], ids=str)  # fmt: skip
def test_a_set_says_how_many_states_it_is_for(s, states):
    assert s.states == states
    s.require_states(5)
    if states is None:
        return s.require_states(3)
    for call in (s.require_states, lambda n: s(rand(n, n)), lambda n: s.project(rand(n, n)),
                 lambda n: s.margin(rand(n, n))):  # fmt: skip
        with pytest.raises(ValueError, match="A has 3 states, but .* is for 5"):
            call(3)


def test_arguments_of_the_wrong_kind_are_named():
    for make, message in [
        (lambda: PerronFrobenius(0.9, "ab"), "weights: got 'ab'"),
        (lambda: StrictlyUpper(sizes=3), "sizes: got 3"),
        (lambda: certificate(torch.zeros(2, 2), "relu", sizes=2), "sizes: got 2"),
        (lambda: rescale(torch.zeros(2, 2), "0.5"), "kappa: got '0.5'"),
        (lambda: rescale([[0.0]]), "A: got list"),
    ]:
        with pytest.raises(TypeError, match=message):
            make()
    for sizes in ((), (True, 2), (1.5, 2), (0, 2)):
        with pytest.raises(ValueError, match="sizes: got"):
            StrictlyUpper(sizes=sizes)
    with pytest.raises(ValueError, match=r"weights: .* got shape \(0, 2\)"):
        PerronFrobenius(0.9, torch.zeros(0, 2))
    assert PerronFrobenius(np.float32(0.5)).kappa == 0.5


@pytest.mark.parametrize("make", [InfNormBall, PerronFrobenius, MatrixMeasure, Monotone])
def test_a_radius_is_a_number(make):
    with pytest.raises(TypeError, match="got '0.5', expected a number"):
        make("0.5")
    with pytest.raises(TypeError, match="got True"):
        make(True)


def test_weights_follow_the_matrix():
    W = torch.ones(3, 3, device="meta")
    for s in (
        PerronFrobenius(0.9, torch.ones(3)),
        MatrixMeasure(0.9, torch.ones(3)),
        StrictlyUpper(sizes=(1, 2)),
    ):
        assert s(W).device.type == "meta"


def test_slopes_above_one_need_a_smaller_bound():
    steep = ELU(alpha=3.0)
    for s in (MatrixMeasure(0.95), Monotone(0.1), InfNormBall(0.95)):
        with pytest.raises(ValueError, match="3"):
            s.check(steep)
    MatrixMeasure(0.3).check(steep)
    Monotone(0.7).check(steep)


def test_the_largest_infinity_norm_of_a_softmax_jacobian_is_one_half():
    p = torch.tensor([0.5, 0.5])
    J = torch.diag(p) - torch.outer(p, p)
    assert Softmax().infinity_lipschitz == float(J.abs().sum(1).max()) == 0.5


def test_a_pair_that_newton_would_still_move_is_no_refutation():
    """Residuals at rounding level, and a contraction all the same: the slope is all but 1."""
    a = np.array([[1 - 1e-12]])
    b, x1, x2 = np.array([1.5e-12]), np.array([1.0]), np.array([2.0])
    p = Component(a, ReLU(), None)
    assert max(abs(np.maximum(a @ x + b, 0) - x) for x in (x1, x2)) < 1e-12
    assert _verified(p, b, a @ x1 + b, a @ x2 + b) is None


def test_the_error_constant_of_a_long_chain_of_blocks():
    """Each block is a reflection: no weighted infinity norm is below 1, and its 2-norm is exact."""
    blocks, angle = 6, 0.8
    c, s = math.cos(angle), math.sin(angle)
    A = torch.block_diag(*[0.9 * torch.tensor([[c, s], [s, -c]])] * blocks)
    A = A + 10.0 * torch.diag(torch.ones(2 * blocks - 2), 2)  # each block reads the next
    report = certificate(A, Identity())
    assert report.condition == "block norm matrix" and len(report.components) == blocks
    # Along the axis of the reflections every inequality of the proof is an equality.
    axis = torch.tensor([math.cos(angle / 2), math.sin(angle / 2)]).repeat(blocks)
    residual = axis * report.weights
    error = torch.linalg.solve(torch.eye(2 * blocks) - A, residual)
    assert 0.4 < float(report.measure(error) / report.error_bound(residual)) <= 1


def test_the_error_constant_of_a_triangular_model_covers_its_inverse():
    """phi = identity: the error is (I - A)^-1 times the residual, and its norm is known exactly."""
    tightest = 0.0
    for seed in range(300):
        A = 0.9 * rand(3, 3, seed=seed).double().clamp(-1, 1)
        A[1:, 0] = 0.0
        A[2, 1] = 0.0
        report = certificate(A, Identity())
        if report.constant is None or report.groups is not None:
            continue
        v = report.weights
        inverse = torch.linalg.inv(torch.eye(3, dtype=torch.float64) - A)
        norm = float(((inverse.abs() @ v) / v).max())
        assert norm <= report.constant * (1 + 1e-12), seed
        tightest = max(tightest, norm / report.constant)
    assert tightest > 0.4


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, in forward mode
@pytest.mark.parametrize("s", SETS_OUTSIDE, ids=name)
def test_forward_over_reverse_without_a_graph_of_the_gradient(s):
    """Tangents go through a backward that builds no graph, where grad mode is off."""
    W, T, weights = rand(4, 4) + 0.1, rand(4, 4, seed=1), rand(4, 4, seed=2)

    def loss(W):
        return (weights * s(W)).sin().sum()

    with forward_ad.dual_level():
        dual = forward_ad.make_dual(W.clone().requires_grad_(), T)
        (gradient,) = torch.autograd.grad(loss(dual), dual)
        got = forward_ad.unpack_dual(gradient).tangent
    expected = (torch.autograd.functional.hessian(loss, W) * T).sum((-2, -1))
    torch.testing.assert_close(got, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
@pytest.mark.parametrize("s", SETS_OUTSIDE, ids=name)
def test_a_compiled_transform_is_right_or_refused(s):
    """torch drops tangents of operators and second derivatives of own rules there, silently."""
    W, T, weights = rand(4, 4) + 0.1, rand(4, 4, seed=1), rand(4, 4, seed=2)

    def loss(W):
        return (weights * s(W)).sin().sum()

    own_rule = isinstance(s, Monotone) or (isinstance(s, PerronFrobenius) and s.weights is None)
    for f in (
        lambda W: torch.func.jvp(s, (W,), (T,))[1],
        torch.func.jacrev(torch.func.jacrev(loss)),
    ):
        torch.compiler.reset()
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        if own_rule:
            with pytest.raises(Exception, match="Observed exception|cannot be compiled"):
                compiled(W)
        else:
            torch.testing.assert_close(compiled(W), f(W))
