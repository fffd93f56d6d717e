"""The fixed-point problems that are timed, and the float64 answers that everybody is judged by.

    x = relu(A x + v)

Each problem is made from its solution: z is drawn, x = relu(z), v = z - A x. The level of z
differs from sample to sample, so that a batch holds samples with all states active, where A's
factor is the true rate of the iteration, and samples with states at zero. Entries nearer than
0.05 to the kink are moved away from it: there a derivative does not exist, and rounding would
decide which one a competitor is asked for.
"""

import dataclasses
import functools
import math

import torch
from torch import Tensor

NAMES = ("nonneg-0.5", "nonneg-0.9", "nonneg-0.99", "random-sign", "monotone")
EXTRA = ("ring-0.99",)
MARGIN = 0.1


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A, v and the cotangent g in float32, and what is certified about A."""

    name: str
    A: Tensor  # (n, n)
    v: Tensor  # (batch, n)
    g: Tensor  # (batch, n)
    active: Tensor  # (batch, n) bool, z > 0 at the solution
    contraction: float | None
    monotone: float | None

    @property
    def n(self) -> int:
        return self.A.shape[0]

    @property
    def batch(self) -> int:
        return self.v.shape[0]

    @property
    def key(self) -> tuple[str, int]:
        return self.name, self.n

    @functools.cached_property
    def A64(self) -> Tensor:
        return self.A.double()

    @functools.cached_property
    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        """x, dv and dA of sum(g x), by dense float64 solves on each sample's active set.

        x_S = (I - A_SS)^-1 v_S and dv_S = (I - A_SS)^-T g_S. With few inactive states N these come
        from M = (I - A)^-1 and the block inverse (I - A_SS)^-1 = M_SS - M_SN M_NN^-1 M_NS.
        """
        eye = torch.eye(self.n, dtype=torch.float64)
        M = torch.linalg.inv(eye - self.A64)
        v, g = self.v.double(), self.g.double()
        x, w = torch.zeros_like(v), torch.zeros_like(g)
        for matrix, right, out in ((M, v, x), (M.mT, g, w)):
            full = (right * self.active) @ matrix.mT
            for b, on in enumerate(self.active):
                N = (~on).nonzero()[:, 0]
                t = full[b]
                if len(N):
                    t = t - matrix[:, N] @ torch.linalg.solve(matrix[N][:, N], t[N])
                out[b] = torch.where(on, t, 0)
        z = x @ self.A64.mT + v
        error = (x - z.relu()).norm() / x.norm().clamp_min(1e-30)
        if not (error < 1e-10 and torch.equal(z > 0, self.active)):
            raise RuntimeError(f"{self.name}, n={self.n}: the reference is wrong by {error:.1e}")
        return x, w, w.mT @ x

    def residual(self, x: Tensor) -> float:
        """Largest over the samples of ||relu(A x + v) - x|| / ||relu(A x + v)||, in float64."""
        x = x.detach().double()
        fx = (x @ self.A64.mT + self.v.double()).relu()
        return _worst((fx - x).norm(dim=1) / fx.norm(dim=1).clamp_min(1e-30))

    def errors(self, dA: Tensor, dv: Tensor) -> tuple[float, float]:
        """||dA - exact|| / ||exact||, and the largest such ratio over the rows of dv."""
        _, dv64, dA64 = self.exact
        rows = (dv.double() - dv64).norm(dim=1) / dv64.norm(dim=1).clamp_min(1e-30)
        return _worst((dA.double() - dA64).norm() / dA64.norm()), _worst(rows)

    def products(self, tolerance: float, gradient: bool, cap: int = 400) -> int:
        """Products with A that the best Krylov method needs from zero, over up to 8 samples.

        The count of GMRES (optimal over the Krylov space) on (I - P A) x = P v with the true
        active set P given to it, for a relative residual; the backward pass adds those of
        (I - P A^T) w = P g and one product for dA.
        """
        few = torch.linspace(0, self.batch - 1, min(self.batch, 8)).long().unique()
        P = self.active[few].double()
        count = _gmres(lambda y: P * (y @ self.A64.mT), P * self.v[few].double(), tolerance, cap)
        if gradient:
            g = P * self.g[few].double()
            count += 1 + _gmres(lambda y: P * (y @ self.A64), g, tolerance, cap)
        return count


def _worst(values: Tensor) -> float:
    worst = float(values.max())
    return worst if math.isfinite(worst) else math.inf


def _gmres(J, b: Tensor, tolerance: float, cap: int) -> int:
    """Steps until every row of (I - J) x = b has relative residual <= tolerance, by Arnoldi."""
    m, n = b.shape
    norm = b.norm(dim=1, keepdim=True).clamp_min(1e-30)
    basis = [b / norm]
    H = torch.zeros(m, cap + 1, cap, dtype=b.dtype)
    for k in range(min(cap, n)):
        q = basis[-1] - J(basis[-1])
        V = torch.stack(basis, dim=1)  # (m, k + 1, n)
        for _ in range(2):
            h = torch.einsum("mkn,mn->mk", V, q)
            H[:, : k + 1, k] += h
            q = q - torch.einsum("mk,mkn->mn", h, V)
        length = q.norm(dim=1, keepdim=True)
        H[:, k + 1, k] = length[:, 0]
        basis.append(q / length.clamp_min(1e-30))
        e = torch.zeros(m, k + 2, 1, dtype=b.dtype)
        e[:, 0] = 1
        small = H[:, : k + 2, : k + 1]
        R = torch.linalg.qr(small, mode="complete").Q[:, :, -1:]  # what no step can reach
        if float((R.mT @ e).abs().max()) <= tolerance:
            return k + 1
    return min(cap, n)


def make(name: str, n: int, batch: int, seed: int = 0) -> Problem:
    """The problem of that name: `nonneg-KAPPA`, `ring-KAPPA`, `random-sign` or `monotone`.

    Args:
        name: nonneg-KAPPA has A >= 0 with all row sums KAPPA; ring-KAPPA as well, on 8 neighbours
            around a ring, so that the spectrum is spread out; random-sign has ||A||_inf = 0.99;
            monotone has A = (1 - m) I - W'W + (Z - Z')/2 with m = 0.1, far from contractive.
        n: states.
        batch: samples.
        seed: of all random numbers.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    kind, _, factor = name.rpartition("-")
    contraction = monotone = None
    low, high = 0.5, 4.0  # the levels of z: from 70 % to all of the states are active
    if kind == "nonneg":
        A = torch.rand(n, n, dtype=torch.float64, generator=generator)
        contraction = float(factor)
        A *= contraction / A.sum(1, keepdim=True)
    elif kind == "ring":
        weights = torch.rand(n, 8, dtype=torch.float64, generator=generator)
        near = torch.arange(n)[:, None] + torch.tensor([-4, -3, -2, -1, 1, 2, 3, 4])
        contraction = float(factor)
        A = torch.zeros(n, n, dtype=torch.float64)
        A.scatter_add_(1, near % n, weights * contraction / weights.sum(1, keepdim=True))
    elif name == "random-sign":
        A, contraction = normal(n, n), 0.99
        A *= contraction / A.abs().sum(1).max()
        low, high = 0.0, 2.0
    elif name == "monotone":
        W, Z, monotone = normal(n, n) / n**0.5, normal(n, n) / n**0.5, MARGIN
        A = (1 - monotone) * torch.eye(n, dtype=torch.float64) - W.mT @ W + (Z - Z.mT) / 2
        low, high = 0.0, 2.0
    else:
        raise ValueError(f"problem {name!r}: expected one of {', '.join(NAMES + EXTRA)}")
    A = A.float()
    level = low + (high - low) * torch.rand(batch, 1, dtype=torch.float64, generator=generator)
    level[0] = high  # every batch has the hardest sample
    z = normal(batch, n) + level
    z = torch.where(z.abs() < 0.05, torch.where(z < 0, -0.05, 0.05), z)
    v = (z - z.relu() @ A.double().mT).float()
    return Problem(name, A, v, normal(batch, n).float(), z > 0, contraction, monotone)
