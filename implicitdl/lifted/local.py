"""`lifted.local`: targets from a proximal sweep, local gradients, any optimiser of torch."""

import copy
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..implicit.lifted import Lifted
from ..layers.base import AffineLayer
from ..model import ImplicitModel
from ..solution import unknown_name
from .chain import NORMS, Chain
from .checkpoint import fingerprint
from .checks import check_count, check_inputs, check_number, check_targets
from .penalties import Penalty, get_loss, get_penalty
from .preparing import as_model, checked_keep, held_out, module_of
from .report import Report
from .running import Process, described, model_tensors, restore, run, scores
from .sweep import Settings, sweep

_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "linear": lambda t: max(1.0 - t, 0.01),
    "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t)),
}


def gradients(
    model: nn.Module,
    data: Tensor,
    targets: Tensor,
    *,
    loss: str = "cross_entropy",
    penalty: "str | Penalty" = "fenchel",
    c: float | None = None,
    two_sided: bool = False,
    sweeps: int | None = None,
    coupling: float = 1.0,
) -> float:
    """Lifted gradients of the mean loss, added to `.grad` as `loss.backward()` would.

    Args:
        model, data, targets, loss, penalty, c, two_sided, sweeps, coupling: as in `local`.

    Returns:
        The mean loss of the free output; for targets that are probabilities, less their entropy.

    Raises:
        TypeError, ValueError: as `local`.

    Example:
        >>> import torch
        >>> from implicitdl import lifted
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> value = lifted.gradients(net, torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
        >>> net[0].weight.grad.shape
        torch.Size([8, 4])
    """
    if isinstance(model, ImplicitModel):
        raise TypeError(
            "model: got an ImplicitModel, which has no `.grad`; expected an ImplicitLayer or an "
            "nn.Sequential. `lifted.local` takes one and returns the trained one."
        )
    how = _settings(model, loss, penalty, c, two_sided, sweeps, coupling)
    backend, u, y = _prepared(model, data, targets, how)
    total, _, _, _ = backend(u, y, how, False)
    return float(total) / len(u)


def local(
    model: "nn.Module | ImplicitModel",
    data: Tensor,  # (m, *input)
    targets: Tensor,  # (m,) labels, or (m, q)
    *,
    loss: str = "cross_entropy",
    penalty: "str | Penalty" = "fenchel",
    c: float | None = None,
    two_sided: bool = False,
    sweeps: int | None = None,
    coupling: float = 1.0,
    optimizer: torch.optim.Optimizer | None = None,
    schedule: "str | Callable[[float], float]" = "linear",
    epochs: int = 20,
    batch_size: int = 64,
    validation: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
    keep: str | None = None,
    checkpoint: "str | os.PathLike[str] | None" = None,
    progress: bool = False,
    on_epoch: Callable[[Report], Any] | None = None,
) -> Report:
    """Train in place by local gradients: each layer's from its own input and target.

    The activations are evaluated and never differentiated, so hard ones train, too. One sweep of a
    chain costs what a back-propagation costs. For an implicit layer the targets are the states of
    a clamped equilibrium (`implicit.lifted.Lifted`), for which A need not be symmetric.

    Args:
        model: an `nn.Sequential` of linear, convolution, average pooling, flattening, dropout,
            batch normalisation and activation modules (`Activate` for any other activation); an
            `ImplicitLayer` or `MonotoneLayer`; or an `ImplicitModel` of matrices, of which the
            report has a trained one.
        data: inputs.
        targets: class numbers, or numbers.
        loss: "cross_entropy" or "squared" (half of the square).
        penalty: "fenchel"; "quadratic" for activations without one (GELU, SiLU), whose single sweep
            is back-propagation, derivatives included; or "askari", which is biased.
        c: the weight of the loss against the penalties, the size of the finite differences; None
            for 0.5, or 0.01 for implicit layers (see `Lifted`).
        two_sided: the mean of the gradients for c and -c, off by O(c^2) instead of O(c).
        sweeps: of each block, more than one only where they are certified to contract; None for 1,
            and for the whole clamped solve of an implicit layer. With one, gradients are off by O(c);
            with more, each block is solved with the target above it held (Li et al.), a direction
            that differs from the gradient for every c.
        coupling: gamma, the weight of each block's penalty against the one below; less than 1
            makes more sweeps contract for larger weights.
        optimizer: over the model's parameters; None for AdamW(lr=3e-3).
        schedule: "linear", "cosine", "constant", or the factor of the learning rate as a function
            of the share of the steps that are done.
        epochs, batch_size, seed: passes over the data, their order being given by the seed.
        validation: inputs and targets to rank epochs by.
        keep: "best" or "last"; None for "best" with validation samples, else "last". Without such
            samples "best" evaluates the training samples after each epoch; after Ctrl-C, whose
            choice comes unasked, epochs are ranked by their running loss.
        checkpoint: a file that is written after each epoch; where it exists, the training goes on
            from it, bit for bit as if it had not stopped.
        progress: whether to show a bar (tqdm where it is installed).
        on_epoch: called with the report after each epoch; returning True ends the training.

    Returns:
        The report; `objective` is the mean loss, the penalties are those of the last batch.

    Raises:
        TypeError: a module, the model or the optimiser is of another kind.
        ValueError: data with NaN (the sample is named), labels out of range, targets of the wrong
            shape, an activation without the needed facts, or an option out of range.

    Reference:
        Li et al. (2019), algorithm 1; Gu, Askari, El Ghaoui (2020), section 4.

    Example:
        >>> import torch
        >>> from implicitdl import lifted
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> u = torch.randn(64, 2)
        >>> lifted.local(net, u, (u[:, 0] > 0).long(), epochs=2).epochs
        2
    """
    module = module_of(model)
    how = _settings(module, loss, penalty, c, two_sided, sweeps, coupling)
    backend, u, y = _prepared(module, data, targets, how)
    optimizer = _optimizer(module, optimizer)
    process = _Local(module, backend, u, y, how, optimizer, targets)
    process.rate = _schedule(schedule)
    process.epochs = check_count("epochs", epochs, 0)
    process.batch_size = check_count("batch_size", batch_size)
    lone = (len(u) - 1) % process.batch_size == 0
    if lone and any(isinstance(m, nn.BatchNorm1d) and m.training for m in module.modules()):
        raise ValueError(
            f"batch_size: {batch_size} leaves a last batch of one of {len(u)} samples, which batch "
            "normalisation cannot take; choose another."
        )
    process.seed = check_count("seed", seed, 0)
    keep = checked_keep(keep, validation)
    held = held_out(module, validation, u, y, how.loss)
    process.after = keep == "best" and held is None
    options: dict[str, Any] = {}
    if checkpoint is not None:
        sent = [None, None] if validation is None else list(validation)
        options = {
            "method": "local", "model": described(module), "loss": loss, "penalty": repr(how.penalty), "c": how.c,
            "two_sided": two_sided, "sweeps": how.sweeps, "coupling": how.coupling,
            "schedule": [process.rate(t) for t in (0.0, 0.2, 0.5, 0.7, 1.0)],
            "epochs": epochs, "batch_size": batch_size, "seed": seed,
            "optimizer": process.hyperparameters(),
            "data": fingerprint(data, targets, *sent),
        }  # fmt: skip
    report = Report(method="local", model=module)
    training = module.training
    module.train()
    try:
        run(
            process, report, epochs, options=options, validate=held, path=checkpoint,
            progress=progress, on_epoch=on_epoch, keep=keep,
        )  # fmt: skip
    finally:
        module.train(training)
        process.close()
    if isinstance(model, ImplicitModel):
        report.model = as_model(module)
    return report


def as_initialization(
    model: nn.Module, data: Tensor, targets: Tensor, *, epochs: int = 2, **options: Any
) -> Report:
    """A few epochs of `local`, after which any optimiser goes on from the model as it is.

    Args:
        model, data, targets: as in `local`; the model is changed in place.
        epochs: how many.
        options: of `local`, say `optimizer`, `loss` or `c`.

    Returns:
        The report of these epochs.

    Raises:
        TypeError, ValueError: as `local`.
    """
    return local(model, data, targets, epochs=epochs, **{"schedule": "constant", **options})


def _settings(
    model: Any, loss: str, penalty: Any, c: float | None, two_sided: bool, sweeps: int | None,
    coupling: float,
) -> Settings:  # fmt: skip
    implicit = isinstance(model, AffineLayer)
    if two_sided not in (True, False):
        raise ValueError(f"two_sided: got {two_sided!r}, expected True or False.")
    count = (
        0 if sweeps is None and implicit else check_count("sweeps", 1 if sweeps is None else sweeps)
    )
    return Settings(
        loss=get_loss(loss),
        penalty=get_penalty(penalty),
        c=check_number("c", (0.01 if implicit else 0.5) if c is None else c),
        two_sided=bool(two_sided),
        sweeps=count,
        coupling=check_number("coupling", coupling),
    )


def _prepared(model: Any, data: Any, targets: Any, how: Settings) -> tuple[Any, Tensor, Tensor]:
    """How to get gradients of the model, and the data as rows, all checked."""
    if isinstance(model, AffineLayer):
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError("model: all of its parameters are frozen, expected one to train.")
        backend: Any = _Equilibrium(model, how)
        like: Tensor = model.B
    else:
        backend = _Sweeps(model, how)
        like = next(model.parameters())
    u = check_inputs(data, like)
    outputs = backend.outputs(u)
    return backend, u, check_targets(targets, len(u), outputs, how.loss, like)


class _Sweeps:
    """Gradients of a chain."""

    def __init__(self, model: Any, how: Settings):
        self.chain = Chain(model)
        for stage in self.chain.stages:
            if stage.phi is not None:
                how.penalty.check(stage.phi, value=False)
        varying = self.chain.random or any(isinstance(m, NORMS) for m in model.modules())
        if how.sweeps > 1 and any(is_parametrized(m) for m in model.modules()):
            raise ValueError(
                f"sweeps: got {how.sweeps} with parametrised weights, whose norms are not known here; "
                "take sweeps=1."
            )
        if how.sweeps > 1 and varying:
            raise ValueError(
                f"sweeps: got {how.sweeps} with dropout or batch normalisation, whose maps change "
                "from one evaluation to the next; take sweeps=1."
            )

    def outputs(self, u: Tensor) -> int:
        return self.chain.check(u)

    def __call__(self, u: Tensor, y: Tensor, how: Settings, measure: bool) -> Any:
        swept = sweep(self.chain, u, y, how, measure=measure)
        return swept.loss, swept.output, [p / len(u) for p in swept.penalties], swept.gaps

    def close(self) -> None:
        """Nothing to put back."""


class _Equilibrium:
    """Gradients of an implicit layer: free and clamped equilibrium."""

    def __init__(self, layer: AffineLayer, how: Settings):
        if not how.penalty.divergence:
            raise ValueError(
                f"penalty: got {how.penalty}, expected 'fenchel' for an implicit layer: the clamped "
                "equilibrium is that of the Fenchel divergence."
            )
        how.penalty.check(layer.activation, value=False)
        self.layer = layer
        self.lifted = Lifted(c=how.c, two_sided=how.two_sided, steps=how.sweeps or None)

    def outputs(self, u: Tensor) -> int:
        if u.shape[1:] != (self.layer.in_features,):
            raise ValueError(
                f"data: got samples of shape {tuple(u.shape[1:])}, expected "
                f"({self.layer.in_features},)."
            )
        return self.layer.out_features

    def __call__(self, u: Tensor, y: Tensor, how: Settings, measure: bool) -> Any:
        adjoint = self.layer.adjoint
        self.layer.adjoint = self.lifted
        try:
            with torch.enable_grad():
                out = self.layer(u)
                total = how.loss.value(y, out).sum()
                (total / len(u)).backward()
        finally:
            self.layer.adjoint = adjoint
        return total.detach(), out.detach(), [], [0.0]

    def close(self) -> None:
        """Nothing to put back: the adjoint is swapped call by call."""


def _optimizer(model: nn.Module, optimizer: Any) -> torch.optim.Optimizer:
    if optimizer is None:
        return torch.optim.AdamW(model.parameters(), lr=3e-3)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer: got {type(optimizer).__name__}, expected one of torch.optim made with the "
            "model's parameters, or None."
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError("optimizer: LBFGS evaluates a closure, expected one that takes gradients.")
    own = {id(p) for p in model.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            "optimizer: it has none of the model's parameters; make it with model.parameters()."
        )
    return optimizer


def _schedule(schedule: Any) -> Callable[[float], float]:
    if callable(schedule):

        def factor(t: float) -> float:
            value = float(schedule(t))
            if not 0 <= value < math.inf:
                raise ValueError(
                    f"schedule: got {value} at {t:.4g}, expected a finite factor >= 0 of the "
                    "learning rate."
                )
            return value

        return factor
    if schedule not in _SCHEDULES:
        raise unknown_name("schedule", schedule, _SCHEDULES)
    return _SCHEDULES[schedule]


class _Local(Process):
    """Mini-batch epochs."""

    rate: Callable[[float], float]
    epochs: int
    batch_size: int
    seed: int
    after: bool  # whether an epoch is judged by a pass after it

    def __init__(
        self, model: nn.Module, backend: Any, u: Tensor, y: Tensor, how: Settings,
        optimizer: torch.optim.Optimizer, targets: Tensor,
    ):  # fmt: skip
        self.model, self.backend, self.u, self.y, self.how = model, backend, u, y, how
        self.optimizer, self.labels = optimizer, not targets.is_floating_point()
        self.base = [float(group["lr"]) for group in optimizer.param_groups]

    def epoch(self, number: int) -> dict[str, Any]:
        """A pass over the data in an order that the seed and the epoch's number give."""
        mixed = (self.seed * 1_000_003 + number) % (1 << 62)
        generator = torch.Generator().manual_seed(mixed)
        order = torch.randperm(len(self.u), generator=generator).to(self.u.device)
        batches = order.split(self.batch_size)
        total = hits = self.u.new_zeros(())
        # What dropout draws depends on the epoch alone, so that a resumed run draws the same.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mixed)
            for k, rows in enumerate(batches):
                share = (number + k / len(batches)) / self.epochs
                for base, group in zip(self.base, self.optimizer.param_groups, strict=True):
                    group["lr"] = base * self.rate(share)
                self.optimizer.zero_grad()
                u, y = self.u[rows], self.y[rows]
                last = k == len(batches) - 1
                value, out, penalties, gaps = self.backend(u, y, self.how, last)
                self.optimizer.step()
                total = total + value
                if self.labels:
                    hits = hits + (out.argmax(1) == y.argmax(1)).sum()
        mean = float(total) / len(self.u)
        share = float(hits) / len(self.u) if self.labels else math.nan
        if self.after:
            mean, share = scores(self.model, self.u, self.y, self.how.loss, self.labels)
        return {
            "objective": mean,
            "loss": mean,
            "penalties": penalties,
            "feasibility": max(gaps, default=0.0),
            "accuracy": share,
        }

    def close(self) -> None:
        """Give the optimiser its learning rates back."""
        for base, group in zip(self.base, self.optimizer.param_groups, strict=True):
            group["lr"] = base

    def hyperparameters(self) -> dict[str, Any]:
        """The optimiser's choices as plain data."""
        groups = [
            {key: repr(value) for key, value in group.items() if key != "params"}
            for group in self.optimizer.param_groups
        ]
        return {"name": type(self.optimizer).__name__, "groups": groups}

    def tensors(self) -> dict[str, Tensor]:
        """Parameters, buffers and the optimiser's state."""
        state = self.optimizer.state_dict()["state"]
        if not state:  # before the first step: what it will be, from a step of a copy
            state = _primed(self.optimizer).state_dict()["state"]
        found = model_tensors(self.model)
        for index, entries in state.items():
            for key, value in entries.items():
                if isinstance(value, Tensor):
                    found[f"optimizer/{index}/{key}"] = value
                elif value is not None:
                    raise TypeError(
                        f"checkpoint: {type(self.optimizer).__name__} keeps {key}={value!r}, which "
                        "is no tensor; train without a checkpoint."
                    )
        return found

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Parameters, buffers and the optimiser's state."""
        restore(self.model, tensors)
        state = self.optimizer.state_dict()
        state["state"] = {}
        for name, t in tensors.items():
            if name.startswith("optimizer/"):
                _, index, key = name.split("/", 2)
                state["state"].setdefault(int(index), {})[key] = t.clone()
        self.optimizer.load_state_dict(state)


def _primed(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """A copy after one step on gradients of zero."""
    twin = copy.deepcopy(optimizer)
    for group in twin.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p) if p.requires_grad else None
    twin.step()
    return twin
