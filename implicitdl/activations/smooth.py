"""Smooth activations."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ._base import (
    DILOG,
    INF,
    NODES,
    WEIGHTS,
    Activation,
    halves,
    kl,
    on_range,
    require_finite,
    softplus,
)


@dataclass(frozen=True, kw_only=True)
class ELU(Activation):
    """phi(z) = z for z > 0, alpha (e^z - 1) below; non-expansive for alpha <= 1."""

    alpha: float = 1.0

    def __post_init__(self) -> None:
        require_finite(self, "alpha", positive=True)

    @property
    def curvature(self) -> float:
        return 1.0 if self.alpha == 1 else INF  # phi' is continuous for alpha = 1 only

    @property
    def slope(self) -> tuple[float, float]:
        return (0.0, max(1.0, self.alpha))

    @property
    def range(self) -> tuple[float, float]:
        return (-self.alpha, INF)

    def __call__(self, z: Tensor) -> Tensor:
        return F.elu(z, self.alpha)

    def call_(self, z: Tensor) -> Tensor:
        return F.elu_(z, self.alpha)

    def derivative(self, z: Tensor) -> Tensor:
        return (self.alpha * z.clamp(max=0.0).exp()).masked_fill(z > 0, 1.0)

    def derivative_at(self, x: Tensor) -> Tensor:
        return (x + self.alpha).masked_fill(x > 0, 1.0)

    def potential(self, z: Tensor) -> Tensor:
        zn = z.clamp(max=0.0)
        return torch.where(z > 0, 0.5 * z * z, self.alpha * (zn.expm1() - zn))

    def conjugate(self, x: Tensor) -> Tensor:
        return self.divergence(x[..., None], torch.zeros_like(x)[..., None])

    def divergence(self, x: Tensor, z: Tensor) -> Tensor:
        def value(x: Tensor) -> Tensor:  # below zero a relative entropy of 1 + x/alpha and e^z
            upper, xn, zn = halves(x, z)
            return upper + self.alpha * kl((xn + self.alpha) / self.alpha, xn / self.alpha, zn)

        return on_range(self, x, value).sum(-1)


@dataclass(frozen=True, kw_only=True)
class Softplus(Activation):
    """phi(z) = log(1 + e^z), F(z) = -Li_2(-e^z).

    Args:
        threshold: beyond it phi(z) = z, as in torch, where 20 is the default: off by 2e-9 there.
            All else that is known of phi is that of the exact one. Below 20 the jump counts: such a
            phi falls there, has no slope range, and is for the evaluation of networks alone.
    """

    threshold: float = 40.0

    range = (0.0, INF)

    @property
    def slope(self) -> tuple[float, float]:
        return (0.0, 1.0) if self.threshold >= 20 else (-INF, INF)

    @property
    def curvature(self) -> float:
        """sup |phi''|."""
        return 0.25 if self.threshold >= 20 else INF

    def __post_init__(self) -> None:
        require_finite(self, "threshold", positive=True)

    def __call__(self, z: Tensor) -> Tensor:
        return F.softplus(z, threshold=self.threshold)

    def derivative(self, z: Tensor) -> Tensor:
        return torch.sigmoid(z)

    def derivative_at(self, x: Tensor) -> Tensor:
        return -torch.expm1(-x)

    @staticmethod
    def _remainder(z: Tensor) -> Tensor:
        """F(z) - z_+^2 / 2, between 0 and pi^2 / 6, by the dilogarithm's Bernoulli series."""
        s = torch.log1p(torch.exp(torch.where(z > 0, -z, z)))
        power, total = s, s + 0.25 * s * s
        for c in DILOG:
            power = power * s * s
            total = total + c * power
        return torch.where(z > 0, math.pi**2 / 6 - total, total)

    def potential(self, z: Tensor) -> Tensor:
        return 0.5 * torch.relu(z) ** 2 + self._remainder(z)

    def conjugate(self, x: Tensor) -> Tensor:
        def value(x: Tensor) -> Tensor:
            w = self._inverse(x)
            return (x * w - self.potential(w)).masked_fill(x == 0, 0.0)

        return on_range(self, x, value)

    @staticmethod
    def _inverse(x: Tensor) -> Tensor:
        x = x.masked_fill(x <= 0, 1.0)
        return x + torch.log(-torch.expm1(-x))

    def divergence(self, x: Tensor, z: Tensor) -> Tensor:
        def value(x: Tensor) -> Tensor:
            w = self._inverse(x)
            d = z - w
            near = d.abs() < 0.5
            h = d.masked_fill(~near, 0.0)
            # Near: D = d^2 int_0^1 (1 - s) phi'(w + s d) ds by Gauss' rule, exact to rounding.
            nodes = [((1 + a) / 2, b * (1 - a) / 4) for a, b in zip(NODES, WEIGHTS, strict=True)]
            rule = sum((float(b) * torch.sigmoid(w + float(a) * h) for a, b in nodes))
            # Far: that of z_+^2 / 2, without cancellation, plus that of the bounded remainder.
            wp, zp = torch.relu(w), torch.relu(z)
            far = 0.5 * (zp - wp) ** 2 + wp * (zp - z)
            far = far + self._remainder(z) - self._remainder(w) - softplus(-w.abs()) * d
            return torch.where(x == 0, self.potential(z), torch.where(near, h * h * rule, far))

        return on_range(self, x, value).sum(-1)


@dataclass(frozen=True, kw_only=True)
class Sigmoid(Activation):
    """phi(z) = 1 / (1 + e^-z), F = softplus; D is the Bernoulli relative entropy."""

    curvature = 1 / (6 * math.sqrt(3))
    slope = (0.0, 0.25)
    range = (0.0, 1.0)

    def __call__(self, z: Tensor) -> Tensor:
        return torch.sigmoid(z)

    def call_(self, z: Tensor) -> Tensor:
        return z.sigmoid_()

    def derivative(self, z: Tensor) -> Tensor:
        return self.derivative_at(torch.sigmoid(z))

    def derivative_at(self, x: Tensor) -> Tensor:
        return x * (1 - x)

    def potential(self, z: Tensor) -> Tensor:
        return softplus(z)

    def conjugate(self, x: Tensor) -> Tensor:
        return on_range(self, x, lambda x: torch.xlogy(x, x) + torch.special.xlog1py(1 - x, -x))

    def divergence(self, x: Tensor, z: Tensor) -> Tensor:
        return on_range(
            self,
            x,
            lambda x: kl(x, x - 1, -softplus(-z)) + kl(1 - x, -x, -softplus(z)),
        ).sum(-1)


@dataclass(frozen=True, kw_only=True)
class Tanh(Activation):
    """phi(z) = tanh z = 2 sigmoid(2z) - 1, F = log cosh; D is Sigmoid's at ((1 + x)/2, 2z)."""

    curvature = 4 / (3 * math.sqrt(3))
    slope = (0.0, 1.0)
    range = (-1.0, 1.0)

    def __call__(self, z: Tensor) -> Tensor:
        return torch.tanh(z)

    def call_(self, z: Tensor) -> Tensor:
        return z.tanh_()

    def derivative(self, z: Tensor) -> Tensor:
        return self.derivative_at(torch.tanh(z))

    def derivative_at(self, x: Tensor) -> Tensor:
        return 1 - x * x

    def potential(self, z: Tensor) -> Tensor:
        return softplus(2 * z) - z - math.log(2)

    def conjugate(self, x: Tensor) -> Tensor:
        half = torch.special.xlog1py
        return on_range(self, x, lambda x: 0.5 * (half(1 + x, x) + half(1 - x, -x)))

    def divergence(self, x: Tensor, z: Tensor) -> Tensor:
        def value(x: Tensor) -> Tensor:
            p, q = 0.5 * (1 + x), 0.5 * (1 - x)
            return kl(p, -q, -softplus(-2 * z)) + kl(q, -p, -softplus(2 * z))

        return on_range(self, x, value).sum(-1)


@dataclass(frozen=True, kw_only=True)
class SiLU(Activation):
    """phi(z) = z sigmoid(z); neither monotone nor non-expansive.

    phi'' = 0 where w tanh w = 1, w = z / 2; there phi' = (1 +- w) / 2, w = 1.1996786402577338.
    """

    curvature = 0.5  # phi'' = sigma' (2 + z (1 - 2 sigma)), largest at 0
    slope = (-0.09983932012886690, 1.0998393201288669)
    range = (-0.2784645427610738, INF)  # -W(1/e), Lambert's function

    def __call__(self, z: Tensor) -> Tensor:
        return F.silu(z)

    def derivative(self, z: Tensor) -> Tensor:
        s = torch.sigmoid(z)
        return s + z * (s * torch.sigmoid(-z))


@dataclass(frozen=True, kw_only=True)
class GELU(Activation):
    """phi(z) = z P(N <= z), N standard normal (exact, by erf); neither monotone nor non-expansive.

    phi'' = (2 - z^2) times the density, so phi' is extreme at z = +-sqrt 2, where it is
    (1 +- erf 1) / 2 +- e^-1 / sqrt pi.
    """

    curvature = 2 / math.sqrt(2 * math.pi)  # (2 - z^2) times the density, largest at 0
    slope = (
        0.5 * math.erfc(1.0) - math.exp(-1.0) / math.sqrt(math.pi),
        0.5 + 0.5 * math.erf(1.0) + math.exp(-1.0) / math.sqrt(math.pi),
    )
    range = (-0.16997120747990369, INF)  # at z = -0.7517915246935645, where phi' = 0

    def __call__(self, z: Tensor) -> Tensor:
        return F.gelu(z)

    def derivative(self, z: Tensor) -> Tensor:
        density = torch.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))
        return 0.5 * torch.special.erfc(z * -math.sqrt(0.5)) + z * density
