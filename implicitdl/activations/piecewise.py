"""Piecewise linear activations."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ._base import INF, Activation, halves, on_range, require_finite


class _Clip(Activation):
    """Projections onto an interval: g is its indicator, whose prox is phi for every t."""

    slope = (0.0, 1.0)
    cheap_prox = True

    def potential(self, z: Tensor) -> Tensor:
        c = self(z)
        return c * (z - 0.5 * c)

    def conjugate(self, x: Tensor) -> Tensor:
        return on_range(self, x, lambda x: 0.5 * x * x)

    def divergence(self, x: Tensor, z: Tensor) -> Tensor:
        c = self(z)
        return on_range(self, x, lambda x: 0.5 * (c - x) ** 2 + (c - x) * (z - c)).sum(-1)

    def prox(self, v: Tensor, t: float | Tensor) -> Tensor:
        self._check_prox(t)
        return self(v)


@dataclass(frozen=True, kw_only=True)
class Identity(_Clip):
    """phi(z) = z, F = z^2 / 2."""

    curvature = 0.0
    slope = (1.0, 1.0)
    homogeneous = True
    linear = True

    def __call__(self, z: Tensor) -> Tensor:
        return z

    def call_(self, z: Tensor) -> Tensor:
        return z

    def derivative(self, z: Tensor) -> Tensor:
        return torch.ones_like(z)

    def derivative_at(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)


@dataclass(frozen=True, kw_only=True)
class ReLU(_Clip):
    """phi(z) = max(z, 0), F = z_+^2 / 2; phi'(0) = 0 as in PyTorch."""

    range = (0.0, INF)
    homogeneous = True

    def __call__(self, z: Tensor) -> Tensor:
        return torch.relu(z)

    def call_(self, z: Tensor) -> Tensor:
        return z.relu_()

    def derivative(self, z: Tensor) -> Tensor:
        return (z > 0).to(z.dtype)

    def derivative_at(self, x: Tensor) -> Tensor:
        return x.sign()  # 0 or 1, in one pass


@dataclass(frozen=True, kw_only=True)
class HardTanh(_Clip):
    """phi(z) = min(max(z, low), high); ReLU6 is `HardTanh(low=0, high=6)`."""

    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not -INF < self.low < self.high < INF:
            raise ValueError(
                f"HardTanh: got low={self.low}, high={self.high}, expected finite low < high"
            )

    @property
    def range(self) -> tuple[float, float]:
        return (self.low, self.high)

    def __call__(self, z: Tensor) -> Tensor:
        return F.hardtanh(z, self.low, self.high)

    def call_(self, z: Tensor) -> Tensor:
        return z.clamp_(self.low, self.high)

    def derivative(self, z: Tensor) -> Tensor:
        return ((z > self.low) & (z < self.high)).to(z.dtype)

    def derivative_at(self, x: Tensor) -> Tensor:
        return self.derivative(x)


@dataclass(frozen=True, kw_only=True)
class LeakyReLU(Activation):
    """phi(z) = z for z > 0, a z below, a = `negative_slope`; a = -1 is the absolute value."""

    negative_slope: float = 0.01
    homogeneous = True
    cheap_prox = True

    def __post_init__(self) -> None:
        require_finite(self, "negative_slope")

    @property
    def slope(self) -> tuple[float, float]:
        return (min(self.negative_slope, 1.0), max(self.negative_slope, 1.0))

    @property
    def range(self) -> tuple[float, float]:
        return (-INF if self.negative_slope > 0 else 0.0, INF)

    def __call__(self, z: Tensor) -> Tensor:
        return F.leaky_relu(z, self.negative_slope)

    def call_(self, z: Tensor) -> Tensor:
        return F.leaky_relu_(z, self.negative_slope)

    def derivative(self, z: Tensor) -> Tensor:
        return torch.ones_like(z).masked_fill(z <= 0, self.negative_slope)

    def derivative_at(self, x: Tensor) -> Tensor | None:
        return self.derivative(x) if self.negative_slope > 0 else None

    def potential(self, z: Tensor) -> Tensor:
        return 0.5 * z * self(z)

    def conjugate(self, x: Tensor) -> Tensor:
        return self.divergence(x[..., None], torch.zeros_like(x)[..., None])

    def divergence(self, x: Tensor, z: Tensor) -> Tensor:
        a = self.negative_slope
        if a < 0:
            raise self._missing("divergence")

        def value(x: Tensor) -> Tensor:
            upper, xn, zn = halves(x, z)
            return upper + (a * zn - xn) ** 2 * (0.5 / a if a else 0.0)  # a = 0: xn = 0 too

        return on_range(self, x, value).sum(-1)

    def prox(self, v: Tensor, t: float | Tensor) -> Tensor:
        self._check_prox(t)
        a = self.negative_slope
        return torch.where(v > 0, v, v * (a / (t + (1 - t) * a)))


@dataclass(frozen=True, kw_only=True)
class SoftShrink(Activation):
    """phi(z) = sign(z) max(|z| - threshold, 0), the prox of g = threshold |x|."""

    threshold: float = 0.5
    slope = (0.0, 1.0)
    cheap_prox = True

    def __post_init__(self) -> None:
        require_finite(self, "threshold", positive=True)

    def __call__(self, z: Tensor) -> Tensor:
        return F.softshrink(z, self.threshold)

    def derivative(self, z: Tensor) -> Tensor:
        return (z.abs() > self.threshold).to(z.dtype)

    def derivative_at(self, x: Tensor) -> Tensor:
        return x.sign().abs()

    def potential(self, z: Tensor) -> Tensor:
        return 0.5 * self(z) ** 2

    def conjugate(self, x: Tensor) -> Tensor:
        return 0.5 * x * x + self.threshold * x.abs()

    def divergence(self, x: Tensor, z: Tensor) -> Tensor:
        e = z.clamp(-self.threshold, self.threshold)
        return (0.5 * (z - e - x) ** 2 + (self.threshold * x.abs() - x * e)).sum(-1)

    def prox(self, v: Tensor, t: float | Tensor) -> Tensor:
        self._check_prox(t)
        size = torch.as_tensor(t * self.threshold, dtype=v.dtype, device=v.device)
        return v - v.clamp(-size, size)
