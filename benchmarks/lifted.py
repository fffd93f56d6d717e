"""Lifted training beside Adam and SGD: test accuracy at the same time, and for implicit models.

    python benchmarks/lifted.py --data DIR          # MNIST's folder; without it MNIST is left out
    python benchmarks/lifted.py --quick --data DIR

Every method gets the same seconds of processor time on one thread, checks its options on held-out
samples with another seed, at a share of that time, and then trains from the same start for each
seed. Test samples are read once a run, after training. The split of the digits and the sample of
MNIST-1D are not those on which methods and grids were worked out. Prints tables and writes
results/lifted.json and results/lifted.md.
"""

import argparse
import concurrent.futures
import functools
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the workers, one a core

import numpy as np
import torch
from _harness import duration, machine, machine_line, table, write_results
from torch import Tensor, nn

from implicitdl import ImplicitLayer, _data, lifted
from implicitdl.lifted import Report

TUNING_SEED = 1000
FRESH = 1  # of the digits' split and of MNIST-1D's generator
AIMS = {"MNIST 784-300-10": 0.98, "implicit": 0.003}


@dataclass(frozen=True)
class Task:
    """A data set, a network, and what a run may take.

    Attributes:
        data: "digits", "mnist1d" or "mnist".
        widths: of the layers; of an implicit layer (inputs, states, outputs).
        seconds: of processor time for each run.
        batch: of the mini-batch methods.
        full: how many samples the full-batch methods use.
        implicit: whether the network is an implicit layer.
        epochs: of an implicit layer.
    """

    name: str
    data: str
    widths: tuple[int, ...]
    seconds: float
    batch: int = 64
    full: int = 10_000
    implicit: bool = False
    epochs: int = 0


TASKS = [
    Task("digits 64-128-10", "digits", (64, 128, 10), 1.2),
    Task("digits 4 x 64", "digits", (64, 64, 64, 64, 64, 10), 1.2),
    Task("MNIST-1D 4 x 100", "mnist1d", (40, 100, 100, 100, 100, 10), 3.0),
    Task("MNIST-1D 8 x 100", "mnist1d", (40, *[100] * 8, 10), 4.0),
    Task("MNIST 784-300-10", "mnist", (784, 300, 10), 12.5, batch=128),
    Task("MNIST 784-300-100-10", "mnist", (784, 300, 100, 10), 12.5, batch=128),
]
IMPLICIT = [
    Task("implicit digits, 64 states", "digits", (64, 64, 10), 0.0, implicit=True, epochs=20),
    Task(
        "implicit MNIST, 100 states", "mnist", (784, 100, 10), 0.0,
        batch=128, full=20_000, implicit=True, epochs=5,
    ),
]  # fmt: skip


@functools.lru_cache(maxsize=4)
def load(name: str, folder: str | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Train, validation and test samples with their labels, standardized by the training part."""
    if name == "mnist1d":
        from mnist1d.data import get_dataset_args, make_dataset

        wanted = get_dataset_args()
        wanted.seed = FRESH
        made = make_dataset(wanted)
        x, y = (torch.from_numpy(np.asarray(made[key])) for key in ("x", "y"))
        test = torch.from_numpy(np.asarray(made["x_test"])), torch.from_numpy(made["y_test"])
        parts = {"train": (x[:3400], y[:3400]), "validation": (x[3400:], y[3400:]), "test": test}
    else:
        d = _data.digits(seed=FRESH) if name == "digits" else _data.mnist(folder or "")
        parts = {
            part: (getattr(d, f"{part}_images"), getattr(d, f"{part}_labels"))
            for part in ("train", "validation", "test")
        }
    u = parts["train"][0].float()
    mean, std = (u.mean(0), u.std(0)) if name == "mnist1d" else (u.mean(), u.std())
    return {part: ((a.float() - mean) / std, b.long()) for part, (a, b) in parts.items()}


def network(task: Task, seed: int) -> nn.Module:
    """The network of the task with fresh parameters."""
    torch.manual_seed(seed)
    if task.implicit:
        return ImplicitLayer(task.widths[0], task.widths[2], task.widths[1])
    layers: list[nn.Module] = []
    for a, b in zip(task.widths[:-1], task.widths[1:], strict=True):
        layers += [nn.Linear(a, b), nn.ReLU()]
    for layer in layers[::2] if task.data == "mnist1d" else []:  # without it nothing trains there
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers[:-1])


# ---- the methods: train a network in place within some seconds of processor time ----------------

Trainer = Callable[[Task, nn.Module, Tensor, Tensor, float, float, int], dict[str, Any]]


def linear(share: float) -> float:
    """The schedule of all mini-batch methods, `lifted.local`'s default."""
    return max(1.0 - share, 0.01)


def by_gradients(make: Callable[[Any, float], torch.optim.Optimizer]) -> Trainer:
    """Back-propagation with that optimiser."""

    def train(task, net, u, y, option, seconds, seed):
        def epochs(net, count, batches=None):
            optimizer = make(net.parameters(), option)
            base = [g["lr"] for g in optimizer.param_groups]
            generator = torch.Generator().manual_seed(seed)
            for epoch in range(count):
                order = torch.randperm(len(u), generator=generator).split(task.batch)
                for k, rows in enumerate(order[:batches]):
                    for lr, group in zip(base, optimizer.param_groups, strict=True):
                        group["lr"] = lr * linear((epoch + k / len(order)) / count)
                    loss = nn.functional.cross_entropy(net(u[rows]), y[rows])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()

        batches = math.ceil(len(u) / task.batch)
        spare, few = network(task, seed), min(batches, 30)
        count = fitting(lambda: epochs(spare, 1, few), batches / few, seconds)
        epochs(net, count)
        return {"epochs": count}

    return train


def by_local(task, net, u, y, option, seconds, seed):
    """One lifted sweep, local gradients into AdamW."""

    def epochs(net, count, u, y):
        optimizer = torch.optim.AdamW(net.parameters(), lr=option)
        lifted.local(net, u, y, optimizer=optimizer, epochs=count, batch_size=task.batch, seed=seed)

    few = min(len(u), 30 * task.batch)
    spare = network(task, seed)
    count = fitting(lambda: epochs(spare, 1, u[:few], y[:few]), len(u) / few, seconds)
    epochs(net, count, u, y)
    return {"epochs": count}


def fitting(some: Callable[[], None], share: float, seconds: float) -> int:
    """How many epochs fit; an epoch is `share` calls of `some`, the faster of two after a first."""
    times = []
    for _ in range(3):
        start = time.process_time()
        some()
        times.append(time.process_time() - start)
    return max(1, round(seconds / (share * min(times[1:]))))


def by_sweeps(train: Callable[..., Report], **own: Any) -> Trainer:
    """A full-batch method, stopped by the clock; the options `choice` share the first number that
    is chosen, the second one is the ridge."""
    choice = own.pop("choice")

    def run(task, net, u, y, option, seconds, seed):
        start = time.process_time()
        weight, ridge = option
        chosen = dict.fromkeys(choice, weight)
        chosen |= {"rows": lifted.Rows(ridge=ridge)} if train is lifted.blocks else {"ridge": ridge}
        report = train(
            net, u[: task.full], y[: task.full], sweeps=10**6, **own, **chosen,
            on_epoch=lambda r: time.process_time() - start > seconds,
        )  # fmt: skip
        return {"epochs": report.epochs, "objective": report.objective[-1]}

    return run


def adam(parameters, lr):
    """AdamW, weight decay as it comes."""
    return torch.optim.AdamW(parameters, lr=lr)


def sgd(parameters, lr):
    """SGD with momentum."""
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


RIDGES = (1e-6, 5e-5)
RATES = (1e-3, 3e-3, 1e-2)

METHODS: dict[str, tuple[Trainer, tuple[Any, ...], str]] = {
    "Adam": (by_gradients(adam), RATES, "lr"),
    "SGD": (by_gradients(sgd), (1e-2, 3e-2, 1e-1), "lr"),
    "local sweep": (by_local, RATES, "lr"),
    "Fenchel blocks": (
        by_sweeps(lifted.blocks, choice=("mu",)), tuple(product((10.0, 1.0, 100.0), RIDGES)), "mu"
    ),
    "Askari": (
        by_sweeps(lifted.blocks, choice=("mu",), penalty="askari"),
        tuple(product((1.0, 0.1, 10.0), RIDGES)), "mu",
    ),
    "Zeng": (
        by_sweeps(lifted.admm, choice=("rho", "gamma")),
        tuple(product((1.0, 0.1, 10.0), RIDGES)), "rho",
    ),
    "dlADMM-style": (
        by_sweeps(lifted.admm, choice=("rho", "gamma"), variant="dladmm", loss="cross_entropy"),
        tuple(product((0.1, 0.01, 1.0), RIDGES)), "rho",
    ),
}  # fmt: skip
MINI_BATCH = ("Adam", "SGD", "local sweep")


@torch.no_grad()
def accuracy(net: nn.Module, u: Tensor, y: Tensor) -> float:
    """Share of samples classified right."""
    hits = sum(
        int((net(a).argmax(1) == b).sum())
        for a, b in zip(u.split(2000), y.split(2000), strict=True)
    )
    return hits / len(u)


def warm() -> None:
    """What a worker's first optimiser step and first product load and start."""
    torch.set_num_threads(1)
    net = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()


def measured(job: dict[str, Any]) -> dict[str, Any]:
    """One training, in a worker: processor seconds and accuracy on the part that is asked for."""
    task, part = job["task"], job["part"]
    data = load(task.data, job["folder"])
    u, y = data["train"]
    net = network(task, job["seed"])
    start = time.process_time()
    if task.implicit:
        more = train_implicit(task, net, u[: task.full], y[: task.full], job)
        seconds = time.process_time() - start
    else:
        trainer = METHODS[job["method"]][0]
        more = trainer(task, net, u, y, job["option"], job["seconds"], job["seed"])
        seconds = time.process_time() - start
    share = accuracy(net, *data[part])
    keys = ("method", "option", "seed", "part")
    return {"task": task.name, **{k: job[k] for k in keys}, "accuracy": share, "seconds": seconds,
            **more}  # fmt: skip


def train_implicit(task: Task, net: Any, u: Tensor, y: Tensor, job: dict[str, Any]) -> dict:
    """The same epochs of AdamW, with the exact adjoint or with lifted gradients."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=job["option"])
    options = {"optimizer": optimizer, "epochs": task.epochs, "batch_size": task.batch}
    if job["method"] == "lifted gradient":
        lifted.local(net, u, y, seed=job["seed"], **options)
    elif job["method"] == "lifted, 5 steps":
        lifted.local(net, u, y, seed=job["seed"], sweeps=5, **options)
    else:
        # The loop of `lifted.local`: the same batches in the same order.
        for epoch in range(task.epochs):
            generator = torch.Generator().manual_seed(job["seed"] * 1_000_003 + epoch)
            order = torch.randperm(len(u), generator=generator).split(task.batch)
            for k, rows in enumerate(order):
                share = (epoch + k / len(order)) / task.epochs
                optimizer.param_groups[0]["lr"] = job["option"] * linear(share)
                loss = nn.functional.cross_entropy(net(u[rows]), y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return {"epochs": task.epochs}


# ---- all of it -----------------------------------------------------------------------------------


def tuned(tasks: list[Task], methods: list[str], folder: str | None, run: Callable) -> dict:
    """The option with the best validation accuracy, for each task and method."""
    jobs = [
        {
            "task": task, "method": method, "option": option, "seed": TUNING_SEED,
            "part": "validation", "folder": folder, "seconds": max(task.seconds / 4, 0.6),
        }
        for task in tasks for method in methods for option in METHODS[method][1]
    ]  # fmt: skip
    best: dict[tuple[str, str], tuple[float, Any]] = {}
    for result in run(jobs):
        key = result["task"], result["method"]
        if result["accuracy"] > best.get(key, (-1.0, None))[0]:
            best[key] = result["accuracy"], result["option"]
    return {key: option for key, (_, option) in best.items()}


def summary(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean, spread and time over the seeds, for each task and method."""
    rows = []
    for key in dict.fromkeys((r["task"], r["method"]) for r in results):
        mine = [r for r in results if (r["task"], r["method"]) == key]
        shares = [r["accuracy"] for r in mine]
        rows.append(
            {
                "task": key[0],
                "method": key[1],
                "option": mine[0]["option"],
                "seeds": len(mine),
                "accuracy": statistics.fmean(shares),
                "deviation": statistics.stdev(shares) if len(shares) > 1 else 0.0,
                "seconds": statistics.fmean(r["seconds"] for r in mine),
                "epochs": statistics.fmean(r["epochs"] for r in mine),
            }
        )
    return rows


def shown(option: "float | tuple[float, float]") -> str:
    """The chosen numbers in a cell."""
    return f"{option[0]:g}, ridge {option[1]:g}" if isinstance(option, tuple) else f"{option:g}"


def report(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    cells = []
    for r in rows:
        name = METHODS[r["method"]][2] if r["method"] in METHODS else "lr"
        cells.append(
            (
                r["task"], r["method"], f"{name} {shown(r['option'])}",
                f"{100 * r['accuracy']:.2f} +- {100 * r['deviation']:.2f}",
                duration(r["seconds"]), f"{r['epochs']:.3g}",
            )
        )  # fmt: skip
    header = ("task", "method", "chosen", "test accuracy, %", "CPU time", "epochs")
    return table(header, cells)


def findings(rows: list[dict[str, Any]]) -> list[str]:
    """Which aims are reached, in words."""
    found = {(r["task"], r["method"]): r for r in rows}
    lines = []
    for task in TASKS:
        pair = found.get((task.name, "Adam")), found.get((task.name, "local sweep"))
        if all(pair):
            gap = pair[1]["accuracy"] - pair[0]["accuracy"]
            noise = math.hypot(pair[0]["deviation"], pair[1]["deviation"])
            word = "above" if gap > noise else "within noise of" if gap > -noise else "below"
            lines.append(
                f"- {task.name}: local {100 * gap:+.2f} points against Adam ({word} it; one "
                f"standard deviation of the difference is {100 * noise:.2f})."
            )
        blocks = found.get((task.name, "Fenchel blocks"))
        if blocks and pair[0] and task.data == "digits":
            gap = blocks["accuracy"] - pair[0]["accuracy"]
            lines.append(f"- {task.name}: Fenchel blocks {100 * gap:+.2f} points against Adam.")
        if pair[1] and task.name in AIMS:
            reached = pair[1]["accuracy"] >= AIMS[task.name]
            lines.append(
                f"- {task.name}: aim of {100 * AIMS[task.name]:.1f} % "
                + ("reached." if reached else "missed.")
            )
    for task in IMPLICIT:
        exact = found.get((task.name, "implicit differentiation"))
        for method in ("lifted gradient", "lifted, 5 steps"):
            mine = found.get((task.name, method))
            if exact and mine:
                gap = mine["accuracy"] - exact["accuracy"]
                ok = "reached" if gap >= -AIMS["implicit"] else "missed"
                lines.append(
                    f"- {task.name}: {method} {100 * gap:+.2f} points against implicit "
                    f"differentiation, {mine['seconds'] / exact['seconds']:.1f} times its time; aim "
                    f"of 0.3 points {ok}."
                )
    return lines


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder of MNIST files; without it MNIST is left out")
    parser.add_argument("--quick", action="store_true", help="fewer tasks, two seeds, no tuning")
    parser.add_argument("--seeds", type=int, help="how many (default: 5)")
    parser.add_argument("--tasks", nargs="*", help="parts of task names, to run some alone")
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), help="to run some alone")
    parser.add_argument("--out", type=Path, help="folder for results")
    options = parser.parse_args()
    seeds = options.seeds or (2 if options.quick else 5)
    methods = options.methods or list(METHODS)
    tasks, implicit = chosen(options)
    facts = machine()
    workers = facts["cores"] or 1
    start = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, warm) as pool:

        def run(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
            results = []
            for result in pool.map(measured, jobs):
                results.append(result)
                print(
                    f"{time.perf_counter() - start:5.0f} s  {result['task']:<24} "
                    f"{result['method']:<24} {shown(result['option']):<17} seed {result['seed']:<5} "
                    f"{result['part']:<10} {100 * result['accuracy']:.2f} %  "
                    f"{result['seconds']:.1f} s",
                    flush=True,
                )
            return results

        if options.quick:
            settings = {(t.name, m): METHODS[m][1][m in MINI_BATCH] for t in tasks for m in methods}
        else:
            settings = tuned(tasks, methods, options.data, run)
        jobs = [
            {
                "task": t, "method": m, "option": settings[t.name, m], "seed": seed, "part": "test",
                "folder": options.data, "seconds": t.seconds,
            }
            for t in tasks for m in methods for seed in range(seeds)
        ]  # fmt: skip
        jobs += [
            {"task": t, "method": m, "option": 3e-3, "seed": seed, "part": "test",
             "folder": options.data, "seconds": 0.0}
            for t in implicit
            for m in ("implicit differentiation", "lifted gradient", "lifted, 5 steps")
            for seed in range(seeds)
        ]  # fmt: skip
        results = run(jobs)
    rows = summary(results)
    lines = findings(rows)
    text = "\n\n".join(
        [
            "# Lifted training",
            f"{machine_line(facts)}; {workers} workers of one thread, float32, {seeds} seeds, "
            f"{time.perf_counter() - start:.0f} s in all. Each run of a task had the same seconds "
            "of processor time; a full-batch method ends with the sweep that passes them. Options "
            + ("were not tuned." if options.quick else "were chosen on the validation part.")
            + " All methods start from the same weights, torch's, or He's on MNIST-1D. The full-batch "
            "methods saw the first 10,000 training samples of MNIST. The implicit "
            "models had the same batches, whatever time they took.",
            report(rows),
            "\n".join(lines),
        ]
    )
    print("\n" + text)
    data = {"machine": facts, "quick": options.quick, "summary": rows, "runs": results}
    write_results("lifted_quick" if options.quick else "lifted", data, text, options.out)
    return 0


def chosen(options: argparse.Namespace) -> tuple[list[Task], list[Task]]:
    """The tasks that are asked for and can be run; what is left out is named."""
    tasks, implicit = list(TASKS), list(IMPLICIT)
    missing = set()
    if options.data is None:
        missing.add("mnist")
        print("MNIST is left out: no --data")
    else:
        try:
            load("mnist", options.data)
        except _data.DataError as error:
            sys.exit(f"--data: {error}")
    try:
        import mnist1d.data  # noqa: F401
    except ImportError as error:
        missing.add("mnist1d")
        print(f"MNIST-1D is left out: pip install mnist1d requests ({error})")
    if options.quick:
        brief = {"digits 64-128-10": 1.0, "MNIST-1D 4 x 100": 2.0, "MNIST 784-300-10": 3.0}
        tasks = [
            Task(t.name, t.data, t.widths, brief[t.name], t.batch, min(t.full, 5000))
            for t in tasks if t.name in brief
        ]  # fmt: skip
        implicit = [
            Task(t.name, t.data, t.widths, 0.0, t.batch, min(t.full, 3000), True, min(t.epochs, 6))
            for t in implicit if t.data == "digits"
        ]  # fmt: skip
    wanted = options.tasks

    def asked(task: Task) -> bool:
        return task.data not in missing and (not wanted or any(w in task.name for w in wanted))

    return [t for t in tasks if asked(t)], [t for t in implicit if asked(t)]


if __name__ == "__main__":
    sys.exit(main())
