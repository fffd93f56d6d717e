"""Attacks: inputs near given ones at which a model answers wrongly.

An attack bounds the robust accuracy from above as a certificate bounds it from below. Gradients go
through the equilibrium by the engine that all solves share, in evaluation mode, too, so nothing is
masked. Each attack keeps the best input that it has seen, the given one included.

Reference: Goodfellow, Shlens and Szegedy (2015), FGSM; Madry et al. (2018), PGD; El Ghaoui et al.
(2021), section 4.4, sparse attacks by the sensitivity matrix and attacks by relaxation.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..robust import UncertaintySet
from ..solution import unknown_name
from ._margins import check_labels, worst_inputs
from ._sensitivity import sensitivity

Model = Callable[[Tensor], Tensor]
NORMS = ("inf", 2)


@dataclass(frozen=True, eq=False)
class Attack:
    """What an attack found.

    Attributes:
        inputs: the worst inputs seen.  # (m, p)
        margin: y_label - max of the other outputs there; below 0 the answer is wrong.  # (m,)
    """

    inputs: Tensor
    margin: Tensor

    @property
    def success(self) -> Tensor:
        """Where the answer is wrong, or undecided.  # (m,) bool"""
        return self.margin <= 0

    def better(self, other: "Attack") -> "Attack":
        """The worse input for the model of each sample."""
        mine = self.margin <= other.margin
        return Attack(
            torch.where(mine[:, None], self.inputs, other.inputs),
            torch.minimum(self.margin, other.margin),
        )


def margin_of(y: Tensor, labels: Tensor) -> Tensor:
    """y_label - max over other j of y_j.  # (m, q), (m,) -> (m,)"""
    own = y.gather(1, labels[:, None])[:, 0]
    others = y.scatter(1, labels[:, None], -math.inf)
    return own - others.amax(1)


def fgsm(
    model: Model, u: Tensor, labels: Tensor, radius: "float | Tensor",
    norm: "str | int" = "inf", *, clip: tuple[float, float] | None = None,
) -> Attack:  # fmt: skip
    """One step of length `radius` along the gradient: u - radius sign(grad margin), or its 2-norm twin.

    Args:
        model: u -> y, differentiable.
        u: inputs.  # (m, p)
        labels: # (m,) int64
        radius: # a number or (m,)
        norm: "inf" or 2.
        clip: the range of inputs, if they have one.

    Raises:
        ValueError: shapes, labels, radius, norm or clip out of range; NaN inputs.
    """
    radius = checked(u, labels, radius, norm, clip)
    start = _measured(model, u, labels)
    g = _gradient(model, u, labels)
    moved = _clipped(u - radius[:, None] * _steepest(g, norm), clip)
    return start.better(_measured(model, moved, labels))


def pgd(
    model: Model, u: Tensor, labels: Tensor, radius: "float | Tensor",
    norm: "str | int" = "inf", *, steps: int = 40, restarts: int = 1, step_size: float | None = None,
    random_start: bool = True, start: Tensor | None = None, mask: Tensor | None = None,
    clip: tuple[float, float] | None = None, generator: torch.Generator | None = None,
) -> Attack:  # fmt: skip
    """Projected gradient steps on the margin, the best of all restarts.

    Args:
        model, u, labels, radius, norm, clip: as in `fgsm`.
        steps: of each restart.
        restarts: how many; the first starts at u unless `random_start`.
        step_size: a share of the radius; None for 0.25, falling linearly, and never below
            2.5 / steps.
        random_start: whether restarts start at random points of the ball.
        start: where the first restart starts.  # (m, p)
        mask: which inputs may move.  # (m, p) bool
        generator: of the random numbers.

    Raises:
        ValueError: as `fgsm`; or a count that is no positive integer.
    """
    radius = checked(u, labels, radius, norm, clip)
    for name, count in (("steps", steps), ("restarts", restarts)):
        if type(count) is not int or count < 1:
            raise ValueError(f"{name}: got {count!r}, expected an integer >= 1.")
    best = _measured(model, u, labels)
    r = radius[:, None]
    for turn in range(restarts):
        if start is not None and turn == 0:
            z = start - u
        elif random_start:
            z = _random(u, r, norm, generator)
        else:
            z = torch.zeros_like(u)
        for step in range(steps):
            if mask is not None:
                z = z * mask
            x = _clipped(u + _projected(z, r, norm), clip)
            # A wrong sample is done.
            open_ = torch.nonzero(best.margin > 0).flatten()
            if not len(open_):
                return best
            few = x[open_]
            g, margin = _gradient_and_margin(model, few, labels[open_])
            best = _noted(best, open_, few, margin)
            if mask is not None:
                g = g * mask[open_]
            share = (
                step_size if step_size is not None else max(2.5 / steps, 0.25 * (1 - step / steps))
            )
            z = x - u
            z[open_] = z[open_] - share * r[open_] * _steepest(g, norm)
        if mask is not None:
            z = z * mask
        best = best.better(_measured(model, _clipped(u + _projected(z, r, norm), clip), labels))
    return best


def sparse_attack(
    model: Model, u: Tensor, labels: Tensor, radius: "float | Tensor", k: int, *,
    scores: Tensor | None = None, steps: int = 20, clip: tuple[float, float] | None = None,
    generator: torch.Generator | None = None,
) -> Attack:  # fmt: skip
    """Changes k inputs by at most `radius` each: those that the sensitivity matrix says move the
    outputs most, then those with the largest gradient.

    Args:
        model, u, labels, radius, clip, generator: as in `fgsm`.
        k: how many inputs change.
        scores: S, how much an input can move an output; `sensitivity(model)` by default.  # (q, p)
        steps: of gradient on the chosen inputs.
    """
    checked(u, labels, radius, "inf", clip)
    p = u.shape[1]
    if type(k) is not int or not 1 <= k <= p:
        raise ValueError(f"k: got {k!r}, expected an integer in 1..{p}.")
    choices = []
    if scores is None:
        try:
            scores = sensitivity(model)
        except (TypeError, ValueError):  # no such matrix: the gradient alone chooses
            scores = None
    g = _gradient(model, u, labels)
    if scores is not None:
        with torch.no_grad():
            y = model(u).scatter(1, labels[:, None], -math.inf)
            rival = y.argmax(1)
        S = scores.to(u)
        choices += [S[labels] + S[rival], (S[labels] + S[rival]) * g.abs()]
    choices.append(g.abs())
    best = _measured(model, u, labels)
    for score in choices:
        mask = torch.zeros_like(u, dtype=torch.bool)
        mask.scatter_(1, score.topk(k, 1).indices, True)
        for random in (False, True):
            found = pgd(
                model, u, labels, radius, steps=steps, random_start=random, mask=mask, clip=clip,
                generator=generator,
            )  # fmt: skip
            best = best.better(found)
    return best


def relaxation_attack(
    model: Any, u: Tensor, labels: Tensor, radius: "float | Tensor",
    norm: "str | int" = "inf", *, method: str = "crown", steps: int = 10,
    clip: tuple[float, float] | None = None,
) -> Attack:  # fmt: skip
    """Starts where a relaxation says that the margin is smallest, one start for each other class.

    Args:
        model: one that `bounds` takes.
        u, labels, radius, norm, clip: as in `fgsm`.
        method: "crown" (the worst input of the linear bound) or "lp" (where the linear program is
            attained; small models).
        steps: of gradient from there.
    """
    radius = checked(u, labels, radius, norm, clip)
    if method not in ("crown", "lp"):
        raise unknown_name("method", method, ("crown", "lp"))
    starts = worst_inputs(model, u, labels, radius, norm, method).to(u.dtype)
    best = _measured(model, u, labels)
    for j in range(starts.shape[1]):
        x = _clipped(u + _projected(starts[:, j] - u, radius[:, None], norm), clip)
        best = best.better(_measured(model, x, labels))
        if steps:
            best = best.better(pgd(model, u, labels, radius, norm, steps=steps, start=x, clip=clip))
    return best


def minimise(
    model: Model, region: UncertaintySet, rows: Tensor, *, around: Tensor | None = None,
    steps: int = 20, generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The smallest F y that conditional gradient steps find in any set: an attack on bounds.

    Args:
        model: u -> y.
        region: as in `bounds`.
        rows: F.  # (k, q)
        around: # (m, p)
        steps: of conditional gradient (Frank and Wolfe), each to the worst member for the gradient.
        generator: of the random starts.

    Returns:
        (values, inputs)  # (m, k), (m, k, p)
    """
    with torch.no_grad():
        z = region.sample(len(rows), generator=generator)
    if around is not None:
        z = z[:, None] if z.dim() == 2 else z
        z = z + torch.zeros_like(around)
    shape = z.shape  # (k, m, p), or (k, p) for one absolute set
    weights = rows.to(z).reshape(len(rows), *(1,) * (z.dim() - 2), -1)
    best, kept = torch.full(shape[:-1], math.inf, dtype=z.dtype, device=z.device), z
    for step in range(steps + 1):
        with torch.enable_grad():
            x = (z if around is None else around + z).detach().requires_grad_()
            value = (model(x.reshape(-1, shape[-1])).reshape(*shape[:-1], -1) * weights).sum(-1)
            (g,) = torch.autograd.grad(value.sum(), x)
        with torch.no_grad():
            better = value < best
            best = torch.where(better, value, best)
            kept = torch.where(better[..., None], x, kept)
            z = z + (region.worst(-g) - z) * (1.0 if step % 2 == 0 else 2 / (step + 2))
    best, kept = best.detach().movedim(0, -1), kept.detach().movedim(0, -2)
    return (best, kept) if best.dim() == 2 else (best[None], kept[None])


# ---- steps -----------------------------------------------------------------------------------------


def _gradient_and_margin(model: Model, u: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        x = u.detach().requires_grad_()
        margin = margin_of(model(x), labels)
        (g,) = torch.autograd.grad(margin.sum(), x)
    return g, margin.detach()


def _gradient(model: Model, u: Tensor, labels: Tensor) -> Tensor:
    return _gradient_and_margin(model, u, labels)[0]


def _measured(model: Model, u: Tensor, labels: Tensor) -> Attack:
    with torch.no_grad():
        return Attack(u, margin_of(model(u), labels))


def _noted(best: Attack, index: Tensor, x: Tensor, margin: Tensor) -> Attack:
    found = Attack(x, margin)
    own = Attack(best.inputs[index], best.margin[index]).better(found)
    return Attack(
        best.inputs.index_copy(0, index, own.inputs), best.margin.index_copy(0, index, own.margin)
    )


def _steepest(g: Tensor, norm: "str | int") -> Tensor:
    """The unit vector, in the norm, along which the margin grows fastest."""
    if norm == "inf":
        return g.sign()
    size = torch.linalg.vector_norm(g, dim=1, keepdim=True)
    return g / torch.where(size > 0, size, torch.ones_like(size))


def _projected(z: Tensor, r: Tensor, norm: "str | int") -> Tensor:
    """The nearest point of the ball of radius r."""
    if norm == "inf":
        return torch.maximum(torch.minimum(z, r), -r)
    size = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    return z * (r / size.clamp(min=1e-30)).clamp(max=1.0)


def _random(u: Tensor, r: Tensor, norm: "str | int", generator: torch.Generator | None) -> Tensor:
    kind: dict[str, Any] = {"generator": generator, "dtype": u.dtype, "device": u.device}
    if norm == "inf":
        return r * (2 * torch.rand(u.shape, **kind) - 1)
    z = torch.randn(u.shape, **kind)
    share = torch.rand(len(u), 1, **kind) ** (1 / u.shape[1])
    return r * share * z / torch.linalg.vector_norm(z, dim=1, keepdim=True)


def _clipped(x: Tensor, clip: tuple[float, float] | None) -> Tensor:
    return x if clip is None else x.clamp(*clip)


def checked(
    u: Tensor, labels: Tensor, radius: "float | Tensor", norm: "str | int",
    clip: tuple[float, float] | None, outputs: int = 1 << 62,
) -> Tensor:  # fmt: skip
    """The radius of each sample, all arguments checked.  # (m,)"""
    if not isinstance(u, Tensor) or not u.is_floating_point() or u.dim() != 2:
        got = tuple(u.shape) if isinstance(u, Tensor) else type(u).__name__
        raise ValueError(f"u: got {got}, expected a floating tensor (m, p).")
    bad = torch.nonzero(~torch.isfinite(u))
    if len(bad):
        at = tuple(bad[0].tolist())
        raise ValueError(f"u: got {float(u[at])} at index {at}, expected finite numbers.")
    check_labels(labels, outputs, len(u))
    if norm not in NORMS or type(norm) is float:
        raise ValueError(f"norm: got {norm!r}, expected 'inf' or the number 2.")
    r = torch.as_tensor(radius, dtype=u.dtype, device=u.device)
    if (
        r.dim() > 1
        or r.dim() == 1
        and len(r) != len(u)
        or not bool((r >= 0).all() & r.isfinite().all())
    ):
        raise ValueError(f"radius: got {radius!r}, expected a finite number >= 0, or one a sample.")
    if clip is not None and not (len(clip) == 2 and clip[0] < clip[1]):
        raise ValueError(f"clip: got {clip!r}, expected (low, high) with low < high.")
    if clip is not None and len(u) and (float(u.min()) < clip[0] or float(u.max()) > clip[1]):
        raise ValueError(
            f"clip: got {clip!r} for inputs in [{float(u.min()):.6g}, {float(u.max()):.6g}], expected "
            "a range that they lie in."
        )
    return r.expand(len(u))
