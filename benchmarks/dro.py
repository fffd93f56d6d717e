"""Distributionally robust fits and training, beside other packages and beside attacks.

    python benchmarks/dro.py [--quick] [--data DIR] [--out DIR]

Four parts: (1) closed-form Wasserstein fits against the `dro` package, the objective recomputed here
from everybody's theta and b; (2) growth with samples and features; (3) WRM certificates and the
attacks that try to beat them; (4) the worst group's accuracy. `--data` is a folder with MNIST, for
part 3. A peer that is not installed is named and left out: pip install --no-deps dro.
"""

import argparse
import importlib.metadata
import math
import sys
import time
import types
import warnings
from pathlib import Path
from typing import Any

import _harness as harness
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from implicitdl import ImplicitLayer, dro
from implicitdl._data import Dataset, digits, mnist
from implicitdl.dro._fits import fit, risk
from implicitdl.dro._losses import Ball, linear_loss

# ours -> the peer's name of the loss
LOSSES = {"logistic": "logistic", "hinge": "svm", "squares": "ols", "absolute": "lad"}
RADIUS = 0.05
# Seconds after which a peer's larger problems are left out.
PATIENCE = 60.0


def peer() -> Any:
    """The `dro` package's class, without the parts of it that need more packages; None if missing."""
    try:  # not by an import: this file has the same name
        found = importlib.metadata.distribution("dro")
    except importlib.metadata.PackageNotFoundError:
        return None
    folder = Path(str(found.locate_file("dro")))
    for name, path in (("dro", folder), ("dro.linear_model", folder / "linear_model")):
        module = types.ModuleType(name)
        module.__path__ = [str(path)]  # the packages' own __init__ import torchvision and more
        sys.modules[name] = module
    try:
        from dro.linear_model.wasserstein_dro import WassersteinDRO
    except ImportError as error:
        print(f"dro: not usable ({error})")
        return None
    return WassersteinDRO


def data(n: int, d: int, loss: str) -> tuple[np.ndarray, np.ndarray]:
    """A linear model with noise; classes by its sign."""
    rng = np.random.default_rng(n + d)
    X = rng.normal(size=(n, d))
    y = X @ (rng.normal(size=d) / math.sqrt(d)) + 0.5 * rng.normal(size=n)
    return X, np.sign(y) if LOSSES[loss] in ("logistic", "svm") else y


def of_peer(kind: Any, X: np.ndarray, y: np.ndarray, loss: str) -> tuple[np.ndarray, float, float]:
    """theta, b and seconds; the ball has the same radius (of squares, theirs is its square)."""
    model = kind(X.shape[1], LOSSES[loss])
    radius = RADIUS**2 if loss == "squares" else RADIUS
    model.update({"eps": radius, "p": 2, "kappa": "inf"})
    start = time.perf_counter()
    model.fit(X, y)
    return np.asarray(model.theta), float(model.b), time.perf_counter() - start


def fits(quick: bool) -> tuple[list[tuple[Any, ...]], Any]:
    """Rows of the first table, and whether all objectives agree to 6 digits."""
    sizes = [(200, 10), (1000, 50)] if quick else [(200, 10), (1000, 50), (20000, 50)]
    kind, rows, agree, slow = peer(), [], True, set()
    if kind is None:
        print("dro: not installed; pip install --no-deps dro")
    ball = Ball(RADIUS, 2.0, math.inf)
    for n, d in sizes:
        for loss in LOSSES:
            X, y = data(n, d, loss)
            one = linear_loss(loss)
            found = fit(X, y, one, ball, True)
            ours = harness.seconds_of(lambda X=X, y=y, one=one: fit(X, y, one, ball, True), 1.0, 3)
            theirs, ratio, gap = "-", "-", math.nan
            if kind is not None and loss not in slow:
                theta, b, seconds = of_peer(kind, X, y, loss)
                other, _ = risk(X, y, one, ball, theta, b)
                gap = (found.risk - other) / other  # below 0: ours is better
                agree = agree and abs(gap) <= 1e-6
                theirs, ratio = harness.duration(seconds), f"{seconds / ours:.0f}"
                if seconds > PATIENCE:
                    slow.add(loss)
            rows.append(
                (f"{n} x {d}", loss, found.method, f"{found.risk:.9f}", f"{found.gap:.0e}", f"{gap:.0e}",
                 harness.duration(ours), theirs, ratio)
            )  # fmt: skip
            print(*rows[-1], flush=True)
    return rows, agree if kind is not None else "not compared"


def memory() -> float:
    """GiB that are free."""
    try:
        text = Path("/proc/meminfo").read_text().split("MemAvailable:", 1)[1]
        return int(text.split()[0]) / 2**20
    except (OSError, IndexError, ValueError):
        return 4.0


def growth(quick: bool) -> list[tuple[Any, ...]]:
    """Seconds and peak memory as samples and features grow; the floor is one Gram matrix of X."""
    sizes = [(10**3, 20), (10**4, 20), (10**4, 100)]
    if not quick:
        sizes += [(10**5, 20), (10**5, 100), (10**6, 20), (10**6, 100)]
    rows = []
    for n, d in sizes:
        if 6 * 8 * n * d / 2**30 > memory():
            rows.append((f"{n} x {d}", "-", "left out", "not enough memory", "-", "-"))
            continue
        for loss in LOSSES:
            X, y = data(n, d, loss)
            start = time.perf_counter()
            X.T @ X
            floor = time.perf_counter() - start
            out: list[Any] = []
            start = time.perf_counter()
            more = harness.peak_memory(
                lambda X=X, y=y, loss=loss, out=out: out.append(
                    fit(X, y, linear_loss(loss), Ball(RADIUS, 2.0, math.inf), True)
                )
            )
            seconds = time.perf_counter() - start
            rows.append(
                (f"{n} x {d}", loss, f"{out[0].method}, {out[0].steps} steps", harness.duration(seconds),
                 f"{seconds / floor:.0f}", f"{more:.0f} MiB")
            )  # fmt: skip
            print(*rows[-1], flush=True)
            del X, y
    return rows


def smooth_networks(p: int) -> dict[str, nn.Module]:
    return {
        "ELU perceptron": nn.Sequential(nn.Linear(p, 32), nn.ELU(), nn.Linear(32, 10)),
        "implicit, tanh": ImplicitLayer(p, 10, 20, activation="tanh", direct=False),
    }


def attacks(net: nn.Module, training: Any, u: Tensor, t: Tensor, radius: float) -> dict[str, float]:
    """Mean losses of laws within the radius, each scaled to its full cost."""

    def mean(z: Tensor) -> float:
        with torch.no_grad():
            return float(functional.cross_entropy(net(z), t))

    def scaled(step: Tensor) -> Tensor:
        size = step.pow(2).sum(1).mean().sqrt()
        return u + step * (radius / size.clamp_min(1e-30))

    v = u.clone().requires_grad_()
    (g,) = torch.autograd.grad(functional.cross_entropy(net(v), t, reduction="sum"), v)
    random = max(mean(scaled(torch.randn_like(u) * torch.rand(len(u), 1))) for _ in range(5))
    steps = [g, torch.nn.functional.normalize(g, dim=1), g * g.norm(dim=1, keepdim=True)]
    gradient = max(mean(scaled(s)) for s in steps)
    z = u.clone()  # projected gradient steps on the mean loss, over the whole law at once
    for _ in range(40):
        z = z.detach().requires_grad_()
        (g,) = torch.autograd.grad(functional.cross_entropy(net(z), t, reduction="sum"), z)
        step = z.detach() + g * (0.2 * radius / g.pow(2).sum(1).mean().sqrt().clamp_min(1e-30)) - u
        size = float(step.pow(2).sum(1).mean().sqrt())
        z = u + step * min(1.0, radius / size)
    transport = float(training.attack((u, t), radius).losses.mean())
    return {"random": random, "gradient": gradient, "projected": mean(z), "transport": transport}


def certificates(sets: list[Dataset], quick: bool) -> tuple[list[tuple[Any, ...]], bool]:
    """Rows of the third table, and whether no attack was above a certificate."""
    rows, sound = [], True
    for set_ in sets:
        count = 1000 if quick else 4000
        u, t = set_.train_images[:count].double(), set_.train_labels[:count]
        m = 100 if quick else 300
        v, s = set_.test_images[:m].double(), set_.test_labels[:m]
        for name in smooth_networks(set_.features):
            for gamma in (None, 1.0):
                torch.manual_seed(0)
                net = smooth_networks(set_.features)[name].double()
                training = dro.WassersteinTraining(net, gamma=gamma or 1.0, steps=5)
                optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3, weight_decay=0.05)
                for _ in range(5 if quick else 15):
                    for batch in torch.randperm(len(u)).split(128):
                        if gamma is None:
                            loss = functional.cross_entropy(net(u[batch]), t[batch])
                        else:
                            loss = training(u[batch], t[batch])
                        optimizer.zero_grad()
                        loss.backward()
                        optimizer.step()
                tight = training.certificate((v, s), gamma=0.51 * training.smoothness(v).L_zz)
                for radius in (0.05, 0.2):
                    proof = training.certificate((v, s), radius=radius)
                    seen = attacks(net, training, v, s, radius)
                    best = max(seen.values())
                    sound = sound and proof.is_certificate and best <= proof.bound
                    rows.append(
                        (set_.name, name, "plain" if gamma is None else "WRM", radius,
                         f"{proof.L_zz:.3g}", f"{proof.nominal:.4f}",
                         f"{best:.4f} ({max(seen, key=seen.get)})", f"{proof.bound:.4f}",
                         f"{math.sqrt(tight.rho_hat):.4f}", f"{tight.bound - tight.attained:.0e}")
                    )  # fmt: skip
                    print(*rows[-1], flush=True)
    return rows, sound


def groups(quick: bool) -> list[tuple[Any, ...]]:
    """Mean and worst-group accuracy over seeds, with a shortcut in 97 % of the training images."""
    results: dict[str, list[tuple[float, float]]] = {}
    for seed in range(2 if quick else 5):
        set_ = digits(seed)
        draw = torch.Generator().manual_seed(seed)
        parts = []
        for images, labels, agree in (
            (set_.train_images, set_.train_labels, 0.97),
            (set_.test_images, set_.test_labels, 0.5),
        ):
            t = (labels >= 5).long()
            lit = torch.where(torch.rand(len(t), generator=draw) < agree, t, 1 - t)
            u = images.float().clone()
            u[:, 0] = 3.0 * lit
            parts.append((u, t, 2 * t + lit))
        (u, t, g), (u_test, t_test, g_test) = parts
        sizes = torch.bincount(g, minlength=4)
        for kind in ("ERM", "reweighted ERM", "CVaR 0.2", "group DRO", "group DRO, adjusted"):
            torch.manual_seed(seed)
            net = nn.Sequential(nn.Linear(64, 24), nn.ELU(), nn.Linear(24, 2)).float()
            worst = dro.GroupDRO(sizes, eta=0.05, adjustment=1.0 if "adjusted" in kind else 0.0)
            optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.05)
            for _ in range(20 if quick else 60):
                for batch in torch.randperm(len(u)).split(100):
                    losses = functional.cross_entropy(net(u[batch]), t[batch], reduction="none")
                    if kind == "ERM":
                        loss = losses.mean()
                    elif kind == "reweighted ERM":
                        loss = dro.reweighted(losses, g[batch], sizes)
                    elif kind == "CVaR 0.2":
                        loss = dro.cvar(losses, 0.2)
                    else:
                        loss = worst(losses, g[batch])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
            with torch.no_grad():
                right = (net(u_test).argmax(1) == t_test).float()
            each, _ = dro.group_means(right, g_test, 4)
            results.setdefault(kind, []).append((float(right.mean()), float(each.min())))
    rows = []
    for kind, pairs in results.items():
        mean, worst_ = np.array(pairs).T * 100
        rows.append(
            (kind, f"{mean.mean():.1f} +- {mean.std():.1f}", f"{worst_.mean():.1f} +- {worst_.std():.1f}",
             f"{worst_.min():.1f}")
        )  # fmt: skip
        print(*rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller sizes, under 2 minutes")
    parser.add_argument("--data", type=Path, help="a folder with MNIST, as torchvision lays it out")
    parser.add_argument("--out", type=Path, default=harness.RESULTS)
    parser.add_argument("--parts", default="1,2,3,4", help="which of the four parts, with commas")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_default_dtype(torch.float64)
    facts = harness.machine()
    print(harness.machine_line(facts))
    wanted, quick = set(arguments.parts.split(",")), arguments.quick
    pieces: list[str] = []
    data_: dict[str, Any] = {"machine": facts}
    if "1" in wanted:
        rows, agree = fits(quick)
        head = ("size", "loss", "method", "worst-case risk", "our gap", "ours less dro's, relative",
                "ours", "dro", "ratio")  # fmt: skip
        pieces.append(f"Fits, radius {RADIUS}, 2-norm. Objectives agree to 6 digits: {agree}.\n\n"
                      + harness.table(head, rows))  # fmt: skip
        data_["fits"] = rows
    if "2" in wanted:
        rows = growth(quick)
        head = ("size", "loss", "method", "time", "over X'X", "memory beyond the data")
        pieces.append("Growth.\n\n" + harness.table(head, rows))
        data_["growth"] = rows
    if "3" in wanted:
        sets = [digits()] + ([mnist(arguments.data)] if arguments.data else [])
        rows, sound = certificates(sets, quick)
        head = ("data", "network", "training", "radius", "L_zz", "loss", "best attack", "certificate",
                "sqrt rho_hat", "slack there")  # fmt: skip
        pieces.append(
            f"Certificates. No attack above one: {sound}.\n\n" + harness.table(head, rows)
        )
        data_["certificates"] = rows
    if "4" in wanted:
        rows = groups(quick)
        head = ("training", "mean accuracy, %", "worst group, %", "least over seeds")
        pieces.append(
            "Groups: digits 0-4 from 5-9 with a shortcut.\n\n" + harness.table(head, rows)
        )
        data_["groups"] = rows
    text = f"{harness.machine_line(facts)}; float64.\n\n" + "\n\n".join(pieces)
    print("\n" + text)
    harness.write_results("dro_quick" if quick else "dro", data_, text, arguments.out)


if __name__ == "__main__":
    main()
