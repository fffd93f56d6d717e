"""Two implicit classifiers trained for certificates: most test images are proved right over a whole ball.

One is trained on interval bounds of its worst margins for the infinity norm, the other, a monotone
layer, on its Lipschitz constant for the 2-norm. What is proved is counted by `certify_accuracy`, beside
what an attack breaks. scikit-learn's digits by default; MNIST from a folder of its files.

    python examples/33_certified_training.py [--data DIR] [--epochs N] [--seed N] [--quick]
"""

import argparse
import time
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from implicitdl import ImplicitLayer, MonotoneLayer, certify
from implicitdl.wellposed import InfNormBall

Data = tuple[Tensor, Tensor, Tensor, Tensor]


def digits(seed: int) -> Data:
    """Train and test images with pixels in [0, 1], and their labels."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(
        images / 16, labels, test_size=0.25, stratify=labels, random_state=seed
    )
    u, u_test = (torch.tensor(part, dtype=torch.float32) for part in split[:2])
    t, t_test = (torch.tensor(part) for part in split[2:])
    return u, u_test, t, t_test


def mnist(folder: str) -> Data:
    from implicitdl import _data

    data = _data.mnist(folder, validation=0.0)
    return data.train_images, data.test_images, data.train_labels, data.test_labels


def train(
    layer: nn.Module,
    loss: Callable[[Tensor, Tensor, float], Tensor],
    u: Tensor,
    t: Tensor,
    epochs: int,
    batch: int,
    rate: float,
) -> float:
    """Adam and a cosine; the radius grows over the first half. Returns the seconds."""
    start = time.perf_counter()
    optimizer = torch.optim.Adam(layer.parameters(), rate)
    steps = epochs * -(-len(u) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        if step % -(-len(u) // batch) == 0:
            order = iter(torch.randperm(len(u)).split(batch))
        index = next(order)
        value = loss(u[index], t[index], min(1.0, 2 * step / steps))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder of MNIST's files, as torchvision lays them out")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few epochs and test images")
    arguments = parser.parse_args()
    u, u_test, t, t_test = mnist(arguments.data) if arguments.data else digits(arguments.seed)
    epochs = 8 if arguments.quick else arguments.epochs
    count = 60 if arguments.quick else len(u_test)
    batch, states = (200, 100) if arguments.data else (64, 50)
    torch.manual_seed(arguments.seed)

    def interval(v: Tensor, y: Tensor, share: float) -> Tensor:
        return certify.robust_loss(box, 0.1 * share, v, y, clip=(0.0, 1.0))

    def lipschitz(v: Tensor, y: Tensor, share: float) -> Tensor:
        return certify.robust_loss(mono, 0.3 * share, v, y, norm=2, method="lipschitz")

    ball = InfNormBall(kappa=0.3)  # loops that contract strongly widen intervals little
    box = ImplicitLayer(
        u.shape[1], 10, states, activation="hardtanh", well_posed=ball, direct=False
    )
    mono = MonotoneLayer(u.shape[1], 10, states, margin=1.0, direct=False)
    jobs = (
        ("intervals", box, interval, "inf", "interval", (0.02, 0.05, 0.1)),
        ("monotone", mono, lipschitz, 2, "lipschitz", (0.1, 0.2, 0.3)),
    )
    for name, layer, loss, norm, method, radii in jobs:
        seconds = train(layer, loss, u, t, epochs, batch, 5e-3 if layer is box else 2e-3)
        for radius in radii:
            report = certify.certify_accuracy(
                layer, (u_test[:count], t_test[:count]), radius, norm, method, clip=(0.0, 1.0)
            )
            print(
                f"{name}, {seconds:.0f} s, norm {norm}, radius {radius}: clean "
                f"{100 * report.clean_accuracy:.2f} %, attacked {100 * report.attacked_accuracy:.2f} %, "
                f"proved {100 * report.certified_accuracy:.2f} %"
            )
            assert report.certified_accuracy <= report.attacked_accuracy <= report.clean_accuracy


if __name__ == "__main__":
    main()
