"""EquilibriumLayer differentiates through your own cell exactly; it prints the gradient's error.

The cell is a small convolutional block f(z, u) on 8 x 8 images: z is the state, u the features of
the image, added at every step. The layer finds z = f(z, u) and differentiates through the equation,
not through the steps: memory does not grow with their number. The gradient is compared with a
central difference in float64; then the network is trained on scikit-learn's digits.

Nothing is known of a general f, and training may lead it to where z = f(z, u) has no solution or
several; a solve that fails then raises. This cell cannot get there: its kernels are scaled so that
it contracts.

    python examples/03_deep_equilibrium.py [--seed N] [--quick]
"""

import argparse

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

from implicitdl import EquilibriumLayer


class Cell(nn.Module):
    """f(z, u) = tanh(K z + u), K a convolution whose row sums of absolute values are <= 0.9.

    tanh has slopes of at most 1, so f contracts by 0.9 in the largest entry. Normalise over the
    channels or over groups if you like, never over the batch: samples must not depend on others.
    """

    kappa = 0.9

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        kernel = self.conv.weight
        length = kernel.abs().sum(dim=(1, 2, 3), keepdim=True)
        kernel = kernel * (self.kappa / length.clamp_min(self.kappa))
        return torch.tanh(functional.conv2d(z, kernel, self.conv.bias, padding=1) + u)


def network(channels: int) -> nn.Sequential:
    """Pixels -> features -> equilibrium -> scores."""
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1),
        EquilibriumLayer(Cell(channels), (channels, 8, 8), contraction=Cell.kappa),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(channels * 16, 10),
    )


def gradient_error(u: Tensor) -> float:
    """Relative difference of backward and (L(w + h e) - L(w - h e)) / 2 h, along a random e."""
    model = network(4).double()
    weight = model[1].f.conv.weight
    direction = torch.randn_like(weight)
    u = u.double()

    def loss() -> Tensor:
        return model(u).square().mean()

    loss().backward()
    exact = (weight.grad * direction).sum().item()
    h = 1e-5
    with torch.no_grad():
        weight += h * direction
        above = loss().item()
        weight -= 2 * h * direction
        below = loss().item()
    return abs(exact - (above - below) / (2 * h)) / abs(exact)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="fewer epochs")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(
        images, labels, test_size=0.25, stratify=labels, random_state=arguments.seed
    )
    u, u_test = (torch.tensor(p, dtype=torch.float32).view(-1, 1, 8, 8) / 16 for p in split[:2])
    t, t_test = (torch.tensor(part) for part in split[2:])

    error = gradient_error(u[:8])
    print(f"gradient against a central difference: relative error {error:.1e}")

    model = network(channels=8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(3 if arguments.quick else 10):
        for batch in torch.randperm(len(u)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(u[batch]), t[batch]).backward()
            optimizer.step()

    with torch.no_grad():
        accuracy = (model(u_test).argmax(1) == t_test).double().mean().item()
        solution = model[1].solve(model[0](u_test))
    print(f"test accuracy {100 * accuracy:.2f} % on {len(u_test)} digits")
    steps = solution.steps.double()
    print(f"equilibria found in {steps.median():.0f} steps (median), {steps.max():.0f} at most")

    assert error < 1e-6, f"relative error of the gradient {error:.1e}, expected below 1e-6"
    asked = 0.90 if arguments.quick else 0.95
    assert accuracy >= asked, f"test accuracy {accuracy:.4f}, expected at least {asked}"
    assert solution.converged.all()


if __name__ == "__main__":
    main()
