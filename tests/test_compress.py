"""Compressed models: what is kept, that they run the same, and bounds that attacks do not break."""

import math
import statistics
import time

import pytest
import torch
from problems import randn
from torch import Tensor, nn

from implicitdl import ImplicitLayer, ImplicitModel, NotWellPosedError
from implicitdl.activations import Blocks, ReLU, Sigmoid, Softmax, Tanh
from implicitdl.compress import error_bound, low_rank, prune, remove, running, sparsify
from implicitdl.operators import LowRank, weights
from implicitdl.operators.sparse import Sparse
from implicitdl.states import Group, Perspective
from implicitdl.states import LowRank as Rank

MATRICES = ("A", "B", "C", "D")


def model(n: int = 12, p: int = 5, q: int = 3, phi=None, size: float = 0.9, seed: int = 0):
    A = randn(n, n, seed=seed)
    A = size * A / A.abs().sum(1).amax()
    return ImplicitModel(
        A, randn(n, p, seed=seed + 1), randn(q, n, seed=seed + 2), randn(q, p, seed=seed + 3),
        randn(n, seed=seed + 4), randn(q, seed=seed + 5), phi or ReLU(),
    )  # fmt: skip


def same(f: ImplicitModel, g: ImplicitModel, u: Tensor, allowed: float = 1e-9) -> None:
    torch.testing.assert_close(f(u), g(u), rtol=allowed, atol=allowed)


def network() -> nn.Sequential:
    """Few of its weights matter, and few of its states."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3))
    with torch.no_grad():
        for layer in (net[0], net[2], net[4]):
            layer.weight *= torch.where(torch.rand_like(layer.weight) < 0.3, 2.0, 1e-3)
        net[4].weight[:, 5:] *= 1e-3
    return net


# ---- pruning ---------------------------------------------------------------------------------------


def test_pruning_keeps_the_largest_entries():
    f = model()
    small = prune(f, 0.75)
    kept = torch.cat([getattr(small.model, k).flatten() for k in MATRICES])
    every = torch.cat([getattr(f, k).flatten() for k in MATRICES])
    count = len(every) - int(0.75 * len(every))
    assert int((kept != 0).sum()) == count
    assert bool((every[kept != 0] == kept[kept != 0]).all())
    assert float(every[kept != 0].abs().min()) > float(every[kept == 0].abs().max())
    assert small.entries <= count + f.states + f.outputs and 0.2 < small.share < 0.4
    same(prune(f, 0.0).fast, f, randn(10, 5))
    same(small.fast, small.model, randn(10, 5))


def test_pruning_by_what_entries_contribute():
    f, u = model(), randn(200, 5)
    u[:, 0] *= 1e-6  # a feature that says nothing, however large its weights
    assert not prune(f, 0.3, u).model.B[:, 0].any()
    assert prune(f, 0.3).model.B[:, 0].any()


def test_equal_entries_go_one_by_one():
    f = ImplicitModel(
        torch.full((4, 4), 0.1),
        torch.full((4, 3), -0.1),
        torch.full((2, 4), 0.1),
        torch.zeros(2, 3),
    )
    small = prune(f, 0.1)
    left = sum(int((getattr(small.model, k) != 0).sum()) for k in MATRICES)
    assert left == 36 - 3  # of 16 + 12 + 8 entries
    again = prune(f, 0.1).model
    assert all(torch.equal(getattr(again, k), getattr(small.model, k)) for k in MATRICES)
    assert prune(f, 0.0).model.A.all()


def test_a_feature_that_does_not_vary_goes_into_the_biases():
    layer, u = ImplicitLayer(6, 3, 10), randn(100, 6)
    u[:, 2] = 5.0
    f = layer.model()
    torch.testing.assert_close(prune(layer, 0.0, u).model(u), f(u), rtol=0, atol=1e-12)
    share = (10 + 3) / sum(int((getattr(f, k) != 0).sum()) for k in MATRICES)
    small = prune(layer, share + 1e-9, u).model
    assert not small.B[:, 2].any() and not small.D[:, 2].any()  # all that was taken out
    torch.testing.assert_close(small(u), f(u), rtol=0, atol=1e-9)
    half = [(prune(layer, 0.5, data).model(u) - f(u)).abs().max() for data in (u, None)]
    assert half[0] < half[1]


def test_a_pruned_model_stays_in_the_ball():
    layer = ImplicitLayer(4, 2, 20)
    for share in (0.1, 0.5, 0.99):
        small = prune(layer, share)
        norm = float(small.model.A.abs().sum(1).max())
        assert norm <= float(layer.A.detach().abs().sum(1).max()) and small.certificate().well_posed


# ---- removal ---------------------------------------------------------------------------------------


def test_states_that_are_constant_or_unseen_are_removed():
    f = model(phi=Blocks(parts=((ReLU(), 5), (Tanh(), 4), (Sigmoid(), 3))), size=3.0)
    A, B, C = f.A.clone(), f.B.clone(), f.C.clone()
    A[[2, 9]], B[[2, 9]] = 0.0, 0.0  # constant: phi(b), of ReLU and of the sigmoid
    C[:, [4, 6]] = 0.0
    A[:, 4], A[:, 6] = 0.0, 0.0
    A[4, 6] = A[6, 4] = 1.0  # they see each other, nobody sees them
    f = ImplicitModel(0.3 * A, B, C, f.D, f.b, f.d, f.phi)
    g = remove(f)
    assert g.states == 8 and [n for _, n in g.phi.parts] == [3, 3, 2]
    same(g, f, randn(20, 5))
    again = remove(g)
    assert again.states == 8 and torch.equal(again.A, g.A)


def test_a_chain_of_constants_and_a_model_that_is_one():
    A = torch.diag(torch.ones(3), -1)
    f = ImplicitModel(A, torch.zeros(4, 2), torch.ones(1, 4), torch.ones(1, 2), b=torch.ones(4))
    g = remove(f)
    assert g.states == 1
    same(g, f, randn(5, 2))
    same(running(f), f, randn(5, 2))


def test_coupled_states_stay_together():
    f = model(n=6, phi=Blocks(parts=((Softmax(), 4), (ReLU(), 2))), size=0.4)
    C, A = f.C.clone(), f.A.clone()
    C[:, 1:] = 0.0
    A[:4] = 0.0
    f = ImplicitModel(A, f.B, C, f.D, f.b, f.d, f.phi)
    g = remove(f)
    assert g.states == 4 and isinstance(g.phi.parts[0][0], Softmax)
    same(g, f, randn(7, 5))


# ---- how it runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "phi", [ReLU(), Tanh(), Blocks(parts=((ReLU(), 130), (Tanh(), 70)))], ids=str
)
def test_sparse_models_with_and_without_loops_run_the_same(phi):
    f = model(n=200, p=20, phi=phi)
    few = torch.rand(200, 200) < 0.05
    for mask in (few, few.triu(1), torch.zeros(200, 200, dtype=torch.bool)):
        g = ImplicitModel(f.A * mask, f.B, f.C, f.D, f.b, f.d, f.phi)
        fast = running(g)
        u = randn(9, 20)
        same(fast, g, u)
        assert fast.structure.cost <= sum(getattr(g, k).numel() for k in MATRICES)
        if mask is few:
            assert any(isinstance(op, Sparse) for _, op in fast.structure.blocks[0].row.terms)
        else:
            assert not fast.structure.loops


def test_gradients_flow_through_a_sparse_loop():
    f = model(n=200, q=2)
    fast = running(ImplicitModel(f.A * (torch.rand(200, 200) < 0.05), f.B, f.C, f.D, f.b, f.d))
    assert fast.structure.loops and "sparse" in str(fast)
    u = randn(4, 5).requires_grad_()
    assert torch.autograd.gradcheck(fast, (u,), atol=1e-6)


def test_sparse_models_are_saved_and_read(tmp_path):
    f = model(n=200)
    fast = running(ImplicitModel(f.A * (torch.rand(200, 200) < 0.05), f.B, f.C, f.D, f.b, f.d))
    fast.save(tmp_path / "sparse")
    again = ImplicitModel.load(tmp_path / "sparse")
    pairs = zip(weights(again.structure), weights(fast.structure), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    same(again, fast, randn(6, 5), 1e-12)


@pytest.mark.parametrize("change", [
    {"pattern": "no text of that kind"}, {"pattern": ""}, {"rows": 0}, {"columns": 3},
    {"values": torch.ones(2)}, {"rows": 7},
], ids=str)  # fmt: skip
def test_a_pattern_that_is_none_is_refused(change):
    op = Sparse.of(torch.tensor([[0.0, 2.0, 0.0, 1.0], [3.0, 0.0, 0.0, 0.0]]))
    given = {"values": op.values, "columns": 4, "rows": 2, "pattern": op.pattern} | change
    with pytest.raises(ValueError, match=r"pattern|values|Sparse"):
        Sparse(**given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sparse_products_in_halves(dtype):
    W = (randn(40, 30) * (torch.rand(40, 30) < 0.1)).to(dtype)
    op, u, g = Sparse.of(W), randn(6, 30).to(dtype), randn(6, 40, seed=1).to(dtype)
    for found, exact in (
        (op.apply(u), u.float() @ W.float().mT), (op.transpose(g), g.float() @ W.float())
    ):  # fmt: skip
        assert found.dtype == dtype
        torch.testing.assert_close(found, exact.to(dtype))
    values = op.values.clone().requires_grad_()
    Sparse(values, 30, 40, op.pattern).apply(u).float().sum().backward()
    assert values.grad.dtype == dtype and bool(values.grad.any())


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own
def test_sparse_products_under_autocast_and_forwards():
    import torch.autograd.forward_ad as forward

    W = randn(40, 30) * (torch.rand(40, 30) < 0.1)
    op, u, v = Sparse.of(W), randn(6, 30), randn(6, 30, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        for x in (u, u.bfloat16()):
            found = Sparse.of(W.float()).apply(x.float() if x is u else x)
            torch.testing.assert_close(found.double(), x.double() @ W.mT, rtol=1e-4, atol=1e-5)
    for values in (op.values, op.values.clone().requires_grad_()):
        with forward.dual_level():
            y = Sparse(values, 30, 40, op.pattern).apply(forward.make_dual(u, v))
            torch.testing.assert_close(forward.unpack_dual(y).tangent, v @ W.mT)


def test_a_sparse_product_is_faster():
    """Half a percent of 1500 x 1500: some twenty times less time; five is asked for."""
    W = randn(1500, 1500) * (torch.rand(1500, 1500) < 0.005)
    sparse, u = Sparse.of(W), randn(64, 1500)
    torch.testing.assert_close(sparse.apply(u), u @ W.mT)

    def seconds(call) -> float:
        times = []
        for _ in range(7):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    assert seconds(lambda: sparse.apply(u)) < seconds(lambda: u @ W.mT) / 5


# ---- rank, and matching of states ------------------------------------------------------------------


def test_a_low_rank_model():
    f = model(n=15, size=0.95)
    small = low_rank(f, 4)
    assert int(torch.linalg.matrix_rank(small.model.A)) == 4
    assert float(small.model.A.abs().sum(1).max()) <= 0.95
    (_, op), *_ = small.fast.structure.blocks[0].row.terms
    assert isinstance(op, LowRank) and op.cost == 2 * 15 * 4
    same(small.fast, small.model, randn(8, 5))
    nearest = torch.linalg.svd(f.A)
    cut = (nearest[0][:, :4] * nearest[1][:4]) @ nearest[2][:4]
    inside = cut.abs().sum(1) <= 0.95
    assert bool(inside.any())
    torch.testing.assert_close(small.model.A[inside], cut[inside])
    tight = low_rank(f, 4, kappa=0.3)
    assert float(tight.model.A.abs().sum(1).max()) <= 0.3


@pytest.mark.parametrize("penalty", [0.05, Perspective(weight=0.05), Group(weight=0.1)], ids=str)
@pytest.mark.parametrize("connections", ["all", "upper"])
def test_matching_states_makes_small_models(penalty, connections):
    net, u = network(), randn(300, 8)
    small = sparsify(net, u, penalty, connections=connections)
    assert small.report.agreement > 0.8
    # A group is a state or a feature: those that stay may read everything.
    assert small.fast.states < 18 if isinstance(penalty, Group) else small.share < 0.8
    same(small.fast, small.model, u, 1e-6)  # in the network's units, and in the layer's
    bound = small.error_bound(u[:50])
    off = (small.model(u[:50]) - small.original(u[:50])).abs()
    assert bool((off <= bound.output).all())
    before, after = small.multiplications
    assert after < before and "multiplications" in str(small)


# ---- bounds ----------------------------------------------------------------------------------------


def directions(f: ImplicitModel, g: ImplicitModel, u: Tensor) -> Tensor:
    """Inputs moved uphill on the difference of outputs, to try the bound where it is large."""
    u = u.clone().requires_grad_()
    for _ in range(20):
        gap = (f(u) - g(u)).abs().sum()
        (slope,) = torch.autograd.grad(gap, u)
        u = (u + 0.3 * slope.sign()).detach().requires_grad_()
    return u.detach()


@pytest.mark.parametrize("phi", [ReLU(), Tanh(), Sigmoid()], ids=str)
@pytest.mark.parametrize("size", [0.3, 0.95])
def test_bounds_hold_and_the_sharper_one_is_sharper(phi, size):
    f = model(phi=phi, size=size)
    changes = [prune(f, 0.3), prune(f, 0.8), low_rank(f, 3)]
    moved = ImplicitModel(
        f.A * (1 + 1e-3 * randn(12, 12)).clamp(max=1.0), f.B + 1e-3 * randn(12, 5, seed=8), f.C,
        f.D, f.b - 1e-3, f.d + 1e-3, f.phi,
    )  # fmt: skip
    for g in [*(c.model for c in changes), moved]:
        u = torch.cat(
            [randn(40, 5, seed=3), directions(f, g, randn(10, 5, seed=4)), torch.zeros(1, 5)]
        )
        bound = error_bound(f, g, u)
        x0, x = f.solve(u).value, g.solve(u).value
        assert bool(((x - x0).abs() <= bound.state + 1e-9).all())
        assert bool(((g(u) - f(u)).abs() <= bound.output + 1e-9).all())
        assert bool((bound.state <= bound.paper_state).all())
        assert bool((bound.output <= bound.paper_output).all())


def test_the_bound_is_the_formula_of_the_paper():
    f = model(size=0.6)
    g = prune(f, 0.4).model
    u = randn(6, 5)
    x0 = f.solve(u).value
    dA, dB = (g.A - f.A).abs(), (g.B - f.B).abs()
    right = x0.abs() @ dA.mT + u.abs() @ dB.mT
    expected = right @ torch.linalg.inv(torch.eye(12) - g.A.abs()).mT
    bound = error_bound(f, g, u)
    torch.testing.assert_close(bound.paper_state, expected, rtol=1e-7, atol=1e-7)
    state = (torch.relu(x0 @ g.A.mT + u @ g.B.mT + g.b) - x0).abs() @ torch.linalg.inv(
        torch.eye(12) - g.A.abs()
    ).mT
    torch.testing.assert_close(bound.state, state, rtol=1e-7, atol=1e-7)


def test_the_bound_is_reached_by_a_positive_model():
    """All entries positive, weights only raised: nothing cancels, and the bound is an equality."""
    f = ImplicitModel(0.05 * torch.rand(6, 6), torch.rand(6, 3), torch.rand(2, 6))
    g = ImplicitModel(f.A + 0.02, f.B + 0.1, f.C)
    u = torch.rand(4, 3)
    bound = error_bound(f, g, u)
    torch.testing.assert_close(bound.output, g(u) - f(u), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(bound.paper_output, g(u) - f(u), rtol=1e-6, atol=1e-8)


def test_the_lipschitz_constant_of_phi_counts():
    """The sigmoid's is 1/4: a matrix far outside the ball of ReLU still has a bound."""
    f = model(phi=Sigmoid(), size=2.0)
    g = prune(f, 0.2).model
    u = randn(20, 5)
    bound = error_bound(f, g, u)
    assert bool(((g(u) - f(u)).abs() <= bound.output).all())
    with pytest.raises(NotWellPosedError, match="expected below 1") as caught:
        error_bound(model(size=0.5), model(size=30.0), u)
    assert caught.value.margin < 0


# ---- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("act, kind, words", [
    (lambda: prune(model(), 1.0), ValueError, r"sparsity: got 1.0, expected a share in \[0, 1\)"),
    (lambda: prune(model(), math.nan), ValueError, "sparsity: got nan"),
    (lambda: prune(network(), 0.5), TypeError, "got Sequential.*to_implicit"),
    (lambda: prune(model(), 0.5, randn(1, 5)), ValueError, "data: got.*at least 2 samples"),
    (lambda: prune(model(), 0.5, torch.tensor([[0.0] * 5, [math.nan] * 5])), ValueError,
     "data: 1 of 2 samples have NaN.*sample 1"),
    (lambda: prune(model(), 0.5, randn(9, 4)), ValueError, "data: got 4 numbers.*expected 5"),
    (lambda: prune(model(), 0.5, [1.0]), TypeError, "data: got list"),
    (lambda: error_bound(model(), model(), randn(10, 4)), ValueError, "u: got 4 numbers.*expected 5"),
    (lambda: error_bound(model(), model(), randn(10, 3)), ValueError, "u: got 3 numbers"),
    (lambda: error_bound(model(), model(), torch.full((2, 5), math.nan)), ValueError, "u: 2 of 2"),
    (lambda: sparsify(network(), randn(20, 7)), ValueError, "data: the network does not take"),
    (lambda: low_rank(model(), 12), ValueError, "rank: got 12, expected an integer in 1..11"),
    (lambda: low_rank(model(), 2, kappa=1.0), ValueError, "kappa: got 1.0"),
    (lambda: running(model(), 2.0), ValueError, "density: got 2.0"),
    (lambda: sparsify(network(), randn(20, 8), Rank(rank=2)), TypeError, "`low_rank` cuts"),
    (lambda: error_bound(model(), model(n=10), randn(2, 5)), ValueError, "compressed: got"),
    (lambda: error_bound(model(phi=Softmax()), model(phi=Softmax()), randn(2, 5)), ValueError,
     "couples states"),
    (lambda: Sparse.of(torch.zeros(3)), ValueError, r"matrix: got shape \(3,\)"),
], ids=lambda v: v if isinstance(v, str) else "")  # fmt: skip
def test_what_is_refused(act, kind, words):
    with pytest.raises(kind, match=words):
        act()
