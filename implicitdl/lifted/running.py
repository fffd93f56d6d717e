"""The loop that all lifted trainers share: best so far, Ctrl-C, checkpoint, progress."""

import abc
import math
import os
import re
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn

from .._sharing import Sharing
from ..solution import ConvergenceError
from . import checkpoint as files
from .penalties import Loss
from .report import Report


class Process(abc.ABC):
    """A training as epochs: what the next depends on, and how to make it."""

    model: nn.Module
    sharing = Sharing()

    @abc.abstractmethod
    def epoch(self, number: int) -> dict[str, Any]:
        """One epoch; returns its record: objective, loss, penalties, feasibility, accuracy."""

    @abc.abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything that the next epoch depends on, beside options and data."""

    @abc.abstractmethod
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put it back."""


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {f"model/{name}": t for name, t in model.state_dict().items()}


@torch.no_grad()
def restore(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Write parameters and buffers back, in place."""
    for name, t in model.state_dict().items():
        t.copy_(tensors[f"model/{name}"])


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: t.detach().clone() for key, t in tensors.items()}


def described(model: nn.Module) -> str:
    """The architecture in a line, without addresses."""
    return " ".join(re.sub(r" at 0x[0-9a-fA-F]+", "", repr(model)).split())


@torch.no_grad()
def scores(
    model: nn.Module, u: Tensor, y: Tensor, loss: Loss, labels: bool,
    add_up: Callable[[Tensor], Tensor] = lambda t: t,
) -> tuple[float, float]:  # fmt: skip
    """The mean loss and the accuracy (nan where the targets are no labels) of the model.

    Args:
        add_up: sums over the processes that have other samples.
    """
    training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=u.device)
    try:
        for rows, wanted in zip(u.split(2000), y.split(2000), strict=True):
            out = model(rows)
            sums[0] += loss.value(wanted, out).double().sum()
            sums[1] += (out.argmax(1) == wanted.argmax(1)).sum()
            sums[2] += len(rows)
    finally:
        model.train(training)
    total, hits, count = add_up(sums).tolist()
    return total / count, hits / count if labels else math.nan


def run(
    process: Process,
    report: Report,
    epochs: int,
    *,
    options: dict[str, Any],
    validate: Callable[[], float] | None,
    path: "str | os.PathLike[str] | None",
    progress: bool,
    on_epoch: Callable[[Report], Any] | None,
    keep: str,
) -> Report:
    """Make the epochs that are missing, and leave the model with the best or the last parameters.

    Args:
        process: what to run.
        report: an empty one, filled as epochs end.
        epochs: how many in all.
        options: what a checkpoint must agree with.
        validate: the validation score of the model as it is now; None without such samples.
        path: of the checkpoint, written after each epoch and resumed from where it exists; where
            processes share samples each has a file of its own, with its number behind the name.
        progress: whether to show a bar.
        on_epoch: called after each epoch; the training ends where it returns True.
        keep: "best", or "last"; after Ctrl-C it is always the best.
    """
    model = process.model
    best = _copies(model_tensors(model))

    def taken_up() -> tuple[str | None, dict[str, Tensor]]:
        if path is None:
            return None, best
        name = files.require_path(path)
        if process.sharing.shard is not None:
            name = f"{name}.{distributed.get_rank(process.sharing.group)}"
        if not os.path.exists(name):
            return name, best
        now, kept = files.load(name, options, report, process.tensors(), best)
        process.load(now)
        return name, kept

    name, best = process.sharing.together(taken_up)
    _require_together(process.sharing, report.epochs, best)
    before = report.seconds[-1] if report.seconds else 0.0
    start = time.perf_counter()
    bar = _bar(epochs, report.epochs) if progress else None
    try:
        while report.epochs < epochs:
            record = process.epoch(report.epochs)
            record["validation"] = math.nan if validate is None else validate()
            record["seconds"] = before + time.perf_counter() - start
            if not math.isfinite(record["objective"]):
                restore(model, best)
                raise ConvergenceError(
                    f"the objective is {record['objective']} in epoch {report.epochs + 1}; the model has "
                    f"the parameters of epoch {report.best + 1} back. Take a smaller learning rate, or "
                    "scale the data."
                )
            report.add(record)
            if report.best == report.epochs - 1:
                best = _copies(model_tensors(model))
            if name is not None:
                files.save(name, options, report, process.tensors(), best)
            if bar is not None:
                bar(report)
            if on_epoch is not None and on_epoch(report) is True:
                break
    except KeyboardInterrupt:
        report.interrupted = True
    finally:
        if bar is not None:
            bar(None)
    report.kept = "best" if report.interrupted else keep
    if report.kept == "best":
        restore(model, best)
    return report


def _require_together(sharing: Sharing, epochs: int, best: dict[str, Tensor]) -> None:
    """Refuse to go on from checkpoints of different epochs."""
    if sharing.shard is None:
        return
    like = next(iter(best.values()))
    mine = torch.tensor([epochs, epochs**2, 1], dtype=torch.float64, device=like.device)
    total, squares, count = sharing.total(mine).tolist()
    if abs(squares * count - total * total) > 0.5:
        raise ValueError(
            f"checkpoint: the processes' files are of different epochs, {epochs} here; remove them to "
            "start anew."
        )


def _bar(total: int, done: int) -> Callable[[Report | None], None]:
    """tqdm's bar, or lines of text where it is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return lambda report: None if report is None else print(report.line(), flush=True)
    bar = tqdm(total=total, initial=done, unit="epoch")

    def show(report: Report | None) -> None:
        if report is None:
            bar.close()
            return
        bar.set_postfix_str(report.line(), refresh=False)
        bar.update(1)

    return show
