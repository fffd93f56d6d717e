"""One answer where a program has many: columns that depend on each other, whatever the order of samples.

A unit that is on at all samples is an affine map of what it reads, so that its column is dependent on
others, exactly; least squares then has a plane of solutions, and rounding would choose among them. Here
the shortest is taken. Signs, support, and whether the ball is full are those of

    argmin_w 1/2 ||z - F w||^2 + R(w) + ridge/2 ||w||^2   over the ball,

which is one point, and moves by at most change / ridge when the data change. On that face the optimum
is a linear system, whose shortest solution is taken by iterated Tikhonov regularisation: along
eigenvectors of its matrix with eigenvalue lambda it is short of the optimum by a share of
(ridge / (lambda + ridge))^steps, and where lambda is zero it is zero.

Reference: Engl, Hanke and Neubauer 1996, section 5.1.
"""

from dataclasses import replace

import torch
from torch import Tensor

from .newton import chunks, finish, free_entries
from .penalties import L1, Penalty
from .rows import RowProgram, RowSolution

RIDGE = 1e-6  # relative to the largest entry of F'F: rounding of 1e-16 moves the answer by 3e-10
STEPS = 3
_NONE = 1e-8  # an entry below this share of its row's largest is zero: rounding made it
_PIVOTS = 20  # faces, each smaller
_PIVOT = 1e-9  # of a Cholesky factor, squared: below it columns may be dependent
_RANK = 1e-12  # eigenvalues below this share of the largest are rounding


def shortest(program: RowProgram, penalty: Penalty, W: Tensor) -> tuple[Tensor, int]:
    """The shortest optimum of each row, and the steps of Newton's method.

    Args:
        program: as for `RowProgram.solve`.
        penalty: an entrywise one.
        W: an optimum to begin at; the answer does not depend on it.  # (r, d)
    """
    # A ridge far below the penalty, or it would spread what the penalty gathers.
    weight = float(penalty.slope(W.new_zeros(())))
    ridge = float(program.gram.diagonal().amax()) * (min(RIDGE, 1e-2 * weight) if weight else RIDGE)
    some = _with_ridge(program, ridge)
    new, steps, reached = finish(some, penalty, W, 1e-13, 60)
    left = (~reached).nonzero().flatten()
    if len(left):
        rows = some.rows(left)
        again, more, _ = finish(rows, penalty, torch.zeros_like(W[left]), 1e-13)
        lower = rows.objective(again, penalty) < rows.objective(new[left], penalty)
        new[left[lower]] = again[lower]
        steps += more
    return _sharpened(program, penalty, new, ridge), steps


def _sharpened(program: RowProgram, penalty: Penalty, W: Tensor, ridge: float) -> Tensor:
    """The closed form on the face of W, less the entries that would change their sign there."""
    tight = torch.zeros(len(W), dtype=torch.bool, device=W.device)
    if program.weights is not None and program.radius is not None:
        length = (W.abs() * program.weights).sum(1)
        tight = (length >= program.radius * (1 - 1e-7)) & (length > 0)
    W = _tidy(W)
    walls = (W != 0) & ~free_entries(program, penalty)
    support, sharp = W != 0, W.clone()
    left = torch.arange(len(W), device=W.device)
    for _ in range(_PIVOTS):
        some = program.rows(left)
        new = _on_face(some, penalty, W[left], support[left], tight[left], ridge)
        sharp[left] = new
        wrong = (new.sign() != W[left].sign()) & walls[left] & support[left]
        left = left[wrong.any(1)]
        if not left.numel():
            break
        support[left] &= ~wrong[wrong.any(1)]
    sharp[left] = W[left]
    sharp = _tidy(program.inside(sharp))
    higher = program.objective(sharp, penalty) - program.objective(W, penalty)
    return torch.where((higher <= 1e-9 * program.energy)[:, None], sharp, W)


def least_squares(program: RowProgram, support: Tensor) -> RowSolution:
    """min 1/2 ||z_i - F w_i||^2 over the balls and the entries of the support, the shortest.

    Args:
        program: its own `allowed` is left aside.
        support: (r, d) bool.
    """
    plain = L1(weight=0.0)
    ridge = RIDGE * float(program.gram.diagonal().amax())
    own = program.within(support)
    # Where least squares alone stays inside, the ball has no say.
    free = replace(own, weights=None, radius=None)
    none = torch.zeros(len(support), dtype=torch.bool, device=support.device)
    W = _tidy(_on_face(free, plain, torch.zeros_like(program.cross), support, none, ridge))
    steps = 0
    if own.weights is not None and own.radius is not None:
        out = ((W.abs() * own.weights).sum(1) > own.radius).nonzero().flatten()
        if len(out):
            some = own.rows(out)
            W[out], steps = shortest(some, plain, some.inside(W[out]))
    return RowSolution(W=W, objective=own.fit(W), gap=None, steps=(0, steps))


def _with_ridge(program: RowProgram, ridge: float) -> RowProgram:
    eye = ridge * torch.eye(len(program.gram), dtype=program.gram.dtype, device=program.gram.device)
    new = replace(program, gram=program.gram + eye)
    values, vectors = program.spectrum
    new.__dict__["spectrum"] = (values + ridge, vectors)
    return new


def _tidy(W: Tensor) -> Tensor:
    size = W.abs()
    return torch.where(size > _NONE * size.amax(1, keepdim=True), W, 0.0) if W.shape[1] else W


def _on_face(
    program: RowProgram, penalty: Penalty, W: Tensor, support: Tensor, tight: Tensor, ridge: float
) -> Tensor:
    """The steps in closed form on a face: the signs of W, a support, the ball's face where it is tight.

    With y the part of w that is at right angles to the ball's face (all of w where there is none),

        y = (1 - (ridge / (K + ridge))^steps) / K  r,     K = F'F + diag(psi'') there,  r the force.
    """
    new = torch.zeros_like(W)
    shared = not bool(tight.any()) and penalty.nothing and bool((support == support[:1]).all())
    parts = [torch.arange(len(W), device=W.device)] if shared else chunks(support)
    for at in parts:
        size, sign, inside = W[at].abs(), W[at].sign(), support[at]
        k = max(1, int(inside.sum(1).max())) if len(at) else 1
        index = inside.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :k]
        there = inside.gather(1, index)
        d = W.shape[1]
        first = slice(0, 1) if shared else slice(None)  # one matrix for all
        where = torch.where(there, index, d)[first]
        flat = where[:, :, None] * (d + 1) + where[:, None, :]
        K = program.padded.index_select(0, flat.reshape(-1)).view(flat.shape)
        bend = penalty.curvature(size)
        own = torch.where(there, bend.gather(1, index), 1.0)[first]
        K.diagonal(dim1=1, dim2=2).add_(own)
        line = (penalty.slope(size) - bend * size) * sign
        force = (program.cross[at] - line).gather(1, index) * there
        base = torch.zeros_like(force)
        if bool(tight[at].any()):
            lean = (program.weights * sign).gather(1, index) * there  # type: ignore[operator]
            lean = lean * tight[at, None]
            long = lean.norm(dim=1, keepdim=True).clamp_min(1e-300)
            lean = lean / long
            base = lean * (program.radius[at, None] / long)  # type: ignore[index]
            force = force - (K @ base[:, :, None])[:, :, 0]
            force = force - (force * lean).sum(1, keepdim=True) * lean
            turned = (K @ lean[:, :, None])[:, :, 0]
            both = lean[:, :, None] * turned[:, None, :]
            along = (lean * turned).sum(1)[:, None, None] + 1.0
            K = K - both - both.mT + along * lean[:, :, None] * lean[:, None, :]
        y = _filtered(K, force, ridge)
        y = torch.where(there, base + y, 0.0)
        new[at] = torch.zeros_like(size).scatter_(1, index, y)
    return new


def _filtered(K: Tensor, force: Tensor, ridge: float) -> Tensor:
    """(1 - (ridge / (K + ridge))^steps) / K on the range of K, times the forces.

    By Cholesky where K has full rank, else by eigenvectors.  # (r or 1, k, k), (r, k) -> (r, k)
    """
    factor, failed = torch.linalg.cholesky_ex(K)
    pivots = factor.diagonal(dim1=1, dim2=2).square()
    full = (failed == 0) & (pivots.amin(1) > _PIVOT * pivots.amax(1))
    y = torch.zeros_like(force)
    rows = full.expand(len(force))
    if bool(full.any()):
        stiff = K[full] + ridge * torch.eye(K.shape[1], dtype=K.dtype, device=K.device)
        stiff = torch.linalg.cholesky(stiff)
        for _ in range(STEPS):
            right = (force + ridge * y)[rows]
            if len(stiff) == len(right):
                y[rows] = torch.cholesky_solve(right[:, :, None], stiff)[:, :, 0]
            else:
                y[rows] = torch.cholesky_solve(right.mT, stiff[0]).mT
    if not bool(full.all()):
        values, Q = torch.linalg.eigh(K[~full])
        gain = sum(ridge**j / (values + ridge) ** (j + 1) for j in range(STEPS))
        gain = torch.where(values > _RANK * values[:, -1:], gain, 0.0)
        seen = (Q.mT @ force[~rows][:, :, None])[:, :, 0]
        y[~rows] = (Q @ (gain * seen)[:, :, None])[:, :, 0]
    return y
