"""A trained MLP becomes an implicit model and its zero blocks are opened; it prints what that gains.

The network is converted exactly: its A is strictly block-triangular, one block a layer. Then the
blocks above the diagonal (skip connections that it did not have) and at last all of A (feedback,
too) become parameters that start at zero, trained on from where the network stands. A set keeps A
well-posed all the way. The control trains the network's own blocks on for as long.

    python examples/06_opening_a_network.py [--data DIR] [--seed N] [--quick]
"""

import argparse
import copy
import gzip
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from implicitdl import ImplicitLayer, to_implicit

WIDTH = 12  # narrow and deep: four layers of a dozen neurons


def digits(seed: int) -> tuple[Tensor, ...]:
    """Images and labels, to train on and to test with."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(
        images / 16.0, labels, test_size=0.25, stratify=labels, random_state=seed
    )
    return tuple(torch.tensor(part) for part in split)


def mnist(folder: Path) -> tuple[Tensor, ...]:
    """MNIST's four files, the same way: 10,000 images to train on."""

    def read(name: str, skip: int) -> np.ndarray:
        plain, packed = folder / name, folder / f"{name}.gz"
        raw = plain.read_bytes() if plain.exists() else gzip.decompress(packed.read_bytes())
        return np.frombuffer(raw, np.uint8, offset=skip)

    out = []
    for part in ("train", "t10k"):
        images = read(f"{part}-images-idx3-ubyte", 16).reshape(-1, 784)[:10_000] / 255.0
        out.append(torch.tensor(images))
    for part in ("train", "t10k"):
        out.append(torch.tensor(read(f"{part}-labels-idx1-ubyte", 8)[:10_000].astype(np.int64)))
    return tuple(out)


def train(model: nn.Module, u: Tensor, t: Tensor, epochs: int, rate: float) -> None:
    """An ordinary training loop."""
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-2)
    for _ in range(epochs):
        for batch in torch.randperm(len(u)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(u[batch]), t[batch]).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, u: Tensor, t: Tensor) -> float:
    """In per cent."""
    return 100 * (model(u).argmax(1) == t).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of MNIST files, in place of digits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="fewer epochs")
    arguments = parser.parse_args()
    data = mnist(arguments.data) if arguments.data else digits(arguments.seed)
    u, u_test, t, t_test = (x.float() if x.is_floating_point() else x for x in data)
    epochs = 2 if arguments.quick else 20

    torch.manual_seed(arguments.seed)
    parts: list[nn.Module] = [nn.Linear(u.shape[1], WIDTH), nn.ReLU()]
    for _ in range(3):
        parts += [nn.Linear(WIDTH, WIDTH), nn.ReLU()]
    net = nn.Sequential(*parts, nn.Linear(WIDTH, 10))
    train(net, u, t, epochs, 3e-3)
    model = to_implicit(net, u[:1])
    print(f"{model}\n")
    before = accuracy(net, u_test, t_test)
    print(f"the network after {epochs} epochs: {before:.2f} %; then as many again of")

    found = {}
    for trainable, what in {
        "": "the network itself",
        "blocks": "B, C, D and its own blocks of A",
        "upper": "and those above the diagonal",
        "all": "and all of A",
    }.items():
        if trainable:
            trained: nn.Module = ImplicitLayer.from_model(model, trainable=trainable)
            assert torch.allclose(trained(u_test), net(u_test), atol=1e-3)
        else:
            trained = copy.deepcopy(net)
        train(trained, u, t, epochs, 1e-3)
        found[trainable] = accuracy(trained, u_test, t_test)
        print(f"  {what:<32} {found[trainable]:.2f} %", end="")
        if isinstance(trained, ImplicitLayer):
            opened = trained.W.numel() if trained.mask is None else int(trained.mask.sum())
            proof = trained.certificate().require()
            print(f", {opened} entries of A trained, well-posed: {proof.condition}", end="")
        print()
    rest, of_A = found["blocks"] - found[""], found["all"] - found["blocks"]
    print(f"opening B, C and D: {rest:+.2f} points; all of A besides: {of_A:+.2f} points")


if __name__ == "__main__":
    main()
