"""Solvers: one conformance suite over all of them, then what each promises on its own."""

import dataclasses
import math
import tracemalloc
from dataclasses import dataclass

import pytest
import torch
from conformance import MEMBERS, Member, check_solver, check_trajectory, poisoned
from problems import PROBLEMS, affine, monotone_matrix, rand, randn, rms, row_sums

from implicitdl.activations import ELU, GELU, Identity, ReLU, SiLU, Tanh
from implicitdl.maps import AffineMap, RowMap
from implicitdl.solution import Status
from implicitdl.solvers import (
    Anderson,
    Auto,
    Broyden,
    FixedPointSolver,
    ForwardBackward,
    Newton,
    NewtonPicard,
    PeacemanRachford,
    Picard,
    from_config,
    get_solver,
)

DTYPES = [torch.float32, torch.float64]
SOLVERS = [
    Picard, Anderson, Broyden, Newton, NewtonPicard, ForwardBackward, PeacemanRachford, Auto
]  # fmt: skip
AFFINE_ONLY = (ForwardBackward, PeacemanRachford, NewtonPicard)
GENERAL = [Picard(), Anderson(), Broyden(), Newton(), Newton(linear="krylov"), Auto()]


def ids(x):
    return str(x) if isinstance(x, Member) else None


# --- the conformance suite


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("member", MEMBERS, ids=ids)
def test_conformance(member, name, dtype):
    problem = PROBLEMS[name](dtype)
    if not member.claims(problem):
        pytest.skip("not claimed")
    check_solver(member, problem, dtype)


@pytest.mark.parametrize("name", ["tanh", "closure", "monotone-relu"])
@pytest.mark.parametrize("member", MEMBERS, ids=ids)
def test_trajectory(member, name):
    problem = PROBLEMS[name](torch.float32)
    if not member.claims(problem):
        pytest.skip("not claimed")
    check_trajectory(member, problem)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("name", ["nonneg-0.9", "monotone-relu", "closure"])
@pytest.mark.parametrize("member", MEMBERS, ids=ids)
def test_an_ill_batch_mate_changes_nothing(member, name, value):
    """To the last bit; and the ill sample is named for what it is."""
    dtype = torch.float32
    problem = PROBLEMS[name](dtype)
    if not member.claims(problem):
        pytest.skip("not claimed")
    expected = member.solver.solve(problem.f, problem.z0)
    got = member.solver.solve(*poisoned(problem, 2, value))
    others = [0, 1, 3, 4]
    assert torch.equal(got.value[others], expected.value[others])
    assert torch.equal(got.steps[others], expected.steps[others])
    assert torch.equal(got.residual[others], expected.residual[others])
    assert bool(got.converged[others].all())
    saturated = value == -math.inf and name != "closure"  # relu(-inf) = 0 is an equilibrium
    if value != 1e30 and not saturated:
        assert got.statuses[2] in (Status.NONFINITE, Status.DIVERGED)
        assert not got.converged[2] and got.residual[2] == torch.inf
        assert bool(got.value[2].isfinite().all())  # the start: nothing better was seen


@pytest.mark.parametrize("solver", GENERAL, ids=str)
def test_a_diverging_batch_mate_changes_nothing(solver):
    """One sample whose map expands without a fixed point at hand."""
    w = randn(6, 4, seed=3).float()
    solver = dataclasses.replace(solver, max_steps=60)

    def f(z, ill):
        out = torch.tanh(w[:, :4] + 0.5 * z.roll(1, 1))
        return torch.where(torch.arange(6)[:, None] == 4, 3 * z * z + 1, out) if ill else out

    expected = solver.solve(lambda z: f(z, False), torch.zeros(6, 4, dtype=torch.float32))
    got = solver.solve(lambda z: f(z, True), torch.zeros(6, 4, dtype=torch.float32))
    others = [0, 1, 2, 3, 5]
    assert torch.equal(got.value[others], expected.value[others])
    assert bool(got.converged[others].all()) and not got.converged[4]
    assert got.statuses[4] in (Status.DIVERGED, Status.MAX_STEPS, Status.STALLED)


def test_a_huge_ratio_is_not_an_infinite_value():
    """f(z) = 0 with atol = 0 makes the scaled residual overflow; nothing is infinite in it."""
    f = AffineMap(-torch.eye(2), torch.tensor([[-1.0, -2.0]]), ReLU())
    for dtype in DTYPES:
        g = dataclasses.replace(f, A=f.A.to(dtype), v=f.v.to(dtype))
        for solver in (Picard(atol=0.0), Anderson(atol=0.0), Newton(atol=0.0)):
            solution = solver.solve(g, torch.full((1, 2), 10.0, dtype=dtype))
            assert solution.status is Status.CONVERGED and not solution.value.any(), solver


def test_growth_beyond_all_bounds_is_called_divergence():
    solution = Picard().solve(lambda z: 3 * z * z + 1, torch.ones(2, 1))
    assert solution.statuses == [Status.DIVERGED] * 2


@pytest.mark.parametrize("where", ["start", "data"])
def test_nan_at_the_start_is_called_nonfinite(where):
    problem = PROBLEMS["nonneg-0.9"](torch.float64)
    if where == "data":
        solution = Anderson().solve(*poisoned(problem, 0, math.nan))
    else:
        z0 = problem.z0.clone()
        z0[0, 3] = math.nan
        solution = Anderson().solve(problem.f, z0)
    assert solution.statuses == [Status.NONFINITE] + [Status.CONVERGED] * 4


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden(), Auto()], ids=str)
def test_a_sample_is_what_it_is_in_a_smaller_batch(solver):
    """Batches of 96 and of 64 of them: the same bits."""
    problem = affine("big", row_sums(randn(64, 64), 0.9), ReLU(), 10, batch=96, dtype=torch.float32)
    f = dataclasses.replace(problem.f, contraction=0.9001)
    whole = solver.solve(f, problem.z0)
    part = solver.solve(dataclasses.replace(f, v=f.v[:64]), problem.z0[:64])
    assert torch.equal(whole.value[:64], part.value)


# --- sizes


@pytest.mark.parametrize("member", MEMBERS, ids=ids)
@pytest.mark.parametrize("batch, n", [(0, 4), (1, 4), (1, 1), (3, 1), (2, 0), (0, 0)])
def test_small_sizes(member, batch, n):
    A = -0.4 * torch.eye(n)
    f = AffineMap(A, randn(batch, n), ReLU(), monotone=1.0)
    solution = member.solver.solve(f, torch.zeros(batch, n), record=True)
    assert solution.status is Status.CONVERGED and solution.value.shape == (batch, n)
    assert torch.allclose(solution.value, f.v.relu() / 1.4, atol=1e-9)
    frames = solution.stats["trajectory"]
    assert frames.shape == (solution.stats["evaluations"] + 1, batch, n)
    closure = (lambda z: torch.relu(f.v - 0.4 * z)) if n else (lambda z: z)
    if not isinstance(member.solver, AFFINE_ONLY):
        got = member.solver.solve(closure, torch.zeros(batch, n))
        assert torch.allclose(got.value, solution.value, atol=1e-9)


# --- compaction


class Uneven:
    """Rows that converge after very different numbers of steps, as an AffineMap."""

    def __init__(self, dtype, slow=5, batch=100):
        n = 24
        A = row_sums(rand(n, n, seed=1), 0.95)
        z = randn(batch, n, seed=2) - 4  # all states at zero: done at once
        z[:slow] += 7  # all active
        x = z.relu()
        self.exact = x
        self.f = AffineMap(A.to(dtype), (z - x @ A.mT).to(dtype), ReLU(), contraction=0.951)
        self.z0 = torch.zeros(batch, n, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("member", MEMBERS, ids=ids)
def test_compaction_is_invisible(member, dtype, monkeypatch):
    case = Uneven(dtype)
    sizes = []
    call = AffineMap.__call__
    monkeypatch.setattr(
        AffineMap, "__call__", lambda f, z, out=None: sizes.append(len(z)) or call(f, z, out)
    )
    solver = member.solver
    if isinstance(solver, ForwardBackward) and dtype == torch.float32:
        solver = dataclasses.replace(solver, rtol=1e-4)  # its short steps drown in rounding
    if isinstance(solver, ForwardBackward | PeacemanRachford):
        case.f = dataclasses.replace(case.f, A=monotone_matrix(24).to(dtype), contraction=None)
        case.exact = None
    got = solver.solve(case.f, case.z0, record=True)
    assert got.status is Status.CONVERGED
    monkeypatch.setattr(AffineMap, "select", lambda f, index: None)
    expected = solver.solve(case.f, case.z0, record=True)
    assert got.stats["trajectory"].shape == expected.stats["trajectory"].shape
    assert torch.equal(got.value, expected.value)
    assert torch.equal(got.steps, expected.steps) and torch.equal(got.codes, expected.codes)
    assert torch.equal(got.stats["trajectory"], expected.stats["trajectory"])
    if case.exact is not None:
        assert torch.allclose(
            got.value.double(), case.exact, atol=3e-4 if dtype.itemsize == 4 else 1e-9
        )
    if isinstance(solver, Picard):
        assert min(sizes) == 16  # it happened, down to a multiple of 16 rows


@pytest.mark.parametrize("solver", GENERAL, ids=str)
def test_an_early_sample_in_float32(solver):
    """dR = 0 for a sample that starts at its answer: the textbook 5 x 5 system is singular."""
    A = row_sums(rand(16, 16, seed=1), 0.97).float()
    v = rand(4, 16).float()
    v[1] = 0.0  # done at once: x = 0
    v[2] = -1.0
    f = AffineMap(A, v, ReLU())
    solution = solver.solve(f, torch.zeros(4, 16, dtype=torch.float32))
    assert solution.status is Status.CONVERGED
    exact = torch.linalg.solve(torch.eye(16) - A.double(), v.double().mT).mT
    assert torch.equal(solution.value[1:3], torch.zeros(2, 16, dtype=torch.float32))
    assert torch.allclose(solution.value[[0, 3]].double(), exact[[0, 3]], rtol=1e-3)


# --- starts, scales, tolerances


@pytest.mark.parametrize("member", MEMBERS, ids=ids)
def test_a_warm_start_saves_work(member):
    problem = PROBLEMS["tanh"](torch.float64)
    if not member.claims(problem):
        pytest.skip("not claimed")
    cold = member.solver.solve(problem.f, problem.z0)
    again = member.solver.solve(problem.f, cold.value)
    assert int(again.steps.max()) <= 2 < int(cold.steps.max())
    near = member.solver.solve(problem.f, problem.exact + 1e-6 * randn(*problem.exact.shape))
    assert int(near.steps.sum()) < int(cold.steps.sum())
    assert torch.allclose(near.value, cold.value, atol=1e-10)


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1e4, 1e8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("member", MEMBERS, ids=ids)
def test_the_answer_scales_with_the_input(member, scale, dtype):
    """phi = ReLU: x(c v) = c x(v), for tolerances that are relative."""
    contraction = isinstance(member.solver, ForwardBackward | PeacemanRachford)
    A = monotone_matrix(16) if contraction else row_sums(randn(16, 16), 0.9)
    problem = affine("scale", A, ReLU(), 30, dtype=dtype, scale=scale)
    solver = dataclasses.replace(member.solver, atol=0.0)
    allowed = 1e-4 if dtype == torch.float32 else 1e-9
    if isinstance(solver, ForwardBackward) and dtype == torch.float32:
        # Steps of length m / L^2 drown in rounding before the default tolerance is reached.
        solver, allowed = dataclasses.replace(solver, rtol=1e-4), 1e-2
    solution = solver.solve(problem.f, problem.z0)
    assert solution.status is Status.CONVERGED
    assert float((rms(solution.value - problem.exact) / rms(problem.exact)).max()) < allowed


def test_tolerances_mean_the_same_at_every_width():
    """||.|| is a root mean square: an un-normalised norm would ask n times more of a wide state."""
    for n in (1, 100, 10000):
        f = AffineMap(torch.zeros(1, 1), torch.ones(1, n), Identity())
        del f
        solution = Picard(rtol=1e-3, atol=0.0, max_steps=1).solve(
            lambda z: torch.full_like(z, 1.001), torch.ones(1, n)
        )
        assert float(solution.residual) == pytest.approx(0.999, rel=1e-3)
        absolute = Picard(rtol=1e-9, atol=1e-2, max_steps=1).solve(
            lambda z: torch.full_like(z, 1.001), torch.ones(1, n)
        )
        assert float(absolute.residual) == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("member", MEMBERS, ids=ids)
def test_a_looser_tolerance_costs_less_and_is_kept(member):
    problem = PROBLEMS["nonneg-0.5"](torch.float64)
    if not member.claims(problem):
        pytest.skip("not claimed")
    loose = dataclasses.replace(member.solver, rtol=1e-2, atol=0.0).solve(problem.f, problem.z0)
    tight = dataclasses.replace(member.solver, rtol=1e-10).solve(problem.f, problem.z0)
    assert int(loose.steps.sum()) < int(tight.steps.sum())
    error = rms(loose.value - problem.exact) / rms(problem.exact)
    assert bool((error < 2e-2 * problem.constant).all()) and bool((error > 1e-9).any())


@pytest.mark.parametrize("member", MEMBERS, ids=ids)
def test_the_step_limit_is_kept_and_said(member):
    problem = PROBLEMS["tanh"](torch.float64)
    f = problem.f
    if isinstance(member.solver, ForwardBackward | PeacemanRachford):
        f = PROBLEMS["monotone-tanh"](torch.float64).f
    calls = []
    solver = dataclasses.replace(member.solver, max_steps=3, rtol=1e-14, atol=0.0)
    if not isinstance(solver, AFFINE_ONLY):
        affine_map = f

        def f(z):
            calls.append(z)
            return affine_map(z)

    solution = solver.solve(f, problem.z0, record=True)
    if solver.name in ("Picard", "Anderson", "Broyden"):
        assert len(calls) == 3
    assert solution.statuses == [Status.MAX_STEPS] * 5
    assert solution.steps.tolist() == [3] * 5 and solution.stats["evaluations"] == 3
    assert bool((solution.residual >= 1).all()) and bool(solution.residual.isfinite().all())
    # The best of what was seen, and its residual: not the last.
    frames = solution.stats["trajectory"]
    assert frames.shape[0] == 4


def test_the_best_iterate_is_kept():
    """A map that comes close and goes away again."""
    points = iter([0.0, 10.0, 1.0, 1.01, 7.0, 20.0, 40.0])
    solution = Picard(max_steps=6, rtol=1e-6).solve(
        lambda z: torch.full_like(z, next(points)), torch.full((1, 1), 5.0)
    )
    # Iterates 5, 0, 10, 1, 1.01, 7: the residual |f(z) - z| / |f(z)| is least at 1 -> 1.01,
    # provided that the solver looked there.
    assert solution.status is Status.MAX_STEPS
    everywhere = _Looking(max_steps=6, rtol=1e-6)
    points = iter([0.0, 10.0, 1.0, 1.01, 7.0, 20.0, 40.0])
    solution = everywhere.solve(lambda z: torch.full_like(z, next(points)), torch.full((1, 1), 5.0))
    assert solution.value.item() == 1.0
    assert solution.residual.item() == pytest.approx(0.01 / (1e-10 + 1.01e-6), rel=1e-3)


@dataclass(frozen=True, kw_only=True)
class _Looking(FixedPointSolver):
    def step(self, f, z, fz, state):
        return fz, f(fz), state


def test_rounding_is_called_by_its_name():
    """A tolerance below rounding stalls, long before the step limit; the best is still kept."""

    def jumps_by(size):  # at the size of rounding noise; above it, a map without a fixed point
        return lambda z: 1 + size * torch.where(z < 1, 1.0, -1.0)

    z0 = torch.full((3, 1), 1.5)
    solution = _Looking(rtol=1e-16, atol=0.0, max_steps=100000).solve(jumps_by(1e-15), z0)
    assert solution.statuses == [Status.STALLED] * 3
    assert solution.stats["evaluations"] < 300
    assert torch.allclose(solution.value, torch.ones(3, 1), atol=3e-15)
    solution = _Looking(rtol=1e-12, atol=0.0, max_steps=500).solve(jumps_by(1e-6), z0)
    assert solution.statuses == [Status.MAX_STEPS] * 3


def test_slow_progress_is_not_rounding():
    """A rate of 0.99 a step gains nothing to speak of in one step, and still arrives."""
    for kappa in (0.95, 0.99):
        f = AffineMap(torch.full((1, 1), kappa), torch.tensor([[1.0], [0.0]]), Identity())
        for solver in (Picard(max_steps=100000), _Looking(max_steps=100000)):
            solution = solver.solve(f, torch.zeros(2, 1))  # one of them is done at once
            assert solution.status is Status.CONVERGED, (solver, solution.statuses)
            assert float(solution.value[0]) == pytest.approx(1 / (1 - kappa), rel=1e-8)


def test_a_certified_contraction_is_honest_in_the_norm_that_is_reported():
    """f contracts in the infinity norm and grows the rms norm by up to sqrt(n) in one step: the
    residual that is reported must be that of the value that is returned."""
    n = 400
    A = torch.zeros(n, n)
    A[:, 0] = 0.9  # x_i = 0.9 x_0 + v_i: row sums 0.9, rms of A e_0 is 0.9 sqrt(n) that of e_0
    f = AffineMap(A, torch.ones(1, n), Identity(), contraction=0.9)
    z0 = torch.full((1, n), 10.0)  # the answer, and the error whose residual is 1e-4 e_0
    z0 += 9e-4
    z0[0, 0] += 1e-4
    for solver in (Picard(rtol=1e-6, atol=0.0), Anderson(rtol=1e-6, atol=0.0)):
        solution = solver.solve(f, z0)
        assert solution.status is Status.CONVERGED
        fx = f(solution.value)
        found = rms(fx - solution.value) / (1e-6 * rms(fx))
        assert float(found) <= 1.01 * float(solution.residual) + 1e-3, (solver, found)


# --- options


@pytest.mark.parametrize("cls", SOLVERS)
@pytest.mark.parametrize(
    "options",
    [
        {"rtol": 0.0}, {"rtol": -1e-6}, {"rtol": 1.0}, {"rtol": math.nan},
        {"atol": -1e-9}, {"atol": math.nan}, {"atol": math.inf},
        {"max_steps": 0}, {"max_steps": -3}, {"max_steps": 2.5},
    ],
    ids=str,
)  # fmt: skip
def test_common_options_are_checked(cls, options):
    (name,) = options
    with pytest.raises(ValueError, match=rf"{cls.__name__}: {name}=.*expected"):
        cls(**options)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Picard(damping=1.0), "damping=1.0"),
        (lambda: Picard(damping=-0.1), "damping=-0.1"),
        (lambda: Anderson(memory=0), "memory=0"),
        (lambda: Anderson(memory=2.5), "memory=2.5"),
        (lambda: Anderson(growth=0.5), "growth=0.5"),
        (lambda: Broyden(memory=0), "memory=0"),
        (lambda: Broyden(growth=math.nan), "growth=nan"),
        (lambda: Newton(linear="lu"), "linear='lu'"),
        (lambda: Newton(forcing=0.0), "forcing=0.0"),
        (lambda: Newton(forcing=1.0), "forcing=1.0"),
        (lambda: ForwardBackward(alpha=0.0), "alpha=0.0"),
        (lambda: PeacemanRachford(alpha=-1.0), "alpha=-1.0"),
    ],
)
def test_own_options_are_checked(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert words in str(error.value) and "expected" in str(error.value)


def test_options_are_keywords_and_nothing_is_ignored():
    with pytest.raises(TypeError):
        Picard(1e-3)
    with pytest.raises(TypeError, match="max_step"):
        Picard(max_step=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Picard().rtol = 1e-3


@pytest.mark.parametrize("member", MEMBERS, ids=ids)
def test_config_round_trip(member):
    solver = dataclasses.replace(member.solver, rtol=1e-3, atol=1e-5, max_steps=77)
    config = solver.to_config()
    assert from_config(config) == solver and config == solver.to_config()
    assert config["name"] == type(solver).__name__ and config["max_steps"] == 77
    assert from_config({"name": solver.name}) == type(solver)()


def test_get_solver():
    assert get_solver("auto") == Auto() and get_solver("peaceman_rachford") == PeacemanRachford()
    assert get_solver("forward-backward") == ForwardBackward()
    assert get_solver("Anderson", memory=3) == Anderson(memory=3)
    own = Picard(rtol=1e-3)
    assert get_solver(own) is own and get_solver(own, atol=1.0) == Picard(rtol=1e-3, atol=1.0)
    with pytest.raises(ValueError, match="Did you mean 'anderson'"):
        get_solver("andersen")
    with pytest.raises(ValueError, match="Did you mean 'memory'"):
        get_solver("anderson", memroy=3)
    with pytest.raises(ValueError, match="solver"):
        get_solver(3)
    with pytest.raises(ValueError, match="Did you mean 'Newton'"):
        from_config({"name": "Neuton"})
    with pytest.raises(ValueError, match="solver"):
        from_config({})


# --- each on its own


def test_a_solver_of_ones_own():
    """Under 20 lines, and everything of the loop works with it: freezing, records, configs."""

    @dataclass(frozen=True, kw_only=True)
    class Aitken(FixedPointSolver):
        """Steffensen's extrapolation, entry by entry."""

        def step(self, f, z, fz, state):
            ffz = f(fz)
            bend = ffz - 2 * fz + z
            safe = bend.abs() > 1e-12
            z = torch.where(safe, z - (fz - z) ** 2 / torch.where(safe, bend, 1.0), ffz)
            return z, f(z), state

    a = torch.tensor([[0.3], [0.7], [0.9]])
    solution = get_solver("aitken", rtol=1e-12).solve(
        lambda z: a * z.cos(), torch.zeros(3, 1), record=True
    )
    assert solution.status is Status.CONVERGED
    assert torch.allclose(solution.value, a * solution.value.cos(), atol=1e-11)
    assert int(solution.steps.max()) < 8 and solution.stats["solver"] == "Aitken"
    assert from_config(Aitken(rtol=0.5).to_config()) == Aitken(rtol=0.5)


def test_picard_on_a_triangular_map_is_exact_after_n_steps():
    A = torch.triu(3 * randn(12, 12), diagonal=1)
    problem = affine("triangular", A, ReLU(), 1.0, acyclic=True)
    solution = Picard(max_steps=13).solve(problem.f, problem.z0)
    assert bool((rms(solution.value - problem.exact) < 1e-8 * rms(problem.exact)).all())


def test_picard_does_not_keep_a_buffer_that_moves_on():
    values = []
    a = torch.tensor([[0.9], [0.1]])
    solution = Picard().solve(lambda z: a * z + 1, torch.zeros(2, 1), record=True)
    values = solution.stats["trajectory"][:5, 0, 0].tolist()
    assert values == pytest.approx([0.0, 1.0, 1.9, 2.71, 3.439])
    affine_map = AffineMap(torch.full((1, 1), 0.9), torch.ones(1, 1), Identity())
    frames = Picard().solve(affine_map, torch.zeros(1, 1), record=True).stats["trajectory"]
    assert frames[:5, 0, 0].tolist() == pytest.approx([0.0, 1.0, 1.9, 2.71, 3.439])


def test_damping_is_what_it_says():
    frames = (
        Picard(damping=0.25)
        .solve(lambda z: 0.5 * z + 1, torch.zeros(1, 1), record=True)
        .stats["trajectory"]
    )
    z, expected = 0.0, []
    for _ in range(4):
        expected.append(z)
        z = 0.75 * (0.5 * z + 1) + 0.25 * z
    assert frames[:4, 0, 0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("declared", [True, False])
def test_anderson_is_never_much_worse_than_picard(declared):
    """Over many random contractions of every kind, in evaluations of f."""
    ratios = []
    for seed in range(60):
        n = int(torch.randint(2, 40, (), generator=torch.Generator().manual_seed(seed)))
        kappa = [0.3, 0.6, 0.9, 0.97][seed % 4]
        A = (rand if seed % 3 else randn)(n, n, seed=seed)
        if seed % 5 == 0:
            A = torch.diag(A.diagonal()) + 1e-3 * A  # decoupled states of many rates
        phi = [ReLU(), Tanh(), ELU()][seed % 3]
        problem = affine("random", row_sums(A, kappa), phi, 1.0, batch=3, seed=seed)
        f = dataclasses.replace(problem.f, contraction=kappa if declared else None)
        anderson = Anderson(rtol=1e-9).solve(f, problem.z0)
        picard = _Looking(rtol=1e-9).solve(f, problem.z0)
        assert anderson.status is Status.CONVERGED, (seed, anderson.statuses)
        ratios.append(float((anderson.steps / picard.steps).max()))
        assert int(anderson.steps.max()) <= int(picard.steps.max()) * 1.5 + 5, seed
    assert sum(ratios) / len(ratios) < 1.0


def test_anderson_on_an_affine_map_is_a_krylov_method():
    """n + 2 evaluations at most where the memory holds the whole space."""
    n = 8
    A = 3 * randn(n, n) / n**0.5  # not a contraction
    problem = affine("linear", A, Identity(), 1.0)
    solution = Anderson(memory=12, rtol=1e-8, growth=1e6).solve(problem.f, problem.z0)
    assert int(solution.steps.max()) <= n + 3
    assert torch.allclose(solution.value, problem.exact, atol=1e-5)


def test_broyden_ends_on_affine_maps():
    """After 2 n steps, whatever the Jacobian (Gay 1979)."""
    for seed in range(5):
        n = 5
        A = randn(n, n, seed=seed) / n**0.5
        problem = affine("linear", A, Identity(), 1.0, seed=seed)
        solution = Broyden(memory=20, rtol=1e-9, growth=1e6).solve(problem.f, problem.z0)
        assert int(solution.steps.max()) <= 2 * n + 2, seed
        assert torch.allclose(solution.value, problem.exact, atol=1e-6)


@pytest.mark.parametrize("solver", [Anderson(), Broyden()], ids=str)
def test_memory_does_not_grow_with_the_step_limit(solver):
    """What is live at the end of a long solve is what was live early on."""
    z = torch.zeros(4, 50)
    f = AffineMap(0.3 * randn(50, 50), torch.ones(4, 50), Tanh())
    sizes = []
    for max_steps in (40, 100000):
        limited = dataclasses.replace(solver, max_steps=max_steps)
        state = limited.init(f, z, f(z))
        total, x, fx = 0, z, f(z)
        for _ in range(30):
            x, fx, state = limited.step(f, x, fx, state)
            total = max(total, _numbers(state))
        sizes.append(total)
    assert sizes[0] == sizes[1] <= (2 * solver.memory + 8) * z.numel() + 100 * z.shape[0]


def _numbers(state) -> int:
    if isinstance(state, torch.Tensor):
        return state.numel()
    return sum(map(_numbers, state)) if isinstance(state, tuple) else 0


def test_no_step_holds_on_to_python_objects():
    problem = PROBLEMS["nonneg-0.99"](torch.float64)
    solver = Picard(rtol=1e-15, atol=0.0, max_steps=200)
    solver.solve(problem.f, problem.z0)
    tracemalloc.start()
    dataclasses.replace(solver, max_steps=2000).solve(problem.f, problem.z0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200_000


def test_newton_ends_on_piecewise_linear_maps():
    problem = PROBLEMS["monotone-relu"](torch.float64)
    solution = Newton(linear="direct").solve(problem.f, problem.z0)
    assert int(solution.steps.max()) <= 8
    assert torch.allclose(solution.value, problem.exact, atol=1e-12)


def test_newton_direct_is_quadratic_on_smooth_maps():
    problem = PROBLEMS["tanh"](torch.float64)
    frames = Newton(linear="direct").solve(problem.f, problem.z0, record=True).stats["trajectory"]
    assert len(frames) <= 9


@pytest.mark.parametrize("n", [100, 140])  # batched LU below 128 states, one by one above
def test_newton_direct_at_both_sizes(n):
    problem = affine("sizes", row_sums(randn(n, n), 0.95), ReLU(), 20, batch=2)
    solution = Newton(linear="direct").solve(problem.f, problem.z0)
    assert torch.allclose(solution.value, problem.exact, atol=1e-9)


@pytest.mark.parametrize("linear", ["direct", "krylov"])
def test_newton_gets_over_a_singular_start(linear):
    """I - J is singular where it begins: z = u + z - z^3 from 0."""
    u = torch.tensor([[8.0], [1.0], [-27.0]])
    solution = Newton(linear=linear).solve(lambda z: u + z - z**3, torch.zeros(3, 1))
    assert solution.status is Status.CONVERGED
    assert torch.allclose(solution.value, torch.tensor([[2.0], [1.0], [-3.0]]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kappa", [0.9, 0.99, 0.999])
def test_newton_picard_does_not_mind_the_perron_root(kappa, dtype):
    """For a dense A >= 0 the rate is that of the rest, about kappa / sqrt(3 n) per step."""
    A, v = row_sums(rand(200, 200, seed=2), kappa), rand(20, 200)
    exact = torch.linalg.solve(torch.eye(200) - A, v.mT).mT  # all states are active
    f = AffineMap(A.to(dtype), v.to(dtype), ReLU())
    rtol = 1e-5 if dtype == torch.float32 else 1e-10
    solution = NewtonPicard(rtol=rtol).solve(f)
    assert solution.status is Status.CONVERGED
    assert int(solution.steps.max()) <= (6 if dtype == torch.float32 else 10)
    assert torch.allclose(solution.value.double(), exact, rtol=10 * rtol / (1 - kappa))
    plain = Picard(rtol=rtol, max_steps=100000).solve(f)
    assert int(plain.steps.max()) > 10 * int(solution.steps.max())


def test_newton_picard_is_exact_in_one_step_for_a_matrix_of_rank_one():
    U, V = rand(30, seed=1), rand(30, seed=2)
    A = 0.95 * torch.outer(U, V) / (U @ V)
    for phi, inner in ((Identity(), None), (ReLU(), 8), (Tanh(), 12)):
        problem = affine("rank one", A, phi, 20)
        solution = NewtonPicard(inner=inner, rtol=1e-11).solve(problem.f)
        assert solution.status is Status.CONVERGED and solution.stats["evaluations"] <= 2, phi
        assert torch.allclose(solution.value, problem.exact, atol=1e-8)


def test_newton_picard_refuses_what_has_no_dominant_direction():
    for f in (lambda z: z / 2, AffineMap(torch.zeros(2, 3, 3), torch.zeros(4, 3), ReLU())):
        with pytest.raises(TypeError, match="NewtonPicard needs x = phi"):
            NewtonPicard().solve(f, torch.zeros(4, 3))
    with pytest.raises(ValueError, match="inner=0, expected an integer >= 1"):
        NewtonPicard(inner=0)


def test_newton_picard_takes_plain_steps_where_its_coarse_equation_may_have_two_solutions():
    """A = u v^T with u^T v = 0.3 and sum |u_i v_i| = 2.7: with one state off V^T D U = 1.5."""
    A = torch.outer(torch.ones(2), torch.tensor([1.5, -1.2]))
    f = AffineMap(A, torch.tensor([[0.1, 0.2], [0.3, -0.1]]), ReLU())
    assert f.factors.dominant().spread > 1
    *_, (fixed, _) = NewtonPicard().begin(f, torch.zeros(2, 2))
    assert fixed.inner == 0
    small = dataclasses.replace(f, A=0.3 * A)
    *_, (fixed, _) = NewtonPicard().begin(small, torch.zeros(2, 2))
    assert fixed.inner > 0


def test_what_was_found_out_about_a_matrix_is_not_used_for_another():
    A, B = row_sums(rand(20, 20), 0.9), row_sums(rand(20, 20, seed=5), 0.9).mT
    f = AffineMap(A, rand(3, 20), ReLU())
    found = f.factors.dominant()
    assert torch.allclose(found.V, A.mT @ found.U) and abs(found.rate - 0.9) < 0.02
    assert dataclasses.replace(f, v=f.v + 1).factors is f.factors
    assert dataclasses.replace(f, A=A.clone()).factors is not f.factors
    other = dataclasses.replace(f, A=B)
    assert torch.allclose(other.factors.dominant().V, B.mT @ other.factors.dominant().U)
    assert f.factors.mT.of(A.mT) and not f.factors.mT.of(A) and f.factors.mT.mT is f.factors
    A.mul_(0.5)
    assert dataclasses.replace(f).factors is not f.factors
    M = monotone_matrix(150)
    g = AffineMap(M, rand(3, 150), ReLU())
    inverse = g.factors.resolvent(0.7)
    eye = torch.eye(150)
    assert torch.allclose(inverse @ (eye + 0.7 * (eye - M)), eye, atol=1e-12)
    assert g.factors.mT.resolvent(0.7).data_ptr() == inverse.data_ptr()  # the same, transposed
    assert torch.equal(g.factors.mT.resolvent(0.7), inverse.mT)
    norm = float(torch.linalg.matrix_norm(eye - M, 2))
    assert 0.7 * norm <= g.factors.norm() <= norm * (1 + 1e-12)


def test_a_measured_rate_tells_picard_when_to_look():
    f = AffineMap(0.5 * torch.eye(3), torch.ones(2, 3), Identity())
    *_, state = Picard(rate=0.5, rtol=1e-3).begin(f, None)
    looks = [k for k in range(1, 15) if Picard(rate=0.5, rtol=1e-3).look(k, 10, state)]
    assert looks == [10, 12, 14]  # 0.5^10 < 1e-3
    *_, state = Picard(rate=0.5, rtol=1e-3).begin(f, torch.zeros(2, 3))
    assert Picard(rate=0.5, rtol=1e-3).look(1, 10, state)  # a warm start may be the answer
    with pytest.raises(ValueError, match="rate=-1"):
        Picard(rate=-1)


def test_f_at_the_solution_is_kept():
    """So that an adjoint need not evaluate it again; also where samples end one by one."""
    problem = affine("image", row_sums(rand(40, 40), 0.9), Tanh(), 10, batch=30)
    for solver in (Auto(), Picard(max_steps=5000), Anderson(), NewtonPicard()):
        solution = solver.solve(problem.f)
        if solution.image is not None:
            assert torch.allclose(solution.image, problem.f(solution.value), atol=1e-14), solver
    assert Auto().solve(problem.f).image is not None
    case = Uneven(torch.float64, batch=30)  # ends one by one, at a loose tolerance
    for solver in (Picard(rtol=1e-3), NewtonPicard(rtol=1e-3), Anderson(rtol=1e-3)):
        solution = solver.solve(case.f, case.z0)
        assert solution.steps.unique().numel() > 1 and solution.image is not None, solver
        assert torch.allclose(solution.image, case.f(solution.value), atol=1e-12), solver


SPLITTINGS = [ForwardBackward, PeacemanRachford]


@pytest.mark.parametrize("cls", SPLITTINGS)
@pytest.mark.parametrize("phi", [SiLU(), GELU(), ELU(alpha=2.0)], ids=str)
def test_splittings_refuse_slopes_that_no_prox_has(cls, phi):
    f = AffineMap(-torch.eye(3), torch.zeros(2, 3), phi)
    with pytest.raises(ValueError, match=rf"{cls.__name__} needs slopes in \[0, 1\]"):
        cls().solve(f, torch.zeros(2, 3))


@pytest.mark.parametrize("cls", SPLITTINGS)
def test_splittings_refuse_what_is_not_monotone(cls):
    f = AffineMap(1.5 * torch.eye(3), torch.zeros(2, 3), ReLU())
    with pytest.raises(ValueError, match="not strongly monotone"):
        cls().solve(f, torch.zeros(2, 3))
    with pytest.raises(TypeError, match=f"{cls.__name__} splits"):
        cls().solve(lambda z: z / 2, torch.zeros(2, 3))
    several = AffineMap(-torch.eye(3).expand(2, 3, 3), torch.zeros(2, 3), ReLU())
    with pytest.raises(TypeError, match="one A for the batch"):
        cls().solve(several, torch.zeros(2, 3))


@pytest.mark.parametrize("cls", SPLITTINGS)
def test_splittings_solve_what_picard_cannot(cls):
    problem = PROBLEMS["monotone-relu"](torch.float64)
    assert float(torch.linalg.eigvals(problem.f.A).abs().max()) > 1
    assert Picard().solve(problem.f, problem.z0).status is not Status.CONVERGED
    solution = cls(max_steps=5000).solve(problem.f, problem.z0)
    assert torch.allclose(solution.value, problem.exact, atol=1e-9)


def test_peaceman_rachford_starts_where_it_is_told():
    """From the answer it stays there, for any step length; from nearby it comes no further off."""
    problem = PROBLEMS["monotone-tanh"](torch.float64)
    f, x = problem.f, problem.exact
    for alpha in (None, 0.1, 3.0):
        solver = PeacemanRachford(alpha=alpha)
        z, fz, state = solver.begin(f, x)
        assert torch.equal(z, x) and torch.allclose(fz, x, atol=1e-12)
        z, fz, state = solver.step(f, z, fz, state)
        assert torch.allclose(z, x, atol=1e-12) and torch.allclose(fz, x, atol=1e-12)
        assert not solver.exact(state)


def test_auto_asks_the_solver_whose_turn_it_is():
    problem = PROBLEMS["monotone-relu"](torch.float64)
    wide = affine("wide", monotone_matrix(64), ReLU(), 1.0, batch=64, monotone=0.59)
    *_, state = Auto().begin(wide.f, wide.z0)
    assert Auto().describe(state)["solver"] == "PeacemanRachford" and not Auto().exact(state)
    assert not Auto().overwrites(state)
    upper = dataclasses.replace(problem.f, monotone=None, acyclic=True)
    *_, state = Auto().begin(upper, problem.z0)  # Picard, which need not look at every step
    assert Auto().exact(state) and Auto().overwrites(state)
    looks = [Auto().look(k, 10, state) for k in range(1, 9)]
    assert looks == [Picard().look(k, 10, state[-1]) for k in range(1, 9)] and not all(looks)


def ring(n: int, kappa: float):
    """A >= 0 with row sums kappa on the nearest neighbours of a ring: no direction stands out."""
    A = torch.zeros(n, n)
    for i in range(n):
        A[i, (i + 1) % n], A[i, i - 1] = 0.6 * kappa, 0.4 * kappa
    return A


N = 64
SMALL, RING = row_sums(randn(N, N), 0.5), ring(N, 0.9)
CHOICES = [
    ("triangular", torch.triu(SMALL, 1), 5, {"acyclic": True}, "Picard", "triangular"),
    ("declared", SMALL, 5, {"contraction": 0.5}, "Picard", "contraction of factor 0.5, cheap"),
    ("measured", SMALL, 64, {}, "Picard", "plain steps contract by about 0.0"),
    ("positive", row_sums(rand(N, N), 0.99), 64, {}, "NewtonPicard", "one direction of A"),
    ("one", RING, 1, {}, "Newton", "LU"),
    ("monotone", SMALL, 64, {"monotone": 0.5}, "PeacemanRachford", "monotone, m = 0.5"),
    ("wide", row_sums(randn(513, 513), 0.5), 2, {"monotone": 0.5}, "Anderson", "m = 0.5"),
    ("contraction", RING, 64, {"contraction": 0.901}, "Anderson", "certified contraction"),
    ("nothing", RING, 64, {}, "Anderson", "nothing certified"),
]


@pytest.mark.parametrize(
    "kind, A, batch, facts, solver, reason", CHOICES, ids=[c[0] for c in CHOICES]
)
def test_auto_says_what_it_chose_and_why(kind, A, batch, facts, solver, reason):
    problem = affine(kind, A, ReLU(), 2.0, batch=batch, **facts)
    solution = Auto().solve(problem.f, problem.z0)
    assert solution.stats["solver"] == solution.stats["tried"][0] == solver
    assert reason in solution.stats["reason"], solution.stats["reason"]
    assert torch.allclose(solution.value, problem.exact, atol=1e-9)


def test_auto_hands_over_when_stuck():
    """A wrong declaration costs time, not the answer."""
    problem = PROBLEMS["monotone-relu"](torch.float64)
    f = dataclasses.replace(problem.f, monotone=None, contraction=None, acyclic=True)
    solution = Auto().solve(f, problem.z0)
    assert solution.status is Status.CONVERGED and len(solution.stats["tried"]) >= 2
    assert solution.stats["tried"][0] == "Picard"
    assert torch.allclose(solution.value, problem.exact, atol=1e-9)


def test_auto_passes_its_tolerances_on():
    problem = PROBLEMS["nonneg-0.9"](torch.float64)
    for rtol in (1e-3, 1e-12):
        for plan, _ in [Auto(rtol=rtol, atol=0.0, max_steps=9).choose(problem.f, 5, 24)]:
            assert all(s.rtol == rtol and s.atol == 0 and s.max_steps == 9 for s, _ in plan)


def test_every_solver_is_covered():
    """A new member of the package has to join MEMBERS."""
    import implicitdl.solvers

    public = {
        c
        for c in vars(implicitdl.solvers).values()
        if isinstance(c, type) and issubclass(c, FixedPointSolver) and c is not FixedPointSolver
    }
    assert public == set(SOLVERS) == {type(m.solver) for m in MEMBERS}


def test_solvers_leave_the_input_alone():
    problem = PROBLEMS["nonneg-0.9"](torch.float64)
    z0, v = problem.z0.clone(), problem.f.v.clone()
    for member in MEMBERS:
        if member.claims(problem):
            first = member.solver.solve(problem.f, problem.z0)
            kept = first.value.clone()
            member.solver.solve(problem.f, problem.z0 + 1)
            assert torch.equal(first.value, kept)
    assert torch.equal(problem.z0, z0) and torch.equal(problem.f.v, v)


def test_three_dimensional_a_is_one_matrix_a_group():
    A = torch.stack([row_sums(randn(6, 6, seed=s), 0.8) for s in range(3)])
    v = randn(6, 6, seed=9)  # two samples a group
    f = AffineMap(A, v, Tanh())
    each = [
        Anderson().solve(AffineMap(A[i], v[2 * i : 2 * i + 2], Tanh()), torch.zeros(2, 6)).value
        for i in range(3)
    ]
    for solver in GENERAL:
        solution = solver.solve(f, torch.zeros(6, 6))
        assert torch.allclose(solution.value, torch.cat(each), atol=1e-9), solver


# --- safeguards, one step at a time


def at_residual(value):
    """z, f(z) whose difference has that norm, along a direction of its own."""
    direction = torch.nn.functional.normalize(randn(2, 6, seed=int(1000 * value)), dim=1)
    z = randn(2, 6, seed=int(1000 * value) + 1)
    return z, z + value * direction


@pytest.mark.parametrize("cls", [Anderson, Broyden])
def test_a_bad_step_is_undone_from_the_best_iterate_seen(cls):
    """Residuals 1, 5, 80, 80: the first is the best; 5 is tolerated, 80 is not, not even twice."""
    solver, f = cls(), RowMap(lambda z: z / 2, torch.Size((2, 6)))
    z, fz = at_residual(1.0)
    good = fz.clone()
    state = solver.init(f, z, fz)
    *_, state = solver.step(f, z, fz, state)
    taken = []
    for value in (5.0, 80.0, 81.0):
        z, fz, state = solver.step(f, *at_residual(value), state)
        taken.append(z)
    assert not torch.equal(taken[0], good)
    assert torch.equal(taken[1], good) and torch.equal(taken[2], good)


def test_anderson_drops_a_difference_in_the_span_of_the_others():
    """What rounding leaves of it would be blown up to length one."""
    columns = torch.zeros(3, 2, 8)
    first = randn(2, 8, seed=1)
    Anderson._append(columns[:1], 0, first, 4)
    Anderson._append(columns[:2], 1, 3 * first + 1e-14 * randn(2, 8, seed=2), 4)
    assert not bool(columns[1].any())
    Anderson._append(columns, 2, randn(2, 8, seed=3), 4)
    r = columns[..., :4]
    gram = torch.einsum("imn,jmn->mij", r, r)
    assert torch.allclose(gram, torch.diag(torch.tensor([1.0, 0.0, 1.0])), atol=1e-12)


@pytest.mark.parametrize("alpha", [None, 0.1, 3.0])
def test_peaceman_rachford_stays_at_an_answer(alpha):
    problem = PROBLEMS["monotone-tanh"](torch.float64)
    solver = PeacemanRachford(alpha=alpha)
    x, fx, state = solver.begin(problem.f, problem.exact)
    for _ in range(3):
        x, fx, state = solver.step(problem.f, x, fx, state)
        assert torch.allclose(x, problem.exact, atol=1e-12)
        assert torch.allclose(fx, problem.exact, atol=1e-12)


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_the_best_is_not_lost_when_its_buffer_is_used_again(damping):
    """Residuals fall, then grow: one mode damped, one slowly taking over."""
    solver = Picard(damping=damping, max_steps=25, atol=1e-14)
    f = AffineMap(torch.diag(torch.tensor([0.2, 1.4])), torch.zeros(2, 2), Identity())
    solution = solver.solve(f, torch.tensor([[1.0, 1e-5], [2.0, 1e-5]]))
    assert solution.statuses == [Status.MAX_STEPS] * 2
    found = rms(f(solution.value) - solution.value)
    claimed = solution.residual * (solver.atol + 1e-12 * rms(f(solution.value)))
    assert torch.allclose(found, claimed, rtol=1e-3)
    assert bool((found < 1e-3).all())


def test_what_a_recurrence_calls_converged_is_checked():
    """A solver whose f(z) is not evaluated may claim what it likes: f itself decides."""

    @dataclass(frozen=True, kw_only=True)
    class _Claims(FixedPointSolver):
        def step(self, f, z, fz, state):
            z = f(z)
            return z, z.clone(), state

        def exact(self, state):
            return False

    f = AffineMap(0.5 * torch.eye(2), torch.ones(3, 2), Identity())
    solution = _Claims().solve(f, torch.zeros(3, 2))
    assert solution.status is Status.CONVERGED and int(solution.steps.min()) > 20
    assert torch.allclose(solution.value, torch.full((3, 2), 2.0), atol=1e-10)


@pytest.mark.parametrize("contraction", [None, 0.5])
@pytest.mark.parametrize("solver", [Anderson(growth=3.0), Broyden(growth=3.0)])
def test_a_step_beyond_the_tolerated_growth_is_undone(solver, contraction):
    """From 3 times the best residual, or from NaN, back to f at the best iterate; not before."""
    f = AffineMap(0.1 * torch.eye(2), torch.ones(4, 2), Identity(), contraction=contraction)
    z = torch.full((4, 2), 1.2)
    fz = f(z)
    far, _, state = solver.step(f, z, fz, solver.init(f, z, fz))
    far[0] += 100.0
    far[1, 0] = torch.nan
    far[2] += 0.01  # worse than it was, within reach
    z_next, f_next, _ = solver.step(f, far, f(far), state)
    assert torch.equal(z_next[:2], fz[:2])
    assert bool(z_next.isfinite().all()) and bool(f_next.isfinite().all())
    assert not (z_next[2:] == fz[2:]).all(dim=1).any()
