"""The nonlinearity phi of x = phi(A x + B u + b), together with the convex analysis it stands for.

Where phi is monotone it is the gradient of a convex potential F, and three more objects follow:

    F*(x)    = sup_z  x z - F(z)                                  the conjugate
    D(x, z)  = F(z) + F*(x) - x z >= 0,  zero iff x = phi(z)      the Fenchel divergence
    prox_t(v) = argmin_x  t g(x) + (x - v)^2 / 2,  g = F* - x^2/2  so that prox_1 = phi

Certificates read `slope` and `homogeneous`, lifted training `divergence`, monotone splittings
`prox`, and the solvers only `__call__`, `call_`, `derivative` and `product`.

Reference: Gu, Askari, El Ghaoui (2018), "Fenchel lifted networks"; Combettes and Pesquet (2020),
"Deep neural network structures solving variational inequalities" (phi as a proximity operator).
"""

import abc
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .solution import unknown_name

_REGISTRY: dict[str, type["Activation"]] = {}
_INF = math.inf
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(6)  # moved to [0, 1] where they are used
# B_2k / (2k + 1)!, k = 1..8: the dilogarithm in s = log(1 + e^z) <= log 2, to below 1e-16.
_BERNOULLI = [1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6, -3617 / 510]
_DILOG = [b / math.factorial(2 * k + 1) for k, b in enumerate(_BERNOULLI, start=1)]


class Activation(abc.ABC):
    """phi, with phi = F' for a convex F wherever `monotone` is True.

    A member declares facts and a formula; nobody asks for its type. A new one needs `slope` (the
    true range of phi', not a guess: certificates rest on it) and `__call__`; `range`, `potential`
    and `conjugate` open lifted training; `derivative`, `prox` and `divergence` have defaults. It
    is registered under its class name, so that `get_activation` and `from_config` find it, unless
    it is private: a leading underscore, or `class Name(Activation, register=False)`.

    Example:
        >>> @dataclass(frozen=True, kw_only=True)
        ... class Arctan(Activation):
        ...     slope = (0.0, 1.0)
        ...     range = (-math.pi / 2, math.pi / 2)
        ...     def __call__(self, z):
        ...         return torch.atan(z)
        ...     def potential(self, z):
        ...         return z * torch.atan(z) - 0.5 * torch.log1p(z * z)
        ...     def conjugate(self, x):
        ...         return -torch.log(torch.cos(x))
        >>> round(get_activation("arctan").prox(torch.tensor(1.0), 0.5).item(), 4)
        0.8535
    """

    def __init_subclass__(cls, register: bool = True, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        name = cls.__name__
        if name.startswith("_") or not register:
            return
        old = _REGISTRY.get(name)
        if old is not None and old.__module__ != cls.__module__:
            raise ValueError(
                f"activation {name!r} of {cls.__module__} has the name of one in "
                f"{old.__module__}; configurations would be ambiguous: rename the new class"
            )
        _REGISTRY[name] = cls

    @property
    @abc.abstractmethod
    def slope(self) -> tuple[float, float]:
        """The range of phi': tight bounds (lo, hi) of the Jacobian's eigenvalues over all z."""

    @property
    def range(self) -> tuple[float, float]:
        """The closed range of phi, entry by entry."""
        return (-_INF, _INF)

    @property
    def homogeneous(self) -> bool:
        """Whether phi(t z) = t phi(z) for all t >= 0."""
        return False

    @property
    def entrywise(self) -> bool:
        """Whether phi acts on each entry alone."""
        return True

    @property
    def lipschitz(self) -> float:
        """The Lipschitz constant max(|lo|, |hi|)."""
        return max(map(abs, self.slope))

    @property
    def monotone(self) -> bool:
        """Whether phi is monotone: then it is the gradient of a convex potential."""
        return self.slope[0] >= 0.0

    @property
    def nonexpansive(self) -> bool:
        """Whether |phi(s) - phi(t)| <= |s - t|."""
        return self.lipschitz <= 1.0

    @abc.abstractmethod
    def __call__(self, z: Tensor) -> Tensor:  # (..., n) -> (..., n)
        """x = phi(z)."""

    def call_(self, z: Tensor) -> Tensor:
        """phi in place: overwrites z and returns it. For loops without autograd."""
        return z.copy_(self(z))

    def derivative(self, z: Tensor) -> Tensor:  # (..., n) -> (..., n)
        """phi'(z), a Clarke element at a kink: what `product` needs to apply the Jacobian."""
        # Backward mode: an entrywise phi need not have forward formulas for this.
        return torch.func.vjp(self, z)[1](torch.ones_like(z))[0]

    def product(self, d: Tensor, w: Tensor) -> Tensor:
        """J w for the Jacobian J that d = `derivative(z)` stands for; J is symmetric."""
        return d * w

    def potential(self, z: Tensor) -> Tensor:
        """F(z), convex, with F' = phi; entry by entry (logsumexp, (..., 1), for softmax)."""
        raise self._missing("potential")

    def conjugate(self, x: Tensor) -> Tensor:
        """F*(x) = sup_z x z - F(z); +inf off the closed range of phi."""
        raise self._missing("conjugate")

    def divergence(self, x: Tensor, z: Tensor) -> Tensor:  # (..., n), (..., n) -> (...)
        """D(x, z) = sum F(z) + F*(x) - x z >= 0, zero iff x = phi(z); grad_z D = phi(z) - x.

        The members here avoid the cancellation of the three terms, so that the error near
        x = phi(z) is far below the rounding of F; the default can only clip at zero.
        """
        d = self.potential(z) + self.conjugate(x) - x * z
        return (d + torch.relu(-d).detach()).sum(-1)  # clipped, with the gradient left alone

    def prox(self, v: Tensor, t: float | Tensor) -> Tensor:
        """argmin_x t (F*(x) - x^2 / 2) + (x - v)^2 / 2, so that prox(v, 1) = phi(v).

        With x = phi(z) the optimality condition is t z + (1 - t) phi(z) = v, an equation whose
        slope lies between 1 and t. The default solves it by Newton steps inside a bracket, to
        rounding; two more steps with autograd then make all derivatives up to the third exact.

        Args:
            v: the point.  # (..., n)
            t: the step, positive; broadcast against v.

        Raises:
            ValueError: the slope range is not within [0, 1] (phi is no proximity operator).
        """
        if not self.entrywise:
            raise self._missing("prox")
        # The bracket's ends are in the ratio t. The members here take 10 steps or 30; a staircase
        # whose slope keeps returning to 0 and 1 takes 36 or 60.
        steps = 40 if not isinstance(t, Tensor) and 0.1 <= t <= 10.0 else 80
        t = self._check_prox(v, t)
        z = _bracketed_newton(self, v.detach(), t.detach(), steps)
        for _ in range(2):
            z = z - (t * z + (1 - t) * self(z) - v) / (t + (1 - t) * self.derivative(z))
        return self(z)

    def to_config(self) -> dict[str, Any]:
        """Plain data, `{"name": ..., **parameters}`, from which `from_config` rebuilds phi."""
        if not dataclasses.is_dataclass(self) and vars(self):
            raise TypeError(
                f"{type(self).__name__} has parameters {sorted(vars(self))} but is not a "
                "dataclass; decorate it with @dataclass(frozen=True, kw_only=True)"
            )
        names = [f.name for f in _fields(type(self))]
        return {"name": type(self).__name__} | {name: getattr(self, name) for name in names}

    def _missing(self, what: str) -> Exception:
        """Why `what` does not exist: phi is not monotone, or nobody wrote it."""
        if self.monotone:
            return NotImplementedError(f"{type(self).__name__} does not define `{what}`: write it")
        return ValueError(
            f"{what}: {self} has slope range ({self.slope[0]:.6g}, {self.slope[1]:.6g}), so it is "
            "not monotone and not the gradient of a convex potential; use a monotone activation "
            "such as ReLU, Softplus or Tanh"
        )

    def _check_prox(self, v: Tensor, t: float | Tensor) -> Tensor:
        lo, hi = self.slope
        if lo < 0.0:
            raise self._missing("prox")
        if hi > 1.0:
            raise ValueError(
                f"prox: {self} has slope up to {hi:.6g}, expected at most 1; such a phi is not a "
                "proximity operator: scale it down or use a solver that needs no prox"
            )
        if not isinstance(t, Tensor) and not 0.0 < t < _INF:
            raise ValueError(f"prox: got t={t}, expected a positive finite step")
        return torch.as_tensor(t, dtype=v.dtype, device=v.device)


def _fields(cls: type[Activation]) -> Iterable[dataclasses.Field[Any]]:
    return dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()


def _bracketed_newton(phi: Activation, v: Tensor, t: Tensor, steps: int) -> Tensor:
    """z with t z + (1 - t) phi(z) = v, in a fixed number of steps; no autograd through it."""
    with torch.no_grad():
        # The slope lies between 1 and t, hence z between r and r / t with r = v - (1 - t) phi(0).
        r = v - (1 - t) * phi(torch.zeros_like(v))
        z, end = r / t.clamp(min=1.0), r / t.clamp(max=1.0)
        pad = 1e-3 * end.abs()  # a Newton step may land on the very end, give or take rounding
        lo, hi = torch.minimum(z, end) - pad, torch.maximum(z, end) + pad
        last = torch.full_like(r, _INF)
        eps = torch.finfo(v.dtype).eps
        for _ in range(steps):
            p, q = t * z, (1 - t) * phi(z)
            residual = p + q - v
            lo, hi = torch.where(residual <= 0, z, lo), torch.where(residual >= 0, z, hi)
            step = residual / (t + (1 - t) * phi.derivative(z))
            newton = z - step
            # At rounding level the bracket means nothing; before it, demand that steps halve.
            done = residual.abs() <= 4 * eps * (p.abs() + q.abs() + v.abs())
            good = (newton >= lo) & (newton <= hi) & (step.abs() <= 0.5 * last)
            new = torch.where(done | good, newton, lo + 0.5 * (hi - lo))
            z, last = new, (new - z).abs()
        return z


def _kl(p: Tensor, p_less_1: Tensor, log_q: Tensor) -> Tensor:
    """p log(p / q) - p + q >= 0, for p in [0, 1] and p - 1 both known to full relative accuracy.

    With d = log q - log p it is p (e^d - 1 - d): a series in d near zero, where the plain formula
    would lose everything; the plain formula elsewhere, where p may be 0 and d infinite.
    """
    log_p = torch.where(p < 0.5, p.masked_fill(p <= 0, 1.0).log(), p_less_1.clamp(min=-0.5).log1p())
    d = log_q - log_p
    near = (d.abs() < 0.5) & (p > 0)
    d = d.masked_fill(~near, 0.0)
    one = torch.ones_like(d)
    series = one
    for k in range(14, 2, -1):  # 1 + d/3 (1 + d/4 (1 + ...)); 0.5^14 / 14! is below rounding
        series = torch.addcmul(one, d, series, value=1.0 / k)
    far = torch.xlogy(p, p) - p * log_q - p + log_q.exp()
    return torch.where(near, p * (0.5 * d * d) * series, far)


def _softplus(z: Tensor) -> Tensor:
    return F.softplus(z, threshold=40.0)  # the default, 20, is 2e-9 off in float64


def _on_range(phi: Activation, x: Tensor, value: Callable[[Tensor], Tensor]) -> Tensor:
    """value(x) on the closed range of phi, +inf elsewhere."""
    lo, hi = phi.range
    inside = x if (lo, hi) == (-_INF, _INF) else x.clamp(lo, hi)
    return value(inside).masked_fill((x < lo) | (x > hi), _INF)


def _halves(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence of the part of phi that is the identity on z > 0, and min(x, 0), min(z, 0).

    z_- is written z_+ - z so that at z = 0 the two one-sided derivatives add up to one.
    """
    zp, xp = torch.relu(z), torch.relu(x)
    zn, xn = z - zp, x - xp
    return 0.5 * (zp - xp) ** 2 - xp * zn - xn * zp, xn, zn


class _Clip(Activation):
    """Projections onto an interval: g is its indicator, whose prox is phi for every t."""

    slope = (0.0, 1.0)

    def potential(self, z: Tensor) -> Tensor:
        c = self(z)
        return c * (z - 0.5 * c)

    def conjugate(self, x: Tensor) -> Tensor:
        return _on_range(self, x, lambda x: 0.5 * x * x)

    def divergence(self, x: Tensor, z: Tensor) -> Tensor:
        c = self(z)
        return _on_range(self, x, lambda x: 0.5 * (c - x) ** 2 + (c - x) * (z - c)).sum(-1)

    def prox(self, v: Tensor, t: float | Tensor) -> Tensor:
        self._check_prox(v, t)
        return self(v)


@dataclass(frozen=True, kw_only=True)
class Identity(_Clip):
    """phi(z) = z, F = z^2 / 2."""

    slope = (1.0, 1.0)
    homogeneous = True

    def __call__(self, z: Tensor) -> Tensor:
        return z

    def call_(self, z: Tensor) -> Tensor:
        return z

    def derivative(self, z: Tensor) -> Tensor:
        return torch.ones_like(z)


@dataclass(frozen=True, kw_only=True)
class ReLU(_Clip):
    """phi(z) = max(z, 0), F = z_+^2 / 2; phi'(0) = 0 as in PyTorch."""

    range = (0.0, _INF)
    homogeneous = True

    def __call__(self, z: Tensor) -> Tensor:
        return torch.relu(z)

    def call_(self, z: Tensor) -> Tensor:
        return z.relu_()

    def derivative(self, z: Tensor) -> Tensor:
        return (z > 0).to(z.dtype)


@dataclass(frozen=True, kw_only=True)
class HardTanh(_Clip):
    """phi(z) = min(max(z, low), high); ReLU6 is `HardTanh(low=0, high=6)`."""

    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not -_INF < self.low < self.high < _INF:
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


@dataclass(frozen=True, kw_only=True)
class LeakyReLU(Activation):
    """phi(z) = z for z > 0, a z below, a = `negative_slope`; a = -1 is the absolute value."""

    negative_slope: float = 0.01
    homogeneous = True

    def __post_init__(self) -> None:
        _finite(self, "negative_slope")

    @property
    def slope(self) -> tuple[float, float]:
        return (min(self.negative_slope, 1.0), max(self.negative_slope, 1.0))

    @property
    def range(self) -> tuple[float, float]:
        return (-_INF if self.negative_slope > 0 else 0.0, _INF)

    def __call__(self, z: Tensor) -> Tensor:
        return F.leaky_relu(z, self.negative_slope)

    def call_(self, z: Tensor) -> Tensor:
        return F.leaky_relu_(z, self.negative_slope)

    def derivative(self, z: Tensor) -> Tensor:
        return torch.ones_like(z).masked_fill(z <= 0, self.negative_slope)

    def potential(self, z: Tensor) -> Tensor:
        return 0.5 * z * self(z)

    def conjugate(self, x: Tensor) -> Tensor:
        return self.divergence(x[..., None], torch.zeros_like(x)[..., None])

    def divergence(self, x: Tensor, z: Tensor) -> Tensor:
        a = self.negative_slope
        if a < 0:
            raise self._missing("divergence")

        def value(x: Tensor) -> Tensor:
            upper, xn, zn = _halves(x, z)
            return upper + (a * zn - xn) ** 2 * (0.5 / a if a else 0.0)  # a = 0: xn = 0 too

        return _on_range(self, x, value).sum(-1)

    def prox(self, v: Tensor, t: float | Tensor) -> Tensor:
        t, a = self._check_prox(v, t), self.negative_slope
        return torch.where(v > 0, v, v * (a / (t + (1 - t) * a)))


@dataclass(frozen=True, kw_only=True)
class SoftShrink(Activation):
    """phi(z) = sign(z) max(|z| - threshold, 0), the prox of g = threshold |x|."""

    threshold: float = 0.5
    slope = (0.0, 1.0)

    def __post_init__(self) -> None:
        _finite(self, "threshold", positive=True)

    def __call__(self, z: Tensor) -> Tensor:
        return F.softshrink(z, self.threshold)

    def derivative(self, z: Tensor) -> Tensor:
        return (z.abs() > self.threshold).to(z.dtype)

    def potential(self, z: Tensor) -> Tensor:
        return 0.5 * self(z) ** 2

    def conjugate(self, x: Tensor) -> Tensor:
        return 0.5 * x * x + self.threshold * x.abs()

    def divergence(self, x: Tensor, z: Tensor) -> Tensor:
        e = z.clamp(-self.threshold, self.threshold)
        return (0.5 * (z - e - x) ** 2 + (self.threshold * x.abs() - x * e)).sum(-1)

    def prox(self, v: Tensor, t: float | Tensor) -> Tensor:
        t = self._check_prox(v, t) * self.threshold
        return v - torch.minimum(torch.maximum(v, -t), t)


@dataclass(frozen=True, kw_only=True)
class ELU(Activation):
    """phi(z) = z for z > 0, alpha (e^z - 1) below; non-expansive for alpha <= 1."""

    alpha: float = 1.0

    def __post_init__(self) -> None:
        _finite(self, "alpha", positive=True)

    @property
    def slope(self) -> tuple[float, float]:
        return (0.0, max(1.0, self.alpha))

    @property
    def range(self) -> tuple[float, float]:
        return (-self.alpha, _INF)

    def __call__(self, z: Tensor) -> Tensor:
        return F.elu(z, self.alpha)

    def call_(self, z: Tensor) -> Tensor:
        return F.elu_(z, self.alpha)

    def derivative(self, z: Tensor) -> Tensor:
        return (self.alpha * z.clamp(max=0.0).exp()).masked_fill(z > 0, 1.0)

    def potential(self, z: Tensor) -> Tensor:
        zn = z.clamp(max=0.0)
        return torch.where(z > 0, 0.5 * z * z, self.alpha * (zn.expm1() - zn))

    def conjugate(self, x: Tensor) -> Tensor:
        return self.divergence(x[..., None], torch.zeros_like(x)[..., None])

    def divergence(self, x: Tensor, z: Tensor) -> Tensor:
        def value(x: Tensor) -> Tensor:  # below zero a relative entropy of 1 + x/alpha and e^z
            upper, xn, zn = _halves(x, z)
            return upper + self.alpha * _kl((xn + self.alpha) / self.alpha, xn / self.alpha, zn)

        return _on_range(self, x, value).sum(-1)


@dataclass(frozen=True, kw_only=True)
class Softplus(Activation):
    """phi(z) = log(1 + e^z), F(z) = -Li_2(-e^z)."""

    slope = (0.0, 1.0)
    range = (0.0, _INF)

    def __call__(self, z: Tensor) -> Tensor:
        return _softplus(z)

    def derivative(self, z: Tensor) -> Tensor:
        return torch.sigmoid(z)

    @staticmethod
    def _remainder(z: Tensor) -> Tensor:
        """F(z) - z_+^2 / 2, between 0 and pi^2 / 6, by the dilogarithm's Bernoulli series."""
        s = torch.log1p(torch.exp(torch.where(z > 0, -z, z)))
        power, total = s, s + 0.25 * s * s
        for c in _DILOG:
            power = power * s * s
            total = total + c * power
        return torch.where(z > 0, math.pi**2 / 6 - total, total)

    def potential(self, z: Tensor) -> Tensor:
        return 0.5 * torch.relu(z) ** 2 + self._remainder(z)

    def conjugate(self, x: Tensor) -> Tensor:
        def value(x: Tensor) -> Tensor:
            w = self._inverse(x)
            return (x * w - self.potential(w)).masked_fill(x == 0, 0.0)

        return _on_range(self, x, value)

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
            nodes = [((1 + a) / 2, b * (1 - a) / 4) for a, b in zip(_NODES, _WEIGHTS, strict=True)]
            rule = sum((float(b) * torch.sigmoid(w + float(a) * h) for a, b in nodes))
            # Far: that of z_+^2 / 2, without cancellation, plus that of the bounded remainder.
            wp, zp = torch.relu(w), torch.relu(z)
            far = 0.5 * (zp - wp) ** 2 + wp * (zp - z)
            far = far + self._remainder(z) - self._remainder(w) - _softplus(-w.abs()) * d
            return torch.where(x == 0, self.potential(z), torch.where(near, h * h * rule, far))

        return _on_range(self, x, value).sum(-1)


@dataclass(frozen=True, kw_only=True)
class Sigmoid(Activation):
    """phi(z) = 1 / (1 + e^-z), F = softplus; D is the Bernoulli relative entropy."""

    slope = (0.0, 0.25)
    range = (0.0, 1.0)

    def __call__(self, z: Tensor) -> Tensor:
        return torch.sigmoid(z)

    def call_(self, z: Tensor) -> Tensor:
        return z.sigmoid_()

    def derivative(self, z: Tensor) -> Tensor:
        x = torch.sigmoid(z)
        return x * (1 - x)

    def potential(self, z: Tensor) -> Tensor:
        return _softplus(z)

    def conjugate(self, x: Tensor) -> Tensor:
        return _on_range(self, x, lambda x: torch.xlogy(x, x) + torch.special.xlog1py(1 - x, -x))

    def divergence(self, x: Tensor, z: Tensor) -> Tensor:
        return _on_range(
            self,
            x,
            lambda x: _kl(x, x - 1, -_softplus(-z)) + _kl(1 - x, -x, -_softplus(z)),
        ).sum(-1)


@dataclass(frozen=True, kw_only=True)
class Tanh(Activation):
    """phi(z) = tanh z = 2 sigmoid(2z) - 1, F = log cosh; D is Sigmoid's at ((1 + x)/2, 2z)."""

    slope = (0.0, 1.0)
    range = (-1.0, 1.0)

    def __call__(self, z: Tensor) -> Tensor:
        return torch.tanh(z)

    def call_(self, z: Tensor) -> Tensor:
        return z.tanh_()

    def derivative(self, z: Tensor) -> Tensor:
        x = torch.tanh(z)
        return 1 - x * x

    def potential(self, z: Tensor) -> Tensor:
        return _softplus(2 * z) - z - math.log(2)

    def conjugate(self, x: Tensor) -> Tensor:
        half = torch.special.xlog1py
        return _on_range(self, x, lambda x: 0.5 * (half(1 + x, x) + half(1 - x, -x)))

    def divergence(self, x: Tensor, z: Tensor) -> Tensor:
        def value(x: Tensor) -> Tensor:
            p, q = 0.5 * (1 + x), 0.5 * (1 - x)
            return _kl(p, -q, -_softplus(-2 * z)) + _kl(q, -p, -_softplus(2 * z))

        return _on_range(self, x, value).sum(-1)


@dataclass(frozen=True, kw_only=True)
class SiLU(Activation):
    """phi(z) = z sigmoid(z); neither monotone nor non-expansive.

    phi'' = 0 where w tanh w = 1, w = z / 2; there phi' = (1 +- w) / 2, w = 1.1996786402577338.
    """

    slope = (-0.09983932012886690, 1.0998393201288669)
    range = (-0.2784645427610738, _INF)  # -W(1/e), Lambert's function

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

    slope = (
        0.5 * math.erfc(1.0) - math.exp(-1.0) / math.sqrt(math.pi),
        0.5 + 0.5 * math.erf(1.0) + math.exp(-1.0) / math.sqrt(math.pi),
    )
    range = (-0.16997120747990369, _INF)  # at z = -0.7517915246935645, where phi' = 0

    def __call__(self, z: Tensor) -> Tensor:
        return F.gelu(z)

    def derivative(self, z: Tensor) -> Tensor:
        density = torch.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))
        return 0.5 * torch.special.erfc(z * -math.sqrt(0.5)) + z * density


@dataclass(frozen=True, kw_only=True)
class Softmax(Activation):
    """phi(z) = e^z / sum e^z over the last dimension, F = logsumexp; D = KL(x || phi(z)).

    J = diag(p) - p p' has eigenvalues in [0, 1/2] and infinity norm max 2 p (1 - p) <= 1/2.
    Points off the simplex by more than the square root of the rounding unit count as outside.
    """

    slope = (0.0, 0.5)
    range = (0.0, 1.0)
    entrywise = False

    def __call__(self, z: Tensor) -> Tensor:
        return torch.softmax(z, -1)

    def derivative(self, z: Tensor) -> Tensor:
        return torch.softmax(z, -1)

    def product(self, d: Tensor, w: Tensor) -> Tensor:
        return d * (w - (d * w).sum(-1, keepdim=True))

    def potential(self, z: Tensor) -> Tensor:  # (..., n) -> (..., 1)
        return torch.logsumexp(z, -1, keepdim=True)

    def conjugate(self, x: Tensor) -> Tensor:  # (..., n) -> (..., 1)
        value = torch.xlogy(x, x.clamp(min=0.0)).sum(-1, keepdim=True)
        return value.masked_fill(self._outside(x), _INF)

    def divergence(self, x: Tensor, z: Tensor) -> Tensor:
        inside = x.clamp(min=0.0)
        value = _kl(inside, inside - 1, torch.log_softmax(z, -1)).sum(-1)
        return value.masked_fill(self._outside(x)[..., 0], _INF)

    @staticmethod
    def _outside(x: Tensor) -> Tensor:
        off = (x.sum(-1, keepdim=True) - 1).abs() > math.sqrt(torch.finfo(x.dtype).eps)
        return off | (x < 0).any(-1, keepdim=True)

    def prox(self, v: Tensor, t: float | Tensor) -> Tensor:
        # t log x + (1 - t) x = v + mu entry by entry, with mu such that sum x = 1. Both this, in
        # y = log x <= 0, and sum x as a function of mu are of one curvature: Newton's method from
        # mu = 1 - t - max v, where some x is 1, descends without safeguards.
        t = self._check_prox(v, t)
        with torch.no_grad():
            v0, s = v.detach(), t.detach()
            mu = 1 - s - v0.amax(-1, keepdim=True)
            y = ((v0 + mu) / s).clamp(max=0.0)
            for _ in range(40):
                for _ in range(4):
                    x = y.exp()
                    y = y - (s * y + (1 - s) * x - v0 - mu) / (s + (1 - s) * x)
                    y = y.clamp(max=0.0)
                x = y.exp()
                rate = (x / (s + (1 - s) * x)).sum(-1, keepdim=True)
                mu = mu - (x.sum(-1, keepdim=True) - 1) / rate
            z = (v0 - (1 - s) * y.exp()) / s
        for _ in range(2):  # Newton for t z + (1 - t) phi(z) = v, by Sherman and Morrison
            p = torch.softmax(z, -1)
            scale = t + (1 - t) * p
            r = (t * z + (1 - t) * p - v) / scale
            lift = (1 - t) * (p * r).sum(-1, keepdim=True)
            z = z - r - p / scale * (lift / (t * (p / scale).sum(-1, keepdim=True)))
        return torch.softmax(z, -1)


@dataclass(frozen=True, kw_only=True)
class Blocks(Activation):
    """phi = (phi_1, ..., phi_k), one activation for each block of states along the last dimension.

    Slope and range are the hulls of the parts'. Nested Blocks are flattened.

    Args:
        parts: pairs (activation, number of states).

    Example:
        >>> phi = Blocks(parts=((ReLU(), 2), (Tanh(), 1)))
        >>> phi(torch.tensor([-1.0, 2.0, 0.0]))
        tensor([0., 2., 0.])
    """

    parts: tuple[tuple[Activation, int], ...]
    _runs: ClassVar[tuple[tuple[Activation, int], ...]]

    def __post_init__(self) -> None:
        flat: list[tuple[Activation, int]] = []
        for phi, n in self.parts:
            if not isinstance(phi, Activation):
                raise TypeError(f"Blocks: got {phi!r} in parts, expected an Activation")
            if not isinstance(n, int) or n < 1:
                raise ValueError(f"Blocks: got size {n!r} for {phi}, expected a positive integer")
            if isinstance(phi, Blocks) and phi.size != n:
                raise ValueError(f"Blocks: a nested part of {phi.size} states got size {n}")
            flat.extend(phi.parts if isinstance(phi, Blocks) else [(phi, n)])
        if not flat:
            raise ValueError("Blocks: got no parts, expected at least one (activation, size)")
        object.__setattr__(self, "parts", tuple(flat))
        # Equal neighbours are evaluated together, for fewer kernels, where phi is entrywise.
        runs: list[tuple[Activation, int]] = []
        for phi, n in flat:
            if runs and phi.entrywise and runs[-1][0] == phi:
                runs[-1] = (phi, runs[-1][1] + n)
            else:
                runs.append((phi, n))
        object.__setattr__(self, "_runs", tuple(runs))

    @classmethod
    def of(cls, phi: Activation, n: int) -> "Blocks":
        """phi on all n states."""
        return cls(parts=((phi, n),))

    @property
    def size(self) -> int:
        """The number of states."""
        return sum(n for _, n in self.parts)

    @property
    def slope(self) -> tuple[float, float]:
        return _hull(phi.slope for phi, _ in self.parts)

    @property
    def range(self) -> tuple[float, float]:
        return _hull(phi.range for phi, _ in self.parts)

    @property
    def homogeneous(self) -> bool:
        return all(phi.homogeneous for phi, _ in self.parts)

    @property
    def entrywise(self) -> bool:
        return all(phi.entrywise for phi, _ in self.parts)

    def _split(self, *tensors: Tensor) -> Iterable[tuple[Any, ...]]:
        """(phi, its slice of each tensor) for each run."""
        phis, sizes = zip(*self._runs, strict=True)
        for tensor in tensors:
            if tensor.shape[-1:] != (self.size,):
                raise ValueError(
                    f"Blocks: got shape {tuple(tensor.shape)}, expected a last dimension of "
                    f"{self.size} = {' + '.join(str(n) for _, n in self.parts)}"
                )
        return zip(phis, *(tensor.split(list(sizes), -1) for tensor in tensors), strict=True)

    def __call__(self, z: Tensor) -> Tensor:
        return _cat([phi(zi) for phi, zi in self._split(z)])

    def call_(self, z: Tensor) -> Tensor:
        for phi, zi in self._split(z):
            phi.call_(zi)
        return z

    def derivative(self, z: Tensor) -> Tensor:
        return _cat([phi.derivative(zi) for phi, zi in self._split(z)])

    def product(self, d: Tensor, w: Tensor) -> Tensor:
        return _cat([phi.product(di, wi) for phi, di, wi in self._split(d, w)])

    def potential(self, z: Tensor) -> Tensor:  # one entry for a whole softmax, else one a state
        return _cat([phi.potential(zi) for phi, zi in self._split(z)])

    def conjugate(self, x: Tensor) -> Tensor:
        return _cat([phi.conjugate(xi) for phi, xi in self._split(x)])

    def divergence(self, x: Tensor, z: Tensor) -> Tensor:
        return sum(phi.divergence(xi, zi) for phi, xi, zi in self._split(x, z))

    def prox(self, v: Tensor, t: float | Tensor) -> Tensor:
        self._check_prox(v, t)
        if isinstance(t, Tensor) and t.shape[-1:] == v.shape[-1:]:  # a step for each state
            return _cat([phi.prox(vi, ti) for phi, vi, ti in self._split(v, t)])
        return _cat([phi.prox(vi, t) for phi, vi in self._split(v)])

    def to_config(self) -> dict[str, Any]:
        return {"name": "Blocks", "parts": [[phi.to_config(), n] for phi, n in self.parts]}


def _cat(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, -1)


def _hull(intervals: Iterable[tuple[float, float]]) -> tuple[float, float]:
    lows, highs = zip(*intervals, strict=True)
    return (min(lows), max(highs))


def _finite(phi: Activation, name: str, positive: bool = False) -> None:
    value = getattr(phi, name)
    if not math.isfinite(value) or (positive and value <= 0):
        kind = "positive finite" if positive else "finite"
        raise ValueError(f"{type(phi).__name__}: got {name}={value}, expected a {kind} number")


def from_config(config: Mapping[str, Any]) -> Activation:
    """The activation that `to_config` described.

    Args:
        config: `{"name": class name, **parameters}`.

    Raises:
        ValueError: the name is not registered, or a parameter is unknown or out of range.
    """
    if not isinstance(config, Mapping) or "name" not in config:
        raise ValueError(f"config: got {config!r}, expected a mapping with a 'name'")
    values = {key: value for key, value in config.items() if key != "name"}
    cls = _REGISTRY.get(config["name"])
    if cls is None:
        raise unknown_name("activation", config["name"], _REGISTRY)
    fields = {f.name: f for f in _fields(cls)}
    for key in values:
        if key not in fields:
            raise unknown_name(f"parameter of {cls.__name__}", key, fields)
    for key, f in fields.items():
        if key not in values and f.default is f.default_factory is dataclasses.MISSING:
            raise ValueError(f"config of {cls.__name__}: got no {key!r}, expected one")
    if "parts" in values and issubclass(cls, Blocks):
        values["parts"] = tuple((from_config(part), n) for part, n in values["parts"])
    return cls(**values)


# What PyTorch calls them, beside every registered class name in any case and with or without "_".
_ALIASES = {"linear": Identity(), "swish": SiLU(), "relu6": HardTanh(low=0.0, high=6.0)}
_NAMES = "identity relu leaky_relu elu softplus sigmoid tanh hardtanh softshrink silu gelu softmax"
_MODULES: dict[type[nn.Module], Callable[[Any], Activation | None]] = {
    nn.Identity: lambda m: Identity(),
    nn.ReLU: lambda m: ReLU(),
    nn.ReLU6: lambda m: HardTanh(low=0.0, high=6.0),
    nn.LeakyReLU: lambda m: LeakyReLU(negative_slope=m.negative_slope),
    nn.ELU: lambda m: ELU(alpha=m.alpha),
    nn.Softplus: lambda m: Softplus() if m.beta == 1 and m.threshold >= 20 else None,
    nn.Sigmoid: lambda m: Sigmoid(),
    nn.Tanh: lambda m: Tanh(),
    nn.Hardtanh: lambda m: HardTanh(low=m.min_val, high=m.max_val),
    nn.Softshrink: lambda m: SoftShrink(threshold=m.lambd),
    nn.SiLU: lambda m: SiLU(),
    nn.GELU: lambda m: GELU() if m.approximate == "none" else None,
    nn.Softmax: lambda m: Softmax() if m.dim == -1 else None,
}


def get_activation(activation: "str | Activation | nn.Module") -> Activation:
    """The activation of that name, or equal to that PyTorch module, or the object itself.

    Args:
        activation: a name such as "relu" or "leaky_relu" (default parameters), an `Activation`, or
            an activation module of `torch.nn`.

    Raises:
        ValueError: unknown name, with the nearest valid one, or a module with no equal here.
        TypeError: anything else.
    """
    if isinstance(activation, Activation):
        return activation
    if isinstance(activation, nn.Module):
        phi = _MODULES.get(type(activation), lambda m: None)(activation)
        if phi is None:
            raise ValueError(
                f"activation: got the module {activation}, which equals no Activation here; "
                "write it as a subclass of implicitdl.activations.Activation"
            )
        return phi
    if not isinstance(activation, str):
        raise TypeError(
            f"activation: got {activation!r}, expected a name, an Activation instance or an "
            "activation module"
        )
    key = activation.lower().replace("_", "").replace("-", "")
    if key in _ALIASES:
        return _ALIASES[key]
    classes = {name.lower().replace("_", ""): cls for name, cls in _REGISTRY.items()}
    if key not in classes:
        own = [n for n, cls in _REGISTRY.items() if cls.__module__ != __name__]
        raise unknown_name("activation", activation, [*_NAMES.split(), *_ALIASES, *own])
    try:
        return classes[key]()
    except TypeError as error:
        raise ValueError(f"activation: {activation!r} has no default parameters: {error}") from None
