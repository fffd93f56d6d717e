"""Gains of networks whose slopes lie anywhere in their range, proved by one quadratic form.

For s = A p + B e, p = D s with any diagonal D, low <= D <= top, the states obey
(p_i - low_i s_i)(top_i s_i - p_i) >= 0. So for any weights lam > 0, and any F and G, if

    |F p + G e|^2 + sum_i lam_i (p_i - low_i s_i)(top_i s_i - p_i)  <=  gain^2 |e|^2    for all p and e,

then |F p + G e| <= gain |e|. The left is a quadratic form in (p, e): negative definite in p it also
proves that I - A D is invertible, and the least gain is a largest eigenvalue. Weights are improved by
its derivative, which at the maximising (p, e) is the slack of each sector; every one of them proves.

Reference:
    Fazlyab, Robey, Hassani, Morari, Pappas (2019), "Efficient and accurate estimation of Lipschitz
    constants for deep neural networks" (without its coupling of states, which does not hold); Revay,
    Wang, Manchester (2020), "Lipschitz bounded equilibrium networks", theorem 2.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LIMIT = 300  # states
_STEPS = 40
_SLACK = 1 + 1e-7  # of the squared gain, so that the form is definite beyond rounding


def together(
    A: Tensor, B: Tensor, C: Tensor, D: Tensor, low: Tensor, top: Tensor, bend: Tensor,
    depth: Tensor, entries: "Tensor | None", gradient: float, hessian: float, pairs: bool,
) -> tuple[float, float]:  # fmt: skip
    """L_zz of a loss of the outputs and their Lipschitz constant, all states at once.

    Args:
        A, B, C, D: of the network.
        low, top, bend: range of phi' and sup |phi''|.  # (n,)
        depth: how many levels are below each state.  # (n,)
        entries: bounds of the adjoint, if there are any.  # (n,)
        gradient, hessian, pairs: as of `OutputLoss`.
    """
    B, D = _narrow(B, D)
    forward = Sector(A, B, low, top, depth)
    lipschitz, lam = forward.gain(C, D)
    # Backwards: v = A'Phi' v + C'g. Of pairs the sum of g is zero, so the mean row of C is nothing.
    reads = C - C.mean(0) if pairs else C
    backward = Sector(A.mT, reads.mT, low, top, depth.max() - depth)
    _, weights = backward.gain(A.mT, reads.mT)
    adjoint = backward.rows(A.mT, reads.mT, weights) * gradient
    if entries is not None:
        adjoint = torch.minimum(adjoint, entries)
    if not bool(torch.isfinite(adjoint).all()):
        return math.inf, lipschitz
    root = (adjoint * bend).sqrt()[:, None]
    inner, _ = forward.gain(root * A, root * B)
    direct = hessian * lipschitz**2
    q = len(C)
    if pairs and 1 < q <= 64:  # see `smoothness`: a variance, a quarter of the squared range
        first, second = torch.triu_indices(q, q, 1)
        far = forward.rows(C[first] - C[second], D[first] - D[second], lam)
        direct = min(direct, 0.25 * float(far.max()) ** 2)
    return (inner**2 + direct) * (1 + 1e-9), lipschitz


def _narrow(B: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
    """The same in coordinates of the input's subspace that is read."""
    rows = torch.cat([B, D])
    if rows.shape[0] >= rows.shape[1]:
        return B, D
    Q, _ = torch.linalg.qr(rows.mT)
    return B @ Q, D @ Q


@dataclass(frozen=True, eq=False)
class Sector:
    """The network s = A p + B e with slopes in [low, top], and weights of its sectors.

    Attributes:
        A: # (n, n)
        B: # (n, m)
        low, top, depth: # (n,)
    """

    A: Tensor
    B: Tensor
    low: Tensor
    top: Tensor
    depth: Tensor

    def _starts(self) -> list[Tensor]:
        """Weights, but for their scale, one of which usually proves something.

        Strongly monotone loops need equal ones; states that feed others, larger ones than these;
        and where |A| max|phi'| contracts, its Perron vectors make I - |A| max|phi'| definite.
        """
        up = (self.depth.max() - self.depth).to(self.A.dtype)
        starts = [t**up for t in (1.0, 4.0, 16.0, 256.0)[: 4 if bool(up.any()) else 1]]
        most = torch.maximum(self.low.abs(), self.top.abs())
        K = torch.eye(len(up), dtype=self.A.dtype) - self.A.abs() * most
        inverse, info = torch.linalg.inv_ex(K)
        right, left = inverse.sum(1), inverse.sum(0)
        if not int(info) and bool((right > 0).all()) and bool((left > 0).all()):
            starts.append(left / right / most.clamp_min(1e-12))
        return [start / start.mean() for start in starts]

    def _form(self, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The weighted sectors as a quadratic form: p'N p, p'K e, e'M e."""
        middle, product = 0.5 * lam * (self.low + self.top), lam * self.low * self.top
        cross = middle[:, None] * self.A
        N = cross + cross.mT - torch.diag(lam) - self.A.mT @ (product[:, None] * self.A)
        K = middle[:, None] * self.B - self.A.mT @ (product[:, None] * self.B)
        M = -self.B.mT @ (product[:, None] * self.B)
        return N, K, M

    def gain(self, F: Tensor, G: Tensor) -> tuple[float, "Tensor | None"]:
        """A bound of |F p + G e| / |e|, infinite where nothing is proved, and its weights.

        Args:
            F: # (k, n)
            G: # (k, m)
        """
        n = self.A.shape[0]
        if not n or not F.shape[0] or not self.B.shape[1]:
            return 0.0, None
        size = float(F.square().sum() + G.square().sum()) or 1.0
        best, lam = math.inf, None
        for start in self._starts():
            for power in range(-2, 7):
                trial = start * (size / n * 10.0**power)
                value, _ = self._at(F, G, trial)
                if value < best:
                    best, lam = value, trial
        if lam is None:
            return math.inf, None
        x, first, second = lam.log(), torch.zeros_like(lam), torch.zeros_like(lam)
        for k in range(1, _STEPS + 1):
            value, slope = self._at(F, G, x.exp())
            if slope is None:  # too far: back to the best, and shorter
                x, first = lam.log(), 0.0 * first
                second = 4 * second + 1e-30
                continue
            if value < best:
                best, lam = value, x.exp()
            slope = slope * x.exp() / value
            first, second = 0.8 * first + 0.2 * slope, 0.95 * second + 0.05 * slope * slope
            rate = 0.3 / math.sqrt(k)
            step = (first / (1 - 0.8**k)) / ((second / (1 - 0.95**k)).sqrt() + 1e-12)
            x = x - rate * step
        proved = self._proved(F, G, lam, best)
        return proved, lam

    def rows(self, F: Tensor, G: Tensor, lam: "Tensor | None") -> Tensor:
        """As `gain` for each row alone, from multiples of the weights of another gain.  # (k,)

        With -N = L L', a = L^-1 f, h = (L^-1 K)'a and the multiple t > |a|^2, the form's largest
        eigenvalue is that of t (M + K'(-N)^-1 K) + h g' + g h' + (t h h' + h g' |a|^2 + ...) / (t - |a|^2).
        """
        none = torch.full((F.shape[0],), math.inf, dtype=F.dtype)
        if lam is None:
            return none
        N, K, M = self._form(lam)
        unit = lam.rsqrt()  # in these units of p the form is about as well conditioned as it gets
        L, info = torch.linalg.cholesky_ex(-N * unit * unit[:, None])
        pivots = L.diagonal()
        # Rounding is far below the slack where the pivots are not too uneven.
        if int(info) or float(pivots.min()) < 1e-4 * float(pivots.max()):
            return none
        half = torch.linalg.solve_triangular(L, K * unit[:, None], upper=False)
        a = torch.linalg.solve_triangular(L, (F * unit).mT, upper=False).mT  # (k, n)
        h, size, base = a @ half, a.square().sum(1), M + half.mT @ half
        out, least = none, 1e-9 * float(size.max() + G.square().sum(1).max()) + 1e-150
        for share in (1.03, 1.1, 1.3, 1.7, 2.5, 4.0, 8.0, 20.0):
            t = (share * size).clamp_min(least)[:, None, None]
            n2, hh, gg = size[:, None, None], h[:, :, None], G[:, :, None]
            v = t * hh + n2 * gg
            S = t * base + hh * gg.mT + gg * hh.mT + (1 + n2 / t) * gg * gg.mT
            S = S + v * v.mT / (t * (t - n2))
            square = torch.linalg.eigvalsh(S)[:, -1].clamp_min(0) * _SLACK
            out = torch.minimum(out, square.sqrt())
        return out

    def _at(self, F: Tensor, G: Tensor, lam: Tensor) -> tuple[float, "Tensor | None"]:
        """The squared gain for these weights, and its derivative by them."""
        N, K, M = self._form(lam)
        P, C = -N - F.mT @ F, K + F.mT @ G
        L, info = torch.linalg.cholesky_ex(P)
        if int(info):
            return math.inf, None
        map_ = torch.cholesky_solve(C, L)
        S = M + G.mT @ G + C.mT @ map_
        if not bool(torch.isfinite(S).all()):
            return math.inf, None
        values, vectors = torch.linalg.eigh(0.5 * (S + S.mT))
        e = vectors[:, -1]
        p = map_ @ e
        s = self.A @ p + self.B @ e
        slack = (p - self.low * s) * (self.top * s - p)
        return max(float(values[-1]), 0.0), slack

    def _proved(self, F: Tensor, G: Tensor, lam: Tensor, square: float) -> float:
        """The gain, once the whole form is seen to be negative definite."""
        N, K, M = self._form(lam)
        n, m = self.B.shape
        scale = float(G.square().sum()) + float(lam.max()) * float(self.B.square().sum()) + square
        for _ in range(6):
            square = square * _SLACK + 1e-13 * scale
            H = torch.empty((n + m, n + m), dtype=F.dtype)
            H[:n, :n] = -N - F.mT @ F
            H[:n, n:] = -K - F.mT @ G
            H[n:, :n] = H[:n, n:].mT
            H[n:, n:] = square * torch.eye(m, dtype=F.dtype) - M - G.mT @ G
            if int(torch.linalg.cholesky_ex(H)[1]) == 0:
                return math.sqrt(square)
            square = square * (1 + 1e-5)
        return math.inf
