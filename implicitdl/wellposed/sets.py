"""Sets of A for which x = phi(A x + b) has exactly one solution for every b.

Each set is a torch parametrization: `torch.nn.utils.parametrize.register_parametrization` can
keep a weight inside it, with the gradient going through the map.
"""

import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._linalg import perron_root, project_l1, project_matrix_measure, reverse_only
from ..activations import Activation
from ..solution import unknown_name
from ._base import (
    WellPosedSet,
    infinity_bound,
    narrowed,
    number,
    positive_weights,
    refusal,
    widened,
)
from ._nearest import nearest_perron


class StrictlyUpper(WellPosedSet):
    """A_ij = 0 unless block(i) < block(j): feedforward, nilpotent, well-posed for every phi.

    Args:
        sizes: Sizes of the diagonal blocks, in order; None for blocks of one state.

    Raises:
        ValueError: A size is not a positive integer, or there is none.
        TypeError: `sizes` is no sequence.

    Reference:
        El Ghaoui, Gu, Travacca, Askari and Tsai 2021, section 3.2.
    """

    block: Tensor

    def __init__(self, sizes: tuple[int, ...] | None = None):
        super().__init__()
        if sizes is not None and not isinstance(sizes, list | tuple):
            raise TypeError(f"sizes: got {sizes!r}, expected a tuple of positive block sizes")
        if sizes is not None and not (sizes and all(type(n) is int and n > 0 for n in sizes)):
            raise ValueError(f"sizes: got {tuple(sizes)}, expected positive block sizes")
        self.sizes = None if sizes is None else tuple(sizes)
        block = None
        if self.sizes is not None:
            block = torch.repeat_interleave(torch.tensor(self.sizes))
        self.register_buffer("block", block, persistent=False)

    @property
    def states(self) -> int | None:
        return None if self.sizes is None else sum(self.sizes)

    def forward(self, W: Tensor) -> Tensor:
        if self.sizes is None:
            return W.triu(1)
        self.require_states(W.shape[-1])
        block = self.block.to(W.device)
        return torch.where(block[:, None] < block[None, :], W, torch.zeros_like(W))

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


class _Weighted(WellPosedSet):
    """A set given by a bound on rows, with weights v > 0 of the states or without."""

    weights: Tensor | None

    def __init__(self, weights: Tensor | None):
        super().__init__()
        self.register_buffer("weights", positive_weights(weights))

    @property
    def states(self) -> int | None:
        return None if self.weights is None else len(self.weights)

    def _fitting(self, A: Tensor) -> Tensor | None:
        """The weights, where and what A is."""
        self.require_states(A.shape[-1])
        return None if self.weights is None else self.weights.to(A)

    def _rows(self, A: Tensor) -> Tensor:
        """sum_j |A_ij| v_j / v_i.  # (..., n)"""
        v = self._fitting(A)
        # A sum and not a product: autocast would take a product in half precision.
        return A.abs().sum(-1) if v is None else (A.abs() * v).sum(-1) / v


class _RowBall(_Weighted):
    """max_i sum_j |A_ij| v_j / v_i <= kappa, v = ones without weights."""

    keeps_rank = True

    def __init__(self, kappa: float, weights: Tensor | None):
        super().__init__(weights)
        self.kappa = number("kappa", kappa, 0.0, float("inf"))

    def margin(self, A: Tensor) -> Tensor:
        if A.shape[-1] == 0:
            return A.new_full(A.shape[:-2], self.kappa)
        return self.kappa - self._rows(widened(A)).amax(-1)

    def forward(self, W: Tensor) -> Tensor:
        wide = widened(W)
        rows = self._rows(wide)
        # A quotient of equal numbers is exactly 1: inside the ball this is the identity.
        scale = torch.full_like(rows, self.kappa) / rows.clamp_min(self.kappa)
        return narrowed(wide * scale[..., None], W.dtype)

    @torch.no_grad()
    def project(self, A: Tensor) -> Tensor:
        wide = widened(A)
        v = self._fitting(wide)
        radius = self.kappa if v is None else self.kappa * v
        return narrowed(project_l1(wide, radius, v), A.dtype)

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
        kappa: Radius; kappa times the Lipschitz constant of phi must be below 1, which `check`
            and layers ask for: below 1 for ReLU or tanh, below 4 for the sigmoid.

    Raises:
        ValueError: kappa is not positive and finite.
        TypeError: kappa is no number.

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
    the gradient through the eigenvalue, and `project` ends in a local minimum of the distance, the
    best of three: the nearest point of a non-convex set is not to be had in general.

    Args:
        kappa: Bound on the Perron root of |A|; times the largest slope of phi it must be below 1,
            which `check` and layers ask for.
        weights: v > 0, one a state, or None.

    Raises:
        ValueError: kappa is not positive and finite, or weights are no positive vector.
        TypeError: kappa or weights are no numbers.

    Reference:
        El Ghaoui, Gu, Travacca, Askari and Tsai 2021, theorem 2.8 and section 3.3.
    """

    def __init__(self, kappa: float = 0.95, weights: Tensor | None = None):
        super().__init__(kappa, weights)

    def margin(self, A: Tensor) -> Tensor:
        if self.weights is not None or A.shape[-1] == 0:
            return super().margin(A)
        return self.kappa - perron_root(widened(A).abs())

    def forward(self, W: Tensor) -> Tensor:
        if self.weights is not None or W.shape[-1] == 0:
            return super().forward(W)
        wide = widened(W)
        scale = self.kappa / perron_root(wide.abs()).clamp_min(self.kappa)
        return narrowed(wide * scale[..., None, None], W.dtype)

    @torch.no_grad()
    def project(self, A: Tensor) -> Tensor:
        """The nearest member for fixed weights. Without weights a local minimum of the distance,
        where another member may be nearer: the problem is not convex (see the class)."""
        if self.weights is not None or A.shape[-1] == 0:
            return super().project(A)
        flat = [
            a.clone()
            if float(perron_root(widened(a).abs())) <= self.kappa
            else narrowed(nearest_perron(a.to(torch.float64), self.kappa), a.dtype)
            for a in A.reshape(-1, *A.shape[-2:])
        ]
        return torch.stack(flat).reshape(A.shape) if flat else A.clone()

    def check(self, phi: Activation) -> None:
        _check_ball(self, phi, self.kappa, entrywise=True)


class MatrixMeasure(_Weighted):
    """max_i A_ii + sum_{j != i} |A_ij| v_j / v_i <= gamma < 1: for phi with slopes in [0, 1].

    Rows may be far longer than 1 as long as the diagonal is negative enough. Picard need not
    converge; the averaged iteration and Newton's method do. `forward` lowers the diagonal of
    each row that is outside; `project` is the nearest point.

    Args:
        gamma: Bound on the matrix measure mu_{inf, v}(A); times the largest slope of phi it must
            be below 1, which `check` and layers ask for.
        weights: v > 0, one a state; None for ones.

    Raises:
        ValueError: gamma is not finite, or weights are no positive vector.
        TypeError: gamma or weights are no numbers.

    Reference:
        Jafarpour, Davydov, Proskurnikov and Bullo 2021 (NEMON), theorem 1 and lemma 7.
    """

    def __init__(self, gamma: float = 0.95, weights: Tensor | None = None):
        super().__init__(weights)
        self.gamma = number("gamma", gamma, -float("inf"), float("inf"))

    def _excess(self, A: Tensor) -> Tensor:
        """A_ii + sum_{j != i} |A_ij| v_j / v_i - gamma.  # (..., n)"""
        diagonal = A.diagonal(dim1=-2, dim2=-1)
        return diagonal + self._rows(A - torch.diag_embed(diagonal)) - self.gamma

    def margin(self, A: Tensor) -> Tensor:
        if A.shape[-1] == 0:
            return A.new_ones(A.shape[:-2])
        return -self._excess(widened(A)).amax(-1)

    def forward(self, W: Tensor) -> Tensor:
        wide = widened(W)
        lower = wide - torch.diag_embed(self._excess(wide).clamp_min(0))
        return narrowed(lower, W.dtype, diagonal_down=True)

    @torch.no_grad()
    def project(self, A: Tensor) -> Tensor:
        wide = widened(A)
        nearest = project_matrix_measure(wide, self.gamma, self._fitting(wide))
        return narrowed(nearest, A.dtype, diagonal_down=True)

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
        with torch.autocast(S.device.type, enabled=False):
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

    Raises:
        ValueError: m is not positive and finite.
        TypeError: m is no number.

    Reference:
        Winston and Kolter 2020, theorem 1; Higham 1988 (the projection).
    """

    def __init__(self, m: float = 0.1):
        super().__init__()
        self.m = number("m", m, 0.0, float("inf"))

    def margin(self, A: Tensor) -> Tensor:
        if A.shape[-1] == 0:
            return A.new_ones(A.shape[:-2])
        A = widened(A)
        return (1 - self.m) - torch.linalg.eigvalsh((A + A.mT) / 2)[..., -1]

    def forward(self, W: Tensor) -> Tensor:
        if W.shape[-1] == 0:
            return W
        compiled = reverse_only("Clipping of eigenvalues")
        rule = _SpectralExcessReverse if compiled else _SpectralExcess
        wide = widened(W)
        A = wide - rule.apply((wide + wide.mT) / 2, 1 - self.m)
        if A.dtype == W.dtype:
            return A
        # Rounding adds E to the symmetric part, and E <= diag(sum_j |E_ij|): taken off again.
        error = narrowed(A.detach(), W.dtype).to(A.dtype) - A.detach()
        error = (error + error.mT).abs() / 2
        off = error.sum(-1) - error.diagonal(dim1=-2, dim2=-1)
        return narrowed(A - torch.diag_embed(off), W.dtype, diagonal_down=True)

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
