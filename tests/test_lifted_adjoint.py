"""The gradient from a clamped equilibrium, against the exact adjoint."""

import math

import pytest
import torch
from torch import nn

from implicitdl import ConvergenceError, ImplicitLayer, ImplicitModel, MonotoneLayer, fixed_point
from implicitdl.activations import Blocks, ReLU, Softmax, Tanh
from implicitdl.implicit.lifted import Lifted
from implicitdl.maps import AffineMap

PHIS = ["tanh", "relu", "sigmoid", "softplus", "softmax", Blocks(parts=((ReLU(), 7), (Tanh(), 5)))]


def layer_and_data(phi, dtype=torch.float64):
    layer = ImplicitLayer(5, 3, 12, activation=phi, dtype=dtype)
    with torch.no_grad():  # far from symmetric
        layer.W.copy_(torch.randn(12, 12, dtype=dtype))
        layer.W.mul_(0.9 / layer.W.abs().sum(1, keepdim=True))
    A = layer.A.detach()
    assert float((A - A.mT).norm()) > 0.5 * float(A.norm())
    return layer, torch.randn(6, 5, dtype=dtype), torch.randint(0, 3, (6,))


def gradient(layer, u, y, adjoint, scale=1.0):
    layer.adjoint = adjoint
    layer.zero_grad()
    u = u.clone().requires_grad_()
    (scale * nn.functional.cross_entropy(layer(u), y)).backward()
    return torch.cat([p.grad.flatten() for p in layer.parameters()] + [u.grad.flatten()])


def off(found, exact):
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("phi", PHIS, ids=str)
@pytest.mark.parametrize("two_sided", [False, True])
def test_the_error_has_the_order_that_is_promised(phi, two_sided):
    layer, u, y = layer_and_data(phi)
    exact = gradient(layer, u, y, "implicit")
    sizes = (4e-4, 1e-4)  # small enough that no state crosses a kink
    errors = [off(gradient(layer, u, y, Lifted(c=c, two_sided=two_sided)), exact) for c in sizes]
    smooth = not isinstance(phi, Blocks) and phi != "relu"
    if two_sided and not smooth:  # exact between two kinks, but for what tanh adds
        assert max(errors) < 1e-7
        return
    order = math.log(errors[0] / errors[1]) / math.log(sizes[0] / sizes[1])
    assert order == pytest.approx(2.0 if two_sided else 1.0, abs=0.1), errors
    assert errors[1] < (1e-6 if two_sided else 1e-3)


def test_it_is_the_gradient_of_the_lifted_objective():
    """By finite differences of J_c(v) = min_X c <g, X> + D(X, A X + v), solved by the equation."""
    c, phi = 0.3, Tanh()
    A = torch.randn(6, 6)
    A = 0.5 * A / A.abs().sum(1, keepdim=True)
    v, g = torch.randn(1, 6), torch.randn(1, 6)
    g = g / g.abs().max()

    def objective(v):
        x = torch.zeros(1, 6)
        for _ in range(400):  # plain damped iteration of the stationarity condition
            z = x @ A.mT + v
            x = 0.5 * x + 0.5 * phi(z - (phi(z) - x) @ A - c * g)
        return float(c * (g * x).sum() + phi.divergence(x, x @ A.mT + v))

    leaf = v.clone().requires_grad_()
    adjoint = Lifted(c=c, two_sided=False)
    x = fixed_point(AffineMap(A, leaf, phi), adjoint=adjoint).value
    (found,) = torch.autograd.grad((g * x).sum(), leaf)
    for i in range(6):
        step = torch.zeros(1, 6)
        step[0, i] = 1e-5
        slope = (objective(v + step) - objective(v - step)) / 2e-5 / c
        assert float(found[0, i]) == pytest.approx(slope, abs=1e-7)


def test_the_size_of_the_loss_does_not_matter():
    layer, u, y = layer_and_data("tanh")
    plain = gradient(layer, u, y, Lifted(c=0.1))
    small = gradient(layer, u, y, Lifted(c=0.1), 1e-8)
    torch.testing.assert_close(small * 1e8, plain, rtol=1e-9, atol=1e-12)


def test_a_sample_does_not_see_its_batch_mates():
    layer, u, _ = layer_and_data("tanh")
    layer.adjoint = Lifted(c=0.1)
    u.requires_grad_()
    (together,) = torch.autograd.grad(layer(u).square().sum(), u)
    (alone,) = torch.autograd.grad(layer(u[2:3]).square().sum(), u)
    torch.testing.assert_close(together[2], alone[2], rtol=1e-9, atol=1e-12)
    weights = torch.zeros(6, 1)
    weights[2] = 1.0
    (masked,) = torch.autograd.grad((weights * layer(u).square()).sum(), u)
    torch.testing.assert_close(masked[2], alone[2], rtol=1e-9, atol=1e-12)
    assert float(masked[0].abs().max()) == 0.0


def test_few_steps_are_a_truncated_series():
    layer, u, y = layer_and_data("tanh")
    exact = gradient(layer, u, y, "implicit")
    errors = [off(gradient(layer, u, y, Lifted(c=1e-4, steps=k)), exact) for k in (1, 4, 16, 64)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 1e-2 and errors[-1] < 1e-5


def test_float32_and_the_other_maps():
    layer, u, y = layer_and_data("relu", torch.float32)
    exact = gradient(layer, u, y, "implicit")
    assert off(gradient(layer, u, y, Lifted(c=1e-3)), exact) < 2e-3
    monotone = MonotoneLayer(5, 3, 8, activation="tanh")
    data = torch.randn(6, 5)
    exact = gradient(monotone, data, y, "implicit")
    assert off(gradient(monotone, data, y, Lifted(c=1e-4)), exact) < 1e-6
    A = torch.tensor([[0.2, 0.5], [-0.1, 0.3]], requires_grad=True)
    model = ImplicitModel(A, torch.eye(2), torch.eye(2), phi="tanh")
    out = [model(data[:, :2], adjoint=a).square().sum() for a in ("implicit", Lifted(c=1e-4))]
    grads = [torch.autograd.grad(o, A)[0] for o in out]
    assert off(grads[1], grads[0]) < 1e-6


def test_failed_samples_get_no_gradient_and_spoil_none():
    layer, u, _ = layer_and_data("tanh")
    layer.adjoint = Lifted(c=0.01)
    (good,) = torch.autograd.grad(layer.solve(u[1:]).value.sum(), layer.W)
    bad = u.clone()
    bad[0, 0] = torch.nan
    solution = layer.solve(bad, on_failure="return")
    (found,) = torch.autograd.grad(solution.value[solution.converged].sum(), layer.W)
    torch.testing.assert_close(found, good, rtol=1e-9, atol=1e-12)
    solution = layer.solve(bad, on_failure="return")
    with pytest.raises(ConvergenceError, match=r"samples \[0\]"):
        solution.value.sum().backward()


def test_second_derivatives_raise():
    layer, u, _ = layer_and_data("tanh")
    layer.adjoint = Lifted()
    (first,) = torch.autograd.grad(layer(u).sum(), layer.W, create_graph=True)
    with pytest.raises(RuntimeError, match="more often than it was attached"):
        first.sum().backward()


def test_no_gradient_asked_for_costs_nothing_and_changes_nothing():
    layer, u, _ = layer_and_data("tanh")
    with torch.no_grad():
        plain = layer(u)
        layer.adjoint = "lifted"
        assert layer.adjoint == Lifted()
        assert torch.equal(layer(u), plain)


def test_refusals():
    for c in (0.0, -1.0, math.inf, "x", True):
        with pytest.raises(ValueError, match="expected a positive number"):
            Lifted(c=c)
    with pytest.raises(ValueError, match="steps=0"):
        Lifted(steps=0)
    with pytest.raises(ValueError, match="Did you mean"):
        Lifted(solver="andersn")
    with pytest.raises(TypeError, match=r"expected a map x -> phi\(A x \+ v\)"):
        fixed_point(lambda z: 0.5 * z, torch.ones(2, 3), adjoint=Lifted())
    f = AffineMap(torch.zeros(3, 3), torch.ones(2, 3, requires_grad=True), Softmax())
    assert fixed_point(f, adjoint=Lifted()).value.requires_grad
    gelu = ImplicitLayer(2, 1, 3, activation="gelu", well_posed=None, adjoint=Lifted())
    with pytest.raises(ValueError, match="no Fenchel divergence"):
        gelu(torch.randn(2, 2))
    layer, u, _ = layer_and_data("tanh")
    layer.adjoint = Lifted()
    with pytest.raises(RuntimeError, match=r"torch\.func transform"):
        torch.func.grad(lambda u: layer(u).sum())(u)
