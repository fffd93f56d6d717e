"""Newton's method on the supports of all rows: from a near guess to the optimum itself.

On the face where signs and support of a row are kept the program is a quadratic one with at most one
constraint, the ball's, whose multiplier theta has a formula:

    (K_SS) d = -(g + sigma psi')_S - theta (weights sigma)_S,     K = F'F + diag(psi''),
    theta = ((weights sigma)'d_0 - slack)_+ / (weights sigma)'K^-1 (weights sigma).

The step is bent at the walls of the face (an entry that would change sign stops at zero) and at the
ball, and is taken where the objective falls; else half of it, and where none does a proximal gradient
step, which always falls. Entries off the support whose dual constraint is violated join it. Every step
lowers the objective, so that small penalties and dependent columns cost steps and cannot cycle. Where
the columns of a support are dependent to the last digit, K_SS with a ridge of 1e-9 gives the step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .penalties import Penalty
    from .rows import RowProgram

_ENTRIES = 1 << 23  # of the matrices of one call: 64 MiB
# Relative to the largest entry of F'F: the first leaves the step as it is, the second gives one that
# rounding does not rule even where columns are dependent; it shortens it, and moves no optimum.
_RIDGES = (1e-14, 1e-9)
_PIVOTS = 20  # faces of one step, each smaller
_WALLS = 60  # walls of one step
_DUAL = 1e-8  # violation of a dual constraint, relative to the penalty, that counts as none
_DUAL_MOST = 1e-10  # the same relative to |F'z|
_ROUNDING = 2e-14


def finish(
    program: "RowProgram",
    penalty: "Penalty",
    W: Tensor,
    tolerance: float,
    max_steps: int = 300,
) -> tuple[Tensor, int, Tensor]:
    """The optimum, from W inside the balls.

    Returns:
        W, the number of steps of the slowest row, and which rows reached it.  # (r, d), int, (r,)
    """
    W = W.clone()
    _ = program.padded  # once, for all rows
    left = torch.arange(W.shape[0], device=W.device)
    reached = torch.zeros(W.shape[0], dtype=torch.bool, device=W.device)
    quiet = torch.zeros(W.shape[0], dtype=torch.long, device=W.device)
    settled = torch.zeros_like(quiet)  # steps in a row that only rounding made
    decrement = torch.full((W.shape[0],), torch.inf, dtype=W.dtype, device=W.device)
    steps = 0
    while steps < max_steps and left.numel():
        own = program.rows(left)
        G = W[left] @ program.gram - own.cross  # the gradient
        enter = _entering(own, penalty, W[left], G)
        scale = 0.5 * own.energy.clamp_min(torch.finfo(W.dtype).tiny)
        small = decrement[left] <= 1e-2 * tolerance * scale
        settled[left] = torch.where(small, settled[left] + 1, 0)
        done = ~enter.any(1) & small
        ready = done.nonzero().flatten()
        gap = program.rows(left[ready]).gap(W[left[ready]], penalty) if len(ready) else None
        if gap is not None:  # a bound may ask for more than the decrement does
            done[ready] = (gap <= 0.1 * tolerance * scale[ready]) | (settled[left[ready]] >= 5)
        reached[left[done]] = True
        go = ~done & (quiet[left] < 5)
        left, G, enter = left[go], G[go], enter[go]
        if not left.numel():
            break
        steps += 1
        for chunk in chunks((W[left] != 0) | enter | free_entries(program.rows(left), penalty)):
            at = left[chunk]
            part = program.rows(at)
            new, full, fell = _step(part, penalty, W[at], G[chunk], enter[chunk])
            W[at] = new
            decrement[at] = full
            quiet[at] = torch.where(fell, 0, quiet[at] + 1)
    return W, steps, reached


def _entering(program: "RowProgram", penalty: "Penalty", W: Tensor, G: Tensor) -> Tensor:
    """Entries that are to join the support, the most violated first where there are many."""
    size = W.abs()
    on = size > 0
    theta = W.new_zeros(W.shape[0])
    start = penalty.slope(torch.zeros_like(size))
    level = start
    if program.weights is not None and program.radius is not None:
        length = (size * program.weights).sum(1)
        tight = length >= program.radius * (1 - 1e-9)
        share = (program.weights * on).square().sum(1)
        pull = (program.weights * on * (-G * W.sign() - penalty.slope(size))).sum(1)
        theta = torch.where(tight & (share > 0), pull / share.clamp_min(1e-300), 0.0).clamp_min(0)
        # A ball of no radius, or one that only entries of it fill, has any multiplier.
        empty = tight & (share == 0)
        over = ((G.abs() - start) / program.weights.clamp_min(1e-300)).masked_fill(
            program.weights == 0, 0.0
        )
        theta = torch.where(empty, over.amax(1).clamp_min(0), theta)
        level = start + theta[:, None] * program.weights
    excess = G.abs() - level
    unit = program.cross.abs().amax(1, keepdim=True).clamp_min(1e-300)
    # What counts as violated: far below the penalty, above the rounding of F'F w.
    level = torch.maximum(torch.minimum(_DUAL * start, _DUAL_MOST * unit), _ROUNDING * unit)
    violated = ~on & (excess > level)
    if program.allowed is not None:
        violated &= program.allowed
    violated &= ~free_entries(program, penalty)  # which are in the support anyway
    most = max(16, int(on.sum(1).max()) // 2)
    if most < W.shape[1]:
        ranked = torch.where(violated, excess, -1.0)
        cut = ranked.topk(most, 1).values[:, -1:]
        violated &= ranked >= cut
    return violated


def chunks(support: Tensor) -> list[Tensor]:
    """Rows of like support sizes together, no more than fit into memory."""
    count = support.sum(1)
    order = count.argsort()
    chunks, start = [], 0
    sizes = count[order].clamp_min(1).tolist()
    for end in range(1, len(sizes) + 1):
        last = end == len(sizes)
        if last or sizes[end] ** 2 * (end + 1 - start) > _ENTRIES or sizes[end] > 2 * sizes[start]:
            chunks.append(order[start:end])
            start = end
    return chunks


def free_entries(program: "RowProgram", penalty: "Penalty") -> Tensor:
    """Entries without a kink at zero: neither penalised nor in a ball.  # (r, d)"""
    free = penalty.slope(torch.zeros_like(program.cross)) == 0
    if program.weights is not None and program.radius is not None:
        free &= program.weights == 0
    if program.allowed is not None:
        free &= program.allowed
    return free


@dataclass(eq=False)
class _Face:
    """The signs and supports of some rows, with K_SS factored.

    Entries may be pinned to zero afterwards, with the factor as it is: K_SS d + E mu = -force and
    E'd = 0 take one more column K_SS^-1 e for each, and a small system for mu.
    """

    program: "RowProgram"
    penalty: "Penalty"
    sign: Tensor  # (r, d)
    index: Tensor  # (r, k), the supports, filled up to the largest
    there: Tensor  # (r, k) bool
    factor: Tensor  # (r, k, k)
    lean: Tensor | None  # (r, k), weights sigma
    columns: Tensor  # (r, k, m), K^-1 E
    pins: Tensor  # (r, m), where among the k
    real: Tensor  # (r, m) bool, whether it is one
    # What `step` leaves for `onward`: K^-1 of the force and of lean, the room in the ball, the
    # multiplier that the force already tells, and the step among the k.
    base: Tensor | None = None  # (r, k, 1 or 2)
    slack: Tensor | None = None  # (r,)
    near: Tensor | None = None  # (r,)
    move: Tensor | None = None  # (r, k)

    @staticmethod
    def of(
        program: "RowProgram", penalty: "Penalty", W: Tensor, sign: Tensor, support: Tensor,
        ridge: float,
    ) -> "_Face":  # fmt: skip
        """Factored at W, whose curvature counts."""
        k = max(1, int(support.sum(1).max()))
        index = support.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :k]
        there = support.gather(1, index)
        d = W.shape[1]
        at = torch.where(there, index, d)
        flat = at[:, :, None] * (d + 1) + at[:, None, :]
        K = program.padded.index_select(0, flat.reshape(-1)).view(flat.shape)
        ridge = ridge * float(program.gram.diagonal().amax())
        own = penalty.curvature(W.abs()).gather(1, index) + ridge
        K.diagonal(dim1=1, dim2=2).add_(torch.where(there, own, 1.0))
        factor, failed = torch.linalg.cholesky_ex(K)
        for more in (1e2, 1e4, 1e6):  # dependent beyond rounding: a larger ridge, a shorter step
            again = failed.nonzero().flatten()
            if not again.numel():
                break
            K.diagonal(dim1=1, dim2=2)[again] += more * ridge
            factor[again], failed[again] = torch.linalg.cholesky_ex(K[again])
        lean = None
        if program.weights is not None and program.radius is not None:
            lean = (program.weights * sign).gather(1, index) * there
        none = index[:, :0]
        return _Face(
            program, penalty, sign, index, there, factor, lean, factor[:, :, :0], none, none > 0
        )

    def _inverse(self, *right: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(self.factor, torch.stack(right, 2), upper=False)
        return torch.linalg.solve_triangular(self.factor.mT, half, upper=True)

    def pin(self, entry: Tensor) -> None:
        """One entry of each row; -1 for none.  # (r,)"""
        at = (self.index == entry[:, None]) & self.there
        self.columns = torch.cat([self.columns, self._inverse(at.to(self.factor.dtype))], 2)
        self.pins = torch.cat([self.pins, at.to(torch.int8).argmax(1, keepdim=True)], 1)
        self.real = torch.cat([self.real, at.any(1, keepdim=True)], 1)

    def step(self, W: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
        """The step to the minimum on the face, and what it would gain.  # (r, d), (r,)"""
        size = W.abs()
        force = (G + self.sign * self.penalty.slope(size)).gather(1, self.index) * self.there
        right, program = [-force], self.program
        if self.lean is not None:
            self.slack = program.radius - (size * program.weights).sum(1)
            # The multiplier that the force already tells is taken off first: near the optimum nothing
            # is left, and the step is not the difference of two long vectors.
            near = -(force * self.lean).sum(1) / self.lean.square().sum(1).clamp_min(1e-300)
            self.near = torch.where(self.slack <= 1e-6 * program.radius, near, 0.0).clamp_min(0)
            right = [-force - self.near[:, None] * self.lean, self.lean]
        self.base = self._inverse(*right)
        step = self._stepped()
        return step, (force * self.move).sum(1).abs()

    def onward(self, t: Tensor) -> Tensor:
        """The step from where a share t of the last one led, entries pinned since: the force has
        changed by K times that, so that nothing is to be solved anew.  # (r,) -> (r, d)"""
        went = t[:, None] * self.move
        self.base[:, :, 0] -= went
        if self.lean is not None:
            self.slack = self.slack - (self.lean * went).sum(1)
        return self._stepped()

    def _stepped(self) -> Tensor:
        found = self.base
        if self.pins.shape[1]:
            E = self.pins[:, :, None]
            S = self.columns.gather(1, E.expand(-1, -1, E.shape[1]))  # E'K^-1 E
            S = S * (self.real[:, :, None] & self.real[:, None, :])
            S = S + torch.diag_embed((~self.real).to(S.dtype))
            mu = found.gather(1, E.expand(-1, -1, found.shape[2])) * self.real[:, :, None]
            found = found - self.columns @ torch.linalg.solve(S, mu)
        self.move = found[:, :, 0]
        if self.lean is not None:
            along = (self.lean * found[:, :, 1]).sum(1)
            more = ((self.lean * self.move).sum(1) - self.slack) / along.clamp_min(1e-300)
            more = torch.maximum(more, -self.near).masked_fill(along <= 0, 0.0)  # none below zero
            self.move = self.move - more[:, None] * found[:, :, 1]
        return torch.zeros_like(self.sign).scatter_(1, self.index, self.move * self.there)


def _step(
    program: "RowProgram", penalty: "Penalty", W: Tensor, G: Tensor, enter: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of each row: the new rows, what a full step would have gained (infinite where it was
    not taken), and whether the objective fell."""
    sign = torch.where(enter, -G.sign(), W.sign())
    free = free_entries(program, penalty)
    support = (W != 0) | enter | free
    walls = support & ~free
    before = program.objective(W, penalty)
    new, step = W.clone(), torch.zeros_like(W)
    full = torch.full_like(before, torch.inf)
    left = torch.arange(len(W), device=W.device)

    def take(attempt: Callable[..., Tensor], ridge: float) -> None:
        nonlocal left
        if not left.numel():
            return
        some = program.rows(left)
        found = attempt(
            some, penalty, W[left], G[left], sign[left], support[left], walls[left], step[left],
            ridge,
        )  # fmt: skip
        # What a face gains may be less than the rounding of the objective; `quiet` ends that.
        room = _noise(some, found) if attempt is _pivoted else 0.0
        good = some.objective(found, penalty) < before[left] + room
        new[left[good]] = found[good]
        left = left[~good]

    for ridge in _RIDGES:
        if not left.numel():
            break
        some = program.rows(left)
        face = _Face.of(some, penalty, W[left], sign[left], support[left], ridge)
        step[left], gain = face.step(W[left], G[left])
        trial = W[left] + step[left]
        plain = ~((trial.sign() != sign[left]) & walls[left]).any(1)
        trial = some.inside(trial)
        # At the optimum only rounding moves.
        plain &= some.objective(trial, penalty) <= before[left] + _noise(some, trial)
        new[left[plain]], full[left[plain]] = trial[plain], gain[plain]
        left = left[~plain]
        take(_pivoted, ridge)
        take(_walked, ridge)
    take(_searched, ridge)
    take(_proximal, ridge)
    fell = program.objective(new, penalty) < before - _noise(program, new)
    return new, full, fell


def _noise(program: "RowProgram", W: Tensor) -> Tensor:
    """Rounding of the objective, whose terms w'F'F w may be larger than what is left of them; never
    more than can be told from a change.  # (r,)"""
    size = W.abs()
    terms = ((size @ program.gram.abs()) * size).sum(1) + program.energy
    return torch.minimum(1e-15 * terms, 1e-12 * program.energy)


def _pivoted(
    program: "RowProgram", penalty: "Penalty", W: Tensor, G: Tensor, sign: Tensor,
    support: Tensor, walls: Tensor, step: Tensor, ridge: float,
) -> Tensor:  # fmt: skip
    """The minimum on the face that is left once all entries that would change sign are dropped, and
    those that would change it then, ..."""
    new = W + step
    left = torch.arange(len(W), device=W.device)
    for _ in range(_PIVOTS):
        wrong = (new[left].sign() != sign[left]) & walls[left] & support[left]
        left = left[wrong.any(1)]
        if not left.numel():
            break
        wrong = wrong[wrong.any(1)]
        support[left] &= ~wrong
        base = torch.where(support[left], W[left], 0.0)
        face = _Face.of(program.rows(left), penalty, base, sign[left], support[left], ridge)
        new[left] = base + face.step(base, base @ program.gram - program.cross[left])[0]
    return program.inside(torch.where(support & ~(walls & (new.sign() != sign)), new, 0.0))


def _walked(
    program: "RowProgram", penalty: "Penalty", W: Tensor, G: Tensor, sign: Tensor,
    support: Tensor, walls: Tensor, step: Tensor, ridge: float,
) -> Tensor:  # fmt: skip
    """The step as far as the first wall, which is then a wall of the face, and so on: it never rises."""
    for _ in range(_PIVOTS):  # entries that were to join but would take the other sign
        stuck = (W == 0) & (step.sign() != sign) & support & walls
        support = support & ~stuck
        face = _Face.of(program, penalty, W, sign, support, ridge)
        step, _ = face.step(W, G)
        if not bool(stuck.any()):
            break
    open_ = support & walls
    for _ in range(_WALLS):
        hits = ((W + step).sign() != sign) & open_
        share = torch.where(hits, W.abs() / step.abs().clamp_min(1e-300), torch.inf)
        t, first = share.min(1)
        W = W + t.clamp(max=1.0)[:, None] * step
        first = torch.where(t <= 1, first, -1)
        hit = first[:, None] == torch.arange(W.shape[1], device=W.device)
        W, open_ = W.masked_fill(hit, 0.0), open_ & ~hit
        if not bool((first >= 0).any()):
            break
        face.pin(first)
        step = face.onward(t.clamp(max=1.0)).masked_fill(walls & ~open_, 0.0)
    return program.inside(torch.where((W.sign() != sign) & walls, 0.0, W))


def _searched(
    program: "RowProgram", penalty: "Penalty", W: Tensor, G: Tensor, sign: Tensor,
    support: Tensor, walls: Tensor, step: Tensor, ridge: float,
) -> Tensor:  # fmt: skip
    """The lowest point on the way of the step, where psi bends between zero and the step's end."""
    slope, bend = (step * G).sum(1), ((step @ program.gram) * step).sum(1)
    low, high = torch.zeros_like(slope), torch.ones_like(slope)
    for _ in range(50):  # the derivative along the way rises
        t = (low + high) / 2
        there = W + t[:, None] * step
        rise = slope + t * bend + (step * there.sign() * penalty.slope(there.abs())).sum(1)
        low, high = torch.where(rise < 0, t, low), torch.where(rise < 0, high, t)
    there = W + high[:, None] * step
    return program.inside(torch.where(there.abs() <= 1e-13 * step.abs(), 0.0, there))


def _proximal(
    program: "RowProgram", penalty: "Penalty", W: Tensor, G: Tensor, sign: Tensor,
    support: Tensor, walls: Tensor, step: Tensor, ridge: float,
) -> Tensor:  # fmt: skip
    """A proximal gradient step of the inverse Lipschitz constant, which never rises."""
    pace = 1 / float(program.spectrum[0].max())
    return program.prox(penalty, W - pace * G, pace)
