"""What every set of well-posed matrices is, and the checks of arguments that they share."""

import abc
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import Activation
from ..solution import NotWellPosedError


class WellPosedSet(nn.Module, abc.ABC):
    """A set of square matrices with a differentiable map into it, a projection and a slack.

    Members are independent of the activation; `check(phi)` says whether membership implies
    well-posedness for phi, and `facts(phi)` what a solver may then rely on.
    """

    # Whether `forward` keeps the rank of W: scaling rows does, taking out eigenvalues does not.
    keeps_rank: bool = False

    @property
    def states(self) -> int | None:
        """The number of states that the set is for; None where it takes any number."""
        return None

    def require_states(self, n: int) -> None:
        """Return for matrices (n, n) that the set is for.

        Raises:
            ValueError: It was made with weights or block sizes for another number of states.
        """
        if self.states not in (None, n):
            raise ValueError(
                f"A has {n} states, but {self} is for {self.states}: give one weight a state, or "
                "block sizes that add up to the number of states"
            )

    @abc.abstractmethod
    def margin(self, A: Tensor) -> Tensor:  # (..., n, n) -> (...)
        """Signed slack: > 0 strictly inside, 0 on the boundary, < 0 outside."""

    @abc.abstractmethod
    def forward(self, W: Tensor) -> Tensor:  # (..., n, n) -> (..., n, n)
        """Differentiable map of any square W into the set; the identity inside it."""

    @abc.abstractmethod
    def project(self, A: Tensor) -> Tensor:  # (..., n, n) -> (..., n, n)
        """The nearest member in the Frobenius norm, without gradient; of a non-convex set (see
        `PerronFrobenius`) one that is nearest among its neighbours."""

    @abc.abstractmethod
    def check(self, phi: Activation) -> None:
        """Raise ValueError, with the way out, where membership does not make phi well-posed."""

    @abc.abstractmethod
    def facts(self, phi: Activation) -> dict[str, Any]:
        """What membership guarantees for phi.

        Returns:
            `contraction`: the factor by which x -> phi(A x + b) contracts in the set's norm, or
            None; `strongly_monotone`: m > 0 with sym(I - A) >= m I where a monotone splitting
            may be used, or None; `acyclic`: whether the state is reached without iteration.

        Raises:
            ValueError: Membership does not make phi well-posed, as in `check`.
        """

    def right_inverse(self, A: Tensor) -> Tensor:
        """Assigning to a parametrized weight stores the nearest member of the set."""
        return self.project(A)

    def contains(self, A: Tensor, tol: float = 1e-6) -> bool:
        """Whether the margin is at least -tol, for every matrix of the batch."""
        return bool((self.margin(A.detach()) >= -tol).all())

    def require(self, A: Tensor, tol: float = 1e-6) -> Tensor:
        """Return A, or refuse it.

        Raises:
            NotWellPosedError: A is outside the set by more than `tol`; it carries `.margin`.
        """
        if not self.contains(A, tol):
            margin = float(self.margin(A.detach()).min())
            raise NotWellPosedError(
                f"A is outside {self}: margin {margin:.6g}, expected at least {-tol:g}; "
                f"bring it back with `.project(A)`",
                margin=margin,
            )
        return A


def number(name: str, value: float, low: float, high: float) -> float:
    """A float strictly between low and high, or a ValueError; TypeError for no number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {value!r}, expected a number in ({low:g}, {high:g})")
    if not low < value < high:
        raise ValueError(f"{name}: got {value}, expected a number in ({low:g}, {high:g})")
    return float(value)


def positive_weights(weights: Any) -> Tensor | None:
    """A private copy of the weights.

    Raises:
        TypeError: They are no tensor and no sequence of numbers.
        ValueError: They are no vector of positive finite numbers.
    """
    if weights is None:
        return None
    try:
        weights = torch.as_tensor(weights).detach()
    except (TypeError, ValueError):
        raise TypeError(
            f"weights: got {weights!r}, expected a vector of positive numbers, one a state"
        ) from None
    if weights.dim() != 1 or not bool(((weights > 0) & weights.isfinite()).all()):
        smallest = f" with smallest entry {float(weights.min()):g}" if weights.numel() else ""
        raise ValueError(
            f"weights: expected a vector of positive finite numbers, one a state; got shape "
            f"{tuple(weights.shape)}{smallest}"
        )
    return weights.clone()


def widened(A: Tensor) -> Tensor:
    """A in at least float32: sums of a row in half precision say little of its length."""
    return A.float() if A.dtype in (torch.float16, torch.bfloat16) else A


def narrowed(A: Tensor, dtype: torch.dtype, diagonal_down: bool = False) -> Tensor:
    """A in `dtype`, no entry larger in size; with `diagonal_down`, no diagonal entry larger.

    Rounding to nearest would lengthen rows beyond the bound that a solver is told. The gradient
    is that of a plain cast.
    """
    if A.dtype == dtype:
        return A
    x = A.detach()
    shorter = x.sign() * _rounded_down(x.abs(), dtype)
    if diagonal_down:
        down = _rounded_down(x.diagonal(dim1=-2, dim2=-1), dtype)
        shorter = shorter + torch.diag_embed(down - shorter.diagonal(dim1=-2, dim2=-1))
    return (A + (shorter - x)).to(dtype)


def _rounded_down(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The next number below or at x that `dtype` has, in the dtype of x."""
    info = torch.finfo(dtype)
    near = x.to(dtype).to(x.dtype)
    # A whole unit less, and one of the smallest numbers: to nearest, this cannot come out above x.
    less = x - x.abs() * info.eps - info.tiny * info.eps
    return torch.where(near > x, less.to(dtype).to(x.dtype), near)


def infinity_bound(phi: Activation, entrywise: bool = False) -> float:
    """Lipschitz constant of phi in the infinity norm; infinite where it declares none, or where
    an argument that needs phi entry by entry meets a block activation."""
    if entrywise and not phi.entrywise:
        return float("inf")
    return phi.infinity_lipschitz


def refusal(this: WellPosedSet, phi: Activation, why: str, way_out: str) -> ValueError:
    """The error for an activation that a set does not make well-posed, with the way out."""
    return ValueError(
        f"{this} does not make x = phi(A x + b) well-posed for {phi}: {why}; {way_out}"
    )
