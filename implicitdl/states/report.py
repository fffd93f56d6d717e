"""What `fit_states` says of what it found."""

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..layers import ImplicitLayer
from ..model import Structure
from ..solution import ConvergenceError
from ..wellposed import Certificate
from .recording import Sharing, chunks, found_at, teacher

if TYPE_CHECKING:
    from .fitting import Fitted


@dataclass(frozen=True, kw_only=True, eq=False)
class FitReport:
    """How well the states of a network were matched, by how little, and what is certain.

    Attributes:
        fit: ||z_i - z_hat_i|| / ||z_i - mean z_i|| on the network's states, of each state.  # (n,)
        readout_fit: the same of the outputs, on the new model's own states.  # (q,)
        states: the network's states that were kept, by number.
        features: the inputs that are read, by number.
        scaling: the network's states over the layer's.  # (states kept,)
        entries: how many numbers of A, B, C, D, b, d are not zero (for a low rank, of L, R).
        parameters: of the network; None where it was a model.
        norm: ||A||_inf, in the weighted norm where the layer's set has weights.
        scaled: whether the network's own weights were in the ball, so that it could be matched.
        certificate: of the layer.
        before, after: accuracy of the network and of the layer on the data (or, where the targets
            are numbers, 1 - squared error / variance); None without targets.
        agreement: share of samples whose largest output is the same; nan where there is one output.
        objective: of the programs of (A B), in units of variances, before the refit.
        gap: to its optimum at most; None where there is no bound.
        samples: how many there were, in all processes.
        steps: of alternating directions and of Newton's method.
    """

    fit: Tensor = field(repr=False)
    readout_fit: Tensor = field(repr=False)
    states: tuple[int, ...] = field(repr=False)
    features: tuple[int, ...] = field(repr=False)
    scaling: Tensor = field(repr=False)
    entries: dict[str, int]
    parameters: int | None
    norm: float
    scaled: bool
    certificate: Certificate = field(repr=False)
    objective: float | None
    gap: float | None
    samples: int
    steps: tuple[int, int]
    before: float | None = None
    after: float | None = None
    agreement: float | None = None

    @property
    def total(self) -> int:
        """Numbers that are not zero."""
        return sum(self.entries.values())

    @property
    def share(self) -> float | None:
        """These over the network's parameters."""
        return None if not self.parameters else self.total / self.parameters

    @staticmethod
    def of(layer: ImplicitLayer, found: "Fitted", parameters: int | None) -> "FitReport":
        """The report of a fit, not scored yet."""
        from .assembly import absorbs, seen

        names = ["B", "C", "D", "b", "d"]
        entries = {"A": int((layer.A != 0).sum())} if layer.low_rank is None else {
            name: getattr(layer, name).numel() for name in ("L", "R")
        }  # fmt: skip
        entries |= {name: int((getattr(layer, name) != 0).sum()) for name in names}
        ball: Any = layer.well_posed
        kept = seen(found.A, found.C, found.phi)
        absorbed = absorbs(found)
        reads = ((layer.B != 0).any(0) | (layer.D != 0).any(0)).nonzero().flatten()
        return FitReport(
            fit=found.fit, readout_fit=found.readout_fit,
            states=tuple(kept.tolist()),
            scaling=found.v[kept] if absorbed else torch.ones_like(found.v[kept]),
            features=tuple(reads.tolist()), entries=entries, parameters=parameters,
            norm=ball.kappa - float(ball.margin(layer.A.detach().double())),
            scaled=found.scaled, certificate=layer.certificate(),
            objective=None if found.objective is None else float(found.objective.sum()),
            gap=None if found.gap is None else float(found.gap.sum()),
            samples=found.samples, steps=found.steps,
        )  # fmt: skip

    def scored(
        self, before: float | None, after: float | None, agreement: float | None
    ) -> "FitReport":
        """The same with scores."""
        return replace(self, before=before, after=after, agreement=agreement)

    def __str__(self) -> str:
        share = "" if self.share is None else f", {100 * self.share:.1f} % of the network's"
        parts = ", ".join(f"{name} {count}" for name, count in self.entries.items())
        mean, worst, out = (
            100 * float(t) for t in (self.fit.mean(), self.fit.max(), self.readout_fit.mean())
        )
        lines = [
            f"{len(self.states)} states of {len(self.fit)}, {len(self.features)} features read",
            f"{self.total} numbers{share} ({parts})",
            f"states matched to {mean:.1f} % of their deviation on average, {worst:.1f} % at worst",
            f"outputs matched to {out:.1f} %",
            f"||A|| = {self.norm:.6g}, {self.certificate}",
        ]
        if not self.scaled:
            lines.append("the network itself is not in the ball: its states cannot all be matched")
        if self.before is not None:
            lines.append(f"score {100 * self.before:.2f} % -> {100 * self.after:.2f} %")
        if self.agreement is not None and not math.isnan(self.agreement):
            lines.append(f"same answer as the network on {100 * self.agreement:.2f} % of samples")
        return "\n".join(lines)


def scores(
    f: Structure,
    layer: ImplicitLayer,
    data: Tensor,
    targets: Tensor | None,
    sharing: Sharing,
) -> tuple[float | None, float | None, float]:
    """Of the network, of the layer, and the share of equal answers, over all processes."""

    def own() -> Tensor:
        sums = torch.zeros(5, dtype=torch.float64, device=data.device)
        start = 0
        for part in chunks(f, data):
            y = teacher(f, part)[2]
            u = data[start : start + len(part)].flatten(1)
            new = found_at(layer.well_posed, lambda u=u: layer(u)).double()  # type: ignore[misc]
            sums += sums.new_tensor(counted(y, new, start))
            start += len(part)
        return sums

    def counted(y: Tensor, new: Tensor, start: int) -> list[float]:
        counts = [float(len(y)), float((y.argmax(1) == new.argmax(1)).sum())]
        if targets is None:
            return [*counts, 0.0, 0.0, 0.0]
        t = targets[start : start + len(y)]
        if t.is_floating_point():
            t = t.double()
            left = ((t - y).square().sum(), (t - new).square().sum(), t.square().sum())
            return [*counts, *map(float, left)]
        return [*counts, float((y.argmax(1) == t).sum()), float((new.argmax(1) == t).sum()), 0.0]

    sums = sharing.together(own, ConvergenceError)
    mean = sums.new_zeros(f.outputs)
    numbers = targets is not None and targets.is_floating_point()
    if numbers:
        mean = targets.double().sum(0)  # type: ignore[union-attr]
    sums, mean = sharing.over_samples(sums, mean)
    count, same, first, second, power = sums.tolist()
    agreement = same / count if f.outputs > 1 else math.nan
    if targets is None:
        return None, None, agreement
    if not numbers:
        return first / count, second / count, agreement
    spread = max(power - float((mean / count).square().sum()) * count, 1e-300)
    return 1 - first / spread, 1 - second / spread, agreement
