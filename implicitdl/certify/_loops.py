"""What is known of a loop x = phi(A x + z): how far its state moves with z, solver error included.

Let x^ be any point, rho = phi(A x^ + z^) - x^ its residual at z^, and x the equilibrium at z. With
slopes of phi in [0, L], e = x - x^ - rho satisfies e = D (A e + A rho + (z - z^)), D diagonal with
entries in [0, L], hence row by row, and in the 2-norm,

    K |e| <= |A rho| + |z - z^|,     K = diag(1/L - a_ii) - |A off its diagonal|,
    m ||e||_2 <= L ||A rho + (z - z^)||_2,     m = least eigenvalue of I - L (A + A')/2.

Where slopes may be negative only K = I/L - |A| is left. If K is an M-matrix (K v > 0 for a v > 0),
|e| <= K^-1 (...). Nothing is asked of x^: a solver stopped early gives a wider bound.

Reference: El Ghaoui et al. (2021), theorem 3.1; Jafarpour et al. (2021), for the signed diagonal (a
matrix measure row by row); Pabbaraju, Winston and Kolter (2021), for the 2-norm.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..activations import Blocks
from ..implicit import Equation
from ..solvers import FixedPointSolver, get_solver
from ._nodes import EPS, Node


@dataclass(frozen=True, eq=False)
class Loop:
    """A loop's matrix with what it proves."""

    node: Node

    @property
    def A(self) -> Tensor:
        """(n, n)."""
        return self.node.A

    @property
    def slope(self) -> float:
        """L, the Lipschitz constant that goes with `comparison`."""
        return self.node.lipschitz

    @functools.cached_property
    def size(self) -> Tensor:
        """|A|."""
        return self.A.abs()

    @functools.cached_property
    def rows(self) -> Tensor:
        """sum_j |a_ij|.  # (n,)"""
        return self.size.sum(1)

    @functools.cached_property
    def comparison(self) -> Tensor:
        """K.  # (n, n)"""
        n, L = self.A.shape[0], self.slope
        eye = torch.eye(n, dtype=self.A.dtype, device=self.A.device)
        if not math.isfinite(L):
            return -eye
        K = eye / L if L > 0 else eye * 1e300
        if self.node.increasing:
            diagonal = self.A.diagonal()
            off = self.size - torch.diag(diagonal.abs())
            return K - torch.diag(diagonal) - off
        if self.node.entrywise:
            return K - self.size
        # Coupled states: only the largest row counts, |e|_inf (1/L - ||A||_inf) <= ...
        return K - eye * self.rows.max()

    @functools.cached_property
    def weights(self) -> Tensor | None:
        """v > 0 with K v >= 1/2, or None where K is no M-matrix."""
        K = self.comparison
        one = K.new_ones(K.shape[0])
        v = _solve(K, one)
        if v is None or not bool((v > 0).all()) or not bool((v < 1e12).all()):
            return None
        rounding = (K.shape[0] + 8) * EPS * (K.abs() @ v)
        return v if bool((K @ v - rounding >= 0.5).all()) else None

    @functools.cached_property
    def spread(self) -> Tensor | None:
        """K^-1, to multiply many right sides by."""
        if self.weights is None:
            return None
        return torch.linalg.inv(self.comparison).clamp(min=0.0)

    def moved(self, load: Tensor) -> Tensor:
        """At least K^-1 load, for load >= 0.  # (m, n) -> (m, n)

        With R computed and d = max(load - K R, 0) its defect, K (R + v max d / min K v) >= load.
        """
        K, v = self.comparison, self.weights
        R = load @ self.spread.mT
        defect = load - R @ K.mT + (K.shape[0] + 8) * EPS * (R @ K.abs().mT + load)
        worst = defect.clamp(min=0.0).amax(-1, keepdim=True)
        return R + 2 * worst * v * (1 + 8 * EPS)

    @functools.cached_property
    def contraction(self) -> float | None:
        """c < 1 with L |A| v <= c v for the weights, or None."""
        v = self.weights
        if v is None or not self.node.entrywise:
            return None
        c = self.slope * (self.size @ v) / v * (1 + (len(v) + 8) * EPS)
        return float(c.max()) if bool(c.max() < 1) else None

    @functools.cached_property
    def monotone(self) -> float | None:
        """m > 0, rounded down, or None."""
        if not (self.node.increasing or self._symmetric_slopes):
            return None
        sym = (self.A + self.A.mT) * (self.slope / 2)
        n = sym.shape[0]
        top = float(torch.linalg.eigvalsh(sym)[-1])
        m = 1 - top - 4 * n * EPS * (1 + float(torch.linalg.matrix_norm(sym)))
        return m if m > 0 else None

    @property
    def _symmetric_slopes(self) -> bool:
        """Whether the Jacobian of a coupled phi is symmetric with eigenvalues in [0, L]."""
        natural = self.node.natural
        if natural is None:
            return False
        phi = natural[0]
        return phi.symmetric and phi.monotone and phi.lipschitz <= self.slope

    @functools.cached_property
    def norm2(self) -> float:
        """||A||_2, rounded up."""
        return float(torch.linalg.matrix_norm(self.A, 2)) * (1 + self.A.shape[0] * 4 * EPS)

    def euclidean_gain(self) -> float | None:
        """G with ||e||_2 <= G ||A rho + z - z^||_2."""
        L = self.node.lipschitz
        if self.node.natural is not None:
            L = max(L, self.node.natural[0].lipschitz)
        gains = []
        if self.monotone is not None:
            gains.append(L / self.monotone)
        if math.isfinite(L) and L * self.norm2 < 1:
            gains.append(L / (1 - L * self.norm2))
        return min(gains) * (1 + 16 * EPS) if gains else None

    # ---- the equilibrium -------------------------------------------------------------------------

    def equation(self) -> Equation:
        """The facts that a solver may rely on."""
        node = self.node
        phi = Blocks(parts=node.parts) if node.natural is None else node.natural[0]
        if node.natural is None and len(node.parts) == 1:
            phi = node.parts[0][0]
        row = float(self.rows.max()) * phi.infinity_lipschitz
        contraction = row if row < 1 else None
        known = contraction is None and self.slope == 1 and self.monotone is not None
        return Equation(phi, contraction, self.monotone if known else None)

    def solve(self, z: Tensor, solver: "str | FixedPointSolver") -> tuple[Tensor, Tensor]:
        """x^ and |rho|, rounding included, whatever the solver reached.  # (m, n) each"""
        with torch.no_grad():
            solution = get_solver(solver).solve(self.equation().map(self.A, z), None)
            x = solution.value.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            fx = self.node.phi(z + x @ self.A.mT)
            terms = x.abs() @ self.size.mT + z.abs()
            L = self.slope if math.isfinite(self.slope) else 1.0
            rounding = (self.node.fan + 8) * EPS * (L * terms + fx.abs() + x.abs())
            if not self.node.entrywise:
                rounding = rounding.sum(-1, keepdim=True).expand_as(rounding)
            return x, (fx - x).abs() + rounding


def _solve(K: Tensor, b: Tensor) -> Tensor | None:
    x, info = torch.linalg.solve_ex(K, b)
    return x if int(info) == 0 and bool(torch.isfinite(x).all()) else None
