"""Layers: every set with every activation it admits, exact gradients, honest bounds, PyTorch manners."""

import copy
import io
import itertools
import pickle
from dataclasses import dataclass

import pytest
import torch
from problems import randn
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from implicitdl import (
    ConvergenceError,
    EquilibriumLayer,
    ImplicitLayer,
    ImplicitModel,
    ImplicitRNN,
    MonotoneLayer,
    fixed_point,
)
from implicitdl.activations import (
    ELU,
    GELU,
    Activation,
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
from implicitdl.implicit import Implicit, Neumann, OneStep, Unrolled
from implicitdl.solution import ConvergenceWarning, Status
from implicitdl.solvers import Anderson, Auto, Newton, PeacemanRachford, Picard
from implicitdl.wellposed import (
    InfNormBall,
    MatrixMeasure,
    Monotone,
    PerronFrobenius,
    StrictlyUpper,
)

SETS = ["inf-norm", "perron-frobenius", "matrix-measure", "monotone", "strictly-upper"]
PHIS = [
    ReLU(), Tanh(), LeakyReLU(), ELU(), Softplus(), Sigmoid(), HardTanh(), Identity(), SiLU(), GELU(),
    Softmax(), Blocks(parts=((Softmax(), 2), (ReLU(), 2), (Tanh(), 1))),
]  # fmt: skip
TIGHT = Auto(rtol=1e-13, atol=1e-15)
P, Q, N = 3, 2, 5
# Forward mode loads torch's own decompositions, which torch still scripts.
SCRIPT = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def name(x):
    return type(x).__name__ if not isinstance(x, str) else x


def admitted(name, phi):
    try:
        ImplicitLayer(P, Q, N, activation=phi, well_posed=name)
    except ValueError:
        return False
    return True


PAIRS = [(s, phi) for s, phi in itertools.product(SETS, PHIS) if admitted(s, phi)]
LAYERS = [
    *[lambda s=s, **k: ImplicitLayer(P, Q, N, well_posed=s, **k) for s in [*SETS, None]],
    lambda **k: ImplicitLayer(P, Q, N, low_rank=2, **k),
    lambda **k: MonotoneLayer(P, Q, N, **k),
]
LAYER_IDS = [*SETS, "free", "low-rank", "MonotoneLayer"]


def stretched(layer, factor=10.0, seed=3):
    """Weights far outside the set: the constraint is active everywhere."""
    with torch.no_grad():
        for key in ("W", "L", "R", "P", "S"):
            if key in layer._parameters:
                p = getattr(layer, key)
                p.copy_(randn(*p.shape, seed=seed) * factor * p.std())
        for p in (layer.b, layer.d):
            if p is not None:
                p.copy_(randn(*p.shape, seed=seed + 1) / 3)
    return layer


def functional(layer):
    """(function of u and all parameters, the parameters)"""
    names, values = zip(*layer.named_parameters(), strict=True)

    def f(u, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (u,))

    return f, values


# ---- what is computed ---------------------------------------------------------------------------


def test_the_admitted_pairs_are_those_that_theory_allows():
    got = {(s, type(phi).__name__) for s, phi in PAIRS}
    plain = {type(p).__name__ for p in PHIS} - {"SiLU", "GELU", "Softmax", "Blocks"}
    assert {p for s, p in got if s == "matrix-measure"} == plain
    assert {p for s, p in got if s == "strictly-upper"} == plain | {"SiLU", "GELU"}
    assert {p for s, p in got if s == "monotone"} == plain | {"Softmax", "Blocks"}
    assert {p for s, p in got if s == "inf-norm"} >= plain | {"Softmax", "Blocks"}
    # 0.95 times a slope of 1.0998 (SiLU) and 1.1290 (GELU) is above one.
    assert not got & {(s, p) for s in ("inf-norm", "perron-frobenius") for p in ("SiLU", "GELU")}


@pytest.mark.parametrize("well_posed, phi", PAIRS, ids=lambda x: name(x))
def test_every_set_with_every_activation_it_admits(well_posed, phi):
    layer = stretched(ImplicitLayer(P, Q, N, activation=phi, well_posed=well_posed, solver=TIGHT))
    u = randn(7, P, seed=5)
    A = layer.A.detach()
    assert layer.well_posed.contains(A, tol=1e-9) and not layer.well_posed.contains(
        layer.W.detach()
    )
    solution = layer.solve(u)
    x = solution.value
    torch.testing.assert_close(phi(x @ A.mT + u @ layer.B.mT + layer.b), x, rtol=0, atol=1e-11)
    y = layer(u)
    torch.testing.assert_close(y, x @ layer.C.mT + u @ layer.D.mT + layer.d, rtol=0, atol=1e-11)
    torch.testing.assert_close(layer.readout(x, u), y, rtol=0, atol=1e-11)
    torch.testing.assert_close(layer.model()(u, solver=TIGHT), y, rtol=0, atol=1e-10)
    assert solution.status is Status.CONVERGED and solution.residual.shape == (7,)
    y.sum().backward()
    for key, p in layer.named_parameters():
        assert p.grad is not None and bool(p.grad.isfinite().all()), key


@pytest.mark.parametrize("make", LAYERS, ids=LAYER_IDS)
def test_shapes_are_those_of_linear(make):
    layer, single = make(), randn(P)
    for shape in ((P,), (1, P), (4, P), (2, 3, P), (0, P), (2, 0, P)):
        u = randn(*shape)
        y = layer(u)
        assert y.shape == (*shape[:-1], Q) and layer.solve(u).value.shape == (*shape[:-1], N)
        assert layer.solve(u).converged.shape == shape[:-1]
        flat = layer(u.reshape(-1, P)).reshape(y.shape)
        torch.testing.assert_close(y, flat, rtol=0, atol=1e-11)
    torch.testing.assert_close(layer(single), layer(single[None])[0], rtol=0, atol=1e-11)


@pytest.mark.parametrize("make", LAYERS, ids=LAYER_IDS)
def test_without_bias_and_direct_term(make):
    layer = make(bias=False, direct=False)
    assert layer.b is None and layer.d is None and layer.D is None
    assert {k for k, _ in layer.named_parameters()} <= {"B", "C", "W", "L", "R", "P", "S"}
    u = randn(4, P)
    torch.testing.assert_close(layer(u), layer.solve(u).value @ layer.C.mT)
    torch.testing.assert_close(layer.model()(u), layer(u))
    assert not bool(layer(torch.zeros(1, P)).any())


def test_the_initial_weights():
    torch.manual_seed(0)
    layer = ImplicitLayer(200, 30, 100)
    layer.requires_grad_(False)
    assert float(layer.W.abs().max()) <= 0.95 / 100 < 1.02 * float(layer.W.abs().max())
    assert float(layer.B.std()) == pytest.approx((2 / 200) ** 0.5, rel=0.05)
    assert float(layer.C.std()) == pytest.approx(0.1, rel=0.05)
    assert float(layer.D.std()) == pytest.approx(0.5 / 200**0.5, rel=0.05)
    assert not bool(layer.b.any()) and not bool(layer.d.any())
    low = ImplicitLayer(200, 30, 100, low_rank=5).requires_grad_(False)
    W = (low.L @ low.R.mT).detach()
    assert float(W.std()) == pytest.approx(0.95 / 100 / 3**0.5, rel=0.25)
    assert torch.equal(layer.A, layer.W)  # inside, the set is the identity
    monotone = MonotoneLayer(20, 3, 100, margin=0.3).requires_grad_(False)
    assert float(monotone.P.std()) == pytest.approx(0.1, rel=0.05)
    assert float(monotone.S.std()) == pytest.approx(0.05, rel=0.05)


def test_the_monotone_weight():
    layer = stretched(MonotoneLayer(P, Q, N, margin=0.3))
    A = layer.A.detach()
    expected = 0.7 * torch.eye(N) - layer.P.mT @ layer.P + layer.S - layer.S.mT
    torch.testing.assert_close(A, expected.detach())
    assert float(torch.linalg.eigvalsh((A + A.mT) / 2).max()) <= 0.7 + 1e-12
    assert Monotone(0.3).contains(A, 1e-12) and layer.margin == 0.3


@pytest.mark.parametrize("well_posed", ["inf-norm", "perron-frobenius", None])
def test_low_rank_keeps_the_rank(well_posed):
    layer = ImplicitLayer(P, Q, 12, low_rank=3, well_posed=well_posed)
    for factor in (1.0, 10.0) if well_posed else (1.0,):
        stretched(layer, factor)
        assert int(torch.linalg.matrix_rank(layer.A)) == 3
        if well_posed:
            assert layer.well_posed.contains(layer.A.detach(), 1e-9)
    assert {"L", "R"} <= dict(layer.named_parameters()).keys() and not hasattr(layer, "W")
    assert sum(p.numel() for k, p in layer.named_parameters() if k in "LR") == 2 * 12 * 3


# ---- gradients ----------------------------------------------------------------------------------


@SCRIPT
@pytest.mark.parametrize(
    "make",
    [
        *[
            lambda s=s, phi=phi: ImplicitLayer(2, 2, 3, well_posed=s, activation=phi, solver=TIGHT)
            for s in SETS
            for phi in (Tanh(), ReLU())
        ],
        lambda: ImplicitLayer(2, 2, 3, low_rank=1, activation="tanh", solver=TIGHT),
        lambda: MonotoneLayer(2, 2, 3, activation="tanh", solver=Newton(rtol=1e-13)),
        lambda: MonotoneLayer(2, 2, 3, activation="relu", solver=TIGHT),
        lambda: ImplicitLayer(2, 2, 3, activation="softmax", solver=TIGHT),
    ],
)
def test_gradients_go_through_the_active_constraint(make):
    layer = stretched(make())
    f, values = functional(layer)
    u = randn(2, 2, seed=7).requires_grad_()
    assert gradcheck(f, (u, *values))
    if not isinstance(layer.well_posed, PerronFrobenius | Monotone) or hasattr(layer, "P"):
        # Those two go through an eigenvalue, which has no forward mode.
        assert gradcheck(f, (u, *values), check_forward_ad=True, check_backward_ad=False)


@pytest.mark.parametrize("make", LAYERS, ids=LAYER_IDS)
def test_second_derivatives_through_the_active_constraint(make):
    layer = make(activation="tanh", solver=TIGHT)
    if layer.well_posed is not None:
        stretched(layer)
    f, values = functional(layer)
    u = randn(2, P, seed=7).requires_grad_()
    assert gradgradcheck(f, (u, *values), fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("adjoint", [Unrolled(steps=400), Neumann(terms=200), OneStep(steps=200)])
@pytest.mark.parametrize("make", [LAYERS[0], LAYERS[1]], ids=LAYER_IDS[:2])
def test_every_adjoint_gives_the_same_in_the_limit(make, adjoint):
    layer = stretched(make(activation="tanh", solver=TIGHT))
    other = make(activation="tanh", solver=TIGHT, adjoint=adjoint)
    other.load_state_dict(layer.state_dict())
    u = randn(4, P)
    for model in (layer, other):
        model(u).pow(2).sum().backward()
    for a, b in zip(layer.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-8)


def test_biased_adjoints_reach_the_layer():
    exact = stretched(ImplicitLayer(P, Q, N))
    biased = stretched(ImplicitLayer(P, Q, N, adjoint="one_step"))
    biased.load_state_dict(exact.state_dict())
    u = randn(4, P)
    torch.testing.assert_close(exact(u), biased(u))
    a, b = (torch.autograd.grad(m(u).sum(), m.B)[0] for m in (exact, biased))
    assert float((a - b).norm() / a.norm()) > 0.05
    own = Picard(rtol=1e-5)
    assert ImplicitLayer(P, Q, N, adjoint=Implicit(solver=own)).equation.adjoint_solver == own


def test_the_state_and_the_model_are_differentiable():
    layer, u = stretched(ImplicitLayer(P, Q, N, solver=TIGHT)), randn(4, P)
    expected = torch.autograd.grad(layer(u).sum(), layer.W)[0]
    x = layer.solve(u).value
    torch.testing.assert_close(torch.autograd.grad(layer.readout(x, u).sum(), layer.W)[0], expected)
    y = layer.model()(u, solver=TIGHT)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), layer.W)[0], expected)


def test_eval_mode_and_no_grad():
    layer, u = ImplicitLayer(P, Q, N), randn(4, P)
    y = layer(u)
    layer.eval()
    assert torch.equal(layer(u), y) and layer(u).requires_grad
    with torch.no_grad():
        assert torch.equal(layer(u), y) and not layer(u).requires_grad
    with torch.inference_mode():
        assert torch.equal(layer(u), y)
    layer.requires_grad_(False)
    assert not layer(u).requires_grad and layer(u.requires_grad_()).requires_grad


def test_training_moves_every_parameter_and_stays_well_posed():
    torch.manual_seed(1)
    layer = ImplicitLayer(P, 1, 8, well_posed=InfNormBall(kappa=0.8))
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.03)
    u = randn(64, P)
    target = torch.sin(2 * u.sum(1, keepdim=True))
    losses = []
    before = {k: p.detach().clone() for k, p in layer.named_parameters()}
    for _ in range(120):
        loss = (layer(u) - target).pow(2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
        assert float(layer.A.detach().abs().sum(1).max()) <= 0.8 + 1e-9
    assert losses[-1] < losses[0] / 4
    assert all(not torch.equal(p, before[k]) for k, p in layer.named_parameters())


# ---- torch.func, torch.compile, torch.export ----------------------------------------------------


@SCRIPT
@pytest.mark.parametrize("make", [LAYERS[0], LAYERS[2], LAYERS[-1]], ids=["inf", "mm", "mon"])
def test_functional_transforms_of_a_layer(make):
    layer, u = stretched(make(activation="tanh", solver=TIGHT)), randn(4, P)
    expected = torch.autograd.functional.jacobian(layer, u)
    for jac in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(jac(layer)(u), expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(torch.func.vmap(layer)(u), layer(u))
    params = {k: p.detach() for k, p in layer.named_parameters()}

    def loss(params, w):
        return torch.func.functional_call(layer, params, (w[None],)).pow(2).sum()

    got = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, u)
    for i in range(4):
        layer.zero_grad()
        layer(u[i]).pow(2).sum().backward()
        for k, p in layer.named_parameters():
            torch.testing.assert_close(got[k][i], p.grad, rtol=1e-8, atol=1e-10)


def test_an_ensemble_by_vmap():
    layers = [stretched(ImplicitLayer(P, Q, N, solver=TIGHT), seed=s) for s in range(3)]
    u = randn(4, P)
    params, buffers = torch.func.stack_module_state(layers)

    def call(params, buffers, u):
        return torch.func.functional_call(layers[0], (params, buffers), (u,))

    got = torch.func.vmap(call, (0, 0, None))(params, buffers, u)
    torch.testing.assert_close(got, torch.stack([m(u) for m in layers]))


@pytest.mark.parametrize("make", [LAYERS[0], LAYERS[2], LAYERS[-1]], ids=["inf", "mm", "mon"])
def test_compiled_equals_eager(make):
    layer, u = stretched(make()), randn(4, P)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(u), layer(u))
    expected = torch.autograd.grad(layer(u).pow(2).sum(), list(layer.parameters()))
    got = torch.autograd.grad(compiled(u).pow(2).sum(), list(layer.parameters()))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("make", [LAYERS[0], LAYERS[-1]], ids=["inf", "mon"])
def test_exported_equals_eager(make):
    layer, u = stretched(make()), randn(4, P)
    exported = torch.export.export(layer, (u,))
    torch.testing.assert_close(exported.module()(u), layer(u))
    graphs = [m.graph for m in exported.graph_module.modules() if hasattr(m, "graph")]
    calls = [str(node.target) for graph in graphs for node in graph.nodes]
    assert calls.count("implicitdl.equilibrium.default") == 1


def test_a_closure_says_why_it_cannot_be_compiled():
    layer, u = EquilibriumLayer(lambda z, u: torch.tanh(z / 2 + u), P), randn(4, P)
    with pytest.raises(Exception, match="EquilibriumLayer cannot be compiled"):
        torch.compile(layer, fullgraph=True, backend="aot_eager")(u)
    with pytest.raises(Exception, match="EquilibriumLayer cannot be compiled"):
        torch.export.export(layer, (u,))


def test_an_activation_of_ones_own_works_in_eager_mode():
    class Half(Identity, register=False):
        slope = (0.5, 0.5)

        def __init__(self):
            object.__setattr__(self, "note", object())  # JSON cannot hold it

        def __call__(self, z):
            return z / 2

        def call_(self, z):
            return z.div_(2)

        def derivative(self, z):
            return torch.full_like(z, 0.5)

    layer, u = ImplicitLayer(P, Q, N, activation=Half(), solver=TIGHT), randn(4, P)
    x = layer.solve(u).value
    torch.testing.assert_close((x @ layer.A.mT + u @ layer.B.mT + layer.b) / 2, x)


# ---- precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", LAYERS, ids=LAYER_IDS)
def test_autocast(make):
    layer = make(dtype=torch.float32)
    u = randn(4, P).float()
    exact = layer(u)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(u)
        x = layer.solve(u).value
        again = layer(u.bfloat16())
    assert y.dtype is torch.bfloat16 and x.dtype is torch.float32
    assert torch.equal(x, layer.solve(u).value)  # the solve knows nothing of autocast
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05)
    torch.testing.assert_close(again.float(), exact, rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in layer.parameters())


def test_layers_in_half_precision_solve_in_float32():
    layer = ImplicitLayer(P, Q, N, dtype=torch.bfloat16)
    u = randn(4, P).bfloat16()
    assert layer(u).dtype is torch.bfloat16 and layer.solve(u).value.dtype is torch.float32
    layer(u).sum().backward()
    assert layer.W.grad.dtype is torch.bfloat16


def test_moving_to_another_dtype():
    layer = ImplicitLayer(P, Q, N, well_posed=PerronFrobenius(0.9, weights=torch.rand(N) + 0.5))
    u = randn(4, P)
    y = layer(u)
    torch.testing.assert_close(layer.float()(u.float()).double(), y, rtol=1e-4, atol=1e-5)
    assert layer.A.dtype is torch.float32
    meta = ImplicitLayer(P, Q, N, device="meta")
    assert meta.W.is_meta
    assert ImplicitLayer(P, Q, N, dtype=torch.float32)(u.float()).dtype is torch.float32


# ---- bounds -------------------------------------------------------------------------------------


def reference(layer, u):
    """The equilibrium of the float32 layer, its numbers taken exactly, in float64."""
    A = layer.A.detach().double()
    v = torch.nn.functional.linear(u, layer.B, layer.b).detach().double()
    return ImplicitModel(A, torch.eye(len(A)), torch.eye(len(A)), phi=layer.activation).solve(
        v, solver=Newton(rtol=1e-14, atol=1e-15), on_failure="return"
    )


@pytest.mark.parametrize("kind", [*SETS, "MonotoneLayer"])
def test_the_error_bound_bounds_the_error(kind):
    """Many random layers in float32, solved loosely, tightly and not at all."""
    checked, sharpest = 0, 0.0
    for seed in range(16):
        torch.manual_seed(seed)
        phi = ("relu", "tanh", "leaky_relu", "elu")[seed % 4]
        n = (4, 10, 16)[seed % 3]
        options = {"activation": phi, "dtype": torch.float32}
        options["solver"] = (Anderson(rtol=1e-2), Anderson(rtol=1e-6), Auto())[seed % 3]
        if kind == "MonotoneLayer":
            layer = MonotoneLayer(P, Q, n, **options)
        else:
            layer = stretched(ImplicitLayer(P, Q, n, well_posed=kind, **options), 1 + seed, seed)
        u = (10.0 ** (seed % 5 - 2) * randn(6, P, seed=seed)).float()
        solution = layer.solve(u, on_failure="return")
        if seed % 4 == 3:  # far away: a start that was never solved
            layer.solver = Picard(max_steps=1)
            solution = layer.solve(u, x0=randn(6, n).float(), on_failure="return")
            assert not bool(solution.converged.any())
        exact = reference(layer, u)
        if not bool(exact.converged.all()):
            continue
        proof = layer.certificate(refute=False)
        error = proof.measure(solution.value.detach().double() - exact.value)
        bound = solution.error_bound
        assert bound.shape == (6,) and bound.dtype is torch.float64
        assert bool((error <= bound * (1 + 1e-6) + 1e-13).all()), (seed, error, bound)
        sharpest = max(sharpest, float((error / bound).max()))
        checked += 1
    assert checked >= 12 and sharpest > 0.01  # a bound that is infinite would pass, too


def test_bounds_over_batches_and_none_where_nothing_is_proved():
    layer, u = stretched(ImplicitLayer(P, Q, N)), randn(2, 3, P)
    assert layer.solve(u).error_bound.shape == (2, 3)
    assert layer.solve(u[0, 0]).error_bound.shape == ()
    free = ImplicitLayer(P, Q, 2, well_posed=None, activation="identity")
    with torch.no_grad():
        free.W.copy_(torch.tensor([[0.0, 3.0], [-3.0, 0.0]]))
    certificate = free.certificate(refute=False)
    assert (free.solve(u).error_bound is None) == (certificate.constant is None)


# ---- solves -------------------------------------------------------------------------------------


def test_options_of_a_solve():
    layer, u = stretched(ImplicitLayer(P, Q, N, solver="anderson")), randn(4, P)
    s = layer.solve(u, record=True)
    frames = s.stats["trajectory"]
    assert frames.shape == (s.stats["evaluations"] + 1, 4, N) and torch.equal(frames[-1], s.value)
    warm = layer.solve(u, x0=s.value.detach())
    assert int(warm.steps.max()) <= 2 < int(s.steps.max())
    short = ImplicitLayer(P, Q, N, solver=Picard(max_steps=2))
    stretched(short)
    with pytest.raises(ConvergenceError, match="4 of 4 samples"):
        short(u)
    with pytest.raises(ConvergenceError):
        short.solve(u)
    with pytest.warns(ConvergenceWarning):
        short.solve(u, on_failure="warn")
    assert short.solve(u, on_failure="return").status is Status.MAX_STEPS
    with pytest.raises(ValueError, match="on_failure"):
        layer.solve(u, on_failure="retrun")
    with pytest.raises(ValueError, match=r"x0: got shape \(3, 5\), expected \(4, 5\)"):
        layer.solve(u, x0=torch.zeros(3, N))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_bad_sample_is_named_and_leaves_the_others_alone(poison):
    layer, u = ImplicitLayer(P, Q, 40, dtype=torch.float32), randn(64, P).float()
    good = layer.solve(u).value
    u[17, 2] = poison
    with pytest.raises(ConvergenceError, match=r"1 of 64 samples .*index 17\)") as caught:
        layer(u)
    found, keep = caught.value.solution, torch.arange(64) != 17
    assert torch.equal(found.value[keep], good[keep])
    assert found.converged.tolist() == keep.tolist()
    torch.testing.assert_close(layer.solve(u[keep]).value, good[keep], rtol=0, atol=1e-5)


def test_a_free_layer_that_has_no_equilibrium_raises():
    layer = ImplicitLayer(1, 1, 1, well_posed=None, solver=Anderson(max_steps=60))
    with torch.no_grad():
        layer.W.fill_(2.0)
        layer.B.fill_(1.0)
    with pytest.raises(ConvergenceError):
        layer(torch.ones(1, 1))


# ---- PyTorch manners ----------------------------------------------------------------------------


@pytest.mark.parametrize("make", LAYERS, ids=LAYER_IDS)
def test_copies_pickles_and_state_dicts(make):
    layer, u = stretched(make()), randn(4, P)
    y = layer(u)
    assert torch.equal(copy.deepcopy(layer)(u), y)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(u), y)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other = make()
    assert not torch.equal(other(u), y)
    other.load_state_dict(torch.load(buffer))
    assert torch.equal(other(u), y)
    net = nn.Sequential(nn.Linear(P, P), make(), nn.ReLU())
    again = nn.Sequential(nn.Linear(P, P), make(), nn.ReLU())
    again.load_state_dict(net.state_dict())
    assert torch.equal(net(u), again(u))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("make", LAYERS, ids=LAYER_IDS)
def test_a_state_of_another_shape_changes_nothing(make, strict):
    layer = make()
    before = {k: p.clone() for k, p in layer.state_dict().items()}
    state = {k: p + 1 for k, p in before.items()}
    state["C"] = torch.zeros(Q, N + 1)
    with pytest.raises(
        RuntimeError, match=rf"C: got shape \({Q}, {N + 1}\), expected \({Q}, {N}\)"
    ):
        layer.load_state_dict(state, strict=strict)
    assert all(torch.equal(p, before[k]) for k, p in layer.state_dict().items())
    with pytest.raises(RuntimeError, match="B"):
        layer.load_state_dict({k: p + 1 for k, p in before.items() if k != "B"})
    assert all(torch.equal(p, before[k]) for k, p in layer.state_dict().items())
    with pytest.raises(RuntimeError, match="surplus"):
        layer.load_state_dict(before | {"surplus": torch.zeros(1)})


def test_a_part_of_a_state_is_loaded_where_that_is_asked_for():
    """strict=False loads what is there, as in every module of torch."""
    layer = ImplicitLayer(P, Q, N)
    before = copy.deepcopy(layer.state_dict())
    part = {k: p + 1 for k, p in before.items() if k != "B"}
    found = layer.load_state_dict(part, strict=False)
    assert found.missing_keys == ["B"] and torch.equal(layer.B, before["B"])
    assert torch.equal(layer.C, before["C"] + 1) and torch.equal(layer.W, before["W"] + 1)


def test_a_layer_inside_a_module_is_all_or_nothing_too():
    layer = ImplicitLayer(P, Q, N)
    before = copy.deepcopy(layer.state_dict())
    state = {f"0.{k}": t for k, t in ImplicitLayer(P, Q, N).state_dict().items()}
    with pytest.raises(RuntimeError, match="0.B: got shape"):
        nn.Sequential(layer).load_state_dict(state | {"0.B": torch.zeros(N, P + 1)})
    assert all(torch.equal(t, before[k]) for k, t in layer.state_dict().items())


def test_two_layers_do_not_share_settings():
    loose, tight = ImplicitLayer(P, Q, N, solver=Auto(rtol=1e-2)), ImplicitLayer(P, Q, N)
    assert tight.solver.rtol is None and loose.solver.rtol == 1e-2


@pytest.mark.parametrize("make", LAYERS, ids=LAYER_IDS)
def test_representations_show_the_options(make):
    text = repr(make(activation="tanh", solver="newton", bias=False))
    for word in (
        "in_features=3",
        "out_features=2",
        "state_features=5",
        "Tanh",
        "Newton",
        "bias=False",
    ):
        assert word in text, text
    assert "low_rank=2" in repr(LAYERS[6]()) and "margin=0.1" in repr(MonotoneLayer(P, Q, N))


@pytest.mark.parametrize("make", LAYERS, ids=LAYER_IDS)
@pytest.mark.parametrize(
    "u, error, message",
    [
        (torch.zeros(4, P + 1), ValueError, r"u: got shape \(4, 4\), expected \(\*batch, 3\)"),
        (torch.tensor(1.0), ValueError, r"u: got shape \(\), expected"),
        (torch.zeros(4, P, dtype=torch.float32), ValueError, "u: got torch.float32, expected torch.float64"),
        (torch.zeros(4, P, dtype=torch.int64), ValueError, "u: got torch.int64, expected torch.float64"),
        (torch.zeros(4, P, device="meta"), ValueError, "u: got a tensor on meta, expected cpu"),
        ([[0.0] * P], TypeError, "u: got list, expected a tensor"),
    ],
    ids=["width", "scalar", "float32", "int", "meta", "list"],
)  # fmt: skip
def test_wrong_inputs_are_named(make, u, error, message):
    layer = make()
    with pytest.raises(error, match=message):
        layer(u)
    with pytest.raises(error, match=message):
        layer.solve(u)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"in_features": 0}, "in_features: got 0, expected an integer >= 1"),
        ({"out_features": 1.5}, "out_features: got 1.5"),
        ({"state_features": -1}, "state_features: got -1"),
        ({"activation": "rellu"}, "activation: got 'rellu'.*Did you mean 'relu'"),
        ({"well_posed": "inf_norm"}, "Did you mean 'inf-norm'"),
        ({"well_posed": InfNormBall(kappa=0.95), "activation": "silu"}, "take kappa < 0.909"),
        ({"well_posed": MatrixMeasure(gamma=0.9), "activation": "gelu"}, "slopes >= 0"),
        ({"well_posed": StrictlyUpper(), "activation": "softmax"}, "couples states"),
        ({"well_posed": PerronFrobenius(), "activation": "softmax"}, "does not make"),
        ({"solver": "andersen"}, "Did you mean 'anderson'"),
        ({"adjoint": "one-step"}, "Did you mean 'one_step'"),
        ({"low_rank": 0}, "low_rank: got 0, expected an integer in 1..4"),
        ({"low_rank": 5}, "low_rank: got 5"),
        ({"low_rank": 2, "well_posed": "monotone"}, "does not keep the rank"),
        ({"low_rank": 2, "well_posed": "strictly-upper"}, "does not keep the rank"),
        ({"low_rank": 2, "well_posed": "matrix-measure"}, "does not keep the rank"),
    ],
)
def test_wrong_options_are_named(options, message):
    arguments = {"in_features": P, "out_features": Q, "state_features": N} | options
    with pytest.raises(ValueError, match=message):
        ImplicitLayer(**arguments)


@pytest.mark.parametrize("kappa", [1.0, 1.5])
@pytest.mark.parametrize("kind", [InfNormBall, PerronFrobenius])
def test_radii_of_one_and_more_are_refused_for_a_slope_of_one(kind, kappa):
    with pytest.raises(ValueError, match="kappa"):
        ImplicitLayer(P, Q, N, well_posed=kind(kappa=kappa))


def test_the_facts_choose_the_solver():
    u = randn(8, P)
    stats = ImplicitLayer(P, Q, N, well_posed="strictly-upper").solve(u).stats
    assert "triangular" in stats["reason"] and stats["solver"] == "Picard"
    for well_posed in ("inf-norm", "perron-frobenius"):
        stats = ImplicitLayer(P, Q, N, well_posed=well_posed).solve(u).stats
        assert "small system" in stats["reason"] or "contract" in stats["reason"], stats
        stats = ImplicitLayer(P, Q, 200, well_posed=well_posed).solve(u).stats
        assert "contract" in stats["reason"] and "Picard" in stats["solver"], stats
    big = MonotoneLayer(P, Q, 40).solve(randn(64, P)).stats
    assert "strongly monotone, m = 0.1" in big["reason"] and big["solver"] == "PeacemanRachford"
    assert ImplicitLayer(P, Q, N, solver=PeacemanRachford(), well_posed="monotone")(u).shape == (
        8,
        Q,
    )


# ---- ImplicitRNN --------------------------------------------------------------------------------


def loop(rnn, sequence, h):
    outputs = []
    for u in sequence:
        h = rnn.cell(torch.cat([u, h], -1))
        outputs.append(h)
    return torch.stack(outputs), h[None]


def test_the_rnn_is_a_loop_over_its_cell():
    rnn, sequence = ImplicitRNN(P, 4, 6, solver=TIGHT), randn(5, 2, P)
    out, h = rnn(sequence)
    expected, last = loop(rnn, sequence, torch.zeros(2, 4))
    assert out.shape == (5, 2, 4) and h.shape == (1, 2, 4)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(h, last)
    got = torch.autograd.grad(out.pow(2).sum(), list(rnn.parameters()))
    wanted = torch.autograd.grad(expected.pow(2).sum(), list(rnn.parameters()))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    h0 = randn(1, 2, 4)
    torch.testing.assert_close(rnn(sequence, h0)[0], loop(rnn, sequence, h0[0])[0])
    # In two halves, the state handed over.
    first, h1 = rnn(sequence[:2])
    second, h2 = rnn(sequence[2:], h1)
    torch.testing.assert_close(torch.cat([first, second]), out)
    torch.testing.assert_close(h2, h)


def test_batch_first_and_single_sequences():
    rnn = ImplicitRNN(P, 4, 6, batch_first=True, solver=TIGHT)
    time_first = ImplicitRNN(P, 4, 6, solver=TIGHT)
    time_first.load_state_dict(rnn.state_dict())
    sequence, h0 = randn(2, 5, P), randn(1, 2, 4)
    out, h = rnn(sequence, h0)
    expected, last = time_first(sequence.transpose(0, 1), h0)
    assert out.shape == (2, 5, 4) and h.shape == (1, 2, 4)
    torch.testing.assert_close(out, expected.transpose(0, 1))
    torch.testing.assert_close(h, last)
    for net in (rnn, time_first):  # one sequence is (time, features) either way
        single, h = net(sequence[0], h0[:, 0])
        assert single.shape == (5, 4) and h.shape == (1, 4)
        torch.testing.assert_close(single, out[0])
        assert net(sequence[0])[1].shape == (1, 4)


def test_the_rnn_agrees_with_nn_rnn_in_shapes():
    ours, theirs = ImplicitRNN(P, 4, 6), nn.RNN(P, 4)
    for shape in ((5, 2, P), (5, P)):
        for a, b in zip(ours(randn(*shape)), theirs(randn(*shape)), strict=True):
            assert a.shape == b.shape


def test_wrong_sequences_are_named():
    rnn = ImplicitRNN(P, 4, 6)
    for sequence in (randn(5, 2, P + 1), randn(P), randn(1, 5, 2, P)):
        with pytest.raises(ValueError, match="input: got shape"):
            rnn(sequence)
    with pytest.raises(ValueError, match=r"h0: got shape \(2, 4\), expected \(1, 2, 4\)"):
        rnn(randn(5, 2, P), randn(2, 4))
    with pytest.raises(ValueError, match="float32"):
        rnn(randn(5, 2, P).float())


def test_the_rnn_under_autocast_and_with_options():
    rnn = ImplicitRNN(P, 4, 6, well_posed="monotone", activation="tanh", dtype=torch.float32)
    assert isinstance(rnn.cell.well_posed, Monotone) and rnn.cell.activation == Tanh()
    sequence = randn(5, 2, P).float()
    expected = rnn(sequence)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = rnn(sequence)
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)
    assert torch.equal(pickle.loads(pickle.dumps(rnn))(sequence)[0], expected)


# ---- EquilibriumLayer ---------------------------------------------------------------------------


class Cell(nn.Module):
    def __init__(self, n, p):
        super().__init__()
        self.z, self.u = nn.Linear(n, n), nn.Linear(p, n)
        nn.init.uniform_(self.z.weight, -0.5 / n, 0.5 / n)

    def forward(self, z, u):
        return torch.tanh(self.z(z) + self.u(u))


@SCRIPT
def test_an_equilibrium_of_a_module():
    layer = EquilibriumLayer(Cell(4, P), 4, solver=TIGHT)
    assert len(list(layer.parameters())) == 4
    u = randn(3, P)
    z = layer(u)
    torch.testing.assert_close(layer.f(z, u), z, rtol=0, atol=1e-11)
    f, values = functional(layer)
    f = lambda u, *v: torch.func.functional_call(
        layer, dict(zip([k for k, _ in layer.named_parameters()], v, strict=True)), (u,)
    )
    assert gradcheck(f, (u.requires_grad_(), *values), check_forward_ad=True)


def test_second_derivatives_of_an_equilibrium_layer():
    u = randn(2, P).requires_grad_()
    cell = Cell(3, P)
    assert gradgradcheck(EquilibriumLayer(cell, 3, solver=TIGHT, adjoint=Implicit(order=2)), (u,))
    with pytest.raises(RuntimeError, match="more often"):
        gradgradcheck(EquilibriumLayer(cell, 3, solver=TIGHT), (u,))


def test_states_of_any_shape_and_a_start():
    conv = nn.Conv2d(2, 2, 3, padding=1)
    nn.init.uniform_(conv.weight, -0.02, 0.02)
    layer = EquilibriumLayer(lambda z, u: torch.relu(conv(z) + u), (2, 4, 4))
    u = randn(3, 2, 4, 4)
    z = layer(u)
    assert z.shape == (3, 2, 4, 4)
    torch.testing.assert_close(torch.relu(conv(z) + u), z, rtol=0, atol=1e-10)
    solution = layer.solve(u, z.detach(), record=True)
    assert torch.equal(solution.stats["trajectory"][0], z) and int(solution.steps.max()) <= 2
    assert layer(u[:0]).shape == (0, 2, 4, 4)
    with pytest.raises(ValueError, match=r"z0: got shape \(2, 2, 4, 4\), expected \(3, 2, 4, 4\)"):
        layer(u, z.detach()[:2])


def test_a_declared_contraction_chooses_picard():
    f = lambda z, u: 0.3 * torch.cos(z) + u
    told = EquilibriumLayer(f, P, contraction=0.3).solve(randn(4, P))
    assert told.stats["solver"] == "Picard" and "contraction" in told.stats["reason"]
    assert EquilibriumLayer(f, P).solve(randn(4, P)).stats["solver"] == "Anderson"


def test_an_equilibrium_layer_in_low_precision_and_with_token_inputs():
    layer = EquilibriumLayer(lambda z, u: torch.tanh(z / 2 + u), P)
    u = randn(4, P).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(u).dtype is torch.float32
        assert layer(u.bfloat16()).dtype is torch.float32
    table = nn.Embedding(10, P)
    tokens = EquilibriumLayer(lambda z, u: torch.tanh(z / 2 + table(u)), P)
    tokens.table = table
    assert tokens(torch.tensor([1, 2, 9])).shape == (3, P)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: EquilibriumLayer(3, 4), TypeError, "f: got int, expected a callable"),
        (lambda: EquilibriumLayer(torch.add, 0), ValueError, "state_shape: got 0"),
        (lambda: EquilibriumLayer(torch.add, (2, -1)), ValueError, "state_shape"),
        (
            lambda: EquilibriumLayer(torch.add, 2, contraction=1.0),
            ValueError,
            "contraction: got 1.0",
        ),
        (lambda: EquilibriumLayer(torch.add, 2, solver="x"), ValueError, "solver: got 'x'"),
        (lambda: EquilibriumLayer(torch.add, 2)([1.0]), ValueError, "u: got list"),
        (lambda: EquilibriumLayer(torch.add, 2)(torch.tensor(1.0)), ValueError, r"u: got \(\)"),
        (
            lambda: EquilibriumLayer(lambda z, u: torch.zeros(3, 3), 2)(torch.zeros(3, 2)),
            ValueError,
            r"f\(z0\): got \(3, 3\)",
        ),
    ],
)
def test_wrong_arguments_of_an_equilibrium_layer(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_copies_of_an_equilibrium_layer():
    layer, u = EquilibriumLayer(Cell(4, P), 4, solver="broyden"), randn(3, P)
    z = layer(u)
    assert torch.equal(copy.deepcopy(layer)(u), z)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(u), z)
    assert "state_shape=(4,), solver=Broyden" in repr(layer)
    other = EquilibriumLayer(Cell(4, P), 4, solver="broyden")
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(u), z)


# ---- more of the same ---------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid", "hardtanh"])
def test_an_infinite_input_is_never_answered(activation, value):
    """A bounded activation would squash it to a plausible number."""
    layer, u = ImplicitLayer(P, Q, N, activation=activation), randn(3, P)
    with torch.no_grad():
        layer.B.abs_()  # nothing cancels to NaN on the way
    u[1] = value
    with pytest.raises(ConvergenceError, match=r"1 of 3 samples .*index 1\)"):
        layer(u)


def test_a_bad_sample_of_a_closure_is_named():
    layer, u = EquilibriumLayer(lambda z, u: torch.tanh(z.roll(1, 1) / 2 + u), P), randn(6, P)
    good = layer.solve(u).value
    u[2, 1] = torch.nan
    with pytest.raises(ConvergenceError, match=r"1 of 6 samples .*index 2\)") as caught:
        layer(u)
    keep = torch.arange(6) != 2
    assert torch.equal(caught.value.solution.value[keep], good[keep])


@pytest.mark.parametrize("make", [LAYERS[0], LAYERS[2], LAYERS[-1]], ids=["inf", "mm", "mon"])
def test_the_error_bound_is_the_residual_times_the_constant(make):
    layer = stretched(make(dtype=torch.float32))
    u = randn(4, P).float()
    s = layer.solve(u)
    proof = layer.certificate(refute=False)
    v = nn.functional.linear(u, layer.B, layer.b).double()
    x = s.value.detach().double()
    residual = layer.activation(x @ layer.A.double().mT + v).detach() - x
    torch.testing.assert_close(s.error_bound, proof.error_bound(residual), rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("make", LAYERS, ids=LAYER_IDS)
def test_the_solver_is_told_what_the_set_guarantees_and_no_more(make):
    layer = make()
    told = layer.equation
    facts = {"contraction": None, "strongly_monotone": None, "acyclic": False}
    if layer.well_posed is not None:
        facts = layer.well_posed.facts(layer.activation)
    assert (told.contraction, told.acyclic) == (facts["contraction"], facts["acyclic"])
    assert told.monotone == facts["strongly_monotone"]


# ---- what a fresh reader broke ------------------------------------------------------------------


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.W, self.V = nn.Linear(4, 4), nn.Linear(P, 4)

    def forward(self, z, u):
        return torch.tanh(0.4 * self.W(z) + self.V(u))


def test_a_solver_and_an_adjoint_may_be_assigned_and_then_hold_everywhere():
    layer, u = ImplicitLayer(P, Q, N), randn(4, P)
    layer.solver = Picard(max_steps=1)
    with pytest.raises(ConvergenceError):
        layer(u)
    assert layer.solve(u, on_failure="return").stats["solver"] == "Picard"
    layer.solver = "anderson"
    assert layer.equation.adjoint_solver.name == "Anderson" and layer(u).shape == (4, Q)
    layer.adjoint = OneStep()
    (biased,) = torch.autograd.grad(layer(u).sum(), layer.B)
    layer.adjoint = "implicit"
    (exact,) = torch.autograd.grad(layer(u).sum(), layer.B)
    assert not torch.allclose(biased, exact, rtol=1e-3)
    with pytest.raises(AttributeError, match="activation"):
        layer.activation = "tanh"
    assert copy.deepcopy(layer).solver == layer.solver


@pytest.mark.parametrize("kind", [ImplicitLayer, MonotoneLayer])
def test_a_masked_out_sample_spoils_no_gradient(kind):
    layer, u = kind(P, Q, N), randn(6, P)
    u[2, 1] = torch.nan
    solution = layer.solve(u, on_failure="return")
    assert solution.converged.tolist() == [True, True, False, True, True, True]
    loss = solution.value[solution.converged].square().sum()
    grads = torch.autograd.grad(loss, list(layer.parameters()), allow_unused=True)
    good = layer.solve(u[solution.converged]).value.square().sum()
    expected = torch.autograd.grad(good, list(layer.parameters()), allow_unused=True)
    for got, wanted in zip(grads, expected, strict=True):
        assert (got is None) == (wanted is None)
        assert got is None or torch.allclose(got, wanted, atol=1e-9)


def test_a_masked_out_sample_of_an_equilibrium_spoils_no_gradient():
    layer, u = EquilibriumLayer(Body(), 4), randn(6, P)
    u[2, 1] = torch.nan
    solution = layer.solve(u, on_failure="return")
    assert solution.converged.tolist() == [True, True, False, True, True, True]
    loss = solution.value[solution.converged].square().sum()
    good = layer.solve(u[solution.converged]).value.square().sum()
    for got, wanted in zip(
        torch.autograd.grad(loss, list(layer.parameters())),
        torch.autograd.grad(good, list(layer.parameters())),
        strict=True,
    ):
        assert torch.allclose(got, wanted, atol=1e-9)


def test_an_infinite_input_of_an_equilibrium_is_never_answered():
    layer, u = EquilibriumLayer(Body(), 4), randn(3, P)
    u[1] = torch.inf
    with pytest.raises(ConvergenceError, match=r"index 1\)"):
        layer(u)


def test_an_equilibrium_layer_says_which_inputs_it_takes():
    layer = EquilibriumLayer(Body(), 4)
    assert len(list(layer.parameters())) == 4
    with pytest.raises(ValueError, match=r"u: got \(3,\), expected a batch"):
        layer(torch.zeros(P))
    with pytest.raises(ValueError, match="u: got torch.float32, expected torch.float64"):
        layer(torch.zeros(2, P, dtype=torch.float32))
    with pytest.raises(ValueError, match="its parameters are torch.bfloat16"):
        EquilibriumLayer(Body().to(torch.bfloat16), 4)(torch.zeros(2, P, dtype=torch.bfloat16))
    for shape in (True, 2.0, (2, 1.5)):
        with pytest.raises(ValueError, match="state_shape"):
            EquilibriumLayer(Body(), shape)


@pytest.mark.parametrize("scale", [1e-20, 1e-15, 1e15, 1e25])
def test_a_layer_without_biases_is_homogeneous_at_every_size(scale, float32):
    torch.manual_seed(0)
    for layer in (ImplicitLayer(P, Q, N, bias=False), MonotoneLayer(P, Q, N, bias=False)):
        u = torch.randn(5, P)
        unit, scaled = layer(u), layer(scale * u)
        assert torch.allclose(scaled / scale, unit, rtol=1e-3, atol=1e-4), layer


@pytest.mark.parametrize("kind", [ImplicitLayer, MonotoneLayer])
def test_a_state_that_does_not_fit_is_refused_before_anything_is_loaded(kind):
    layer, other = kind(P, Q, N, bias=False), kind(P, Q, N)
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\): b, d"):
        layer.load_state_dict(other.state_dict())
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())
    weighted = ImplicitLayer(P, Q, N, well_posed=PerronFrobenius(0.9, torch.ones(N)))
    state = {name: t + 1 for name, t in weighted.state_dict().items()}
    before = {name: t.clone() for name, t in weighted.state_dict().items()}
    del state["well_posed.weights"]
    with pytest.raises(RuntimeError, match="well_posed.weights"):
        weighted.load_state_dict(state)
    state["well_posed.weights"] = torch.ones(N + 1)
    with pytest.raises(RuntimeError, match="well_posed.weights"):
        weighted.load_state_dict(state)
    assert all(torch.equal(t, before[name]) for name, t in weighted.state_dict().items())


@SCRIPT
def test_a_compiled_transform_raises_or_is_right(float32):
    """An operator without a rule for forward mode drops its tangents, and torch says nothing."""
    torch.manual_seed(0)
    layer, u = ImplicitLayer(P, Q, N), torch.randn(4, P)

    def tangent(x):
        return torch.func.jvp(layer, (x,), (x,))[1]

    expected = tangent(u)
    with pytest.raises(Exception, match="cannot be compiled inside torch.func|Observed exception"):
        torch.compile(tangent, fullgraph=True, backend="eager")(u)
    torch._dynamo.reset()
    assert bool(expected.isfinite().all())


@dataclass(frozen=True, kw_only=True)
class Held(Activation, register=False):
    """tanh, as a function that no file can hold."""

    function: object = torch.tanh
    slope = (0.0, 1.0)

    def __call__(self, z):
        return self.function(z)


@SCRIPT
def test_what_cannot_be_compiled_is_named(float32):
    layer, u = ImplicitLayer(P, Q, N, activation=Held()), torch.randn(4, P)
    assert layer(u).shape == (4, Q) and not layer.equation.spec
    with pytest.raises(Exception, match="as JSON|Observed exception"):
        torch.compile(layer, fullgraph=True, backend="eager")(u)
    torch._dynamo.reset()


def test_blocks_that_do_not_fit_are_refused_at_construction():
    with pytest.raises(ValueError, match="activation: got Blocks for 4 states, expected 5"):
        ImplicitLayer(P, Q, 5, activation=Blocks(parts=((ReLU(), 4),)))
    for well_posed in (PerronFrobenius(0.9, torch.ones(4)), StrictlyUpper(sizes=(2, 2))):
        with pytest.raises(ValueError, match="A has 5 states, but .* is for 4"):
            ImplicitLayer(P, Q, 5, well_posed=well_posed)
    with pytest.raises(ValueError, match="contraction: got 1.5"):
        fixed_point(torch.cos, torch.ones(2, 1), contraction=1.5)
    with pytest.raises(TypeError, match="z0: got list"):
        fixed_point(torch.cos, [0.0])
    with pytest.raises(TypeError, match="rtol='a', expected a number"):
        Picard(rtol="a")
    with pytest.raises(ValueError, match="max_steps=True"):
        Picard(max_steps=True)


def test_the_cell_of_an_rnn_keeps_its_weight_under_autocast(float32):
    torch.manual_seed(0)
    rnn, u = ImplicitRNN(P, 4, 50, low_rank=4), torch.randn(1, 2, P)
    seen = []
    state = rnn.cell.state
    rnn.cell.state = lambda u, A: seen.append(A) or state(u, A)
    rnn(u)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rnn(u)
    assert torch.equal(*seen)
