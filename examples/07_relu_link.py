"""ReLU is a small convex program, and others can take its place; it prints how far they are apart.

relu(v) is the nearest point to v with x >= 0, the solution of a quadratic program. So the equation
x = relu(A x + B u + b) asks for an x in K = {x >= 0} with

    F(x)'(y - x) >= 0 for all y in K,    F(x) = (I - A) x - B u - b,

a variational inequality: strongly monotone, with one solution, where I - A is. First a monotone
layer's equilibrium is found with the program in place of ReLU: same values, same gradients. Then K
becomes what no activation can be: a polytope. Five routes share one unit of traffic, two of them a
bridge with room for 0.3; drivers choose the cheapest route, costs rise with the flows and depend on
each other without symmetry, so that no objective has the equilibrium as its minimum.

    python examples/07_relu_link.py [--seed N] [--quick]
"""

import argparse

import torch
from torch import Tensor

from implicitdl import MonotoneLayer, fixed_point
from implicitdl.convex import LinearProgram, Projection, QuadraticProgram


def program_for_relu(v: Tensor) -> Tensor:
    """argmin 1/2 ||x||^2 - v'x over -x <= 0."""
    eye = torch.eye(v.shape[-1], dtype=v.dtype)
    return QuadraticProgram()(eye, -v, -eye, v.new_zeros(v.shape[-1]))


def same_layer(batch: int) -> tuple[float, float]:
    """Largest differences of values and of gradients: MonotoneLayer, and the program inside."""
    layer = MonotoneLayer(4, 2, state_features=10, margin=0.3, dtype=torch.float64)
    u = torch.randn(batch, 4, dtype=torch.float64, requires_grad=True)
    leaves = [u, *layer.parameters()]
    weights = torch.randn(batch, 2, dtype=torch.float64)

    y = layer(u)
    wanted = torch.autograd.grad((weights * y).sum(), leaves)

    m = layer.model()  # A, B, C, D, b, d, connected with the layer's parameters
    v = u @ m.B.mT + m.b
    x = fixed_point(lambda x: program_for_relu(x @ m.A.mT + v), torch.zeros_like(v)).value
    z = x @ m.C.mT + u @ m.D.mT + m.d
    got = torch.autograd.grad((weights * z).sum(), leaves)
    apart = max(
        ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, wanted, strict=True)
    )
    return (z - y).abs().max().item(), apart


ROOM = 0.3  # of the bridge, routes 0 and 1
ROUTES = 5


def limits() -> dict[str, Tensor]:
    """K = {x >= 0, x_0 + x_1 <= ROOM, sum x = 1}."""
    bridge = torch.zeros(1, ROUTES, dtype=torch.float64)
    bridge[0, :2] = 1.0
    G = torch.cat([-torch.eye(ROUTES, dtype=torch.float64), bridge])
    h = torch.tensor([0.0] * ROUTES + [ROOM], dtype=torch.float64)
    ones = torch.ones(1, ROUTES, dtype=torch.float64)
    return {"G": G, "h": h, "A": ones, "b": torch.ones(1, dtype=torch.float64)}


def flows(M: Tensor, cost: Tensor) -> Tensor:
    """The x in K with (M x + cost)'(y - x) >= 0 for all y in K.  # (batch, ROUTES)"""
    onto = Projection("polytope", **limits())
    step = 0.5  # any positive one has the same solution; a small one contracts
    start = torch.full_like(cost, 1 / ROUTES)
    return fixed_point(lambda x: onto(x - step * (x @ M.mT + cost)), start).value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="fewer samples")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    batch = 8 if arguments.quick else 64

    values, gradients = same_layer(batch)
    print(f"x = relu(A x + B u + b), {batch} samples: outputs differ by {values:.1e}, "
          f"gradients by {gradients:.1e} relative")  # fmt: skip

    noise = torch.randn(ROUTES, ROUTES, dtype=torch.float64)
    M = torch.eye(ROUTES, dtype=torch.float64) + 0.3 * (noise - noise.mT)  # not symmetric
    low = torch.tensor([0.0, 0.1, 0.5, 0.6, 0.7], dtype=torch.float64)
    cost = (low + 0.1 * torch.rand(batch, ROUTES, dtype=torch.float64)).requires_grad_()
    x = flows(M, cost)
    # max over y in K of F(x)'(x - y), by a linear program: 0 at the equilibrium, and only there.
    with torch.no_grad():
        F = x @ M.mT + cost
        y = LinearProgram()(F, *limits().values())
        gap = (F * (x - y)).sum(1).abs().max().item()
    on_bridge = x[:, :2].sum(1).max().item()
    print(f"traffic on {ROUTES} routes: gap of the inequality {gap:.1e}, "
          f"on the bridge at most {on_bridge:.6f} of {ROOM}")  # fmt: skip

    # What a toll on route 2 does to the flow on route 4: backward, and a central difference.
    (slope,) = torch.autograd.grad(x[:, 4].sum(), cost)
    h = torch.zeros(ROUTES, dtype=torch.float64)
    h[2] = 1e-5
    with torch.no_grad():
        difference = (flows(M, cost + h)[:, 4] - flows(M, cost - h)[:, 4]) / 2e-5
    error = (slope[:, 2] - difference).abs().max().item()
    print(f"d flow 4 / d toll 2 = {slope[:, 2].mean():.4f} on average; differs from a central "
          f"difference by {error:.1e}")  # fmt: skip

    assert values < 1e-9 and gradients < 1e-8
    assert gap < 1e-8 and on_bridge < ROOM + 1e-9
    assert error < 1e-6


if __name__ == "__main__":
    main()
