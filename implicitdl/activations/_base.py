"""What an activation declares, and the numerics that members share."""

import abc
import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

REGISTRY: dict[str, type["Activation"]] = {}
INF = math.inf
NODES, WEIGHTS = np.polynomial.legendre.leggauss(6)  # moved to [0, 1] where they are used
# B_2k / (2k + 1)!, k = 1..8: the dilogarithm in s = log(1 + e^z) <= log 2, to below 1e-16.
BERNOULLI = [1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6, -3617 / 510]
DILOG = [b / math.factorial(2 * k + 1) for k, b in enumerate(BERNOULLI, start=1)]


class Activation(abc.ABC):
    """phi, with phi = F' for a convex F wherever `monotone` is True.

    A member declares facts and a formula; nobody asks for its type. A new one needs `slope` (the
    true range of phi', not a guess: certificates rest on it) and `__call__`; `range`, `potential`
    and `conjugate` open lifted training; `derivative`, `prox` and `divergence` have defaults. It
    is registered under its class name, so that `get_activation` and `from_config` find it, unless
    it is private: a leading underscore, or `class Name(Activation, register=False)`.

    Example:
        >>> import math, torch
        >>> from dataclasses import dataclass
        >>> from implicitdl.activations import Activation, get_activation
        >>> @dataclass(frozen=True, kw_only=True)
        ... class InverseTangent(Activation):
        ...     slope = (0.0, 1.0)
        ...     range = (-math.pi / 2, math.pi / 2)
        ...     def __call__(self, z):
        ...         return torch.atan(z)
        ...     def potential(self, z):
        ...         return z * torch.atan(z) - 0.5 * torch.log1p(z * z)
        ...     def conjugate(self, x):
        ...         return -torch.log(torch.cos(x))
        >>> round(get_activation("inverse_tangent").prox(torch.tensor(1.0), 0.5).item(), 4)
        0.8535
    """

    def __init_subclass__(cls, register: bool = True, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        name = cls.__name__
        if name.startswith("_") or not register:
            return
        old = REGISTRY.get(name)
        if old is not None and old.__module__ != cls.__module__:
            raise ValueError(
                f"activation {name!r} of {cls.__module__} has the name of one in "
                f"{old.__module__}; configurations would be ambiguous: rename the new class"
            )
        REGISTRY[name] = cls

    @property
    @abc.abstractmethod
    def slope(self) -> tuple[float, float]:
        """The range of phi': tight bounds (lo, hi) of the Jacobian's eigenvalues over all z."""

    @property
    def range(self) -> tuple[float, float]:
        """The closed range of phi, entry by entry."""
        return (-INF, INF)

    @property
    def homogeneous(self) -> bool:
        """Whether phi(t z) = t phi(z) for all t >= 0."""
        return False

    @property
    def size(self) -> int | None:
        """The number of states that phi is for; None where it takes any number."""
        return None

    def blocks(self, n: int) -> "tuple[tuple[Activation, int], ...]":
        """phi on n states as (activation, number of states) of its blocks, in order."""
        return ((self, n),)

    @property
    def linear(self) -> bool:
        """Whether phi is a linear map."""
        return False

    @property
    def entrywise(self) -> bool:
        """Whether phi acts on each entry alone."""
        return True

    @property
    def isotone(self) -> bool:
        """Whether larger entries in give no smaller entries out."""
        return self.entrywise and self.slope[0] >= 0

    @property
    def symmetric(self) -> bool:
        """Whether the Jacobian is symmetric, so that `product` serves for its transpose, too."""
        return True

    @property
    def lipschitz(self) -> float:
        """The Lipschitz constant max(|lo|, |hi|)."""
        return max(map(abs, self.slope))

    @property
    def curvature(self) -> float:
        """sup |phi''|, entry by entry; infinite where phi is not smooth or nothing is known."""
        return INF

    @property
    def cheap_prox(self) -> bool:
        """Whether `prox` is a formula rather than an inner Newton iteration."""
        return False

    @property
    def infinity_lipschitz(self) -> float:
        """Lipschitz constant in the infinity norm: the largest slope where phi is entrywise; a
        block activation declares its own, since `slope` bounds only its spectral norm."""
        return self.lipschitz if self.entrywise else INF

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

    def natural(self, z: Tensor) -> Tensor:  # (m, *shape) -> (m, *shape)
        """phi on a block of states in its own shape, one sample a row."""
        return self(z)

    def natural_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what `natural` returns, one sample."""
        return shape

    def call_(self, z: Tensor) -> Tensor:
        """phi in place: overwrites z and returns it. For loops without autograd."""
        return z.copy_(self(z))

    def derivative(self, z: Tensor) -> Tensor:  # (..., n) -> (..., n)
        """phi'(z), a Clarke element at a kink: what `product` needs to apply the Jacobian."""
        # Backward mode: an entrywise phi need not have forward formulas for this.
        return torch.func.vjp(self, z)[1](torch.ones_like(z))[0]

    def derivative_at(self, x: Tensor) -> Tensor | None:  # (..., n) -> (..., n)
        """phi'(z) from x = phi(z), a formula in x; None where x does not tell it."""
        return None

    def rows(self, index: Tensor) -> "Activation":
        """phi for some of the samples: itself, unless it holds something for each of them."""
        return self

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
            ValueError: the slope range is not within [0, 1] (phi is no proximity operator), or a
                step is not positive and finite (not looked at under `torch.func` transforms and
                `torch.compile`, which hide the values of a tensor).
        """
        if not self.entrywise:
            raise self._missing("prox")
        # The bracket's ends are in the ratio t. The members here take 10 steps or 30; a staircase
        # whose slope keeps returning to 0 and 1 takes 36 or 60.
        steps = 40 if not isinstance(t, Tensor) and 0.1 <= t <= 10.0 else 80
        self._check_prox(t)
        t = torch.as_tensor(t, dtype=v.dtype, device=v.device)
        z = bracketed_newton(self, v.detach(), t.detach(), steps)
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
        names = [f.name for f in own_fields(type(self))]
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

    def _check_prox(self, t: float | Tensor) -> None:
        lo, hi = self.slope
        if lo < 0.0:
            raise self._missing("prox")
        if hi > 1.0:
            raise ValueError(
                f"prox: {self} has slope up to {hi:.6g}, expected at most 1; such a phi is not a "
                "proximity operator: scale it down or use a solver that needs no prox"
            )
        if not isinstance(t, Tensor):
            good, shown = 0.0 < t < INF, float(t)
        elif torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return  # the values are not to be seen here
        else:
            right = (t > 0) & (t < INF)
            good = bool(right.all())
            shown = 1.0 if good else float(t[~right].flatten()[0])
        if not good:
            raise ValueError(f"prox: got t={shown}, expected a positive finite step")


def own_fields(cls: type[Activation]) -> Iterable[dataclasses.Field[Any]]:
    """The parameters of an activation class."""
    return dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()


def bracketed_newton(phi: Activation, v: Tensor, t: Tensor, steps: int) -> Tensor:
    """z with t z + (1 - t) phi(z) = v, in a fixed number of steps; no autograd through it."""
    with torch.no_grad():
        # The slope lies between 1 and t, hence z between r and r / t with r = v - (1 - t) phi(0).
        r = v - (1 - t) * phi(torch.zeros_like(v))
        z, end = r / t.clamp(min=1.0), r / t.clamp(max=1.0)
        pad = 1e-3 * end.abs()  # a Newton step may land on the very end, give or take rounding
        lo, hi = torch.minimum(z, end) - pad, torch.maximum(z, end) + pad
        last = torch.full_like(r, INF)
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


def kl(p: Tensor, p_less_1: Tensor, log_q: Tensor) -> Tensor:
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


def softplus(z: Tensor) -> Tensor:
    """log(1 + e^z), without overflow."""
    return F.softplus(z, threshold=40.0)  # the default, 20, is 2e-9 off in float64


def on_range(phi: Activation, x: Tensor, value: Callable[[Tensor], Tensor]) -> Tensor:
    """value(x) on the closed range of phi, +inf elsewhere."""
    lo, hi = phi.range
    inside = x if (lo, hi) == (-INF, INF) else x.clamp(lo, hi)
    return value(inside).masked_fill((x < lo) | (x > hi), INF)


def halves(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence of the part of phi that is the identity on z > 0, and min(x, 0), min(z, 0).

    z_- is written z_+ - z so that at z = 0 the two one-sided derivatives add up to one.
    """
    zp, xp = torch.relu(z), torch.relu(x)
    zn, xn = z - zp, x - xp
    return 0.5 * (zp - xp) ** 2 - xp * zn - xn * zp, xn, zn


def require_finite(phi: Activation, name: str, positive: bool = False) -> None:
    """Refuse a parameter that is infinite, NaN or, where asked, not positive."""
    value = getattr(phi, name)
    if not math.isfinite(value) or (positive and value <= 0):
        kind = "positive finite" if positive else "finite"
        raise ValueError(f"{type(phi).__name__}: got {name}={value}, expected a {kind} number")
