"""A network as an implicit model, beside the network and beside iterating on its dense matrices.

    python benchmarks/convert.py [--quick] [--out DIR]

Float32. The network and what `to_implicit` makes of it are timed in turns: the forward pass under
no_grad, and forward with the gradients of all parameters. In float64 they are compared; peak memory
is measured in child processes. The dense iteration is the loop of torchidl: x <- phi(A x + B u + b)
from zero, with mitr=300 and tol=3e-6, on the matrices of `model.dense()`. The status is 1 where a
target is missed.
"""

import argparse
import contextlib
import ctypes
import functools
import importlib
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import _harness as harness
import torch
from _harness import duration, median, table
from torch import Tensor, nn

from implicitdl import ImplicitModel, to_implicit
from implicitdl.activations import ReLU

MODES = ("forward", "forward + backward")
TARGETS = {"large batch": 1.2, "batch 1": 1.5, "outputs": 1e-12, "gradients": 1e-10, "memory": 1.5}
MITR, TOL = 300, 3e-6  # what torchidl's own model comes with

HOW = """\
The converted model and the network in turns, medians; forward under no_grad, backward to all
parameters."""
AIM = """\
Targets: at most 1.2 at batch 64 and 256, 1.5 at batch 1; outputs to 1e-12 and gradients to 1e-10
in float64; 1.5 times the peak memory."""
FLOOR = """\
Floor: multiplications of the operators (three times as many with the backward pass) over the rate
of a large product of float32 matrices, {:.1f}e9 a second, the best of this run. Winograd's
convolutions take fewer and may be below it; a product with one vector is bound by memory and far
above it."""
ITERATION = f"""\
The forward pass as torchidl computes one: A, B, C and D as matrices, x from zero until no entry
moves by {TOL:g}. torchidl has no phi but ReLU: no max-pooling. In turns with a large A, everybody's
own weights have left the caches. Differences are relative, from the network's outputs in float32."""

# --- the networks


def mlp() -> nn.Module:
    """784-512-512-10."""
    first = nn.Linear(784, 512), nn.ReLU(inplace=True)
    return nn.Sequential(*first, nn.Linear(512, 512), nn.ReLU(inplace=True), nn.Linear(512, 10))


def lenet() -> nn.Module:
    """Two convolutions with max-pooling, three matrices."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(inplace=True), nn.Linear(120, 84), nn.ReLU(inplace=True),
        nn.Linear(84, 10),
    )  # fmt: skip


class Residual(nn.Module):
    """relu(s(x) + two normalised convolutions of x), with s the identity, or a 1x1 convolution."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride > 1 or width != out:
            shorter = nn.Conv2d(width, out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(shorter, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        z = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(z)) + self.shortcut(x))


def resnet(widths: Sequence[int] = (64, 128, 256, 512)) -> nn.Module:
    """The shape of ResNet-18 for 32x32 images, in eval mode with random running statistics."""
    first = widths[0]
    layers = [nn.Conv2d(3, first, 3, 1, 1, bias=False), nn.BatchNorm2d(first), nn.ReLU(True)]
    for width, out in zip((first, *widths), widths, strict=False):
        layers += [Residual(width, out, 1 if out == first else 2), Residual(out, out, 1)]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean, std=0.1)
            nn.init.uniform_(part.running_var, 0.5, 1.5)
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, std=0.1)
    return net


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network of the benchmark, and how it is measured."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of a sample
    judged: int = 64  # the batch at which it is compared with its model in float64
    slow: bool = False  # whether a pass takes seconds

    def build(self, batch: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
        """The network in eval mode and an input, the same at each call."""
        torch.manual_seed(0)
        net = self.make().to(dtype).eval()
        torch.manual_seed(1)
        return net, torch.randn(batch, *self.shape, dtype=dtype)


NETWORKS = {
    "MLP": Network(make=mlp, shape=(784,)),
    "LeNet": Network(make=lenet, shape=(1, 28, 28)),
    "ResNet-18": Network(make=resnet, shape=(3, 32, 32), judged=4, slow=True),
}
Map = Callable[[Tensor], Tensor]
Runs = Mapping[str, Callable[[], object]]


def gradients(f: Map, u: Tensor, parameters: Iterable[Tensor], g: Tensor) -> tuple[Tensor, ...]:
    """Of sum(g f(u)), by the parameters."""
    return torch.autograd.grad(f(u), tuple(parameters), g)


# --- speed


def speed(name: str, batch: int, seconds: float, least: int) -> list[dict[str, Any]]:
    """Both passes of the network and of its model at one batch, a row each."""
    net, u = NETWORKS[name].build(batch)
    model = to_implicit(net, u[:1])
    parameters, g = tuple(net.parameters()), torch.randn(batch, 10)
    maps: dict[str, Map] = {"original": net, "ours": model}
    passes: dict[str, Callable[[Map], object]] = {
        MODES[0]: lambda f: f(u),
        MODES[1]: lambda f: gradients(f, u, parameters, g),
    }
    rows = []
    for mode, one in passes.items():
        with torch.set_grad_enabled(mode != MODES[0]):
            runs = {who: functools.partial(one, f) for who, f in maps.items()}
            times = in_turns(runs, seconds, least)
        spread = [b / a for a, b in zip(times["original"], times["ours"], strict=True)]
        middle = {who: median(x) for who, x in times.items()}
        rows.append({
            "network": name, "batch": batch, "mode": mode, **middle,
            "ratio": middle["ours"] / middle["original"], "rounds": len(spread),
            "quartiles": statistics.quantiles(spread)[::2],
            "multiplications": model.structure.cost * batch * (1 if mode == MODES[0] else 3),
        })  # fmt: skip
    return rows


def in_turns(runs: Runs, seconds: float, least: int) -> dict[str, list[float]]:
    """Seconds of each repetition; as many rounds as fit, but at least `least`."""
    round_ = math.inf
    for _ in range(2):  # kernels are chosen and memory is had off the clock
        start = time.perf_counter()
        for run in runs.values():
            run()
        round_ = min(round_, time.perf_counter() - start)
        if round_ > seconds / (least + 2):
            break
    most = min(max(least, int(seconds / round_)), 2000)
    return harness.interleaved(runs, math.inf, least=most, most=most)


def product_rate(n: int = 2048) -> float:
    """Multiplications a second in a large product of matrices, the best of some."""
    a = torch.randn(n, n)
    return n**3 / min(harness.seconds_of(lambda: a @ a, 0.5) for _ in range(3))


# --- accuracy


def accuracy(name: str) -> dict[str, float]:
    """Largest relative difference of outputs and of any parameter's gradient, in float64."""
    net, u = NETWORKS[name].build(NETWORKS[name].judged, torch.float64)
    model = to_implicit(net, u[:1])
    parameters, g = tuple(net.parameters()), torch.randn(u.shape[0], 10, dtype=torch.float64)
    with torch.no_grad():
        outputs = apart(model(u), net(u))
    pairs = zip(gradients(model, u, parameters, g), gradients(net, u, parameters, g), strict=True)
    return {"outputs": outputs, "gradients": max(itertools.starmap(apart, pairs))}


def apart(got: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest entry."""
    return float((got - expected).abs().amax() / expected.abs().amax())


# --- the dense iteration


class Picard:
    """x <- phi(A x + B u + b) on matrices until no entry moves by `TOL`, then C x + D u + d."""

    def __init__(self, dense: ImplicitModel) -> None:
        self.A, self.B, self.C, self.D = (getattr(dense, k).detach().mT for k in "ABCD")
        self.b, self.d = dense.b.detach(), dense.d.detach()
        self.all_relu = all(isinstance(phi, ReLU) for phi, _ in dense.phi.parts)
        self.phi = torch.relu if self.all_relu else dense.phi
        self.direct = bool(self.D.any())
        self.products = 0

    def __call__(self, u: Tensor) -> Tensor:
        u = u.flatten(1)
        v = torch.addmm(self.b, u, self.B)
        x = torch.zeros_like(v)
        for self.products in range(1, MITR + 1):
            old, x = x, self.phi(torch.addmm(v, x, self.A))
            if float((x - old).abs().amax()) < TOL:
                break
        y = torch.addmm(self.d, x, self.C)
        return torch.addmm(y, u, self.D) if self.direct else y


def torchidls(dense: ImplicitModel) -> Map | None:
    """torchidl's model with these matrices, ReLU its only phi; None where it is not installed.

    Its base function scales no matrix: the default one would shrink A, the triangular one would
    write into it. b and d are columns of B and D, as its `bias=True` has them.
    """
    try:
        torchidl = importlib.import_module("torchidl")
    except ImportError:
        print("torchidl: not installed; its rows are left out")
        return None
    net = torchidl.ImplicitModel(
        dense.inputs, dense.outputs, dense.states, f=torchidl.ImplicitFunction, bias=True,
        mitr=MITR, tol=TOL,
    )  # fmt: skip
    with torch.no_grad():
        net.A.copy_(dense.A)
        net.B.copy_(torch.cat([dense.B, dense.b[:, None]], 1))
        net.C.copy_(dense.C)
        net.D.copy_(torch.cat([dense.D, dense.d[:, None]], 1))
    return lambda u: net(u.flatten(1))


def dense_cells(name: str, batches: Sequence[int], seconds: float) -> list[dict[str, Any]]:
    """The forward pass by the dense iteration beside ours, a row each; or why there is none."""
    net, u = NETWORKS[name].build(1)
    model = to_implicit(net, u)
    entries = model.states**2
    if 4 * 4 * entries > (harness.machine()["memory_gib"] or 16) * 2**30:  # four times A
        why = f"not made: A would have {entries:.2g} entries, {gigabytes(4e-9 * entries)}"
        return [{"network": name, "batch": "any", "method": why}]
    with torch.no_grad():
        dense = model.dense(limit=entries)
    picard = Picard(dense)
    maps: dict[str, Map] = {"implicitdl": model, "Picard on the dense A": picard}
    if picard.all_relu and (theirs := torchidls(dense)):
        maps["torchidl's ImplicitModel"] = theirs
    cells = []
    for batch in batches:
        _, u = NETWORKS[name].build(batch)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")  # torchidl warns where it does not converge
            expected = net(u)
            off = {who: apart(f(u), expected) for who, f in maps.items()}
            runs = {who: functools.partial(f, u) for who, f in maps.items()}
            times = {who: median(x) for who, x in in_turns(runs, seconds, 3).items()}
        for who, one in times.items():
            cells.append({
                "network": name, "batch": batch, "method": who, "seconds": one,
                "times ours": one / times["implicitdl"], "difference": off[who],
                "products": picard.products if who.startswith("Picard") else None,
            })  # fmt: skip
    return cells


# --- memory, in children


def peak(kind: str, name: str, batch: int) -> float:
    """MiB at the peak above the level before, called in a fresh process.

    Of forward and backward it is the second pass that counts: code and buffers that stay are there.
    """
    net, u = NETWORKS[name].build(batch)
    if kind == "conversion":
        to_implicit(resnet((2, 2)).eval(), torch.randn(1, 3, 8, 8))  # code is loaded
        measured = functools.partial(to_implicit, net, u)
    else:
        f = net if kind == "original" else to_implicit(net, u[:1])
        g = torch.randn(batch, 10)
        measured = functools.partial(gradients, f, u, tuple(net.parameters()), g)
        measured()
    with contextlib.suppress(OSError, AttributeError):  # what was freed goes back to the system
        ctypes.CDLL(None).malloc_trim(0)
    return harness.peak_memory(measured)


def forked(jobs: Sequence[tuple[str, str, int]]) -> list[float | None]:
    """`peak` of each job in a forked child; None where it failed."""
    answers = [harness.in_child(lambda job=job: peak(*job), 120) for job in jobs]
    return [value if kind == "ok" else None for kind, value in answers]


def memory(names: Sequence[str], batch: int, repeats: int) -> list[dict[str, Any]]:
    """Peaks of forward and backward and of the conversion, medians over children.

    They are forked by a helper that has imported torch and computed nothing.
    """
    kinds = [("original", batch), ("ours", batch), ("conversion", 1)]
    jobs = [(kind, name, size) for name in names for kind, size in kinds]
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"import convert, json\nprint(json.dumps(convert.forked({jobs * repeats!r})))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=600
    )
    if said.returncode:
        raise RuntimeError(said.stderr[-500:])
    found = [math.nan if x is None else x for x in json.loads(said.stdout.splitlines()[-1])]
    rows = []
    for j, name in enumerate(names):
        original, ours, conversion = (median(found[3 * j + k :: len(jobs)]) for k in range(3))
        rows.append({
            "network": name, "batch": batch, "original": original, "ours": ours,
            "ratio": ours / original if original else math.nan, "conversion": conversion,
        })  # fmt: skip
    return rows


# --- sizes


def size(name: str, repeats: int) -> dict[str, Any]:
    """What the model of a network would be as matrices, and how long the conversion takes."""
    net, u = NETWORKS[name].build(1)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        model = to_implicit(net, u)
        times.append(time.perf_counter() - start)
    entries = model.states**2
    return {
        "network": name, "states": model.states, "blocks": len(model.structure.blocks),
        "cost": model.structure.cost, "parameters": sum(p.numel() for p in net.parameters()),
        "entries of A": entries, "GB of A": 4e-9 * entries, "first conversion": times[0],
        "conversion": median(times),
    }  # fmt: skip


# --- the report


def short(cells: Sequence[dict[str, Any]]) -> str:
    """The ratios alone, for README.md."""
    keys = dict.fromkeys((c["network"], c["batch"]) for c in cells)
    ratio = {(c["network"], c["batch"], c["mode"]): f"{c['ratio']:.2f}" for c in cells}
    rows = [[name, batch, *(ratio[name, batch, mode] for mode in MODES)] for name, batch in keys]
    return table(["time of the model / of the network", "batch", *MODES], rows)


def full(cells: Sequence[dict[str, Any]]) -> str:
    """Times, spread and floor."""
    rows = [
        [c["network"], c["batch"], c["mode"], *(duration(c[k]) for k in ("original", "ours")),
         f"{c['ratio']:.2f}", "{:.2f} - {:.2f}".format(*c["quartiles"]), c["rounds"],
         duration(c["floor"]), f"{c['times the floor']:.2f}"] for c in cells
    ]  # fmt: skip
    header = ["network", "batch", "mode", "original", "implicitdl", "ratio",
              "quartiles of the rounds", "rounds", "floor", "x floor"]  # fmt: skip
    return table(header, rows)


def dense_table(cells: Sequence[dict[str, Any]]) -> str:
    """The dense iteration and torchidl beside ours."""
    rows = [
        [c["network"], c["batch"], c["method"], *(
            [duration(c["seconds"]), c["products"] or "-", f"{c['times ours']:.1f}",
             small(c["difference"])] if "seconds" in c else ["-"] * 4
        )] for c in cells
    ]  # fmt: skip
    header = ["network", "batch", "forward", "time", "products A x", "times ours", "difference"]
    return table(header, rows)


def small(x: float) -> str:
    """A difference as text."""
    return f"{x:.0e}" if x else "0"


def gigabytes(x: float) -> str:
    """GB as text."""
    return f"{x:,.0f} GB" if x >= 10 else f"{x:.2g} GB"


def missed(cells: Any, exact: Any, space: Any) -> list[str]:
    """Every target that was missed, with the number."""
    found = [
        (f"{c['network']}, batch {c['batch']}, {c['mode']}, time", c["ratio"],
         TARGETS["batch 1" if c["batch"] == 1 else "large batch"]) for c in cells
    ]  # fmt: skip
    found += [(f"{k}, {what}", x, TARGETS[what]) for k in exact for what, x in exact[k].items()]
    found += [(f"{r['network']}, peak memory", r["ratio"], TARGETS["memory"]) for r in space]
    return [f"{what}: {x:.3g}, target {limit:g}" for what, x, limit in found if not x <= limit]


def report(facts: Any, rate: float, cells: Any, exact: Any, space: Any, thick: Any, sizes: Any,
           losses: Sequence[str]) -> str:  # fmt: skip
    """Everything as markdown; the first table is README.md's."""
    exactly = [[k, NETWORKS[k].judged, *map(small, row.values())] for k, row in exact.items()]
    mib = [
        [r["network"], r["batch"], *(f"{r[k]:.1f} MiB" for k in ("original", "ours")),
         f"{r['ratio']:.2f}"] for r in space
    ]  # fmt: skip
    big = [
        [s["network"], *(f"{s[k]:,}" for k in ("states", "blocks", "parameters", "cost")),
         f"{s['entries of A']:.3g}", gigabytes(s["GB of A"]), duration(s["first conversion"]),
         duration(s["conversion"]), f"{r['conversion']:.1f} MiB"]
        for s, r in zip(sizes, space, strict=True)
    ]  # fmt: skip
    parts = [
        f"# Networks as implicit models\n\n{harness.machine_line(facts)}; float32.",
        f"{HOW}\n\n{short(cells)}\n\n{AIM}",
        "\n".join(f"- missed: {x}" for x in losses) or "All are met.",
        FLOOR.format(rate / 1e9) + "\n\n" + full(cells),
        "Largest relative difference of the model from the network, float64:",
        table(["network", "batch", "outputs", "gradients of parameters"], exactly),
        "Peak memory of forward + backward above the level before, medians of child processes:",
        table(["network", "batch", "original", "implicitdl", "ratio"], mib),
        f"{ITERATION}\n\n{dense_table(thick)}",
        "Sizes, and what a conversion takes (example: one sample):",
        table(["network", "states", "blocks", "parameters", "multiplications", "entries of dense A",
               "in float32", "first conversion", "conversion", "its peak memory"], big),
    ]  # fmt: skip
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer batches, under two minutes")
    parser.add_argument("--out", type=Path, help="folder of the results")
    options = parser.parse_args(argv)
    quick = options.quick
    batches = (1, 64) if quick else (1, 64, 256)
    facts = harness.machine()
    print(harness.machine_line(facts), flush=True)

    sizes = [size(name, 3) for name in NETWORKS]
    exact = {name: accuracy(name) for name in NETWORKS}
    space = memory(list(NETWORKS), 64, 1 if quick else 5)
    print(json.dumps({"accuracy": exact, "memory": space}, indent=1), flush=True)
    rate = product_rate()
    cells = []
    for name, net in NETWORKS.items():
        for batch in batches:
            long = net.slow and batch > 1
            seconds = (4.0 if long else 2.0) if quick else (40.0 if long else 12.0)
            cells += speed(name, batch, seconds, 3 if quick else 5)
            print(short(cells[-len(MODES) :]).splitlines()[-1], flush=True)
    thick = dense_cells("MLP", batches, 2.0 if quick else 12.0)
    for name in ("LeNet", "ResNet-18"):
        thick += dense_cells(name, (1,) if quick else batches, 2.0 if quick else 12.0)
    rate = max(rate, product_rate())
    for cell in cells:
        floor = cell["multiplications"] / rate
        cell |= {"floor": floor, "times the floor": cell["ours"] / floor}
    losses = missed(cells, exact, space)
    markdown = report(facts, rate, cells, exact, space, thick, sizes, losses)
    print("\n" + markdown)
    data = {"machine": facts, "targets": TARGETS, "missed": losses, "products a second": rate,
            "cells": cells, "accuracy": exact, "memory": space, "dense iteration": thick,
            "sizes": sizes}  # fmt: skip
    harness.write_results("convert_quick" if quick else "convert", data, markdown, options.out)
    return int(bool(losses) and not quick)


if __name__ == "__main__":
    raise SystemExit(main())
