"""The penalty in place of the equation x = phi(z): one divergence for every monotone activation.

    D(x, z) = F(z) + F*(x) - <x, z> >= 0,  zero iff x = phi(z),        F' = phi
    grad_z D = phi(z) - x                        no derivative of phi
    F beta-smooth, beta the largest slope  =>  D(x, z) >= |x - phi(z)|^2 / (2 beta)

It is convex in x and in z; Fenchel lifted networks, lifted proximal operator machines and lifted
Bregman training all use it. A loss is such a penalty, too: cross-entropy is that of softmax (up to
the entropy of the labels), half the squared error that of the identity.

Reference: Gu, Askari, El Ghaoui (2020), section 3; Li et al. (2019), equation 8; Wang, Benning
(2022), equation 6; Carreira-Perpinan, Wang (2014) for the quadratic penalty; Askari, Negiar,
Sambharya, El Ghaoui (2018), equation 5, for the first lifted one.
"""

import abc
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..activations import Activation
from ..solution import unknown_name


@dataclass(frozen=True, kw_only=True)
class Penalty(abc.ABC):
    """How far x is from phi(z): a value a sample, its gradient in z, and steps in x.

    Attributes:
        convex: whether it is convex in z, so that W-steps are convex programs.
        divergence: whether it is the Fenchel divergence, whose minimum over x is zero.
    """

    convex = True
    divergence = False

    @abc.abstractmethod
    def check(self, phi: Activation, value: bool = True) -> None:
        """Return for an activation that the penalty is defined for.

        Args:
            phi: the activation.
            value: whether the value is needed, or its gradient alone.

        Raises:
            ValueError: it is not, with the reason and the way out.
        """

    @abc.abstractmethod
    def value(self, phi: Activation, x: Tensor, z: Tensor) -> Tensor:  # (m, *), (m, *) -> (m,)
        """The penalty of each sample."""

    @abc.abstractmethod
    def residual(
        self, phi: Activation, x: Tensor, z: Tensor, image: Tensor | None = None
    ) -> Tensor:
        """The gradient in z; `image` is phi(z), where it is known."""

    @abc.abstractmethod
    def target(self, phi: Activation, z: Tensor, s: Tensor) -> Tensor:
        """argmin_x penalty(x, z) + <s, x>: the proximal sweep's step."""

    @abc.abstractmethod
    def minimise(self, phi: Activation, z: Tensor, q: Tensor, L: float) -> Tensor:
        """argmin_x penalty(x, z) + L |x|^2 / 2 - <q, x>: a proximal gradient step, L >= 0."""

    @abc.abstractmethod
    def curvature(self, phi: Activation) -> float:
        """beta: the penalty's gradient in z has that Lipschitz constant. Where the penalty is not
        `convex` a first guess, to be doubled until a step lowers the value."""

    @abc.abstractmethod
    def strong(self, phi: Activation) -> float:
        """The strong convexity in x."""


@dataclass(frozen=True, kw_only=True)
class Fenchel(Penalty):
    """D(x, z) = F(z) + F*(x) - <x, z>, for activations that are gradients of convex functions."""

    divergence = True

    def check(self, phi: Activation, value: bool = True) -> None:
        """As in `Penalty`."""
        if not (phi.monotone and phi.symmetric):
            low, high = phi.slope
            reason = (
                f"has slope range ({low:.6g}, {high:.6g}), so it is not monotone"
                if phi.symmetric
                else "has a Jacobian that is not symmetric"
            )
            raise ValueError(
                f"penalty: {phi} {reason} and is not the gradient of a convex function: it has no "
                "Fenchel divergence. Take penalty='quadratic', which needs none, or a monotone "
                "activation such as ReLU, Softplus or Tanh; average pooling for max-pooling."
            )
        if not value:
            return
        zero = torch.zeros(1, phi.size or 2)
        try:
            phi.divergence(phi(zero), zero)
        except NotImplementedError as error:
            raise ValueError(
                f"penalty: {phi} does not define its divergence ({error}), which 'fenchel' needs; "
                "write `potential` and `conjugate`, or take penalty='quadratic'."
            ) from error

    def value(self, phi: Activation, x: Tensor, z: Tensor) -> Tensor:
        """D(x, z)."""
        return phi.divergence(x.flatten(1), z.flatten(1))

    def residual(
        self, phi: Activation, x: Tensor, z: Tensor, image: Tensor | None = None
    ) -> Tensor:
        """phi(z) - x."""
        return (phi(z) if image is None else image) - x

    def target(self, phi: Activation, z: Tensor, s: Tensor) -> Tensor:
        """phi(z - s)."""
        return phi(z - s)

    def minimise(self, phi: Activation, z: Tensor, q: Tensor, L: float) -> Tensor:
        """x = phi(w) with w + L x = z + q, the proximity operator of F* - |x|^2 / 2."""
        if L == 0.0:
            return phi(z + q)
        beta = phi.slope[1]
        if beta <= 1.0:
            return phi.prox((z + q) / (1 + L), 1 / (1 + L))
        # phi / beta is non-expansive: w + (L beta) (phi(w) / beta) = z + q.
        L = L * beta
        return beta * _Shrunk(phi=phi, by=beta).prox((z + q) / (1 + L), 1 / (1 + L))

    def curvature(self, phi: Activation) -> float:
        """The largest slope."""
        return phi.slope[1]

    def strong(self, phi: Activation) -> float:
        """1 / the largest slope."""
        return 1 / phi.slope[1] if phi.slope[1] > 0 else 1.0


@dataclass(frozen=True, kw_only=True)
class _Shrunk(Activation):
    """phi / by."""

    phi: Activation
    by: float

    @property
    def slope(self) -> tuple[float, float]:  # type: ignore[override]
        low, high = self.phi.slope
        return low / self.by, high / self.by

    @property
    def entrywise(self) -> bool:  # type: ignore[override]
        return self.phi.entrywise

    def __call__(self, z: Tensor) -> Tensor:
        return self.phi(z) / self.by

    def derivative(self, z: Tensor) -> Tensor:
        return self.phi.derivative(z) / self.by


@dataclass(frozen=True, kw_only=True)
class Quadratic(Penalty):
    """|x - phi(z)|^2 / 2, for every activation: the method of auxiliary coordinates.

    Its gradient needs the derivative of phi, and it is not convex in z.
    """

    convex = False

    def check(self, phi: Activation, value: bool = True) -> None:
        """As in `Penalty`: any activation with a derivative whose Jacobian is symmetric."""
        if not phi.symmetric:
            raise ValueError(
                f"penalty: {phi} has a Jacobian that is not symmetric, whose products are not to be "
                "had here; take average pooling for max-pooling."
            )

    def value(self, phi: Activation, x: Tensor, z: Tensor) -> Tensor:
        """|x - phi(z)|^2 / 2."""
        return 0.5 * (x - phi(z)).flatten(1).square().sum(-1)

    def residual(
        self, phi: Activation, x: Tensor, z: Tensor, image: Tensor | None = None
    ) -> Tensor:
        """J (phi(z) - x), J the Jacobian of phi at z."""
        return phi.product(phi.derivative(z), (phi(z) if image is None else image) - x)

    def target(self, phi: Activation, z: Tensor, s: Tensor) -> Tensor:
        """phi(z) - s."""
        return phi(z) - s

    def minimise(self, phi: Activation, z: Tensor, q: Tensor, L: float) -> Tensor:
        """(phi(z) + q) / (1 + L)."""
        return (phi(z) + q) / (1 + L)

    def curvature(self, phi: Activation) -> float:
        """The square of the Lipschitz constant: exact where the residual is zero."""
        return phi.lipschitz**2

    def strong(self, phi: Activation) -> float:
        """1."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Askari(Penalty):
    """|x - z|^2 / 2 over x in the range of phi, the penalty of the first lifted networks: biased.

    For ReLU it is D(x, z) + |min(z, 0)|^2 / 2, so at the exact point x = phi(z) it is not zero: it
    drives pre-activations to where phi is the identity, towards a linear network. It is here for
    comparison. All blocks are least squares.
    """

    def check(self, phi: Activation, value: bool = True) -> None:
        """As in `Penalty`: phi must be the projection onto its range."""
        probe = torch.linspace(-8.0, 8.0, 33, dtype=torch.float64)
        clipped = probe.clamp(*phi.range)
        if not phi.entrywise or not torch.allclose(phi(probe), clipped, atol=1e-12):
            raise ValueError(
                f"penalty: {phi} is not the projection onto its range {phi.range}, which 'askari' "
                "needs (ReLU, hard tanh, the identity); take 'fenchel' or 'quadratic'."
            )

    def value(self, phi: Activation, x: Tensor, z: Tensor) -> Tensor:
        """|x - z|^2 / 2."""
        return 0.5 * (x - z).flatten(1).square().sum(-1)

    def residual(
        self, phi: Activation, x: Tensor, z: Tensor, image: Tensor | None = None
    ) -> Tensor:
        """z - x."""
        return z - x

    def target(self, phi: Activation, z: Tensor, s: Tensor) -> Tensor:
        """z - s, clipped to the range."""
        return (z - s).clamp(*phi.range)

    def minimise(self, phi: Activation, z: Tensor, q: Tensor, L: float) -> Tensor:
        """(z + q) / (1 + L), clipped to the range."""
        return ((z + q) / (1 + L)).clamp(*phi.range)

    def curvature(self, phi: Activation) -> float:
        """1."""
        return 1.0

    def strong(self, phi: Activation) -> float:
        """1."""
        return 1.0


_PENALTIES: dict[str, type[Penalty]] = {
    "fenchel": Fenchel,
    "quadratic": Quadratic,
    "askari": Askari,
}


def get_penalty(penalty: "str | Penalty") -> Penalty:
    """A penalty from its name (`"fenchel"`, `"quadratic"`, `"askari"`) or itself.

    Args:
        penalty: the name or the object.

    Raises:
        ValueError: an unknown name, with the nearest valid one.
    """
    if isinstance(penalty, Penalty):
        return penalty
    if not isinstance(penalty, str) or penalty not in _PENALTIES:
        raise unknown_name("penalty", penalty, _PENALTIES)
    return _PENALTIES[penalty]()


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The divergence of the output's activation, softmax or the identity, from the targets.

    Attributes:
        name: "cross_entropy" or "squared".
        phi: the activation whose divergence it is.
    """

    name: str
    phi: Activation

    def value(self, y: Tensor, z: Tensor) -> Tensor:  # (m, q), (m, q) -> (m,)
        """D(y, z) of each sample; for labels the usual loss (half of it for squares)."""
        if self.name == "cross_entropy":  # D without its care for rounding near zero: a fifth of it
            return torch.xlogy(y, y).sum(-1) - (y * torch.log_softmax(z, -1)).sum(-1)
        return self.phi.divergence(y, z)

    def residual(self, y: Tensor, z: Tensor) -> Tensor:
        """The gradient in z: phi(z) - y."""
        return self.phi(z) - y

    @property
    def curvature(self) -> float:
        """The largest slope of its gradient."""
        return self.phi.slope[1]


def get_loss(loss: "str | Loss") -> Loss:
    """A loss from its name (`"cross_entropy"`, `"squared"`) or itself.

    Args:
        loss: the name or the object.

    Raises:
        ValueError: an unknown name, with the nearest valid one.
    """
    from ..activations import Identity, Softmax

    known: dict[str, Any] = {"cross_entropy": Softmax(), "squared": Identity()}
    if isinstance(loss, Loss):
        return loss
    if not isinstance(loss, str) or loss not in known:
        raise unknown_name("loss", loss, known)
    return Loss(name=loss, phi=known[loss])
