"""certificate() finds two equilibria of an ill-posed A, the repaired A has one; it prints them all.

x = relu(A x + b) with A = [[0.5, 2.0], [0.7, -1.0]] has, for one b, two solutions. A loop started
at different points may return different answers, each with residual zero: no solver can notice. The
certificate does, shows both, and the sets of `implicitdl.wellposed` bring A back.

    python examples/05_certificate_and_repair.py [--seed N] [--quick]
"""

import argparse

import torch

from implicitdl import ImplicitModel, NotWellPosedError, wellposed
from implicitdl.activations import ReLU, SiLU


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="changes nothing: it is quick")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.set_default_dtype(torch.float64)

    print("1. Reading a certificate")
    A = torch.tensor([[0.5, 2.0], [0.7, -1.0]])
    report = wellposed.certificate(A, ReLU(), seed=arguments.seed)
    print(report)
    b, x1, x2 = report.equilibria
    residuals = [float((torch.relu(A @ x + b) - x).abs().max()) for x in (x1, x2)]
    print(f"b  = {b.tolist()}\nx1 = {x1.tolist()}\nx2 = {x2.tolist()}")
    print(f"residuals {residuals[0]:.0e} and {residuals[1]:.0e}, checked here\n")
    assert report.status == "ill-posed"
    assert max(residuals) < 1e-9 and float((x1 - x2).abs().max()) > 1e-3
    try:
        report.require()
    except NotWellPosedError as error:
        print(f"require() refuses it, margin {error.margin:.3g}\n")

    print("2. Repairing it: the nearest A of each set, and what it then certifies")
    # Perron-Frobenius is not convex without weights: there the distance is a local minimum.
    sets = [
        wellposed.InfNormBall(kappa=0.95),
        wellposed.PerronFrobenius(kappa=0.95),
        wellposed.MatrixMeasure(gamma=0.95),
        wellposed.Monotone(m=0.05),
    ]
    for family in sets:
        repaired = family.project(A)
        moved = torch.linalg.matrix_norm(repaired - A)
        margins = [round(float(family.margin(M)), 2) + 0.0 for M in (A, repaired)]
        proof = wellposed.certificate(repaired, ReLU())
        print(
            f"{family!s:<28} margin {margins[0]:+.2f} -> {margins[1]:.2f}, "
            f"moved by {moved:.3f}, {proof.condition}"
        )
        assert proof.well_posed and family.contains(repaired)

    print("\n3. One equilibrium now, from any start, with a bound on its error")
    repaired = sets[0].project(A)
    proof = wellposed.certificate(repaired, ReLU())
    model = ImplicitModel(repaired, torch.eye(2), torch.eye(2))
    starts = 100 * torch.randn(5, 2)
    states = model.solve(b.abs().expand(5, 2), x0=starts).value
    spread = float((states - states[0]).abs().max())
    bound = proof.error_bound(torch.relu(states @ repaired.mT + b.abs()) - states)
    print(
        f"five random starts end within {spread:.1e}; certified error at most {bound.max():.1e}\n"
    )
    assert spread <= 2 * float(bound.max())

    print("4. Rescaling: long rows are no obstacle where the Perron root of |A| is below 1")
    A = torch.tensor([[0.2, 5.0], [0.05, 0.2]])
    model = ImplicitModel(A, torch.randn(2, 3), torch.randn(1, 2))
    same = model.rescale(kappa=0.9)
    u = torch.randn(100, 3)
    gap = float((model(u) - same(u)).abs().max())
    print(model.certificate())
    print(
        f"||A||_inf {A.abs().sum(1).max():.2f} -> {same.A.abs().sum(1).max():.2f}, outputs differ "
        f"by {gap:.0e}\n"
    )
    assert same.A.abs().sum(1).max() <= 0.9 and gap < 1e-8

    print("5. The slope of the activation counts: SiLU reaches 1.0998, not 1")
    silu = wellposed.certificate(torch.tensor([[0.99]]), SiLU())
    print(f"A = 0.99: {silu.status}, {len(silu.equilibria[1:])} equilibria shown")
    fine = wellposed.certificate(torch.tensor([[0.9]]), SiLU())
    print(f"A = 0.90: {fine}")
    assert silu.status == "ill-posed" and fine.well_posed


if __name__ == "__main__":
    main()
