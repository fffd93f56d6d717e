"""`lifted.blocks`: full-batch block coordinate descent, the objective never rising.

    J = (1/m) sum_k [ loss(y_k, z_L) + mu sum_l pen_l(x_{l+1}, W_l x_l + b_l) ] + regularisation

over all states x_1, ..., x_{L-1} and all weights. With the Fenchel penalty each block is a convex
program: states one after the other from the top (`states`), then the weights of each layer
(`rows`). J's minimum is a lower bound of that of training, for every mu > 0, and rises with mu.

Reference: Gu, Askari, El Ghaoui (2020), sections 3 and 4; Askari et al. (2018), section 3.
"""

import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._sharing import Sharing, require_initialised
from ..layers.base import AffineLayer
from ..model import ImplicitModel
from ..solution import unknown_name
from .chain import Chain, Stage
from .checkpoint import fingerprint
from .checks import check_count, check_inputs, check_number, check_targets
from .equilibrium_blocks import EquilibriumBlocks
from .penalties import Loss, Penalty, get_loss, get_penalty
from .preparing import as_model, checked_keep, held_out, module_of
from .report import Report
from .rows import Region, Rows, fit_rows
from .running import Process, described, model_tensors, restore, run
from .states import descend


def blocks(
    model: "nn.Module | ImplicitModel",
    data: Tensor,  # (m, *input)
    targets: Tensor,  # (m,) labels, or (m, q)
    *,
    loss: str = "cross_entropy",
    penalty: "str | Penalty" = "fenchel",
    mu: float = 10.0,
    growth: float = 1.0,
    rows: Rows | None = None,
    sweeps: int = 30,
    state_steps: int = 10,
    weight_steps: int = 5,
    damping: float = 0.03,
    trace: bool = False,
    validation: tuple[Tensor, Tensor] | None = None,
    keep: str | None = None,
    checkpoint: "str | os.PathLike[str] | None" = None,
    progress: bool = False,
    on_epoch: Callable[[Report], Any] | None = None,
    shard: str | None = None,
    group: Any = None,
) -> Report:
    """Train in place by block coordinate descent over weights and states of all samples.

    For small data, constraints and convex blocks, not for accuracy on hard tasks: a full-batch
    descent of J stops near where it starts. No derivative of an activation is used with the Fenchel
    penalty, and J never rises while mu stays (`growth=1`).

    Args:
        model: an `nn.Sequential` (see `local`; one linear module a stage, without dropout and
            batch normalisation), an `ImplicitLayer`, or an `ImplicitModel` of matrices.
        data, targets, loss: as in `local`.
        penalty: "fenchel"; "quadratic" for activations without one, whose blocks are not convex and
            are descended with backtracking; or "askari", least squares and biased.
        mu: weight of the penalties against the loss.
        growth: factor of mu after each sweep, at least 1; J rises with mu.
        rows: l1, ridge and row bounds of the weights, `Rows(...)`. The A of an implicit layer is
            kept in its own set, too: rows in the l1 ball of `InfNormBall`, or in weighted ones from
            the Perron-Frobenius scaling of A for `PerronFrobenius`.
        sweeps: over all blocks.
        state_steps, weight_steps: steps in each block.
        damping: of the weights' steps, over the mean square of a layer's inputs: they then move
            little in directions that the data hardly have. 0 makes least squares exact.
        trace: whether to evaluate J after each block.
        validation, keep, checkpoint, progress, on_epoch: as in `local`.
        shard: with torch.distributed initialised, "samples": each process has its own samples and
            the states of these, and the same model; what they add up are Gram matrices, gradients
            of weights and values. The result is that of one process with all samples.
        group: of torch.distributed; None for all processes.

    Returns:
        The report; with `trace`, `details["steps"]` has J after each block of the last sweep.

    Raises:
        TypeError: the model, or a module of it, is of another kind.
        ValueError: as `local`, or an A outside its set.

    Example:
        >>> import torch
        >>> from implicitdl import lifted
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> u = torch.randn(64, 2)
        >>> report = lifted.blocks(net, u, (u[:, 0] > 0).long(), sweeps=3)
        >>> report.objective[2] <= report.objective[0]
        True
    """
    module = module_of(model, kept=True)
    chosen, how = get_loss(loss), get_penalty(penalty)
    rows = Rows() if rows is None else rows
    if not isinstance(rows, Rows):
        raise TypeError(f"rows: got {type(rows).__name__}, expected lifted.Rows(...).")
    if check_number("growth", growth) < 1:
        raise ValueError(f"growth: got {growth}, expected a factor of at least 1.")
    check_number("mu", mu)
    check_count("sweeps", sweeps, 0)
    check_count("state_steps", state_steps)
    counts = (
        state_steps,
        check_count("weight_steps", weight_steps),
        bool(trace),
        check_number("damping", damping, zero=True),
    )
    keep = checked_keep(keep, validation)
    if shard not in (None, "samples"):
        raise unknown_name("shard", shard, ("samples",))
    sharing = Sharing(shard=shard, group=group)
    if shard is not None:
        require_initialised(shard)
        if not how.convex:
            raise ValueError(
                f"shard: got {shard!r} with the penalty {how!r}, whose step lengths depend on all "
                "samples; take penalty='fenchel'."
            )
    made: Any = EquilibriumBlocks if isinstance(module, AffineLayer) else _ChainBlocks
    process = made(module, chosen, how, rows, float(mu), float(growth), counts, sharing)

    def accepted() -> tuple[Tensor, Tensor, Callable[[], float] | None]:
        u = check_inputs(data, next(module.parameters()))
        y = check_targets(targets, len(u), process.outputs(u), chosen, u)
        return u, y, held_out(module, validation, u, y, chosen, sharing.total)

    u, y, held = sharing.together(accepted)
    process.start(u, y, not targets.is_floating_point())
    options: dict[str, Any] = {}
    if checkpoint is not None:
        sent = [None, None] if validation is None else list(validation)
        options = {
            "method": "blocks", "model": described(module), "loss": loss, "penalty": repr(how), "mu": mu, "growth": growth,
            "rows": repr(rows), "state_steps": state_steps, "weight_steps": weight_steps, "damping": damping,
            "data": fingerprint(data, targets, *sent),
        }  # fmt: skip
    report = Report(method="blocks", model=module, details=process.details)
    run(
        process, report, sweeps, options=options, validate=held, path=checkpoint,
        progress=progress, on_epoch=on_epoch, keep=keep,
    )  # fmt: skip
    if isinstance(model, ImplicitModel):
        report.model = as_model(module)
    return report


class _ChainBlocks(Process):
    """Sweeps over the states and weights of a chain."""

    def __init__(
        self, model: nn.Module, loss: Loss, penalty: Penalty, rows: Rows, mu: float, growth: float,
        counts: tuple[int, int, bool, float], sharing: Sharing,
    ):  # fmt: skip
        self.sharing = sharing
        self.model, self.loss, self.penalty, self.rows = model, loss, penalty, rows
        self.mu, self.growth = mu, growth
        self.state_steps, self.weight_steps, self.trace, self.damping = counts
        self.chain = Chain(model, dense=True)
        self.stages = self.chain.stages
        for stage in self.stages:
            if stage.phi is not None:
                penalty.check(stage.phi)
        self.details: dict[str, Any] = {}

    def outputs(self, u: Tensor) -> int:
        """How many the model has for such inputs."""
        return self.chain.check(u)

    @torch.no_grad()
    def start(self, u: Tensor, y: Tensor, labels: bool) -> None:
        """Feasible weights, and the states of a forward pass."""
        self.y, self.labels = y, labels
        self.count = int(self.sharing.total(u.new_tensor([len(y)], dtype=torch.float64)))
        for stage in self.stages:
            if stage.core is not None and stage.parameters:
                theta = stage.weights()
                stage.assign(self._region(stage, theta).inside(theta))
        self.x, _ = self.chain.forward(u)

    def _region(self, stage: Stage, theta: Tensor) -> Region:
        core: Any = stage.core
        return Region.of(self.rows, theta, core.weight[0].numel())

    def _stage_value(self, k: int, target: Tensor, z: Tensor) -> Tensor:
        """The weighted penalty of stage k, or the loss, of each sample."""
        phi = self.stages[k].phi
        if phi is None:
            return self.loss.value(target, z)
        return self.mu * self.penalty.value(phi, target, z)

    def _residual(self, k: int, target: Tensor, z: Tensor) -> Tensor:
        phi = self.stages[k].phi
        if phi is None:
            return self.loss.residual(target, z)
        return self.mu * self.penalty.residual(phi, target, z)

    def _curvature(self, k: int) -> float:
        phi = self.stages[k].phi
        return self.loss.curvature if phi is None else self.mu * self.penalty.curvature(phi)

    def _target(self, k: int) -> Tensor:
        return self.y if self.stages[k].phi is None else self.x[k + 1]

    @torch.no_grad()
    def terms(self) -> tuple[list[float], float, float]:
        """The mean of each stage's penalty, the loss last; the regularisation; and the largest
        relative distance of a state from its equation."""
        means, extra, worst = [], 0.0, 0.0
        total = self.sharing.total
        for k, stage in enumerate(self.stages):
            z = stage(self.x[k])
            value = self._stage_value(k, self._target(k), z).sum()
            off = size = value
            if stage.phi is not None:
                free = stage.phi(z)
                off, size = (self.x[k + 1] - free).pow(2).sum(), free.pow(2).sum()
            value, off, size = total(torch.stack([value, off, size])).tolist()
            means.append(value / self.count)
            if stage.phi is not None:
                worst = max(worst, math.sqrt(off / (size or 1.0)))
            if stage.core is not None:
                theta = stage.weights()
                extra += float(self._region(stage, theta).value(theta))
        return means, extra, worst

    def objective(self) -> float:
        """J."""
        means, extra, _ = self.terms()
        return math.fsum(means) + extra

    @torch.no_grad()
    def epoch(self, number: int) -> dict[str, Any]:
        """States from the top, then weights."""
        if number > 0:
            self.mu *= self.growth
        steps = []
        for k in range(len(self.stages) - 1, 0, -1):
            self._state_step(k)
            if self.trace:
                steps.append([f"states {k}", self.objective()])
        for k, stage in enumerate(self.stages):
            if stage.core is not None and stage.parameters:
                self._weight_step(k)
                if self.trace:
                    steps.append([f"weights {k}", self.objective()])
        if self.trace:
            self.details["steps"] = steps
        return self._record()

    def _record(self) -> dict[str, Any]:
        means, extra, worst = self.terms()
        share = math.nan
        if self.labels:
            out = self.chain.forward(self.x[0])[1][-1]
            right = (out.argmax(1) == self.y.argmax(1)).double().sum()
            share = float(self.sharing.total(right.reshape(1))) / self.count
        return {
            "objective": math.fsum(means) + extra,
            "loss": means[-1],
            "penalties": means[:-1],
            "feasibility": worst,
            "accuracy": share,
        }

    def _state_step(self, k: int) -> None:
        """x_k, between the stage below it, k - 1, and the one above, k."""
        below, above = self.stages[k - 1], self.stages[k]
        phi, target = below.phi, self._target(k)
        assert phi is not None
        p = below(self.x[k - 1])

        def value(x: Tensor) -> Tensor:
            return self.penalty.value(phi, x, p) + self._stage_value(k, target, above(x)) / self.mu

        def step(x: Tensor, L: float) -> Tensor:
            r = self._residual(k, target, above(x)) / self.mu
            return self.penalty.minimise(phi, p, L * x - above.adjoint(r, x), L)

        norm = above.norm_bound(self.x[k]) if len(above.body) else 1.0
        L = self._curvature(k) / self.mu * norm**2
        certain = self.penalty.convex or above.phi is None
        sigma = self.penalty.strong(phi)
        self.x[k] = descend(self.x[k], step, value, L, sigma, self.state_steps, certain=certain)

    def _weight_step(self, k: int) -> None:
        stage = self.stages[k]
        core: Any = stage.core
        regressors = stage.regressors(self.x[k])
        if core.bias is not None:
            ones = regressors.new_ones(len(regressors), 1)
            regressors = torch.cat([regressors, ones], 1)
        target = self._target(k)
        if not isinstance(core, nn.Linear):  # one row a position; the penalties act entry by entry
            target = target.reshape(len(target), *_core_shape(stage, self.x[k][:1]))
        wanted = stage.as_rows(target)
        theta = stage.weights()
        new = fit_rows(
            theta,
            regressors,
            lambda z: self._stage_value(k, wanted, z).sum(),
            lambda z: self._residual(k, wanted, z),
            self._curvature(k),
            self._region(stage, theta),
            weight=1.0 / self.count,
            add_up=self.sharing.total,
            steps=self.weight_steps,
            damping=self.damping,
            convex=self.penalty.convex or stage.phi is None,
        )
        stage.assign(new)

    def tensors(self) -> dict[str, Tensor]:
        """Parameters, states, mu."""
        found = model_tensors(self.model)
        found |= {f"state/{k}": x for k, x in enumerate(self.x) if k > 0}
        found["mu"] = torch.tensor(self.mu, dtype=torch.float64)
        return found

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Parameters, states, mu."""
        restore(self.model, tensors)
        for k in range(1, len(self.x)):
            self.x[k] = tensors[f"state/{k}"].clone()
        self.mu = float(tensors["mu"])


def _core_shape(stage: Stage, x: Tensor) -> tuple[int, ...]:
    """The shape of what a convolution returns, whatever flattening follows it."""
    for module in stage.body:
        x = module(x)
        if module is stage.core:
            break
    return tuple(x.shape[1:])
