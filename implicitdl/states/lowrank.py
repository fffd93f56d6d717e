"""Rows of (A B) with A = L R^T: reduced-rank regression, then each row again inside its ball."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..convex import QuadraticProgram
from ..solution import ConvergenceError
from .recording import Sharing

if TYPE_CHECKING:
    from .fitting import Normed

_CUT = 1e-9  # eigenvalues below this share of the largest variance are rounding


def _powers(S: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """S^-1 and S^-1/2 on the range of S >= 0."""
    values, Q = torch.linalg.eigh((S + S.mT) / 2)
    live = values > _CUT * largest.clamp_min(1e-300)
    inverse = torch.where(live, 1 / values.clamp_min(1e-300), 0.0)
    return (Q * inverse) @ Q.mT, (Q * inverse.sqrt()) @ Q.mT


def fit_low_rank(
    rows: "Normed", n: int, rank: int, sharing: Sharing
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """(L, R, B), and the relative fit of each row.

    With U projected out, S = X'X - X'U (U'U)^-1 U'X and T = Z'X - Z'U (U'U)^-1 U'X, the best A of
    rank r is T S^-1 cut to the r largest singular values of T S^-1/2: A = T S^-1/2 V V' S^-1/2, V the
    right singular vectors. R = S^-1/2 V is kept; each row l of L, and of B, is then the optimum of

        min_{l, b} 1/2 ||z - X R l - U b||^2   over   sum_j weights_j |(R l)_j| <= radius.
    """
    program = rows.program
    G, H = program.gram, program.cross
    live = program.allowed.any(0) if program.allowed is not None else None
    if live is not None:
        G = G * live * live[:, None]
        H = H * live
    Gxx, Gxu, Guu = G[:n, :n], G[:n, n:], G[n:, n:]
    largest = G.diagonal().amax()
    inverse, _ = _powers(Guu, largest)
    S = Gxx - Gxu @ inverse @ Gxu.mT
    T = H[:, :n] - H[:, n:] @ inverse @ Gxu.mT
    _, root = _powers(S, largest)
    rank = min(rank, n)
    V = torch.linalg.svd(T @ root, full_matrices=False).Vh[:rank].mT
    R = root @ V  # so that R'S R = I, and L = T R
    own = sharing.own(len(H))
    weights, radius = program.weights, program.radius
    L = sharing.together(
        lambda: _in_ball((T @ R)[own], R, weights[:n], radius[own]),  # type: ignore[index]
        ConvergenceError,
    )
    L = sharing.whole(L, len(H))
    B = (H[:, n:] - L @ (R.mT @ Gxu)) @ inverse
    W = torch.cat([L @ R.mT, B], 1)
    return (L, R, B), (2 * program.fit(W) / program.energy.clamp_min(1e-300)).sqrt()


def _in_ball(L0: Tensor, R: Tensor, weights: Tensor, radius: Tensor) -> Tensor:
    """argmin_l ||l - l0||^2 / 2 over sum_j weights_j |(R l)_j| <= radius, for each row: what is left
    of the row's program once b is eliminated, as R'S R = I.

    A quadratic program in (l, t) with |weights_j (R l)_j| <= t_j, sum t <= radius, all rows in one
    batch; what its solver leaves outside is scaled in, exactly, which keeps the rank.
    """
    M = weights[:, None] * R
    long = (L0 @ M.mT).abs().sum(1) > radius
    if not bool(long.any()):
        return L0
    n, r = M.shape
    unit = radius[long, None]
    eye, zero = torch.eye(n).to(M), M.new_zeros(1, r)
    G = torch.cat([
        torch.cat([M, -eye], 1), torch.cat([-M, -eye], 1), torch.cat([zero, eye.new_ones(1, n)], 1)
    ])  # fmt: skip
    P = torch.block_diag(torch.eye(r).to(M), eye.new_zeros(n, n))
    q = torch.cat([-L0[long] / unit, M.new_zeros(len(unit), n)], 1)
    h = torch.cat([M.new_zeros(2 * n), M.new_ones(1)])
    new = QuadraticProgram().solve(P, q, G, h).value[:, :r] * unit
    length = (new @ M.mT).abs().sum(1)
    out = L0.clone()
    out[long] = new * (radius[long] / length.clamp_min(1e-300)).clamp(max=1.0)[:, None]
    return out
