"""What every set of well-posed matrices is, and the checks of arguments that they share."""

import abc
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
        """What membership guarantees for phi, once `check(phi)` has passed.

        Returns:
            `contraction`: the factor by which x -> phi(A x + b) contracts in the set's norm, or
            None; `strongly_monotone`: m > 0 with sym(I - A) >= m I where a monotone splitting
            may be used, or None; `acyclic`: whether the state is reached without iteration.
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
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: got {value!r}, expected a number in ({low:g}, {high:g})")
    if not low < value < high:
        raise ValueError(f"{name}: got {value}, expected a number in ({low:g}, {high:g})")
    return float(value)


def positive_weights(weights: Tensor | None) -> Tensor | None:
    """A private copy of the weights, or a ValueError where they are no positive vector."""
    if weights is None:
        return None
    weights = torch.as_tensor(weights).detach()
    if weights.dim() != 1 or not bool(((weights > 0) & weights.isfinite()).all()):
        raise ValueError(
            f"weights: expected a vector of positive finite numbers, one a state; got shape "
            f"{tuple(weights.shape)} with smallest entry {float(weights.min()):g}"
        )
    return weights.clone()


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
