"""The programs of `fit_states`: in units of deviations, solved, and refitted on their supports."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..activations import Activation
from ..model import ImplicitModel, Structure
from ..solution import ConvergenceError
from .checks import Options
from .lowrank import fit_low_rank
from .penalties import LowRank, Penalty
from .recording import (
    Moments,
    Sharing,
    chunks,
    contraction_weights,
    evaluation_order,
    found_at,
    gather,
    teacher,
)
from .rows import RowProgram
from .unique import least_squares, shortest

_DEAD = 1e-12  # a deviation below this share of the largest, or of its own mean, is none


@dataclass(frozen=True, kw_only=True, eq=False)
class Fitted:
    """What was found, in the coordinates of the recorded states, float64.

    Attributes:
        A, B, b, C, D, d: the matrices, of all states.
        L, R: the factors of A, where it is of low rank.
        v: weights of the ball, |A| v <= kappa v.
        scaled: whether they come from the network, so that it is in the ball itself.
        phi: of all states.
        fit: ||z_i - what the fit says|| / ||z_i - mean||, of each state.
        readout_fit: the same of each output.
        objective, gap: of the rows of (A B); None for a low rank.
        steps: alternating directions and Newton steps.
    """

    A: Tensor
    B: Tensor
    b: Tensor
    C: Tensor
    D: Tensor
    d: Tensor
    L: Tensor | None
    R: Tensor | None
    v: Tensor
    scaled: bool
    phi: Activation
    fit: Tensor
    readout_fit: Tensor
    objective: Tensor | None
    gap: Tensor | None
    steps: tuple[int, int]
    samples: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Normed:
    """A program in units of deviations; `restore` undoes it.

    Attributes:
        program: gram with ones on the diagonal.
        unit: deviations of the features; one where there is none.
        scale: deviations of the targets; one where there is none.
    """

    program: RowProgram
    unit: Tensor
    scale: Tensor
    moments: Moments

    def restore(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """W in the units of the data, and the bias."""
        raw = W * self.scale[:, None] / self.unit
        return raw, self.moments.aim - raw @ self.moments.mean


def normed(
    moments: Moments, weights: Tensor | None, radius: Tensor | None, allowed: Tensor | None
) -> Normed:
    """The rows of z = F w + b: the bias, free, is taken out by the means, exactly."""

    def deviations(squares: Tensor, about: Tensor) -> tuple[Tensor, Tensor]:
        s = (squares / moments.count).sqrt()
        live = s > _DEAD * torch.maximum(s.max(), about.abs())
        return torch.where(live, s, 1.0), live

    unit, live = deviations(moments.gram.diagonal(), moments.mean)
    scale, moving = deviations(moments.energy, moments.aim)
    may = live.expand(len(scale), -1) & moving[:, None]
    if allowed is not None:
        may = may & allowed
    program = RowProgram(
        gram=moments.gram / moments.count / unit / unit[:, None],
        cross=moments.cross / moments.count / unit / scale[:, None],
        energy=moments.energy / moments.count / scale**2,
        weights=None if weights is None else weights / unit,
        radius=None if radius is None else radius / scale,
        allowed=may,
    )
    return Normed(program=program, unit=unit, scale=scale, moments=moments)


def fit(f: Structure, data: Tensor, options: Options, refit: bool, sharing: Sharing) -> Fitted:
    """All matrices, from the states of f, in float64, at the samples."""
    n, p, q = f.states, f.inputs, f.outputs
    u = torch.empty(0, dtype=torch.float64, device=data.device)
    v = contraction_weights(f, options.kappa) if f.phi.entrywise else None
    scaled = v is not None
    v = u.new_ones(n) if v is None else v.to(u)
    low = options.penalty if isinstance(options.penalty, LowRank) else None
    joint = low is None and options.penalty.couples_rows

    def recorded() -> Iterator[tuple[Tensor, Tensor]]:
        for part in chunks(f, data):
            x, z, y = teacher(f, part)
            yield torch.cat([x, part.flatten(1)], 1), torch.cat([z, y], 1) if joint else z

    moments = gather(recorded(), sharing, (n + p, n + q if joint else n), u)
    allowed = None
    if options.upper:
        order = evaluation_order(f).to(u.device)
        looped = torch.tensor(
            [k in {j for c in f.loops for j in c}
             for k, block in enumerate(f.blocks) for _ in range(block.size)], device=u.device
        )  # fmt: skip
        earlier = order[:, None] > order[None, :]
        allowed = earlier | ((order[:, None] == order[None, :]) & looped[:, None])
        allowed = torch.cat([allowed, allowed.new_ones(n, p)], 1)
        if joint:
            allowed = torch.cat([allowed, allowed.new_ones(q, n + p)])
    weights = torch.cat([v, v.new_zeros(p)])
    radius = options.kappa * v
    if joint:  # the rows of (C D) are in no ball
        radius = torch.cat([radius, radius.new_full((q,), torch.inf)])
    rows = normed(moments, weights, radius, allowed)
    L = R = objective = gap = None
    if low is not None:
        (L, R, B), fit_ = fit_low_rank(rows, n, low.rank, sharing)
        W = torch.cat([L @ R.mT, B], 1)
        steps = (0, 0)
        kept = None
    else:
        solved = _solve(rows.program, options.penalty, refit, sharing)
        W, objective, gap, steps, fit_ = solved
        kept = (W[n:] != 0) if joint else None
        W, fit_ = W[:n], fit_[:n]
    top = replace(rows, scale=rows.scale[:n], moments=replace(moments, aim=moments.aim[:n]))
    raw, b = top.restore(W)
    if L is not None:
        L = L * top.scale[:, None]
        R = R / rows.unit[:n, None]  # type: ignore[operator]
    A, B = raw[:, :n], raw[:, n:]
    found = ImplicitModel(A, B, A[:0].new_zeros(1, n), None, b, None, f.phi)

    ball = f"||A||_inf <= {options.kappa:.9g}"

    def regenerated() -> Iterator[tuple[Tensor, Tensor]]:
        for part in chunks(f, data):
            y = teacher(f, part)[2]
            at = part.flatten(1)
            x = found_at(ball, lambda at=at: found.solve(at).value)  # type: ignore[misc]
            yield torch.cat([x, part.flatten(1)], 1), y

    second = gather(regenerated(), sharing, (n + p, q), u)
    out = normed(second, None, None, kept)
    W, _, _, more, readout_fit = _solve(out.program, options.readout, refit, sharing)
    raw, d = out.restore(W)
    return Fitted(
        A=A, B=B, b=b, C=raw[:, :n], D=raw[:, n:], d=d, L=L, R=R, v=v, scaled=scaled, phi=f.phi,
        fit=fit_, readout_fit=readout_fit, objective=objective, gap=gap,
        steps=(steps[0] + more[0], steps[1] + more[1]), samples=moments.count,
    )  # fmt: skip


def _solve(
    program: RowProgram, penalty: Penalty, refit: bool, sharing: Sharing
) -> tuple[Tensor, Tensor, Tensor | None, tuple[int, int], Tensor]:
    """W, the objective and gap of the penalised program, the steps, and the relative fit."""
    rows = len(program.energy)
    _ = program.spectrum  # once, for all rows
    own = program.rows(sharing.own(rows))

    def solved() -> tuple[Tensor, Tensor, Tensor | None, tuple[int, int]]:
        allowed = torch.ones_like(own.cross, dtype=torch.bool)
        if own.allowed is not None:
            allowed = own.allowed
        if penalty.nothing:
            found = least_squares(own, allowed)
            return found.W, found.objective, found.gap, found.steps
        found = own.solve(penalty)
        W, (split, newton) = found.W, found.steps
        if penalty.entrywise:
            W, more = shortest(own, penalty, W)
            newton += more
        if refit:
            again = least_squares(own, W != 0)
            W, newton = again.W, newton + again.steps[1]
        return W, found.objective, found.gap, (split, newton)

    W, objective, gap, steps = sharing.together(solved, ConvergenceError)
    share = (2 * own.fit(W) / own.energy.clamp_min(torch.finfo(W.dtype).tiny)).sqrt()
    W, share = sharing.whole(W, rows), sharing.whole(share, rows)
    if objective.dim():
        objective = sharing.whole(objective, rows)
        gap = None if gap is None else sharing.whole(gap, rows)
    return W, objective, gap, steps, share
