"""Implicit classifiers trained for certificates on MNIST: the part `mnist` of certify.py."""

import concurrent.futures
import functools
import math
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the workers, one a core

import torch
from _harness import duration, table
from torch import Tensor, nn

from implicitdl import ImplicitLayer, MonotoneLayer, _data
from implicitdl.certify import certify_accuracy, robust_loss
from implicitdl.wellposed import InfNormBall


@dataclass(frozen=True, kw_only=True)
class Job:
    """A classifier, how it is trained, and how it is judged.

    Attributes:
        loss: a method of `robust_loss`; "lipschitz" takes a monotone layer and the 2-norm.
        radius: of the training, reached after the share `ramp` of it.
        judged: methods of `certify_accuracy`, cheap ones first; CROWN with its `refinements`.
        aims: radius -> certified share, where one was set.
    """

    name: str
    states: int
    loss: str
    epochs: int
    rate: float
    batch: int
    radius: float
    aims: dict[float, float | None]
    ramp: float = 0.5
    kappa: float = 0.3
    direct: bool = False
    activation: str = "relu"
    judged: tuple[str, ...] = ("interval",)
    refinements: int = 0

    @property
    def norm(self) -> "str | int":
        """Of the ball."""
        return 2 if self.loss == "lipschitz" else "inf"


# The settings were chosen on the validation part.
JOBS = (
    Job(
        name="100 states, CROWN", states=100, loss="crown", epochs=40, rate=5e-3, batch=250,
        radius=0.1, ramp=0.4, kappa=0.1, direct=True, judged=("interval", "crown"), refinements=1,
        aims={0.05: None, 0.1: 0.90},
    ),
    Job(
        name="500 states, intervals", states=500, loss="interval", epochs=14, rate=3e-3, batch=250,
        radius=0.105, aims={0.05: None, 0.1: 0.94},
    ),
    Job(
        name="100 states, hardtanh, intervals", states=100, loss="interval", epochs=32, rate=5e-3,
        batch=200, radius=0.105, activation="hardtanh", aims={0.05: None, 0.1: 0.90},
    ),
    Job(
        name="100 states, monotone", states=100, loss="lipschitz", epochs=20, rate=2e-3, batch=200,
        radius=0.3, judged=("lipschitz",), aims={0.1: 0.93, 0.2: 0.85, 0.3: 0.68},
    ),
)  # fmt: skip


def train(
    layer: nn.Module, images: Tensor, labels: Tensor, epochs: int, loss: Callable[..., Tensor],
    rate: float = 3e-3, batch: int = 128,
) -> float:  # fmt: skip
    """Adam with a cosine; `loss(u, y, t)` sees the share of the training that is done."""
    start = time.perf_counter()
    optimizer = torch.optim.Adam(layer.parameters(), rate)
    steps = epochs * math.ceil(len(images) / batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    step = 0
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(batch):
            value = loss(images[index], labels[index], step / steps)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            step += 1
    return time.perf_counter() - start


def warm() -> None:
    """A worker has one thread and torch's own default dtype."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)


def run(job: Job, folder: Path, size: int | None, count: int | None) -> list[dict[str, Any]]:
    """Train and judge, in a worker."""
    data = _data.mnist(folder)
    torch.manual_seed(0)
    layer: Any
    if job.loss == "lipschitz":
        layer = MonotoneLayer(784, 10, job.states, margin=1.0, direct=job.direct)
    else:
        layer = ImplicitLayer(
            784, 10, job.states, activation=job.activation, direct=job.direct,
            well_posed=InfNormBall(kappa=job.kappa),
        )  # fmt: skip

    def loss(u: Tensor, y: Tensor, t: float) -> Tensor:
        radius = job.radius * min(1.0, max(0.0, (t - 0.02) / job.ramp))
        return robust_loss(layer, radius, u, y, norm=job.norm, method=job.loss, clip=(0.0, 1.0))

    images, labels = data.train_images[:size], data.train_labels[:size]
    spent = train(layer, images, labels, job.epochs, loss, job.rate, job.batch)
    u, y = data.test_images[:count], data.test_labels[:count]
    rows = []
    for radius in job.aims:
        report = certify_accuracy(
            layer, (u, y), radius, job.norm, job.judged, clip=(0.0, 1.0), batch_size=500,
            pgd_steps=20, refinements=job.refinements,
        )  # fmt: skip
        shares = (report.clean_accuracy, report.attacked_accuracy, report.certified_accuracy)
        row = {
            "model": job.name, "norm": str(job.norm), "radius": radius, "shares": shares,
            "training": spent, "seconds": float(report.seconds.mean()), "aim": job.aims[radius],
        }  # fmt: skip
        print(f"{row}", flush=True)
        rows.append(row)
    return rows


def mnist(folder: Path, quick: bool, samples: int | None) -> tuple[str, dict[str, Any]]:
    """All jobs, one a core at a time."""
    jobs, size, count = JOBS, None, samples
    if quick:
        jobs = tuple(replace(job, epochs=2) for job in JOBS if job.states == 100)
        size, count = 4000, samples or 500
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count() or 1, context, warm) as pool:
        work = functools.partial(run, folder=folder, size=size, count=count)
        rows = [row for found in pool.map(work, jobs) for row in found]
    body = [
        [
            r["model"], duration(r["training"]), r["norm"], f"{r['radius']:g}",
            *(f"{100 * s:.2f} %" for s in r["shares"]),
            "" if r["aim"] is None else f"{100 * r['aim']:.0f} %", duration(r["seconds"]),
        ]
        for r in rows
    ]  # fmt: skip
    head = ["model", "training", "norm", "radius", "clean", "PGD", "certified", "aim", "a sample"]
    text = (
        f"MNIST, {count or 10000} test images; a thread a training, one training a core.\n\n"
        + table(head, body)
    )
    return text, {"rows": rows}
