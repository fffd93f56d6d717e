"""Group DRO protects those whom a shortcut fails; it prints the worst group's accuracy, three ways.

The task is to tell the digits 0-4 from 5-9. In the training images one corner pixel is lit for nearly
all of one class and dark for nearly all of the other: a shortcut. Four groups follow (class and
pixel), two of them rare. Plain training minimises the mean loss; reweighting counts the groups
equally; group DRO minimises the loss of the worst one.

    python examples/30_dro_groups.py [--seed N] [--quick]
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from implicitdl import dro


def spurious(seed: int, share: float) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(images, classes, groups) to train on and, all groups alike, to test on."""
    draw = torch.Generator().manual_seed(seed)
    digits = load_digits()
    u = torch.tensor(digits.data, dtype=torch.float32) / 16
    t = torch.tensor(digits.target >= 5).long()
    order = torch.randperm(len(u), generator=draw)
    parts = []
    for rows, agree in ((order[:1200], share), (order[1200:], 0.5)):
        lit = torch.where(torch.rand(len(rows), generator=draw) < agree, t[rows], 1 - t[rows])
        images = u[rows].clone()
        images[:, 0] = 3.0 * lit
        parts.append((images, t[rows], 2 * t[rows] + lit))
    return parts


def train(kind: str, u: Tensor, t: Tensor, g: Tensor, epochs: int, seed: int) -> nn.Module:
    """One network, one optimiser; only the line that makes one number of the losses differs."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 24), nn.ELU(), nn.Linear(24, 2))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.05)
    sizes = torch.bincount(g, minlength=4)
    worst = dro.GroupDRO(sizes, eta=0.05, adjustment=0.5)
    for _ in range(epochs):
        for batch in torch.randperm(len(u)).split(100):
            losses = functional.cross_entropy(net(u[batch]), t[batch], reduction="none")
            loss = {
                "plain": lambda x, b: x.mean(),
                "reweighted": lambda x, b: dro.reweighted(x, g[b], sizes),
                "group DRO": lambda x, b: worst(x, g[b]),
            }[kind](losses, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="fewer epochs")
    arguments = parser.parse_args()
    (u, t, g), (u_test, t_test, g_test) = spurious(arguments.seed, 0.97)
    print(f"training groups: {torch.bincount(g, minlength=4).tolist()} images")
    worst = {}
    for kind in ("plain", "reweighted", "group DRO"):
        net = train(kind, u, t, g, 15 if arguments.quick else 60, arguments.seed)
        with torch.no_grad():
            right = (net(u_test).argmax(1) == t_test).float()
        groups, _ = dro.group_means(right, g_test, 4)
        worst[kind] = float(groups.min())
        print(
            f"{kind:>10}: mean accuracy {100 * right.mean():.1f} %, worst group {100 * groups.min():.1f} %"
        )
    with torch.no_grad():
        losses = functional.cross_entropy(net(u), t, reduction="none")
    proof = dro.CVaR(0.1).bracket(losses)
    print(f"mean of the worst tenth of the training losses: {proof.lower:.4f} to {proof.upper:.4f}")

    assert worst["group DRO"] > worst["plain"] + 0.1
    assert proof.lower <= proof.upper + 1e-6


if __name__ == "__main__":
    main()
