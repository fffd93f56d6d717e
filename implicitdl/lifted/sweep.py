"""One proximal sweep: targets from the output down, local gradients, no derivative of phi.

At the free states x_{l+1} = phi_l(z_l), z_l = W_l x_l + b_l, the lifted problem

    min_T  c loss(z_L) + sum_l D_l(T_{l+1}, W_l T_l + b_l) / gamma^(l+1-L)

is swept once from the top, with e_L = c grad loss and, below, the proximal step in each block:

    T_{l+1} = phi_l(z_l - s_{l+1}),    s_l = gamma W_l^T e_l,    e_l = phi_l(z_l) - T_{l+1}
    grad W_l = e_l x_l^T / (c gamma^(L-l))

As c -> 0 these are the gradients of back-propagation, one-sided to O(c), two-sided to O(c^2). More
sweeps of a block, T <- phi(z - gamma W^T (phi(W T + b) - T_above)), contract where gamma beta
||W||^2 < 1, and are made only there: beyond, they diverge, and training collapses with them. They
solve the block with the target above held, so that what comes out, (I + D W' D_above W)^-1 times
the one-sweep residual, is a descent direction of the lifted problem and not the gradient, however
small c is.

Reference: Li et al. (2019), section 3.3 (the fixed-point form of the step); Zach, Estellers (2019)
and Zach (2021) for the limit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .chain import Chain, Stage
from .penalties import Loss, Penalty


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The choices of `lifted.local`, checked."""

    loss: Loss
    penalty: Penalty
    c: float
    two_sided: bool
    sweeps: int
    coupling: float


@dataclass(frozen=True, kw_only=True)
class Swept:
    """What a sweep has seen: sums over the batch.

    Attributes:
        loss: of the free output.
        output: the free output.  # (m, q)
        penalties, gaps: a value a block: the divergence of its target over c, and the relative
            distance of its target from the free state; empty where not asked for.
        certified: how many blocks were swept more than once.
    """

    loss: Tensor
    output: Tensor
    penalties: list[float]
    gaps: list[float]
    certified: int


class _Frame:
    """A stage at a batch: input, pre-activation, state, and products with W^T at it."""

    def __init__(self, stage: Stage, x: Tensor, first: bool):
        self.stage = stage
        rows = stage.rows(x)
        self.linear = None if rows is None else stage.linear
        if rows is not None:
            self.x, self.shape = rows, x.shape
            self.z = stage(x)
        else:
            with torch.enable_grad():  # of what is affine, batch normalisation, parametrisations
                self.x, self.shape = x.detach().requires_grad_(not first), x.shape
                self.graph = stage(self.x)
            self.z = self.graph.detach()
        self.image = self.z if stage.phi is None else stage.phi(self.z)

    def adjoint(self, r: Tensor) -> Tensor:
        """W^T r."""
        if self.linear is not None:
            return (r @ self.linear.weight.detach()).view(self.shape)
        (out,) = torch.autograd.grad(self.graph, self.x, r, retain_graph=True)
        return out

    def accumulate(self, r: Tensor) -> None:
        """Add r x^T to the gradients of the stage's parameters."""
        parameters = self.stage.parameters
        if not parameters:
            return
        linear = self.linear
        grads: Sequence[Tensor | None]
        if linear is None:
            grads = torch.autograd.grad(self.graph, parameters, r, allow_unused=True)
        else:
            grads = [r.mT @ self.x if p is linear.weight else r.sum(0) for p in parameters]
        for p, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                p.grad = grad if p.grad is None else p.grad.add_(grad)


@torch.no_grad()
def sweep(chain: Chain, u: Tensor, y: Tensor, how: Settings, *, measure: bool = False) -> Swept:
    """Add the local gradients of the mean loss to `.grad` of the parameters.

    Args:
        chain: the network.
        u, y: inputs and targets as rows.  # (m, *input), (m, q)
        how: the choices.
        measure: whether to evaluate penalties and gaps.
    """
    frames: list[_Frame] = []
    x = u
    for number, stage in enumerate(chain.stages):
        frames.append(_Frame(stage, x, number == 0))
        x = frames[-1].image
    samples = len(u)
    output = frames[-1].z
    top = how.loss.residual(y, output)
    more = [0.0] * len(frames)
    if how.sweeps > 1:
        more = [_factor(frame, k, len(frames), how) for k, frame in enumerate(frames)]
    residuals: list[Tensor | None] = [None] * (len(frames) - 1) + [top / samples]
    penalties, gaps = [0.0] * (len(frames) - 1), [0.0] * (len(frames) - 1)
    sides = (how.c, -how.c) if how.two_sided else (how.c,)
    for side in sides:
        e, scale = side * top, side
        above: Tensor | None = None  # the target of the stage above; None for the loss
        for k in range(len(frames) - 2, -1, -1):
            frame, higher = frames[k], frames[k + 1]
            phi = frame.stage.phi
            assert phi is not None
            weight = 1.0 if k == len(frames) - 2 else how.coupling
            scale = scale * weight
            target = how.penalty.target(phi, frame.z, weight * higher.adjoint(e))
            if 0.0 < more[k + 1] < 1.0:
                for _ in range(how.sweeps - 1):
                    z = higher.stage(target)
                    if above is None:
                        e = side * how.loss.residual(y, z)
                    else:
                        e = how.penalty.residual(higher.stage.phi, above, z)  # type: ignore[arg-type]
                    target = how.penalty.target(phi, frame.z, weight * higher.adjoint(e))
            e = how.penalty.residual(phi, target, frame.z, frame.image)
            above = target
            part = e * (1 / (scale * len(sides) * samples))
            old = residuals[k]
            residuals[k] = part if old is None else old + part
            if measure and side > 0:
                size = torch.linalg.vector_norm(frame.image)
                size = size.clamp_min(torch.finfo(size.dtype).tiny)
                gaps[k] = float(torch.linalg.vector_norm(target - frame.image) / size)
                penalties[k] = _value(how.penalty, frame, target) / scale
            if k == 0 and not frame.stage.parameters:
                break
    for frame, r in zip(frames, residuals, strict=True):
        if r is not None:
            frame.accumulate(r)
    return Swept(
        loss=how.loss.value(y, output).sum(),
        output=output,
        penalties=penalties if measure else [],
        gaps=gaps if measure else [],
        certified=sum(0.0 < f < 1.0 for f in more),
    )


def _value(penalty: Penalty, frame: _Frame, target: Tensor) -> float:
    try:
        return float(penalty.value(frame.stage.phi, target, frame.z).sum())  # type: ignore[arg-type]
    except NotImplementedError:  # an activation of the user's without a potential
        return float("nan")


def _factor(frame: _Frame, k: int, stages: int, how: Settings) -> float:
    """A bound on the factor by which a block below stage k contracts; 0 where there is none."""
    if k == 0:
        return 0.0
    if frame.stage.phi is None:
        beta, weight = how.loss.curvature, how.c
    else:
        beta, weight = how.penalty.curvature(frame.stage.phi), how.coupling
    return weight * beta * frame.stage.norm_bound(frame.x.view(frame.shape)) ** 2
