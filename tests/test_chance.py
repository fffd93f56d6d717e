"""Chance constraints: kappa by a second derivation, by simulation, and in programs."""

import math

import cvxpy as cp
import numpy as np
import pytest
import torch
from scipy import integrate, optimize, stats
from torch.autograd import gradcheck, gradgradcheck

from implicitdl.robust import (
    AnyLaw,
    Bounded,
    ChanceConstrainedLayer,
    ChanceConstrainedLP,
    Gaussian,
    Moments,
    Radial,
    RadiallyDecreasing,
    StudentT,
    Symmetric,
    SymmetricUnimodal,
    UniformEllipsoid,
    clopper_pearson,
)
from implicitdl.robust.families import quantile
from implicitdl.solution import InfeasibleError

N, M = 3, 2


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moments(lead=(), k=N, r=N):
    mean = 1 + 0.2 * normal(*lead, M, k, seed=1)
    return Moments(mean=mean, factor=0.1 * normal(*lead, M, k, r, seed=2))


def program(family=None, **changes):
    options = {"eps": 0.05, "low": 0.0, "high": 3.0, **changes}
    options.setdefault("family", family or Gaussian())
    return ChanceConstrainedLP(-torch.tensor([1.0, 0.8, 1.2]), moments(), torch.ones(M), **options)


def disc(level):
    """Prob{w_1 > level} for w uniform on the unit ball of R^5, by integrating its slices."""
    slices = [integrate.quad(lambda t: (1 - t * t) ** 2, a, 1)[0] for a in (level, -1)]
    return slices[0] / slices[1]


R = 5
# kappa again, not by the formula that the library has but from the tail that it must leave.
TAILS = {
    "gaussian": (Gaussian(), lambda k: stats.norm.sf(k)),
    "student": (StudentT(5.0), lambda k: stats.t.sf(k / math.sqrt(3 / 5), 5)),
    "uniform": (UniformEllipsoid(), lambda k: disc(k / math.sqrt(R + 2))),
    "decreasing": (RadiallyDecreasing(), disc),
    # The most that a law of this mean and variance has beyond k, over laws on a grid: `moment_tail`.
    "any": (AnyLaw(), lambda k: moment_tail(k, symmetric=False)),
    "symmetric": (Symmetric(), lambda k: moment_tail(k, symmetric=True)),
    "unimodal": (SymmetricUnimodal(), lambda k: unimodal_tail(k)),
}  # fmt: skip


def moment_tail(k, symmetric):
    """max Prob{s >= k} over laws with E s = 0, E s^2 = 1, as a linear program over atoms."""
    grid = np.unique(np.concatenate([np.linspace(-8, 8, 321), [k, -k, -1 / k]]))
    rows = [np.ones_like(grid), grid, grid**2]
    if symmetric:
        grid = grid[grid >= 0]  # half of each atom on either side
        rows = [np.ones_like(grid), grid**2]
        gain = 0.5 * (grid >= k)
        limits = [1, 1]
    else:
        gain, limits = 1.0 * (grid >= k), [1, 0, 1]
    return -optimize.linprog(-gain, A_eq=np.array(rows), b_eq=limits).fun


def unimodal_tail(k):
    """The same over mixtures of uniform laws on [-c, c], which all symmetric unimodal laws are."""
    c = np.unique(np.concatenate([np.linspace(1e-9, 12, 2401), [1.5 * k]]))
    gain = 0.5 * np.clip(1 - k / c, 0, None)
    rows = np.array([np.ones_like(c), c**2 / 3])
    return -optimize.linprog(-gain, A_eq=rows, b_eq=[1, 1]).fun


@pytest.mark.parametrize("name", TAILS)
@pytest.mark.parametrize("eps", [0.3, 0.1, 0.05])
def test_kappa_leaves_exactly_eps(name, eps):
    family, tail = TAILS[name]
    k = float(family.kappa(torch.tensor(eps), R))
    assert tail(k) == pytest.approx(eps, rel=1e-3)
    assert tail(0.97 * k) > eps * 1.005


@pytest.mark.parametrize("name", TAILS)
def test_kappa_falls_with_eps_and_has_its_derivative(name):
    family = TAILS[name][0]
    eps = torch.tensor([0.02, 0.11, 0.3, 0.45], requires_grad=True)
    k = family.kappa(eps, R)
    assert (k.diff() < 0).all()
    assert gradcheck(lambda e: family.kappa(e, R), eps)
    assert gradgradcheck(lambda e: family.kappa(e, R), eps)


def test_families_are_ordered_as_their_assumptions():
    eps = torch.tensor([0.01, 0.05, 0.15])
    any_, symmetric, unimodal, gaussian, uniform = (
        f.kappa(eps, R)
        for f in (AnyLaw(), Symmetric(), SymmetricUnimodal(), Gaussian(), UniformEllipsoid())
    )
    assert (any_ > symmetric).all() and (symmetric > unimodal).all()
    assert (unimodal > torch.maximum(gaussian, uniform)).all()
    # Uniform on an ellipsoid of many dimensions is normal in each direction.
    torch.testing.assert_close(UniformEllipsoid().kappa(eps, 4000), gaussian, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(StudentT(1e6).kappa(eps, R), gaussian, atol=1e-4, rtol=1e-4)
    # Calafiore and El Ghaoui's form for m = n + 1.
    n = 4
    theirs = math.sqrt(n + 3) * np.sqrt(stats.beta.ppf(1 - 2 * eps.numpy(), 0.5, n / 2 + 1))
    torch.testing.assert_close(UniformEllipsoid().kappa(eps, n + 1), torch.as_tensor(theirs))


def test_hoeffding_holds_for_every_law_of_bounded_entries():
    """Prob{d'w > kappa} <= eps, exactly enumerated for entries at +-1, and for skewed ones."""
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 8)
    g = torch.Generator().manual_seed(3)
    for eps in (0.3, 0.1, 0.02):
        k = float(Bounded().kappa(torch.tensor(eps), 8))
        assert k == pytest.approx(2 * math.sqrt(math.log(1 / eps) / 2))  # of whole widths 2
        for _ in range(20):
            d = torch.randn(8, generator=g)
            d = d / d.norm()
            assert ((signs @ d) > k).double().mean() <= eps
            # Mean 0 at -p and 1 - p: an interval of length 1, half width 1/2.
            p = 0.05 + 0.9 * torch.rand(8, generator=g)
            up = (signs > 0).double()
            weight = torch.where(signs > 0, p, 1 - p).prod(1)
            assert weight[((up - p) @ d) > k / 2].sum() <= eps


FAMILIES = {
    "gaussian": Gaussian(), "student": StudentT(4.0), "uniform": UniformEllipsoid(),
    "decreasing": RadiallyDecreasing(), "any": AnyLaw(), "symmetric": Symmetric(),
    "unimodal": SymmetricUnimodal(), "bounded": Bounded(),
    "radial": Radial(
        marginal=lambda p: math.sqrt(3) * (2 * p - 1),  # uniform on [-sqrt 3, sqrt 3], r = 1
        sampler=lambda n, r, g: math.sqrt(3) * (2 * torch.rand(n, r, generator=g) - 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_simulation_of_each_family(name):
    """At the solution a row is violated as often as allowed, by the worst law, and no more."""
    family = FAMILIES[name]
    rows = moments(r=1 if name == "radial" else N)
    p = ChanceConstrainedLP(
        -torch.ones(N), rows, torch.ones(M), eps=0.1, family=family, low=0.0, high=3.0
    )
    x = p.solve().value
    tight = p.robust().violation(x) > -1e-7
    assert tight.any() and (p.robust().violation(x) <= 1e-7).all()
    seen = p.simulate(x, 20_000, generator=torch.Generator().manual_seed(4))
    assert (seen.low <= 0.1).all()
    assert (seen.joint_rate >= seen.rate.max()).all()
    # A little beyond, the tight rows are violated too often: the check can fail. (Hoeffding's bound
    # is not attained.)
    if name != "bounded":
        # Scaled until the margin is 90 % of the deviation.
        wide = p.simulate(x * 1.02, 20_000, generator=torch.Generator().manual_seed(5))
        assert (wide.low[tight] > 0.09).all() and (wide.rate[tight] > seen.rate[tight]).all()
        assert wide.high.max() > 0.1


def test_worst_laws_have_the_moments_that_they_say():
    direction = torch.tensor([[0.6, 0.8, 0.0], [0.0, 0.0, 1.0]])
    for name in ("student", "uniform", "any", "symmetric", "unimodal", "gaussian"):
        g = torch.Generator().manual_seed(6)
        w = FAMILIES[name].draw(60_000, direction, torch.tensor(0.1), g)
        assert w.shape == (60_000, 2, 3)
        assert w.mean(0).abs().max() < 0.03
        covariance = torch.einsum("nij,nik->ijk", w, w) / len(w)
        assert (covariance - torch.eye(3)).abs().max() < 0.1


@pytest.mark.parametrize("family", [Gaussian(), AnyLaw(), UniformEllipsoid()])
def test_the_solution_is_that_of_cvxpy(family):
    p = program(family)
    x = cp.Variable(N)
    k = float(family.kappa(torch.tensor(0.05), N))
    mean, factor = p.moments.mean.numpy(), p.moments.factor.numpy()
    rows = [mean[i] @ x + k * cp.norm(factor[i].T @ x) <= 1 for i in range(M)]
    problem = cp.Problem(cp.Minimize(p.c.numpy() @ x), [*rows, x >= 0, x <= 3])
    problem.solve(solver=cp.CLARABEL)
    solution = p.solve()
    assert float(solution.stats["objective"]) == pytest.approx(problem.value, abs=1e-6)
    torch.testing.assert_close(solution.value, torch.as_tensor(x.value), atol=1e-5, rtol=1e-5)
    assert solution.stats["joint"] is None
    torch.testing.assert_close(solution.stats["kappa"], torch.tensor(k))


def test_a_random_limit_is_one_more_coordinate():
    """Prob{a'x <= b} with both random; independent of each other, their variances add."""
    mean = torch.cat([torch.ones(1, N), torch.full((1, 1), 2.0)], 1)
    factor = torch.diag(torch.tensor([0.1, 0.2, 0.3, 0.4]))[None]
    p = ChanceConstrainedLP(-torch.ones(N), Moments(mean=mean, factor=factor), eps=0.05, low=0.0)
    x = p.solve().value
    k = stats.norm.ppf(0.95)
    spread = math.sqrt(float(((factor[0, :N, :N] @ x) ** 2).sum()) + 0.4**2)
    assert float(x.sum()) + k * spread == pytest.approx(2.0, abs=1e-7)
    seen = p.simulate(x, 40_000, generator=torch.Generator().manual_seed(7))
    assert seen.low[0] <= 0.05 <= seen.high[0]


def test_joint_rows_share_eps_by_bonferroni():
    p, q = program(joint=True, eps=0.1), program(eps=0.05)
    torch.testing.assert_close(p.kappa, q.kappa.expand(1))
    s = p.solve()
    assert s.stats["joint"] == "Bonferroni"
    torch.testing.assert_close(s.value, q.solve().value)
    seen = p.simulate(s.value, 20_000, generator=torch.Generator().manual_seed(8))
    assert seen.joint_low <= 0.1 and (seen.low <= 0.05).all()


@pytest.mark.parametrize("name", ["gaussian", "any", "uniform"])
def test_gradients_in_moments_and_eps(name):
    base = moments()

    def solved(c, mean, factor, b, eps):
        p = ChanceConstrainedLP(
            c, Moments(mean=mean, factor=factor), b, eps=eps, family=FAMILIES[name], low=0.0,
            high=3.0,
        )  # fmt: skip
        s = p.solve()
        return s.value, s.stats["objective"]

    tensors = (program().c, base.mean, base.factor, torch.ones(M), torch.tensor([0.05, 0.1]))
    inputs = [t.clone().requires_grad_() for t in tensors]
    assert gradcheck(solved, inputs, eps=1e-5, atol=1e-5, rtol=1e-4, fast_mode=True)


def test_a_batch_and_its_infeasible_instance():
    b = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [2.0, 1.0]])
    p = ChanceConstrainedLP(-torch.ones(N), moments(), b, eps=0.05, low=0.0, high=3.0)
    with pytest.raises(InfeasibleError) as caught:
        p.solve()
    assert caught.value.instances.tolist() == [1]
    s = p.solve(on_failure="nan")
    assert torch.isnan(s.value[1]).all() and torch.isfinite(s.value[[0, 2]]).all()
    seen = p.simulate(s.value.nan_to_num(0.0), 500)
    assert seen.rate.shape == (3, M) and seen.joint_rate.shape == (3,)


# ---- estimated moments -----------------------------------------------------------------------------


def test_estimates_are_those_of_numpy():
    d = normal(40, M, N, seed=9)
    rows = Moments.from_samples(d)
    for i in range(M):
        torch.testing.assert_close(rows.mean[i], d[:, i].mean(0))
        covariance = torch.as_tensor(np.cov(d[:, i].numpy().T))
        torch.testing.assert_close(rows.factor[i] @ rows.factor[i].mT, covariance)
    few = Moments.from_samples(d[:2])  # fewer samples than dimensions
    covariance = torch.as_tensor(np.cov(d[:2, 0].numpy().T))
    torch.testing.assert_close(few.factor[0] @ few.factor[0].mT, covariance)


@pytest.mark.parametrize("kind", ["normal", "bounded"])
def test_the_correction_covers_the_truth_as_often_as_it_says(kind):
    """All at once: 400 estimates, each right for all x where a matrix inequality holds."""
    trials, size, confidence = 400, 60, 0.9
    g = torch.Generator().manual_seed(10)
    L = torch.tensor([[0.5, 0.0], [0.3, 0.2]])
    if kind == "normal":
        w = torch.randn(size, trials, 2, generator=g)
        extra = {}
    else:
        w = torch.where(torch.rand(size, trials, 2, generator=g) < 0.5, -1.0, 1.0)
        bound = float(torch.linalg.vector_norm(w[:1] @ L.mT, dim=-1).max())
        centre = torch.ones(2)
        extra = {"bound": max(bound, 0.83), "centre": centre.expand(trials, 2)}
    rows = Moments.from_samples(1 + w @ L.mT, confidence=confidence, **extra)
    # mean: (mu - 1)'x <= shift ||factor'x|| + radius ||x|| for all x
    e = rows.mean - 1
    by_shift = torch.linalg.solve_triangular(rows.factor, e[..., None], upper=False)[..., 0]
    if kind == "normal":
        mean_holds = by_shift.norm(dim=-1) <= rows.shift
    else:
        mean_holds = e.norm(dim=-1) <= rows.radius
    excess = torch.linalg.eigvalsh(rows.factor @ rows.factor.mT - L @ L.mT)
    covariance_holds = excess.amin(-1) >= -1e-12
    both = (mean_holds & covariance_holds).double().mean()
    assert both >= confidence
    # Without the correction, the estimate is wrong for some x in most trials.
    plain = Moments.from_samples(1 + w @ L.mT)
    low = torch.linalg.eigvalsh(plain.factor @ plain.factor.mT - L @ L.mT).amin(-1) >= 0
    assert low.double().mean() < 0.5


def test_the_correction_fades_with_samples_and_protects():
    d = torch.ones(1) + 0.1 * normal(4000, 1, N, seed=11)
    sizes = []
    for count in (60, 400, 4000):
        rows = Moments.from_samples(d[:count], confidence=0.95)
        p = ChanceConstrainedLP(-torch.ones(N), rows, torch.ones(1), eps=0.05, low=0.0)
        sizes.append(float(p.solve().value.sum()))
    exact = Moments(mean=torch.ones(1, N), factor=0.1 * torch.eye(N)[None])
    best = float(
        ChanceConstrainedLP(-torch.ones(N), exact, torch.ones(1), eps=0.05, low=0.0)
        .solve().stats["objective"]
    )  # fmt: skip
    assert sizes == sorted(sizes) and sizes[-1] < -best < 1.1 * sizes[-1]
    truth = ChanceConstrainedLP(-torch.ones(N), exact, torch.ones(1), eps=0.05, low=0.0)
    rows = Moments.from_samples(d[:60], confidence=0.95)
    x = ChanceConstrainedLP(-torch.ones(N), rows, torch.ones(1), eps=0.05, low=0.0).solve().value
    assert truth.simulate(x, 20_000, generator=torch.Generator().manual_seed(12)).high.max() < 0.05


@pytest.mark.parametrize("errors", [{"shift": 0.7}, {"radius": 0.2}, {"shift": 0.7, "radius": 0.2}])
def test_errors_of_the_mean_are_kept_from_the_limit(errors):
    """mean'x + (kappa + shift) ||factor'x|| + radius ||x|| <= b, by its definition."""
    base = moments()
    rows = Moments(mean=base.mean, factor=base.factor, **errors)
    p = ChanceConstrainedLP(-torch.ones(N), rows, torch.ones(M), eps=0.05, low=0.0, high=3.0)
    x = p.solve().value
    k = stats.norm.ppf(0.95) + errors.get("shift", 0.0)
    used = rows.mean @ x + k * (rows.factor.mT @ x).norm(dim=-1)
    used = used + errors.get("radius", 0.0) * x.norm()
    assert float(used.max()) == pytest.approx(1.0, abs=1e-7)


def test_new_data_can_be_counted():
    p = program()
    x = p.solve().value
    data = p.moments.mean + 10 * normal(1000, M, N, seed=13)
    seen = p.simulate(x, law=data)
    expected = ((data @ x) > 1).double().mean(0)
    torch.testing.assert_close(seen.rate, expected)
    assert seen.draws == 1000 and (seen.low < expected).all() and (seen.high > expected).all()


def test_clopper_pearson():
    low, high = clopper_pearson(torch.tensor([0, 3, 20]), 20, 0.95)
    for i, k in enumerate((0, 3, 20)):
        exact = stats.binomtest(k, 20).proportion_ci(0.95, "exact")
        assert float(low[i]) == pytest.approx(exact.low, abs=1e-12)
        assert float(high[i]) == pytest.approx(exact.high, abs=1e-12)


# ---- the layer -------------------------------------------------------------------------------------


def test_a_layer_learns_how_uncertain_the_rows_are():
    rows = Moments(mean=torch.ones(1, 2), factor=0.1 * torch.eye(2)[None])
    c, b = -(0.5 + torch.rand(8, 2, generator=torch.Generator().manual_seed(14))), torch.ones(8, 1)
    true = Moments(mean=torch.ones(1, 2), factor=torch.diag(torch.tensor([0.3, 0.2]))[None])
    wanted = ChanceConstrainedLP(c, true, b, eps=0.1, low=0.0).solve().value
    layer = ChanceConstrainedLayer(rows, eps=0.1, learn=("factor",), low=0.0)
    assert [name for name, _ in layer.named_parameters()] == ["factor"]
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (layer(c, b) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]


def test_all_of_a_layer_is_learned_and_saved():
    layer = ChanceConstrainedLayer(moments(), eps=torch.tensor([0.05, 0.2]), low=0.0, high=3.0)
    layer(-torch.ones(4, N), torch.ones(4, M)).square().sum().backward()
    assert all(t.grad.abs().max() > 0 for t in layer.parameters())
    torch.testing.assert_close(layer.eps.detach(), torch.tensor([0.05, 0.2]))
    other = ChanceConstrainedLayer(Moments(mean=torch.zeros(M, N), factor=torch.zeros(M, N, N)),
                                   eps=torch.tensor([0.1, 0.1]), low=0.0, high=3.0)  # fmt: skip
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(
        other(-torch.ones(N), torch.ones(M)), layer(-torch.ones(N), torch.ones(M))
    )
    assert "joint=False" in repr(layer)


def test_a_layer_works_in_float32(float32):
    rows = Moments(mean=torch.ones(1, 2), factor=0.1 * torch.eye(2)[None])
    x = ChanceConstrainedLayer(rows, eps=0.05, low=0.0)(-torch.ones(2), torch.ones(1))
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, torch.full((2,), 0.447905), atol=1e-5, rtol=1e-5)


def test_quantile_is_the_inverse_to_all_orders():
    p = torch.tensor([0.6, 0.9], requires_grad=True)

    def density(t):
        return (-t).exp()

    got = quantile(p, lambda u: -np.log1p(-u), density)
    torch.testing.assert_close(got, -torch.log1p(-p))
    assert gradgradcheck(lambda u: quantile(u, lambda v: -np.log1p(-v), density), p)


@pytest.mark.parametrize(
    "make, error, text",
    [
        (lambda: program(eps=0.6), ValueError, r"eps: got 0.6, expected numbers in \(0, 1/2\]"),
        (lambda: program(eps=0.0), ValueError, "eps: got 0"),
        (lambda: program(eps=torch.tensor([0.1, 0.1, 0.1])), ValueError, "one a row"),
        (lambda: program(family="gaussian"), TypeError, "family: got 'gaussian'"),
        (lambda: ChanceConstrainedLP(torch.ones(N), moments(), eps=0.1), ValueError, "b missing"),
        (lambda: ChanceConstrainedLP(torch.ones(2), moments(), torch.ones(M), eps=0.1), ValueError,
         "rows of dimension 3"),
        (lambda: ChanceConstrainedLP(torch.ones(N), torch.ones(M, N), torch.ones(M), eps=0.1),
         TypeError, "moments: got Tensor"),
        (lambda: Moments(mean=torch.ones(M, N), factor=torch.ones(M, 2, 2)), ValueError, "factor"),
        (lambda: Moments(mean=torch.ones(M, N), factor=torch.ones(M, N, 2), shift=-1.0), ValueError,
         "shift: got -1"),
        (lambda: Moments(mean=torch.full((M, N), math.nan), factor=torch.ones(M, N, N)), ValueError,
         "mean: got nan at index"),
        (lambda: Moments.from_samples(normal(1, M, N)), ValueError, "samples: got 1"),
        (lambda: Moments.from_samples(normal(9, M, N), confidence=0.99), ValueError,
         "samples: got 9 of dimension 3, expected at least"),
        (lambda: Moments.from_samples(normal(9, M, N), confidence=1.5), ValueError, "confidence"),
        (lambda: Moments.from_samples(normal(9, M, N), confidence=0.9, bound=0.1), ValueError,
         "bound: got 0.1, but a sample is"),
        (lambda: StudentT(2.0), ValueError, "freedom: got 2"),
        (lambda: program().simulate(torch.ones(N), confidence=2.0), ValueError, "confidence"),
        (lambda: program(Radial(marginal=torch.special.ndtri)).simulate(torch.ones(N)), ValueError,
         "no `sampler`"),
        (lambda: ChanceConstrainedLayer(moments(), eps=0.5), ValueError, r"in \(0, 1/2\)"),
        (lambda: ChanceConstrainedLayer(moments(), eps=0.1, learn=("b",)), ValueError, "learn: got"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(make, error, text):
    with pytest.raises(error, match=text):
        make()
