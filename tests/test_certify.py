"""Bounds hold: random models, regions and methods, attacked by samples and by gradients."""

import copy
import gc
import math

import pytest
import torch
from torch import Tensor, nn

import implicitdl
from implicitdl import ImplicitLayer, ImplicitModel, MonotoneLayer, to_implicit
from implicitdl.activations import GELU, Blocks, ReLU, Softmax, Tanh
from implicitdl.certify import (
    Bounds,
    _graph,
    _programs,
    bounds,
    certify_accuracy,
    margins,
    minimise,
    robust_radius,
    sensitivity,
)
from implicitdl.certify._graph import known
from implicitdl.certify.accuracy import ball, pair_rows
from implicitdl.robust import Ball, Box, Budget, Ellipsoid, Polytope
from implicitdl.solvers import Picard
from implicitdl.wellposed import InfNormBall

P, Q, N = 5, 3, 8
METHODS = ("sensitivity", "interval", "lipschitz", "crown", "best")


def dense(seed: int, kappa: float = 0.9, n: int = N, phi="relu") -> ImplicitModel:
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(n, n, generator=g)
    A = kappa * A / A.abs().sum(1, keepdim=True)
    B, C = torch.randn(n, P, generator=g), torch.randn(Q, n, generator=g)
    D, b = torch.randn(Q, P, generator=g), torch.randn(n, generator=g)
    return ImplicitModel(A, B, C, D, b, torch.randn(Q, generator=g), phi)


def measured(seed: int) -> ImplicitModel:
    """||A||_inf > 1, matrix measure below 1."""
    f = dense(seed, 0.5)
    return ImplicitModel(f.A - 1.5 * torch.eye(N), f.B, f.C, f.D, f.b, f.d)


def monotone(seed: int) -> MonotoneLayer:
    torch.manual_seed(seed)
    return MonotoneLayer(P, Q, N, margin=0.4)


def block(seed: int) -> ImplicitModel:
    """Two loops, one after the other, and an activation for each block."""
    f, g = dense(seed, 0.8), dense(seed + 1, 0.7, 4, "tanh")
    B = torch.randn(4, Q, generator=torch.Generator().manual_seed(seed))
    return ImplicitModel(g.A, B, g.C, torch.zeros(Q, Q), g.b, g.d, g.phi) @ f


def network(seed: int) -> ImplicitModel:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(P, 7), nn.ReLU(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, Q))
    return to_implicit(net, torch.randn(2, P))


def residual_network(seed: int) -> ImplicitModel:
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(P, 6), nn.Linear(6, 6), nn.Linear(6, Q)

        def forward(self, u):
            x = torch.relu(self.a(u))
            return self.c(x + torch.relu(self.b(x)))

    torch.manual_seed(seed)
    return to_implicit(Net(), torch.randn(2, P))


MODELS = {
    "dense": dense,
    "near one": lambda seed: dense(seed, 0.99),
    "measure": measured,
    "monotone": monotone,
    "block": block,
    "tanh": lambda seed: dense(seed, 0.9, N, "tanh"),
    "leaky": lambda seed: dense(seed, 0.9, N, "leaky_relu"),
    "gelu": lambda seed: dense(seed, 0.8, N, GELU()),
    "mixed": lambda seed: dense(seed, 0.9, N, Blocks(parts=((ReLU(), 5), (Tanh(), 3)))),
    "softmax": lambda seed: dense(seed, 1.5, N, Softmax()),
    "network": network,
    "residual": residual_network,
}
REGIONS = {
    "inf": Ball(radius=0.2, norm="inf", dimension=P),
    "2": Ball(radius=0.4, norm=2, dimension=P),
    "1": Ball(radius=0.5, norm=1, dimension=P),
    "cardinality": Budget(budget=2.0, scale=0.3 * torch.ones(P)),
    "box": Box(low=-torch.rand(P), high=torch.rand(P)),
    "ellipsoid": Ellipsoid(shape=0.2 * torch.randn(P, P)),
}
# Whose state has no box argument: coupled states have norms only, a monotone loop the 2-norm only.
REFUSED = {("monotone", "interval"), ("monotone", "sensitivity")}


def extremes(model, region, u: Tensor, samples: int = 200) -> tuple[Tensor, Tensor]:
    """The smallest and largest outputs that samples and gradient attacks find.  # (m, q) each"""
    g = torch.Generator().manual_seed(1)
    z = torch.cat(
        [region.sample(samples, generator=g), region.sample(50, boundary=True, generator=g)]
    )
    with torch.no_grad():
        y = model((u + z[:, None]).reshape(-1, P)).reshape(len(z), len(u), -1)
    eye = torch.eye(Q)
    low, _ = minimise(model, region, torch.cat([eye, -eye]), around=u, steps=6, generator=g)
    return torch.minimum(y.amin(0), low[:, :Q]), torch.maximum(y.amax(0), -low[:, Q:])


def gap_of(found: Bounds, ends: tuple[Tensor, Tensor]) -> float:
    """How far the nearest of these outputs stays inside the bounds; < 0: outside."""
    return min(float((ends[0] - found.lower).min()), float((found.upper - ends[1]).min()))


def worst_gap(model, region, found: Bounds, u: Tensor, samples: int = 200) -> float:
    """`gap_of` samples and attacks."""
    return gap_of(found, extremes(model, region, u, samples))


@pytest.mark.parametrize(
    ("name", "region"),
    [
        (name, list(REGIONS)[(k + shift) % 6])
        for k, name in enumerate(MODELS)
        for shift in (0, 1, 3)
    ],
)
def test_no_input_of_the_region_leaves_the_bounds(name, region):
    model, set_ = MODELS[name](3), REGIONS[region]
    u = torch.randn(3, P)
    widths, ends = {}, extremes(model, set_, u)
    for method in METHODS:
        if (name, method) in REFUSED:
            with pytest.raises(ValueError, match="no M-matrix|M-matrix, which"):
                bounds(model, set_, method, around=u)
            continue
        found = bounds(model, set_, method, around=u)
        assert found.sound and found.method == method
        # The layer's own solve is as accurate as its tolerance: what it is off by is no violation.
        assert gap_of(found, ends) > -1e-9, (name, region, method)
        widths[method] = found.width
    # Ranges of states that other methods found are no wider, but the lines drawn in them may be.
    assert (widths["best"] <= widths["crown"] * (1 + 1e-3)).all()
    assert (widths["best"] <= widths["lipschitz"] * (1 + 1e-3)).all()


@pytest.mark.parametrize("name", ["dense", "monotone", "network", "tanh"])
def test_states_are_bounded_in_the_model_s_order(name):
    model, set_ = MODELS[name](5), REGIONS["inf"]
    u = torch.randn(2, P)
    method = "crown" if name == "monotone" else "interval"
    found = bounds(model, set_, method, around=u)
    x = torch.stack([model.solve(u + z).value for z in set_.sample(100)])
    assert x.shape[-1] == found.state_lower.shape[-1]
    assert (x >= found.state_lower - 1e-9).all() and (x <= found.state_upper + 1e-9).all()


def test_states_of_a_triangular_matrix_keep_their_order():
    torch.manual_seed(0)
    A = torch.randn(6, 6).triu(1)[torch.tensor([3, 0, 5, 1, 4, 2])][
        :, torch.tensor([3, 0, 5, 1, 4, 2])
    ]
    f = ImplicitModel(A, torch.randn(6, P), torch.randn(Q, 6))
    u, set_ = torch.randn(2, P), Ball(radius=1e-6, norm="inf", dimension=P)
    found = bounds(f, set_, "interval", around=u)
    x = f.solve(u).value
    assert (x >= found.state_lower - 1e-12).all() and (x <= found.state_upper + 1e-12).all()
    assert float((found.state_upper - found.state_lower).max()) < 1e-3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_a_solver_stopped_early_widens_the_bounds(method, steps):
    model, set_ = dense(0, 0.99), REGIONS["inf"]
    u = torch.randn(3, P)
    full = bounds(model, set_, method, around=u)
    early = bounds(model, set_, method, around=u, solver=Picard(max_steps=steps))
    assert (early.residual > full.residual).all()
    assert worst_gap(model, set_, early, u, 50) > -1e-9


def test_a_large_sweep_has_no_violation():
    generator = torch.Generator().manual_seed(0)
    kinds = ("dense", "near one", "monotone", "network", "block")
    for seed in range(20):
        name = kinds[seed % len(kinds)]
        model = MODELS[name](seed + 10)
        region = list(REGIONS.values())[seed % 4]
        u = torch.randn(2, P, generator=generator)
        ends, few = extremes(model, region, u, 100), 3 * (seed % 2)
        for method in ("lipschitz", "crown"):
            found = bounds(
                model, region, method, around=u, refinements=2, steps=few, range_steps=few
            )
            assert gap_of(found, ends) > -1e-9, (name, seed, method)


# ---- two published constructions that are not sound ------------------------------------------------


def test_a_truncated_interval_iteration_is_not_a_bound_and_ours_is():
    """silva-networks stops at 60 steps: from zero width the box is approached from inside."""
    n = 6
    A = 0.999 * torch.ones(n, n) / n
    f = ImplicitModel(A, torch.ones(n, 1), torch.ones(1, n), b=torch.ones(n))
    u, r = torch.zeros(1, 1), 0.5
    low = high = torch.zeros(1, n)
    for _ in range(60):
        low, high = torch.relu(low @ A.mT + 1 - r), torch.relu(high @ A.mT + 1 + r)
    x = f.solve(torch.tensor([[r]])).value
    assert float(x.max()) > float(high.max()) + 100  # their box does not contain the state
    found = bounds(f, Ball(radius=r, norm="inf", dimension=1), "interval", around=u)
    assert (x <= found.state_upper).all() and (x >= found.state_lower).all()
    assert float(found.state_upper.max()) < float(x.max()) * (1 + 1e-6)
    early = bounds(
        f,
        Ball(radius=r, norm="inf", dimension=1),
        "interval",
        around=u,
        solver=Picard(max_steps=60),
    )
    assert (x <= early.state_upper).all()


def test_row_sums_are_no_spectral_norms():
    """||C||_inf ||B||_inf / (1 - ||A||_inf), printed for the 2-norm in a published code, is no bound
    there: of y = (u, ..., u), p times, the row sums say 1 and the 2-norm moves by sqrt(p) |u|."""
    p = 16
    f = ImplicitModel(torch.zeros(p, p), torch.ones(p, 1), torch.eye(p), b=torch.ones(p))
    by_row_sums = float(f.C.abs().sum(1).max() * f.B.abs().sum(1).max())
    u, v = torch.zeros(1, 1), torch.ones(1, 1)
    moved = float(torch.linalg.vector_norm(f(v) - f(u)))
    assert by_row_sums == 1.0 and moved == pytest.approx(math.sqrt(p))
    row = torch.ones(1, p) / math.sqrt(p)  # along which it moves
    found = bounds(f, Ball(radius=1.0, norm=2, dimension=1), "lipschitz", around=u, rows=row)
    low, high = float(found.lower - row @ f(u)[0]), float(found.upper - row @ f(u)[0])
    assert low <= -moved and high >= moved
    assert high < moved * (1 + 1e-9)  # and no more than the 2-norms say


# ---- what is kept from call to call ---------------------------------------------------------------


def test_weights_that_change_in_any_way_are_seen():
    """Nodes are kept while all weights stay, number by number: no version counter is trusted."""
    net, model = feedforward()
    layer = ImplicitLayer(P, Q, N)
    matrices = dense(0)
    u, region = torch.randn(2, P), REGIONS["inf"]
    changes = {
        "in place": lambda w: w.detach().mul_(1.01),
        "through .data": lambda w: w.data.add_(0.01),
        "shared memory": lambda w: w.detach().numpy().__imul__(0.99),
    }
    for thing, weight in (
        (model, net[2].weight), (model, net[4].bias), (layer, layer.B), (layer, layer.W),
        (matrices, matrices.A), (matrices, matrices.d),
    ):  # fmt: skip
        for name, change in changes.items():
            before = bounds(thing, region, "interval", around=u)
            assert known(thing)[0] is known(thing)[0], name
            change(weight)
            after = bounds(thing, region, "interval", around=u)
            assert not torch.equal(after.lower, before.lower), name
            fresh = copy.deepcopy(thing)  # nothing is known of a copy
            again = bounds(fresh, region, "interval", around=u)
            torch.testing.assert_close(after.lower, again.lower, rtol=0, atol=0)
    before = bounds(model, region, "interval", around=u)
    net[0].weight = nn.Parameter(2 * net[0].weight.detach())  # another tensor in its place
    assert not torch.equal(bounds(model, region, "interval", around=u).lower, before.lower)
    with torch.no_grad():
        net[0].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN or infinite weights"):
        bounds(model, region, "interval", around=u)


def test_what_is_kept_goes_with_its_model():
    model = dense(3)
    bounds(model, REGIONS["inf"], "interval", around=torch.zeros(1, P))
    count = len(_graph._KNOWN)
    del model
    gc.collect()
    assert len(_graph._KNOWN) < count


# ---- tight cases -----------------------------------------------------------------------------------


def feedforward(seed: int = 0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(P, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, Q))
    return net, to_implicit(net, torch.randn(2, P))


def ibp(net: nn.Sequential, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    for layer in net:
        if isinstance(layer, nn.Linear):
            c, r = (low + high) / 2, (high - low) / 2
            m, w = layer(c), r @ layer.weight.abs().mT
            low, high = m - w, m + w
        else:
            low, high = layer(low), layer(high)
    return low, high


def test_intervals_of_a_network_are_ibp():
    net, model = feedforward()
    u, r = torch.randn(4, P), 0.3
    found = bounds(model, Ball(radius=r, norm="inf", dimension=P), "interval", around=u)
    low, high = ibp(net, u - r, u + r)
    torch.testing.assert_close(found.lower, low.detach(), rtol=0, atol=1e-11)
    torch.testing.assert_close(found.upper, high.detach(), rtol=0, atol=1e-11)
    matrices = bounds(model.dense(), Ball(radius=r, norm="inf", dimension=P), "interval", around=u)
    torch.testing.assert_close(matrices.lower, found.lower, rtol=0, atol=1e-11)


def crown_by_hand(net: nn.Sequential, u: Tensor, r: float) -> tuple[Tensor, Tensor]:
    """CROWN of one sample, layer by layer, with matrices written out."""
    linear = [m for m in net if isinstance(m, nn.Linear)]
    ranges: list[tuple[Tensor, Tensor]] = []

    def backward(depth: int, sign: float) -> Tensor:
        W = sign * linear[depth].weight
        total = sign * linear[depth].bias
        for k in reversed(range(depth)):
            low, high = ranges[k]
            active, open_ = low >= 0, (low < 0) & (high > 0)
            upper = torch.where(active, 1.0, torch.where(open_, high / (high - low), 0.0))
            lower = torch.where(active, 1.0, torch.where(open_ & (high > -low), 1.0, 0.0))
            rise = torch.where(open_, -upper * low, 0.0)
            plus, minus = W.clamp(min=0), W.clamp(max=0)
            total = total + minus @ rise
            D = plus * lower + minus * upper
            total = total + D @ linear[k].bias
            W = D @ linear[k].weight
        return total + W @ u - r * W.abs().sum(1)

    for depth in range(len(linear)):
        ranges.append((backward(depth, 1.0), -backward(depth, -1.0)))
    return ranges[-1]


def test_crown_of_a_network_is_feedforward_crown():
    net, model = feedforward(1)
    u, r = torch.randn(3, P), 0.4
    found = bounds(model, Ball(radius=r, norm="inf", dimension=P), "crown", around=u)
    for i in range(3):
        with torch.no_grad():
            low, high = crown_by_hand(net, u[i], r)
        torch.testing.assert_close(found.lower[i], low, rtol=0, atol=1e-10)
        torch.testing.assert_close(found.upper[i], high, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["loop", "network"])
def test_the_best_slopes_reach_the_linear_program(kind):
    model = dense(2) if kind == "loop" else feedforward(2)[1]
    torch.manual_seed(2)
    u, region = torch.randn(2, P), Ball(radius=0.5, norm="inf", dimension=P)
    lp = bounds(model, region, "lp", around=u, refinements=2)
    found = bounds(model, region, "crown", around=u, refinements=2, steps=120)
    plain = bounds(model, region, "crown", around=u, refinements=2)
    assert float((lp.lower - plain.lower).max()) > 1e-3  # there is something to gain
    torch.testing.assert_close(found.lower, lp.lower, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.upper, lp.upper, rtol=1e-3, atol=1e-3)


def test_the_linear_program_is_that_of_a_plain_solver():
    """x >= 0, x >= s, x <= chord, s = A x + B u + b, by SciPy, with the ranges that bounds uses."""
    from scipy.optimize import linprog

    model, r = dense(4), 0.3
    u = torch.randn(1, P)
    region = Ball(radius=r, norm="inf", dimension=P)
    found = bounds(model, region, "lp", around=u, refinements=0)
    box = bounds(model, region, "interval", around=u)
    below, above = box.state_lower[0], box.state_upper[0]
    A, B = model.A, model.B
    m, w = (below + above) / 2, (above - below) / 2
    s0 = A @ m + B @ u[0] + model.b
    half = A.abs() @ w + r * B.abs().sum(1)
    low, high = s0 - half, s0 + half
    slope = torch.where(low >= 0, 1.0, torch.where(high <= 0, 0.0, high / (high - low)))
    rise = torch.where((low < 0) & (high > 0), -slope * low, 0.0)
    eye = torch.eye(N)
    # variables (x, u): s - x <= 0 and x - slope s <= rise
    rows = torch.cat(
        [torch.cat([A - eye, B], 1), torch.cat([eye - slope[:, None] * A, -slope[:, None] * B], 1)]
    )
    right = torch.cat([-model.b, slope * model.b + rise])
    limits = [(max(0.0, float(a)), float(b)) for a, b in zip(below, above, strict=True)]
    limits += [(float(t - r), float(t + r)) for t in u[0]]
    for i in range(Q):
        cost = torch.cat([model.C[i], model.D[i]]).numpy()
        solved = linprog(cost, rows.numpy(), right.numpy(), bounds=limits)
        assert solved.status == 0
        value = solved.fun + float(model.d[i])
        assert float(found.lower[0, i]) <= value + 1e-7
        assert value - float(found.lower[0, i]) < 1e-6 * (1 + abs(value))


def test_the_semidefinite_bound_is_between_linear_and_true():
    model, region = dense(6, n=6), Ball(radius=0.5, norm="inf", dimension=P)
    u = torch.randn(1, P)
    lp = bounds(model, region, "lp", around=u, refinements=2)
    sdp = bounds(model, region, "sdp", around=u, refinements=2)
    assert worst_gap(model, region, sdp, u) > -1e-9
    assert float(sdp.width.mean()) < float(lp.width.mean()) * 1.001


@pytest.mark.parametrize(("exact", "few"), [(100, {"max_iter": 4}), (0, {"max_iters": 20})])
def test_any_multipliers_of_the_semidefinite_program_give_a_bound(monkeypatch, exact, few):
    """The interior-point and the first-order solver, at their end and stopped early."""
    model, u, real = dense(7, n=6), torch.randn(1, P), _programs._solve
    row = torch.eye(Q)[:1]
    monkeypatch.setattr(_programs, "SDP_EXACT", exact)
    for region in (REGIONS["inf"], REGIONS["2"]):
        full = bounds(model, region, "sdp", around=u, rows=row)
        monkeypatch.setattr(_programs, "_solve", lambda problem, **o: real(problem, **(o | few)))
        early = bounds(model, region, "sdp", around=u, rows=row)
        monkeypatch.setattr(_programs, "_solve", real)
        y = model(u + region.sample(300))[:, 0]
        low, _ = minimise(model, region, torch.cat([row, -row]), around=u, steps=20)
        least, most = min(float(y.min()), float(low[0, 0])), max(float(y.max()), -float(low[0, 1]))
        for found in (full, early):
            assert float(found.lower) <= least + 1e-9 and float(found.upper) >= most - 1e-9
        assert float(early.width) >= float(full.width) * (1 - 1e-3)


def test_ascent_over_the_slopes_of_ranges_tightens_them():
    model, region, u = dense(2), Ball(radius=0.5, norm="inf", dimension=P), torch.randn(2, P)
    for method in ("crown", "best"):
        plain = bounds(model, region, method, around=u, refinements=3, steps=20)
        more = bounds(model, region, method, around=u, refinements=3, steps=20, range_steps=5)
        assert worst_gap(model, region, more, u) > -1e-9
        assert float(more.width.sum()) < float(plain.width.sum())
        states = (more.state_upper - more.state_lower, plain.state_upper - plain.state_lower)
        assert float(states[0].sum()) < float(states[1].sum())


def test_small_programs_of_monotone_models_hold():
    model = monotone(1)
    u = torch.randn(1, P)
    for region in (REGIONS["2"], REGIONS["cardinality"]):
        for method in ("lp", "sdp"):
            found = bounds(model, region, method, around=u, refinements=2)
            assert worst_gap(model, region, found, u) > -1e-9


def test_linear_models_are_bounded_exactly():
    torch.manual_seed(0)
    f = ImplicitModel(torch.zeros(2, 2), torch.zeros(2, P), torch.zeros(Q, 2), torch.randn(Q, P))
    u = torch.randn(2, P)
    for region in REGIONS.values():
        found = bounds(f, region, "crown", around=u)
        exact = u @ f.D.mT + region.support(f.D)
        torch.testing.assert_close(found.upper, exact, rtol=0, atol=1e-9)


def test_class_pairs_are_tighter_than_differences():
    model, region = dense(1), REGIONS["inf"]
    u, labels = torch.randn(4, P), torch.tensor([0, 1, 2, 0])
    for method in METHODS:
        pair = margins(model, region, labels, method, around=u)
        plain = bounds(model, region, method, around=u)
        own = plain.lower.gather(1, labels[:, None])
        apart = (own - plain.upper).scatter(1, labels[:, None], math.inf)
        if method in (
            "sensitivity",
            "interval",
            "lipschitz",
        ):  # a norm of a sum; lines are chosen anew
            assert (pair >= apart - 1e-9).all()
        assert float((pair - apart)[pair.isfinite()].mean()) > 0.1


def test_blocks_of_states_have_a_version_of_their_own():
    torch.manual_seed(0)
    Z = torch.linalg.qr(torch.randn(4, 4))[0]
    A = torch.block_diag(0.9 * Z, 0.9 * Z)  # ||A||_inf > 1, block norms 0.9
    A[:4, 4:] = 0.3 * torch.randn(4, 4)
    f = ImplicitModel(A, torch.randn(8, P), torch.randn(Q, 8), b=torch.randn(8), phi="relu")
    A[4:, :4] = 1e-3 * torch.randn(4, 4)  # one loop
    u, region = torch.randn(2, P), REGIONS["2"]
    with pytest.raises(ValueError, match="M-matrix"):
        bounds(f, region, "sensitivity", around=u)
    found = bounds(f, region, "sensitivity", around=u, sizes=(4, 4))
    assert worst_gap(f, region, found, u) > -1e-9
    with pytest.raises(ValueError, match="add up to 8"):
        bounds(f, region, "sensitivity", around=u, sizes=(4, 5))
    with pytest.raises(ValueError, match="larger blocks"):
        bounds(f, region, "sensitivity", around=u, sizes=(1,) * 8)


def test_convolutions_and_pooling_are_bounded():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)
    )
    model = to_implicit(net, torch.randn(2, 1, 6, 6))
    u = torch.randn(2, 36)
    region = Ball(radius=0.05, norm="inf", dimension=36)
    y = torch.stack([net((u + z).view(-1, 1, 6, 6)) for z in region.sample(100)])
    for method in METHODS:
        found = bounds(model, region, method, around=u)
        assert (y >= found.lower).all() and (y <= found.upper).all(), method


def test_batches_of_sets_and_absolute_sets():
    model = dense(0)
    u = torch.randn(3, P)
    radius = torch.tensor([0.1, 0.2, 0.3])
    for norm in ("inf", 2):
        batch = Ball(radius=radius, norm=norm, centre=u)
        found = bounds(model, batch, "crown")
        for i in range(3):
            one = bounds(
                model, Ball(radius=radius[i], norm=norm, dimension=P), "crown", around=u[i]
            )
            torch.testing.assert_close(found.lower[i : i + 1], one.lower, rtol=0, atol=1e-4)
    polytope = Polytope(
        F=torch.cat([torch.eye(P), -torch.eye(P), torch.ones(1, P)]),
        g=torch.tensor([0.2] * 10 + [0.3]),
    )
    found = bounds(model, polytope, "crown", around=u)
    z = polytope.sample(50)
    y = torch.stack([model(u + w) for w in z])
    assert (y >= found.lower).all() and (y <= found.upper).all()


def test_an_answer_does_not_depend_on_its_batch_mates():
    model, region = dense(0), REGIONS["inf"]
    u = torch.randn(4, P)
    whole = bounds(model, region, "crown", around=torch.cat([u, 1e3 * u]))
    alone = bounds(model, region, "crown", around=u)
    torch.testing.assert_close(whole.lower[:4], alone.lower, rtol=1e-3, atol=1e-3)


def test_float32_models_are_bounded_in_float64():
    torch.manual_seed(0)
    layer = ImplicitLayer(P, Q, N, dtype=torch.float32)
    u = torch.randn(3, P, dtype=torch.float32)
    region = Ball(radius=0.1, norm="inf", dimension=P)
    found = bounds(layer, region, around=u)
    assert found.lower.dtype == torch.float64
    exact = layer.double()(u.double())
    assert (exact >= found.lower).all() and (exact <= found.upper).all()


# ---- sensitivity -----------------------------------------------------------------------------------


def test_sensitivity_is_the_closed_form_and_bounds_every_difference():
    f = dense(0)
    S = sensitivity(f)
    A, B, C, D = (t.abs() for t in (f.A, f.B, f.C, f.D))
    whole = C @ torch.linalg.solve(torch.eye(N) - A, B) + D
    assert bool(torch.ge(whole + 1e-9, S).all())
    positive = ImplicitModel(A, f.B, f.C, f.D, f.b, f.d)  # signs of the diagonal change nothing
    torch.testing.assert_close(sensitivity(positive), whole, rtol=1e-9, atol=1e-9)
    u, v = torch.randn(200, P), torch.randn(200, P)
    for model in (f, network(0), block(0), dense(0, 1.5, N, Softmax())):
        S = sensitivity(model)
        assert ((model(u) - model(v)).abs() <= (u - v).abs() @ S.mT + 1e-9).all()


def test_a_monotone_model_outside_has_no_sensitivity_matrix():
    with pytest.raises(ValueError, match="no sensitivity matrix"):
        sensitivity(monotone(0))


# ---- accuracy --------------------------------------------------------------------------------------


def problem():
    layer = ImplicitLayer(P, Q, N, well_posed=InfNormBall(kappa=0.8))
    u = torch.randn(30, P)
    return layer, u, layer(u).argmax(1)


def test_certified_is_below_attacked_is_below_clean(tmp_path):
    layer, u, labels = problem()
    labels = labels.clone()
    labels[:5] = (labels[:5] + 1) % Q  # five wrong
    for norm in ("inf", 2):
        report = certify_accuracy(
            layer, (u, labels), 0.05, norm, attacks=("pgd", "relaxation"), batch_size=15
        )
        assert report.clean_accuracy == pytest.approx(25 / 30)
        assert report.certified_accuracy <= report.attacked_accuracy <= report.clean_accuracy
        assert report.certified_accuracy > 0.3
        assert not bool((report.certified & report.broken).any())
        assert "certified" in str(report) and (report.seconds > 0).all()
    zero = certify_accuracy(layer, (u, labels), 0.0)
    assert zero.certified_accuracy == zero.clean_accuracy


def test_a_run_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    layer, u, labels = problem()
    file = tmp_path / "run.safetensors"
    whole = certify_accuracy(layer, (u, labels), 0.1, batch_size=10)
    from implicitdl.certify import accuracy

    calls = []
    real = accuracy._batch

    def stops(*args):
        calls.append(args[3])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(accuracy, "_batch", stops)
    with pytest.raises(KeyboardInterrupt):
        certify_accuracy(layer, (u, labels), 0.1, batch_size=10, path=file)
    calls.clear()
    again = certify_accuracy(layer, (u, labels), 0.1, batch_size=10, path=file)
    assert [int(c[0]) for c in calls] == [20]  # the last batch alone
    assert torch.equal(again.certified, whole.certified)
    with pytest.raises(ValueError, match="another run"):
        certify_accuracy(layer, (u, labels), 0.2, batch_size=10, path=file)


def _worker(rank: int, world: int, folder: str) -> None:
    import torch.distributed as dist

    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world
    )
    torch.manual_seed(0)
    layer, u, labels = problem()
    report = certify_accuracy(layer, (u, labels), 0.1, attacks=(), batch_size=4)
    if rank == 1:
        from safetensors.torch import save_file

        save_file({"certified": report.certified, "margins": report.margins}, f"{folder}/out")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_processes_share_the_samples(tmp_path):
    import torch.multiprocessing as mp
    from safetensors.torch import load_file

    mp.spawn(_worker, (2, str(tmp_path)), nprocs=2)
    torch.manual_seed(0)
    layer, u, labels = problem()
    alone = certify_accuracy(layer, (u, labels), 0.1, attacks=(), batch_size=4)
    shared = load_file(tmp_path / "out")
    assert torch.equal(shared["certified"], alone.certified)
    torch.testing.assert_close(shared["margins"], alone.margins, equal_nan=True)


def test_the_radius_is_bracketed():
    layer, u, labels = problem()
    labels = labels.clone()
    labels[0] = (labels[0] + 1) % Q
    for norm in ("inf", 2):
        proved, broken = robust_radius(
            layer, u[:8], labels[:8], norm, most=0.5, bisections=6, pgd_steps=10, restarts=1
        )
        assert float(proved[0]) == float(broken[0]) == 0.0
        assert (proved[1:] > 0).all() and (proved <= broken).all()
        ratio = (proved / broken)[1:][broken[1:].isfinite()]
        assert float(ratio.max()) > 0.9
        inside = margins(layer, ball(u[1:8], proved[1:] * 0.99, norm), labels[1:8], "crown")
        assert (inside > 0).all()


def test_pair_rows_leave_out_the_label():
    rows, others = pair_rows(torch.tensor([1, 0]), 3, torch.empty(0))
    assert others.tolist() == [[0, 2], [1, 2]]
    assert rows[0].tolist() == [[-1.0, 1.0, 0.0], [0.0, 1.0, -1.0]]


# ---- refusals --------------------------------------------------------------------------------------


def test_what_does_not_apply_raises():
    region = REGIONS["inf"]
    wild = ImplicitModel(3 * torch.ones(2, 2), torch.randn(2, P), torch.randn(Q, 2))
    for method in METHODS:
        with pytest.raises(ValueError, match="method"):
            bounds(wild, region, method, around=torch.zeros(1, P))
    none = ImplicitModel(wild.A, 0 * wild.B, wild.C, wild.D, -torch.ones(2), torch.arange(3.0))
    with pytest.raises(ValueError, match="none applies"):
        certify_accuracy(none, (torch.zeros(1, P), torch.tensor([2])), 0.1, attacks=())
    with pytest.raises(ValueError, match="ReLU models"):
        bounds(dense(0, phi="tanh"), region, "sdp", around=torch.zeros(1, P))


def test_bad_input_is_named():
    f, region, u = dense(0), REGIONS["inf"], torch.zeros(2, P)
    with pytest.raises(ValueError, match="Did you mean 'crown'"):
        bounds(f, region, "crwn", around=u)
    with pytest.raises(TypeError, match="UncertaintySet"):
        bounds(f, 0.1, around=u)
    with pytest.raises(TypeError, match="ImplicitModel"):
        bounds(nn.Linear(2, 2), region, around=u)
    with pytest.raises(ValueError, match="dimension 3"):
        bounds(f, Ball(radius=0.1, dimension=3), around=u)
    bad = u.clone()
    bad[1, 2] = math.nan
    with pytest.raises(ValueError, match=r"index \(1, 2\)"):
        bounds(f, region, around=bad)
    with pytest.raises(ValueError, match="around: got shape"):
        bounds(f, region, around=torch.zeros(2, P + 1))
    with pytest.raises(ValueError, match="rows: got shape"):
        bounds(f, region, around=u, rows=torch.zeros(1, Q + 1))
    with pytest.raises(ValueError, match="refinements"):
        bounds(f, region, around=u, refinements=-1)
    with pytest.raises(ValueError, match="sizes"):
        bounds(f, region, "crown", around=u, sizes=(4, 4))
    with pytest.raises(ValueError, match="unbounded"):
        bounds(f, Polytope(F=torch.eye(P), g=torch.ones(P)), around=u)
    broken = ImplicitModel(f.A, f.B, f.C, f.D, f.b.clone().fill_(math.nan), f.d)
    with pytest.raises(ValueError, match="NaN or infinite weights"):
        bounds(broken, region, around=u)
    with pytest.raises(ValueError, match="class 7"):
        margins(f, region, torch.tensor([7, 0]), around=u)
    with pytest.raises(ValueError, match="radius"):
        certify_accuracy(f, (u, torch.zeros(2, dtype=torch.long)), -1.0)
    labels = torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="expected one of"):
        certify_accuracy(f, (u, labels), 0.1, attacks=("magic",))
    with pytest.raises(ValueError, match="Did you mean 'range_steps'"):
        certify_accuracy(f, (u, labels), 0.1, range_step=3)
    with pytest.raises(ValueError, match="steps: got -2"):
        certify_accuracy(f, (u, labels), 0.1, steps=-2)
    with pytest.raises(ValueError, match="range_steps: got 1.5"):
        margins(f, region, labels, around=u, range_steps=1.5)


def test_the_package_is_reached_by_one_path():
    assert implicitdl.certify.bounds is bounds
