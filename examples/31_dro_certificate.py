"""WRM training lowers the proved worst-case loss on digits; it prints certificate, attack and loss.

For every radius rho the mean loss over all laws within a Wasserstein distance rho of the test images
is at most gamma rho^2 + E phi_gamma (the certificate, above) and at least what a transport attack
finds (below). The constant that makes the first a proof is computed from the weights. The figure is
that of Sinha, Namkoong and Duchi (2018), for a plain network and one trained by WRM.

    python examples/31_dro_certificate.py [--out certificate.png] [--seed N] [--quick]
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

from implicitdl import ImplicitLayer, dro


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images of 8 x 8 pixels in [0, 1], a quarter of them kept for the test."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(
        images / 16, labels, test_size=0.25, stratify=labels, random_state=seed
    )
    u, u_test = (torch.tensor(part, dtype=torch.float32) for part in split[:2])
    t, t_test = (torch.tensor(part) for part in split[2:])
    return u, u_test, t, t_test


def network(kind: str) -> nn.Module:
    """A perceptron with ELU, or one implicit layer in place of its hidden layers; both are smooth."""
    if kind == "implicit":
        return ImplicitLayer(64, 10, state_features=20, activation="elu", direct=False)
    return nn.Sequential(nn.Linear(64, 32), nn.ELU(), nn.Linear(32, 10))


def train(
    kind: str, gamma: float | None, u: Tensor, t: Tensor, epochs: int, seed: int
) -> nn.Module:
    """Adam, on the loss or on the loss at worst-case inputs."""
    torch.manual_seed(seed)
    net = network(kind)
    training = dro.WassersteinTraining(net, gamma=gamma or 1.0, steps=5)
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3, weight_decay=0.05)
    for _ in range(epochs):
        for batch in torch.randperm(len(u)).split(128):
            if gamma is None:
                loss = functional.cross_entropy(net(u[batch]), t[batch])
            else:
                loss = training(u[batch], t[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("certificate.png"))
    parser.add_argument("--quick", action="store_true", help="fewer epochs, perceptron only")
    arguments = parser.parse_args()
    u, u_test, t, t_test = digits(arguments.seed)
    data = (u_test[:60], t_test[:60]) if arguments.quick else (u_test, t_test)
    radii = [0.0, 0.03, 0.06, 0.1, 0.15, 0.2]
    curves = {}
    for kind in ["perceptron"] if arguments.quick else ["perceptron", "implicit"]:
        for name, gamma in (("plain", None), ("WRM", 2.0)):
            net = train(kind, gamma, u, t, 16 if arguments.quick else 25, arguments.seed)
            training = dro.WassersteinTraining(net, gamma=1.0)
            with torch.no_grad():
                accuracy = (net(u_test).argmax(1) == t_test).double().mean().item()
            proof = training.certificate(data, radius=0.1)
            assert proof.is_certificate, proof.reason
            above = [proof.at(r) for r in radii]
            below = [proof.nominal] + [
                float(training.attack(data, r, steps=20).losses.mean()) for r in radii[1:]
            ]
            curves[f"{kind}, {name}"] = above, below
            print(
                f"{kind}, {name}: accuracy {100 * accuracy:.1f} %, L = {proof.L_zz:.3g}, loss "
                f"{proof.nominal:.3f}; within 0.1 proved below {above[3]:.3f}, attacked {below[3]:.3f}"
            )
            assert all(a >= b for a, b in zip(above, below, strict=True)), (
                "an attack beat the proof"
            )

    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for k, (name, (above, below)) in enumerate(curves.items()):
        axes.plot(radii, above, color=f"C{k}", label=f"{name}: certificate")
        axes.plot(radii, below, color=f"C{k}", linestyle="--", label=f"{name}: attack")
    axes.set(xlabel="Wasserstein radius", ylabel="mean loss", yscale="log")
    axes.legend(fontsize="small")
    figure.savefig(arguments.out, dpi=120)
    print(f"drawn: {arguments.out}")
    assert curves["perceptron, WRM"][0][-1] < curves["perceptron, plain"][0][-1]


if __name__ == "__main__":
    main()
