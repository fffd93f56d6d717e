"""The worst-case inputs of a batch: gradient ascent on l(z) - gamma c(z, z0), sample by sample."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._checks import finite
from .smoothness import OutputLoss


@dataclass(frozen=True, eq=False)
class Worst:
    """The worst-case inputs of a batch.

    Attributes:
        inputs, labels: T(z).  # (m, *shape), (m,)
        losses: l there.  # (m,)
        costs: c(T(z), z).  # (m,)
        surrogate: l - gamma c.  # (m,)
        residual: length of the gradient of l - gamma c, in the coordinates of the cost.  # (m,)
        steps: of each sample.  # (m,)
        upper: with a Lipschitz constant, an upper bound of the surrogate.  # (m,)
    """

    inputs: Tensor
    labels: Tensor
    losses: Tensor
    costs: Tensor
    surrogate: Tensor
    residual: Tensor
    steps: Tensor
    upper: Tensor


def like(t: Tensor, u: Tensor) -> Tensor:
    """(m,) in the number of dimensions of u."""
    return t.view(-1, *(1,) * (u.dim() - 1))


def ascend(
    model: Any, loss: OutputLoss, u: Tensor, labels: Tensor, gamma: float, root: "Tensor | None",
    price: float, steps: int, tol: float, L: float,
) -> Worst:  # fmt: skip
    """The maximisers of l - gamma c, every label a candidate where labels flip."""
    if math.isinf(price):
        return climb(model, loss, u, labels, gamma, root, steps, tol, L)
    with torch.no_grad():
        classes = model(u[:1]).shape[-1]
    best: Worst | None = None
    for k in range(classes):
        candidate = torch.full_like(labels, k)
        got = climb(model, loss, u, candidate, gamma, root, steps, tol, L)
        toll = price * (candidate != labels).to(got.costs)
        got = dataclasses.replace(
            got, costs=got.costs + toll, surrogate=got.surrogate - gamma * toll,
            upper=got.upper - gamma * toll,
        )  # fmt: skip
        if best is None:
            best = got
            continue
        more = got.surrogate > best.surrogate
        fields = {}
        for f in dataclasses.fields(Worst):
            new, old = getattr(got, f.name), getattr(best, f.name)
            if f.name == "upper":
                fields[f.name] = torch.maximum(new, old)
            elif f.name == "steps":
                fields[f.name] = new + old
            else:
                fields[f.name] = torch.where(like(more, new), new, old)
        best = Worst(**fields)
    return best


def climb(
    model: Any, loss: OutputLoss, u: Tensor, labels: Tensor, gamma: float, root: "Tensor | None",
    steps: int, tol: float, L: float,
) -> Worst:  # fmt: skip
    """Gradient ascent on l - gamma ||d||^2, d = sqrt(w) (z - z0), sample by sample.

    The step 1 / (2 gamma) is the one for Hessians in [-L - 2 gamma, L - 2 gamma]; where nothing is
    proved and it does not go up, the sample goes back to its best point and halves its step. A
    sample that is done is left out of further evaluations.
    """
    m = len(u)
    inverse = None if root is None else torch.where(root.isinf(), 0.0, root.reciprocal())

    def inputs(d: Tensor, rows: Tensor) -> Tensor:
        return u[rows] + (d if inverse is None else d * inverse)

    def measure(d: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            d = d.detach().requires_grad_()
            value = loss.function(model(inputs(d, rows)), labels[rows])
            if value.shape != (len(rows),):
                raise ValueError(
                    f"loss: got shape {tuple(value.shape)}, expected ({len(rows)},), one loss a sample."
                )
            (g,) = torch.autograd.grad(value.sum(), d)
        d = d.detach()
        square = (d * d).flatten(1).sum(1)
        rise = g - 2 * gamma * d
        return value.detach(), square, rise

    rows = torch.arange(m, device=u.device)
    d = torch.zeros_like(u)
    value, square, rise = measure(d, rows)
    finite("loss", value)
    height = value - gamma * square
    length = rise.flatten(1).norm(dim=1)
    goal = tol * length
    step = torch.full_like(height, 0.5 / gamma)
    count = torch.zeros(m, dtype=torch.long, device=u.device)
    shortest = 0.5 / gamma * 1e-6
    active = torch.nonzero(length > goal).flatten() if tol < 1 else rows[:0]
    for _ in range(steps):
        if not active.numel():
            break
        count[active] += 1
        trial = d[active] + like(step[active], u) * rise[active]
        v, s, r = measure(trial, active)
        h = v - gamma * s
        size = r.flatten(1).norm(dim=1)
        # Near the top heights are equal to rounding and only the gradient tells.
        slack = 1e-14 if h.dtype == torch.float64 else 1e-6
        equal = (h - height[active]).abs() <= slack * (1 + h.abs())
        good = torch.isfinite(h) & ((h > height[active]) | (equal & (size < length[active])))
        rows = active[good]
        d[rows], value[rows], square[rows], rise[rows] = trial[good], v[good], s[good], r[good]
        height[rows], length[rows] = h[good], size[good]
        bad = active[~good]
        step[bad] *= 0.5
        active = active[(length[active] > goal[active]) & (step[active] > shortest)]
    upper = height
    if 2 * gamma > L:
        upper = height + length**2 / (2 * (2 * gamma - L))
    return Worst(
        inputs=inputs(d, torch.arange(m, device=u.device)), labels=labels, losses=value,
        costs=square, surrogate=height, residual=length, steps=count, upper=upper,
    )  # fmt: skip
