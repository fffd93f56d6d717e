"""One ImplicitLayer replaces three Linear layers and their ReLUs; it prints both accuracies.

`Classifier` stands for a model that somebody already has: a normalisation, a stack of Linear and
ReLU, a head. Only the line that builds the stack changes. The replacement has the same interface,
`(*, in_features)` to `(*, out_features)`, no more parameters, and the training code is untouched.

    python examples/02_in_place_of_a_stack.py [--seed N] [--quick]
"""

import argparse

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from implicitdl import ImplicitLayer


class Classifier(nn.Module):
    """Somebody's model: (batch, 64) pixels in, (batch, 10) scores out."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.body = body
        self.head = nn.Linear(32, 10)

    def forward(self, u: Tensor) -> Tensor:
        return self.head(self.body(self.norm(u)).relu())


def stack() -> nn.Module:
    """What the model had."""
    return nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)
    )


def implicit() -> nn.Module:
    """What it gets instead: 64 + 64 + 32 outputs of three layers become 60 states of one."""
    return ImplicitLayer(64, 32, state_features=60, direct=False)


def train(model: nn.Module, u: Tensor, t: Tensor, epochs: int) -> None:
    """Somebody's training loop."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    criterion = nn.CrossEntropyLoss()
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(u)).split(64):
            optimizer.zero_grad()
            criterion(model(u[batch]), t[batch]).backward()
            optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="fewer epochs")
    arguments = parser.parse_args()
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(
        images, labels, test_size=0.25, stratify=labels, random_state=arguments.seed
    )
    u, u_test = (torch.tensor(part, dtype=torch.float32) / 16 for part in split[:2])
    t, t_test = (torch.tensor(part) for part in split[2:])

    accuracy, size = {}, {}
    for name, body in {"stack": stack, "implicit": implicit}.items():
        torch.manual_seed(arguments.seed)
        model = Classifier(body())
        train(model, u, t, epochs=4 if arguments.quick else 20)
        model.eval()
        with torch.no_grad():
            accuracy[name] = (model(u_test).argmax(1) == t_test).double().mean().item()
        size[name] = sum(p.numel() for p in model.parameters())
        print(f"{name:>8}: test accuracy {100 * accuracy[name]:.2f} %, {size[name]:,} parameters")

    # Evaluation keeps gradients: the network's sensitivity to a pixel is an ordinary backward pass.
    probe = u_test[:1].requires_grad_()
    model(probe).logsumexp(1).sum().backward()
    print(f"largest derivative by a pixel, in eval mode: {probe.grad.abs().max():.3f}")

    assert size["implicit"] <= size["stack"]
    assert probe.grad.abs().max() > 0
    allowed = 0.03 if arguments.quick else 0.015
    lost = accuracy["stack"] - accuracy["implicit"]
    assert lost <= allowed, f"the implicit model is {100 * lost:.2f} points below, too many"
    points = round(-100 * lost, 2) + 0.0
    share = size["implicit"] / size["stack"]
    print(f"difference: {points:+.2f} points with {share:.0%} of the parameters")


if __name__ == "__main__":
    main()
