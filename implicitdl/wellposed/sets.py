"""Sets of A for which x = phi(A x + b) has exactly one solution for every b.

Each set is a torch parametrization: `torch.nn.utils.parametrize.register_parametrization` can
keep a weight inside it, with the gradient going through the map.
"""

import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._linalg import perron_root, project_l1, project_matrix_measure
from ..activations import Activation
from ..solution import unknown_name
from ._base import WellPosedSet, infinity_bound, number, positive_weights, refusal


class StrictlyUpper(WellPosedSet):
    """A_ij = 0 unless block(i) < block(j): feedforward, nilpotent, well-posed for every phi.

    Args:
        sizes: Sizes of the diagonal blocks, in order; None for blocks of one state.

    Reference:
        El Ghaoui, Gu, Travacca, Askari and Tsai 2021, section 3.2.
    """

    block: Tensor

    def __init__(self, sizes: tuple[int, ...] | None = None):
        super().__init__()
        if sizes is not None and (len(sizes) == 0 or min(sizes) < 1):
            raise ValueError(f"sizes: got {tuple(sizes)}, expected positive block sizes")
        self.sizes = None if sizes is None else tuple(map(int, sizes))
        block = None
        if self.sizes is not None:
            block = torch.repeat_interleave(torch.tensor(self.sizes))
        self.register_buffer("block", block, persistent=False)

    def forward(self, W: Tensor) -> Tensor:
        if self.sizes is None:
            return W.triu(1)
        if W.shape[-1] != sum(self.sizes):
            raise ValueError(
                f"A has {W.shape[-1]} states, but the block sizes {self.sizes} add up to "
                f"{sum(self.sizes)}: pass the sizes of this A"
            )
        return torch.where(self.block[:, None] < self.block[None, :], W, torch.zeros_like(W))

    @torch.no_grad()
    def project(self, A: Tensor) -> Tensor:
        return self.forward(A)

    def margin(self, A: Tensor) -> Tensor:
        outside = (A - self.forward(A)).abs().flatten(-2)
        return -outside.amax(-1) if outside.shape[-1] else A.new_zeros(A.shape[:-2])

    def contains(self, A: Tensor, tol: float = 0.0) -> bool:
        """Whether the entries outside the pattern are at most tol; 0 asks for exact zeros."""
        return super().contains(A, tol)

    def require(self, A: Tensor, tol: float = 0.0) -> Tensor:
        return super().require(A, tol)

    def check(self, phi: Activation) -> None:
        if phi.entrywise:
            return
        # A block activation couples its own states: its block must lie inside one of ours.
        parts = () if phi.size is None else phi.blocks(phi.size)
        inside = self.sizes is not None and bool(parts)
        if inside:
            edges = set(np.cumsum((0, *self.sizes)).tolist())
            start = 0
            for part, n in parts:
                if not part.entrywise and not edges.isdisjoint(range(start + 1, start + n)):
                    inside = False
                start += n
        if not inside:
            raise refusal(
                self, phi, "it couples states of different blocks",
                "give `sizes` whose blocks hold each block of the activation",
            )  # fmt: skip

    def facts(self, phi: Activation) -> dict[str, Any]:
        self.check(phi)
        return {"contraction": None, "strongly_monotone": None, "acyclic": True}

    def extra_repr(self) -> str:
        return "" if self.sizes is None else f"sizes={self.sizes}"


def _fitting(weights: Tensor, A: Tensor) -> Tensor:
    """The weights, where and what A is, if there is one a state."""
    if len(weights) != A.shape[-1]:
        raise ValueError(
            f"A has {A.shape[-1]} states, but the set was made with {len(weights)} weights: pass "
            "one weight a state"
        )
    return weights.to(A)


class _RowBall(WellPosedSet):
    """max_i sum_j |A_ij| v_j / v_i <= kappa, v = ones without weights."""

    weights: Tensor | None
    keeps_rank = True

    def __init__(self, kappa: float, weights: Tensor | None):
        super().__init__()
        self.kappa = number("kappa", kappa, 0.0, float("inf"))
        self.register_buffer("weights", positive_weights(weights))

    def _rows(self, A: Tensor) -> Tensor:
        """sum_j |A_ij| v_j / v_i.  # (..., n)"""
        if self.weights is None:
            return A.abs().sum(-1)
        v = _fitting(self.weights, A)
        return (A.abs() @ v) / v

    def margin(self, A: Tensor) -> Tensor:
        if A.shape[-1] == 0:
            return A.new_full(A.shape[:-2], self.kappa)
        return self.kappa - self._rows(A).amax(-1)

    def forward(self, W: Tensor) -> Tensor:
        rows = self._rows(W)
        # A quotient of equal numbers is exactly 1: inside the ball this is the identity.
        return W * (torch.full_like(rows, self.kappa) / rows.clamp_min(self.kappa))[..., None]

    @torch.no_grad()
    def project(self, A: Tensor) -> Tensor:
        if self.weights is None:
            return project_l1(A, self.kappa)
        v = _fitting(self.weights, A)
        return project_l1(A, self.kappa * v, v)

    def facts(self, phi: Activation) -> dict[str, Any]:
        self.check(phi)
        c = self.kappa * infinity_bound(phi)
        return {"contraction": c, "strongly_monotone": None, "acyclic": False}

    def extra_repr(self) -> str:
        tail = "" if self.weights is None else f", weights=({len(self.weights)} states)"
        return f"kappa={self.kappa:g}{tail}"


def _check_ball(this: WellPosedSet, phi: Activation, kappa: float, entrywise: bool) -> None:
    bound = infinity_bound(phi, entrywise)
    if bound == float("inf"):
        raise refusal(
            this, phi, "its Lipschitz constant in the infinity norm is not known here",
            "use `Monotone`, or certify each matrix with `certificate`",
        )  # fmt: skip
    if kappa * bound >= 1:
        raise refusal(
            this, phi, f"kappa times the Lipschitz constant is {kappa:g} * {bound:.6g} >= 1",
            f"take kappa < {1 / bound:.6g}",
        )  # fmt: skip


class InfNormBall(_RowBall):
    """max_i sum_j |A_ij| <= kappa: the Picard map contracts by kappa Lip(phi).

    `forward` scales each long row down to length kappa; `project` soft-thresholds it, which is
    the nearest point and sets small entries to zero.

    Args:
        kappa: Radius; kappa times the Lipschitz constant of phi must be below 1.

    Example:
        >>> ball = InfNormBall(kappa=0.5)
        >>> ball(torch.tensor([[3.0, 1.0], [0.1, 0.2]]))
        tensor([[0.3750, 0.1250],
                [0.1000, 0.2000]])

    Reference:
        El Ghaoui, Gu, Travacca, Askari and Tsai 2021, section 3.3 (convex sufficient condition).
    """

    def __init__(self, kappa: float = 0.95):
        super().__init__(kappa, None)

    def check(self, phi: Activation) -> None:
        _check_ball(self, phi, self.kappa, entrywise=False)


class PerronFrobenius(_RowBall):
    """lambda_pf(|A|) <= kappa: some weighted infinity norm of A is at most kappa.

    With `weights` v the set is {|A| v <= kappa v}, convex, with exact projection. Without, it is
    the whole (non-convex) Perron-Frobenius set: `forward` scales W by kappa / lambda_pf(|W|) with
    the gradient through the eigenvalue, and `project` ends in a local minimum of the distance: the
    nearest point of a non-convex set is not to be had in general.

    Args:
        kappa: Bound on the Perron root of |A|.
        weights: v > 0, one a state, or None.

    Reference:
        El Ghaoui, Gu, Travacca, Askari and Tsai 2021, theorem 2.8 and section 3.3.
    """

    def __init__(self, kappa: float = 0.95, weights: Tensor | None = None):
        super().__init__(kappa, weights)

    def margin(self, A: Tensor) -> Tensor:
        if self.weights is not None or A.shape[-1] == 0:
            return super().margin(A)
        return self.kappa - perron_root(A.abs())

    def forward(self, W: Tensor) -> Tensor:
        if self.weights is not None or W.shape[-1] == 0:
            return super().forward(W)
        return W * (self.kappa / perron_root(W.abs()).clamp_min(self.kappa))[..., None, None]

    @torch.no_grad()
    def project(self, A: Tensor) -> Tensor:
        """The nearest member for fixed weights; without weights a local minimum of the distance.

        For every v > 0 the projection onto {|P| v <= kappa v} lies in the set, and the projection
        onto the set is one of these. The squared distance is minimised over log v; by the envelope
        theorem its gradient is (|P|' theta - kappa theta) v with the row multipliers theta. Where
        it vanishes, theta is a left Perron vector of |P| and A - P a normal of the set.
        """
        if self.weights is not None or A.shape[-1] == 0:
            return super().project(A)
        flat = [self._nearest(a) for a in A.reshape(-1, *A.shape[-2:])]
        return torch.stack(flat).reshape(A.shape) if flat else A.clone()

    def _nearest(self, A: Tensor) -> Tensor:
        from scipy.optimize import minimize

        root = float(perron_root(A.abs()))
        if root <= self.kappa:
            return A.clone()
        a = A.detach().to(torch.float64)
        size = a.abs()
        eye = torch.eye(len(a), dtype=a.dtype, device=a.device)
        start = torch.linalg.solve(1.01 * root * eye - size, torch.ones_like(a[:, 0])).clamp_min(
            1e-12
        )

        def distance(log_v: np.ndarray) -> tuple[float, np.ndarray]:
            v = torch.from_numpy(log_v).to(a.device).exp()
            p = project_l1(a, self.kappa * v, v)
            # The multiplier of row i, from any entry that the threshold moved: |a| - |p| = t v.
            theta = ((size - p.abs()) / v).amax(-1)
            slope = (p.abs().mT @ theta - self.kappa * theta) * v
            return 0.5 * float(((a - p) ** 2).sum()), slope.cpu().numpy()

        log_v = (start / start.max()).log().cpu().numpy()
        # Entries further apart than this change nothing in float32 and overflow the weights.
        box = [(-30.0, 30.0)] * len(log_v)
        found = minimize(
            distance,
            log_v,
            jac=True,
            method="L-BFGS-B",
            bounds=box,
            options={"maxiter": 200 if len(log_v) <= 256 else 30},
        )
        v = torch.from_numpy(found.x).to(a.device).exp()
        return project_l1(a, self.kappa * v, v).to(A.dtype)

    def check(self, phi: Activation) -> None:
        _check_ball(self, phi, self.kappa, entrywise=True)


class MatrixMeasure(WellPosedSet):
    """max_i A_ii + sum_{j != i} |A_ij| v_j / v_i <= gamma < 1: for phi with slopes in [0, 1].

    Rows may be far longer than 1 as long as the diagonal is negative enough. Picard need not
    converge; the averaged iteration and Newton's method do. `forward` lowers the diagonal of
    each row that is outside; `project` is the nearest point.

    Args:
        gamma: Bound on the matrix measure mu_{inf, v}(A).
        weights: v > 0, one a state; None for ones.

    Reference:
        Jafarpour, Davydov, Proskurnikov and Bullo 2021 (NEMON), theorem 1 and lemma 7.
    """

    weights: Tensor | None

    def __init__(self, gamma: float = 0.95, weights: Tensor | None = None):
        super().__init__()
        self.gamma = number("gamma", gamma, -float("inf"), float("inf"))
        self.register_buffer("weights", positive_weights(weights))

    def _excess(self, A: Tensor) -> Tensor:
        """A_ii + sum_{j != i} |A_ij| v_j / v_i - gamma.  # (..., n)"""
        diagonal = A.diagonal(dim1=-2, dim2=-1)
        off = (A - torch.diag_embed(diagonal)).abs()
        if self.weights is None:
            rows = off.sum(-1)
        else:
            v = _fitting(self.weights, A)
            rows = (off @ v) / v
        return diagonal + rows - self.gamma

    def margin(self, A: Tensor) -> Tensor:
        if A.shape[-1] == 0:
            return A.new_ones(A.shape[:-2])
        return -self._excess(A).amax(-1)

    def forward(self, W: Tensor) -> Tensor:
        return W - torch.diag_embed(self._excess(W).clamp_min(0))

    @torch.no_grad()
    def project(self, A: Tensor) -> Tensor:
        v = None if self.weights is None else _fitting(self.weights, A)
        return project_matrix_measure(A, self.gamma, v)

    def check(self, phi: Activation) -> None:
        low, high = phi.slope
        if not phi.entrywise or low < 0:
            raise refusal(
                self, phi, f"it needs an entrywise phi with slopes >= 0, this one has "
                f"[{low:.6g}, {high:.6g}]{'' if phi.entrywise else ' and couples states'}",
                "use `InfNormBall` with kappa times its Lipschitz constant below 1",
            )  # fmt: skip
        if self.gamma * high >= 1:
            raise refusal(
                self, phi, f"gamma times the largest slope is {self.gamma:g} * {high:.6g} >= 1",
                f"take gamma < {1 / high:.6g}",
            )  # fmt: skip

    def facts(self, phi: Activation) -> dict[str, Any]:
        self.check(phi)
        return {"contraction": None, "strongly_monotone": None, "acyclic": False}

    def extra_repr(self) -> str:
        tail = "" if self.weights is None else f", weights=({len(self.weights)} states)"
        return f"gamma={self.gamma:g}{tail}"


class _SpectralExcessReverse(torch.autograd.Function):
    """V max(lambda - c, 0) V' of a symmetric S = V diag(lambda) V'.

    The derivative is the Daleckii-Krein formula V (K o V' G V) V' with the divided differences K
    in [0, 1]: finite for repeated eigenvalues, where differentiating V would divide by zero.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(S: Tensor, c: float) -> Tensor:
        value, V = torch.linalg.eigh(S)
        return (V * (value - c).clamp_min(0)[..., None, :]) @ V.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])
        ctx.c = inputs[1]

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> Any:  # type: ignore[override]
        return _excess_derivative(ctx.saved_tensors[0], ctx.c, G), None


class _SpectralExcess(_SpectralExcessReverse):
    """With forward mode, too, which a compiled graph does not admit."""

    @staticmethod
    def jvp(ctx: Any, dS: Tensor, *_: Any) -> Tensor:  # type: ignore[override]
        return _excess_derivative(ctx.saved_tensors[0], ctx.c, dS)


def _excess_derivative(S: Tensor, c: float, G: Tensor) -> Tensor:
    """V (K o V' G V) V', which is its own adjoint."""
    with torch.autocast(S.device.type, enabled=False):
        value, V = torch.linalg.eigh(S)
        f = (value - c).clamp_min(0)
        # Two eigenvalues on the same side of c give exactly 1 or 0; on different sides they differ.
        above = value > c
        same = above[..., :, None] == above[..., None, :]
        gap = value[..., :, None] - value[..., None, :]
        rise = f[..., :, None] - f[..., None, :]
        side = above[..., :, None].to(S.dtype).expand_as(gap)
        K = torch.where(same, side, rise / torch.where(same, torch.ones_like(gap), gap))
        G = ((G + G.mT) / 2).to(S.dtype)
        return V @ (K * (V.mT @ G @ V)) @ V.mT


class Monotone(WellPosedSet):
    """(A + A')/2 <= (1 - m) I: I - A strongly monotone, for phi with slopes in [0, 1].

    Nothing is asked of the antisymmetric part. `forward` and `project` both clip the eigenvalues
    of the symmetric part at 1 - m, which is the nearest point, and is differentiable through.

    Args:
        m: Strong monotonicity constant, > 0.

    Reference:
        Winston and Kolter 2020, theorem 1; Higham 1988 (the projection).
    """

    def __init__(self, m: float = 0.1):
        super().__init__()
        self.m = number("m", m, 0.0, float("inf"))

    def margin(self, A: Tensor) -> Tensor:
        if A.shape[-1] == 0:
            return A.new_ones(A.shape[:-2])
        return (1 - self.m) - torch.linalg.eigvalsh((A + A.mT) / 2)[..., -1]

    def forward(self, W: Tensor) -> Tensor:
        if W.shape[-1] == 0:
            return W
        rule = _SpectralExcessReverse if torch.compiler.is_compiling() else _SpectralExcess
        return W - rule.apply((W + W.mT) / 2, 1 - self.m)

    @torch.no_grad()
    def project(self, A: Tensor) -> Tensor:
        return self.forward(A)

    def check(self, phi: Activation) -> None:
        low, high = phi.slope
        if low < 0 or high * (1 - self.m) >= 1:
            raise refusal(
                self, phi, f"it needs slopes >= 0 and (1 - m) times the largest slope below 1, "
                f"this one has [{low:.6g}, {high:.6g}]",
                "use a monotone activation, or `InfNormBall` with a smaller kappa",
            )  # fmt: skip

    def facts(self, phi: Activation) -> dict[str, Any]:
        self.check(phi)
        # Splittings read phi as a proximity operator, which slopes above 1 are not.
        monotone = self.m if phi.nonexpansive else None
        return {"contraction": None, "strongly_monotone": monotone, "acyclic": False}

    def extra_repr(self) -> str:
        return f"m={self.m:g}"


_SETS: dict[str, type[WellPosedSet]] = {
    "inf-norm": InfNormBall,
    "perron-frobenius": PerronFrobenius,
    "matrix-measure": MatrixMeasure,
    "monotone": Monotone,
    "strictly-upper": StrictlyUpper,
}


def get_well_posed(well_posed: str | WellPosedSet, **options: Any) -> WellPosedSet:
    """The set of that name, made with `options`; a set is returned as it is.

    Args:
        well_posed: "inf-norm", "perron-frobenius", "matrix-measure", "monotone",
            "strictly-upper", or a `WellPosedSet`.
        options: Arguments of the set's constructor, such as `kappa=0.9`.

    Raises:
        ValueError: An unknown name or option, with the nearest valid one.
        TypeError: Neither a name nor a set, or options beside a set.
    """
    if isinstance(well_posed, WellPosedSet):
        if options:
            raise TypeError(f"got options {sorted(options)} beside a finished set {well_posed}")
        return well_posed
    if not isinstance(well_posed, str):
        raise TypeError(
            f"well_posed: got {type(well_posed).__name__}, expected a name or a WellPosedSet object"
        )
    if well_posed not in _SETS:
        raise unknown_name("well_posed", well_posed, list(_SETS))
    cls = _SETS[well_posed]
    valid = [p for p in inspect.signature(cls.__init__).parameters if p != "self"]
    for name in options:
        if name not in valid:
            raise unknown_name(f"option of well_posed={well_posed!r}", name, valid)
    return cls(**options)
