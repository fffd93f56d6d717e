"""Conformance of every activation: the declared facts are true and tight, the formulas exact."""

import dataclasses
import itertools
import json
import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from implicitdl import activations
from implicitdl.activations import (
    ELU,
    GELU,
    Activation,
    Blocks,
    HardTanh,
    Identity,
    LeakyReLU,
    MaxPool,
    ReLU,
    Sigmoid,
    SiLU,
    Softmax,
    Softplus,
    SoftShrink,
    Tanh,
    from_config,
    get_activation,
)

# Raised inside PyTorch, once, by the first use of forward mode.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

ENTRYWISE = [
    Identity(),
    ReLU(),
    LeakyReLU(),
    LeakyReLU(negative_slope=0.0),
    LeakyReLU(negative_slope=1.75),
    LeakyReLU(negative_slope=-0.5),
    SoftShrink(threshold=0.25),
    HardTanh(),
    HardTanh(low=0.125, high=0.75),
    ELU(),
    ELU(alpha=0.5),
    ELU(alpha=1.5),
    Softplus(),
    Sigmoid(),
    Tanh(),
    SiLU(),
    GELU(),
]
BLOCKS = [
    Softmax(),
    Blocks(parts=((ReLU(), 2), (Tanh(), 1), (Tanh(), 1), (Softmax(), 3))),
    Blocks(parts=((Softplus(), 3), (ELU(alpha=0.5), 4))),
]
ALL = ENTRYWISE + BLOCKS
WIDTH = 7  # of BLOCKS
DTYPES = [torch.float64, torch.float32]
STEPS = [1e-3, 0.3, 1.0, 3.0, 200.0]


def where(fact, members=ALL):
    """Members for which a declared fact holds, as pytest parameters."""
    return pytest.mark.parametrize("phi", [phi for phi in members if fact(phi)], ids=repr)


monotone = where(lambda phi: phi.monotone)
proximal = where(lambda phi: phi.monotone and phi.nonexpansive)
every = where(lambda phi: True)
entrywise = where(lambda phi: phi.entrywise, ENTRYWISE)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def kinks(phi):
    """Where phi may not be differentiable: its parameters and zero."""
    values = [v for v in vars(phi).values() if isinstance(v, (int, float))]
    return {0.0, *values, *(-v for v in values)}


def away_from_kinks(phi, z):
    for kink in kinks(phi) if not isinstance(phi, Blocks) else {0.0}:
        z = torch.where((z - kink).abs() < 0.05, z + 0.1, z)
    return z


def samples(phi, batch=6, scale=2.0, dtype=torch.float64):
    return away_from_kinks(phi, scale * torch.randn(batch, WIDTH, dtype=dtype))


def is_smooth(phi):
    d = samples(phi, 2).requires_grad_()
    return phi.derivative(d).requires_grad


def interior(phi, *shape, dtype=torch.float64):
    """Points in the range of phi, other than phi at the point they will be compared with."""
    return phi(2 * torch.randn(*shape, WIDTH, dtype=dtype))


# ---- facts -----------------------------------------------------------------------------------


def refine(f, z, radius, rounds=12):
    """The largest f on a grid around z, the grid shrinking: hunts an extremum to rounding."""
    for _ in range(rounds):
        grid = z + torch.linspace(-radius, radius, 201, dtype=torch.float64)
        z, radius = grid[f(grid).argmax()], radius / 50
    return f(z).item()


@entrywise
def test_slope_is_true_and_tight(phi):
    lo, hi = phi.slope
    grid = torch.cat([torch.linspace(-60, 60, 240_001, dtype=torch.float64), torch.randn(10**4)])
    d = phi.derivative(grid)
    assert d.min() >= lo - 1e-15 and d.max() <= hi + 1e-15
    z_hi, z_lo = grid[d.argmax()], grid[d.argmin()]
    assert refine(phi.derivative, z_hi, 1e-3) == pytest.approx(hi, abs=2e-15)
    assert refine(lambda z: -phi.derivative(z), z_lo, 1e-3) == pytest.approx(-lo, abs=2e-15)
    chords = (phi(grid[1:240_001]) - phi(grid[:240_000])) / (grid[1:240_001] - grid[:240_000])
    assert chords.min() >= lo - 1e-9 and chords.max() <= hi + 1e-9
    assert phi.lipschitz == max(abs(lo), abs(hi))
    assert phi.monotone == (lo >= 0) and phi.nonexpansive == (lo >= -1 and hi <= 1)


@dtypes
@entrywise
def test_derivative_stays_in_the_slope_range_after_rounding(phi, dtype):
    z = torch.cat([torch.linspace(-30, 30, 100_001, dtype=dtype), extremes(dtype)])
    allowance = 4 * torch.finfo(dtype).eps
    d = phi.derivative(z)
    assert d.min() >= phi.slope[0] - allowance and d.max() <= phi.slope[1] + allowance


def test_published_slope_constants():
    assert SiLU().slope == pytest.approx((-0.0998393201288669, 1.0998393201288669), abs=1e-16)
    assert GELU().slope == pytest.approx((-0.128904145185155, 1.128904145185155), abs=1e-15)


@where(lambda phi: not phi.entrywise)
def test_block_slope_bounds_the_spectrum(phi):
    lo, hi = phi.slope
    z = 3 * torch.randn(40, WIDTH, dtype=torch.float64)
    jacobian = torch.vmap(torch.func.jacrev(phi))(z)
    eigenvalues = torch.linalg.eigvalsh(jacobian)
    assert eigenvalues.min() >= lo - 1e-14 and eigenvalues.max() <= hi + 1e-14
    assert jacobian.abs().sum(-1).max() <= phi.lipschitz + 1e-14  # in the infinity norm as well


def test_softmax_slope_is_attained():
    z = torch.tensor([0.0, 0.0, -60.0], dtype=torch.float64)
    jacobian = torch.func.jacrev(Softmax())(z)
    assert torch.linalg.eigvalsh(jacobian).max().item() == pytest.approx(0.5, abs=1e-14)


@entrywise
def test_range_is_true_and_tight(phi):
    lo, hi = phi.range
    z = torch.cat([torch.linspace(-60, 60, 240_001, dtype=torch.float64), extremes(torch.float64)])
    x = phi(z)
    assert x.min() >= lo - 1e-15 and x.max() <= hi
    assert x.min() <= max(lo + 1e-7, -1e27) and x.max() >= min(hi - 1e-7, 1e27)


@every
def test_homogeneous_as_declared(phi):
    z, t = torch.randn(5, WIDTH), torch.tensor([0.0, 0.3, 1.0, 2.5, 80.0])[:, None]
    equal = torch.allclose(phi(t * z), t * phi(z), rtol=1e-5, atol=1e-6)
    assert equal == phi.homogeneous


# ---- derivatives -----------------------------------------------------------------------------


@dtypes
@every
def test_product_is_the_jacobian(phi, dtype):
    z = samples(phi, dtype=dtype)
    w = torch.randn_like(z)
    _, jvp = torch.func.jvp(phi, (z,), (w,))
    _, vjp = torch.func.vjp(phi, z)
    product = phi.product(phi.derivative(z), w)
    assert product.dtype == dtype and product.shape == z.shape
    torch.testing.assert_close(product, jvp)
    torch.testing.assert_close(product, vjp(w)[0])


@every
def test_product_is_the_finite_difference(phi):
    z, h = samples(phi), 1e-5
    w = torch.randn_like(z)
    difference = (phi(z + h * w) - phi(z - h * w)) / (2 * h)
    torch.testing.assert_close(phi.product(phi.derivative(z), w), difference, rtol=0, atol=1e-8)


@entrywise
def test_derivative_at_kinks_is_a_clarke_element(phi):
    z = torch.tensor(sorted(kinks(phi)), dtype=torch.float64)
    sides = torch.stack([phi.derivative(z - 1e-12), phi.derivative(z + 1e-12)])
    d = phi.derivative(z)
    assert (d >= sides.amin(0) - 1e-9).all() and (d <= sides.amax(0) + 1e-9).all()
    z.requires_grad_()  # the element that autograd takes, so that all gradients agree
    torch.testing.assert_close(d, torch.autograd.grad(phi(z).sum(), z)[0].detach())


@every
def test_default_derivative_agrees(phi):
    if phi.entrywise:
        z = samples(phi)
        torch.testing.assert_close(Activation.derivative(phi, z), phi.derivative(z))


@every
def test_gradcheck_of_value_and_derivative(phi):
    z = samples(phi, 2).requires_grad_()
    assert gradcheck(phi, z) and gradgradcheck(phi, z)
    if is_smooth(phi):
        assert gradcheck(phi.derivative, z) and gradgradcheck(phi.derivative, z, atol=1e-4)


@every
def test_transforms(phi):
    z, w = samples(phi), torch.randn(6, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(torch.vmap(phi)(z), phi(z))
    torch.testing.assert_close(torch.vmap(phi.derivative)(z), phi.derivative(z))

    def product(z, w):
        return phi.product(phi.derivative(z), w)

    torch.testing.assert_close(torch.vmap(product)(z, w), product(z, w))
    _, tangent = torch.func.jvp(lambda z: product(z, w), (z,), (w,))
    difference = (product(z + 1e-5 * w, w) - product(z - 1e-5 * w, w)) / 2e-5
    torch.testing.assert_close(tangent, difference, rtol=0, atol=1e-7)


@every
def test_in_place_form(phi):
    z = torch.randn(4, WIDTH)
    expected, buffer = phi(z), z.clone()
    out = phi.call_(buffer)
    assert out is buffer
    torch.testing.assert_close(buffer, expected, rtol=0, atol=0)


def test_compile_without_graph_breaks():
    def use(z, w):
        phi = Blocks(parts=((ReLU(), 4), (Softmax(), 3)))
        return phi(z) + phi.product(phi.derivative(z), w) + phi.divergence(phi(w), z)[:, None]

    z, w = torch.randn(2, 3, WIDTH)
    compiled = torch.compile(use, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(z, w), use(z, w))


# ---- the Fenchel side ------------------------------------------------------------------------


@monotone
def test_potential_is_convex_with_gradient_phi(phi):
    z = samples(phi, 40).requires_grad_()
    (gradient,) = torch.autograd.grad(phi.potential(z).sum(), z)
    torch.testing.assert_close(gradient, phi(z), rtol=1e-12, atol=1e-13)
    other = torch.randn_like(z)
    middle = 2 * phi.potential((z + other) / 2).sum(-1)
    assert (middle <= (phi.potential(z) + phi.potential(other)).sum(-1) + 1e-12).all()


@where(lambda phi: phi.monotone, ENTRYWISE)
def test_conjugate_by_brute_force(phi):
    x = interior(phi, 3).flatten()
    z = torch.linspace(-40, 40, 100_001, dtype=torch.float64)
    potential = phi.potential(z)
    brute = torch.stack([(xi * z - potential).max() for xi in x])
    torch.testing.assert_close(phi.conjugate(x), brute, rtol=0, atol=2e-7)  # step^2 slope / 8


def test_softmax_conjugate_by_brute_force():
    x, z = torch.softmax(torch.randn(7, dtype=torch.float64), 0), torch.zeros(7).double()
    z.requires_grad_()
    optimiser = torch.optim.LBFGS([z], max_iter=200, tolerance_grad=1e-10, tolerance_change=0)

    def objective():
        optimiser.zero_grad()
        value = (Softmax().potential(z) - (x * z).sum()).sum()
        value.backward()
        return value

    optimiser.step(objective)
    assert Softmax().conjugate(x).item() == pytest.approx(-objective().item(), abs=1e-9)


@where(lambda phi: phi.monotone, ENTRYWISE)
def test_conjugate_and_divergence_are_infinite_off_the_range(phi):
    outside = torch.tensor([e for e in phi.range if math.isfinite(e)], dtype=torch.float64)
    outside = outside + torch.tensor([-1e-3, 1e-3][: len(outside)], dtype=torch.float64)
    assert torch.isposinf(phi.conjugate(outside)).all()
    assert torch.isposinf(
        phi.divergence(outside[:, None], torch.zeros_like(outside)[:, None])
    ).all()
    ends = torch.tensor([e for e in phi.range if math.isfinite(e)], dtype=torch.float64)
    assert (
        phi.conjugate(ends).isfinite().all()
    )  # closed: every range here has finite F* at its ends


def test_softmax_is_infinite_off_the_simplex():
    x = torch.tensor([[0.5, 0.5, 0.1], [1.1, -0.1, 0.0], [0.5, 0.5, 0.0]])
    assert torch.isinf(Softmax().conjugate(x)[:, 0]).tolist() == [True, True, False]
    assert torch.isinf(Softmax().divergence(x, torch.zeros(3, 3))).tolist() == [True, True, False]


@monotone
def test_divergence_is_the_sum_of_its_three_terms(phi):
    z, x = samples(phi, 200), interior(phi, 200)
    terms = phi.potential(z).sum(-1) + phi.conjugate(x).sum(-1) - (x * z).sum(-1)
    torch.testing.assert_close(phi.divergence(x, z), terms, rtol=1e-10, atol=1e-11)


@dtypes
@monotone
def test_divergence_is_nonnegative_and_zero_at_the_image(phi, dtype):
    z, x = samples(phi, 2000, 4.0, dtype), interior(phi, 2000, dtype=dtype)
    assert (phi.divergence(x, z) >= 0).all()
    for nudge in (0.0, 1e-6, 1e-3):
        near = phi.divergence(phi(z + nudge), z)
        assert (near >= 0).all()
        # Rounding of x by eps moves D by at most about eps * |z|, and second order in the nudge.
        eps = torch.finfo(dtype).eps
        assert (near <= WIDTH * (phi.lipschitz * nudge**2 + eps * 0.2 * (eps + nudge + 1))).all()


@dtypes
@monotone
def test_divergence_bound_by_smoothness(phi, dtype):
    z, x = samples(phi, 500, dtype=dtype), interior(phi, 500, dtype=dtype)
    distance = ((x - phi(z)) ** 2).sum(-1) / (2 * phi.lipschitz)
    assert (phi.divergence(x, z) >= distance * (1 - 1e-4) - torch.finfo(dtype).eps).all()


@where(lambda phi: phi.monotone, ENTRYWISE)
@pytest.mark.parametrize("gap", [1e-3, 1e-5])
def test_divergence_near_the_image_is_accurate(phi, gap):
    # In float32 the three terms would leave nothing of gap^2 / 2 times the slope.
    w = torch.tensor([-3.0, -1.3, 0.65, 1.4, 2.9], dtype=torch.float64)
    x = phi(w)
    z32 = (w + gap).float()
    expected = reference_divergence(phi, x, z32.double())
    got = phi.divergence(x[:, None], z32.double()[:, None])
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-20)
    x32 = x.float()
    got32 = phi.divergence(x32[:, None], z32[:, None]).double()
    expected32 = reference_divergence(phi, x32.double(), z32.double())
    assert ((got32 - expected32).abs() <= 1e-6 * (expected32.sqrt() + 1e-6)).all()


def reference_divergence(phi, x, z):
    """D = int_w^z (phi(s) - x) ds with phi(w) = x, by quadrature after bisection for w."""
    lo, hi = torch.full_like(x, -50.0), torch.full_like(x, 50.0)
    for _ in range(200):
        middle = (lo + hi) / 2
        below = phi(middle) < x
        lo, hi = torch.where(below, middle, lo), torch.where(below, hi, middle)
    w = (lo + hi) / 2
    s = torch.linspace(0, 1, 2001, dtype=x.dtype)
    s = (s[1:] + s[:-1]) / 2
    points = w[:, None] + s * (z - w)[:, None]
    return ((phi(points) - x[:, None]).mean(1) * (z - w)).clamp(min=0)


@monotone
def test_gradients_of_the_divergence(phi):
    z, x = samples(phi, 30).requires_grad_(), interior(phi, 30)
    (gradient,) = torch.autograd.grad(phi.divergence(x, z).sum(), z)
    torch.testing.assert_close(gradient, phi(z) - x, rtol=1e-9, atol=1e-12)
    near = phi(z.detach() + 1e-4)  # the branch near the image
    (gradient,) = torch.autograd.grad(phi.divergence(near, z).sum(), z)
    torch.testing.assert_close(gradient, phi(z) - near, rtol=1e-8, atol=1e-12)
    # In x it is phi^-1(x) - z, up to a constant on the simplex: at x = phi(w) it is w - z.
    w = torch.full((30, WIDTH), 0.65, dtype=torch.float64) + 0.01 * torch.rand(30, WIDTH)
    x = phi(w).requires_grad_()
    (gradient,) = torch.autograd.grad(phi.divergence(x, z.detach()).sum(), x)
    if phi.entrywise and (phi.derivative(w) != 0).all():
        torch.testing.assert_close(gradient, w - z.detach(), rtol=1e-8, atol=1e-10)


@where(lambda phi: phi.monotone, ENTRYWISE)
def test_gradient_of_the_divergence_at_the_kinks(phi):
    z = torch.tensor(sorted(kinks(phi)), dtype=torch.float64)[:, None].requires_grad_()
    for shift in (-0.7, 0.3):
        x = phi(z.detach() + shift)
        (gradient,) = torch.autograd.grad(phi.divergence(x, z).sum(), z)
        torch.testing.assert_close(gradient, (phi(z) - x).detach())


@proximal
@pytest.mark.parametrize("t", STEPS)
def test_prox_is_optimal(phi, t):
    v = 3 * torch.randn(50, WIDTH, dtype=torch.float64)
    x = phi.prox(v, t)

    def objective(x):
        inside = phi.conjugate(x).sum(-1) - 0.5 * (x * x).sum(-1)
        return t * inside + 0.5 * ((x - v) ** 2).sum(-1)

    best = objective(x)
    assert best.isfinite().all()
    for scale in (1e-3, 1e-1, 1.0):  # convex: no better point near by is no better point at all
        for _ in range(5):
            other = move(phi, x, scale)
            assert (best <= objective(other) + 1e-9 * max(1.0, t)).all()


def move(phi, x, scale):
    """A random point of dom F* near x."""
    if isinstance(phi, Blocks):
        parts = zip(phi.parts, x.split([n for _, n in phi.parts], -1), strict=True)
        return torch.cat([move(part, xi, scale) for (part, _), xi in parts], -1)
    if not phi.entrywise:
        return x + scale / 2 * (torch.softmax(torch.randn_like(x), -1) - x)
    return (x + scale * torch.randn_like(x)).clamp(*phi.range)


@where(lambda phi: phi.monotone and phi.nonexpansive, ENTRYWISE)
@pytest.mark.parametrize("t", [0.05, 0.5, 4.0])
def test_prox_by_brute_force(phi, t):
    lo, hi = max(phi.range[0], -8.0), min(phi.range[1], 8.0)
    x = torch.linspace(lo, hi, 50_001, dtype=torch.float64)
    g = t * (phi.conjugate(x) - 0.5 * x * x)
    v = torch.linspace(-3, 3, 13, dtype=torch.float64)
    brute = torch.stack([x[(g + 0.5 * (x - vi) ** 2).argmin()] for vi in v])
    torch.testing.assert_close(phi.prox(v, t), brute, rtol=0, atol=3e-4)


@dtypes
@proximal
def test_prox_at_one_is_phi_and_solves_its_equation(phi, dtype):
    v = torch.cat([6 * torch.randn(40, WIDTH, dtype=dtype), torch.zeros(1, WIDTH, dtype=dtype)])
    torch.testing.assert_close(phi.prox(v, 1.0), phi(v))
    eps = torch.finfo(dtype).eps
    for t in STEPS:
        x = phi.prox(v, t)
        assert x.dtype == dtype
        z = (v - (1 - t) * x) / t  # in the subdifferential of F* at x: so x = phi(z)
        slack = 40 * eps * max(1.0, 1 / t, t) * (1 + v.abs().max())
        torch.testing.assert_close(phi(z), x, rtol=0, atol=slack.item())


@dtypes
@proximal
def test_prox_is_nonexpansive_in_v(phi, dtype):
    v, w = 4 * torch.randn(2, 50, WIDTH, dtype=dtype)
    for t in (0.1, 3.0):
        x, y = phi.prox(v, t), phi.prox(w, t)
        slack = 20 * torch.finfo(dtype).eps * max(1.0, t)
        assert ((x - y).norm(dim=-1) <= (v - w).norm(dim=-1) * (1 + slack) + slack).all()


@proximal
def test_gradcheck_of_prox(phi):
    v, t = samples(phi, 1), 0.3
    if any(math.isfinite(e) for e in phi.range) and phi.prox(v, t).unique().numel() < WIDTH:
        v = away_from_kinks(phi, 0.2 + 0.03 * torch.arange(WIDTH, dtype=torch.float64)[None])
    v = (v[:, :3] if phi.entrywise and not isinstance(phi, Blocks) else v).requires_grad_()
    assert gradcheck(lambda v: phi.prox(v, t), v, fast_mode=True)
    assert gradgradcheck(lambda v: phi.prox(v, t), v, atol=1e-4, fast_mode=True)
    _, tangent = torch.func.jvp(lambda v: phi.prox(v, t), (v.detach(),), (torch.ones_like(v),))
    backward = torch.func.vmap(torch.func.jacrev(lambda v: phi.prox(v, t)))(v.detach()).sum(-1)
    torch.testing.assert_close(tangent, backward)


@where(lambda phi: True, [LeakyReLU(), SoftShrink(threshold=0.25), Tanh(), Softmax()])
def test_gradcheck_of_prox_in_the_step(phi):
    v = torch.tensor([-1.2, 0.5, 0.9], dtype=torch.float64, requires_grad=True)
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(phi.prox, (v, t), fast_mode=True)
    assert gradgradcheck(phi.prox, (v, t), atol=1e-4, fast_mode=True)


@where(lambda phi: phi.monotone and phi.nonexpansive, ENTRYWISE)
def test_prox_closed_form_is_the_generic_one(phi):
    # The equation t z + (1 - t) phi(z) = v is all the default needs, kinks included.
    v = 3 * torch.randn(64, dtype=torch.float64)
    for t in (0.2, 0.9, 5.0):
        torch.testing.assert_close(phi.prox(v, t), Activation.prox(phi, v, t), atol=1e-9, rtol=0)


@where(lambda phi: not (phi.monotone and phi.nonexpansive))
def test_prox_refuses_a_slope_outside_the_unit_interval(phi):
    with pytest.raises(ValueError, match="slope"):
        phi.prox(torch.zeros(WIDTH), 0.5)


@where(lambda phi: not phi.monotone)
def test_no_convex_analysis_without_monotonicity(phi):
    z = torch.zeros(WIDTH)
    with pytest.raises(ValueError, match="not monotone"):
        phi.conjugate(z)
    with pytest.raises(ValueError, match="not monotone"):
        phi.divergence(z, z)


@pytest.mark.parametrize("t", [0.0, -1.0, math.inf, math.nan])
@proximal
def test_prox_refuses_a_bad_step(phi, t):
    with pytest.raises(ValueError, match="positive finite"):
        phi.prox(torch.zeros(WIDTH), t)


# ---- rounding --------------------------------------------------------------------------------


def extremes(dtype):
    powers = [10.0**k for k in (-30, -10, -4, 0, 1, 2, 3, 6, 10, 19, 20, 30)]
    return torch.tensor([0.0, *powers, *(-p for p in powers), 17.3, -88.5, 103.9], dtype=dtype)


@entrywise
def test_float32_up_to_1e30(phi):
    z = extremes(torch.float32).requires_grad_()
    x, exact = phi(z), phi(z.detach().double())
    assert x.dtype == torch.float32 and x.isfinite().all()
    torch.testing.assert_close(x.double(), exact, rtol=2e-6, atol=2e-7)
    d = phi.derivative(z)
    assert d.isfinite().all()
    torch.testing.assert_close(d.double(), phi.derivative(z.detach().double()), rtol=0, atol=5e-7)
    (first,) = torch.autograd.grad(x.sum(), z, create_graph=True)
    torch.testing.assert_close(first, d, rtol=0, atol=1e-6)
    if d.requires_grad:
        assert torch.autograd.grad(d.sum(), z)[0].isfinite().all()


@where(lambda phi: phi.monotone, ENTRYWISE)
def test_float32_fenchel_up_to_1e30(phi):
    z = extremes(torch.float32)
    assert not phi.potential(z).isnan().any()  # it may overflow to inf: z^2 / 2 does
    exact = phi.potential(z.double())
    fits = exact.abs() < 1e38
    torch.testing.assert_close(phi.potential(z).double()[fits], exact[fits], rtol=2e-6, atol=2e-6)
    pairs = torch.tensor(list(itertools.product(phi(z).tolist(), z.tolist())))
    x, u = pairs.split(1, -1)
    x, u = x.float(), u.float().requires_grad_()
    d = phi.divergence(x, u)
    exact = phi.divergence(x.double(), u.double())
    assert not d.isnan().any() and (d >= 0).all()
    fits = exact < 1e37
    # Rounding of x and phi(z) in D = (x - phi(z))^2 / 2 + ..., or of its bounded terms.
    rounding = 1e-6 * (x + phi(u)).abs().double().sum(-1)
    off = (d.double().sqrt() - exact.sqrt()).abs() <= rounding + 1e-5 * exact.sqrt()
    assert (off | ((d - exact).abs() <= 2e-6 + 2e-5 * exact))[fits].all()
    (gradient,) = torch.autograd.grad(d[fits].sum(), u)
    torch.testing.assert_close(
        gradient[fits], (phi(u) - x)[fits].detach(), rtol=1e-4, atol=1e-5, check_dtype=True
    )


@where(lambda phi: phi.monotone and phi.nonexpansive, ENTRYWISE)
def test_float32_prox_up_to_1e30(phi):
    v = extremes(torch.float32)
    for t in (1e-3, 0.5, 2.0, 1e3):
        x, exact = phi.prox(v, t), phi.prox(v.double(), t)
        assert x.isfinite().all()
        torch.testing.assert_close(x.double(), exact, rtol=2e-5 * max(t, 1), atol=2e-6)


def test_range_ends_that_float32_cannot_hold():
    for phi in (HardTanh(low=0.1, high=0.7), ELU(alpha=0.4), HardTanh(low=-0.7, high=-0.1)):
        z = torch.linspace(-100, 100, 401)[:, None]
        d = phi.divergence(phi(z), z)
        assert (d < 1e-6).all() and phi.conjugate(phi(z)).isfinite().all()


def test_softmax_up_to_1e30():
    z = torch.tensor([[1e30, 0.0, -1e30], [1e30, 1e30, 0.0], [-1e30, -1e30, -1e30]])
    phi, w = Softmax(), torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(phi(z).sum(-1), torch.ones(3))
    assert phi.product(phi.derivative(z), w).isfinite().all()
    assert phi.potential(z).isfinite().all()
    assert (phi.divergence(phi(z), z) >= 0).all() and (phi.divergence(phi(z), z) < 1e-6).all()
    for t in (1e-3, 0.5, 2.0):
        x = phi.prox(1e3 * torch.randn(40, 5), t)
        assert (x >= 0).all()
        torch.testing.assert_close(x.sum(-1), torch.ones(40))


def test_softplus_is_exact_beyond_the_threshold_of_pytorch():
    z = torch.linspace(15, 60, 451, dtype=torch.float64)  # PyTorch switches to z at 20
    torch.testing.assert_close(Softplus()(z), z + torch.log1p(torch.exp(-z)), rtol=1e-15, atol=0)


@pytest.mark.parametrize("t", [0.1, 10.0, 0.01])
def test_prox_of_a_staircase(t):
    class Stairs(Activation, register=False):  # slope back at 0 and 1 again and again
        slope = (0.0, 1.0)

        def __call__(self, z):
            return z / 2 + torch.sin(30 * z) / 60

    phi, v = Stairs(), torch.linspace(-5, 5, 1001, dtype=torch.float64)
    x = phi.prox(v, t)
    torch.testing.assert_close(phi((v - (1 - t) * x) / t), x, rtol=0, atol=1e-13 / t)


# ---- names, configurations, blocks -----------------------------------------------------------


@every
def test_config_round_trip(phi):
    config = json.loads(json.dumps(phi.to_config()))
    assert from_config(config) == phi and hash(from_config(config)) == hash(phi)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "LeakyRelu"}, "LeakyReLU"),
        ({"name": "LeakyReLU", "slope": 0.1}, "negative_slope"),
        ({"name": "ELU", "alpha": -1.0}, "positive"),
        ({"name": "Blocks"}, "parts"),
        ({"alpha": 1.0}, "name"),
        ("ReLU", "mapping"),
    ],
)
def test_config_errors(config, message):
    with pytest.raises(ValueError, match=message):
        from_config(config)


@pytest.mark.parametrize("name", activations._NAMES.split())
def test_names(name):
    phi = get_activation(name)
    assert type(phi).__name__.lower() == name.replace("_", "")
    assert get_activation(type(phi).__name__) == phi and get_activation(phi) is phi
    assert hasattr(nn.functional, name) or name == "identity"  # PyTorch's spelling


@pytest.mark.parametrize(
    "module",
    [
        nn.Identity(),
        nn.ReLU(),
        nn.ReLU6(),
        nn.LeakyReLU(0.2),
        nn.ELU(0.7),
        nn.Softplus(),
        nn.Sigmoid(),
        nn.Tanh(),
        nn.Hardtanh(-0.5, 2.0),
        nn.Softshrink(0.2),
        nn.SiLU(),
        nn.GELU(),
        nn.Softmax(-1),
    ],
    ids=repr,
)
def test_modules(module):
    z = 4 * torch.randn(50, 7, dtype=torch.float64)
    torch.testing.assert_close(get_activation(module)(z), module(z), rtol=0, atol=3e-9)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ("leaky_rellu", ValueError, "Did you mean 'leaky_relu'"),
        ("blocks", ValueError, "default"),
        (nn.GELU(approximate="tanh"), ValueError, "GELU"),
        (nn.Softmax(0), ValueError, "Softmax"),
        (nn.Softplus(beta=2), ValueError, "Softplus"),
        (nn.Mish(), ValueError, "Mish"),
        (ReLU, TypeError, "instance"),
        (torch.relu, TypeError, "instance"),
    ],
    ids=lambda value: "torch.relu" if value is torch.relu else str(value),
)
def test_get_activation_errors(wrong, error, message):
    with pytest.raises(error, match=message):
        get_activation(wrong)


@pytest.mark.parametrize(
    "make",
    [
        lambda: HardTanh(low=1.0, high=1.0),
        lambda: HardTanh(high=math.inf),
        lambda: LeakyReLU(negative_slope=math.nan),
        lambda: ELU(alpha=0.0),
        lambda: SoftShrink(threshold=-1.0),
        lambda: Blocks(parts=()),
        lambda: Blocks(parts=((ReLU(), 0),)),
        lambda: Blocks(parts=((Blocks.of(ReLU(), 3), 2),)),
    ],
)
def test_bad_parameters(make):
    with pytest.raises(ValueError, match="got"):
        make()


def test_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LeakyReLU().negative_slope = 0.3
    with pytest.raises(TypeError):
        LeakyReLU(0.3)


def test_blocks():
    inner = Blocks(parts=((ReLU(), 2), (Softmax(), 3)))
    phi = Blocks(parts=[(inner, 5), (SiLU(), 2)])
    assert phi.parts == ((ReLU(), 2), (Softmax(), 3), (SiLU(), 2)) and phi.size == 7
    assert phi.slope == SiLU().slope and phi.range == (SiLU().range[0], math.inf)
    assert not phi.entrywise and not phi.homogeneous and not phi.monotone
    assert Blocks(parts=((ReLU(), 2), (Identity(), 1))).homogeneous
    assert Blocks.of(Tanh(), 4).parts == ((Tanh(), 4),)
    z = torch.randn(2, 3, 7)
    expected = [
        torch.relu(z[..., :2]),
        torch.softmax(z[..., 2:5], -1),
        nn.functional.silu(z[..., 5:]),
    ]
    torch.testing.assert_close(phi(z), torch.cat(expected, -1))
    with pytest.raises(TypeError, match="expected an Activation"):
        Blocks(parts=(("relu", 3),))


@pytest.mark.parametrize("width", [1, 6, 8])
def test_blocks_refuse_the_wrong_width(width):
    phi, z = BLOCKS[1], torch.zeros(2, width)
    right = torch.zeros(2, WIDTH)
    calls = [phi, phi.call_, phi.derivative, phi.potential, phi.conjugate]
    for call in [
        *calls,
        lambda z: phi.prox(z, 0.5),
        lambda z: phi.product(right, z),
        lambda z: phi.divergence(right, z),
    ]:
        with pytest.raises(ValueError, match="last dimension of 7 = 2 \\+ 1"):
            call(z)


def test_equal_neighbours_are_evaluated_together_but_softmax_is_not():
    z = torch.randn(3, 6)
    parts = Blocks(parts=((Softmax(), 3), (Softmax(), 3)))
    torch.testing.assert_close(parts(z).sum(-1), torch.full((3,), 2.0))
    phi = Blocks(parts=((ReLU(), 2), (ReLU(), 4)))
    assert phi.parts == ((ReLU(), 2), (ReLU(), 4))
    torch.testing.assert_close(phi(z), torch.relu(z))


def test_user_defined_activation():
    @dataclass(frozen=True, kw_only=True)
    class Cubic(Activation):  # phi(z) = scale * sign(z) |z|^3 / (1 + z^2): no derivative given
        scale: float = 0.5
        slope = (0.0, 0.5625)

        def __call__(self, z):
            return self.scale * z * (z * z / (1 + z * z))

    phi = get_activation("cubic")
    assert phi == Cubic() == from_config({"name": "Cubic", "scale": 0.5})
    z = torch.linspace(-9, 9, 1001, dtype=torch.float64, requires_grad=True)
    d = phi.derivative(z)
    assert d.min() >= 0 and d.max().item() == pytest.approx(phi.slope[1], abs=1e-4)
    assert gradcheck(phi.derivative, z[:5])
    v = torch.randn(20, dtype=torch.float64)
    for t in (0.2, 1.0, 6.0):
        x = phi.prox(v, t)
        torch.testing.assert_close(phi((v - (1 - t) * x) / t), x)
    with pytest.raises(NotImplementedError, match="does not define `potential`"):
        phi.divergence(v, v)
    first = phi

    class Cubic(Activation):  # the cell is run again, with another formula: it replaces the first
        slope = (1.0, 1.0)

        def __call__(self, z):
            return z

    assert get_activation("cubic") != first and from_config(Cubic().to_config()).slope == (1, 1)
    with pytest.raises(ValueError, match="Did you mean 'Cubic'"):
        get_activation("cubik")


def test_default_divergence_is_clipped_but_keeps_its_gradient():
    class HalfForTest(Activation):
        slope = (0.5, 0.5)

        def __call__(self, z):
            return 0.5 * z

        def potential(self, z):
            return 0.25 * z * z

        def conjugate(self, x):
            return x * x

    phi, z = HalfForTest(), (1e3 * torch.randn(500, 1)).requires_grad_()
    x = phi(z.detach() * (1 + 1e-6))
    d = phi.divergence(x, z)
    assert (d >= 0).all()
    torch.testing.assert_close(torch.autograd.grad(d.sum(), z)[0], phi(z) - x, atol=1e-3, rtol=0)


def test_registration_errors():
    with pytest.raises(ValueError, match="rename"):
        type("ReLU", (Activation,), {})
    with pytest.raises(TypeError, match="abstract"):
        type("NoSlope", (Activation,), {"__call__": lambda self, z: z})()

    class Stateful(Activation, register=False):
        slope = (0.0, 1.0)

        def __init__(self):
            self.scale = 2.0

        def __call__(self, z):
            return z

    with pytest.raises(TypeError, match="dataclass"):
        Stateful().to_config()
    with pytest.raises(ValueError, match="activation: got 'stateful'"):
        get_activation("stateful")


def test_speed_critical_members_are_bare():
    z = torch.randn(3, 4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ReLU()(z)
    assert [e.key for e in profile.key_averages() if e.key.startswith("aten")] in (
        ["aten::relu", "aten::clamp_min"],
        ["aten::relu"],
    )
    assert Identity()(z) is z


# --- the derivative told by the value


TOLD = [Identity(), ReLU(), LeakyReLU(), LeakyReLU(negative_slope=0.3), ELU(), ELU(alpha=0.7),
        HardTanh(), HardTanh(low=-0.5, high=2.0), Sigmoid(), Tanh(), Softplus(), SoftShrink(),
        Softmax(), Blocks(parts=((ReLU(), 3), (Softmax(), 4), (Tanh(), 3)))]  # fmt: skip
UNTOLD = [SiLU(), GELU(), LeakyReLU(negative_slope=-0.2), LeakyReLU(negative_slope=0.0),
          Blocks(parts=((ReLU(), 5), (GELU(), 5)))]  # fmt: skip


def test_every_member_says_whether_its_value_tells():
    own = {cls for cls in activations.REGISTRY.values() if cls.__module__.startswith("implicitdl.")}
    assert own - {MaxPool} == {type(phi) for phi in [*TOLD, *UNTOLD]}  # which has no derivative


@every
def test_blocks_of_states(phi):
    """phi is its blocks side by side; `size` and `blocks` are what others read of them."""
    parts = phi.blocks(WIDTH)
    assert phi.size in (None, WIDTH) and sum(n for _, n in parts) == WIDTH
    z = torch.randn(5, WIDTH, dtype=torch.float64)
    pieces = z.split([n for _, n in parts], -1)
    alone = [part(piece) for (part, _), piece in zip(parts, pieces, strict=True)]
    torch.testing.assert_close(torch.cat(alone, -1), phi(z))
    if phi.size is None:
        assert parts == ((phi, WIDTH),) and phi.blocks(3) == ((phi, 3),)
    else:
        with pytest.raises(ValueError, match="got 3 states, expected 7"):
            phi.blocks(3)


@pytest.mark.parametrize("phi", TOLD, ids=str)
def test_the_value_tells_the_derivative(phi):
    z = 3 * torch.randn(200, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z = z.masked_fill((z.abs() - 1).abs() < 1e-3, 0.7)  # away from kinks
    x = phi(z)
    assert torch.allclose(phi.derivative_at(x), phi.derivative(z), atol=1e-12)
    # As a function of z it has the second derivative, too.
    z.requires_grad_()
    weights = torch.randn(z.shape, generator=torch.Generator().manual_seed(2), dtype=z.dtype)
    told, known = phi.derivative_at(phi(z)), phi.derivative(z)
    zero = 0 * z.sum()  # piecewise linear ones have none
    got, expected = (
        torch.autograd.grad((d * weights).sum() + zero, z, retain_graph=True)[0]
        for d in (told, known)
    )
    assert torch.allclose(got, expected, atol=1e-9)


@pytest.mark.parametrize("phi", UNTOLD, ids=str)
def test_where_the_value_does_not_tell_there_is_no_formula(phi):
    assert phi.derivative_at(phi(torch.linspace(-3, 3, 10))) is None


def test_who_is_linear():
    for phi in [*TOLD, *UNTOLD]:
        z, w = torch.randn(2, 10, 10, generator=torch.Generator().manual_seed(3))
        additive = torch.allclose(phi(z + w), phi(z) + phi(w), atol=1e-5)
        assert phi.linear == additive, phi
    assert Blocks(parts=((Identity(), 2), (Identity(), 3))).linear


def test_negative_steps_of_a_prox_are_refused_as_tensors_too():
    bad = [-1.0, 0.0, math.inf, math.nan]
    for t in (*bad, *map(torch.tensor, bad), *(torch.tensor([1.0, t]) for t in bad)):
        with pytest.raises(ValueError, match="expected a positive finite step"):
            Tanh().prox(torch.zeros(2), t)


@pytest.mark.parametrize(  # by formula, by search; compiling the blocks takes long
    "phi",
    [ReLU(), Tanh(), *(pytest.param(b, marks=pytest.mark.slow) for b in BLOCKS[:2])],
    ids=repr,
)
def test_tensor_steps_of_a_prox_under_transforms_and_in_a_compiled_graph(phi):
    v, t = samples(phi, batch=3), torch.rand(3, 1, dtype=torch.float64) + 0.5
    expected = phi.prox(v, t)
    assert torch.allclose(torch.func.vmap(phi.prox)(v, t), expected, atol=1e-12)
    torch.compiler.reset()  # each phi counts as a recompilation of one function
    compiled = torch.compile(lambda v, t: phi.prox(v, t), fullgraph=True, backend="eager")
    assert torch.allclose(compiled(v, t), expected, atol=1e-12)
    assert phi.prox(v[:0], t[:0]).shape == (0, WIDTH)  # no step is no bad step


def test_an_unknown_name_lists_each_name_once():
    with pytest.raises(ValueError) as error:
        get_activation("rellu")
    assert str(error.value).count("'relu'") == 2 and "'ReLU'" not in str(error.value)
