"""Certificates: sound under attack, as tight as the linear program, and fast.

    python benchmarks/certify.py [--quick] [--data DIR] [--part NAME ...] [--samples N]

- sound: random models x regions x methods, each attacked by samples and by gradients;
- digits: certified share of implicit ReLU classifiers of 64 states by method, with time;
- tight: the best slopes against the linear program, and the semidefinite bound between it and PGD;
- network: a converted 784-100-100-10 against a plain interval and CROWN pass written out here;
- lirpa: auto_LiRPA on two networks (needs --lirpa, a python that has it);
- mnist: classifiers trained for certificates, all test images (needs --data, MNIST's four files).

Prints tables and writes results/certify.json and results/certify.md.
"""

import argparse
import concurrent.futures
import math
import multiprocessing
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _harness import duration, interleaved, machine, machine_line, median, table, write_results
from certify_mnist import mnist, train, warm
from torch import Tensor, nn

from implicitdl import ImplicitLayer, ImplicitModel, MonotoneLayer, _data, to_implicit
from implicitdl.certify import (
    bounds,
    margins,
    minimise,
    pgd,
    robust_loss,
)
from implicitdl.certify.accuracy import ball
from implicitdl.robust import Ball, Budget
from implicitdl.solvers import Picard
from implicitdl.wellposed import InfNormBall

PARTS = ("sound", "digits", "tight", "network", "lirpa", "mnist")
# Shares and seconds of the bare prototype, for the same kind of model on the same images; it was
# measured on another machine, so that its seconds are a rough guide.
PROTOTYPE = {
    ("standard", 0.02): (0.917, 0.225, 0.889, 0.917, 0.917),
    ("standard", 0.05): (0.758, 0.0, 0.344, 0.706, 0.706),
    ("interval", 0.05): (0.900, 0.853, 0.889, 0.894, 0.894),
    ("interval", 0.1): (0.711, 0.364, 0.522, 0.603, 0.603),
}


# ---- sound -----------------------------------------------------------------------------------------


def random_model(kind: str, g: torch.Generator) -> Any:
    """A model of 5 inputs and 3 outputs."""
    p, q, n = 5, 3, 8
    if kind == "network":
        net = nn.Sequential(nn.Linear(p, 9), nn.ReLU(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, q))
        for w in net.parameters():
            w.data = torch.randn(w.shape, generator=g) / math.sqrt(w.shape[-1])
        return to_implicit(net, torch.zeros(1, p))
    if kind == "monotone":
        layer = MonotoneLayer(p, q, n, margin=0.3)
        for w in layer.parameters():
            w.data = torch.randn(w.shape, generator=g) / math.sqrt(w.shape[-1])
        return layer
    kappa = {"dense": 0.9, "near 1": 0.99, "block": 0.8}[kind]
    A = torch.randn(n, n, generator=g)
    if kind == "block":
        A[4:, :4] = 0
    A = kappa * A / A.abs().sum(1, keepdim=True)
    return ImplicitModel(
        A, torch.randn(n, p, generator=g), torch.randn(q, n, generator=g),
        torch.randn(q, p, generator=g), torch.randn(n, generator=g),
    )  # fmt: skip


KINDS = ("dense", "near 1", "block", "monotone", "network")
METHODS: dict[str, dict[str, Any]] = {
    "sensitivity": {}, "interval": {}, "lipschitz": {}, "crown": {},
    "crown, 2 + ascent": {"refinements": 2, "steps": 10}, "best": {},
    "best, solver stopped early": {"solver": Picard(max_steps=3)},
}  # fmt: skip


def violations(numbers: range, samples: int) -> tuple[dict[tuple[str, str], list[int]], float]:
    """Of these models: bounds, violations and refusals, and the smallest distance to a bound."""
    torch.set_default_dtype(torch.float64)
    regions = (
        Ball(radius=0.2, norm="inf", dimension=5),
        Ball(radius=0.4, norm=2, dimension=5),
        Budget(budget=2.0, scale=0.3 * torch.ones(5)),
    )
    eye = torch.eye(3)
    rows = torch.cat([eye, -eye])
    count = {(kind, name): [0, 0, 0] for kind in KINDS for name in METHODS}
    least = math.inf
    for k in numbers:
        g = torch.Generator().manual_seed(k)
        kind = KINDS[k % len(KINDS)]
        model = random_model(kind, g)
        u = torch.randn(2, 5, generator=g)
        for region in regions:
            z = region.sample(samples, generator=g)
            with torch.no_grad():
                y = model((u + z[:, None]).reshape(-1, 5)).reshape(samples, 2, 3)
            attacked, _ = minimise(model, region, rows, around=u, steps=8, generator=g)
            low = torch.minimum(y.amin(0), attacked[:, :3])
            high = torch.maximum(y.amax(0), -attacked[:, 3:])
            for name, options in METHODS.items():
                cell = count[kind, name]
                try:
                    found = bounds(model, region, name.split(",")[0], around=u, **options)
                except ValueError:
                    cell[2] += 1
                    continue
                gap = float(torch.minimum(low - found.lower, found.upper - high).min())
                least = min(least, gap)
                cell[0] += 1
                cell[1] += gap < -1e-9  # what the model's own solve may be off by
    return count, least


def sound(models: int, samples: int) -> tuple[str, dict[str, Any]]:
    """How often an input of the region left the bounds; a share of the models a core."""
    cores = os.cpu_count() or 1
    shares = [range(models * k // cores, models * (k + 1) // cores) for k in range(cores)]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(cores, context, warm) as pool:
        parts = list(pool.map(violations, shares, [samples] * cores))
    count = {key: [sum(p[key][i] for p, _ in parts) for i in range(3)] for key in parts[0][0]}
    least = min(gap for _, gap in parts)
    head = ["model", *METHODS]
    body = [
        [kind] + [
            f"{b} of {a}" + (f", {c} refused" if c else "")
            for a, b, c in (count[kind, name] for name in METHODS)
        ]
        for kind in KINDS
    ]  # fmt: skip
    text = (
        f"Violations, {models} models x 3 regions x {len(METHODS)} methods, {samples} samples and "
        f"gradient attacks each; smallest distance to a bound {least:.2g}.\n\n" + table(head, body)
    )
    total = sum(b for _, b, _ in count.values())
    return text, {"models": models, "violations": total, "least": least}


# ---- digits ----------------------------------------------------------------------------------------


def ramp(t: float) -> float:
    """From 0 to 1 over the first half."""
    return min(1.0, 2 * t)


def digits(quick: bool) -> tuple[str, dict[str, Any]]:
    """Certified share of 360 test images by method."""
    data = _data.digits(0)
    images, labels = data.test_images.double(), data.test_labels
    stages: dict[str, tuple[str, dict[str, Any]]] = {
        "interval": ("interval", {}),
        "crown": ("crown", {"refinements": 0}),
        "crown, 3 refinements, ascent": ("crown", {"refinements": 3, "steps": 20}),
        "and ascent of the ranges": ("crown", {"refinements": 3, "steps": 20, "range_steps": 5}),
    }
    body, numbers = [], []
    for kind in ("standard", "interval"):
        torch.manual_seed(0)
        layer = ImplicitLayer(64, 10, 64, well_posed=InfNormBall(kappa=0.9))

        def loss(u: Tensor, y: Tensor, t: float, layer: Any = layer, kind: str = kind) -> Tensor:
            return F.cross_entropy(layer(u), y) if kind == "standard" else (
                robust_loss(layer, 0.05 * ramp(t), u, y)
            )  # fmt: skip

        train(layer, data.train_images, data.train_labels, 10 if quick else 60, loss)
        layer = layer.double()
        for radius in (0.02, 0.05) if kind == "standard" else (0.05, 0.1):
            broken = pgd(layer, images, labels, radius, restarts=2).success
            row: list[str] = [kind, f"{radius:g}", f"{1 - float(broken.double().mean()):.3f}"]
            known = PROTOTYPE[kind, radius]
            entry: dict[str, Any] = {"net": kind, "radius": radius, "pgd": row[2]}
            for (name, (method, options)), theirs in zip(stages.items(), known[1:], strict=True):
                start = time.perf_counter()
                low = margins(layer, ball(images, radius, "inf"), labels, method, **options)
                seconds = time.perf_counter() - start
                share = float((low > 1e-9).all(1).double().mean())
                row.append(f"{share:.3f} ({duration(seconds)}) | {theirs:.3f}")
                entry[name] = {"share": share, "seconds": seconds}
            body.append(row)
            numbers.append(entry)
    text = (
        "Certified share of the 359 test digits, n = 64, ||A||_inf = 0.9, and the prototype's share on a "
        "net of its own (0.1 s, 0.2 to 0.45 s, 12 to 29 s), PGD of that net: "
        + ", ".join(f"{PROTOTYPE[key][0]:.3f}" for key in PROTOTYPE)
        + ". On our nets the prototype finds 0.535 (standard, 0.05) and 0.504 (interval, 0.1) with its "
        "refinements, as we do without ascent of the ranges.\n\n"
        + table(["net", "radius", "PGD", *(f"{s}, ours and prototype" for s in stages)], body)
    )  # fmt: skip
    return text, {"rows": numbers}


# ---- tight -----------------------------------------------------------------------------------------


def tight(quick: bool) -> tuple[str, dict[str, Any]]:
    """Ascent over slopes against the linear program; the semidefinite bound between it and PGD."""
    g = torch.Generator().manual_seed(1)
    gaps, seconds, body, closed = [], [[0.0, 0.0], [0.0, 0.0]], [], []
    region = Ball(radius=0.5, norm="inf", dimension=5)
    for _ in range(4 if quick else 20):
        model = random_model("dense", g)
        u = torch.randn(3, 5, generator=g)
        exact = bounds(model, region, "lp", around=u, refinements=2)
        best = bounds(model, region, "crown", around=u, refinements=2, steps=150)
        gap = torch.cat([exact.lower - best.lower, best.upper - exact.upper])
        gaps += (gap / exact.width.repeat(2, 1)).flatten().tolist()
        seconds[0][0] += best.seconds
        seconds[1][0] += exact.seconds
    for n in (10,) if quick else (10, 20, 40, 60):
        A = torch.randn(n, n, generator=g)
        A = 0.9 * A / A.abs().sum(1, keepdim=True)
        model = ImplicitModel(
            A, torch.randn(n, 8, generator=g), torch.randn(1, n, generator=g) / math.sqrt(n),
            b=torch.randn(n, generator=g),
        )  # fmt: skip
        region = Ball(radius=0.5, norm="inf", dimension=8)
        u = torch.randn(1, 8, generator=g)
        lp = bounds(model, region, "lp", around=u, refinements=2)
        sdp = bounds(model, region, "sdp", around=u, refinements=2)
        low, _ = minimise(model, region, torch.tensor([[1.0], [-1.0]]), around=u, steps=40)
        true = float(-low[0, 1] - low[0, 0])
        share = (float(lp.width) - float(sdp.width)) / max(float(lp.width) - true, 1e-12)
        closed.append(share)
        body.append([
            n, f"{true:.4f}", f"{float(sdp.width):.4f} ({duration(sdp.seconds)})",
            f"{float(lp.width):.4f} ({duration(lp.seconds)})", f"{100 * share:.0f} %",
        ])  # fmt: skip
    worst = sorted(gaps)
    text = (
        f"Ascent over slopes (150 steps) against the linear program, {len(gaps)} bounds of random loops, "
        f"gap over the width of the bounds: median {median(worst):.2g}, 90 % below "
        f"{worst[int(0.9 * len(worst))]:.2g}, worst {worst[-1]:.2g}; {duration(seconds[0][0])} against "
        f"{duration(seconds[1][0])}.\n\n"
        + table(["n", "attacked width", "SDP", "LP", "gap closed"], body)
    )
    return text, {"gaps": worst, "closed": closed}


# ---- a network -------------------------------------------------------------------------------------


def plain_ibp(net: nn.Sequential, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Interval bound propagation, written out."""
    for layer in net:
        if isinstance(layer, nn.Linear):
            c, r = layer((low + high) / 2), (high - low) / 2 @ layer.weight.abs().mT
            low, high = c - r, c + r
        else:
            low, high = layer(low), layer(high)
    return low, high


def plain_crown(net: nn.Sequential, u: Tensor, r: float) -> tuple[Tensor, Tensor]:
    """CROWN of a batch, written out."""
    linear = [m for m in net if isinstance(m, nn.Linear)]
    ranges: list[tuple[Tensor, Tensor]] = []

    def back(depth: int, sign: float) -> Tensor:
        W = (sign * linear[depth].weight)[None]
        total = (sign * linear[depth].bias)[None]
        for k in reversed(range(depth)):
            low, high = ranges[k]
            open_ = (low < 0) & (high > 0)
            up = torch.where(low >= 0, 1.0, torch.where(open_, high / (high - low), 0.0))
            down = torch.where(low >= 0, 1.0, torch.where(open_ & (high > -low), 1.0, 0.0))
            rise = torch.where(open_, -up * low, 0.0)
            minus = W.clamp(max=0)
            total = total + (minus @ rise[..., None])[..., 0]
            D = W.clamp(min=0) * down[:, None] + minus * up[:, None]
            total = total + D @ linear[k].bias
            W = D @ linear[k].weight
        return total + (W @ u[..., None])[..., 0] - r * W.abs().sum(-1)

    for depth in range(len(linear)):
        ranges.append((back(depth, 1.0), -back(depth, -1.0)))
    return ranges[-1]


def of_lirpa(python: str, net: nn.Sequential, u: Tensor, radius: float) -> dict[str, Any]:
    """What auto_LiRPA says, by an interpreter that has it: see lirpa.py."""
    linear = [m for m in net if isinstance(m, nn.Linear)]
    arrays = {f"w{k}": m.weight.detach().numpy() for k, m in enumerate(linear)}
    arrays |= {f"b{k}": m.bias.detach().numpy() for k, m in enumerate(linear)}
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.npz", Path(folder) / "out.npz"
        np.savez(source, u=u.numpy(), radius=radius, **arrays)
        script = Path(__file__).with_name("lirpa.py")
        subprocess.run([python, str(script), str(source), str(target)], check=True)
        return dict(np.load(target))


def beside_lirpa(quick: bool, python: str) -> tuple[str, dict[str, Any]]:
    """The same bounds as auto_LiRPA, and the time of both."""
    torch.manual_seed(0)
    data = _data.digits(0)
    digits_net = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    rows = data.train_images.double(), data.train_labels
    train(digits_net, *rows, 5 if quick else 30, lambda u, y, t: F.cross_entropy(digits_net(u), y))
    wide = nn.Sequential(
        nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)
    )
    cases = {
        "digits 64-64-64-10, 359 inputs, 0.05": (digits_net, data.test_images.double(), 0.05),
        "random 784-100-100-10, 64 inputs, 0.01": (wide, torch.rand(64, 784), 0.01),
    }
    body, numbers = [], []
    for name, (net, u, radius) in cases.items():
        theirs = of_lirpa(python, net.requires_grad_(False), u, radius)
        model = to_implicit(net, u[:1])
        region = Ball(radius=radius, norm="inf", dimension=u.shape[1])
        for method in ("interval", "crown"):
            seconds = []
            for _ in range(8):
                found = bounds(model, region, method, around=u)
                seconds.append(found.seconds)
            low, high = (torch.tensor(theirs[f"{method} {end}"]) for end in ("low", "high"))
            wider = max(float((low - found.lower).max()), float((found.upper - high).max()))
            tighter = max(float((found.lower - low).max()), float((high - found.upper).max()))
            ours, other = median(seconds[1:]), median(theirs[method].tolist())
            body.append([
                name, method, f"{wider:.1e}", f"{tighter:.1e}", duration(ours), duration(other),
                f"{other / ours:.2f}",
            ])  # fmt: skip
            numbers.append({
                "case": name, "method": method, "wider": wider, "tighter": tighter,
                "seconds": ours, "theirs": other,
            })  # fmt: skip
    head = ["network", "method", "ours wider by", "tighter by", "ours", "auto_LiRPA", "ratio"]
    return "float64, medians of 7 calls.\n\n" + table(head, body), {"rows": numbers}


def network(quick: bool) -> tuple[str, dict[str, Any]]:
    """Equality with, and time against, passes written for this network alone."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)
    )
    for w in net.parameters():
        w.requires_grad_(False)
    model = to_implicit(net, torch.zeros(1, 784))
    u, r = torch.rand(16 if quick else 64, 784), 0.01
    region = Ball(radius=r, norm="inf", dimension=784)
    body, numbers = [], {}
    pairs = {
        "interval": lambda: plain_ibp(net, u - r, u + r),
        "crown": lambda: plain_crown(net, u, r),
    }
    for name, plain in pairs.items():
        found = bounds(model, region, name, around=u)
        low, high = plain()
        off = max(float((found.lower - low).abs().max()), float((found.upper - high).abs().max()))
        times = interleaved(
            {"ours": lambda name=name: bounds(model, region, name, around=u), "plain": plain},
            2.0 if quick else 8.0,
        )
        ours, theirs = median(times["ours"]), median(times["plain"])
        body.append([name, f"{off:.1e}", duration(ours), duration(theirs), f"{ours / theirs:.2f}"])
        numbers[name] = {"difference": off, "ratio": ours / theirs}
    text = f"A random 784-100-100-10, {len(u)} inputs, float64.\n\n" + table(
        ["method", "largest difference", "ours", "written out", "ratio"], body
    )
    return text, numbers


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small run, under 2 minutes")
    parser.add_argument("--data", type=Path, help="folder of MNIST's four files")
    parser.add_argument("--lirpa", help="a python that has auto_LiRPA; see lirpa.py")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--samples", type=int, help="test images of MNIST; all by default")
    parser.add_argument("--out", type=Path, help="where results go; results/ by default")
    arguments = parser.parse_args()
    facts = machine()
    quick = arguments.quick
    texts, numbers = [f"# Certificates\n\n{machine_line(facts)}"], {"machine": facts}
    for part in arguments.part:
        if part == "mnist" and arguments.data is None:
            print("mnist: left out, no --data")
            continue
        if part == "lirpa" and arguments.lirpa is None:
            print("lirpa: left out, no --lirpa")
            continue
        torch.set_default_dtype(torch.float32 if part in ("mnist", "digits") else torch.float64)
        start = time.perf_counter()
        if part == "sound":
            found = sound(10 if quick else 500, 100 if quick else 200)
        elif part == "lirpa":
            found = beside_lirpa(quick, arguments.lirpa)
        elif part == "mnist":
            found = mnist(arguments.data, quick, arguments.samples)
        else:
            found = {"digits": digits, "tight": tight, "network": network}[part](quick)
        text = f"## {part}\n\n{found[0]}\n\n{duration(time.perf_counter() - start)} in all."
        print(f"\n{text}", flush=True)
        texts.append(text)
        numbers[part] = found[1]
    name = "certify-quick" if quick else "certify"
    write_results(name, numbers, "\n\n".join(texts), arguments.out)


if __name__ == "__main__":
    main()
