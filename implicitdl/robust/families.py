"""How far a random number can be from its mean: kappa, for one family of laws a class.

For d = mean + L w with w of mean 0 and covariance I, and any x, the number d'x has mean mean'x and
standard deviation ||L'x||; kappa(eps) is the least number with

    Prob{d'x <= mean'x + kappa ||L'x||} >= 1 - eps        for every law of the family.

Then Prob{d'x <= b} >= 1 - eps where mean'x + kappa ||L'x|| <= b: a second-order cone, for eps <= 1/2.

Reference:
    Calafiore, El Ghaoui (2006), "On distributionally robust chance-constrained linear programs".
"""

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Family(abc.ABC):
    """Laws of w in R^r."""

    @abc.abstractmethod
    def kappa(self, eps: Tensor, r: int) -> Tensor:
        """The number of standard deviations to keep, differentiable in eps.

        Args:
            eps: in (0, 1/2].
            r: the dimension of w.
        """

    @abc.abstractmethod
    def draw(
        self, n: int, direction: Tensor, eps: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """n draws of w from a law of the family; the worst one for the direction, where one is known.

        Args:
            n: how many.
            direction: of length 1; Prob{direction'w > kappa} is what matters.  # (..., r)
            eps: # broadcasts against (...)
            generator: of the random numbers.

        Returns:
            # (n, ..., r)
        """


@dataclass(frozen=True)
class Gaussian(Family):
    """Normal laws: kappa = Phi^-1(1 - eps)."""

    def kappa(self, eps: Tensor, r: int) -> Tensor:
        return -torch.special.ndtri(eps)

    def draw(
        self, n: int, direction: Tensor, eps: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        return _normal(n, direction, generator)


@dataclass(frozen=True)
class AnyLaw(Family):
    """All laws of this mean and covariance: kappa = sqrt((1 - eps) / eps).

    By the one-sided Chebyshev (Cantelli) inequality; a law of two points attains it.
    """

    def kappa(self, eps: Tensor, r: int) -> Tensor:
        return ((1 - eps) / eps).sqrt()

    def draw(
        self, n: int, direction: Tensor, eps: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        # kappa with probability eps, else -1 / kappa: mean 0 and variance 1.
        a = (eps / (1 - eps)).sqrt()
        high = _uniform(n, direction, generator) < eps
        return _along(torch.where(high, 1 / a, -a), direction, n, generator)


@dataclass(frozen=True)
class Symmetric(Family):
    """All laws of this mean and covariance that are symmetric about the mean: sqrt(1 / (2 eps)).

    Prob{|s| >= k} <= 1 / k^2 (Chebyshev), half of it on either side; a law of three points attains
    it. (At eps = 1/2 a symmetric number is above its mean with at most this probability, and 0 would
    do; the formula is what the bound gives.)
    """

    def kappa(self, eps: Tensor, r: int) -> Tensor:
        return (0.5 / eps).sqrt()

    def draw(
        self, n: int, direction: Tensor, eps: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        u, k = _uniform(n, direction, generator), (0.5 / eps).sqrt()
        s = torch.where(u < eps, k, torch.where(u < 2 * eps, -k, torch.zeros_like(k)))
        return _along(s, direction, n, generator)


@dataclass(frozen=True)
class SymmetricUnimodal(Family):
    """Laws of this mean and covariance whose numbers d'x are symmetric with one mode, at the mean.

    kappa = sqrt(2 / (9 eps)) for eps <= 1/6, and sqrt(3) (1 - 2 eps) above: Gauss's inequality
    Prob{|s| >= k} <= 4 / (9 k^2) for k >= 2 / sqrt(3), and 1 - k / sqrt(3) below, half of it on either
    side. All elliptical laws with a density that falls from the mean are of this kind.
    """

    def kappa(self, eps: Tensor, r: int) -> Tensor:
        low = eps <= 1 / 6
        safe = torch.where(low, eps, torch.full_like(eps, 1 / 6))
        return torch.where(low, (2 / (9 * safe)).sqrt(), math.sqrt(3) * (1 - 2 * eps))

    def draw(
        self, n: int, direction: Tensor, eps: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        # With probability p uniform on [-c, c], else 0, of variance p c^2 / 3 = 1: then
        # Prob{s >= k} = p (1 - k / c) / 2, the most at c = 3 k / 2, where p = 4 / (3 k^2) = 6 eps.
        p = (6 * eps).clamp(max=1.0)
        c = (3 / p).sqrt()
        on = _uniform(n, direction, generator) < p
        s = torch.where(on, c * (2 * _uniform(n, direction, generator) - 1), 0.0)
        return _along(s, direction, n, generator)


@dataclass(frozen=True)
class UniformEllipsoid(Family):
    """Uniform on an ellipsoid of R^r of this mean and covariance.

    kappa = sqrt(r + 2) sqrt(B), B the (1 - 2 eps)-quantile of the beta law of (1/2, (r + 1)/2): w is
    uniform on the ball of radius sqrt(r + 2), and (w_1 / radius)^2 has that law.
    """

    def kappa(self, eps: Tensor, r: int) -> Tensor:
        return math.sqrt(r + 2) * _beta_root(eps, r)

    def draw(
        self, n: int, direction: Tensor, eps: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        return math.sqrt(direction.shape[-1] + 2) * _in_ball(n, direction, generator)


@dataclass(frozen=True)
class RadiallyDecreasing(Family):
    """Laws on an ellipsoid whose density is radial and does not rise from the centre outwards.

    Here L is a factor of the ellipsoid itself, {mean + L w : ||w|| <= 1}, not of the covariance. Such
    a law is a mixture of uniform laws on balls of radius at most 1, and Prob{w_1 > t} of these rises
    with the radius: the uniform law on the whole ellipsoid is the worst. kappa = sqrt(B) with B as in
    `UniformEllipsoid`.
    """

    def kappa(self, eps: Tensor, r: int) -> Tensor:
        return _beta_root(eps, r)

    def draw(
        self, n: int, direction: Tensor, eps: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        return _in_ball(n, direction, generator)


@dataclass(frozen=True)
class StudentT(Family):
    """Multivariate t laws with this covariance: heavy tails.

    Args:
        freedom: degrees of freedom, > 2 so that there is a covariance.
    """

    freedom: float

    def __post_init__(self) -> None:
        if not 2 < self.freedom < math.inf:
            raise ValueError(f"freedom: got {self.freedom}, expected a finite number > 2.")

    def kappa(self, eps: Tensor, r: int) -> Tensor:
        from scipy.special import stdtrit

        nu = self.freedom
        level = math.lgamma((nu + 1) / 2) - math.lgamma(nu / 2) - 0.5 * math.log(nu * math.pi)

        def density(t: Tensor) -> Tensor:
            return (level - (nu + 1) / 2 * torch.log1p(t * t / nu)).exp()

        t = quantile(1 - eps, lambda p: stdtrit(nu, p), density)
        return math.sqrt((nu - 2) / nu) * t

    def draw(
        self, n: int, direction: Tensor, eps: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        w = _normal(n, direction, generator)
        # Chi-square by its quantile function: torch's gamma sampler takes no generator.
        from scipy.special import gammaincinv

        u = _uniform(n, direction, generator)
        chi = 2 * _numpy(lambda p: gammaincinv(self.freedom / 2, p), u)
        return w * ((self.freedom - 2) / chi)[..., None].sqrt()


@dataclass(frozen=True)
class Radial(Family):
    """d = mean + L w, w of a law without direction: kappa is the quantile of one coordinate of w.

    L'x has w turned to it, so d'x - mean'x = ||L'x|| w_1. L is a factor of the covariance where w has
    covariance I, and any scale that `marginal` is relative to else.

    Args:
        marginal: the quantile function of w_1, of a tensor of probabilities >= 1/2; differentiable
            in torch where eps is to be learned.
        sampler: (n, r, generator) -> w (n, r), for simulation.
    """

    marginal: Callable[[Tensor], Tensor]
    sampler: "Callable[[int, int, torch.Generator | None], Tensor] | None" = None

    def kappa(self, eps: Tensor, r: int) -> Tensor:
        return self.marginal(1 - eps)

    def draw(
        self, n: int, direction: Tensor, eps: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        if self.sampler is None:
            raise ValueError("Radial: got no `sampler`, expected one for a simulation.")
        lead, r = direction.shape[:-1], direction.shape[-1]
        w = self.sampler(n * math.prod(lead), r, generator).to(direction)
        return w.reshape(n, *lead, r)


@dataclass(frozen=True)
class Bounded(Family):
    """Independent entries in known intervals: kappa = sqrt(2 ln(1/eps)) with L = diag(half widths).

    d_j = mean_j + L_jj w_j with w_j independent, of mean 0 and in [-1, 1] (of any law there, or any
    interval of length 2): Hoeffding's inequality. In terms of whole widths, sqrt(ln(1/eps) / 2).
    Safe, not tight.
    """

    def kappa(self, eps: Tensor, r: int) -> Tensor:
        return (-2 * eps.log()).sqrt()

    def draw(
        self, n: int, direction: Tensor, eps: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        shape = (n, *direction.shape)
        u = torch.rand(shape, generator=generator, dtype=direction.dtype, device=direction.device)
        return torch.where(u < 0.5, -torch.ones_like(u), torch.ones_like(u))


class _Quantile(torch.autograd.Function):
    """F^-1(p), with derivative 1 / f(F^-1(p)) to every order that f has."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, inverse: Any, density: Any) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(p)
        ctx.functions = inverse, density
        return _numpy(inverse, p)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        (p,) = ctx.saved_tensors
        inverse, density = ctx.functions
        return g / density(_Quantile.apply(p, inverse, density)), None, None


def quantile(
    p: Tensor, inverse: Callable[[Any], Any], density: Callable[[Tensor], Tensor]
) -> Tensor:
    """F^-1(p), differentiable.

    Args:
        p: probabilities.
        inverse: F^-1 on numpy arrays.
        density: F' in torch.
    """
    return _Quantile.apply(p, inverse, density)  # type: ignore[no-any-return]


def _beta_root(eps: Tensor, r: int) -> Tensor:
    """The (1 - eps)-quantile of one coordinate of a uniform point of the unit ball of R^r."""
    from scipy.special import betaincinv

    # Its density is proportional to (1 - t^2)^((r - 1) / 2).
    level = math.lgamma(r / 2 + 1) - math.lgamma((r + 1) / 2) - 0.5 * math.log(math.pi)

    def density(t: Tensor) -> Tensor:
        return math.exp(level) * (1 - t * t).pow((r - 1) / 2)

    return quantile(
        1 - eps, lambda p: betaincinv(0.5, (r + 1) / 2, (2 * p - 1).clip(0, 1)) ** 0.5, density
    )


def _numpy(function: Callable[[Any], Any], t: Tensor) -> Tensor:
    return torch.as_tensor(function(t.detach().cpu().double().numpy())).to(t)


def _normal(n: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn((n, *like.shape), generator=generator, dtype=like.dtype, device=like.device)


def _uniform(n: int, direction: Tensor, generator: torch.Generator | None) -> Tensor:
    """# (n, ...), one for each direction"""
    shape = (n, *direction.shape[:-1])
    return torch.rand(shape, generator=generator, dtype=direction.dtype, device=direction.device)


def _along(s: Tensor, direction: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    """w of covariance I with direction'w = s."""
    w = _normal(n, direction, generator)
    return w + (s - (w * direction).sum(-1))[..., None] * direction


def _in_ball(n: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    w = _normal(n, like, generator)
    u = _uniform(n, like, generator).pow(1 / like.shape[-1])
    return w / torch.linalg.vector_norm(w, dim=-1, keepdim=True) * u[..., None]
