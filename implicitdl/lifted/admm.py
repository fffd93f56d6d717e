"""`lifted.admm`: three-splitting block descent and multipliers, every block in closed form.

    J = (1/m) sum_k [ loss(y, u_L) + (gamma/2) sum_l |x_l - phi(u_l)|^2
                                   + (rho/2) sum_l |u_l - W_l x_{l-1} - b_l|^2 ]

over states x_l, pre-activations u_l and weights. W is ridge regression, x a linear system, and u
falls apart into entries: for phi(u) = h u above zero and a u below, with target x and centre t,

    argmin_u (gamma/2) (x - phi(u))^2 + (r/2) (u - t)^2 = the better of
    max((gamma h x + r t) / (gamma h^2 + r), 0)   and   min((gamma a x + r t) / (gamma a^2 + r), 0).

Reference: Zeng, Lau, Lin, Yao (2019), algorithm 2 (block descent, its proximal terms); Taylor et al.
(2016), algorithm 1 (a multiplier at the output); Wang, Yu, Chen, Zhao (2019), algorithm 1 (dlADMM:
gradient steps in place of inverses, backward and forward sweeps).
"""

import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import Activation
from ..solution import unknown_name
from .chain import Chain
from .checkpoint import fingerprint
from .checks import check_count, check_inputs, check_number, check_targets
from .penalties import Loss, get_loss
from .preparing import checked_keep, held_out
from .report import Report
from .running import Process, described, model_tensors, restore, run
from .states import descend

_VARIANTS = ("zeng", "taylor", "dladmm")


def admm(
    model: nn.Module,
    data: Tensor,  # (m, *input)
    targets: Tensor,  # (m,) labels, or (m, q)
    *,
    variant: str = "zeng",
    loss: str = "squared",
    rho: float = 1.0,
    gamma: float = 1.0,
    alpha: float = 5.0,
    ridge: float = 1e-6,
    sweeps: int = 50,
    validation: tuple[Tensor, Tensor] | None = None,
    keep: str | None = None,
    checkpoint: "str | os.PathLike[str] | None" = None,
    progress: bool = False,
    on_epoch: Callable[[Report], Any] | None = None,
) -> Report:
    """Train in place by block descent over weights, states and pre-activations.

    "zeng" is plain block descent with proximal terms: J never rises. "taylor" and "dladmm" carry a
    multiplier on the output's equation; their J may rise, `feasibility` says how far they are.

    Args:
        model: an `nn.Sequential` of dense layers and positively homogeneous activations (ReLU,
            leaky ReLU, the identity).
        data, targets: as in `local`.
        variant: "zeng", "taylor" or "dladmm".
        loss: "squared" (half of the square) or "cross_entropy".
        rho, gamma: weights of u = W x + b and of x = phi(u).
        alpha: of "zeng"'s proximal terms on weights and pre-activations, a sample each.
        ridge: of weights, half the sum of squares.
        sweeps: over all blocks.
        validation, keep, checkpoint, progress, on_epoch: as in `local`.

    Returns:
        The report; its penalties are gamma's and rho's of each layer, in turn.

    Raises:
        TypeError: a module is of another kind.
        ValueError: as `local`; or an activation that has no two branches.

    Example:
        >>> import torch
        >>> from implicitdl import lifted
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> u = torch.randn(64, 2)
        >>> report = lifted.admm(net, u, (u[:, 0] > 0).long(), sweeps=3)
        >>> report.objective[2] <= report.objective[0]
        True
    """
    if variant not in _VARIANTS:
        raise unknown_name("variant", variant, _VARIANTS)
    chosen = get_loss(loss)
    numbers = {
        "rho": check_number("rho", rho),
        "gamma": check_number("gamma", gamma),
        "alpha": check_number("alpha", alpha, zero=True),
        "ridge": check_number("ridge", ridge, zero=True),
    }
    check_count("sweeps", sweeps, 0)
    keep = checked_keep(keep, validation)
    process = _Splitting(model, chosen, variant, **numbers)
    u = check_inputs(data, next(model.parameters()))
    y = check_targets(targets, len(u), process.chain.check(u), chosen, u)
    held = held_out(model, validation, u, y, chosen)
    process.start(u, y, not targets.is_floating_point())
    options: dict[str, Any] = {}
    if checkpoint is not None:
        sent = [None, None] if validation is None else list(validation)
        options = {
            "method": "admm", "model": described(model), "variant": variant, "loss": loss, **numbers,
            "data": fingerprint(data, targets, *sent),
        }  # fmt: skip
    report = Report(method="admm", model=model, details=process.details)
    return run(
        process, report, sweeps, options=options, validate=held, path=checkpoint,
        progress=progress, on_epoch=on_epoch, keep=keep,
    )  # fmt: skip


def branches(phi: Activation) -> tuple[float, float]:
    """(a, h), the slopes of phi below and above zero.

    Args:
        phi: the activation.

    Raises:
        ValueError: phi is not positively homogeneous entry by entry.
    """
    if not (phi.homogeneous and phi.entrywise):
        raise ValueError(
            f"model: {phi} is not positively homogeneous entry by entry, expected ReLU, leaky ReLU "
            "or the identity, whose pre-activations have a closed form; take `lifted.blocks`."
        )
    low, high = phi(torch.tensor([-1.0, 1.0], dtype=torch.float64)).tolist()
    return -low, high


def two_branch(x: Tensor, t: Tensor, gamma: float, r: float, slopes: tuple[float, float]) -> Tensor:
    """argmin_u (gamma/2) (x - phi(u))^2 + (r/2) (u - t)^2, entry by entry.

    Args:
        x: targets of phi(u).
        t: centres.
        gamma, r: positive weights.
        slopes: (a, h) of phi below and above zero.
    """
    a, h = slopes
    above = ((gamma * h * x + r * t) / (gamma * h * h + r)).clamp(min=0.0)
    below = ((gamma * a * x + r * t) / (gamma * a * a + r)).clamp(max=0.0)
    up = gamma * (x - h * above).square() + r * (above - t).square()
    down = gamma * (x - a * below).square() + r * (below - t).square()
    return torch.where(up <= down, above, below)


class _Splitting(Process):
    """Sweeps over weights, states and pre-activations."""

    def __init__(self, model: nn.Module, loss: Loss, variant: str, **numbers: float):
        self.model, self.loss, self.variant = model, loss, variant
        self.rho, self.gamma = numbers["rho"], numbers["gamma"]
        self.alpha = numbers["alpha"] if variant == "zeng" else 0.0
        self.ridge = numbers["ridge"]
        self.chain = Chain(model, dense=True)
        for stage in self.chain.stages:
            if stage.linear is None:
                raise TypeError(
                    f"model: the stage at {stage.name} is {stage.body}, expected a dense layer "
                    "before each activation and at the end; `lifted.blocks` takes convolutions."
                )
        self.slopes = [branches(s.phi) for s in self.chain.stages if s.phi is not None]
        self.last = len(self.chain.stages) - 1
        self.details: dict[str, Any] = {}

    @torch.no_grad()
    def start(self, u: Tensor, y: Tensor, labels: bool) -> None:
        """States and pre-activations of a forward pass, no multiplier."""
        self.y, self.labels = y, labels
        states, self.u = self.chain.forward(u)
        deep = [stage.name for stage, z in zip(self.chain.stages, self.u, strict=True)
                if z.dim() != 2]  # fmt: skip
        if deep:
            raise ValueError(
                f"data: the stage at {deep[0]} has states of more than one dimension, expected "
                "vectors; flatten first."
            )
        self.x = [states[0].flatten(1), *states[1:]]
        self.dual = torch.zeros_like(self.u[-1])

    def _affine(self, k: int) -> Tensor:
        linear: Any = self.chain.stages[k].linear
        return nn.functional.linear(self.x[k], linear.weight, linear.bias).detach()

    def _phi(self, k: int) -> Tensor:
        return self.chain.stages[k].phi(self.u[k])  # type: ignore[misc]

    @torch.no_grad()
    def epoch(self, number: int) -> dict[str, Any]:
        """A sweep in the order of the variant."""
        layers = range(self.last + 1)
        if self.variant == "zeng":
            for k in reversed(layers):
                if k < self.last:
                    self._state(k + 1)
                self._before(k)
                self._weights(k)
        elif self.variant == "taylor":
            for k in layers:
                self._weights(k)
                if k < self.last:
                    self._state(k + 1)
                self._before(k)
            self._multiplier()
        else:
            for order in (reversed(layers), layers):
                for k in order:
                    if k < self.last:
                        self._state(k + 1)
                    self._before(k)
                    self._weights(k)
            self._multiplier()
        return self._record()

    def _state(self, k: int) -> None:
        """x_k, between x = phi(u_{k-1}) below and u_k = W x + b above."""
        linear: Any = self.chain.stages[k].linear
        W = linear.weight.detach()
        wanted = self.u[k] if linear.bias is None else self.u[k] - linear.bias.detach()
        if k == self.last:
            wanted = wanted + self.dual / self.rho
        below = self._phi(k - 1)
        if self.variant == "dladmm":
            slope = self.rho * (self.x[k] @ W.mT - wanted) @ W + self.gamma * (self.x[k] - below)
            norm = float(torch.linalg.matrix_norm(W, 2)) ** 2
            self.x[k] = self.x[k] - slope / (self.rho * norm + self.gamma)
            return
        M = self.rho * (W.mT @ W)
        M.diagonal().add_(self.gamma)
        right = self.rho * wanted @ W + self.gamma * below
        self.x[k] = torch.cholesky_solve(right.mT, torch.linalg.cholesky(M)).mT

    def _before(self, k: int) -> None:
        """u_k, between u = W x + b below and x = phi(u), or the loss, above."""
        t, r = self._affine(k), self.rho + self.alpha
        t = (self.rho * t + self.alpha * self.u[k]) / r
        if k < self.last:
            self.u[k] = two_branch(self.x[k + 1], t, self.gamma, r, self.slopes[k])
            return
        t = t - self.dual / r
        if self.loss.phi.linear:
            self.u[k] = (self.y + r * t) / (1 + r)
            return

        def value(z: Tensor) -> Tensor:
            return self.loss.value(self.y, z) + 0.5 * r * (z - t).square().sum(1)

        def step(z: Tensor, L: float) -> Tensor:
            return (L * z - self.loss.residual(self.y, z) + r * t) / (L + r)

        self.u[k] = descend(self.u[k], step, value, self.loss.curvature, r, 20)

    def _weights(self, k: int) -> None:
        """W_k and b_k: ridge regression of u_k, or a gradient step."""
        stage = self.chain.stages[k]
        linear: Any = stage.linear
        if not stage.parameters:
            return
        x = self.x[k]
        if linear.bias is not None:
            x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        wanted = self.u[k] + self.dual / self.rho if k == self.last else self.u[k]
        theta, m = stage.weights(), len(x)
        ridge = torch.full_like(theta[0], self.ridge)
        if linear.bias is not None:
            ridge[-1] = 0.0
        H = x.mT @ x * (self.rho / m)
        if self.variant == "dladmm":
            slope = self.rho / m * (x @ theta.mT - wanted).mT @ x + ridge * theta
            top = float(torch.linalg.matrix_norm(H, 2)) + self.ridge
            stage.assign(theta - slope / top)
            return
        near = self.alpha / m
        lift = 10 * torch.finfo(H.dtype).eps * H.shape[0] * float(H.diagonal().mean())
        right = self.rho / m * (wanted.mT @ x) + (near + lift) * theta
        H.diagonal().add_(ridge + near + lift)
        stage.assign(torch.cholesky_solve(right.mT, torch.linalg.cholesky(H)).mT)

    def _multiplier(self) -> None:
        self.dual = self.dual + self.rho * (self.u[-1] - self._affine(self.last))

    @torch.no_grad()
    def _record(self) -> dict[str, Any]:
        penalties, worst, extra = [], 0.0, 0.0
        for k, stage in enumerate(self.chain.stages):
            pairs = [] if k == self.last else [(self.x[k + 1], self._phi(k), self.gamma)]
            pairs.append((self.u[k], self._affine(k), self.rho))
            for held, free, weight in pairs:
                gap = float(torch.linalg.vector_norm(held - free))
                penalties.append(0.5 * weight * gap * gap / len(self.y))
                worst = max(worst, gap / (float(torch.linalg.vector_norm(free)) or 1.0))
            extra += 0.5 * self.ridge * float(stage.linear.weight.square().sum())  # type: ignore
        mean = float(self.loss.value(self.y, self.u[-1]).mean())
        share = math.nan
        if self.labels:
            out = self.chain.forward(self.x[0])[1][-1]
            share = float((out.argmax(1) == self.y.argmax(1)).double().mean())
        return {
            "objective": mean + math.fsum(penalties) + extra,
            "loss": mean,
            "penalties": penalties,
            "feasibility": worst,
            "accuracy": share,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Parameters, states, pre-activations, the multiplier."""
        found = model_tensors(self.model) | {"dual": self.dual}
        found |= {f"state/{k}": x for k, x in enumerate(self.x) if k > 0}
        return found | {f"before/{k}": u for k, u in enumerate(self.u)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Parameters, states, pre-activations, the multiplier."""
        restore(self.model, tensors)
        self.dual = tensors["dual"].clone()
        for k in range(1, len(self.x)):
            self.x[k] = tensors[f"state/{k}"].clone()
        self.u = [tensors[f"before/{k}"].clone() for k in range(len(self.u))]
