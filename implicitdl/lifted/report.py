"""What every lifted trainer returns."""

import math
from dataclasses import dataclass, field, fields
from typing import Any

_SERIES = ("objective", "loss", "penalties", "feasibility", "accuracy", "validation", "seconds")


@dataclass
class Report:
    """The history of a training, one entry an epoch (or sweep), and what became of it.

    Attributes:
        method: "local", "blocks" or "admm".
        model: the trained model: the module that was passed in, or a new `ImplicitModel`.
        objective: what the method minimises: loss, penalties and regularisation together.
        loss: the loss of the lifted (for `local`, the free) output, mean over the samples.
        penalties: the weighted penalty of each block, mean over the samples.  # epochs x blocks
        feasibility: how far the states are from the network's equations, the largest over the
            blocks of ||x - phi(z)|| / ||phi(z)||.
        accuracy: share of the training samples classified right; nan for regression.
        validation: the share on the validation samples; minus the loss for regression; nan
            without such samples.
        seconds: since the start, resumed runs added up.
        best: which epoch's parameters are the best, by validation or else by the objective;
            -1 for those before the first.
        kept: "best" or "last", which parameters the model has now.
        interrupted: whether Ctrl-C ended the training.
        details: what else the method has to say, in numbers and words.
    """

    method: str
    model: Any = field(repr=False)
    objective: list[float] = field(default_factory=list, repr=False)
    loss: list[float] = field(default_factory=list, repr=False)
    penalties: list[list[float]] = field(default_factory=list, repr=False)
    feasibility: list[float] = field(default_factory=list, repr=False)
    accuracy: list[float] = field(default_factory=list, repr=False)
    validation: list[float] = field(default_factory=list, repr=False)
    seconds: list[float] = field(default_factory=list, repr=False)
    best: int = -1
    kept: str = "last"
    interrupted: bool = False
    details: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def epochs(self) -> int:
        """How many there were."""
        return len(self.objective)

    def score(self, epoch: int) -> float:
        """What epochs are ranked by: validation or else minus the objective; larger is better."""
        value = self.validation[epoch]
        return -self.objective[epoch] if math.isnan(value) else value

    def add(self, record: "dict[str, Any]") -> None:
        """One epoch more."""
        for name in _SERIES:
            getattr(self, name).append(record[name])
        score = self.score(self.epochs - 1)
        if self.best < 0 or score > self.score(self.best) or math.isnan(self.score(self.best)):
            self.best = self.epochs - 1

    def history(self) -> dict[str, Any]:
        """All of it but the model, as plain data."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "model"}

    def line(self, epoch: int = -1) -> str:
        """An epoch in words."""
        if not self.epochs:
            return "no epoch finished"
        parts = [f"objective {self.objective[epoch]:.5g}", f"loss {self.loss[epoch]:.5g}"]
        parts.append(f"feasibility {self.feasibility[epoch]:.2g}")
        for name in ("accuracy", "validation"):
            value = getattr(self, name)[epoch]
            if not math.isnan(value):
                parts.append(f"{name} {value:.4f}")
        return ", ".join(parts)

    def __str__(self) -> str:
        end = " (interrupted)" if self.interrupted else ""
        best = "" if self.best < 0 else f"; best epoch {self.best + 1}: {self.line(self.best)}"
        seconds = f"{self.seconds[-1]:.1f} s" if self.seconds else "0 s"
        return f"{self.method}, {self.epochs} epochs, {seconds}{end}: {self.line()}{best}"
