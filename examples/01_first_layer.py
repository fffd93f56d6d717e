"""An ImplicitLayer is trained like any torch module; it prints its test accuracy on real digits.

The state x = relu(A x + B u + b) is an equilibrium, the prediction is y = C x + D u + d. Nothing in
the loop below knows about it: the optimiser is torch's own, and A stays where the equation has
exactly one solution, because the layer computes it from a free parameter W that way.

    python examples/01_first_layer.py [--seed N] [--quick]
"""

import argparse

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional

from implicitdl import ImplicitLayer


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1,797 scanned digits of 8 x 8 pixels, a quarter of them kept for the test."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=seed)
    u, u_test = (torch.tensor(part, dtype=torch.float32) / 16 for part in split[:2])
    t, t_test = (torch.tensor(part) for part in split[2:])
    return u, t, u_test, t_test


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="fewer epochs")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    u, t, u_test, t_test = digits(arguments.seed)

    layer = ImplicitLayer(64, 10, state_features=50)
    optimizer = torch.optim.Adam(layer.parameters(), lr=5e-3)
    epochs = 6 if arguments.quick else 30
    for _ in range(epochs):
        for batch in torch.randperm(len(u)).split(64):
            loss = functional.cross_entropy(layer(u[batch]), t[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    with torch.no_grad():
        accuracy = (layer(u_test).argmax(1) == t_test).double().mean().item()
        solution = layer.solve(u_test)
    print(f"test accuracy {100 * accuracy:.2f} % on {len(u_test)} digits, {epochs} epochs")
    print(layer.certificate())
    print(
        f"{int(solution.converged.sum())} of {len(u_test)} states found, "
        f"{int(solution.steps.max())} steps at most, error at most {solution.error_bound.max():.1e}"
    )

    asked = 0.92 if arguments.quick else 0.95
    assert accuracy >= asked, f"test accuracy {accuracy:.4f}, expected at least {asked}"
    assert layer.certificate().well_posed
    assert solution.converged.all()


if __name__ == "__main__":
    main()
