"""Layers written for cvxpylayers run unchanged as ConvexLayer; it prints engine and differences.

The problems that cvxpylayers is taught with, each set up once and given to both classes. ConvexLayer
solves those with linear and second-order cones itself and hands the others, with logarithms, to the
engine of cvxpylayers, checked. Differences are those of values and of gradients of a random loss,
relative to the largest entry; cvxpylayers has its exact settings (Clarabel to 1e-11, dense derivative),
as its default ones can be off by several per cent. Left out are instances that gradient_certificate
calls degenerate; last are errors against a formula.

    python examples/12_cvxpylayers.py [--seed N] [--quick]
"""

import argparse
import time

import cvxpy as cp
import torch
from cvxpylayers.torch import CvxpyLayer
from torch import Tensor

from implicitdl.convex import ConvexLayer, gradient_certificate

N = 8


def l1_regression():
    x, A, b = cp.Variable(N), cp.Parameter((3 * N, N)), cp.Parameter(3 * N)
    return cp.Problem(cp.Minimize(cp.norm1(A @ x - b)), [x >= 0]), [A, b], [x]


def relu():
    x, v = cp.Variable(N), cp.Parameter(N)
    return cp.Problem(cp.Minimize(cp.sum_squares(x - v)), [x >= 0]), [v], [x]


def sigmoid():
    x, v = cp.Variable(N), cp.Parameter(N)
    return cp.Problem(cp.Minimize(-v @ x - cp.sum(cp.entr(x) + cp.entr(1 - x)))), [v], [x]


def sparsemax():
    x, v = cp.Variable(N), cp.Parameter(N)
    return cp.Problem(cp.Minimize(cp.sum_squares(x - v)), [cp.sum(x) == 1, x >= 0]), [v], [x]


def softmax_with_limits():
    x, v, most = cp.Variable(N), cp.Parameter(N), cp.Parameter(N)
    limits = [cp.sum(x) == 1, x <= most]
    return cp.Problem(cp.Minimize(-v @ x - cp.sum(cp.entr(x))), limits), [v, most], [x]


def choice_of_two():
    x, v = cp.Variable(N), cp.Parameter(N)
    entropy = cp.sum(cp.entr(x) + cp.entr(1 - x))
    return cp.Problem(cp.Minimize(-v @ x - entropy), [cp.sum(x) == 2]), [v], [x]


def monotone_regression():
    x, v = cp.Variable(N), cp.Parameter(N)
    return cp.Problem(cp.Minimize(cp.sum_squares(x - v)), [cp.diff(x) >= 0]), [v], [x]


def denoising():
    x, v, weight = cp.Variable(N), cp.Parameter(N), cp.Parameter(nonneg=True)
    rough = cp.norm1(cp.diff(x, 2))
    return cp.Problem(cp.Minimize(cp.norm2(x - v) + weight * rough)), [v, weight], [x]


def values(parameters: list, batch: int) -> list[Tensor]:
    """Random parameters; limits and weights are positive and leave room."""
    out = [torch.randn(batch, *p.shape, dtype=torch.float64) for p in parameters]
    if len(parameters[0].shape) == 1:
        out[1:] = [0.2 + 0.3 * torch.rand_like(value) for value in out[1:]]
    return [value.requires_grad_() for value in out]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a small batch")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    batch = 16 if arguments.quick else 128
    tight = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-11)
    exact = {"solve_method": "Clarabel", "mode": "dense", **tight}
    makers = [l1_regression, relu, sigmoid, sparsemax, softmax_with_limits, choice_of_two]
    makers += [monotone_regression, denoising]
    formulas, largest = {"relu": torch.relu, "sigmoid": torch.sigmoid}, 0.0
    print(f"batch {batch}; time is that of cvxpylayers over ours, both ways")
    print(f"{'problem':<20} engine   values  gradients  left out   time   error: theirs, ours")
    for make in makers:
        problem, parameters, variables = make()
        theta = values(parameters, batch)
        weights, results, seconds = torch.randn(batch, N).double(), [], []
        for kind, options in ((CvxpyLayer, {"solver_args": exact}), (ConvexLayer, {})):
            layer = kind(problem, parameters=parameters, variables=variables)
            for _ in range(2):  # the second one is timed
                begin = time.perf_counter()
                (x,) = layer(*theta, **options)
                gradients = torch.autograd.grad((weights * x).sum(), theta)
            seconds.append(time.perf_counter() - begin)
            results.append((x.detach(), *gradients))
        sure = torch.ones(batch, dtype=torch.bool)
        if layer.engine == "native":  # at a change of the active constraints are several gradients
            sure = ~gradient_certificate(layer.solve(*theta))["degenerate"]
        pairs = [(a[sure], b[sure]) for a, b in zip(*results, strict=True)]
        apart = [float((a - b).abs().max() / a.abs().max()) for a, b in pairs]
        line = f"{make.__name__:<20} {layer.engine:<7} {apart[0]:7.0e} {max(apart[1:]):10.0e}"
        line += f"{int((~sure).sum()):9}{seconds[0] / seconds[1]:7.2f}"
        if formula := formulas.get(make.__name__):
            errors = [(r[0] - formula(theta[0].detach())).abs().max() for r in results]
            line += "".join(f"{error:10.0e}" for error in errors)
        print(line)
        largest = max(largest, *apart)
    print(f"largest difference {largest:.1e}")
    assert largest < 1e-4


if __name__ == "__main__":
    main()
